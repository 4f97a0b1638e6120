"""Rotary positions, l2norm, SwiGLU and token shift: eager, torch.compile, fla, Liger, and the copy floor.

    python benchmarks/small_ops.py               # on a CUDA device, bfloat16
    python benchmarks/small_ops.py --device cpu  # smaller, float32, without the peers
    python benchmarks/small_ops.py --only shift  # what has "shift" in its name

These are elementwise, or sums over short rows, and Inductor writes a kernel for each. A kernel of our own is worth
having only where torch.compile loses clearly to a peer, or to the floor: "to floor" is the ratio of forward and
backward, on a GPU of their kernels alone, to a copy of the bytes that must move.

Token shift is measured alone and with the mixing that follows it in RWKV: x + mu (x_{t-1} - x_t) for one, five (RWKV6)
or six (RWKV7) vectors mu, whose gradients are sums over all steps.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import save, table
from timing import floors, measure, peer
from torch import Tensor

SIZES = {"cuda": (8, 2048, 32, 128), "cpu": (2, 256, 4, 64)}  # B, T, H, D
LINEAR = "rotary", "token shift,"  # how the names begin of those whose backward does not read the operand
MIXES = 1, 5, 6
Results = Tensor | tuple[Tensor, ...]
Operation = tuple[Callable[..., Results], dict[str, Callable[..., Results]], list[Tensor]]


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, D], turned in two halves by angles [T, D / 2]."""
    a, b = x.float().chunk(2, -1)
    c, s = cos[:, None].float(), sin[:, None].float()
    return torch.cat([a * c - b * s, a * s + b * c], -1).to(x.dtype)


def l2norm(x: Tensor) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    return F.silu(a) * b


def token_shift(x: Tensor) -> Tensor:
    """x_{t-1} - x_t, with zero before the first; x [B, T, D]."""
    return F.pad(x, (0, 0, 1, -1)) - x


def mixed(x: Tensor, *mus: Tensor, shift: Callable[[Tensor], Tensor] = token_shift) -> tuple[Tensor, ...]:
    """x + mu (x_{t-1} - x_t) for each mu [D]."""
    delta = shift(x)
    return tuple(x + delta * mu for mu in mus)


def operations(device: str) -> dict[str, Operation]:
    """By name: the program, its peers, the operands that need gradients."""
    B, T, H, D = SIZES[device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    angle = torch.arange(T, device=device)[:, None] * 10000.0 ** -(torch.arange(0, D, 2, device=device) / D)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    peers: dict[str, dict[str, Callable[..., Results]]] = {"rotary": {}, "l2norm": {}, "swiglu": {}}
    theirs = {
        "rotary": peer("fla.modules.rotary", "rotary_embedding"),
        "l2norm": peer("fla.modules.norm.l2norm", "l2norm"),
        "swiglu": peer("fla.modules.activations", "swiglu"),
    }
    for name, f in theirs.items():
        if f is not None:
            peers[name]["fla"] = (lambda x, f=f: f(x, cos, sin)) if name == "rotary" else f
    liger = peer("liger_kernel.transformers.functional", "liger_swiglu")
    if liger is not None:
        peers["swiglu"]["Liger"] = liger
    rope = peer("liger_kernel.transformers.functional", "liger_rope")
    if rope is not None:
        # It turns q and k [B, H, T, D] at once, in place: here two halves of the heads.
        both_cos, both_sin = (torch.cat([y, y], -1)[None] for y in (cos, sin))

        def liger_rotary(x: Tensor) -> Tensor:
            q, k = (y.clone() for y in x.transpose(1, 2).chunk(2, 1))
            return torch.cat(rope(q, k, both_cos, both_sin), 1).transpose(1, 2)

        peers["rotary"]["Liger, with copies"] = liger_rotary
    return {
        "rotary": (lambda x: rotary(x, cos, sin), peers["rotary"], [random(B, T, H, D)]),
        "l2norm": (l2norm, peers["l2norm"], [random(B, T, H, D)]),
        "swiglu": (swiglu, peers["swiglu"], [random(B * T, H * D), random(B * T, H * D)]),
        **{name: found for width in (H * D, H * D // 4) for name, found in shifts(B, T, width, random).items()},
    }


def shifts(B: int, T: int, D: int, random: Callable[..., Tensor]) -> dict[str, Operation]:
    shift = peer("fla.modules.token_shift", "token_shift")
    fused = peer("fla.ops.rwkv7.fused_addcmul", "fused_addcmul_rwkv7")
    found: dict[str, Operation] = {
        f"token shift, D={D}": (token_shift, {} if shift is None else {"fla": shift}, [random(B, T, D)])
    }
    for count in MIXES:
        peers: dict[str, Callable[..., Results]] = {}
        if shift is not None:
            peers["fla, its shift alone"] = lambda x, *mus: mixed(x, *mus, shift=shift)
        if shift is not None and fused is not None and count == 6:
            peers["fla"] = lambda x, *mus: fused(x, shift(x), *(mu.view(1, 1, -1) for mu in mus))
        found[f"token shift and {count}, D={D}"] = mixed, peers, [random(B, T, D), *(random(D) for _ in range(count))]
    return found


def as_list(results: Results) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def difference(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest of the results' relative differences."""
    return max(((a - b).float().norm() / b.float().norm()).item() for a, b in zip(got, want, strict=True))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    p.add_argument("--no-eager", action="store_true", help="torch.compile and the peers alone")
    p.add_argument("--only", default="", help="operations with this in their name")
    args = p.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("a CUDA device is needed, and torch sees none; --device cpu runs on the CPU")
    rows: list[dict[str, Any]] = []
    for name, (program, peers, leaves) in operations(args.device).items():
        if args.only not in name:
            continue
        torch._dynamo.reset()
        with torch.no_grad():
            out = as_list(program(*leaves))
        douts, least = [torch.randn_like(y) for y in out], floors(leaves, out, keeps=not name.startswith(LINEAR))
        compiled = torch.compile(program, fullgraph=True, dynamic=False)
        for what, f in {"eager": program, "torch.compile": compiled, **peers}.items():
            if (args.device == "cpu" and what in peers) or (args.no_eager and what == "eager"):
                continue
            row = {"op": name, "what": what, **measure(f, leaves, douts), **least}
            if "fwd+bwd ms" in row:
                row["to floor"] = row.get("kernels ms", row["fwd+bwd ms"]) / row["floor fwd+bwd"]
                with torch.no_grad():
                    row["difference"] = difference(as_list(f(*leaves)), out)
            rows.append(row)
            print(row, flush=True)
            save("small_ops", args.device, f"{args.device} {args.only}".strip(), rows, vars(args))
    print(table(rows))


if __name__ == "__main__":
    main()

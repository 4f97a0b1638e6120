"""RMSNorm times SiLU of a gate, alone and in front of a linear layer: ours, torch.compile, eager, fla, Liger's norm.

    python benchmarks/norm_gate.py               # the shapes of peers.md on a CUDA device, bfloat16
    python benchmarks/norm_gate.py --device cpu  # smaller ones on the CPU, float32
    python benchmarks/norm_gate.py --sweep       # ours alone, over launch configurations

"ours" is the operator; "ours compiled" the program as a user writes it under backend="fla"; "torch.compile" the same
under Inductor. Milliseconds are medians; "kept" is what forward leaves for backward beside the operands and the result.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import save, table
from timing import floors, measure, milliseconds, peer
from torch import Tensor

from fla_compile.ops import norm_gate, norm_gate_linear

SHAPES = {"cuda": [(524288, 128), (16384, 2048), (65536, 512)], "cpu": [(8192, 64), (2048, 512)]}
EPS = 1e-5


def program(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS) * F.silu(gate)


def program_linear(x: Tensor, gate: Tensor, weight: Tensor, linear: Tensor) -> Tensor:
    return F.linear(program(x, gate, weight), linear)


def candidates(linear: bool) -> dict[str, Callable[..., Tensor]]:
    """By name; every one takes x, gate, weight and, with `linear`, its weight."""
    run = program_linear if linear else program
    found: dict[str, Callable[..., Tensor]] = {
        "ours": (lambda x, g, w, p: norm_gate_linear(x, g, w, None, p, eps=EPS))
        if linear
        else (lambda x, g, w: norm_gate(x, g, w, eps=EPS)),
        "ours compiled": torch.compile(run, backend="fla", fullgraph=True, dynamic=False),
        "torch.compile": torch.compile(run, fullgraph=True, dynamic=False),
        "eager": run,
    }
    name = "rms_norm_swish_gate_linear" if linear else "rms_norm_gated"
    fla = peer("fla.modules.norm.fused_norm_gate", name)
    if fla is not None:
        found["fla"] = (
            (lambda x, g, w, p: fla(x, g, w, None, p, None, eps=EPS))
            if linear
            else (lambda x, g, w: fla(x, g, w, None, eps=EPS))
        )
    liger = peer("liger_kernel.transformers.functional", "liger_rms_norm")
    if liger is not None and not linear:
        found["Liger's norm, eager gate"] = lambda x, g, w: liger(x, w, EPS, in_place=False) * F.silu(g)
    return found


def operands(shape: tuple[int, int], device: str, linear: bool) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x, gate, dout = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    leaves = [x, gate, torch.ones(shape[1], device=device, dtype=dtype)]
    if linear:
        leaves.append(torch.randn(shape[1], shape[1], device=device, dtype=dtype) * shape[1] ** -0.5)
    return [y.requires_grad_() for y in leaves], dout


def compare(device: str, linear: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for shape in SHAPES[device]:
        leaves, dout = operands(shape, device, linear)
        if linear and shape[1] < 512:
            continue
        torch._dynamo.reset()
        for name, f in candidates(linear).items():
            row = {"rows x width": "x".join(map(str, shape)), "what": name, **measure(f, leaves, dout)}
            rows.append(row if linear else {**row, **floors(leaves[:2], dout)})
            print(rows[-1], flush=True)
    return rows


def sweep() -> list[dict[str, Any]]:
    """Milliseconds of the two kernels of each shape, by configuration."""
    from fla_compile.kernels import norm_gate_triton
    from fla_compile.kernels.norm_gate_configs import Config
    from fla_compile.kernels.norm_gate_forms import Form

    rows: list[dict[str, Any]] = []
    for shape in SHAPES["cuda"][:2]:
        leaves, dy = operands(shape, "cuda", False)
        x, gate, weight = (y.detach() for y in leaves)
        form, operand = Form(shape[1], EPS, False, True, False), (x, gate, weight, None)
        _, rstd, _ = norm_gate_triton.launch_forward(*operand, form, x.dtype)
        forward = partial(norm_gate_triton.launch_forward, *operand, form, x.dtype)
        backward = partial(norm_gate_triton.launch_backward, *operand, rstd, None, dy, form, None)
        for tile in (4, 8, 16, 32) if shape[1] == 128 else (1, 2):
            for warps in (2, 4, 8):
                row: dict[str, Any] = {"rows x width": "x".join(map(str, shape)), "rows": tile, "warps": warps}
                row["fwd ms"] = milliseconds(partial(forward, Config(tile, warps, tile, warps, 1)), "cuda")
                for programs in (2, 4, 8, 16):
                    config = Config(tile, warps, tile, warps, programs)
                    row[f"bwd ms, {programs} a multiprocessor"] = milliseconds(partial(backward, config), "cuda")
                rows.append(row)
                print(row, flush=True)
    return rows


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    p.add_argument("--sweep", action="store_true", help="ours alone, over launch configurations")
    args = p.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("a CUDA device is needed, and torch sees none; --device cpu runs on the CPU")
    if args.sweep:
        rows = sweep()
        save("norm_gate", "cuda", "sweep", rows, vars(args))
        print(table(rows))
        return
    for section, linear in (("norm gate", False), ("norm gate, linear", True)):
        rows = compare(args.device, linear)
        save("norm_gate", args.device, f"{section}, {args.device}", rows, vars(args))
        print(table(rows))


if __name__ == "__main__":
    main()

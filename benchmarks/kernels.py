"""Each op beside flash-linear-attention's, on one CUDA device: forward, and forward with backward.

    python benchmarks/kernels.py                # three shapes, with fla if it is installed
    python benchmarks/kernels.py --quick --no-peer

Medians of `triton.testing.do_bench`, in milliseconds; operands bfloat16, gates float32. "floor" is the bytes that must
move once (inputs read and outputs written; backward reads the inputs and the output's gradient and writes the inputs'
gradients) at 3.0 TB/s, an H100's measured copy. "first call" compiles; fla's autotunes as well. Ours is measured at
every shape, and the file written, before the first of fla's is begun.
"""

import argparse
import importlib
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import save, table
from torch import Tensor

import fla_compile.ops

SHAPES = [(8, 2048, 32, 128), (8, 4096, 16, 64), (1, 16384, 8, 128)]  # B, T, H, K = V
PEERS = {
    "linear_attention": ("fla.ops.linear_attn", "chunk_linear_attn", {"normalize": False}),
    "retention": ("fla.ops.retention", "chunk_retention", {}),
    "simple_gla": ("fla.ops.simple_gla", "chunk_simple_gla", {}),
    "gla": ("fla.ops.gla", "chunk_gla", {}),
}
BYTES_PER_MS = 3.0e9


def operands(op: str, shape: tuple[int, int, int, int]) -> list[Tensor]:
    """q, k, v and, where `op` takes one, its log decay; retention decays as RetNet does, in both libraries."""
    B, T, H, D = shape
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    gates = {"simple_gla": (B, T, H), "gla": (B, T, H, D)}
    gate = [F.logsigmoid(torch.randn(gates[op], device="cuda")) / 16] if op in gates else []
    return [x.requires_grad_() for x in (q, F.normalize(k.float(), dim=-1).bfloat16(), v, *gate)]


def floors(inputs: list[Tensor], o: Tensor) -> tuple[float, float]:
    """Milliseconds that forward, and forward with backward, cannot go below."""
    read, written = sum(x.numel() * x.element_size() for x in inputs), o.numel() * o.element_size()
    return (read + written) / BYTES_PER_MS, (3 * read + 2 * written) / BYTES_PER_MS


def measure(f: Callable, inputs: list[Tensor]) -> dict[str, Any]:
    """First-call seconds and median milliseconds, or the message of what `f` raised."""
    from triton.testing import do_bench

    results: dict[str, Any] = {}

    def both() -> None:
        o = f(*inputs)[0]
        torch.autograd.grad(o, inputs, do)

    try:
        torch.cuda.synchronize()
        start = time.perf_counter()
        do = torch.randn_like(f(*inputs)[0])
        torch.cuda.synchronize()
        results["fwd first s"] = time.perf_counter() - start
        with torch.no_grad():
            results["fwd ms"] = do_bench(lambda: f(*inputs), return_mode="median")
        start = time.perf_counter()
        both()
        torch.cuda.synchronize()
        results["fwd+bwd first s"] = time.perf_counter() - start
        results["fwd+bwd ms"] = do_bench(both, return_mode="median")
    except Exception as error:  # a peer's refusal is a result
        results["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
    return results


def compare(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.float() - theirs.float()).norm() / ours.float().norm()).item()


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--ops", nargs="+", choices=list(PEERS), default=list(PEERS), help="which ops")
    p.add_argument("--quick", action="store_true", help="the first shape only")
    p.add_argument("--no-peer", action="store_true", help="ours alone")
    p.add_argument("--peer-limit", type=float, default=400.0, help="seconds after which no other op of fla's is begun")
    args = p.parse_args()
    if not torch.cuda.is_available():
        p.error("a CUDA device is needed, and torch sees none")

    rows: list[dict[str, Any]] = []
    cases = [(op, shape) for shape in SHAPES[: 1 if args.quick else None] for op in args.ops]

    def report() -> None:
        save("kernels", "cuda", "decayed outer product", rows, vars(args))

    for op, shape in cases:
        inputs, f = operands(op, shape), getattr(fla_compile.ops, op)
        forward, both = floors(inputs, inputs[2])
        ours = measure(f, inputs)
        rows.append(
            {"op": op, "B,T,H,D": ",".join(map(str, shape)), "floor fwd": forward, "floor fwd+bwd": both, **ours}
        )
        print(rows[-1], flush=True)
        report()

    start = time.perf_counter()
    for row, (op, shape) in zip(rows, cases, strict=True):
        if args.no_peer or time.perf_counter() - start > args.peer_limit:
            continue
        module, name, options = PEERS[op]
        try:
            peer = getattr(importlib.import_module(module), name)
        except ImportError as error:
            print(f"no peer: {error}")
            break
        inputs = operands(op, shape)
        theirs = measure(lambda *x, peer=peer, options=options: peer(*x, **options), inputs)
        row.update({f"fla {key}": value for key, value in theirs.items()})
        for part in ("fwd", "fwd+bwd"):
            if f"{part} ms" in row and f"fla {part} ms" in row:
                row[f"{part} faster by"] = row[f"fla {part} ms"] / row[f"{part} ms"]
        if "fla fwd ms" in row and "fwd ms" in row:
            with torch.no_grad():
                row["relative difference"] = compare(
                    getattr(fla_compile.ops, op)(*inputs)[0], peer(*inputs, **options)[0]
                )
        print(row, flush=True)
        report()
    print(table(rows))


if __name__ == "__main__":
    main()

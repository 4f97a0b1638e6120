"""How far an op and its gradients are from the definition in float64, ours beside flash-linear-attention's.

    python benchmarks/errors.py              # on a CUDA device, bfloat16, gates float32
    python benchmarks/errors.py --ops gla --shape 1 512 32 128 --no-autotune   # fla's in their first configuration

The definition (`fla_compile.ops.naive_*`) gets the same rounded operands. "error" is the Euclidean norm of the
difference over that of the truth, tensor by tensor; "fla / ours" above 1 says that ours is nearer.
"""

import argparse
from typing import Any

import torch
from common import save, skip_autotuning, table
from decayed import FLA, decayed, operands
from torch import Tensor

import fla_compile.ops

NAMES = ("o", "dq", "dk", "dv", "dg", "du")


def differentiated(f: Any, inputs: list[Tensor], do: Tensor) -> list[Tensor]:
    o = f(*inputs)[0]
    return [o.detach(), *torch.autograd.grad(o, inputs, do)]


def errors(found: list[Tensor], truth: list[Tensor]) -> dict[str, float]:
    return {name: ((x.double() - y).norm() / y.norm()).item() for name, x, y in zip(NAMES, found, truth, strict=False)}


def compare(op: str, shape: tuple[int, int, int, int], device: str) -> list[dict[str, Any]]:
    inputs = operands(op, shape, device)
    do = torch.randn_like(inputs[2])
    wide = [x.detach().double().requires_grad_() for x in inputs]
    truth = differentiated(getattr(fla_compile.ops, f"naive_{op}"), wide, do.double())
    ours = errors(differentiated(decayed("ours", op), inputs, do), truth)
    theirs: dict[str, float] = {}
    refusal = None
    f = decayed("fla", op)
    if f is not None and device == "cuda":
        with torch.no_grad():
            theirs = errors([f(*inputs)[0]], truth[:1])
        try:
            theirs |= errors(differentiated(f, inputs, do), truth)
        except Exception as error:  # a refusal is a result
            refusal = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]
    rows = []
    for name, error in ours.items():
        row: dict[str, Any] = {"op": op, "B,T,H,D": ",".join(map(str, shape)), "tensor": name, "ours": error}
        if name in theirs:
            row |= {"fla": theirs[name], "fla / ours": theirs[name] / error}
        elif refusal is not None:
            row["fla refused"] = refusal
        rows.append(row)
    return rows


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--ops", nargs="+", choices=list(FLA), default=list(FLA))
    p.add_argument("--shape", nargs=4, type=int, default=(1, 1024, 32, 128), metavar=("B", "T", "H", "D"))
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    p.add_argument("--no-autotune", action="store_true", help="fla's kernels in their first configuration that runs")
    p.add_argument("--results", default="errors", help="the file's name")
    args = p.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("a CUDA device is needed, and torch sees none; --device cpu runs on the CPU, ours alone")
    if args.no_autotune:
        skip_autotuning()
    B, T, H, D = args.shape
    rows: list[dict[str, Any]] = []
    for op in args.ops:
        first = len(rows)
        rows += compare(op, (B, T, H, D), args.device)
        print(table(rows[first:]), flush=True)
        save(args.results, args.device, "errors beside fla", rows, vars(args))


if __name__ == "__main__":
    main()

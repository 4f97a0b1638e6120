"""Packed sequences of many lengths: in one launch as they lie, gathered into batches, by fla, and one sequence as long.

    python benchmarks/packed.py               # on a CUDA device, bfloat16
    python benchmarks/packed.py --device cpu  # smaller, float32, without fla

Lengths are drawn evenly from 1 to a fourth of all steps, the last cut off, with a fixed seed. "unpacked" is the same
operator on one sequence of all steps (B=1): what packing could cost at least, but for the states of each sequence. ms
are medians, launches from Python included; the boundaries lie on the CPU for ours and on the device for fla. "floor" is
the bytes that must move at 3.0 TB/s. Of `simple_gla` the backward is gathered, since its gate has a gradient.
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from common import save, table
from decayed import decayed, operands
from timing import floors, measure
from torch import Tensor

import fla_compile.ops
from fla_compile.kernels import decay_ops

SIZES = {"cuda": (65536, 16, 128), "cpu": (512, 2, 16)}  # T, H, D
OPS = ("linear_attention", "simple_gla", "gla")


def lengths(T: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    found: list[int] = []
    while sum(found) < T:
        drawn = int(torch.randint(1, T // 4 + 1, (), generator=generator))
        found.append(min(drawn, T - sum(found)))
    return found


def gathering() -> AbstractContextManager[Any]:
    """The operators as they run where no kernel takes packed sequences as they lie."""
    return mock.patch.object(decay_ops, "packed_kernels_for", return_value=None)


def programs(op: str, cu_seqlens: Tensor, device: str) -> dict[str, Callable[..., Tensor]]:
    ours = getattr(fla_compile.ops, op)

    def packed(*x: Tensor) -> Tensor:
        return ours(*x, cu_seqlens=cu_seqlens)[0]

    found: dict[str, Callable[..., Tensor]] = {"packed": packed, "gathered": packed, "unpacked": lambda *x: ours(*x)[0]}
    theirs = decayed("fla", op) if device == "cuda" else None
    if theirs is not None:
        on_device = cu_seqlens.to(device)
        found["fla"] = lambda *x: theirs(*x, cu_seqlens=on_device)[0]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where")
    p.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS), help="which ops")
    p.add_argument("--results", default="packed", help="the file's name")
    args = p.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("a CUDA device is needed, and torch sees none; --device cpu runs on the CPU")
    sizes = lengths(SIZES[args.device][0])
    cu_seqlens = torch.tensor([0, *sizes]).cumsum(0)
    rows: list[dict[str, Any]] = []
    for op in args.ops:
        T, H, D = SIZES[args.device]
        leaves = operands(op, (1, T, H, D), args.device)
        dout, least = torch.randn_like(leaves[2]), floors(leaves, leaves[2])
        for who, f in programs(op, cu_seqlens, args.device).items():
            with gathering() if who == "gathered" else nullcontext():
                rows.append({"op": op, "who": who, **least, **measure(f, leaves, dout)})
            print(rows[-1], flush=True)
            save(args.results, args.device, "packed sequences", rows, vars(args) | {"lengths": sizes})
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

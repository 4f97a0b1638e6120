"""The short convolution on one CUDA device: ours beside flash-linear-attention's, nn.Conv1d and torch.compile.

    python benchmarks/short_conv.py
    python benchmarks/short_conv.py --quick --configs      # one shape; every shape of our kernels' tiles

x [B, T, D] in bfloat16, W taps, a bias, SiLU. Medians of `triton.testing.do_bench` in milliseconds; "kernels ms" is
what the GPU takes for forward and backward without the launches it may wait for. "floor" is the bytes that must move
once (forward: x read, y written; backward: x and dy read, dx written) at 3.0 TB/s, an H100's measured copy, "to floor"
the ratio of the kernels to it. At the first shape also what is compiled: "compiled taps" is the sum of W products,
which Inductor makes one kernel of, "fla backend" a program with conv1d, recognised.
"""

import argparse
import importlib
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from common import save, table
from timing import BYTES_PER_MS, measure
from torch import Tensor, nn

from fla_compile.kernels import short_conv_triton
from fla_compile.ops import short_conv

SHAPES = [(8, 2048, 4096, 4), (2, 16384, 1024, 4), (1, 2048, 4096, 4), (8, 2048, 4096, 8)]  # B, T, D, W
PEER = "fla.modules.causal_conv1d", "fla.modules.convolution"


def peer() -> Callable | None:
    """fla's convolution, wherever this version has it; None if it is not installed."""
    for name in PEER:
        try:
            return importlib.import_module(name).causal_conv1d
        except (ImportError, AttributeError):
            continue
    return None


def programs(W: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    def conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = F.conv1d(x.mT, weight[:, None], bias, padding=W - 1, groups=x.shape[-1])
        return F.silu(z[..., : x.shape[1]]).mT

    def taps(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        padded, T = F.pad(x, (0, 0, W - 1, 0)), x.shape[1]
        z = sum(padded[:, j : j + T].float() * weight[:, j] for j in range(W)) + bias
        return F.silu(z).to(x.dtype)

    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "ours": lambda x, weight, bias: short_conv(x, weight, bias, activation="silu")[0],
        "fla backend": torch.compile(conv1d, backend="fla", fullgraph=True),
        "eager conv1d": conv1d,
        "compiled conv1d": torch.compile(conv1d, fullgraph=True),
        "compiled taps": torch.compile(taps, fullgraph=True),
    }
    theirs = peer()
    if theirs is not None:

        def fla(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            result: Any = theirs(x, weight, bias, activation="silu", backend="triton")
            return result[0] if isinstance(result, tuple) else result

        found["fla"] = fla
    return found


def operands(shape: tuple[int, int, int, int]) -> list[Tensor]:
    B, T, D, W = shape
    torch.manual_seed(0)
    conv = nn.Conv1d(D, D, W, groups=D, device="cuda", dtype=torch.bfloat16)
    assert conv.bias is not None
    x = torch.randn(B, T, D, device="cuda", dtype=torch.bfloat16)
    return [y.detach().clone().requires_grad_() for y in (x, conv.weight[:, 0], conv.bias)]


def difference(f: Callable, inputs: list[Tensor]) -> float:
    """Relative, of the output and all gradients, from the definition in float64."""
    from fla_compile.ops import naive_short_conv

    dy = torch.randn_like(inputs[0])
    wide = [x.detach().double().requires_grad_() for x in inputs]
    truth, _ = naive_short_conv(*wide, activation="silu")
    truths = (truth, *torch.autograd.grad(truth, wide, dy.double()))
    y = f(*inputs)
    got = (y, *torch.autograd.grad(y, inputs, dy))
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, truths, strict=True))


def compare_configs(shape: tuple[int, int, int, int]) -> list[dict[str, Any]]:
    """Our kernels at other tiles than the table's."""
    from triton.testing import do_bench

    x, weight, bias = (y.detach() for y in operands(shape))
    dy, rows = torch.randn_like(x), []
    for (block_d, warps), steps in product(((128, 1), (256, 2), (256, 4), (512, 4)), (4, 8, 16)):
        config = short_conv_triton.Config(block_d, steps, warps)
        row: dict[str, Any] = {"block_d": block_d, "rows": steps, "warps": warps}
        row["fwd ms"] = do_bench(
            lambda c=config: short_conv_triton.forward(x, weight, bias, None, None, True, None, c), return_mode="median"
        )
        row["bwd ms"] = do_bench(
            lambda c=config: short_conv_triton.backward(x, weight, bias, None, True, None, dy, False, c),
            return_mode="median",
        )
        rows.append(row)
    return rows


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="the first shape only")
    p.add_argument("--configs", action="store_true", help="other tiles of our kernels too, at the first shape")
    args = p.parse_args()
    if not torch.cuda.is_available():
        p.error("a CUDA device is needed, and torch sees none")
    rows: list[dict[str, Any]] = []
    for shape in SHAPES[: 1 if args.quick else None]:
        B, T, D, W = shape
        tensor = 2 * B * T * D
        floor, both = 2 * tensor / BYTES_PER_MS, 5 * tensor / BYTES_PER_MS
        for name, f in programs(W).items():
            if shape != SHAPES[0] and name not in ("ours", "eager conv1d", "fla"):
                continue  # to compile takes longer than all else
            inputs = operands(shape)
            found = measure(f, inputs, torch.randn_like(inputs[0]))
            if "error" not in found:
                found |= {"to floor": found["kernels ms"] / both, "error to float64": difference(f, inputs)}
            shown = ",".join(map(str, shape))
            rows.append({"B,T,D,W": shown, "by": name, "floor fwd": floor, "floor fwd+bwd": both, **found})
            print(rows[-1], flush=True)
            save("short_conv", "cuda", "short convolution", rows, vars(args))
    print(table(rows))
    if args.configs:
        tiles = compare_configs(SHAPES[0])
        save("short_conv", "cuda", "tiles", tiles, vars(args))
        print(table(tiles))


if __name__ == "__main__":
    main()

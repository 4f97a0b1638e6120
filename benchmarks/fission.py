"""A cell with everything inside the time loop beside the same layer written in parallel by hand.

    python benchmarks/fission.py

The cell is an RNN-style module, `S, y = cell(x_t, S)`, with its projections, gates, norm and output projection inside;
fission leaves only the recurrence in the loop. The layer by hand projects all of x at once and calls `ops.gla`. Both
are compiled with backend "fla" and run forward and backward; runs alternate, the median of each counts.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import save, table
from torch import Tensor, nn

from fla_compile.ops import gla


class Cell(nn.Module):
    """One step of gated linear attention; x_t: [B, D], S: [B, H, K, V]."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.g, self.gate, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(6))
        self.norm = nn.RMSNorm(dim // heads, eps=1e-5)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def forward(self, x_t: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, g = (self.split(f(x_t)) for f in (self.q, self.k, self.v, self.g))
        S = S * (F.logsigmoid(g) / 16).exp()[..., None] + k[..., :, None] * v[..., None, :]
        o = self.norm((q[..., None] * S).sum(-2)).flatten(-2)
        return S, self.out(o * F.silu(self.gate(x_t)))


class Looped(nn.Module):
    def __init__(self, cell: Cell):
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-1] // self.cell.heads
        S = x.new_zeros(x.shape[0], self.cell.heads, size, size)
        outputs = []
        for t in range(x.shape[1]):
            S, y = self.cell(x[:, t], S)
            outputs.append(y)
        return torch.stack(outputs, dim=1)


class Parallel(nn.Module):
    def __init__(self, cell: Cell):
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        cell = self.cell
        q, k, v, g = (cell.split(f(x)) for f in (cell.q, cell.k, cell.v, cell.g))
        o, _ = gla(q, k, v, F.logsigmoid(g) / 16, scale=1.0)
        return cell.out(cell.norm(o).flatten(-2) * F.silu(cell.gate(x)))


def step(layer: Callable, x: Tensor) -> float:
    start = time.perf_counter()
    layer(x).square().mean().backward()
    return time.perf_counter() - start


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--length", type=int, default=2048, help="T")
    p.add_argument("--dim", type=int, default=256, help="width of the layer")
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--repeats", type=int, default=11, help="runs whose median counts")
    args = p.parse_args()

    torch.manual_seed(0)
    cell = Cell(args.dim, args.heads)
    x = torch.randn(args.batch, args.length, args.dim)
    layers = {"cell in a loop": Looped(cell), "parallel by hand": Parallel(cell)}
    compiled = {name: torch.compile(layer, backend="fla", fullgraph=True) for name, layer in layers.items()}
    outputs = [layer(x) for layer in compiled.values()]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-4)
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for run in range(args.repeats + 1):
        for name, layer in compiled.items():
            taken = step(layer, x)
            if run:  # the first compiles the backward
                seconds[name].append(taken)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    by_hand = medians["parallel by hand"]
    rows = [{"layer": name, "s": s, "to by hand": s / by_hand} for name, s in medians.items()]
    print(table(rows))
    print("wrote", save("fission", "cpu", f"T={args.length}", rows, vars(args)))


if __name__ == "__main__":
    main()

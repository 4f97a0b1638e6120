"""Cross entropy of logits that exist already, forward with backward, beside Liger, fla, eager and torch.compile.

    python benchmarks/logits.py                 # two shapes on one GPU, with the peers that are installed
    python benchmarks/logits.py --quick         # the first alone

bfloat16 logits, one target in 16 ignored, loss and gradient. Times, memory and errors are as in `losses.py`; Liger
writes the gradient over the logits, so it is given a copy, whose time and memory are in its figures. The floor is the
logits read twice and their gradient written, at 3.0 TB/s, an H100's measured copy.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import save, table
from losses import SLICE, measure
from timing import BYTES_PER_MS
from torch import Tensor

from fla_compile.ops import cross_entropy

SHAPES = [(16384, 32000), (8192, 128256)]  # N, V
LossOf = Callable[[Tensor, Tensor], Tensor]


def operands(N: int, V: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    target = torch.randint(0, V, (N,), device="cuda")
    target[::16] = -100
    return torch.randn(N, V, device="cuda", dtype=torch.bfloat16).requires_grad_(), target


def differentiated(loss_of: LossOf) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def run(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        loss = loss_of(z, target)
        return loss.detach(), torch.autograd.grad(loss, z)[0]

    return run


def eager(z: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(z.float(), target)


def by_hand(z: Tensor, target: Tensor) -> Tensor:
    kept = target != -100
    picked = F.log_softmax(z.float(), -1).gather(1, target.clamp(min=0)[:, None])[:, 0]
    return -(picked * kept).sum() / kept.sum()


def contestants() -> dict[str, LossOf]:
    """Ours and whoever is installed, by name; peers are optional and imported here alone."""
    found: dict[str, LossOf] = {"ours": cross_entropy}
    for name, written in {"F.cross_entropy": eager, "log_softmax, gather": by_hand}.items():
        found[f"backend fla, {name}"] = torch.compile(written, backend="fla", dynamic=False)
        found[f"torch.compile, {name}"] = torch.compile(written, dynamic=False)
        found[f"eager, {name}"] = written
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy

        found["Liger"] = lambda z, target: liger_cross_entropy(z.clone(), target)
    except ImportError as error:
        print(f"no Liger: {error}")
    try:
        from fla.modules import FusedCrossEntropyLoss

        found["fla"] = FusedCrossEntropyLoss()
    except ImportError as error:
        print(f"no fla: {error}")
    return found


def truth(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64, the gradient rounded to float32; a slice of rows at a time."""
    counts, loss = (target != -100).sum(), torch.zeros((), dtype=torch.float64, device=z.device)
    dz = torch.empty(z.shape, dtype=torch.float32, device=z.device)
    for first in range(0, len(z), SLICE):
        part = slice(first, first + SLICE)
        rows = z.detach()[part].double().requires_grad_()
        each = F.cross_entropy(rows, target[part], reduction="sum") / counts
        dz[part] = torch.autograd.grad(each, rows)[0]
        loss += each.detach()
    return loss, dz


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="the first shape only")
    args = p.parse_args()
    if not torch.cuda.is_available():
        p.error("a CUDA device is needed, and torch sees none")
    rows: list[dict[str, Any]] = []
    for N, V in SHAPES[: 1 if args.quick else None]:
        torch._dynamo.reset()
        given = operands(N, V)
        exact, floor = truth(*given), 6.0 * N * V / BYTES_PER_MS
        for name, loss_of in contestants().items():
            found = measure(differentiated(loss_of), given, exact, ("loss error", "dz error"))
            rows.append({"N, V": f"{N}, {V}", "by": name, "floor ms": floor, **found})
            print(rows[-1], flush=True)
            save("losses", "cuda", "cross entropy", rows, vars(args))
        del given, exact
    print(table(rows))


if __name__ == "__main__":
    main()

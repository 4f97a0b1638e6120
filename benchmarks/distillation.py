"""Two linear layers and a distillation loss, forward with backward, beside eager, torch.compile, Liger and fla.

    python benchmarks/distillation.py           # on one GPU, with the peers that are installed
    python benchmarks/distillation.py --cpu     # time and peak memory with logits and without

On the GPU operands are bfloat16, the teacher is as wide as the student (fla asks for it), and times, memory and errors
are as in `losses.py`. The floor is four matrix products of 2 N D V operations at 778 TFLOP/s. On the CPU operands are
float32, the teacher is twice as wide, and each measurement has a process of its own. "with labels" is the usual
objective, a divergence at temperature 2 and a cross entropy of the same student logits: under the backend one operator
with four products, while the function called as it is gives both losses, and computes its logits once more backward.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import fresh_process, median_seconds, save, table
from losses import OPS_PER_MS, SLICE, measure
from torch import Tensor

from fla_compile.ops import linear_kl_div, naive_linear_kl_div

SHAPES = [(16384, 2048, 32000), (8192, 4096, 128256)]  # N, D, V
LABELLED = "with labels"
KINDS = ("forward_kl", "jensen_shannon", LABELLED)
TEMPERATURE, ALPHA = 2.0, 0.5
CPU_SHAPE = 2048, 256, 32000
LOGITS = "fla, with logits"
BACKENDS = ("eager", LOGITS, "fla")
Operands = tuple[Tensor, Tensor, Tensor, Tensor]  # x, weight, the teacher's x, the teacher's weight
LossOf = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def operands(N: int, D: int, E: int, V: int, device: str, dtype: torch.dtype) -> Operands:
    torch.manual_seed(0)
    x, theirs = (torch.randn(N, width, device=device).to(dtype) for width in (D, E))
    weight, matrix = ((torch.randn(V, width, device=device) / width**0.5).to(dtype) for width in (D, E))
    return x.requires_grad_(), weight.requires_grad_(), theirs, matrix


def differentiated(loss_of: LossOf) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    def run(x: Tensor, weight: Tensor, theirs: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss = loss_of(x, weight, theirs, matrix)
        dx, dw = torch.autograd.grad(loss, (x, weight))
        return loss.detach(), dx, dw

    return run


def forward_kl(x: Tensor, weight: Tensor, theirs: Tensor, matrix: Tensor) -> Tensor:
    logp = F.log_softmax(F.linear(x, weight).float(), -1)
    with torch.no_grad():
        q = F.softmax(F.linear(theirs, matrix).float(), -1)
    return F.kl_div(logp, q, reduction="batchmean")


def jensen_shannon(x: Tensor, weight: Tensor, theirs: Tensor, matrix: Tensor) -> Tensor:
    p = F.softmax(F.linear(x, weight).float(), -1)
    with torch.no_grad():
        q = F.softmax(F.linear(theirs, matrix).float(), -1)
    logm = (0.5 * (p + q)).log()
    return 0.5 * (F.kl_div(logm, p, reduction="batchmean") + F.kl_div(logm, q, reduction="batchmean"))


def labels_of(x: Tensor, weight: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device) % len(weight)


def labelled(x: Tensor, weight: Tensor, theirs: Tensor, matrix: Tensor) -> Tensor:
    z = F.linear(x, weight).float()
    with torch.no_grad():
        q = F.softmax(F.linear(theirs, matrix).float() / TEMPERATURE, -1)
    soft = F.kl_div(F.log_softmax(z / TEMPERATURE, -1), q, reduction="batchmean") * TEMPERATURE**2
    return ALPHA * F.cross_entropy(z, labels_of(x, weight)) + (1.0 - ALPHA) * soft


def ours_labelled(x: Tensor, weight: Tensor, theirs: Tensor, matrix: Tensor) -> Tensor:
    labels = labels_of(x, weight)
    soft, hard = linear_kl_div(x, weight, theirs, matrix, labels=labels, temperature=TEMPERATURE)
    return ALPHA * hard.mean() + (1.0 - ALPHA) * TEMPERATURE**2 * soft


EAGER: dict[str, LossOf] = {"forward_kl": forward_kl, "jensen_shannon": jensen_shannon, LABELLED: labelled}


def contestants(kind: str) -> dict[str, LossOf]:
    """Ours and whoever is installed, by name; peers are optional and imported here alone."""
    ours: LossOf = ours_labelled if kind == LABELLED else partial(linear_kl_div, divergence=kind)
    found: dict[str, LossOf] = {"ours": ours}
    found["torch.compile, backend fla"] = torch.compile(EAGER[kind], backend="fla")
    found["torch eager"] = EAGER[kind]
    found["torch.compile"] = torch.compile(EAGER[kind])
    if kind == LABELLED:
        return found
    try:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        jsd = LigerFusedLinearJSD(jsd_beta={"forward_kl": 0.0, "jensen_shannon": 0.5}[kind])
        found["Liger"] = lambda x, weight, theirs, matrix: jsd(x, weight, theirs, matrix, None)
    except ImportError as error:
        print(f"no Liger: {error}")
    if kind == "forward_kl":
        try:
            from fla.modules import FusedKLDivLoss

            module = FusedKLDivLoss()
            found["fla"] = lambda x, weight, theirs, matrix: module(x, theirs, weight, matrix)
        except ImportError as error:
            print(f"no fla: {error}")
    return found


def exact(kind: str, rows: Tensor, w: Tensor, theirs: Tensor, m: Tensor, labels: Tensor) -> Tensor:
    """The sum of the rows' losses."""
    if kind != LABELLED:
        return naive_linear_kl_div(rows, w, theirs, m, divergence=kind, reduction="sum")
    soft, hard = naive_linear_kl_div(rows, w, theirs, m, labels=labels, temperature=TEMPERATURE, reduction="sum")
    return ALPHA * hard.sum() + (1.0 - ALPHA) * TEMPERATURE**2 * soft


def truth(kind: str, x: Tensor, weight: Tensor, theirs: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of the definition in float64, a slice of rows at a time."""
    w, m = weight.detach().double().requires_grad_(), matrix.double()
    loss, dx, dw = w.new_zeros(()), x.new_empty(x.shape, dtype=torch.float64), torch.zeros_like(w)
    for first in range(0, len(x), SLICE):
        part = slice(first, first + SLICE)
        rows = x.detach()[part].double().requires_grad_()
        each = exact(kind, rows, w, theirs[part].double(), m, labels_of(x, w)[part]) / len(x)
        dx[part], of_w = torch.autograd.grad(each, (rows, w))
        loss, dw = loss + each.detach(), dw + of_w
    return loss, dx, dw


def run_gpu(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for N, D, V in SHAPES[: 1 if args.quick else None]:
        for kind in KINDS:
            torch._dynamo.reset()
            given = operands(N, D, D, V, "cuda", torch.bfloat16)
            exact, floor = truth(kind, *given), 8.0 * N * D * V / OPS_PER_MS
            for name, loss_of in contestants(kind).items():
                row = {"N, D, V": f"{N}, {D}, {V}", "loss": kind, "by": name, "floor ms": floor}
                rows.append(row | measure(differentiated(loss_of), given, exact))
                print(rows[-1], flush=True)
                save("losses", "cuda", "linear kl div", rows, vars(args))
            del given, exact
    return rows


def measure_cpu(kind: str, backend: str) -> dict[str, float]:
    """Median seconds of forward and backward, and MiB at the peak above what is held before."""
    from cpu_demo import peak_memory

    N, D, V = CPU_SHAPE
    given, loss_of = operands(N, D, 2 * D, V, "cpu", torch.float32), EAGER[kind]
    if backend != "eager":
        disabled: dict[str, Any] = {"disable": ("linear_kl_div",) if backend == LOGITS else ()}
        loss_of = torch.compile(loss_of, backend="fla", options=disabled)
    run = differentiated(loss_of)
    seconds = median_seconds(lambda: run(*given))
    return {"peak MiB": peak_memory(lambda: run(*given))[0], "s": seconds}


def run_cpu(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        for backend in BACKENDS:
            found = fresh_process(__file__, ["--measure", kind, backend], limit=args.limit)
            rows.append({"N, D, E, V": "2048, 256, 512, 32000", "loss": kind, "backend": backend, **(found or {})})
            print(rows[-1], flush=True)
            save("losses", "cpu", "linear kl div, CPU", rows, vars(args))
    return rows


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--cpu", action="store_true", help="time and peak memory on the CPU")
    p.add_argument("--quick", action="store_true", help="the first shape only")
    p.add_argument("--limit", type=float, default=600.0, help="seconds for one measurement on the CPU")
    p.add_argument("--measure", nargs=2, metavar=("KIND", "BACKEND"), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.measure:
        print(json.dumps(measure_cpu(*args.measure)))
        return
    if not args.cpu and not torch.cuda.is_available():
        p.error("a CUDA device is needed, or --cpu")
    print(table(run_cpu(args) if args.cpu else run_gpu(args)))


if __name__ == "__main__":
    main()

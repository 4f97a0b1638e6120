"""A linear layer and its cross entropy, forward with backward, beside Liger, fla, eager and torch.compile, on one GPU.

    python benchmarks/losses.py                 # both shapes, with the peers that are installed
    python benchmarks/losses.py --plans         # and ours with other chunks than its rule takes, and products alone

bfloat16 operands, one target in 16 ignored, loss and the gradients of x and W. "ms" is the median of
`triton.testing.do_bench`. "scratch GB" is the peak of allocated memory over inputs and both gradients (1e9 bytes), "GB"
that over the inputs alone; both are measured outside do_bench, which holds a buffer of its own. Errors are relative to
the definition in float64, computed in slices on the same GPU. The floor is three matrix products of 2 N D V operations
at 778 TFLOP/s, an H100's measured bfloat16 product.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import save, table
from torch import Tensor

from fla_compile.kernels.cross_entropy_rows import RowLoss
from fla_compile.kernels.linear_cross_entropy_ops import forward_chunks
from fla_compile.kernels.linear_loss_chunks import Plan, chunk_linear_loss
from fla_compile.ops import linear_cross_entropy

SHAPES = [(16384, 2048, 32000), (8192, 4096, 128256)]  # N, D, V
OPS_PER_MS = 778e9
PLANS = [(rows, sums) for sums in (torch.float32, torch.bfloat16) for rows in (1024, 2048, 4096)]
SLICE = 1024  # rows of float64 logits
Run = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def operands(N: int, D: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(N, D, device="cuda", dtype=torch.bfloat16)
    weight = (torch.randn(V, D, device="cuda") / D**0.5).bfloat16()
    target = torch.randint(0, V, (N,), device="cuda")
    target[::16] = -100
    return x.requires_grad_(), weight.requires_grad_(), target


def differentiated(loss_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
    def run(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss = loss_of(x, weight, target)
        dx, dw = torch.autograd.grad(loss, (x, weight))
        return loss.detach(), dx, dw

    return run


def eager(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), target)


def planned(plan: Plan) -> Run:
    def run(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            needs = True, True, False
            loss, dx, dw, _ = forward_chunks(x, weight, None, target, None, RowLoss(), "mean", needs, plan)
        return loss, dx, dw

    return run


def products(rows: int) -> Run:
    """The three matrix products of `rows` rows a chunk: no loss, and gradients of which only the sizes are right."""

    def run(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            needs = dict(need_dx=True, need_dw=True, need_db=False)
            plan = Plan(rows, torch.float32 if rows < len(x) else x.dtype)
            losses, found = chunk_linear_loss(x, weight, lambda a, first: a[:, 0].float(), **needs, plan=plan)
        assert found.dx is not None and found.dw is not None
        return losses.sum(), found.dx, found.dw

    return run


def contestants(plans: bool) -> dict[str, Run]:
    """Ours and whoever is installed, by name; peers are optional and imported here alone."""
    found: dict[str, Run] = {"ours": differentiated(linear_cross_entropy)}
    found["torch.compile, backend fla"] = differentiated(torch.compile(eager, backend="fla"))
    if plans:
        for rows, sums in PLANS:
            found[f"ours, {rows} rows, sums {str(sums)[6:]}"] = planned(Plan(rows, sums))
        for rows in (2048, 1 << 20):
            found[f"products alone, {rows if rows == 2048 else 'all'} rows"] = products(rows)
    found["torch eager"] = differentiated(eager)
    found["torch.compile"] = differentiated(torch.compile(eager))
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        found["Liger"] = differentiated(liger_fused_linear_cross_entropy)
    except ImportError as error:
        print(f"no Liger: {error}")
    try:
        from fla.modules import FusedLinearCrossEntropyLoss

        module = FusedLinearCrossEntropyLoss()
        found["fla"] = differentiated(lambda x, weight, target: module(x, target, weight))
    except ImportError as error:
        print(f"no fla: {error}")
    return found


def truth(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in float64, a slice of rows at a time."""
    w, counts = weight.detach().double(), (target != -100).sum()
    loss, dx, dw = w.new_zeros(()), x.new_empty(x.shape, dtype=torch.float64), torch.zeros_like(w)
    for first in range(0, len(x), SLICE):
        part = slice(first, first + SLICE)
        rows, t = x.detach()[part].double(), target[part]
        z = rows @ w.T
        loss += F.cross_entropy(z, t, reduction="sum") / counts
        keep = (t != -100).double()
        grad = torch.softmax(z, 1)
        grad[torch.arange(len(t), device=t.device), t.clamp(min=0)] -= 1.0
        grad *= (keep / counts).unsqueeze(1)
        dx[part] = grad @ w
        dw += grad.T @ rows
    return loss, dx, dw


def relative(got: Tensor, want: Tensor) -> float:
    """In slices: the difference of two large tensors would be a third."""
    got, want = got.reshape(-1), want.reshape(-1)
    parts = range(0, want.numel(), 1 << 26)
    error = sum((got[i : i + (1 << 26)].double() - want[i : i + (1 << 26)]).square().sum() for i in parts)
    return (error / want.square().sum()).sqrt().item()


def measure(
    run: Callable[..., tuple[Tensor, ...]],
    given: tuple[Tensor, ...],
    exact: tuple[Tensor, ...],
    names: tuple[str, ...] = ("loss error", "dx error", "dW error"),
) -> dict[str, Any]:
    from triton.testing import do_bench

    results: dict[str, Any] = {}
    try:
        found = run(*given)  # compiles
        errors = {n: relative(a, b) for n, a, b in zip(names, found, exact, strict=True)}
        del found
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = run(*given)
        torch.cuda.synchronize()
        over = torch.cuda.max_memory_allocated() - before
        gradients = sum(y.numel() * y.element_size() for y in found[1:])
        del found
        results["ms"] = do_bench(lambda: run(*given), warmup=50, rep=300, return_mode="median")
        results |= {"scratch GB": (over - gradients) / 1e9, "GB": over / 1e9, **errors}
    except Exception as error:  # a peer's refusal is a result
        results["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
    return results


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--plans", action="store_true", help="also chunks of other sizes and sums of other types")
    p.add_argument("--quick", action="store_true", help="the first shape only")
    args = p.parse_args()
    if not torch.cuda.is_available():
        p.error("a CUDA device is needed, and torch sees none")
    rows: list[dict[str, Any]] = []
    for N, D, V in SHAPES[: 1 if args.quick else None]:
        torch._dynamo.reset()
        given = operands(N, D, V)
        exact = truth(*given)
        floor = 6.0 * N * D * V / OPS_PER_MS
        for name, run in contestants(args.plans).items():
            rows.append({"N, D, V": f"{N}, {D}, {V}", "by": name, "floor ms": floor, **measure(run, given, exact)})
            print(rows[-1], flush=True)
            save("losses", "cuda", "linear cross entropy", rows, vars(args))
        del given, exact
    print(table(rows))


if __name__ == "__main__":
    main()

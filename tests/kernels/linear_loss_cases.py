"""Operands, options and errors that the tests of linear losses share."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from budget import FACTOR, FLOOR, check_budget
from torch import Tensor

from fla_compile.kernels.linear_cross_entropy import naive_linear_cross_entropy

NAMES = ("loss", "dx", "dweight", "dbias")


@dataclass(frozen=True)
class Case:
    """`ignored` is the share of targets that do not count; `options` go to the function."""

    name: str
    N: int = 37
    D: int = 24
    V: int = 53
    bias: bool = False
    ignored: float = 0.0
    weighted: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def options(**given: Any) -> dict[str, Any]:
    return given


CASES = [
    *(Case(f"{reduction}", options=options(reduction=reduction)) for reduction in ("mean", "sum", "none")),
    *(Case(f"ignored-{r}", ignored=0.4, options=options(reduction=r)) for r in ("mean", "sum", "none")),
    *(Case(f"N{N}", N=N) for N in (1, 63, 64, 65)),
    *(Case(f"V{V}", V=V) for V in (2, 64, 1000)),
    Case("bias", bias=True, ignored=0.2),
    Case("index", ignored=0.3, options=options(ignore_index=7)),
    Case("smoothing", bias=True, ignored=0.2, options=options(label_smoothing=0.1)),
    Case("smoothing-none", ignored=0.2, options=options(label_smoothing=0.1, reduction="none")),
    Case("softcap", bias=True, options=options(softcap=2.0)),
    Case("scale", bias=True, options=options(logit_scale=0.3)),
    Case("z-loss", ignored=0.2, options=options(z_loss=0.02)),
    Case("weighted", weighted=True, ignored=0.2, options=options(reduction="sum")),
    Case("weighted-mean", weighted=True, ignored=0.2),
    Case("weighted-none", weighted=True, options=options(reduction="none")),
    Case("all", bias=True, ignored=0.3, weighted=True,
         options=options(softcap=5.0, logit_scale=1.7, label_smoothing=0.2, z_loss=0.01)),
]  # fmt: skip


@dataclass
class Operands:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    row_weight: Tensor | None
    dloss: Tensor


def make_operands(case: Case, dtype: torch.dtype, device: str = "cpu") -> Operands:
    generator = torch.Generator().manual_seed(case.N * case.V)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, weight, bias = draw(case.N, case.D), 2 * draw(case.V, case.D) / case.D**0.5, draw(case.V)
    target = torch.randint(0, case.V, (case.N,), generator=generator)
    dropped = torch.rand(case.N, generator=generator) < case.ignored
    target[dropped] = case.options.get("ignore_index", -100)
    row_weight = torch.rand(case.N, generator=generator, dtype=torch.float64)
    dloss = draw(case.N) if case.options.get("reduction") == "none" else torch.tensor(-0.7, dtype=torch.float64)
    own = lambda y: y.to(device, dtype)  # noqa: E731
    return Operands(
        own(x), own(weight), own(bias) if case.bias else None, target.to(device),
        row_weight.to(device, torch.float32) if case.weighted else None, dloss.to(device),
    )  # fmt: skip


def results(fn: Callable, case: Case, given: Operands, dtype: torch.dtype) -> dict[str, Tensor]:
    """Loss and gradients of `fn` at these operands in `dtype`."""
    leaves = [None if y is None else y.detach().to(dtype).requires_grad_() for y in (given.x, given.weight, given.bias)]
    x, weight, bias = leaves
    row_weight = given.row_weight
    if row_weight is not None and dtype == torch.float64:
        row_weight = row_weight.double()
    loss = fn(x, weight, given.target, bias=bias, row_weight=row_weight, **case.options)
    wanted = [leaf for leaf in leaves if leaf is not None]
    grads = torch.autograd.grad(loss, wanted, given.dloss.to(loss.dtype))
    return dict(zip(NAMES, (loss.detach(), *grads), strict=False))


def check_results(case: Case, given: Operands, got: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Every result is there and within budget of the definition in float64."""
    rows = replace(case, options=case.options | {"reduction": "none"})
    alone = replace(given, dloss=torch.ones_like(given.target, dtype=torch.float64))
    counts = given.target != case.options.get("ignore_index", -100)
    check_losses(
        str(case), got, dtype,
        defined=lambda dtype: results(naive_linear_cross_entropy, case, given, dtype),
        each=lambda dtype: results(naive_linear_cross_entropy, rows, alone, dtype)["loss"].double(),
        over=counts.sum() if case.options.get("reduction", "mean") == "mean" else 1.0,
    )  # fmt: skip


def check_losses(
    case: str,
    got: dict[str, Tensor],
    dtype: torch.dtype,
    *,
    defined: Callable[[torch.dtype], dict[str, Tensor]],
    each: Callable[[torch.dtype], Tensor],
    over: Any,
) -> None:
    """`got` against what is `defined` in a type; `each` gives the rows' losses, whose sum `over` something is the loss.

    A sum of rows is held to what their errors in eager can add up to: eager's own sum may be right by chance.
    """
    truth, eager = defined(torch.float64), defined(dtype)
    assert set(got) == set(truth)
    for name, y in got.items():
        if dtype == torch.float64:  # eager is the truth itself
            assert y.dtype == dtype and (y - truth[name]).norm() <= 1e-12 * truth[name].norm(), f"{case} {name}"
            continue
        if name != "loss" or y.ndim:
            kind = "forward" if name == "loss" else "backward"
            check_budget(f"{case} {name}", y, truth[name], eager[name].to(y.dtype), kind)
            continue
        assert y.dtype == torch.float32 and y.isfinite()
        rows, exact = each(dtype), each(torch.float64)
        allowed = FACTOR["forward"] * (rows - exact).norm() + FLOOR[y.dtype] * exact.norm()
        allowed = exact.numel() ** 0.5 * allowed / over
        assert (y.double() - truth[name]).abs() <= allowed, f"{case}: {y} for {truth[name]}"

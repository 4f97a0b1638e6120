"""Operands, options and errors that the tests of distillation losses share."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from linear_loss_cases import NAMES, check_losses, options
from torch import Tensor

from fla_compile.kernels.linear_kl_div import naive_linear_kl_div


@dataclass(frozen=True)
class Case:
    """`E` is the teacher's width, `dropped` the share of rows that do not count, `spread` the size of logits."""

    name: str
    N: int = 37
    D: int = 24
    E: int = 40
    V: int = 53
    bias: bool = False
    dropped: float = 0.0
    weighted: bool = False
    spread: float = 2.0
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


KINDS = ("forward_kl", "reverse_kl", "jensen_shannon", "cross_entropy")
CASES = [
    *(Case(kind, options=options(divergence=kind)) for kind in KINDS),
    *(Case(f"{kind}-none", dropped=0.3, options=options(divergence=kind, reduction="none")) for kind in KINDS),
    *(Case(f"{kind}-warm", bias=True, options=options(divergence=kind, temperature=3.0)) for kind in KINDS),
    *(Case(f"{kind}-strong", spread=60.0, options=options(divergence=kind)) for kind in KINDS),
    *(Case(f"{r}", dropped=0.4, options=options(reduction=r)) for r in ("mean", "sum", "batchmean")),
    *(Case(f"N{N}", N=N, options=options(divergence="reverse_kl")) for N in (1, 63, 64, 65)),
    *(Case(f"V{V}", V=V, options=options(divergence="jensen_shannon")) for V in (2, 64, 1000)),
    Case("same-width", E=24),
    Case("weighted", weighted=True, dropped=0.2, options=options(reduction="sum")),
    Case("weighted-none", weighted=True, options=options(reduction="none", divergence="reverse_kl")),
    *(Case(f"mixture-{b}", options=options(divergence="jensen_shannon", beta=b)) for b in (0.1, 0.9)),
    Case("all", bias=True, dropped=0.3, weighted=True, options=options(
        divergence="jensen_shannon", temperature=0.7, teacher_temperature=2.0, beta=0.3, reduction="mean")),
]  # fmt: skip


@dataclass
class Operands:
    student: list[Tensor | None]
    teacher: list[Tensor | None]
    target: Tensor | None
    row_weight: Tensor | None
    dloss: Tensor


def make_operands(case: Case, dtype: torch.dtype, device: str = "cpu") -> Operands:
    generator = torch.Generator().manual_seed(case.N * case.V)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731

    def side(width: int) -> list[Tensor | None]:
        made = draw(case.N, width), case.spread * draw(case.V, width) / width**0.5, draw(case.V)
        return [y.to(device, dtype) for y in made[: 2 + case.bias]] + [None] * (1 - case.bias)

    student, teacher = side(case.D), side(case.E)
    target = torch.where(torch.rand(case.N, generator=generator) < case.dropped, -100, 1).to(device)
    row_weight = torch.rand(case.N, generator=generator, dtype=torch.float64).to(device, torch.float32)
    dloss = draw(case.N) if case.options.get("reduction") == "none" else torch.tensor(-0.7, dtype=torch.float64)
    return Operands(
        student, teacher, target if case.dropped else None, row_weight if case.weighted else None, dloss.to(device)
    )


def results(fn: Callable, case: Case, given: Operands, dtype: torch.dtype) -> dict[str, Tensor]:
    """Loss and gradients of `fn` at these operands in `dtype`."""
    leaves = [None if y is None else y.detach().to(dtype).requires_grad_() for y in given.student]
    theirs = [None if y is None else y.to(dtype) for y in given.teacher]
    row_weight = given.row_weight
    if row_weight is not None and dtype == torch.float64:
        row_weight = row_weight.double()
    loss = fn(
        *leaves[:2], *theirs[:2], bias=leaves[2], teacher_bias=theirs[2], target=given.target, row_weight=row_weight,
        **case.options,
    )  # fmt: skip
    wanted = [leaf for leaf in leaves if leaf is not None]
    grads = torch.autograd.grad(loss, wanted, given.dloss.to(loss.dtype))
    return dict(zip(NAMES, (loss.detach(), *grads), strict=False))


def check_results(case: Case, given: Operands, got: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Every result is there and within budget of the definition in float64."""
    rows = replace(case, options=case.options | {"reduction": "none"})
    alone = replace(given, dloss=torch.ones(case.N, device=got["loss"].device, dtype=torch.float64))
    over: Any = 1.0
    if case.options.get("reduction", "batchmean") in ("mean", "batchmean"):
        counted = case.options.get("reduction") == "mean" and given.target is not None
        over = (given.target != -100).sum() if counted else case.N
    check_losses(
        str(case), got, dtype,
        defined=lambda dtype: results(naive_linear_kl_div, case, given, dtype),
        each=lambda dtype: results(naive_linear_kl_div, rows, alone, dtype)["loss"].double(),
        over=over,
    )  # fmt: skip

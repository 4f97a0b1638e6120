"""Inputs for the tests of norm times gate."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from fla_compile.kernels.norm_gate_forms import Form, naive_norm_gate

NAMES = ("x", "gate", "weight", "bias")


@dataclass(frozen=True)
class Case:
    """`groups` heads of `width` elements a row of the last axis; `affine` "", "w", "b" or "wb", per head or not."""

    rows: int
    width: int
    groups: int = 1
    affine: str = "w"
    per_head: bool = False
    norm: str = "rms"
    activation: str = "silu"
    gate_first: bool = False
    layout: str = "dense"  # x and the gate as "slices" of wider rows
    eps: float = 1e-5

    def __str__(self) -> str:
        order = "gate-first" if self.gate_first else "gate-last"
        heads = f"{self.groups}{'own' if self.per_head else ''}"
        return (
            f"{self.norm}-{self.activation}-{order}-{self.rows}x{heads}x{self.width}{self.affine and '-' + self.affine}"
        )

    @property
    def form(self) -> Form:
        return Form(self.width, self.eps, self.norm == "layer", self.activation == "silu", self.gate_first)


CASES = [
    Case(1, 16),
    Case(9, 16, affine=""),
    Case(9, 24, activation="sigmoid"),
    Case(33, 16, groups=3, affine="w", per_head=True, layout="slices"),
    Case(10, 16, groups=2, affine="wb", per_head=True, norm="layer"),
    Case(10, 20, groups=2, affine="wb", norm="layer", activation="sigmoid", layout="slices"),
    Case(9, 24, affine="wb", gate_first=True),
    Case(7, 100, affine="w", norm="layer", gate_first=True, activation="sigmoid"),
    Case(8, 16, groups=2, affine="b", per_head=True),
]


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cpu") -> SimpleNamespace:
    """x, gate, dy [rows, groups * width] in `dtype`, weight and bias in float32 or wider; all exact in `dtype`."""
    generator = torch.Generator().manual_seed(case.rows + case.width)
    P, wide = case.groups * case.width, torch.promote_types(dtype, torch.float32)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    if case.layout == "slices":
        whole = random(case.rows, 2 * P + 16)
        x, gate = whole[:, :P], whole[:, P : 2 * P]
    else:
        x, gate = random(case.rows, P), random(case.rows, P)
    size = P if case.per_head else case.width
    weight = 1 + 0.5 * random(size).to(wide) if "w" in case.affine else None
    bias = random(size).to(wide) if "b" in case.affine else None
    return SimpleNamespace(x=x, gate=gate, weight=weight, bias=bias, dy=random(case.rows, P))


def results(case: Case, x: SimpleNamespace, fn=naive_norm_gate) -> dict[str, Tensor]:
    """y and every gradient by name, each in its operand's type."""
    leaves = {n: getattr(x, n).detach().requires_grad_() for n in NAMES if getattr(x, n) is not None}
    y = fn(
        leaves["x"], leaves["gate"], leaves.get("weight"), leaves.get("bias"), norm=case.norm,
        activation=case.activation, eps=case.eps, gate_first=case.gate_first, width=case.width,
    )  # fmt: skip
    grads = torch.autograd.grad(y, list(leaves.values()), x.dy)
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, grads, strict=True)}}


def naive_results(case: Case, x: SimpleNamespace, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same in another type."""
    return results(case, SimpleNamespace(**{n: None if y is None else y.to(dtype) for n, y in vars(x).items()}))

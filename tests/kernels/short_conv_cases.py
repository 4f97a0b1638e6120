"""Cases of the short convolution for all of its implementations, and what the definition makes of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fla_compile.kernels.short_conv_naive import naive_short_conv

NAMES = ("x", "weight", "bias", "residual", "initial_state")


@dataclass(frozen=True)
class Case:
    """`lengths` packs sequences into one row; `parts` are the operands given beside x and weight."""

    W: int = 4
    T: int = 65
    B: int = 2
    D: int = 24
    activation: str | None = "silu"
    parts: tuple[str, ...] = ("bias", "residual", "initial_state")
    lengths: tuple[int, ...] = ()
    scale: float = 1.0

    def __str__(self) -> str:
        what = "-".join(("packed",) * bool(self.lengths) + self.parts) or "plain"
        return f"W{self.W}-T{sum(self.lengths) or self.T}-D{self.D}-{self.activation}-{what}-{self.scale:g}"

    @property
    def cu_seqlens(self) -> Tensor | None:
        return torch.tensor([0, *torch.tensor(self.lengths).cumsum(0).tolist()]) if self.lengths else None


def make_operands(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """By name, the numbers the same in every dtype up to rounding."""
    generator = torch.Generator().manual_seed(0)
    B, T, N = (1, sum(case.lengths), len(case.lengths)) if case.lengths else (case.B, case.T, case.B)
    D, W = case.D, case.W
    shapes = {"x": (B, T, D), "weight": (D, W), "bias": (D,), "residual": (B, T, D), "initial_state": (N, W - 1, D)}
    wanted = {n: s for n, s in shapes.items() if n in ("x", "weight", *case.parts)}
    made = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    made["weight"] *= case.scale
    return {n: made[n].to(device, dtype) for n in wanted}


def make_gradients(case: Case, operands: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of y and of the final state."""
    x = operands["x"]
    generator = torch.Generator().manual_seed(1)
    N = len(case.lengths) or x.shape[0]
    shapes = x.shape, (N, case.W - 1, case.D)
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(x) for s in shapes)  # type: ignore


def results(fn: Callable, case: Case, operands: dict[str, Tensor], final: bool = True) -> dict[str, Tensor]:
    """y, the final state and the gradient of every operand; without `final` y alone is differentiated."""
    leaves = {n: x.detach().clone().requires_grad_() for n, x in operands.items()}
    x, weight, *rest = leaves.values()
    named = dict(zip(list(leaves)[2:], rest, strict=True))
    out = fn(x, weight, activation=case.activation, output_final_state=True, cu_seqlens=case.cu_seqlens, **named)
    size = 2 if final else 1
    slopes = make_gradients(case, operands)[:size]
    grads = torch.autograd.grad(out[:size], list(leaves.values()), slopes, allow_unused=True)
    return {
        "y": out[0].detach(),
        "final_state": out[1].detach(),
        **{f"d{n}": torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), grads, strict=True)},
    }


def truth_and_eager(
    case: Case, operands: dict[str, Tensor], final: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The definition in float64, and in the operands' dtype."""
    wide = {n: x.double() for n, x in operands.items()}
    return results(naive_short_conv, case, wide, final), results(naive_short_conv, case, operands, final)

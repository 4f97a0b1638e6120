"""Inputs for the tests of the decayed delta."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from decay_cases import log_decay
from torch import Tensor
from torch.nn.functional import normalize

from fla_compile.kernels import delta_naive
from fla_compile.kernels.delta_ops import FAMILIES

SCALE = 0.3


@dataclass(frozen=True)
class Case:
    family: str
    T: int
    decay: str = "weak"
    beta: str = "unit"
    B: int = 2
    H: int = 3
    K: int = 24
    V: int = 40

    def __str__(self) -> str:
        return f"{self.family}-B{self.B}T{self.T}H{self.H}K{self.K}V{self.V}-{self.decay}-{self.beta}"


def make_operands(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """q, k, v, the family's own and initial_state, with values that are exact in `dtype`.

    Gates, beta and states are at least float32. Keys have length one, so that the state stays bounded.
    """
    torch.manual_seed(0)
    B, T, H, K, V = case.B, case.T, case.H, case.K, case.V
    wide = torch.promote_types(dtype, torch.float32)
    q, k, c = torch.randn(3, B, T, H, K)
    k, c = normalize(k, dim=-1), normalize(c, dim=-1)
    if case.beta == "same_key":
        k = k[:, :1].expand_as(k)
    beta = {
        "unit": torch.rand(B, T, H),
        "two": torch.full((B, T, H), 2.0),
        "any": 2.5 * torch.rand(B, T, H) - 0.5,
        "same_key": torch.rand(B, T, H) * 2,
    }[case.beta]
    gate = (B, T, H) if case.family == "gated_delta_rule" else (B, T, H, K)
    g = torch.where(torch.rand(gate) < 0.05, -1e4, 0.0) if case.decay == "erasing" else log_decay(case.decay, gate)
    b = -c * (beta.unsqueeze(-1) if case.beta != "unit" else torch.rand(B, T, H, K))
    own = {"g": g.to(wide), "beta": beta.to(wide), "b": b.to(dtype), "c": c.to(dtype)}
    return {
        "q": q.to(dtype),
        "k": k.to(dtype),
        "v": torch.randn(B, T, H, V).to(dtype),
        **{name: own[name].contiguous() for name in FAMILIES[case.family]},
        "initial_state": torch.randn(B, H, K, V).to(wide),
    }


def output_gradients(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Those of o and of the final state."""
    torch.manual_seed(1)
    do, dht = torch.randn(case.B, case.T, case.H, case.V), torch.randn(case.B, case.H, case.K, case.V)
    return do.to(dtype), dht.to(torch.promote_types(dtype, torch.float32))


def results(
    fn: Callable[..., tuple[Tensor, Tensor]], case: Case, operands: dict[str, Tensor], do: Tensor, dht: Tensor
) -> dict[str, Tensor]:
    """o, final_state and the gradient of every operand, by autograd."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in operands.items()}
    *inputs, h0 = leaves.values()
    o, final = fn(*inputs, scale=SCALE, initial_state=h0, output_final_state=True)
    grads = torch.autograd.grad([o, final], list(leaves.values()), [do.to(o.dtype), dht.to(final.dtype)])
    found = dict(zip((f"d{name}" for name in leaves), grads, strict=True))
    return {"o": o.detach(), "final_state": final.detach()} | found


@cache
def truth_and_eager(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The naive loop in float64 and in `dtype`, on the operands of `dtype`."""
    naive = getattr(delta_naive, f"naive_{case.family}")
    operands, (do, dht) = make_operands(case, dtype), output_gradients(case, dtype)
    if dtype == torch.float32:
        truth, _ = truth_and_eager(case, torch.float64)  # the same values
    else:
        truth = results(naive, case, {name: x.double() for name, x in operands.items()}, do, dht)
    return truth, truth if dtype == torch.float64 else results(naive, case, operands, do, dht)


def kind(name: str) -> str:
    return "forward" if name in ("o", "final_state") else "backward"

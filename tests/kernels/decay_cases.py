"""Inputs for the tests of the decayed outer product."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fla_compile import ops

FAMILIES = ("linear_attention", "retention", "simple_gla", "gla")
NAMES = ("o", "final_state", "dq", "dk", "dv", "dg", "dh0")


@dataclass(frozen=True)
class Case:
    family: str
    T: int
    decay: str = "weak"
    B: int = 2
    H: int = 3
    K: int = 24
    V: int = 40

    def __str__(self) -> str:
        return f"{self.family}-B{self.B}T{self.T}H{self.H}K{self.K}V{self.V}-{self.decay}"


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    h0: Tensor
    do: Tensor
    dht: Tensor


def make_inputs(case: Case, dtype: torch.dtype) -> Inputs:
    """Values that are exact in `dtype`; gates and states are at least float32."""
    torch.manual_seed(0)
    B, T, H, K, V = case.B, case.T, case.H, case.K, case.V
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v, do = (torch.randn(B, T, H, d).to(dtype) for d in (K, K, V, V))
    h0, dht = (torch.randn(B, H, K, V).to(wide) for _ in range(2))
    shape = {"retention": (H,), "simple_gla": (B, T, H), "gla": (B, T, H, K)}.get(case.family)
    g = None if shape is None else log_decay(case.decay, shape).to(wide)
    return Inputs(q, k, v, g, h0, do, dht)


def log_decay(kind: str, shape: tuple[int, ...]) -> Tensor:
    g = torch.nn.functional.logsigmoid(torch.randn(shape))
    weak, some = g / 16, torch.rand(shape)
    return {
        "zero": torch.zeros(shape),
        "weak": weak,
        "strong": g,
        "very_strong": torch.full(shape, -100.0),
        "resets": torch.where(some < 0.05, -100.0, weak),
        "mixed": torch.where(some < 0.5, weak, 30 * g),
        "growing": -weak,
    }[kind]


def naive_results(case: Case, inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """The naive loop and its gradients by autograd, computed from the inputs cast to `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {
        name: getattr(inputs, name).to(dtype if name in "qkv" else wide).detach().clone().requires_grad_()
        for name in ("q", "k", "v", "g", "h0")
        if getattr(inputs, name) is not None
    }
    gate = [leaves["g"]] if "g" in leaves else []
    if case.family == "retention":
        gate = [leaves["g"].exp()]
    naive: Callable[..., tuple[Tensor, Tensor]] = getattr(ops, f"naive_{case.family}")
    o, final = naive(
        *(leaves[name] for name in "qkv"), *gate, scale=0.3, initial_state=leaves["h0"], output_final_state=True
    )
    grads = torch.autograd.grad([o, final], list(leaves.values()), [inputs.do.to(o.dtype), inputs.dht.to(final.dtype)])
    found = dict(zip((f"d{name}" for name in leaves), grads, strict=True))
    return {"o": o.detach(), "final_state": final.detach()} | found


def truth_and_eager(case: Case, inputs: Inputs, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    truth = naive_results(case, inputs, torch.float64)
    return truth, truth if dtype == torch.float64 else naive_results(case, inputs, dtype)

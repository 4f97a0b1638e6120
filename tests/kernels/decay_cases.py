"""Inputs for the tests of the decayed outer product."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fla_compile.kernels import decay_naive

FAMILIES = ("linear_attention", "retention", "simple_gla", "gla")
NAMES = ("o", "final_state", "dq", "dk", "dv", "dg", "dh0")

# Beyond the four families of one gate: its axes and the other tensor's.
WIDER = {
    "gla_values": ("", "BTHV"),
    "gla_both": ("BTHK", "BTHV"),
    "rwkv6": ("BTHK", "HK"),
    "rwkv6_no_bonus": ("BTHK", ""),
}
LEAVES = ("q", "k", "v", "g", "gv", "u", "h0")
SCALE = 0.3


@dataclass(frozen=True)
class Case:
    family: str
    T: int
    decay: str = "weak"
    B: int = 2
    H: int = 3
    K: int = 24
    V: int = 40
    value_decay: str = "weak"

    def __str__(self) -> str:
        shape = f"{self.family}-B{self.B}T{self.T}H{self.H}K{self.K}V{self.V}-{self.decay}"
        return f"{shape}-{self.value_decay}" if self.family in ("gla_values", "gla_both") else shape


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    h0: Tensor
    do: Tensor
    dht: Tensor
    gv: Tensor | None = None
    u: Tensor | None = None


def make_inputs(case: Case, dtype: torch.dtype) -> Inputs:
    """Values that are exact in `dtype`; gates and states are at least float32."""
    torch.manual_seed(0)
    B, T, H, K, V = case.B, case.T, case.H, case.K, case.V
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v, do = (torch.randn(B, T, H, d).to(dtype) for d in (K, K, V, V))
    h0, dht = (torch.randn(B, H, K, V).to(wide) for _ in range(2))
    shape = {"retention": (H,), "simple_gla": (B, T, H), "gla": (B, T, H, K)}.get(case.family)
    gv = u = None
    if case.family in WIDER:
        keys, other = WIDER[case.family]
        shape = (B, T, H, K) if keys else None
        gv = log_decay(case.value_decay, (B, T, H, V)).to(wide) if other == "BTHV" else None
        u = torch.randn(H, K).to(wide) if other == "HK" else None
    g = None if shape is None else log_decay(case.decay, shape).to(wide)
    return Inputs(q, k, v, g, h0, do, dht, gv, u)


def log_decay(kind: str, shape: tuple[int, ...]) -> Tensor:
    g = torch.nn.functional.logsigmoid(torch.randn(shape))
    weak, some = g / 16, torch.rand(shape)
    # the state grows by e^70 and shrinks again, and so, from the end, does its gradient
    up = torch.arange(shape[1] if len(shape) > 1 else 1).view(-1, *[1] * (len(shape) - 2)) // 64 % 2 == 0
    t = torch.arange(shape[1] if len(shape) > 1 else 1).view(-1, *[1] * (len(shape) - 2))
    return {
        "zero": torch.zeros(shape),
        "weak": weak,
        "strong": g,
        "steep": torch.full(shape, -20.0),
        "rising": torch.full(shape, 20.0),
        "very_strong": torch.full(shape, -100.0),
        "resets": torch.where(some < 0.05, -100.0, weak),
        "hard_resets": torch.where(some < 0.05, -1e4, weak),
        "mixed": torch.where(some < 0.5, weak, 30 * g),
        "growing": -weak,
        "hills": torch.where(up, 1.1, -1.1).expand(shape),
        # pairs of steps that grow by far more than the gradients of other steps are
        "alternating": torch.where(t % 2 == 1, 70.0, -70.0).expand(shape),
        "peak": torch.where(t == 13, 20.0, -2.5).expand(shape),
        # the state before the steps from 32 to 63 and its gradient after them are both near e^60
        "valley": torch.where(t % 65 == 5, 60.0, torch.where((t > 31) & (t < 64), -100 / 32, -0.01)).expand(shape),
        "dip": torch.where(t == 12, -70.0, torch.where(t == 13, 70.0, -0.3)).expand(shape),
    }[kind]


def make_leaves(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """What there is of `LEAVES`, in `dtype`, gates and states at least in float32, to be differentiated."""
    wide = torch.promote_types(dtype, torch.float32)
    return {
        name: x.to(dtype if name in "qkv" else wide).detach().clone().requires_grad_()
        for name in LEAVES
        if (x := getattr(inputs, name)) is not None
    }


def call(fn: Callable[..., tuple[Tensor, Tensor]], case: Case, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A public function or its naive twin on `make_leaves`."""
    gates = {name: leaves[name] for name in ("g", "gv", "u") if name in leaves}
    if case.family == "retention":
        gates = {"gamma": gates["g"].exp()}
    return fn(
        leaves["q"], leaves["k"], leaves["v"], **gates, scale=SCALE, initial_state=leaves["h0"], output_final_state=True
    )


def results(
    fn: Callable[..., tuple[Tensor, Tensor]], case: Case, inputs: Inputs, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Outputs and gradients by autograd, computed from the inputs cast to `dtype`."""
    leaves = make_leaves(inputs, dtype)
    o, final = call(fn, case, leaves)
    grads = torch.autograd.grad([o, final], list(leaves.values()), [inputs.do.to(o.dtype), inputs.dht.to(final.dtype)])
    found = dict(zip((f"d{name}" for name in leaves), grads, strict=True))
    return {"o": o.detach(), "final_state": final.detach()} | found


def naive_results(case: Case, inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    name = case.family.removesuffix("_values").removesuffix("_both").removesuffix("_no_bonus")
    return results(getattr(decay_naive, f"naive_{name}"), case, inputs, dtype)


def truth_and_eager(case: Case, inputs: Inputs, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    truth = naive_results(case, inputs, torch.float64)
    return truth, truth if dtype == torch.float64 else naive_results(case, inputs, dtype)

"""Inputs for the tests of the decode step, and what the naive steps make of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from budget import check_budget
from decay_cases import SCALE, log_decay
from torch import Tensor

from fla_compile.kernels import decay_step_naive

# The public function, and the axes of its gates and bonus; the gates' heads are G.
FAMILIES = {
    "linear_attention": ("linear_attention", {}),
    "retention": ("retention", {"gamma": "G"}),
    "simple_gla": ("simple_gla", {"g": "BTG"}),
    "gla": ("gla", {"g": "BTGK"}),
    "gla_values": ("gla", {"gv": "BTGV"}),
    "gla_both": ("gla", {"g": "BTGK", "gv": "BTGV"}),
    "rwkv6": ("rwkv6", {"g": "BTGK", "u": "UK"}),
    "rwkv6_no_bonus": ("rwkv6", {"g": "BTGK"}),
}
DECAYS = ("none", "weak", "very_strong", "forget", "growing", "signed")


@dataclass(frozen=True)
class Case:
    """HQ, HK, HV and HG are the heads of q, k, v and the gates, H where None."""

    family: str
    T: int = 1
    decay: str = "weak"
    B: int = 2
    H: int = 3
    K: int = 24
    V: int = 40
    HQ: int | None = None
    HK: int | None = None
    HV: int | None = None
    HG: int | None = None
    state: torch.dtype | None = None  # float32 where None, float64 for float64

    def __str__(self) -> str:
        heads = ",".join(str(n or self.H) for n in (self.HQ, self.HK, self.HV, self.HG))
        return f"{self.family}-B{self.B}T{self.T}H{self.H}({heads})K{self.K}V{self.V}-{self.decay}"

    @property
    def log(self) -> bool:
        return self.decay != "signed" and self.family != "retention"


# More queries than states, fewer queries and keys than values, and everything at once.
GROUPED = ({"HQ": 12, "HK": 2, "HG": 1}, {"HQ": 2, "HK": 2, "HV": 4}, {"HQ": 8, "HK": 1, "HV": 2, "HG": 2})


def make_operands(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """By the names of the public functions' arguments; gates and the state are at least float32."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.promote_types(dtype, torch.float32)
    sizes = {"B": case.B, "T": case.T, "H": case.H, "K": case.K, "V": case.V, "G": case.HG or case.H}
    sizes["U"] = max(case.H, case.HQ or case.H)

    def random(axes: str, heads: int | None = None) -> Tensor:
        shape = [case.H if heads is None and a == "H" else heads if a == "H" else sizes[a] for a in axes]
        return torch.randn(shape, generator=generator)

    found = {
        "q": random("BTHK", case.HQ).to(dtype),
        "k": random("BTHK", case.HK).to(dtype),
        "v": random("BTHV", case.HV).to(dtype),
        "state": random("BHKV").to(case.state or wide),
    }
    for name, axes in FAMILIES[case.family][1].items():
        shape = tuple(sizes[a] for a in axes)
        if name == "u":
            found[name] = random(axes).to(wide)
        elif case.decay == "signed":
            found[name] = torch.randn(shape, generator=generator).clamp(-1, 1).to(wide)
        else:
            g = gates(case.decay, shape).to(wide)
            found[name] = g.exp() if name == "gamma" else g
    return {name: x.to(device) for name, x in found.items()}


def gates(decay: str, shape: tuple[int, ...]) -> Tensor:
    torch.manual_seed(2)
    if decay == "forget":
        return log_decay("weak", shape).masked_fill(torch.rand(shape) < 0.3, -torch.inf)
    return log_decay("zero" if decay == "none" else decay, shape)


def run(prefix: str, module: object, case: Case, operands: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and state of a public function, or of its naive twin, on a state of its own."""
    name, gates = FAMILIES[case.family]
    fn: Callable[..., Tensor] = getattr(module, f"{prefix}{name}_step")
    state = operands["state"].clone()
    extra: dict[str, object] = {n: operands[n] for n in gates}
    if extra and name != "retention":
        extra["log"] = case.log
    with torch.no_grad():
        o = fn(operands["q"], operands["k"], operands["v"], state, **extra, scale=SCALE)
    return {"o": o, "state": state}


def check(case: Case, operands: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    """Holds output and state to the budget of `budget`, the naive steps in float64 being the truth."""
    truth = run("naive_", decay_step_naive, case, {n: x.double() for n, x in operands.items()})
    eager = run("naive_", decay_step_naive, case, operands)
    for name, y in got.items():
        check_budget(f"{case} {name}", y, truth[name], eager[name].to(y.dtype), "forward")

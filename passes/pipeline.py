"""The order of the passes over a captured graph, one line each; lifting comes before, while Dynamo traces."""

from dataclasses import dataclass
from typing import Protocol

from torch import fx

from fla_compile.kernels.decay_ops import supports
from fla_compile.passes.classify import Plan, written_at
from fla_compile.passes.match_recurrences import match_recurrences, nested_graphs
from fla_compile.passes.normalise import Step
from fla_compile.passes.records import Refusal, Refused, Rewrite


class Switches(Protocol):
    @property
    def validate(self) -> bool: ...

    def runs(self, name: str) -> bool: ...


@dataclass(frozen=True)
class Result:
    """`refusals` beside the (file, line) of what was left; `before` and `after` are readable programs."""

    rewrites: tuple[Rewrite, ...]
    refusals: tuple[tuple[Refusal, tuple[str, int] | None], ...]
    before: str
    after: str
    validation_seconds: float


def kernel_for(step: Step, plan: Plan) -> str:
    """The name of the kernel that runs a plan on its device; raises `Refused` where there is none."""
    names = []
    for r in plan.recurrences:
        state = step.carries[r.carry].meta["val"]
        key_size, value_size = step.space.total(r.keys), step.space.total(r.values)
        device = state.device.type
        reason = supports(r.family, device, state.dtype, key_size, value_size)
        if reason is not None:
            raise Refused("no_kernel", reason, written_at(step, r.carry))
        names.append({"cpu": "chunk (matrix products)", "cuda": "chunk (Triton)"}[device])
    return " + ".join(dict.fromkeys(names)) or "parallel"


def run_passes(gm: fx.GraphModule, *, options: Switches) -> Result:
    """Rewrite `gm` in place."""
    before = gm.print_readable(print_output=False)
    rewrites, refusals, seconds = [], [], 0.0
    if options.runs("recurrence"):
        for region in nested_graphs(gm):
            found = match_recurrences(region, validated=options.validate, kernel=kernel_for)
            rewrites += found.rewrites
            refusals += [(refusal, scan.place) for refusal, scan in found.refusals]
            seconds += found.validation_seconds
    after = gm.print_readable(print_output=False)
    return Result(tuple(rewrites), tuple(refusals), before, after, seconds)

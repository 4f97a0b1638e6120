"""The order of the passes over a captured graph, one line each; lifting comes before, while Dynamo traces."""

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, Protocol

from torch import fx

from fla_compile.kernels import decay_ops, delta_ops, linear_scan, rwkv6_ops, selective_scan, short_conv  # noqa: F401
from fla_compile.passes.fission import Delay, Window
from fla_compile.passes.lower_recurrence import operand_dtype
from fla_compile.passes.match_cross_entropy import match_cross_entropy
from fla_compile.passes.match_linear_cross_entropy import match_linear_cross_entropy
from fla_compile.passes.match_linear_kl_div import match_linear_kl_div
from fla_compile.passes.match_norm_gate import match_norm_gate
from fla_compile.passes.match_parallel import match_parallel
from fla_compile.passes.match_recurrences import Known, match_recurrences
from fla_compile.passes.match_short_conv import match_short_conv
from fla_compile.passes.records import Refusal, Refused, Rewrite
from fla_compile.passes.recurrence import Elementwise, Generic, Recurrence, Stage
from fla_compile.passes.scans import nested_graphs
from fla_compile.passes.share_heads import share_heads
from fla_compile.passes.share_states import share_states
from fla_compile.passes.step import Step
from fla_compile.passes.updates import written_at

# What is looked for after the recurrences, in this order, by the name of its pass.
PATTERNS: dict[str, Callable[..., Any]] = {
    "parallel_attention": match_parallel,
    "short_conv": match_short_conv,
    "norm_gate": match_norm_gate,
    "linear_kl_div": match_linear_kl_div,
    "linear_cross_entropy": match_linear_cross_entropy,
    "cross_entropy": match_cross_entropy,
}


class Switches(Protocol):
    @property
    def validate(self) -> bool: ...

    def runs(self, name: str) -> bool: ...


@dataclass(frozen=True)
class Result:
    """`refusals` beside the (file, line) of what was left, `looped` of what runs as a loop of no known family;
    `before` and `after` are readable programs."""

    rewrites: tuple[Rewrite, ...]
    refusals: tuple[tuple[Refusal, tuple[str, int] | None], ...]
    looped: tuple[Refusal, ...]
    before: str
    after: str
    validation_seconds: float


def kernel_for(step: Step, stage: Stage) -> str:
    """The name of the kernel that runs a stage on its device; raises `Refused` where there is none."""
    if isinstance(stage, Generic):
        return "looped step"
    assert not isinstance(stage, Delay | Window)
    state = step.carries[stage.carry].meta["val"]
    device = state.device.type
    if isinstance(stage, Recurrence):
        ops = delta_ops if stage.family in delta_ops.FAMILIES else decay_ops
        sizes = step.space.total(stage.keys), step.space.total(stage.values)
        own = stage.family
        if stage.value_decay:
            own = "gla_both" if stage.decay or stage.decay_coef != 1.0 else "gla_values"
        reason = ops.supports(own, device, state.dtype, *sizes)
        name = "chunk (matrix products)"
        if ops is decay_ops:
            name = decay_ops.kernel_name(own, device, operand_dtype(step, stage), *sizes)
    else:
        scan = linear_scan if isinstance(stage, Elementwise) else selective_scan
        reason = scan.supports(device, state.dtype)
        name = linear_scan.kernel_name(device) if scan is linear_scan else "scan in blocks"
    if reason is not None:
        raise Refused("no_kernel", reason, written_at(step, stage.carry))
    return name


def run_passes(
    gm: fx.GraphModule, *, options: Switches, lifted: Container[tuple[str, int] | None] = frozenset()
) -> Result:
    """Rewrite `gm` in place; `lifted` are the places of loops that Dynamo traced as scans."""
    before, captured = gm.print_readable(print_output=False), _nodes(gm)
    rewrites: list[Rewrite] = []
    refusals: list[tuple[Refusal, tuple[str, int] | None]] = []
    looped: list[Refusal] = []
    seconds = 0.0
    known = Known()
    refusals += [(refusal, scan.place) for refusal, scan in share_states(gm, lifted)]
    for region in nested_graphs(gm):
        if options.runs("recurrence"):
            found = match_recurrences(region, validated=options.validate, kernel=kernel_for, known=known)
            rewrites += found.rewrites
            refusals += [(refusal, scan.place) for refusal, scan in found.refusals]
            looped += found.looped
            seconds += found.validation_seconds
        for name, match in PATTERNS.items():
            if options.runs(name):
                matched = match(region, validated=options.validate)
                rewrites += matched.rewrites
                refusals += [(refusal, None) for refusal in matched.refusals]
                seconds += matched.validation_seconds
        refused, spent = share_heads(region, validated=options.validate)
        refusals += [(refusal, None) for refusal in refused]
        seconds += spent
    after = before if _nodes(gm) == captured else gm.print_readable(print_output=False)
    return Result(tuple(rewrites), tuple(refusals), tuple(looped), before, after, seconds)


def _nodes(gm: fx.GraphModule) -> list[tuple[Any, ...]]:
    """What a program and all programs in it say, in a form that takes less time than to print them."""
    inside = [m for m in gm.modules() if isinstance(m, fx.GraphModule)]
    return [(n, n.target, n.args, n.kwargs) for m in inside for n in m.graph.nodes]

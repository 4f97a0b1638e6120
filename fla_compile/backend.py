"""`torch.compile(model, backend="fla")`: our passes over Dynamo's graph, then Inductor for the rest."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from fla_compile import dynamo
from fla_compile.options import Options
from fla_compile.passes.pipeline import run_passes
from fla_compile.passes.records import Refusal
from fla_compile.report import Report, emit_report

log = logging.getLogger("fla_compile")


class RefusedError(RuntimeError):
    """Under `strict`, something that looks like a pattern of ours was refused; names the reason and the user's line."""


def _strict_error(refusals: tuple[Refusal, ...]) -> RefusedError:
    from torch._dynamo.exc import ShortenTraceback

    class Raised(RefusedError, ShortenTraceback):
        """A base of Dynamo's that passes through it unwrapped."""

    Raised.__name__ = Raised.__qualname__ = RefusedError.__name__  # what a traceback shows
    text = "\n".join(f"{r.source}: {r.pattern} refused: {r.reason}: {r.detail}" for r in refusals)
    return Raised(text, first_useful_frame=None)


def report_on(gm: fx.GraphModule, example_inputs: list[Any], options: Options) -> tuple[Report, dict]:
    """Run the passes on `gm` in place; returns the report and the lifted loops that were refused, by place."""
    trace = dynamo.current_trace()
    dynamo.want_fixed_floats(gm)
    with dynamo.untraced():
        result = run_passes(gm, options=options, lifted=trace.lifted)
    found = (*trace.refusals, *(refusal for refusal, _ in result.refusals), *result.looped)
    refusals = tuple(dict.fromkeys(found))
    for refusal in refusals:
        level = logging.WARNING if refusal.reason == "validation_failed" else logging.INFO
        log.log(level, "%s: %s refused: %s: %s", refusal.source, refusal.pattern, refusal.reason, refusal.detail)
    unlift = {place: refusal for refusal, place in result.refusals if place in trace.lifted}
    return Report.of(result, refusals), unlift


def fla(gm: fx.GraphModule, example_inputs: list[Any], *, options: Mapping[str, Any] | None = None) -> Callable:
    """The backend registered as "fla"; `options` as in `fla_compile.options.Options`.

    Raises ValueError for an unknown option and RefusedError for a refusal under `strict`.
    """
    from torch._inductor.compile_fx import compile_fx

    chosen = Options.parse(options)
    report, unlift = report_on(gm, example_inputs, chosen)
    emit_report(report)
    if chosen.strict and report.refusals:
        raise _strict_error(report.refusals)
    if unlift:
        raise dynamo.leave_loops(unlift)
    run: Any = compile_fx(gm, example_inputs, config_patches=dict(chosen.inductor) or None)
    return run


fla.is_fla_backend = True  # type: ignore[attr-defined]
dynamo.install()

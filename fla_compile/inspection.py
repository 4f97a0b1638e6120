"""`explain`: what `backend="fla"` would do to a model, without running it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fla_compile import dynamo
from fla_compile.backend import report_on
from fla_compile.options import Options
from fla_compile.passes.records import Refusal
from fla_compile.report import Report


class _Explained(Exception):
    """Carries the report out of Dynamo before anything is compiled or run."""


class _Explainer:
    is_fla_backend = True

    def __init__(self) -> None:
        self.options = Options()
        self.report: Report | None = None

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable:
        self.report, _ = report_on(gm, example_inputs, self.options)
        raise _Explained


def explain(model_or_fn: Callable, *args: Any, **kwargs: Any) -> Report:
    """Report the rewrites and refusals for this call of a model or function; nothing is run on the data.

    Only the part up to the first graph break is seen; a break is itself reported, with pattern "graph".
    """
    model_or_fn = getattr(model_or_fn, "_orig_mod", model_or_fn)
    model_or_fn = getattr(model_or_fn, "_torchdynamo_orig_callable", model_or_fn)
    dynamo.install()
    broken: tuple[Refusal, ...] = ()
    for fullgraph in (True, False):
        explainer = _Explainer()
        try:
            with torch._dynamo.config.patch(suppress_errors=False):
                torch.compile(model_or_fn, backend=explainer, fullgraph=fullgraph)(*args, **kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, _Explained):
                raise
        except torch._dynamo.exc.Unsupported as error:
            if not fullgraph:
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            broken = (Refusal("graph", "graph_break", lines[0] if lines else "", _where(lines)),)
            continue
        report = explainer.report or Report((), ())
        return Report(report.rewrites, report.refusals + broken, report.before, report.after, report.validation_seconds)
    raise AssertionError("unreachable")


def _where(lines: list[str]) -> str:
    """The last user line that Dynamo's message names."""
    from fla_compile.passes.places import innermost_frame, short_source

    return short_source(innermost_frame("\n".join(lines)))

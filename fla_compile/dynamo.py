"""With dynamo_scan, all that touches Dynamo's private parts; written against torch 2.11 to 2.13.

Three hooks, all inert unless the backend of the current compilation is ours:
* the function given to `torch.compile` is called through a small wrapper, so that it is inlined like any other;
* when Dynamo inlines a function that has time loops, it traces the function's twin (see passes/lift_loops.py) instead;
* where a lifted loop cannot be kept, Dynamo starts the frame again with that loop as the user wrote it.

If torch has moved what these hooks hang on, `install` says so once and compilation goes on without lifting.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch._guards import CompileContext, TracingContext

from fla_compile import dynamo_scan
from fla_compile.options import Options
from fla_compile.passes.lift_loops import LoopSite, lift_loops
from fla_compile.passes.loop_analysis import NO_TIME_LOOP, SILENT
from fla_compile.passes.loop_refusal import not_liftable
from fla_compile.passes.places import short_source
from fla_compile.passes.records import Refusal

log = logging.getLogger("fla_compile")
NO_USER_CODE = ("torch.", "einops.", "fla_compile.passes.", "fla_compile.dynamo")
Site = tuple[str, int]  # file name and line of a `for`


@dataclass
class Trace:
    """What lifting did in the trace that leads to the current graph."""

    lifted: dict[Site, LoopSite] = field(default_factory=dict)
    refusals: dict[Refusal, None] = field(default_factory=dict)


@dataclass
class Attempts:
    """What earlier traces of this compilation learnt; another compilation, of other shapes, starts afresh."""

    left: dict[Site, Refusal] = field(default_factory=dict)
    fixed_floats: bool = False


_installed: bool | None = None


def backend_options(compiler_fn: Any) -> Options | None:
    """The options of our backend if it is at the bottom of `compiler_fn`, else None."""
    given: Any = None
    for _ in range(10):
        if getattr(compiler_fn, "is_fla_backend", False):
            return getattr(compiler_fn, "options", None) or Options.parse(given)
        if isinstance(compiler_fn, functools.partial):
            given = compiler_fn.keywords.get("options", given)
            compiler_fn = compiler_fn.func
        elif hasattr(compiler_fn, "_torchdynamo_orig_backend"):
            compiler_fn = compiler_fn._torchdynamo_orig_backend
        elif hasattr(compiler_fn, "compiler_fn"):
            given = getattr(compiler_fn, "kwargs", {}).get("options", given)
            compiler_fn = compiler_fn.compiler_fn
        else:
            return None
    return None


def is_ours(output_graph: Any) -> bool:
    """Whether the backend of the compilation that makes this graph is ours."""
    return backend_options(getattr(output_graph, "compiler_fn", None)) is not None


def current_trace() -> Trace:
    """The record of the trace whose graph is being compiled."""
    context = TracingContext.try_get()
    return _trace_of(context) if context is not None else Trace()


def _trace_of(context: Any) -> Trace:
    if not hasattr(context, "fla_trace"):
        context.fla_trace = Trace()
    return context.fla_trace


def _attempts() -> Attempts:
    context = CompileContext.get()  # one object for all traces of a frame
    if not hasattr(context, "fla_attempts"):
        context.fla_attempts = Attempts()  # type: ignore[attr-defined]
    return context.fla_attempts  # type: ignore[attr-defined]


def leave_loops(refusals: dict[Site, Refusal]) -> BaseException:
    """The exception that makes Dynamo trace this frame again with these loops unlifted."""
    _attempts().left.update(refusals)
    return _trace_again()


def _trace_again() -> BaseException:
    from torch._dynamo import exc

    class TraceAgain(exc.UnspecializeRestartAnalysis, exc.TensorifyScalarRestartAnalysis):
        """The first base clears Dynamo's speculations, the second is let through when a backend raises it."""

    return TraceAgain(restart_reason="fla_compile changed its mind about a loop")


def want_fixed_floats(gm: torch.fx.GraphModule) -> None:
    """Trace again with constant Python floats if one that changed between calls became an operand of a loop."""
    attempts = _attempts() if CompileContext.try_get() is not None else Attempts(fixed_floats=True)
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.scan):
        for operand in node.args[3]:
            value = operand.meta.get("example_value") if isinstance(operand, torch.fx.Node) else operand
            if isinstance(value, torch.SymFloat) and not attempts.fixed_floats:
                attempts.fixed_floats = True
                raise _trace_again()


def _own_frame(fn: Callable) -> Callable:
    """A wrapper with a code object of its own: Dynamo keeps compiled code, and its limits, by code object."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    code = getattr(fn, "__code__", None) or getattr(getattr(type(fn), "forward", None), "__code__", None)
    # Code objects are equal by value: without a mark of its own, functions of one name would share theirs.
    mark = (code.co_filename, code.co_firstlineno) if code is not None else ()
    name = getattr(fn, "__name__", type(fn).__name__)
    call.__code__ = call.__code__.replace(co_name=name, co_consts=(*call.__code__.co_consts, mark))
    if isinstance(fn, FunctionType):
        call = functools.wraps(fn)(call)
    return call


def _inline_twin(original: Callable, parent: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
    from torch._dynamo import exc
    from torch._dynamo.variables.functions import UserFunctionVariable

    fn = getattr(func, "fn", None)
    if not isinstance(func, UserFunctionVariable) or not isinstance(fn, FunctionType):
        return original(parent, func, *args, **kwargs)
    if (fn.__module__ or "").startswith(NO_USER_CODE):
        return original(parent, func, *args, **kwargs)
    options = backend_options(parent.output.compiler_fn)
    if options is None or not options.runs("lift"):
        return original(parent, func, *args, **kwargs)
    attempts = _attempts()
    if attempts.fixed_floats and not torch._dynamo.config.specialize_float:
        with torch._dynamo.config.patch(specialize_float=True):
            return _inline_twin(original, parent, func, *args, **kwargs)
    left = attempts.left
    lifted = lift_loops(fn, skip=frozenset(left))
    trace = _trace_of(parent.output.tracing_context)
    first, last = fn.__code__.co_firstlineno, max((line or 0 for *_, line in fn.__code__.co_lines()), default=0)
    mine = [r for (name, line), r in left.items() if name == fn.__code__.co_filename and first <= line <= last]
    trace.refusals.update(dict.fromkeys(r for r in (*lifted.refusals, *mine) if r.reason not in SILENT))
    if lifted.twin is None:
        return original(parent, func, *args, **kwargs)
    trace.lifted.update({(site.filename, site.line): site for site in lifted.loops})
    func.fn = lifted.twin
    try:
        return original(parent, func, *args, **kwargs)
    except (exc.RestartAnalysis, exc.SkipFrame):
        raise
    except Exception as error:
        if not attempts.fixed_floats and not_liftable(error) is None:
            # A Python float that changed between calls becomes symbolic, which a scan does not take: try it constant.
            attempts.fixed_floats = True
            raise _trace_again() from error
        raise leave_loops(_why_not(error, lifted.loops)) from error
    finally:
        func.fn = fn


def _why_not(error: Exception, loops: tuple[LoopSite, ...]) -> dict[Site, Refusal]:
    """Which of a function's loops Dynamo could not trace as a scan, and why."""
    told = not_liftable(error)
    if told is not None:
        reason, detail, where, line = told
        mine = [s for s in loops if f"{s.filename}:{s.line}" == where]
    else:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason, detail, line, mine = "not_captured", (lines[0] if lines else type(error).__name__)[:200], 0, []
    refusals = {}
    for s in mine or loops:
        why = reason if s.certain or mine else NO_TIME_LOOP
        source = short_source((s.filename, line if mine and line else s.line))
        refusals[s.filename, s.line] = Refusal("recurrence", why, detail, source)
    return refusals


def install() -> bool:
    """Hook into Dynamo, once; False (after a warning) where this torch does not have what the hooks need."""
    global _installed
    if _installed is None:
        try:
            _hook()
            _installed = True
        except (ImportError, AttributeError) as error:
            log.warning("time loops are not lifted: torch %s has no %s", torch.__version__, error)
            _installed = False
        else:
            dynamo_scan.install(is_ours)
    return _installed


def _hook() -> None:
    from torch._dynamo import exc
    from torch._dynamo.eval_frame import _TorchDynamoContext, innermost_backend
    from torch._dynamo.symbolic_convert import InliningInstructionTranslator

    assert issubclass(exc.TensorifyScalarRestartAnalysis, exc.RestartAnalysis)
    assert issubclass(exc.UnspecializeRestartAnalysis, exc.RestartAnalysis)
    inline = InliningInstructionTranslator.__dict__["inline_call"].__func__
    decorate = _TorchDynamoContext.__call__

    @functools.wraps(inline)
    def inline_call(cls: Any, parent: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        return _inline_twin(functools.partial(inline, cls), parent, func, *args, **kwargs)

    @functools.wraps(decorate)
    def call(self: Any, fn: Any) -> Any:
        options = backend_options(innermost_backend(self.callback)) if self.callback else None
        if options is not None and options.runs("lift"):
            if getattr(fn, "__name__", "") == "_wrapped_call_impl" and isinstance(fn.__self__, torch.nn.Module):
                fn = _own_frame(fn.__self__)
            elif callable(fn) and not isinstance(fn, torch.nn.Module | type):
                fn = _own_frame(fn)
        return decorate(self, fn)

    InliningInstructionTranslator.inline_call = classmethod(inline_call)  # type: ignore[assignment]
    _TorchDynamoContext.__call__ = call  # type: ignore[method-assign]


@contextmanager
def untraced() -> Iterator[None]:
    """Run real tensors inside a backend: Dynamo's fake tensors and tracing state are put aside."""
    with torch._guards.tracing(None), torch.utils._python_dispatch._disable_current_modes():
        yield

"""What Dynamo does at a loop, put right; the hooks are inert unless the backend of the current compilation is ours.

* What a scan returns is found by running its body on fake tensors. The scan operator would make the graph of its
  gradients for that, half of all capture time, which nobody reads: what replaces the scan brings its own.
* An object made before a scan keeps the attributes that it is given after it, which Dynamo loses.
* A loop that is left as it is keeps its last step where a graph breaks in a comprehension over a reversed range:
  torch 2.13 goes on with a range that ends before 0.

Where torch has moved what a hook hangs on, `install` says so once and Dynamo goes on as it is.
"""

import functools
import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

log = logging.getLogger("fla_compile")
IsOurs = Callable[[Any], bool]  # of an output graph of Dynamo's
_finding_fakes: ContextVar[bool] = ContextVar("_finding_fakes", default=False)


def install(is_ours: IsOurs) -> None:
    """Hook into Dynamo; to be called once."""
    for hook in (_hook_fakes, _hook_side_effects, _hook_ranges, _hook_logger):
        try:
            hook(is_ours)
        except (ImportError, AttributeError, KeyError) as error:
            log.warning("time loops are captured less well: torch %s has no %s", torch.__version__, error)


def _steps(combine: Callable, init: Any, xs: Any, invariants: Any) -> tuple[torch.Tensor, ...]:
    """What a scan over fake tensors returns; its results need gradients where those of a loop in eager do."""
    first = [x.select(0, 0).clone() for x in xs]
    state = list(init)
    while True:
        results = combine(*state, *first, *invariants)
        after = results[: len(state)]
        grown = [new.requires_grad and not old.requires_grad for old, new in zip(state, after, strict=True)]
        if not any(grown):
            break
        state = [new if more else old for old, new, more in zip(state, after, grown, strict=True)]
    length = xs[0].shape[0]
    stacked = [y.expand(length, *y.shape).clone(memory_format=torch.contiguous_format) for y in results[len(init) :]]
    return (*after, *stacked)


def _hook_fakes(is_ours: IsOurs) -> None:
    from torch._dynamo import utils
    from torch._ops import HigherOrderOperator

    run_node, scan = utils.run_node, torch.ops.higher_order.scan
    differentiated = scan.py_kernels[torch._C.DispatchKey.Autograd]
    forget = scan._dispatch_cache.clear

    @functools.wraps(run_node)
    def run(tracer: Any, node: torch.fx.Node, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(node.target, HigherOrderOperator) or not is_ours(tracer):
            return run_node(tracer, node, *args, **kwargs)
        token = _finding_fakes.set(True)
        try:
            return run_node(tracer, node, *args, **kwargs)
        finally:
            _finding_fakes.reset(token)

    @functools.wraps(differentiated)
    def with_gradients(combine: Callable, init: Any, xs: Any, invariants: Any) -> Any:
        fake = all(isinstance(x, torch._subclasses.FakeTensor) for x in (*init, *xs))
        if not fake or not _finding_fakes.get() or not torch.is_grad_enabled():
            return differentiated(combine, init, xs, invariants)
        return _steps(combine, init, xs, invariants)

    scan.py_kernels[torch._C.DispatchKey.Autograd] = with_gradients
    forget()
    utils.run_node = run


def _hook_side_effects(is_ours: IsOurs) -> None:
    """Let an object's `__dict__` look into the current table of side effects.

    Dynamo puts another table in place of the one in force before a scan, and an object that remembers the old one
    stores into that, where nobody looks.
    """
    from torch._dynamo.variables import dicts

    own = "_fla_side_effects"

    def current(self: Any) -> Any:
        remembered = getattr(self, own)
        output = remembered.output_graph_weakref()
        return output.side_effects if output is not None and is_ours(output) else remembered

    # torch 2.11 has no such class.
    proxy = getattr(dicts, "SideEffectsProxyDict", None)
    if proxy is not None:
        proxy.side_effects = property(current, lambda self, table: setattr(self, own, table))


def _hook_ranges(is_ours: IsOurs) -> None:
    """What is left of a range over which the code after a graph break goes on."""
    from torch._dynamo.variables.lists import RangeIteratorVariable

    reconstruct = RangeIteratorVariable.reconstruct

    @functools.wraps(reconstruct)
    def whole(self: Any, codegen: Any) -> None:
        if is_ours(codegen.tx.output):
            self.stop = self.start + self.step * self.len
        reconstruct(self, codegen)

    RangeIteratorVariable.reconstruct = whole  # type: ignore[method-assign]


def _hook_logger(is_ours: IsOurs) -> None:
    """torch 2.11 left this logger at DEBUG, which prints the graphs of every scan."""
    from torch._higher_order_ops import partitioner

    logging.getLogger(partitioner.__name__).setLevel(logging.NOTSET)

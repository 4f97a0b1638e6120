"""What a step changes in place, as tracing shows it: helpers and methods do so where no syntax of the loop tells.

A tensor's version counts its changes, under every name and through every view; Dynamo's fake tensors count as well.
What is seen while the body of a scan is traced is noted here, for the code around the scan to ask for.
"""

import itertools
from typing import Any

import torch
from torch._dynamo.comptime import comptime

_looked_at: list[tuple[int, int]] = []
_notes: set[tuple] = set()
_kept_nodes: set[torch.fx.Node] = set()
_runs = itertools.count()


def _look(ctx: Any) -> None:
    x = ctx.get_local("x").as_fake()
    _looked_at[:] = [(x._version, x.untyped_storage()._cdata)]


def _scans(ctx: Any) -> list[torch.fx.Node]:
    scan = torch.ops.higher_order.scan
    return [n for n in ctx.graph().nodes if n.op == "call_function" and n.target is scan]


def _count_scans(ctx: Any) -> None:
    _looked_at[:] = [(len(_scans(ctx)), 0)]


def _look_inside(ctx: Any) -> None:
    """Note the memory of what the body of the last scan uses besides its states and steps."""
    for operand in _scans(ctx)[-1].args[3]:
        value = operand.meta.get("example_value") if isinstance(operand, torch.fx.Node) else None
        if isinstance(value, torch.Tensor):
            _notes.add(("used", value.untyped_storage()._cdata))


def _remember(ctx: Any) -> None:
    _kept_nodes.clear()
    _kept_nodes.update(ctx.graph().nodes)


def _erase(ctx: Any) -> None:
    graph = ctx.graph()
    for node in reversed(list(graph.nodes)):
        is_call = node.op in ("call_function", "call_method")
        is_size = isinstance(node.meta.get("example_value"), torch.SymInt | torch.SymFloat | torch.SymBool)
        if is_call and not is_size and node not in _kept_nodes and len(node.users) == 0:
            graph.erase_node(node)
    _kept_nodes.clear()


@torch._dynamo.assume_constant_result
def _first() -> int:
    return _looked_at[0][0]


@torch._dynamo.assume_constant_result
def _second() -> int:
    return _looked_at[0][1]


@torch._dynamo.assume_constant_result
def new_run() -> int:
    """A number for one loop; what earlier ones noted is forgotten."""
    _notes.difference_update([n for n in _notes if n[0] == "used"])
    return next(_runs)


@torch._dynamo.assume_constant_result
def note(*what: Any) -> bool:
    _notes.add(what)
    return True


@torch._dynamo.assume_constant_result
def noted(*what: Any) -> bool:
    return what in _notes


def version(x: Any) -> int:
    """How often the tensor was changed in place."""
    if not isinstance(x, torch.Tensor):
        return 0
    if not torch.compiler.is_compiling():
        return x._version
    comptime(_look)
    return _first()


def memory_of(x: torch.Tensor) -> int:
    """What is the same number for tensors that may share memory."""
    if not torch.compiler.is_compiling():
        return x.untyped_storage()._cdata
    comptime(_look)
    return _second()


def is_used_inside(x: torch.Tensor) -> bool:
    """Whether the body of the scan traced last has this memory under a name of its own."""
    if not torch.compiler.is_compiling():
        return False
    place = memory_of(x)
    comptime(_look_inside)
    return noted("used", place)


def holds_scan() -> bool:
    """Whether the body of a scan that is being traced has a scan itself."""
    if not torch.compiler.is_compiling():
        return False
    comptime(_count_scans)
    return _first() > 0


def begin_aside() -> None:
    """From here on to `end_aside` the program runs only for what its trace shows."""
    if torch.compiler.is_compiling():
        comptime(_remember)


def end_aside() -> None:
    """Take what was traced since `begin_aside`, and nobody uses, out of the graph."""
    if torch.compiler.is_compiling():
        comptime(_erase)

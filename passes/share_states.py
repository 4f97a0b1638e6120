"""Give the final states of lifted loops the memory that they have in eager.

Before: a state that a step sets to a view, `prev = x[:, t]`, leaves its scan as a copy, as all that a scan returns.
After: what follows the loop reads `x[:, T - 1]` itself, so that writing to it reaches the argument, and the reverse.

Legal because the last step of the loop as written makes that very view; the scan still carries the values. A scan
written by the user is left alone: it does return copies.
Refused (`state_escapes`): views whose origin depends on the number of steps, or on the step itself.
"""

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import fx

from fla_compile.passes.log_decay import op_name
from fla_compile.passes.memory import HANDS_ON, memory, share
from fla_compile.passes.places import short_source
from fla_compile.passes.records import Refusal, Refused
from fla_compile.passes.scans import Scan, scan_nodes, take_apart

MAX_VIEWS = 8


@dataclass(frozen=True)
class Origin:
    """A final state is `views` of the body, innermost first, of `node` outside; of its entry `index` if not None."""

    node: fx.Node
    index: int | None
    views: tuple[fx.Node, ...]


def origin_of(scan: Scan, i: int) -> Origin | None:
    """Whose memory the final state i has in eager, None for memory of its own; raises `Refused`."""
    inputs = scan.body.graph.find_nodes(op="placeholder")
    outputs = scan.body.graph.output_node().args[0]
    states, reads = len(scan.init), len(scan.reads)
    length = scan.reads[0].meta["example_value"].shape[0]
    views: list[fx.Node] = []
    state, back = i, 0
    while True:
        back += 1
        if op_name(outputs[state]) != "clone":
            return None
        base, chain = _viewed(outputs[state].args[0])
        views += chain
        if base.op != "placeholder":
            return _same_result(scan, i, base, tuple(reversed(views))) if back == 1 else None
        place = inputs.index(base)
        if len(views) > MAX_VIEWS:
            raise Refused("state_escapes", "the memory of a final state depends on the number of steps")
        if place >= states + reads:
            return Origin(scan.operands[place], None, tuple(reversed(views)))
        if place >= states:
            return _read(scan.operands[place], back, tuple(reversed(views)))
        unchanged = place == state and not chain
        if unchanged or (isinstance(length, int) and back == length):
            return _first(scan.init[place], tuple(reversed(views)))
        if back > 1 and not isinstance(length, int):  # a dynamic length is 2 or more
            raise Refused("state_escapes", "the memory of a final state depends on the number of steps")
        state = place


def _viewed(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """What a node of the body is a view of, and the views from the outermost in."""
    chain = []
    while node.op in ("call_function", "call_method") and op_name(node) in HANDS_ON:
        first = node.args[0]
        if not isinstance(first, fx.Node) or not memory(first) & memory(node):
            break
        chain.append(node)
        node = first
    return node, chain


def _read(node: fx.Node, back: int, views: tuple[fx.Node, ...]) -> Origin:
    if op_name(node) == "flip" and isinstance(node.args[0], fx.Node):  # how a loop from right to left is read
        return Origin(node.args[0], back - 1, views)
    return Origin(node, -back, views)


def _first(node: fx.Node, views: tuple[fx.Node, ...]) -> Origin:
    if op_name(node) in ("clone", "contiguous") and not memory(node) & memory(node.args[0]):
        raise Refused("state_escapes", "a final state may be the tensor that another one started as")
    return Origin(node, None, views)


def _same_result(scan: Scan, i: int, base: fx.Node, views: tuple[fx.Node, ...]) -> Origin | None:
    """Another final state of which this one is a view, if there is one."""
    outputs = scan.body.graph.output_node().args[0]
    results = {user.args[1]: user for user in scan.node.users}
    for j in range(len(scan.init)):
        if j in results and outputs[j].args[0] is base and (j < i or (views and j != i)):
            return Origin(results[j], None, views)
    return None


def _check_replayable(scan: Scan, origin: Origin) -> None:
    if any(node.target is torch._C._set_grad_enabled for node in scan.body.graph.nodes):
        raise Refused("state_escapes", "a final state may be a view made without gradients")
    invariants = scan.body.graph.find_nodes(op="placeholder")[len(scan.init) + len(scan.reads) :]
    for view in origin.views:
        if not set(view.all_input_nodes[1:]) <= set(invariants):
            raise Refused("state_escapes", "a final state is a view at a place that the step computes")


def _replace(scan: Scan, result: fx.Node, origin: Origin) -> None:
    graph = scan.node.graph
    where = origin.node if origin.node in scan.node.users else scan.node
    env: dict[fx.Node, fx.Node] = dict(
        zip(scan.body.graph.find_nodes(op="placeholder"), scan.operands, strict=True)  # type: ignore[arg-type]
    )
    with graph.inserting_before(where.next):
        value = origin.node
        if origin.index is not None:
            value = graph.call_method("select", (value, 0, origin.index))
        for view in origin.views:
            env[view.args[0]] = value  # type: ignore[index]
            value = graph.node_copy(view, env.__getitem__)
        if value is origin.node:
            share(graph, memory(result), memory(value))
        else:
            value.meta = result.meta
            share(graph, memory(result), memory(origin.node))
    result.replace_all_uses_with(value)
    graph.erase_node(result)


def share_states(gm: fx.GraphModule, lifted: Container[tuple[str, int] | None]) -> list[tuple[Refusal, Scan]]:
    """Rewrite `gm` in place; returns the loops that cannot be kept, `lifted` are the places of those from loops."""
    refusals = []
    for node in scan_nodes(gm):
        scan = take_apart(gm, node)
        if scan.place not in lifted:
            continue
        try:
            results = [(user, origin_of(scan, user.args[1])) for user in node.users if user.args[1] < len(scan.init)]
            found = [(result, origin) for result, origin in results if origin is not None and result.users]
            for _, origin in found:
                _check_replayable(scan, origin)
        except Refused as refused:
            refusals.append((refused.record("recurrence", short_source(scan.place)), scan))
            continue
        for result, origin in found:
            _replace(scan, result, origin)
    return refusals

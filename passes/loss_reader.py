"""Read a graph once, in order: which of its values come from logits, and what they are (`loss_values`)."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from fla_compile.passes.loss_reductions import REDUCTIONS
from fla_compile.passes.loss_rules import ARITHMETIC
from fla_compile.passes.loss_values import Losses, Value
from fla_compile.passes.loss_views import VIEWS
from fla_compile.passes.spellings import call_of, tensor_of

RULES = {**ARITHMETIC, **REDUCTIONS}


def read(losses: Losses, graph: fx.Graph, rules: Mapping[str, Callable[..., Value | None]] = RULES) -> None:
    """Value by value, in order; `losses` starts with the logits."""
    for node in graph.nodes:
        known = losses.values.keys() | losses.pairs
        if node in losses.values or known.isdisjoint(node.all_input_nodes):
            continue
        call = call_of(node)
        rule = rules.get(call.name) if call is not None else None
        if call is not None and call.name == "max" and _is_pair(node):
            losses.pairs.add(node)
            continue
        if call is None or rule is None or tensor_of(node) is None or call.get("out") is not None:
            continue
        if call.in_place and not _is_alone(call.get("input"), node):
            continue
        try:
            value = rule(losses, call, node)
        except Exception:  # arguments that the rule does not know: never the program's trouble
            value = None
        if value is not None:
            losses.values[node] = value
            if call.in_place:
                losses.values[call.get("input")] = value
                losses.writes.setdefault(call.get("input"), []).append(node)


def _is_alone(written: Any, by: fx.Node) -> bool:
    """Whether nothing that stands in front of what writes over a tensor can still see what was in it."""
    call = call_of(written) if isinstance(written, fx.Node) else None
    if call is None or call.name in VIEWS:
        return False
    order = {node: i for i, node in enumerate(by.graph.nodes)}
    earlier = [user for user in written.users if order[user] < order[by]]
    return all((made := call_of(user)) is not None and made.in_place for user in earlier)


def _is_pair(node: fx.Node) -> bool:
    calls = [call_of(user) for user in node.users]
    return all(call is not None and call.name == "getitem" and call.get("index") == 0 for call in calls)

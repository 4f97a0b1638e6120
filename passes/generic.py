"""A group of states of no known family: which part of the step stays in the loop, and what it takes in and hands out.

Only what depends on the states stays, and what is much smaller to recompute than to read. Of what depends on them, the
loop computes the new states, and hands out what the rest of the step needs: a value is taken where it is small, so
that norms, gates and projections run after the loop for all steps at once, and a matrix state is read out inside.
"""

import torch
from torch import fx

from fla_compile.passes.read_outs import wanted
from fla_compile.passes.records import Refused
from fla_compile.passes.recurrence import Generic
from fla_compile.passes.step import Step, elements

# Operations that shrink or grow a tensor count as small below, or large above, this factor.
MUCH = 2


def generic(step: Step, group: frozenset[int], why: Refused) -> Generic:
    """The loop for the states in `group`."""
    inside = ancestors(step, [step.next_carries[i] for i in group])
    emitted: dict[fx.Node, None] = {}
    for node in wanted(step):
        hand_out(step, node, inside, emitted)
    body = ancestors(step, [*(step.next_carries[i] for i in group), *emitted])
    inputs: dict[fx.Node, None] = {}
    for node in step.gm.graph.nodes:
        if node in body:
            for n in node.all_input_nodes:
                if not step.stateful(n):
                    take_in(step, n, inputs)
    for node in (*(step.next_carries[i] for i in group), *emitted):
        if not step.stateful(node):
            take_in(step, node, inputs)
    return Generic(tuple(sorted(group)), tuple(inputs), tuple(emitted), why)


def ancestors(step: Step, nodes: list[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on the states in focus and that `nodes` need."""
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found and step.stateful(node):
            found.add(node)
            todo.extend(node.all_input_nodes)
    return found


def hand_out(step: Step, node: fx.Node, inside: set[fx.Node], emitted: dict[fx.Node, None]) -> None:
    """Choose what the loop hands out so that `node` can be computed after it."""
    if node in emitted or not step.stateful(node):
        return
    below = []
    for n in node.all_input_nodes:
        if isinstance(n.meta.get("val"), torch.Tensor):
            below.append(n)
        elif n in inside:  # a part of what an operation with several results gives
            emitted[node] = None
            return
        else:
            below += n.all_input_nodes
    below = [n for n in below if step.stateful(n)]
    small = elements(node) * MUCH <= sum(elements(n) for n in below)
    if node in inside or node in step.carries or (small and not step.pending(node)):
        emitted[node] = None
        return
    for n in below:
        hand_out(step, n, inside, emitted)


def take_in(step: Step, node: fx.Node, inputs: dict[fx.Node, None]) -> None:
    """Choose what the loop reads of a stateless node: its value, or where that is much larger, what it is made of."""
    if node in inputs:
        return
    below = [n for n in node.all_input_nodes if n in step.timed]
    plain = node.op == "call_function" and all(isinstance(n.meta.get("val"), torch.Tensor) for n in below)
    if plain and below and elements(node) > MUCH * sum(elements(n) for n in below):
        for n in node.all_input_nodes:
            take_in(step, n, inputs)
    else:
        inputs[node] = None

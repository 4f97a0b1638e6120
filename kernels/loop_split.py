"""Cut the graph of one step into what runs before a loop, in every step of it, and after it.

    prologue    what depends on invariants only, once a call
    body        carried', written_t, summed += body(carried, streams_t, invariants)
    epilogue    of a backward: matrix products that only feed gradients of reads and invariants, for all steps at once

The parts compute what the whole would: a prologue is the same at every step, and nothing that is carried on to the next
step depends on an epilogue.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fla_compile.kernels.loop_step import PRODUCTS, is_view, results_of

aten = torch.ops.aten
Label = tuple[str, int]


@dataclass
class Body:
    """`graph` takes carried values, streams, invariants and returns carried values, what is written, what is summed.

    Labels tell the streams, invariants and results apart; `results` are the outputs' fake values, all contiguous.
    """

    graph: fx.Graph
    carried: list[int]
    streams: list[Label]
    invariants: list[Label]
    written: list[Label]
    summed: list[Label]
    prologue: fx.GraphModule | None = None
    hoisted_from: list[int] = field(default_factory=list)
    epilogue: "Epilogue | None" = None

    @property
    def results(self) -> dict[Label, Tensor]:
        values = [n.meta["val"] for n in results_of(self.graph)[len(self.carried) :]]
        return dict(zip([*self.written, *self.summed], values, strict=True))


@dataclass
class Epilogue:
    """Nodes that run after the loop; `inputs` says where the values at the border come from."""

    inputs: dict[fx.Node, Label]
    timed: set[fx.Node]
    written: dict[Label, fx.Node]
    summed: dict[Label, fx.Node]


def _ancestors(results: Iterable[fx.Node], stop: Iterable[fx.Node]) -> set[fx.Node]:
    found, todo, border = set(), list(results), set(stop)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            if node not in border:
                todo.extend(node.all_input_nodes)
    return found


def subgraph(graph: fx.Graph, inputs: Sequence[fx.Node], results: Sequence[fx.Node]) -> fx.Graph:
    """The part of `graph` that computes `results` from `inputs`, which may be inner nodes."""
    part = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        env[node] = part.placeholder(node.name)
        env[node].meta["val"] = node.meta["val"]
    needed = _ancestors(results, inputs)
    for node in graph.nodes:
        if node in needed and node not in env:
            env[node] = part.node_copy(node, lambda n: env[n])
    part.output(tuple(env[node] for node in results))
    return part


def lay_out(graph: fx.Graph, contiguous: Sequence[fx.Node]) -> None:
    """Make operands `contiguous` and follow their strides through the graph.

    A value that the forward kept, or that was computed once for all steps, is given as a contiguous tensor also where
    the node that it stands for had other strides.
    """
    strided = [node for node in contiguous if not node.meta["val"].is_contiguous()]
    if not strided:
        return
    with strided[0].meta["val"].fake_mode:
        for node in strided:
            node.meta["val"] = torch.empty_like(node.meta["val"], memory_format=torch.contiguous_format)
        for node in graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])  # type: ignore
                node.meta["val"] = node.target(*args, **kwargs)


def split(
    graph: fx.Graph,
    carried: Sequence[fx.Node],
    indices: Iterable[int],
    inputs: dict[fx.Node, Label],
    following: Sequence[fx.Node],
    written: dict[Label, fx.Node],
    summed: dict[Label, fx.Node],
    defer: bool = False,
) -> Body:
    """Cut `graph` into prologue, body and epilogue; `inputs` labels every value that is given to it."""
    results = [*following, *written.values(), *summed.values()]
    needed = _ancestors(results, [*inputs, *carried])
    operands = [node for node, label in inputs.items() if label[0] == "operand"]
    fixed = _fixed(graph, needed, operands, {*inputs, *carried})
    outside = {n for node in needed - fixed if node not in inputs for n in node.all_input_nodes} | set(results)
    same = {*operands}  # views of operands cost nothing in the loop
    for node in graph.nodes:
        if (is_view(node) or node.target is operator.getitem) and node.all_input_nodes[0] in same:
            same.add(node)
    hoisted = [node for node in graph.nodes if node in fixed and node in outside and node not in same]
    prologue = None
    if hoisted:
        part = subgraph(graph, operands, hoisted)
        prologue = fx.GraphModule(torch.nn.Module(), part)
    inputs = inputs | {node: ("hoisted", h) for h, node in enumerate(hoisted)}
    epilogue = None
    if defer:
        epilogue = _epilogue(graph, carried, inputs, following, written, summed)
        if epilogue is not None:
            written = {label: node for label, node in written.items() if label not in epilogue.written}
            written |= {label: node for node, label in epilogue.inputs.items() if label[0] == "cut"}
            summed = {label: node for label, node in summed.items() if label not in epilogue.summed}
    results = [*following, *written.values(), *summed.values()]
    needed = _ancestors(results, [*inputs, *carried])
    used = [node for node in inputs if node in needed]
    streams = [node for node in used if inputs[node][0] not in ("operand", "hoisted")]
    invariants = [node for node in used if node not in set(streams)]
    body = subgraph(graph, [*carried, *streams, *invariants], results)
    given = zip([*carried, *streams, *invariants], body.find_nodes(op="placeholder"), strict=True)
    lay_out(body, [place for node, place in given if inputs.get(node, ("carried", 0))[0] != "operand"])
    return Body(
        body,
        list(indices),
        [inputs[node] for node in streams],
        [inputs[node] for node in invariants],
        list(written),
        list(summed),
        prologue,
        [inputs[node][1] for node in operands],
        epilogue,
    )


def _fixed(graph: fx.Graph, needed: set[fx.Node], operands: Sequence[fx.Node], given: set[fx.Node]) -> set[fx.Node]:
    """What depends on invariant operands and constants only; constants alone are left for the compiler to fold."""
    fixed, constant = set(operands), set()
    for node in graph.nodes:
        if node not in needed or node in given or node.op == "placeholder":
            continue
        inputs = node.all_input_nodes
        if all(n in constant for n in inputs):
            constant.add(node)
        elif all(n in constant or n in fixed for n in inputs):
            fixed.add(node)
    return fixed


def _epilogue(
    graph: fx.Graph,
    carried: Sequence[fx.Node],
    inputs: dict[fx.Node, Label],
    following: Sequence[fx.Node],
    written: dict[Label, fx.Node],
    summed: dict[Label, fx.Node],
) -> Epilogue | None:
    """What the loop need not compute: matrix products that end in sums over time or multiply by an invariant.

    Over all steps these are one product, not T small ones. Elementwise work stays in the loop, where it is fused and
    its operands are in the cache.
    """
    given = {*inputs, *carried}
    needed = _ancestors([*written.values(), *summed.values()], given) - given
    looped = _ancestors(following, given)
    deferred: set[fx.Node] = set()
    for node in graph.nodes:
        if node not in needed or node in looped or node in deferred:
            continue
        packet = getattr(node.target, "overloadpacket", None)
        if packet in PRODUCTS and packet is not aten.convolution:
            after = _descendants(graph, node) & needed
            with_invariant = any(inputs.get(_root(n, given), ("", 0))[0] in ("operand", "hoisted") for n in node.args)
            if not after & set(written.values()) or (packet is aten.mm and with_invariant):
                deferred |= after
    if not deferred:
        return None
    outside = {node: label for label, node in written.items() if node not in deferred}
    border: dict[fx.Node, Label] = {}
    todo, seen = [n for node in deferred for n in node.all_input_nodes], set(deferred)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in inputs:
            border[node] = inputs[node]
        elif node not in carried and (is_view(node) or not node.all_input_nodes):
            todo.extend(node.all_input_nodes)
        else:
            border[node] = outside.get(node, ("cut", len(border)))
    timed = {node for node, label in border.items() if label[0] not in ("operand", "hoisted")}
    for node in graph.nodes:
        if node in seen and any(n in timed for n in node.all_input_nodes):
            timed.add(node)
    return Epilogue(
        border,
        timed,
        {label: node for label, node in written.items() if node in deferred},
        {label: node for label, node in summed.items() if node in deferred},
    )


def _descendants(graph: fx.Graph, root: fx.Node) -> set[fx.Node]:
    found = {root}
    for node in graph.nodes:
        if any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _root(node: Any, given: set[fx.Node]) -> Any:
    while isinstance(node, fx.Node) and node not in given and is_view(node):
        node = node.all_input_nodes[0]
    return node

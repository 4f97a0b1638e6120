"""The pieces of a graph in which T x T matrices or running sums may hide a recurrence.

A piece holds what has two axes of one size, or is computed from a cumulative sum; the masks and positions that go into
it; the views, casts and outer products just in front of it; and the first operations behind it, one of which may be
the read-out. What feeds a piece is opaque to it. Tensors that no data reach, such as masks, may belong to many pieces.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fla_compile.passes.log_decay import CASTS, VIEWS, op_name
from fla_compile.passes.memory import _writes, memory
from fla_compile.passes.normal_form import same_size

SHAPE_ONLY = {
    "ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full",
}  # fmt: skip
# Without one of these there is no causal mask.
MASKING = {
    "tril", "triu", "tril_", "triu_", "ge", "gt", "le", "lt", "eq", "ne", "greater", "greater_equal", "less",
    "less_equal", "not_equal", "eye", "cumsum", "cumsum_", "relu", "clamp", "clamp_min", "maximum", "abs",
}  # fmt: skip
SOFTMAX = {"softmax", "log_softmax", "_softmax", "_log_softmax"}
BARRIERS = SOFTMAX | {"scaled_dot_product_attention", "dropout", "linear"}
ARITHMETIC = {
    "mul", "add", "sub", "rsub", "neg", "exp", "div", "imul", "iadd", "isub", "itruediv", "masked_fill", "where",
}  # fmt: skip
OUTER = {"mul", "einsum", "matmul", "bmm"}
RANDOM = {"empty", "empty_like", "new_empty", "dropout", "normal", "bernoulli", "multinomial", "normal_", "uniform_"}
MODES = {
    "_set_grad_enabled", "_enter_autocast", "_exit_autocast", "_enter_inference_mode", "_exit_inference_mode",
    "set_grad_enabled",
}  # fmt: skip
LARGEST = 600


@dataclass
class Region:
    """`nodes` in the order of the graph: `free` those that no data reach, `exits` the last; `inputs` feed them."""

    nodes: list[fx.Node]
    free: set[fx.Node]
    exits: set[fx.Node]
    inputs: list[fx.Node] = field(default_factory=list)

    @property
    def tensors(self) -> list[fx.Node]:
        return [n for n in self.nodes if tensor_of(n) is not None]

    @property
    def bound(self) -> list[fx.Node]:
        return [n for n in self.nodes if n not in self.free]


def tensor_of(node: Any) -> torch.Tensor | None:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def is_square(node: fx.Node) -> bool:
    """Two axes of one size."""
    value = tensor_of(node)
    sizes = [] if value is None else [s for s in value.shape if not same_size(s, 1)]
    return any(same_size(a, b) for n, a in enumerate(sizes) for b in sizes[n + 1 :])


def elements(node: fx.Node) -> int:
    value = tensor_of(node)
    total = 1
    for size in () if value is None else value.shape:
        total *= size if isinstance(size, int) else int(size.node.hint or 1)
    return total


def _computes(node: fx.Node) -> bool:
    if op_name(node) == "setitem":
        return tensor_of(node.args[0]) is not None
    value = tensor_of(node)
    return node.op in ("call_function", "call_method") and value is not None and value.layout == torch.strided


def _is_free(node: fx.Node, free: set[fx.Node]) -> bool:
    """Whether no data reach a tensor, but sizes at most."""
    name = op_name(node)
    if name in SHAPE_ONLY:
        return True
    if "nondeterministic_seeded" in str(getattr(node.target, "tags", "")) or "rand" in name or name in RANDOM:
        return False
    scalars = (int, float, torch.SymInt, torch.SymFloat)
    return all(n in free or isinstance(n.meta.get("example_value"), scalars) for n in node.all_input_nodes)


def find_regions(graph: fx.Graph) -> list[Region]:
    """All pieces of a graph with a mask and something to read out, in linear time."""
    free: set[fx.Node] = set()
    inside: set[fx.Node] = set()
    running: set[fx.Node] = set()
    exits: list[fx.Node] = []
    order = {node: n for n, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not _computes(node):
            continue
        name, tensors = op_name(node), [n for n in node.all_input_nodes if tensor_of(n) is not None]
        if _is_free(node, free):
            free.add(node)
            continue
        if name == "setitem":
            if node.args[0] in inside:
                inside.add(node)
            continue
        floating = tensor_of(node).dtype.is_floating_point
        sums = (name == "cumsum" and floating) or (
            any(n in running for n in tensors)
            and (name in VIEWS | CASTS | ARITHMETIC or elements(node) >= max(elements(n) for n in tensors))
        )
        if sums and name not in BARRIERS:
            running.add(node)
        if (sums or is_square(node)) and name not in BARRIERS:
            inside.add(node)
        elif any(n in inside for n in tensors) and floating and name not in BARRIERS:
            exits.append(node)
    if not inside:
        return []
    groups = _Groups()
    members = {*inside, *exits}
    extra = _in_front(members, free)
    for node in (*members, *extra):
        for n in node.all_input_nodes:
            if n in members or n in extra:
                groups.join(node, n)
    found = []
    for group in groups.groups({*members, *extra}):
        if any(_is_read(node, group) for node in group):
            region = _complete(group, free, group & set(exits), order)
            if len(region.nodes) <= LARGEST and any(op_name(n) in MASKING for n in region.nodes):
                found.append(region)
    return sorted(found, key=lambda region: order[region.bound[0]])


def _is_read(node: fx.Node, group: set[fx.Node]) -> bool:
    """Whether a node of a piece is used outside of it other than by a softmax."""
    return any(user not in group and op_name(user) not in SOFTMAX for user in node.users)


def _in_front(members: Iterable[fx.Node], free: set[fx.Node]) -> set[fx.Node]:
    """Views, casts that lose nothing and outer products that feed a piece."""
    extra: set[fx.Node] = set()
    todo = [n for node in members for n in node.all_input_nodes]
    known = set(members)
    while todo:
        node = todo.pop()
        if node in extra or node in known or node in free or not _computes(node):
            continue
        tensors = [n for n in node.all_input_nodes if tensor_of(n) is not None]
        if not tensors:
            continue
        have, want = tensor_of(tensors[0]), tensor_of(node)
        name = op_name(node)
        lossless = name in CASTS and torch.promote_types(have.dtype, want.dtype) == want.dtype
        outer = name in OUTER and elements(node) > max(elements(n) for n in tensors)
        if (name in VIEWS and tensor_of(node.args[0]) is not None) or lossless or outer:
            extra.add(node)
            todo += node.all_input_nodes
    return extra


def _complete(group: set[fx.Node], free: set[fx.Node], exits: set[fx.Node], order: dict[fx.Node, int]) -> Region:
    """Add what no data reach: that which a piece is computed from, and writes to it."""
    nodes, todo = set(group), list(group)
    writers = [n for n in free if _writes(n)]
    while todo:
        while todo:
            for n in todo.pop().all_input_nodes:
                if n in free and n not in nodes:
                    nodes.add(n)
                    todo.append(n)
        held = frozenset[int]().union(*(memory(n) for n in nodes & free)) if writers else frozenset[int]()
        todo = [w for w in writers if w not in nodes and _writes(w) & held]
        nodes.update(todo)
    ordered = sorted(nodes, key=order.__getitem__)
    inputs = dict.fromkeys(n for node in ordered for n in node.all_input_nodes if n not in nodes)
    return Region(ordered, nodes & free, exits, list(inputs))


class _Groups:
    """Union-find over nodes."""

    def __init__(self) -> None:
        self.parent: dict[fx.Node, fx.Node] = {}

    def root(self, node: fx.Node) -> fx.Node:
        while self.parent.get(node, node) is not node:
            node = self.parent[node]
        return node

    def join(self, a: fx.Node, b: fx.Node) -> None:
        self.parent[self.root(a)] = self.root(b)

    def groups(self, nodes: Iterable[fx.Node]) -> list[set[fx.Node]]:
        found: dict[fx.Node, set[fx.Node]] = {}
        for node in nodes:
            found.setdefault(self.root(node), set()).add(node)
        return list(found.values())


def sound(region: Region) -> bool:
    """Whether a piece can be read as a function of its inputs.

    All inputs are known, it writes to nothing but its own, nothing else writes to what it holds until it has run, and
    neither gradients nor autocast are switched inside it.
    """
    if any(n.op == "get_attr" or n.meta.get("example_value") is None for n in region.inputs):
        return False
    first, last, members = region.bound[0], region.bound[-1], set(region.nodes)
    outer = frozenset[int]().union(*(memory(n) for n in region.inputs))
    own, read, running = frozenset[int](), frozenset[int](), False
    inputs = set(region.inputs)
    for node in first.graph.nodes:
        running = running or node is first
        if node.op in ("call_function", "call_method"):
            writes = _writes(node)
            if node in members and writes & outer:
                return False
            if node not in members and (writes & own or (running and (writes & read or op_name(node) in MODES))):
                return False
        if node is last:
            return True
        if node in inputs:
            read |= memory(node)
        if node in members and node not in region.exits:
            own |= memory(node)
    return True


def body_of(gm: fx.GraphModule, region: Region) -> fx.GraphModule:
    """The piece as a module from `inputs` to the values of its nodes, each as it was when it was computed."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in region.inputs:
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)
    changed = frozenset[int]().union(*(_writes(node) for node in region.nodes))
    results = []
    for node in region.nodes:
        value = env[node] = graph.node_copy(node, env.__getitem__)
        if tensor_of(node) is not None:
            results.append(graph.call_function(torch.clone, (value,)) if memory(node) & changed else value)
    graph.output(tuple(results))
    return fx.GraphModule(gm, graph)


def live_nodes(region: Region, replaced: set[fx.Node], kept: set[fx.Node]) -> set[fx.Node]:
    """The nodes of a piece that are still wanted once `replaced` are computed from `kept` in another way."""
    members, live = set(region.nodes), set[fx.Node]()
    todo = [n for n in region.nodes if n in kept or any(u not in members for u in n.users)]
    writers = [n for n in region.nodes if _writes(n)]
    while todo:
        while todo:
            node = todo.pop()
            if node in members and node not in live and node not in replaced:
                live.add(node)
                todo += node.all_input_nodes
        held = frozenset[int]().union(*(memory(n) for n in live))
        todo = [w for w in writers if w not in live and w not in replaced and _writes(w) & held]
    return live

"""The module that takes the place of a scan, as it is built: operands, layouts, and parts that run over all steps.

parallel part    what does not depend on a state that is still unknown, mapped over time by vmap
operands         products of factors, laid out as q, k [B,T,H,K], v [B,T,H,V], log decay, initial state [B,H,K,V]
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fla_compile.passes.normal_form import Factor, Labels, Term, same_size
from fla_compile.passes.over_time import OverTime
from fla_compile.passes.polynomials import materialise
from fla_compile.passes.step import Step, shape_of

TIME = -1  # stands for the time axis among labels


class Looped(nn.Module):
    """Runs one step after another: states, reads that lead by [T, ...] and invariants to final states and outputs.

    It stands for the loop operator, which takes its place in the user's graph, where the loop is to be checked.
    """

    def __init__(self, step: fx.GraphModule, carries: int, reads: int):
        super().__init__()
        self.step, self.carries, self.reads = step, carries, reads

    def forward(self, steps: int, *operands: Any) -> tuple[torch.Tensor, ...]:
        state = operands[: self.carries]
        reads, invariants = operands[self.carries :][: self.reads], operands[self.carries + self.reads :]
        outputs = []
        for t in range(steps):
            results = self.step(*state, *(x[t] for x in reads), *invariants)
            state = results[: self.carries]
            outputs.append(results[self.carries :])
        return *state, *(torch.stack(ys) for ys in zip(*outputs, strict=True))


def extract(step: Step, operands: Sequence[fx.Node], results: Sequence[fx.Node]) -> fx.GraphModule:
    """The part of the step's graph that computes `results` from those of `operands` that it needs."""
    graph = fx.Graph()
    given = set(operands)
    needed: set[fx.Node] = set()
    todo = list(results)
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            if node not in given:
                todo.extend(node.all_input_nodes)
    env: dict[fx.Node, fx.Node] = {}
    for node in operands:
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)
    for node in step.gm.graph.nodes:
        if node in needed and node not in given:
            env[node] = graph.node_copy(node, lambda n: env[n])
    graph.output(tuple(env[node] for node in results))
    return fx.GraphModule(step.gm, graph)


def used_operands(step: Step, operands: Sequence[fx.Node], results: Sequence[fx.Node]) -> list[fx.Node]:
    """Those of `operands` from which `results` are computed, the nearest ones."""
    given, seen, todo = set(operands), set(), list(results)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            if node not in given:
                todo.extend(node.all_input_nodes)
    return [node for node in operands if node in seen]


def factor_dtype(step: Step, factors: Sequence[Factor], state: torch.dtype) -> torch.dtype:
    """The type of the factors' product: that of a single one, else the state's."""
    if len(factors) == 1:
        own = step.atoms[factors[0].atom].node.meta["val"].dtype
        return own if own.is_floating_point else state
    return state


@dataclass(frozen=True)
class Layout:
    """An operand's axes, each made of the labels of one role, in the order that a kernel wants."""

    roles: tuple[Labels, ...]

    @property
    def order(self) -> list[int]:
        return [label for role in self.roles for label in role]


class Lowering:
    """`self.node` maps nodes of the step that are known for all steps to nodes of `self.graph`, time first."""

    def __init__(self, step: Step, zero_init: Sequence[bool], logs: Sequence[int]):
        self.step, self.zero_init, self.logs = step, zero_init, tuple(logs)
        self.graph, self.root = fx.Graph(), nn.Module()
        self.node: dict[fx.Node, fx.Node] = {}
        self.operands = [*step.carries, *step.reads, *step.invariants]
        places = [self.graph.placeholder(node.name) for node in self.operands]
        self.init = places[: len(step.carries)]
        for i, (node, place) in enumerate(zip(self.operands, places, strict=True)):
            if i >= len(step.carries) or i in step.idle:
                self.node[node] = place
        self.log_node: dict[fx.Node, fx.Node] = {}
        for index in self.logs:
            self.log_node[self.operands[index]] = self.graph.placeholder(f"log_{self.operands[index].name}")
        self.sizes: dict[int, Any] = {}
        self.shared: set[fx.Node] = set()  # nodes of the graph that share memory with others
        self.length = self.call(torch.ops.aten.sym_size.int, places[len(step.carries)], 0)

    def call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(function, args, kwargs)

    def cast(self, tensor: fx.Node, have: torch.dtype | None, want: torch.dtype) -> fx.Node:
        return tensor if have == want else self.graph.call_method("to", (tensor, want))

    def size(self, label: int) -> Any:
        """The size of a label (or of time) as a number or a node."""
        if label == TIME:
            return self.length
        if label not in self.sizes:
            self.sizes[label] = self.extent(self.step.space.sizes[label])
        return self.sizes[label]

    def extent(self, size: Any) -> Any:
        """A size of the step as a number, or as a node that takes it from an operand where it is dynamic."""
        if isinstance(size, int):
            return size
        for i, node in enumerate(self.operands):
            value = node.meta["val"]
            if isinstance(value, torch.Tensor):
                place = self.init[i] if i < len(self.init) else self.node[node]
                for axis, extent in enumerate(value.shape):
                    if same_size(extent, size):
                        return self.call(torch.ops.aten.sym_size.int, place, axis + (node in self.step.reads))
        raise ValueError(f"size must be the extent of an operand, got {size}")

    def product(self, labels: Sequence[int]) -> Any:
        sizes = [self.size(label) for label in labels]
        total: Any = math.prod(s for s in sizes if isinstance(s, int))
        for size in sizes:
            if not isinstance(size, int):
                total = size if isinstance(total, int) and total == 1 else self.call(torch.mul, total, size)
        return total

    def parallel(self, wanted: Sequence[fx.Node]) -> None:
        """Compute nodes of the step from what is known, for all steps at once."""
        for timed in (False, True):
            todo = [n for n in dict.fromkeys(wanted) if n not in self.node and (n in self.step.timed) == timed]
            if todo:
                inputs = used_operands(self.step, list(self.node), todo)
                operands = [(n, self.node[n], n in self.step.timed) for n in inputs]
                for node, result in zip(todo, self.over_time(operands, todo), strict=True):
                    self.node[node] = result

    def over_time(self, operands: Sequence[tuple[fx.Node, fx.Node, bool]], results: Sequence[fx.Node]) -> list[fx.Node]:
        """Nodes of the step for all steps, from (node, its value here, whether that has time)."""
        part = extract(self.step, [node for node, _, _ in operands], results)
        timed = [t for _, _, t in operands]
        module: nn.Module = OverTime(part, timed) if any(timed) else part
        target = f"part_{len(self.root._modules)}"
        self.root.add_module(target, module)
        call = self.graph.call_module(target, tuple(value for _, value, _ in operands))
        return [self.call(operator.getitem, call, i) for i in range(len(results))]

    def stream(self, node: fx.Node) -> fx.Node:
        """A node of the step that may be the same at every step, as [T, ...]."""
        self.parallel([node])
        if node in self.step.timed:
            return self.node[node]
        return self.call(torch.Tensor.expand, self.node[node], self.length, *([-1] * len(shape_of(node))))

    def given(self, node: fx.Node, carry: fx.Node, value: fx.Node) -> fx.Node:
        """A node of the step as [T, ...], for a state that has the same `value` at every step."""
        inputs = used_operands(self.step, [*self.node, carry], [node])
        operands = [(n, value, False) if n is carry else (n, self.node[n], n in self.step.timed) for n in inputs]
        (result,) = self.over_time(operands, [node])
        if any(timed for _, _, timed in operands):
            return result
        return self.call(torch.Tensor.expand, result, self.length, *([-1] * len(shape_of(node))))

    def plus(self, tensor: fx.Node, rest: tuple[Term, ...], dims: tuple[Labels, ...], dtype: torch.dtype) -> fx.Node:
        """A read-out [T, *dims] plus the stateless terms that belong to it."""
        if not rest:
            return tensor
        labels = [label for axis in dims for label in axis]
        factor = materialise(self.step, rest, labels)
        layout = Layout(((TIME,), *((label,) for label in labels)))
        node = self.step.atoms[factor.atom].node
        added = self.call(
            torch.reshape,
            self.operand((factor,), layout, dtype, node.meta["val"].device),
            [self.length, *(self.product(axis) for axis in dims)],
        )
        return self.cast(self.call(torch.add, tensor, added), None, dtype)

    def laid_out(self, tensor: fx.Node, axes: tuple[Labels, ...], timed: bool, order: Sequence[int]) -> fx.Node:
        """`tensor` [T?, *axes] with one axis for each entry of `order`, of size 1 where it has none."""
        flat = [label for axis in axes for label in axis]
        have = ([TIME] if timed else []) + flat
        if any(len(axis) != 1 for axis in axes):
            tensor = self.call(torch.reshape, tensor, [self.size(label) for label in have])
        wanted = [label for label in order if label in have]
        if wanted != have:
            tensor = self.call(torch.permute, tensor, [have.index(label) for label in wanted])
        for i, label in enumerate(order):
            if label not in have:
                tensor = self.call(torch.unsqueeze, tensor, i)
        return tensor

    def group(
        self,
        factors: Sequence[tuple[Factor, fx.Node]],
        order: Sequence[int],
        dtype: torch.dtype | None,
        combine: Any = torch.mul,
    ) -> fx.Node | None:
        """The product (or sum) of factors over the axes `order`, broadcast but not yet expanded."""
        total: fx.Node | None = None
        for factor, tensor in factors:
            part = self.laid_out(tensor, factor.axes, self.step.is_timed(factor), order)
            if dtype is not None:
                part = self.cast(part, None, dtype)
            total = part if total is None else self.call(combine, total, part)
        return total

    def full(self, tensor: fx.Node, layout: Layout, have: set[int]) -> fx.Node:
        """Expand to all labels of the layout, of which the tensor has `have`, and merge each role into one axis."""
        if not have.issuperset(layout.order):
            sizes = (self.size(label) for label in layout.order)
            tensor = self.graph.call_method("expand", (tensor, *sizes))
        if all(len(role) == 1 for role in layout.roles):
            return tensor
        return self.call(torch.reshape, tensor, [self.product(role) for role in layout.roles])

    def operand(self, factors: Sequence[Factor], layout: Layout, dtype: torch.dtype, device: torch.device) -> fx.Node:
        """The product of factors in a layout; several are multiplied in `dtype`, one alone keeps its own."""
        self.parallel([self.step.atoms[f.atom].node for f in factors])
        pairs = [(f, self.node[self.step.atoms[f.atom].node]) for f in factors]
        narrow = len(factors) == 1 and self.step.atoms[factors[0].atom].node.meta["val"].dtype.is_floating_point
        total = self.group(pairs, layout.order, None if narrow else dtype)
        if total is None:
            total = self.call(torch.ones, [1] * len(layout.order), dtype=dtype, device=device)
        return self.full(total, layout, self.labels_of(factors))

    def labels_of(self, factors: Sequence[Factor]) -> set[int]:
        timed = any(self.step.is_timed(f) for f in factors)
        return {label for f in factors for label in f.labels} | ({TIME} if timed else set())

    def restored(
        self, tensor: fx.Node, layout: Layout, dims: tuple[Labels, ...], timed: bool, dropped: Sequence[int] = ()
    ) -> fx.Node:
        """A kernel's result back to the axes that the program has, time first; of `dropped` labels only one is kept."""
        have = layout.order
        if any(len(role) != 1 for role in layout.roles):
            tensor = self.call(torch.reshape, tensor, [self.size(label) for label in have])
        for label in dropped:
            tensor = self.call(torch.select, tensor, have.index(label), 0)
            have.remove(label)
        order = ([TIME] if timed else []) + [label for axis in dims for label in axis]
        if order != have:
            tensor = self.call(torch.permute, tensor, [have.index(label) for label in order])
        if any(len(axis) != 1 for axis in dims):
            shape = ([self.length] if timed else []) + [self.product(axis) for axis in dims]
            tensor = self.call(torch.reshape, tensor, shape)
        return tensor

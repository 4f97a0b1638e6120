"""Check a recognised loss: run the program's operations and the kernel on few random rows; values and gradients agree.

Rows are few and the layer's inputs narrow, the classes all there, as programs know their number. Views are made for the
small sizes; everything else runs as the program has it, in float64.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fla_compile.passes.loss_decide import NEVER, Loss
from fla_compile.passes.loss_emit import Emitter
from fla_compile.passes.loss_rules import is_zero
from fla_compile.passes.loss_values import Axis, Label, Losses, Value, flat, is_one, resolved
from fla_compile.passes.loss_views import from_end
from fla_compile.passes.records import Refused
from fla_compile.passes.spellings import call_of, is_cast, tensor_of
from fla_compile.passes.validate import TOLERANCE, error, gradients, in_float64

ROWS = 3  # along an axis, more where a slice begins late
WIDTH = 3
LARGE = 1 << 24
_RESIZED = {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "ravel", "expand"}


class Sizes:
    """A small size for every label, so that no slice is empty."""

    def __init__(self) -> None:
        self.known: dict[Label, int] = {}

    def __call__(self, label: Label) -> int:
        if label.whole:
            return label.size
        if label not in self.known:
            if label.span is not None and label.parent is not None:
                self.known[label] = len(range(*slice(*label.span).indices(self(label.parent))))
            elif label.parts:
                self.known[label] = self(label.parts[0]) * self(label.parts[1])
            else:
                self.known[label] = ROWS + len(self.known) % 2 + _cut_off(label)
        return self.known[label]

    def shape(self, dims: tuple[Axis, ...]) -> list[int]:
        return [self.product(axis) for axis in dims]

    def product(self, axis: Axis) -> int:
        total = 1
        for label in axis:
            total *= self(label)
        return total


def _cut_off(label: Label) -> int:
    """Steps that slices of a label, and of its slices, leave out at most."""
    return max((abs(c.span[0] or 0) + abs(c.span[1] or 0) + _cut_off(c) for c in label.cuts), default=0)


def needed(losses: Losses, frontier: fx.Node, root: fx.Node) -> list[fx.Node]:
    """The nodes from the layer `root` to a value, in order."""
    found, todo = set[fx.Node](), [frontier]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += losses.writes.get(node, [])
            if node is not root:
                todo += [n for n in node.all_input_nodes if n in losses.values or n in losses.pairs]
    return [node for node in frontier.graph.nodes if node in found]


class Program:
    """The operations from the layer to the loss, at small sizes, as a graph of `operands`."""

    def __init__(self, losses: Losses, frontier: fx.Node, loss: Loss):
        self.losses, self.loss, self.sizes = losses, loss, Sizes()
        self.graph = fx.Graph()
        self.operands: list[torch.Tensor] = []
        self.inputs: dict[fx.Node, fx.Node] = {}
        generator = torch.Generator().manual_seed(0)
        self.random = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
        root = loss.value.root
        V = root.classes.size
        shape = [1 if is_one(label.size) else self.sizes(label) for label in root.rows]
        self.picked = self.drawn(loss, generator)
        self.mask = lambda *size: torch.rand(size, generator=generator) > 0.3
        if root.weight is None:
            self.add(root.node, self.random(*shape, V))
        else:
            self.add(root.x, self.random(*shape, WIDTH))
            self.add(root.weight, self.random(*((WIDTH, V) if root.transposed else (V, WIDTH))))
        if root.bias is not None:
            self.add(root.bias, self.random(V))
        self.leaves = len(self.operands)
        for node in needed(losses, frontier, root.node):
            if node is not root.node and losses.values.get(node) is not None:
                self.operands_of(node)
        env: dict[fx.Node, fx.Node] = {}
        for node in needed(losses, frontier, root.node):
            env[node] = self.logits() if node is root.node else self.copied(node, env)
        self.graph.output((env[frontier],))

    def drawn(self, loss: Loss, generator: torch.Generator) -> torch.Tensor:
        """Targets over their own rows in `order`."""
        self.order, V = loss.target.order, loss.value.root.classes.size
        count = self.sizes.product(self.order)
        if count * V > LARGE:
            raise Refused("validation_failed", f"{count} rows are too many to run on random data")
        picked = torch.randint(0, V, (count,), generator=generator)
        if loss.ignore_index != NEVER:
            picked[1::3] = loss.ignore_index
        return picked.reshape([self.sizes(label) for label in self.order])

    def add(self, node: fx.Node, value: torch.Tensor) -> None:
        if node not in self.inputs:
            self.inputs[node] = self.graph.placeholder(f"operand_{len(self.operands)}")
            self.operands.append(value)

    def operands_of(self, node: fx.Node) -> None:
        for operand in node.all_input_nodes if node not in self.losses.picks else [self.losses.picks[node]]:
            self.operand(operand)

    def operand(self, node: fx.Node) -> None:
        if node in self.losses.values or node in self.losses.pairs or node in self.inputs or is_zero(node):
            return
        if node in self.losses.one_hots:
            target = self.losses.one_hots[node]
            hot = torch.nn.functional.one_hot(self.targets(target.dims).clamp(min=0), self.loss.value.root.classes.size)
            self.add(target.node, self.targets(target.dims))
            return self.add(node, hot.double())
        if node not in self.losses.laid:
            raise Refused("validation_failed", f"nothing says what {node.name} is made of")
        dims, dtype = self.losses.laid[node], tensor_of(node).dtype
        shape = self.sizes.shape(dims)
        if dtype == torch.bool:
            self.add(node, self.mask(*shape))
        elif set(flat(dims)) == set(self.order) and not dtype.is_floating_point:
            self.add(node, self.targets(dims))
        else:
            self.add(node, self.random(*shape).abs() + 0.1)

    def targets(self, dims: tuple[Axis, ...]) -> torch.Tensor:
        own = flat(dims)
        return self.picked.permute([self.order.index(label) for label in own]).reshape(self.sizes.shape(dims))

    def logits(self) -> fx.Node:
        root = self.loss.value.root
        shape = self.sizes.shape(resolved(self.losses.values[root.node].dims))
        if root.weight is None:
            return self.graph.call_method("reshape", (self.inputs[root.node], shape))
        weight = self.inputs[root.weight]
        weight = self.graph.call_method("t", (weight,)) if root.transposed else weight
        bias = None if root.bias is None or self.by_hand() else self.inputs[root.bias]
        out = self.graph.call_function(torch.nn.functional.linear, (self.inputs[root.x], weight, bias))
        first = self.losses.values[root.node].class_axis == 0 and len(root.rows) > 0
        if first:
            out = self.graph.call_function(torch.movedim, (out, -1, 0))
        return self.graph.call_method("reshape", (out, shape))

    def by_hand(self) -> bool:
        return self.losses.values[self.loss.value.root.node].root.bias is None

    def copied(self, node: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
        call = call_of(node)
        value: Value | None = self.losses.values.get(node)
        source = env.get(call.get("input")) if call is not None else None
        if is_cast(node) or (call is not None and call.name in ("cpu", "cuda", "to")):
            return source
        if value is not None and call.name in _RESIZED:
            return self.graph.call_method("reshape", (source, self.sizes.shape(resolved(value.dims))))
        before = self.losses.values.get(call.get("input")) if call is not None else None
        if node in self.losses.picks:
            index = self.graph.call_method("unsqueeze", (self.inputs[self.losses.picks[node]], -1))
            return self.graph.call_method("squeeze", (self.graph.call_function(torch.gather, (source, -1, index)), -1))
        if value is not None and before is not None and call.name in ("getitem", "narrow"):
            return self.sliced(source, before, call)

        def operand(other: fx.Node) -> Any:
            return env.get(other) or self.inputs.get(other) or (0.0 if is_zero(other) else None)

        return self.graph.create_node(node.op, node.target, *fx.map_arg((node.args, node.kwargs), operand))

    def sliced(self, source: fx.Node, before: Value, call: Any) -> fx.Node:
        """The same slices, with ends counted from the end."""
        sizes = [axis[0].size if len(axis) == 1 else None for axis in resolved(before.dims)]
        if call.name == "narrow":
            dim = call.get("dim") % len(sizes)
            stop = from_end(call.get("start") + call.get("length"), sizes[dim])
            index: tuple[Any, ...] = (*[slice(None)] * dim, slice(call.get("start"), stop))
            return self.graph.call_function(operator.getitem, (source, index))
        given = call.get("index")
        given = given if isinstance(given, tuple) else (given,)
        used = sum(i is not None and i is not Ellipsis for i in given)
        new, at = [], 0
        for entry in given:
            if entry is Ellipsis:
                at = len(sizes) - used
            elif isinstance(entry, slice):
                entry, at = slice(entry.start, from_end(entry.stop, sizes[at])), at + 1
            elif entry is not None:
                at += 1
            new.append(entry)
        return self.graph.call_function(operator.getitem, (source, tuple(new)))


def check(losses: Losses, frontier: fx.Node, loss: Loss, emitter: Callable[..., Emitter] = Emitter) -> float:
    """The largest relative error; raises `Refused("validation_failed")` beyond tolerance."""
    return compare(lambda: Program(losses, frontier, loss), lambda program: _kernel(program, loss, emitter))


def compare(program_of: Callable[[], Any], kernel_of: Callable[[Any], fx.Graph]) -> float:
    """The same for any program and the graph that replaces it."""
    try:
        program = program_of()
        holder = torch.nn.Module()
        before = fx.GraphModule(holder, program.graph)
        after = fx.GraphModule(holder, kernel_of(program))
        with torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            operands = [x.requires_grad_() if i < program.leaves else x for i, x in enumerate(program.operands)]
            want, got = list(in_float64(before)(*operands)), list(in_float64(after)(*operands))
            wanted = [x for x in operands if x.requires_grad]
            pairs = [("value", error(a, b)) for a, b in zip(got, want, strict=True)]
            slopes = zip(gradients(got, wanted), gradients(want, wanted), strict=True)
            pairs += [("gradient", error(a, b)) for a, b in slopes]
    except Refused:
        raise
    except Exception as why:  # a replacement that cannot run must not cost the user the program
        detail = f"loss and kernel do not run on random data: {type(why).__name__}: {why}"
        raise Refused("validation_failed", detail) from why
    kind, size = max(pairs, key=lambda pair: pair[1] if pair[1] == pair[1] else float("inf"))
    if not size <= TOLERANCE[torch.float64]:
        raise Refused("validation_failed", f"{kind} of loss and kernel differ by {size:.2e}")
    return size


def _kernel(program: Program, loss: Loss, emitter: Callable[..., Emitter]) -> fx.Graph:
    graph = fx.Graph()
    mine = {node: graph.placeholder(x.name) for node, x in program.inputs.items()}
    writer = emitter(graph, mine, program.sizes, faked=False)
    needs = (True, True, loss.value.root.bias is not None)
    graph.output((writer.loss(loss, needs, torch.float64, None),))
    return graph

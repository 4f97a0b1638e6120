"""Write a recognised loss as the kernel's operator and what goes around it, into a graph of any sizes."""

import operator
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import fx

from fla_compile.kernels.linear_cross_entropy_ops import linear_cross_entropy_forward  # noqa: F401
from fla_compile.passes.appending import Appending
from fla_compile.passes.loss_decide import Loss
from fla_compile.passes.loss_values import Axis, Dims, Label, Root, flat, is_one, resolved
from fla_compile.passes.records import Refused
from fla_compile.passes.spellings import tensor_of

E = TypeVar("E", bound="Emitter")


@dataclass
class Emitter(Appending):
    """Appends nodes at the insertion point of `graph`; `env` says which of its nodes stand for those of the program.

    `size` gives the size of a label where it is a number. `faked` gives new nodes fake values.
    """

    graph: fx.Graph
    env: Mapping[fx.Node, fx.Node]
    size: Callable[[Label], Any]
    faked: bool
    added: list[fx.Node] = field(default_factory=list)
    extents: dict[Label, fx.Node] = field(default_factory=dict)

    def extent(self, label: Label) -> Any:
        size = self.size(label)
        return size if isinstance(size, int) else self.extents[label]

    def axis(self, labels: Axis) -> Any:
        total: Any = 1
        for label in labels:
            size = self.extent(label)
            if isinstance(total, int) and (isinstance(size, int) or total == 1):
                total = total * size if isinstance(size, int) else size
            else:
                total = self.call(operator.mul, total, size)
        return total

    def rows_of(self, x: fx.Node, labels: tuple[Label, ...], wanted: set[Label]) -> tuple[fx.Node, tuple[Label, ...]]:
        """The rows of x [*labels, D] that `wanted` names, as [N, D], and their axes in order."""
        have = list(labels)
        i = 0
        while i < len(have):
            label = have[i]
            cut = next((c for c in label.cuts if wanted & set(_descendants(c))), None)
            if label in wanted or (cut is None and not label.parts and is_one(label.size)):
                i += 1
            elif label.parts:
                x = self.method("unflatten", x, i, [self.size(part) for part in label.parts])
                have[i : i + 1] = label.parts
            elif cut is not None and cut.span is not None:
                x = self.call(operator.getitem, x, (*[slice(None)] * i, slice(*cut.span)))
                have[i] = cut
            else:
                raise Refused("unsupported_loss", "its rows are not the layer's")
        order = tuple(label for label in have if label in wanted)
        if len(order) != len(wanted):
            raise Refused("unsupported_loss", "its rows are not the layer's")
        for i, label in enumerate(have):
            if not isinstance(self.size(label), int):
                self.extents[label] = self.method("size", x, i)
        return (self.method("flatten", x, 0, -2) if len(have) > 1 else x), order

    def laid_out(self, node: fx.Node, dims: Dims, order: tuple[Label, ...]) -> fx.Node:
        """A tensor over some rows as a vector over all of them [N]."""
        node, own = self.env[node], flat(dims)
        if own == order:
            return self.method("reshape", node, -1)
        node = self.method("reshape", node, [self.extent(label) for label in own])
        present = [label for label in order if label in own]
        if present != list(own):
            node = self.method("permute", node, [own.index(label) for label in present])
        for i, label in enumerate(order):
            if label not in own:
                node = self.method("unsqueeze", node, i)
        if len(present) < len(order):
            node = self.method("expand", node, [self.extent(label) for label in order])
        return self.method("reshape", node, -1)

    def uncut(self, rows: fx.Node, order: tuple[Label, ...], axes: dict[Label, Any], fill: float) -> fx.Node:
        """Numbers of the loss's rows [N], laid over all rows of the logits with `fill` where a slice left rows out."""
        if any(spans_of(label)[1] for label in order):
            rows = self.method("reshape", rows, [self.extent(label) for label in order])
        for i, label in enumerate(order):
            whole, spans = spans_of(label)
            size = axes.get(whole, self.size(whole))
            for start, stop in reversed(spans):
                after = 0 if stop is None else -stop
                if after < 0:
                    if len(spans) > 1:
                        raise Refused("unsupported_loss", "its rows are a slice of a slice that ends at a number")
                    after = size - stop if isinstance(size, int) else self.call(operator.sub, size, stop)
                ends = [self.filled(rows, len(order), i, n, fill) for n in (start or 0, after)]
                rows = self.call(torch.cat, [*ends[0], rows, *ends[1]], i)
        return self.method("reshape", rows, list(axes.values()))

    def filled(self, rows: fx.Node, axes: int, axis: int, size: Any, fill: float) -> list[fx.Node]:
        """What is joined to an axis, if anything. Not by padding: that would fix dynamic sizes."""
        if isinstance(size, int) and size == 0:
            return []
        have = tensor_of(rows).shape if self.faked else (None,) * axes
        shape = [n if isinstance(n, int) else self.method("size", rows, i) for i, n in enumerate(have)]
        shape[axis] = size
        return [self.method("new_full", rows, shape, fill)]

    def cut(self, rows: fx.Node, order: tuple[Label, ...], axes: dict[Label, Any]) -> fx.Node:
        """The other way: a number for each row of the logits as one for each row of the loss [N]."""
        if any(spans_of(label)[1] for label in order):
            wholes = [spans_of(label)[0] for label in order]
            rows = self.method("reshape", rows, [axes.get(whole, self.size(whole)) for whole in wholes])
        for i, label in enumerate(order):
            for span in spans_of(label)[1]:
                rows = self.call(operator.getitem, rows, (*[slice(None)] * i, slice(*span)))
        return self.method("reshape", rows, -1)

    def loss(self, loss: Loss, needs: tuple[bool, ...], dtype: torch.dtype, narrow: torch.dtype | None) -> fx.Node:
        """`narrow` is the type that autocast casts the layer's operands to."""
        value, root = loss.value, loss.value.root
        x, order = self.rows_of(self.env[root.x], root.rows, set(flat(loss.target.dims)))
        weight, bias = self.env[root.weight], None if root.bias is None else self.env[root.bias]
        if root.transposed:
            weight = self.method("t", weight)
        if narrow is not None:
            x, weight = self.method("to", x, narrow), self.method("to", weight, narrow)
            bias = None if bias is None else self.method("to", bias, narrow)
        target, weights = self.targets(loss, order)
        cap = 0.0 if value.form.cap is None else abs(value.form.cap)
        found = self.call(
            torch.ops.fla_compile.linear_cross_entropy.default, x, weight, bias, target, weights, loss.ignore_index,
            loss.smoothing, cap, value.form.scale, loss.z_loss, loss.reduction, *needs,
        )  # fmt: skip
        return self.finished(self.call(operator.getitem, found, 0), loss, order, dtype)

    def targets(self, loss: Loss, order: tuple[Label, ...]) -> tuple[fx.Node, fx.Node | None]:
        """The targets [N] and the rows' weights [N], if any."""
        target = self.laid_out(loss.target.node, loss.target.dims, order)
        if loss.target.wraps:
            last = self.call(torch.add, self.method("to", target, torch.int64), loss.value.root.classes.size)
            target = self.call(torch.where, self.call(torch.lt, target, 0), last, target)
        for mask, sense, dims in loss.keeps:
            dropped = self.laid_out(mask, dims, order)
            dropped = self.call(torch.logical_not, dropped) if sense else dropped
            target = self.method("masked_fill", self.method("to", target, torch.int64), dropped, loss.ignore_index)
        return target, self.weighed(loss.weights, order)

    def weighed(self, given: tuple[tuple[fx.Node, Dims], ...], order: tuple[Label, ...]) -> fx.Node | None:
        """The rows' weights [N], if there are any."""
        weights: fx.Node | None = None
        for factor, dims in given:
            part = self.laid_out(factor, dims, order)
            weights = part if weights is None else self.call(torch.mul, weights, part)
        return weights

    def finished(self, result: fx.Node, loss: Loss, order: tuple[Label, ...], dtype: torch.dtype) -> fx.Node:
        """The program's value from the kernel's."""
        if loss.factor != 1.0:
            result = self.call(torch.mul, result, loss.factor)
        if loss.over_rows:
            result = self.call(torch.div, result, self.axis(order))
        for divisor in loss.over:
            result = self.call(torch.div, result, self.laid_out_scalar(divisor))
        return self._shaped(self.method("to", result, dtype), loss, order)

    def laid_out_scalar(self, node: fx.Node) -> fx.Node:
        return self.method("reshape", self.env[node], [])

    def _shaped(self, result: fx.Node, loss: Loss, order: tuple[Label, ...]) -> fx.Node:
        dims = resolved(loss.value.dims)
        if loss.reduction != "none":
            return self.method("reshape", result, [1] * len(dims)) if dims else result
        own = flat(dims)
        if own != order:
            result = self.method("reshape", result, [self.extent(label) for label in order])
            result = self.method("permute", result, [order.index(label) for label in own])
        if len(dims) == 1:
            return result if own == order else self.method("reshape", result, -1)
        return self.method("reshape", result, [self.axis(axis) for axis in dims])


def _descendants(label: Label) -> list[Label]:
    return [label, *(x for child in (*label.parts, *label.cuts) for x in _descendants(child))]


def spans_of(label: Label) -> tuple[Label, list[tuple[int | None, int | None]]]:
    """The axis that a label was cut from, and the slices in their order."""
    spans = list[tuple[int | None, int | None]]()
    while label.span is not None and label.parent is not None:
        spans.insert(0, label.span)
        label = label.parent
    return label, spans


def narrowed(loss: Loss) -> torch.dtype | None:
    """The type in which the layer runs where it is not that of its operands."""
    have, run = tensor_of(loss.value.root.x).dtype, tensor_of(loss.value.root.node).dtype
    return None if have == run else run


def wanted_of(node: fx.Node, root: Root) -> tuple[bool, ...]:
    """Which of a layer's x, weight and bias get gradients of the loss `node`."""
    operands = root.x, root.weight, root.bias
    return tuple(tensor_of(node).requires_grad and x is not None and tensor_of(x).requires_grad for x in operands)


def put(
    graph: fx.Graph,
    node: fx.Node,
    emitter: Callable[..., E],
    write: Callable[[E], fx.Node],
    own: Container[fx.Node],
) -> tuple[int, int]:
    """Put what `write` writes in the place of the loss `node`; those of `own` that nothing wants any more are removed.

    Returns how many nodes went and came.
    """
    return put_all(graph, (node,), emitter, lambda writer: [write(writer)], own)


def put_all(
    graph: fx.Graph,
    nodes: Sequence[fx.Node],
    emitter: Callable[..., E],
    write: Callable[[E], list[fx.Node]],
    own: Container[fx.Node],
) -> tuple[int, int]:
    """The same for several losses, at the place of the last of `nodes`; the others are used behind it alone."""
    before, last = len(graph.nodes), nodes[-1]
    with graph.inserting_before(last):
        writer = emitter(graph, {n: n for n in graph.nodes}, lambda label: label.size, faked=True)
        try:
            results = write(writer)
        except Exception as error:  # a mistake of ours must not cost the user the program
            for new in reversed(writer.added):
                graph.erase_node(new)
            if isinstance(error, Refused):
                raise
            raise Refused("validation_failed", f"cannot be written: {type(error).__name__}: {error}") from error
    for new in writer.added:
        new.meta.setdefault("stack_trace", last.meta.get("stack_trace"))
    for node, result in zip(nodes, results, strict=True):
        fake = tensor_of(node)
        node.replace_all_uses_with(result)
        result.meta["example_value"] = fake
    for old in reversed(list(graph.nodes)):
        if old in own and not old.users:  # what writes over another layer's output has no users either, and stays
            graph.erase_node(old)
    return before + len(writer.added) - len(graph.nodes), len(writer.added)

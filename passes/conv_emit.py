"""Write a convolution into a graph: its operands as the operator wants them, the operator or its taps, the result back.

x [B, T, D]       the batch axes in one, then time, then the channels in one
weight [D, W]     the program's own, or its taps side by side
op                torch.ops.fla_compile.short_conv
taps              sum_j weight[:, j] * padded[:, j : j + T], which Inductor makes one loop of
"""

import operator
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fla_compile.passes.appending import Appending
from fla_compile.passes.conv_decide import TIME, Conv
from fla_compile.passes.memory import memory
from fla_compile.passes.normal_form import Factor, Labels, Term, same_size
from fla_compile.passes.spellings import tensor_of
from fla_compile.passes.windows import ZERO, Row, Window, Windows, fixed


@dataclass(frozen=True)
class Head:
    """What follows a convolution: SiLU or not, then a residual or not; `node` is the last, `inner` all before it."""

    node: fx.Node
    silu: bool = False
    residual: fx.Node | None = None
    inner: frozenset[fx.Node] = frozenset()


@dataclass
class Emitter(Appending):
    """Appends nodes to `graph` at its insertion point; `env` says which of its nodes stand for those of the program.

    What lies in `changed` memory is copied, as a kernel may keep it for its backward. `faked` gives nodes fake values.
    """

    windows: Windows
    graph: fx.Graph
    env: Mapping[fx.Node, fx.Node]
    changed: Set[int]
    faked: bool
    added: list[fx.Node] = field(default_factory=list)

    def held(self, node: fx.Node) -> fx.Node:
        """A node of the program."""
        here = self.env.get(node, node)
        return self.method("clone", here) if memory(node) & self.changed else here

    def cast(self, node: fx.Node, have: torch.dtype, want: torch.dtype) -> fx.Node:
        return node if have == want else self.method("to", node, want)

    def permuted(self, node: fx.Node, order: Sequence[int]) -> fx.Node:
        return node if list(order) == sorted(order) else self.method("permute", node, *order)

    def length(self, conv: Conv) -> Any:
        """The number of steps, as a number or a node."""
        return self.count(conv.x, conv.time, conv.length)

    def count(self, node: fx.Node, axis: int, length: Any) -> Any:
        """A part of an axis, as a number or a node."""
        if isinstance(length, int):
            return length
        left = fixed(tensor_of(node).shape[axis] - length)
        size = self.size(node, axis)
        return self.call(operator.sub, size, left) if left else size

    def steps(self, node: fx.Node, axis: int, start: int, length: Any) -> fx.Node:
        """A slice; torch.narrow would make a dynamic length a constant."""
        end = start + length if isinstance(length, int) else self.call(operator.add, length, start) if start else length
        return self.call(operator.getitem, node, (*[slice(None)] * axis, slice(start, end)))

    def relabelled(self, conv: Conv, node: fx.Node, have: Sequence[Labels], want: Sequence[Labels]) -> fx.Node:
        """A tensor whose axes carry the labels `have`, with the axes `want`; time without a label is of size 1."""
        if tuple(have) == tuple(want):
            return node
        for axis in reversed(range(len(have))):
            if not have[axis]:
                node = self.call(torch.squeeze, node, axis)
            elif len(have[axis]) > 1:
                node = self.call(torch.unflatten, node, axis, [self.extent(conv, label) for label in have[axis]])
        labels, wanted = ([label for own in axes for label in own] for axes in (have, want))
        if TIME in labels and TIME not in wanted:
            node = self.call(torch.squeeze, node, labels.index(TIME))
            labels.remove(TIME)
        elif TIME in wanted and TIME not in labels:
            node, labels = self.call(torch.unsqueeze, node, 0), [TIME, *labels]
        node = self.permuted(node, [labels.index(label) for label in wanted])
        for axis, own in enumerate(want):
            if not own:
                node = self.call(torch.unsqueeze, node, axis)
            elif len(own) > 1:
                node = self.call(torch.flatten, node, axis, axis + len(own) - 1)
        return node

    def extent(self, conv: Conv, label: int) -> Any:
        """The size of a label, as a number or a node."""
        size = fixed(self.windows.space.sizes[label])
        return size if isinstance(size, int) else self.size(conv.x, conv.labels.index((label,)))

    def size(self, node: fx.Node, axis: int) -> Any:
        size = fixed(tensor_of(node).shape[axis])
        return size if isinstance(size, int) else self.method("size", self.env.get(node, node), axis)

    def x(self, conv: Conv) -> fx.Node:
        node, size = self.held(conv.x), tensor_of(conv.x).shape[conv.time]
        if conv.first or not same_size(size, conv.length):
            node = self.steps(node, conv.time, conv.first, self.length(conv))
        return self.relabelled(conv, node, conv.labels, conv.groups)

    def state(self, conv: Conv) -> fx.Node | None:
        """The steps before the first, [B, W - 1, D], None where all are zeros."""
        if all(row == ZERO for row in conv.rows):
            return None
        pieces: list[list[Row]] = []
        for row in conv.rows:
            if pieces and _follows(pieces[-1][-1], row):
                pieces[-1].append(row)
            else:
                pieces.append([row])
        parts = []
        for rows in pieces:
            first = rows[0]
            if first.node is None:
                one = self.call(torch.narrow, self.env.get(conv.x, conv.x), conv.time, 0, 1)
                zeros = self.call(torch.zeros_like, one)
                parts += [zeros] * len(rows)
                continue
            node = self.held(first.node)
            if not same_size(tensor_of(first.node).shape[first.axis], len(rows)):
                node = self.call(torch.narrow, node, first.axis, first.index, len(rows))
            parts.append(self.permuted(node, first.order))
        whole = parts[0] if len(parts) == 1 else self.call(torch.cat, parts, conv.time)
        return self.relabelled(conv, whole, conv.labels, conv.groups)

    def weight(self, conv: Conv) -> fx.Node:
        """[D, W]."""
        whole = self.whole_weight(conv)
        return self.call(torch.stack, [self.vector(conv, terms) for terms in conv.taps], 1) if whole is None else whole

    def whole_weight(self, conv: Conv) -> fx.Node | None:
        """A weight of the program whose entries along one axis are the taps in order."""
        node, axis, axes = None, None, None
        for j, terms in enumerate(conv.taps):
            if len(terms) != 1 or terms[0].coef != 1.0 or len(terms[0].factors) != 1:
                return None
            factor = terms[0].factors[0]
            what = self.windows.atoms[factor.atom]
            assert isinstance(what, Window)
            node, axis, axes = (what.node, what.axis, factor.axes) if node is None else (node, axis, axes)
            if (what.node, what.axis, factor.axes) != (node, axis, axes) or what.start != j or axis is None:
                return None
        assert node is not None and axis is not None and axes is not None
        own = [label for axis_labels in axes for label in axis_labels]
        if own != list(conv.groups[2]) or tensor_of(node).shape[axis] != conv.width:
            return None
        order = [*(i for i in range(len(axes)) if i != axis), axis]
        return self.call(torch.reshape, self.permuted(self.held(node), order), (-1, conv.width))

    def vector(self, conv: Conv, terms: Sequence[Term]) -> fx.Node:
        """A sum of products over channels as [D]."""
        total: fx.Node | None = None
        sizes = [fixed(self.windows.space.sizes[label]) for label in conv.groups[2]]
        for term in terms:
            product: fx.Node | None = None
            for f in term.factors:
                part = self.factor(conv, f)
                product = part if product is None else self.call(torch.mul, product, part)
            assert product is not None
            if term.coef != 1.0:
                product = self.call(torch.mul, product, term.coef)
            product = self.call(torch.reshape, self.method("expand", product, *sizes), (-1,))
            total = product if total is None else self.call(torch.add, total, product)
        assert total is not None
        return total

    def factor(self, conv: Conv, f: Factor) -> fx.Node:
        """A factor over channels, one axis for each label of them, of size 1 where it has none."""
        have = {label for own in f.axes for label in own}
        wanted = [(label,) if label in have else () for label in conv.groups[2]]
        return self.relabelled(conv, self.part(f), f.axes, wanted)

    def part(self, f: Factor) -> fx.Node:
        what = self.windows.atoms[f.atom]
        assert isinstance(what, Window)
        node = self.held(what.node)
        if what.axis is None or same_size(what.length, tensor_of(what.node).shape[what.axis]):
            return node
        return self.steps(node, what.axis, what.start, self.count(what.node, what.axis, what.length))

    def residual(self, conv: Conv, head: Head) -> fx.Node | None:
        if head.residual is not None:
            return self.relabelled(conv, self.held(head.residual), conv.dims, conv.groups)
        if conv.residual is None:
            return None
        return self.relabelled(conv, self.part(conv.residual), conv.residual.axes, conv.groups)

    def convolution(self, conv: Conv, head: Head, kernel: str, final: bool) -> tuple[fx.Node, fx.Node | None]:
        """The node that takes the place of the head, and the last W - 1 steps [B, W - 1, D] if asked for."""
        have, dtype, out = tensor_of(conv.x).dtype, computed_in(conv, head), tensor_of(head.node).dtype
        x, state = self.cast(self.x(conv), have, dtype), self.state(conv)
        weight, residual = self.weight(conv), self.residual(conv, head)
        bias = self.vector(conv, conv.bias) if conv.bias else None
        last = None
        if kernel == "op":
            op = torch.ops.fla_compile.short_conv.default
            call = self.call(op, x, weight, bias, residual, state, head.silu, final, None)
            y = self.call(operator.getitem, call, 0)
            last = self.cast(self.call(operator.getitem, call, 1), dtype, have) if final else None
        else:
            y = self.cast(self.taps(conv, dtype, x, weight, bias, residual, state, head.silu), None, dtype)
        return self.cast(self.relabelled(conv, y, conv.groups, conv.dims), dtype, out), last

    def taps(
        self,
        conv: Conv,
        dtype: torch.dtype,
        x: fx.Node,
        weight: fx.Node,
        bias: fx.Node | None,
        residual: fx.Node | None,
        state: fx.Node | None,
        silu: bool,
    ) -> fx.Node:
        W, length = conv.width, self.length(conv)
        wide = torch.promote_types(dtype, torch.float32)
        static = all(isinstance(fixed(size), int) for size in tensor_of(conv.x).shape)
        if state is None and static:
            padded = self.call(F.pad, x, (0, 0, W - 1, 0))
        elif state is None:  # F.pad would make the sizes constants
            first = self.steps(x, 1, 0, 1)
            zeros = self.method("expand", self.call(torch.zeros_like, first), -1, W - 1, -1)
            padded = self.call(torch.cat, [zeros, x], 1)
        else:
            padded = self.call(torch.cat, [self.method("to", state, dtype), x], 1)
        z: fx.Node | None = None
        for j in range(W):
            part = self.cast(self.steps(padded, 1, j, length), dtype, wide)
            term = self.call(torch.mul, part, self.call(torch.select, weight, 1, j))
            z = term if z is None else self.call(torch.add, z, term)
        assert z is not None
        z = z if bias is None else self.call(torch.add, z, bias)
        z = self.call(F.silu, z) if silu else z
        return z if residual is None else self.call(torch.add, z, residual)


def computed_in(conv: Conv, head: Head) -> torch.dtype:
    """The type of the operator's x and y: x's own, or autocast's, unless the program goes on in a wider one."""
    have, own = tensor_of(conv.x).dtype, tensor_of(conv.node).dtype
    dtype = own if torch.promote_types(have, own) == have else have
    return torch.promote_types(dtype, tensor_of(head.node).dtype)


def _follows(a: Row, b: Row) -> bool:
    if a.node is None or b.node is None:
        return a.node is b.node
    return (b.node, b.axis, b.order, b.index) == (a.node, a.axis, a.order, a.index + 1)

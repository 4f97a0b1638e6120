"""After the backward loop: matrix products for all steps at once.

A gradient of an invariant is a sum over time. The sum is moved inwards through what is linear until it meets a matrix
product, where it becomes part of the inner dimension:

    sum_t A_t B_t  =  [A_1 .. A_T] [B_1; ..; B_T]

A gradient of a read is the same product for every step, mapped over time.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fla_compile.kernels.loop_split import Epilogue, Label

aten = torch.ops.aten

_CAST = torch.ops.prims.convert_element_type.default

# For one step each is linear in its only tensor, and does the same to a sum of steps.
_THROUGH = {
    aten.permute, aten.t, aten.transpose, aten.neg, aten.clone, aten.sum, aten._to_copy, _CAST.overloadpacket,
}  # fmt: skip
_RESHAPES = {aten.view, aten.reshape, aten._unsafe_view, aten.unsqueeze, aten.squeeze}


class OverTime:
    """Values of the epilogue's nodes: [T, ...] for those in `timed`, and their sums over T."""

    def __init__(self, epilogue: Epilogue, stacks: Mapping[Label, Tensor], invariants: Mapping[Label, Tensor]):
        self.timed = epilogue.timed
        self.values: dict[fx.Node, Any] = {}
        for node, label in epilogue.inputs.items():
            self.values[node] = stacks[label] if node in self.timed else invariants[label]

    def value(self, node: fx.Node) -> Any:
        if node not in self.values:
            inputs = node.all_input_nodes
            values = dict(zip(inputs, [self.value(n) for n in inputs], strict=True))
            self.values[node] = self._mapped(node, values) if node in self.timed else _call(node, values)
        return self.values[node]

    def _mapped(self, node: fx.Node, values: dict[fx.Node, Any]) -> Tensor:
        """A node for all steps at once."""
        packet = node.target.overloadpacket  # type: ignore[union-attr]
        shape = node.meta["val"].shape
        x = values[node.all_input_nodes[0]]
        if packet in (aten.mm, aten.bmm):
            return torch.matmul(*(values[n] for n in node.args))  # type: ignore
        if packet in _RESHAPES:
            return x.reshape(x.shape[0], *shape)
        if packet in (aten.permute, aten.transpose, aten.t):
            return x.permute(0, *(1 + d for d in _order(node, len(shape))))
        if node.target is _CAST:
            return x.to(node.args[1])
        if torch.Tag.pointwise in node.target.tags:  # type: ignore[union-attr]
            lead = dict(values)
            for n in values:
                if n in self.timed:
                    lead[n] = values[n][(slice(None), *[None] * (len(shape) + 1 - values[n].ndim))]
            return _call(node, lead)
        dims = tuple(0 if n in self.timed else None for n in values)
        return torch.vmap(lambda *xs: _call(node, dict(zip(values, xs, strict=True))), in_dims=dims)(*values.values())

    def summed(self, node: fx.Node) -> Tensor:
        packet = getattr(node.target, "overloadpacket", None)
        if node in self.timed and node not in self.values:
            args = node.args
            if packet in _RESHAPES:
                return self.summed(args[0]).reshape(node.meta["val"].shape)  # type: ignore
            if packet in _THROUGH and len(node.all_input_nodes) == 1 and args[0] in self.timed:
                return node.target(self.summed(args[0]), *args[1:], **node.kwargs)  # type: ignore
            if packet in (aten.mm, aten.bmm):
                return self._product(*args, batch=packet is aten.bmm)  # type: ignore
            if packet is aten.mul and not isinstance(args[1], fx.Node) and args[0] in self.timed:
                return node.target(self.summed(args[0]), args[1])  # type: ignore
            if packet is aten.add and not node.kwargs and all(self._whole(n, node) for n in args):
                return node.target(*(self.summed(n) for n in args))  # type: ignore
        value = self.value(node)
        return value.sum(0, dtype=value.dtype)

    def _whole(self, node: Any, of: fx.Node) -> bool:
        return isinstance(node, fx.Node) and node in self.timed and node.meta["val"].shape == of.meta["val"].shape

    def _product(self, a: fx.Node, b: fx.Node, batch: bool) -> Tensor:
        if a not in self.timed:
            return torch.matmul(self.value(a), self.summed(b))
        if b not in self.timed:
            return torch.matmul(self.summed(a), self.value(b))
        left, right = self.value(a), self.value(b)  # [T, N?, M, K] and [T, N?, K, D]
        left = left.movedim(0, -2).flatten(-2)
        right = (right.transpose(0, 1) if batch else right).flatten(-3, -2)
        return torch.matmul(left, right)


def _call(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])  # type: ignore
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _order(node: fx.Node, axes: int) -> list[int]:
    """What a permute, transpose or t of one step does, as a permutation."""
    order = list(range(axes))
    if node.target is aten.permute.default:
        return [d % axes for d in node.args[1]]  # type: ignore
    i, j = node.args[1:] if len(node.args) == 3 else (0, axes - 1)
    order[i], order[j] = order[j], order[i]  # type: ignore
    return order

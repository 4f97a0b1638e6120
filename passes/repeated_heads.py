"""Find heads that a program repeats: `repeat_interleave`, or an axis of one unsqueezed, expanded and merged."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fla_compile.passes.log_decay import op_name
from fla_compile.passes.normal_form import same_size

CASTS = {"float", "double", "half", "bfloat16"}
SHAPES = {"zeros_like", "empty_like", "ones_like", "new_zeros", "new_empty", "new_ones", "size"}  # look at nothing else


@dataclass(frozen=True)
class Repeated:
    """An operand that `moves`, the last one first, make of a repetition of `source`, which has `heads` of its own."""

    source: fx.Node
    squeezed: int | None  # an axis of size one that the source still has behind its heads
    heads: int
    moves: tuple[fx.Node, ...]


def repeated_heads(node: Any, axis: int) -> Repeated | None:
    """`node` as moves of a tensor whose `axis` repeats heads, each for a number of neighbours; None if it is not."""
    moves: list[fx.Node] = []
    while isinstance(node, fx.Node) and _read_once(node) and node.op in ("call_function", "call_method"):
        found = _repetition(node, axis)
        if found is not None:
            source, squeezed, heads = found
            return Repeated(source, squeezed, heads, tuple(moves))
        before = _axis_before(node, axis)
        if before is None:
            return None
        moves.append(node)
        node, axis = node.args[0], before
    return None


def _read_once(node: fx.Node) -> bool:
    return sum(op_name(user) not in SHAPES for user in node.users) == 1


def _axis_before(node: fx.Node, axis: int) -> int | None:
    """Where `axis` of a permutation or a cast is in what it is made of."""
    name, args = op_name(node), node.args[1:]
    if node.kwargs:
        return None
    if name in CASTS and not args:
        return axis
    if name == "to" and len(args) == 1 and isinstance(args[0], torch.dtype):
        return axis
    if name == "mul" and len(args) == 1 and isinstance(args[0], int | float):
        return axis
    if name == "permute":
        dims = args[0] if len(args) == 1 else args
        return dims[axis] % len(dims) if isinstance(dims, list | tuple) else None
    if name in ("movedim", "moveaxis", "transpose", "swapaxes") and len(args) == 2:
        value, (first, second) = _value(node), args
        if value is None or not isinstance(first, int) or not isinstance(second, int):
            return None
        order = list(range(value.ndim))
        first, second = first % value.ndim, second % value.ndim
        if name in ("movedim", "moveaxis"):
            order.insert(second, order.pop(first))
        else:
            order[first], order[second] = second, first
        return order[axis]
    return None


def _repetition(node: fx.Node, axis: int) -> tuple[fx.Node, int | None, int] | None:
    """What a node repeats along `axis`, an axis of size one to be left out of it, and its heads."""
    value, source = _value(node), node.args[0] if node.args else None
    if value is None or not isinstance(source, fx.Node) or _value(source) is None:
        return None
    name = op_name(node)
    if name == "repeat_interleave":
        given = dict(zip(("repeats", "dim"), node.args[1:], strict=False)) | node.kwargs
        if isinstance(given.get("repeats"), int) and isinstance(given.get("dim"), int):
            heads = _value(source).shape[axis]
            return (source, None, heads) if given["dim"] % value.ndim == axis and isinstance(heads, int) else None
    elif name in ("reshape", "view", "flatten") and op_name(source) == "expand":
        one = source.args[0]
        if not _read_once(source) or not isinstance(one, fx.Node) or _value(one) is None:
            return None
        narrow, wide = list(_value(one).shape), list(_value(source).shape)
        merged = [*wide[:axis], value.shape[axis], *wide[axis + 2 :]]
        spread = [*wide[: axis + 1], 1, *wide[axis + 2 :]]
        if _same(narrow, spread) and _same(merged, list(value.shape)) and isinstance(wide[axis], int):
            return one, axis + 1, wide[axis]
    return None


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def _value(node: fx.Node) -> torch.Tensor | None:
    value = node.meta.get("example_value")
    return value if isinstance(value, torch.Tensor) else None

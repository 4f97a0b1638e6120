"""Views of values that come from logits: which axes they have after it; None for what only looks like a view."""

from collections.abc import Callable
from typing import Any

from torch import fx

from fla_compile.passes.loss_values import Axis, Dims, Value, extent, resolved, viewed
from fla_compile.passes.normal_form import same_size
from fla_compile.passes.spellings import Call, tensor_of

View = Callable[[Value, Call, fx.Node], Dims | None]


def _reshape(value: Value, call: Call, node: fx.Node) -> Dims | None:
    if tensor_of(node).dtype != tensor_of(call.get("input")).dtype:
        return None  # the same bits as another type
    dims = viewed(value.dims, tensor_of(node).shape)
    return dims if dims is not None and _classes_alone(value, dims) else None


def _classes_alone(value: Value, dims: Dims) -> bool:
    return all(axis == (value.root.classes,) for axis in dims if value.root.classes in axis)


def _transpose(value: Value, call: Call, node: fx.Node) -> Dims | None:
    dims, n = list(value.dims), len(value.dims)
    if call.name in ("t", "T", "mT"):
        first, second = (0, 1) if call.name != "mT" else (n - 2, n - 1)
        if n < 2 or (call.name != "mT" and n != 2):
            return None
    else:
        first, second = call.get("dim0"), call.get("dim1")
        if not isinstance(first, int) or not isinstance(second, int):
            return None
    dims[first], dims[second] = dims[second], dims[first]
    return tuple(dims)


def _permute(value: Value, call: Call, node: fx.Node) -> Dims | None:
    order = call.get("dims")
    if not isinstance(order, tuple | list) or not all(isinstance(i, int) for i in order):
        return None
    return tuple(value.dims[i] for i in order)


def _movedim(value: Value, call: Call, node: fx.Node) -> Dims | None:
    source, destination = list(call.args.values())[1:3]
    if not isinstance(source, int) or not isinstance(destination, int):
        return None
    dims = list(value.dims)
    axis = dims.pop(source)
    dims.insert(destination % len(value.dims), axis)
    return tuple(dims)


def _expand(value: Value, call: Call, node: fx.Node) -> Dims | None:
    """Only what expands nothing."""
    shape = tensor_of(node).shape
    if len(shape) != len(value.dims):
        return None
    return value.dims if all(same_size(s, extent(a)) for s, a in zip(shape, value.dims, strict=True)) else None


def _getitem(value: Value, call: Call, node: fx.Node) -> Dims | None:
    index = call.get("index")
    index = list(index) if isinstance(index, tuple) else [index]
    if sum(i is Ellipsis for i in index) > 1:
        return None
    used = sum(i is not None and i is not Ellipsis for i in index)
    rest = [slice(None)] * (len(value.dims) - used)
    at = next((n for n, i in enumerate(index) if i is Ellipsis), None)
    index = index + rest if at is None else index[:at] + rest + index[at + 1 :]
    sizes, old, dims = list(tensor_of(node).shape), list(resolved(value.dims)), list[Axis]()
    for entry in index:
        if entry is None:
            dims.append(())
            continue
        axis = old.pop(0)
        if entry in (0, -1) and not isinstance(entry, bool | slice) and not axis:
            continue  # the only one
        if not isinstance(entry, slice) or entry.step not in (None, 1) or len(dims) >= len(sizes):
            return None
        found = _cut(axis, entry.start, entry.stop, sizes[len(dims)])
        if found is None or (value.root.classes in axis and found != axis):
            return None
        dims.append(found)
    return tuple(dims)


def _cut(axis: Axis, start: Any, stop: Any, size: Any) -> Axis | None:
    if same_size(extent(axis), size):
        return axis
    if len(axis) != 1 or not isinstance(start, int | None) or not isinstance(stop, int | None):
        return None
    return (axis[0].cut(start or 0, from_end(stop, axis[0].size), size),)


def from_end(stop: int | None, size: Any) -> int | None:
    """The same end counted from the end of the axis, whatever its size will be."""
    if stop is None or stop < 0 or not isinstance(size, int):
        return stop
    return None if stop >= size else stop - size


def _select(value: Value, call: Call, node: fx.Node) -> Dims | None:
    dims, dim = list(value.dims), call.get("dim")
    if not isinstance(dim, int) or dims[dim] or call.get("index") not in (0, -1):
        return None
    dims.pop(dim)
    return tuple(dims)


def _narrow(value: Value, call: Call, node: fx.Node) -> Dims | None:
    dim, start, length = call.get("dim"), call.get("start"), call.get("length")
    if not all(isinstance(x, int) for x in (dim, start, length)) or start < 0:
        return None
    dims = list(resolved(value.dims))
    if value.root.classes in dims[dim]:
        return None
    found = _cut(dims[dim], start, start + length, tensor_of(node).shape[dim])
    if found is None:
        return None
    dims[dim] = found
    return tuple(dims)


def _same(value: Value, call: Call, node: fx.Node) -> Dims | None:
    """Casts between floating types, copies and moves to where the tensor is already."""
    have, want = tensor_of(call.get("input")), tensor_of(node)
    kept = have.shape == want.shape and have.device == want.device
    return value.dims if kept and want.dtype.is_floating_point else None


VIEWS: dict[str, View] = {
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "ravel"), _reshape),
    **dict.fromkeys(("transpose", "t", "T", "mT"), _transpose),
    "permute": _permute,
    "movedim": _movedim,
    "expand": _expand,
    "getitem": _getitem,
    "narrow": _narrow,
    "select": _select,
    **dict.fromkeys(("to", "contiguous", "clone", "alias", "cpu", "cuda"), _same),
}

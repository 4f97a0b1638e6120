"""A state kept in a container as the tensors in it: tuples, lists, dicts, named tuples and dataclasses, nested."""

import dataclasses
from typing import Any

import torch


@torch._dynamo.assume_constant_result
def _field_names(kind: type) -> tuple[str, ...]:
    if not dataclasses.is_dataclass(kind) or hasattr(kind, "__post_init__"):
        return ()
    fields = dataclasses.fields(kind)
    return tuple(f.name for f in fields) if all(f.init for f in fields) else ()


def field_names(value: Any) -> tuple[str, ...]:
    """The fields of an instance of a plain dataclass, none of anything else; torch 2.11 cannot trace that question."""
    if value is None or isinstance(value, (torch.Tensor, int, float, str, bool, type, list, tuple, dict)):
        return ()
    return _field_names(type(value))


def flatten(value: Any, name: str) -> tuple[list, list[str], Any]:
    """Return the leaves of a state, what to call them, and the shape that `rebuild` gives back to them."""
    children: list[tuple[str, Any]] = []
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        kind, children = (type(value), value._fields), [(f".{f}", getattr(value, f)) for f in value._fields]
    elif isinstance(value, tuple):
        kind, children = (tuple, ()), [(f"[{i}]", item) for i, item in enumerate(value)]
    elif isinstance(value, list):
        kind, children = (list, ()), [(f"[{i}]", item) for i, item in enumerate(value)]
    elif isinstance(value, dict):
        kind, children = (dict, tuple(value.keys())), [(f"[{key!r}]", item) for key, item in value.items()]
    elif len(fields := field_names(value)) > 0:
        kind, children = (type(value), fields), [(f".{f}", getattr(value, f)) for f in fields]
    else:
        return [value], [name], None
    leaves: list = []
    names: list[str] = []
    shapes = []
    for suffix, child in children:
        inner, inner_names, shape = flatten(child, name + suffix)
        leaves = leaves + inner
        names = names + inner_names
        shapes.append(shape)
    return leaves, names, (kind, tuple(shapes))


def rebuild(shape: Any, leaves: list, place: int = 0) -> tuple[Any, int]:
    """Return a state of this shape from the leaves from `place` on, and the place after its last one."""
    if shape is None:
        return leaves[place], place + 1
    (kind, keys), shapes = shape
    children = []
    for inner in shapes:
        child, place = rebuild(inner, leaves, place)
        children.append(child)
    if kind is tuple:
        return tuple(children), place
    if kind is list:
        return children, place
    if kind is dict:
        return dict(zip(keys, children, strict=True)), place
    return kind(**dict(zip(keys, children, strict=True))), place


def flatten_all(values: tuple, names: tuple[str, ...]) -> tuple[list, list[str], list]:
    """`flatten` for several states, one shape for each."""
    leaves: list = []
    leaf_names: list[str] = []
    shapes = []
    for value, name in zip(values, names, strict=True):
        inner, inner_names, shape = flatten(value, name)
        leaves = leaves + inner
        leaf_names = leaf_names + inner_names
        shapes.append(shape)
    return leaves, leaf_names, shapes


def rebuild_all(shapes: list, leaves: list) -> tuple:
    """`rebuild` for several states."""
    values, place = [], 0
    for shape in shapes:
        value, place = rebuild(shape, leaves, place)
        values.append(value)
    return tuple(values)


def same_shape(one: Any, other: Any) -> bool:
    """Whether two states hold the same things; torch 2.11 cannot compare what names a class of the user's."""
    if one is None or other is None:
        return one is None and other is None
    (kind, keys), shapes = one
    (other_kind, other_keys), others = other
    if kind is not other_kind or len(keys) != len(other_keys) or len(shapes) != len(others):
        return False
    same = [a == b for a, b in zip(keys, other_keys, strict=True)]
    return all(same) and all([same_shape(a, b) for a, b in zip(shapes, others, strict=True)])

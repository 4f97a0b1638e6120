"""Which memory does a captured graph write to? Dynamo's graphs keep in-place operations, views and `out=` as written.

Two tensors share memory when their fake tensors share storage, whatever operation made one from the other. A node that
hands its input on and is not known to be a plain view is taken to have written to it.
"""

import operator
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from fla_compile.passes.log_decay import CASTS, VIEWS, op_name

_IN_PLACE = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.imatmul, operator.iand,
    operator.ior, operator.ixor, operator.ifloordiv, operator.imod, operator.ilshift, operator.irshift,
}  # fmt: skip
HANDS_ON = VIEWS | CASTS | {
    "detach", "data", "getattr", "unbind", "chunk", "split", "tensor_split", "split_with_sizes", "diagonal", "unfold",
    "as_strided", "ravel", "broadcast_to", "swapdims", "cpu", "cuda", "type", "half", "bfloat16", "real",
    "vsplit", "hsplit", "dsplit", "view_as_real", "view_as_complex", "atleast_1d", "atleast_2d", "atleast_3d",
}  # fmt: skip


def memory(node: Any) -> frozenset[int]:
    """The storages of a node's value, of all its parts if it is a tuple."""
    if not isinstance(node, fx.Node):
        return frozenset()
    value = node.meta.get("example_value")
    found = frozenset(x.untyped_storage()._cdata for x in tree_leaves(value) if isinstance(x, torch.Tensor))
    return found.union(*(others for storage, others in _shared(node.graph).items() if storage in found))


def _shared(graph: fx.Graph) -> dict[int, frozenset[int]]:
    meta = getattr(graph.owning_module, "meta", {})
    return meta.setdefault("fla_shared", {})


def share(graph: fx.Graph, storages: frozenset[int], others: frozenset[int]) -> None:
    """From now on what lies in `storages` also lies in `others`."""
    _shared(graph).update(dict.fromkeys(storages - others, others))


def written(graph: fx.Graph, before: fx.Node | None = None) -> set[int]:
    """The storages that nodes of the graph, or only those in front of `before`, may write to."""
    found: set[int] = set()
    for node in graph.nodes:
        if node is before:
            break
        if node.op in ("call_function", "call_method"):
            found |= _writes(node)
    return found


def written_between(first: fx.Node, last: fx.Node) -> set[int]:
    """The storages that nodes behind `first` and in front of `last` may write to."""
    found: set[int] = set()
    between = False
    for node in first.graph.nodes:
        if node is last:
            break
        if between and node.op in ("call_function", "call_method"):
            found |= _writes(node)
        between = between or node is first
    return found


def _writes(node: fx.Node) -> frozenset[int]:
    name = op_name(node)
    everything = frozenset[int]().union(*(memory(n) for n in node.all_input_nodes))
    schema = getattr(node.target, "_schema", None)
    if node.kwargs.get("out") is not None or (schema is not None and schema.is_mutable):
        return everything
    if name == "setitem" or getattr(operator, name, None) in _IN_PLACE or (name.endswith("_") and name[-2:] != "__"):
        return memory(node.args[0]) or everything
    if name in HANDS_ON or node.target is torch.ops.higher_order.scan:
        return frozenset()
    return memory(node) & everything

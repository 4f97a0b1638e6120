"""One rule an operation: sums over classes and rows, softmaxes, the target's entry, and torch's own losses.

The rules of `loss_rules`, for operations that take an axis away.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fla_compile.passes.loss_rules import number, view
from fla_compile.passes.loss_values import (
    LSE,
    MAX,
    SUM,
    Axis,
    Losses,
    Poly,
    Target,
    Value,
    add,
    extent,
    flat,
    laid_over,
    poly,
    resolved,
    scaled,
    times,
)
from fla_compile.passes.memory import memory, written
from fla_compile.passes.normal_form import same_size
from fla_compile.passes.spellings import Call, call_of, tensor_of


def _max_part(losses: Losses, call: Call, node: fx.Node) -> Value | None:
    """`x.max(dim)` is a pair: its first part, by number."""
    source = call.get("input")
    pair = call_of(source) if source in losses.pairs else None
    if pair is None:
        return _picked(losses, call, node) or view(losses, call, node)
    dim, keepdim = pair.get("other", pair.get("dim")), pair.get("arg2", pair.get("keepdim", False))
    return _reduced(losses.of(pair.get("input")), dim, keepdim, "max")


def _axes(dim: Any, n: int) -> list[int] | None:
    if dim is None:
        return list(range(n))
    dim = [dim] if isinstance(dim, int) else dim
    if not isinstance(dim, tuple | list) or not all(isinstance(d, int) for d in dim):
        return None
    return sorted(d % n for d in dim) if n else []


def _reduced(a: Value | None, dim: Any, keepdim: Any, how: str) -> Value | None:
    axes = _axes(dim, len(a.dims)) if a is not None else None
    if a is None or axes is None:
        return None
    at = a.class_axis
    if at is not None:
        return _over_classes(a, at, bool(keepdim), how) if axes == [at] else None
    rest = [axis for i, axis in enumerate(a.dims) if i not in axes]
    if how not in ("sum", "mean") or a.kind != "row" or any(flat(tuple(rest))):
        return None
    kept = a.dims if keepdim else tuple(rest)
    rows = times(a.rows, poly(("rows",))) if how == "mean" else a.rows
    return replace(a, kind="total", dims=tuple(() for _ in kept), rows=rows)


def _over_classes(a: Value, at: int, keepdim: bool, how: str) -> Value | None:
    dims = (*a.dims[:at], *(((),) if keepdim else ()), *a.dims[at + 1 :])
    V = a.root.classes.size
    if a.kind == "exp" and how == "sum":
        return replace(a, kind="exprow", dims=dims, rows=add(a.rows, poly(LSE)))
    if a.kind != "class":
        return None
    if a.onehot is not None:
        if how != "sum":
            return None
        rows = add(a.rows, poly(("pick", a.onehot), coef=a.coef))
        return replace(a, kind="row", dims=dims, rows=rows, coef=1.0, onehot=None)
    if how == "lse" and a.coef == 1.0:
        return replace(a, kind="row", dims=dims, rows=add(a.rows, poly(LSE)))
    if how == "max" and a.coef == 1.0:
        return replace(a, kind="row", dims=dims, rows=add(a.rows, poly(MAX)))
    if how in ("sum", "mean") and isinstance(V, int):
        one = 1.0 if how == "sum" else 1.0 / V
        rows = add(scaled(a.rows, V * one), poly(SUM, coef=a.coef * one))
        return replace(a, kind="row", dims=dims, rows=rows, coef=1.0)
    return None


def _reduce(how: str) -> Callable[[Losses, Call, fx.Node], Value | None]:
    def rule(losses: Losses, call: Call, node: fx.Node) -> Value | None:
        return _reduced(losses.of(call.get("input")), call.get("dim"), call.get("keepdim", False), how)

    return rule


def _log_softmax(losses: Losses, call: Call, node: fx.Node) -> Value | None:
    a = losses.of(call.get("input"))
    at = a.class_axis if a is not None else None
    dim = call.get("dim")
    if a is None or at is None or a.kind != "class" or a.coef != 1.0 or a.onehot is not None:
        return None
    if not isinstance(dim, int) or dim % len(a.dims) != at:
        return None
    # shifted by anything of the row it is the same
    return replace(a, rows=poly(LSE, coef=-1.0))


def _softmax(losses: Losses, call: Call, node: fx.Node) -> Value | None:
    found = _log_softmax(losses, call, node)
    return None if found is None else replace(found, kind="exp")


def _gather(losses: Losses, call: Call, node: fx.Node) -> Value | None:
    a, index = losses.of(call.get("input")), call.get("index")
    fake = tensor_of(index)
    if a is None or fake is None or losses.depends(index) or a.onehot is not None:
        return None
    at = a.class_axis
    if at is None:
        return None
    if call.get("dim") % len(a.dims) != at or len(fake.shape) != len(a.dims) or not same_size(fake.shape[at], 1):
        return None
    dims = tuple(() if i == at else axis for i, axis in enumerate(resolved(a.dims)))
    if laid_over(fake.shape, dims) != dims:
        return None
    rows = add(a.rows, poly(("pick", losses.target(index, dims)), coef=a.coef))
    return replace(a, kind="row" if a.kind == "class" else "exprow", dims=dims, coef=1.0, rows=rows)


def _picked(losses: Losses, call: Call, node: fx.Node) -> Value | None:
    """a[arange(n), t]: the targets of n rows, negative ones from the end."""
    a, index = losses.of(call.get("input")), call.get("index")
    if a is None or a.class_axis != 1 or len(a.dims) != 2 or a.onehot is not None:
        return None
    if not isinstance(index, tuple | list) or len(index) != 2 or not isinstance(a.root.classes.size, int):
        return None
    fake, dims = tensor_of(index[1]), resolved(a.dims)[:1]
    if fake is None or fake.dtype in (torch.bool, torch.uint8) or losses.depends(index[1]):
        return None
    if len(fake.shape) != 1 or laid_over(fake.shape, dims) != dims or not _counts(index[0], dims[0]):
        return None
    losses.picks[node] = index[1]
    rows = add(a.rows, poly(("pick", losses.target(index[1], dims, wraps=True)), coef=a.coef))
    return replace(a, kind="row" if a.kind == "class" else "exprow", dims=dims, coef=1.0, rows=rows)


def _counts(node: Any, axis: Axis) -> bool:
    """Whether a tensor is 0, 1, 2 and so on along an axis."""
    fake, call = tensor_of(node), None
    while isinstance(node, fx.Node) and not memory(node) & written(node.graph):
        call = call_of(node)
        if call is None or call.name not in ("to", "cpu", "cuda"):
            break
        node, call = call.get("input"), None
    if fake is None or call is None or call.name != "arange" or fake.dtype != torch.int64 or len(fake.shape) != 1:
        return False
    counted = tensor_of(node)
    if counted is None or counted.dtype not in (torch.int32, torch.int64):  # others round
        return False
    first = call.get("input") if "other" in call.args else 0  # arange(end), or arange(start, end, step)
    given = {"start", "end", "step", "out"} & call.args.keys()
    return not given and first == 0 and call.get("arg2", 1) == 1 and same_size(fake.shape[0], extent(axis))


def _classes_second(losses: Losses, call: Call) -> tuple[Value, Target] | None:
    """Input and target of torch's losses, whose classes are the second axis (the first of a vector)."""
    a, t = losses.of(call.get("input")), call.get("target")
    fake = tensor_of(t)
    if a is None or fake is None or fake.dtype.is_floating_point or a.kind != "class" or a.onehot is not None:
        return None
    at = 1 if len(a.dims) > 1 else 0
    dims = tuple(axis for i, axis in enumerate(resolved(a.dims)) if i != at)
    options = call.get("weight"), call.get("size_average"), call.get("reduce")
    if a.class_axis != at or any(option is not None for option in options) or len(fake.shape) != len(dims):
        return None
    return (a, losses.target(t, dims)) if laid_over(fake.shape, dims) == dims else None


def _torch_loss(a: Value, target: Target, call: Call, node: fx.Node, rows: Poly) -> Value | None:
    index, reduction = call.get("ignore_index", -100), call.get("reduction", "mean")
    if not isinstance(index, int):
        return None
    rows = times(rows, poly(("valid", target, index)))
    if reduction == "none":
        return replace(a, kind="row", dims=target.dims, coef=1.0, rows=rows)
    if reduction == "mean":
        rows = times(rows, poly(("count", target, index)))
    elif reduction != "sum":
        return None
    return replace(a, kind="total", dims=(), coef=1.0, rows=rows)


def _cross_entropy(losses: Losses, call: Call, node: fx.Node) -> Value | None:
    found = _classes_second(losses, call)
    smoothing = number(call.get("label_smoothing", 0.0))
    if found is None or smoothing is None or found[0].coef != 1.0:
        return None
    a, target = found
    V = a.root.classes.size
    rows = add(poly(LSE), poly(("pick", target), coef=smoothing - 1.0))
    if smoothing:
        rows = add(rows, poly(SUM, coef=-smoothing / V))
    return _torch_loss(a, target, call, node, rows)


def _nll_loss(losses: Losses, call: Call, node: fx.Node) -> Value | None:
    found = _classes_second(losses, call)
    if found is None:
        return None
    a, target = found
    return _torch_loss(a, target, call, node, scaled(add(a.rows, poly(("pick", target), coef=a.coef)), -1.0))


REDUCTIONS: dict[str, Callable[[Losses, Call, fx.Node], Value | None]] = {
    "getitem": _max_part,
    "sum": _reduce("sum"),
    "mean": _reduce("mean"),
    "amax": _reduce("max"),
    "logsumexp": _reduce("lse"),
    "log_softmax": _log_softmax,
    "softmax": _softmax,
    **dict.fromkeys(("gather", "take_along_dim"), _gather),
    "cross_entropy": _cross_entropy,
    "nll_loss": _nll_loss,
}

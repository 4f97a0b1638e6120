"""One rule an operation: what sums, products, functions and masks make of values that come from logits.

A rule answers None where the result is nothing that a loss is made of; the operation then counts as another use of its
operands.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fla_compile.passes.loss_values import (
    MAX,
    Losses,
    Root,
    Target,
    Value,
    add,
    aligned,
    flat,
    laid_over,
    poly,
    resolved,
    scaled,
    times,
)
from fla_compile.passes.loss_views import VIEWS
from fla_compile.passes.normal_form import same_size
from fla_compile.passes.spellings import Call, call_of, tensor_of


def number(x: Any) -> float | None:
    return float(x) if isinstance(x, int | float) and not isinstance(x, bool) else None


def view(losses: Losses, call: Call, node: fx.Node) -> Value | None:
    value = losses.of(call.get("input"))
    dims = VIEWS[call.name](value, call, node) if value is not None else None
    if dims is None or (_lies_over_rows(value) and set(flat(dims)) != set(flat(value.dims))):
        return None  # some rows of what was made with a target or a factor for each of all
    return value.over(dims)


def _lies_over_rows(value: Value) -> bool:
    own = {"lse", "sum", "max"}
    return value.kind in ("row", "exprow") and any(atom[0] not in own for monomial in value.rows for atom in monomial)


def _times_number(value: Value, number: float) -> Value | None:
    if value.plain:
        return replace(value, form=value.form.times(number)) if number else None
    if value.kind in ("exp", "exprow"):
        return None
    return replace(value, coef=value.coef * number, rows=scaled(value.rows, number))


def _mul(losses: Losses, call: Call, node: fx.Node) -> Value | None:
    left, right = call.get("input"), call.get("other")
    a, b = losses.of(left), losses.of(right)
    if a is None:
        left, right, a, b = right, left, b, a
    if a is None:
        return None
    if number(right) is not None:
        return _times_number(a, number(right))
    if b is not None:
        dims = aligned(a.dims, b.dims)
        if a.kind == b.kind == "row" and _alike(a, b) and dims is not None:
            return replace(a, dims=dims, rows=times(a.rows, b.rows))
        return None
    if a.kind == "class" and a.onehot is None:
        target = _one_hot(right, a)
        if target is None:
            return None
        losses.one_hots[right] = target
        return replace(a, onehot=target)
    return _factor(losses, a, right, "node")


def _div(losses: Losses, call: Call, node: fx.Node) -> Value | None:
    a, divisor = losses.of(call.get("input")), call.get("other")
    if a is None or call.get("rounding_mode") is not None:
        return None
    b = losses.of(divisor)
    if b is not None:
        dims = aligned(a.dims, b.dims)
        if a.kind not in ("exp", "exprow") or b.kind != "exprow" or not _alike(a, b) or dims is None:
            return None
        return replace(a, dims=dims, rows=add(a.rows, b.rows, -1.0))
    by = number(divisor)
    if by is not None:
        return _times_number(a, 1.0 / by) if by else None
    return _factor(losses, a, divisor, "over")


def _factor(losses: Losses, a: Value, tensor: Any, kind: str) -> Value | None:
    """Rows of a loss times, or over, numbers that come from elsewhere and take no gradient."""
    fake = tensor_of(tensor)
    if fake is None or fake.requires_grad or a.kind not in ("row", "total"):
        return None
    dims = laid_over(fake.shape, a.dims)
    if dims is None or (kind == "over" and flat(dims)):
        return None
    losses.laid[tensor] = dims
    atom = (kind, tensor) if kind == "over" else (kind, tensor, dims)
    return replace(a, rows=times(a.rows, poly(atom)))


def _one_hot(node: Any, value: Value) -> Target | None:
    """The target of `F.one_hot` over the classes of a value."""
    while isinstance(node, fx.Node):
        call = call_of(node)
        if call is None or call.name not in ("to", "one_hot"):
            return None
        source = call.get("input")
        if call.name == "one_hot":
            classes = call.get("other", call.get("num_classes"))
            fits = isinstance(classes, int) and same_size(classes, value.root.classes.size)
            fake = tensor_of(source)
            if not fits or fake is None or value.dims[-1] != (value.root.classes,):
                return None
            dims = value.dims[:-1]
            same = len(fake.shape) == len(dims) and laid_over(fake.shape, dims) == dims
            return Target.of(source, resolved(dims)) if same else None
        node = source
    return None


def _alike(a: Value, b: Value) -> bool:
    return a.root is b.root and a.form == b.form


def _sum_of(losses: Losses, call: Call, node: fx.Node, sign: float) -> Value | None:
    left, right, alpha = call.get("input"), call.get("other"), number(call.get("alpha", 1))
    a, b = losses.of(left), losses.of(right)
    if alpha is None or (a is None and b is None):
        return None
    for value, added, own, others in ((a, right, 1.0, sign * alpha), (b, left, sign * alpha, 1.0)):
        if value is not None and number(added) is not None:
            if value.onehot is not None:
                return None
            moved = _times_number(value, own) if own != 1.0 else value
            if moved is None or (value.plain and number(added)) or value.kind not in ("class", "row", "total"):
                return moved if moved is not None and not number(added) else None
            return replace(moved, rows=add(moved.rows, poly(coef=others * number(added))))
    if a is None or b is None:
        return _biased(a, right, sign * alpha) if a is not None else _biased(b, left, sign * alpha)
    dims = aligned(a.dims, b.dims)
    kinds = {a.kind, b.kind}
    if dims is None or not _alike(a, b) or a.onehot is not None or b.onehot is not None:
        return None
    rows = add(a.rows, b.rows, sign * alpha)
    if kinds == {"row"} or kinds == {"total"}:
        return replace(a, dims=dims, rows=rows)
    if kinds == {"class", "row"}:
        coef = a.coef if a.kind == "class" else sign * alpha * b.coef
        return replace(a, kind="class", dims=dims, rows=rows, coef=coef)
    if kinds == {"class"}:
        return replace(a, dims=dims, rows=rows, coef=a.coef + sign * alpha * b.coef)
    return None


def _biased(value: Value | None, tensor: Any, factor: float) -> Value | None:
    """The layer's bias, where the program adds it by hand."""
    if value is None:
        return None
    fake, root = tensor_of(tensor), value.root
    fresh = value.plain and value.form.scale == 1.0 and value.form.cap is None and root.bias is None
    if fake is None or root.weight is None or not fresh or factor != 1.0 or fake.ndim != 1:
        return None
    if laid_over(fake.shape, value.dims) != ((root.classes,),) or fake.dtype != tensor_of(root.node).dtype:
        return None
    biased = Root(root.node, root.x, root.weight, tensor, root.transposed, root.rows, root.classes)
    return replace(value, root=biased)


def _exp(losses: Losses, call: Call, node: fx.Node) -> Value | None:
    a = losses.of(call.get("input"))
    if a is None or a.kind not in ("class", "row") or a.coef != 1.0 or a.onehot is not None:
        return None
    return replace(a, kind="exp" if a.kind == "class" else "exprow")


def _log(losses: Losses, call: Call, node: fx.Node) -> Value | None:
    a = losses.of(call.get("input"))
    if a is None or a.kind not in ("exp", "exprow"):
        return None
    return replace(a, kind="class" if a.kind == "exp" else "row")


def _tanh(losses: Losses, call: Call, node: fx.Node) -> Value | None:
    a = losses.of(call.get("input"))
    if a is None or not a.plain or a.form.cap is not None:
        return None
    return replace(a, form=replace(a.form, cap=1.0))


def _square(losses: Losses, call: Call, node: fx.Node) -> Value | None:
    a, power = losses.of(call.get("input")), call.get("exponent", call.get("other", 2))
    if a is None or a.kind != "row" or power != 2:
        return None
    return replace(a, rows=times(a.rows, a.rows))


def _detach(losses: Losses, call: Call, node: fx.Node) -> Value | None:
    """A shift by the maximum changes nothing, with a gradient or without."""
    a = losses.of(call.get("input"))
    return a if a is not None and a.kind == "row" and set(a.rows) == {(MAX,)} else None


def _neg(losses: Losses, call: Call, node: fx.Node) -> Value | None:
    a = losses.of(call.get("input"))
    return None if a is None else _times_number(a, -1.0)


def _where(losses: Losses, call: Call, node: fx.Node) -> Value | None:
    condition = call.get("condition")
    first, second = call.get("input"), call.get("other")
    for operand, other, sense in ((first, second, True), (second, first, False)):
        if losses.of(operand) is not None and is_zero(other):
            return _kept(losses, losses.of(operand), condition, sense)
    return None


def _masked_fill(losses: Losses, call: Call, node: fx.Node) -> Value | None:
    a = losses.of(call.get("input"))
    return _kept(losses, a, call.get("mask"), False) if a is not None and is_zero(call.get("value")) else None


def is_zero(x: Any) -> bool:
    if number(x) == 0.0:
        return True
    call = call_of(x) if isinstance(x, fx.Node) else None
    if call is None or len(x.users) > 1:  # others may write to it
        return False
    return call.name in ("zeros_like", "zeros", "new_zeros") or (call.name == "tensor" and x.args[0] == 0)


def _kept(losses: Losses, a: Value, mask: Any, sense: bool) -> Value | None:
    fake = tensor_of(mask)
    dims = laid_over(fake.shape, a.dims) if fake is not None and a.kind == "row" else None
    if dims is None or fake.dtype != torch.bool:
        return None
    losses.laid[mask] = dims
    return replace(a, rows=times(a.rows, poly(("keep", mask, sense, dims))))


ARITHMETIC: dict[str, Callable[[Losses, Call, fx.Node], Value | None]] = {
    **dict.fromkeys(VIEWS, view),
    "mul": _mul,
    "div": _div,
    "add": lambda losses, call, node: _sum_of(losses, call, node, 1.0),
    "sub": lambda losses, call, node: _sum_of(losses, call, node, -1.0),
    "neg": _neg,
    "detach": _detach,
    "exp": _exp,
    "log": _log,
    "tanh": _tanh,
    "square": _square,
    "pow": _square,
    "where": _where,
    "masked_fill": _masked_fill,
}

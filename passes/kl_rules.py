"""One rule an operation for values of two layers; what one layer's logits become is left to the rules of cross entropy.

As in `loss_rules` a rule answers None where the result is nothing that a divergence is made of.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fla_compile.passes.kl_values import Pairs, Side, beside, exp_of, inner, log, log_of, terms
from fla_compile.passes.loss_reader import RULES
from fla_compile.passes.loss_rules import is_zero, number
from fla_compile.passes.loss_values import Dims, Form, Poly, Value, add, aligned, flat, laid_over, poly, scaled, times
from fla_compile.passes.memory import memory, written
from fla_compile.passes.spellings import Call, call_of, tensor_of

Rule = Callable[[Pairs, Call, fx.Node], Value | None]

_OF_NUMBERS: dict[str, Callable[..., float]] = {
    "tensor": float,
    "new_tensor": float,
    "neg": lambda x: -x,
    "log": math.log,
    "log1p": math.log1p,
    "exp": math.exp,
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
}


def constant(x: Any) -> float | None:
    """The number that a program makes a tensor of, or computes from such: the weights of a mixture."""
    if number(x) is not None:
        return number(x)
    call, fake = (call_of(x), tensor_of(x)) if isinstance(x, fx.Node) else (None, None)
    if call is None or fake is None or fake.ndim or call.in_place or call.name not in (*_OF_NUMBERS, "to"):
        return None
    names = ("other",) if call.name == "new_tensor" else ("input", "other")
    given = [constant(call.args[name]) for name in names if call.args.get(name) is not None]
    options = call.args.keys() - {"input", "other", "dtype", "device"}
    if options or not given or any(x is None for x in given) or memory(x) & written(x.graph):
        return None
    return given[0] if call.name == "to" else _OF_NUMBERS[call.name](*given)


def _with_numbers(call: Call) -> Call:
    found = {name: constant(x) for name, x in call.args.items() if isinstance(x, fx.Node)}
    return replace(call, args={**call.args, **{name: x for name, x in found.items() if x is not None}})


def _mul(losses: Pairs, call: Call, node: fx.Node) -> Value | None:
    left, right = call.get("input"), call.get("other")
    a, b = terms(losses, left), terms(losses, right)
    if a is None:
        left, right, a, b = right, left, b, a
    if a is None:
        return None
    if b is not None:
        dims = aligned(a.dims, b.dims)
        same = a.root is b.root and dims is not None
        return replace(a, dims=dims, rows=times(a.rows, b.rows)) if same else None
    if number(right) is not None:
        return replace(a, rows=scaled(a.rows, number(right)))
    fake = tensor_of(right)
    if fake is None or fake.requires_grad or losses.depends(right):
        return None
    return _of_rows(losses, a, right, lambda dims: ("node", right, dims))


def _of_rows(losses: Pairs, a: Value, tensor: fx.Node, atom: Callable[[Dims], Any]) -> Value | None:
    """A factor that is the same for all classes of a row."""
    dims = laid_over(tensor_of(tensor).shape, a.dims)
    if dims is None or a.root.classes in flat(dims):
        return None
    losses.laid[tensor] = dims
    return replace(a, rows=times(a.rows, poly(atom(dims))))


def _div(losses: Pairs, call: Call, node: fx.Node) -> Value | None:
    a, by = terms(losses, call.get("input")), number(call.get("other"))
    if a is None or not by or call.get("rounding_mode") is not None:
        return None
    return replace(a, rows=scaled(a.rows, 1.0 / by))


def _sum_of(losses: Pairs, call: Call, node: fx.Node, sign: float) -> Value | None:
    left, right, alpha = call.get("input"), call.get("other"), number(call.get("alpha", 1))
    a, b = _addends(losses, left, right)
    if alpha is None:
        return None
    if a is not None and b is not None:
        return _combined(a, b, 1.0, sign * alpha)
    for value, own, added, others in ((a, 1.0, right, sign * alpha), (b, sign * alpha, left, 1.0)):
        if value is not None and number(added) is not None:
            return replace(value, rows=add(scaled(value.rows, own), poly(coef=others * number(added))))
    return None


def _addends(losses: Pairs, left: Any, right: Any) -> tuple[Value | None, Value | None]:
    """Both over classes; or a divergence and a cross entropy of one of its layers, both summed or both not."""
    a, b = beside(losses, left), beside(losses, right)
    if a is not None and b is not None and a.kind == b.kind and set(flat(a.dims)) == set(flat(b.dims)):
        if losses.is_shared(losses.of(left)) or losses.is_shared(losses.of(right)):
            return a, b
    return terms(losses, left), terms(losses, right)


def _combined(a: Value, b: Value, left: float, right: float) -> Value | None:
    dims = aligned(a.dims, b.dims)
    if a.root is not b.root or dims is None:
        return None
    return replace(a, dims=dims, rows=add(scaled(a.rows, left), b.rows, right))


def _neg(losses: Pairs, call: Call, node: fx.Node) -> Value | None:
    a = terms(losses, call.get("input"))
    return None if a is None else replace(a, rows=scaled(a.rows, -1.0))


def _lerp(losses: Pairs, call: Call, node: fx.Node) -> Value | None:
    (a, b), weight = _addends(losses, call.get("input"), call.get("end")), number(call.get("weight"))
    return None if a is None or b is None or weight is None else _combined(a, b, 1.0 - weight, weight)


def _applied(function: Callable[[Poly], Poly | None]) -> Rule:
    def rule(losses: Pairs, call: Call, node: fx.Node) -> Value | None:
        a = terms(losses, call.get("input"))
        rows = function(a.rows) if a is not None else None
        return None if a is None or rows is None else replace(a, rows=rows)

    return rule


def _xlogy(losses: Pairs, call: Call, node: fx.Node) -> Value | None:
    a, b = terms(losses, call.get("input")), terms(losses, call.get("other"))
    rows = log_of(b.rows) if b is not None else None
    dims = aligned(a.dims, b.dims) if a is not None and b is not None else None
    if a is None or b is None or rows is None or dims is None or a.root is not b.root:
        return None
    return replace(a, dims=dims, rows=times(a.rows, rows))


def _logs_added(a: Value | None, b: Value | None) -> Value | None:
    """log(e^a + e^b)."""
    if a is None or b is None:
        return None
    left, right = exp_of(a.rows), exp_of(b.rows)
    if left is None or right is None:
        return None
    both = _combined(replace(a, rows=left), replace(b, rows=right), 1.0, 1.0)
    rows = log_of(both.rows) if both is not None else None
    return None if both is None or rows is None else replace(both, rows=rows)


def _logaddexp(losses: Pairs, call: Call, node: fx.Node) -> Value | None:
    return _logs_added(terms(losses, call.get("input")), terms(losses, call.get("other")))


def _stack(losses: Pairs, call: Call, node: fx.Node) -> Value | None:
    """A stack of two logarithms is no value, but its logsumexp is one."""
    parts = call.get("tensors")
    if isinstance(parts, tuple | list) and len(parts) == 2 and all(terms(losses, x) is not None for x in parts):
        losses.pairs.add(node)
    return None


def _logsumexp(losses: Pairs, call: Call, node: fx.Node) -> Value | None:
    source, dim = call.get("input"), call.get("dim")
    stacked = call_of(source) if source in losses.pairs else None
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    if stacked is None or stacked.name != "stack" or not isinstance(dim, int) or call.get("keepdim", False):
        return None
    n = tensor_of(source).ndim
    if dim % n != stacked.get("dim", 0) % n:
        return None
    first, second = stacked.get("tensors")
    return _logs_added(terms(losses, first), terms(losses, second))


def _detach(losses: Pairs, call: Call, node: fx.Node) -> Value | None:
    """The same numbers; what takes no gradient is told by the fake tensors."""
    a = losses.of(call.get("input"))
    return a if a is not None and a.class_axis is not None else None


def _where(losses: Pairs, call: Call, node: fx.Node) -> Value | None:
    first, second = call.get("input"), call.get("other")
    for operand, other, sense in ((first, second, True), (second, first, False)):
        if is_zero(other):
            return _kept(losses, terms(losses, operand), call.get("condition"), sense)
    return None


def _masked_fill(losses: Pairs, call: Call, node: fx.Node) -> Value | None:
    if not is_zero(call.get("value")):
        return None
    return _kept(losses, terms(losses, call.get("input")), call.get("mask"), False)


def _kept(losses: Pairs, a: Value | None, mask: Any, sense: bool) -> Value | None:
    fake = tensor_of(mask)
    if a is None or fake is None or fake.dtype != torch.bool:
        return None
    return _of_rows(losses, a, mask, lambda dims: ("keep", mask, sense, dims))


def _reduce(how: str) -> Rule:
    def rule(losses: Pairs, call: Call, node: fx.Node) -> Value | None:
        a = terms(losses, call.get("input"))
        return None if a is None else _reduced(a, call.get("dim"), bool(call.get("keepdim", False)), how)

    return rule


def _reduced(a: Value, dim: Any, keepdim: bool, how: str) -> Value | None:
    """Over the classes, or over classes and all rows."""
    n, at = len(a.dims), a.class_axis
    dim = [dim] if isinstance(dim, int) else range(n) if dim is None else dim
    axes = {d % n for d in dim}
    rest = [axis for i, axis in enumerate(a.dims) if i not in axes]
    rows = inner(a.rows, a.dims, a.root.classes)
    if at not in axes or rows is None or (any(rest) and axes != {at}):
        return None
    if how == "mean":
        rows = scaled(rows, 1.0 / a.root.classes.size)
    if axes == {at}:
        dims = (*a.dims[:at], *(((),) if keepdim else ()), *a.dims[at + 1 :])
        return replace(a, kind="row", dims=dims, rows=rows)
    if how == "mean":
        rows = times(rows, poly(("rows",)))
    return replace(a, kind="total", dims=tuple(() for _ in (a.dims if keepdim else rest)), rows=rows)


def _kl_div(losses: Pairs, call: Call, node: fx.Node) -> Value | None:
    """The sum of t (log t - input)."""
    given, target = terms(losses, call.get("input")), terms(losses, call.get("target"))
    if given is None or target is None or any(call.get(old) is not None for old in ("size_average", "reduce")):
        return None
    logs = target.rows if call.get("log_target", False) is True else log_of(target.rows)
    t = exp_of(target.rows) if call.get("log_target", False) is True else target.rows
    difference = _combined(replace(target, rows=logs), given, 1.0, -1.0) if logs is not None and t is not None else None
    if difference is None or t is None:
        return None
    each = replace(difference, rows=times(t, difference.rows))
    reduction = call.get("reduction", "mean")
    if reduction == "none":
        return each
    if reduction in ("sum", "mean"):
        return _reduced(each, None, False, reduction)
    total, first = _reduced(each, None, False, "sum"), each.dims[0]
    if reduction != "batchmean" or total is None or each.root.classes in first:
        return None
    all_rows = not any(axis for axis in each.dims[1:] if axis != (each.root.classes,))
    return replace(total, rows=times(total.rows, poly(("rows",) if all_rows else ("axis", first))))


def _cross_entropy(losses: Pairs, call: Call, node: fx.Node) -> Value | None:
    """With probabilities as targets."""
    a, target = losses.of(call.get("input")), terms(losses, call.get("target"))
    options = call.get("weight"), call.get("size_average"), call.get("reduce"), call.get("label_smoothing") or None
    if a is None or target is None or a.kind != "class" or a.coef != 1.0 or a.onehot is not None:
        return None
    dims, at = aligned(a.dims, target.dims), 1 if len(a.dims) > 1 else 0
    if a.class_axis != at or dims is None or any(option is not None for option in options):
        return None
    rows = times(target.rows, poly(log(Side(a.root, a.form)), coef=-1.0))
    each = Value(target.root, Form(), "terms", dims, rows)
    reduction = call.get("reduction", "mean")
    if reduction == "none":
        return _reduced(each, at, False, "sum")
    total = _reduced(each, None, False, "sum")
    if total is None or reduction not in ("sum", "mean"):
        return None
    return replace(total, rows=times(total.rows, poly(("rows",)))) if reduction == "mean" else total


OF_TWO: dict[str, Rule] = {
    "mul": _mul,
    "div": _div,
    "add": lambda losses, call, node: _sum_of(losses, call, node, 1.0),
    "sub": lambda losses, call, node: _sum_of(losses, call, node, -1.0),
    "neg": _neg,
    "lerp": _lerp,
    "exp": _applied(exp_of),
    "log": _applied(log_of),
    "xlogy": _xlogy,
    "special_xlogy": _xlogy,
    "logaddexp": _logaddexp,
    "stack": _stack,
    "logsumexp": _logsumexp,
    "detach": _detach,
    "where": _where,
    "masked_fill": _masked_fill,
    "sum": _reduce("sum"),
    "mean": _reduce("mean"),
    "kl_div": _kl_div,
    "cross_entropy": _cross_entropy,
}


def _either(name: str) -> Rule:
    alone, together = RULES.get(name), OF_TWO[name]

    def rule(losses: Pairs, call: Call, node: fx.Node) -> Value | None:
        call = _with_numbers(call)
        found = alone(losses, call, node) if alone is not None else None
        return together(losses, call, node) if found is None else found

    return rule


PAIR_RULES = {**RULES, **{name: _either(name) for name in OF_TWO}}

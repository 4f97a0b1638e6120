"""The rules of the normal form: one for each operation of a small closed set, by its name in ATen.

    rule(step, node, *args, **kwargs) -> the node's value, or None where the rule has nothing to say about it

A rule raises `NoNormalForm` where the operation has no meaning in the normal form. It may add operations to the step
(1 / x, a mask as a number) and then gives them their atoms.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fla_compile.passes import normal_form as nf
from fla_compile.passes.alike import opaque
from fla_compile.passes.normal_form import NoNormalForm, Value
from fla_compile.passes.step import Step, shape_of

aten = torch.ops.aten


def of(step: Step, x: Any) -> Value:
    if isinstance(x, fx.Node):
        if x not in step.values:
            raise NoNormalForm(f"a number that changes from call to call ({x.meta.get('val')})")
        if not x.meta["val"].dtype.is_floating_point:
            return as_float(step, x)
        return step.values[x]
    if isinstance(x, int | float):
        return step.space.constant(float(x), ())
    raise NoNormalForm(f"operand {x!r}")


def as_float(step: Step, x: fx.Node) -> Value:
    """A mask or a count among the factors of a product, in the state's type."""
    dtype = step.carries[min(step.core)].meta["val"].dtype
    with step.gm.graph.inserting_after(x):
        node = step.gm.graph.call_function(aten._to_copy.default, (x,), {"dtype": dtype})
    node.meta = {**x.meta, "val": x.meta["val"].new_empty(shape_of(x), dtype=dtype)}
    step.adopt(node)
    step.values[node] = step.new_atom(node)
    return step.values[node]


def number(x: Any) -> float:
    if isinstance(x, int | float):
        return float(x)
    raise NoNormalForm(f"operand {x!r} is not a number")


def _mul(step: Step, node: fx.Node, a: Any, b: Any) -> Value:
    return nf.multiply(step.space, of(step, a), of(step, b))


def _add(step: Step, node: fx.Node, a: Any, b: Any, *, alpha: Any = 1) -> Value:
    return nf.add(step.space, of(step, a), of(step, b), number(alpha))


def _sub(step: Step, node: fx.Node, a: Any, b: Any, *, alpha: Any = 1) -> Value:
    return nf.add(step.space, of(step, a), of(step, b), -number(alpha))


def _rsub(step: Step, node: fx.Node, a: Any, b: Any, alpha: Any = 1) -> Value:
    return nf.add(step.space, of(step, b), of(step, a), -number(alpha))


def _neg(step: Step, node: fx.Node, a: Any) -> Value:
    return nf.scaled(of(step, a), -1.0)


def _div(step: Step, node: fx.Node, a: Any, b: Any) -> Value:
    if isinstance(b, fx.Node):
        if step.stateful(b):
            raise NoNormalForm("division by the state")
        with step.gm.graph.inserting_after(b):
            inverse = step.gm.graph.call_function(aten.reciprocal.default, (b,))
        inverse.meta = {**b.meta, "val": b.meta["val"].new_empty(shape_of(b), dtype=node.meta["val"].dtype)}
        step.adopt(inverse)
        step.values[inverse] = opaque(step, inverse)
        return nf.multiply(step.space, of(step, a), of(step, inverse))
    return nf.scaled(of(step, a), 1.0 / number(b))


def _sum(step: Step, node: fx.Node, a: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    value = of(step, a)
    return nf.reduce_sum(step.space, value, range(len(value.dims)) if not dim else dim, keepdim)


def _mean(step: Step, node: fx.Node, a: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    count = 1
    for axis in dim or range(len(shape_of(a))):
        count = count * shape_of(a)[axis]
    return nf.scaled(_sum(step, node, a, dim, keepdim), 1.0 / number(count))


def _bmm(step: Step, node: fx.Node, a: Any, b: Any) -> Value:
    return nf.contract(step.space, of(step, a), of(step, b), batch=1)


def _mm(step: Step, node: fx.Node, a: Any, b: Any) -> Value:
    return nf.contract(step.space, of(step, a), of(step, b), batch=0)


def _mv(step: Step, node: fx.Node, a: Any, b: Any) -> Value:
    return nf.reduce_sum(step.space, nf.multiply(step.space, of(step, a), of(step, b)), [-1], keepdim=False)


def _dot(step: Step, node: fx.Node, a: Any, b: Any) -> Value:
    return nf.reduce_sum(step.space, nf.multiply(step.space, of(step, a), of(step, b)), [0], keepdim=False)


def _addcmul(step: Step, node: fx.Node, a: Any, b: Any, c: Any, *, value: Any = 1) -> Value:
    return nf.add(step.space, of(step, a), _mul(step, node, b, c), number(value))


def _baddbmm(step: Step, node: fx.Node, a: Any, b: Any, c: Any, *, beta: Any = 1, alpha: Any = 1) -> Value:
    return nf.add(step.space, nf.scaled(of(step, a), number(beta)), _bmm(step, node, b, c), number(alpha))


def _addmm(step: Step, node: fx.Node, a: Any, b: Any, c: Any, *, beta: Any = 1, alpha: Any = 1) -> Value:
    return nf.add(step.space, nf.scaled(of(step, a), number(beta)), _mm(step, node, b, c), number(alpha))


def _lerp(step: Step, node: fx.Node, a: Any, b: Any, weight: Any) -> Value:
    return nf.add(step.space, of(step, a), nf.multiply(step.space, of(step, weight), _sub(step, node, b, a)))


def _where(step: Step, node: fx.Node, mask: Any, a: Any, b: Any) -> Value | None:
    """mask * a + (1 - mask) * b; of what has no state, only what the mask lets through is looked at."""
    if not step.stateful(node) or step.stateful(mask):
        return None
    with step.gm.graph.inserting_before(node):
        inverse = step.gm.graph.call_function(aten.logical_not.default, (mask,))
    inverse.meta = dict(mask.meta)
    step.adopt(inverse)
    step.values[inverse] = step.new_atom(inverse)
    parts = [_masked(step, node, x, keep) for x, keep in ((a, mask), (b, inverse))]
    return nf.expand(step.space, nf.add(step.space, *parts), shape_of(node))


def _masked(step: Step, node: fx.Node, x: Any, keep: fx.Node) -> Value:
    if not isinstance(x, fx.Node) or step.stateful(x) or not step.values[x].atoms:
        return nf.multiply(step.space, as_float(step, keep), of(step, x))
    with step.gm.graph.inserting_before(node):
        kept = step.gm.graph.call_function(torch.where, (keep, x, 0.0))
    val = node.meta["val"]
    shape = torch.broadcast_shapes(shape_of(keep), shape_of(x))
    kept.meta = {**node.meta, "val": val.new_empty(shape)}
    step.adopt(kept)
    step.values[kept] = step.new_atom(kept)
    return step.values[kept]


def _masked_fill(step: Step, node: fx.Node, a: Any, mask: Any, fill: Any) -> Value | None:
    return _where(step, node, mask, fill, a)


def _same(step: Step, node: fx.Node, a: Any, *args: Any, **kwargs: Any) -> Value:
    return of(step, a)


def _cast(step: Step, node: fx.Node, a: Any, **kwargs: Any) -> Value | None:
    """A cast that loses nothing is no operation; a rounding is part of the state's arithmetic, or an atom."""
    wide = torch.promote_types(a.meta["val"].dtype, node.meta["val"].dtype)
    if not node.meta["val"].dtype.is_floating_point or a.meta["val"].device != node.meta["val"].device:
        return None
    if step.stateful(node) or (wide == node.meta["val"].dtype and a.meta["val"].dtype.is_floating_point):
        return of(step, a)
    return None


def _copy(step: Step, node: fx.Node, a: Any, b: Any, *args: Any) -> Value:
    return nf.expand(step.space, of(step, b), shape_of(node))


def _reshape(step: Step, node: fx.Node, a: Any, *args: Any, **kwargs: Any) -> Value:
    return nf.reshape(step.space, of(step, a), shape_of(node))


def _permute(step: Step, node: fx.Node, a: Any, order: Any) -> Value:
    return nf.permute(of(step, a), [axis % len(order) for axis in order])


def _transpose(step: Step, node: fx.Node, a: Any, i: int, j: int) -> Value:
    order = list(range(len(shape_of(a))))
    order[i], order[j] = order[j], order[i]
    return nf.permute(of(step, a), order)


def _t(step: Step, node: fx.Node, a: Any) -> Value:
    return nf.permute(of(step, a), range(len(shape_of(a)))[::-1])


def _expand(step: Step, node: fx.Node, a: Any, *args: Any, **kwargs: Any) -> Value:
    return nf.expand(step.space, of(step, a), shape_of(node))


def _whole(step: Step, node: fx.Node, a: Any, *args: Any) -> Value | None:
    """A slice that keeps everything."""
    whole = all(nf.same_size(x, y) for x, y in zip(shape_of(a), shape_of(node), strict=True))
    return of(step, a) if whole else None


def _select(step: Step, node: fx.Node, a: Any, dim: int, index: Any) -> Value | None:
    """Taking the only element of an axis of size 1."""
    if not nf.same_size(shape_of(a)[dim], 1):
        return None
    return nf.reshape(step.space, of(step, a), shape_of(node))


def _full(step: Step, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    fill = {aten.zeros: 0.0, aten.zeros_like: 0.0, aten.new_zeros: 0.0, aten.ones: 1.0, aten.ones_like: 1.0}
    packet = node.target.overloadpacket  # type: ignore[union-attr]
    value = fill[packet] if packet in fill else number(args[0 if packet is aten.scalar_tensor else 1])
    return step.space.constant(value, shape_of(node))


def _eye(step: Step, node: fx.Node, n: Any, m: Any = None, **kwargs: Any) -> Value:
    return step.new_atom(node, eye=m is None or m == n)


def _diag_embed(step: Step, node: fx.Node, a: Any, *args: Any, **kwargs: Any) -> Value | None:
    """A diagonal matrix: the vector times the identity."""
    value = of(step, a)
    if any(args) or kwargs or len(value.dims[-1]) != 1:
        return None
    val = node.meta["val"]
    with step.gm.graph.inserting_before(node):
        size = (shape_of(a)[-1],)
        eye = step.gm.graph.call_function(aten.eye.default, size, {"dtype": val.dtype, "device": val.device})
    eye.meta = {**node.meta, "val": val.new_empty((*size, *size))}
    step.adopt(eye)
    step.values[eye] = step.new_atom(eye, eye=True)
    column = Value((*value.dims, ()), value.terms)
    return nf.multiply(step.space, column, step.values[eye])


Rule = Callable[..., Value | None]
RULES: dict[Any, Rule] = {
    aten.mul: _mul,
    aten.add: _add,
    aten.sub: _sub,
    aten.rsub: _rsub,
    aten.neg: _neg,
    aten.div: _div,
    aten.sum: _sum,
    aten.mean: _mean,
    aten.bmm: _bmm,
    aten.mm: _mm,
    aten.mv: _mv,
    aten.dot: _dot,
    aten.addcmul: _addcmul,
    aten.baddbmm: _baddbmm,
    aten.addmm: _addmm,
    aten.lerp: _lerp,
    aten.where: _where,
    aten.masked_fill: _masked_fill,
    aten.clone: _same,
    aten.alias: _same,
    aten._to_copy: _cast,
    aten.copy: _copy,
    aten.view: _reshape,
    aten.reshape: _reshape,
    aten._unsafe_view: _reshape,
    aten.unsqueeze: _reshape,
    aten.squeeze: _reshape,
    aten.permute: _permute,
    aten.transpose: _transpose,
    aten.t: _t,
    aten.expand: _expand,
    aten.slice: _whole,
    aten.select: _select,
    aten.eye: _eye,
    aten.diag_embed: _diag_embed,
    aten.zeros: _full,
    aten.zeros_like: _full,
    aten.new_zeros: _full,
    aten.ones: _full,
    aten.ones_like: _full,
    aten.full: _full,
    aten.scalar_tensor: _full,
    aten.full_like: _full,
}

"""Rules for sums, products, contractions and views of any type of tensor, masks and positions among them.

The same algebra as `normalise.RULES`, which read whole numbers as opaque because a state is never one.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from fla_compile.passes import normal_form as nf
from fla_compile.passes.normal_form import Factor, NoNormalForm, Term, Value
from fla_compile.passes.parallel_forms import Forms

aten = torch.ops.aten
Rule = Callable[..., Value | None]


def value_of(forms: Forms, x: Any) -> Value:
    if isinstance(x, fx.Node):
        if x not in forms.values:
            raise NoNormalForm(f"a number that changes from call to call ({x.meta.get('val')})")
        return forms.values[x]
    if not isinstance(x, int | float) or x != x:
        raise NoNormalForm(f"operand {x!r}")
    if math.isinf(x):
        return Value((), (Term(math.copysign(1.0, x), (Factor(forms.inf, ()),)),))
    return forms.space.constant(float(x), ())


def written_number(gm: fx.GraphModule, node: fx.Node) -> float | None:
    """A number of the program that tracing made a tensor of."""
    value = getattr(gm, str(node.target), None)
    value = getattr(value, "constant", None) if isinstance(value, FakeTensor) else value
    if not isinstance(value, torch.Tensor) or value.dim() or isinstance(value, FakeTensor):
        return None
    with unset_fake_temporarily():
        return float(value)


def shape_of(node: fx.Node) -> Any:
    return node.meta["val"].shape


def number(x: Any) -> float:
    if isinstance(x, int | float):
        return float(x)
    raise NoNormalForm(f"operand {x!r} is not a number")


def finite(forms: Forms, x: Any) -> Value:
    """A factor; 0 * inf is not a number."""
    value = value_of(forms, x)
    if forms.has_inf(value):
        raise NoNormalForm("a product with infinity")
    return value


def _mul(forms: Forms, node: fx.Node, a: Any, b: Any) -> Value:
    return nf.multiply(forms.space, finite(forms, a), finite(forms, b))


def _add(forms: Forms, node: fx.Node, a: Any, b: Any, *, alpha: Any = 1) -> Value:
    return nf.add(forms.space, value_of(forms, a), value_of(forms, b), number(alpha))


def _sub(forms: Forms, node: fx.Node, a: Any, b: Any, *, alpha: Any = 1) -> Value:
    return nf.add(forms.space, value_of(forms, a), value_of(forms, b), -number(alpha))


def _rsub(forms: Forms, node: fx.Node, a: Any, b: Any, alpha: Any = 1) -> Value:
    return nf.add(forms.space, value_of(forms, b), value_of(forms, a), -number(alpha))


def _neg(forms: Forms, node: fx.Node, a: Any) -> Value:
    return nf.scaled(value_of(forms, a), -1.0)


def _sum(forms: Forms, node: fx.Node, a: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    value = finite(forms, a)
    return nf.reduce_sum(forms.space, value, range(len(value.dims)) if not dim else dim, keepdim)


def _mean(forms: Forms, node: fx.Node, a: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    count = math.prod(shape_of(a)[axis] for axis in dim or range(len(shape_of(a))))
    return nf.scaled(_sum(forms, node, a, dim, keepdim), 1.0 / number(count))


def _bmm(forms: Forms, node: fx.Node, a: Any, b: Any) -> Value:
    return nf.contract(forms.space, finite(forms, a), finite(forms, b), batch=1)


def _mm(forms: Forms, node: fx.Node, a: Any, b: Any) -> Value:
    return nf.contract(forms.space, finite(forms, a), finite(forms, b), batch=0)


def _mv(forms: Forms, node: fx.Node, a: Any, b: Any) -> Value:
    return nf.reduce_sum(forms.space, _mul(forms, node, a, b), [-1], keepdim=False)


def _addcmul(forms: Forms, node: fx.Node, a: Any, b: Any, c: Any, *, value: Any = 1) -> Value:
    return nf.add(forms.space, value_of(forms, a), _mul(forms, node, b, c), number(value))


def _add_product(product: Rule) -> Rule:
    def rule(forms: Forms, node: fx.Node, a: Any, b: Any, c: Any, *, beta: Any = 1, alpha: Any = 1) -> Value:
        base = nf.scaled(value_of(forms, a), number(beta)) if beta else forms.space.constant(0.0, ())
        return nf.add(forms.space, base, product(forms, node, b, c), number(alpha))

    return rule


def _same(forms: Forms, node: fx.Node, a: Any, *args: Any, **kwargs: Any) -> Value:
    return value_of(forms, a)


def _copy(forms: Forms, node: fx.Node, a: Any, b: Any, *args: Any) -> Value:
    return nf.expand(forms.space, value_of(forms, b), shape_of(node))


def _reshape(forms: Forms, node: fx.Node, a: Any, *args: Any, **kwargs: Any) -> Value:
    return nf.reshape(forms.space, value_of(forms, a), shape_of(node))


def _permute(forms: Forms, node: fx.Node, a: Any, order: Iterable[int]) -> Value:
    return nf.permute(value_of(forms, a), [axis % len(shape_of(a)) for axis in order])


def _transpose(forms: Forms, node: fx.Node, a: Any, i: int, j: int) -> Value:
    order = list(range(len(shape_of(a))))
    order[i], order[j] = order[j], order[i]
    return nf.permute(value_of(forms, a), order)


def _t(forms: Forms, node: fx.Node, a: Any) -> Value:
    return nf.permute(value_of(forms, a), range(len(shape_of(a)))[::-1])


def _expand(forms: Forms, node: fx.Node, a: Any, *args: Any, **kwargs: Any) -> Value:
    return nf.expand(forms.space, value_of(forms, a), shape_of(node))


def _repeat(forms: Forms, node: fx.Node, a: Any, repeats: Any) -> Value | None:
    """Copies of axes of size 1."""
    shape = (1,) * (len(repeats) - len(shape_of(a))) + tuple(shape_of(a))
    if not all(nf.same_size(n, 1) or nf.same_size(size, 1) for n, size in zip(repeats, shape, strict=True)):
        return None
    return _expand(forms, node, a)


def _constant(fill: float) -> Rule:
    return lambda forms, node, *args, **kwargs: forms.space.constant(fill, shape_of(node))


LINEAR_RULES: dict[Any, Rule] = {
    aten.mul: _mul,
    aten.add: _add,
    aten.sub: _sub,
    aten.rsub: _rsub,
    aten.neg: _neg,
    aten.sum: _sum,
    aten.mean: _mean,
    aten.bmm: _bmm,
    aten.mm: _mm,
    aten.mv: _mv,
    aten.dot: _mv,
    aten.addcmul: _addcmul,
    aten.baddbmm: _add_product(_bmm),
    aten.addmm: _add_product(_mm),
    aten.clone: _same,
    aten.alias: _same,
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
    aten.repeat: _repeat,
    aten.zeros: _constant(0.0),
    aten.zeros_like: _constant(0.0),
    aten.new_zeros: _constant(0.0),
    aten.ones: _constant(1.0),
    aten.ones_like: _constant(1.0),
    aten.new_ones: _constant(1.0),
}

"""Rules that give masks, positions, exponentials and cumulative sums their normal form; see `parallel_forms`.

`LINEAR_RULES` know sums, products, contractions and views. A rule that answers None leaves the node an atom.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fla_compile.passes import normal_form as nf
from fla_compile.passes.normal_form import NoNormalForm, Term, Value
from fla_compile.passes.parallel_decays import DECAY_RULES
from fla_compile.passes.parallel_forms import Forms, Terms, number_of, single
from fla_compile.passes.parallel_linear import LINEAR_RULES, Rule, value_of, written_number

aten = torch.ops.aten


def analyse(gm: fx.GraphModule, provable: Callable[[fx.Node], bool], measured: set[fx.Node]) -> Forms:
    """The values of all tensors of a functional ATen graph; `provable` adds to `measured` as it is asked."""
    forms = Forms(gm, provable=provable, measured=measured)
    for node in list(gm.graph.nodes):
        if node.op == "get_attr":
            number = written_number(gm, node)
            if number is not None:
                forms.values[node] = forms.space.constant(number, ())
            continue
        if isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat):
            forms.values[node] = forms.scalar(node)
        if node.op == "output" or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        packet = getattr(node.target, "overloadpacket", None)
        rule = RULES.get(packet)
        try:
            value = rule(forms, node, *node.args, **node.kwargs) if rule else None
            forms.values[node] = forms.new_atom(node) if value is None else forms.settled(node, value)
        except (NoNormalForm, TypeError, OverflowError):  # TypeError: arguments that the rule does not know
            forms.values[node] = forms.new_atom(node)
    return forms


def one_minus(forms: Forms, value: Value) -> Value:
    return nf.add(forms.space, forms.space.constant(1.0, ()), value, -1.0)


def blend(forms: Forms, mask: Value, a: Value, b: Value) -> Value:
    """`a` where the mask is 1, `b` where it is 0."""
    first = nf.multiply(forms.space, mask, a)
    return forms.simplify(nf.add(forms.space, first, nf.multiply(forms.space, one_minus(forms, mask), b)))


def _arange(forms: Forms, node: fx.Node, *args: Any, **kwargs: Any) -> Value | None:
    start, step = (0, 1) if len(args) == 1 else (args[0], args[2] if len(args) > 2 else 1)
    (size,) = node.meta["val"].shape
    axis = forms.space.axis(size)
    if not isinstance(start, int) or not isinstance(step, int) or not axis:
        return None
    terms = (Term(float(step), (forms.position(single(axis)),)),)
    return Value((axis,), terms + ((Term(float(start), ()),) if start else ()))


def _fill(forms: Forms, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    number = args[0] if node.target.overloadpacket is aten.scalar_tensor else args[1]
    return nf.expand(forms.space, value_of(forms, number), node.meta["val"].shape)


def _eye(forms: Forms, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    dims = tuple(forms.space.axis(size) for size in node.meta["val"].shape)
    pair = single(dims[0]), single(dims[1])
    return Value(dims, (Term(1.0, (forms.ind(0, *pair),)), Term(-1.0, (forms.ind(1, *pair),))))


def _kept(forms: Forms, value: Value, mask: Callable[[int, int], Terms]) -> Value:
    row, column = single(value.dims[-2]), single(value.dims[-1])
    kept = mask(row, column)
    return Value(value.dims, tuple(Term(s.coef * t.coef, s.factors + t.factors) for s in kept for t in value.terms))


def _tril(forms: Forms, node: fx.Node, a: Any, diagonal: int = 0) -> Value:
    return _kept(forms, value_of(forms, a), lambda i, j: (Term(1.0, (forms.ind(-diagonal, i, j),)),))


def _triu(forms: Forms, node: fx.Node, a: Any, diagonal: int = 0) -> Value:
    return _kept(forms, value_of(forms, a), lambda i, j: (Term(1.0, ()), Term(-1.0, (forms.ind(1 - diagonal, i, j),))))


def _and(forms: Forms, node: fx.Node, a: Any, b: Any) -> Value:
    return nf.multiply(forms.space, truth(forms, a), truth(forms, b))


def _or(forms: Forms, node: fx.Node, a: Any, b: Any) -> Value:
    return one_minus(forms, nf.multiply(forms.space, *(one_minus(forms, truth(forms, x)) for x in (a, b))))


def _not(forms: Forms, node: fx.Node, a: Any) -> Value:
    if node.meta["val"].dtype != torch.bool:
        raise NoNormalForm("bits")
    return one_minus(forms, truth(forms, a))


def truth(forms: Forms, a: fx.Node) -> Value:
    """A condition as 1 and 0."""
    value = value_of(forms, a)
    return value if a.meta["val"].dtype == torch.bool else nonzero(forms, value)


def nonzero(forms: Forms, value: Value) -> Value:
    def function(terms: Terms) -> Terms:
        number = number_of(Value((), terms))
        if number is None:
            raise NoNormalForm("a condition on data")
        return (Term(1.0, ()),) if number else ()

    return forms.piecewise(value, function)


def _compare(sign: float, strict: bool) -> Callable[..., Value]:
    def rule(forms: Forms, node: fx.Node, a: Any, b: Any) -> Value:
        difference = nf.add(forms.space, value_of(forms, a), value_of(forms, b), -1.0)

        def function(terms: Terms) -> Terms:
            found = forms.at_least(tuple(Term(sign * t.coef, t.factors) for t in terms), strict)
            if found is None:
                raise NoNormalForm("a comparison of data")
            return found

        return forms.piecewise(difference, function)

    return rule


def _eq(forms: Forms, node: fx.Node, a: Any, b: Any) -> Value:
    """x == y where x >= y and not x > y; x != x only where x is no number, and data are taken to be numbers."""
    return nf.add(forms.space, _GE(forms, node, a, b), _GT(forms, node, a, b), -1.0)


def _ne(forms: Forms, node: fx.Node, a: Any, b: Any) -> Value:
    if a is b:
        return forms.space.constant(0.0, node.meta["val"].shape)
    return one_minus(forms, _eq(forms, node, a, b))


_GE, _GT = _compare(1.0, False), _compare(1.0, True)


def _where(forms: Forms, node: fx.Node, mask: Any, a: Any, b: Any) -> Value:
    return blend(forms, value_of(forms, mask), value_of(forms, a), value_of(forms, b))


def _masked_fill(forms: Forms, node: fx.Node, a: Any, mask: Any, fill: Any) -> Value:
    return blend(forms, value_of(forms, mask), value_of(forms, fill), value_of(forms, a))


def _index_put(forms: Forms, node: fx.Node, a: Any, indices: Any, fill: Any, accumulate: bool = False) -> Value | None:
    """x[mask] = number, the mask over some adjacent axes."""
    masks = [(n, x) for n, x in enumerate(indices) if x is not None]
    if accumulate or len(masks) != 1 or masks[0][1].meta["val"].dtype != torch.bool:
        return None
    at, mask = masks[0]
    number, value = value_of(forms, fill), value_of(forms, a)
    if number.dims or any(t.factors and t.factors[0].atom != forms.inf for t in number.terms):
        return None
    condition = value_of(forms, mask)
    behind = ((),) * (len(value.dims) - at - len(condition.dims))
    return blend(forms, Value((*condition.dims, *behind), condition.terms), number, value)


def _clamp(forms: Forms, node: fx.Node, a: Any, low: Any = None, high: Any = None, **kwargs: Any) -> Value:
    value = value_of(forms, a)
    low, high = kwargs.get("min", low), kwargs.get("max", high)
    if low is not None:
        value = _larger(forms, value, value_of(forms, low))
    if high is not None:
        value = nf.scaled(_larger(forms, nf.scaled(value, -1.0), nf.scaled(value_of(forms, high), -1.0)), -1.0)
    return value


def _larger(forms: Forms, a: Value, b: Value) -> Value:
    """max(a, b) of positions."""
    excess = forms.piecewise(nf.add(forms.space, a, b, -1.0), lambda terms: _positive_part(forms, terms))
    return forms.simplify(nf.add(forms.space, excess, b))


def _positive_part(forms: Forms, terms: Terms) -> Terms:
    mask = forms.at_least(terms, strict=False)
    if mask is None:
        raise NoNormalForm("a choice by data")
    return tuple(Term(s.coef * t.coef, s.factors + t.factors) for s in mask for t in terms)


def _relu(forms: Forms, node: fx.Node, a: Any) -> Value:
    return forms.piecewise(value_of(forms, a), lambda terms: _positive_part(forms, terms))


def _abs(forms: Forms, node: fx.Node, a: Any) -> Value:
    value = value_of(forms, a)
    return nf.add(forms.space, nf.scaled(_relu(forms, node, a), 2.0), forms.opened(value), -1.0)


def _maximum(forms: Forms, node: fx.Node, a: Any, b: Any) -> Value:
    return _larger(forms, value_of(forms, a), value_of(forms, b))


def _minimum(forms: Forms, node: fx.Node, a: Any, b: Any) -> Value:
    a, b = (nf.scaled(value_of(forms, x), -1.0) for x in (a, b))
    return nf.scaled(_larger(forms, a, b), -1.0)


def _cast(forms: Forms, node: fx.Node, a: Any, **kwargs: Any) -> Value | None:
    """A mask keeps its numbers in every type; a T x T matrix is not rounded, what is not one is an atom where it is."""
    have, want = a.meta["val"], node.meta["val"]
    if have.device != want.device:
        return None
    value = value_of(forms, a)
    if want.dtype == torch.bool:
        return truth(forms, a)
    whole = not have.dtype.is_floating_point
    if whole or torch.promote_types(have.dtype, want.dtype) == want.dtype:
        return value
    inner = forms.masked(value) or any(forms.summed(atom) for atom in value.atoms)
    return value if inner and want.dtype.is_floating_point else None


def _slice(
    forms: Forms, node: fx.Node, a: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value | None:
    """A leading part of an axis that only masks and positions run over."""
    value = value_of(forms, a)
    shape = node.meta["val"].shape
    if all(nf.same_size(x, y) for x, y in zip(a.meta["val"].shape, shape, strict=True)):
        return value
    if start not in (None, 0) or step != 1:
        return None
    old, new = single(value.dims[dim]), single(forms.space.axis(shape[dim]))
    touched = {f.atom for t in value.terms for f in t.factors if old in f.labels}
    if not touched <= {forms.pos, *forms.inds}:
        return None
    return nf.substitute(value, {old: (new,)})


def _detach(forms: Forms, node: fx.Node, a: Any) -> Value | None:
    value = value_of(forms, a)
    symbols = {forms.pos, forms.inf, *forms.inds}
    return value if value.atoms <= symbols else None


RULES: dict[Any, Rule] = (
    LINEAR_RULES
    | DECAY_RULES
    | {
        aten.arange: _arange,
        aten.full: _fill,
        aten.full_like: _fill,
        aten.new_full: lambda forms, node, a, size, fill, **kwargs: _fill(forms, node, a, fill),
        aten.scalar_tensor: _fill,
        aten.eye: _eye,
        aten.tril: _tril,
        aten.triu: _triu,
        aten.bitwise_and: _and,
        aten.logical_and: _and,
        aten.bitwise_or: _or,
        aten.logical_or: _or,
        aten.bitwise_not: _not,
        aten.logical_not: _not,
        aten.ge: _GE,
        aten.gt: _GT,
        aten.le: _compare(-1.0, False),
        aten.lt: _compare(-1.0, True),
        aten.eq: _eq,
        aten.ne: _ne,
        aten.where: _where,
        aten.masked_fill: _masked_fill,
        aten.index_put: _index_put,
        aten.clamp: _clamp,
        aten.clamp_min: _clamp,
        aten.relu: _relu,
        aten.abs: _abs,
        aten.maximum: _maximum,
        aten.minimum: _minimum,
        aten._to_copy: _cast,
        aten.slice: _slice,
        aten.detach: _detach,
        aten.lift_fresh_copy: _detach,
    }
)

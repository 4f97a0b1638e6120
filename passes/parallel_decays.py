"""Rules for exponentials, logarithms, powers, quotients and cumulative sums of T x T matrices; see `parallel_forms`.

A power of a distance is an exponential, and so is a quotient of exponentials: decays are products of exponentials with
known logarithms, however they are spelled.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fla_compile.passes import normal_form as nf
from fla_compile.passes.normal_form import Factor, NoNormalForm, Term, Value
from fla_compile.passes.parallel_forms import Forms, Terms, negated, number_of, single
from fla_compile.passes.parallel_linear import Rule, finite, value_of

aten = torch.ops.aten


def _exp(base: float | None = None) -> Callable[..., Value]:
    def rule(forms: Forms, node: fx.Node, a: Any) -> Value:
        value = value_of(forms, a)
        if base is not None:
            value = nf.scaled(value, math.log(base))
        whole = None if forms.masked(forms.opened(value)) else node
        return forms.piecewise(value, lambda terms: forms.exponential(terms, whole, value.dims))

    return rule


def _log(forms: Forms, node: fx.Node, a: Any) -> Value | None:
    def function(terms: Terms) -> Terms:
        found = forms.logarithm(terms)
        if found is None or any(f.atom in forms.log_of for t in found for f in t.factors):
            raise NoNormalForm("the logarithm of data")
        return found

    return forms.piecewise(value_of(forms, a), function)


def _pow(forms: Forms, node: fx.Node, a: Any, b: Any) -> Value | None:
    base = value_of(forms, a)
    if isinstance(b, int | float) and (b == 1 or not any(f.atom in forms.logs for t in base.terms for f in t.factors)):
        return base if b == 1 else None
    log = forms.logarithm(base.terms)
    if log is None:
        return None
    exponent = forms.opened(value_of(forms, b))
    power = nf.multiply(forms.space, Value(base.dims, log), exponent)
    found = forms.piecewise(power, forms.exponential)
    unsigned = [f for f in base.terms[0].factors if forms.atoms[f.atom].node in forms.measured] if base.terms else []
    return _signed(forms, base, unsigned, exponent, found) if unsigned else found


def _signed(forms: Forms, base: Value, unsigned: list[Factor], exponent: Value, size: Value) -> Value:
    """The signs of a power of i - j: those of the i-th and of the j-th power."""
    form = forms.affine(exponent.terms)
    if form is None or form[0] != 1.0 or form[3] or len(base.terms) != 1:
        raise NoNormalForm("a power of a number of unknown sign")
    for factor in unsigned:
        atom = next((a for a, of in forms.sign_of.items() if of == factor.atom), None)
        if atom is None:
            atom = forms.symbol()
            forms.sign_of[atom] = factor.atom
        for label in form[1:3]:
            # The base and the exponent have axes of their own; they are aligned as for a product.
            sign = Value(base.dims, (Term(1.0, (Factor(atom, factor.axes),)),))
            time = Value(tuple(d if label in d else () for d in exponent.dims), (Term(1.0, (forms.position(label),)),))
            both = nf.multiply(forms.space, sign, time)
            (term,) = both.terms
            held = next(f for f in term.factors if f.atom == atom)
            at = next(f for f in term.factors if f.atom == forms.pos)
            axes = (*held.axes, *at.axes)
            size = nf.multiply(forms.space, size, Value(both.dims, (Term(1.0, (Factor(atom, axes),)),)))
    return size


def _reciprocal(forms: Forms, node: fx.Node, a: Any) -> Value | None:
    value = value_of(forms, a)
    if len(value.terms) != 1 or any(f.atom not in forms.logs for f in value.terms[0].factors):
        return None
    log = forms.logarithm(tuple(Term(abs(t.coef), t.factors) for t in value.terms))
    assert log is not None
    found = forms.exponential(negated(log))
    return Value(value.dims, tuple(Term(math.copysign(t.coef, value.terms[0].coef), t.factors) for t in found))


def _div(forms: Forms, node: fx.Node, a: Any, b: Any, rounding_mode: Any = None) -> Value | None:
    if rounding_mode is not None:
        return None
    if not isinstance(b, fx.Node):
        return nf.scaled(value_of(forms, a), 1.0 / float(b))
    inverse = _reciprocal(forms, node, b)
    if inverse is None:
        graph, held = forms.gm.graph, b.meta["val"]
        with graph.inserting_after(b):
            if isinstance(held, torch.Tensor):
                new = graph.call_function(aten.reciprocal.default, (b,))
                new.meta = {**b.meta, "val": held.new_empty(held.shape, dtype=node.meta["val"].dtype)}
            else:
                new = graph.call_function(operator.truediv, (1.0, b))
                new.meta = {**b.meta, "val": 1.0 / held}
        inverse = forms.values[new] = forms.new_atom(new) if isinstance(held, torch.Tensor) else forms.scalar(new)
    return nf.multiply(forms.space, finite(forms, a), inverse)


def _cumsum(forms: Forms, node: fx.Node, a: Any, dim: int, **kwargs: Any) -> Value:
    value = finite(forms, a)
    if not value.dims[dim]:
        return value
    t = single(value.dims[dim])
    number = number_of(value)
    if number is not None:
        return Value(value.dims, (Term(number, (forms.position(t),)), Term(number, ())))
    if any(t in f.labels for term in value.terms for f in forms.masks(term)):
        return Value(value.dims, tuple(part for term in value.terms for part in _segment_sum(forms, term, t)))
    fresh = forms.space.renamed(value)
    row, column = forms.space.fresh(forms.space.sizes[t]), single(fresh.dims[dim])
    mask = forms.ind(0, row, column)
    dims = [*fresh.dims]
    dims[dim] = (row,)
    total = Value(tuple(dims), tuple(Term(x.coef, (*x.factors, mask)) for x in fresh.terms))
    total = forms.contraction(node, total)
    forms.gains[total.terms[0].factors[0].atom] = (dim % len(value.dims), forms.space.renamed(value))
    return total


def _segment_sum(forms: Forms, term: Term, t: int) -> Terms:
    """The sum over axis t of a term with a mask over t and another axis: differences of cumulative sums X."""
    masks = forms.masks(term)
    if len(masks) != 1:
        raise NoNormalForm("a sum over a part of the positions")
    mask = masks[0]
    d, (row, column) = forms.inds[mask.atom], mask.labels
    other = column if row == t else row
    summed = tuple(f for f in term.factors if t in f.labels and f is not mask)
    rest = tuple(f for f in term.factors if t not in f.labels)
    labels = tuple(sorted({label for f in summed for label in f.labels}))
    if not summed or other in labels or d not in (0, 1):
        raise NoNormalForm("a sum over a part of the positions")
    X = forms.symbol()
    step = forms.space.renamed(Value(tuple((x,) for x in labels), (Term(1.0, summed),)))
    forms.gains[X] = (labels.index(t), step)

    def at(label: int) -> Factor:
        return Factor(X, tuple(((label if x == t else x),) for x in labels))

    own = nf.substitute(Value((), (Term(1.0, summed),)), {t: (other,)}).terms[0].factors
    if row == t:  # from other + d to t, where t - other >= d; nothing where t = other and d = 1
        mask = forms.ind(0, t, other)
        parts = [(1.0, (at(t), mask)), (-1.0, (at(other), mask))] + ([(1.0, (*own, mask))] if d == 0 else [])
    else:  # up to t, but at most to other - d
        parts = [(1.0, (at(t), mask)), (1.0, (at(other),)), (-1.0, (at(other), mask))]
        parts += [(-1.0, own), (1.0, (*own, mask))] if d == 1 else []
    return tuple(Term(term.coef * coef, (*rest, *factors)) for coef, factors in parts)


DECAY_RULES: dict[Any, Rule] = {
    aten.exp: _exp(),
    aten.exp2: _exp(2.0),
    aten.log: _log,
    aten.pow: _pow,
    aten.reciprocal: _reciprocal,
    aten.div: _div,
    aten.cumsum: _cumsum,
}

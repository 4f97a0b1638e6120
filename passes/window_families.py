"""Families of windows: stacked along a new axis, joined, and summed over member by member."""

from collections.abc import Iterable, Sequence

from fla_compile.passes import normal_form as nf
from fla_compile.passes.normal_form import Factor, Labels, NoNormalForm, Term, Value
from fla_compile.passes.windows import Family, Window, Windows


def summed(w: Windows, value: Value, axes: Iterable[int], keepdim: bool) -> Value:
    """The sum over axes; terms with a family along one of them become one term for each of its members."""
    for axis in sorted((axis % len(value.dims) for axis in axes), reverse=True):
        labels = value.dims[axis]
        families = [t for t in value.terms if labels and any(runs_along(w, f, labels) for f in t.factors)]
        rest = Value(value.dims, tuple(t for t in value.terms if t not in families))
        total = nf.reduce_sum(w.space, rest, [axis], keepdim)
        written = [t for term in families for t in written_out(w, term, labels)]
        value = nf.collect(Value(total.dims, (*total.terms, *written)))
    return value


def runs_along(w: Windows, f: Factor, labels: Labels) -> bool:
    return isinstance(w.atoms[f.atom], Family) and f.axes[-1] == labels


def written_out(w: Windows, term: Term, labels: Labels) -> list[Term]:
    """The sum of a term over the axis of a family, member by member."""
    family = next(f for f in term.factors if runs_along(w, f, labels))
    count = len(w.atoms[family.atom].members)  # type: ignore[union-attr]
    return [Term(term.coef, tuple(picked(w, f, labels, i) for f in term.factors)) for i in range(count)]


def picked(w: Windows, f: Factor, labels: Labels, i: int) -> Factor:
    """Entry i of a factor along an axis."""
    what = w.atoms[f.atom]
    if isinstance(what, Family) and runs_along(w, f, labels):
        return Factor(what.members[i], f.axes[:-1])
    for at, own in enumerate(f.axes):
        if own == labels:
            atom = w.moved(f.atom, at, lambda x: Window(x.node, x.axis, x.start + i, 1, x.prefix, x.suffix))
            return Factor(atom, (*f.axes[:at], (), *f.axes[at + 1 :]))
    if labels[0] in f.labels:
        raise NoNormalForm("a part of a merged axis")
    return f


def joined(w: Windows, values: Sequence[Value], axis: int) -> Value | None:
    """Families joined along their own axis, or with further members; None where there is no family."""
    members: list[Value] = []
    found = False
    for value in values:
        if len(value.terms) != 1 or len(value.terms[0].factors) != 1:
            return None
        factor, labels = value.terms[0].factors[0], value.dims[axis]
        rest = (*value.dims[:axis], *value.dims[axis + 1 :])
        if labels and runs_along(w, factor, labels):
            found = True
            members += [Value(rest, (term,)) for term in written_out(w, value.terms[0], labels)]
        elif not labels:
            members.append(Value(rest, value.terms))
        else:
            return None
    return with_axis(stacked(w, members), axis) if found else None


def with_axis(value: Value, axis: int) -> Value:
    """The last axis of a value put elsewhere."""
    order = list(range(len(value.dims) - 1))
    order.insert(axis, len(order))
    return nf.permute(value, order)


def stacked(w: Windows, values: Sequence[Value]) -> Value:
    """Views of windows with the same axes, along a new last axis."""
    first = w.single(values[0])
    members = []
    for value in values:
        own = w.single(value)
        names = dict(zip((x for axis in value.dims for x in axis), (x for d in values[0].dims for x in d), strict=True))
        axes = tuple(tuple(names[label] for label in axis) for axis in own.axes)
        if axes != first.axes or isinstance(w.atoms[own.atom], Family):
            raise NoNormalForm("a stack of different things")
        members.append(own.atom)
    label = w.space.axis(len(members))
    factor = Factor(w.atom(Family(tuple(members))), (*first.axes, label))
    return Value((*values[0].dims, label), (Term(1.0, (factor,)),))

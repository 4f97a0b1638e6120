"""Atoms that are alike: one atom for what a program computes twice, with its axes in another order each time.

    silu(k)[..., None] and silu(k[..., None])          an operation on each element commutes with every view
    k.norm(dim=-1) and k[:, None].norm(dim=-1)         one along an axis, with every view that keeps that axis
    1 + elu(k) and (elu(k.mT) + 1).mT                  sums and contractions with equal terms

An operation on a view of an atom is computed on the atom itself, in the atom's own type; only then is it looked up.
"""

from typing import Any

import torch
from torch import fx

from fla_compile.passes import normal_form as nf
from fla_compile.passes.normal_form import Factor, Labels, Term, Value
from fla_compile.passes.polynomials import add_node
from fla_compile.passes.step import Step, shape_of

aten = torch.ops.aten

# Operations along one axis, by the place of that axis among their arguments; those that leave it with size 1.
ALONG = {aten._softmax.default: 1, aten._log_softmax.default: 1, aten.linalg_vector_norm.default: 2}
REDUCING = {aten.linalg_vector_norm.default}


def opaque(step: Step, node: fx.Node) -> Value:
    """The value of a stateless node without a rule."""
    value = _on_the_atom(step, node)
    return step.new_atom(node) if value is None else value


def mixed(step: Step, node: fx.Node, value: Value) -> Value:
    """The value of a stateless node that is a sum or a contraction: an atom that knows its terms."""
    order = _order(value)
    if order is None or not _plain(step, node, value):
        return step.new_atom(node, expansion=value)
    place = {label: i for i, label in enumerate(order)}
    terms = sorted((nf.canonical(t, tuple((label,) for label in order)), t.coef) for t in value.terms)
    sizes = tuple(str(step.space.sizes[label]) for label in order)
    key = (tuple(terms), sizes, node.meta["val"].dtype)
    if key not in step.alike:
        own = step.new_atom(node, expansion=value)
        step.alike[key] = (own.terms[0].factors[0].atom, tuple(tuple(place[x] for x in axis) for axis in value.dims))
        return own
    atom, axes = step.alike[key]
    return Value(value.dims, (Term(1.0, (Factor(atom, tuple(tuple(order[i] for i in axis) for axis in axes)),)),))


def _plain(step: Step, node: fx.Node, value: Value) -> bool:
    """Whether equal terms mean equal numbers: nothing is widened on the way, no axis is summed over in pieces."""
    dims = {label for axis in value.dims for label in axis}
    factors = [f for t in value.terms for f in t.factors]
    own = node.meta["val"].dtype
    return all(step.atoms[f.atom].node.meta["val"].dtype == own for f in factors) and all(
        len(set(axis) - dims) < 2 for f in factors for axis in f.axes
    )


def _order(value: Value) -> list[int] | None:
    """The labels of the axes in an order that does not depend on that of the axes; None if one is in no term."""
    terms = sorted(value.terms, key=lambda t: (sorted(f.atom for f in t.factors), t.coef))
    factors = [f for t in terms for f in sorted(t.factors, key=lambda f: f.atom)]
    dims = [label for axis in value.dims for label in axis]
    order = list(dict.fromkeys(label for f in factors for label in f.labels if label in set(dims)))
    return order if len(order) == len(dims) else None


def _on_the_atom(step: Step, node: fx.Node) -> Value | None:
    """An operation on a view of an atom as a view of the operation on the atom."""
    x = node.args[0] if node.args else None
    if not isinstance(x, fx.Node) or x not in step.values or _uses(node) != [x]:
        return None
    value = step.values[x]
    if len(value.terms) != 1 or len(value.terms[0].factors) != 1 or value.terms[0].coef != 1.0:
        return None
    (factor,) = value.terms[0].factors
    source = step.atoms[factor.atom].node
    dims = [label for axis in value.dims for label in axis]
    if source.meta["val"].dtype != x.meta["val"].dtype or not set(factor.labels) <= set(dims):
        return None
    if len(set(factor.labels)) != len(factor.labels):
        return None
    if node.target in ALONG:
        return _along(step, node, value, factor, source)
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()) or len(shape_of(node)) != len(value.dims):
        return None
    atom = _atom(step, node, source, (source, *node.args[1:]), x is source)
    return Value(value.dims, (Term(1.0, (Factor(atom, factor.axes),)),))


def _uses(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments, each as often as it is used."""
    used: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: used.append(n) or n)  # type: ignore[func-returns-value]
    return used


def _along(step: Step, node: fx.Node, value: Value, factor: Factor, source: fx.Node) -> Value | None:
    place = ALONG[node.target]  # type: ignore[index]
    given: list[Any] = list(node.args)
    axes = given[place] if len(given) > place else None
    axes = [axes] if isinstance(axes, int) else axes
    if not isinstance(axes, list | tuple) or len(axes) != 1 or node.kwargs:
        return None
    axis = axes[0] % len(value.dims)
    if not value.dims[axis] or value.dims[axis] not in factor.axes:
        return None
    own = factor.axes.index(value.dims[axis])
    reduces = node.target in REDUCING
    keeps = not reduces or given[place + 1 : place + 2] == [True]
    args = [source, *given[1:place], *([[own], True] if reduces else [own, *given[place + 1 : place + 2]])]
    if len(given) > place + 2:
        return None  # a type of its own
    atom = _atom(step, node, source, tuple(args), node.args[0] is source and keeps)
    dims: list[Labels] = list(value.dims)
    left = list(factor.axes)
    if reduces:
        dims[axis : axis + 1] = [()] if keeps else []
        left[own] = ()
    return Value(tuple(dims), (Term(1.0, (Factor(atom, tuple(left)),)),))


def _atom(step: Step, node: fx.Node, source: fx.Node, args: tuple[Any, ...], same: bool) -> int:
    """The atom of an operation on `source`: one that is there, `node` itself where it is the `same`, or a new one."""
    key = (node.target, source, repr(args[1:]), repr(node.kwargs))
    if key not in step.alike:
        if not same:
            with step.gm.graph.inserting_after(source):
                made = add_node(step, node.target, *args, **node.kwargs)
            made.meta = {**node.meta, "val": made.meta["val"]}
            node = made
        own = step.new_atom(node)
        step.values[node] = own
        step.alike[key] = (own.terms[0].factors[0].atom, ())
    return step.alike[key][0]

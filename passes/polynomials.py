"""Compare values in normal form, and write a polynomial back into a step's graph as operations."""

import functools
import string
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from fla_compile.passes import normal_form as nf
from fla_compile.passes.normal_form import Factor, Term, Value
from fla_compile.passes.step import Step

aten = torch.ops.aten

ROUNDING = 1e-9  # of coefficients, relative: they are products of the program's constants


def difference(step: Step, a: Value, b: Value) -> Value:
    """a - b; atoms that are contractions are opened where the two sides name them differently."""
    result = _minus(a, b)
    for atom in sorted(a.atoms ^ b.atoms, reverse=True):
        if not result.terms:
            break
        definition = step.atoms[atom].expansion
        if definition is None:
            continue
        try:
            a, b = nf.inline(step.space, a, atom, definition), nf.inline(step.space, b, atom, definition)
        except nf.NoNormalForm:
            break
        a, b = without_eyes(step, a), without_eyes(step, b)
        result = _minus(a, b)
    return result


def opened(step: Step, value: Value) -> Value:
    """The value with all atoms that are sums or contractions opened, and identity matrices multiplied out."""
    while sums := [atom for atom in value.atoms if step.atoms[atom].expansion is not None]:
        definition = step.atoms[max(sums)].expansion
        assert definition is not None
        value = nf.inline(step.space, value, max(sums), definition)
    return without_eyes(step, value)


def multiplied_out(step: Step, value: Value) -> Value:
    """The value with each matrix that acts on the state and is made of an identity matrix opened: (I - k k^T) S is
    S - k (k^T S), while what a key or a value is made of stays one atom."""
    while (found := _acting_eye(step, value)) is not None:
        definition = step.atoms[found].expansion
        assert definition is not None
        value = nf.inline(step.space, value, found, definition)
    return without_eyes(step, value) if any(step.atoms[atom].eye for atom in value.atoms) else value


def _acting_eye(step: Step, value: Value) -> int | None:
    """An atom with an identity matrix inside that is summed over together with the state."""
    kept = {label for axis in value.dims for label in axis}
    for term in value.terms:
        states = {label for f in term.factors if step.is_carry(f.atom) for label in f.labels} - kept
        for factor in term.factors:
            if step.atoms[factor.atom].has_eye and states & set(factor.labels):
                return factor.atom
    return None


def without_eyes(step: Step, value: Value) -> Value:
    """Sum over the axes of identity matrices that are summed over: sum_j I_ij x_j = x_i."""
    kept = {label for axis in value.dims for label in axis}
    terms = []
    for term in value.terms:
        while (found := _summed_eye(step, term, kept)) is not None:
            factor, gone, stays = found
            term = Term(term.coef, renamed(less(term.factors, [factor]), {gone: stays}))
        terms.append(term)
    return nf.collect(Value(value.dims, tuple(terms)))


def _summed_eye(step: Step, term: Term, kept: set[int]) -> tuple[Factor, int, int] | None:
    """An identity matrix of the term, its axis that is summed over, and the other."""
    for factor in term.factors:
        if step.atoms[factor.atom].eye and all(len(axis) == 1 for axis in factor.axes):
            i, j = factor.labels
            if i != j and not {i, j} <= kept:
                return (factor, j, i) if j not in kept else (factor, i, j)
    return None


def _minus(a: Value, b: Value) -> Value:
    left = {nf.canonical(t, a.dims): t for t in nf.collect(a).terms}
    right = {nf.canonical(t, b.dims): t for t in nf.collect(b).terms}
    terms = []
    for key in {**left, **right}:
        x, y = left.get(key), right.get(key)
        have, take = (x.coef if x else 0.0), (y.coef if y else 0.0)
        if abs(have - take) > ROUNDING * max(abs(have), abs(take)):
            terms.append(Term(have - take, (x or y).factors))  # type: ignore[union-attr]
    return Value(a.dims, tuple(terms))


def without(factors: Sequence[Factor], gone: Iterable[Factor]) -> tuple[Factor, ...] | None:
    """The factors less those in `gone`, None if one of these is missing."""
    left = list(factors)
    for factor in gone:
        if factor not in left:
            return None
        left.remove(factor)
    return tuple(left)


def less(factors: Sequence[Factor], gone: Iterable[Factor]) -> tuple[Factor, ...]:
    """The factors less those in `gone`, all of which are there."""
    left = without(factors, gone)
    assert left is not None
    return left


def renamed(factors: Iterable[Factor], names: dict[int, int]) -> tuple[Factor, ...]:
    return tuple(
        Factor(f.atom, tuple(tuple(names.get(label, label) for label in axis) for axis in f.axes)) for f in factors
    )


def same_factors(a: Iterable[Factor], b: Iterable[Factor]) -> bool:
    def key(factors: Iterable[Factor]) -> list:
        return sorted((f.atom, f.axes) for f in factors)

    return key(a) == key(b)


def materialise(step: Step, terms: Sequence[Term], labels: Sequence[int]) -> Factor:
    """Add operations to the step's graph that compute `terms` over the axes `labels`; the result as a new atom.

    A label that no term has becomes an axis of size 1, without a label. `1 - x` is written so that a proof of its sign
    finds it. Raises `NoNormalForm` for what holds the state: a new atom would hide it.
    """
    if any(step.is_carry(f.atom) for t in terms for f in t.factors):
        raise nf.NoNormalForm("a sum that holds the state is no operand")
    graph, space = step.gm.graph, step.space
    constant = sum(t.coef for t in terms if not t.factors)
    used = {label for term in terms for label in term.labels}
    with graph.inserting_before(graph.output_node()):
        parts = [(t.coef, _product(step, t, labels)) for t in terms if t.factors]
        if not parts:
            raise nf.NoNormalForm("a constant has no tensor to take its device from")
        if len(parts) == 1 and parts[0][0] == -1.0 and constant:
            total = add_node(step, aten.rsub.Scalar, parts[0][1], constant)
        else:
            scaled = [node if coef == 1.0 else add_node(step, aten.mul.Tensor, node, coef) for coef, node in parts]
            total = scaled[0]
            for node in scaled[1:]:
                total = add_node(step, aten.add.Tensor, total, node)
            if constant:
                total = add_node(step, aten.add.Tensor, total, constant)
    dims = tuple((label,) if label in used else () for label in labels)
    value = space.renamed(Value(dims, tuple(terms)))
    step.values[total] = step.new_atom(total, expansion=value)
    return Factor(len(step.atoms) - 1, dims)


def add_node(step: Step, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """An operation of the step's graph, at the insertion point, with its fake value."""
    node = step.gm.graph.call_function(target, args, kwargs)
    fakes = fx.map_arg(args, lambda n: n.meta["val"])
    mode = next(fake.fake_mode for fake in torch.utils._pytree.tree_leaves(fakes) if hasattr(fake, "fake_mode"))
    with torch._guards.tracing(None), mode, torch.no_grad():
        node.meta["val"] = target(*fakes, **kwargs)
    step.adopt(node)
    return node


def _product(step: Step, term: Term, labels: Sequence[int]) -> fx.Node:
    letter = dict(zip(sorted(term.labels), string.ascii_letters, strict=False))
    nodes, inputs = [], []
    for factor in term.factors:
        nodes.append(_by_label(step, factor))
        inputs.append("".join(letter[label] for label in factor.labels))
    dtype = functools.reduce(torch.promote_types, (node.meta["val"].dtype for node in nodes))
    if not dtype.is_floating_point:
        dtype = step.carries[0].meta["val"].dtype
    nodes = [n if n.meta["val"].dtype == dtype else add_node(step, torch.Tensor.to, n, dtype) for n in nodes]
    kept = [label for label in labels if label in term.labels]
    output = "".join(letter[label] for label in kept)
    total = nodes[0]
    if len(nodes) > 1 or inputs[0] != output:
        total = add_node(step, torch.einsum, ",".join(inputs) + "->" + output, *nodes)
    for i, label in enumerate(labels):
        if label not in kept:
            total = add_node(step, aten.unsqueeze.default, total, i)
    return total


def _by_label(step: Step, factor: Factor) -> fx.Node:
    """The factor's tensor with one axis for each of its labels."""
    node = step.atoms[factor.atom].node
    for i in reversed(range(len(factor.axes))):
        if not factor.axes[i]:
            node = add_node(step, aten.squeeze.dim, node, i)
        elif len(factor.axes[i]) > 1:
            sizes = [s if isinstance(s, int) else -1 for s in (step.space.sizes[label] for label in factor.axes[i])]
            if sizes.count(-1) > 1:
                raise nf.NoNormalForm("an axis of two unknown sizes is cut")
            node = add_node(step, torch.unflatten, node, i, sizes)
    return node

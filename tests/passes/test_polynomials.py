"""Polynomials of a step: compared term by term, and written back as operations that compute what they stand for."""

import pytest
import torch
import torch.nn.functional as F
from programs import Cases, Passes, assert_looped, assert_rewritten, assert_same, operands, over_time, read, write
from torch._higher_order_ops.scan import scan

from fla_compile.passes.lowering import extract
from fla_compile.passes.normal_form import Factor, Term, Value
from fla_compile.passes.normalise import focus, normalise
from fla_compile.passes.polynomials import difference, materialise, renamed, same_factors, without
from fla_compile.passes.scans import scan_nodes, take_apart
from fla_compile.passes.step import Step

AXES = "hkv hk hk hv h"  # the operands of one step: S, k, l, v, b


def step_of(new_state) -> Step:
    """The normalised step of `S' = new_state(S, k, l, v, b)`, with S in focus."""
    found = []

    def backend(gm, example_inputs):
        (only,) = (take_apart(gm, node) for node in scan_nodes(gm))
        found.append(normalise(only.body, len(only.init), len(only.reads)))
        return gm.forward

    def program(S, *reads):
        return scan(lambda S, x: (new_state(S, *x), x[0].clone()), S, reads)

    S, *reads = operands(AXES)
    with torch.no_grad():
        torch.compile(program, backend=backend, fullgraph=True)(S, *(torch.stack([x] * 3) for x in reads))
    (step,) = found
    focus(step, frozenset({0}), frozenset())
    return step


def computed(step: Step, factor: Factor) -> torch.Tensor:
    """The value of an atom that was written into the step."""
    given = [*step.carries, *step.reads, *step.invariants]
    part = extract(step, given, [step.atoms[factor.atom].node])
    return part(*operands(AXES))[0]


def write_terms(step: Step) -> tuple[Value, tuple[Term, ...]]:
    value = step.values[step.next_carries[0]]
    return value, tuple(t for t in value.terms if not any(step.is_carry(f.atom) for f in t.factors))


WRITES = {
    "one product": lambda k, l, v, b: k[..., None] * v[:, None],
    "a sum": lambda k, l, v, b: k[..., None] * v[:, None] - 2 * l[..., None] * v[:, None],
    "a sum with a scalar": lambda k, l, v, b: k[..., None] * v[:, None] + (b[:, None] * l)[..., None] * v[:, None],
    "three factors": lambda k, l, v, b: torch.einsum("hk,hv,h->hkv", k, v, b),
    "of itself": lambda k, l, v, b: (k * k)[..., None] * v[:, None],
    "with a contraction": lambda k, l, v, b: ((k * l).sum(-1, keepdim=True) * k)[..., None] * v[:, None],
    "merged axes": lambda k, l, v, b: (k.reshape(-1) * l.reshape(-1)).view(2, 4, 1) * v[:, None],
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=["as it is", "turned"])
def test_what_is_written_back_is_what_it_stands_for(name, order):
    step = step_of(lambda S, *x: 0.5 * S + WRITES[name](*x))
    value, terms = write_terms(step)
    labels = [label for axis in value.dims for label in axis]
    got = computed(step, materialise(step, terms, [labels[i] for i in order]))
    _, k, l, v, b = operands(AXES)
    torch.testing.assert_close(got, WRITES[name](k, l, v, b).permute(order))


def test_one_minus_is_written_so_that_its_sign_is_found():
    step = step_of(lambda S, k, l, v, b: S - torch.sigmoid(k)[..., None] * S + v[:, None])
    value = step.values[step.next_carries[0]]
    terms = [
        Term(t.coef, tuple(f for f in t.factors if not step.is_carry(f.atom)))
        for t in value.terms
        if any(step.is_carry(f.atom) for f in t.factors)
    ]
    used = {label for term in terms for label in term.labels}
    labels = [label for axis in value.dims for label in axis if label in used]
    factor = materialise(step, terms, labels)
    assert step.atoms[factor.atom].node.target is torch.ops.aten.rsub.Scalar
    torch.testing.assert_close(computed(step, factor), 1 - torch.sigmoid(operands(AXES)[1]))


def test_a_label_without_a_term_is_an_axis_of_size_one():
    step = step_of(lambda S, k, l, v, b: S + (b[:, None] * k)[..., None] * v[:, None])
    value, (term,) = write_terms(step)
    labels = [label for axis in value.dims for label in axis]
    only_b = Term(3.0, tuple(f for f in term.factors if len(f.labels) == 1))
    factor = materialise(step, [only_b], labels[:2])
    assert factor.axes[1] == () and computed(step, factor).shape == (2, 1)
    torch.testing.assert_close(computed(step, factor)[:, 0], 3 * operands(AXES)[4])


def test_differences():
    step = step_of(lambda S, k, l, v, b: 2 * S + k[..., None] * v[:, None] - l[..., None] * v[:, None])
    value, terms = write_terms(step)
    assert difference(step, value, value).terms == ()
    rest = difference(step, value, Value(value.dims, terms))
    assert len(rest.terms) == 1 and rest.terms[0].coef == 2.0
    assert all(step.is_carry(f.atom) for f in rest.terms[0].factors)
    negative = difference(step, Value(value.dims, terms), value)
    assert [t.coef for t in negative.terms] == [-2.0]
    almost = Value(value.dims, tuple(Term(t.coef * (1 + 1e-6), t.factors) for t in value.terms))
    assert len(difference(step, value, almost).terms) == len(value.terms)


def test_a_difference_opens_contractions():
    """(k . l) as an atom, against the same written out."""
    step = step_of(lambda S, k, l, v, b: S + ((k * l).sum(-1)[:, None] * k)[..., None] * v[:, None])
    value, (term,) = write_terms(step)
    (contraction,) = [f for f in term.factors if step.atoms[f.atom].expansion is not None]
    definition = step.space.renamed(step.atoms[contraction.atom].expansion)
    names = dict(zip((x for axis in definition.dims for x in axis), contraction.labels, strict=True))
    others = without(term.factors, [contraction])
    opened = Term(term.coef, (*others, *renamed(definition.terms[0].factors, names)))
    assert difference(step, Value(value.dims, (term,)), Value(value.dims, (opened,))).terms == ()


def test_factors_as_sets():
    a, b, c = Factor(0, ((0,), (1,))), Factor(1, ((1,),)), Factor(1, ((2,),))
    assert without([a, b, b], [b]) == (a, b)
    assert without([a, b], [c]) is None and without([a], []) == (a,)
    assert same_factors([a, b], [b, a]) and not same_factors([a, b], [a, c]) and not same_factors([a], [a, a])
    assert renamed([a, b], {1: 2}) == (Factor(0, ((0,), (2,))), c)


# (I - beta k k^T) S: the matrix is multiplied out, and what k, v and q are made of stays as it is.

CASES = Cases()


def eye(x: torch.Tensor) -> torch.Tensor:
    return torch.eye(x.shape[-1], dtype=x.dtype)


@CASES.cell("delta_rule", "bhkv bthk bthk bthv bth kk vv kk")
def projected_operands(S, q, k, v, beta, Wk, Wv, Wq):
    k, v, q = k @ Wk, v @ Wv, F.linear(q, Wq)
    bk = k * beta[..., None]
    S = (eye(k) - write(bk, k)) @ S + write(bk, v)
    return read(q, S), S


@CASES.cell("kda", "bhvk bthk bthk bthv bth bthk")
def keys_of_two_terms(S, q, k, v, beta, g):
    k = F.elu(k) + 1
    bk = k * beta.sigmoid()[..., None]
    S = g.sigmoid()[..., None, :] * S
    S = S @ (eye(k) - torch.einsum("bhk,bhj->bhkj", bk, k)) + torch.einsum("bhv,bhk->bhvk", v, bk)
    return (S @ q[..., None])[..., 0], S


@CASES("gated_delta_rule", "tk tk tv t t kk")
def a_projected_query_without_batch(q, k, v, beta, g, Wq):
    S, outs = q.new_zeros(q.shape[1], v.shape[1]), []
    for t in range(q.shape[0]):
        S = (eye(k) - beta[t] * torch.outer(k[t], k[t])) @ (g[t].sigmoid() * S) + torch.outer(beta[t] * k[t], v[t])
        outs.append(F.linear(q[t], Wq) @ S)
    return torch.stack(outs), S


@CASES.cell("dplr", "bhkv bthk bthk bthv bthk bthk bthk kk")
def a_diagonal_and_a_matrix(S, q, k, v, g, b, c, Wk):
    S = (torch.diag_embed(g.sigmoid()) + write(b, c)) @ S + write(k @ Wk, v)
    return read(q, S), S


@CASES.cell("kda", "bhkv bthk bthk bthv bth bthk vv")
def a_product_of_matrices(S, q, k, v, beta, g, Wv):
    erase = eye(k) - beta[..., None, None] * write(k, k)
    S = (erase @ torch.diag_embed(g.sigmoid())) @ S + write(beta[..., None] * k, v @ Wv)
    return read(q, S), S


@pytest.mark.parametrize("fn, families, axes, sizes", CASES)
def test_matrices_made_of_an_identity(fn, families, axes, sizes):
    assert_rewritten(fn, [x * 0.5 for x in operands(axes, **sizes)], families)


def an_identity_less_any_matrix(S, q, k, v, W):
    S = (eye(k) - W) @ S + write(k, v)  # here
    return (q[..., None, :] @ S).squeeze(-2), S


def an_identity_as_a_mask(S, q, k, v):
    S = (eye(k) - write(q, k)) * S + write(k, v)
    return read(q, S), S


def test_other_uses_of_an_identity():
    axes = "bhkv bthk bthk bthv kk"
    args = [x * 0.5 for x in operands(axes)]
    assert_looped(over_time(an_identity_less_any_matrix, axes), args, "unknown_recurrence", "whole matrix")
    axes = "bhkk bthk bthk bthk"
    fn, backend = over_time(an_identity_as_a_mask, axes), Passes()
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), operands(axes))
    assert [r.family for r in backend.report.rewrites] == ["linear_scan"]

"""Divergence and cross entropy of one student on the CPU: every loss and gradient against the definition."""

from dataclasses import replace

import pytest
import torch
from budget import check_budget
from linear_kl_cases import CASES, KINDS, Case, make_operands, options

from fla_compile.kernels import kl_div_rows, linear_loss_chunks
from fla_compile.kernels.linear_distillation_ops import (
    linear_distillation_backward,
    linear_distillation_forward,
    linear_distillation_rows,
)
from fla_compile.kernels.linear_kl_div import linear_kl_div, naive_linear_kl_div
from fla_compile.kernels.linear_loss_chunks import Plan

NAMES = ("kl_div", "cross_entropy", "dx", "dweight", "dbias")
SUITED = [case for case in CASES if case.options.get("reduction", "none") == "none" and not case.name.startswith("mix")]


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of a few rows, so that every test has several and a shorter last one; rows two by two in them."""

    def plan(N, D, V, dtype, processors, *, need_dw):
        return Plan(10, torch.float64 if dtype == torch.float64 else torch.float32)

    monkeypatch.setattr(linear_loss_chunks, "plan_chunks", plan)
    monkeypatch.setitem(kl_div_rows.AT_A_TIME, "cpu", 200)


def labels_of(case, ignore_index=-100):
    generator = torch.Generator().manual_seed(case.N + case.V)
    found = torch.randint(0, case.V, (case.N,), generator=generator)
    return found.masked_fill(torch.rand(case.N, generator=generator) < 0.3, ignore_index)


def by_rows(fn, case, given, labels, dtype):
    """Both losses of every row, and the gradients of a fixed mixture."""
    leaves = [None if y is None else y.to(dtype).requires_grad_() for y in given.student]
    theirs = [None if y is None else y.to(dtype) for y in given.teacher]
    soft, hard = fn(
        *leaves[:2], *theirs[:2], bias=leaves[2], teacher_bias=theirs[2], target=given.target, labels=labels,
        row_weight=None if given.row_weight is None else given.row_weight.to(soft_dtype(dtype)),
        **case.options | {"reduction": "none"},
    )  # fmt: skip
    ends = (-1.0, 2.0), (0.5, -0.7)
    factors = [torch.linspace(*pair, case.N, dtype=soft.dtype, device=soft.device) for pair in ends]
    grads = torch.autograd.grad((soft, hard), [y for y in leaves if y is not None], factors)
    return dict(zip(NAMES, (soft.detach(), hard.detach(), *grads), strict=False))


def soft_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def summed(case, given, labels, dtype, *, defined):
    """The weighted sum of both, in which each has a factor; by the operator or by its definition."""
    leaves = [None if y is None else y.to(dtype).requires_grad_() for y in given.student]
    theirs = [None if y is None else y.to(dtype) for y in given.teacher]
    own = dict(dtype=soft_dtype(dtype), device=labels.device)
    weights = [torch.linspace(*ends, case.N, **own) for ends in ((0.1, 2.0), (1.0, -0.3))]
    factors = torch.tensor(0.7, **own), torch.tensor(-0.2, **own)
    T = case.options.get("temperature", 1.0)
    kind, beta = case.options["divergence"], case.options.get("beta", 0.5)
    if defined:
        both = naive_linear_kl_div(
            *leaves[:2], *theirs[:2], bias=leaves[2], teacher_bias=theirs[2], labels=labels, temperature=T,
            divergence=kind, beta=beta, reduction="none",
        )  # fmt: skip
        loss = sum(f * (w * y).sum() for f, w, y in zip(factors, weights, both, strict=True))
    else:
        needs = [y is not None for y in leaves]
        numbers = 1.0 / T, 1.0 / T, kind, beta, -100, 0.0, 1.0, 0.0
        loss = linear_distillation_forward(*leaves, *theirs, None, labels, *weights, *factors, *numbers, *needs)[0]
    grads = torch.autograd.grad(3.0 * loss, [y for y in leaves if y is not None])
    return dict(zip(NAMES[1:], (loss.detach(), *grads), strict=False))


def check(got, truth, eager, dtype):
    assert got.keys() == truth.keys()
    for name, y in got.items():
        if dtype == torch.float64:  # eager is the truth itself
            assert (y - truth[name]).norm() <= 1e-12 * truth[name].norm(), name
        else:
            check_budget(name, y, truth[name], eager[name].to(y.dtype), "backward" if name[0] == "d" else "forward")


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SUITED, ids=str)
def test_rows(case, dtype, small_chunks, monkeypatch):
    given, labels = make_operands(case, dtype), labels_of(case)
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **kw: empty(self, *a, **kw).fill_(torch.nan))
    got = by_rows(linear_kl_div, case, given, labels, dtype)
    monkeypatch.undo()
    truth, eager = (by_rows(naive_linear_kl_div, case, given, labels, d) for d in (torch.float64, dtype))
    check(got, truth, eager, dtype)


def check_sums(case, dtype, device="cpu"):
    given, labels = make_operands(case, dtype, device), labels_of(case).to(device)
    truth, eager = (summed(case, given, labels, d, defined=True) for d in (torch.float64, dtype))
    got = summed(case, given, labels, dtype, defined=False)
    if dtype != torch.float64:  # a sum of rows may be right by chance in eager: `test_rows` holds them to their budget
        loss, exact = got.pop("cross_entropy"), truth.pop("cross_entropy")
        assert (loss - exact).abs() <= {torch.float32: 1e-5}.get(dtype, 3e-2) * exact.abs()
    check(got, truth, eager, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sums(kind, dtype, small_chunks):
    check_sums(Case(kind, bias=True, options=options(divergence=kind, temperature=2.0, beta=0.3)), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gpu(kind, dtype):
    """Both operators, twice for determinism."""
    case = Case(
        kind, N=130, D=72, E=64, V=50257, bias=True, dropped=0.3, options=options(divergence=kind, temperature=2.0)
    )
    given, labels = make_operands(case, dtype, "cuda"), labels_of(case).cuda()
    got, again = (by_rows(linear_kl_div, case, given, labels, dtype) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got.values(), again.values(), strict=True))
    truth, eager = (by_rows(naive_linear_kl_div, case, given, labels, d) for d in (torch.float64, dtype))
    check(got, truth, eager, dtype)
    check_sums(case, dtype, "cuda")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "batchmean"])
def test_reductions(reduction):
    """That of the divergence is what it is without labels; the cross entropies stay the rows' own."""
    case = Case("reduced", dropped=0.3, weighted=True)
    given, labels = make_operands(case, torch.float64), labels_of(case)
    how = dict(target=given.target, row_weight=given.row_weight.double(), reduction=reduction)
    operands = *given.student[:2], *given.teacher[:2]
    soft, hard = linear_kl_div(*operands, labels=labels, **how)
    torch.testing.assert_close(soft, linear_kl_div(*operands, **how))
    wanted = torch.nn.functional.cross_entropy(operands[0] @ operands[1].T, labels, reduction="none")
    torch.testing.assert_close(hard, wanted)


def test_shapes_and_index():
    x, weight, theirs, matrix = torch.randn(2, 5, 4), torch.randn(7, 4), torch.randn(2, 5, 3), torch.randn(7, 3)
    labels = torch.arange(10).reshape(2, 5) % 7
    soft, hard = linear_kl_div(x, weight, theirs, matrix, labels=labels, ignore_index=3, reduction="none")
    want = naive_linear_kl_div(x, weight, theirs, matrix, labels=labels, ignore_index=3, reduction="none")
    torch.testing.assert_close((soft, hard), want)
    assert soft.shape == hard.shape == (2, 5) and (hard == 0).eq(labels == 3).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_taken_out_may_hold_anything(kind):
    """By one loss or by both: what is infinite then does not reach the other, nor a gradient."""
    x, theirs = torch.randn(4, 3), torch.randn(4, 6)
    theirs[1], x[2], theirs[2] = torch.nan, torch.inf, torch.nan
    x.requires_grad_()
    target, labels = torch.tensor([0, -100, -100, 0]), torch.tensor([1, 2, -100, -100])
    how = dict(target=target, labels=labels, divergence=kind, reduction="sum")
    soft, hard = linear_kl_div(x, torch.randn(6, 3), theirs, torch.randn(6, 6), **how)
    dx = torch.autograd.grad(soft + hard.sum(), x)[0]
    assert soft.isfinite() and hard.isfinite().all() and hard.eq(0).tolist() == [False, False, True, True]
    assert dx.isfinite().all() and dx.eq(0).all(1).tolist() == [False, False, True, False]


def test_one_loss_alone():
    """Without a gradient for one of them the other's is what it is by itself; without any there is none."""
    given = make_operands(Case("alone"), torch.float64)
    x, labels = given.student[0].requires_grad_(), labels_of(Case("alone"))
    soft, hard = linear_kl_div(x, given.student[1], *given.teacher[:2], labels=labels)
    want = naive_linear_kl_div(x, given.student[1], *given.teacher[:2], labels=labels)
    for a, b in zip((soft, hard.sum()), (want[0], want[1].sum()), strict=True):
        got, true = (torch.autograd.grad(y, x, retain_graph=True)[0] for y in (a, b))
        torch.testing.assert_close(got, true)
    with torch.no_grad():
        assert not any(y.requires_grad for y in linear_kl_div(x, given.student[1], *given.teacher[:2], labels=labels))


def test_no_rows():
    x, weight = torch.randn(0, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    teacher, labels = (torch.randn(0, 2), torch.randn(6, 2)), torch.zeros(0, dtype=torch.long)
    soft, hard = linear_kl_div(x, weight, *teacher, labels=labels, reduction="sum")
    assert soft == 0 and hard.shape == (0,) and torch.autograd.grad(soft + hard.sum(), weight)[0].eq(0).all()
    one, none = torch.tensor(1.0), torch.tensor(torch.inf)  # the factor of a mean of no rows
    numbers = 1.0, 1.0, "forward_kl", 0.5, -100, 0.0, 1.0, 0.0
    operands = x, weight, None, *teacher, None, None, labels, None, None, none, one
    assert linear_distillation_forward(*operands, *numbers, True, True, False)[0].isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_scale_reaches_float16(kind):
    """Gradients of 2^-26, lost in float16, are there when the loss is scaled as by a GradScaler."""
    case = Case("scaled", N=512, D=8, E=8, V=16, spread=0.5)
    given, labels, scale = make_operands(case, torch.float16), labels_of(case), 2.0**16
    x, weight, *teacher = given.student[0].requires_grad_(), given.student[1] / 512, *given.teacher[:2]
    numbers = 1.0, 1.0, kind, 0.5, -100, 0.0, 1.0, 0.0
    mean = torch.tensor(1.0 / case.N)
    weighed = x, weight, None, *teacher, None, None, labels, None, None, mean, mean
    dx = torch.autograd.grad(linear_distillation_forward(*weighed, *numbers, True, False, False)[0] * scale, x)[0]
    x64 = x.detach().double().requires_grad_()
    soft, hard = naive_linear_kl_div(
        x64, weight.double(), *(y.double() for y in teacher), labels=labels, divergence=kind
    )
    truth = torch.autograd.grad((soft + hard.sum() / case.N) * scale, x64)[0]
    assert ((dx.double() - truth).norm() / truth.norm()) < 4e-3


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.zeros(3, dtype=torch.long), ValueError, r"labels must be \[2\] as x is \[2, 4\]"),
        (torch.zeros(2), ValueError, "labels must hold integers"),
        (torch.tensor([0, 5]), IndexError, "Target 5 is out of bounds"),
    ],
    ids=["shape", "dtype", "range"],
)
def test_bad_labels(labels, error, message):
    with pytest.raises(error, match=message):
        linear_kl_div(torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2, 3), torch.zeros(5, 3), labels=labels)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float16], ids=str)
def test_opcheck(dtype):
    case = Case("opcheck", N=9, bias=True, weighted=True, dropped=0.3)
    given, labels = make_operands(case, dtype), labels_of(case)
    leaves, keep = [y.requires_grad_() for y in given.student], given.target != -100
    own = *leaves, *given.teacher, keep, labels
    numbers = 0.5, 0.7, "jensen_shannon", 0.3, -100, 0.1, 1.0, 0.01
    factors = torch.tensor(0.3), torch.tensor(2.0)
    torch.library.opcheck(linear_distillation_rows, (*own, *numbers))
    torch.library.opcheck(
        linear_distillation_forward, (*own, given.row_weight, None, *factors, *numbers, True, True, True)
    )
    detached = [y.detach() for y in leaves]
    rows = torch.stack([given.row_weight, given.row_weight.flip(0)], 1)
    torch.library.opcheck(
        linear_distillation_backward, (*detached, *given.teacher, keep, labels, rows, *numbers, True, False, True)
    )


def test_autocast_is_kept_out():
    case = Case("autocast")
    given, labels = make_operands(case, torch.float32), labels_of(case)
    operands = *given.student[:2], *given.teacher[:2]
    alone = linear_kl_div(*operands, labels=labels)
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_kl_div(*operands, labels=labels)
    assert all(torch.equal(a, b) for a, b in zip(alone, inside, strict=True))


def test_smoothing_and_another_scale():
    """What the operator has beyond the function: smoothed labels, a z-loss, logits of the labels at a scale."""
    case = Case("smoothed", bias=True)
    given, labels = make_operands(replace(case), torch.float64), labels_of(case)
    x, weight, bias = (y.requires_grad_() for y in given.student)
    numbers = 0.5, 0.5, "reverse_kl", 0.5, -100, 0.1, 1.3, 0.02
    soft, hard = linear_distillation_rows(x, weight, bias, *given.teacher, None, labels, *numbers)
    z = 1.3 * torch.nn.functional.linear(x, weight, bias)
    want = torch.nn.functional.cross_entropy(z, labels, label_smoothing=0.1, reduction="none")
    want = want + 0.02 * torch.where(labels != -100, z.logsumexp(-1) ** 2, 0.0)
    alone = naive_linear_kl_div(
        x, weight, *given.teacher[:2], bias=bias, teacher_bias=given.teacher[2], temperature=2.0,
        divergence="reverse_kl", reduction="none",
    )  # fmt: skip
    torch.testing.assert_close((soft, hard), (alone, want))
    grads = [torch.autograd.grad((a + 3 * b).sum(), (x, weight, bias)) for a, b in ((soft, hard), (alone, want))]
    torch.testing.assert_close(*grads)

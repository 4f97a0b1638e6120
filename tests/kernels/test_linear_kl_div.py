"""Distillation losses on the CPU: every loss and gradient against the definition, and what happens at the edges."""

import pytest
import torch
import torch.nn.functional as F
from linear_kl_cases import CASES, KINDS, Case, check_results, make_operands, options, results
from torch._dynamo.testing import CompileCounterWithBackend

from fla_compile.kernels import kl_div_rows, linear_loss_chunks
from fla_compile.kernels.linear_kl_div import kernel_name, linear_kl_div, naive_linear_kl_div, supports
from fla_compile.kernels.linear_kl_div_ops import linear_kl_div_backward, linear_kl_div_forward
from fla_compile.kernels.linear_loss_chunks import Plan


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of a few rows, so that every test has several and a shorter last one; rows two by two in them."""

    def plan(N, D, V, dtype, processors, *, need_dw):
        return Plan(10, torch.float64 if dtype == torch.float64 else torch.float32)

    monkeypatch.setattr(linear_loss_chunks, "plan_chunks", plan)
    monkeypatch.setitem(kl_div_rows.AT_A_TIME, "cpu", 200)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_naive(case, dtype, small_chunks, monkeypatch):
    given = make_operands(case, dtype)
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **kw: empty(self, *a, **kw).fill_(torch.nan))
    got = results(linear_kl_div, case, given, dtype)
    monkeypatch.undo()
    check_results(case, given, got, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_as_torch_spells_it(kind):
    """The factor T^2 is the caller's, and batchmean is over the first axis."""
    x, weight = torch.randn(2, 5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    theirs, matrix, T = torch.randn(2, 5, 3), torch.randn(7, 3), 2.0
    logp, logq = F.log_softmax(x @ weight.T / T, -1), F.log_softmax(theirs @ matrix.T / T, -1)
    logm = torch.log((logp.exp() + logq.exp()) / 2)
    spelled = {
        "forward_kl": lambda: F.kl_div(logp, logq.exp(), reduction="batchmean"),
        "reverse_kl": lambda: F.kl_div(logq, logp, reduction="batchmean", log_target=True),
        "jensen_shannon": lambda: sum(F.kl_div(logm, y.exp(), reduction="batchmean") for y in (logp, logq)) / 2,
        "cross_entropy": lambda: -(logq.exp() * logp).sum() / 2,
    }
    got = linear_kl_div(x, weight, theirs, matrix, temperature=T, divergence=kind)
    found = []
    for loss in (got * T**2, spelled[kind]() * T**2):
        found.append((loss, *torch.autograd.grad(loss, (x, weight))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_one_chunk_and_many_agree(kind):
    case = Case("whole", N=300, options=options(divergence=kind))
    given = make_operands(case, torch.float64)
    whole = results(linear_kl_div, case, given, torch.float64)
    again = results(linear_kl_div, case, given, torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(whole.values(), again.values(), strict=True))
    check_results(case, given, whole, torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "batchmean"])
def test_all_rows_taken_out(reduction, kind):
    """A mean over no rows is NaN; gradients are zero, whatever the rows hold."""
    x, weight = torch.full((5, 4), torch.inf, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    target = torch.full((5,), -100)
    loss = linear_kl_div(
        x, weight, torch.randn(5, 3), torch.randn(7, 3), target=target, divergence=kind, reduction=reduction
    )
    assert loss.isnan() if reduction == "mean" else loss.eq(0).all()
    dx, _ = torch.autograd.grad(loss.sum(), (x, weight))
    assert dx.eq(0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_taken_out_may_hold_anything(kind):
    x, theirs = torch.randn(4, 3), torch.randn(4, 6)
    x[2], theirs[2] = torch.inf, torch.nan
    x.requires_grad_()
    target = torch.tensor([0, 1, -100, 2])
    loss = linear_kl_div(x, torch.randn(6, 3), theirs, torch.randn(6, 6), target=target, divergence=kind)
    dx = torch.autograd.grad(loss, x)[0]
    assert loss.isfinite() and dx[2].eq(0).all() and dx[:2].ne(0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_hidden(kind):
    """A row of NaN, or of infinite logits, gives NaN."""
    x = torch.randn(4, 3)
    x[2] = torch.nan
    loss = linear_kl_div(x, torch.randn(6, 3), torch.randn(4, 6), torch.randn(6, 6), divergence=kind, reduction="none")
    assert loss.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_classes_taken_out(kind):
    """A class of probability zero on both sides, by a bias of -inf, counts for nothing: 0 log 0 = 0."""
    x, weight, theirs, matrix = torch.randn(6, 4), torch.randn(5, 4), torch.randn(6, 3), torch.randn(5, 3)
    x.requires_grad_()
    gone = torch.tensor([0.0, 0.0, 0.0, -torch.inf, 0.0])
    keep = gone == 0.0
    found = []
    for loss in (
        linear_kl_div(x, weight, theirs, matrix, bias=gone, teacher_bias=gone, divergence=kind),
        naive_linear_kl_div(x, weight[keep], theirs, matrix[keep], divergence=kind),
    ):
        found.append((loss, torch.autograd.grad(loss, x)[0]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_only_one_side_without_a_class():
    """KL(q, p) is infinite where the student has no such class, the Jensen-Shannon divergence at most log 2."""
    x, weight, theirs, matrix = torch.randn(6, 4), torch.randn(5, 4), torch.randn(6, 3), torch.randn(5, 3)
    gone = torch.tensor([0.0, 0.0, 0.0, -torch.inf, 0.0])
    how = dict(bias=gone, reduction="none")
    assert linear_kl_div(x, weight, theirs, matrix, **how).isinf().all()
    found = linear_kl_div(x, weight, theirs, matrix, divergence="jensen_shannon", **how)
    assert found.isfinite().all() and (found < 0.6932).all()
    assert linear_kl_div(x, weight, theirs, matrix, divergence="reverse_kl", **how).isfinite().all()


@pytest.mark.parametrize("kind", KINDS[:3])
def test_equal_sides(kind):
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(50, 4)
    loss = linear_kl_div(x, weight, x.detach(), weight, divergence=kind)
    assert loss.abs() < 1e-6 and torch.autograd.grad(loss, x)[0].abs().max() < 1e-6


def test_no_rows():
    x, weight = torch.randn(0, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    loss = linear_kl_div(x, weight, torch.randn(0, 2), torch.randn(6, 2), reduction="sum")
    dx, dw = torch.autograd.grad(loss, (x, weight))
    assert loss.eq(0) and dx.shape == (0, 3) and dw.eq(0).all()


def test_sides_of_two_dtypes():
    case = Case("two", options=options(divergence="jensen_shannon"))
    given = make_operands(case, torch.float32)
    theirs = [y.bfloat16() for y in given.teacher[:2]]
    for wide in (False, True):
        x, weight = (y.double() if wide else y for y in given.student[:2])
        rounded = (theirs[0] @ theirs[1].T).to(x.dtype)  # a teacher whose logits are its products in bfloat16
        eye = torch.eye(case.V, dtype=x.dtype)
        got = linear_kl_div(x, weight, *theirs, **case.options)
        torch.testing.assert_close(got, naive_linear_kl_div(x, weight, rounded, eye, **case.options))


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_frozen_operand(frozen, reduction):
    given = make_operands(Case("frozen", bias=True), torch.float64)
    leaves = {n: y.requires_grad_(n != frozen) for n, y in zip(("x", "weight", "bias"), given.student, strict=True)}
    found = []
    for fn in (linear_kl_div, naive_linear_kl_div):
        loss = fn(leaves["x"], leaves["weight"], *given.teacher[:2], bias=leaves["bias"], reduction=reduction)
        found.append(torch.autograd.grad(loss.sum(), [y for y in leaves.values() if y.requires_grad]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_used_twice_and_backward_twice():
    given = make_operands(Case("twice"), torch.float64)
    x = given.student[0].requires_grad_()
    loss = linear_kl_div(x, given.student[1], *given.teacher[:2])
    first = torch.autograd.grad(3 * loss, x, retain_graph=True)[0]
    kept = first.clone()
    first.zero_()
    again = torch.autograd.grad(3 * loss, x, retain_graph=True)[0]
    torch.testing.assert_close(again, kept)
    torch.testing.assert_close(torch.autograd.grad(loss + 2 * loss, x)[0], kept)


def test_not_twice_differentiable():
    given = make_operands(Case("double"), torch.float64)
    x = given.student[0].requires_grad_()
    loss = linear_kl_div(x, given.student[1], *given.teacher[:2])
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_scale_reaches_float16(kind):
    """Gradients of 2^-26, lost in float16, are there when the loss is scaled as by a GradScaler."""
    N, D, V = 512, 8, 16
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).half()  # noqa: E731
    x, weight = draw(N, D).requires_grad_(), 0.001 * draw(V, D)
    theirs, matrix, scale = draw(N, D), draw(V, D) / 4, 2.0**16
    dx = torch.autograd.grad(linear_kl_div(x, weight, theirs, matrix, divergence=kind) * scale, x)[0]
    x64 = x.detach().double().requires_grad_()
    loss = naive_linear_kl_div(x64, weight.double(), theirs.double(), matrix.double(), divergence=kind)
    truth = torch.autograd.grad(loss * scale, x64)[0]
    assert ((dx.double() - truth).norm() / truth.norm()) < 4e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(5, 3)}, r"^weight must be \[V, 4\]"),
        ({"teacher_weight": torch.zeros(5, 4)}, r"teacher_weight must be \[V, 3\]"),
        ({"teacher_weight": torch.zeros(6, 3)}, "the 5 classes of weight, got 6"),
        ({"teacher_x": torch.zeros(3, 3)}, r"rows \[2\] of x"),
        ({"target": torch.zeros(3, dtype=torch.long)}, r"target must be \[2\]"),
        ({"target": torch.zeros(2)}, "target must hold integers"),
        ({"bias": torch.zeros(4)}, r"^bias must be \[5\]"),
        ({"teacher_bias": torch.zeros(4)}, r"teacher_bias must be \[5\]"),
        ({"weight": torch.zeros(5, 4).double()}, "weight has dtype"),
        ({"row_weight": torch.zeros(3)}, r"row_weight must be \[2\]"),
        ({"row_weight": torch.zeros(2).requires_grad_()}, "must not require a gradient"),
        ({"teacher_x": torch.zeros(2, 3, requires_grad=True)}, "teacher_x requires a gradient"),
        ({"reduction": "max"}, "reduction must be one of"),
        ({"divergence": "kl"}, "divergence must be one of"),
        ({"beta": 1.0}, "beta must be"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, "takes float16"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_bad_input(change, message):
    shapes = {"x": (2, 4), "weight": (5, 4), "teacher_x": (2, 3), "teacher_weight": (5, 3)}
    with pytest.raises(ValueError, match=message):
        linear_kl_div(**{name: torch.zeros(shape) for name, shape in shapes.items()} | change)


def test_supports():
    assert supports("cpu", torch.bfloat16, torch.float32) is None
    assert "mps" in supports("mps", torch.float32, torch.float32)
    assert "int64" in supports("cuda", torch.float32, torch.int64)


def test_the_name_of_the_kernel():
    own, wide = (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float64)
    assert kernel_name("cuda", *own) == "chunks of rows (matrix products, Triton)"
    assert kernel_name("cpu", *own) == kernel_name("cuda", *wide) == "chunks of rows (matrix products, torch)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction, dtype):
    given = make_operands(Case("opcheck", N=9, bias=True, weighted=True, dropped=0.3), dtype)
    leaves = [y.requires_grad_() for y in given.student]
    keep, numbers = given.target != -100, (0.5, 0.7, "jensen_shannon", 0.3)
    own = *leaves, *given.teacher, keep, given.row_weight, *numbers, reduction, True, True, True
    torch.library.opcheck(linear_kl_div_forward, own)
    detached = [y.detach() for y in leaves]
    torch.library.opcheck(
        linear_kl_div_backward, (*detached, *given.teacher, keep, given.row_weight, *numbers, True, False, True)
    )


def test_compiles_once():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *a: linear_kl_div(*a), backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for N in (5, 9, 12):
        x, weight = torch.randn(N, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
        teacher = torch.randn(N, 3), torch.randn(7, 3)
        found = []
        for fn in (compiled, naive_linear_kl_div):
            loss = fn(x, weight, *teacher)
            found.append((loss, *torch.autograd.grad(2 * loss, (x, weight))))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1]


def test_autocast_is_kept_out():
    given = make_operands(Case("autocast"), torch.float32)
    operands = *given.student[:2], *given.teacher[:2]
    alone = linear_kl_div(*operands)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_kl_div(*operands), alone)

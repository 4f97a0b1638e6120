"""Linear cross entropy on the CPU: every loss and gradient against the definition, and what torch does at the edges."""

import pytest
import torch
import torch.nn.functional as F
from linear_loss_cases import CASES, Case, check_results, make_operands, results
from torch._dynamo.testing import CompileCounterWithBackend

from fla_compile.kernels import linear_loss_chunks
from fla_compile.kernels.linear_cross_entropy import linear_cross_entropy, naive_linear_cross_entropy, supports
from fla_compile.kernels.linear_cross_entropy_ops import linear_cross_entropy_backward, linear_cross_entropy_forward
from fla_compile.kernels.linear_loss_chunks import Plan, plan_chunks

GIB = 1 << 30


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of a few rows, so that every test has several and a shorter last one."""

    def plan(N, D, V, dtype, processors, *, need_dw):
        return Plan(10, torch.float64 if dtype == torch.float64 else torch.float32)

    monkeypatch.setattr(linear_loss_chunks, "plan_chunks", plan)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_naive(case, dtype, small_chunks, monkeypatch):
    given = make_operands(case, dtype)
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **kw: empty(self, *a, **kw).fill_(torch.nan))
    got = results(linear_cross_entropy, case, given, dtype)
    monkeypatch.undo()
    check_results(case, given, got, dtype)


def test_one_chunk_and_many_agree():
    case = Case("whole", N=300)
    given = make_operands(case, torch.float64)
    whole = results(linear_cross_entropy, case, given, torch.float64)
    again = results(linear_cross_entropy, case, given, torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(whole.values(), again.values(), strict=True))
    check_results(case, given, whole, torch.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored_as_torch(reduction, smoothing):
    """A mean over no targets is NaN; its gradient is zero."""
    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    target = torch.full((5,), -100)
    found = []
    for ours in (True, False):
        how = dict(reduction=reduction, label_smoothing=smoothing)
        loss = linear_cross_entropy(x, weight, target, **how) if ours else F.cross_entropy(x @ weight.T, target, **how)
        found.append((loss, *torch.autograd.grad(loss.sum(), (x, weight))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert bool(found[0][0].isnan().any()) == (reduction == "mean")


def test_ignored_rows_may_hold_anything():
    x = torch.randn(4, 3)
    x[2] = torch.inf
    x.requires_grad_()
    weight, target = torch.randn(6, 3, requires_grad=True), torch.tensor([0, 1, -100, 2])
    loss = linear_cross_entropy(x, weight, target)
    dx = torch.autograd.grad(loss, x)[0]
    assert loss.isfinite() and dx[2].eq(0).all() and dx[:2].ne(0).any()


def test_no_rows():
    x, weight = torch.randn(0, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    target = torch.zeros(0, dtype=torch.long)
    assert linear_cross_entropy(x, weight, target).isnan()
    dx, dw = torch.autograd.grad(linear_cross_entropy(x, weight, target, reduction="sum"), (x, weight))
    assert dx.shape == (0, 3) and dw.eq(0).all()


def test_targets_out_of_range():
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    for bad in (5, -1):
        with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
            linear_cross_entropy(x, weight, torch.tensor([0, bad, 1]))


def test_masked_classes():
    """A bias of -inf takes a class out, as in eager."""
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    bias = torch.tensor([0.0, -torch.inf, 0.0, 0.0, 0.0])
    target = torch.tensor([0, 2, 3, 4, 0, 2])
    found = []
    for loss in (linear_cross_entropy(x, weight, target, bias=bias), F.cross_entropy(x @ weight.T + bias, target)):
        found.append((loss, *torch.autograd.grad(loss, (x, weight))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_a_frozen_operand(frozen):
    case = Case("frozen", bias=True)
    given = make_operands(case, torch.float64)
    leaves = {n: getattr(given, n).requires_grad_(n != frozen) for n in ("x", "weight", "bias")}
    found = []
    for fn in (linear_cross_entropy, naive_linear_cross_entropy):
        loss = fn(leaves["x"], leaves["weight"], given.target, bias=leaves["bias"])
        found.append(torch.autograd.grad(loss, [y for y in leaves.values() if y.requires_grad]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_used_twice_and_backward_twice():
    """Two uses of a loss add up; a kept graph gives the same gradient again, whatever was done to the first."""
    given = make_operands(Case("twice"), torch.float64)
    x = given.x.requires_grad_()
    loss = linear_cross_entropy(x, given.weight, given.target)
    first = torch.autograd.grad(3 * loss, x, retain_graph=True)[0]
    kept = first.clone()
    first.zero_()
    again = torch.autograd.grad(3 * loss, x, retain_graph=True)[0]
    torch.testing.assert_close(again, kept)
    torch.testing.assert_close(torch.autograd.grad(loss + 2 * loss, x)[0], kept)


def test_not_twice_differentiable():
    given = make_operands(Case("double"), torch.float64)
    x = given.x.requires_grad_()
    loss = linear_cross_entropy(x, given.weight, given.target)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_a_loss_scale_reaches_float16():
    """Gradients of 2^-26, lost in float16, are there when the loss is scaled as by a GradScaler."""
    N, D, V = 512, 8, 16
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator).half().requires_grad_()
    weight = (0.001 * torch.randn(V, D, generator=generator)).half().requires_grad_()
    target = torch.randint(0, V, (N,), generator=generator)
    scale = 2.0**16
    dx = torch.autograd.grad(linear_cross_entropy(x, weight, target) * scale, x)[0]
    x64, w64 = x.detach().double().requires_grad_(), weight.detach().double()
    truth = torch.autograd.grad(F.cross_entropy(x64 @ w64.T, target) * scale, x64)[0]
    assert ((dx.double() - truth).norm() / truth.norm()) < 2e-3


def test_leading_axes_and_views():
    x = torch.randn(24, 2, 5).transpose(0, 1).requires_grad_()
    weight, target = torch.randn(24, 9).T, torch.randint(0, 9, (2, 5))
    x = x.transpose(1, 2)  # [2, 5, 24], no axis in memory order
    for reduction in ("mean", "none"):
        got = linear_cross_entropy(x, weight, target, reduction=reduction)
        torch.testing.assert_close(got, naive_linear_cross_entropy(x, weight, target, reduction=reduction).view_as(got))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(5, 3)}, r"weight must be \[V, 4\]"),
        ({"target": torch.zeros(3, dtype=torch.long)}, r"target must be \[2\]"),
        ({"target": torch.zeros(2)}, "target must hold integers"),
        ({"bias": torch.zeros(4)}, r"bias must be \[5\]"),
        ({"weight": torch.zeros(5, 4).double()}, "weight has dtype"),
        ({"row_weight": torch.zeros(3)}, r"row_weight must be \[2\]"),
        ({"row_weight": torch.zeros(2).requires_grad_()}, "must not require a gradient"),
        ({"reduction": "max"}, "reduction must be one of"),
        ({"label_smoothing": 1.5}, "label_smoothing must be"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, "takes float16"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_bad_input(change, message):
    args = {"x": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "target": torch.zeros(2, dtype=torch.long)} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**args)


def test_supports():
    assert supports("cpu", torch.bfloat16) is None and supports("cuda", torch.float64) is None
    assert "mps" in supports("mps", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction, dtype):
    given = make_operands(Case("opcheck", N=9, bias=True, weighted=True, ignored=0.3), dtype)
    leaves = [y.requires_grad_() for y in (given.x, given.weight, given.bias)]
    rest = given.target, given.row_weight, -100, 0.1, 2.0, 1.3, 0.01
    torch.library.opcheck(linear_cross_entropy_forward, (*leaves, *rest, reduction, True, True, True))
    detached = [y.detach() for y in leaves]
    torch.library.opcheck(linear_cross_entropy_backward, (*detached, *rest, True, False, True))


def test_compiles_once():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *a: linear_cross_entropy(*a), backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for N in (5, 9, 12):
        x, weight = torch.randn(N, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
        target = torch.randint(0, 7, (N,))
        found = []
        for fn in (compiled, naive_linear_cross_entropy):
            loss = fn(x, weight, target)
            found.append((loss, *torch.autograd.grad(2 * loss, (x, weight))))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1]  # the first call itself may start over, to fix the numbers among the arguments


def test_autocast_is_kept_out():
    given = make_operands(Case("autocast"), torch.float32)
    alone = linear_cross_entropy(given.x, given.weight, given.target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_cross_entropy(given.x, given.weight, given.target), alone)


@pytest.mark.parametrize(
    ("N", "D", "V", "rows", "sums", "bytes_over"),
    [
        (16384, 2048, 32000, 2048, torch.float32, 0.27e9),
        (8192, 4096, 128256, 1024, torch.bfloat16, 0.27e9),
        (16384, 4096, 128256, 2048, torch.bfloat16, 0.53e9),
        (4096, 1152, 262144, 1024, torch.bfloat16, 0.54e9),
        (65536, 4096, 128256, 1024, torch.float32, 1.32e9),
        (100, 64, 1000, 100, torch.bfloat16, 1e6),
    ],
)
def test_plan(N, D, V, rows, sums, bytes_over):
    """Chunks on a device of 132 processors, and what they take beside inputs and gradients."""
    plan = plan_chunks(N, D, V, torch.bfloat16, 132)
    assert plan == Plan(rows, sums)
    over = rows * V * 2 + V * D * (sums.itemsize - 2)
    assert over <= bytes_over


def test_plan_of_odd_sizes():
    for N, D, V in [(1, 1, 2), (10**6, 17, 50257), (7, 10**5, 3), (10**5, 8192, 10**6)]:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for processors in (0, 1, 132):
                plan = plan_chunks(N, D, V, dtype, processors)
                assert 1 <= plan.rows <= N
                assert plan.sums == torch.float32 or dtype == torch.bfloat16

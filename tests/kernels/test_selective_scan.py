from dataclasses import dataclass

import pytest
import torch
from budget import check_budget
from torch._dynamo.testing import CompileCounterWithBackend

from fla_compile.kernels import selective_scan as module
from fla_compile.kernels.selective_scan import naive_selective_scan, selective_scan

NAMES = ("y", "final_state", "dx", "ddt", "dA", "dB", "dC", "dS0")
RATES = ("mamba", "weak", "strong", "mixed", "growing", "zero", "resets")


@dataclass(frozen=True)
class Case:
    T: int
    rate: str = "mamba"
    B: int = 2
    D: int = 7
    N: int = 4

    def __str__(self):
        return f"B{self.B}T{self.T}D{self.D}N{self.N}-{self.rate}"


@dataclass(frozen=True)
class Inputs:
    operands: tuple[torch.Tensor, ...]  # x, dt, A, B, C
    state: torch.Tensor
    dy: torch.Tensor
    dST: torch.Tensor

    def to(self, *args):
        return Inputs(
            tuple(z.to(*args) for z in self.operands), self.state.to(*args), self.dy.to(*args), self.dST.to(*args)
        )


def _inputs(case, dtype, step_dtype=None):
    """Values that are exact in `dtype`; A and the states are at least float32."""
    torch.manual_seed(0)
    B, T, D, N = case.B, case.T, case.D, case.N
    wide = torch.promote_types(dtype, torch.float32)
    x, dy = (torch.randn(B, T, D).to(dtype) for _ in range(2))
    B_, C = (torch.randn(B, T, N).to(dtype) for _ in range(2))
    state, dST = (torch.randn(B, D, N).to(wide) for _ in range(2))
    dt = torch.rand(B, T, D) / 5
    A = -torch.arange(1.0, N + 1).expand(D, N) * (0.5 + torch.rand(D, N))
    if case.rate == "weak":
        A = A / 100
    elif case.rate == "strong":
        A = A * 100
    elif case.rate == "mixed":
        A = torch.randn(D, N) / 8
    elif case.rate == "growing":
        A = -A / 40
    elif case.rate == "zero":
        A = torch.zeros(D, N)
    elif case.rate == "resets":
        dt = torch.where(torch.rand(B, T, D) < 0.03, 1e3, dt)
    return Inputs((x, dt.to(step_dtype or dtype), A.to(wide), B_, C), state, dy, dST)


def _results(fn, inputs):
    leaves = [z.detach().clone().requires_grad_() for z in (*inputs.operands, inputs.state)]
    y, final = fn(*leaves[:5], initial_state=leaves[5], output_final_state=True)
    grads = torch.autograd.grad([y, final], leaves, [inputs.dy.to(y.dtype), inputs.dST.to(final.dtype)])
    return dict(zip(NAMES, (y.detach(), final.detach(), *grads), strict=True))


def _check(case, dtype, step_dtype=None):
    inputs = _inputs(case, dtype, step_dtype)
    got, eager = (_results(fn, inputs) for fn in (selective_scan, naive_selective_scan))
    truth = _results(naive_selective_scan, inputs.to(torch.float64))
    for name, z in got.items():
        kind = "forward" if name in ("y", "final_state") else "backward"
        check_budget(f"{case} {name}", z, truth[name], eager[name], kind)


def test_naive_is_the_sum_over_pairs():
    inputs = _inputs(Case(6), torch.float64)
    x, dt, A, B, C = inputs.operands
    y, final = naive_selective_scan(x, dt, A, B, C, initial_state=inputs.state, output_final_state=True)
    z = torch.einsum("btd,dn->btdn", dt, A).cumsum(1)
    pairs = (z[:, :, None] - z[:, None]).exp() * torch.ones(6, 6).tril()[None, :, :, None, None]
    S = torch.einsum("bijdn,bjd,bjd,bjn->bidn", pairs, dt, x, B) + z.exp() * inputs.state[:, None]
    torch.testing.assert_close(y, torch.einsum("bidn,bin->bid", S, C))
    torch.testing.assert_close(final, S[:, -1])
    assert naive_selective_scan(x, dt, A, B, C)[1] is None


@pytest.mark.parametrize("fn", [naive_selective_scan, selective_scan])
def test_gradients_against_differences(fn):
    inputs = _inputs(Case(5, "mixed", D=3, N=2), torch.float64)
    leaves = [z.requires_grad_() for z in (*inputs.operands, inputs.state)]
    assert torch.autograd.gradcheck(
        lambda *z: fn(*z[:5], initial_state=z[5], output_final_state=True), leaves, fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 200])
def test_sizes(T, dtype):
    _check(Case(T), dtype)


@pytest.mark.parametrize(
    "case", [Case(40, B=1, D=1, N=1), Case(33, B=3, D=70, N=16), Case(1000, "weak", D=3), Case(20, D=1, N=33)], ids=str
)
def test_other_sizes(case):
    _check(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rate", RATES)
def test_rates(rate, dtype):
    _check(Case(130, rate), dtype)


@pytest.mark.parametrize("step_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow(dtype, step_dtype):
    _check(Case(100), dtype, step_dtype)


@pytest.mark.parametrize("rate", ["mixed", "resets"])
def test_slabs_and_segments_change_nothing(rate, monkeypatch):
    inputs = _inputs(Case(37, rate, B=3), torch.float64)
    whole = _results(selective_scan, inputs)
    for width, segment in ((1, 1), (4, 20), (12, 60), (28, 280), (56, 300), (84, 85)):
        monkeypatch.setitem(module.WIDTH, "cpu", width)
        monkeypatch.setitem(module.SEGMENT, "cpu", segment)
        parts = _results(selective_scan, inputs)
        for name in NAMES:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-11, atol=1e-11)


def test_memory_is_bounded_by_a_slab(monkeypatch):
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for z in out if isinstance(out, (tuple, list)) else [out]:
                largest = max(largest, z.untyped_storage().nbytes() if isinstance(z, torch.Tensor) else 0)
            return out

    monkeypatch.setitem(module.WIDTH, "cpu", 1 << 8)
    monkeypatch.setitem(module.SEGMENT, "cpu", 1 << 12)
    case = Case(300, B=2, D=40, N=16)
    with Watch():
        _results(selective_scan, _inputs(case, torch.float32))
    assert largest < case.B * case.T * case.D * case.N * 4 / 4
    assert largest >= 4 * (1 << 12), "nothing was seen"


def test_a_long_step_forgets():
    inputs = _inputs(Case(70), torch.float32)
    x, dt, A, B, C = inputs.operands
    dt[:, 20], x[:, 20] = 1e6, 0.0
    state = inputs.state.requires_grad_()
    y, _ = selective_scan(x, dt, A, B, C, initial_state=state)
    alone, _ = selective_scan(*(z[:, 21:] if z.ndim == 3 else z for z in (x, dt, A, B, C)))
    torch.testing.assert_close(y[:, 21:], alone)
    assert not torch.autograd.grad(y[:, 20:].sum(), state)[0].any()


def test_rows_do_not_see_the_future():
    inputs = _inputs(Case(100), torch.float32)
    before, _ = selective_scan(*inputs.operands)
    for z in inputs.operands:
        if z.ndim == 3:
            z[:, 50:] = 7.0
    after, _ = selective_scan(*inputs.operands)
    assert torch.equal(before[:, :50], after[:, :50])


def test_twice_is_bitwise_the_same():
    inputs = _inputs(Case(200, "mixed"), torch.float32)
    first, second = (_results(selective_scan, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_strided_inputs_and_no_aliasing():
    inputs = _inputs(Case(65), torch.float32)
    operands = tuple(z.transpose(0, -1).contiguous().transpose(0, -1) for z in inputs.operands)
    strided = Inputs(operands, inputs.state.mT.contiguous().mT, inputs.dy[:1, :1].expand_as(inputs.dy), inputs.dST)
    plain = _results(selective_scan, Inputs(inputs.operands, inputs.state, strided.dy.contiguous(), inputs.dST))
    got = _results(selective_scan, strided)
    for name in NAMES:
        torch.testing.assert_close(got[name], plain[name])
    x, dt, A, B, C = operands
    y, final = module.selective_scan_op(x, dt, A, B, C, strided.state)
    assert y.is_contiguous() and final.is_contiguous()
    assert all(z.untyped_storage().data_ptr() != y.untyped_storage().data_ptr() for z in (*operands, final))


@pytest.mark.parametrize("case", [Case(5, B=0), Case(5, D=0), Case(5, N=0)], ids=str)
def test_empty(case):
    got, expected = (_results(fn, _inputs(case, torch.float32)) for fn in (selective_scan, naive_selective_scan))
    assert all(torch.equal(got[name], expected[name]) for name in NAMES)


def test_optional_gradients():
    inputs = _inputs(Case(70), torch.float64)
    x, dt, A, B, C = (z.requires_grad_() for z in inputs.operands)
    with_zeros = _results(selective_scan, Inputs(inputs.operands, 0 * inputs.state, inputs.dy, 0 * inputs.dST))
    y, none = selective_scan(x, dt, A, B, C)
    assert none is None
    grads = torch.autograd.grad(y, (x, dt, A, B, C), inputs.dy)
    for name, z in zip(NAMES[2:7], grads, strict=True):
        torch.testing.assert_close(z, with_zeros[name])
    _, final = selective_scan(x, dt, A, B, C, output_final_state=True)
    dB, dC = torch.autograd.grad(final, (B, C), inputs.dST)
    assert not dC.any()
    torch.testing.assert_close(dB[:, -1], torch.einsum("bdn,bd->bn", inputs.dST, x[:, -1] * dt[:, -1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    inputs = _inputs(Case(20), dtype)
    operands = [z.requires_grad_() for z in inputs.operands]
    torch.library.opcheck(module.selective_scan_op, (*operands, inputs.state.requires_grad_()))
    torch.library.opcheck(module.selective_scan_op, (*operands, None))
    plain, state = [z.detach() for z in operands], inputs.state.detach()
    torch.library.opcheck(module.selective_scan_backward, (*plain, state, inputs.dy, inputs.dST, True))
    torch.library.opcheck(module.selective_scan_backward, (*plain, None, inputs.dy, None, False))


def test_compiles_once_for_every_size():
    counter = CompileCounterWithBackend("aot_eager")
    fn = torch.compile(selective_scan, fullgraph=True, dynamic=True, backend=counter)
    for B, T in ((2, 17), (3, 40), (5, 65), (2, 130)):
        inputs = _inputs(Case(T, B=B), torch.float32)
        got, expected = _results(fn, inputs), _results(selective_scan, inputs)
        assert all(torch.equal(got[name], expected[name]) for name in NAMES)
    assert counter.frame_count == 1
    targets = [str(node.target) for node in counter.graphs[0].graph.nodes]
    assert sum("fla_compile.selective_scan" in target for target in targets) == 1


def test_autocast_leaves_the_scan_alone():
    inputs = _inputs(Case(65), torch.float32)
    expected = _results(selective_scan, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = _results(selective_scan, inputs)
    assert all(torch.equal(got[name], expected[name]) for name in NAMES)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 65, 200])
def test_cuda(T, dtype):
    inputs = _inputs(Case(T, "mixed"), dtype)
    got, eager = _results(selective_scan, inputs.to("cuda")), _results(naive_selective_scan, inputs)
    truth = _results(naive_selective_scan, inputs.to(torch.float64))
    for name, z in got.items():
        kind = "forward" if name in ("y", "final_state") else "backward"
        check_budget(name, z.cpu(), truth[name], eager[name], kind)


def _x(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": _x(2, 5)}, "x must have 3 dimensions, got 2"),
        ({"dt": _x(2, 5)}, "dt must have 3 dimensions, got 2"),
        ({"A": _x(3)}, "A must have 2 dimensions, got 1"),
        ({"B": _x(2, 5)}, "B must have 3 dimensions, got 2"),
        ({"C": _x(5, 4)}, "C must have 3 dimensions, got 2"),
        ({"initial_state": _x(2, 3)}, "initial_state must have 3 dimensions, got 2"),
        ({"dt": _x(2, 5, 1)}, "dt has D=1, x has D=3"),
        ({"dt": _x(2, 6, 3)}, "dt has T=6, x has T=5"),
        ({"A": _x(2, 4)}, "A has D=2, x has D=3"),
        ({"B": _x(1, 5, 4)}, "B has B=1, x has B=2"),
        ({"B": _x(2, 5, 3)}, "B has N=3, A has N=4"),
        ({"C": _x(2, 4, 4)}, "C has T=4, x has T=5"),
        ({"C": _x(2, 5, 5)}, "C has N=5, A has N=4"),
        ({"initial_state": _x(1, 3, 4)}, "initial_state has B=1, x has B=2"),
        ({"initial_state": _x(2, 4, 3)}, "initial_state has D=4, x has D=3"),
        ({"initial_state": _x(2, 3, 3)}, "initial_state has N=3, A has N=4"),
        ({"x": _x(2, 0, 3), "dt": _x(2, 0, 3), "B": _x(2, 0, 4), "C": _x(2, 0, 4)}, "x has T=0"),
        ({"x": _x(2, 5, 3, dtype=torch.int64)}, "x must be floating point, got torch.int64"),
        ({"A": _x(3, 4, dtype=torch.bool)}, "A must be floating point, got torch.bool"),
        ({"C": _x(2, 5, 4, device="meta")}, "C is on meta, x is on cpu"),
        ({"initial_state": _x(2, 3, 4, device="meta")}, "initial_state is on meta, x is on cpu"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"x": _x(2, 5, 3), "dt": _x(2, 5, 3), "A": _x(3, 4), "B": _x(2, 5, 4), "C": _x(2, 5, 4)}
    with pytest.raises(ValueError, match=message):
        selective_scan(**(good | change))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("cpu", torch.float64), None),
        (("cuda", torch.bfloat16), None),
        (("mps", torch.float32), "device"),
        (("cpu", torch.int8), "dtype"),
    ],
)
def test_supports(arguments, reason):
    found = module.supports(*arguments)
    assert found is None if reason is None else reason in found

from dataclasses import dataclass

import pytest
import torch
from budget import check_budget
from torch._dynamo.testing import CompileCounterWithBackend

from fla_compile.kernels import linear_scan as module
from fla_compile.kernels.linear_scan import linear_scan, naive_linear_scan

NAMES = ("h", "final_state", "dx", "da", "dh0")
TAME = ("decay", "signed", "zeros", "negative", "resets", "growing")
PATHS = {"steps": 0, "blocks": 1 << 30}


@dataclass(frozen=True)
class Case:
    T: int
    factor: str = "signed"
    B: int = 2
    D: int = 5

    def __str__(self):
        return f"B{self.B}T{self.T}D{self.D}-{self.factor}"


def _factor(kind, shape):
    some, normal = torch.rand(shape), torch.randn(shape)
    return {
        "decay": some,
        "signed": 0.8 * normal,
        "zeros": torch.where(some < 0.3, 0.0, 0.8 * normal),
        "negative": -some,
        "resets": torch.where(some < 0.03, 0.0, 1 - some / 50),
        "growing": 1 + some / 40,
    }[kind]


def _inputs(case, dtype, a_dtype=None):
    """x, a, h0, dh, dht: values that are exact in `dtype`, the state's at least float32."""
    torch.manual_seed(0)
    shape, wide = (case.B, case.T, case.D), torch.promote_types(dtype, torch.float32)
    x, dh = (torch.randn(shape).to(dtype) for _ in range(2))
    h0, dht = (torch.randn(case.B, case.D).to(wide) for _ in range(2))
    return x, _factor(case.factor, shape).to(a_dtype or dtype), h0, dh, dht


def _results(fn, x, a, h0, dh, dht):
    leaves = [y.detach().clone().requires_grad_() for y in (x, a, h0)]
    h, final = fn(*leaves[:2], initial_state=leaves[2], output_final_state=True)
    grads = torch.autograd.grad([h, final], leaves, [dh.to(h.dtype), dht.to(final.dtype)])
    return dict(zip(NAMES, (h.detach(), final.detach(), *grads), strict=True))


def _check(case, dtype, a_dtype=None):
    inputs = _inputs(case, dtype, a_dtype)
    got, eager = (_results(fn, *inputs) for fn in (linear_scan, naive_linear_scan))
    truth = _results(naive_linear_scan, *(y.double() for y in inputs))
    for name, y in got.items():
        kind = "forward" if name in ("h", "final_state") else "backward"
        check_budget(f"{case} {name}", y, truth[name], eager[name], kind)


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Every width and length on one path; blocks must not fall back."""
    monkeypatch.setitem(module.NARROW, "cpu", PATHS[request.param])
    monkeypatch.setitem(module.LONG, "cpu", 2)
    monkeypatch.setitem(module.GROWTH, torch.float64, 300)  # ordinary growth is exact in blocks as well
    if request.param == "blocks":
        monkeypatch.setattr(module, "_scan_steps", _only_a_tail(module._scan_steps))
    return request.param


def _only_a_tail(steps):
    def checked(out, x, a, state, reverse):
        assert len(x) == 1 or (state is not None and len(x) < 40), "the blocks fell back to steps"
        return steps(out, x, a, state, reverse)

    return checked


def test_naive_is_the_sum_over_products():
    x, a, h0, *_ = _inputs(Case(6), torch.float64)
    h, final = naive_linear_scan(x, a, initial_state=h0, output_final_state=True)
    for t in range(6):
        expected = a[:, : t + 1].prod(1) * h0 + sum(a[:, j + 1 : t + 1].prod(1) * x[:, j] for j in range(t + 1))
        torch.testing.assert_close(h[:, t], expected)
    assert torch.equal(final, h[:, -1])
    assert naive_linear_scan(x, a)[1] is None


@pytest.mark.parametrize("fn", [naive_linear_scan, linear_scan])
def test_gradients_against_differences(fn):
    x, a, h0, *_ = _inputs(Case(9, "zeros"), torch.float64)
    assert a.count_nonzero() < a.numel()
    inputs = [y.requires_grad_() for y in (x, a, h0)]
    assert torch.autograd.gradcheck(lambda x, a, h: fn(x, a, initial_state=h, output_final_state=True), inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 200])
def test_sizes(T, dtype, path):
    _check(Case(T), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("factor", TAME)
def test_factors(factor, dtype, path):
    _check(Case(130, factor, D=40), dtype)


@pytest.mark.parametrize(
    "case", [Case(1000, "resets", D=33), Case(1, B=1, D=1), Case(300, "decay", B=1, D=3000)], ids=str
)
def test_other_sizes(case):
    _check(case, torch.float32)


@pytest.mark.parametrize("a_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow(dtype, a_dtype, path, monkeypatch):
    monkeypatch.setitem(module.SEGMENT, "cpu", 400)
    _check(Case(200, "resets"), dtype, a_dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.bfloat16, 8e-3)], ids=str)
def test_slabs_and_segments_change_nothing(dtype, tolerance, monkeypatch):
    inputs = _inputs(Case(70, "zeros"), dtype)
    whole = _results(linear_scan, *inputs)
    for width, segment in ((1, 1), (3, 20), (5, 64), (10, 10), (10, 230)):
        monkeypatch.setitem(module.WIDTH, "cpu", width)
        monkeypatch.setitem(module.SEGMENT, "cpu", segment)
        parts = _results(linear_scan, *inputs)
        for name in NAMES:  # not bitwise: whether the product of a step is rounded depends on where vectors end
            torch.testing.assert_close(parts[name], whole[name], rtol=tolerance, atol=tolerance)


def _extreme(kind, T, dtype):
    """Factors whose products leave the range of the dtype within one block, where the loop's states do not."""
    large = 1e20 if dtype == torch.float32 else 1e200
    x, a = torch.zeros(1, T, 3, dtype=dtype), torch.full((1, T, 3), 0.5, dtype=dtype)
    h0 = torch.ones(1, 3, dtype=dtype)
    x[:, ::50] = 1.0
    t = T // 2
    if kind == "grow_then_zero":
        a[:, t], a[:, t + 1] = large, 0.0
        x[:, t + 2] = 1.0
    elif kind == "grow_then_shrink":
        a[:, t], a[:, t + 1] = large, 1 / large
    elif kind == "zero_state_grows":
        h0.zero_()
        x[:, : T - 9] = 0.0
        a[:, 10:30] = large
    elif kind == "shrink_then_grow":
        h0.fill_(large)
        x.zero_()
        a.fill_(1.0)
        a[:, t : t + 2], a[:, t + 2 : t + 4] = 1 / large, large
    elif kind == "cancelled":
        x.zero_()
        a.fill_(1.0)
        a[:, t], x[:, t] = large, -large  # the state is one: it vanishes here
        a[:, t + 1 : t + 4] = large
    elif kind == "far_down_and_back" and dtype == torch.float64:
        h0.fill_(1e50)
        x.zero_()
        a.fill_(1.0)
        a[:, 64:68], a[:, 80:112] = 1e-80, 1e10
    return x, a, h0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "kind",
    ["grow_then_zero", "grow_then_shrink", "zero_state_grows", "shrink_then_grow", "cancelled", "far_down_and_back"],
)
def test_products_out_of_range(kind, dtype):
    x, a, h0 = _extreme(kind, 200, dtype)
    inputs = (x, a, h0, torch.ones_like(x), torch.zeros_like(h0))
    got, eager = (_results(fn, *inputs) for fn in (linear_scan, naive_linear_scan))
    assert eager["h"].isfinite().all(), "the loop is meant to stay finite"
    for name in NAMES:
        finite = eager[name].isfinite()
        torch.testing.assert_close(got[name][finite], eager[name][finite], rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(
    ("dtype", "factor", "value", "held"),
    [
        (torch.float32, 0.5, 1.0, True),
        (torch.float32, 1e30, 1.0, False),
        (torch.float32, -1e30, 1.0, False),
        (torch.float32, torch.nan, 1.0, False),
        (torch.float32, 1.0, 3e38, False),
        (torch.float64, 0.5, 1e50, True),
        (torch.float64, 1.5, 1.0, False),
        (torch.float64, 0.5, 1e100, False),
        (torch.float64, 0.5, torch.nan, False),
    ],
)
def test_blocks_hold_within_their_bounds_only(dtype, factor, value, held):
    x, a = torch.zeros(200, 3, dtype=dtype), torch.ones(200, 3, dtype=dtype)
    out = torch.full_like(x, torch.nan)
    a[17], x[20:24] = factor, value
    assert (module._scan_blocks(out, x, a, None, False) is not None) == held
    assert not out.isnan().any() if held else out.isnan().all()


def test_products_of_a_block_may_leave_the_range_of_float32():
    C = module._block_size(200)
    x, a = torch.zeros(200, 1), torch.ones(200, 1)
    a[C : C + 4], a[C + 4 : C + 8] = 1e-11, 1e11
    out = torch.empty_like(x)
    assert C >= 8 and module._scan_blocks(out, x, a, torch.tensor([1e15]), False) is not None
    torch.testing.assert_close(out[[C + 3, C + 7, 199], 0], torch.tensor([1e-29, 1e15, 1e15]), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["x", "a", "h0"])
def test_what_is_not_finite_spreads_as_in_the_loop(where, value):
    inputs = dict(zip(("x", "a", "h0"), _inputs(Case(200, "zeros"), torch.float32)[:3], strict=True))
    inputs[where].view(-1)[3 if where == "h0" else 603] = value
    h, final = linear_scan(inputs["x"], inputs["a"], initial_state=inputs["h0"], output_final_state=True)
    expected, _ = naive_linear_scan(inputs["x"], inputs["a"], initial_state=inputs["h0"])
    torch.testing.assert_close(h, expected, equal_nan=True)
    torch.testing.assert_close(final, expected[:, -1], equal_nan=True)
    assert not expected.isfinite().all()


def test_an_exact_zero_forgets(path):
    x, a, h0, *_ = _inputs(Case(130), torch.float32)
    a[:, 50] = 0.0
    leaves = [y.requires_grad_() for y in (x, a, h0)]
    h, _ = linear_scan(x, a, initial_state=h0)
    dx, da, dh0 = torch.autograd.grad(h[:, 50:].sum(), leaves)
    torch.testing.assert_close(h[:, 50:], linear_scan(x[:, 50:], a[:, 50:])[0])
    assert not dx[:, :50].any() and not dh0.any() and not da[:, :50].any()
    torch.testing.assert_close(da[:, 50], dx[:, 50] * h[:, 49])
    assert da[:, 50].count_nonzero() > 0


def test_twice_is_bitwise_the_same(path):
    inputs = _inputs(Case(200, "zeros"), torch.float32)
    first, second = (_results(linear_scan, *inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 1, 1), (1, 130, 1), (1, 1, 1), (2, 1, 5)], ids=str)
def test_expanded_factors(shape, path):
    x, _, h0, dh, dht = _inputs(Case(130), torch.float32)
    torch.manual_seed(1)
    a = torch.rand(shape)
    expanded = _results(lambda x, a, **kw: linear_scan(x, a.expand_as(x), **kw), x, a, h0, dh, dht)
    full = _results(linear_scan, x, a.expand_as(x).contiguous(), h0, dh, dht)
    full["da"] = full["da"].sum_to_size(shape)
    for name in NAMES:
        torch.testing.assert_close(expanded[name], full[name], rtol=1e-5, atol=1e-5)


def test_an_expanded_factor_is_not_materialised(monkeypatch):
    seen = []
    inner = module.scan_into

    def spy(out, x, a, state, *, reverse=False):
        seen.append(a.untyped_storage().nbytes())
        return inner(out, x, a, state, reverse=reverse)

    monkeypatch.setattr(module, "scan_into", spy)
    a = torch.rand(1, 1, 64, requires_grad=True)
    linear_scan(torch.randn(4, 2000, 64), a.expand(4, 2000, 64))[0].sum().backward()
    assert set(seen) == {64 * 4}
    seen.clear()
    linear_scan(torch.randn(4, 2000, 64), a[..., :1].expand(4, 2000, 64))
    assert max(seen) <= 4 * module.SEGMENT["cpu"]


def test_strided_inputs_and_no_aliasing():
    x, a, h0, dh, dht = _inputs(Case(200, D=7), torch.float32)
    plain = _results(linear_scan, x, a, h0, dh, dht)
    strided = [y.transpose(0, -1).contiguous().transpose(0, -1) for y in (x, a, h0, dh, dht)]
    got = _results(linear_scan, *strided)
    h, final = linear_scan(*strided[:2], initial_state=strided[2], output_final_state=True)
    assert h.is_contiguous() and final.untyped_storage().data_ptr() != h.untyped_storage().data_ptr()
    for name in NAMES:
        torch.testing.assert_close(got[name], plain[name])


@pytest.mark.parametrize("case", [Case(5, B=0), Case(5, D=0)], ids=str)
def test_empty(case):
    got, expected = (_results(fn, *_inputs(case, torch.float32)) for fn in (linear_scan, naive_linear_scan))
    assert all(torch.equal(got[name], expected[name]) for name in NAMES)


def test_optional_gradients():
    x, a, h0, dh, dht = _inputs(Case(70), torch.float64)
    dx, da, _ = module._backward(linear_scan(x, a)[0], a, None, dh, None, True)
    with_zeros = _results(linear_scan, x, a, 0 * h0, dh, 0 * dht)
    torch.testing.assert_close(dx, with_zeros["dx"])
    torch.testing.assert_close(da, with_zeros["da"])
    assert module._backward(x, a, None, dh, None, False)[1] is None
    x.requires_grad_()
    _, final = linear_scan(x, a, output_final_state=True)
    (dx,) = torch.autograd.grad(final, x, dht)
    torch.testing.assert_close(dx[:, -1], dht)
    torch.testing.assert_close(dx[:, -2], dht * a[:, -1])
    assert linear_scan(x, a)[1] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    x, a, h0, dh, dht = _inputs(Case(20), dtype)
    torch.library.opcheck(module.linear_scan_op, (x.requires_grad_(), a.requires_grad_(), h0.requires_grad_()))
    torch.library.opcheck(module.linear_scan_op, (x, a, None))
    x, a, h0 = (y.detach() for y in (x, a, h0))
    for needs in ((True, True), (False, False)):
        torch.library.opcheck(module.linear_scan_backward, (x, a, h0, dh, dht, *needs))
        torch.library.opcheck(module.linear_scan_backward, (x, a, None, dh, None, *needs))


def test_compiles_once_for_every_size():
    counter = CompileCounterWithBackend("aot_eager")
    fn = torch.compile(linear_scan, fullgraph=True, dynamic=True, backend=counter)
    for B, T in ((2, 17), (3, 40), (5, 65), (2, 130)):
        inputs = _inputs(Case(T, B=B), torch.float32)
        got, expected = _results(fn, *inputs), _results(linear_scan, *inputs)
        assert all(torch.equal(got[name], expected[name]) for name in NAMES)
    assert counter.frame_count == 1
    targets = [str(node.target) for node in counter.graphs[0].graph.nodes]
    assert sum("fla_compile.linear_scan" in target for target in targets) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 65, 200, 1000])
def test_cuda(T, dtype):
    inputs = _inputs(Case(T, "zeros", D=33), dtype)
    got = _results(linear_scan, *(y.cuda() for y in inputs))
    eager = _results(naive_linear_scan, *inputs)
    truth = _results(naive_linear_scan, *(y.double() for y in inputs))
    for name, y in got.items():
        kind = "forward" if name in ("h", "final_state") else "backward"
        check_budget(name, y.cpu(), truth[name], eager[name], kind)


def _x(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": _x(2, 5)}, "x must have 3 dimensions, got 2"),
        ({"a": _x(2, 5)}, "a must have 3 dimensions, got 2"),
        ({"initial_state": _x(2, 5, 3)}, "initial_state must have 2 dimensions, got 3"),
        ({"a": _x(1, 5, 3)}, "a has B=1, x has B=2"),
        ({"a": _x(2, 1, 3)}, "a has T=1, x has T=5"),
        ({"a": _x(2, 5, 1)}, "a has D=1, x has D=3"),
        ({"initial_state": _x(1, 3)}, "initial_state has B=1, x has B=2"),
        ({"initial_state": _x(2, 4)}, "initial_state has D=4, x has D=3"),
        ({"x": _x(2, 0, 3), "a": _x(2, 0, 3)}, "x has T=0"),
        ({"x": _x(2, 5, 3, dtype=torch.int64)}, "x must be floating point, got torch.int64"),
        ({"a": _x(2, 5, 3, dtype=torch.bool)}, "a must be floating point, got torch.bool"),
        ({"a": _x(2, 5, 3, device="meta")}, "a is on meta, x is on cpu"),
        ({"initial_state": _x(2, 3, device="meta")}, "initial_state is on meta, x is on cpu"),
        ({"x": _x(2, 5, 3, device="meta"), "a": _x(2, 5, 3, device="meta")}, "device 'meta'"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        linear_scan(**({"x": _x(2, 5, 3), "a": _x(2, 5, 3)} | change))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(("cpu", torch.float64), None), (("cuda", torch.bfloat16), None), (("mps", torch.float32), "device"),
     (("cpu", torch.int8), "dtype")],
)  # fmt: skip
def test_supports(arguments, reason):
    found = module.supports(*arguments)
    assert found is None if reason is None else reason in found

"""A loop of one step becomes the step: no operator, the numbers of eager, and graphs for other lengths as ever."""

import pytest
import torch
import torch.nn.functional as F
from programs import Cases, Passes, assert_same, dynamic_in_time, operands, read, write

from fla_compile.passes.lower_step import KERNEL

cases = Cases()


@cases.cell("gla", "bhkv bthk bthk bthv bthk")
def gated(S, q, k, v, g):
    S = S * torch.sigmoid(g)[..., None] + write(k, v)
    return read(q.to(S.dtype), S).to(v.dtype), S


@cases.cell("gated_delta_rule", "bhkv bthk bthk bthv bth bth")
def delta(S, q, k, v, g, beta):
    k = F.normalize(k, dim=-1)
    S = S * torch.sigmoid(g)[..., None, None]
    S = S + write(k, torch.sigmoid(beta)[..., None] * (v - read(k, S)))
    return read(q, S), S


@cases.cell("rwkv6", "bhkv bthk bthk bthv bthk hk")
def bonus(S, q, k, v, w, u):
    o = read(q, S + u[..., None] * write(k, v))
    return o, S * torch.exp(-torch.exp(w))[..., None] + write(k, v)


@cases.cell("linear_scan", "bk btk btk")
def elementwise(h, x, a):
    h = torch.sigmoid(a) * h + (1 - torch.sigmoid(a)) * x
    return h, h


@cases.cell("elementwise", "bkw btk btk kw", w=4)
def rolling_window(buffer, x, g, w):
    buffer = torch.cat([buffer[..., 1:], x.unsqueeze(-1)], -1)
    return g * (buffer * w).sum(-1), buffer


@cases.cell("generic", "bk btk btx kx kk", x=5)
def tanh_cell(h, x, y, W, U):
    h = torch.tanh(y @ W.mT + h @ U)
    return h * x, h


@pytest.mark.parametrize("fn, family, axes, sizes", cases)
def test_one_step_is_the_step(fn, family, axes, sizes):
    backend = Passes(then="aot_eager")
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), operands(axes, t=1, **sizes))
    (rewrite,) = backend.report.rewrites
    assert (rewrite.family, rewrite.kernel) == (family, KERNEL)
    after = backend.report.graph("after")
    assert "torch.ops.fla_compile" not in after and "higher_order.scan" not in after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_rounds_as_the_program_does(dtype):
    fn, _, axes, _ = cases[0].values
    S, *args = operands(axes, t=1, dtype=dtype)
    with torch.no_grad():
        results = torch.compile(fn, backend=Passes(), fullgraph=True)(S.float(), *args)
        for got, want in zip(results, fn(S.float(), *args), strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want)


def test_prompts_of_all_lengths_share_a_graph_and_tokens_another():
    fn, _, axes, _ = cases[0].values
    backend = Passes()
    compiled = dynamic_in_time(torch.compile(fn, backend=backend, fullgraph=True), axes)
    for length in (7, 5, 1, 30, 1, 8):
        assert_same(fn, compiled, operands(axes, t=length))
    assert backend.graphs == 2
    kernels = [report.rewrites[0].kernel for report in backend.reports]
    assert kernels[0] != KERNEL and kernels[1] == KERNEL


def test_loops_of_one_step_and_of_many_stand_side_by_side():
    fn, _, axes, _ = cases[0].values

    def both(S, *args):
        first, S = fn(S, *(x[:, :1] for x in args))
        rest, S = fn(S, *(x[:, 1:] for x in args))
        return torch.cat([first, rest], 1), S

    backend = Passes()
    assert_same(both, torch.compile(both, backend=backend, fullgraph=True), operands(axes))
    one, many = (rewrite.kernel for rewrite in backend.report.rewrites)
    assert one == KERNEL != many


def updated_in_place(x):
    S, outs = x[:, 0] * 2, []
    for t in range(x.shape[1]):
        outs.append(S + x[:, t])
        S.mul_(0.5)
        S.add_(x[:, t])
    return torch.stack(outs, 1), S


def hands_on_its_input(x):
    last, outs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        outs.append(x[:, t] + 0.5 * last)
        last = x[:, t]
    return torch.stack(outs, 1), last


def one_value_under_two_names(x):
    h = last = torch.zeros_like(x[:, 0])
    outs = []
    for t in range(x.shape[1]):
        h = torch.sigmoid(x[:, t]) * h + last * 0.5
        last = h
        outs.append(h)
    return torch.stack(outs, 1), h, last


def returns_its_state_unchanged(x):
    first, h, outs = x[:, 0] * 2, torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = 0.5 * h + first
        outs.append(h * x[:, t])
    return torch.stack(outs, 1), h, first


@pytest.mark.parametrize(
    "fn",
    [updated_in_place, hands_on_its_input, one_value_under_two_names, returns_its_state_unchanged],
    ids=lambda fn: fn.__name__,
)
@torch.no_grad()
def test_results_share_memory_only_where_they_do_in_eager(fn):
    def after_writing(run):
        (x,) = operands("bthk", t=1)
        results = run(x)
        values = [r.clone() for r in results]
        for i, result in enumerate(results):
            result.add_(i + 1)
            values += [r.clone() for r in (*results, x)]
        return values

    backend = Passes(then="aot_eager")
    got = after_writing(torch.compile(fn, backend=backend, fullgraph=True))
    assert backend.report.rewrites
    for a, b in zip(got, after_writing(fn), strict=True):
        torch.testing.assert_close(a, b)

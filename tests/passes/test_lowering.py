"""Lowering: results are memory of their own, types are those of the program, and all stages go through Inductor."""

import pytest
import torch
import torch.nn.functional as F
from programs import Cases, Passes, assert_looped, assert_rewritten, assert_same, bare, dynamic_in_time, operands

CASES = Cases()


def every_kind_of_stage(x, w, g, k, q, dt, A, buffer, prev, U):
    """A window, a delay, a matrix state, an elementwise scan, a selective scan and a plain loop, one behind another."""
    S = x.new_zeros(x.shape[0], k.shape[2], x.shape[2])
    h, m = torch.zeros_like(x[:, 0]), x.new_zeros(x.shape[0], x.shape[2], A.shape[1])
    u = torch.zeros_like(x[:, 0])
    outs = []
    for t in range(x.shape[1]):
        buffer = torch.cat([buffer[..., 1:], x[:, t].unsqueeze(-1)], -1)
        y = F.silu((buffer * w).sum(-1)) + 0.5 * prev
        prev = x[:, t]
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * y[:, None]
        r = (q[:, t].unsqueeze(1) @ S).squeeze(1)
        h = torch.lerp(h, r, torch.sigmoid(x[:, t]))
        step = F.softplus(dt[:, t])
        m = torch.exp(-step[..., None] * A.exp()) * m + (step * torch.tanh(h))[..., None] * k[:, t, None, :]
        z = (m * q[:, t, None, :]).sum(-1)
        u = torch.tanh(0.1 * (u @ U) + z)  # here
        outs.append(u + x[:, t])
    return torch.stack(outs, 1), S, h, m, u, buffer, prev


EVERY = "btv vw btk btk btk btv vk bvw bv vv"


def every(then, **sizes):
    families = "gla + linear_scan + selective_scan + generic"
    args = [x * 0.5 for x in operands(EVERY, w=3, **sizes)]
    assert_looped(every_kind_of_stage, args, "unsupported_op", "tanh", families=families, then=then, tolerance=1e-4)


@pytest.mark.parametrize("then", ["eager", "aot_eager"])
def test_every_kind_of_stage(then):
    every(then)


def test_every_kind_of_stage_under_inductor():
    every("inductor", t=5)


# One program of each kind through Inductor alone.


@CASES("delta_rule", "bthk bthk bthv bth")
def delta(q, k, v, beta):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        u = (v[:, t] - (k[:, t][..., None] * S).sum(-2)) * torch.sigmoid(beta[:, t])[..., None]
        S = S + k[:, t][..., None] * u[..., None, :]
        o[:, t] = (q[:, t][..., None] * S).sum(-2)
    return o, S


@CASES("dplr", "bthk bthk bthv bthk bthk bthk")
def dplr(q, k, v, g, b, c):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + b[:, t][..., None] * (c[:, t].unsqueeze(-2) @ S)
        S = S + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = (q[:, t][..., None] * S).sum(-2)
    return o, S


@CASES("rwkv6", "bthk bthk bthv bthk hk")
def rwkv6(r, k, v, w, u):
    S, o = bare(r, v), torch.zeros_like(v)
    for t in range(r.shape[1]):
        kv = k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = (r[:, t].unsqueeze(-2) @ (S + u[..., None] * kv)).squeeze(-2)
        S = S * torch.exp(-w[:, t].exp())[..., None] + kv
    return o, S


@CASES("gla", "bthk bthk bthv bthv")
def over_values(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None, :] + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = (q[:, t].unsqueeze(-2) @ S).squeeze(-2)
    return o, S


@pytest.mark.slow
@pytest.mark.parametrize("fn, families, axes, sizes", CASES)
def test_under_inductor(fn, families, axes, sizes):
    args = [x * 0.5 for x in operands(axes, t=70, **sizes)]
    assert_rewritten(fn, args, families, then="inductor", tolerance=1e-4)


# Memory: what a program returns it may write to, whatever the loop made it of.


def scan_state_that_is_the_last_output(x, g):
    h, o = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = torch.sigmoid(g[:, t]) * h + x[:, t]
        o.append(h)
    return torch.stack(o, 1), h


def delayed_output(x, g):
    prev, o = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        o.append(prev)
        prev = x[:, t] * 2
    return torch.stack(o, 1), prev


def window_kept_at_every_step(x, g):
    buffer, o = x.new_zeros(x.shape[0], x.shape[2], 3), []
    for t in range(x.shape[1]):
        buffer = torch.cat([buffer[..., 1:], x[:, t].unsqueeze(-1)], -1)
        o.append(buffer)
    return torch.stack(o, 1), buffer


def state_kept_before_and_after(x, g):
    h, o, p = torch.zeros_like(x[:, 0]), [], []
    for t in range(x.shape[1]):
        p.append(h)
        h = torch.sigmoid(g[:, t]) * h + x[:, t]
        o.append(h)
    return torch.stack(o, 1), torch.stack(p, 1), h


def reads_handed_on(x, g):
    h, o, p = torch.zeros_like(x[:, 0]), [], []
    for t in range(x.shape[1]):
        h = torch.sigmoid(g[:, t]) * h + x[:, t]
        o.append(h)
        p.append(x[:, t])
    return torch.stack(o, 1), torch.stack(p, 1), h


def one_output_in_two_places(x, g):
    h, o, p = torch.zeros_like(x[:, 0]), torch.zeros_like(x), torch.zeros_like(x)
    for t in range(x.shape[1]):
        h = torch.sigmoid(g[:, t]) * h + x[:, t]
        o[:, t] = h
        p[:, t] = h
    return o, p, h


def idle_state_returned(x, g):
    h, held, o = torch.zeros_like(x[:, 0]), g[:, 0], []
    for t in range(x.shape[1]):
        h = torch.sigmoid(held) * h + x[:, t]
        held = held.clone()
        o.append(h)
    return torch.stack(o, 1), held


def loop_state_that_is_the_last_output(x, g):
    h, o = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = torch.tanh(g[:, t] * h + x[:, t])
        o.append(h)
    return torch.stack(o, 1), h


SHARED = [
    scan_state_that_is_the_last_output, delayed_output, window_kept_at_every_step, state_kept_before_and_after,
    reads_handed_on, one_output_in_two_places, idle_state_returned, loop_state_that_is_the_last_output,
]  # fmt: skip


@pytest.mark.parametrize("fn", SHARED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("then", ["eager", "aot_eager"])
def test_results_are_updated_in_place_by_the_caller(fn, then):
    """Each result in turn is overwritten: neither the others nor the arguments change more than in eager."""
    backend = Passes(then=then)

    def changed(x, g):
        results = list(fn(x, g))
        for i, result in enumerate(results):
            result.mul_(i + 2).add_(1.0)
        return (*results, x, g)

    compiled = torch.compile(fn, backend=backend, fullgraph=True)

    def outside(x, g):
        results = list(compiled(x, g))
        for i, result in enumerate(results):
            result.mul_(i + 2).add_(1.0)
        return (*results, x, g)

    args = operands("btk btk")
    inside = torch.compile(changed, backend=backend, fullgraph=True)
    with torch.no_grad():
        want = changed(*(x.clone() for x in args))
        for run in (inside, outside):
            got = run(*(x.clone() for x in args))
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    assert all(report.rewrites for report in backend.reports)


# Types.


@pytest.mark.parametrize("then", ["eager", "aot_eager"])
def test_narrow_operands_and_a_wide_state(then):
    def fn(q, k, v, g):
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
        S, o = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[-1]), torch.zeros_like(v)
        for t in range(q.shape[1]):
            S = S * torch.sigmoid(g[:, t])[..., None, None]
            S = S + k[:, t].float()[..., None] * v[:, t].float()[..., None, :]
            o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t].float(), S).to(v.dtype)
        return o, S

    assert_rewritten(fn, operands("bthk bthk bthv bth"), "simple_gla", tolerance=5e-2, then=then)


KINDS = {fn.__name__: (fn, families, axes) for fn, families, axes, _ in (c.values for c in CASES)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_types_of_each_family(kind, dtype):
    fn, families, axes = KINDS[kind]
    assert_rewritten(fn, [x * 0.5 for x in operands(axes, dtype=dtype)], families)


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_for_all_lengths(kind):
    fn, _, axes = KINDS[kind]
    backend = Passes()
    compiled = torch.compile(fn, backend=backend, fullgraph=True)
    for length in (7, 5, 11):
        args = [x * 0.5 for x in operands(axes, t=length)]
        assert_same(fn, dynamic_in_time(compiled, axes), args)
    assert backend.graphs == 1 and backend.report.rewrites and not backend.report.refusals

"""Generic loops: what has no family runs step by step with right values and gradients, and only its core does."""

import pytest
import torch
import torch.nn.functional as F
from programs import Passes, assert_looped, assert_same, bare, dynamic_in_time, operands

from fla_compile.kernels import loop_ops
from fla_compile.passes import splice

QKVG = "bthk bthk bthv bthk"


def lstm(x, Wi, Wh, h, c):
    outs = []
    for t in range(x.shape[1]):
        i, f, g, u = (x[:, t] @ Wi + h @ Wh).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)  # here
        h = torch.sigmoid(u) * torch.tanh(c)
        outs.append(h)
    return torch.stack(outs, 1), h, c


def gru(x, Wi, Wh, h):
    outs = []
    for t in range(x.shape[1]):
        r, z, n = (x[:, t] @ Wi).chunk(3, -1)
        hr, hz, hn = (h @ Wh).chunk(3, -1)  # here
        z = torch.sigmoid(z + hz)
        h = (1 - z) * torch.tanh(n + torch.sigmoid(r + hr) * hn) + z * h
        outs.append(h)
    return torch.stack(outs, 1), h


def elman(x, W, U, P, h):
    outs = []
    for t in range(x.shape[1]):
        h = torch.tanh(x[:, t] @ W + h @ U)  # here
        outs.append((h @ P).relu())
    return torch.stack(outs, 1), h


def tanh_of_a_matrix(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = torch.tanh(S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :])  # here
        o[:, t] = F.silu((q[:, t].unsqueeze(-2) @ S).squeeze(-2))
    return o, S


def in_place(q, k, v, g):
    S, o = bare(q, v) + 0, torch.zeros_like(v)
    for t in range(q.shape[1]):
        S.mul_(torch.sigmoid(g[:, t])[..., None])
        S.add_(k[:, t][..., None] * v[:, t][..., None, :])
        S.clamp_(-1.0, 1.0)  # here
        o[:, t] = (q[:, t].unsqueeze(-2) @ S).squeeze(-2)
    return o, S


def out_of_place(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        S = S.clamp(-1.0, 1.0)
        o[:, t] = (q[:, t].unsqueeze(-2) @ S).squeeze(-2)
    return o, S


def momentum(q, k, v, g):
    """Titans: the surprise is read from the state that it updates."""
    S, M, o = bare(q, v), bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        u = torch.einsum("bhk,bhkv->bhv", k[:, t], S) - v[:, t]
        M = 0.9 * M - 0.1 * k[:, t][..., None] * u[..., None, :]  # here
        S = torch.sigmoid(g[:, t])[..., None] * S + M
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S, M


def maximum(x, g):
    h, outs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = torch.maximum(h * torch.sigmoid(g[:, t]), x[:, t])  # here
        outs.append(h)
    return torch.stack(outs, 1)


def branch_by_where(x, g):
    h, outs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = torch.where(h > 0.5, h * 0.5, h + x[:, t])  # here
        outs.append(h * g[:, t])
    return torch.stack(outs, 1), h


PROGRAMS = [
    (lstm, "btk kx dx bd bd", {"x": 20, "d": 5}, "unknown_recurrence"),
    (gru, "btk kx dx bd", {"x": 15, "d": 5}, "unsupported_op"),
    (elman, "btk kd dd dv bd", {"d": 5}, "unsupported_op"),
    (tanh_of_a_matrix, QKVG, {}, "unsupported_op"),
    (in_place, QKVG, {}, "unsupported_op"),
    (momentum, QKVG, {}, "unknown_recurrence"),
    (maximum, "btk btk", {}, "unsupported_op"),
    (branch_by_where, "btk btk", {}, "unsupported_op"),
]
IDS = [fn.__name__ for fn, *_ in PROGRAMS]


@pytest.mark.parametrize("fn, axes, sizes, reason", PROGRAMS, ids=IDS)
def test_looped(fn, axes, sizes, reason):
    reference = out_of_place if fn is in_place else None
    report = assert_looped(fn, operands(axes, **sizes), reason, reference=reference)
    assert report.rewrites[0].kernel == "looped step"


@pytest.mark.parametrize("fn, axes, sizes", [p[:3] for p in PROGRAMS[:4]], ids=IDS[:4])
def test_gradients_through_aot(fn, axes, sizes):
    reason = dict((p[0], p[3]) for p in PROGRAMS)[fn]
    assert_looped(fn, operands(axes, **sizes), reason, then="aot_eager")


@pytest.mark.parametrize("fn, axes, sizes, reason", [PROGRAMS[1], PROGRAMS[3]], ids=["gru", "matrix"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types(fn, axes, sizes, reason, dtype):
    assert_looped(fn, [x * 0.5 for x in operands(axes, dtype=dtype, **sizes)], reason)


@pytest.mark.parametrize("fn, axes, sizes", [PROGRAMS[0][:3], PROGRAMS[3][:3]], ids=["lstm", "matrix"])
def test_one_graph_for_all_lengths(fn, axes, sizes):
    backend = Passes()
    compiled = torch.compile(fn, backend=backend, fullgraph=True)
    for length in (7, 5, 11):
        assert_same(fn, dynamic_in_time(compiled, axes), operands(axes, t=length, **sizes))
    assert backend.graphs == 1
    assert all(report.rewrites[0].family == "generic" for report in backend.reports)


def test_the_graph_does_not_grow_with_time():
    axes, sizes, reason = PROGRAMS[0][1:]
    reports = [assert_looped(lstm, operands(axes, t=t, **sizes), reason) for t in (3, 40)]
    assert len({r.rewrites[0].nodes_after for r in reports}) == 1


def test_without_gradients_nothing_is_kept():
    backend, args = Passes(), operands(QKVG)
    with torch.no_grad():
        got = torch.compile(tanh_of_a_matrix, backend=backend, fullgraph=True)(*args)
    torch.testing.assert_close(got, tanh_of_a_matrix(*args), rtol=2e-5, atol=2e-5)
    assert [r.family for r in backend.report.rewrites] == ["generic"]


def test_only_what_needs_the_state_is_in_the_loop(monkeypatch):
    """Projections before and behind the core run for all steps at once: the step holds one matrix product of three."""
    steps = []

    def register(step, carries, reads):
        steps.append([node.target for node in step.graph.nodes])
        return loop_ops.register_step(step, carries, reads)

    monkeypatch.setattr(splice, "register_step", register)
    assert_looped(elman, operands("btk kd dd dv bd", d=5), "unsupported_op")
    (targets,) = steps
    assert targets.count(torch.ops.aten.mm.default) == 1 and torch.ops.aten.relu.default not in targets


def test_states_and_outputs_are_memory_of_their_own():
    """The caller may update any of them in place, and none of the others changes."""

    def fn(x, W, U, h):
        outs = []
        for t in range(x.shape[1]):
            h = torch.tanh(x[:, t] @ W + h @ U)
            outs.append(h)
        return torch.stack(outs, 1), h

    args = operands("btk kd dd bd", d=5)
    with torch.no_grad():
        o, h = torch.compile(fn, backend=Passes(), fullgraph=True)(*args)
        kept, given = o.clone(), args[3].clone()
        h.add_(1.0)
    assert torch.equal(o, kept) and torch.equal(args[3], given)


def test_a_step_that_returns_its_old_state():
    def fn(x, W):
        h, outs = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            outs.append(h)
            h = torch.tanh(x[:, t] + h @ W)  # here
        return torch.stack(outs, 1)

    assert_looped(fn, operands("btk kk"), "unsupported_op")


def test_two_loops_of_one_step_share_what_is_compiled():
    def layer(x, W):
        h, outs = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = torch.tanh(x[:, t] + h @ W)
            outs.append(h)
        return torch.stack(outs, 1)

    def fn(x, W, U):
        return layer(layer(x, W), U)

    backend, args = Passes(), operands("btk kk kk")
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), args)
    assert [r.family for r in backend.report.rewrites] == ["generic", "generic"]
    assert [r.reason for r in backend.report.refusals] == ["unsupported_op"]  # of one line

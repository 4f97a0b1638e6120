"""Lowering: one graph for all lengths, states in and out with their gradients, and the parts beside the core."""

import pytest
import torch
import torch.nn.functional as F
from programs import Passes, assert_rewritten, assert_same, operands


def gla(q, k, v, g, S0):
    S, o = S0, torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


def merged_with_norm(q, k, v, g):
    """Heads merged with features, a norm after: sizes must be found again where they are dynamic."""
    S = q.new_zeros(q.shape[0], 2, 4, 6)
    outs = []
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[:, :, None, None]
        S = S + k[:, t].view(-1, 2, 4, 1) * v[:, t].view(-1, 2, 1, 6)
        y = (q[:, t].view(-1, 2, 1, 4) @ S).squeeze(2)
        outs.append(F.layer_norm(y, (6,)).reshape(q.shape[0], 12))
    return torch.stack(outs, 1), S


PROGRAMS = [(gla, "bthk bthk bthv bthk bhkv"), (merged_with_norm, "btD btD btE bth")]
LENGTHS = (7, 5, 11, 30, 8)


@pytest.mark.parametrize("fn, axes", PROGRAMS, ids=["gla", "merged"])
@pytest.mark.parametrize("marked, most", [(True, 1), (False, 2)], ids=["marked", "automatic"])
def test_one_graph_for_all_lengths(fn, axes, marked, most):
    backend = Passes()
    compiled = torch.compile(fn, backend=backend, fullgraph=True)

    def call(*args):
        for x, letters in zip(args, axes.split(), strict=True):
            if marked and "t" in letters:
                torch._dynamo.mark_dynamic(x, letters.index("t"))
        return compiled(*args)

    for length in LENGTHS:
        # float64: a norm of a state that is still small magnifies roundings.
        assert_same(fn, call, operands(axes, t=length, D=8, E=12, dtype=torch.float64))
    assert backend.graphs <= most
    assert all(len(report.rewrites) == 1 and not report.refusals for report in backend.reports)


@pytest.mark.parametrize("fn, axes", PROGRAMS, ids=["gla", "merged"])
def test_one_graph_for_all_batches_and_lengths(fn, axes):
    backend = Passes()
    compiled = torch.compile(fn, backend=backend, fullgraph=True, dynamic=True)
    for batch, length in ((3, 7), (7, 5), (5, 9), (9, 3)):
        assert_same(fn, compiled, operands(axes, b=batch, t=length, D=8, E=12, dtype=torch.float64))
    assert backend.graphs == 1
    assert backend.report.rewrites and not backend.report.refusals


def test_a_dynamic_graph_is_right_under_aot():
    backend = Passes(then="aot_eager")
    compiled = torch.compile(gla, backend=backend, fullgraph=True)
    for length in LENGTHS[:3]:
        assert_same(gla, compiled, operands(PROGRAMS[0][1], t=length))
    assert backend.graphs <= 2


def test_the_graph_does_not_grow_with_time():
    sizes = {assert_rewritten(gla, operands(PROGRAMS[0][1], t=t), "gla").rewrites[0].nodes_after for t in (3, 40)}
    assert len(sizes) == 1


@pytest.mark.parametrize("axes", ["bhkv", "hkv", "kv"])
def test_the_initial_state_gets_its_gradient(axes):
    def fn(q, k, v, g, S0):
        return gla(q, k, v, g, S0.expand(q.shape[0], q.shape[2], -1, -1))

    args = operands("bthk bthk bthv bthk", axes)
    leaf = args[4].requires_grad_()
    backend = Passes(then="aot_eager")
    o, S = torch.compile(fn, backend=backend, fullgraph=True)(*args)
    got = torch.autograd.grad(o.sum() + S.cos().sum(), leaf)[0]
    o, S = fn(*args)
    torch.testing.assert_close(got, torch.autograd.grad(o.sum() + S.cos().sum(), leaf)[0], rtol=2e-5, atol=2e-5)
    assert got.abs().max() > 0 and backend.report.rewrites


def test_a_final_state_alone_gets_its_gradient():
    def fn(k, v, g, S0):
        S = S0
        for t in range(k.shape[1]):
            S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        return S.tanh()

    assert_rewritten(fn, operands("bthk bthv bthk bhkv"), "gla", then="aot_eager")


def test_outputs_without_the_state():
    """What a loop returns but does not read from the state: mapped over time, or repeated."""

    def fn(q, k, v, w):
        S, o = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), torch.zeros_like(v)
        gates, same = [], []
        for t in range(q.shape[1]):
            S = S * 0.9 + k[:, t][..., None] * v[:, t][..., None, :]
            o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
            gates.append(F.silu(q[:, t]) * w)
            same.append(w.exp())
        return o, torch.stack(gates, 1), torch.stack(same)

    assert_rewritten(fn, operands("bthk bthk bthv hk"), "retention")


def test_a_state_that_never_changes():
    def fn(q, k, v, w):
        S, o, held = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), torch.zeros_like(v), w
        for t in range(q.shape[1]):
            S = S * 0.9 + k[:, t][..., None] * v[:, t][..., None, :]
            o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
            held = held.clone()
        return o, held

    assert_rewritten(fn, operands("bthk bthk bthv hk"), "retention")


def test_one_output_written_twice():
    def fn(q, k, v):
        S, o, p = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), torch.zeros_like(v), torch.zeros_like(v)
        for t in range(q.shape[1]):
            S = S * 0.9 + k[:, t][..., None] * v[:, t][..., None, :]
            y = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
            o[:, t] = y
            p[:, t] = y
        return o, p

    report = assert_rewritten(fn, operands("bthk bthk bthv"), "retention")
    assert report.graph("after").count("torch.ops.fla_compile.retention") == 1


def test_parts_that_need_views_of_other_strides():
    """A view that is legal on one step's slice need not be on all of them: it becomes a reshape."""

    def fn(q, k, v):
        S, outs = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), []
        q, k = q.transpose(1, 2), k.permute(1, 0, 3, 2)
        for t in range(q.shape[2]):
            k_t = F.relu(k[t]).transpose(1, 2)
            S = S * 0.9 + k_t[..., None] * v[:, t][..., None, :]
            y = torch.einsum("bhk,bhkv->bhv", q[:, :, t], S)
            outs.append(F.silu(y.view(y.shape[0], -1)).view(-1, 2, 2, 3).transpose(1, 3))
        return torch.stack(outs)

    assert_rewritten(fn, operands("bthk bthk bthv"), "retention")


def test_mixed_types():
    def fn(q, k, v, g):
        q, k = q.bfloat16(), k.half()
        S, o = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), torch.zeros_like(v)
        for t in range(q.shape[1]):
            S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t].float()[..., None] * v[:, t][..., None, :]
            o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t].float(), S)
        return o, S

    assert_rewritten(fn, operands("bthk bthk bthv bthk"), "gla", tolerance=5e-2)


def test_under_inductor():
    assert_rewritten(gla, operands(PROGRAMS[0][1], t=70), "gla", then="inductor", tolerance=1e-4)

"""Read-outs: where a step reads its state, and what stands between the read-outs and the outputs of a step."""

import pytest
import torch
import torch.nn.functional as F
from programs import Cases, assert_looped, assert_rewritten, bare, operands, over_time

CASES = Cases()


@CASES("gla", "bthk bthk bthv bthk bhvk")
def transposed_initial_and_final_state(q, k, v, g, S0):
    S, o = S0.transpose(-1, -2), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.exp(-(g[:, t] ** 2))[..., None] + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        o[:, t] = (S * q[:, t][..., None]).sum(2)
    return o, S.mT


@CASES("gla", "bthk bthv bthk bhkv")
def only_the_final_state(k, v, g, S0):
    S = S0
    for t in range(k.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
    return S


@CASES("linear_attention", "bthk bthk bthv")
def normaliser(q, k, v):
    S, z, o = bare(q, v), torch.zeros_like(q[:, 0]), torch.zeros_like(v)
    for t in range(q.shape[1]):
        q_t, k_t = F.elu(q[:, t]) + 1, F.elu(k[:, t]) + 1
        S = S + k_t[..., None] * v[:, t][..., None, :]
        z = z + k_t
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q_t, S) / ((q_t * z).sum(-1, keepdim=True) + 1e-6)
    return o, S, z


@CASES("gla", "bthk bthk bthv bthk")
def gated_normaliser_with_a_floor(q, k, v, g):
    S, z, o = bare(q, v), torch.zeros_like(q[:, 0]), torch.zeros_like(v)
    for t in range(q.shape[1]):
        a = torch.sigmoid(g[:, t])
        S = S * a[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        z = z * a + k[:, t]
        norm = torch.einsum("bhk,bhk->bh", q[:, t], z).abs().clamp(min=1.0)
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S) / norm[..., None]
    return o


@CASES("gla", "bthk bthk bthv bthk bthv v")
def norm_and_gate_after(q, k, v, g, gate, weight):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        y = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
        o[:, t] = F.rms_norm(y, (y.shape[-1],), weight) * F.silu(gate[:, t])
    return o


@CASES("linear_attention", "bthk bthk bthv")
def feature_maps_and_normalised_keys(q, k, v):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        k_t = F.normalize(k[:, t], dim=-1)
        S = S + k_t[..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", F.relu(q[:, t]).softmax(-1), S)
    return o


@CASES("simple_gla", "btD Dk Dk Dv D Dv", D=5)
def a_whole_cell(x, wq, wk, wv, wg, wo):
    S, outs = x.new_zeros(x.shape[0], wq.shape[1], wv.shape[1]), []
    for t in range(x.shape[1]):
        x_t = x[:, t]
        S = S * torch.sigmoid(x_t @ wg)[:, None, None] + (x_t @ wk)[:, :, None] * (x_t @ wv)[:, None, :]
        outs.append((((x_t @ wq).unsqueeze(1) @ S).squeeze(1) @ wo.T + x_t).tanh())
    return torch.stack(outs, 1), S


@CASES("simple_gla + gla", "bthk bthk bthv bthk bth")
def two_independent_states(q, k, v, g, h):
    S, R, o = bare(q, v), bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        kv = k[:, t][..., None] * v[:, t][..., None, :]
        S = S * torch.sigmoid(g[:, t])[..., None] + kv
        R = R * torch.sigmoid(h[:, t])[..., None, None] + kv
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S) * torch.einsum("bhk,bhkv->bhv", k[:, t], R).sigmoid()
    return o, S, R


@CASES("gla", "bthk bthk bthv bthk")
def same_tensor_in_two_roles(q, k, v, g):
    S, o = q.new_zeros(*q.shape[:1], *q.shape[2:], q.shape[-1]), torch.zeros_like(q)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * k[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", k[:, t], S)
    return o, S


# More queries than states.


@CASES.cell("simple_gla", "bhkv bthgk bthk bthv bth", g=3)
def grouped_queries(S, q, k, v, g):
    S = S * torch.sigmoid(g)[..., None, None] + k[..., None] * v[..., None, :]
    return torch.einsum("bhgk,bhkv->bhgv", q, S), S


@CASES.cell("gla", "bhkv btghk bthk bthv bthk", g=2)
def grouped_queries_in_another_order(S, q, k, v, g):
    S = S * torch.sigmoid(g)[..., None] + k[..., None] * v[..., None, :]
    return q.movedim(1, 2) @ S, S


@CASES.cell("linear_attention", "bkv bthk btk btv")
def one_state_for_all_heads(S, q, k, v):
    S = S + k[..., None] * v[..., None, :]
    return q @ S, S


@CASES.cell("gla", "bhkv bthgk bthk bthv bthv", g=2)
def grouped_queries_and_a_decay_over_values(S, q, k, v, g):
    S = S * torch.sigmoid(g)[..., None, :] + k[..., None] * v[..., None, :]
    return q @ S, S


@CASES.cell("simple_gla", "bhkv bthgk bthk bthv bth", g=3)
def grouped_queries_read_before(S, q, k, v, g):
    o = torch.einsum("bhgk,bhkv->bhgv", q, S)
    return o, S * torch.sigmoid(g)[..., None, None] + k[..., None] * v[..., None, :]


# What a read-out may add, and what may follow it.


@CASES.cell("linear_attention", "bhkv bthk bthk bthv v")
def skip_connection(S, q, k, v, D):
    S = S + k[..., None] * v[..., None, :]
    return torch.einsum("bhk,bhkv->bhv", q, S) + D * v, S


@CASES.cell("retention", "bhkv bthk bthk bthv")
def read_before_and_after(S, q, k, v):
    o = torch.einsum("bhk,bhkv->bhv", q, S)
    S = S * 0.9 + k[..., None] * v[..., None, :]
    return o * torch.einsum("bhk,bhkv->bhv", k, S), S


@CASES.cell("simple_gla", "bhkv bthk bthk bthv bth hvd", d=5)
def projected_by_heads(S, q, k, v, g, W):
    S = S * torch.sigmoid(g)[..., None, None] + k[..., None] * v[..., None, :]
    return torch.einsum("bhk,bhkv,hvd->bd", q, S, W).relu(), S


@CASES.cell("linear_attention", "bhkv bthk bthk bthv")
def difference_of_two_read_outs(S, q, k, v):
    S = S + k[..., None] * v[..., None, :]
    return torch.einsum("bhk,bhkv->bhv", q, S).softmax(-1) - torch.einsum("bhk,bhkv->bhv", k, S).softmax(-1), S


@pytest.mark.parametrize("fn, families, axes, sizes", CASES)
def test_recognised(fn, families, axes, sizes):
    (rewrite,) = assert_rewritten(fn, operands(axes, **sizes), families).rewrites
    assert rewrite.source.startswith(("test_read_outs.py:", "programs.py:"))


def usual(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None, None] + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


@CASES("simple_gla", "bthk bthk bthv bth")
def only_the_outputs(q, k, v, g):
    return usual(q, k, v, g)[0]


def test_a_written_matrix_of_higher_rank():
    """A sum over heads makes the written matrix an operand of its own, no smaller than the state."""

    def fn(q, k, v):
        S, o = q.new_zeros(q.shape[0], q.shape[-1], v.shape[-1]), torch.zeros_like(v[:, :, 0])
        for t in range(q.shape[1]):
            S = S + torch.einsum("bhk,bhv->bkv", k[:, t], v[:, t])
            o[:, t] = torch.einsum("bk,bkv->bv", q[:, t, 0], S)
        return o, S

    assert_rewritten(fn, operands("bthk bthk bthv"), "linear_scan")


def test_a_quadratic_form_is_a_read_out_and_a_product():
    def fn(q, k, v, u):
        S, outs = bare(q, v), []
        for t in range(q.shape[1]):
            S = S * 0.9 + k[:, t][..., None] * v[:, t][..., None, :]
            outs.append(torch.einsum("bhk,bhkv,bhv->bh", q[:, t], S, u[:, t]))
        return torch.stack(outs, 1)

    assert_rewritten(fn, operands("bthk bthk bthv bthv"), "retention")


def test_two_read_outs_of_one_state():
    def fn(q, r, k, v):
        S, o, p = bare(q, v), torch.zeros_like(v), []
        for t in range(q.shape[1]):
            S = S + k[:, t][..., None] * v[:, t][..., None, :]
            o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
            p.append(torch.einsum("bhk,bhkv->bhv", r[:, t], S))
        return o, torch.stack(p, 1), S

    report = assert_rewritten(fn, operands("bthk bthk bthk bthv"), "linear_attention")
    assert report.graph("after").count("torch.ops.fla_compile.linear_attention") == 2


def test_a_normaliser_that_is_one_more_column():
    """z as a state [K, 1] of its own, read by the same query."""

    def fn(q, k, v, g):
        S, z, o = bare(q, v), q.new_zeros(*q.shape[:1], *q.shape[2:], 1), torch.zeros_like(v)
        for t in range(q.shape[1]):
            a, q_t, k_t = torch.sigmoid(g[:, t])[..., None, None], q[:, t].exp(), k[:, t].exp()
            S = S * a + k_t[..., None] * v[:, t][..., None, :]
            z = z * a + k_t[..., None]
            o[:, t] = (q_t.unsqueeze(-2) @ S).squeeze(-2) / (q_t.unsqueeze(-2) @ z).squeeze(-2)
        return o, S, z

    assert_rewritten(fn, operands("bthk bthk bthv bth"), "simple_gla")


def test_a_normaliser_read_before_the_update():
    def fn(q, k, v):
        S, z, o = bare(q, v), torch.ones_like(q[:, 0]), torch.zeros_like(v)
        for t in range(q.shape[1]):
            q_t, k_t = q[:, t].exp(), k[:, t].exp()
            o[:, t] = torch.einsum("bhk,bhkv->bhv", q_t, S) / (q_t * z).sum(-1, keepdim=True)
            S = S + k_t[..., None] * v[:, t][..., None, :]
            z = z + k_t
        return o, S, z

    assert_rewritten(fn, operands("bthk bthk bthv"), "linear_attention")


# The state is used in another way than through a query: it runs all the same.


def size_of_the_state(S, q, k, v, g):
    S = S * torch.sigmoid(g)[..., None] + k[..., None] * v[..., None, :]
    o = (q[..., None] * S).sum(-2)
    return o * (S * S).sum((-2, -1))[..., None], S  # here


def matrix_that_multiplies_another_state(S, q, k, v, g):
    S = S * torch.sigmoid(g)[..., None] + k[..., None] * v[..., None, :]
    return (q[..., None] * S.abs()).sum(-2), S  # here


def softmax_of_the_state(S, q, k, v, g):
    S = S * torch.sigmoid(g)[..., None] + k[..., None] * v[..., None, :]
    return (q[..., None] * S.softmax(-2)).sum(-2), S  # here


LOOPED = [
    (size_of_the_state, "state_escapes", ""),
    (matrix_that_multiplies_another_state, "unsupported_op", "abs"),
    (softmax_of_the_state, "unsupported_op", "softmax"),
]


@pytest.mark.parametrize("cell, reason, detail", LOOPED, ids=[cell.__name__ for cell, *_ in LOOPED])
def test_looped_where_the_state_is_large(cell, reason, detail):
    """Large beside what a step reads: not all of its steps can be kept."""
    axes = "bhkv bthk bthk bthv bthk"
    assert_looped(over_time(cell, axes), operands(axes, k=16, v=24), reason, detail)


@pytest.mark.parametrize("cell", [cell for cell, *_ in LOOPED], ids=[cell.__name__ for cell, *_ in LOOPED])
def test_scanned_where_the_state_is_small(cell):
    """A small state is handed out at every step, and what is computed from it runs after the loop."""
    axes = "bhkv bthk bthk bthv bthk"
    assert_rewritten(over_time(cell, axes), operands(axes, k=3, v=3), "linear_scan")

"""Elementwise and selective scans: HGRN, minGRU, RG-LRU, Mamba; decays of any sign; states kept at every step."""

import pytest
import torch
import torch.nn.functional as F
from programs import (
    Cases,
    Passes,
    assert_looped,
    assert_rewritten,
    assert_same,
    bare,
    dynamic_in_time,
    operands,
    over_time,
)

CASES = Cases()

# linear_scan: h' = a * h + b


@CASES.cell("linear_scan", "bk btk btk")
def hgrn(h, x, f):
    a = torch.sigmoid(f)
    h = a * h + (1 - a) * x
    return h, h


@CASES.cell("linear_scan", "bk btk btk")
def by_lerp(h, x, z):
    h = torch.lerp(h, x, torch.sigmoid(z))
    return torch.tanh(h), h


@CASES.cell("linear_scan", "bk btk btk btk kd", d=3)
def min_gru(h, z, x, gate, W):
    z = torch.sigmoid(z)
    h = (1 - z) * h + z * F.relu(x)
    return torch.nn.functional.silu(gate) * h, h


@CASES.cell("linear_scan", "bk btk btk k")
def rg_lru(h, x, r, L):
    log_a = -8 * F.softplus(L) * torch.sigmoid(r)
    h = torch.exp(log_a) * h + torch.sqrt(1 - torch.exp(2 * log_a)) * x
    return h, h


@CASES.cell("linear_scan", "bk btk btk")
def decay_of_unknown_sign(h, x, a):
    h = a * h + x
    return h * x, h


@CASES.cell("linear_scan", "bk btk btk")
def negative_decay(h, x, g):
    h = x - torch.sigmoid(g) * h
    return h, h


@CASES.cell("linear_scan", "bk btk bt")
def scalar_decay(h, x, a):
    h = a[:, None] * h + x
    return h, h


@CASES.cell("linear_scan", "bk btk btk")
def read_before_the_update(h, x, a):
    return h.exp(), torch.sigmoid(a) * h + x


@CASES.cell("linear_scan", "bk btk btk")
def cumulative_sum(h, x, y):
    h = h + x * y
    return h / 2, h


@CASES.cell("linear_scan", "bk btk btk")
def constant_decay_of_a_difference(h, x, y):
    h = 0.5 * (h + x) - y
    return h, h


@CASES.cell("linear_scan", "bhkv bthk bthv bthv")
def a_matrix_kept_at_every_step(S, k, v, g):
    S = S * torch.sigmoid(g)[..., None, :] + k[..., None] * v[..., None, :]
    return S, S


@CASES.cell("linear_scan", "bhkv bthk bthv bthkv")
def a_decay_of_its_own_for_each_element(S, k, v, a):
    S = S * a.tanh() + k[..., None] * v[..., None, :]
    return (k[..., None] * S).sum(-2), S


@CASES("linear_scan", "btk btk")
def from_the_first_input(x, g):
    h, outs = x[:, 0], []
    for t in range(x.shape[1]):
        h = torch.sigmoid(g[:, t]) * h + x[:, t]
        outs.append(h)
    return torch.stack(outs, 1)


@CASES("linear_scan", "btk btk")
def in_place_into_the_output(x, g):
    h, o = torch.zeros_like(x[:, 0]), torch.empty_like(x)
    for t in range(x.shape[1]):
        h = torch.sigmoid(g[:, t]) * h + x[:, t]
        o[:, t] = h
    return o


@CASES("linear_scan", "btk btk btk")
def two_scans_of_one_loop(x, g, f):
    h, r, o = torch.zeros_like(x[:, 0]), torch.ones_like(x[:, 0]), torch.empty_like(x)
    for t in range(x.shape[1]):
        h = torch.sigmoid(g[:, t]) * h + x[:, t]
        r = f[:, t] * r - h
        o[:, t] = h * r
    return o, r


# selective_scan: h' = exp(dt A) h + (dt x) B^T, y = h C


@CASES.cell("selective_scan", "bdn btd btd btn btn dn d", d=5, n=3)
def mamba(h, x, dt, B, C, A, D):
    dt, A = F.softplus(dt), -torch.exp(A)
    h = h * torch.exp(dt[..., None] * A) + (dt * x)[..., None] * B[:, None, :]
    return (h * C[:, None, :]).sum(-1) + D * x, h


@CASES.cell("selective_scan", "bdn btd btd btn btn dn", d=5, n=3)
def mamba_by_einsum(h, x, dt, B, C, A):
    h = torch.exp(torch.einsum("bd,dn->bdn", dt.exp(), -A.exp())) * h + torch.einsum("bd,bn,bd->bdn", dt.exp(), B, x)
    return torch.einsum("bdn,bn->bd", h, C), h


@CASES.cell("selective_scan", "bnd btd btd btn btn nd", d=5, n=3)
def mamba_with_the_state_first(h, x, dt, B, C, A):
    h = torch.exp(F.softplus(dt)[:, None] * -A.exp()) * h + B[..., None] * (F.softplus(dt) * x)[:, None]
    return (C.unsqueeze(1) @ h).squeeze(1) * F.silu(x), h


@CASES("selective_scan", "btd btd btn btn dn", d=5, n=3)
def mamba_from_zeros(x, dt, B, C, A):
    h, outs, A = x.new_zeros(x.shape[0], x.shape[2], A.shape[1]), [], -torch.exp(A)
    for t in range(x.shape[1]):
        step = F.softplus(dt[:, t])
        h = torch.exp(step[..., None] * A) * h + (step * x[:, t])[..., None] * B[:, t, None, :]
        outs.append(torch.einsum("bdn,bn->bd", h, C[:, t]))
    return torch.stack(outs, 1)


@CASES("linear_scan", "btd btd btn btn dn", d=5, n=3)
def mamba_with_its_decay_before_the_loop(x, dt, B, C, A):
    """The decay is an operand [B,T,D,N], as large as the states."""
    h, outs = x.new_zeros(x.shape[0], x.shape[2], A.shape[1]), []
    decay = torch.exp(F.softplus(dt)[..., None] * -A.exp())
    write = (F.softplus(dt) * x)[..., None] * B[:, :, None]
    for t in range(x.shape[1]):
        h = decay[:, t] * h + write[:, t]
        outs.append(torch.einsum("bdn,bn->bd", h, C[:, t]))
    return torch.stack(outs, 1), h


# Near misses of the selective scan.


@CASES.cell("linear_scan", "bdn btd btn btn btn dn", d=5, n=3)
def a_step_that_depends_on_the_keys(h, x, dt, B, C, A):
    h = h * torch.exp(-dt.exp()[:, None] * A.exp()) + x[..., None] * B[:, None, :]
    return (h * C[:, None, :]).sum(-1), h


@CASES.cell("linear_scan", "bdn btd btd btn btn dn", d=5, n=3)
def mamba_read_before_the_update(h, x, dt, B, C, A):
    y = (h * C[:, None, :]).sum(-1)
    return y, h * torch.exp(-F.softplus(dt)[..., None] * A.exp()) + x[..., None] * B[:, None, :]


@CASES.cell("linear_scan", "bdn btd btd btn btn dn", d=5, n=3)
def an_exponent_of_two_terms(h, x, dt, B, C, A):
    h = h * torch.exp(-F.softplus(dt)[..., None] * A.exp() - x.square()[..., None]) + x[..., None] * B[:, None, :]
    return (h * C[:, None, :]).sum(-1), h


@pytest.mark.parametrize("fn, families, axes, sizes", CASES)
def test_recognised(fn, families, axes, sizes):
    report = assert_rewritten(fn, operands(axes, **sizes), families)
    assert len(report.rewrites) == 1


def case(name):
    return next(c.values for c in CASES if c.id == name)


@pytest.mark.parametrize("name", ["hgrn", "decay_of_unknown_sign", "mamba", "a_matrix_kept_at_every_step"])
@pytest.mark.parametrize("length", [2, 70])
def test_lengths(name, length):
    fn, families, axes, sizes = case(name)
    args = [x * 0.3 for x in operands(axes, t=length, **sizes)]
    assert_rewritten(fn, args, families)


@pytest.mark.parametrize("name", ["hgrn", "decay_of_unknown_sign", "mamba"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types(name, dtype):
    fn, families, axes, sizes = case(name)
    assert_rewritten(fn, [x * 0.5 for x in operands(axes, dtype=dtype, **sizes)], families)


@pytest.mark.parametrize("name", ["hgrn", "mamba"])
def test_gradients_through_aot(name):
    fn, families, axes, sizes = case(name)
    assert_rewritten(fn, operands(axes, **sizes), families, then="aot_eager")


@pytest.mark.parametrize("a", [0.0, -1.0, 1.0], ids=["zero", "minus one", "one"])
def test_decays_at_the_edge(a):
    """Where the decay is zero its gradient is the state before, not nothing."""
    fn, families, axes, _ = case("decay_of_unknown_sign")
    h, x, decay = operands(axes)
    decay[:, ::2] = a
    assert_rewritten(fn, (h, x, decay), families)


@pytest.mark.parametrize("name", ["hgrn", "mamba"])
def test_one_graph_for_all_lengths(name):
    fn, _, axes, sizes = case(name)
    backend = Passes()
    compiled = torch.compile(fn, backend=backend, fullgraph=True)
    for length in (7, 5, 11):
        assert_same(fn, dynamic_in_time(compiled, axes), operands(axes, t=length, **sizes))
    assert backend.graphs == 1 and backend.report.rewrites and not backend.report.refusals


# Too large to be kept at every step.


def unknown_sign_of_a_large_state(S, q, k, v, a):
    S = S * a[..., None] + k[..., None] * v[..., None, :]  # here
    return (q[..., None] * S).sum(-2), S


def test_a_large_state_with_a_decay_of_unknown_sign():
    axes = "bhkv bthk bthk bthv bthk"
    fn = over_time(unknown_sign_of_a_large_state, axes)
    assert_looped(fn, operands(axes, k=16, v=24), "decay_sign_unknown", "exp(g)")
    assert_rewritten(fn, operands(axes, k=3, v=3), "linear_scan")


def test_decays_of_unknown_sign_in_inference():
    """Without gradients they go as magnitudes, with their signs in q and k: a matrix kernel at any size."""
    axes = "bhkv bthk bthk bthv bthk"
    fn, args = over_time(unknown_sign_of_a_large_state, axes), operands(axes, k=16, v=24)
    args[4][:, ::3] = 0
    backend = Passes()
    with torch.no_grad():
        got, want = torch.compile(fn, backend=backend, fullgraph=True)(*args), fn(*args)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    assert [r.family for r in backend.report.rewrites] == ["gla"]


def test_the_kept_states_are_used_elsewhere():
    """An escape: the scanned state feeds a read-out, a norm and the final state."""

    def fn(k, v, q, g):
        S, o, sizes = bare(q, v), torch.zeros_like(v), []
        for t in range(q.shape[1]):
            S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
            o[:, t] = (q[:, t][..., None] * S).sum(-2)
            sizes.append(S.square().sum((-1, -2)))
        return o, torch.stack(sizes, 1), S * 2

    report = assert_rewritten(fn, operands("bthk bthv bthk bthk"), "linear_scan")
    assert report.graph("after").count("torch.ops.fla_compile.linear_scan") == 1

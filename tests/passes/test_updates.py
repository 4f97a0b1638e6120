"""Updates: scales, decays and writes of any make are read off as one decay and one write."""

import pytest
import torch
import torch.nn.functional as F
from programs import Cases, Passes, assert_looped, assert_rewritten, bare, operands, over_time, read, write

CASES = Cases()


@CASES("linear_attention", "bthk bthk bthv")
def scale_everywhere(q, k, v):
    S, o = bare(q, v), torch.zeros_like(v)
    half = torch.tensor(0.5)
    for t in range(q.shape[1]):
        S = S + (k[:, t] * 2.0)[..., None] * (v[:, t] / 3)[..., None, :] * half
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t] * q.shape[-1] ** -0.5, S) * half / 5
    return o, S


@CASES("retention", "bthk bthk bthv s", s=1)
def scale_of_an_argument(q, k, v, scale):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = 0.9 * S + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S) * scale
    return o


@CASES("linear_attention", "bthk bthk bthv hv")
def scale_over_values(q, k, v, scale):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S) * scale
    return o


@CASES("linear_attention", "bthk bthk bthv")
def mean_in_place_of_sum(q, k, v):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = (q[:, t][..., None] * S).mean(-2)
    return o


# Decays.


@CASES("retention", "bthk bthk bthv")
def constant_for_each_head(q, k, v):
    gamma = 1 - 2.0 ** (-5 - torch.arange(q.shape[2], dtype=torch.float32))
    S, o = q.new_zeros(q.shape[0], q.shape[2], v.shape[3], q.shape[3]), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = gamma.view(1, -1, 1, 1) * S + v[:, t].unsqueeze(-1) * k[:, t].unsqueeze(-2)
        o[:, t] = torch.matmul(S, q[:, t].unsqueeze(-1)).squeeze(-1) * q.shape[-1] ** -0.5
    return o, S


@CASES("retention", "bthk bthk bthv h")
def learned_for_each_head(q, k, v, w):
    S, o = bare(q, v), torch.zeros_like(v)
    gamma = torch.sigmoid(w)
    for t in range(q.shape[1]):
        S = gamma[:, None, None] * S + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


@CASES("gla", "bthk bthk bthv hk")
def learned_for_each_key(q, k, v, w):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = torch.sigmoid(w)[..., None] * S + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


@CASES("simple_gla", "bthk bthk bthv bt")
def shared_by_the_heads(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[:, None, None, None] + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


@CASES("gla", "bthk bthk bthv tk")
def shared_by_batch_and_heads(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[t])[:, None] + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


@CASES("gla", "bthk bthk bthv bth hk")
def product_of_two(q, k, v, g, w):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.exp2(-g[:, t].abs())[..., None, None] * torch.sigmoid(w)[..., None] * 0.99
        S = S + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


@CASES("gla", "bthk bthv bthk")
def write_of_one_minus_the_decay(q, v, g):
    """HGRN-2: what is forgotten makes room for what is written."""
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        a = torch.sigmoid(g[:, t])
        S = S * a[..., None] + (1 - a)[..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


@CASES("simple_gla", "bthk bthk bthv bth h h")
def mamba2(C, B_, x, dt, A_log, bias):
    """dt = softplus(.), a = exp(dt A): the gate multiplies the write too."""
    S, o = bare(C, x), torch.zeros_like(x)
    A = -A_log.exp()
    for t in range(C.shape[1]):
        step = F.softplus(dt[:, t] + bias)
        S = S * torch.exp(step * A)[..., None, None] + (step[..., None] * B_[:, t])[..., None] * x[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", C[:, t], S)
    return o, S


@CASES.cell("gla", "bhkv bthk bthk bthv bthk")
def moved_towards_what_is_written(S, q, k, v, z):
    """lerp: two terms with the state, one decay 1 - w."""
    S = torch.lerp(S, k[..., None] * v[..., None, :], torch.sigmoid(z)[..., None])
    return torch.einsum("bhk,bhkv->bhv", q, S), S


@CASES.cell("simple_gla", "bhkv bthk bthk bthv bth")
def decay_of_two_terms(S, q, k, v, z):
    w = torch.sigmoid(z)[..., None, None]
    S = S - w * S + k[..., None] * v[..., None, :]
    return torch.einsum("bhk,bhkv->bhv", q, S), S


@CASES.cell("gated_delta_rule", "bhkv bthk bthk bthv bth bth")
def erase_after_a_decay_of_two_terms(S, q, k, v, beta, z):
    S = S - torch.sigmoid(z)[..., None, None] * S
    S = S + write(k, beta[..., None] * (v - read(k, S)))
    return read(q, S), S


@CASES.cell("kda", "bhkv bthk bthk bthv bth bthk")
def erase_after_a_decay_of_two_terms_over_keys(S, q, k, v, beta, z):
    S = S - torch.sigmoid(z)[..., None] * S
    S = S + write(k, beta[..., None] * (v - read(k, S)))
    return read(q, S), S


@CASES.cell("dplr", "bhkv bthk bthk bthv bth bth")
def two_erases_of_one_key(S, q, k, v, b, c):
    S = S - b[..., None, None] * write(k, read(k, S)) - c[..., None, None] * write(k, read(k, S))
    S = S + write((b + c)[..., None] * k, v)
    return read(q, S), S


@CASES.cell("linear_attention", "bhkv bthk bthk bthv bthv")
def two_writes_of_one_key(S, q, k, v, w):
    S = S + k[..., None] * v[..., None, :] - 2 * k[..., None] * w[..., None, :]
    return torch.einsum("bhk,bhkv->bhv", q, S), S


@CASES.cell("linear_attention", "bhkv bthk bthk bthv bthk")
def two_writes_of_one_value(S, q, k, v, l):
    S = S + torch.einsum("bhk,bhv->bhkv", k, v) + torch.einsum("bhk,bhv->bhkv", l, v)
    return torch.einsum("bhk,bhkv->bhv", q, S), S


# Decays over values, or over both.


@CASES.cell("gla", "bhkv bthk bthk bthv bthv")
def decay_over_values(S, q, k, v, g):
    S = S * torch.sigmoid(g)[..., None, :] + write(k, v)
    return read(q, S), S


@CASES.cell("gla", "bhvk bthk bthk bthv bthv")
def decay_over_values_of_values_times_keys(S, q, k, v, g):
    S = S * torch.exp(-F.softplus(g))[..., None] + v[..., None] * k[..., None, :]
    return (S @ q[..., None]).squeeze(-1), S


@CASES.cell("gla", "bhkv bthk bthk bthv bthv bthk")
def decay_over_both(S, q, k, v, g, f):
    S = S * torch.sigmoid(g)[..., None, :] * torch.sigmoid(f)[..., None] + write(k, v)
    return read(q, S), S


@CASES.cell("gla", "bhkv bthk bthk bthv v k")
def constant_decay_over_both(S, q, k, v, g, f):
    S = S * torch.sigmoid(f)[:, None] * torch.sigmoid(g) * 0.9 + write(k, v)
    return read(q, S), S


@CASES.cell("gla", "bhkv bthk bthk bthv bthv")
def decay_over_values_read_before_the_update(S, q, k, v, g):
    return read(q, S), S * torch.sigmoid(g)[..., None, :] + write(k, v)


@CASES.cell("gla", "bhkv bthk bthk bthv bthv bth")
def decay_over_values_and_over_heads(S, q, k, v, g, f):
    S = S * torch.sigmoid(g)[..., None, :] * torch.sigmoid(f)[..., None, None] + write(k, v)
    return read(q, S), S


@pytest.mark.parametrize("fn, families, axes, sizes", CASES)
def test_recognised(fn, families, axes, sizes):
    (rewrite,) = assert_rewritten(fn, operands(axes, **sizes), families).rewrites
    assert rewrite.source.startswith(("test_updates.py:", "programs.py:"))


GATES = {
    "exp": lambda x: torch.exp(-F.softplus(x)),
    "exp2": lambda x: torch.exp2(-x.abs()),
    "sigmoid": torch.sigmoid,
    "special": torch.special.expit,
    "power": lambda x: torch.sigmoid(x) ** (1 / 16),
    "one_minus": lambda x: 1 - torch.sigmoid(x),
    "root": lambda x: torch.sigmoid(x).sqrt(),
    "quotient": lambda x: torch.exp(-x.abs()) / 2,
    "reciprocal": lambda x: torch.reciprocal(torch.exp(x.abs())),
    "log": lambda x: F.logsigmoid(x).mul(0.0625).exp(),
}


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("name", GATES)
def test_gates(name, inside):
    gate = GATES[name]

    def within(q, k, v, g):
        S, o = bare(q, v), torch.zeros_like(v)
        for t in range(q.shape[1]):
            S = S * gate(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
            o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
        return o, S

    def without(q, k, v, g):
        S, o = bare(q, v), torch.zeros_like(v)
        a = gate(g)
        for t in range(q.shape[1]):
            S = S * a[:, t, :, :, None] + k[:, t][..., None] * v[:, t][..., None, :]
            o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
        return o, S

    assert_rewritten(within if inside else without, operands("bthk bthk bthv bthk"), "gla")


def test_decays_of_any_sign_without_gradients():
    """What needs no gradient may be negative or zero: a buffer in training, anything in inference."""

    def fn(q, k, v):
        gamma = torch.tensor([-0.5, 0.0])
        S, o = bare(q, v), torch.zeros_like(v)
        for t in range(q.shape[1]):
            S = S * gamma[:, None, None] + k[:, t][..., None] * v[:, t][..., None, :]
            o[:, t] = (q[:, t][..., None] * S).sum(-2)
        return o, S

    assert_rewritten(fn, operands("bthk bthk bthv"), "retention")


@pytest.mark.parametrize("axes, family", [("bthk", "gla"), ("bth", "simple_gla"), ("hk", "gla"), ("h", "retention")])
def test_any_decay_in_inference(axes, family):
    def fn(q, k, v, a):
        a = a if a.dim() > 2 else a.expand(q.shape[1], *a.shape).unsqueeze(0)
        a = a if axes.endswith("k") else a.unsqueeze(-1)
        S, o = bare(q, v), torch.zeros_like(v)
        for t in range(q.shape[1]):
            S = S * a[:, t, :, :, None] + k[:, t][..., None] * v[:, t][..., None, :]
            o[:, t] = (q[:, t][..., None] * S).sum(-2)
        return o, S

    args = operands("bthk bthk bthv", axes)
    args[3].view(-1)[::3] = 0
    backend = Passes()
    with torch.no_grad():
        got, want = torch.compile(fn, backend=backend, fullgraph=True)(*args), fn(*args)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    # Expanded over time before the loop, a decay counts as one that changes.
    assert [r.family for r in backend.report.rewrites] == [{"retention": "simple_gla"}.get(family, family)]


# Near misses.


def squared(S, q, k, v):
    S = 0.1 * S * S + k[..., None] * v[..., None, :]  # here
    return (q[..., None] * S).sum(-2), S


def transposed(S, q, k, v):
    S = 0.5 * S.mT.contiguous() + k[..., None] * v[..., None, :]  # here
    return (q[..., None] * S).sum(-2), S


def rolled(S, q, k, v):
    S = S.roll(1, -1) + k[..., None] * v[..., None, :]  # here
    return (q[..., None] * S).sum(-2), S


def decay_of_the_state(S, q, k, v):
    S = S * torch.sigmoid(S) + k[..., None] * v[..., None, :]  # here
    return (q[..., None] * S).sum(-2), S


def squashed(S, q, k, v):
    S = torch.tanh(S + k[..., None] * v[..., None, :])  # here
    return (q[..., None] * S).sum(-2), S


def divided_by_its_norm(S, q, k, v):
    S = S / S.norm(dim=-1, keepdim=True).clamp(min=1.0) + k[..., None] * v[..., None, :]  # here
    return (q[..., None] * S).sum(-2), S


def rounded(S, q, k, v):
    S = S.mul(8).round() / 8 + k[..., None] * v[..., None, :]  # here
    return (q[..., None] * S).sum(-2), S


def erases_over_keys_and_over_values(S, q, k, v):
    """The gate is a factor of all the erases, the state is not: its axes differ."""
    S = torch.sigmoid(q.mean(-1))[..., None, None] * S
    S = S - write(k, read(k, S))
    S = S - 0.1 * (S @ v[..., None]) * v[..., None, :] + write(k, v)  # here
    return read(q, S), S


LOOPED = [
    (erases_over_keys_and_over_values, "unknown_recurrence", "ways"),
    (squared, "not_affine", "multiplies states"),
    (transposed, "unknown_recurrence", "moves"),
    (rolled, "unsupported_op", "roll"),
    (decay_of_the_state, "unsupported_op", "sigmoid"),
    (squashed, "unsupported_op", "tanh"),
    (divided_by_its_norm, "unsupported_op", ""),
    (rounded, "unsupported_op", "round"),
]


@pytest.mark.parametrize("cell, reason, detail", LOOPED, ids=[cell.__name__ for cell, *_ in LOOPED])
def test_looped(cell, reason, detail):
    axes = "bhkk bthk bthk bthk"
    assert_looped(over_time(cell, axes), operands(axes), reason, detail)

"""Classify: what a loop is decided to be, with a small state and with a large one; what is refused, at its line."""

import pytest
import torch
import torch.nn.functional as F
from programs import Passes, assert_looped, assert_refused, assert_rewritten, assert_same, bare, operands

AXES = "bthk bthk bthv bthk"


def squashed(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = torch.tanh(S * g[:, t].exp()[..., None] + k[:, t][..., None] * v[:, t][..., None, :])  # here
        o[:, t] = (q[:, t][..., None] * S).sum(-2)
    return o, S


def decay_of_unknown_sign(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * g[:, t][..., None] + k[:, t][..., None] * v[:, t][..., None, :]  # here
        o[:, t] = (q[:, t][..., None] * S).sum(-2)
    return o, S


def negative_decay(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = k[:, t][..., None] * v[:, t][..., None, :] - S * torch.sigmoid(g[:, t])[..., None]
        o[:, t] = (q[:, t][..., None] * S).sum(-2)  # here
    return o, S


def state_kept_at_each_step(q, k, v, g):
    S, states = bare(q, v), []
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        states.append(S)
    return torch.stack(states, 1)


def state_kept_beside_a_read_out(q, k, v, g):
    S, o, states = bare(q, v), torch.zeros_like(v), []
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = (q[:, t][..., None] * S).sum(-2)
        states.append(S.abs())
    return o, torch.stack(states, 1)


def two_coupled_states(q, k, v, g):
    S, R, o = bare(q, v), bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * 0.9 + k[:, t][..., None] * v[:, t][..., None, :]
        R = R * 0.5 + S
        o[:, t] = (q[:, t][..., None] * R).sum(-2)
    return o, S, R


def sum_of_two_outer_products(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        kv = k[:, t][..., None] * v[:, t][..., None, :]
        S = S + kv + g[:, t][..., None] * v[:, t, :, None, :].cos()
        o[:, t] = (q[:, t][..., None] * S).sum(-2)  # here
    return o, S


def state_of_an_unbounded_step(q, k, v, g):
    """The read-out is fine; what else is computed from the state is not."""
    S, o, size = bare(q, v), torch.zeros_like(v), []
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = (q[:, t][..., None] * S).sum(-2)
        size.append((S * S).sum((-2, -1)))  # here
    return o, torch.stack(size, 1)


def read_before_the_update(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
    return o, S


def decay_over_values(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(v[:, t])[..., None, :] + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = (q[:, t][..., None] * S).sum(-2)
    return o, S


def delta_rule(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        k_t = F.normalize(k[:, t], dim=-1)
        S = S + k_t[..., None] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k_t, S))[..., None, :]
        o[:, t] = (q[:, t][..., None] * S).sum(-2)
    return o, S


def elementwise(q, k, v, g):
    S, o = torch.zeros_like(k[:, 0]), torch.zeros_like(k)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t]) + k[:, t]
        o[:, t] = q[:, t] * S
    return o, S


# A loop, the family of it where the state is small, and why it runs as a loop where it is large.
VERDICTS = [
    (squashed, None, "unsupported_op", "tanh"),
    (decay_of_unknown_sign, "linear_scan", "decay_sign_unknown", "exp(g)"),
    (negative_decay, "linear_scan", "decay_sign_unknown", "-1.0"),
    (sum_of_two_outer_products, "linear_scan", "not_outer_product", "2 terms"),
    (state_of_an_unbounded_step, "linear_scan", "state_escapes", ""),
]


@pytest.mark.parametrize("fn, family, reason, detail", VERDICTS, ids=[fn.__name__ for fn, *_ in VERDICTS])
def test_small_and_large_states(fn, family, reason, detail):
    """All steps of a small state can be kept, so that its scan is read afterwards; not those of a large one."""
    if family is None:
        assert_looped(fn, operands(AXES), reason, detail)
    else:
        assert_rewritten(fn, operands(AXES), family)
    assert_looped(fn, operands(AXES, k=16, v=24), reason, detail)


@pytest.mark.parametrize(
    "fn, families",
    [
        (state_kept_at_each_step, "linear_scan"),
        (state_kept_beside_a_read_out, "linear_scan"),
        (read_before_the_update, "rwkv6"),
        (decay_over_values, "gla"),
        (delta_rule, "delta_rule"),
        (elementwise, "linear_scan"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_known_at_any_size(fn, families):
    """A state that is wanted whole at every step is kept whatever its size."""
    assert_rewritten(fn, operands(AXES), families)
    assert_rewritten(fn, operands(AXES, k=16, v=24), families)


def test_a_state_that_another_is_made_of():
    """S is wanted whole at every step, and what is written into R is a matrix."""
    assert_rewritten(two_coupled_states, operands(AXES), "linear_scan")


def dropout(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S + k[:, t][..., None] * F.dropout(v[:, t], 0.5)[..., None, :]  # here
        o[:, t] = (q[:, t][..., None] * S).sum(-2)
    return o, S


def bernoulli(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        keep = torch.rand_like(v[:, t]) < 0.5  # here
        S = S + k[:, t][..., None] * (v[:, t] * keep)[..., None, :]
        o[:, t] = (q[:, t][..., None] * S).sum(-2)
    return o, S


@pytest.mark.parametrize("fn", [dropout, bernoulli], ids=lambda f: f.__name__)
def test_random_numbers_in_a_loop(fn):
    assert_refused(fn, operands(AXES), "random_in_loop")


def test_dropout_that_is_off():
    """In evaluation it draws nothing."""

    def fn(q, k, v, g):
        S, o = bare(q, v), torch.zeros_like(v)
        for t in range(q.shape[1]):
            S = S * torch.sigmoid(g[:, t])[..., None]
            S = S + k[:, t][..., None] * F.dropout(v[:, t], 0.5, training=False)[..., None, :]
            o[:, t] = (q[:, t][..., None] * S).sum(-2)
        return o, S

    assert_rewritten(fn, operands(AXES), "gla")


# States that none of the others needs, or that do nothing.


def test_idle_states():
    """Handed on at every step as they are."""

    def fn(q, k, v, w):
        S, o, held = bare(q, v), torch.zeros_like(v), w
        for t in range(q.shape[1]):
            S = S * 0.9 + (k[:, t] * held)[..., None] * v[:, t][..., None, :]
            o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
            held = held.clone()
        return o, held

    assert_rewritten(fn, operands("bthk bthk bthv hk"), "retention")


def test_an_idle_state_as_a_decay():
    def fn(q, k, v, w):
        S, o, a = bare(q, v), torch.zeros_like(v), torch.sigmoid(w)
        for t in range(q.shape[1]):
            S = S * a[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
            o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
            a = a + 0
        return o, a

    backend, args = Passes(), operands("bthk bthk bthv hk")
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), args)
    assert len(backend.report.rewrites) == 1 and not backend.report.refusals


def test_a_state_that_nothing_reads():
    def fn(q, k, v, g):
        S, unused, o = bare(q, v), bare(q, v), torch.zeros_like(v)
        for t in range(q.shape[1]):
            kv = k[:, t][..., None] * v[:, t][..., None, :]
            S = S * torch.sigmoid(g[:, t])[..., None] + kv
            unused = torch.tanh(unused + kv)
            o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
        return o

    backend, args = Passes(), operands(AXES)
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), args)
    assert "gla" in backend.report.rewrites[0].family


def test_a_loop_whose_states_are_all_delays_has_no_recurrence():
    def fn(x):
        prev, outs = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            outs.append(x[:, t] - prev)
            prev = x[:, t]
        return torch.stack(outs, 1), prev

    report = assert_rewritten(fn, operands("btk"), "elementwise")
    assert report.rewrites[0].kernel == "parallel" and "torch.ops.fla_compile" not in report.graph("after")

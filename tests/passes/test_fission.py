"""Fission: delays and windows cost nothing, stacked states are solved one after another, tangled ones as one loop."""

import pytest
import torch
import torch.nn.functional as F
from programs import Cases, Passes, assert_looped, assert_rewritten, assert_same, bare, dynamic_in_time, operands

CASES = Cases()

# Delays: what the step before computed.


@CASES("gla", "bthk bthk bthv bthk k")
def token_shift(q, k, v, g, mu):
    S, prev, o = bare(q, v), torch.zeros_like(k[:, 0]), torch.zeros_like(v)
    for t in range(q.shape[1]):
        mixed = k[:, t] + (prev - k[:, t]) * mu
        prev = k[:, t]
        S = S * torch.sigmoid(g[:, t])[..., None] + mixed[..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S, prev


@CASES("retention", "bthk bthk bthv bhk")
def the_previous_step_as_an_argument(q, k, v, prev):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * 0.9 + (k[:, t] * torch.sigmoid(prev))[..., None] * v[:, t][..., None, :]
        prev = k[:, t].exp()
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S, prev


@CASES("linear_scan", "btk btk bk bk")
def two_steps_back(x, g, one, two):
    h, o = torch.zeros_like(x[:, 0]), torch.zeros_like(x)
    for t in range(x.shape[1]):
        h = h * torch.sigmoid(g[:, t]) + x[:, t] + 0.5 * one - 0.25 * two
        two = one
        one = x[:, t]
        o[:, t] = h
    return o, one, two


@CASES("retention", "bthk bthk bthv")
def delayed_read_out(q, k, v):
    """A delay behind a recurrence: its stream is known once that is solved."""
    S, y, o = bare(q, v), torch.zeros_like(v[:, 0]), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * 0.9 + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = y
        y = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, y


@CASES("retention", "bthk bthk bthv bhk")
def a_delay_of_an_invariant(q, k, v, w):
    S, c, o = bare(q, v), torch.zeros_like(w), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * 0.9 + (k[:, t] + c)[..., None] * v[:, t][..., None, :]
        c = w.tanh()
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, c


# Windows: the buffer of a short convolution.


@CASES("linear_attention", "btv vw btk btk", w=4)
def window_by_cat(x, w, q, k):
    buffer, outs = x.new_zeros(x.shape[0], x.shape[2], 4), []
    S = x.new_zeros(x.shape[0], k.shape[2], x.shape[2])
    for t in range(x.shape[1]):
        buffer = torch.cat([buffer[..., 1:], x[:, t].unsqueeze(-1)], -1)
        S = S + k[:, t].unsqueeze(-1) * F.silu((buffer * w).sum(-1)).unsqueeze(-2)
        outs.append((q[:, t].unsqueeze(-2) @ S).squeeze(-2))
    return torch.stack(outs, 1), buffer


@CASES("linear_attention", "btv vw btk btk bvw", w=4)
def window_given_and_returned(x, w, q, k, buffer):
    S, outs = x.new_zeros(x.shape[0], k.shape[2], x.shape[2]), []
    for t in range(x.shape[1]):
        buffer = torch.cat([buffer[..., 1:], x[:, t].unsqueeze(-1)], -1)
        S = S + k[:, t].unsqueeze(-1) * F.silu((buffer * w).sum(-1)).unsqueeze(-2)
        outs.append((q[:, t].unsqueeze(-2) @ S).squeeze(-2))
    return torch.stack(outs, 1), buffer


@CASES("linear_attention", "btv vw btk btk bvw", w=4)
def window_by_roll_and_assignment(x, w, q, k, buffer):
    S, outs = x.new_zeros(x.shape[0], k.shape[2], x.shape[2]), []
    for t in range(x.shape[1]):
        buffer = torch.roll(buffer, -1, -1)
        buffer[..., -1] = x[:, t]
        S = S + k[:, t].unsqueeze(-1) * (buffer * w).sum(-1).unsqueeze(-2)
        outs.append((q[:, t].unsqueeze(-2) @ S).squeeze(-2))
    return torch.stack(outs, 1), buffer


@CASES("linear_attention", "btv wv btk btk bwv", w=3)
def window_with_the_newest_first(x, w, q, k, buffer):
    S, outs = x.new_zeros(x.shape[0], k.shape[2], x.shape[2]), []
    for t in range(x.shape[1]):
        buffer = torch.cat([x[:, t].unsqueeze(1), buffer[:, :-1]], 1)
        S = S + k[:, t].unsqueeze(-1) * (buffer * w).sum(1).unsqueeze(-2)
        outs.append((q[:, t].unsqueeze(-2) @ S).squeeze(-2))
    return torch.stack(outs, 1), buffer


@CASES("linear_attention", "btv vw btk btk bvw", w=3)
def window_read_before_it_moves(x, w, q, k, buffer):
    """The three inputs before this one: the buffer as the step before left it."""
    S, outs = x.new_zeros(x.shape[0], k.shape[2], x.shape[2]), []
    for t in range(x.shape[1]):
        S = S + k[:, t].unsqueeze(-1) * (x[:, t] + (buffer * w).sum(-1)).unsqueeze(-2)
        buffer = torch.cat([buffer[..., 1:], x[:, t].unsqueeze(-1)], -1)
        outs.append((q[:, t].unsqueeze(-2) @ S).squeeze(-2))
    return torch.stack(outs, 1), buffer


# Stacked recurrences: the second reads what the first has computed.


@CASES("gla + linear_attention", "bthk bthk bthk bthk")
def two_layers(q, k, v, g):
    S, R, o = bare(q, v), bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        y = F.normalize(torch.einsum("bhk,bhkv->bhv", q[:, t], S), dim=-1)
        R = R + y[..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", k[:, t], R)
    return o, S, R


@CASES("linear_attention + delta_rule", "bthk bthk bthk bth")
def two_layers_written_in_the_other_order(q, k, v, beta):
    """The second layer's state comes first among the states, and reads the first layer's last output."""
    R, S, o = bare(q, v), bare(q, v), torch.zeros_like(v)
    y = torch.zeros_like(q[:, 0])
    for t in range(q.shape[1]):
        R = R + (beta[:, t, :, None] * y)[..., None] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", y, R))[..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], R)
        S = S + k[:, t][..., None] * v[:, t][..., None, :]
        y = F.normalize(torch.einsum("bhk,bhkv->bhv", q[:, t], S), dim=-1)
    return o, S, R


@CASES("gla", "bthk bthk bthv bthm", m=3)
def abc(q, k, v, s):
    """ABC and GSA: two states coupled only through a read-out."""
    K, V = q.new_zeros(2, 2, s.shape[3], q.shape[3]), q.new_zeros(2, 2, s.shape[3], v.shape[3])
    o = torch.zeros_like(v)
    for t in range(q.shape[1]):
        a = torch.sigmoid(s[:, t])
        K = K * a[..., None] + (1 - a)[..., None] * k[:, t, :, None]
        V = V * a[..., None] + (1 - a)[..., None] * v[:, t, :, None]
        p = torch.softmax(torch.einsum("bhmk,bhk->bhm", K, q[:, t]), -1)
        o[:, t] = torch.einsum("bhm,bhmv->bhv", p, V)
    return o, K, V


@CASES("linear_attention + linear_scan", "bthk bthk bthv bthm", m=3)
def read_by_what_a_later_state_tells(q, k, v, w):
    """ABC's normaliser, and the state that it reads, named in the order in which nothing can be solved."""
    A, B = q.new_zeros(2, 2, 3, v.shape[3]), q.new_zeros(2, 2, q.shape[3], 3)
    C, o = torch.zeros_like(w[:, 0]), torch.zeros_like(v)
    for t in range(q.shape[1]):
        w_t = torch.exp(w[:, t])
        B = B + k[:, t][..., None] * w_t[:, :, None]
        A = A + w_t[..., None] * v[:, t][:, :, None]
        C = C + w_t
        p = torch.softmax((q[:, t][..., None] * B).sum(-2) / C, -1)
        o[:, t] = ((p / C)[..., None] * A).sum(-2)
    return o, A, B, C


@CASES("linear_scan + gla", "bthk bthk bthv bthk")
def a_gate_that_is_itself_a_scan(q, k, v, g):
    S, h, o = bare(q, v), torch.zeros_like(g[:, 0]), torch.zeros_like(v)
    for t in range(q.shape[1]):
        h = 0.9 * h + 0.1 * g[:, t]
        S = S * torch.sigmoid(h)[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S, h


@pytest.mark.parametrize("fn, families, axes, sizes", CASES)
def test_solved(fn, families, axes, sizes):
    report = assert_rewritten(fn, operands(axes, **sizes), families)
    assert [r.pattern for r in report.rewrites].count("recurrence") == 1


@pytest.mark.parametrize("fn", [token_shift, window_by_roll_and_assignment, two_layers], ids=lambda f: f.__name__)
def test_a_length_below_that_of_the_window(fn):
    families, axes, sizes = next(c.values[1:] for c in CASES if c.id == fn.__name__)
    assert_rewritten(fn, operands(axes, t=2, dtype=torch.float64, **sizes), families)


# Near misses of delays and windows.


def window_that_forgets(x, w, buffer):
    outs = []
    for t in range(x.shape[1]):
        buffer = torch.cat([0.9 * buffer[..., 1:], x[:, t].unsqueeze(-1)], -1)  # here
        outs.append((buffer * w).sum(-1))
    return torch.stack(outs, 1), buffer


def window_that_skips_a_row(x, w, buffer):
    outs = []
    for t in range(x.shape[1]):
        buffer = torch.cat([buffer[..., 2:], x[:, t].unsqueeze(-1), buffer[..., :1]], -1)  # here
        outs.append((buffer * w).sum(-1))
    return torch.stack(outs, 1), buffer


def window_that_turns(x, w, buffer):
    """Nothing new comes in."""
    outs = []
    for t in range(x.shape[1]):
        buffer = torch.roll(buffer, 1, -1)  # here
        outs.append((buffer * w).sum(-1) * x[:, t])
    return torch.stack(outs, 1), buffer


def window_of_its_own_output(x, w, buffer):
    outs = []
    for t in range(x.shape[1]):
        y = (buffer * w).sum(-1) + x[:, t]
        buffer = torch.cat([buffer[..., 1:], y.unsqueeze(-1)], -1)  # here
        outs.append(y)
    return torch.stack(outs, 1), buffer


def window_written_in_the_middle(x, w, buffer):
    outs = []
    for t in range(x.shape[1]):
        buffer = torch.roll(buffer, -1, -1)  # here
        buffer[..., 1] = x[:, t]
        outs.append((buffer * w).sum(-1))
    return torch.stack(outs, 1), buffer


def window_by_stack(x, w, buffer):
    """A window, but its rows are taken out one by one."""
    outs = []
    for t in range(x.shape[1]):
        buffer = torch.stack([buffer[..., 1], buffer[..., 2], buffer[..., 3], x[:, t]], -1)  # here
        outs.append((buffer * w).sum(-1))
    return torch.stack(outs, 1), buffer


NO_WINDOWS = [
    window_by_stack, window_that_forgets, window_that_skips_a_row, window_that_turns, window_of_its_own_output,
    window_written_in_the_middle,
]  # fmt: skip


@pytest.mark.parametrize("fn", NO_WINDOWS, ids=lambda f: f.__name__)
def test_what_is_no_window_is_looped(fn):
    assert_looped(fn, operands("btk kw bkw", w=4), "unsupported_op")


def lstm(x, Wi, Wh):
    h, outs = x.new_zeros(x.shape[0], Wh.shape[0]), []
    c = torch.zeros_like(h)
    for t in range(x.shape[1]):
        i, f, g, u = (x[:, t] @ Wi + h @ Wh).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)  # here
        h = torch.sigmoid(u) * torch.tanh(c)
        outs.append(h)
    return torch.stack(outs, 1), c


def test_states_that_need_each_other():
    assert_looped(lstm, operands("btk kx dx", x=20, d=5), "unknown_recurrence", "2 states depend on each other")


def linear_but_coupled(x, a, b):
    """A rotation: affine, and of two states at once."""
    h, r, outs = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h, r = a * h - b * r + x[:, t], b * h + a * r  # here
        outs.append(h)
    return torch.stack(outs, 1), r


def test_a_rotation():
    assert_looped(linear_but_coupled, operands("btk k k"), "unknown_recurrence", "2 states")


def known_beside_unknown(q, k, v, g):
    S, h, o = bare(q, v), torch.zeros_like(g[:, 0]), torch.zeros_like(v)
    for t in range(q.shape[1]):
        h = torch.tanh(h + g[:, t])  # here
        S = S * torch.sigmoid(h)[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S, h


def unknown_behind_known(q, k, v, g):
    S, h, o = bare(q, v), torch.zeros_like(v[:, 0]), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        h = torch.tanh(h + torch.einsum("bhk,bhkv->bhv", q[:, t], S))  # here
        o[:, t] = h
    return o, S, h


def unknown_between_delays(q, k, v, g):
    S, h, o, last = bare(q, v), torch.zeros_like(g[:, 0]), torch.zeros_like(v), torch.zeros_like(g[:, 0])
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(last)[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        last = h
        h = torch.tanh(h + g[:, t])  # here
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S, h, last


@pytest.mark.parametrize(
    "fn, families",
    [
        (known_beside_unknown, "generic + gla"),
        (unknown_behind_known, "gla + generic"),
        (unknown_between_delays, "generic + gla"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_only_the_unknown_state_is_looped(fn, families):
    args = operands("bthk bthk bthv bthk")
    assert_looped(fn, args, "unsupported_op", "tanh", families=families)


def mlstm(q, k, v, i, f):
    C, n, m = bare(q, v), torch.zeros_like(q[:, 0]), torch.zeros_like(i[:, 0])
    o = torch.zeros_like(v)
    for t in range(q.shape[1]):
        log_f = F.logsigmoid(f[:, t])
        m_new = torch.maximum(log_f + m, i[:, t])  # here
        a, b = torch.exp(log_f + m - m_new), torch.exp(i[:, t] - m_new)
        m = m_new
        C = a[..., None, None] * C + b[..., None, None] * k[:, t, :, :, None] * v[:, t, :, None]
        n = a[..., None] * n + b[..., None] * k[:, t]
        size = (q[:, t] * n).sum(-1, keepdim=True).abs().clamp(min=1.0)
        o[:, t] = (q[:, t].unsqueeze(-2) @ C).squeeze(-2) / size
    return o, C, n, m


def test_a_stabiliser_is_looped_and_its_matrix_is_not():
    args = operands("bthk bthk bthv bth bth", dtype=torch.float64)
    assert_looped(mlstm, args, "unsupported_op", "maximum", families="generic + simple_gla")


def test_a_window_is_dynamic_in_time():
    backend = Passes()
    axes = "btv vw btk btk bvw"
    compiled = torch.compile(window_given_and_returned, backend=backend, fullgraph=True)
    for length in (7, 5, 2, 11):
        assert_same(window_given_and_returned, dynamic_in_time(compiled, axes), operands(axes, t=length, w=4))
    assert backend.graphs == 1 and backend.report.rewrites and not backend.report.refusals

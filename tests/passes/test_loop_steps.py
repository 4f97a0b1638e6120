"""First and last steps, numbers and outputs of a loop: each is one scan with eager's values and gradients."""

import pytest
import torch
from lifting import Graphs, twin_of
from programs import assert_refused, assert_same, operands

B, T, K = 2, 6, 3


# First and last steps.


def first_step_in_a_branch(x, y, S):
    o = torch.zeros_like(x)
    for t in range(x.shape[1]):
        if t == 0:
            h = x[:, t]
        else:
            h = h * y[:, t] + x[:, t]
        o[:, t] = h
    return o, h


def previous_or_zero(x, y, S):
    outs = []
    for t in range(x.shape[1]):
        prev = x[:, t - 1] if t > 0 else torch.zeros_like(x[:, t])
        S = S * 0.5 + prev * y[:, t]
        outs.append(S)
    return torch.stack(outs, 1)


def both_ends(x, y, S):
    last = x.shape[1] - 1
    for t in range(x.shape[1]):
        if t > 0 and t < last:
            S = S + x[:, t - 1] * x[:, t + 1]
        S = S * y[:, t]
        if not t:
            S = S * 2
    return S


def from_none(x, y, S):
    h = None
    for t in range(x.shape[1]):
        if h is None:
            h = x[:, t]
        else:
            h = h * y[:, t] + x[:, t]
    return h


def from_none_in_place(x, y, S):
    h = None
    for t in range(x.shape[1]):
        if h is None:
            h = torch.zeros_like(x[:, t])
        h += x[:, t] * y[:, t]
    return h * S


def later_steps_append(x, y, S):
    outs = []
    for t in range(x.shape[1]):
        if t != 0:
            S = S * y[:, t]
            outs.append(S + x[:, t - 1])
    return torch.stack(outs, 1), len(outs)


# Numbers.


def powers(x, y, S):
    for t in range(x.shape[1]):
        S = S * 0.9**t + x[:, t] / (t + 1)
    return S


def added_index(x, y, S):
    o = torch.zeros_like(x)
    for t in range(x.shape[1]):
        S = S + x[:, t] * (t * 0.1)
        S *= 1 - t
        o[:, t] = S - t
    return o


def tensor_powers(x, y, S):
    gamma = torch.sigmoid(y[0, 0])
    for t in range(x.shape[1]):
        S = S + x[:, t] * torch.exp(-gamma * t)
    return S


# Outputs.


def placed(x, y, S):
    outs = [None] * x.shape[1]
    for t in range(x.shape[1]):
        S = S * y[:, t] + x[:, t]
        outs[t] = S
    return torch.stack(outs, dim=1), outs[-1]


def placed_backwards(x, y, S):
    outs = [None for _ in range(x.shape[1])]
    for t in range(x.shape[1] - 1, -1, -1):
        S = S * y[:, t] + x[:, t]
        outs[t] = S
    return torch.stack(outs, 1), outs[0]


def two_at_the_front(x, y, S):
    outs = []
    for t in range(x.shape[1]):
        S = S * y[:, t] + x[:, t]
        outs.insert(0, S)
        outs.insert(0, x[:, t])
    return torch.stack(outs), outs[0], outs[-1], outs[3]


def turned(x, y, S):
    outs, more = [], []
    for x_t in reversed(x.unbind(1)):
        S = S * 0.5 + x_t
        outs += [S, x_t]
        more.extend([S])
    outs.reverse()
    more = more[::-1]
    return torch.stack(outs[::-1], 1), torch.vstack(outs), torch.hstack(list(reversed(more))), torch.stack(tuple(more))


def growing(x, y, S):
    o = torch.empty(B, 0, K, dtype=x.dtype)
    for t in range(x.shape[1]):
        S = S * y[:, t] + x[:, t]
        o = torch.cat([o, S.unsqueeze(1)], dim=1)
    return o * 2


def growing_over_unbind(x, y, S):
    o = x[:, :1]
    for x_t in torch.unbind(x, 1):
        S = S * x_t
        o = torch.cat((o, S.unsqueeze(1)), -2)
    return o


def heads_in_a_list(x, y, S):
    o = torch.zeros_like(x)
    for t in range(x.shape[1]):
        rows = []
        for h in range(K):
            rows.append(S[:, h] * y[:, t, h] + x[:, t, h])
        S = torch.stack(rows, 1)
        o[:, t] = S
    return o


def autocast_inside(x, y, S):
    for t in range(x.shape[1]):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = (x[:, t] @ y[0, :3].T).to(S.dtype)
        S = S * 0.5 + z
    return S


FORMS = [
    first_step_in_a_branch, previous_or_zero, both_ends, from_none, from_none_in_place, later_steps_append, powers,
    added_index, tensor_powers, placed, placed_backwards, two_at_the_front, turned, growing, growing_over_unbind,
    heads_in_a_list, autocast_inside,
]  # fmt: skip


@pytest.mark.parametrize("fn", FORMS, ids=lambda f: f.__name__)
def test_values_and_gradients_are_eagers_through_one_scan(fn):
    before = fn.__code__
    compiled = Graphs(twin_of(fn), by_steps=True)
    assert_same(fn, compiled.fn, operands("btk btk bk", b=B, t=T, k=K))
    assert compiled.scans == [1]
    assert fn.__code__ is before and not hasattr(fn, "_torchdynamo_inline")


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
@pytest.mark.parametrize("fn", [first_step_in_a_branch, powers, added_index, tensor_powers], ids=lambda f: f.__name__)
def test_other_dtypes(fn, dtype):
    compiled = Graphs(twin_of(fn), by_steps=True)
    assert_same(fn, compiled.fn, operands("btk btk bk", b=B, t=T, k=K, dtype=dtype))
    assert compiled.scans == [1]


@pytest.mark.parametrize("fn", [previous_or_zero, both_ends, growing], ids=lambda f: f.__name__)
def test_one_graph_for_all_lengths(fn):
    compiled = Graphs(twin_of(fn))
    for steps in (6, 10, 18):
        args = operands("btk btk bk", b=B, t=steps, k=K)
        for x in args[:2]:
            torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(compiled.fn(*args), fn(*args))
    assert len(compiled.graphs) == 1


# Near misses: the line of the refusal is marked.


def more_than_the_ends(x, y, S):
    for t in range(x.shape[1]):
        if t > 2:  # here
            S = S + x[:, t]
    return S


def bfloat_number(x, y, S):
    S = S.bfloat16()
    for t in range(x.shape[1]):
        S = S + x[:, t].bfloat16()
        S = S * 0.9**t  # here
    return S.float()


def number_in_a_call(x, y, S):
    for t in range(x.shape[1]):
        S = S + torch.full_like(S, t)  # here
        S = S * x[:, t]
    return S


def half_a_list(x, y, S):
    outs = [None] * (x.shape[1] + 1)
    for t in range(x.shape[1]):  # here
        S = S + x[:, t]
        outs[t] = S
    return S, len(outs)


def copy_of(S):
    return S.view(S.shape)


def second_name_in_the_first_step(x, y, S):
    S = S.clone()
    for t in range(x.shape[1]):  # here
        if t == 0:
            first = copy_of(S)
        S += x[:, t] * first.mean()
    return S


def kept_in_the_first_step(x, y, S):
    S, outs = S.clone(), []
    for t in range(x.shape[1]):  # here
        if t == 0:
            outs.append(copy_of(S))
        S += x[:, t]
    return torch.stack(outs)


NEAR_MISSES = [
    (more_than_the_ends, "loop_index_used"),
    (bfloat_number, "loop_index_used"),
    (number_in_a_call, "loop_index_used"),
    (half_a_list, "output_list_used"),
    (second_name_in_the_first_step, "aliased_state"),
    (kept_in_the_first_step, "aliased_state"),
]


@pytest.mark.parametrize("fn, reason", NEAR_MISSES, ids=lambda x: getattr(x, "__name__", ""))
def test_near_misses_are_refused_at_their_line(fn, reason):
    assert_refused(fn, operands("btk btk bk", b=B, t=T, k=K), reason)

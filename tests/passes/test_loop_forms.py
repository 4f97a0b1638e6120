"""Loops over tensors, ranges and counters, and what they read: each is one scan with eager's values and gradients."""

import pytest
import torch
from lifting import Graphs, twin_of
from programs import assert_refused, assert_same, operands

B, T, K = 2, 6, 3


# Iterables: each takes (x, y, S) of shapes [B, T, K], [B, T, K], [B, K].


def unbind(x, y, S):
    for x_t in x.unbind(1):
        S = S * 0.5 + x_t
    return S


def unbind_of_a_call(x, y, S):
    outs = []
    for x_t in torch.unbind(torch.sigmoid(x), dim=-2):
        S = S * x_t
        outs.append(S)
    return torch.stack(outs, 1), S


def bare_tensor(x, y, S):
    for x_t in x.transpose(0, 1):
        S = torch.tanh(S + x_t)
    return S


def bare_argument(x, y, S):
    xs = x.transpose(0, 1)
    outs = []
    for x_t in xs:
        S = S * 0.9 + x_t
        outs.append(S)
    return torch.stack(outs, 1)


def annotated_argument(x: torch.Tensor, y, S):
    S = S[0] * x[0].mean(0)
    for x_b in x:
        S = S + x_b.sum(0)
    return S


def zipped(x, y, S):
    o = torch.zeros_like(x)
    for t, x_t, y_t in zip(range(x.shape[1]), x.unbind(1), torch.unbind(y, 1), strict=True):
        S = S * y_t + x_t
        o[:, t] = S
    return o


def zip_of_unequal_lengths(x, y, S):
    for x_t, y_t in zip(x.unbind(1), y[:, :4].unbind(1)):  # noqa: B905
        S = S * y_t + x_t
    return S


def enumerated(x, y, S):
    o = torch.zeros_like(x)
    for t, x_t in enumerate(x.unbind(1)):
        S = S * y[:, t] + x_t
        o[:, t] = S
    return o, S


def enumerated_from_one(x, y, S):
    o = x.new_zeros(x.shape[0], x.shape[1] + 1, x.shape[2])
    for t, (x_t, y_t) in enumerate(zip(x.unbind(1), y.unbind(1), strict=False), start=1):
        S = S * y_t + x_t
        o[:, t] = S
    return o


def split_in_steps(x, y, S):
    outs = []
    for x_t, y_t in zip(x.split(1, dim=1), torch.split(y, 1, 1), strict=True):
        S = S * 0.5 + (x_t * y_t).squeeze(1)
        outs.append(S.unsqueeze(1))
    return torch.cat(outs, dim=1)


def chunked(x, y, S):
    for x_t in x.chunk(T, 1):
        S = S * 0.5 + x_t[:, 0]
    return S


def split_in_chunks(x, y, S):
    outs = []
    for x_c, y_c in zip(x.split(2, 1), torch.chunk(y, 3, dim=1), strict=True):
        outs.append(x_c + S.unsqueeze(1))
        S = S + (x_c * y_c).sum(1)
    return torch.cat(outs, 1), S


def reversed_unbind(x, y, S):
    outs = []
    for x_t in reversed(x.unbind(1)):
        S = S * 0.5 + x_t
        outs.insert(0, S)
    return torch.stack(outs, 1)


# Ranges.


def backwards(x, y, S):
    o = torch.zeros_like(x)
    for t in range(x.shape[1] - 1, -1, -1):
        S = S * y[:, t] + x[:, t]
        o[:, t] = S
    return o, S


def reversed_range(x, y, S):
    o = torch.zeros_like(x)
    for t in reversed(range(x.shape[1])):
        S = S * y[:, t] + x[:, t]
        o[:, t] += S
    return o


def mirrored_index(x, y, S):
    o = torch.zeros_like(x)
    for i in range(x.shape[1]):
        t = x.shape[1] - 1 - i
        S = S * y[:, t] + x[:, i]
        o[:, t] = S
    return o


def strided(x, y, S):
    o = torch.zeros_like(x)
    for t in range(1, x.shape[1], 2):
        S = S * y[:, t] + x[:, t]
        o[:, t] = S
    return o


def strided_backwards(x, y, S):
    o = torch.zeros_like(x)
    for t in range(x.shape[1] - 1, 0, -2):
        S = S * y[:, t] + x[:, t]
        o[:, t] = S
    return o


def counted_while(x, y, S):
    t, outs = 0, []
    while t < x.shape[1]:
        S = S * y[:, t] + x[:, t]
        outs.append(S)
        t += 1
    return torch.stack(outs, 1), t


def counted_down(x, y, S):
    o = torch.zeros_like(x)
    t = x.shape[1] - 1
    while t >= 0:
        S = S * y[:, t] + x[:, t]
        o[:, t] = S
        t = t - 1
    return o, t


def while_bound_first(x, y, S):
    t = 1
    while x.shape[1] > t:
        S = S * y[:, t] + x[:, t - 1]
        t += 2
    return S, t


# Positions.


def shifted(x, y, S):
    o = torch.zeros_like(x)
    for t in range(1, x.shape[1] - 1):
        S = S * y[:, t - 1] + x[:, t + 1] - x[:, t]
        o[:, t + 1] = S
    return o


def wraps_around(x, y, S):
    for t in range(x.shape[1]):
        S = S * y[:, t] + x[:, t - 1]
    return S


def chunks(x, y, S):
    C, o = 2, torch.zeros_like(x)
    for i in range(0, x.shape[1], C):
        x_c = x[:, i : i + C]
        o[:, i : i + C] = torch.cumsum(x_c, 1) + S.unsqueeze(1)
        S = S + x_c.sum(1) * y[:, i]
    return o, S


def numbered_chunks(x, y, S):
    C, outs = 3, []
    for i in range(x.shape[1] // C):
        x_c, y_c = x[:, i * C : (i + 1) * C], y[:, i * C : (i + 1) * C, 0]
        outs.append(x_c * S.unsqueeze(1))
        S = S + (x_c * y_c[..., None]).sum(1)
    return torch.cat(outs, 1)


def windows(x, y, S):
    outs = []
    for t in range(2, x.shape[1]):
        S = S * y[:, t] + x[:, t - 2 : t + 1].mean(1)
        outs.append(S)
    return torch.stack(outs, 1)


def windows_of_a_last_axis(x, y, S):
    x = x.transpose(1, 2)
    for t in range(x.shape[-1] - 1):
        S = S * y[:, t] + x[..., t : t + 2].sum(-1)
    return S


def last_chunk_is_shorter(x, y, S):
    for i in range(0, x.shape[1], 4):
        S = S * y[:, i] + x[:, i : i + 4].sum(1)
    return S


def ragged_chunks(x, y, S):
    o = torch.zeros_like(x)
    for i in range(0, x.shape[1], 4):
        S = S + x[:, i : i + 4].sum(1)
        o[:, i : i + 4] = x[:, i : i + 4] * S.unsqueeze(1)
    return o


def ragged_up_to_the_end(x, y, S):
    T, o = x.shape[1], torch.zeros_like(x)
    for i in range(0, T, 4):
        j = min(i + 4, T)
        S = S + x[:, i:j].sum(1)
        o[:, i : min(T, i + 4)] += x[:, i:j] * S.unsqueeze(1)
    return o, S


def ragged_split(x, y, S):
    outs = []
    for x_c in x.split(4, 1):
        S = S + x_c.sum(1)
        outs.append(x_c * S.unsqueeze(1))
    return torch.cat(outs, 1), S


def turned_weights(x, y, S):
    W = y[0, :3]
    for t in range(x.shape[1]):
        S = S @ W + x[:, t] @ W.T * 0.5
    return S


def halves_of_a_weight(x, y, S):
    W, U = y[:, :2].chunk(2, 1)
    V = W.transpose(0, 1)
    for t in range(x.shape[1]):
        S = S * W[:, 0] + x[:, t] * U[:, 0] + V[0].mean()
    return S


FORMS = [
    unbind, unbind_of_a_call, bare_tensor, bare_argument, annotated_argument, zipped, zip_of_unequal_lengths,
    enumerated, enumerated_from_one, split_in_steps, chunked, split_in_chunks, reversed_unbind, backwards,
    reversed_range, mirrored_index, strided, strided_backwards, counted_while, counted_down, while_bound_first,
    shifted, wraps_around, chunks, numbered_chunks, windows, windows_of_a_last_axis, last_chunk_is_shorter,
    ragged_chunks, ragged_up_to_the_end, ragged_split, turned_weights, halves_of_a_weight,
]  # fmt: skip


@pytest.mark.parametrize("fn", FORMS, ids=lambda f: f.__name__)
def test_values_and_gradients_are_eagers_through_one_scan(fn):
    before = fn.__code__
    compiled = Graphs(twin_of(fn), by_steps=True)
    assert_same(fn, compiled.fn, operands("btk btk bk", b=B, t=T, k=K))
    assert compiled.scans == [1]
    assert fn.__code__ is before and not hasattr(fn, "_torchdynamo_inline")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fn", [zipped, strided_backwards, chunks], ids=lambda f: f.__name__)
def test_other_dtypes(fn, dtype):
    compiled = Graphs(twin_of(fn), by_steps=True)
    assert_same(fn, compiled.fn, operands("btk btk bk", b=B, t=T, k=K, dtype=dtype))
    assert compiled.scans == [1]


@pytest.mark.parametrize("fn", [zipped, backwards, counted_while, chunks], ids=lambda f: f.__name__)
def test_one_graph_for_all_lengths(fn):
    compiled = Graphs(twin_of(fn))
    for steps in (6, 10, 18):
        args = operands("btk btk bk", b=B, t=steps, k=K)
        for x in args[:2]:
            torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(compiled.fn(*args), fn(*args))
    assert len(compiled.graphs) == 1


def any_sequence(xs, S):
    for x in xs:
        S = S * 0.5 + x
    return S


def test_a_list_of_tensors_is_left_alone():
    x, S = operands("tbk bk", b=B, t=T, k=K)
    for xs, scans in (x, [1]), (list(x), [0]):
        compiled = Graphs(twin_of(any_sequence))
        torch.testing.assert_close(compiled.fn(xs, S), any_sequence(xs, S))
        assert compiled.scans == scans


# Near misses: the line of the refusal is marked.


def cut_short(x, y, S):
    T = x.shape[1] - 1
    for i in range(0, T, 4):  # here
        j = min(i + 4, T)
        S = S + x[:, i:j].sum(1)
    return S


def ragged_chunk(x, y, S):
    for x_c in x.chunk(4, 1):  # here
        S = S + x_c.sum(1)
    return S


def cap_used(x, y, S):
    T = x.shape[1]
    for i in range(0, T, 4):
        S = S + x[:, i : i + 4].sum(1) * min(i + 4, T)  # here
    return S


def far_shift(x, y, S):
    for t in range(x.shape[1]):  # here
        S = S * y[:, t] + x[:, t - 2]
    return S


def overlapping_writes(x, y, S):
    o = torch.zeros_like(x)
    for t in range(x.shape[1] - 1):  # here
        S = S + x[:, t]
        o[:, t : t + 2] = S.unsqueeze(1)
    return o


def counter_moves_twice(x, y, S):
    t = 0
    while t < x.shape[1]:
        S = S + x[:, t]
        t += 1
        if S.dim() == 3:
            t += 1  # here
    return S


def writes_what_it_iterates(x, y, S):
    x = x.detach() * 1  # here
    for x_t in x.transpose(0, 1):
        S = S + x_t
        x[:, 0] = S.detach()
    return S


NEAR_MISSES = [
    (cut_short, "index_range"),
    (ragged_chunk, "index_range"),
    (cap_used, "loop_index_used"),
    (far_shift, "index_range"),
    (overlapping_writes, "reads_own_output"),
    (counter_moves_twice, "loop_index_used"),
    (writes_what_it_iterates, "mutates_input"),
]


@pytest.mark.parametrize("fn, reason", NEAR_MISSES, ids=lambda x: getattr(x, "__name__", ""))
def test_near_misses_are_refused_at_their_line(fn, reason):
    assert_refused(fn, operands("btk btk bk", b=B, t=T, k=K), reason)

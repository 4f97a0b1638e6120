"""What is nearly a recurrence, or wanted by others, is left as it is, with the values and gradients of the program."""

import math

import pytest
import torch
import torch.nn.functional as F
from parallel import Parallel, assert_left, assert_matched, operands, refused
from programs import assert_same

BHTK = "bhtk bhtk bhtv"


def causal(T):
    return torch.ones(T, T, dtype=torch.bool).tril()


# None of our business.


def softmax_attention(q, k, v):
    scores = (q @ k.mT).masked_fill(~causal(q.shape[2]), -math.inf)
    return torch.softmax(scores, dim=-1) @ v


def softmax_by_hand(q, k, v):
    P = torch.exp(q @ k.mT).tril()
    return (P / P.sum(-1, keepdim=True)) @ v


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def bidirectional(q, k, v):
    return (q @ k.mT) @ v


def mask_argument(q, k, v, m):
    return (q @ k.mT * m) @ v


def plain_cumsum(q, k, v):
    return (q + k).cumsum(2).sum(-1), v.cumsum(-1)


@pytest.mark.parametrize("fn", [softmax_attention, softmax_by_hand, sdpa, bidirectional, plain_cumsum])
def test_left_alone(fn):
    assert_left(fn, operands(BHTK))


def test_a_mask_that_is_an_argument():
    q, k, v = operands(BHTK)
    assert_left(mask_argument, [q, k, v, torch.ones(7, 7).tril()])


# Near misses.


def anticausal(q, k, v):
    return (q @ k.mT).triu() @ v  # here


def one_step_ahead(q, k, v):
    return (q @ k.mT).tril(1) @ v  # here


def banded(q, k, v):
    t = torch.arange(q.shape[2])
    distance = t[:, None] - t
    return (q @ k.mT * ((distance >= 0) & (distance < 3))) @ v  # here


def all_but_causal(q, k, v):
    return (q @ k.mT).masked_fill(causal(q.shape[2]), 0) @ v  # here


def gaussian_decay(q, k, v):
    t = torch.arange(q.shape[2], dtype=torch.float)
    return (q @ k.mT * torch.exp(-((t[:, None] - t) ** 2) / 9)).tril() @ v  # here


def longer_keys(q, k, v):
    return (q @ torch.cat((k, k), 2).mT).tril() @ torch.cat((v, v), 2)  # here


def weak_outside(q, k, v):
    return torch.where(causal(q.shape[2]), q @ k.mT, 0.1 * (q @ k.mT)) @ v  # here


def gated_by_pairs(q, k, v, g):
    return (q @ k.mT * torch.exp(g[..., None] * g[..., None, :])).tril() @ v  # here


def gated_by_a_sum(q, k, v, g):
    return (q @ k.mT * torch.exp(-(g[..., None] - g[..., None, :]).abs())).tril() @ v  # here


def scores_squared(q, k, v):
    P = q @ k.mT
    return (P.sigmoid() * P).tril() @ v  # here


@pytest.mark.parametrize(
    "fn, detail",
    [
        (anticausal, "later"),
        (one_step_ahead, "after"),
        (banded, "before"),
        (all_but_causal, "later"),
        (gaussian_decay, "no function of a step"),
        (longer_keys, "length"),
        (weak_outside, "later"),
        (gated_by_pairs, "decay"),
        (gated_by_a_sum, "no function of a step"),
        (scores_squared, "data"),
    ],
)
def test_near_misses(fn, detail):
    refused(fn, operands(BHTK + (" bht" if fn.__name__.startswith("gated") else "")), "unknown_recurrence", detail)


# The matrix, or the state, is wanted by others.


def returned(q, k, v):
    P = (q @ k.mT).tril()
    return P @ v, P  # here


def scores_returned(q, k, v):
    P = q @ k.mT
    o = P.tril() @ v  # here
    return o, P.mean()


def wanted_by_a_norm(q, k, v):
    P = (q @ k.mT).tril()
    return P @ v / P.norm(dim=-1, keepdim=True)  # here


def decay_returned(q, k, v, g):
    G = g.cumsum(-1)
    D = torch.exp(G[..., None] - G[..., None, :]).tril()
    o = (q @ k.mT * D) @ v  # here
    return o, D.sum((-1, -2))


@pytest.mark.parametrize("fn", [returned, scores_returned, wanted_by_a_norm, decay_returned])
def test_escapes(fn):
    refused(fn, operands(BHTK + (" bht" if fn is decay_returned else "")), "state_escapes")


def last_state(q, k, v):
    S = (k[..., :, None] * v[..., None, :]).cumsum(2)
    o = torch.einsum("bhtk,bhtkv->bhtv", q, S)  # here
    return o, S[:, :, -1]


def test_a_state_that_is_returned():
    refused(last_state, operands(BHTK), "state_escapes", pattern="recurrence")


def test_a_mask_that_others_use():
    def fn(q, k, v):
        mask = causal(q.shape[2])
        o = (q @ k.mT * mask) @ v
        return o, torch.softmax((q @ k.mT).masked_fill(~mask, -math.inf), -1) @ v

    backend = Parallel()
    args = operands(BHTK)
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), args)
    assert [r.family for r in backend.found[-1].rewrites] == ["linear_attention"]


# Gradients that are cut, and memory that is written to.


def test_cut_gradients():
    def keys(q, k, v):
        return (q @ k.detach().mT).tril() @ v

    def all_of_it(q, k, v):
        with torch.no_grad():
            P = (q @ k.mT).tril()
        return P @ v + (q + k).sum(-1, keepdim=True)

    def scores(q, k, v):
        return (q @ k.mT).tril().detach() @ v + (q + k).sum(-1, keepdim=True)

    assert_matched(keys, operands(BHTK), "linear_attention")
    assert_left(all_of_it, operands(BHTK))
    assert_left(scores, operands(BHTK))


def keys_change_between(q, k, v):
    k = k * 1.0
    P = (q @ k.mT).tril()
    k.mul_(2.0)
    return P @ v + k.sum(-1, keepdim=True)


def values_change_between(q, k, v):
    v = v * 1.0
    P = (q @ k.mT).tril()
    o = P @ v
    v += 1.0
    return o + P @ v


@pytest.mark.parametrize("fn", [keys_change_between, values_change_between])
@pytest.mark.parametrize("b", [2, 3])
def test_operands_that_change_inside(fn, b):
    backend = Parallel()
    args = operands(BHTK, b=b)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(fn, backend=backend, fullgraph=True)(*args), fn(*args))
    if b == 3:
        assert backend.found[-1].rewrites == []


def test_operands_that_change_before_and_after():
    def fn(q, k, v):
        k, v = k * 1.0, v * 1.0
        k[:, :, 0] = 0.5
        o = (q @ k.mT).tril() @ v
        v2 = v.mul_(2.0)
        return o.mul_(3.0), v2

    backend = Parallel()
    with torch.no_grad():
        args = operands(BHTK, b=3)
        got, want = torch.compile(fn, backend=backend, fullgraph=True)(*args), fn(*args)
    torch.testing.assert_close(got, want)
    assert [r.family for r in backend.found[-1].rewrites] == ["linear_attention"]


def test_an_argument_that_changes():
    def fn(q, k, v):
        o = (q @ k.mT).tril() @ v  # here
        k.add_(1.0)
        return o

    backend = Parallel()
    q, k, v = operands(BHTK)
    want, k2 = fn(q, k.clone(), v), k.clone()
    got = torch.compile(fn, backend=backend, fullgraph=True)(q, k2, v)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(k2, k + 1.0)
    assert [r.reason for r in backend.found[-1].refusals] == ["mutates_input"]


# Sizes, types, layers.


@pytest.mark.parametrize("sizes", [{"k": 7}, {"v": 7}, {"k": 7, "v": 7}, {"h": 7}, {"b": 7, "h": 7, "k": 7, "v": 7}])
def test_axes_as_long_as_time(sizes):
    def fn(q, k, v):
        q = q @ torch.ones(q.shape[-1], q.shape[-1])
        return ((q @ k.mT).tril() @ v).tanh() * 2.0

    backend = Parallel()
    args = operands(BHTK, **sizes)
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), args)
    assert [r.family for r in backend.found[-1].rewrites] == ["linear_attention"]


def simple(q, k, v, g):
    G = g.cumsum(-1)
    D = (G[..., None] - G[..., None, :]).masked_fill(~causal(g.shape[-1]), -math.inf).exp()
    P = q @ k.mT * D * q.shape[-1] ** -0.5
    return P @ v


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_types(dtype):
    q, k, v, g = operands(BHTK + " bht", dtype=dtype)
    tolerance = 5e-2 if dtype == torch.bfloat16 else None
    assert_matched(simple, [q, k, v, -g.abs()], "simple_gla", tolerance=tolerance, then="aot_eager")


def test_dynamic_time():
    backend = Parallel("aot_eager")
    fn = torch.compile(simple, backend=backend, fullgraph=True, dynamic=True)
    for T in (7, 12, 33):
        q, k, v, g = operands(BHTK + " bht", t=T)
        assert_same(simple, fn, [q, k, v, -g.abs()])
    assert len(backend.found) == 1
    assert [r.family for r in backend.found[0].rewrites] == ["simple_gla"]


def test_long_time_is_validated_on_few_steps():
    backend = Parallel()
    q, k, v, g = operands(BHTK + " bht", t=4096, b=1)
    got = torch.compile(simple, backend=backend, fullgraph=True)(q, k, v, -g.abs() * 0.1)
    found = backend.found[0]
    assert [r.family for r in found.rewrites] == ["simple_gla"] and found.refusals == []
    assert backend.over_two_times(4096) == []
    assert 0 < found.validation_seconds < 5
    with torch.no_grad():
        torch.testing.assert_close(got, simple(q, k, v, -g.abs() * 0.1), rtol=1e-3, atol=1e-3)


def test_layers():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)

        def forward(self, x):
            B, T, D = x.shape
            q, k, v = (y.view(B, T, 2, 8).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
            t = torch.arange(T)
            D_ = (0.9 ** (t[:, None] - t)).tril()
            o = torch.einsum("bhij,bhjv->bhiv", (q @ k.mT) * D_, v)
            return x + self.out(o.transpose(1, 2).reshape(B, T, D))

    model = torch.nn.Sequential(Layer(), Layer(), Layer())
    backend = Parallel()
    x = torch.randn(2, 9, 16)
    assert_same(model, torch.compile(model, backend=backend, fullgraph=True), [x])
    assert [r.family for r in backend.found[0].rewrites] == ["retention"] * 3
    assert backend.over_two_times(9) == []


def test_a_wrong_rewrite_is_refused(monkeypatch):
    from fla_compile.passes import match_parallel

    real = match_parallel.read_out

    def wrong(*args):
        from dataclasses import replace

        read = real(*args)
        if read is None:
            return None
        return replace(read, kernels=tuple(replace(k, scale=1.001 * k.scale) for k in read.kernels))

    monkeypatch.setattr(match_parallel, "read_out", wrong)

    def fn(q, k, v):
        return (q @ k.mT).tril() @ v  # here

    refused(fn, operands(BHTK), "validation_failed")

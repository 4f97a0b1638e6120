"""Normalisers, sums of several recurrences, masks without the diagonal, and prefix sums."""

import pytest
import torch
import torch.nn.functional as F
from parallel import assert_matched, operands
from programs import Passes

from fla_compile.passes import match_parallel

BHTK = "bhtk bhtk bhtv"
BTHK = "bthk bthk bthv"


# Normalisers.


def by_row_sum(q, k, v):
    P = (q.exp() @ k.exp().mT).tril()
    return (P / P.sum(-1, keepdim=True)) @ v


def by_row_sum_with_eps(q, k, v):
    P = (q.exp() @ k.exp().mT).tril()
    return P / (P.sum(dim=-1, keepdim=True) + 1e-6) @ v


def by_row_sum_after(q, k, v):
    P = (q.exp() @ k.exp().mT).tril()
    return (P @ v) / P.sum(-1).clamp(min=1e-3)[..., None]


def by_row_sum_of_retention(q, k, v):
    """RetNet's normalisations of the decay and of the scores."""
    t = torch.arange(q.shape[2])
    D = torch.where(t[:, None] >= t, 0.9 ** (t[:, None] - t), 0.0)
    D = D / D.sum(-1, keepdim=True).sqrt()
    P = q @ k.mT * D
    P = P / P.sum(-1, keepdim=True).abs().clamp(min=1, max=5e4)
    return P @ v


@pytest.mark.parametrize("fn", [by_row_sum, by_row_sum_with_eps, by_row_sum_after])
def test_normalisers(fn):
    assert_matched(fn, operands(BHTK), "linear_attention", "linear_attention")


def test_normalised_retention():
    assert_matched(by_row_sum_of_retention, operands(BHTK), "retention", "retention", "retention")


def test_two_kinds_of_attention_in_one_product():
    def fn(q, k, v):
        t = torch.arange(q.shape[2])
        return (q @ k.mT * (0.5 - 0.3 * 0.9 ** (t[:, None] - t))).tril() @ v

    assert_matched(fn, operands(BHTK), "linear_attention + retention")


def test_a_mask_without_the_diagonal():
    def fn(q, k, v, g):
        G = g.cumsum(-1)
        return (q @ k.mT * torch.exp(G[..., None] - G[..., None, :])).tril(-1) @ v

    q, k, v, g = operands(BHTK + " bht")
    assert_matched(fn, [q, k, v, -g.abs()], "simple_gla")


# Prefix sums.


def by_cumsum(q, k, v):
    S = torch.cumsum(k[..., :, None] * v[..., None, :], dim=1)
    return torch.einsum("bthk,bthkv->bthv", q, S)


def by_cumsum_of_einsum(q, k, v):
    S = torch.einsum("bthk,bthv->bthkv", k, v).cumsum(1)
    return (q[..., None] * S).sum(-2) * 0.3


def by_cumsum_with_normaliser(q, k, v):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    S = torch.cumsum(torch.einsum("bthk,bthv->bthkv", k, v), dim=1)
    z = torch.cumsum(k, dim=1)
    return torch.einsum("bthk,bthkv->bthv", q, S) / (torch.einsum("bthk,bthk->bth", q, z)[..., None] + 1e-6)


@pytest.mark.parametrize("fn", [by_cumsum, by_cumsum_of_einsum, by_cumsum_with_normaliser])
def test_prefix_sums(fn):
    report = assert_matched(fn, operands(BTHK), "linear_attention", pattern="recurrence")
    assert len(report.rewrites) == 1


def test_prefix_sums_with_decay():
    def fn(q, k, v, g):
        G = g.cumsum(1)[..., None, None]
        S = torch.exp(G) * torch.cumsum(k[..., None] * v[..., None, :] * torch.exp(-G), dim=1)
        return torch.einsum("bthk,bthkv->bthv", q, S)

    q, k, v, g = operands(BTHK + " bth")
    assert_matched(fn, [q, k, v, -g.abs() * 0.3], "simple_gla", pattern="recurrence")


def test_a_running_sum_alone_wants_no_kernel(monkeypatch):
    """Such as HGRN's lower bounds over layers: left as it is without a word, also where no kernel would take it."""
    monkeypatch.setattr(match_parallel, "supports", lambda *args: "not on a Tuesday")
    x = torch.randn(4, 512)
    backend = Passes()
    share = x.softmax(0)
    got = torch.compile(lambda x: x.softmax(0).cumsum(0) - x.softmax(0)[0], backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(got, share.cumsum(0) - share[0])
    (report,) = backend.reports
    assert not report.rewrites and not report.refusals


def test_a_normaliser_alone_that_no_kernel_takes_is_refused(monkeypatch):
    monkeypatch.setattr(match_parallel, "supports", lambda *args: "not on a Tuesday")
    q, k, _ = operands(BHTK)
    backend = Passes()
    torch.compile(lambda q, k: (q.exp() @ k.exp().mT).tril().sum(-1), backend=backend, fullgraph=True)(q, k)
    (refusal,) = backend.report.refusals
    assert (refusal.reason, refusal.detail) == ("no_kernel", "not on a Tuesday")

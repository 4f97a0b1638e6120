"""Parallel and prefix-sum forms in many spellings: recognised, with the values and gradients of the program."""

import math

import pytest
import torch
import torch.nn.functional as F
from parallel import assert_matched, operands

BHTK = "bhtk bhtk bhtv"
BTHK = "bthk bthk bthv"


def causal(T):
    return torch.ones(T, T, dtype=torch.bool).tril()


# Linear attention: the mask, the products and the axes.


def by_tril(q, k, v):
    return (q @ k.transpose(-1, -2)).tril() @ v


def by_mask_product(q, k, v):
    T = q.shape[2]
    return torch.matmul(torch.matmul(q, k.mT) * torch.tril(torch.ones(T, T)), v)


def by_masked_fill(q, k, v):
    scores = torch.einsum("bhik,bhjk->bhij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhij,bhjv->bhiv", scores.masked_fill(~causal(q.shape[2]), 0), v)


def by_masked_fill_of_triu(q, k, v):
    T = q.shape[2]
    mask = torch.triu(torch.ones(T, T), diagonal=1).bool()
    scores = q @ k.transpose(2, 3)
    scores.masked_fill_(mask, 0.0)
    return scores @ v / math.sqrt(q.shape[-1])


def by_where(q, k, v):
    t = torch.arange(q.shape[2])
    return torch.where(t[:, None] >= t[None, :], q @ k.mT, 0.0) @ (0.5 * v)


def by_comparison_of_a_difference(q, k, v):
    t = torch.arange(q.shape[2])
    return ((t.unsqueeze(0) - t.unsqueeze(1) <= 0).to(q.dtype) * (q @ k.mT)) @ v


def by_mask_equal_zero(q, k, v):
    T = q.shape[2]
    mask = torch.tril(torch.ones(T, T)).view(1, 1, T, T)
    return (q @ k.mT).masked_fill(mask[:, :, :T, :T] == 0, 0) @ v


def by_logical_masks(q, k, v):
    t = torch.arange(q.shape[2])
    above, equal = t[:, None] > t, t[:, None] == t
    return (q @ k.mT * torch.logical_or(above, equal)) @ v


def by_one_einsum(q, k, v):
    return torch.einsum("bhik,bhjk,ij,bhjv->bhiv", q, k, torch.ones(q.shape[2], q.shape[2]).tril(), v)


def by_bmm(q, k, v):
    B, H, T = q.shape[:3]
    q, k, v = (x.reshape(B * H, T, x.shape[-1]) for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).tril(0), v).view(B, H, T, -1)


def by_sums(q, k, v):
    P = (q[:, :, :, None] * k[:, :, None]).sum(-1) * causal(q.shape[2])
    return (P[..., None] * v[:, :, None]).sum(3)


def by_index_assignment(q, k, v):
    scores = q @ k.mT
    scores[:, :, ~causal(q.shape[2])] = 0
    return scores @ v


def by_transposed_scores(q, k, v):
    return (k @ q.mT).triu().transpose(2, 3) @ v


def with_feature_maps(q, k, v):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return (q @ k.mT).tril() @ v


def in_float32(q, k, v):
    return ((q.float() @ k.float().mT).tril() @ v.float()).to(v.dtype)


def of_permuted_axes(q, k, v):
    T = q.shape[1]
    P = torch.einsum("bihk,bjhk->bijh", q, k) * torch.ones(T, T).tril()[None, :, :, None]
    return torch.einsum("bijh,bjhv->bihv", P, v)


def of_time_first(q, k, v):
    """[T, B, H, K]"""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    return ((q @ k.mT).tril() @ v).permute(2, 0, 1, 3)


def of_one_head(q, k, v):
    return torch.tril(q @ k.T) @ v


def of_batched_heads(q, k, v):
    B, T, D = q.shape
    q, k, v = (x.view(B, T, 2, -1).transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT).tril() @ v).transpose(1, 2).reshape(B, T, D)


def with_shared_keys(q, k, v):
    return (torch.einsum("bhik,bjk->bhij", q, k)).tril() @ v[:, None]


def with_padding(q, k, v):
    keep = torch.arange(q.shape[2]) < 5
    return (q @ k.mT).masked_fill(~causal(q.shape[2]) | ~keep, 0) @ v


@pytest.mark.parametrize(
    "fn, axes",
    [
        (by_tril, BHTK),
        (by_mask_product, BHTK),
        (by_masked_fill, BHTK),
        (by_masked_fill_of_triu, BHTK),
        (by_where, BHTK),
        (by_comparison_of_a_difference, BHTK),
        (by_mask_equal_zero, BHTK),
        (by_logical_masks, BHTK),
        (by_one_einsum, BHTK),
        (by_bmm, BHTK),
        (by_sums, BHTK),
        (by_index_assignment, BHTK),
        (by_transposed_scores, BHTK),
        (with_feature_maps, BHTK),
        (in_float32, BHTK),
        (of_permuted_axes, BTHK),
        (of_time_first, "tbhk tbhk tbhv"),
        (of_one_head, "tk tk tv"),
        (of_batched_heads, "btv btv btv"),
        (with_shared_keys, "bhtk btk btv"),
        (with_padding, BHTK),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_linear_attention(fn, axes):
    report = assert_matched(fn, operands(axes), "linear_attention")
    assert report.rewrites[0].equation == "S' = S + k v^T"


# Retention: a constant decay.


def by_power(q, k, v):
    t = torch.arange(q.shape[2])
    distance = t[:, None] - t
    return (q @ k.mT * torch.where(distance >= 0, 0.9**distance, 0)) @ v


def by_power_of_a_clamped_distance(q, k, v):
    t = torch.arange(q.shape[2])
    distance = (t[:, None] - t[None]).clamp(min=0)
    return (q @ k.mT * (0.9 ** distance.float()).tril()) @ v


def by_head_gammas(q, k, v):
    T, H = q.shape[2], q.shape[1]
    gamma = 1 - 2.0 ** (-5 - torch.arange(H))
    t = torch.arange(T)
    D = gamma[:, None, None] ** (t[:, None] - t)
    return (q @ k.mT * torch.tril(D)) @ v


def by_alibi(q, k, v):
    t = torch.arange(q.shape[2])
    bias = -0.1 * (t[:, None] - t[None, :]).abs()
    return (torch.exp(bias.masked_fill(t[:, None] < t, -math.inf)) * (q @ k.mT)) @ v


def by_bias_of_infinity(q, k, v):
    T = q.shape[2]
    t = torch.arange(T)
    bias = torch.full((T, T), float("-inf")).triu(1) - 0.2 * (t[:, None] - t)
    return (bias.exp() * (q @ k.mT)) @ v


def by_learned_gamma(q, k, v, a):
    t = torch.arange(q.shape[2])
    D = torch.sigmoid(a)[:, None, None] ** (t[:, None] - t)
    return (q @ k.mT * D * (t[:, None] >= t)) @ v


def by_given_gamma(q, k, v, a):
    """Of either sign, without a gradient."""
    t = torch.arange(q.shape[2])
    a = a.detach().tanh()
    return (q @ k.mT * (a[:, None, None] ** (t[:, None] - t)).tril()) @ v + 0 * q.sum()


def by_nan_removal(q, k, v):
    t = torch.arange(q.shape[2])
    D = (0.95 ** (t[:, None] - t)) * (t[:, None] >= t).float()
    D[D != D] = 0
    return (q @ k.mT * D) @ v


@pytest.mark.parametrize(
    "fn",
    [
        by_power,
        by_power_of_a_clamped_distance,
        by_head_gammas,
        by_alibi,
        by_bias_of_infinity,
        by_learned_gamma,
        by_given_gamma,
        by_nan_removal,
    ],
)
def test_retention(fn):
    assert_matched(fn, operands(BHTK + (" h" if fn in (by_learned_gamma, by_given_gamma) else "")), "retention")


# A decay a step.


def by_masked_difference(q, k, v, g):
    G = g.cumsum(-1)
    D = (G[..., :, None] - G[..., None, :]).masked_fill(~causal(g.shape[-1]), -math.inf)
    return (q @ k.mT * D.exp()) @ v


def by_exponential_then_mask(q, k, v, g):
    G = torch.cumsum(F.logsigmoid(g), dim=2)
    return (q @ k.mT * torch.exp(G.unsqueeze(3) - G.unsqueeze(2))).tril() @ v


def by_where_of_exponential(q, k, v, g):
    G = g.cumsum(-1)
    D = torch.where(causal(g.shape[-1]), torch.exp(G[..., None] - G[..., None, :]), 0)
    return torch.einsum("bhij,bhij,bhjv->bhiv", q @ k.mT, D, v)


def by_segment_sum(q, k, v, g):
    """As Mamba-2 writes it."""
    T = g.shape[-1]
    x = g[..., None].expand(*g.shape, T)
    x = x.masked_fill(~torch.tril(torch.ones(T, T, dtype=torch.bool), diagonal=-1), 0)
    x = torch.cumsum(x, dim=-2)
    x = x.masked_fill(~torch.tril(torch.ones(T, T, dtype=torch.bool), diagonal=0), -torch.inf)
    return torch.einsum("bhik,bhjk,bhij,bhjv->bhiv", q, k, torch.exp(x), v)


def by_time_before_heads(q, k, v, g):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    G = g.transpose(1, 2).cumsum(1)
    D = torch.exp(G[:, :, None] - G[:, None])
    D = D * causal(g.shape[-1])[None, :, :, None]
    P = torch.einsum("bihk,bjhk->bijh", q, k) * D
    return torch.einsum("bijh,bjhv->bihv", P, v).transpose(1, 2)


def by_given_sums(q, k, v, g):
    """The cumulative sums are data."""
    G = torch.sigmoid(g) * 0.1
    return ((G[..., None] - G[..., None, :]).exp() * (q @ k.mT)).tril() @ v


def by_two_decays(q, k, v, g):
    T = g.shape[-1]
    G, t = g.cumsum(-1), torch.arange(T)
    D = torch.exp(G[..., None] - G[..., None, :]) * 0.9 ** (t[:, None] - t)
    return (q @ k.mT * D).tril() @ v


def by_dt(q, k, v, g):
    """A per head, dt per step, both for the gate and for the input, with keys shared between the heads."""
    A, dt = -torch.arange(1.0, g.shape[1] + 1), F.softplus(g)
    G = (dt * A[:, None]).cumsum(-1)
    D = torch.exp(G[..., None] - G[..., None, :]).tril()
    return torch.einsum("bik,bjk,bhij,bhj,bhjv->bhiv", q[:, 0], k[:, 0], D, dt, v)


def by_exponentials_of_rows_and_columns(q, k, v, g):
    G = g.cumsum(-1)[..., None]
    return ((q * G.exp()) @ (k * (-G).exp()).mT).tril() @ v


@pytest.mark.parametrize(
    "fn",
    [
        by_masked_difference,
        by_exponential_then_mask,
        by_where_of_exponential,
        by_segment_sum,
        by_time_before_heads,
        by_given_sums,
        by_two_decays,
        by_dt,
        by_exponentials_of_rows_and_columns,
    ],
)
def test_simple_gla(fn):
    q, k, v, g = operands(BHTK + " bht")
    assert_matched(fn, [q, k, v, -g.abs() * 0.3], "simple_gla", then="aot_eager")


def by_exponentials_of_keys(q, k, v, g):
    G = g.cumsum(2)
    return ((q * G.exp()) @ (k / G.exp()).mT).tril() @ v


def test_gla():
    q, k, v, g = operands(BHTK + " bhtk")
    assert_matched(by_exponentials_of_keys, [q, k, v, -g.abs() * 0.3], "gla")

"""Normalise: every spelling of one update and one read-out is the same recurrence, with any axes missing."""

import einops
import pytest
import torch
import torch.nn.functional as F
from programs import Cases, assert_rewritten, bare, operands

CASES = Cases()

# Spellings of the write and of the read-out.


@CASES("linear_attention", "bthk bthk bthv")
def multiply_and_sum(q, k, v):
    S = bare(q, v)
    o = torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        o[:, t] = (q[:, t].unsqueeze(-1) * S).sum(-2)
    return o, S


@CASES("linear_attention", "bthk bthk bthv")
def einsum(q, k, v):
    S, outs = bare(q, v), []
    for t in range(q.size(1)):
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(outs, dim=1)


@CASES("linear_attention", "bthk bthk bthv")
def one_einsum_with_three_operands(q, k, v):
    S, outs = bare(q, v), []
    scale = torch.full((q.shape[2],), 0.5)
    for t in range(q.size(1)):
        S = S + torch.einsum("bhk,bhv,h->bhkv", k[:, t], v[:, t], scale)
        outs.append(torch.einsum("bhk,bhkv,h->bhv", q[:, t], S, scale))
    return torch.stack(outs, dim=1)


@CASES("linear_attention", "bhtk bhtk bhtv")
def matmul_from_a_number(q, k, v):
    S, o = 0, torch.empty_like(v)
    for t in range(q.shape[2]):
        S = S + k[:, :, t, :, None] @ v[:, :, t, None, :]
        o[:, :, t] = (q[:, :, t, None, :] @ S).squeeze(-2)
    return o


@CASES("linear_attention", "bthk bthk bthv")
def expand(q, k, v):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S + k[:, t].unsqueeze(-1).expand(S.shape) * v[:, t].unsqueeze(-2).expand_as(S)
        o[:, t] = (q[:, t].unsqueeze(-1).expand(-1, -1, -1, v.shape[-1]) * S).sum(2)
    return o, S


@CASES("linear_attention", "tk tk tv")
def outer(q, k, v):
    S, o = q.new_zeros(q.shape[1], v.shape[1]), torch.zeros_like(v)
    for t in range(q.shape[0]):
        S = S + torch.outer(k[t], v[t])
        o[t] = q[t] @ S
    return o


@CASES("linear_attention", "tk tk tv")
def matrix_times_vector_of_the_transpose(q, k, v):
    S, o = q.new_zeros(v.shape[1], q.shape[1]), torch.zeros_like(v)
    for t in range(q.shape[0]):
        S = S + torch.outer(k[t], v[t]).T
        o[t] = torch.mv(S, q[t])
    return o, S


@CASES("delta_rule", "tk tk tv t kk")
def computed_twice_with_views_in_place(q, k, v, beta, W):
    """PyTorch itself writes `squeeze_` behind a product with a vector."""
    S, outs = q.new_zeros(q.shape[1], v.shape[1]), []
    for t in range(q.shape[0]):
        error = v[t] - (S * F.linear(k[t], W).unsqueeze(-1)).sum(0)
        S = S + torch.outer(F.linear(k[t], W), beta[t] * error)
        outs.append(q[t] @ S)
    return torch.stack(outs), S


@CASES("linear_attention", "bthk bthk bthv")
def addcmul(q, k, v):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = torch.addcmul(S, k[:, t].unsqueeze(-1), v[:, t].unsqueeze(-2), value=0.5)
        o[:, t] = (q[:, t].unsqueeze(-1) * S).sum(-2)
    return o, S


@CASES("retention", "btk btk btv")
def baddbmm(q, k, v):
    S, o = q.new_zeros(q.shape[0], q.shape[2], v.shape[2]), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = torch.baddbmm(S, k[:, t].unsqueeze(2), v[:, t].unsqueeze(1), beta=0.9, alpha=0.5)
        o[:, t] = torch.bmm(q[:, t].unsqueeze(1), S).squeeze(1)
    return o, S


@CASES("gla", "btD btD btE btD", D=8, E=12)
def einops_of_merged_heads(q, k, v, g):
    S, o = q.new_zeros(q.shape[0], 2, 4, 6), torch.zeros_like(v)
    a = F.logsigmoid(g)
    for t in range(q.shape[1]):
        q_t = einops.rearrange(q[:, t], "b (h k) -> b h k", h=2)
        k_t = einops.rearrange(k[:, t], "b (h k) -> b h k", h=2)
        v_t = einops.rearrange(v[:, t], "b (h v) -> b h v", h=2)
        S = S * einops.rearrange(a[:, t].exp(), "b (h k) -> b h k 1", h=2)
        S = S + einops.einsum(k_t, v_t, "b h k, b h v -> b h k v")
        o[:, t] = einops.rearrange(einops.einsum(q_t, S, "b h k, b h k v -> b h v"), "b h v -> b (h v)")
    return o


@CASES("gla", "btD btD btE btD", D=8, E=12)
def views_of_merged_heads(q, k, v, g):
    S, o = q.new_zeros(q.shape[0], 2, 4, 6), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t]).view(-1, 2, 4, 1)
        S = S + k[:, t].view(-1, 2, 4, 1) * v[:, t].reshape(-1, 2, 1, 6)
        o[:, t] = (q[:, t].view(-1, 2, 1, 4) @ S).flatten(1)
    return o, S


@CASES("gla", "bthk bthk bthv bthk")
def expanded_polynomial(q, k, v, g):
    """The read-out of the new state, multiplied out before the state is updated."""
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        a = torch.exp(-g[:, t].abs())
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t] * a, S) + (q[:, t] * k[:, t]).sum(-1, keepdim=True) * v[:, t]
        S = S * a[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
    return o, S


@CASES("simple_gla", "bthk bthk bthv bth")
def subtracted_twice(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = -(-S * torch.sigmoid(g[:, t])[..., None, None] - k[:, t][..., None] * v[:, t][..., None, :])
        o[:, t] = torch.matmul(S.mT, q[:, t].unsqueeze(-1)).squeeze(-1)
    return o, S


# Sizes and axes that are not all there.


@CASES("gla", "tk tk tv tk")
def no_batch_no_heads(q, k, v, g):
    S, o = q.new_zeros(q.shape[1], v.shape[1]), torch.zeros_like(v)
    for t in range(q.shape[0]):
        S = S * g[t].sigmoid()[:, None] + torch.outer(k[t], v[t])
        o[t] = q[t] @ S
    return o, S


@CASES("simple_gla", "btk btk btv bt")
def no_heads(q, k, v, g):
    S, o = q.new_zeros(q.shape[0], q.shape[2], v.shape[2]), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * g[:, t].sigmoid()[:, None, None] + k[:, t, :, None] * v[:, t, None, :]
        o[:, t] = torch.einsum("bk,bkv->bv", q[:, t], S)
    return o, S


@CASES("retention", "thk thk thv")
def no_batch(q, k, v):
    S, o = q.new_zeros(q.shape[1], q.shape[2], v.shape[2]), torch.zeros_like(v)
    gamma = torch.tensor([0.9, 0.5]).view(-1, 1, 1)
    for t in range(q.shape[0]):
        S = S * gamma + k[t][..., None] * v[t][:, None]
        o[t] = torch.einsum("hk,hkv->hv", q[t], S)
    return o, S


@CASES("linear_attention", "bthgk btgk btgv", g=3)
def two_axes_of_heads(q, k, v):
    k, v = k.unsqueeze(2).expand(-1, -1, 2, -1, -1), v.unsqueeze(2).expand(-1, -1, 2, -1, -1)
    S, outs = q.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[-1]), []
    for t in range(q.shape[1]):
        S = S + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        outs.append((q[:, t].unsqueeze(-1) * S).sum(-2))
    return torch.stack(outs, 1), S


@CASES("gla", "bthk bthk bthv bthk")
def autocast_that_is_off(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        with torch.autocast("cpu", enabled=False):
            S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
            o[:, t] = (q[:, t][..., None] * S).sum(-2)
    return o, S


@pytest.mark.parametrize("fn, families, axes, sizes", CASES)
def test_recognised(fn, families, axes, sizes):
    report = assert_rewritten(fn, operands(axes, **sizes), families)
    (rewrite,) = report.rewrites
    assert rewrite.source.startswith("test_normalise.py:")


def in_place_methods(q, k, v, g, S0):
    S, o = S0.clone(), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S.mul_(g[:, t].sigmoid()[:, :, None, None])
        S.add_(k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2))
        o[:, t] = torch.einsum("bhkv,bhk->bhv", S, q[:, t])
    return o, S


def in_place_operators(q, k, v, g, S0):
    S, o = S0 + 0, torch.zeros_like(v)
    for t in range(q.shape[1]):
        S *= g[:, t].sigmoid()[..., None, None]
        S += k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] += (q[:, t][..., None] * S).sum(-2)
    return o, S


def from_a_state(q, k, v, g, S0):
    S, outs = S0, []
    for t in range(q.shape[1]):
        S = S * g[:, t].sigmoid()[..., None, None] + k[:, t][..., None] * v[:, t][..., None, :]
        outs.append((q[:, t][..., None] * S).sum(-2))
    return torch.stack(outs, 1), S


@pytest.mark.parametrize("fn", [in_place_methods, in_place_operators, from_a_state], ids=lambda f: f.__name__)
def test_updates_in_place(fn):
    """Eager autograd refuses most of these: it would need the states that they overwrite."""
    assert_rewritten(fn, operands("bthk bthk bthv bth bhkv"), "simple_gla", reference=from_a_state)


def usual(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None, None] + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


@pytest.mark.parametrize(
    "sizes", [{"b": 1}, {"h": 1}, {"b": 1, "h": 1}, {"v": 1}, {"t": 1}], ids=lambda s: "".join(f"{n}{s[n]}" for n in s)
)
def test_axes_of_size_one(sizes):
    assert_rewritten(usual, operands("bthk bthk bthv bth", **sizes), "simple_gla")

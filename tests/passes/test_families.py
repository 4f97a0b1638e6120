"""Families: the axes of decay and erase name the family, in every spelling; near misses go to another one or loop."""

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
    operands,
    over_time,
    read,
    write,
)

CASES = Cases()


# delta_rule: S' = (I - beta k k^T) S + beta k v^T


@CASES.cell("delta_rule", "bhkv bthk bthk bthv bth")
def delta_as_a_correction(S, q, k, v, beta):
    u = v - (k[..., None] * S).sum(-2)
    S = S + beta[..., None, None] * k[..., None] * u[..., None, :]
    return (q[..., None] * S).sum(-2), S


@CASES.cell("delta_rule", "bhkv bthk bthk bthv bth")
def delta_multiplied_out(S, q, k, v, beta):
    S = S - torch.einsum("bh,bhk,bhl,bhlv->bhkv", beta, k, k, S) + torch.einsum("bh,bhk,bhv->bhkv", beta, k, v)
    return read(q, S), S


@CASES.cell("delta_rule", "bhvk bthk bthk bthv bth")
def delta_on_values_times_keys(S, q, k, v, beta):
    u = (v.unsqueeze(-1) - S @ k.unsqueeze(-1)) * beta[..., None, None]
    S = S + u @ k.unsqueeze(-2)
    return (S @ q.unsqueeze(-1)).squeeze(-1), S


@CASES.cell("delta_rule", "bhkv bthk bthk bthv")
def delta_without_beta(S, q, k, v):
    k = F.normalize(k, dim=-1)
    S = S + write(k, v - read(k, S))
    return read(q, S), S


@CASES.cell("delta_rule", "bkv btk btk btv bt")
def delta_by_baddbmm(S, q, k, v, beta):
    u = (v - torch.bmm(k.unsqueeze(1), S).squeeze(1)) * beta.sigmoid().unsqueeze(-1)
    S = torch.baddbmm(S, k.unsqueeze(2), u.unsqueeze(1))
    return torch.bmm(q.unsqueeze(1), S).squeeze(1), S


@CASES.cell("delta_rule", "bhkv bthk bthk bthv bth")
def delta_read_before_the_update(S, q, k, v, beta):
    o = read(q, S)
    return o, S + write(k, beta[..., None] * (v - read(k, S)))


@CASES.cell("delta_rule", "bhkv bthk bthk bthv bth")
def delta_of_a_key_divided_by_its_norm(S, q, k, v, beta):
    """The scalars of the key are in the erase twice and in the write once."""
    k = k / k.norm(dim=-1, keepdim=True)
    return read(q, S), S + write(k, beta[..., None] * (v - read(k, S)))


@CASES.cell("delta_rule", "bhkv bthk bthk bthv bth h")
def delta_of_values_with_a_scale(S, q, k, v, beta, scale):
    S = S + write(beta[..., None] * k, scale[:, None] * v - read(k, S))
    return read(q, S), S


# gated_delta_rule: S' = a (I - beta k k^T) S + beta k v^T


@CASES.cell("gated_delta_rule", "bhkv bthk bthk bthv bth bth")
def gated_decay_first(S, q, k, v, beta, g):
    S = S * torch.sigmoid(g)[..., None, None]
    S = S + write(k, (v - read(k, S)) * beta[..., None])
    return read(q, S), S


@CASES.cell("gated_delta_rule", "bhkv bthk bthk bthv bth bth")
def gated_decay_last(S, q, k, v, beta, g):
    erased = S - write(beta[..., None] * k, read(k, S))
    S = torch.exp(-F.softplus(g))[..., None, None] * erased + write(beta[..., None] * k, v)
    return read(q, S), S


@CASES.cell("gated_delta_rule", "bhvk bthk bthk bthv bth bth")
def gated_on_values_times_keys(S, q, k, v, beta, g):
    S = S * torch.sigmoid(g)[..., None, None]
    u = beta[..., None] * (v - torch.einsum("bhvk,bhk->bhv", S, k))
    S = S + torch.einsum("bhv,bhk->bhvk", u, k)
    return torch.einsum("bhvk,bhk->bhv", S, q), S


@CASES.cell("gated_delta_rule", "bhkv bthk bthk bthv bth")
def gated_by_a_constant(S, q, k, v, beta):
    S = 0.9 * S
    S = S + write(k, (v - read(k, S)) * beta[..., None])
    return read(q, S), S


@CASES.cell("gated_delta_rule", "bhkv bthk bthk bthv bth bth")
def gated_read_before_the_update(S, q, k, v, beta, g):
    o = read(q, S) * q.shape[-1] ** -0.5
    S = S * torch.sigmoid(g)[..., None, None]
    return o, S + write(k, (v - read(k, S)) * beta[..., None])


# kda: S' = (I - beta k k^T) diag(a) S + beta k v^T


@CASES.cell("kda", "bhkv bthk bthk bthv bth bthk")
def kda_decay_first(S, q, k, v, beta, g):
    S = S * torch.sigmoid(g)[..., None]
    S = S + write(k, (v - read(k, S)) * beta[..., None])
    return read(q, S), S


@CASES.cell("kda", "bhvk bthk bthk bthv bth bthk")
def kda_on_values_times_keys(S, q, k, v, beta, g):
    a = torch.exp(-F.softplus(g))
    u = beta[..., None] * (v - (S * (a * k)[..., None, :]).sum(-1))
    S = S * a[..., None, :] + u[..., None] * k[..., None, :]
    return (S @ q[..., None]).squeeze(-1), S


@CASES.cell("kda", "bhkv bthk bthk bthv bthk")
def kda_read_before_the_update(S, q, k, v, g):
    o = read(q, S)
    S = S * torch.sigmoid(g)[..., None]
    return o, S + write(k, v - read(k, S))


# dplr: S' = (diag(a) + b c^T) S + k v^T


@CASES.cell("dplr", "bhvk bthk bthk bthv bthk bthk bthk")
def dplr_as_in_rwkv7(S, r, k, v, w, a, kk):
    kk = F.normalize(kk, dim=-1)
    removed = S @ -kk.unsqueeze(-1)
    S = S * torch.exp(-torch.exp(w)).unsqueeze(-2) + removed @ (kk * torch.sigmoid(a)).unsqueeze(-2)
    S = S + v.unsqueeze(-1) @ k.unsqueeze(-2)
    return (S @ r.unsqueeze(-1)).squeeze(-1), S


@CASES.cell("dplr", "bhkv bthk bthk bthv bthk bthk bthk")
def dplr_on_keys_times_values(S, q, k, v, g, b, c):
    S = torch.sigmoid(g)[..., None] * S + torch.einsum("bhk,bhl,bhlv->bhkv", b, c, S) + write(k, v)
    return read(q, S), S


@CASES.cell("dplr", "bhkv bthk bthk bthv bthk bthk")
def dplr_without_decay(S, q, k, v, b, c):
    S = S + write(b, read(c, S)) * 0.5 + write(k, v)
    return read(q, S), S


@CASES.cell("dplr", "bhkv bthk bthk bthv bth bth")
def dplr_of_an_erase_that_is_not_decayed(S, q, k, v, beta, g):
    """One step away from the gated delta rule: what is erased is read from the state as it was before the decay."""
    u = (v - read(k, S)) * beta[..., None]
    S = S * torch.sigmoid(g)[..., None, None] + write(k, u)
    return read(q, S), S


@CASES.cell("dplr", "bhkv bthk bthk bthv bthk")
def dplr_of_a_decay_after_the_erase(S, q, k, v, g):
    """One step away from kda: diag(a) (I - k k^T) in place of (I - k k^T) diag(a)."""
    S = torch.sigmoid(g)[..., None] * (S - write(k, read(k, S))) + write(k, v)
    return read(q, S), S


@CASES.cell("dplr", "bhkv bthk bthk bthv bth bth")
def dplr_of_two_betas(S, q, k, v, beta, gamma):
    S = S - write(beta[..., None] * k, read(k, S)) + write(gamma[..., None] * k, v)
    return read(q, S), S


@CASES.cell("dplr", "bhkv bthk bthk bthv bthk bthk bthk")
def dplr_read_before_the_update(S, q, k, v, g, b, c):
    o = read(q, S)
    return o, torch.sigmoid(g)[..., None] * S + write(b, read(c, S)) + write(k, v)


# rwkv6: gla, read before the update, with a bonus


@CASES.cell("rwkv6", "bhkv bthk bthk bthv bthk hk")
def rwkv6_bonus_on_the_written_matrix(S, r, k, v, w, u):
    kv = write(k, v)
    o = (r.unsqueeze(-2) @ (S + u[..., None] * kv)).squeeze(-2)
    return o, S * torch.exp(-w.exp())[..., None] + kv


@CASES.cell("rwkv6", "bhkv bthk bthk bthv bthk hk")
def rwkv6_bonus_beside_the_read_out(S, r, k, v, w, u):
    o = read(r, S) + (r * u * k).sum(-1, keepdim=True) * v
    return o, S * torch.exp(-w.exp())[..., None] + write(k, v)


@CASES.cell("rwkv6", "bhvk bthk bthk bthv bthk hk")
def rwkv6_on_values_times_keys(S, r, k, v, w, u):
    vk = v[..., None] * k[..., None, :]
    o = torch.einsum("bhvk,bhk->bhv", u.unsqueeze(-2) * vk + S, r)
    return o, S * torch.exp(-w.exp()).unsqueeze(-2) + vk


@CASES.cell("rwkv6", "bhkv bthk bthk bthv bthk k")
def rwkv6_one_bonus_for_all_heads(S, r, k, v, w, u):
    kv = write(k, v)
    return read(r, S + u[:, None] * kv), S * torch.exp(-w.exp())[..., None] + kv


@CASES.cell("rwkv6", "bhkv bthk bthk bthv bthk")
def rwkv6_without_a_bonus(S, r, k, v, w):
    return read(r, S), S * torch.exp(-w.exp())[..., None] + write(k, v)


@CASES.cell("rwkv6", "bhkv bthk bthk bthv bthk bthk")
def rwkv6_bonus_that_changes_with_time(S, r, k, v, w, u):
    """No operand of the kernel: it is added to what the kernel reads."""
    kv = write(k, v)
    return read(r, S + u[..., None] * kv), S * torch.exp(-w.exp())[..., None] + kv


@CASES.cell("rwkv6", "bhkv bthk bthk bthv bthk hk")
def rwkv6_bonus_of_another_key(S, r, k, v, w, u):
    return read(r, S + u[..., None] * write(k.cos(), v)), S * torch.exp(-w.exp())[..., None] + write(k, v)


# The families without an erase, read before the update.


@CASES.cell("linear_attention", "bhkv bthk bthk bthv")
def linear_attention_read_before(S, q, k, v):
    return read(q, S) + v, S + write(k, v)


@CASES.cell("simple_gla", "bhkv bthk bthk bthv bth")
def simple_gla_read_before(S, q, k, v, g):
    return read(q, S), S * torch.sigmoid(g)[..., None, None] + write(k, v)


@CASES.cell("simple_gla", "bhkv bthk bthk bthv bth")
def decayed_but_not_written_when_read(S, q, k, v, g):
    """Between the two: the query takes the decay along."""
    S = S * torch.sigmoid(g)[..., None, None]
    return read(q, S), S + write(k, v)


@pytest.mark.parametrize("fn, families, axes, sizes", CASES)
def test_recognised(fn, families, axes, sizes):
    assert_rewritten(fn, operands(axes, **sizes), families)


@pytest.mark.parametrize("family", ["delta_rule", "gated_delta_rule", "kda", "dplr", "rwkv6"])
def test_the_gradients_go_through_aot(family):
    fn, families, axes, _ = next(c.values for c in CASES if c.values[1] == family)
    assert_rewritten(fn, operands(axes), families, then="aot_eager")


# With one key there is no matrix left.
SIZES = [
    (kda_decay_first, dict(t=70, k=3, v=5), "kda"),
    (kda_decay_first, dict(k=1), "linear_scan"),
    (kda_decay_first, dict(v=1), "kda"),
    (kda_decay_first, dict(b=1, h=1), "kda"),
    (rwkv6_bonus_on_the_written_matrix, dict(t=70, k=3, v=5), "rwkv6"),
    (rwkv6_bonus_on_the_written_matrix, dict(k=1), "linear_scan"),
    (rwkv6_bonus_on_the_written_matrix, dict(v=1), "rwkv6"),
]


@pytest.mark.parametrize("cell, sizes, family", SIZES, ids=[f"{c.__name__}-{s}" for c, s, _ in SIZES])
def test_sizes(cell, sizes, family):
    axes = next(c.values[2] for c in CASES if c.id == cell.__name__)
    assert_rewritten(over_time(cell, axes), [x * 0.5 for x in operands(axes, **sizes)], family)


def test_retention_read_before_the_update():
    """It begins with an idle step, whose decay is another: the kernel is that of a decay for each step."""

    def cell(S, q, k, v, w):
        return read(q, S), S * torch.sigmoid(w)[:, None, None] + write(k, v)

    axes = "bhkv bthk bthk bthv h"
    backend, fn, args = Passes(), over_time(cell, axes), operands(axes)
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), args)
    assert [r.family for r in backend.report.rewrites] == ["retention"] and not backend.report.refusals
    assert "torch.ops.fla_compile.simple_gla" in backend.report.graph("after")


def test_beta_over_values():
    """Each value has an erase of its own: no kernel of one state takes it, and it must not cost the loop."""

    def cell(S, q, k, v, beta):
        S = S + write(k, beta * (v - read(k, S)))
        return read(q, S), S

    axes = "bhkv bthk bthk bthv bthv"
    backend, fn, args = Passes(), over_time(cell, axes), [x * 0.5 for x in operands(axes)]
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), args)
    assert backend.report.rewrites and "validation_failed" not in [r.reason for r in backend.report.refusals]


# Near misses that no family has.


def two_erases(S, q, k, v, b, c):
    S = S + b[..., None] * (c[..., None, :] @ S) + c[..., None] * (b[..., None, :] @ S) + write(k, v)  # here
    return read(q, S), S


def erase_by_a_matrix(S, q, k, v, W):
    S = S + torch.einsum("kl,bhlv->bhkv", W, S) + write(k, v)  # here
    return (q[..., None, :] @ S).squeeze(-2), S


def erase_over_values(S, q, k, v, c):
    """The erase contracts values, the read-out keys."""
    S = S - torch.einsum("bhv,bhw,bhkw->bhkv", c, c, S) + write(k, v)  # here
    return (q[..., None, :] @ S).squeeze(-2), S


def erase_with_a_decay_over_values(S, q, k, v, g):
    S = S * torch.sigmoid(g)[..., None, :]
    S = S + write(k, v - read(k, S))
    return (q[..., None, :] @ S).squeeze(-2), S  # here


def delta_with_more_queries_than_states(S, q, k, v):
    S = S + write(k, v - read(k, S))
    return torch.einsum("bhgk,bhkv->bhgv", q, S), S  # here


LOOPED = [
    (two_erases, "bhkv bthk bthk bthv bthk bthk", "unknown_recurrence", "whole matrix"),
    (erase_by_a_matrix, "bhkv bthk bthk bthv kk", "unknown_recurrence", "whole matrix"),
    (erase_over_values, "bhkv bthk bthk bthv bthv", "unknown_recurrence", "other axes"),
    (erase_with_a_decay_over_values, "bhkv bthk bthk bthv bthv", "no_kernel", "varies over values"),
    (delta_with_more_queries_than_states, "bhkv bthgk bthk bthv", "no_kernel", "these axes"),
]


@pytest.mark.parametrize("cell, axes, reason, detail", LOOPED, ids=[cell.__name__ for cell, *_ in LOOPED])
def test_looped(cell, axes, reason, detail):
    args = [x * 0.5 for x in operands(axes, g=3)]
    assert_looped(over_time(cell, axes), args, reason, detail)


def test_an_erase_of_unknown_sign_needs_no_proof():
    """Only the decay lives in log space."""

    def fn(q, k, v, beta):
        S, outs = bare(q, v), []
        for t in range(q.shape[1]):
            S = S + write(k[:, t] * beta[:, t, :, None], v[:, t] - read(k[:, t], S))
            outs.append(read(q[:, t], S))
        return torch.stack(outs, 1)

    q, k, v, beta = operands("bthk bthk bthv bth")
    assert_rewritten(fn, (q, k, v, beta - beta.mean()), "delta_rule")


def test_the_corrected_value_is_used_elsewhere():
    """An escape: what the delta rule computes on the way is a read-out of the state before the update."""

    def fn(q, k, v, beta):
        S, outs, errors = bare(q, v), [], []
        for t in range(q.shape[1]):
            u = v[:, t] - read(k[:, t], S)
            S = S + write(k[:, t] * beta[:, t, :, None], u)
            outs.append(read(q[:, t], S))
            errors.append(u.square().mean(-1))
        return torch.stack(outs, 1), torch.stack(errors, 1)

    report = assert_rewritten(fn, operands("bthk bthk bthv bth"), "delta_rule")
    assert report.graph("after").count("torch.ops.fla_compile.delta_rule") == 2

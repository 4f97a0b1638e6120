"""Classify: every spelling of a family is recognised and exact; every near miss is refused at its line."""

from collections.abc import Callable
from typing import Any

import einops
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import Passes, assert_refused, assert_rewritten, operands

from fla_compile.passes.classify import EQUATIONS

Case = tuple[Callable, str, Any]
CASES: list[Any] = []


def case(families: str, axes: str, **sizes: int) -> Callable[[Callable], Callable]:
    """A program of these families, called with random operands of these axes."""

    def add(fn: Callable) -> Callable:
        CASES.append(pytest.param(fn, families, axes, sizes, id=fn.__name__))
        return fn

    return add


def bare(q, v):
    return q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])


# Spellings of the write and of the read-out.


@case("linear_attention", "bthk bthk bthv")
def multiply_and_sum(q, k, v):
    S = bare(q, v)
    o = torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        o[:, t] = (q[:, t].unsqueeze(-1) * S).sum(-2)
    return o, S


@case("linear_attention", "bthk bthk bthv")
def einsum(q, k, v):
    S, outs = bare(q, v), []
    for t in range(q.size(1)):
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(outs, dim=1)


@case("linear_attention", "bthk bthk bthv")
def one_einsum_with_three_operands(q, k, v):
    S, outs = bare(q, v), []
    scale = torch.full((q.shape[2],), 0.5)
    for t in range(q.size(1)):
        S = S + torch.einsum("bhk,bhv,h->bhkv", k[:, t], v[:, t], scale)
        outs.append(torch.einsum("bhk,bhkv,h->bhv", q[:, t], S, scale))
    return torch.stack(outs, dim=1)


@case("linear_attention", "bhtk bhtk bhtv")
def matmul_from_a_number(q, k, v):
    S, o = 0, torch.empty_like(v)
    for t in range(q.shape[2]):
        S = S + k[:, :, t, :, None] @ v[:, :, t, None, :]
        o[:, :, t] = (q[:, :, t, None, :] @ S).squeeze(-2)
    return o


@case("linear_attention", "bthk bthk bthv")
def expand(q, k, v):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S + k[:, t].unsqueeze(-1).expand(S.shape) * v[:, t].unsqueeze(-2).expand_as(S)
        o[:, t] = (q[:, t].unsqueeze(-1).expand(-1, -1, -1, v.shape[-1]) * S).sum(2)
    return o, S


@case("linear_attention", "tk tk tv")
def outer(q, k, v):
    S, o = q.new_zeros(q.shape[1], v.shape[1]), torch.zeros_like(v)
    for t in range(q.shape[0]):
        S = S + torch.outer(k[t], v[t])
        o[t] = q[t] @ S
    return o


@case("linear_attention", "tk tk tv")
def matrix_times_vector_of_the_transpose(q, k, v):
    S, o = q.new_zeros(v.shape[1], q.shape[1]), torch.zeros_like(v)
    for t in range(q.shape[0]):
        S = S + torch.outer(k[t], v[t]).T
        o[t] = torch.mv(S, q[t])
    return o, S


@case("linear_attention", "bthk bthk bthv")
def addcmul(q, k, v):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = torch.addcmul(S, k[:, t].unsqueeze(-1), v[:, t].unsqueeze(-2), value=0.5)
        o[:, t] = (q[:, t].unsqueeze(-1) * S).sum(-2)
    return o, S


@case("retention", "btk btk btv")
def baddbmm(q, k, v):
    S, o = q.new_zeros(q.shape[0], q.shape[2], v.shape[2]), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = torch.baddbmm(S, k[:, t].unsqueeze(2), v[:, t].unsqueeze(1), beta=0.9, alpha=0.5)
        o[:, t] = torch.bmm(q[:, t].unsqueeze(1), S).squeeze(1)
    return o, S


@case("gla", "btD btD btE btD", D=8, E=12)
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


@case("gla", "btD btD btE btD", D=8, E=12)
def views_of_merged_heads(q, k, v, g):
    S, o = q.new_zeros(q.shape[0], 2, 4, 6), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t]).view(-1, 2, 4, 1)
        S = S + k[:, t].view(-1, 2, 4, 1) * v[:, t].reshape(-1, 2, 1, 6)
        o[:, t] = (q[:, t].view(-1, 2, 1, 4) @ S).flatten(1)
    return o, S


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


@pytest.mark.parametrize(
    "fn", [in_place_methods, in_place_operators, from_a_state], ids=lambda f: f.__name__
)
def test_updates_in_place(fn):
    """Eager autograd refuses most of these: it would need the states that they overwrite."""
    assert_rewritten(fn, operands("bthk bthk bthv bth bhkv"), "simple_gla", reference=from_a_state)


@case("gla", "bthk bthk bthv bthk")
def expanded_polynomial(q, k, v, g):
    """The read-out of the new state, multiplied out before the state is updated."""
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        a = torch.exp(-g[:, t].abs())
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t] * a, S) + (q[:, t] * k[:, t]).sum(-1, keepdim=True) * v[:, t]
        S = S * a[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
    return o, S


@case("simple_gla", "bthk bthk bthv bth")
def subtracted_twice(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = -(-S * torch.sigmoid(g[:, t])[..., None, None] - k[:, t][..., None] * v[:, t][..., None, :])
        o[:, t] = torch.matmul(S.mT, q[:, t].unsqueeze(-1)).squeeze(-1)
    return o, S


# Sizes and axes that are not all there.


@case("gla", "tk tk tv tk")
def no_batch_no_heads(q, k, v, g):
    S, o = q.new_zeros(q.shape[1], v.shape[1]), torch.zeros_like(v)
    for t in range(q.shape[0]):
        S = S * g[t].sigmoid()[:, None] + torch.outer(k[t], v[t])
        o[t] = q[t] @ S
    return o, S


@case("simple_gla", "btk btk btv bt")
def no_heads(q, k, v, g):
    S, o = q.new_zeros(q.shape[0], q.shape[2], v.shape[2]), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * g[:, t].sigmoid()[:, None, None] + k[:, t, :, None] * v[:, t, None, :]
        o[:, t] = torch.einsum("bk,bkv->bv", q[:, t], S)
    return o, S


@case("retention", "thk thk thv")
def no_batch(q, k, v):
    S, o = q.new_zeros(q.shape[1], q.shape[2], v.shape[2]), torch.zeros_like(v)
    gamma = torch.tensor([0.9, 0.5]).view(-1, 1, 1)
    for t in range(q.shape[0]):
        S = S * gamma + k[t][..., None] * v[t][:, None]
        o[t] = torch.einsum("hk,hkv->hv", q[t], S)
    return o, S


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


@case("linear_attention", "bthgk btgk btgv", g=3)
def two_axes_of_heads(q, k, v):
    k, v = k.unsqueeze(2).expand(-1, -1, 2, -1, -1), v.unsqueeze(2).expand(-1, -1, 2, -1, -1)
    S, outs = q.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[-1]), []
    for t in range(q.shape[1]):
        S = S + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        outs.append((q[:, t].unsqueeze(-1) * S).sum(-2))
    return torch.stack(outs, 1), S


# Where the state comes from, where it goes, and scales.


@case("gla", "bthk bthk bthv bthk bhvk")
def transposed_initial_and_final_state(q, k, v, g, S0):
    S, o = S0.transpose(-1, -2), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.exp(-g[:, t] ** 2)[..., None] + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        o[:, t] = (S * q[:, t][..., None]).sum(2)
    return o, S.mT


@case("gla", "bthk bthv bthk bhkv")
def only_the_final_state(k, v, g, S0):
    S = S0
    for t in range(k.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
    return S


@case("simple_gla", "bthk bthk bthv bth")
def only_the_outputs(q, k, v, g):
    return usual(q, k, v, g)[0]


@case("linear_attention", "bthk bthk bthv")
def scale_everywhere(q, k, v):
    S, o = bare(q, v), torch.zeros_like(v)
    half = torch.tensor(0.5)
    for t in range(q.shape[1]):
        S = S + (k[:, t] * 2.0)[..., None] * (v[:, t] / 3)[..., None, :] * half
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t] * q.shape[-1] ** -0.5, S) * half / 5
    return o, S


@case("retention", "bthk bthk bthv s", s=1)
def scale_of_an_argument(q, k, v, scale):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = 0.9 * S + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S) * scale
    return o


@case("linear_attention", "bthk bthk bthv hv")
def scale_over_values(q, k, v, scale):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S) * scale
    return o


@case("linear_attention", "bthk bthk bthv")
def mean_in_place_of_sum(q, k, v):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = (q[:, t][..., None] * S).mean(-2)
    return o


# Decays.


@case("retention", "bthk bthk bthv")
def constant_for_each_head(q, k, v):
    gamma = 1 - 2.0 ** (-5 - torch.arange(q.shape[2], dtype=torch.float32))
    S, o = q.new_zeros(q.shape[0], q.shape[2], v.shape[3], q.shape[3]), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = gamma.view(1, -1, 1, 1) * S + v[:, t].unsqueeze(-1) * k[:, t].unsqueeze(-2)
        o[:, t] = torch.matmul(S, q[:, t].unsqueeze(-1)).squeeze(-1) * q.shape[-1] ** -0.5
    return o, S


@case("retention", "bthk bthk bthv h")
def learned_for_each_head(q, k, v, w):
    S, o = bare(q, v), torch.zeros_like(v)
    gamma = torch.sigmoid(w)
    for t in range(q.shape[1]):
        S = gamma[:, None, None] * S + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


@case("gla", "bthk bthk bthv hk")
def learned_for_each_key(q, k, v, w):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = torch.sigmoid(w)[..., None] * S + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


@case("simple_gla", "bthk bthk bthv bt")
def shared_by_the_heads(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[:, None, None, None] + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


@case("gla", "bthk bthk bthv tk")
def shared_by_batch_and_heads(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[t])[:, None] + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


@case("gla", "bthk bthk bthv bth hk")
def product_of_two(q, k, v, g, w):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.exp2(-g[:, t].abs())[..., None, None] * torch.sigmoid(w)[..., None] * 0.99
        S = S + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


@case("gla", "bthk bthv bthk")
def write_of_one_minus_the_decay(q, v, g):
    """HGRN-2: what is forgotten makes room for what is written."""
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        a = torch.sigmoid(g[:, t])
        S = S * a[..., None] + (1 - a)[..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


@case("simple_gla", "bthk bthk bthv bth h h")
def mamba2(C, B_, x, dt, A_log, bias):
    """dt = softplus(.), a = exp(dt A): the gate multiplies the write too."""
    S, o = bare(C, x), torch.zeros_like(x)
    A = -A_log.exp()
    for t in range(C.shape[1]):
        step = F.softplus(dt[:, t] + bias)
        S = S * torch.exp(step * A)[..., None, None] + (step[..., None] * B_[:, t])[..., None] * x[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", C[:, t], S)
    return o, S


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


# Types.


@case("simple_gla", "bthk bthk bthv bth")
def narrow_operands_wide_state(q, k, v, g):
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    S, o = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[-1]), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None, None] + k[:, t].float()[..., None] * v[:, t].float()[..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t].float(), S).to(v.dtype)
    return o, S


@case("gla", "bthk bthk bthv bthk")
def double_throughout(q, k, v, g):
    q, k, v, g = q.double(), k.double(), v.double(), g.double()
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


# What stands before and after the core, inside the loop.


@case("linear_attention", "bthk bthk bthv")
def normaliser(q, k, v):
    S, z, o = bare(q, v), torch.zeros_like(q[:, 0]), torch.zeros_like(v)
    for t in range(q.shape[1]):
        q_t, k_t = F.elu(q[:, t]) + 1, F.elu(k[:, t]) + 1
        S = S + k_t[..., None] * v[:, t][..., None, :]
        z = z + k_t
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q_t, S) / ((q_t * z).sum(-1, keepdim=True) + 1e-6)
    return o, S, z


@case("gla", "bthk bthk bthv bthk")
def gated_normaliser_with_a_floor(q, k, v, g):
    S, z, o = bare(q, v), torch.zeros_like(q[:, 0]), torch.zeros_like(v)
    for t in range(q.shape[1]):
        a = torch.sigmoid(g[:, t])
        S = S * a[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        z = z * a + k[:, t]
        norm = torch.einsum("bhk,bhk->bh", q[:, t], z).abs().clamp(min=1.0)
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S) / norm[..., None]
    return o


@case("gla", "bthk bthk bthv bthk bthv v")
def norm_and_gate_after(q, k, v, g, gate, weight):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        y = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
        o[:, t] = F.rms_norm(y, (y.shape[-1],), weight) * F.silu(gate[:, t])
    return o


@case("linear_attention", "bthk bthk bthv")
def feature_maps_and_normalised_keys(q, k, v):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        k_t = F.normalize(k[:, t], dim=-1)
        S = S + k_t[..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", F.relu(q[:, t]).softmax(-1), S)
    return o


@case("simple_gla", "btD Dk Dk Dv D Dv", D=5)
def a_whole_cell(x, wq, wk, wv, wg, wo):
    S, outs = x.new_zeros(x.shape[0], wq.shape[1], wv.shape[1]), []
    for t in range(x.shape[1]):
        x_t = x[:, t]
        S = S * torch.sigmoid(x_t @ wg)[:, None, None] + (x_t @ wk)[:, :, None] * (x_t @ wv)[:, None, :]
        outs.append((((x_t @ wq).unsqueeze(1) @ S).squeeze(1) @ wo.T + x_t).tanh())
    return torch.stack(outs, 1), S


@case("gla + simple_gla", "bthk bthk bthv bthk bth")
def two_independent_states(q, k, v, g, h):
    S, R, o = bare(q, v), bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        kv = k[:, t][..., None] * v[:, t][..., None, :]
        S = S * torch.sigmoid(g[:, t])[..., None] + kv
        R = R * torch.sigmoid(h[:, t])[..., None, None] + kv
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S) * torch.einsum("bhk,bhkv->bhv", k[:, t], R).sigmoid()
    return o, S, R


@case("gla", "bthk bthk bthv bthk")
def same_tensor_in_two_roles(q, k, v, g):
    S, o = q.new_zeros(*q.shape[:1], *q.shape[2:], q.shape[-1]), torch.zeros_like(q)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * k[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", k[:, t], S)
    return o, S


@pytest.mark.parametrize("fn, families, axes, sizes", CASES)
def test_recognised(fn, families, axes, sizes):
    tolerance = 5e-2 if fn is narrow_operands_wide_state else None
    report = assert_rewritten(fn, operands(axes, **sizes), families, tolerance=tolerance)
    (rewrite,) = report.rewrites
    assert rewrite.pattern == "recurrence"
    assert rewrite.equation == "; ".join(EQUATIONS[family] for family in families.split(" + "))
    assert rewrite.source.startswith("test_classify.py:")


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


def test_a_written_matrix_of_higher_rank():
    """A sum over heads makes the written matrix an operand of its own: each of its columns is a head."""

    def fn(q, k, v):
        S, o = q.new_zeros(q.shape[0], q.shape[-1], v.shape[-1]), torch.zeros_like(v[:, :, 0])
        for t in range(q.shape[1]):
            S = S + torch.einsum("bhk,bhv->bkv", k[:, t], v[:, t])
            o[:, t] = torch.einsum("bk,bkv->bv", q[:, t, 0], S)
        return o, S

    assert_rewritten(fn, operands("bthk bthk bthv"), "linear_attention")


def test_a_quadratic_form_is_a_read_out_and_a_product():
    def fn(q, k, v, u):
        S, outs = bare(q, v), []
        for t in range(q.shape[1]):
            S = S * 0.9 + k[:, t][..., None] * v[:, t][..., None, :]
            outs.append(torch.einsum("bhk,bhkv,bhv->bh", q[:, t], S, u[:, t]))
        return torch.stack(outs, 1)

    assert_rewritten(fn, operands("bthk bthk bthv bthv"), "retention")


def test_two_read_outs_of_one_state():
    def fn(q, r, k, v):
        S, o, p = bare(q, v), torch.zeros_like(v), []
        for t in range(q.shape[1]):
            S = S + k[:, t][..., None] * v[:, t][..., None, :]
            o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
            p.append(torch.einsum("bhk,bhkv->bhv", r[:, t], S))
        return o, torch.stack(p, 1), S

    report = assert_rewritten(fn, operands("bthk bthk bthk bthv"), "linear_attention")
    assert report.graph("after").count("torch.ops.fla_compile.linear_attention") == 2


# Every order of axes.


def program(io: str, state: str, family: str, spelling: str) -> Callable:
    """A program whose operands have their axes in the order `io` ("x" is K or V), and whose state has `state`."""
    now = io.replace("t", "")
    q_axes, v_axes = now.replace("x", "k"), now.replace("x", "v")
    g_axes = {"gla": q_axes, "simple_gla": now.replace("x", "")}.get(family, "")
    at, gate_at = io.index("t"), (io if family == "gla" else io.replace("x", "")).index("t")

    def fn(q, k, v, *gate):
        q, k, v = (x.movedim(at, 0) for x in (q, k, v))
        size = dict(zip(q_axes, q[0].shape, strict=True)) | {"v": v[0].shape[now.index("x")]}
        S, outs = q.new_zeros([size[letter] for letter in state]), []
        a = torch.sigmoid(gate[0]).movedim(gate_at, 0) if gate else None
        for t in range(q.shape[0]):
            if a is not None:
                S = torch.einsum(f"{state},{g_axes}->{state}", S, a[t])
            elif family == "retention":
                S = S * 0.9
            if spelling == "einsum":
                S = S + torch.einsum(f"{q_axes},{v_axes}->{state}", k[t], v[t])
                outs.append(torch.einsum(f"{q_axes},{state}->{v_axes}", q[t], S))
            else:
                S = S + laid(k[t], q_axes, state) * laid(v[t], v_axes, state)
                rest = state.replace("k", "")
                y = (laid(q[t], q_axes, state) * S).sum(state.index("k"))
                outs.append(y.permute([rest.index(letter) for letter in v_axes]))
        return torch.stack(outs, at), S

    return fn


def laid(x: torch.Tensor, axes: str, state: str) -> torch.Tensor:
    x = x.permute([axes.index(letter) for letter in state if letter in axes])
    for i, letter in enumerate(state):
        if letter not in axes:
            x = x.unsqueeze(i)
    return x


def operands_of(io: str, family: str, **sizes: int) -> list[torch.Tensor]:
    q_axes, v_axes = io.replace("x", "k"), io.replace("x", "v")
    gate = {"gla": " " + q_axes, "simple_gla": " " + io.replace("x", "")}.get(family, "")
    return operands(f"{q_axes} {q_axes} {v_axes}{gate}", **sizes)


LAYOUTS = [
    ("bthx", "bhkv"), ("bthx", "bhvk"), ("bhtx", "bhkv"), ("tbhx", "hbvk"), ("thbx", "kbhv"), ("bhxt", "bhkv"),
    ("xtbh", "vkhb"), ("txb", "kvb"), ("htx", "hvk"), ("tx", "kv"), ("xt", "vk"),
]  # fmt: skip


@pytest.mark.parametrize("io, state", LAYOUTS, ids=lambda x: x)
@pytest.mark.parametrize("spelling", ["einsum", "multiply"])
def test_orders_of_axes(io, state, spelling):
    family = list(EQUATIONS)[LAYOUTS.index((io, state)) % 4]
    assert_rewritten(program(io, state, family, spelling), operands_of(io, family), family)


@pytest.mark.fuzz
@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_any_order_of_axes(data):
    torch._dynamo.reset()
    head = data.draw(st.sampled_from(["", "b", "h", "bh"]))
    io = "".join(data.draw(st.permutations("t" + head + "x")))
    state = "".join(data.draw(st.permutations(head + "kv")))
    family, spelling = data.draw(st.sampled_from(list(EQUATIONS))), data.draw(st.sampled_from(["einsum", "multiply"]))
    sizes = {letter: data.draw(st.integers(1, 3)) for letter in "bhkv"} | {"k": data.draw(st.integers(2, 4))}
    assert_rewritten(program(io, state, family, spelling), operands_of(io, family, **sizes), family)


# Near misses and escapes.


def squashed(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = torch.tanh(S * g[:, t].exp()[..., None] + k[:, t][..., None] * v[:, t][..., None, :])  # here
        o[:, t] = (q[:, t][..., None] * S).sum(-2)
    return o, S


def squared(q, k, v, g):
    S, o = bare(q, v) + 0.1, torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = 0.1 * S * S + k[:, t][..., None] * v[:, t][..., None, :]  # here
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
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]  # here
        states.append(S)
    return torch.stack(states, 1)


def state_kept_beside_a_read_out(q, k, v, g):
    S, o, states = bare(q, v), torch.zeros_like(v), []
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = (q[:, t][..., None] * S).sum(-2)
        states.append(S.abs())  # here
    return o, torch.stack(states, 1)


def two_coupled_states(q, k, v, g):
    S, R, o = bare(q, v), bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * 0.9 + k[:, t][..., None] * v[:, t][..., None, :]
        R = R * 0.5 + S  # here
        o[:, t] = (q[:, t][..., None] * R).sum(-2)
    return o, S, R


def sum_of_two_outer_products(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        kv = k[:, t][..., None] * v[:, t][..., None, :]
        S = S + kv + g[:, t][..., None] * v[:, t, :, None, :].cos()  # here
        o[:, t] = (q[:, t][..., None] * S).sum(-2)
    return o, S


def dropout(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S + k[:, t][..., None] * F.dropout(v[:, t], 0.5)[..., None, :]  # here
        o[:, t] = (q[:, t][..., None] * S).sum(-2)
    return o, S


def read_before_the_update(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)  # here
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
    return o, S


def decay_over_values(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(v[:, t])[..., None, :] + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = (q[:, t][..., None] * S).sum(-2)  # here
    return o, S


def rolled_state(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S.roll(1, -1) + k[:, t][..., None] * v[:, t][..., None, :]  # here
        o[:, t] = (q[:, t][..., None] * S).sum(-2)
    return o, S


def transposed_state(q, k, v, g):
    S, o = q.new_zeros(*q.shape[:1], *q.shape[2:], q.shape[-1]), torch.zeros_like(q)
    for t in range(q.shape[1]):
        S = 0.5 * S.transpose(-1, -2).contiguous() + k[:, t][..., None] * q[:, t][..., None, :]  # here
        o[:, t] = (q[:, t][..., None] * S).sum(-2)
    return o, S


def decay_of_the_state(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(S) + k[:, t][..., None] * v[:, t][..., None, :]  # here
        o[:, t] = (q[:, t][..., None] * S).sum(-2)
    return o, S


def delta_rule(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        k_t = F.normalize(k[:, t], dim=-1)
        S = S + k_t[..., None] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k_t, S))[..., None, :]  # here
        o[:, t] = (q[:, t][..., None] * S).sum(-2)
    return o, S


def elementwise(q, k, v, g):
    S, o = torch.zeros_like(k[:, 0]), torch.zeros_like(k)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t]) + k[:, t]
        o[:, t] = q[:, t] * S  # here
    return o, S


def state_of_an_unbounded_step(q, k, v, g):
    """The read-out is fine; what else is computed from the state is not."""
    S, o, size = bare(q, v), torch.zeros_like(v), []
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = (q[:, t][..., None] * S).sum(-2)
        size.append((S * S).sum((-2, -1)))  # here
    return o, torch.stack(size, 1)


REFUSED = [
    (state_of_an_unbounded_step, "state_escapes", ""),
    (squashed, "unsupported_op", "tanh"),
    (squared, "not_affine", "multiplies states"),
    (decay_of_unknown_sign, "decay_sign_unknown", "exp(g)"),
    (negative_decay, "decay_sign_unknown", "-1.0"),
    (state_kept_at_each_step, "state_escapes", ""),
    (state_kept_beside_a_read_out, "unsupported_op", "abs"),
    (two_coupled_states, "unknown_recurrence", "one state into another"),
    (sum_of_two_outer_products, "not_outer_product", "2 terms"),
    (dropout, "random_in_loop", ""),
    (read_before_the_update, "no_kernel", "before its update"),
    (decay_over_values, "no_kernel", "over values"),
    (rolled_state, "unsupported_op", "roll"),
    (transposed_state, "unknown_recurrence", "moves"),
    (decay_of_the_state, "unsupported_op", "sigmoid"),
    (delta_rule, "unknown_recurrence", ""),
    (elementwise, "state_escapes", ""),
]


@pytest.mark.parametrize("fn, reason, detail", REFUSED, ids=[fn.__name__ for fn, *_ in REFUSED])
def test_refused_at_its_line(fn, reason, detail):
    assert_refused(fn, operands("bthk bthk bthv bthk"), reason, detail)

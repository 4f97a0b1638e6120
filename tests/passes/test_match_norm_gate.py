"""A norm times a gate is recognised in any spelling, and becomes one node with the same values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from norm_gates import assert_matched
from programs import operands

RMS_SILU, RMS_SIGMOID = "rms_norm(x) * silu(gate)", "rms_norm(x) * sigmoid(gate)"
LAYER_SILU, LAYER_SIGMOID = "layer_norm(x) * silu(gate)", "layer_norm(x) * sigmoid(gate)"
FIRST = "rms_norm(x * silu(gate))"
D = 16
SPELLINGS = []


def spelling(family, axes="btd btd d d", **sizes):
    def add(fn):
        SPELLINGS.append(pytest.param(fn, family, axes, {"d": D, **sizes}, id=fn.__name__))
        return fn

    return add


@spelling(RMS_SILU)
def functional(x, g, w, b):
    return F.rms_norm(x, (D,), w, 1e-5) * F.silu(g)


@spelling(RMS_SILU)
def default_eps(x, g, w, b):
    return F.rms_norm(x, (D,), w) * F.silu(g)


@spelling(RMS_SILU)
def by_hand(x, g, w, b):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w * (g * torch.sigmoid(g))


@spelling(RMS_SILU)
def llama(x, g, w, b):
    h = x.to(torch.float32)
    variance = h.pow(2).mean(-1, keepdim=True)
    h = h * torch.rsqrt(variance + 1e-6)
    return F.silu(g.float()) * (w * h.to(x.dtype))


@spelling(RMS_SILU)
def square_root(x, g, w, b):
    return (x / torch.sqrt(torch.mean(x * x, dim=-1, keepdim=True) + 1e-5)) * w * F.silu(g)


@spelling(RMS_SILU)
def unsqueezed(x, g, w, b):
    return x * (x.square().sum(-1) / D + 1e-5).rsqrt()[..., None] * F.silu(g) * w


@spelling(RMS_SILU)
def power(x, g, w, b):
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).pow(-0.5) * F.silu(g)


@spelling(RMS_SILU)
def reciprocal(x, g, w, b):
    return torch.reciprocal((x.abs() ** 2).mean(-1, keepdim=True).add(1e-5).sqrt()).mul(x).mul(g).mul(g.sigmoid())


@spelling(RMS_SILU)
def vector_norm(x, g, w, b):
    return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) * D**-0.5) * w * F.silu(g)


@spelling(RMS_SIGMOID)
def gemma(x, g, w, b):
    return F.rms_norm(x, (D,), eps=1e-5) * (1 + w) * torch.sigmoid(g)


@spelling(RMS_SIGMOID)
def logistic(x, g, w, b):
    return F.rms_norm(x, (D,), w, 1e-5) / (1 + torch.exp(-g))


@spelling(RMS_SIGMOID)
def hyperbolic(x, g, w, b):
    return F.rms_norm(x, (D,), w, 1e-5) * (0.5 * (1 + torch.tanh(0.5 * g)))


@spelling(RMS_SILU)
def in_place(x, g, w, b):
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    y *= w
    y.mul_(F.silu(g))
    return y


@spelling(LAYER_SILU)
def layer_norm(x, g, w, b):
    return F.layer_norm(x, (D,), w, b) * F.silu(g)


@spelling(LAYER_SIGMOID)
def centred_by_hand(x, g, w, b):
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return ((x - mean) / torch.sqrt(var + 1e-5) * w + b) * torch.sigmoid(g)


@spelling(LAYER_SILU)
def centred_in_steps(x, g, w, b):
    c = x - x.mean(-1, True)
    return c * torch.rsqrt(c.square().mean(-1, True) + 1e-5) * w * F.silu(g)


@spelling(LAYER_SILU)
def biased_variance(x, g, w, b):
    var, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    return torch.addcmul(b, x - mean, torch.rsqrt(var + 1e-5)) * F.silu(g)


@spelling(LAYER_SILU)
def unbiased_variance(x, g, w, b):
    """Another eps and a constant in the weight, but a layer norm all the same."""
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5) * w * F.silu(g)


@spelling(LAYER_SILU)
def second_moment(x, g, w, b):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt(x.square().mean(-1, keepdim=True) - mean**2 + 1e-5) * F.silu(g)


@spelling(LAYER_SILU, "btd btd d d", d=24)
def groups(x, g, w, b):
    return (F.group_norm(x.flatten(0, 1), 4, w, b).view_as(x)) * F.silu(g)


@spelling(LAYER_SILU, "bthv bthv v v", v=8)
def heads(x, g, w, b):
    return (F.layer_norm(x, (8,), w, b) * F.silu(g)).flatten(2)


@spelling(RMS_SILU, "bthv btd v v", v=8, d=16)
def heads_and_a_flat_gate(o, g, w, b):
    return F.rms_norm(o, (8,), w, 1e-5).flatten(2) * F.silu(g)


@spelling(RMS_SILU, "btd btd d d", d=24)
def grouped_weights(x, g, w, b):
    grouped = x.unflatten(-1, (3, 8))
    return F.rms_norm(grouped, (8,), eps=1e-5).flatten(-2) * w * F.silu(g)


@spelling(RMS_SILU, "bthv bthv v v", v=8)
def rows(x, g, w, b):
    shape = x.shape
    x, g = x.reshape(-1, 8), g.reshape(-1, 8)
    y = F.rms_norm(x, (8,), w, 1e-5) * F.silu(g)
    return y.reshape(shape).flatten(2)


@spelling(FIRST)
def gate_first(x, g, w, b):
    u = x * F.silu(g)
    return u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + 1e-5) * w


@spelling("layer_norm(x * sigmoid(gate))")
def gate_first_centred(x, g, w, b):
    return F.layer_norm(torch.sigmoid(g) * x, (D,), w, b)


@spelling("rms_norm(x * sigmoid(gate))")
def own_gate(x, g, w, b):
    """The norm of silu(x)."""
    return F.rms_norm(F.silu(x), (D,), w, 1e-5)


@spelling(RMS_SILU)
def sums_inside(x, g, w, b):
    """What is normalised, and the gate, are sums; what comes in front is left alone."""
    h = x + torch.cumsum(x, 1)
    z = g - x
    return F.rms_norm(h, (D,), w, 1e-5) * F.silu(z)


@pytest.mark.parametrize(("fn", "family", "axes", "sizes"), SPELLINGS)
def test_recognised(fn, family, axes, sizes):
    left = ["mul"] if fn is unbiased_variance else []  # of the weight
    assert_matched(fn, operands(axes, **sizes), family, left=left)

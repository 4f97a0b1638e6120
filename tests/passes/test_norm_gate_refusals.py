"""What is no norm times a gate is left alone; a pattern whose inside is used elsewhere is refused with the line."""

import pytest
import torch
import torch.nn.functional as F
from norm_gates import NormGates, assert_left, assert_matched, refused
from programs import operands

D = 16
RMS_SILU = "rms_norm(x) * silu(gate)"
MISSES = []


def miss(fn):
    MISSES.append(pytest.param(fn, id=fn.__name__))
    return fn


def rms(x, dim=-1):
    return x * torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + 1e-5)


@miss
def over_time(x, g, w, b):
    return rms(x, 1) * w * F.silu(g)


@miss
def over_everything(x, g, w, b):
    return x * torch.rsqrt(x.pow(2).mean() + 1e-5) * w * F.silu(g)


@miss
def eps_outside(x, g, w, b):
    return x / (torch.sqrt(x.pow(2).mean(-1, keepdim=True)) + 1e-2) * w * F.silu(g)


@miss
def added_after(x, g, w, b):
    return x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) + 1e-2) * F.silu(g)


@miss
def tanh_gate(x, g, w, b):
    return rms(x) * torch.tanh(g)


@miss
def gelu_gate(x, g, w, b):
    return rms(x) * F.gelu(g)


@miss
def swish_with_another_slope(x, g, w, b):
    return rms(x) * g * torch.sigmoid(1.702 * g)


@miss
def one_minus_sigmoid(x, g, w, b):
    return rms(x) * torch.sigmoid(-g)


@miss
def no_gate(x, g, w, b):
    return rms(x) * w + F.silu(g)


@miss
def plain_gate(x, g, w, b):
    return rms(x) * g


@miss
def two_gates(x, g, w, b):
    return rms(x) * F.silu(g) ** 2


@miss
def gate_of_the_norm(x, g, w, b):
    y = rms(x)
    return y * F.silu(y) * g


@miss
def gate_computed_from_the_norm(x, g, w, b):
    y = rms(x)
    return y * F.silu(torch.cumsum(y, 1) + g)


@miss
def fourth_power(x, g, w, b):
    return x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-5) * F.silu(g)


@miss
def cube_root(x, g, w, b):
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5) ** (-1 / 3) * F.silu(g)


@miss
def another_tensors_norm(x, g, w, b):
    return torch.cumsum(x, 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * F.silu(g)


@miss
def centred_by_another_mean(x, g, w, b):
    return (x - 2 * x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5) * F.silu(g)


@miss
def not_centred(x, g, w, b):
    return x * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5) * F.silu(g)


@miss
def mean_of_absolute_values(x, g, w, b):
    return x / (x.abs().mean(-1, keepdim=True) + 1e-5) * F.silu(g)


@miss
def root_of_a_square(x, g, w, b):
    """|x| times its own rms: no x."""
    return x.pow(2).sqrt() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * F.silu(g)


@miss
def negative_eps(x, g, w, b):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 4 - 5e-3 * 801) * F.silu(g)


@miss
def detached_statistic(x, g, w, b):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5).detach() * F.silu(g)


@miss
def statistic_without_gradient(x, g, w, b):
    with torch.no_grad():
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    return x * r * F.silu(g)


@miss
def l2norm(x, g, w, b):
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) * torch.sigmoid(g)


@miss
def l2norm_of_an_activation(x, g, w, b):
    y = F.silu(x)
    return y * torch.rsqrt((y * y).sum(-1, keepdim=True) + 1e-6)


@miss
def clamped(x, g, w, b):
    return F.normalize(x, dim=-1) * F.silu(g)


@miss
def gate_over_rows(x, g, w, b):
    return rms(x) * F.silu(g[..., :1])


@miss
def turned(x, g, w, b):
    return rms(x).transpose(1, 2) * F.silu(g).reshape(2, D, 7)


@pytest.mark.parametrize("fn", MISSES)
def test_left_alone(fn):
    assert_left(fn, operands("btd btd d d", d=D))


def test_normalised_value_is_used_elsewhere():
    def fn(x, g, w):
        y = F.rms_norm(x, (D,), w, 1e-5)
        return y * F.silu(g), y.cumsum(1)  # here

    refused(fn, operands("btd btd d", d=D), "intermediate_used", "y is used at test_norm_gate_refusals.py")


def test_statistic_is_used_elsewhere():
    def fn(x, g, w):
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return x * r * w * F.silu(g), r  # here

    refused(fn, operands("btd btd d", d=D), "intermediate_used", "program's result")


def test_one_norm_with_two_gates():
    def fn(x, g, w):
        y = F.rms_norm(x, (D,), w, 1e-5)
        a = y * F.silu(g)  # here
        return a, y * torch.sigmoid(g)

    refused(fn, operands("btd btd d", d=D), "intermediate_used")


def test_what_is_only_a_gate_may_be_used_elsewhere():
    def fn(x, g, w):
        a = F.silu(g)
        return F.rms_norm(x.float(), (D,), w, 1e-5) * a, a, x.float().cumsum(1)

    backend = assert_matched(fn, operands("btd btd d", d=D), RMS_SILU, left=["silu"])
    assert backend.targets.count("silu") == 1


def test_result_may_be_used_often():
    def fn(x, g, w):
        y = F.rms_norm(x, (D,), w, 1e-5) * F.silu(g)
        return y.cumsum(1), y.flatten(1), y

    assert_matched(fn, operands("btd btd d", d=D), RMS_SILU)


def test_gate_is_written_over_inside():
    def fn(x, g, w):
        z = g.cumsum(1)
        return F.rms_norm(x, (D,), w, 1e-5) * F.silu(z, inplace=True)

    assert_matched(fn, operands("btd btd d", d=D), RMS_SILU)


def test_gate_is_written_over_and_used_after():
    def fn(x, g, w):
        z = g.cumsum(1)
        y = F.rms_norm(x, (D,), w, 1e-5) * F.silu(z, inplace=True)  # here
        return y, z

    refused(fn, operands("btd btd d", d=D), "intermediate_used", "written over")


@torch.no_grad()
def verdict(fn, args):
    """What becomes of a program that no gradient is asked of, with the values it had."""
    backend = NormGates()
    got, want = torch.compile(fn, backend=backend, fullgraph=True)(*args), fn(*args)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    return [r.family for r in backend.found[-1].rewrites]


def test_operand_is_written_over_before_the_product():
    """The kernel would read x where the product is, and find another one."""

    def fn(x, g, w):
        x = x.cumsum(1)
        y = F.rms_norm(x, (D,), w, 1e-5)
        x.mul_(2)
        return y * F.silu(g), x

    assert verdict(fn, operands("btd btd d", d=D)) == []


def test_operand_is_written_over_after():
    def fn(x, g, w):
        x = x.cumsum(1)
        y = F.rms_norm(x, (D,), w, 1e-5) * F.silu(g)
        x.mul_(2)
        return y, x

    assert verdict(fn, operands("btd btd d", d=D)) == [RMS_SILU]


def test_gate_is_written_over_after_and_its_gradient_is_wanted():
    """The sigmoid's own gradient needs its result only; the kernel's needs the gate."""

    def fn(x, g, w):
        z = g.cumsum(1)
        y = F.rms_norm(x, (D,), w, 1e-5) * torch.sigmoid(z)  # here
        z.mul_(2)
        return y, z

    refused(fn, operands("btd btd d", d=D), "mutates_input", "z is written over")

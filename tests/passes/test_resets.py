"""Resets: a state that starts anew where a mask says so, as in packed sequences, is a decay of zero there."""

import pytest
import torch
from programs import Cases, Passes, assert_looped, assert_rewritten, operands, over_time

CASES = Cases()


def starts() -> torch.Tensor:
    """[B, T]: sequences of unequal lengths, one of length 1, one that begins at once."""
    start = torch.zeros(2, 7, dtype=torch.bool)
    start[0, [0, 3, 4]] = True
    start[1, 5] = True
    return start


def step(S, q, k, v):
    S = S + k[..., None] * v[..., None, :]
    return torch.einsum("bhk,bhkv->bhv", q, S), S


@CASES.cell("simple_gla", "bhkv bthk bthk bthv bt")
def where_with_a_number(S, q, k, v, start):
    return step(torch.where(start[:, None, None, None], 0.0, S), q, k, v)


@CASES.cell("simple_gla", "bhkv bthk bthk bthv bt")
def where_with_zeros(S, q, k, v, start):
    return step(torch.where(start[:, None, None, None], torch.zeros_like(S), S), q, k, v)


@CASES.cell("simple_gla", "bhkv bthk bthk bthv bt")
def where_of_what_is_kept(S, q, k, v, start):
    return step(torch.where(~start[:, None, None, None], S, 0.0), q, k, v)


@CASES.cell("simple_gla", "bhkv bthk bthk bthv bt")
def masked_fill(S, q, k, v, start):
    return step(S.masked_fill(start[:, None, None, None], 0.0), q, k, v)


@CASES.cell("simple_gla", "bhkv bthk bthk bthv bt")
def one_minus_the_mask(S, q, k, v, start):
    return step(S * (1 - start.to(S.dtype))[:, None, None, None], q, k, v)


@CASES.cell("simple_gla", "bhkv bthk bthk bthv bt")
def times_a_boolean(S, q, k, v, start):
    return step(S * ~start[:, None, None, None], q, k, v)


@CASES.cell("gla", "bhkv bthk bthk bthv bt bthk")
def gate_and_mask(S, q, k, v, start, g):
    return step(S * torch.sigmoid(g)[..., None] * (1 - start.float())[:, None, None, None], q, k, v)


@CASES.cell("gla", "bhkv bthk bthk bthv bt bthk")
def masked_gate(S, q, k, v, start, g):
    a = torch.where(start[:, None, None], 0.0, torch.sigmoid(g))
    return step(S * a[..., None], q, k, v)


@CASES.cell("gla", "bhkv bthk bthk bthv bt bthk")
def masked_gate_filled(S, q, k, v, start, g):
    a = torch.exp(-g.abs()).masked_fill(start[:, None, None], 0.0)
    return step(S * a[..., None], q, k, v)


@CASES.cell("gated_delta_rule", "bhkv bthk bthk bthv bt")
def ungated_delta(S, q, k, v, start):
    """A mask is a gate of its own."""
    S = S.masked_fill(start[:, None, None, None], 0.0)
    S = S + k[..., None] * (v - torch.einsum("bhk,bhkv->bhv", k, S))[..., None, :]
    return torch.einsum("bhk,bhkv->bhv", q, S), S


@CASES.cell("kda", "bhkv bthk bthk bthv bt bthk")
def gated_delta_by_keys(S, q, k, v, start, g):
    S = torch.where(start[:, None, None, None], 0.0, S * torch.sigmoid(g)[..., None])
    S = S + k[..., None] * (v - torch.einsum("bhk,bhkv->bhv", k, S))[..., None, :]
    return torch.einsum("bhk,bhkv->bhv", q, S), S


@CASES.cell("rwkv6", "bhkv bthk bthk bthv bt bthk hk")
def before_a_read_out_with_a_bonus(S, r, k, v, start, w, u):
    S = S.masked_fill(start[:, None, None, None], 0.0)
    kv = k[..., None] * v[..., None, :]
    return torch.einsum("bhk,bhkv->bhv", r, S + u[..., None] * kv), S * torch.exp(-w.exp())[..., None] + kv


@CASES.cell("linear_scan", "bk btk bt btk")
def elementwise(h, x, start, g):
    h = torch.where(start[:, None], 0.0, torch.sigmoid(g) * h) + x
    return h, h


@CASES.cell("linear_scan", "bk btk bt btk")
def of_a_decay_of_unknown_sign(h, x, start, a):
    h = (a * h).masked_fill(start[:, None], 0.0) + x
    return h, h


@CASES.cell("linear_scan", "bhkv bthk bthk bthv bt hkv")
def to_a_learned_state(S, q, k, v, start, S0):
    return step(torch.where(start[:, None, None, None], S0, S), q, k, v)


def arguments(axes: str) -> list[torch.Tensor]:
    args = operands(axes)
    args[axes.split().index("bt")] = starts()
    return args


@pytest.mark.parametrize("fn, families, axes, sizes", CASES)
def test_recognised(fn, families, axes, sizes):
    assert_rewritten(fn, arguments(axes), families)


def test_nothing_of_the_first_sequence_reaches_the_second():
    """Exactly nothing: a state of 1e30 before the reset leaves no trace."""
    fn, _, axes, _ = next(c.values for c in CASES if c.id == "gate_and_mask")
    S, q, k, v, _, g = args = arguments(axes)
    start = torch.zeros(2, 7, dtype=torch.bool)
    start[:, 3] = True
    args[4] = start
    compiled = torch.compile(fn, backend=Passes(), fullgraph=True)
    with torch.no_grad():
        clean = compiled(*args)[0][:, 3:]
        loud = compiled(S * 1e30, q, k, v, start, g)[0][:, 3:]
    torch.testing.assert_close(loud, clean, rtol=1e-5, atol=1e-6)


def clamped(S, q, k, v, start):
    S = S.masked_fill(start[:, None, None, None], 0.0)
    S = torch.clamp(S + k[..., None] * v[..., None, :], -1.0, 1.0)  # here
    return torch.einsum("bhk,bhkv->bhv", q, S), S


def mask_of_the_state(S, q, k, v, start):
    """What is reset depends on the state: no mask that is known for all steps."""
    S = torch.where((S.sum((-1, -2), keepdim=True) > 1.0) | start[:, None, None, None], 0.0, S)  # here
    S = S + k[..., None] * v[..., None, :]
    return torch.einsum("bhk,bhkv->bhv", q, S), S


@pytest.mark.parametrize("cell, detail", [(clamped, "clamp"), (mask_of_the_state, "")], ids=["clamp", "mask"])
def test_looped(cell, detail):
    axes = "bhkv bthk bthk bthv bt"
    assert_looped(over_time(cell, axes), arguments(axes), "unsupported_op", detail)

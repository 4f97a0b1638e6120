"""Alike: what a program computes twice, with its axes in another order each time, is one key, not two."""

import pytest
import torch
import torch.nn.functional as F
from programs import Cases, assert_rewritten, operands, read, write

CASES = Cases()


@CASES.cell("delta_rule", "bhkv bthk bthk bthv bth")
def each_element_of_a_view(S, q, k, v, beta):
    error = v - (F.silu(k)[..., None] * S).sum(-2)
    S = S + F.silu(k[..., None]) * (beta[..., None] * error)[..., None, :]
    return read(q, S), S


@CASES.cell("delta_rule", "bhkv bthk bthk bthv bth")
def normalised_along_an_axis_that_moves(S, q, k, v, beta):
    error = v - (F.normalize(k, dim=-1)[..., None] * S).sum(-2)
    S = S + F.normalize(k[..., None], dim=-2) * (beta[..., None] * error)[..., None, :]
    return read(q, S), S


@CASES.cell("delta_rule", "bhkv bthk bthk bthv bth")
def norms_with_and_without_their_axis(S, q, k, v, beta):
    one, other = k / k.norm(dim=-1, keepdim=True), k * (1 / k.norm(dim=-1))[..., None]
    return read(q, S), S + beta[..., None, None] * write(one, v - read(other, S))


@CASES.cell("delta_rule", "bhkv bthk bthk bthv bth")
def softmax_of_a_transpose(S, q, k, v, beta):
    other = torch.softmax(k.mT, 1).mT
    return read(q, S), S + beta[..., None, None] * write(torch.softmax(k, -1), v - read(other, S))


@CASES.cell("delta_rule", "bhkv bthk bthk bthv bth kk")
def contractions(S, q, k, v, beta, W):
    error = v - (F.linear(k, W)[..., None] * S).sum(-2)
    S = S + (W @ k[..., None]) * (beta[..., None] * error)[..., None, :]
    return read(q, S), S


@CASES.cell("delta_rule", "bhkv bthk bthk bthv bth")
def sums(S, q, k, v, beta):
    other = (F.elu(k.transpose(0, 1)) + 1).transpose(0, 1)
    return read(q, S), S + write(beta[..., None] * (F.elu(k) + 1), v - read(other, S))


@CASES.cell("dplr", "bhkv bthk bthk bthv bth")
def near_miss_softmax_along_another_axis(S, q, k, v, beta):
    other = torch.softmax(k, 1)
    return read(q, S), S + beta[..., None, None] * write(torch.softmax(k, -1), v - read(other, S))


@CASES.cell("dplr", "bhkv bthk bthk bthv bth kk")
def near_miss_the_transposed_contraction(S, q, k, v, beta, W):
    return read(q, S), S + beta[..., None, None] * write(k @ W, v - read(k @ W.transpose(0, 1), S))


@CASES.cell("dplr", "bhkv bthk bthk bthv bth")
def near_miss_another_constant(S, q, k, v, beta):
    other = F.leaky_relu(k[..., None], 0.2)[..., 0]
    return read(q, S), S + beta[..., None, None] * write(F.leaky_relu(k, 0.1), v - read(other, S))


@pytest.mark.parametrize("fn, families, axes, sizes", CASES)
def test_recognised(fn, families, axes, sizes):
    assert_rewritten(fn, [x * 0.5 for x in operands(axes, **sizes)], families)

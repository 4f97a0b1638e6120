"""Heads that a program repeats, or that an operand does not vary over: the kernel gets them once."""

import pytest
import torch
from programs import Cases, assert_rewritten, bare, operands, read, write

from fla_compile.kernels import decay_cpu, decay_heads

CASES = Cases()
AXES = "bthk btgk btgv bthk"


def gla(q, k, v, g, S=None):
    S, o = bare(q, v) if S is None else S, torch.zeros(*q.shape[:3], v.shape[3])
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + write(k[:, t], v[:, t])
        o[:, t] = read(q[:, t], S)
    return o, S


@CASES("gla", AXES, h=6, g=2)
def interleaved(q, k, v, g):
    return gla(q, k.repeat_interleave(3, 2), torch.repeat_interleave(v, 3, dim=-2), g)


@CASES("gla", f"{AXES} bhkv", h=6, g=2)
def expanded(q, k, v, g, S):
    k = k[:, :, :, None].expand(-1, -1, -1, 3, -1).reshape(q.shape)
    return gla(q, k, v.unsqueeze(3).expand(*v.shape[:3], 3, -1).flatten(2, 3), g, S)


@CASES("linear_attention", "bthk btgk btgv", h=6, g=2)
def fewer_states(q, k, v):
    k, v = (x.repeat_interleave(3, 2) for x in (k, v))
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S + write(k[:, t], v[:, t])
        o[:, t] = read(q[:, t], S)
    return o, S


@CASES("simple_gla", "btgk btgk bthv bth", h=4, g=2)
def queries_and_keys(q, k, v, g):
    q, k = (x.repeat_interleave(2, 2) for x in (q, k))
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None, None] + write(k[:, t], v[:, t])
        o[:, t] = read(q[:, t], S)
    return o, S


@CASES.cell("gla", "bghkv btghk btgk btgv btghk", h=3, g=2)
def an_axis_of_its_own(S, q, k, v, g):
    S = S * torch.sigmoid(g)[..., None] + write(k, v)[:, :, None]
    return (q[..., None, :] @ S).squeeze(-2), S


@CASES.cell("retention", "bhkv bthk btk bthv", h=6)
def one_key_for_all_heads(S, q, k, v):
    S = S * 0.9 + k[:, None, :, None] * v[..., None, :]
    return read(q, S), S


@CASES.cell("linear_attention", "bhkv bthk btk btv", h=6)
def states_that_differ_in_the_first_only(S, q, k, v):
    S = S + write(k, v)[:, None]
    return read(q, S), S


# Heads of q, k, v and the decay that the kernel gets, for 6 or, of `queries_and_keys`, 4 heads.
HEADS = {
    "interleaved": (6, 2, 2, 6),
    "expanded": (6, 2, 2, 6),
    "fewer_states": (6, 2, 2, 0),
    "queries_and_keys": (2, 2, 4, 4),
    "an_axis_of_its_own": (6, 2, 2, 6),
    "one_key_for_all_heads": (6, 1, 6, 1),
    "states_that_differ_in_the_first_only": (6, 1, 1, 0),
}


def heads_given(fn, args, families, monkeypatch):
    """The heads of q, k, v and the decay that the kernel is given, after all checks of `assert_rewritten`."""
    seen, forward = [], decay_cpu.chunk_forward

    def spy(q, k, v, g, *rest):
        seen.append((q.shape[2], k.shape[2], v.shape[2], decay_heads.decay_heads(g)))
        return forward(q, k, v, g, *rest)

    monkeypatch.setattr(decay_cpu, "chunk_forward", spy)
    assert_rewritten(fn, args, families)
    return seen[-1]  # those before are of the validation


@pytest.mark.parametrize("fn, families, axes, sizes", CASES)
def test_shared(fn, families, axes, sizes, monkeypatch, request):
    name = request.node.callspec.id.split("-")[0]
    assert heads_given(fn, operands(axes, **sizes), families, monkeypatch) == HEADS[name]


def tiled(q, k, v, g):
    return gla(q, k.repeat(1, 1, 3, 1), v.repeat(1, 1, 3, 1), g)


def read_again(q, k, v, g):
    k, v = (x.repeat_interleave(3, 2) for x in (k, v))
    return *gla(q, k, v, g), k.relu(), v.relu()


def written_to_after(q, k, v, g):
    k, v = k + 1, v + 1
    repeated = [x.repeat_interleave(3, 2) for x in (k, v)]
    k.zero_()
    v.mul_(2)
    return gla(q, *repeated, g)


def without_gradient(q, k, v, g):
    with torch.no_grad():
        k, v = (x.repeat_interleave(3, 2) for x in (k, v))
    return gla(q, k, v, g)


@pytest.mark.parametrize("fn", [tiled, read_again, written_to_after, without_gradient])
def test_left_alone(fn, monkeypatch):
    assert heads_given(fn, operands(AXES, h=6, g=2), "gla", monkeypatch) == (6, 6, 6, 6)

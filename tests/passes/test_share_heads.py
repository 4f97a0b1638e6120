"""Heads that a program repeats, or that an operand does not vary over: the kernel gets them once."""

from pathlib import Path

import pytest
import torch
from programs import Cases, assert_rewritten, bare, operands, read, write

from fla_compile import explain
from fla_compile.kernels import decay_cpu, decay_heads
from fla_compile.passes import share_heads
from fla_compile.passes.heads_check import check_call, check_operand
from fla_compile.passes.log_decay import op_name
from fla_compile.passes.records import Refused
from fla_compile.passes.repeated_heads import Repeated, repeated_heads

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


def test_a_wrong_finding_is_refused(monkeypatch):
    """Heads that lie one group after the other, taken for neighbours."""

    def mistaken(node, axis):
        moves = []
        while node.args and op_name(node) != "repeat":
            moves.append(node)
            node = node.args[0]
        return Repeated(node.args[0], None, 2, tuple(moves)) if node.args else None

    monkeypatch.setattr(share_heads, "repeated_heads", mistaken)
    inputs = operands(AXES, h=6, g=2)
    (refusal,) = explain(tiled, *inputs).refusals
    assert (refusal.pattern, refusal.reason) == ("share_heads", "validation_failed")
    assert refusal.source == f"{Path(__file__).name}:{tiled.__code__.co_firstlineno + 1}"
    torch.testing.assert_close(torch.compile(tiled, backend="fla")(*inputs), tiled(*inputs))


class Values(torch.fx.Interpreter):
    """Notes the value of every node, as Dynamo does."""

    def run_node(self, n):
        n.meta["example_value"] = value = super().run_node(n)
        return value


def traced(fn, *shape):
    gm = torch.fx.symbolic_trace(fn)
    Values(gm).run(torch.zeros(shape))
    operand = gm.graph.output_node().args[0]
    return operand, next(iter(gm.graph.nodes))


# [B, T, 6, K] of x [2, 40, 2, 20]
NEIGHBOURS = {
    "repeat_interleave": lambda x: x.repeat_interleave(3, 2),
    "function": lambda x: torch.repeat_interleave(x, repeats=3, dim=-2),
    "expand": lambda x: x[:, :, :, None].expand(2, 40, 2, 3, 20).reshape(2, 40, 6, 20),
    "flatten": lambda x: x.unsqueeze(-2).expand(-1, -1, -1, 3, -1).flatten(2, 3),
    "heads_first": lambda x: x.transpose(1, 2).repeat_interleave(3, 1).permute(0, 2, 1, 3),
    "time_first": lambda x: x.transpose(0, 1).repeat_interleave(3, 2).movedim(1, 0).mul(0.5).bfloat16(),
}
# and what is not every head for its neighbours
OTHERS = {
    "repeat": lambda x: x.repeat(1, 1, 3, 1),
    "tile": lambda x: x.tile(1, 1, 3, 1),
    "expand_before": lambda x: x[:, :, None].expand(2, 40, 3, 2, 20).reshape(2, 40, 6, 20),
    "flatten_before": lambda x: x.unsqueeze(2).expand(-1, -1, 3, -1, -1).flatten(2, 3),
    "other_merged": lambda x: x[:, :, :, None].expand(2, 40, 2, 3, 20).reshape(2, 40, 3, 40),
    "mixed": lambda x: x[:, :, :, None].expand(2, 40, 2, 3, 20).transpose(2, 3).reshape(2, 40, 6, 20),
    "two_expanded": lambda x: x[:1, :, :, None].expand(2, 40, 2, 3, 20).reshape(2, 40, 6, 20),
    "steps": lambda x: x.repeat_interleave(3, 1),
    "keys": lambda x: x.repeat_interleave(3, 3),
    "steps_moved": lambda x: x.repeat_interleave(3, 2).transpose(1, 2).transpose(2, 3),
    "batch": lambda x: x[:1].expand(2, -1, -1, -1),
    "one_by_one": lambda x: x.repeat_interleave(torch.tensor([2, 4]), 2),
    "detached": lambda x: x.repeat_interleave(3, 2).detach(),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_found(name):
    operand, _ = traced(NEIGHBOURS[name], 2, 40, 2, 20)
    repeated = repeated_heads(operand, 2)
    assert repeated is not None and repeated.heads == 2
    check_operand(operand, repeated, 6)


@pytest.mark.parametrize("name", OTHERS)
def test_not_found(name):
    operand, x = traced(OTHERS[name], 2, 40, 2, 20)
    assert repeated_heads(operand, 2) is None
    if name != "detached":
        with pytest.raises(Refused, match="validation_failed"):
            check_operand(operand, Repeated(x, None, 2, ()), 6)


def test_a_call_is_checked():
    call = torch.fx.Graph().call_function(torch.ops.fla_compile.linear_attention.default)
    before, after = ({"q": 6, "k": n, "v": n, "g": 0, "state": 0} for n in (6, 2))
    check_call(call, before, after, (6, 2))
    with pytest.raises(Refused, match="validation_failed"):
        check_call(call, before, after, (6, 3))
    with pytest.raises(Refused, match="validation_failed"):
        check_call(call, before, after | {"v": 6}, (6, 3))

"""Every order of axes, of the operands and of the state, is the same recurrence."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import assert_rewritten, operands

FAMILIES = ["linear_attention", "retention", "simple_gla", "gla", "delta_rule", "gated_delta_rule", "kda"]
OVER_KEYS, SCALAR = {"gla", "kda"}, {"simple_gla", "gated_delta_rule"}
LAYOUTS = [
    ("bthx", "bhkv"), ("bthx", "bhvk"), ("bhtx", "bhkv"), ("tbhx", "hbvk"), ("thbx", "kbhv"), ("bhxt", "bhkv"),
    ("xtbh", "vkhb"), ("txb", "kvb"), ("htx", "hvk"), ("tx", "kv"), ("xt", "vk"),
]  # fmt: skip


def program(io: str, state: str, family: str, spelling: str) -> Callable:
    """A program whose operands have their axes in the order `io` ("x" is K or V), and whose state has `state`."""
    now = io.replace("t", "")
    q_axes, v_axes = now.replace("x", "k"), now.replace("x", "v")
    g_axes = q_axes if family in OVER_KEYS else now.replace("x", "")
    at, gate_at = io.index("t"), (io if family in OVER_KEYS else io.replace("x", "")).index("t")
    corrects = "delta" in family or family == "kda"

    def write(k, v):
        if spelling == "einsum":
            return torch.einsum(f"{q_axes},{v_axes}->{state}", k, v)
        return laid(k, q_axes, state) * laid(v, v_axes, state)

    def read(q, S):
        if spelling == "einsum":
            return torch.einsum(f"{q_axes},{state}->{v_axes}", q, S)
        rest = state.replace("k", "")
        y = (laid(q, q_axes, state) * S).sum(state.index("k"))
        return y.permute([rest.index(letter) for letter in v_axes])

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
            if corrects:
                S = S + write(k[t], 0.5 * (v[t] - read(k[t], S)))
            else:
                S = S + write(k[t], v[t])
            outs.append(read(q[t], S))
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
    gate = " " + q_axes if family in OVER_KEYS else " " + io.replace("x", "") if family in SCALAR else ""
    return operands(f"{q_axes} {q_axes} {v_axes}{gate}", **sizes)


@pytest.mark.parametrize("io, state", LAYOUTS, ids=lambda x: x)
@pytest.mark.parametrize("spelling", ["einsum", "multiply"])
def test_orders_of_axes(io, state, spelling):
    family = FAMILIES[(LAYOUTS.index((io, state)) + (spelling == "einsum")) % len(FAMILIES)]
    assert_rewritten(program(io, state, family, spelling), operands_of(io, family), family)


@pytest.mark.fuzz
@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_any_order_of_axes(data):
    torch._dynamo.reset()
    head = data.draw(st.sampled_from(["", "b", "h", "bh"]))
    io = "".join(data.draw(st.permutations("t" + head + "x")))
    state = "".join(data.draw(st.permutations(head + "kv")))
    family, spelling = data.draw(st.sampled_from(FAMILIES)), data.draw(st.sampled_from(["einsum", "multiply"]))
    sizes = {letter: data.draw(st.integers(1, 3)) for letter in "bhkv"} | {"k": data.draw(st.integers(2, 4))}
    assert_rewritten(program(io, state, family, spelling), operands_of(io, family, **sizes), family)

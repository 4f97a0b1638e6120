"""States in containers, in cells and under contexts: each loop is one scan with eager's values and gradients."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from lifting import Graphs
from programs import Passes, assert_same, here, operands
from torch import nn

from fla_compile.options import Options

B, T, K = 2, 6, 3


class Pair(NamedTuple):
    S: torch.Tensor
    z: torch.Tensor


@dataclass
class State:
    S: torch.Tensor
    z: torch.Tensor


@dataclass
class Late:
    S: torch.Tensor | None = None


def in_a_tuple(x, y, S):
    state, outs = (S, S * 2), []
    for t in range(x.shape[1]):
        S, z = state
        state = (S * y[:, t] + z, z + x[:, t])
        outs.append(state[0])
    return torch.stack(outs, 1), state[1]


def cell(x, state):
    h, c = state
    c = torch.sigmoid(x) * c + torch.tanh(h)
    return torch.tanh(c), (torch.tanh(c), c)


def by_a_cell(x, y, S):
    state, outs = (S, torch.zeros_like(S)), []
    for x_t in x.unbind(1):
        out, state = cell(x_t, state)
        outs.append(out)
    return torch.stack(outs, 1), state


def by_a_cell_from_none(x, y, S):
    state, outs = None, []
    for t in range(x.shape[1]):
        if state is None:
            state = (torch.zeros_like(x[:, t]), S)
        out, state = cell(x[:, t], state)
        outs.append(out)
    return torch.stack(outs, 1)


def in_a_named_tuple(x, y, S):
    state = Pair(S, S * 0)
    for t in range(x.shape[1]):
        state = Pair(state.S * y[:, t], state.z + state.S)
    return state.z


def in_a_dataclass(x, y, S):
    state = State(S, torch.zeros_like(S))
    for t in range(x.shape[1]):
        state = State(S=state.S * y[:, t] + x[:, t], z=state.z + state.S)
    return state.z, state.S


def in_a_list(x, y, S):
    states = [S, S * 0.5]
    o = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for i in range(2):
            states[i] = states[i] * y[:, t] + x[:, t] * (i + 1)
        o[:, t] = states[0] - states[1]
    return o, states[1]


def in_a_dict(x, y, S):
    cache = {"S": S, "z": torch.zeros_like(S)}
    seen = cache
    for t in range(x.shape[1]):
        cache["S"] = cache["S"] * y[:, t] + x[:, t]
        cache["z"] = cache["z"] + cache["S"]
    return seen["z"], cache["S"]


def in_attributes(x, y, S):
    state = State(S, torch.zeros_like(S))
    seen = state
    for t in range(x.shape[1]):
        state.S = state.S * y[:, t]
        state.z = state.z + state.S
    return seen.z, state.S


def fills_a_dict(x, y, S):
    cache = {}
    for t in range(x.shape[1]):
        S = S * y[:, t] + x[:, t]
        cache["S"] = S
    return cache["S"]


def in_place_in_a_list(x, y, S):
    S = S * 1
    states = [S]
    for t in range(x.shape[1]):
        states[0] *= 0.5
        states[0] += x[:, t]
    return states[0] + S


def first_set_in_the_loop(x, y, S):
    state = {"z": S}
    for t in range(x.shape[1]):
        if t == 0:
            state["S"] = torch.zeros_like(S)
        state["S"] = state["S"] * y[:, t] + x[:, t]
        state["z"] = state["z"] + state["S"]
    return state


def first_asked_for(x, y, S):
    state, outs = {}, []
    for t in range(x.shape[1]):
        h = state.get("h")
        h = S if h is None else h * y[:, t]
        state["h"] = h + x[:, t]
        outs.append(state["h"])
    return torch.stack(outs, 1), state["h"]


def not_yet_in_a_dict(x, y, S):
    state = {"h": None}
    for x_t, y_t in zip(x.unbind(1), y.unbind(1), strict=True):
        if state["h"] is None:
            state["h"] = S * 1
        state["h"] = state["h"] * y_t
        state["h"].add_(x_t)
    return state["h"]


def list_entries_first_set(x, y, S):
    states = [None, None]
    for t in range(x.shape[1]):
        for i in range(2):
            states[i] = x[:, t] if t == 0 else states[i] * y[:, t] + x[:, t] * i
    return states[0] + S, states[1]


def attribute_first_set(x, y, S):
    state = Late()
    for t in range(x.shape[1]):
        if state.S is None:
            state.S = torch.zeros_like(S)
        state.S = state.S * y[:, t] + x[:, t]
    return state.S


def stored_after_the_loop(x, y, S):
    state = State(S, S)
    for x_t in x.unbind(1):
        S = S * 0.5 + x_t
    state.z = S
    return state.z, state.S


def without_gradients(x, y, S):
    with torch.no_grad():
        z = torch.zeros_like(S)
        for t in range(x.shape[1]):
            z = z * y[:, t] + x[:, t]
    return S * z


def with_gradients_again(x, y, S):
    with torch.no_grad(), torch.enable_grad():
        for x_t in x.unbind(1):
            S = S * x_t
    return S


def under_autocast(x, y, S):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        w = y[0, :3]
        for t in range(x.shape[1]):
            S = S * 0.5 + (x[:, t] @ w).to(S.dtype)
    return S


FORMS = [
    in_a_tuple, by_a_cell, by_a_cell_from_none, in_a_named_tuple, in_a_dataclass, in_a_list, in_a_dict, in_attributes,
    stored_after_the_loop, without_gradients, with_gradients_again, under_autocast, fills_a_dict, in_place_in_a_list,
    first_set_in_the_loop, first_asked_for, not_yet_in_a_dict, list_entries_first_set, attribute_first_set,
]  # fmt: skip


class Lifting(Graphs):
    """Lifts by itself, as the backend does: Dynamo's own loss of attributes after a scan is mended only then."""

    is_fla_backend = True
    options = Options()


@pytest.mark.parametrize("fn", FORMS, ids=lambda f: f.__name__)
def test_values_and_gradients_are_eagers_through_one_scan(fn):
    compiled = Lifting(fn, by_steps=True)
    assert_same(fn, compiled.fn, operands("btk btk bk", b=B, t=T, k=K))
    assert compiled.scans == [1]


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(K, K)

    def forward(self, x, h):
        state, outs = (h, torch.zeros_like(h)), []
        for t, x_t in enumerate(x.unbind(1)):
            state = self.cell(x_t, state)
            outs.append(state[0] if t else state[0] * 2)
        return torch.stack(outs, 1)


def test_an_lstm_cell():
    model = Cell()
    compiled = Lifting(model, by_steps=True)
    assert_same(model, compiled.fn, operands("btk bk", b=B, t=T, k=K))
    assert compiled.scans == [1]


# Near misses.


def two_names_for_a_list(x, y, S):
    states = [S, S * 2]  # here
    same = states
    for t in range(x.shape[1]):
        states[0] = states[0] * y[:, t] + same[1]
        states[1] = states[0] + x[:, t]
    return states[1]


def a_list_in_a_list(x, y, S):
    inner = [S]
    states = [inner]
    for t in range(x.shape[1]):  # here
        states[0] = [states[0][0] * y[:, t]]
    return inner[0], states[0][0]


def a_dict_that_changes(x, y, S):
    cache = {"S": S}
    for t in range(x.shape[1]):  # here
        S = cache["S"] * y[:, t]
        cache[f"z{len(cache)}"] = S
        cache["S"] = S
    return cache["S"]


def no_grad_inside(x, y, S):
    for t in range(x.shape[1]):
        with torch.no_grad():  # here
            z = x[:, t] * 2
        S = S + z
    return S


@pytest.mark.parametrize(
    "fn, reason",
    [
        (two_names_for_a_list, "mutates_input"),
        (a_list_in_a_list, "state_escapes"),
        (a_dict_that_changes, "carry_changes"),
        (no_grad_inside, "unsupported_statement"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_near_misses_are_refused_at_their_line(fn, reason):
    backend = Passes()
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), operands("btk btk bk", b=B, t=T, k=K))
    (refusal,) = backend.report.refusals
    assert (refusal.reason, refusal.source) == (reason, here(fn))

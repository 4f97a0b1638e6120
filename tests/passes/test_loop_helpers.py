"""States that helpers, methods and cells update in place: one scan with eager's values, gradients and aliases."""

from dataclasses import dataclass

import pytest
import torch
from lifting import Graphs
from programs import Passes, assert_refused, assert_rewritten, assert_same, operands
from torch import nn

from fla_compile.options import Options

B, T, K = 2, 6, 3


@dataclass
class State:
    S: torch.Tensor
    z: torch.Tensor


def update(S, a, b):
    S.mul_(a).add_(b)
    return S


def silent(S, a, b):
    S *= a
    S[:] = S + b


def total(S, a, b):
    S.mul_(a)
    S += b
    return S.sum(-1, keepdim=True)


def returned(x, y, S):
    S, outs = S.clone(), []
    for t in range(x.shape[1]):
        S = update(S, y[:, t], x[:, t])
        outs.append(S * 2)
    return torch.stack(outs, 1), S


def not_returned(x, y, S):
    S = torch.zeros_like(S)
    o = torch.zeros_like(x)
    for t in range(x.shape[1]):
        silent(S, y[:, t], x[:, t])
        o[:, t] = S
    return o, S


def only_read_from(x, y, S):
    S, outs = S * 1, []
    for x_t, y_t in zip(x.unbind(1), y.unbind(1), strict=True):
        outs.append(total(S, y_t, x_t))
    return torch.cat(outs, 1), S


def seen_by_an_alias(x, y, S):
    S = S * 1
    first = S
    for t in range(x.shape[1]):
        update(S, y[:, t], x[:, t])
    return first * 2, S


def seen_through_a_view(x, y, S):
    both = torch.stack([S, S * 2])
    h = both[0]
    for t in range(x.shape[1]):
        h = update(h, y[:, t], x[:, t])
    return both, h


def a_view_updated(x, y, S):
    S = S.clone()
    for t in range(x.shape[1]):
        update(S[:, :2], y[:, t, :2], x[:, t, :2])
    return S


def with_weights(x, y, S):
    W, S = y[0, :3] * 0.3, S.clone()
    for t in range(x.shape[1]):
        total(S, 0.5, x[:, t] @ W)
    return S, W


def in_a_dict(x, y, S):
    cache = {"S": S.clone(), "z": torch.zeros_like(S)}
    z = cache["z"]
    for t in range(x.shape[1]):
        remember(cache, x[:, t], y[:, t])
    return cache["S"], z


def remember(cache, a, b):
    cache["S"].mul_(b).add_(a)
    cache["z"] += cache["S"]


def in_a_dataclass(x, y, S):
    state = State(S.clone(), S * 0)
    kept = state.z
    for t in range(x.shape[1]):
        advance(state, x[:, t], y[:, t])
    return state.S, state.z, kept


def advance(state, a, b):
    state.S = state.S * b + a
    state.z.add_(state.S)


def in_a_list(x, y, S):
    states = [S * 1, S * 2]
    for t in range(x.shape[1]):
        states[0] *= y[:, t]
        states[0] += x[:, t]
        update(states[1], 0.5, states[0])
    return states[0], states[1]


def in_a_tuple(x, y, S):
    state = (S * 1, S * 2)
    outs = []
    for t in range(x.shape[1]):
        out, state = step_of_two(state, x[:, t], y[:, t])
        outs.append(out)
    return torch.stack(outs, 1), state


def step_of_two(state, a, b):
    S, z = state
    S.mul_(b).add_(a)
    z = z * 0.5 + S
    return z * 2, (S, z)


def first_step_in_a_helper(x, y, S):
    h = None
    for t in range(x.shape[1]):
        if h is None:
            h = torch.zeros_like(x[:, t])
        update(h, y[:, t], x[:, t])
    return h + S


FORMS = [
    returned, not_returned, only_read_from, seen_by_an_alias, seen_through_a_view, a_view_updated, with_weights,
    in_a_dict, in_a_dataclass, in_a_list, in_a_tuple, first_step_in_a_helper,
]  # fmt: skip


def arguments_state(x, S):
    for t in range(x.shape[1]):
        update(S, 0.5, x[:, t])
    return S * 2


def arguments_dict(x, S):
    cache = {"S": S, "z": S * 0}
    for t in range(x.shape[1]):
        remember(cache, x[:, t], x[:, t])
    return cache["z"]


# Near misses: the line of the refusal is marked.


def kept_items(x, y, S):
    S, outs = S.clone(), []
    for t in range(x.shape[1]):  # here
        update(S, 0.5, x[:, t])
        outs.append(S)
    return torch.stack(outs, 1)


def old_name_read(x, y, S):
    S = S * 1
    old = S.view(S.shape)
    for t in range(x.shape[1]):  # here
        S = update(S, 0.5, x[:, t] * old.mean())
    return S


def carried_alias(x, y, S):
    S = S * 1
    previous = S
    for t in range(x.shape[1]):  # here
        y_t = previous * 2
        previous = S
        update(S, 0.5, x[:, t] + y_t)
    return S


def changed_and_replaced(x, y, S):
    S = S * 1
    first = S
    for t in range(x.shape[1]):  # here
        S = update(S, 0.5, x[:, t]) + 1
    return S, first


def reads_through_a_closure(x, y, S):
    S = S * 1

    def read():
        return S.sum()

    for t in range(x.shape[1]):  # here
        update(S, 0.5, x[:, t] * read())
    return S


def changes_what_it_reads(x, y, S):
    x = x * 1
    for t in range(x.shape[1]):  # here
        S = S + update(x[:, t], 0.5, y[:, t])
    return S, x


class Holder:
    def __init__(self, S):
        self.S = S

    def read(self):
        return self.S.sum()


def hidden_second_name(x, y, S):
    S = S * 1
    holder = Holder(S)
    for t in range(x.shape[1]):  # here
        update(S, 0.5, x[:, t] * holder.read())
    return S


def state_of_an_object(x, y, S):
    holder = Holder(S * 1)
    for t in range(x.shape[1]):  # here
        change(holder, x[:, t])
    return holder.S


def change(holder, a):
    holder.S = holder.S * 0.5 + a


def last_step_only(x, y, S):
    S, outs = S * 1, []
    for t in range(x.shape[1]):  # here
        outs.append(S)
        if t == x.shape[1] - 1:
            update(S, 0.5, x[:, t])
    return torch.stack(outs, 1)


NEAR_MISSES = [
    (kept_items, "aliased_state"),
    (old_name_read, "mutates_input"),
    (carried_alias, "aliased_state"),
    (changed_and_replaced, "mutates_input"),
    (reads_through_a_closure, "not_captured"),
    (changes_what_it_reads, "not_captured"),
    (hidden_second_name, "mutates_input"),
    (state_of_an_object, "not_captured"),
    (last_step_only, "aliased_state"),
]


class Lifting(Graphs):
    """Lifts by itself, as the backend does: helpers are inlined, and attributes after a scan are kept, only then."""

    is_fla_backend = True
    options = Options()


@pytest.mark.parametrize("fn", FORMS, ids=lambda f: f.__name__)
def test_values_and_gradients_are_eagers_through_one_scan(fn):
    compiled = Lifting(fn, by_steps=True)
    assert_same(fn, compiled.fn, operands("btk btk bk", b=B, t=T, k=K))
    assert compiled.scans == [1]


@pytest.mark.parametrize(
    "fn", [returned, not_returned, in_a_dataclass, first_step_in_a_helper], ids=lambda f: f.__name__
)
def test_the_graph_is_as_large_for_any_length(fn):
    sizes = set()
    for steps in (5, 40):
        compiled = Lifting(fn)
        compiled.fn(*operands("btk btk bk", b=B, t=steps, k=K))
        sizes |= set(compiled.sizes)
    assert len(sizes) == 1


def test_recognised_as_if_it_were_written_in_the_loop():
    for fn in (returned, with_weights):
        assert_rewritten(fn, operands("btk btk bk", b=B, t=T, k=K), "linear_scan")


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = Cell()

    def forward(self, x, y, S):
        S, outs = S * 1, []
        for t in range(x.shape[1]):
            outs.append(self.cell(x[:, t], S))
            self.decay(S, y[:, t])
        return torch.stack(outs, 1), S

    def decay(self, S, a):
        S *= torch.sigmoid(a)


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(K, K)

    def forward(self, x_t, S):
        S.add_(self.project(x_t))
        return S * 2


def test_cells_and_methods():
    model = Mixer()
    backend = Passes()
    args = operands("btk btk bk", b=B, t=T, k=K)
    assert_same(model, torch.compile(model, backend=backend, fullgraph=True), args)
    assert [r.family for r in backend.report.rewrites] == ["linear_scan"] and backend.report.refusals == ()


@pytest.mark.parametrize("fn", [arguments_state, arguments_dict], ids=lambda f: f.__name__)
def test_the_callers_tensor_is_updated(fn):
    x, S = operands("btk bk", b=B, t=T, k=K)
    mine, theirs = S.clone(), S.clone()
    compiled = Lifting(fn)
    torch.testing.assert_close(compiled.fn(x, mine), fn(x, theirs))
    torch.testing.assert_close(mine, theirs)
    assert compiled.scans == [1]


@pytest.mark.parametrize("fn, reason", NEAR_MISSES, ids=lambda x: getattr(x, "__name__", ""))
def test_near_misses_are_refused_at_their_line(fn, reason):
    assert_refused(fn, operands("btk btk bk", b=B, t=T, k=K), reason)

"""Comprehensions and generator expressions over time: each is one scan with eager's values and gradients."""

from dataclasses import dataclass

import pytest
import torch
from lifting import Graphs
from programs import assert_refused, assert_rewritten, assert_same, operands

from fla_compile.options import Options

B, T, K = 2, 6, 3


@dataclass
class State:
    S: torch.Tensor


def walrus(x, y, S):
    outs = [(S := S * y[:, t] + x[:, t]) for t in range(x.shape[1])]
    return torch.stack(outs, 1), S


def walrus_in_the_middle(x, y, S):
    return torch.stack([torch.tanh((S := S * y_t + x_t) * 2) for x_t, y_t in zip(x.unbind(1), y.unbind(1))], 1)  # noqa: B905


def stateless(x, y, S):
    return torch.stack([torch.relu(x_t) * S for x_t in x.unbind(1)], 1)


def stateless_by_index(x, y, S):
    outs = [x[:, t] * y[:, t] for t in range(x.shape[1])]
    return torch.stack(outs, dim=1)


def by_tuple(x, y, S):
    return torch.cat(tuple((S := S * 0.5 + x_t).unsqueeze(1) for x_t in x.unbind(1)), dim=1) * S.unsqueeze(1)


def by_list(x, y, S):
    outs = list((S := S * y[:, t] + x[:, t]) for t in range(x.shape[1]))
    return torch.stack(outs, 1)


def step(state, a, b):
    state.S = state.S * b + a
    return state.S * 2


def by_an_attribute(x, y, S):
    state = State(S)
    return torch.stack([step(state, x[:, t], y[:, t]) for t in range(x.shape[1])], 1), state.S


def cell(box, a, b):
    box[0] = box[0] * b + a
    return box[0]


def by_a_list_cell(x, y, S):
    box = [S]
    outs = [cell(box, x_t, y_t) for x_t, y_t in zip(x.unbind(1), y.unbind(1), strict=True)]
    return torch.stack(outs, -1), box[0]


def update(S, a, b):
    return S.mul_(b).add_(a).clone()


def by_a_tensor(x, y, S):
    S = S * 1
    return torch.sigmoid(torch.stack([update(S, x[:, t], y[:, t]) for t in range(x.shape[1])], 1)) + S.unsqueeze(1)


def around_it(x, y, S):
    t = x.mean()
    return torch.tanh(t * S).sum() + torch.stack([(S := S + x[:, t] * y[:, t]) for t in range(x.shape[1])], 1) * t


FORMS = [
    walrus, walrus_in_the_middle, stateless, stateless_by_index, by_tuple, by_list, by_an_attribute, by_a_list_cell,
    by_a_tensor, around_it,
]  # fmt: skip


class Lifting(Graphs):
    is_fla_backend = True
    options = Options()


@pytest.mark.parametrize("fn", FORMS, ids=lambda f: f.__name__)
def test_values_and_gradients_are_eagers_through_one_scan(fn):
    compiled = Lifting(fn, by_steps=True)
    assert_same(fn, compiled.fn, operands("btk btk bk", b=B, t=T, k=K))
    assert compiled.scans == [1]


def test_the_graph_is_as_large_for_any_length():
    for fn in (walrus, by_an_attribute):
        sizes = set()
        for steps in (5, 40):
            compiled = Lifting(fn)
            compiled.fn(*operands("btk btk bk", b=B, t=steps, k=K))
            sizes |= set(compiled.sizes)
        assert len(sizes) == 1


def head(q, k, g):
    S, outs = torch.zeros_like(q[:, 0]), []
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t]) + k[:, t]
        outs.append(S * q[:, t])
    return torch.stack(outs, 1)


def heads_around_a_helper(q, k, g):
    return torch.stack([head(q[:, :, h], k[:, :, h], g[:, :, h]) for h in range(q.shape[2])], 2)


def heads_around_a_comprehension(q, k, g):
    S = torch.zeros_like(q[:, 0, 0])
    g = torch.sigmoid(g)
    return torch.stack(
        [torch.stack([(S := S * g[:, t, h] + k[:, t, h]) for t in range(q.shape[1])], 1) for h in range(q.shape[2])], 2
    )


def test_heads():
    for fn, families in ((heads_around_a_helper, 2), (heads_around_a_comprehension, 1)):
        args = operands("bthk bthk bthk", b=B, t=T, h=2, k=K)
        report = assert_rewritten(fn, args, *["linear_scan"] * families)
        assert report.refusals == ()


# What is no list over time stays as it is.


def plain_lists(x, y, S):
    parts = [p * 2 for p in (x, y)]
    sizes = [x.shape[i] for i in range(3)]
    return torch.cat(parts, 1) * sum(sizes) + torch.stack([S for _ in range(2 * T)], 1)


def with_a_condition(x, y, S):
    return torch.stack([x[:, t] + S for t in range(x.shape[1]) if t % 2], 1)


@pytest.mark.parametrize("fn", [plain_lists, with_a_condition], ids=lambda f: f.__name__)
def test_other_comprehensions_are_left(fn):
    compiled = Lifting(fn)
    assert_same(fn, compiled.fn, operands("btk btk bk", b=B, t=T, k=K))
    assert compiled.scans == [0]


# Near misses: the line of the refusal is marked.


def reads_the_list(x, y, S):
    outs = [S]
    outs = outs + [(S := S * y[:, t] + x[:, t]) for t in range(x.shape[1])]  # here
    return torch.stack(outs, 1)


def keeps_what_changes(x, y, S):
    S = S * 1
    return torch.stack([S.mul_(y[:, t]).add_(x[:, t]) for t in range(x.shape[1])], 1)  # here


@pytest.mark.parametrize(
    "fn, reason",
    [(reads_the_list, "output_list_used"), (keeps_what_changes, "aliased_state")],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_near_misses_are_refused_at_their_line(fn, reason):
    assert_refused(fn, operands("btk btk bk", b=B, t=T, k=K), reason)


def test_earlier_values_are_computed_first():
    def fn(x, S):
        return S.add_(1).sum() * torch.stack([(S := S * 0.5 + x_t) for x_t in x.unbind(1)], 1)

    x, S = operands("btk bk", b=B, t=T, k=K)
    compiled = Lifting(fn)
    torch.testing.assert_close(compiled.fn(x, S.clone()), fn(x, S.clone()))
    assert compiled.scans == [1]

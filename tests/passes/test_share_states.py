"""Final states lie in the memory that they have in eager: writing to one reaches an argument exactly where it does."""

import pytest
import torch
import torch.nn.functional as F
from programs import Passes, operands


def shifted(x):
    last, outs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        outs.append(x[:, t] + 0.5 * last)
        last = x[:, t]
    return torch.stack(outs, 1), last


def shifted_twice(x):
    first = second = torch.zeros_like(x[:, 0])
    outs = []
    for t in range(x.shape[1]):
        outs.append(x[:, t] + 0.5 * first - second)
        second, first = first, x[:, t]
    return torch.stack(outs, 1), first, second


def from_right_to_left(x):
    last, outs = torch.zeros_like(x[:, 0]), []
    for t in reversed(range(x.shape[1])):
        outs.append(x[:, t] + 0.5 * last)
        last = x[:, t]
    return torch.stack(outs, 1), last


def part(x):
    last, outs = torch.zeros_like(x[:, 0, :2].mT), []
    for t in range(x.shape[1]):
        outs.append(x[:, t] + last.mT[:, :1])
        last = x[:, t, :2].mT
    return torch.stack(outs, 1), last


def one_value_two_names(x):
    h = last = torch.zeros_like(x[:, 0])
    outs = []
    for t in range(x.shape[1]):
        h = torch.sigmoid(x[:, t]) * h + last * 0.5
        last = h
        outs.append(h)
    return torch.stack(outs, 1), h, last


def fixed(x):
    first, last, outs = x[:, 0], torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        outs.append(x[:, t] + last)
        last = first
    return torch.stack(outs, 1), last


def swapped(x):
    a, b, outs = x[:, 0], x[:, 1], []
    for t in range(x.shape[1]):
        a, b = b, a
        outs.append(x[:, t] * a)
    return torch.stack(outs, 1), a, b


def copied(x):
    last, outs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        outs.append(x[:, t] + 0.5 * last)
        last = x[:, t].clone()
    return torch.stack(outs, 1), last


def written_after(x):
    last, outs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        outs.append(x[:, t] + 0.5 * last)
        last = x[:, t]
    last.mul_(3)
    return torch.stack(outs, 1), x.sum()


def written_before_a_second_loop(x):
    last, outs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        outs.append(x[:, t] + 0.5 * last)
        last = x[:, t]
    last.mul_(3)
    h = torch.zeros_like(last)
    for t in range(x.shape[1]):
        h = 0.5 * h + x[:, t]
    return torch.stack(outs, 1), h


PROGRAMS = [shifted, shifted_twice, from_right_to_left, part, one_value_two_names, fixed, copied]
WRITERS = [written_after, written_before_a_second_loop]


def after_writing(fn, x):
    """All values, once each result but the first was written to in turn."""
    results = fn(x)
    values = [r.clone() for r in results]
    for i, result in enumerate(results[1:]):
        result.add_(i + 1)
        values += [r.clone() for r in (*results, x)]
    return values


@pytest.mark.parametrize("then", ["eager", "aot_eager"])
@pytest.mark.parametrize("fn", PROGRAMS + WRITERS, ids=lambda fn: fn.__name__)
def test_writes_after_the_call(fn, then):
    backend = Passes(then=then)
    (x,) = operands("bthk")
    with torch.no_grad():
        want = after_writing(fn, x.clone())
        got = after_writing(torch.compile(fn, backend=backend, fullgraph=True), x.clone())
    assert backend.report.rewrites
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("fn", [shifted, shifted_twice], ids=lambda fn: fn.__name__)
def test_any_length(fn):
    backend = Passes(then="aot_eager")
    compiled = torch.compile(fn, backend=backend, fullgraph=True, dynamic=True)
    for t in (5, 9):
        (x,) = operands("bthk", t=t)
        with torch.no_grad():
            for a, b in zip(after_writing(compiled, x.clone()), after_writing(fn, x.clone()), strict=True):
                torch.testing.assert_close(a, b)
    assert backend.graphs == 1 and backend.report.rewrites


@pytest.mark.parametrize("dynamic", [False, True], ids=["a copied start", "a dynamic length"])
def test_memory_that_cannot_be_told(dynamic):
    backend = Passes()
    (x,) = operands("bthk", t=5)
    with torch.no_grad():
        got = after_writing(torch.compile(swapped, backend=backend, dynamic=dynamic), x.clone())
        want = after_writing(swapped, x.clone())
    assert [r.reason for r in backend.report.refusals] == ["state_escapes"]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "same",
    [
        lambda h: h.to(h.dtype), lambda h: h.contiguous(), lambda h: h.float(), lambda h: h.view(h.shape),
        lambda h: h.reshape(h.shape), lambda h: h.cpu(), torch.nn.Identity(), lambda h: h.mT.mT, torch.atleast_1d,
        lambda h: F.dropout(h, p=0.0),
    ],
    ids=["to", "contiguous", "float", "view", "reshape", "cpu", "identity", "mT", "atleast", "dropout"],
)  # fmt: skip
def test_a_state_that_may_be_the_argument_itself(same):
    """Plain `torch.compile` tells which operations return their input; of dropout it does not know."""

    def fn(x, h0):
        h, outs = same(h0), []
        for t in range(x.shape[1]):
            h.mul_(0.5).add_(x[:, t])
            outs.append(h * 2)
        return torch.stack(outs, 1), h

    x, h0 = operands("btk bk")
    backend = Passes(then="aot_eager")
    results = []
    with torch.no_grad():
        for compiled in (torch.compile(fn, backend=backend), torch.compile(fn, backend="aot_eager")):
            start = h0.clone()
            torch._dynamo.reset()
            results.append([*compiled(x, start), start])
    assert backend.report.rewrites
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)

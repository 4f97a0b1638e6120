"""What Dynamo makes of a scan under our backend: needs of gradients as in eager, no gradient graph, nobody else hit."""

import logging

import pytest
import torch
from programs import Passes, assert_same, operands
from torch._higher_order_ops.scan import scan, scan_op

from fla_compile import dynamo, dynamo_scan


def recur(x, w):
    h, outs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = torch.tanh(h * w + x[:, t])
        outs.append(h)
    return torch.stack(outs, 1), h


def counter(x, w):
    n, h, outs = torch.zeros((), dtype=torch.int64), torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        n = n + 1
        h = h * 0.9 + x[:, t] * w / n
        outs.append(h)
    return torch.stack(outs, 1), n


def mask(x, w):
    alive, h, outs = torch.ones_like(x[:, 0], dtype=torch.bool), torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        alive = alive & (x[:, t] > -1)
        h = torch.where(alive, torch.tanh(h * w + x[:, t]), h)
        outs.append(h)
    return torch.stack(outs, 1), alive.long()


def largest(x, w):
    place, h, outs = torch.zeros(x.shape[0], dtype=torch.int64), torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = torch.tanh(h * w + x[:, t] * (place == 1)[:, None])
        place = h.argmax(-1)
        outs.append(h)
    return torch.stack(outs, 1), place


@pytest.mark.parametrize("then", ["eager", "aot_eager"])
@pytest.mark.parametrize("fn", [counter, mask, largest], ids=lambda fn: fn.__name__)
def test_states_of_integers_and_booleans_train(fn, then):
    backend = Passes(then=then)
    args = operands("btv v", dtype=torch.float64)
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), args, tolerance=1e-10)
    assert backend.report.rewrites and "higher_order.scan" not in backend.report.graph("after")


def two_states(x, w, step):
    """The first state needs gradients from the second step on, the second one never."""
    a, b = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0])
    seen = []
    for t in range(x.shape[1]):
        a, b = a + w * b, step(b, x[:, t])
        seen.append(b)
    later = a * 2
    later.mul_(0.5)
    return a, b, torch.stack(seen, 1), later


NEEDS = {"constant": lambda b, x: b + x, "detached": lambda b, x: (b + x).detach(), "used": lambda b, x: b * x}


@pytest.mark.parametrize("argument", [False, True])
@pytest.mark.parametrize("step", NEEDS.values(), ids=NEEDS)
def test_results_need_gradients_as_in_eager(step, argument):
    (x, w) = operands("btv v")
    x.requires_grad_(argument)
    w.requires_grad_()
    told = []

    def fn(x, w):
        results = two_states(x, w, step)
        told.append([r.requires_grad for r in results])  # while Dynamo traces, as the program would branch on it
        return results

    want = [r.requires_grad for r in two_states(x, w, step)]
    torch.compile(fn, backend=Passes())(x, w)
    assert told[-1] == want


@pytest.fixture
def differentiated(monkeypatch):
    """Counts the gradient graphs that scan makes."""
    from torch._higher_order_ops.partitioner import HopGraphMinCutPartitioner

    made, make = [], HopGraphMinCutPartitioner.create_partitioned_graph

    def counted(*args, **kwargs):
        made.append(args)
        return make(*args, **kwargs)

    monkeypatch.setattr(HopGraphMinCutPartitioner, "create_partitioned_graph", staticmethod(counted))
    return made


def by_hand(x, h):
    return scan(lambda c, y: (torch.tanh(c + y), (c * y).clone()), h, x)


def test_no_gradient_graph_is_made(differentiated):
    args = operands("btv v")
    assert_same(recur, torch.compile(recur, backend=Passes(), fullgraph=True), args)
    assert not differentiated


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_other_backends_differentiate_scans(backend, differentiated):
    x, h = (a.requires_grad_() for a in operands("tbv bv"))
    final, _ = torch.compile(by_hand, backend=backend)(x, h)
    assert differentiated and final.requires_grad
    final.sum().backward()
    assert x.grad.abs().sum() > 0


def test_without_a_hook_dynamo_goes_on_as_it_is(monkeypatch, caplog):
    kernels = dict(scan_op.py_kernels)
    monkeypatch.setattr(scan_op, "py_kernels", {})
    with caplog.at_level(logging.WARNING, "fla_compile"):
        dynamo_scan.install(dynamo.is_ours)
    assert len([r for r in caplog.records if "captured less well" in r.message]) == 1
    monkeypatch.undo()
    assert scan_op.py_kernels == kernels


@pytest.mark.parametrize("steps", [range(5), range(4, -1, -1), range(0, 5, 2)], ids=str)
def test_a_graph_break_over_a_reversed_range(steps):
    """A branch on data is not lifted; torch 2.13 leaves its last step out."""

    def step(cache, x):
        s = cache["s"] * 0.5 + x
        cache["s"] = s * 0.5 if s.sum() > 0 else s
        return s

    def fn(x):
        cache = {"s": torch.zeros(4)}
        o = [step(cache, x[:, t]) for t in reversed(steps)]
        return torch.stack(o, 1), cache["s"]

    x = torch.randn(4, 5)
    torch.testing.assert_close(torch.compile(fn, backend=Passes(), dynamic=False)(x), fn(x))

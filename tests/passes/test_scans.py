"""Scans in a graph: taken apart, and recognised once where they are alike; what only looks alike is judged anew."""

import pytest
import torch
from programs import Passes, assert_same, bare, operands
from torch._higher_order_ops.scan import scan

from fla_compile.passes import match_recurrences
from fla_compile.passes.scans import scan_nodes, signature, take_apart

AXES = "bthk bthk bthv bthk"


def recur(q, k, v, a, S):
    o = []
    for t in range(q.shape[1]):
        S = S * a[:, t][..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        o.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(o, 1), S


def decayed(q, k, v, gamma, S):
    o = []
    for t in range(q.shape[1]):
        S = S * gamma + k[:, t][..., None] * v[:, t][..., None, :]
        o.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(o, 1), S


def written_scan(q, k, v, g):
    def step(S, x):
        q, k, v, a = x
        S = S * a[..., None] + k[..., None] * v[..., None, :]
        return S, torch.einsum("bhk,bhkv->bhv", q, S)

    xs = tuple(x.movedim(1, 0) for x in (q, k, v, torch.sigmoid(g)))
    S, o = scan(step, bare(q, v), xs)
    return o.movedim(0, 1), S


def captured(fn, args):
    """The scans of `fn` as a backend sees them."""
    found = []

    def backend(gm, example_inputs):
        found.extend(take_apart(gm, node) for node in scan_nodes(gm))
        return gm.forward

    with torch.no_grad():
        torch.compile(fn, backend=backend, fullgraph=True)(*args)
    return found


def test_scans_are_taken_apart():
    (only,) = captured(written_scan, operands(AXES))
    assert len(only.init) == 1 and len(only.reads) == 4 and only.zero_init == (True,)
    assert only.place is not None and only.place[0].endswith("test_scans.py")
    assert only.operands == (*only.init, *only.reads, *only.invariants)


def twice(q, k, v, g):
    o, _ = written_scan(q, k, v, g)
    return written_scan(q, k, o, g)


def one_other(q, k, v, g):
    def step(S, x):
        q, k, v, a = x
        S = S * a[..., None] + 2.0 * k[..., None] * v[..., None, :]
        return S, torch.einsum("bhk,bhkv->bhv", q, S)

    o, _ = written_scan(q, k, v, g)
    return scan(step, bare(q, v), tuple(x.movedim(1, 0) for x in (q, k, o, torch.sigmoid(g))))[1]


def test_signatures():
    first, second = captured(twice, operands(AXES))
    assert signature(first) == signature(second) is not None
    first, second = captured(one_other, operands(AXES))
    assert signature(first) != signature(second)


@pytest.fixture
def recognised(monkeypatch):
    """The loops that were classified, not taken from an earlier one."""
    calls, real = [], match_recurrences.classify

    def counted(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(match_recurrences, "classify", counted)
    return calls


def test_layers_that_are_alike_are_recognised_once(recognised):
    def fn(q, k, v, g):
        for _ in range(3):
            v, _ = recur(q, k, v, torch.sigmoid(g), bare(q, v))
        return v

    backend, args = Passes(), operands(AXES)
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), args)
    assert [r.family for r in backend.report.rewrites] == ["gla"] * 3 and len(recognised) == 1


# Loops of one source whose operands differ in what was proved of them.


def zeros_then_a_state(q, k, v, g):
    o, S = recur(q, k, v, torch.sigmoid(g), bare(q, v))
    return recur(q, k, o, torch.sigmoid(g), S)


def a_state_then_zeros(q, k, v, g):
    o, S = recur(q, k, v, torch.sigmoid(g), bare(q, v) + 1)
    return *recur(q, k, o, torch.sigmoid(g), bare(q, v)), S


def proved_then_unknown(q, k, v, g):
    o, S = recur(q, k, v, torch.sigmoid(g), bare(q, v) + 1)
    return recur(q, k, o, torch.tanh(g), S)


def unknown_then_proved(q, k, v, g):
    o, S = recur(q, k, v, torch.tanh(g), bare(q, v) + 1)
    return recur(q, k, o, torch.sigmoid(g), S)


def proved_in_two_ways(q, k, v, g):
    o, S = recur(q, k, v, torch.sigmoid(g), bare(q, v) + 1)
    return recur(q, k, o, torch.exp(-g.abs()), S)


def two_constants(q, k, v, g):
    o, _ = decayed(q, k, v, 0.9, bare(q, v))
    return decayed(q, k, o, 0.5, bare(q, v))


def constants_of_two_signs(q, k, v, g):
    o, S = decayed(q, k, v, torch.tensor(0.9), bare(q, v) + 1)
    return decayed(q, k, o, torch.tensor(-0.5), S)


def with_and_without_a_gradient(q, k, v, g):
    o, S = recur(q, k, v, torch.tanh(g.detach()), bare(q, v) + 1)
    return recur(q, k, o, torch.tanh(g), S)


def in_two_types(q, k, v, g):
    o, S = recur(q, k, v, torch.sigmoid(g), bare(q, v) + 1)
    return recur(*(x.double() for x in (q, k, o, torch.sigmoid(g), S)))


def changed_between(q, k, v, g):
    a = torch.sigmoid(g) * 1.0
    o, S = recur(q, k, v, a.clone(), bare(q, v) + 1)
    a.mul_(-0.5)
    return recur(q, k, o, a, S)


ALIKE = [
    zeros_then_a_state, a_state_then_zeros, proved_then_unknown, unknown_then_proved, proved_in_two_ways,
    two_constants, constants_of_two_signs, with_and_without_a_gradient, in_two_types, changed_between,
]  # fmt: skip


@pytest.mark.parametrize("fn", ALIKE, ids=lambda f: f.__name__)
def test_loops_that_look_alike(fn):
    backend, args = Passes(), operands("bthk bthk bthk bthk")
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), args, tolerance=2e-5)
    assert len(backend.report.rewrites) + len(backend.report.refusals) >= 2


@pytest.mark.parametrize("first", [True, False], ids=["inside first", "outside first"])
def test_one_loop_inside_and_outside_of_autocast(first):
    """The same body rounds its products in one of them."""

    def products(x, W):
        h, o = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = 0.5 * h + (x[:, t] @ W).float()
            o.append(h)
        return torch.stack(o, 1)

    def fn(x, W):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=first):
            y = products(x, W)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not first):
            z = products(x, W)
        return y, z

    backend, args = Passes(), operands("btk kk")
    compiled = torch.compile(fn, backend=backend, fullgraph=True)
    with torch.no_grad():
        pairs = list(zip(compiled(*args), fn(*args), strict=True))
    wide = pairs[1] if first else pairs[0]
    torch.testing.assert_close(*wide, rtol=1e-5, atol=1e-5)
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)

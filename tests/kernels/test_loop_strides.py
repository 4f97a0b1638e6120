"""Memory layouts: operands, states, outputs and their gradients may have any strides."""

import pytest
import torch
from loop_cases import CASES, D, H, as_graph, assert_close, assert_same, gradients, step_graph

from fla_compile.kernels import loop_compile, loop_run
from fla_compile.kernels.loop_ops import loop, register_step

TRACED: dict = {}


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Steps run as graphs that assert the strides of their operands, as compiled ones do."""
    monkeypatch.setattr(loop_compile, "by_inductor", as_graph)
    monkeypatch.setattr(loop_run, "_loops", TRACED)


def as_is(x):
    return x


def turned(x):
    """The same values, in memory in another order of axes."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def batch_first(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim > 1 else x


def sparse(x):
    """Every second element of a larger tensor."""
    return x.repeat_interleave(2, -1)[..., ::2] if x.ndim else x


def relaid(operands, layout):
    found = [layout(x.detach()) if isinstance(x, torch.Tensor) else x for x in operands]
    return [
        y.requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else y
        for x, y in zip(operands, found, strict=True)
    ]


@pytest.mark.parametrize("layout", [turned, batch_first, sparse])
@pytest.mark.parametrize("name", [name for name in CASES if name != "masked"])
def test_operands(name, layout):
    case = CASES[name]
    assert_same(case, relaid(case.operands(4), layout), key=case.register())


def test_expanded_operands():
    case = CASES["views"]
    plain, key = [x.detach() for x in case.operands(5)], case.register()
    bases = [x[:1].clone().requires_grad_() for x in plain]
    operands = [x.expand_as(y) for x, y in zip(bases, plain, strict=True)]
    got, want = loop(key, operands), case.eager(operands)
    assert_close(got, want)
    for slopes in zip(gradients(got, bases), gradients(want, bases), strict=True):
        assert_close(slopes[:1], slopes[1:])


@pytest.mark.parametrize("layout", [as_is, turned, batch_first, sparse])
@pytest.mark.parametrize("name", ["transposing", "views", "lstm"])
def test_gradients_of_results(name, layout):
    case = CASES[name]
    operands, key = case.operands(4), case.register()
    found = []
    for results in (loop(key, operands), case.eager(operands)):
        slopes = [layout(torch.sin(y.detach() * 3)) for y in results]
        found.append(torch.autograd.grad(results, operands, slopes, retain_graph=True))
        found.append(torch.autograd.grad(results, operands, [s.mean().expand_as(s) for s in slopes]))
    assert_close(found[0], found[2])
    assert_close(found[1], found[3])


@pytest.mark.parametrize("name", ["transposing", "views"])
def test_results_are_contiguous(name):
    operands = CASES[name].operands(3)
    got = loop(CASES[name].register(), operands)
    slopes = [g for g in gradients(got, operands) if g is not None]
    assert all(y.is_contiguous() and y.storage_offset() == 0 for y in (*got, *slopes))


def test_strides_that_change_with_time_compile_nothing_new(monkeypatch):
    """An invariant that is a slice of a tensor with time."""
    monkeypatch.setattr(loop_run, "_loops", {})
    case = CASES["views"]
    for T in (3, 5):
        S, q, k, W = case.operands(T)
        W = torch.stack([W.detach()] * T, 1)[:, 0].requires_grad_()
        assert_same(case, [S, q, k, W], key=case.register())
    assert len(loop_run._loops) == 2


def test_a_step_that_takes_strides_is_refused():
    step = step_graph(lambda h, x: (h.as_strided((D, H), (H, 1)).t() + x, x * 1.0), 1, 1, [torch.zeros(H, D)] * 2)
    with pytest.raises(ValueError, match=r"must not depend on strides, got aten\.as_strided"):
        register_step(step, 1, 1)


def test_as_many_loops_are_kept_as_told(monkeypatch):
    monkeypatch.setattr(loop_run, "_loops", {})
    monkeypatch.setattr(loop_run, "LOOPS", 3)
    case, used = CASES["lstm"], []
    for batch in (1, 2, 3, 1, 4):
        operands = [x.detach()[:1].expand(batch, -1) for x in case.operands(2)[:2]]
        loop(case.register(), [*operands, torch.zeros(2, batch, 4 * D).double(), torch.zeros(4 * D, D).double()])
        used.append([specs[0].shape[0] for _, specs, *_ in loop_run._loops])
    assert used == [[1], [1, 2], [1, 2, 3], [2, 3, 1], [3, 1, 4]]

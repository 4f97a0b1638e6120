"""The operator against the eager loop. Most tests run the steps as graphs: Inductor takes seconds for each."""

import logging

import pytest
import torch
from loop_cases import CASES, B, Case, D, as_graph, assert_close, assert_same, gradients, lstm, step_graph, weights
from torch._dynamo.testing import CompileCounterWithBackend

from fla_compile.kernels import loop_compile, loop_ops, loop_run
from fla_compile.kernels.loop_ops import loop, loop_forward, register_step

NAMES = list(CASES)
TRACED: dict = {}  # loops of uncompiled steps, for all tests


@pytest.fixture
def uncompiled(monkeypatch):
    """Steps run as graphs."""
    monkeypatch.setattr(loop_compile, "by_inductor", as_graph)
    monkeypatch.setattr(loop_run, "_loops", TRACED)


@pytest.fixture
def graphs(monkeypatch):
    """Steps run as graphs; the list of the graphs that would have been compiled."""
    found = []

    def noted(gm, examples):
        found.append(gm)
        return as_graph(gm, examples)

    monkeypatch.setattr(loop_compile, "by_inductor", noted)
    monkeypatch.setattr(loop_run, "_loops", {})
    return found


@pytest.mark.parametrize("T", [1, 7])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(uncompiled, name, T):
    assert_same(CASES[name], CASES[name].operands(T))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("lstm", torch.float64), ("tanh_state", torch.float32), ("transposing", torch.float64)],
    ids=str,
)
def test_compiled(name, dtype, caplog):
    with caplog.at_level(logging.WARNING, logger="fla_compile"):
        assert_same(CASES[name], CASES[name].operands(9, dtype))
    assert not [record for record in caplog.records if record.name == "fla_compile"]


@pytest.mark.parametrize("name", NAMES)
def test_no_steps(uncompiled, name):
    case = CASES[name]
    operands = case.operands(0)
    got, one = loop(case.register(), operands), case.eager(case.operands(1))
    assert_close(got[: case.carries], operands[: case.carries])
    assert [y.shape for y in got[case.carries :]] == [(0, *y.shape[1:]) for y in one[case.carries :]]
    carries = [c for c in operands[: case.carries] if c.requires_grad]
    slopes = gradients(got, operands)
    assert_close(slopes[: len(carries)], weights(got)[: len(carries)])
    assert not any(x is not None and x.any() for x in slopes[len(carries) :])


@pytest.mark.parametrize("segment", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_recomputed_by_segments(uncompiled, name, segment):
    case = CASES[name]
    operands, key = case.operands(7), case.register()
    count = case.carries + len(case.eager(operands)) - case.carries

    def by_segments(key, operands):
        tensors, ints, floats = loop_ops.sort_operands(key, operands)
        return loop_forward(key, tensors, ints, floats, 7, segment)[:count]

    assert_same(case, operands, by_segments, key)


def test_memory_bound_decides(uncompiled, monkeypatch):
    case = CASES["lstm"]
    tensors, key = case.operands(7), case.register()
    every = loop_forward(key, tensors, [], [], 7, loop_run.BY_SIZE)
    # Kept: c of 8 steps with the first, and the products; h is an output.
    assert [tuple(x.shape) for x in every[3:]] == [(8, B, D), (7, B, 4 * D)]
    size = 8 * (B * D + B * 4 * D)
    monkeypatch.setattr(loop_run, "KEPT_BYTES", 7 * size)
    assert len(loop_forward(key, tensors, [], [], 7, loop_run.BY_SIZE)) == len(every)
    monkeypatch.setattr(loop_run, "KEPT_BYTES", 7 * size - 1)
    monkeypatch.setattr(loop_run, "SEGMENT", 3)
    marks = loop_forward(key, tensors, [], [], 7, loop_run.BY_SIZE)
    assert [tuple(x.shape) for x in marks[3:]] == [(3, B, D), (3, B, D)]
    assert_same(case, tensors)
    compiled = torch.compile(lambda *xs: loop(key, xs), fullgraph=True, backend="aot_eager")
    assert_same(case, tensors, lambda key, xs: compiled(*xs))


def test_nothing_is_kept_without_gradients(uncompiled):
    case = CASES["lstm"]
    operands, key = case.operands(7), case.register()
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.fla_compile.loop.default:
                seen.append(len(result))
            return result

    with Spy():
        with torch.no_grad():
            without = loop(key, operands)
        detached = loop(key, [x.detach() for x in operands])
        kept = loop(key, operands)
    assert seen == [3, 3, 5]
    assert not any(x.requires_grad for x in (*without, *detached))
    assert_close(without, kept)


@pytest.mark.parametrize("name", ["lstm_projecting", "tanh_state", "masked"])
def test_gradients_of_some_operands_only(uncompiled, name):
    case = CASES[name]
    key = case.register()
    for i, x in enumerate(case.operands(5)):
        if isinstance(x, torch.Tensor) and x.dtype.is_floating_point:
            operands = [y.detach() if isinstance(y, torch.Tensor) else y for y in case.operands(5)]
            operands[i].requires_grad_()
            assert_same(case, operands, key=key)


def test_gradients_from_some_results_only(uncompiled):
    case = CASES["lstm"]
    operands, key = case.operands(6), case.register()
    for i in range(3):
        got, want = (torch.autograd.grad(f[i].sum(), operands, allow_unused=True)
                     for f in (loop(key, operands), case.eager(operands)))  # fmt: skip
        assert_close(got, want)


def test_gradients_that_are_zero(uncompiled):
    case = CASES["idle"]
    operands, key = case.operands(4), case.register()
    got = torch.autograd.grad(loop(key, operands)[1].sum(), operands, allow_unused=True)
    assert_close(got, torch.autograd.grad(case.eager(operands)[1].sum(), operands, allow_unused=True))


@pytest.mark.parametrize("name", ["lstm", "idle", "accumulating"])
def test_results_are_fresh(uncompiled, name):
    case = CASES[name]
    operands, key = case.operands(1), case.register()
    with torch.no_grad():
        quiet = loop(key, operands)
    got = loop(key, operands)
    slopes = [g for g in gradients(got, operands) if g is not None]
    for results in (quiet, got, slopes):
        places = [x.untyped_storage().data_ptr() for x in (*operands, *results) if isinstance(x, torch.Tensor)]
        assert len(set(places)) == len(places)
        assert all(y.is_contiguous() and y.storage_offset() == 0 for y in results)


def test_same_bits_twice():
    case = CASES["tanh_state"]
    operands, key = case.operands(9, torch.float32), case.register(torch.float32)
    runs = []
    for _ in range(2):
        got = loop(key, operands)
        runs.append([*got, *gradients(got, operands)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_narrow_sums_are_kept_wide(uncompiled):
    """The gradient of an invariant is a sum of many small bfloat16 terms."""

    def step(h, x, b):
        return h * 0.5, x * b

    operands = [torch.zeros(2, dtype=torch.bfloat16), torch.ones(1000, 2, dtype=torch.bfloat16),
                torch.ones(2, dtype=torch.bfloat16, requires_grad=True)]  # fmt: skip
    key = register_step(step_graph(step, 1, 1, operands), 1, 1)
    (grad,) = torch.autograd.grad(loop(key, operands)[1].sum(), operands[2])
    assert grad.tolist() == [1000.0, 1000.0] and grad.dtype == torch.bfloat16


def test_autocast_outside_changes_nothing(uncompiled):
    case = CASES["gru"]
    operands, key = case.operands(5, torch.float32), case.register(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loop(key, operands)
    slopes = gradients(got, operands)
    assert_close(got, case.eager(operands))
    assert_close(slopes, gradients(case.eager(operands), operands))


def test_one_compilation_for_every_length(graphs):
    """Also with reads that are batch first in memory, whose strides depend on T."""
    case = CASES["tanh_state"]
    key = case.register()
    for T in (2, 5, 300):
        operands = case.operands(T)
        operands[1] = operands[1].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        assert_same(case, operands, key=key)
    assert len(graphs) == 2


@pytest.mark.parametrize("name", ["lstm_projecting", "tanh_state", "numbers"])
def test_captured_once_for_every_length_and_batch(uncompiled, name):
    case = CASES[name]
    key = case.register(symbolic=True)
    counter = CompileCounterWithBackend("aot_eager")
    first = 0  # Dynamo itself tries twice where it meets a float
    compiled = torch.compile(lambda xs: loop(key, xs), fullgraph=True, dynamic=True, backend=counter)
    for T, batch in ((7, 3), (9, 3), (30, 5)):
        operands = case.operands(T)
        if name != "numbers":
            operands = [
                x.detach()[:, :1].repeat(1, batch, *[1] * (x.ndim - 2)).requires_grad_()
                if case.carries <= i < case.carries + case.reads
                else x.detach()[:1].repeat(batch, *[1] * (x.ndim - 1)).requires_grad_() if i < case.carries else x
                for i, x in enumerate(operands)
            ]  # fmt: skip
        assert_same(case, operands, lambda key, xs: compiled(xs), key)
        first = first or counter.frame_count
    assert counter.frame_count == first
    assert sum("fla_compile.loop" in str(node.target) for node in counter.graphs[-1].graph.nodes) == 1


def test_inside_inductor_with_a_graph_around():
    case = CASES["lstm"]
    key = case.register()

    def model(h, c, x, W):
        h, c, y = loop(key, [h, c, (x * 2).movedim(0, 1).movedim(1, 0), W])
        return h, c, y.tanh() + x[..., :D]

    def plain(h, c, x, W):
        h, c, y = case.eager([h, c, x * 2, W])
        return h, c, y.tanh() + x[..., :D]

    operands = case.operands(9)
    compiled = torch.compile(model, fullgraph=True)
    got, want = compiled(*operands), plain(*operands)
    assert_close(got, want)
    assert_close(gradients(got, operands), gradients(want, operands))
    with torch.no_grad():
        assert_close(compiled(*operands), want)


@pytest.mark.parametrize(
    ("name", "segment"), [("lstm", 0), ("lstm", 2), ("lstm", loop_run.BY_SIZE), ("masked", 1), ("numbers", 1)], ids=str
)
def test_opcheck(uncompiled, name, segment):
    case = CASES[name]
    tensors, ints, floats = loop_ops.sort_operands(case.register(), case.operands(4))
    torch.library.opcheck(loop_forward, (case.register(), tensors, ints, floats, 4, segment))


def test_opcheck_backward(uncompiled):
    case = CASES["lstm"]
    key, tensors = case.register(), [x.detach() for x in case.operands(4)]
    results = loop_forward(key, tensors, [], [], 4, loop_run.EVERY_STEP)
    slopes = [torch.ones_like(results[0]), torch.ones_like(results[2])]
    torch.library.opcheck(
        loop_ops.loop_backward,
        (key, tensors, [], [], 4, loop_run.EVERY_STEP, results[3:], [results[2]], slopes, [0, 2], [1, 3]),
    )


def test_a_second_derivative_is_refused(uncompiled):
    case = CASES["gru"]
    operands = case.operands(3)
    (grad,) = torch.autograd.grad(loop(case.register(), operands)[1].sum(), operands[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_what_inductor_cannot_compile_runs_as_it_is(monkeypatch, caplog):
    def fails(gm, examples):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(loop_compile, "by_inductor", fails)
    monkeypatch.setattr(loop_compile, "_warned", set())
    monkeypatch.setattr(loop_run, "_loops", {})
    case = CASES["gru"]
    with caplog.at_level(logging.WARNING, logger="fla_compile"):
        for T in (3, 4):
            assert_same(case, case.operands(T))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and "Inductor fails: RuntimeError: no such kernel" in told[0]


def test_without_reads(uncompiled):
    def step(h, W):
        h = torch.tanh(h @ W)
        return h.clone(), h

    operands = [torch.randn(B, D), torch.randn(D, D)]
    key = register_step(step_graph(step, 1, 0, operands), 1, 0)
    want = operands[0]
    for _ in range(3):
        want = step(want, operands[1])[0]
    final, outputs = loop(key, operands, length=3)
    assert_close([final, outputs[-1]], [want, want])
    with pytest.raises(ValueError, match="length must be given"):
        loop(key, operands)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda xs: xs[:-1], "operands must be 4, got 3"),
        (lambda xs: [xs[0].float(), *xs[1:]], "operand 0 has dtype torch.float32, the step has torch.float64"),
    ],
)
def test_bad_operands_are_named(change, message):
    case = CASES["lstm"]
    with pytest.raises(ValueError, match=message):
        loop(case.register(), change(case.operands(2)))


def test_a_carry_that_changes_its_shape_is_refused(uncompiled):
    def grows(h, x):
        return torch.tanh(h + x).sum(0, keepdim=True), x.clone()

    case = Case(grows, 1, 1, ((B, D), (B, D)))
    with pytest.raises(ValueError, match=r"carry 0 must stay \(3, 4\), got \(1, 4\)"):
        loop(case.register(), [x.detach() for x in case.operands(2)])


def test_the_lstm_is_torchs():
    """The case itself: torch.nn.LSTM with its gates in our order."""
    theirs = torch.nn.LSTM(D, D, bias=False, dtype=torch.float64)
    x = torch.randn(5, B, D, dtype=torch.float64)
    order = torch.cat([torch.arange(D) + D * g for g in (0, 1, 3, 2)])
    operands = [torch.zeros(B, D).double(), torch.zeros(B, D).double(),
                x @ theirs.weight_ih_l0[order].t(), theirs.weight_hh_l0[order]]  # fmt: skip
    torch.testing.assert_close(Case(lstm, 2, 1, ()).eager(operands)[2], theirs(x)[0])

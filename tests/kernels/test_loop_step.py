import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loop_cases import CASES, B, D, K, V, step_graph
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fla_compile.kernels import loop_compile
from fla_compile.kernels.loop_ops import loop, sort_operands
from fla_compile.kernels.loop_step import STEPS, register_step

HERE = Path(__file__).resolve().parent


def registered(step, carries, reads, *operands):
    return STEPS[register_step(step_graph(step, carries, reads, operands), carries, reads)]


def tensor(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def test_same_content_same_key():
    assert len({CASES[name].register() for name in CASES}) == len(CASES)
    for name in CASES:
        assert CASES[name].register() == CASES[name].register()
    assert CASES["lstm"].register() != CASES["lstm"].register(torch.float32)


def test_same_key_in_another_process():
    names = ["lstm", "numbers", "masked"]
    code = f"from loop_cases import CASES; print(*(CASES[n].register() for n in {names}))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE.parents[1], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": f"{HERE}:{HERE.parents[1]}", "PATH": "", "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert run.stdout.split() == [CASES[name].register() for name in names]


def test_keys_tell_constants_and_carries_apart():
    def half(h, x):
        return h * torch.tensor([0.5]) + x, h.clone()

    def third(h, x):
        return h * torch.tensor([1 / 3]) + x, h.clone()

    args = (tensor(B, D), tensor(1, B, D))
    keys = {registered(half, 1, 1, *args).key, registered(third, 1, 1, *args).key}
    assert len(keys) == 2
    assert register_step(step_graph(half, 1, 1, args), 2, 0) not in keys
    assert [c.tolist() for c in registered(half, 1, 1, *args).constants] == [[0.5]]


def test_names_and_metadata_do_not_count():
    graph = CASES["gru"].graph()
    for node in graph.graph.nodes:
        node.name = f"renamed_{node.name}"
        node.meta["stack_trace"] = "somewhere else"
    assert register_step(graph, 1, 1) == CASES["gru"].register()


@pytest.mark.parametrize(
    ("name", "keep", "shared", "saved"),
    [
        ("lstm", (True, True), (0, None), 1),  # h is an output, c is kept, and the product with W
        ("lstm_projecting", (True, True), (0, None), 2),
        ("gru", (True,), (0,), 1),
        ("tanh_state", (True,), (None,), 0),  # the read-out is a sum here, and linear
        ("delta_tanh", (True,), (None,), 1),  # S^T k; an outer product and the read-out are not kept
        ("accumulating", (False,), (None,), 1),  # only x W, for b's gradient
    ],
)
def test_what_is_kept(name, keep, shared, saved):
    step = STEPS[CASES[name].register()]
    assert (step.keep, step.shared, step.saved) == (keep, shared, saved)


def test_symbolic_sizes_are_operands():
    step = STEPS[CASES["numbers"].register(symbolic=True)]
    assert step.kinds == ("tensor", "tensor", "int", "fixed") and step.fixed == (0.75,)
    assert sort_operands(step.key, [1, 2, 3, 0.75]) == ([1, 2], [3], [])
    with pytest.raises(ValueError, match=r"traced with 0.75 for an operand, got 0.5"):
        sort_operands(step.key, [1, 2, 3, 0.5])


def test_symbolic_floats_are_operands(monkeypatch):
    monkeypatch.setattr(loop_compile, "by_inductor", lambda gm, examples: lambda arguments: gm(*arguments))
    graph = torch.fx.Graph()
    h, x, a = (graph.placeholder(name) for name in "hxa")
    y = graph.call_function(torch.ops.aten.mul.Tensor, (h, a))
    z = graph.call_function(torch.ops.aten.tanh.default, (y,))
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, (z, x)), z))
    for node in graph.nodes:
        node.meta["val"] = tensor(B, D)
    a.meta["val"] = ShapeEnv().create_unbacked_symfloat()
    key = register_step(torch.fx.GraphModule({}, graph), 1, 1)
    assert STEPS[key].kinds == ("tensor", "tensor", "float")
    h, x = torch.randn(B, D), torch.randn(1, B, D)
    for a in (0.5, 0.25):
        torch.testing.assert_close(loop(key, [h, x, a])[0], torch.tanh(h * a) + x[0])


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda h, x: (h.double(), x.clone()), "carry 0 must stay torch.float32 with 2 axes"),
        (lambda h, x: (h.sum(0), x.clone()), "carry 0 must stay torch.float32 with 2 axes"),
        (lambda h, x: (h + torch.rand_like(x), x.clone()), "must not draw random numbers, got aten.rand_like"),
        (lambda h, x: (torch.dropout(h, 0.5, True), x.clone()), "must not draw random numbers"),
        (lambda h, x: (h + x, 3), "must return tensors"),
    ],
)
def test_refused(step, message):
    with pytest.raises(ValueError, match=message):
        registered(step, 1, 1, tensor(B, D), tensor(1, B, D))


def test_complex_operands_are_refused():
    with pytest.raises(ValueError, match="must be real"):
        registered(lambda h, x: (h * x, h.clone()), 1, 1, tensor(B, dtype=torch.complex64), tensor(1, B))


def test_writes_are_refused():
    graph = torch.fx.Graph()
    h = graph.placeholder("h")
    y = graph.call_function(torch.ops.aten.tanh_.default, (h,))
    graph.output((y,))
    for node in graph.nodes:
        node.meta["val"] = tensor(K, V)
    with pytest.raises(ValueError, match="must be functional"):
        register_step(torch.fx.GraphModule({}, graph), 1, 0)

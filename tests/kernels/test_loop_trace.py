import pytest
import torch
from loop_cases import CASES, B, D, H, K, V, step_graph

from fla_compile.kernels.loop_epilogue import OverTime
from fla_compile.kernels.loop_ops import register_step, sort_operands
from fla_compile.kernels.loop_run import Call
from fla_compile.kernels.loop_split import Epilogue

aten = torch.ops.aten


def backward(name, wanted=None, given=None):
    case = CASES[name]
    operands = case.operands(5)
    tensors, ints, floats = sort_operands(case.register(), operands)
    call = Call.of(case.register(), tensors, ints, floats, 5)
    floating = [i for i, x in enumerate(tensors) if x.dtype.is_floating_point]
    outputs = call.forward_loop(True).results
    slopes = [j for (kind, j), y in outputs.items() if kind == "output" and y.dtype.is_floating_point]
    return call.backward_loop(floating if wanted is None else wanted, slopes if given is None else given).body


def products(nodes):
    return sum(getattr(node.target, "overloadpacket", None) in (aten.mm, aten.bmm, aten.addmm) for node in nodes)


def test_weights_of_an_lstm_wait_until_after_the_loop():
    body = backward("lstm")
    assert not body.summed and list(body.epilogue.summed) == [("gradient", 3)]
    # In the loop: dh = dg W. The sum over time needs dg, which is x's gradient, and h.
    assert products(body.graph.nodes) == 1
    assert set(body.epilogue.inputs.values()) == {("gradient", 2), ("previous", 0)}
    assert body.written == [("gradient", 2)]
    assert ("saved", 0) in body.streams and ("next", 1) in body.streams


def test_a_projection_inside_the_loop_waits_too():
    body = backward("lstm_projecting")
    assert set(body.epilogue.summed) == {("gradient", 3), ("gradient", 4)}
    assert set(body.epilogue.written) == {("gradient", 2)}
    assert body.summed == [("gradient", 5)] and products(body.graph.nodes) == 1


def test_elementwise_work_stays_in_the_loop():
    body = backward("tanh_state")
    assert body.epilogue is None and len(body.written) == 4
    assert ("next", 0) in body.streams  # tanh's derivative takes its result
    assert not any(node.target is aten.tanh.default for node in body.graph.nodes)


def test_what_depends_on_invariants_only_runs_once():
    body = backward("accumulating")
    assert body.prologue is not None
    assert aten.exp.default in [node.target for node in body.prologue.graph.nodes]
    assert not any(node.target is aten.exp.default for node in body.graph.nodes)


def test_only_what_is_wanted_is_computed():
    body = backward("lstm", wanted=[2], given=[0])
    assert body.carried == [0, 1] and body.written == [("gradient", 2)]
    assert not body.summed and body.epilogue is None
    assert backward("accumulating", wanted=[3], given=[]).carried == [0]
    assert backward("idle", wanted=[2], given=[0, 1, 2]).carried == [0]


def test_int_carries_have_no_gradient():
    assert backward("masked").carried == [0]


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y, W: (x.t() @ y).t().neg() * 2.0,
        lambda x, y, W: (x.t() @ y @ W).reshape(-1).unsqueeze(0),
        lambda x, y, W: (W.t() @ (y.t() @ x)) + (y.t() @ x),
        lambda x, y, W: torch.bmm(x.view(B, 1, D).transpose(1, 2), y.view(B, 1, D)).sum(0),
        lambda x, y, W: torch.bmm(W.expand(B, D, D), x.view(B, D, 1)).squeeze(-1) @ W,
        lambda x, y, W: (x.t() @ y).sigmoid() * W,
        lambda x, y, W: ((x.t() @ y).to(torch.float32) + 1).permute(1, 0).softmax(-1),
        lambda x, y, W: (x @ W)[:, None].expand(B, 2, D).sum(1),
    ],
)
def test_sums_and_maps_over_time(form):
    """Every form of an epilogue's graph against the same for each step."""
    T, dtype = 4, torch.float64
    x, y, W = torch.randn(T, B, D, dtype=dtype), torch.randn(T, B, D, dtype=dtype), torch.randn(D, D, dtype=dtype)
    graph = step_graph(lambda x, y, W: form(x, y, W), 0, 2, [x, y, W]).graph
    inputs = dict(zip(graph.find_nodes(op="placeholder"), [("x", 0), ("y", 0), ("W", 0)], strict=True))
    node = graph.output_node().args[0]

    epilogue = Epilogue(inputs, {n for n in inputs if inputs[n] != ("W", 0)}, {}, {})
    for n in graph.nodes:
        if any(m in epilogue.timed for m in n.all_input_nodes):
            epilogue.timed.add(n)
    want = torch.stack([form(x[t], y[t], W) for t in range(T)])
    for ask in ("summed", "value"):
        got = getattr(OverTime(epilogue, {("x", 0): x, ("y", 0): y}, {("W", 0): W}), ask)(node)
        expected = want.sum(0) if ask == "summed" else want
        assert got.shape == expected.shape and got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 if want.dtype == torch.float32 else 1e-12)


def test_a_sum_over_time_is_one_product():
    T = 6
    x, y = torch.randn(T, H, B, K), torch.randn(T, H, B, V)

    def step(h, x, y, W):
        return h * 0.5, torch.einsum("hbk,hkv->hbv", x, W) * y

    operands = [torch.zeros(D), x, y, torch.randn(H, K, V).requires_grad_()]
    key = register_step(step_graph(step, 1, 2, operands), 1, 2)
    body = Call.of(key, operands, [], [], T).backward_loop([3], [0]).body
    assert list(body.epilogue.summed) == [("gradient", 3)] and products(body.graph.nodes) == 0

import pytest
import torch
from budget import check_budget
from decay_cases import FAMILIES, Case, make_inputs, truth_and_eager
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from fla_compile import ops
from fla_compile.kernels import decay_ops

OPERATORS = ("linear_attention", "retention", "simple_gla", "gla")


def _leaves(case, dtype=torch.float32):
    x = make_inputs(case, dtype)
    tensors = {name: getattr(x, name) for name in ("q", "k", "v", "g", "h0")}
    return x, {name: t.requires_grad_() for name, t in tensors.items() if t is not None}


def _call(family, leaves):
    gate = [leaves["g"]] if "g" in leaves else []
    if family == "retention":
        gate = [leaves["g"].exp()]
    return getattr(ops, family)(
        leaves["q"], leaves["k"], leaves["v"], *gate, scale=0.3, initial_state=leaves["h0"], output_final_state=True
    )


def test_the_table():
    assert tuple(decay_ops.OPS) == OPERATORS
    assert tuple(decay_ops.FAMILIES) == (*OPERATORS, "gla_values", "gla_both", "rwkv6")
    assert set(ops.__all__) >= {name for f in OPERATORS for name in (f, f"naive_{f}")}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_autograd(family, dtype):
    case = Case(family, 70)
    x, leaves = _leaves(case, dtype)
    o, final = _call(family, leaves)
    grads = torch.autograd.grad([o, final], list(leaves.values()), [x.do, x.dht])
    got = {"o": o, "final_state": final} | dict(zip((f"d{name}" for name in leaves), grads, strict=True))
    truth, eager = truth_and_eager(case, x, dtype)
    for name, y in got.items():
        check_budget(name, y, truth[name], eager[name], "forward" if name in ("o", "final_state") else "backward")


@pytest.mark.parametrize("family", FAMILIES)
def test_opcheck(family):
    _, leaves = _leaves(Case(family, 20, B=1))
    args = [leaves.get(name) for name in ("q", "k", "v", "g", "h0")]
    torch.library.opcheck(decay_ops.OPS[family], (*args, 0.3))
    torch.library.opcheck(decay_ops.OPS[family], (*args[:4], None, 0.3))


@pytest.mark.parametrize("needs", [(True, True), (False, False)], ids=str)
def test_opcheck_backward(needs):
    x = make_inputs(Case("gla", 20, B=1), torch.bfloat16)
    torch.library.opcheck(decay_ops.decay_backward, (x.q, x.k, x.v, x.g, x.h0, 0.3, x.do, x.dht, *needs))


@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_once_for_every_length(family):
    counter = CompileCounterWithBackend("aot_eager")
    fn = torch.compile(lambda leaves: _call(family, leaves), fullgraph=True, dynamic=True, backend=counter)
    for T in (17, 40, 65, 130):
        x, leaves = _leaves(Case(family, T))
        got = torch.autograd.grad(fn(leaves), list(leaves.values()), [x.do, x.dht])
        expected = torch.autograd.grad(_call(family, leaves), list(leaves.values()), [x.do, x.dht])
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1
    targets = [str(node.target) for node in counter.graphs[0].graph.nodes]
    assert sum(f"fla_compile.{family}" in target for target in targets) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_strided_inputs_and_no_aliasing(family):
    x = make_inputs(Case(family, 65), torch.float32)
    plain = {name: getattr(x, name) for name in ("q", "k", "v", "g", "h0") if getattr(x, name) is not None}
    strided = {
        name: t.transpose(0, -1).contiguous().transpose(0, -1) if t.ndim > 1 else t.repeat_interleave(2)[::2]
        for name, t in plain.items()
    }
    for a, b in zip(_call(family, strided), _call(family, plain), strict=True):
        torch.testing.assert_close(a, b)
        assert a.is_contiguous()
        assert all(a.untyped_storage().data_ptr() != t.untyped_storage().data_ptr() for t in strided.values())


def test_only_what_is_wanted_is_computed(monkeypatch):
    seen = []
    inner = decay_ops.decay_cpu.chunk_backward

    def spy(*args, need_dg):
        seen.append(need_dg)
        return inner(*args, need_dg=need_dg)

    monkeypatch.setattr(decay_ops.decay_cpu, "chunk_backward", spy)
    x = make_inputs(Case("gla", 20), torch.float32)
    q = x.q.requires_grad_()
    o, final = ops.gla(q, x.k, x.v, x.g, initial_state=x.h0, output_final_state=True)
    o.sum().backward(retain_graph=True)
    final.sum().backward()
    assert seen == [False, False]
    assert ops.gla(q, x.k, x.v, x.g)[1] is None


def test_retention_defaults_to_retnet():
    x = make_inputs(Case("retention", 20), torch.bfloat16)
    o, _ = ops.retention(x.q, x.k, x.v)
    torch.testing.assert_close(o, ops.naive_retention(x.q, x.k, x.v)[0])


def _x(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": _x(2, 5, 3)}, "q must have 4 dimensions, got 3"),
        ({"k": _x(2, 5, 3)}, "k must have 4 dimensions, got 3"),
        ({"v": _x(2, 5, 3)}, "v must have 4 dimensions, got 3"),
        ({"g": _x(2, 5, 3)}, "g must have 4 dimensions, got 3"),
        ({"initial_state": _x(3, 4, 6)}, "initial_state must have 4 dimensions, got 3"),
        ({"k": _x(1, 5, 3, 4)}, "k has B=1, q has B=2"),
        ({"v": _x(2, 6, 3, 6)}, "v has T=6, q has T=5"),
        ({"k": _x(2, 5, 2, 4)}, "k has H=2, q has H=3"),
        ({"k": _x(2, 5, 3, 8)}, "k has K=8, q has K=4"),
        ({"g": _x(2, 5, 3, 1)}, "g has K=1, q has K=4"),
        ({"g": _x(2, 4, 3, 4)}, "g has T=4, q has T=5"),
        ({"initial_state": _x(1, 3, 4, 6)}, "initial_state has B=1, q has B=2"),
        ({"initial_state": _x(2, 3, 4, 5)}, "initial_state has V=5, v has V=6"),
        ({"q": _x(2, 0, 3, 4), "k": _x(2, 0, 3, 4), "v": _x(2, 0, 3, 6), "g": _x(2, 0, 3, 4)}, "q has T=0"),
        ({"q": _x(2, 5, 3, 4, dtype=torch.int64)}, "q must be floating point, got torch.int64"),
        ({"g": _x(2, 5, 3, 4, dtype=torch.int32)}, "g must be floating point, got torch.int32"),
        ({"initial_state": _x(2, 3, 4, 6, dtype=torch.bool)}, "initial_state must be floating point, got torch.bool"),
        ({"k": _x(2, 5, 3, 4, dtype=torch.bfloat16)}, "k has dtype torch.bfloat16, q has torch.float32"),
        ({"v": _x(2, 5, 3, 6, dtype=torch.float64)}, "v has dtype torch.float64, q has torch.float32"),
        ({"k": _x(2, 5, 3, 4, device="meta")}, "k is on meta, q is on cpu"),
        ({"g": _x(2, 5, 3, 4, device="meta")}, "g is on meta, q is on cpu"),
        ({"initial_state": _x(2, 3, 4, 6, device="meta")}, "initial_state is on meta, q is on cpu"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"q": _x(2, 5, 3, 4), "k": _x(2, 5, 3, 4), "v": _x(2, 5, 3, 6), "g": _x(2, 5, 3, 4)}
    for _ in range(2):
        ops.gla(**good)  # what has agreed is not looked at again
        with pytest.raises(ValueError, match=message):
            ops.gla(**(good | change))


def test_sizes_without_a_value():
    """Traced by torch.func, tensors are plain ones, but what they agree in is not to be kept."""
    trace = make_fx(torch.func.functionalize(lambda q: ops.linear_attention(q, q, q)[0]), tracing_mode="symbolic")
    targets = [node.target for node in trace(_x(1, 5, 3, 4)).graph.nodes]
    assert torch.ops.fla_compile.linear_attention.default in targets


@pytest.mark.parametrize(
    ("family", "gate", "message"),
    [
        ("simple_gla", _x(2, 5, 3, 4), "g must have 3 dimensions, got 4"),
        ("simple_gla", _x(2, 5, 2), "g has H=2, q has H=3"),
        ("retention", _x(2), "gamma has H=2, q has H=3"),
        ("retention", _x(2, 3), "gamma must have 1 dimensions, got 2"),
        ("retention", _x(3, dtype=torch.int64), "gamma must be floating point, got torch.int64"),
    ],
)
def test_bad_gates_are_named(family, gate, message):
    with pytest.raises(ValueError, match=message):
        getattr(ops, family)(_x(2, 5, 3, 4), _x(2, 5, 3, 4), _x(2, 5, 3, 6), gate)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("gla", "cpu", torch.float64, 512, 512), None),
        (("gla", "cuda", torch.bfloat16, 256, 256), None),
        (("gla", "cuda", torch.bfloat16, 257, 64), None),
        (("retention", "cuda", torch.float32, 64, 513), None),
        (("gla_values", "cuda", torch.float32, 64, 512), None),
        (("gla_both", "cuda", torch.float32, 64, 512), None),
        (("rwkv6", "cpu", torch.float64, 512, 512), None),
        (("rwkv6", "cuda", torch.float32, 64, 513), None),
        (("rwkv", "cpu", torch.float32, 64, 64), "family"),
        (("gla", "mps", torch.float32, 64, 64), "device"),
        (("gla", "cpu", torch.int8, 64, 64), "dtype"),
    ],
)
def test_supports(arguments, reason):
    found = decay_ops.supports(*arguments)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("gla", "cpu"), "chunk (matrix products)"),
        (("gla", "cuda"), "chunk (Triton)"),
        (("gla", "cuda", torch.bfloat16), "chunk (Triton)"),
        (("gla", "cuda", torch.float64), "chunk (matrix products)"),
        (("rwkv6", "cuda"), "chunk (Triton)"),
        (("retention", "cuda", torch.bfloat16, 256, 512), "chunk (Triton)"),
        (("retention", "cuda", torch.bfloat16, 256, 513), "chunk (matrix products)"),
        (("gla", "cuda", torch.bfloat16, 257, 64), "chunk (matrix products)"),
        (("gla_values", "cuda", torch.float32, 512, 256), "chunk (Triton)"),
        (("gla_values", "cuda"), "chunk (Triton)"),
        (("gla_values", "cuda", torch.float32, 256, 256), "chunk (Triton)"),
        (("gla_values", "cuda", torch.float32, 64, 257), "chunk (matrix products)"),
        (("gla_values", "cuda", torch.float64), "chunk (matrix products)"),
        (("gla_both", "cuda"), "chunk (matrix products)"),
        (("gla_both", "cuda", torch.float32), "chunk (matrix products)"),
        (("gla_both", "cuda", torch.bfloat16, 128, 128), "chunk (Triton)"),
        (("gla_both", "cuda", torch.bfloat16, 128, 129), "chunk (matrix products)"),
    ],
)
def test_kernel_name(arguments, name):
    assert decay_ops.kernel_name(*arguments) == name

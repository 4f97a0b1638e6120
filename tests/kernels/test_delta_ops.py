import pytest
import torch
from budget import check_budget
from delta_cases import SCALE, Case, kind, make_operands, output_gradients, results, truth_and_eager
from torch._dynamo.testing import CompileCounterWithBackend

from fla_compile.kernels import delta_naive, delta_ops

FAMILIES = ("delta_rule", "gated_delta_rule", "kda", "dplr")


def _public(family):
    return getattr(delta_ops, family)


def test_the_table():
    assert delta_ops.FAMILIES == {
        "delta_rule": {"beta": "BTH"},
        "gated_delta_rule": {"g": "BTH", "beta": "BTH"},
        "kda": {"g": "BTHK", "beta": "BTH"},
        "dplr": {"g": "BTHK", "b": "BTHK", "c": "BTHK"},
    }
    assert tuple(delta_ops.OPS) == FAMILIES
    assert set(delta_ops.__all__) == {"FAMILIES", "supports", *FAMILIES}
    assert set(delta_naive.__all__) == {f"naive_{family}" for family in FAMILIES}


@pytest.mark.parametrize(
    ("family", "operands"),
    [
        ("delta_rule", "Tensor q, Tensor k, Tensor v, Tensor beta"),
        ("gated_delta_rule", "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta"),
        ("kda", "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta"),
        ("dplr", "Tensor q, Tensor k, Tensor v, Tensor g, Tensor b, Tensor c"),
    ],
)
def test_the_schemas(family, operands):
    expected = f"fla_compile::{family}({operands}, Tensor? initial_state, float scale) -> (Tensor, Tensor)"
    assert str(getattr(torch.ops.fla_compile, family).default._schema) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_autograd(family, dtype):
    case = Case(family, 70, beta="any")
    got = results(_public(family), case, make_operands(case, dtype), *output_gradients(case, dtype))
    truth, eager = truth_and_eager(case, dtype)
    for name, y in got.items():
        check_budget(name, y, truth[name], eager[name], kind(name))


@pytest.mark.parametrize("family", FAMILIES)
def test_opcheck(family):
    *inputs, h0 = (x.requires_grad_() for x in make_operands(Case(family, 20, B=1), torch.float32).values())
    torch.library.opcheck(delta_ops.OPS[family], (*inputs, h0, SCALE))
    torch.library.opcheck(delta_ops.OPS[family], (*inputs, None, SCALE))


@pytest.mark.parametrize("needs", [(True, True), (False, False)], ids=str)
@pytest.mark.parametrize("family", ["kda", "dplr"])
def test_opcheck_backward(family, needs):
    case = Case(family, 20, B=1)
    absent = {name: None for name in ("q", "k", "v", "g", "beta", "b", "c")}
    operands = absent | make_operands(case, torch.bfloat16)
    torch.library.opcheck(
        delta_ops.delta_backward, (*operands.values(), SCALE, *output_gradients(case, torch.bfloat16), *needs)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_once_for_every_length_and_batch(family):
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def step(*operands):
        *inputs, h0 = operands
        # a literal: a float from elsewhere would be an input of the graph, and Dynamo would start again to fix it
        return _public(family)(*inputs, scale=0.3, initial_state=h0, output_final_state=True)

    def compiled(*inputs, scale, initial_state, output_final_state):
        assert scale == 0.3
        return step(*inputs, initial_state)

    for B, T in ((2, 17), (3, 40), (2, 65), (4, 130)):
        case = Case(family, T, B=B)
        operands, grads = make_operands(case, torch.float32), output_gradients(case, torch.float32)
        got, expected = (results(fn, case, operands, *grads) for fn in (compiled, _public(family)))
        for name, y in got.items():
            torch.testing.assert_close(y, expected[name])
    assert counter.frame_count == 1
    targets = [str(node.target) for node in counter.graphs[0].graph.nodes]
    assert sum(f"fla_compile.{family}" in target for target in targets) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_strided_inputs_and_no_aliasing(family):
    plain = make_operands(Case(family, 65), torch.float32)
    strided = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in plain.items()}
    kept = {name: x.clone() for name, x in plain.items()}
    found = [
        _public(family)(*list(x.values())[:-1], initial_state=x["initial_state"], output_final_state=True)
        for x in (strided, plain)
    ]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
        assert a.is_contiguous()
        assert all(a.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for x in strided.values())
    for name, x in plain.items():
        assert torch.equal(x, kept[name]) and torch.equal(strided[name], kept[name]), f"{name} was written to"


def test_only_what_is_wanted_is_computed(monkeypatch):
    seen = []
    inner = delta_ops.chunk_backward

    def spy(*args, need_dg):
        seen.append(need_dg)
        return inner(*args, need_dg=need_dg)

    monkeypatch.setattr(delta_ops, "chunk_backward", spy)
    x = make_operands(Case("kda", 20), torch.float32)
    q = x["q"].requires_grad_()
    operands = [q, *(x[name] for name in ("k", "v", "g", "beta"))]
    o, final = delta_ops.kda(*operands, initial_state=x["initial_state"], output_final_state=True)
    o.sum().backward(retain_graph=True)
    final.sum().backward()
    assert seen == [False, False]
    assert delta_ops.kda(*operands)[1] is None


@pytest.mark.parametrize("family", FAMILIES)
def test_one_gradient_at_a_time(family):
    case = Case(family, 70)
    operands, (do, dht) = make_operands(case, torch.float64), output_gradients(case, torch.float64)
    whole = results(_public(family), case, operands, do, dht)
    for wanted in operands:
        leaf = operands[wanted].clone().requires_grad_()
        *inputs, h0 = (operands | {wanted: leaf}).values()
        o, final = _public(family)(*inputs, scale=SCALE, initial_state=h0, output_final_state=True)
        (grad,) = torch.autograd.grad([o, final], [leaf], [do, dht])
        torch.testing.assert_close(grad, whole[f"d{wanted}"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_scale_defaults_to_the_key_size(family):
    operands = list(make_operands(Case(family, 20), torch.bfloat16).values())[:-1]
    o, _ = _public(family)(*operands)
    torch.testing.assert_close(o, _public(family)(*operands, scale=24**-0.5)[0])
    torch.testing.assert_close(o, getattr(delta_naive, f"naive_{family}")(*operands)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_changes_nothing(family):
    case = Case(family, 70)
    operands, grads = make_operands(case, torch.float32), output_gradients(case, torch.float32)
    plain = results(_public(family), case, operands, *grads)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = results(_public(family), case, operands, *grads)
    for name, y in plain.items():
        assert torch.equal(y, narrow[name]), name


def _x(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": _x(2, 5, 3)}, "q must have 4 dimensions, got 3"),
        ({"k": _x(2, 5, 3)}, "k must have 4 dimensions, got 3"),
        ({"v": _x(2, 5, 3)}, "v must have 4 dimensions, got 3"),
        ({"g": _x(2, 5, 3)}, "g must have 4 dimensions, got 3"),
        ({"b": _x(2, 5, 3)}, "b must have 4 dimensions, got 3"),
        ({"c": _x(5, 3, 4)}, "c must have 4 dimensions, got 3"),
        ({"initial_state": _x(3, 4, 6)}, "initial_state must have 4 dimensions, got 3"),
        ({"k": _x(1, 5, 3, 4)}, "k has B=1, q has B=2"),
        ({"v": _x(2, 6, 3, 6)}, "v has T=6, q has T=5"),
        ({"k": _x(2, 5, 1, 4)}, "k has H=1, q has H=3"),
        ({"k": _x(2, 5, 3, 8)}, "k has K=8, q has K=4"),
        ({"g": _x(2, 5, 3, 1)}, "g has K=1, q has K=4"),
        ({"b": _x(2, 5, 3, 5)}, "b has K=5, q has K=4"),
        ({"c": _x(2, 4, 3, 4)}, "c has T=4, q has T=5"),
        ({"initial_state": _x(1, 3, 4, 6)}, "initial_state has B=1, q has B=2"),
        ({"initial_state": _x(2, 3, 4, 5)}, "initial_state has V=5, v has V=6"),
        ({n: _x(2, 0, 3, 6 if n == "v" else 4) for n in "qkvgbc"}, "q has T=0, at least T=1 is needed"),
        ({"q": _x(2, 5, 3, 4, dtype=torch.int64)}, "q must be floating point, got torch.int64"),
        ({"g": _x(2, 5, 3, 4, dtype=torch.int32)}, "g must be floating point, got torch.int32"),
        ({"c": _x(2, 5, 3, 4, dtype=torch.int32)}, "c must be floating point, got torch.int32"),
        ({"initial_state": _x(2, 3, 4, 6, dtype=torch.bool)}, "initial_state must be floating point, got torch.bool"),
        ({"k": _x(2, 5, 3, 4, dtype=torch.bfloat16)}, "k has dtype torch.bfloat16, q has torch.float32"),
        ({"v": _x(2, 5, 3, 6, dtype=torch.float64)}, "v has dtype torch.float64, q has torch.float32"),
        ({"b": _x(2, 5, 3, 4, dtype=torch.float16)}, "b has dtype torch.float16, q has torch.float32"),
        ({"k": _x(2, 5, 3, 4, device="meta")}, "k is on meta, q is on cpu"),
        ({"c": _x(2, 5, 3, 4, device="meta")}, "c is on meta, q is on cpu"),
        ({"initial_state": _x(2, 3, 4, 6, device="meta")}, "initial_state is on meta, q is on cpu"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {name: _x(2, 5, 3, 6 if name == "v" else 4) for name in "qkvgbc"}
    delta_ops.dplr(**good)
    with pytest.raises(ValueError, match=message):
        delta_ops.dplr(**(good | change))


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("delta_rule", {"beta": _x(2, 5, 3, 1)}, "beta must have 3 dimensions, got 4"),
        ("delta_rule", {"beta": _x(2, 5, 1)}, "beta has H=1, q has H=3"),
        ("gated_delta_rule", {"beta": _x(2, 5, 3, dtype=torch.int64)}, "beta must be floating point, got torch.int64"),
        ("gated_delta_rule", {"g": _x(2, 5, 3, 4)}, "g must have 3 dimensions, got 4"),
        ("gated_delta_rule", {"g": _x(2, 1, 3)}, "g has T=1, q has T=5"),
        ("kda", {"g": _x(2, 5, 3)}, "g must have 4 dimensions, got 3"),
        ("kda", {"beta": _x(1, 5, 3)}, "beta has B=1, q has B=2"),
    ],
)
def test_bad_gates_are_named(family, change, message):
    good = {"q": _x(2, 5, 3, 4), "k": _x(2, 5, 3, 4), "v": _x(2, 5, 3, 6)}
    good |= {
        name: _x(2, 5, 3, 4) if axes == "BTHK" else _x(2, 5, 3) for name, axes in delta_ops.FAMILIES[family].items()
    }
    _public(family)(**good)
    with pytest.raises(ValueError, match=message):
        _public(family)(**(good | change))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("dplr", "cpu", torch.float64, 512, 512), None),
        (("kda", "cuda", torch.bfloat16, 512, 64), None),
        (("gla", "cpu", torch.float32, 64, 64), "family"),
        (("delta_rule", "mps", torch.float32, 64, 64), "device"),
        (("delta_rule", "cpu", torch.int8, 64, 64), "dtype"),
    ],
)
def test_supports(arguments, reason):
    found = delta_ops.supports(*arguments)
    assert found is None if reason is None else reason in found

"""Validation: a wrong replacement never reaches the user; a right one is not refused for its roundings."""

import logging

import pytest
import torch
import torch.nn.functional as F
from programs import Passes, assert_looped, assert_refused, assert_rewritten, operands, outcome

from fla_compile import explain
from fla_compile.options import Options
from fla_compile.passes import lower as lowering
from fla_compile.passes import match_recurrences, validate


def program(q, k, v, g):
    S, o = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), torch.zeros_like(v)
    for t in range(q.shape[1]):  # here
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


def spoiled(change):
    """Lowering with a mistake: `change(graph, kernel call)` edits the finished graph."""

    def lower(*args):
        lowered = lowering.lower(*args)
        graph = lowered.module.graph
        for call in graph.find_nodes(op="call_function", target=torch.ops.fla_compile.gla.default):
            with graph.inserting_before(call):
                change(graph, call)
        lowered.module.recompile()
        return lowered

    return lower


def wrong_scale(graph, call):
    call.update_arg(5, call.args[5] * 1.001)


def wrong_gate(graph, call):
    call.update_arg(3, graph.call_function(torch.mul, (call.args[3], 0.5)))


def swapped_operands(graph, call):
    q, k = call.args[:2]
    call.update_arg(0, k)
    call.update_arg(1, q)


def lost_gradient(graph, call):
    call.update_arg(1, graph.call_method("detach", (call.args[1],)))


def wrong_shape(graph, call):
    call.update_arg(2, graph.call_function(torch.cat, ([call.args[2]] * 2, -1)))


def does_not_run(graph, call):
    call.update_arg(2, graph.call_function(torch.flatten, (call.args[2],)))


@pytest.mark.parametrize(
    "change, detail",
    [
        (wrong_scale, "differ by 1.00e-03"),
        (wrong_gate, "differ"),
        (swapped_operands, "differ"),
        (lost_gradient, "gradient of loop and kernel differ"),
        (wrong_shape, "its shape is"),
        (does_not_run, "do not run"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_wrong_replacement_is_looped(change, detail, monkeypatch, caplog):
    monkeypatch.setattr(match_recurrences, "lower", spoiled(change))
    with caplog.at_level(logging.WARNING, "fla_compile"):
        assert_looped(program, operands("bthk bthk bthv bthk"), "validation_failed", detail)
    assert any("validation_failed" in r.message and "test_validate.py" in r.message for r in caplog.records)


def test_a_wrong_loop_is_left_as_it_was(monkeypatch):
    """Where not even the looped step gives the same numbers, the program keeps its own."""

    def lower(*args):
        lowered = lowering.lower(*args)
        graph = lowered.module.graph
        (states_and_outputs,) = graph.output_node().args
        with graph.inserting_before(graph.output_node()):
            changed = [graph.call_function(torch.mul, (x, 1.01)) for x in states_and_outputs]
        graph.output_node().args = (tuple(changed),)
        lowered.module.recompile()
        return lowered

    monkeypatch.setattr(match_recurrences, "lower", lower)
    assert_refused(program, operands("bthk bthk bthv bthk"), "validation_failed", "differ by")


def test_without_validation_a_wrong_replacement_goes_through(monkeypatch):
    """What `validate=False` gives up; and proof that the test above spoils what it says."""
    monkeypatch.setattr(match_recurrences, "lower", spoiled(wrong_gate))
    args = operands("bthk bthk bthv bthk")
    backend = Passes(Options(validate=False))
    got, _ = torch.compile(program, backend=backend, fullgraph=True)(*args)
    assert backend.report.rewrites and backend.report.validation_seconds == 0
    assert not torch.allclose(got, program(*args)[0], rtol=1e-2, atol=1e-2)


def test_the_random_state_is_left_alone():
    args = operands("bthk bthk bthv bthk")
    explain(program, *args)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    report = explain(program, *args)
    assert report.rewrites and report.validation_seconds > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_the_users_data_and_gradients_are_left_alone():
    args = [x.requires_grad_() for x in operands("bthk bthk bthv bthk")]
    kept = [x.detach().clone() for x in args]
    torch.compile(program, backend=Passes(), fullgraph=True)(*args)
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(args, kept, strict=True))


def test_a_norm_with_the_default_eps():
    """Its eps is that of the type: float64 would compare two different programs."""

    def fn(q, k, v, g):
        S, o = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), torch.zeros_like(v)
        for t in range(q.shape[1]):
            k_t = F.rms_norm(k[:, t], (k.shape[-1],))
            S = S * torch.sigmoid(g[:, t])[..., None] + k_t[..., None] * v[:, t][..., None, :]
            o[:, t] = F.rms_norm(torch.einsum("bhk,bhkv->bhv", q[:, t], S), (v.shape[-1],))
        return o, S

    assert_rewritten(fn, operands("bthk bthk bthv bthk"), "gla", tolerance=2e-4)


def test_a_loop_that_needs_positive_data():
    def fn(q, k, v, g):
        S, o = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), torch.zeros_like(v)
        for t in range(q.shape[1]):
            S = S * torch.exp(-g[:, t].abs())[..., None] + k[:, t].sqrt()[..., None] * v[:, t].log()[..., None, :]
            o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
        return o, S

    args = [x.abs() + 0.1 for x in operands("bthk bthk bthv bthk")]
    assert_rewritten(fn, args, "gla", tolerance=1e-4)


def test_a_loop_without_finite_numbers_is_refused():
    def fn(q, k, v, g):
        S, o = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), torch.zeros_like(v)
        for t in range(q.shape[1]):  # here
            S = S * torch.sigmoid(g[:, t])[..., None] + torch.acosh(-k[:, t].abs())[..., None] * v[:, t][..., None, :]
            o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
        return o

    backend = Passes()
    torch.compile(fn, backend=backend, fullgraph=True)(*operands("bthk bthk bthv bthk"))
    (refusal,) = backend.report.refusals
    assert refusal.reason == "validation_failed" and "no finite numbers" in refusal.detail


@pytest.mark.parametrize("wide, inner", [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)])
def test_narrow_types_are_judged_by_their_own_roundings(wide, inner):
    def fn(q, k, v, g):
        S, o = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=wide), torch.zeros_like(v)
        for t in range(q.shape[1]):
            S = S * torch.sigmoid(g[:, t].float())[..., None] + (k[:, t][..., None] * v[:, t][..., None, :]).to(wide)
            o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t].float(), S).to(inner)
        return o, S

    args = operands("bthk bthk bthv bthk", dtype=inner)
    report = assert_rewritten(fn, args, "gla", tolerance=6e-2)
    assert report.rewrites


def test_error_and_tolerances():
    a = torch.tensor([1.0, 2.0])
    assert validate.error(a, a) == 0.0
    assert validate.error(a, a + 1e-3) > 1e-4
    with pytest.raises(ValueError, match=r"its shape is \[1\], not \[2\]"):
        validate.error(a[:1], a)
    assert not validate.error(torch.tensor([float("nan")]), torch.tensor([1.0])) <= 1.0
    assert validate.TOLERANCE == {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def test_in_float64_leaves_the_original_alone():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_method("to", (graph.call_method("float", (x,)), torch.bfloat16))
    graph.output((graph.call_function(torch.ops.aten._to_copy.default, (y,), {"dtype": torch.float32}),))
    gm = torch.fx.GraphModule({}, graph)
    before = gm.code
    wide = validate.in_float64(gm)
    third = torch.tensor(1 / 3, dtype=torch.float64)
    assert torch.equal(wide(third)[0], third) and wide(third)[0].dtype == torch.float64
    assert gm.code == before and gm(third)[0].dtype == torch.float32


def test_gradients_reach_every_operand():
    values, slopes = outcome(program, operands("bthk bthk bthv bthk"))
    assert len(values) == 2 and all(g is not None and g.abs().max() > 0 for g in slopes)


def written_after_it_was_read(q, k, v, beta):
    """Eager autograd cannot differentiate it: the product holds the state that is then written to."""
    S, outs = q.new_zeros(q.shape[0], q.shape[2], v.shape[3], q.shape[3]), []
    for t in range(q.shape[1]):
        S = 1.0 * S
        error = v[:, t] - (S @ k[:, t, :, :, None])[..., 0]
        S += (beta[:, t, :, None] * error)[..., None] * k[:, t, :, None, :]
        outs.append((S @ q[:, t, :, :, None])[..., 0])
    return torch.stack(outs, 1)


def without_writes_in_place(q, k, v, beta):
    S, outs = q.new_zeros(q.shape[0], q.shape[2], v.shape[3], q.shape[3]), []
    for t in range(q.shape[1]):
        error = v[:, t] - (S @ k[:, t, :, :, None])[..., 0]
        S = S + (beta[:, t, :, None] * error)[..., None] * k[:, t, :, None, :]
        outs.append((S @ q[:, t, :, :, None])[..., 0])
    return torch.stack(outs, 1)


def test_gradients_that_eager_cannot_take():
    args = operands("bthk bthk bthv bth")
    with pytest.raises(RuntimeError, match="inplace"):
        outcome(written_after_it_was_read, args)
    assert_rewritten(written_after_it_was_read, args, "delta_rule", reference=without_writes_in_place)


def halved(S):
    with torch.no_grad():
        return S * 0.5


def without_gradients_of_the_state(q, k, v):
    S, outs = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), []
    for t in range(q.shape[1]):
        S = S + k[:, t][..., None] * v[:, t][..., None, :]
        outs.append((q[:, t][..., None] * S).sum(-2))
        S = halved(S)
    return torch.stack(outs, 1)


def test_no_grad_in_the_loop_is_refused_without_validation_too():
    backend = Passes(Options(validate=False))
    args = operands("bthk bthk bthv")
    got, slopes = outcome(torch.compile(without_gradients_of_the_state, backend=backend, fullgraph=True), args)
    want, true_slopes = outcome(without_gradients_of_the_state, args)
    for a, b in zip((*got, *slopes), (*want, *true_slopes), strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-5)
    (refusal,) = backend.report.refusals
    assert refusal.reason == "unsupported_op" and "no_grad" in refusal.detail

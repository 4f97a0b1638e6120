import dataclasses

import decay_cases
import delta_cases
import pytest
import torch
from range_cases import DECAYS, FLOOR, check_where_finite, log_decay

from fla_compile.kernels import (
    decay_cpu,
    decay_ops,
    delta_chunk,
    delta_naive,
    delta_ops,
    delta_steps,
    linear_scan,
    selective_scan,
)

DECAY_FAMILIES = ("simple_gla", "gla", "gla_values", "gla_both", "rwkv6")
DELTA_FAMILIES = ("gated_delta_rule", "kda", "dplr")
SHAPE = {"T": 200, "B": 1, "H": 2, "K": 6, "V": 10}


def _check_decay(case, x):
    name = case.family.removesuffix("_values").removesuffix("_both")
    got = decay_cases.results(getattr(decay_ops, name), case, x, torch.float32)
    truth, eager = decay_cases.truth_and_eager(case, x, torch.float32)
    for part, y in got.items():
        check_where_finite(f"{case} {part}", y, truth[part], eager[part])


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("family", DECAY_FAMILIES)
def test_decay(family, decay):
    case = decay_cases.Case(family, **SHAPE)
    x = decay_cases.make_inputs(case, torch.float32)
    shrinks = decay in ("strong", "infinite", "some_infinite")
    new = {"g": log_decay(decay, x.g.shape)} if x.g is not None else {}
    if x.gv is not None:  # both growing would overflow the loop at once
        new["gv"] = log_decay(decay if shrinks or family == "gla_values" else "zero", x.gv.shape)
    _check_decay(case, dataclasses.replace(x, **new))


@pytest.mark.parametrize("family", ["simple_gla", "gla", "gla_values"])
def test_growth_beside_small_gradients(family):
    """A pair that grew by e^12 spans no other step, and leaves nothing in that step's gradient."""
    case = decay_cases.Case(family, **SHAPE)
    x = decay_cases.make_inputs(case, torch.float32)
    name = "g" if x.gv is None else "gv"
    g = torch.full_like(getattr(x, name), -0.3)
    g[:, 30], g[:, 31] = 12.0, -12.0
    x = dataclasses.replace(x, **{name: g})
    got = decay_cases.results(getattr(decay_ops, family.removesuffix("_values")), case, x, torch.float32)
    truth, eager = decay_cases.truth_and_eager(case, x, torch.float32)
    for part, y in got.items():
        check_where_finite(f"{case} {part}", y, truth[part], eager[part], floor=1e-4, every_row=True)


def test_retention_that_grows():
    case = decay_cases.Case("retention", **SHAPE)
    x = decay_cases.make_inputs(case, torch.float32)
    _check_decay(case, dataclasses.replace(x, g=torch.tensor([0.05, 0.3])))


def _delta_case(family, decay, erased=1.0):
    """`erased` is the share of steps that erase: a decay apart for each key, mixed by every step, soon overflows."""
    case = delta_cases.Case(family, **SHAPE)
    x = delta_cases.make_operands(case, torch.float32)
    x["g"] = log_decay(decay, x["g"].shape)
    name = "b" if family == "dplr" else "beta"
    x[name][:, torch.rand(case.T) > erased] = 0
    return case, x, delta_cases.output_gradients(case, torch.float32)


def _check_delta(case, x, grads, got):
    naive = getattr(delta_naive, f"naive_{case.family}")
    truth = delta_cases.results(naive, case, {name: y.double() for name, y in x.items()}, *grads)
    eager = delta_cases.results(naive, case, x, *grads)
    for part, y in got.items():
        check_where_finite(f"{case} {part}", y, truth[part], eager[part])


@pytest.mark.gpu
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("family", DELTA_FAMILIES)
def test_gpu_delta(family, decay):
    case, x, grads = _delta_case(family, decay)
    on_gpu = {name: y.cuda() for name, y in x.items()}, *(y.cuda() for y in grads)
    got = delta_cases.results(getattr(delta_ops, family), case, *on_gpu)
    _check_delta(case, x, grads, {part: y.cpu() for part, y in got.items()})


@pytest.mark.parametrize("erased", [1.0, 0.02], ids=["always", "seldom"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("family", DELTA_FAMILIES)
def test_delta(family, decay, erased):
    case, x, grads = _delta_case(family, decay, erased)
    _check_delta(case, x, grads, delta_cases.results(getattr(delta_ops, family), case, x, *grads))


@pytest.mark.parametrize("family", DELTA_FAMILIES)
def test_erasing_holds_what_would_grow(family):
    """S' = (1 - beta k^2) e S + beta k v with beta k^2 = 1: bounded, where chunks would cancel terms of e^63."""
    case = delta_cases.Case(family, 130, B=1, H=2, K=1, V=8)
    x = delta_cases.make_operands(case, torch.float32)
    x["k"], x["g"] = torch.ones_like(x["k"]), torch.ones_like(x["g"])
    if family == "dplr":
        x["b"], x["c"] = torch.full_like(x["b"], -torch.e), torch.ones_like(x["c"])
    else:
        x["beta"] = torch.ones_like(x["beta"])
    grads = delta_cases.output_gradients(case, torch.float32)
    got = delta_cases.results(getattr(delta_ops, family), case, x, *grads)
    assert got["o"].abs().max() < 1e3
    _check_delta(case, x, grads, got)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", delta_cases.FAMILIES)
def test_steps_equal_chunks(family, dtype):
    """The steps by themselves, where both hold; T over several segments, with a rest."""
    case = delta_cases.Case(family, 150, beta="any")
    x, (do, dht) = delta_cases.make_operands(case, dtype), delta_cases.output_gradients(case, dtype)
    absent = {name: None for name in ("g", "beta", "b", "c")}
    operands = delta_chunk.Operands(**absent | x, scale=delta_cases.SCALE)
    # one rounding of a narrow result, or a float64 sum in another order
    close = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2**-7, "atol": 1e-4}
    for got, expected in zip(delta_steps.steps_forward(operands), delta_chunk.chunk_forward(operands), strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, **close)
    got, expected = (fn(operands, do, dht) for fn in (delta_steps.steps_backward, delta_chunk.chunk_backward))
    for name in ("q", "k", "v", *absent, "initial_state"):
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, **close)
    assert delta_steps.steps_backward(operands, do, dht, need_dg=False).g is None


def test_which_decays_are_tame():
    g = torch.zeros(2, 130, 3)
    g[0, 10, 1] = delta_steps.CHUNK_GROWTH + 1
    g[1, :, 2] = (delta_steps.CHUNK_GROWTH - 1) / 64
    g[1, 20, 0] = -100.0
    assert delta_steps.tame(g).tolist() == [[True, False, True], [True, True, True]]
    assert delta_steps.grows(g) and not delta_steps.grows(g[1:]) and not delta_steps.grows(None)
    many = torch.full((1, 2048, 1, 2), (delta_steps.CHUNK_GROWTH - 1) / 64)
    assert delta_steps.grows(many) and not delta_steps.grows(many[:, :256])
    assert delta_steps.grows(torch.full((1, 5, 1), torch.nan))


@pytest.mark.parametrize("family", [*DELTA_FAMILIES, "delta_rule", "gla", "gla_both"])
def test_a_captured_graph_is_not_waited_for(family):
    """Meta tensors take the road of a CUDA graph being captured, and raise where a number is read back."""
    q, k, b, c = torch.empty(4, 2, 100, 3, 8, device="meta").unbind()
    v, gv, do = torch.empty(3, 2, 100, 3, 6, device="meta").unbind()
    h0 = torch.empty(2, 3, 8, 6, device="meta")
    if family.startswith("gla"):
        values = gv if family == "gla_both" else None
        o, _ = decay_cpu.chunk_forward.__wrapped__(q, k, v, c, h0, 1.0, gv=values)
        decay_cpu.chunk_gradients.__wrapped__(q, k, v, c, values, h0, 1.0, do, h0)
    else:
        own = {"g": c, "beta": q[..., 0], "b": b, "c": c} | ({"g": q[..., 0]} if "gated" in family else {})
        wanted = {name: own[name] if name in delta_ops.FAMILIES[family] else None for name in own}
        x = delta_chunk.Operands(q=q, k=k, v=v, **wanted, initial_state=h0, scale=1.0)
        o, _ = delta_chunk.chunk_forward(x)
        o = delta_ops.where_tame(o, x, 1)
        delta_chunk.chunk_backward(x, delta_ops.where_tame(do, x, 1), h0)
    assert o.shape == v.shape and o.device.type == "meta"


@pytest.mark.parametrize("family", DELTA_FAMILIES)
def test_a_captured_graph_tells_what_chunks_cannot(family):
    """What a CUDA graph holds, on CPU tensors: NaN for the heads that grow, the right numbers for the others."""
    _, x, (do, dht) = _delta_case(family, "zero")
    x["g"][:, :, 1] = 1.0
    absent = {name: None for name in ("g", "beta", "b", "c")}
    operands = delta_chunk.Operands(**absent | x, scale=delta_cases.SCALE)
    expected = delta_chunk.chunk_forward(operands)
    for y, whole, axis in zip(expected, expected, (1, 0), strict=True):
        got = delta_ops.where_tame(y, operands, axis)
        heads = got.movedim(2 if axis else 1, 0)
        assert heads[1].isnan().all() and torch.equal(heads[0], whole.movedim(2 if axis else 1, 0)[0])
    grads = delta_chunk.chunk_backward(operands, delta_ops.where_tame(do, operands, 1), dht)
    for name in ("q", "k", "v", "g"):
        heads = getattr(grads, name).movedim(2, 0)
        assert heads[1].isnan().all() and heads[0].isfinite().all(), name
    assert grads.initial_state[:, 1].isnan().all() and grads.initial_state[:, 0].isfinite().all()


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("D", [6, 600], ids=["narrow", "wide"])
def test_linear_scan(D, decay):
    torch.manual_seed(0)
    a = log_decay(decay, (2, 200, D)).exp()
    operands = {"x": torch.randn(2, 200, D), "a": a, "initial_state": torch.randn(2, D)}
    _check_scan(linear_scan.linear_scan, linear_scan.naive_linear_scan, operands)


@pytest.mark.parametrize("decay", DECAYS)
def test_selective_scan(decay):
    torch.manual_seed(0)
    dt, A = log_decay(decay, (2, 200, 5)), torch.linspace(0.5, 1.0, 20).view(5, 4)
    if "infinite" in decay:  # dt A = -inf, of a dt that is finite
        dt, A = torch.full_like(dt, 0.5), torch.where(A > 0.8 if "some" in decay else A > 0, -torch.inf, -A)
    x = torch.randn(2, 200, 5) / (1 + dt.abs())
    operands = {"x": x, "dt": dt, "A": A, "B": torch.randn(2, 200, 4), "C": torch.randn(2, 200, 4)}
    operands["initial_state"] = torch.randn(2, 5, 4)
    _check_scan(selective_scan.selective_scan, selective_scan.naive_selective_scan, operands)


def _check_scan(fn, naive, operands):
    found = []
    for call, dtype in ((fn, torch.float32), (naive, torch.float64), (naive, torch.float32)):
        leaves = {name: y.to(dtype).requires_grad_() for name, y in operands.items()}
        out = call(**leaves, output_final_state=True)
        grads = [torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y) for y in out]
        found.append([y.detach() for y in out] + list(torch.autograd.grad(out, list(leaves.values()), grads)))
    names = ("o", "final_state", *(f"d{name}" for name in operands))
    for name, got, truth, eager in zip(names, *found, strict=True):
        # a rate's gradient is a sum of both signs over all sequences and steps
        check_where_finite(name, got, truth, eager, floor=3e-4 if name == "dA" else FLOOR)

"""The decode steps as operators on the CPU: values, grouped heads, compilation, refusals."""

import pytest
import torch
from decay_cases import SCALE
from decay_step_cases import DECAYS, FAMILIES, GROUPED, Case, check, make_operands, run

from fla_compile import ops
from fla_compile.kernels import decay_checks, decay_configs, decay_step
from fla_compile.kernels.decay_step import decay_step_op, kernel_name

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_values(family, dtype):
    cases = [Case(family, T=T, decay=d) for T in (1, 5) for d in DECAYS]
    cases += [Case(family, T=3, H=4, **heads) for heads in GROUPED]
    cases += [Case(family, T=16, B=1, H=1, K=1, V=1), Case(family, T=2, state=torch.bfloat16)]
    for case in cases:
        if case.state is None or dtype != torch.float64:
            operands = make_operands(case, dtype)
            check(case, operands, run("", ops, case, operands))


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_the_sequence(family):
    """One step after another is what the op over the whole sequence gives, with its final state."""
    case = Case(family, T=7)
    x = make_operands(case, torch.float64)
    name, gates = FAMILIES[family]
    extra = {n: x[n] for n in gates}
    want = getattr(ops, name)(
        x["q"], x["k"], x["v"], **extra, scale=SCALE, initial_state=x["state"], output_final_state=True
    )
    for module, prefix in ((ops, ""), (ops, "naive_")):
        state, o = x["state"].clone(), []
        for t in range(case.T):
            step = {n: y if n in ("gamma", "u") else y[:, t : t + 1] for n, y in extra.items()}
            fn = getattr(module, f"{prefix}{name}_step")
            o.append(fn(*(x[n][:, t : t + 1] for n in "qkv"), state, **step, scale=SCALE))
        torch.testing.assert_close(torch.cat(o, 1), want[0])
        torch.testing.assert_close(state, want[1])


@pytest.mark.parametrize("layout", ["heads_first", "last_first", "inside"])
def test_strided(layout):
    """Operands and state of any strides; the state's own memory is what changes, and nothing beside it."""
    case = Case("gla_both", T=3)
    plain = make_operands(case, torch.float32)
    want = run("", ops, case, plain)
    strided = {n: lay_out(x, layout) for n, x in plain.items()}
    memory = strided["state"]
    o = ops.gla_step(**strided, scale=SCALE)
    torch.testing.assert_close(o, want["o"])
    torch.testing.assert_close(memory, want["state"])
    assert o.is_contiguous()
    if layout == "inside":
        base = memory._base
        assert base.isnan().sum() == base.numel() - memory.numel()


def lay_out(x, layout):
    if layout == "inside":
        whole = x.new_full([n + 2 for n in x.shape], torch.nan)
        inner = whole[tuple(slice(1, -1) for _ in x.shape)]
        return inner.copy_(x)
    axes = (1, 2) if layout == "heads_first" else (0, -1)
    return x.transpose(*axes).contiguous().transpose(*axes) if x.ndim > 2 else x


def test_retention_is_retnets_by_default():
    case = Case("retention", T=2)
    x = make_operands(case, torch.float32)
    want, final = ops.retention(x["q"], x["k"], x["v"], initial_state=x["state"], output_final_state=True)
    for step in (ops.retention_step, ops.naive_retention_step):
        state = x["state"].clone()
        torch.testing.assert_close(step(x["q"], x["k"], x["v"], state), want)
        torch.testing.assert_close(state, final)


@pytest.mark.parametrize("family", FAMILIES)
def test_opcheck(family):
    case = Case(family, T=2, H=4, **GROUPED[2])
    x = make_operands(case, torch.bfloat16)
    g = x.get("gamma", x.get("g"))
    args = (x["q"], x["k"], x["v"], x["state"], g, x.get("gv"), x.get("u"), case.log, "rwkv6" in family, 0.3)
    torch.library.opcheck(decay_step_op, args)


@pytest.mark.parametrize(
    ("backend", "alone"),
    [("aot_eager", False), ("inductor", True), pytest.param("inductor", False, marks=pytest.mark.slow)],
)
def test_compiles(backend, alone):
    """One graph for every batch, the caller's cache updated in place, beside other operations on it."""

    def decode(q, k, v, g, state):
        if alone:
            return (ops.gla_step(q, k, v, state, g, scale=0.3),)
        o = ops.gla_step(q * 2, k, v, state, g, scale=0.3)
        return o + 1, state * 2

    compiled = torch.compile(decode, backend=backend, fullgraph=True, dynamic=True)
    for B in (2, 5):
        x = make_operands(Case("gla", B=B), torch.float32)
        own, other = x["state"].clone(), x["state"].clone()
        with torch.no_grad():
            got = compiled(x["q"], x["k"], x["v"], x["g"], own)
            want = decode(x["q"], x["k"], x["v"], x["g"], other)
        for a, b in zip((*got, own), (*want, other), strict=True):
            torch.testing.assert_close(a, b)
        assert not torch.equal(own, x["state"])


def test_a_state_that_autograd_keeps_is_not_changed_unseen():
    x = make_operands(Case("gla"), torch.float32)
    w = torch.ones((), requires_grad=True)
    y = (w * x["state"]).sum()
    with torch.no_grad():
        ops.gla_step(x["q"], x["k"], x["v"], x["state"], x["g"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_inference_mode():
    case = Case("rwkv6", T=2)
    x = make_operands(case, torch.float32)
    want = run("", ops, case, x)
    with torch.inference_mode():
        got = run("", ops, case, {n: y.clone() for n, y in x.items()})
    for name in want:
        assert torch.equal(want[name], got[name])


def test_autocast_does_not_round():
    case = Case("gla", T=2)
    x = make_operands(case, torch.float32)
    want = run("", ops, case, x)
    with torch.autocast("cpu", torch.bfloat16):
        got = run("", ops, case, x)
    assert all(torch.equal(want[name], got[name]) for name in want)


def _x(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": _x(2, 4, 3)}, "q must have 4 dimensions, got 3"),
        ({"g": _x(2, 1, 4)}, "g must have 4 dimensions, got 3"),
        ({"gv": _x(2, 1, 4)}, "gv must have 4 dimensions, got 3"),
        ({"state": _x(4, 3, 6)}, "state must have 4 dimensions, got 3"),
        ({"k": _x(3, 1, 4, 3)}, "k has B=3, state has B=2"),
        ({"v": _x(2, 2, 4, 6)}, "v has T=2, q has T=1"),
        ({"k": _x(2, 1, 4, 5)}, "k has K=5, state has K=3"),
        ({"gv": _x(2, 1, 4, 5)}, "gv has V=5, state has V=6"),
        ({"k": _x(2, 1, 8, 3)}, "k has H=8, state has H=4, of which it must be a divisor"),
        ({"v": _x(2, 1, 3, 6)}, "v has H=3, state has H=4"),
        ({"q": _x(2, 1, 6, 3)}, "q has H=6, state has H=4, of which it must be a divisor or a multiple"),
        ({"q": _x(2, 0, 4, 3), "k": _x(2, 0, 4, 3), "v": _x(2, 0, 4, 6), "g": _x(2, 0, 4, 3)}, "q has T=0"),
        ({"q": _x(2, 17, 4, 3), "k": _x(2, 17, 4, 3), "v": _x(2, 17, 4, 6)}, "q has T=17, a decode step has 1 to 16"),
        ({"k": _x(2, 1, 4, 3, dtype=torch.bfloat16)}, "k has dtype torch.bfloat16, q has torch.float32"),
        ({"state": _x(2, 4, 3, 6, dtype=torch.int64)}, "state has dtype torch.int64"),
        ({"state": _x(2, 4, 3, 6, device="meta")}, "state is on meta, q is on cpu"),
        ({"state": _x(1, 4, 3, 6).expand(2, -1, -1, -1)}, "state is to be updated in place but shares memory"),
        ({"state": _x(2, 4, 3, 6).requires_grad_()}, "state requires a gradient"),
        ({"g": _x(2, 1, 4, 3).requires_grad_()}, "g requires a gradient"),
        ({"g": None}, "gla_step needs a gate"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"q": _x(2, 1, 4, 3), "k": _x(2, 1, 4, 3), "v": _x(2, 1, 4, 6), "g": _x(2, 1, 4, 3)}
    with pytest.raises(ValueError, match=message):
        ops.gla_step(**({"state": _x(2, 4, 3, 6)} | good | change))


def test_bad_gates_are_named():
    q, v, state = _x(2, 1, 4, 3), _x(2, 1, 4, 6), _x(2, 4, 3, 6)
    with pytest.raises(ValueError, match="g must have 3 dimensions, got 4"):
        ops.simple_gla_step(q, q, v, state, q)
    with pytest.raises(ValueError, match="gamma has H=3, state has H=4"):
        ops.retention_step(q, q, v, state, _x(3))
    with pytest.raises(ValueError, match="u has H=3, o has H=4"):
        ops.rwkv6_step(q, q, v, state, q, _x(3, 3))
    with pytest.raises(ValueError, match="g must have 4 dimensions, got 3"):
        ops.rwkv6_step(q, q, v, state, q[..., 0])


def test_an_empty_batch():
    q, state = _x(0, 2, 4, 3), _x(0, 4, 3, 3)
    assert ops.gla_step(q, q, q, state, q).shape == (0, 2, 4, 3)


def test_only_checked_architectures_run_the_kernel(monkeypatch):
    """The rows of no architecture are marked as checked by themselves: a report says what runs."""
    gpu, sizes = torch.device("cuda", 0), (torch.bfloat16, 256, 512)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    for checked, name in (((), "step (torch)"), ((90,), "step (torch)"), ((80,), "step (Triton)")):
        monkeypatch.setattr(decay_configs, "STEPS_CHECKED", checked)
        decay_checks._step_checked.cache_clear()
        assert kernel_name(gpu, *sizes) == name
    assert kernel_name(gpu, torch.float64, 64, 64) == "step (torch)"
    assert kernel_name(gpu, torch.bfloat16, 257, 64) == kernel_name(gpu, torch.bfloat16, 64, 513) == "step (torch)"
    assert kernel_name(torch.device("cpu"), torch.float32, 64, 64) == "step (torch)"
    decay_checks._step_checked.cache_clear()


def test_the_table():
    assert set(decay_step.__all__) == {
        "decay_step_op", "kernel_name", *(f"{name}_step" for name, _ in FAMILIES.values())
    }  # fmt: skip
    assert {arch for arch, _ in decay_configs.STEPS} == set(decay_configs.ARCHS)
    for arch in (80, 89, 90, 100, 120):
        for keys in (1, 64, 65, 256):
            assert decay_configs.step_config(arch, keys) in decay_configs.STEPS.values()
    assert set(decay_configs.STEPS_CHECKED) <= set(decay_configs.ARCHS)

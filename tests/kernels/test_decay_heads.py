"""Heads that neighbours share, in the operators of sequences and in their kernels.

Run as a script (with TRITON_INTERPRET=1) this file is the interpreted part, as `test_decay_triton`.
"""

import dataclasses
import sys
from functools import partial
from unittest.mock import patch

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has no build for this system")

from budget import check_budget  # noqa: E402
from decay_cases import FAMILIES, SCALE, Case, call, make_inputs, make_leaves, naive_results, results  # noqa: E402
from interpreted import interpreted  # noqa: E402
from test_decay_triton import KIND, check_results, narrow_results, on_gpu, run_kernels  # noqa: E402
from test_decay_triton_packed import naive_packed, narrow_packed, run_packed  # noqa: E402

from fla_compile import ops  # noqa: E402
from fla_compile.kernels import (  # noqa: E402
    decay_fused,
    decay_heads,
    decay_layout,
    decay_ops,
    decay_segments,
    decay_triton_common,
)
from fla_compile.kernels.decay_configs import Config  # noqa: E402

# Heads of q, k, v and the decay, and of the initial state if there is one.
QUERIES = (6, 2, 2, 2, 2)  # that read the same states
VALUES = (2, 2, 6, 6, None)  # and decays, as in Mamba-2
MIXED = (6, 2, 3, 1, 6)
GROUPED = (QUERIES, VALUES, MIXED)


def shared_inputs(family, heads, dtype, T=70, decay="weak", K=12, V=20, B=2):
    """A case of as many heads as the output has, and its inputs with the heads that are asked for."""
    q, k, v, g, h0 = heads
    states = h0 or max(k, v, 0 if family == "linear_attention" else g)
    case = Case(family, T, decay, B=B, H=max(q, states), K=K, V=V)
    x = make_inputs(case, dtype)
    decays = None if x.g is None else x.g[:g] if x.g.ndim == 1 else x.g[:, :, :g]
    h0, dht = (y[:, :states] for y in (x.h0, x.dht))
    return case, dataclasses.replace(x, q=x.q[:, :, :q], k=x.k[:, :, :k], v=x.v[:, :, :v], g=decays, h0=h0, dht=dht)


def one_for_each(x, H):
    """The same with nothing shared."""
    q, k, v = (decay_heads.spread(y, 2, H) for y in (x.q, x.k, x.v))
    g = None if x.g is None else decay_heads.spread(x.g, 0 if x.g.ndim == 1 else 2, H)
    return dataclasses.replace(x, q=q, k=k, v=v, g=g, h0=decay_heads.spread(x.h0, 1, H))


@pytest.mark.parametrize("heads", GROUPED, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_naive_is_that_of_repeated_heads(family, heads):
    case, x = shared_inputs(family, heads, torch.float64, T=5)
    naive = getattr(ops, f"naive_{family}")
    o, final = call(naive, case, make_leaves(x, torch.float64))
    whole, states = call(naive, case, make_leaves(one_for_each(x, case.H), torch.float64))
    assert torch.equal(o, whole)
    assert torch.equal(final.repeat_interleave(case.H // final.shape[1], 1), states)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", GROUPED, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_autograd(family, heads, dtype):
    case, x = shared_inputs(family, heads, dtype)
    truth = naive_results(case, x, torch.float64)
    eager = truth if dtype == torch.float64 else naive_results(case, x, dtype)
    for name, y in results(getattr(ops, family), case, x, dtype).items():
        check_budget(name, y, truth[name], eager[name], "forward" if name in ("o", "final_state") else "backward")


@pytest.mark.parametrize("family", ["retention", "gla"])
def test_packed(family):
    case, x = shared_inputs(family, QUERIES, torch.float64, B=1)
    cu_seqlens = torch.tensor([0, 3, 68, 70])
    h0, dht = torch.randn(2, 3, *x.h0.shape[1:], dtype=torch.float64)
    x = dataclasses.replace(x, h0=h0, dht=dht)
    truth = naive_packed(case, x, cu_seqlens, torch.float64)
    fn = partial(getattr(ops, family), cu_seqlens=cu_seqlens)
    for name, y in results(fn, case, x, torch.float64).items():
        check_budget(name, y, truth[name], truth[name], "forward" if name in ("o", "final_state") else "backward")


@pytest.mark.parametrize("slab", [1, 2000])
def test_slabs_that_do_not_end_with_a_group(slab, monkeypatch):
    case, x = shared_inputs("gla", MIXED, torch.float64)
    whole = results(ops.gla, case, x, torch.float64)
    monkeypatch.setattr(decay_layout, "SLAB", slab)
    for name, y in results(ops.gla, case, x, torch.float64).items():
        torch.testing.assert_close(y, whole[name])


@pytest.mark.parametrize("heads", (QUERIES, VALUES), ids=str)
def test_decoding_goes_on_from_the_final_state(heads):
    _, x = shared_inputs("simple_gla", heads, torch.float64)
    whole, _ = ops.simple_gla(x.q, x.k, x.v, x.g)
    first, last = ([y[:, t] for y in (x.q, x.k, x.v, x.g)] for t in (slice(0, -1), slice(-1, None)))
    _, state = ops.simple_gla(*first, output_final_state=True)
    q, k, v, g = last
    torch.testing.assert_close(ops.simple_gla_step(q, k, v, state, g), whole[:, -1:])


def test_retention_defaults_to_one_decay_a_state():
    _, x = shared_inputs("retention", QUERIES, torch.bfloat16)
    for h0 in (None, x.h0):
        o, _ = ops.retention(x.q, x.k, x.v, initial_state=h0)
        torch.testing.assert_close(o, ops.naive_retention(x.q, x.k, x.v, initial_state=h0)[0])


@pytest.mark.parametrize("family", ["retention", pytest.param("gla", marks=pytest.mark.slow)])
def test_opcheck(family):
    _, x = shared_inputs(family, MIXED, torch.float32, T=20, B=1)
    leaves = make_leaves(x, torch.float32)
    args = [leaves.get(name) for name in ("q", "k", "v", "g", "h0")]
    torch.library.opcheck(decay_ops.OPS[family], (*args, SCALE))
    torch.library.opcheck(decay_ops.PACKED[family], (*args, SCALE, torch.tensor([0, 20])))


def test_opcheck_backward():
    _, x = shared_inputs("gla", QUERIES, torch.bfloat16, T=20, B=1)
    torch.library.opcheck(decay_ops.decay_backward, (x.q, x.k, x.v, x.g, x.h0, SCALE, x.do, x.dht, True, True))


def _heads(n, *rest):
    return torch.zeros(1, 4, n, *rest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": _heads(2, 4)}, "k has H=2, q has H=3, of which it must be a divisor"),
        ({"v": _heads(4, 5)}, "q has H=3, v has H=4, of which it must be a divisor or a multiple"),
        ({"g": _heads(2)}, "g has H=2, q has H=3, of which it must be a divisor"),
        ({"g": _heads(0)}, "g has H=0, q has H=3"),
        ({"q": _heads(4, 4)}, "q has H=4, k has H=3, of which it must be a divisor or a multiple"),
        ({"initial_state": torch.zeros(1, 4, 4, 5)}, "q has H=3, initial_state has H=4"),
    ],
)
def test_bad_heads_are_named(change, message):
    good = {"q": _heads(3, 4), "k": _heads(3, 4), "v": _heads(3, 5), "g": _heads(3)}
    with pytest.raises(ValueError, match=message):
        ops.simple_gla(**(good | change))


@pytest.mark.parametrize("family", ["gla_values", "rwkv6"])
def test_other_operators_share_nothing(family):
    x = make_inputs(Case(family, 4), torch.float32)
    gates = {name: y for name in ("g", "gv", "u") if (y := getattr(x, name)) is not None}
    with pytest.raises(ValueError, match="k has H=1, q has H=3"):
        getattr(ops, family.removesuffix("_values"))(x.q, x.k[:, :, :1], x.v, **gates)


def summed(x, found):
    """The gradients of shared operands from those of `one_for_each`, in their own dtype."""
    for name in ("q", "k", "v"):
        found[f"d{name}"] = decay_heads.sum_heads(found[f"d{name}"], 2, getattr(x, name).shape[2])
    if x.g is not None:
        found["dg"] = decay_heads.sum_decay_heads(found["dg"], x.g)
    return found


CONFIG = Config(16, 16, 16, 4, 1, 0)
FEW = dict(K=16, V=16, B=1)
# Of the operands of the split launch; the heads they share differ from one to the next.
SPLIT = ((4, 2, 1, 2, 4), (1, 1, 4, 2, None), (2, 4, 2, 1, 4))


@pytest.mark.parametrize("heads", SPLIT, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_split_launch_is_told_operands_where_they_lie(family, heads, monkeypatch):
    """Every kernel, forward and backward, and of how many heads share each."""
    told = []

    def launch(kernel, device, grid, numbers, **options):
        return lambda *first: told.append(dict(zip(kernel.arg_names, (*first, *numbers), strict=True)))

    monkeypatch.setattr(decay_triton_common, "Launch", launch)
    monkeypatch.setattr(decay_triton_common, "_launches", {})
    case, x = shared_inputs(family, heads, torch.float32, T=17, **FEW)
    x = dataclasses.replace(x, **{name: y.contiguous() for name in "qkvg" if (y := getattr(x, name)) is not None})
    run_kernels(x, CONFIG)
    wanted = {"H": case.H}
    for name in "qkvg":
        y = getattr(x, name)
        wanted[f"p_{name}"] = None if y is None else y.data_ptr()
        wanted[f"R{name.upper()}"] = 1 if y is None else case.H // decay_heads.decay_heads(y)
    assert len(told) == {"simple_gla": 7, "gla": 11}.get(family, 6)
    for args in told:
        got = {name: y.data_ptr() if isinstance(y, torch.Tensor) else y for name, y in args.items() if name in wanted}
        assert got == {name: wanted[name] for name in got}
    assert {name for args in told for name in args} >= set(wanted)


def fused(family, heads, limit, walk=None):
    """In segments; with a limit below zero as if factors did not hold the gates."""
    case, x = shared_inputs(family, heads, torch.float16, T=18, decay="strong" if limit else "weak", **FEW)
    choices = dict(heads=case.H, segments=2, limit=limit, wide=CONFIG, tall=CONFIG, walk=walk)
    scans = decay_fused.plan_scans(x.q, x.v, KIND[family], **choices)
    eager = summed(x, narrow_results(case, one_for_each(x, case.H), torch.float16))
    check_results(case, x, run_kernels(x, scans=scans), torch.float16, eager=eager)
    print("ok fused", case)


def grown(heads):
    """Steps that grow, whose decay's gradient is of a launch of its own."""
    case, x = shared_inputs("simple_gla", heads, torch.float32, T=18, decay="alternating", **FEW)
    scans = decay_fused.plan_scans(x.q, x.v, "scalar", heads=case.H, segments=2, wide=CONFIG, tall=CONFIG)
    check_results(case, x, run_kernels(x, scans=scans), torch.float32)
    print("ok grown", case)


def packed(family, heads, walk=None):
    case, x = shared_inputs(family, heads, torch.float16, T=19, **FEW)
    cu_seqlens = torch.tensor([0, 16, 19])
    h0, dht = torch.randn(2, 2, case.H, case.K, case.V)
    x = dataclasses.replace(x, h0=h0, dht=dht)
    scans = decay_fused.plan_scans(x.q, x.v, KIND[family], heads=case.H, wide=CONFIG, tall=CONFIG, walk=walk)
    truth = naive_packed(case, x, cu_seqlens, torch.float64)
    eager = summed(x, narrow_packed(case, one_for_each(x, case.H), cu_seqlens, torch.float16))
    check_results(case, x, run_packed(x, cu_seqlens, scans=scans), torch.float16, truth, eager)
    print("ok packed", case)


def split(family, heads, dtype=torch.float32, decay="weak", T=18, config=CONFIG, sizes=(20, 24)):
    """In several chunks, and in several blocks of what the `sizes` of keys and values exceed."""
    case, x = shared_inputs(family, heads, dtype, T=T, decay=decay, K=sizes[0], V=sizes[1], B=1)
    eager = None if dtype == torch.float32 else summed(x, narrow_results(case, one_for_each(x, case.H), dtype))
    check_results(case, x, run_kernels(x, config), dtype, eager=eager)
    print("ok split", case)


def split_in_segments(family, heads):
    with patch.object(decay_segments, "SHORTEST", 1), patch.object(decay_triton_common, "LONG_SWEEP", 1):
        _, x = shared_inputs(family, heads, torch.float32, T=72, **FEW)
        shared = decay_heads.shares(4, x.q, x.k, x.v, x.g)
        assert decay_triton_common.plan_launch(x.q, x.v, KIND[family], CONFIG, shared=shared).segments > 1
        split(family, heads, T=72, sizes=(16, 16))


def interpret(thorough: bool) -> None:
    """Every family once; thorough, every family in every launch."""
    if thorough:
        for family in FAMILIES:
            for heads in ((4, 2, 1, 2, 4), (1, 1, 4, 2, None)):
                for limit in (None, -1.0) if family == "gla" else (None,):
                    for walk in (None, CONFIG) if family == "gla" else (None,):
                        fused(family, heads, limit, walk)
                packed(family, (*heads[:4], None))
            for heads in SPLIT:
                split(family, heads)
            split(family, SPLIT[1], torch.float16, "strong")
            split_in_segments(family, SPLIT[0])
        # as the tables choose, for heads that no pass holds
        split("simple_gla", SPLIT[0], torch.float16, config=None, sizes=(8, 272))
        split("gla", SPLIT[0], config=None)
    else:
        fused("gla", (1, 1, 1, 1, 2), -1.0)
        grown((4, 2, 1, 2, 4))
        fused("gla", (4, 2, 1, 2, 4), None, CONFIG)
        packed("gla", (2, 1, 4, 2, None))
        packed("gla", (2, 1, 4, 2, None), CONFIG)
        packed("simple_gla", (2, 1, 4, 2, None))
        packed("retention", (1, 1, 2, 1, None))
        for family in FAMILIES:
            split(family, SPLIT[0], sizes=(16, 16))
        for family in FAMILIES[2:]:
            split(family, SPLIT[1], decay="alternating", sizes=(20, 16))
        split("simple_gla", SPLIT[2], torch.float16)
        split_in_segments("retention", SPLIT[2])


def test_interpreted():
    assert interpreted(__file__) == 1 + 1 + 5 + 8


@pytest.mark.slow
def test_interpreted_thoroughly():
    assert interpreted(__file__, "thorough") == 4 * (2 * 2 + 3 + 1 + 1) + 2 * 3 + 2


@pytest.mark.gpu
@pytest.mark.parametrize("heads", GROUPED, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_gpu(family, heads):
    """The operators on few steps, in segments, with heads for the split launch, and packed."""
    dtype = torch.bfloat16
    for T, K, V in ((5, 64, 64), (200, 64, 64), (200, 48, 96), (200, 256, 64)):
        case, x = shared_inputs(family, heads, dtype, T=T, K=K, V=V, B=1)
        for lengths in ((T,), (3, T - 70, 67)) if T > 100 else ((T,),):
            states = torch.randn(2, len(lengths), *x.h0.shape[1:])
            y = on_gpu(dataclasses.replace(x, h0=states[0], dht=states[1]))
            cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
            truth = naive_packed(case, y, cu_seqlens, torch.float64)
            every = dataclasses.replace(one_for_each(y, case.H), dht=decay_heads.at_first_alike(y.dht, case.H))
            eager = summed(y, narrow_packed(case, every, cu_seqlens, dtype))
            eager["final_state"] = decay_heads.first_alike(eager["final_state"], y.h0.shape[1])
            eager["dh0"] = decay_heads.sum_heads(eager["dh0"], 1, y.h0.shape[1])
            one_batch = {"cu_seqlens": cu_seqlens} if len(lengths) > 1 else {}
            got = results(partial(getattr(ops, family), **one_batch), case, y, dtype)
            check_results(case, y, got, dtype, truth, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "K", "V"), [(torch.float32, 40, 72), (torch.bfloat16, 256, 64)], ids=str)
def test_gpu_split(family, dtype, K, V):
    wide = dtype == torch.float32
    decays = ("weak", "alternating") if wide and family in FAMILIES[2:] else ("weak",)
    for heads, decay in ((heads, decay) for heads in SPLIT for decay in decays):
        case, x = shared_inputs(family, heads, dtype, T=200, decay=decay, K=K, V=V)
        x = on_gpu(x)
        shared = decay_heads.shares(case.H, x.q, x.k, x.v, x.g)
        config = decay_triton_common.plan_launch(x.q, x.v, KIND[family], None, shared=shared).config
        got, again = run_kernels(x, config), run_kernels(x, config)
        for name in got:
            assert torch.equal(got[name], again[name]), f"{case} {heads} {name} differs from run to run"
        eager = None if wide else summed(x, narrow_results(case, one_for_each(x, case.H), dtype))
        check_results(case, x, got, dtype, eager=eager)


if __name__ == "__main__":
    interpret("thorough" in sys.argv)

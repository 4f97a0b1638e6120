"""Packed sequences under a gate over values, alone or beside one over keys: interpreted, and on a GPU.

Run as a script (with TRITON_INTERPRET=1) this file is the interpreted part, as `test_decay_triton`. What is launched
here is compiled ahead of time by `test_decay_triton_packed` and, for both gates, by `test_decay_triton_both`.
"""

from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has no build for this system")

from decay_cases import SCALE, naive_results  # noqa: E402
from interpreted import interpreted  # noqa: E402
from test_decay_triton import check_results, on_gpu  # noqa: E402
from test_decay_triton_both import NAMES as BOTH_NAMES  # noqa: E402
from test_decay_triton_both import TILE  # noqa: E402
from test_decay_triton_packed import LENGTHS, check_absent, each_of, joined, make_packed  # noqa: E402
from test_decay_triton_values import NAMES, narrow_results, scans_of  # noqa: E402

from fla_compile import ops  # noqa: E402
from fla_compile.kernels import decay_plan, decay_triton_both, decay_triton_values, decay_values  # noqa: E402
from fla_compile.kernels.decay_configs import Config  # noqa: E402

SMALL, LARGER = Config(32, 32, 16, 4, 1, 0), Config(64, 64, 32, 4, 1, 0)
FAMILIES = {"gla_values": decay_triton_values, "gla_both": decay_triton_both}


def make_values(lengths, dtype, decay="weak", **sizes):
    return make_packed("gla_values", lengths, dtype, value_decay=decay, **sizes)


def kernels_of(x):
    """Where the launchers are, the names of all results, and the gates as these take them."""
    if x.g is None:
        return decay_triton_values, NAMES, (x.gv,)
    return decay_triton_both, BOTH_NAMES, (x.g, x.gv)


def run(x, *cu_seqlens, **how):
    """All results by name, with every allocation filled with NaN; without cu_seqlens of the launch without packing."""
    empty, empty_like = torch.empty, torch.empty_like
    torch.empty = lambda *a, **kw: empty(*a, **kw).fill_(torch.nan)
    torch.empty_like = lambda *a, **kw: empty_like(*a, **kw).fill_(torch.nan)
    kernels, names, gates = kernels_of(x)
    operands = x.q, x.k, x.v, *gates, x.h0, SCALE, *cu_seqlens
    forward, backward = kernels.chunk_forward, kernels.chunk_backward
    if cu_seqlens:
        forward, backward = kernels.packed_forward, kernels.packed_backward
    try:
        found = forward(*operands, **how) + backward(*operands, x.do, x.dht, **how)
    finally:
        torch.empty, torch.empty_like = empty, empty_like
    return dict(zip(names, found, strict=True))


def check(case, x, cu_seqlens, dtype, got):
    """Holds what a launch found to what the loop makes of each sequence, by the budget of `test_decay_triton`."""
    _, names, _ = kernels_of(x)
    truth, eager = [], []
    for one, y in each_of(case, x, cu_seqlens):
        truth.append(dict(zip(names, naive_results(one, y, torch.float64).values(), strict=True)))
        narrow = dtype != torch.float32
        found = narrow_results(y, dtype, names) if narrow else naive_results(one, y, dtype)
        eager.append(dict(zip(names, found.values(), strict=True)))
    return check_results(case, x, got, dtype, joined(truth), joined(eager))


def interpret() -> None:
    """Sequences whole and cut, several blocks and chunks, gates beyond what factors hold, and steps that grow."""
    half, single = torch.float16, torch.float32
    cases = [(LENGTHS, "weak", half, LARGER, 64, dict(K=24, V=40))]
    cases += [((3, 32, 97), "strong", half, SMALL, 32, dict(K=40, V=20))]
    cases += [((3, 32, 49), "weak", single, SMALL, 32, dict(H=2, K=8, V=16))]
    cases += [((5, 70), decay, half, SMALL, 32, dict(K=8, V=16)) for decay in ("resets", "very_strong", "growing")]
    cases += [((3, 70), decay, single, SMALL, 32, dict(K=8, V=8)) for decay in ("alternating", "peak")]
    cases += [((1, 2, 5), "weak", half, SMALL, None, dict(K=8, V=8))]
    for lengths, decay, dtype, config, longest, sizes in cases:
        case, x, cu_seqlens = make_values(lengths, dtype, decay, **dict(H=1) | sizes)
        check(case, x, cu_seqlens, dtype, run(x, cu_seqlens, longest=longest, **scans_of(x, config)))
        print("ok", dtype, case)
    both_gates()
    for family in FAMILIES:
        without_states(family)
        one_sequence(family)
        through_the_operator(family)


def both_gates() -> None:
    """As above, by products, by steps, and by both where one sequence or segment of several decays too much."""
    half, single = torch.float16, torch.float32
    cases = [((1, 2, 15, 16, 17, 50), ("weak", "weak"), half, 16, dict(K=20, V=24))]
    cases += [((3, 40), ("strong", "weak"), single, 16, dict(H=2))]
    cases += [((3, 33), ("growing", "resets"), single, 32, dict(K=20))]
    cases += [((5, 33), ("hard_resets", "mixed"), half, 16, {})]
    cases += [((3, 20), ("very_strong", "very_strong"), single, 16, {})]
    cases += [((3, 34), decays, single, 16, dict(K=9)) for decays in (("alternating", "weak"), ("weak", "peak"))]
    cases += [((1, 2, 5), ("weak", "strong"), half, None, {})]
    for lengths, (decay, value_decay), dtype, longest, sizes in cases:
        sizes = dict(H=1, K=8, V=8, value_decay=value_decay) | sizes
        case, x, cu_seqlens = make_packed("gla_both", lengths, dtype, decay, **sizes)
        check(case, x, cu_seqlens, dtype, run(x, cu_seqlens, config=TILE, longest=longest))
        print("ok", dtype, case)
    for limit in (None, -1.0):
        case, x, cu_seqlens = make_packed("gla_both", (17, 3, 33), single, H=2, K=8, V=8)
        x.gv[:, 25:30, 1, 5] = -30.0
        check(case, x, cu_seqlens, single, run(x, cu_seqlens, config=TILE, longest=16, limit=limit))
        print("ok some", case)


def small(family, lengths, **sizes):
    """float16 inputs, and the launch of segments of 32 steps at most."""
    case, x, cu_seqlens = make_packed(family, lengths, torch.float16, K=16, V=8, **sizes)
    how = dict(config=TILE) if x.g is not None else scans_of(x, SMALL)
    return case, x, cu_seqlens, how | dict(longest=32)


def without_states(family) -> None:
    """No initial state, and no gradient of the final one or of the outputs."""
    case, x, cu_seqlens, how = small(family, (33, 3), H=1)
    kernels, _, gates = kernels_of(x)

    def forward(h0):
        return kernels.packed_forward(x.q, x.k, x.v, *gates, h0, SCALE, cu_seqlens, **how)

    def backward(do, dht):
        rest = None, SCALE, cu_seqlens, do, dht
        *grads, dh0 = kernels.packed_backward(x.q, x.k, x.v, *gates, *rest, **how)
        assert dh0 is None
        return grads

    check_absent(x, forward, backward)
    print("ok", case)


def one_sequence(family) -> None:
    """What the operator without packing computes, to the last digit; also where both are cut alike."""
    for segments, longest in ((1, None), (2, 32)):
        case, x, cu_seqlens, how = small(family, (50,), H=2)
        how = dict(longest=longest, **(dict(config=TILE) if x.g is not None else scans_of(x, SMALL, segments=segments)))
        got = run(x, cu_seqlens, **how)
        del how["longest"]
        want = run(x, **how, **(dict(segments=segments) if x.g is not None else {}))
        for name, y in want.items():
            if segments == 1 or name not in ("final_state", "dh0"):  # not of the chain, but of the last segment
                assert torch.equal(got[name], y), f"{case} {name}"
            else:  # of another kernel, whose factors are rounded elsewhere
                assert (got[name] - y).norm() <= 2.0**-11 * y.norm(), f"{case} {name}"
        print("ok", case)


def through_the_operator(family) -> None:
    """Autograd gets what the launches compute."""
    case, x, cu_seqlens, how = small(family, (2, 33), H=1)
    kernels = FAMILIES[family]
    stand_in = SimpleNamespace(
        packed_forward=partial(kernels.packed_forward, **how), packed_backward=partial(kernels.packed_backward, **how)
    )
    want = run(x, cu_seqlens, **how)
    where = "value_kernels_for" if x.g is None else "both_kernels_for"
    with mock.patch.object(decay_values, where, return_value=stand_in):
        for without in ((), ("dg", "dh0")):
            got = operator_results(x, cu_seqlens, without)
            assert set(got) == set(want) - {*without}
            assert all(torch.equal(y, want[name].to(y.dtype)) for name, y in got.items())
    print("ok", case)


def operator_results(x, cu_seqlens, without=()):
    """Of the public function, with gradients by autograd but for those `without`."""
    _, names, gates = kernels_of(x)
    inputs = [y.detach().clone() for y in (x.q, x.k, x.v, *gates, x.h0)]
    wanted = {n: y.requires_grad_() for n, y in zip(names[2:], inputs, strict=True) if n not in without}
    *qkv, h0 = inputs[:3] + inputs[-1:]
    gates = dict(zip(("g", "gv")[-len(gates) :], inputs[3:-1], strict=True))
    how = dict(scale=SCALE, initial_state=h0, output_final_state=True, cu_seqlens=cu_seqlens)
    o, final = ops.gla(*qkv, **gates, **how)
    grads = torch.autograd.grad([o, final], list(wanted.values()), [x.do, x.dht])
    return {"o": o.detach(), "final_state": final.detach()} | dict(zip(wanted, grads, strict=True))


def test_interpreted():
    assert interpreted(__file__) == 9 + 8 + 2 + 2 * (1 + 2 + 1)


def test_what_is_gathered():
    """Where the fused launch is not: float32, and gradients where the scale is zero."""
    _, x, cu_seqlens = make_values((3, 4), torch.float16, H=1, K=16, V=16)
    narrow = x.q, x.k, x.v
    wide = [y.float() for y in narrow]
    assert decay_triton_values.packed_forward(*wide, x.gv, None, SCALE, cu_seqlens) is None
    for operands, scale in ((wide, SCALE), (narrow, 0.0)):
        rest = x.gv, None, scale, cu_seqlens, x.do, None
        assert decay_triton_values.packed_backward(*operands, *rest) is None
    rest = x.gv, x.gv, None, 0.0, cu_seqlens, x.do, None
    assert decay_triton_both.packed_backward(*narrow, *rest) is None


def check_on_gpu(case, x, cu_seqlens, **how):
    """Twice alike, and through the operator and its autograd as alone."""
    got, again = run(x, cu_seqlens, **how), run(x, cu_seqlens, **how)
    assert all(torch.equal(y, again[name]) for name, y in got.items()), f"{case} differs from run to run"
    for name, error in check(case, x, cu_seqlens, x.q.dtype, got).items():
        print(f"{error:.1e}  {case} {name}")
    if not how:
        through = operator_results(x, cu_seqlens.cuda())
        assert all(torch.equal(y, got[name].to(y.dtype)) for name, y in through.items())


LONG = (1, 63, 700, 64, 65, 2100, 2)


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "V"), [(128, 96), (512, 200)], ids=str)
@pytest.mark.parametrize("decay", ["weak", "resets"])
def test_gpu_values(decay, K, V):
    """Long sequences cut, short ones whole."""
    case, x, cu_seqlens = make_values(LONG, torch.bfloat16, decay, H=2, K=K, V=V)
    x = on_gpu(x)
    packing = decay_plan.pack_scans(scans_of(x)["scans"], [*pairwise(cu_seqlens.tolist())], x.q.device)
    assert packing.joints > 3, "long sequences are cut"
    check_on_gpu(case, x, cu_seqlens)


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "V"), [(128, 128), (40, 64)], ids=str)
@pytest.mark.parametrize("decays", [("weak", "strong"), ("resets", "hard_resets"), ("mixed", "weak")], ids=str)
def test_gpu_both(decays, K, V):
    """Long sequences cut, short ones whole; by products, steps and both; also where all is done by steps."""
    lengths = (1, 63, 400, 64, 65, 900, 2)
    case, x, cu_seqlens = make_packed(
        "gla_both", lengths, torch.bfloat16, decays[0], value_decay=decays[1], H=2, K=K, V=V
    )
    x = on_gpu(x)
    plan = decay_triton_both._plan(x.q, x.k, x.v, x.g, x.gv, None, None, 1)
    assert decay_triton_both._pack(plan, x.q, x.v, cu_seqlens, None).joints > 3, "long sequences are cut"
    for how in ({}, dict(limit=-1.0), dict(longest=64)):
        check_on_gpu(case, x, cu_seqlens, **how)


if __name__ == "__main__":
    interpret()

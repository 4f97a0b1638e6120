"""Packed sequences under a gate over values: interpreted, and on a GPU.

Run as a script (with TRITON_INTERPRET=1) this file is the interpreted part, as `test_decay_triton`;
`test_decay_triton_packed` compiles ahead of time what is launched under a gate over values alone.
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
from test_decay_triton_packed import LENGTHS, each_of, joined, make_packed  # noqa: E402
from test_decay_triton_values import NAMES, narrow_results, scans_of  # noqa: E402

from fla_compile import ops  # noqa: E402
from fla_compile.kernels import decay_plan, decay_triton_values, decay_values  # noqa: E402
from fla_compile.kernels.decay_configs import Config  # noqa: E402

SMALL, LARGER = Config(32, 32, 16, 4, 1, 0), Config(64, 64, 32, 4, 1, 0)


def make_values(lengths, dtype, decay="weak", **sizes):
    return make_packed("gla_values", lengths, dtype, value_decay=decay, **sizes)


def run_packed(x, cu_seqlens, **how):
    """All results by name, gv's gradient as dg, with every allocation filled with NaN."""
    empty, empty_like = torch.empty, torch.empty_like
    torch.empty = lambda *a, **kw: empty(*a, **kw).fill_(torch.nan)
    torch.empty_like = lambda *a, **kw: empty_like(*a, **kw).fill_(torch.nan)
    operands = x.q, x.k, x.v, x.gv, x.h0, SCALE, cu_seqlens
    try:
        found = decay_triton_values.packed_forward(*operands, **how)
        found += decay_triton_values.packed_backward(*operands, x.do, x.dht, **how)
    finally:
        torch.empty, torch.empty_like = empty, empty_like
    return dict(zip(NAMES, found, strict=True))


def check(case, x, cu_seqlens, dtype, got):
    """Holds what a launch found to what the loop makes of each sequence, by the budget of `test_decay_triton`."""
    truth, eager = [], []
    for one, y in each_of(case, x, cu_seqlens):
        truth.append(dict(zip(NAMES, naive_results(one, y, torch.float64).values(), strict=True)))
        narrow = dtype != torch.float32
        found = narrow_results(y, dtype) if narrow else naive_results(one, y, dtype)
        eager.append(dict(zip(NAMES, found.values(), strict=True)))
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
        check(case, x, cu_seqlens, dtype, run_packed(x, cu_seqlens, longest=longest, **scans_of(x, config)))
        print("ok", dtype, case)
    without_states()
    one_sequence()
    through_the_operator()


def without_states() -> None:
    """No initial state, and no gradient of the final one or of the outputs."""
    case, x, cu_seqlens = make_values((33, 3), torch.float16, H=1, K=16, V=16)
    how = dict(longest=32, **scans_of(x, SMALL))
    zero = torch.zeros_like(x.h0)

    def forward(h0):
        return decay_triton_values.packed_forward(x.q, x.k, x.v, x.gv, h0, SCALE, cu_seqlens, **how)

    def backward(do, dht):
        rest = None, SCALE, cu_seqlens, do, dht
        *grads, dh0 = decay_triton_values.packed_backward(x.q, x.k, x.v, x.gv, *rest, **how)
        assert dh0 is None
        return grads

    pairs = (forward(None), forward(zero)), (backward(x.do, None), backward(x.do, zero))
    pairs += ((backward(None, x.dht), backward(torch.zeros_like(x.do), x.dht)),)
    for got, want in pairs:
        assert all(torch.equal(y, z) and y.is_contiguous() for y, z in zip(got, want, strict=True))
    print("ok", case)


def one_sequence() -> None:
    """What the operator without packing computes, to the last digit; also where both are cut alike."""
    for segments, longest in ((1, None), (2, 64)):
        case, x, cu_seqlens = make_values((100,), torch.float16, H=2, K=16, V=24)
        how = scans_of(x, LARGER, segments=segments)
        got = run_packed(x, cu_seqlens, longest=longest, **how)
        want = decay_triton_values.chunk_forward(x.q, x.k, x.v, x.gv, x.h0, SCALE, **how)
        want += decay_triton_values.chunk_backward(x.q, x.k, x.v, x.gv, x.h0, SCALE, x.do, x.dht, **how)
        for name, y in zip(NAMES, want, strict=True):
            if segments == 1 or name not in ("final_state", "dh0"):  # not of the chain, but of the last segment
                assert torch.equal(got[name], y), f"{case} {name}"
            else:  # of another kernel, whose factors are rounded elsewhere
                assert (got[name] - y).norm() <= 2.0**-11 * y.norm(), f"{case} {name}"
        print("ok", case)


def through_the_operator() -> None:
    """Autograd gets what the launches compute."""
    case, x, cu_seqlens = make_values((2, 33), torch.float16, H=1, K=16, V=8)
    how = dict(longest=32, **scans_of(x, SMALL))
    kernels = SimpleNamespace(
        packed_forward=partial(decay_triton_values.packed_forward, **how),
        packed_backward=partial(decay_triton_values.packed_backward, **how),
    )
    want = run_packed(x, cu_seqlens, **how)
    with mock.patch.object(decay_values, "value_kernels_for", return_value=kernels):
        for without in ((), ("dg", "dh0")):
            got = operator_results(x, cu_seqlens, without)
            assert set(got) == set(want) - {*without}
            assert all(torch.equal(y, want[name].to(y.dtype)) for name, y in got.items())
    print("ok", case)


def operator_results(x, cu_seqlens, without=()):
    """Of the public function, with gradients by autograd but for those `without`."""
    leaves = {f"d{n}": getattr(x, n).detach() for n in "qkv"} | {"dg": x.gv.detach(), "dh0": x.h0.detach()}
    wanted = {n: y.requires_grad_() for n, y in leaves.items() if n not in without}
    q, k, v, gv, h0 = leaves.values()
    o, final = ops.gla(
        q, k, v, gv=gv, scale=SCALE, initial_state=h0, output_final_state=True, cu_seqlens=cu_seqlens
    )  # fmt: skip
    grads = torch.autograd.grad([o, final], list(wanted.values()), [x.do, x.dht])
    return {"o": o.detach(), "final_state": final.detach()} | dict(zip(wanted, grads, strict=True))


def test_interpreted():
    assert interpreted(__file__) == 9 + 1 + 2 + 1


def test_what_is_gathered():
    """Where the fused launch is not: float32, and gradients where the scale is zero."""
    _, x, cu_seqlens = make_values((3, 4), torch.float16, H=1, K=16, V=16)
    narrow = x.q, x.k, x.v
    wide = [y.float() for y in narrow]
    assert decay_triton_values.packed_forward(*wide, x.gv, None, SCALE, cu_seqlens) is None
    for operands, scale in ((wide, SCALE), (narrow, 0.0)):
        rest = x.gv, None, scale, cu_seqlens, x.do, None
        assert decay_triton_values.packed_backward(*operands, *rest) is None


def relative_errors(got, truth):
    """Root mean squares of each result's error, to its size."""
    return {n: ((y.double() - truth[n]).norm() / truth[n].norm()).item() for n, y in got.items()}


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "V"), [(128, 96), (512, 200)], ids=str)
@pytest.mark.parametrize("decay", ["weak", "resets"])
def test_gpu_values(decay, K, V):
    """Long sequences cut, short ones whole, twice alike, and as gathered through the operator and its autograd."""
    dtype = torch.bfloat16
    case, x, cu_seqlens = make_values((1, 63, 700, 64, 65, 2100, 2), dtype, decay, H=2, K=K, V=V)
    x = on_gpu(x)
    packing = decay_plan.pack_scans(scans_of(x)["scans"], [*pairwise(cu_seqlens.tolist())], x.q.device)
    assert packing.joints > 3, "long sequences are cut"
    got, again = run_packed(x, cu_seqlens), run_packed(x, cu_seqlens)
    assert all(torch.equal(y, again[name]) for name, y in got.items()), f"{case} differs from run to run"
    for name, error in check(case, x, cu_seqlens, dtype, got).items():
        print(f"{error:.1e}  {case} {name}")
    through = operator_results(x, cu_seqlens.cuda())
    assert all(torch.equal(y, got[name].to(y.dtype)) for name, y in through.items())


if __name__ == "__main__":
    interpret()

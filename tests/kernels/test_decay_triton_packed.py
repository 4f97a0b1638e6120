"""Packed sequences in the fused launch: interpreted, compiled ahead of time, and on a GPU.

Run as a script (with TRITON_INTERPRET=1) this file is the interpreted part, as `test_decay_triton.py`.
"""

import dataclasses
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has no build for this system")

from decay_ahead import compile_kernel, kinds_of, most_stack, passes_of, sums_of  # noqa: E402
from decay_cases import FAMILIES, NAMES, SCALE, Case, make_inputs  # noqa: E402
from interpreted import interpreted  # noqa: E402
from machine_code import check_memory  # noqa: E402
from test_decay_triton import CAP, KIND, check_results, narrow_results  # noqa: E402

from fla_compile import ops  # noqa: E402
from fla_compile.kernels import (  # noqa: E402
    decay_fused,
    decay_naive,
    decay_ops,
    decay_plan,
    decay_segments,
    decay_triton,
    decay_triton_common,
    decay_triton_packed,
)
from fla_compile.kernels.decay_configs import TABLE, Config, all_configs  # noqa: E402

LENGTHS = (1, 2, 31, 64, 65, 130)


def make_packed(family, lengths, dtype, decay="weak", **sizes):
    """The case and its inputs, with a state for each sequence, and cu_seqlens."""
    case = Case(family, sum(lengths), decay, B=1, **sizes)
    x = make_inputs(case, dtype)
    h0, dht = (torch.randn(len(lengths), *x.h0.shape[1:]).to(x.h0.dtype) for _ in range(2))
    return case, dataclasses.replace(x, h0=h0, dht=dht), torch.tensor([0, *lengths]).cumsum(0)


def run_packed(x, cu_seqlens, **how):
    """All results by name, with every allocation filled with NaN."""
    empty, empty_like = torch.empty, torch.empty_like
    torch.empty = lambda *a, **kw: empty(*a, **kw).fill_(torch.nan)
    torch.empty_like = lambda *a, **kw: empty_like(*a, **kw).fill_(torch.nan)
    operands = x.q, x.k, x.v, x.g, x.h0, SCALE, cu_seqlens
    try:
        results = decay_triton_packed.packed_forward(*operands, **how)
        results += decay_triton_packed.packed_backward(*operands, x.do, x.dht, need_dg=True, **how)
    finally:
        torch.empty, torch.empty_like = empty, empty_like
    return {n: y for n, y in zip(NAMES, results, strict=True) if y is not None}


def naive_packed(case, x, cu_seqlens, dtype):
    """What the loop makes of each sequence, in this dtype, and what torch differentiates of it."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {
        n: y.to(dtype if n in "qkv" else wide).detach().requires_grad_()
        for n in ("q", "k", "v", "g", "h0")
        if (y := getattr(x, n)) is not None
    }
    gate = {} if x.g is None else {"gamma": leaves["g"].exp()} if case.family == "retention" else {"g": leaves["g"]}
    o, final = getattr(decay_naive, f"naive_{case.family}")(
        *(leaves[n] for n in "qkv"), **gate, scale=SCALE, initial_state=leaves["h0"], output_final_state=True,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    grads = torch.autograd.grad([o, final], list(leaves.values()), [x.do.to(o.dtype), x.dht.to(final.dtype)])
    return {"o": o.detach(), "final_state": final.detach()} | dict(zip((f"d{n}" for n in leaves), grads, strict=True))


def each_of(case, x, cu_seqlens):
    """The case and the inputs of every sequence."""
    for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        given = {m: y for m in ("q", "k", "v", "g", "gv", "do") if (y := getattr(x, m)) is not None}
        rows = {m: y[:, start:end] for m, y in given.items() if y.ndim > 1}
        states = {m: getattr(x, m)[n : n + 1] for m in ("h0", "dht")}
        yield dataclasses.replace(case, T=end - start), dataclasses.replace(x, **rows, **states)


def joined(found):
    """Results by name of sequences end to end, from those of each."""
    return {m: torch.cat([y[m] for y in found], 0 if m in ("final_state", "dh0") else 1) for m in found[0]}


def narrow_packed(case, x, cu_seqlens, dtype):
    """`narrow_results` of each sequence; the gradient of a gate that sequences share is the sum of theirs."""
    found = [narrow_results(*one, dtype) for one in each_of(case, x, cu_seqlens)]
    whole = {"dg": sum(y.pop("dg") for y in found)} if case.family == "retention" else {}
    return joined(found) | whole


def check_packed(case, x, cu_seqlens, dtype, got):
    """Holds what a launch found to the budget of `test_decay_triton`."""
    truth = naive_packed(case, x, cu_seqlens, torch.float64)
    eager = (naive_packed if dtype == torch.float32 else narrow_packed)(case, x, cu_seqlens, dtype)
    check_results(case, x, got, dtype, truth, eager)


def interpret() -> None:
    """Sequences whole and cut, several blocks of columns and chunks, gates beyond what factors hold."""
    small, larger = Config(32, 32, 16, 4, 1, 0), Config(64, 64, 32, 4, 1, 0)
    half, single = torch.float16, torch.float32
    cases = [("gla", LENGTHS, "weak", half, larger, 64, dict(H=1, K=20, V=40))]
    cases += [(f, (3, 32, 97), "weak", half, small, 32, dict(H=1, K=20, V=24)) for f in FAMILIES[:3]]
    cases += [(f, (3, 32, 49), "weak", single, small, 32, dict(H=2, K=16, V=8)) for f in FAMILIES[1::2]]
    cases += [("gla", (5, 33), "resets", half, small, 32, dict(H=1, K=16, V=8))]
    cases += [("gla", (3, 50), "weak", half, Config(32, 16, 16, 4, 1, 0), 32, dict(H=1, K=24, V=24))]
    cases += [("simple_gla", (3, 32, 49), "alternating", single, small, 32, dict(H=2, K=16, V=8))]
    cases += [("simple_gla", (3, 70), "alternating", single, larger, 64, dict(H=1, K=40, V=20))]
    cases += [("retention", (32, 32, 32), "weak", half, small, None, dict(H=1, K=16, V=16))]
    for family, lengths, decay, dtype, config, longest, sizes in cases:
        case, x, cu_seqlens = make_packed(family, lengths, dtype, decay, **sizes)
        scans = decay_fused.plan_scans(x.q, x.v, KIND[family], wide=config, tall=config)
        got = run_packed(x, cu_seqlens, scans=scans, longest=longest)
        check_packed(case, x, cu_seqlens, dtype, got)
        print("ok", dtype, case)
    case, x, cu_seqlens = make_packed("simple_gla", (3, 70, 130), half, H=1, K=20, V=24)
    scans = decay_fused.plan_scans(x.q, x.v, "scalar", wide=small, tall=small)
    scans = dataclasses.replace(scans, dv=dataclasses.replace(small, chunk=64))
    check_packed(case, x, cu_seqlens, half, run_packed(x, cu_seqlens, scans=scans, longest=64))
    print("ok", half, case)
    for family in FAMILIES[2:]:
        without_states(family, small)
    one_sequence(larger)
    for family in FAMILIES[1::2]:
        through_the_operator(family, small)


def without_states(family, config) -> None:
    """No initial state, and no gradient of the final one or of the outputs."""
    case, x, cu_seqlens = make_packed(family, (33, 3), torch.float16, K=16, V=16, H=1)
    how = dict(scans=decay_fused.plan_scans(x.q, x.v, KIND[family], wide=config, tall=config), longest=32)

    def forward(h0):
        return decay_triton_packed.packed_forward(x.q, x.k, x.v, x.g, h0, SCALE, cu_seqlens, **how)

    def backward(do, dht):
        rest = None, SCALE, cu_seqlens, do, dht
        *grads, dh0 = decay_triton_packed.packed_backward(x.q, x.k, x.v, x.g, *rest, need_dg=True, **how)
        assert dh0 is None
        return grads

    check_absent(x, forward, backward)
    print("ok", case)


def check_absent(x, forward, backward) -> None:
    """`forward(h0)` and `backward(do, dht)` of what is absent: as if it were zero."""
    zero = torch.zeros_like(x.h0)
    pairs = (forward(None), forward(zero)), (backward(x.do, None), backward(x.do, zero))
    pairs += ((backward(None, x.dht), backward(torch.zeros_like(x.do), x.dht)),)
    for got, want in pairs:
        assert all(torch.equal(y, z) and y.is_contiguous() for y, z in zip(got, want, strict=True))


def one_sequence(config) -> None:
    """What the operator without packing computes, to the last digit."""
    for family, segments, longest in (("simple_gla", 2, 64), ("gla", 1, None), ("gla", 2, 64)):
        case, x, cu_seqlens = make_packed(family, (100,), torch.float16, K=24, V=16, H=1)
        scans = decay_fused.plan_scans(x.q, x.v, KIND[family], wide=config, tall=config, segments=segments)
        assert scans.segments == segments
        got = run_packed(x, cu_seqlens, scans=scans, longest=longest)
        want = decay_triton.chunk_forward(x.q, x.k, x.v, x.g, x.h0, SCALE, scans=scans)
        want += decay_triton.chunk_backward(x.q, x.k, x.v, x.g, x.h0, SCALE, x.do, x.dht, scans=scans)
        for name, y in zip(NAMES, want, strict=True):
            if segments == 1 or name not in ("final_state", "dh0"):  # not of the chain, but of the last segment
                assert torch.equal(got[name], y), f"{case} {name}"
            elif family == "gla":  # of another kernel, whose factors are rounded elsewhere
                assert (got[name] - y).norm() <= 2.0**-11 * y.norm(), f"{case} {name}"
            else:
                torch.testing.assert_close(got[name], y)
        print("ok", case)


def through_the_operator(family, config) -> None:
    """Autograd gets what the launches compute."""
    case, x, cu_seqlens = make_packed(family, (2, 33), torch.float16, H=1, K=16, V=16)
    how = dict(scans=decay_fused.plan_scans(x.q, x.v, KIND[family], wide=config, tall=config), longest=32)
    kernels = SimpleNamespace(
        packed_forward=partial(decay_triton_packed.packed_forward, **how),
        packed_backward=partial(decay_triton_packed.packed_backward, **how),
    )
    logarithm = x.g.exp().log() if family == "retention" else x.g
    want = run_packed(dataclasses.replace(x, g=logarithm), cu_seqlens, **how)
    for need_dg in (False, True):
        with mock.patch.object(decay_ops, "packed_kernels_for", return_value=kernels):
            got = operator_results(family, x, cu_seqlens, need_dg)
        for name, y in got.items():
            if name == "dg" and family == "retention":  # which is of the logarithm of the gate's exponential
                torch.testing.assert_close(y, want[name], rtol=1e-6, atol=0.0)
            else:
                assert torch.equal(y, want[name].to(y.dtype)), f"{case} {name}"
    print("ok", case)


def operator_results(family, x, cu_seqlens, need_dg):
    """Of the public function, with gradients by autograd; x.g for retention is the logarithm of its gamma."""
    leaves = {n: y.detach().requires_grad_() for n in ("q", "k", "v", "g", "h0") if (y := getattr(x, n)) is not None}
    if not need_dg and x.g is not None:
        leaves["g"].requires_grad_(False)
    gate = {} if x.g is None else {"gamma": leaves["g"].exp()} if family == "retention" else {"g": leaves["g"]}
    o, final = getattr(ops, family)(
        *(leaves[n] for n in "qkv"), **gate, scale=SCALE, initial_state=leaves["h0"], output_final_state=True,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    wanted = {n: y for n, y in leaves.items() if y.requires_grad}
    grads = torch.autograd.grad([o, final], list(wanted.values()), [x.do, x.dht])
    return {"o": o.detach(), "final_state": final.detach()} | dict(zip((f"d{n}" for n in wanted), grads, strict=True))


def test_interpreted():
    assert interpreted(__file__) == 1 + 3 + 2 + 1 + 1 + 1 + 1 + 1 + 1 + 2 + 3 + 2


@pytest.mark.parametrize(
    ("lengths", "H"),
    [((1,) * 40, 2), (LENGTHS, 4), ((65536, *range(1, 300, 7)), 2), ((16384, 3, 9000, 64, 700), 16), ((5, 4096), 1)],
    ids=str,
)
def test_the_table(lengths, H):
    """Every step is in one segment, the longest come first, and segments meet where the table says."""
    q = torch.empty(1, sum(lengths), H, 128, dtype=torch.bfloat16, device="meta")
    scans = decay_fused.plan_scans(q, q, "vector")
    ends = torch.tensor([0, *lengths]).cumsum(0)
    bounds = [*pairwise(ends.tolist())]
    packing = decay_fused.pack_scans(scans, bounds, torch.device("cpu"))
    rows = packing.table[: packing.segments].tolist()
    sizes = [end - start for start, end, *_ in rows]
    assert sizes == sorted(sizes, reverse=True) and packing.sequences == len(lengths)
    # no program works longer than its share of the device, of which two run at once, or a few chunks
    share = sum(lengths) * H * 2 / (2 * 132)
    assert sizes[0] <= max(2 * share, decay_segments.FEWEST * decay_plan.SHORTEST[1])
    firsts, state = [], 0
    for start, end, *_ in rows:  # chunks are found by their first ones, which ascend
        firsts.append(state)
        state += -(-(end - start) // scans.tall.chunk)
    assert [row[2] for row in rows] == firsts and packing.chunks == state
    by_start = sorted(rows)
    assert [row[0] for row in by_start] == [0, *(row[1] for row in by_start[:-1])]
    for start, end, _, sequence, before, after, *_ in by_start:
        assert bounds[sequence][0] <= start < end <= bounds[sequence][1]
        assert (before < 0) == (start == bounds[sequence][0]) and (after < 0) == (end == bounds[sequence][1])
        assert after < 0 or (end - start) % scans.chunk == 0
    joints = [row[5] for row in by_start if row[5] >= 0]
    assert joints == [row[4] for row in by_start if row[4] >= 0] == [*range(packing.joints)]
    for reverse, side in ((False, 5), (True, 4)):
        sums = packing.sums(reverse).table.tolist()
        assert sums == [[*row[:3], row[side], -1, -1, 0, 0] for row in rows if row[side] >= 0]
    chain = packing.chain().tolist()
    assert [first + n for first, count, *_ in chain for n in range(count)] == joints
    for first, count, sequence, *_ in chain:
        assert {row[3] for row in rows if first <= row[5] < first + count} == {sequence}


@pytest.mark.parametrize("T", [1, 100, 257, 1000, 10_000, 65_536])
@pytest.mark.parametrize("H", [1, 2, 16, 64, 70])
def test_one_sequence_is_cut_as_without_packing(H, T):
    q = torch.empty(1, T, H, 128, dtype=torch.bfloat16, device="meta")
    scans = decay_fused.plan_scans(q, q, "vector")
    packing = decay_fused.pack_scans(scans, [(0, T)], torch.device("cpu"))
    assert packing.segments == scans.segments == packing.joints + 1
    assert (packing.table[0, 1] - packing.table[0, 0]).item() == min(T, scans.length)


def test_what_is_gathered():
    """Where the fused launch is not: float32, large heads, and gradients where the scale is zero."""
    _, x, cu_seqlens = make_packed("simple_gla", (3, 4), torch.float16, H=1, K=16, V=16)
    narrow, wide = (x.q, x.k, x.v), tuple(torch.empty(1, 7, 1, size, dtype=torch.float16) for size in (64, 64, 512))
    for operands in (tuple(y.float() for y in narrow), wide):
        assert decay_triton_packed.packed_forward(*operands, x.g, None, SCALE, cu_seqlens) is None
    for g in (x.g, x.g[0, 0], None):
        rest = g, None, 0.0, cu_seqlens, x.do, None
        assert decay_triton_packed.packed_backward(*narrow, *rest, need_dg=g is not None) is None


def ahead_of_time():
    for row, _ in all_configs():
        for kind in kinds_of(row):
            if row.launch == "split" or row.few:
                continue
            name = f"sm{row.arch}-{row.launch}-{kind}-{row.size}"
            yield pytest.param(row, kind, True, id=name, marks=pytest.mark.slow)
            if row.arch == 90 and row.size == 128 and kind == "vector":
                yield pytest.param(row, kind, False, id=f"{name}-fast")


def joints_of(row, kind):
    """What adds up the segments that lead to a joint (a gate a key has `states` for it), and the chain of joints."""
    for kernel, constants in passes_of(row, kind, packed=True) if kind != "vector" else ():
        absent = dict.fromkeys(("p_x", "p_y", "p_s0", "p_u"))
        yield kernel, constants | absent | dict(OUTPUT=False, HAS_S0=False)
    sizes = dict(K=row.size, V=row.size, BK=1024 // row.size, BV=row.size, DECAY=decay_triton_common.KINDS[kind])
    for absent in ({"p_gv": None}, *([{}] if kind == "vector" else [])):  # a gate over values beside it
        for reverse in (False, True):
            yield decay_segments.chain_joints_kernel, dict(sizes, REVERSE=reverse, HAS_S0=True, **absent)


@pytest.mark.parametrize(("row", "kind", "whole"), list(ahead_of_time()))
def test_compiles(row, kind, whole):
    """No packed pass needs more registers or shared memory than there are."""
    kernels = passes_of(row, kind, packed=True)
    if not whole:
        kernels = [(kernel, x) for kernel, x in kernels if x.get("REVERSE", True) and not x.get("EXACT")]
    if row.launch == "wide" and whole:
        kernels += joints_of(row, kind)
    elif row.launch != "wide":
        kernels += [(kernel, {n: y for n, y in x.items() if n != "p_table"}) for kernel, x in sums_of(row, kind)]
    for kernel, constants in kernels:
        compiled = compile_kernel(kernel, constants, row, kind, "ieee")
        check_memory(compiled, TABLE[row][0].shared, most_stack(row, kernel, constants))


def gpu_inputs(family, lengths, dtype, K=128, V=96):
    case, x, cu_seqlens = make_packed(family, lengths, dtype, H=2, K=K, V=V)
    return case, type(x)(**{n: None if y is None else y.cuda() for n, y in vars(x).items()}), cu_seqlens


def relative_errors(got, truth):
    """Root mean squares of each result's error, to its size."""
    return {n: ((y.double() - truth[n]).norm() / truth[n].norm()).item() for n, y in got.items()}


LARGE = ("linear_attention", 256, 256), ("retention", 136, 256), ("simple_gla", 256, 200), ("gla", 200, 256)


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "K", "V"), [*((f, 128, 96) for f in FAMILIES), *LARGE])
def test_gpu(family, K, V, record_property):
    """Long sequences cut, short ones whole, twice alike; bounds are those of `test_decay_triton` without its loop."""
    dtype = torch.bfloat16
    case, x, cu_seqlens = gpu_inputs(family, (1, 63, 700, 64, 65, 4096, 2), dtype, K, V)
    truth = naive_packed(case, x, cu_seqlens, torch.float64)
    scans = decay_fused.plan_scans(x.q, x.v, KIND[family], few=False)
    if scans is None:  # no pass holds so many rows on this architecture
        assert decay_triton_packed.packed_forward(x.q, x.k, x.v, x.g, None, SCALE, cu_seqlens) is None
        return
    packing = decay_fused.pack_scans(scans, [*pairwise(cu_seqlens.tolist())], x.q.device)
    assert packing.joints > 8, "long sequences are cut"
    got, again = run_packed(x, cu_seqlens), run_packed(x, cu_seqlens)
    for name, error in relative_errors(got, truth).items():
        assert torch.equal(got[name], again[name]), f"{case} {name} differs from run to run"
        cap = CAP[dtype]
        if name == "dg":
            cap *= 64 if family == "retention" else 4  # of all steps, where terms of both signs cancel
        assert error <= cap, f"{case} {name}: {error:.1e}"
        print(f"{error:.1e}  {case} {name}")
        record_property(f"{case} {name}", error)
    assert set(got) == set(truth)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_operators(family, dtype):
    """By autograd, each with the gradient of its gate: in bfloat16 fused, in float32 gathered."""
    lengths = (1, 64, 200, 65)
    case, x, cu_seqlens = gpu_inputs(family, lengths, dtype)
    truth = naive_packed(case, x, cu_seqlens, torch.float64)
    got = operator_results(family, x, cu_seqlens.cuda(), need_dg=True)
    for name, error in relative_errors(got, truth).items():
        cap = 1e-5 if dtype == torch.float32 else CAP[dtype]
        if name == "dg":
            cap *= 64 if family == "retention" else 4  # of all steps, where terms of both signs cancel
        print(f"{error:.1e}  {case} {name}")
        assert error <= cap, f"{case} {name}: {error:.1e}"


if __name__ == "__main__":
    interpret()

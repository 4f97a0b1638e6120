"""Segments whose programs walk what is before them too: interpreted, compiled ahead of time, and on a GPU.

Run as a script (with TRITON_INTERPRET=1) this file is the interpreted part, as `test_decay_triton`.
"""

from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has no build for this system")

from decay_ahead import compile_kernel, kinds_of, most_stack, name_of, passes_of  # noqa: E402
from decay_cases import FAMILIES, Case, make_inputs, naive_results  # noqa: E402
from interpreted import interpreted  # noqa: E402
from machine_code import check_memory  # noqa: E402
from test_decay_heads import GROUPED, one_for_each, shared_inputs, summed  # noqa: E402
from test_decay_triton import KIND, check_results, narrow_results, on_gpu, run_kernels  # noqa: E402

from fla_compile.kernels import decay_plan  # noqa: E402
from fla_compile.kernels.decay_configs import TABLE, Config, all_configs  # noqa: E402
from fla_compile.kernels.decay_plan import plan_scans  # noqa: E402

SMALL, LARGER = Config(16, 32, 16, 4, 1, 0), Config(64, 32, 16, 4, 1, 0)
ROWS = FAMILIES[:3]


def scans_of(x, family, segments, config=SMALL, tall=None, heads=None, dv=None):
    """As many segments, with run-ups if there are two or more; one is the walk of all chunks."""
    scans = plan_scans(
        x.q, x.v, KIND[family], heads=heads, segments=segments, runup=True, wide=config, tall=tall or config
    )
    assert scans.segments == segments and scans.runup == (segments > 1) and not scans.chained
    return replace(scans, dv=dv or scans.dv)


def check_segments(case, dtype, *segments, **tiles):
    """Within the budget, and to the last digit what one program makes of all chunks."""
    x = make_inputs(case, dtype)
    whole = run_kernels(x, scans=scans_of(x, case.family, 1, **tiles))
    check_results(case, x, whole, dtype)
    for count in segments:
        got = run_kernels(x, scans=scans_of(x, case.family, count, **tiles))
        for name, y in got.items():
            assert torch.equal(y, whole[name]), f"{case} {name} in {count} segments"
    print("ok", dtype, case, segments)


def interpret() -> None:
    """Segments of one chunk and of several, the last one whole or not; blocks of columns; chunks of either shape."""
    half, single = torch.float16, torch.float32
    for family in ROWS:
        check_segments(Case(family, 40, "strong", B=2, H=2, K=20, V=24), half, 3, 2)
        check_segments(Case(family, 32, "weak", B=1, H=1, K=16, V=16), half, 2)
        check_segments(Case(family, 9, "weak", B=1, H=1, K=16, V=8), half)
        check_segments(Case(family, 150, "weak", B=1, H=1, K=16, V=16), half, 3, config=LARGER)
        check_segments(Case(family, 150, "strong", B=1, H=1, K=8, V=16), half, 2, tall=LARGER)
        absent(family)
    check_segments(Case("simple_gla", 150, "strong", B=1, H=1, K=8, V=16), half, 2, tall=LARGER, dv=LARGER)
    check_segments(Case("retention", 40, "very_strong", B=1, H=2, K=16, V=16), half, 3)
    check_segments(Case("simple_gla", 40, "resets", B=1, H=2, K=16, V=16), half, 3)
    check_segments(Case("simple_gla", 40, "alternating", B=1, H=1, K=20, V=8), single, 3)
    for family in ROWS[1:]:
        for heads in GROUPED:
            grouped(family, heads)


def absent(family) -> None:
    """No initial state and no gradient of the final one: as if they were zero."""
    x = make_inputs(Case(family, 40, B=1, H=1, K=16, V=16), torch.float32)
    scans = scans_of(x, family, 3)
    got = run_kernels(replace(x, h0=None, dht=None), scans=scans)
    want = run_kernels(replace(x, h0=torch.zeros_like(x.h0), dht=torch.zeros_like(x.h0)), scans=scans)
    assert all(torch.equal(y, want[name]) for name, y in got.items())
    print("ok absent", family)


def grouped(family, heads) -> None:
    """Operands that heads share."""
    case, x = shared_inputs(family, (*heads[:4], None), torch.float16, T=40, K=16, V=16, B=1)
    x = replace(one_for_each(x, case.H), q=x.q, k=x.k, v=x.v, g=x.g, dht=torch.randn(1, case.H, 16, 16))
    eager = summed(x, narrow_results(case, one_for_each(x, case.H), torch.float16))
    got = run_kernels(x, scans=scans_of(x, family, 3, heads=case.H))
    check_results(case, x, got, torch.float16, eager=eager)
    print("ok grouped", case, heads)


def test_interpreted():
    assert interpreted(__file__) == 6 * 3 + 4 + 2 * 3


def planned(B, T, H, D, kind="none", **how):
    q = torch.empty(B, T, H, D, dtype=torch.bfloat16, device="meta")
    return plan_scans(q, q, kind, **how)


@pytest.mark.parametrize("how", [dict(forward=True), {}, dict(need_dg=True)], ids=["forward", "backward", "need_dg"])
@pytest.mark.parametrize("kind", ["none", "constant", "scalar"])
def test_rule(kind, how):
    """Short sequences of too few programs, in chunks at the finest, no more than there are multiprocessors."""
    longest = decay_plan.RUNUP_STEPS[kind]
    for T in (256, 100, 512):
        scans = planned(1, T, 4, 128, kind, **how)
        assert scans.runup and scans.segments == -(-T // scans.chunk) and scans.length == scans.chunk
    scans = planned(1, 512, 16, 128, kind, **how)
    assert scans.runup and scans.segments == 132 // (16 * 2)
    scans = planned(2, 512, 16, 128, kind, **how)
    assert scans.runup and scans.segments == 2
    assert planned(1, longest, 4, 128, kind, **how).runup
    for B, T, H in ((1, 16, 4), (2, 256, 32), (1, longest + 1, 4), (1, 10_000, 4), (8, 2048, 32)):
        scans = planned(B, T, H, 128, kind, **how)
        assert not scans.runup and scans == planned(B, T, H, 128, kind, runup=False, **how)


def test_asked_for():
    assert planned(1, 10_000, 4, 128, runup=True).runup
    assert planned(1, 10_000, 4, 128, runup=True, segments=7).segments == 7
    assert planned(1, 256, 4, 128, segments=4).chained
    assert planned(1, 256, 4, 128, runup=False).segments == 1
    assert not planned(1, 256, 4, 128, "vector").runup
    with pytest.raises(ValueError, match="no run-up, got runup=True and kind='vector'"):
        planned(1, 256, 4, 128, "vector", runup=True)


def ahead_of_time():
    for row, _ in all_configs():
        for kind in kinds_of(row):
            if row.launch == "split" or row.family != "row":
                continue
            quick = row.arch in (80, 90) and row.size == 128 and kind == "scalar" and row.launch != "tall"
            name = f"sm{row.arch}-{name_of(row)}-{kind}-{row.size}"
            yield pytest.param(row, kind, id=name, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("row", "kind"), list(ahead_of_time()))
def test_compiles(row, kind):
    """No more registers or shared memory than a pass without a run-up may need."""
    for kernel, constants in passes_of(row, kind, runup=True):
        compiled = compile_kernel(kernel, constants, row, kind, "ieee")
        check_memory(compiled, TABLE[row][0].shared, most_stack(row, kernel, constants))


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "V"), [(64, 64), (128, 128), (256, 256), (256, 64), (64, 256)])
@pytest.mark.parametrize("family", ROWS)
def test_gpu(family, K, V):
    """The tables' tiles: chunks whole or not, two segments, and as the rule chooses."""
    dtype = torch.bfloat16
    for T, segments in ((256, None), (200, None), (128, 2), (500, 3)):
        case = Case(family, T, "weak", B=1, H=2, K=K, V=V)
        x = on_gpu(make_inputs(case, dtype))
        truth, eager = naive_results(case, x, torch.float64), narrow_results(case, x, dtype)
        for need_dg in (False, True) if x.g is not None else (False,):
            # few programs of 256 values have no pass that leaves the decay's gradient
            few = False if need_dg and V == 256 else None
            scans = plan_scans(x.q, x.v, KIND[family], segments=segments, runup=True, need_dg=need_dg, few=few)
            assert scans.runup and scans.segments > 1
            got, again = run_kernels(x, scans=scans), run_kernels(x, scans=scans)
            for name in got:
                assert torch.equal(got[name], again[name]), f"{case} {name} differs from run to run"
            check_results(case, x, got, dtype, truth, eager)


if __name__ == "__main__":
    interpret()

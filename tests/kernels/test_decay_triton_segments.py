"""Time cut into segments for the sweeps of the split launch: interpreted, compiled ahead of time, and on a GPU.

Run as a script (with TRITON_INTERPRET=1) this file is the interpreted part; pytest starts it in a process of its own,
as for `test_decay_triton`.
"""

from dataclasses import replace
from itertools import product
from unittest.mock import patch

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has no build for this system")

from decay_ahead import compile_kernel  # noqa: E402
from decay_cases import FAMILIES, Case, make_inputs, naive_results  # noqa: E402
from interpreted import interpreted  # noqa: E402
from machine_code import check_memory  # noqa: E402
from test_decay_triton import KIND, check_results, narrow_results, on_gpu, run_kernels  # noqa: E402
from test_decay_triton_values import check, value_case  # noqa: E402

from fla_compile.kernels import decay_segments, decay_triton_common  # noqa: E402
from fla_compile.kernels.decay_configs import KINDS, TABLE, Config  # noqa: E402
from fla_compile.kernels.decay_plan import plan_scans  # noqa: E402

SMALL = Config(16, 16, 16, 4, 1, 0)
STEPS = 72


def segments_of(case, x, config=None):
    scans = None if config else plan_scans(x.q, x.v, KIND[case.family], forward=True)
    return (scans or decay_triton_common.plan_launch(x.q, x.v, KIND[case.family], config)).segments


def interpret() -> None:
    """Three segments of two, two and one chunk, the last chunk of 8 rows; several blocks of keys or values."""
    decay_segments.SHORTEST = decay_triton_common.LONG_SWEEP = 1
    one, wide = torch.float32, dict(B=1, H=1, K=8, V=20)
    cases = [(Case("linear_attention", STEPS, B=2, H=1, K=8, V=20), one), (Case("retention", STEPS, **wide), one)]
    cases += [(Case("simple_gla", STEPS, "strong", B=1, H=2, K=20, V=8), one)]
    cases += [(Case("simple_gla", STEPS, "very_strong", **wide), torch.float16)]
    cases += [(Case("gla", STEPS, "hills", B=1, H=1, K=8, V=8), one)]
    for case, dtype in cases:
        x = make_inputs(case, dtype)
        assert segments_of(case, x, SMALL) == 3
        check_results(case, x, run_kernels(x, SMALL), dtype)
        print("ok", dtype, case)
    case = value_case(40, K=4, V=8)
    check(case, make_inputs(case, one), one, dict(config=SMALL))
    print("ok", case)
    absent()
    chained()


def absent() -> None:
    """No initial state and no gradient of the final one: as if they were zero."""
    x = make_inputs(Case("linear_attention", STEPS, B=1, H=1, K=8, V=8), torch.float32)
    got = run_kernels(replace(x, h0=None, dht=None), SMALL)
    want = run_kernels(replace(x, h0=torch.zeros_like(x.h0), dht=torch.zeros_like(x.h0)), SMALL)
    assert all(torch.equal(y, want[name]) for name, y in got.items())
    print("ok absent")


def chained() -> None:
    """A factor beyond float32 leaves a state of zero alone, and takes a small one to what it is."""
    u = torch.tensor([0.0, 1e-30, 0.0]).view(1, 3, 1, 1, 1).expand(1, 3, 1, 1, 2).contiguous()
    gt = torch.tensor([500.0, 500.0, 100.0]).view(1, 3, 1)
    st = torch.empty(1, 1, 1, 2)
    decay_segments.chain_segments(u, gt, None, st, 1, reverse=False, s_in=1.0, s_st=1.0)
    assert u.flatten().tolist() == [0.0, 0.0, 0.0, 0.0, *u[0, 2].flatten().tolist()]
    want = 1e-30 * torch.tensor(100.0, dtype=torch.float64).exp()
    assert ((st.double() - want).abs() < 1e-5 * want).all()
    print("ok chained")
    for numbers in (decay_segments.CHAIN_NUMBERS, (8, 8)):  # a program a state, and two rows a program, of five
        with patch.multiple(decay_segments, CHAIN_NUMBERS=numbers, _launches={}):
            for (segments, reverse), (decay, gate) in product(CHAINS, KINDS_OF_CHAIN):
                case = dict(decay=decay, gate=gate, reverse=reverse)
                chain_and_joints(segments, **case)
                print("ok chained in eights", numbers, segments, case)


# Segments, and whether from the last one back
CHAINS = (1, False), (5, True), (8, True), (14, False), (19, True)
# What `chain_segments` is told of a decay, and whether one over values is beside it.
KINDS_OF_CHAIN = (0, False), (2, False), (3, False), (3, True)


def chain_and_joints(n, decay, gate, reverse):
    """Eight segments are read at once: fewer, as many, and more, from states and to them, the second by its joints."""
    H, K, V = 2, 5, 3
    u, s0, last = torch.randn(2, n, H, K, V), torch.randn(2, H, K, V), torch.empty(2, H, K, V)
    g = -torch.rand(2, n, H, *[K] * (decay == 3))
    gv = -torch.rand(2, n, H, V) if gate else None
    factors = torch.ones(2, n, H, 1, 1)
    if decay == 3:
        factors = torch.exp2(g[..., None] + (0.0 if gv is None else gv[..., None, :]))
    elif decay:
        factors = g.exp()[..., None, None]
    state, before, after = s0 * 0.5, torch.empty_like(u), torch.empty_like(u)
    for i in sorted(range(n), reverse=reverse):
        before[:, i] = state
        state = after[:, i] = state * factors[:, i] + u[:, i]
    got, joints = u.clone(), u.flatten(0, 1)
    decay_segments.chain_segments(got, g, s0, last, decay, reverse=reverse, s_in=0.5, s_st=2.0, gv=gv)
    torch.testing.assert_close(got, before)
    torch.testing.assert_close(last, state * 2.0)
    rows = torch.tensor([[0, n, 0, 0, 0, 0, 0, 0], [n, n, 1, 0, 0, 0, 0, 0]], dtype=torch.int32)
    rest = None if gv is None else gv.flatten(0, 1)
    decay_segments.chain_joints(joints, g.flatten(0, 1), s0, rows, decay, reverse=reverse, s_in=0.5, gv=rest)
    torch.testing.assert_close(joints, after.flatten(0, 1))


def test_interpreted():
    assert interpreted(__file__) == 8 + 2 * len(CHAINS) * len(KINDS_OF_CHAIN)


def test_rule():
    """As many segments as fill the device; none where there are programs enough, or few chunks."""

    def segments(B, T, H, D, dtype=torch.bfloat16):
        q = torch.empty(B, T, H, D, dtype=dtype, device="meta")
        return decay_triton_common.plan_launch(q, q, "scalar", None).segments

    assert segments(1, 65_536, 4, 256) > 4
    assert segments(1, 65_536, 1, 256) > segments(1, 65_536, 4, 256)
    assert segments(1, 4032, 4, 256) == 1
    assert segments(8, 2048, 32, 256) == 1
    assert segments(1, 2048, 4, 64, torch.float32) > 1


def test_narrow_states_are_widened(monkeypatch):
    told = []
    monkeypatch.setattr(decay_segments, "Launch", lambda *how, **options: lambda *args: told.append(args[3].dtype))
    monkeypatch.setattr(decay_segments, "_launches", {})
    u, gt, rows = torch.zeros(1, 3, 1, 4, 4), torch.zeros(1, 3, 1), torch.zeros(1, 8, dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float32):
        s0 = torch.zeros(1, 1, 4, 4, dtype=dtype)
        decay_segments.chain_segments(u, gt, s0, None, 2, reverse=False, s_in=1.0, s_st=1.0)
        decay_segments.chain_joints(u[0], gt[0], s0, rows, 2, reverse=False, s_in=1.0)
    assert told == [torch.float32] * 4


def test_chain_tiles():
    """Whole rows, of 512 numbers a program where these have a multiprocessor each, else of 1,024."""
    sizes = (4, 128, 128), (5, 128, 128), (1, 5, 3), (1, 64, 512), (2, 256, 400)
    tiles = [decay_segments.chain_tile(*each, room=132) for each in sizes]
    assert tiles == [(4, 128), (8, 128), (8, 4), (1, 512), (2, 512)]


SPLIT = [row for row in TABLE if (row.launch, row.nbytes, row.size) == ("split", 2, 128)]


@pytest.mark.parametrize("row", SPLIT, ids=lambda row: f"sm{row.arch}-{row.family}")
def test_compiles(row):
    """The chain of segments, from and to states or neither, sizes that are no powers of two and the most values too;
    the sweeps are `test_decay_triton`'s."""
    kinds = [kind for kind, family in KINDS.items() if family == row.family]
    states = dict(HAS_S0=True, FINAL=True), dict(HAS_S0=False, FINAL=False, p_s0=None, p_st=None)
    gates = [{"p_gv": None}, {}] if row.family == "key" else [{"p_gv": None}]
    tiles = [((128, 128, rows, 128), reverse, ends) for rows, reverse, ends in product((4, 8), (False, True), states)]
    tiles += [((40, 72, 8, 128), True, states[0]), ((256, 512, 2, 512), True, states[0])]
    for kind, gate, (tile, reverse, ends) in product(kinds, gates, tiles):
        sizes = dict(zip(("K", "V", "BK", "BV"), tile, strict=True))
        constants = sizes | dict(DECAY=decay_triton_common.KINDS[kind], REVERSE=reverse)
        compiled = compile_kernel(decay_segments.chain_segments_kernel, constants | ends | gate, row, kind, "ieee")
        check_memory(compiled, stack=8 if row.arch == 80 and tile[1] == 72 else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "K", "V"), [(torch.bfloat16, 256, 256), (torch.float32, 40, 72)], ids=str)
def test_gpu(family, dtype, K, V, monkeypatch):
    """The table's split launch, and what the tables choose, with a last chunk and a last segment that are not whole."""
    monkeypatch.setattr(decay_triton_common, "LONG_SWEEP", 1)
    monkeypatch.setattr(decay_segments, "SHORTEST", 1)
    case = Case(family, 1100, "weak", B=1, H=1, K=K, V=V)
    x = on_gpu(make_inputs(case, dtype))
    truth = naive_results(case, x, torch.float64)
    eager = (naive_results if dtype == torch.float32 else narrow_results)(case, x, dtype)
    split = decay_triton_common.plan_launch(x.q, x.v, KIND[family], None).config
    for config in (split, None):
        assert segments_of(case, x, config) > 1
        got, again = run_kernels(x, config), run_kernels(x, config)
        for name in got:
            assert torch.equal(got[name], again[name]), f"{case} {name} differs from run to run"
        check_results(case, x, got, dtype, truth, eager)


if __name__ == "__main__":
    interpret()

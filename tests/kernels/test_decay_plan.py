"""What the fused launch of a decayed outer product plans: segments of time, and the tiles of its passes."""

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this system")

from fla_compile.kernels.decay_configs import configs_for
from fla_compile.kernels.decay_plan import plan_scans


def test_segments():
    """Time is cut where heads are too few to fill the device, into whole chunks, the last segment apart."""
    q = torch.empty(1, 10_000, 2, 128, dtype=torch.bfloat16, device="meta")
    scans = plan_scans(q, q, "scalar")
    assert scans.dv is scans.wide and scans.length % scans.wide.chunk == scans.length % scans.tall.chunk == 0
    assert (scans.segments - 1) * scans.length < 10_000 <= scans.segments * scans.length
    assert scans.segments > 16
    many = torch.empty(8, 10_000, 32, 128, dtype=torch.bfloat16, device="meta")
    assert plan_scans(many, many, "scalar").segments == 1
    assert plan_scans(q.float(), q, "scalar") is None


def test_value_grads():
    """dv has tiles of its own under one decay a row of more than 64 keys, beside passes that leave its gradient."""
    for K, V, cut in ((128, 128, 7), (72, 40, 1)):
        q, v = (torch.empty(1, 1000, 2, size, dtype=torch.bfloat16, device="meta") for size in (K, V))
        scans = plan_scans(q, v, "scalar", need_dg=True, segments=cut)
        assert (scans.wide.chunk, scans.dv.chunk) == (32, 64) and scans.length % 64 == 0
        for how in (dict(need_dg=False), dict(forward=True), dict(wide=scans.wide)):
            scans = plan_scans(q, v, "scalar", **dict(need_dg=True) | how)
            assert scans.dv is scans.wide
        scans = plan_scans(q, v, "constant", need_dg=True)
        assert scans.dv is scans.wide
    assert not configs_for(90, "dv", "scalar", 2, 64) and not configs_for(80, "dv", "scalar", 2, 128)


def planned(B, T, H, K, V, kind, **how):
    q, v = (torch.empty(B, T, H, size, dtype=torch.bfloat16, device="meta") for size in (K, V))
    return plan_scans(q, v, kind, **how)


@pytest.mark.parametrize("kind", ["none", "constant", "scalar"])
def test_tiles_for_few_programs(kind):
    """Heads of more than 128 have half the columns where these have a multiprocessor each."""
    for B, H, columns in ((1, 4, 64), (2, 16, 64), (1, 33, 64), (1, 34, 128), (8, 32, 128)):
        scans = planned(B, 2048, H, 256, 256, kind)
        assert (scans.wide.block_v, scans.tall.block_v) == (columns, columns)
        assert planned(B, 2048, H, 256, 256, kind, few=False).wide.block_v == 128
    assert [planned(1, 2048, H, 256, 64, kind).wide.block_v for H in (132, 133)] == [64, 128]
    assert planned(1, 2048, 4, 256, 512, kind) is None, "no pass holds 512 rows"
    assert planned(1, 2048, 4, 256, 512, kind, forward=True) is not None


@pytest.mark.parametrize("kind", ["constant", "scalar"])
def test_grads_of_few_programs_are_not_passes(kind):
    """Few heads of more than 128 leave one decay's gradient to the split launch, but packed, which that cannot do."""
    for B, H, columns in ((1, 17, 64), (2, 16, 64), (1, 34, 128), (8, 32, 128)):  # of dv, whose programs are fewer
        scans = planned(B, 2048, H, 256, 256, kind, need_dg=True)
        assert (scans.dv.block_v, scans.tall.chunk, scans.tall.block_v) == (columns, 64, 64)
    for H in (4, 16):
        assert planned(1, 2048, H, 256, 256, kind, need_dg=True) is None
        assert planned(1, 2048, H, 256, 256, kind, need_dg=True, few=False).tall.chunk == 64


def test_chunks_of_few_programs():
    """Under a gate a key chunks run side by side: there are more of them in more steps."""
    few = planned(1, 256, 4, 256, 256, "vector")
    many = planned(1, 2048, 4, 256, 256, "vector")
    assert (few.chunks.block_v, few.tall.block_v, few.segments) == (64, 32, 1)
    assert (many.chunks.block_v, many.tall.block_v) == (128, 64) and many.segments > 3
    assert planned(1, 512, 4, 256, 256, "vector").length == 128
    before = planned(1, 256, 4, 256, 256, "vector", before=True)
    assert (before.chunks.block_v, before.tall.block_v) == (64, 32)


def test_one_large_tile_a_multiprocessor():
    """Programs of eight warps over 256 rows are not counted two a multiprocessor: half as many segments fill it."""
    large, small = (planned(1, 65_536, 4, size, size, "none", few=False) for size in (256, 128))
    assert (large.wide.num_warps, small.wide.num_warps) == (8, 4)
    assert large.segments == 132 // 8 and small.segments == 2 * 132 // 8
    tall = planned(1, 65_536, 4, 128, 256, "none", few=False)
    assert (tall.wide.num_warps, tall.tall.num_warps, tall.segments) == (4, 8, 132 // 4)


@pytest.mark.parametrize("kind", ["none", "constant", "scalar"])
def test_run_ups(kind):
    """Forward and backward, of short sequences and whatever rows."""
    for K, V in ((256, 256), (256, 64), (64, 256), (200, 136), (64, 64)):
        for how in (dict(forward=True), {}):
            assert planned(1, 256, 4, K, V, kind, **how).runup
            assert not planned(1, 1025, 4, K, V, kind, **how).runup
    assert planned(1, 256, 4, 256, 64, kind, need_dg=True).runup

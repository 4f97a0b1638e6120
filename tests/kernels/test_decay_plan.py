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

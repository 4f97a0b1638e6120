"""The walk that makes the gradients under a gate a key: interpreted, and on a GPU (`test_decay_triton` compiles it).

Run as a script (with TRITON_INTERPRET=1) this file is the interpreted part, as `test_decay_triton`.
"""

from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has no build for this system")

from decay_cases import Case, make_inputs, naive_results  # noqa: E402
from interpreted import interpreted  # noqa: E402
from test_decay_triton import check_results, narrow_results, on_gpu, run_kernels  # noqa: E402

from fla_compile.kernels import decay_fused_gates  # noqa: E402
from fla_compile.kernels.decay_configs import Config  # noqa: E402
from fla_compile.kernels.decay_fused import plan_scans  # noqa: E402

HELD, TALL, WALK = Config(16, 64, 16, 4, 1, 0), Config(32, 16, 16, 4, 1, 0), Config(16, 16, 16, 4, 1, 0)


def plan(x, walk=WALK, **choices):
    """Chunks of the walk are half of those that states are counted by."""
    scans = plan_scans(x.q, x.v, "vector", wide=HELD, tall=TALL, walk=walk, **choices)
    assert scans.walk is walk
    return scans


def interpret() -> None:
    """Values in two tiles, and in one; keys in blocks; segments; out of range."""
    single, half, one_tile = torch.float32, torch.float16, Config(16, 32, 16, 4, 1, 0)
    cases = [("strong", single, 24, 20, WALK, dict(segments=1)), ("weak", half, 40, 24, WALK, {})]
    cases += [("weak", single, 20, 30, one_tile, dict(segments=2)), ("zero", half, 8, 24, WALK, {})]
    cases += [("strong", single, 24, 20, WALK, dict(limit=-1.0)), ("resets", half, 8, 24, WALK, {})]
    cases += [("very_strong", half, 8, 8, WALK, {})]
    cases += [(decay, single, 8, 8, WALK, dict(segments=1)) for decay in ("alternating", "peak", "valley")]
    for decay, dtype, K, V, walk, choices in cases:
        case = Case("gla", 96 if decay == "valley" else 70, decay, B=1, H=1, K=K, V=V)
        x = make_inputs(case, dtype)
        check_results(case, x, run_kernels(x, scans=plan(x, walk, **choices)), dtype)
        print("ok", case)
    in_range()
    small_gradients()


def in_range() -> None:
    """A reset is in range, and two, but where chunks side by side have one each."""
    made, ranges = [], decay_fused_gates._ranges
    decay_fused_gates._ranges = lambda *args: made.append(ranges(*args)) or made[-1]
    for steps, within in (([40], True), ([20, 60], True), ([33, 50], False)):
        case = Case("gla", 70, "weak", B=1, H=1, K=16, V=16)
        x = make_inputs(case, torch.float32)
        x.g[:, steps] = -1e4
        scans = plan(x, segments=1)
        got, truth = run_kernels(x, scans=scans), naive_results(case, x, torch.float64)
        assert (made[-1] <= scans.limit).all() == within, f"{steps}: range {made[-1].max()}, limit {scans.limit}"
        for name in ("dq", "dk", "dg"):
            assert (got[name] - truth[name]).norm() <= 1e-5 * truth[name].norm(), f"{steps}: {name}"
        print("ok in range", case)
    decay_fused_gates._ranges = ranges


def small_gradients() -> None:
    """What float16 holds below its normal numbers, times a chunk's factors, is not rounded as there."""
    case = Case("gla", 64, "weak", B=1, H=1, K=16, V=32)
    x = make_inputs(case, torch.float16)
    x = replace(x, g=torch.full_like(x.g, -0.5), do=x.do * 1e-4, dht=x.dht * 1e-4)
    truth = naive_results(case, x, torch.float64)["dk"]
    error = (run_kernels(x, scans=plan(x, segments=1))["dk"].double() - truth).norm() / truth.norm()
    assert error <= 2.0**-11, f"dk: {error:.1e}"
    print("ok small", case)


def test_interpreted():
    assert interpreted(__file__) == 10 + 3 + 1


@pytest.mark.gpu
@pytest.mark.parametrize("rare", [1e-3, 3e-2])
def test_gpu_resets(rare):
    """Long sequences with few resets, which are in range, and with many, side by side, which are not."""
    dtype = torch.bfloat16
    case = Case("gla", 1030, "weak", B=2, H=4, K=72, V=96)
    x = make_inputs(case, dtype)
    x = on_gpu(replace(x, g=torch.where(torch.rand(*x.g.shape[:3], 1) < rare, -100.0, x.g)))
    got, again = run_kernels(x), run_kernels(x)
    for name in got:
        assert torch.equal(got[name], again[name]), f"{case} {name} differs from run to run"
    check_results(case, x, got, dtype, naive_results(case, x, torch.float64), narrow_results(case, x, dtype))


if __name__ == "__main__":
    interpret()

"""The one table of tolerances for kernels.

Truth is the naive loop in float64. A kernel may be wrong by what the naive loop itself is wrong in the kernel's
dtype, times `FACTOR`, plus `FLOOR` of the truth's size:

    |got - truth|  <=  FACTOR * |eager - truth|  +  FLOOR * rms(truth)  +  TINY

Errors are root mean squares, so that one lucky element decides nothing; the largest single error is held to
`PEAK` times as much, so that one wrong row in a thousand cannot hide.
"""

import torch
from torch import Tensor

# Forward: the same sums in another order. Backward: sums of such sums, and the chunk is recomputed.
FACTOR = {"forward": 1.5, "backward": 3.0}

# What is left when eager happens to be exact, by the dtype of the result.
FLOOR = {
    torch.float64: 1e-13,  # 64 roundings of 1e-16 in a chunk, with room; eager is the truth itself here
    torch.float32: 1e-6,  # factors e^x with |x| <= 16 carry 16 * 2^-24
    torch.bfloat16: 2e-4,  # a tenth of one rounding: values on a tie may go either way
    torch.float16: 3e-5,
}

# A largest error over many elements varies more than their root mean square.
PEAK = 8.0

# Below this a number is zero: gradients through a decay of e^-100 underflow at different steps.
TINY = 1e-30


def check_budget(name: str, got: Tensor, truth: Tensor, eager: Tensor, kind: str) -> None:
    """Raises AssertionError if `got` is not finite, has another shape or dtype than `eager`, or breaks the budget."""
    assert got.shape == truth.shape == eager.shape, f"{name}: shape {tuple(got.shape)}, truth {tuple(truth.shape)}"
    assert got.dtype == eager.dtype, f"{name}: dtype {got.dtype}, eager {eager.dtype}"
    assert got.isfinite().all(), f"{name}: {int((~got.isfinite()).sum())} values are not finite"
    truth = truth.detach().double()
    error, allowed = got.detach().double() - truth, eager.detach().double() - truth
    floor = FLOOR[got.dtype] * _rms(truth) + TINY
    limit = FACTOR[kind] * _rms(allowed) + floor
    assert _rms(error) <= limit, f"{name}: rms error {_rms(error):.2e} > {limit:.2e} (eager {_rms(allowed):.2e})"
    peak, limit = error.abs().max().item(), PEAK * (FACTOR[kind] * allowed.abs().max().item() + floor)
    assert peak <= limit, f"{name}: largest error {peak:.2e} > {limit:.2e}"


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()

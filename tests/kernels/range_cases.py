"""Log decays at the ends of what float32 holds, and what is asked of an operator there.

Where a decay grows, the loop's own results overflow in places: an operator must be finite wherever the loop in float32
is, and there as near to the truth.
"""

import torch
from torch import Tensor

DECAYS = ("zero", "strong", "infinite", "some_infinite", "alternating", "by_key", "one_growth", "growing", "hills")

# Sums in another order, and factors e^x with |x| up to 88: each carries 88 * 2^-24, and a chain of ten of them counts.
FACTOR, FLOOR = 4.0, 2e-5


def log_decay(kind: str, shape: tuple[int, ...]) -> Tensor:
    """[B, T, ...], the same for all B, float32."""
    torch.manual_seed(2)
    t = torch.arange(shape[1]).view(1, -1, *[1] * (len(shape) - 2))
    keys = torch.randint(0, 2, (1, 1, *shape[2:]))
    g = {
        "zero": torch.zeros(1),
        "strong": torch.full((1,), -100.0),
        "infinite": torch.full((1,), -torch.inf),
        "some_infinite": torch.where(torch.rand(shape) < 0.1, -torch.inf, -0.05),
        "alternating": torch.where(t % 2 == 1, 70.0, -70.0),
        "by_key": torch.where((t + keys) % 2 == 1, 70.0, -70.0),
        "one_growth": torch.where(t == shape[1] // 3, 80.0, 0.0),
        "growing": torch.where((t >= 3) & (t < 63), 1.0, 0.0),
        "hills": torch.where(t // 64 % 2 == 0, 1.1, -1.1),
    }[kind]
    return g.expand(shape).clone()


def check_where_finite(
    name: str, got: Tensor, truth: Tensor, eager: Tensor, *, floor: float = FLOOR, every_row: bool = False
) -> None:
    """Raises AssertionError unless `got` is finite where `eager` is, and no further from the truth, by row.

    A row is what one step, head or key holds, so that e^70 in one does not excuse another of size one; but rows below
    the median are held to the median's size, or, with `every_row`, to their own.
    """
    assert got.shape == eager.shape and got.dtype == eager.dtype, name
    finite = eager.isfinite() & truth.isfinite()
    lost = finite & ~got.isfinite()
    assert not lost.any(), f"{name}: {int(lost.sum())} of {int(finite.sum())} values are not finite"
    values = [torch.where(finite, x.detach().double(), 0.0) for x in (got, truth, eager)]
    (error, allowed), size = ((x - values[1]).abs() for x in (values[0], values[2])), values[1].abs()
    if got.ndim > 2:
        error, allowed, size = (x.amax(-1) for x in (error, allowed, size))
    if not every_row:
        size = size.clamp(min=size.median().item())
    limit = FACTOR * allowed + floor * size + 1e-30
    worst = (error / limit).max().item()
    assert worst <= 1, f"{name}: error {worst:.1f} times what is allowed"

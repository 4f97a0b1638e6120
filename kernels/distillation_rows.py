"""Divergence from a teacher and cross entropy with labels, of the same rows of logits, with one gradient for both.

    l = D(q, p)      of student and teacher at their temperatures, as in `kl_div_rows`
    h                the cross entropy of the student's logits, at a scale of their own, as in `cross_entropy_rows`
    dL/da = f dl/da + g dh/da                  f, g the factors of the two losses of a row

Either loss leaves rows out by itself: the divergence those that are not kept, the cross entropy those whose label is
`ignore_index`. A loss that leaves a row out is 0 there and adds nothing to its gradient, whatever the logits are. The
gradient may be written over the student's products in their own dtype; sums are float32 (float64 for float64).

Source: Hinton et al. 2015 (arXiv:1503.02531).
"""

from torch import Tensor

from fla_compile.kernels import cross_entropy_rows, kl_div_rows
from fla_compile.kernels.cross_entropy_rows import RowLoss, wide_dtype
from fla_compile.kernels.kl_div_rows import AT_A_TIME, Divergence, Side, runs_triton

__all__ = ["distillation_rows", "torch_rows"]


def distillation_rows(
    student: Side,
    teacher: Side,
    keep: Tensor | None,
    target: Tensor,
    factors: Tensor | None,
    loss: Divergence,
    hard: RowLoss,
    *,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Divergences [n] and cross entropies [n]; factors [n, 2] for the gradient, which goes to `out` [n, V].

    `hard` has no cap. `out` may be the student's products.
    """
    if runs_triton(student.a.device.type, student.a.dtype, teacher.a.dtype):
        from fla_compile.kernels.distillation_triton import triton_rows

        return triton_rows(student, teacher, keep, target, factors, loss, hard, out=out)
    return torch_rows(student, teacher, keep, target, factors, loss, hard, out=out)


def torch_rows(
    student: Side,
    teacher: Side,
    keep: Tensor | None,
    target: Tensor,
    factors: Tensor | None,
    loss: Divergence,
    hard: RowLoss,
    *,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same on any device, in torch operations on a few rows at a time."""
    n, V = student.a.shape
    wide = wide_dtype(student.a.dtype)
    losses, hards = student.a.new_empty((2, n), dtype=wide)
    step = max(1, AT_A_TIME[student.a.device.type] // V)
    for first in range(0, n, step):
        rows = slice(first, first + step)
        own, other = (Side(side.a[rows], side.bias, side.scale) for side in (student, teacher))
        f, g = (None, None) if factors is None else factors[rows].unbind(1)
        soft, grad = (None, None) if out is None else own.a.new_empty((2, *own.a.shape), dtype=wide)
        kept = None if keep is None else keep[rows]
        losses[rows] = kl_div_rows.torch_rows(own, other, kept, f, loss, out=soft)
        hards[rows] = cross_entropy_rows.torch_rows(own.a, own.bias, target[rows], g, hard, out=grad)
        if out is not None and soft is not None and grad is not None:
            out[rows] = grad.add_(soft)
    return losses, hards

"""The operators of `linear_kl_div`: forward with its gradients, backward, `torch.library` registration.

As in `linear_cross_entropy_ops` the forward computes dx, dW and db chunk by chunk, up to the factor of the loss that
the backward multiplies by; without a reduction the backward computes the chunks once more. For each chunk the teacher's
products stand beside the student's: one product of 2 N D' V operations more, and as much memory again for the logits.
"""

from typing import Any

import torch
from torch import Tensor

from fla_compile.kernels.cross_entropy_rows import wide_dtype
from fla_compile.kernels.kl_div_rows import Divergence, Side, divergence_rows
from fla_compile.kernels.linear_cross_entropy_ops import LIFT
from fla_compile.kernels.linear_loss_chunks import Gradients, Plan
from fla_compile.kernels.loss_ops import (
    Need,
    filled,
    filled_fake,
    keep_for_backward,
    layer_gradients,
    lifted_linear_loss,
    reduced,
    row_factors,
)
from fla_compile.kernels.operators import operator, register_autograd, register_fake

LIFT_OF_LOGARITHMS = 16.0  # float16 rows of reverse_kl: dl/da grows with the logits, and must stay below 65504
Layer = tuple[Tensor, Tensor, Tensor | None, float]  # x [N, D], weight [V, D], bias [V], scale of the logits


def _rows(
    student: Layer,
    teacher: Layer,
    keep: Tensor | None,
    factor: Tensor,
    loss: Divergence,
    need: Need,
    plan: Plan | None = None,
) -> tuple[Tensor, Gradients]:
    """Losses [N], and the gradients of sum_i factor_i l_i."""
    (x, weight, bias, scale), (theirs, matrix, their_bias, their_scale) = student, teacher

    def rows(a: Tensor, part: slice, factor: Tensor, out: Tensor | None) -> Tensor:
        b = theirs.new_empty((len(a), a.stride(0)))[:, : a.shape[1]]  # rows as far apart as the student's
        torch.mm(theirs[part], matrix.t(), out=b)
        own, other = Side(a, bias, scale), Side(b, their_bias, their_scale)
        return divergence_rows(own, other, None if keep is None else keep[part], factor, loss, out=out)

    lift = LIFT_OF_LOGARITHMS if loss.kind == "reverse_kl" else LIFT
    return lifted_linear_loss(x, weight, factor, rows, need, lift=lift, plan=plan)


@operator("linear_kl_div")
def linear_kl_div_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    keep: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
    teacher_scale: float,
    divergence: str,
    beta: float,
    reduction: str,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need = (need_dx, need_dw, need_db) if reduction != "none" else (False, False, False)
    student, teacher = (x, weight, bias, scale), (teacher_x, teacher_weight, teacher_bias, teacher_scale)
    return forward_chunks(student, teacher, keep, row_weight, Divergence(divergence, beta), reduction, need)


def forward_chunks(
    student: Layer,
    teacher: Layer,
    keep: Tensor | None,
    row_weight: Tensor | None,
    loss: Divergence,
    reduction: str,
    need: Need,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    factor = row_factors(student[0].shape[:1], keep, row_weight, reduction, student[0])
    with torch.autocast(student[0].device.type, enabled=False):
        losses, found = _rows(student, teacher, keep, factor, loss, need, plan)
    return reduced(losses, keep, row_weight, reduction), *filled(found, student[0])


@register_fake(linear_kl_div_forward)
def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    keep: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
    teacher_scale: float,
    divergence: str,
    beta: float,
    reduction: str,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    whole = reduction != "none"
    losses = x.new_empty(() if whole else x.shape[0], dtype=wide_dtype(x.dtype))
    return losses, *filled_fake(x, weight, (whole and need_dx, whole and need_dw, whole and need_db))


@operator("linear_kl_div_backward")
def linear_kl_div_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    keep: Tensor | None,
    factor: Tensor,
    scale: float,
    teacher_scale: float,
    divergence: str,
    beta: float,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of sum_i factor_i l_i."""
    student, teacher = (x, weight, bias, scale), (teacher_x, teacher_weight, teacher_bias, teacher_scale)
    with torch.autocast(x.device.type, enabled=False):
        found = _rows(student, teacher, keep, factor, Divergence(divergence, beta), (need_dx, need_dw, need_db))[1]
        return filled(found, x)


@register_fake(linear_kl_div_backward)
def _backward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    keep: Tensor | None,
    factor: Tensor,
    scale: float,
    teacher_scale: float,
    divergence: str,
    beta: float,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return filled_fake(x, weight, (need_dx, need_dw, need_db))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.loss = inputs[8:12]
    keep_for_backward(ctx, inputs[:8], output, inputs[12], inputs[13:])


def _backward(ctx: Any, dloss: Tensor | None, *of_gradients: Tensor | None) -> tuple[Any, ...]:
    def again(operands: tuple[Any, ...], wanted: Need) -> tuple[Tensor, ...]:
        *given, row_weight = operands
        factor = dloss if row_weight is None else dloss * row_weight
        return linear_kl_div_backward(*given, factor, *ctx.loss, *wanted)

    return *layer_gradients(ctx, dloss, "linear_kl_div", again), *(None,) * 13


register_autograd(linear_kl_div_forward, _backward, setup_context=_setup_context)

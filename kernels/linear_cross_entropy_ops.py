"""The operators of `linear_cross_entropy`: forward with its gradients, backward, `torch.library` registration.

The forward computes dx, dW and db chunk by chunk, and the backward multiplies by the factor of the loss (`loss_ops`).
Without a reduction the backward computes the chunks once more, with the rows' factors.

Source: Hsu et al. 2024 (arXiv:2410.10989) for gradients in the forward.
"""

from typing import Any

import torch
from torch import Tensor

from fla_compile.kernels.cross_entropy_rows import RowLoss, loss_rows, wide_dtype
from fla_compile.kernels.decay_layout import without_autocast
from fla_compile.kernels.linear_loss_chunks import Gradients, Plan
from fla_compile.kernels.loss_ops import (
    Need,
    check_targets,
    filled,
    filled_fake,
    keep_for_backward,
    layer_gradients,
    lifted_linear_loss,
    reduced,
    row_factors,
)
from fla_compile.kernels.operators import operator, register_autograd, register_fake

LIFT = 1024.0  # float16 rows: dl/da is at most 1, and its parts of 2^-24 / LIFT are not lost


def _rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factor: Tensor,
    loss: RowLoss,
    need: Need,
    plan: Plan | None = None,
) -> tuple[Tensor, Gradients]:
    """Losses [N], and the gradients of sum_i factor_i l_i."""
    check_targets(target, weight.shape[0], loss.ignore_index)
    target = target.long().contiguous()

    def rows(a: Tensor, part: slice, scale: Tensor, out: Tensor | None) -> Tensor:
        return loss_rows(a, bias, target[part], scale, loss, out=out)

    return lifted_linear_loss(x, weight, factor, rows, need, lift=LIFT, plan=plan)


@operator("linear_cross_entropy")
def linear_cross_entropy_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
    z_loss: float,
    reduction: str,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = RowLoss(ignore_index, label_smoothing, softcap, logit_scale, z_loss)
    need = (need_dx, need_dw, need_db) if reduction != "none" else (False, False, False)
    return forward_chunks(x, weight, bias, target, row_weight, loss, reduction, need)


@without_autocast
def forward_chunks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None,
    loss: RowLoss,
    reduction: str,
    need: Need,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keep = target != loss.ignore_index
    factor = row_factors(target.shape, keep, row_weight, reduction, x)
    losses, found = _rows(x, weight, bias, target, factor, loss, need, plan)
    return reduced(losses, keep, row_weight, reduction), *filled(found, x)


@register_fake(linear_cross_entropy_forward)
def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
    z_loss: float,
    reduction: str,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keep = reduction != "none"
    losses = x.new_empty(() if keep else target.shape, dtype=wide_dtype(x.dtype))
    return losses, *filled_fake(x, weight, (keep and need_dx, keep and need_dw, keep and need_db))


@operator("linear_cross_entropy_backward")
def linear_cross_entropy_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factor: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
    z_loss: float,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of sum_i factor_i l_i."""
    loss = RowLoss(ignore_index, label_smoothing, softcap, logit_scale, z_loss)
    with torch.autocast(x.device.type, enabled=False):
        return filled(_rows(x, weight, bias, target, factor, loss, (need_dx, need_dw, need_db))[1], x)


@register_fake(linear_cross_entropy_backward)
def _backward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factor: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
    z_loss: float,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return filled_fake(x, weight, (need_dx, need_dw, need_db))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *ctx.loss, reduction = inputs[5:11]
    keep_for_backward(ctx, inputs[:5], output, reduction, inputs[11:])


def _backward(ctx: Any, dloss: Tensor | None, *of_gradients: Tensor | None) -> tuple[Any, ...]:
    def again(operands: tuple[Any, ...], wanted: Need) -> tuple[Tensor, ...]:
        *given, row_weight = operands
        factor = dloss if row_weight is None else dloss * row_weight
        return linear_cross_entropy_backward(*given, factor, *ctx.loss, *wanted)

    return *layer_gradients(ctx, dloss, "linear_cross_entropy", again), *(None,) * 11


register_autograd(linear_cross_entropy_forward, _backward, setup_context=_setup_context)

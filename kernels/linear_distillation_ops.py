"""The operators of `linear_kl_div` with labels: divergence and cross entropy of one student, from one set of logits.

`linear_distillation` is a weighted sum of both losses over all rows; its forward computes dx, dW and db as
`linear_kl_div` does, and the backward multiplies. `linear_distillation_rows` gives both losses of every row, and its
backward computes the chunks once more. Either way a chunk's logits are computed once for both losses, and their
gradients are added before the products for dx and dW.
"""

from typing import Any

import torch
from torch import Tensor

from fla_compile.kernels.cross_entropy_rows import RowLoss, wide_dtype
from fla_compile.kernels.distillation_rows import distillation_rows
from fla_compile.kernels.kl_div_rows import Divergence, Side
from fla_compile.kernels.linear_cross_entropy_ops import LIFT
from fla_compile.kernels.linear_kl_div_ops import LIFT_OF_LOGARITHMS, Layer
from fla_compile.kernels.linear_loss_chunks import Gradients
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


def both_losses(
    student: Layer,
    teacher: Layer,
    keep: Tensor | None,
    target: Tensor,
    factors: Tensor,
    loss: Divergence,
    hard: RowLoss,
    need: Need,
) -> tuple[Tensor, Tensor, Gradients]:
    """Divergences l [N], cross entropies h [N], and the gradients of sum_i f_i l_i + g_i h_i for factors [N, 2]."""
    (x, weight, bias, scale), (theirs, matrix, their_bias, their_scale) = student, teacher
    check_targets(target, weight.shape[0], hard.ignore_index)
    target = target.long().contiguous()
    hards = x.new_empty(len(x), dtype=wide_dtype(x.dtype))

    def rows(a: Tensor, part: slice, factors: Tensor, out: Tensor | None) -> Tensor:
        b = theirs.new_empty((len(a), a.stride(0)))[:, : a.shape[1]]  # rows as far apart as the student's
        torch.mm(theirs[part], matrix.t(), out=b)
        own, other = Side(a, bias, scale), Side(b, their_bias, their_scale)
        kept = None if keep is None else keep[part]
        losses, hards[part] = distillation_rows(own, other, kept, target[part], factors, loss, hard, out=out)
        return losses

    lift = LIFT_OF_LOGARITHMS if loss.kind == "reverse_kl" else LIFT
    with torch.autocast(x.device.type, enabled=False):
        losses, found = lifted_linear_loss(x, weight, factors, rows, need, lift=lift)
    return losses, hards, found


@operator("linear_distillation")
def linear_distillation_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    keep: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None,
    hard_weight: Tensor | None,
    factor: Tensor,
    hard_factor: Tensor,
    scale: float,
    teacher_scale: float,
    divergence: str,
    beta: float,
    ignore_index: int,
    label_smoothing: float,
    hard_scale: float,
    z_loss: float,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """factor sum_i row_weight_i l_i + hard_factor sum_i hard_weight_i h_i; the factors are tensors of one number."""
    student, teacher = (x, weight, bias, scale), (teacher_x, teacher_weight, teacher_bias, teacher_scale)
    loss, hard = Divergence(divergence, beta), RowLoss(ignore_index, label_smoothing, 0.0, hard_scale, z_loss)
    parts = (row_weight, factor), (hard_weight, hard_factor)
    factors = torch.stack([row_factors(target.shape, None, w, "sum", x) * f for w, f in parts], 1)
    *losses, found = both_losses(student, teacher, keep, target, factors, loss, hard, (need_dx, need_dw, need_db))
    soft, of_labels = (reduced(y, None, w, "sum") * f for y, (w, f) in zip(losses, parts, strict=True))
    return (soft + of_labels).to(wide_dtype(x.dtype)), *filled(found, x)


@register_fake(linear_distillation_forward)
def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    keep: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None,
    hard_weight: Tensor | None,
    factor: Tensor,
    hard_factor: Tensor,
    scale: float,
    teacher_scale: float,
    divergence: str,
    beta: float,
    ignore_index: int,
    label_smoothing: float,
    hard_scale: float,
    z_loss: float,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty((), dtype=wide_dtype(x.dtype)), *filled_fake(x, weight, (need_dx, need_dw, need_db))


@operator("linear_distillation_rows")
def linear_distillation_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    keep: Tensor | None,
    target: Tensor,
    scale: float,
    teacher_scale: float,
    divergence: str,
    beta: float,
    ignore_index: int,
    label_smoothing: float,
    hard_scale: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    """l [N] and h [N], 0 in rows that are not kept, or not labelled."""
    student, teacher = (x, weight, bias, scale), (teacher_x, teacher_weight, teacher_bias, teacher_scale)
    loss, hard = Divergence(divergence, beta), RowLoss(ignore_index, label_smoothing, 0.0, hard_scale, z_loss)
    factors = x.new_ones((), dtype=wide_dtype(x.dtype)).expand(len(x), 2)
    losses, hards, _ = both_losses(student, teacher, keep, target, factors, loss, hard, (False, False, False))
    return losses, hards


@register_fake(linear_distillation_rows)
def _rows_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    keep: Tensor | None,
    target: Tensor,
    scale: float,
    teacher_scale: float,
    divergence: str,
    beta: float,
    ignore_index: int,
    label_smoothing: float,
    hard_scale: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    losses = x.new_empty(x.shape[:1], dtype=wide_dtype(x.dtype))
    return losses, torch.empty_like(losses)


@operator("linear_distillation_backward")
def linear_distillation_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    keep: Tensor | None,
    target: Tensor,
    factors: Tensor,
    scale: float,
    teacher_scale: float,
    divergence: str,
    beta: float,
    ignore_index: int,
    label_smoothing: float,
    hard_scale: float,
    z_loss: float,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of sum_i f_i l_i + g_i h_i for factors [N, 2]."""
    student, teacher = (x, weight, bias, scale), (teacher_x, teacher_weight, teacher_bias, teacher_scale)
    loss, hard = Divergence(divergence, beta), RowLoss(ignore_index, label_smoothing, 0.0, hard_scale, z_loss)
    need = need_dx, need_dw, need_db
    return filled(both_losses(student, teacher, keep, target, factors.contiguous(), loss, hard, need)[2], x)


@register_fake(linear_distillation_backward)
def _backward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    keep: Tensor | None,
    target: Tensor,
    factors: Tensor,
    scale: float,
    teacher_scale: float,
    divergence: str,
    beta: float,
    ignore_index: int,
    label_smoothing: float,
    hard_scale: float,
    z_loss: float,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return filled_fake(x, weight, (need_dx, need_dw, need_db))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    keep_for_backward(ctx, inputs[:3], output, "sum", inputs[20:])


def _backward(ctx: Any, dloss: Tensor | None, *of_gradients: Tensor | None) -> tuple[Any, ...]:
    return *layer_gradients(ctx, dloss, "linear_distillation"), *(None,) * 20


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.numbers = inputs[8:]
    keep_for_backward(ctx, inputs[:8], output[:1], "none", (True, True, True))


def _backward_rows(ctx: Any, of_losses: Tensor | None, of_hards: Tensor | None) -> tuple[Any, ...]:
    known = of_losses if of_losses is not None else of_hards
    if known is None:
        return (None,) * 16
    both = [torch.zeros_like(known) if y is None else y for y in (of_losses, of_hards)]

    def again(operands: tuple[Any, ...], wanted: Need) -> tuple[Tensor, ...]:
        return linear_distillation_backward(*operands, torch.stack(both, 1), *ctx.numbers, *wanted)

    return *layer_gradients(ctx, known, "linear_distillation_rows", again), *(None,) * 13


register_autograd(linear_distillation_forward, _backward, setup_context=_setup_context)
register_autograd(linear_distillation_rows, _backward_rows, setup_context=_setup_rows)

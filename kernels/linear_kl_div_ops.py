"""The operators of `linear_kl_div`: forward with its gradients, backward, `torch.library` registration.

As in `linear_cross_entropy_ops` the forward computes dx, dW and db chunk by chunk, up to the factor of the loss that
the backward multiplies by; without a reduction the backward computes the chunks once more. For each chunk the teacher's
products stand beside the student's: one product of 2 N D' V operations more, and as much memory again for the logits.
"""

from typing import Any

import torch
from torch import Tensor

from fla_compile.kernels.cross_entropy_rows import scale_in_place, wide_dtype
from fla_compile.kernels.kl_div_rows import Divergence, Side, divergence_rows
from fla_compile.kernels.linear_cross_entropy_ops import LIFT, filled, filled_fake, multiplied
from fla_compile.kernels.linear_loss_chunks import Gradients, Plan, chunk_linear_loss
from fla_compile.kernels.operators import operator, register_autograd, register_fake

LIFT_OF_LOGARITHMS = 16.0  # float16 rows of reverse_kl: dl/da grows with the logits, and must stay below 65504
Layer = tuple[Tensor, Tensor, Tensor | None, float]  # x [N, D], weight [V, D], bias [V], scale of the logits


def _rows(
    student: Layer,
    teacher: Layer,
    keep: Tensor | None,
    factor: Tensor,
    loss: Divergence,
    need: tuple[bool, bool, bool],
    plan: Plan | None = None,
) -> tuple[Tensor, Gradients]:
    """Losses [N], and the gradients of sum_i factor_i l_i."""
    (x, weight, bias, scale), (theirs, matrix, their_bias, their_scale) = student, teacher
    grads, unlift = any(need), None
    if x.dtype == torch.float16 and grads and len(x):
        top = factor.abs().max()
        top = torch.where(torch.isfinite(top) & (top > 0), top, 1.0)
        lift = LIFT_OF_LOGARITHMS if loss.kind == "reverse_kl" else LIFT
        factor, unlift = factor / top * lift, top / lift

    def loss_of(a: Tensor, first: int) -> Tensor:
        part = slice(first, first + len(a))
        b = theirs.new_empty((len(a), a.stride(0)))[:, : a.shape[1]]  # rows as far apart as the student's
        torch.mm(theirs[part], matrix.t(), out=b)
        own, other = Side(a, bias, scale), Side(b, their_bias, their_scale)
        kept = None if keep is None else keep[part]
        return divergence_rows(own, other, kept, factor[part], loss, out=a if grads else None)

    losses, found = chunk_linear_loss(x, weight, loss_of, need_dx=need[0], need_dw=need[1], need_db=need[2], plan=plan)
    if unlift is not None:
        for grad in (found.dx, found.dw, found.db):
            if grad is not None:
                scale_in_place(grad, unlift)
    return losses, found


def _factors(x: Tensor, keep: Tensor | None, row_weight: Tensor | None, reduction: str) -> Tensor:
    """The factor of each row's loss in the loss [N]."""
    one = x.new_ones((), dtype=wide_dtype(x.dtype))
    if reduction == "mean":
        one = one / (x.shape[0] if keep is None else keep.sum())
    return one.expand(x.shape[0]) if row_weight is None else row_weight.to(one.dtype) * one


def _reduced(losses: Tensor, keep: Tensor | None, row_weight: Tensor | None, reduction: str) -> Tensor:
    if row_weight is not None:
        losses = losses * row_weight
    if reduction == "none":
        return losses
    # no row that counts: 0 / 0, as torch has it
    return losses.sum() / (len(losses) if keep is None else keep.sum()) if reduction == "mean" else losses.sum()


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
    need: tuple[bool, bool, bool],
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    factor = _factors(student[0], keep, row_weight, reduction)
    with torch.autocast(student[0].device.type, enabled=False):
        losses, found = _rows(student, teacher, keep, factor, loss, need, plan)
    return _reduced(losses, keep, row_weight, reduction), *filled(found, student[0])


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
    x, weight, bias, *_ = operands = inputs[:8]
    ctx.loss, ctx.reduction, ctx.need = inputs[8:12], inputs[12], inputs[13:]
    ctx.set_materialize_grads(False)
    ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*(operands if ctx.reduction == "none" else output[1:]))


def _backward(ctx: Any, dloss: Tensor | None, *of_gradients: Tensor | None) -> tuple[Any, ...]:
    if torch.is_grad_enabled():  # a graph of the backward would hold gradients that came from no graph
        raise RuntimeError("linear_kl_div cannot be differentiated twice: create_graph is not supported")
    nothing = (None,) * 13
    if dloss is None:
        return None, None, None, *nothing
    wanted = ctx.needs_input_grad[:3]
    if any(wish and not had for wish, had in zip(wanted, ctx.need, strict=True)):
        raise RuntimeError("linear_kl_div was told in the forward that this gradient is not needed")
    if ctx.reduction == "none":
        *operands, row_weight = ctx.saved_tensors
        factor = dloss if row_weight is None else dloss * row_weight
        found = linear_kl_div_backward(*operands, factor, *ctx.loss, *wanted)
    else:
        saved = zip(ctx.saved_tensors, wanted, strict=True)
        found = tuple(multiplied(grad, dloss) if wish else grad for grad, wish in saved)
    grads = (g.to(d) if wish else None for g, d, wish in zip(found, ctx.dtypes, wanted, strict=True))
    return *grads, *nothing


register_autograd(linear_kl_div_forward, _backward, setup_context=_setup_context)

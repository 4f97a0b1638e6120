"""The operators of `linear_cross_entropy`: forward with its gradients, backward, `torch.library` registration.

The loss is L = sum_i r_i l_i, or that over the number of targets that count, and dL/da_i is known as soon as the row
is, up to the factor dL. So the forward computes dx, dW and db chunk by chunk (`linear_loss_chunks`), and the backward
multiplies by the factor. Without a reduction the factor is one a row and comes too late: there the forward computes the
losses alone, and the backward the chunks once more, with the rows' factors.

float16 gradients are kept in float32 until the factor is known, and their rows scaled to 2^10 inside: a loss scale must
be able to lift them before they are rounded.

Source: Hsu et al. 2024 (arXiv:2410.10989) for gradients in the forward.
"""

from typing import Any

import torch
from torch import Tensor

from fla_compile.kernels.cross_entropy_rows import RowLoss, loss_rows, scale_in_place, wide_dtype
from fla_compile.kernels.decay_layout import without_autocast
from fla_compile.kernels.linear_loss_chunks import Gradients, Plan, chunk_linear_loss
from fla_compile.kernels.operators import operator, register_autograd, register_fake

LIFT = 1024.0  # float16 rows: dl/da is at most 1, and its parts of 2^-24 / LIFT are not lost


def _rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    loss: RowLoss,
    need: tuple[bool, bool, bool],
    plan: Plan | None = None,
) -> tuple[Tensor, Gradients]:
    """Losses [N], and the gradients of sum_i scale_i l_i."""
    check_targets(target, weight.shape[0], loss.ignore_index)
    target, grads = target.long().contiguous(), any(need)
    unlift = None
    if x.dtype == torch.float16 and grads and target.numel():
        top = scale.abs().max()
        top = torch.where(torch.isfinite(top) & (top > 0), top, 1.0)
        scale, unlift = scale / top * LIFT, top / LIFT

    def loss_of(a: Tensor, first: int) -> Tensor:
        part = slice(first, first + len(a))
        return loss_rows(a, bias, target[part], scale[part], loss, out=a if grads else None)

    losses, found = chunk_linear_loss(x, weight, loss_of, need_dx=need[0], need_dw=need[1], need_db=need[2], plan=plan)
    if unlift is not None:
        for grad in (found.dx, found.dw, found.db):
            if grad is not None:
                scale_in_place(grad, unlift)
    return losses, found


def check_targets(target: Tensor, V: int, ignore_index: int) -> None:
    """As torch: an IndexError on the CPU, an assertion of the device on CUDA."""
    legal = ((target >= 0) & (target < V)) | (target == ignore_index)
    if target.device.type == "cpu":
        if not legal.all():
            raise IndexError(f"Target {int(target[~legal][0])} is out of bounds.")
    else:
        torch._assert_async(legal.all())


def row_factors(target: Tensor, row_weight: Tensor | None, ignore_index: int, reduction: str, like: Tensor) -> Tensor:
    """The factor of each row's loss in the loss [N]."""
    one = like.new_ones((), dtype=wide_dtype(like.dtype))
    if reduction == "mean":
        one = one / (target != ignore_index).sum()
    return one.expand(target.shape) if row_weight is None else row_weight.to(one.dtype) * one


def reduced(losses: Tensor, target: Tensor, row_weight: Tensor | None, ignore_index: int, reduction: str) -> Tensor:
    if row_weight is not None:
        losses = losses * row_weight
    if reduction == "none":
        return losses
    # no target that counts: 0 / 0, as torch has it
    return losses.sum() / (target != ignore_index).sum() if reduction == "mean" else losses.sum()


def filled(found: Gradients, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An operator returns tensors only: where a gradient is not wanted, an empty one stands in its place."""
    dx, dw, db = (x.new_empty(0) if grad is None else grad for grad in (found.dx, found.dw, found.db))
    return dx, dw, db


def filled_fake(x: Tensor, weight: Tensor, need: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
    held = torch.float32 if x.dtype == torch.float16 else x.dtype
    return (
        x.new_empty(x.shape if need[0] else 0, dtype=held if need[0] else x.dtype),
        x.new_empty(weight.shape if need[1] else 0, dtype=held if need[1] else x.dtype),
        x.new_empty(weight.shape[0] if need[2] else 0, dtype=wide_dtype(x.dtype) if need[2] else x.dtype),
    )


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
    need: tuple[bool, bool, bool],
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scale = row_factors(target, row_weight, loss.ignore_index, reduction, x)
    losses, found = _rows(x, weight, bias, target, scale, loss, need, plan)
    return reduced(losses, target, row_weight, loss.ignore_index, reduction), *filled(found, x)


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
    x, weight, bias, target, row_weight, *ctx.loss, ctx.reduction = inputs[:11]
    ctx.set_materialize_grads(False)
    ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
    ctx.need = inputs[11:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*((x, weight, bias, target, row_weight) if ctx.reduction == "none" else output[1:]))


def _backward(ctx: Any, dloss: Tensor | None, *of_gradients: Tensor | None) -> tuple[Any, ...]:
    if torch.is_grad_enabled():  # a graph of the backward would hold gradients that came from no graph
        raise RuntimeError("linear_cross_entropy cannot be differentiated twice: create_graph is not supported")
    nothing = (None,) * 11
    if dloss is None:
        return None, None, None, *nothing
    wanted = ctx.needs_input_grad[:3]
    if any(wish and not had for wish, had in zip(wanted, ctx.need, strict=True)):
        raise RuntimeError("linear_cross_entropy was told in the forward that this gradient is not needed")
    if ctx.reduction == "none":
        x, weight, bias, target, row_weight = ctx.saved_tensors
        factor = dloss if row_weight is None else dloss * row_weight
        found = linear_cross_entropy_backward(x, weight, bias, target, factor, *ctx.loss, *wanted)
    else:
        saved = zip(ctx.saved_tensors, wanted, strict=True)
        found = tuple(multiplied(grad, dloss) if wish else grad for grad, wish in saved)
    grads = (g.to(d) if wish else None for g, d, wish in zip(found, ctx.dtypes, wanted, strict=True))
    return *grads, *nothing


def multiplied(saved: Tensor, factor: Tensor) -> Tensor:
    """A saved gradient times a number; in its own memory where nobody will ask for it again."""
    if type(saved) is not Tensor or keeps_graph():
        return saved * factor
    saved = saved.detach()
    scale_in_place(saved, factor)
    return saved


def keeps_graph() -> bool:
    """Whether the running backward was asked to keep its graph for another one."""
    return torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]


register_autograd(linear_cross_entropy_forward, _backward, setup_context=_setup_context)

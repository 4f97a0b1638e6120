"""Cross entropy of logits that exist, in place on its gradient: that is the one tensor of their size it writes.

    z = c tanh(s a / c)        l_i = lse_i - (1 - e) z_it - e mean_v z_iv + w lse_i^2

Shapes: logits a [..., V], target and row_weight [...]; l [...] (`cross_entropy_rows` has its gradient). The gradient
has the logits' dtype, and nothing of their size is made in another: Triton takes a row at a time, torch operations few.

The loss is L = sum_i r_i l_i, or that over the number of targets that count. Eager code gets dl/da with the loss, in
one pass over the logits, which are not kept for backward; that multiplies by the factor dL in the gradient's own
memory. Where the factor comes too late for this the logits are kept and backward writes the gradient with its factor
at once: without a reduction, where there is one a row; in float16, where a loss scale must reach what would be rounded
to zero before; in a traced program, where nobody may write over what is saved, so that one more pass would be two.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fla_compile.kernels.cross_entropy_rows import RowLoss, loss_rows, runs_triton, wide_dtype
from fla_compile.kernels.decay_layout import without_autocast
from fla_compile.kernels.linear_loss_chunks import CPU_LOGITS
from fla_compile.kernels.loss_ops import (
    REDUCTIONS,
    check_rows,
    check_targets,
    multiplied,
    reduced,
    refusal,
    row_factors,
)
from fla_compile.kernels.operators import operator, register_autograd, register_fake

__all__ = ["check_options", "cross_entropy", "kernel_name", "naive_cross_entropy", "supports"]

MATRICES = 64  # launches for rows that lie at no single distance; beyond this they are copied


def supports(device: str, dtype: torch.dtype) -> str | None:
    return refusal("cross_entropy", device, dtype)


def kernel_name(device: str, dtype: torch.dtype) -> str:
    return "rows (Triton)" if device == "cuda" and dtype != torch.float64 else "rows (torch)"


def naive_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The definition; float64 for float64 logits, else the loss is float32."""
    z = logits.to(wide_dtype(logits.dtype)) * logit_scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    counts = target != ignore_index
    losses = F.cross_entropy(
        z.reshape(-1, z.shape[-1]), target.reshape(-1),
        ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none",
    ).reshape(target.shape)  # fmt: skip
    losses = losses + z_loss * torch.where(counts, torch.logsumexp(z, -1) ** 2, 0.0)
    if row_weight is not None:
        losses = losses * row_weight
    if reduction == "none":
        return losses
    return losses.sum() / counts.sum() if reduction == "mean" else losses.sum()


def matrices(x: Tensor) -> Iterator[Tensor]:
    """The rows of x [..., V] in order, as views [n, V] at one distance each; only Triton takes many at a time."""
    V, n = x.shape[-1], x.shape[:-1].numel()
    try:
        rows = x.view(n, V)
    except RuntimeError:
        for part in x:
            yield from matrices(part)
        return
    yield from (rows,) if runs_triton(x) else rows.split(max(1, CPU_LOGITS // max(1, V)))


def _with_strides(logits: Tensor) -> Tensor:
    """Logits that `matrices` takes in few views: themselves, but for strides that rows do not have."""
    V = logits.shape[-1]
    apart = logits.shape[:-2].numel() > MATRICES and not logits.is_contiguous()
    return logits.contiguous() if apart or (V > 1 and logits.stride(-1) != 1) else logits


@without_autocast
def losses_of(
    logits: Tensor, target: Tensor, scale: Tensor | None, loss: RowLoss, want: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses [N], and where wanted the gradient [..., V] of sum_i scale_i l_i, dense."""
    target, logits = target.reshape(-1).long().contiguous(), _with_strides(logits)
    losses = logits.new_empty(target.shape, dtype=wide_dtype(logits.dtype))
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if want else None
    first = 0
    for rows in matrices(logits):
        part = slice(first, first + len(rows))
        out = None if grad is None else grad.view(-1, grad.shape[-1])[part]
        losses[part] = loss_rows(rows, None, target[part], None if scale is None else scale[part], loss, out=out)
        first += len(rows)
    return losses, grad


@operator("cross_entropy")
def cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
    z_loss: float,
    reduction: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The loss and, `with_gradient`, that of the logits, which is empty otherwise."""
    loss = RowLoss(ignore_index, label_smoothing, softcap, logit_scale, z_loss)
    check_targets(target, logits.shape[-1], ignore_index)
    t, weight = target.reshape(-1), None if row_weight is None else row_weight.reshape(-1)
    want = with_gradient and reduction != "none"
    keep = t != ignore_index
    scale = row_factors(t.shape, keep, weight, reduction, logits) if want else None
    losses, grad = losses_of(logits, target, scale, loss, want)
    found = reduced(losses, keep, weight, reduction)
    return found.reshape(target.shape) if reduction == "none" else found, logits.new_empty(0) if grad is None else grad


@register_fake(cross_entropy_forward)
def _forward_fake(
    logits: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
    z_loss: float,
    reduction: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    shape = target.shape if reduction == "none" else ()
    want = with_gradient and reduction != "none"
    return logits.new_empty(shape, dtype=wide_dtype(logits.dtype)), logits.new_empty(logits.shape if want else 0)


@operator("cross_entropy_backward")
def cross_entropy_backward(
    logits: Tensor,
    target: Tensor,
    factor: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
    z_loss: float,
) -> Tensor:
    """The gradient of sum_i factor_i l_i."""
    loss = RowLoss(ignore_index, label_smoothing, softcap, logit_scale, z_loss)
    grad = losses_of(logits, target, factor.reshape(-1), loss, True)[1]
    assert grad is not None
    return grad


@register_fake(cross_entropy_backward)
def _backward_fake(
    logits: Tensor,
    target: Tensor,
    factor: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
    z_loss: float,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, row_weight, *ctx.loss, ctx.reduction, with_gradient = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.has_gradient = with_gradient and ctx.reduction != "none"
    ctx.save_for_backward(*((output[1],) if ctx.has_gradient else (logits, target, row_weight)))


def _backward(ctx: Any, dloss: Tensor | None, *of_gradient: Tensor | None) -> tuple[Any, ...]:
    grad: Tensor | None = None
    if dloss is not None and ctx.has_gradient:
        grad = multiplied(ctx.saved_tensors[0], dloss)
    elif dloss is not None:
        logits, target, row_weight = ctx.saved_tensors
        keep = target != ctx.loss[0]
        factor = row_factors(target.shape, keep, row_weight, ctx.reduction, logits) * dloss
        grad = cross_entropy_backward(logits, target, factor, *ctx.loss)
    return grad, *(None,) * 9


register_autograd(cross_entropy_forward, _backward, setup_context=_setup_context)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of softcap * tanh(logit_scale * logits / softcap) with `target`, in place on its gradient.

    logits [..., V], at any distances: rows of a slice are not copied, though targets that are ignored spare the
    gradient a copy that a slice costs; target [...], integers in [0, V) or `ignore_index`; row_weight [...] multiplies
    the rows' losses and takes no gradient; `z_loss` times the squared logsumexp is added to each row's loss; "mean" is
    over the targets that are not ignored, weighted or not. Returns the loss in float32 (float64 for float64), [] or,
    with reduction "none", [...]. Raises ValueError for shapes, dtypes, devices or options that do not fit, IndexError
    for a target out of range on the CPU (on CUDA the device asserts). Cannot be differentiated twice.
    Source: Hsu et al. 2024, arXiv:2410.10989.
    """
    reason = supports(logits.device.type, logits.dtype)
    if reason is not None:
        raise ValueError(reason)
    check_options("logits", logits, target, row_weight, label_smoothing, softcap, reduction)
    graded = torch.is_grad_enabled() and logits.requires_grad
    with_gradient = graded and logits.dtype != torch.float16 and not torch.compiler.is_compiling()
    return cross_entropy_forward(
        logits, target, row_weight, ignore_index, label_smoothing, softcap or 0.0, logit_scale, z_loss, reduction,
        with_gradient,
    )[0]  # fmt: skip


def check_options(
    name: str,
    x: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    label_smoothing: float,
    softcap: float | None,
    reduction: str,
) -> None:
    """Raises ValueError for what does not fit rows of x [..., *], which the message calls `name`."""
    check_rows(name, x, target, row_weight)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if softcap is not None and softcap <= 0.0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")

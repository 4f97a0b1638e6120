"""Divergence of two linear layers' softmaxes, student and teacher, without ever holding the logits of either.

    p = softmax((x W^T + b) / T)        q = softmax((x' W'^T + b') / T')        l_i = D(q_i, p_i)

Shapes: x [N, D], weight [V, D], bias [V]; teacher_x [N, D'], teacher_weight [V, D'], teacher_bias [V]; l [N]. D is one
of the divergences of `kl_div_rows`. Logits exist for a chunk of rows at a time, both layers', and the student's are
turned into their gradient in place (`linear_loss_chunks`). The teacher is a constant. With labels, the cross entropy
of the student's logits x W^T + b comes of the same chunks (`distillation_rows`).

Source: Hinton et al. 2015 (arXiv:1503.02531).
"""

import math
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fla_compile.kernels.cross_entropy import naive_cross_entropy
from fla_compile.kernels.cross_entropy_rows import wide_dtype
from fla_compile.kernels.kl_div_rows import DIVERGENCES, runs_triton
from fla_compile.kernels.linear_distillation_ops import linear_distillation_rows
from fla_compile.kernels.linear_kl_div_ops import linear_kl_div_forward
from fla_compile.kernels.loss_ops import REDUCTIONS as PLAIN_REDUCTIONS
from fla_compile.kernels.loss_ops import check_rows, reduced, refusal

__all__ = ["kernel_name", "linear_kl_div", "naive_linear_kl_div", "supports"]

REDUCTIONS = (*PLAIN_REDUCTIONS, "batchmean")


def supports(device: str, dtype: torch.dtype, teacher: torch.dtype) -> str | None:
    return refusal("linear_kl_div", device, dtype, teacher)


def kernel_name(device: str, dtype: torch.dtype, teacher: torch.dtype) -> str:
    own = "Triton" if runs_triton(device, dtype, teacher) else "torch"
    return f"chunks of rows (matrix products, {own})"


@overload
def naive_linear_kl_div(
    x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor, *, bias: Tensor | None = None,
    teacher_bias: Tensor | None = None, target: Tensor | None = None, labels: None = None,
    row_weight: Tensor | None = None, ignore_index: int = -100, temperature: float = 1.0,
    teacher_temperature: float | None = None, divergence: str = "forward_kl", beta: float = 0.5,
    reduction: str = "batchmean",
) -> Tensor: ...  # fmt: skip


@overload
def naive_linear_kl_div(
    x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor, *, bias: Tensor | None = None,
    teacher_bias: Tensor | None = None, target: Tensor | None = None, labels: Tensor,
    row_weight: Tensor | None = None, ignore_index: int = -100, temperature: float = 1.0,
    teacher_temperature: float | None = None, divergence: str = "forward_kl", beta: float = 0.5,
    reduction: str = "batchmean",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def naive_linear_kl_div(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    target: Tensor | None = None,
    labels: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    reduction: str = "batchmean",
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition, logits and all; float64 for float64 operands, else the loss is float32."""
    wide = wide_dtype(x.dtype)
    logits = F.linear(x, weight, bias).to(wide)
    z = logits / temperature
    y = F.linear(teacher_x, teacher_weight, teacher_bias).detach().to(wide)
    y = y / (temperature if teacher_temperature is None else teacher_temperature)
    logp, logq = F.log_softmax(z, -1), F.log_softmax(y, -1)
    if divergence == "forward_kl":
        losses = F.kl_div(logp, logq, reduction="none", log_target=True).sum(-1)
    elif divergence == "reverse_kl":
        losses = F.kl_div(logq, logp, reduction="none", log_target=True).sum(-1)
    elif divergence == "cross_entropy":
        losses = -(logq.exp() * logp).sum(-1)
    else:
        logm = torch.logaddexp(logq + math.log(beta), logp + math.log1p(-beta))
        of_q, of_p = (F.kl_div(logm, y, reduction="none", log_target=True).sum(-1) for y in (logq, logp))
        losses = beta * of_q + (1.0 - beta) * of_p
    count: Tensor | int = losses.numel()
    if target is not None:
        keep = target != ignore_index
        losses, count = torch.where(keep, losses, 0.0), keep.sum()
    if row_weight is not None:
        losses = losses * row_weight
    if reduction == "batchmean":
        losses = losses.sum() / x.shape[0]
    elif reduction != "none":
        losses = losses.sum() / count if reduction == "mean" else losses.sum()
    if labels is None:
        return losses
    return losses, naive_cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")


@overload
def linear_kl_div(
    x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor, *, bias: Tensor | None = None,
    teacher_bias: Tensor | None = None, target: Tensor | None = None, labels: None = None,
    row_weight: Tensor | None = None, ignore_index: int = -100, temperature: float = 1.0,
    teacher_temperature: float | None = None, divergence: str = "forward_kl", beta: float = 0.5,
    reduction: str = "batchmean",
) -> Tensor: ...  # fmt: skip


@overload
def linear_kl_div(
    x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor, *, bias: Tensor | None = None,
    teacher_bias: Tensor | None = None, target: Tensor | None = None, labels: Tensor,
    row_weight: Tensor | None = None, ignore_index: int = -100, temperature: float = 1.0,
    teacher_temperature: float | None = None, divergence: str = "forward_kl", beta: float = 0.5,
    reduction: str = "batchmean",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def linear_kl_div(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    target: Tensor | None = None,
    labels: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    reduction: str = "batchmean",
) -> Tensor | tuple[Tensor, Tensor]:
    """Divergence of a student's softmax from a teacher's, both of linear layers, logits never whole.

    x [..., D]; weight [V, D]; bias [V]; teacher_x [..., E]; teacher_weight [V, E]; teacher_bias [V]; target [...] takes
    rows out where it is `ignore_index`; row_weight [...] multiplies the rows' losses. With p the student's and q the
    teacher's softmax of logits / temperature, `divergence` is "forward_kl" KL(q, p), "reverse_kl" KL(p, q),
    "jensen_shannon" beta KL(q, m) + (1 - beta) KL(p, m) for m = beta q + (1 - beta) p, or "cross_entropy", forward_kl
    without the teacher's entropy. The customary factor temperature^2 is the caller's. "mean" is over the rows that are
    not taken out, weighted or not; "batchmean" divides by the first size of x, as `F.kl_div`, whose own "mean" divides
    by V too. Returns the loss in float32 (float64 for float64), [] or, with reduction "none", [...]. With labels [...],
    integers in [0, V) or `ignore_index`, returns a pair: the same loss, and the cross entropies [...] of the student's
    logits, at no temperature, each row's own, unweighted and 0 where the label is `ignore_index`; `target` does not
    touch these, nor the labels the divergence. Gradients go to x, weight and bias; teacher and row_weight take none.
    Raises ValueError for shapes, dtypes, devices or options that do not fit, and for a teacher that requires a
    gradient, IndexError for a label out of range on the CPU (on CUDA the device asserts). Cannot be differentiated
    twice.
    Source: Hinton et al. 2015, arXiv:1503.02531; Agarwal et al. 2024, arXiv:2306.13649.
    """
    theirs = temperature if teacher_temperature is None else teacher_temperature
    _check_layers(x, weight, bias, teacher_x, teacher_weight, teacher_bias)
    check_rows("x", x, target, row_weight)
    _check_options(temperature, theirs, divergence, beta, reduction)
    student = x.reshape(-1, x.shape[-1]), weight, bias
    teacher = teacher_x.reshape(-1, teacher_x.shape[-1]), teacher_weight, teacher_bias
    keep = None if target is None else (target != ignore_index).reshape(-1)
    weights = None if row_weight is None else row_weight.reshape(-1)
    numbers = 1.0 / temperature, 1.0 / theirs, divergence, beta
    each, hard = "sum" if reduction == "batchmean" else reduction, None
    if labels is None:
        graded = torch.is_grad_enabled()
        need = [graded and operand is not None and operand.requires_grad for operand in (x, weight, bias)]
        found = linear_kl_div_forward(*student, *teacher, keep, weights, *numbers, each, *need)[0]
    else:
        check_rows("x", x, labels, None, target_name="labels")
        losses, hard = linear_distillation_rows(
            *student, *teacher, keep, labels.reshape(-1), *numbers, ignore_index, 0.0, 1.0, 0.0
        )
        found = reduced(losses, keep, weights, each)
    if reduction == "batchmean":
        found = found / x.shape[0]
    elif reduction == "none":
        found = found.reshape(x.shape[:-1])
    return found if hard is None else (found, hard.reshape(x.shape[:-1]))


def _check_layers(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
) -> None:
    reason = supports(x.device.type, x.dtype, teacher_x.dtype)
    if reason is not None:
        raise ValueError(reason)
    if teacher_x.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"teacher_x must have the rows {list(x.shape[:-1])} of x, got {list(teacher_x.shape)}")
    for who, rows, matrix, vector in (("", x, weight, bias), ("teacher_", teacher_x, teacher_weight, teacher_bias)):
        shape, own = list(matrix.shape), f"as {who}x is {list(rows.shape)}"
        if matrix.ndim != 2 or matrix.shape[1] != rows.shape[-1]:
            raise ValueError(f"{who}weight must be [V, {rows.shape[-1]}] {own}, got {shape}")
        if vector is not None and vector.shape != matrix.shape[:1]:
            raise ValueError(f"{who}bias must be [{shape[0]}] as {who}weight is {shape}, got {list(vector.shape)}")
        for name, operand in ((f"{who}weight", matrix), (f"{who}bias", vector)):
            if operand is not None and operand.dtype != rows.dtype:
                raise ValueError(f"{name} has dtype {operand.dtype}, {who}x has {rows.dtype}")
        for name, operand in ((f"{who}x", rows), (f"{who}weight", matrix), (f"{who}bias", vector)):
            if operand is not None and operand.device != x.device:
                raise ValueError(f"{name} is on {operand.device}, x is on {x.device}")
            if who and operand is not None and operand.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{name} requires a gradient, and the teacher takes none: detach it")
    if teacher_weight.shape[0] != weight.shape[0]:
        raise ValueError(f"teacher_weight must have the {weight.shape[0]} classes of weight, got {len(teacher_weight)}")


def _check_options(temperature: float, theirs: float, divergence: str, beta: float, reduction: str) -> None:
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta must be in (0, 1), got {beta}: at its ends the mixture is one of the two")
    for name, value in (("temperature", temperature), ("teacher_temperature", theirs)):
        if value <= 0.0:
            raise ValueError(f"{name} must be positive, got {value}")

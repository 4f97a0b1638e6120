"""Cross entropy of a linear layer's output, without ever holding the logits.

    a = x W^T + b        z = c tanh(s a / c)        l_i = lse_i - (1 - e) z_it - e mean_v z_iv + w lse_i^2

Shapes: x [N, D], weight [V, D], bias [V], target [N], row_weight [N]; l [N] (`cross_entropy_rows` has its gradient).
Logits exist for a chunk of rows at a time, and are turned into their gradient in place (`linear_loss_chunks`).

Source: Wijmans et al. 2024 (arXiv:2411.09009).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fla_compile.kernels import cross_entropy
from fla_compile.kernels.linear_cross_entropy_ops import linear_cross_entropy_forward
from fla_compile.kernels.loss_ops import refusal

__all__ = ["kernel_name", "linear_cross_entropy", "naive_linear_cross_entropy", "supports"]


def supports(device: str, dtype: torch.dtype) -> str | None:
    return refusal("linear_cross_entropy", device, dtype)


def kernel_name(device: str, dtype: torch.dtype) -> str:
    own = "Triton" if device == "cuda" and dtype != torch.float64 else "torch"
    return f"chunks of rows (matrix products, {own})"


def naive_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The definition, logits and all; float64 for float64 operands, else the loss is float32."""
    return cross_entropy.naive_cross_entropy(
        F.linear(x, weight, bias), target, row_weight=row_weight, ignore_index=ignore_index,
        label_smoothing=label_smoothing, softcap=softcap, logit_scale=logit_scale, z_loss=z_loss, reduction=reduction,
    )  # fmt: skip


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of softcap * tanh(logit_scale * (x weight^T + bias) / softcap) with `target`, logits never whole.

    x [..., D]; weight [V, D]; bias [V]; target [...], integers in [0, V) or `ignore_index`; row_weight [...] multiplies
    the rows' losses and takes no gradient; `z_loss` times the squared logsumexp is added to each row's loss; "mean" is
    over the targets that are not ignored, weighted or not. Returns the loss in float32 (float64 for float64), [] or,
    with reduction "none", [...]. Raises ValueError for shapes, dtypes, devices or options that do not fit, IndexError
    for a target out of range on the CPU (on CUDA the device asserts). Cannot be differentiated twice.
    Source: Wijmans et al. 2024, arXiv:2411.09009.
    """
    _check(x, weight, target, bias, row_weight, label_smoothing, softcap, reduction)
    graded = torch.is_grad_enabled()
    need = [graded and operand is not None and operand.requires_grad for operand in (x, weight, bias)]
    found = linear_cross_entropy_forward(
        x.reshape(-1, x.shape[-1]), weight, bias, target.reshape(-1),
        None if row_weight is None else row_weight.reshape(-1),
        ignore_index, label_smoothing, softcap or 0.0, logit_scale, z_loss, reduction, *need,
    )[0]  # fmt: skip
    return found.reshape(target.shape) if reduction == "none" else found


def _check(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    row_weight: Tensor | None,
    label_smoothing: float,
    softcap: float | None,
    reduction: str,
) -> None:
    reason = supports(x.device.type, x.dtype)
    if reason is not None:
        raise ValueError(reason)
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must be [V, {x.shape[-1]}] as x is {list(x.shape)}, got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}] as weight is {list(weight.shape)}, got {list(bias.shape)}")
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand is not None and operand.dtype != x.dtype:
            raise ValueError(f"{name} has dtype {operand.dtype}, x has {x.dtype}")
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand is not None and operand.device != x.device:
            raise ValueError(f"{name} is on {operand.device}, x is on {x.device}")
    cross_entropy.check_options("x", x, target, row_weight, label_smoothing, softcap, reduction)

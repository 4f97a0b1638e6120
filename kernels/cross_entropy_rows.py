"""Cross entropy of rows of logits, with its gradient: the row-wise part of every loss here.

    z = c tanh(s (a + b) / c)                  a [n, V] the products, b [V] a bias; z = s (a + b) where c is 0
    l = lse - (1 - e) z_t - e mean(z) + w lse^2           lse = log sum_v exp(z_v), e label smoothing, w z-loss
    dl/da_v = s (1 - (z_v / c)^2) (p_v (1 + 2 w lse) - e / V - (1 - e) [v = t])               p = exp(z - lse)

A row whose target is `ignore_index` has loss 0 and gradient 0, whatever its logits are. The gradient may be written
over the products in their own dtype, so one buffer serves a chunk from its products to their gradient. Sums are float32
(float64 for float64). CUDA runs `cross_entropy_triton`.

Sources: Szegedy et al. 2015 (arXiv:1512.00567) for smoothing, Chowdhery et al. 2022 (arXiv:2204.02311) for the z-loss,
Gemma Team 2024 (arXiv:2408.00118) for the cap.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RowLoss", "loss_rows", "scale_in_place", "wide_dtype"]


@dataclass(frozen=True)
class RowLoss:
    """What is computed from a row of logits and its target."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float = 0.0
    logit_scale: float = 1.0
    z_loss: float = 0.0


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def loss_rows(
    a: Tensor, bias: Tensor | None, target: Tensor, scale: Tensor | None, loss: RowLoss, *, out: Tensor | None
) -> Tensor:
    """The losses [n] of products a [n, V]; their gradient times scale [n] goes to `out` [n, V], which may be a."""
    if runs_triton(a):
        from fla_compile.kernels.cross_entropy_triton import triton_rows

        return triton_rows(a, bias, target, scale, loss, out=out)
    return torch_rows(a, bias, target, scale, loss, out=out)


def torch_rows(
    a: Tensor, bias: Tensor | None, target: Tensor, scale: Tensor | None, loss: RowLoss, *, out: Tensor | None
) -> Tensor:
    """The same on any device, in torch operations."""
    z, smoothing = a.to(wide_dtype(a.dtype)), loss.label_smoothing
    if bias is not None:
        z = z + bias
    if loss.logit_scale != 1.0:
        z = z * loss.logit_scale
    slope = None
    if loss.softcap:
        t = torch.tanh(z / loss.softcap)
        z, slope = loss.softcap * t, 1.0 - t * t
    lse = torch.logsumexp(z, 1) if loss.z_loss else None
    logp = torch.log_softmax(z, 1)
    valid = target != loss.ignore_index
    index = torch.where(valid, target, 0).unsqueeze(1)  # [n, 1]
    losses = (smoothing - 1.0) * logp.gather(1, index).squeeze(1)
    if smoothing:
        losses = losses - smoothing * logp.mean(1)
    if lse is not None:
        losses = losses + loss.z_loss * lse * lse
    if out is not None:
        assert scale is not None
        grad = logp.exp_()
        if lse is not None:
            grad *= (1.0 + 2.0 * loss.z_loss * lse).unsqueeze(1)
        if smoothing:
            grad -= smoothing / z.shape[1]
        grad.scatter_add_(1, index, torch.full_like(index, smoothing - 1.0, dtype=grad.dtype))
        if slope is not None:
            grad *= slope
        grad *= (scale * loss.logit_scale).unsqueeze(1)
        out.copy_(grad)
        if out.device.type != "cpu" or not valid.all():
            out.masked_fill_(~valid.unsqueeze(1), 0.0)  # a product with zero would keep infinities
    return losses.masked_fill(~valid, 0.0)


def scale_in_place(x: Tensor, factor: Tensor) -> None:
    """x *= factor, a tensor of one number; on CUDA the host never reads it, and where it is 1 nothing is touched."""
    if runs_triton(x):
        from fla_compile.kernels import cross_entropy_triton

        cross_entropy_triton.scale_in_place(x, factor)
    elif x.device.type != "cpu" or factor.item() != 1.0:
        x.mul_(factor)


def runs_triton(x: Tensor) -> bool:
    return x.device.type == "cuda" and x.dtype != torch.float64

"""Divergence of two rows of logits, with its gradient: the row-wise part of the distillation losses.

    p = softmax(s (a + b))          of the student: a [n, V] products, b [V] a bias, s one over the temperature
    q = softmax(s' (a' + b'))       of the teacher, a constant
    m = w q + (1 - w) p

    forward_kl       l = KL(q, p) = sum_v q (log q - log p)    dl/da = s (p - q)
    cross_entropy    l = - sum_v q log p                       dl/da = s (p - q)
    reverse_kl       l = KL(p, q)                              dl/da = s p (log p - log q - l)
    jensen_shannon   l = w KL(q, m) + (1 - w) KL(p, m)         dl/da = s (1 - w) p (log p - log m - KL(p, m))

Logarithms are differences of logits and logsumexps. A class of probability zero adds nothing (0 log 0 = 0), and log m
is the larger of log p and log q plus a bounded term, so that nothing overflows. Rows that are not kept have loss 0 and
gradient 0, whatever their logits are. The gradient may be written over the student's products in their own dtype. Sums
are float32 (float64 for float64).

Sources: Hinton et al. 2015 (arXiv:1503.02531) for distillation, Agarwal et al. 2024 (arXiv:2306.13649) for the mixture.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fla_compile.kernels.cross_entropy_rows import wide_dtype

__all__ = ["DIVERGENCES", "Divergence", "Side", "divergence_rows", "runs_triton", "torch_rows"]

DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "cross_entropy")
AT_A_TIME = {"cpu": 1 << 17, "cuda": 1 << 24}  # logits whose float32 copies exist together


@dataclass(frozen=True)
class Divergence:
    """`beta` is the teacher's weight in the mixture; used by jensen_shannon alone."""

    kind: str = "forward_kl"
    beta: float = 0.5


@dataclass(frozen=True)
class Side:
    """Products a [n, V] of student or teacher, their bias [V] and the scale of both."""

    a: Tensor
    bias: Tensor | None
    scale: float

    def logits(self, rows: slice) -> Tensor:
        z = self.a[rows].to(wide_dtype(self.a.dtype))
        if self.bias is not None:
            z = z + self.bias
        return z if self.scale == 1.0 else z * self.scale


def divergence_rows(
    student: Side, teacher: Side, keep: Tensor | None, scale: Tensor | None, loss: Divergence, *, out: Tensor | None
) -> Tensor:
    """The losses [n]; their gradient times scale [n] goes to `out` [n, V], which may be the student's products."""
    if runs_triton(student.a.device.type, student.a.dtype, teacher.a.dtype):
        from fla_compile.kernels.kl_div_triton import triton_rows

        return triton_rows(student, teacher, keep, scale, loss, out=out)
    return torch_rows(student, teacher, keep, scale, loss, out=out)


def runs_triton(device: str, *dtypes: torch.dtype) -> bool:
    return device == "cuda" and torch.float64 not in dtypes


def torch_rows(
    student: Side, teacher: Side, keep: Tensor | None, scale: Tensor | None, loss: Divergence, *, out: Tensor | None
) -> Tensor:
    """The same on any device, in torch operations on a few rows at a time."""
    n, V = student.a.shape
    losses = student.a.new_empty(n, dtype=wide_dtype(student.a.dtype))
    step = max(1, AT_A_TIME[student.a.device.type] // V)
    for first in range(0, n, step):
        rows = slice(first, first + step)
        logp, logq = (torch.log_softmax(side.logits(rows), 1) for side in (student, teacher))
        losses[rows], grad = _divergence(logp, logq, loss, graded=out is not None)
        if grad is not None:
            assert out is not None and scale is not None
            grad *= (scale[rows] * student.scale).unsqueeze(1)
            if keep is not None:  # a product with zero would keep infinities
                grad = grad.masked_fill_(~keep[rows].unsqueeze(1), 0.0)
            out[rows] = grad
    return losses if keep is None else losses.masked_fill_(~keep, 0.0)


def _divergence(logp: Tensor, logq: Tensor, loss: Divergence, *, graded: bool) -> tuple[Tensor, Tensor | None]:
    """Losses [n] and dl/dz [n, V] from log probabilities; writes over `logq` or `logp` where it can."""
    if loss.kind in ("forward_kl", "cross_entropy"):
        q = logq.exp()
        terms = q * (logq.sub_(logp) if loss.kind == "forward_kl" else -logp)
        return _sum_where(q, terms), logp.exp_().sub_(q) if graded else None
    p = logp.exp()
    if loss.kind == "reverse_kl":
        terms = p * logp.sub_(logq)
        losses = _sum_where(p, terms)
        return losses, terms.addcmul_(p, losses.unsqueeze(1), value=-1.0) if graded else None
    q, d = logq.exp(), logq.sub_(logp)
    below_p = d.clamp(max=0.0)  # log q and log p under the larger of both, and log m less that
    below_q = below_p - d
    m = below_p.exp().mul_(loss.beta).add_(below_q.exp(), alpha=1.0 - loss.beta).log_()
    at_q, at_p = q * below_p.sub_(m), p * below_q.sub_(m)
    of_q, of_p = _sum_where(q, at_q), _sum_where(p, at_p)
    grad = at_p.addcmul_(p, of_p.unsqueeze(1), value=-1.0).mul_(1.0 - loss.beta) if graded else None
    return loss.beta * of_q + (1.0 - loss.beta) * of_p, grad


def _sum_where(probability: Tensor, terms: Tensor) -> Tensor:
    """Sums over classes, in place without those of probability zero, which are zero or no number."""
    if terms.device.type == "cpu":
        found = terms.sum(1)
        if not found.isnan().any():
            return found
    return terms.masked_fill_(probability == 0.0, 0.0).sum(1)

"""Divergence and cross entropy of the same rows as one Triton kernel; `distillation_rows` has the mathematics.

As `kl_div_triton` for long rows: once over a row for the three logsumexps, once for the loss, and where the gradient
needs the divergence (all but forward_kl and cross_entropy) once more; every other time backwards, when most of a row is
still in the L2 cache.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_compile.kernels import kl_div_triton
from fla_compile.kernels.cross_entropy_rows import RowLoss
from fla_compile.kernels.cross_entropy_triton import load_logits, logit_gradient, row_loss
from fla_compile.kernels.kl_div_rows import Divergence, Side
from fla_compile.kernels.kl_div_triton import gradient, joined, loss_of, one_more, terms
from fla_compile.kernels.launch import Launch, layout, remember


@triton.jit
def load_three(
    p_a, p_bias, p_b, p_their_bias, o_v, m_v, scale, their_scale, hard_scale,
    HAS_BIAS: tl.constexpr, HAS_THEIR_BIAS: tl.constexpr,
):  # fmt: skip
    """Logits of the student and of the teacher at their temperatures, and of the student for its labels."""
    b_a = load_logits(p_a, p_bias, o_v, m_v, 1.0, 0.0, HAS_BIAS, False)
    b_y = load_logits(p_b, p_their_bias, o_v, m_v, their_scale, 0.0, HAS_THEIR_BIAS, False)
    none = float("-inf")
    return tl.where(m_v, b_a * scale, none), tl.where(m_v, b_y, none), tl.where(m_v, b_a * hard_scale, none)


@triton.jit(do_not_specialize=["ignore_index"])
def distillation_rows_kernel(
    p_a, p_bias, p_b, p_their_bias, p_keep, p_target, p_factors, p_loss, p_hard, p_out,
    stride_a, stride_b, stride_out, V, ignore_index, scale, their_scale, beta, hard_scale, smoothing, z_loss,
    BLOCK: tl.constexpr, KIND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_THEIR_BIAS: tl.constexpr,
    HAS_KEEP: tl.constexpr, SMOOTHED: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """One program a row. `p_out` may be `p_a`: a number is read for the last time before the same thread writes its
    gradient there, and the label's logit before any sum over the row, which all threads wait for."""
    DIRECT: tl.constexpr = KIND == "forward_kl" or KIND == "cross_entropy"  # the gradient without the loss
    i_row = tl.program_id(0).to(tl.int64)
    p_a += i_row * stride_a
    p_b += i_row * stride_b
    p_out += i_row * stride_out
    i_t = tl.load(p_target + i_row)
    counts = i_t != ignore_index
    kept = i_t == i_t  # every row, unless a mask says otherwise
    if HAS_KEEP:
        kept = tl.load(p_keep + i_row) != 0
    if not (kept or counts):
        tl.store(p_loss + i_row, 0.0)
        tl.store(p_hard + i_row, 0.0)
        if STORE:
            for i in range(0, V, BLOCK):
                o_v = i + tl.arange(0, BLOCK)
                tl.store(p_out + o_v, tl.zeros((BLOCK,), p_out.dtype.element_ty), mask=o_v < V)
    else:
        factor, hard_factor = 0.0, 0.0
        if STORE:
            factor = tl.load(p_factors + 2 * i_row).to(tl.float32) * scale
            hard_factor = tl.load(p_factors + 2 * i_row + 1).to(tl.float32)
        h_t = load_logits(p_a, p_bias, i_t, (i_t >= 0) & (i_t < V), hard_scale, 0.0, HAS_BIAS, False)
        # Each thread keeps maxima and sums of its own: none waits for another before the row is read.
        b_top_p = tl.full((BLOCK,), float("-inf"), tl.float32)
        b_top_q = tl.full((BLOCK,), float("-inf"), tl.float32)
        b_top_h = tl.full((BLOCK,), float("-inf"), tl.float32)
        b_sum_p, b_sum_q = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        b_sum_h, b_total = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for i in range(0, V, BLOCK):
            o_v = i + tl.arange(0, BLOCK)
            b_z, b_y, b_h = load_three(
                p_a, p_bias, p_b, p_their_bias, o_v, o_v < V, scale, their_scale, hard_scale, HAS_BIAS, HAS_THEIR_BIAS
            )
            b_top_p, b_sum_p = one_more(b_z, b_top_p, b_sum_p)
            b_top_q, b_sum_q = one_more(b_y, b_top_q, b_sum_q)
            b_top_h, b_sum_h = one_more(b_h, b_top_h, b_sum_h)
            if SMOOTHED:
                b_total += tl.where(o_v < V, b_h, 0.0)
        top_p, rest_p = joined(b_top_p, b_sum_p)
        top_q, rest_q = joined(b_top_q, b_sum_q)
        top_h, rest_h = joined(b_top_h, b_sum_h)
        lse = top_h + rest_h
        hard = row_loss(lse, h_t, tl.sum(b_total, 0), V, smoothing, z_loss)
        tl.store(p_hard + i_row, tl.where(counts, hard, 0.0))
        b_of_q, b_of_p = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for i in range(tl.cdiv(V, BLOCK) - 1, -1, -1):
            o_v = i * BLOCK + tl.arange(0, BLOCK)
            m_v = o_v < V
            b_z, b_y, b_h = load_three(
                p_a, p_bias, p_b, p_their_bias, o_v, m_v, scale, their_scale, hard_scale, HAS_BIAS, HAS_THEIR_BIAS
            )
            b_p, b_q, b_at_q, b_at_p = terms(b_z - top_p - rest_p, b_y - top_q - rest_q, beta, KIND)
            b_of_q += b_at_q
            b_of_p += b_at_p
            if STORE and DIRECT:
                b_s = gradient(b_p, b_q, b_at_p, 0.0, factor, beta, KIND)
                b_g = logit_gradient(b_h, o_v, i_t, lse, hard_factor, V, hard_scale, 0.0, smoothing, z_loss, False)
                b_g = tl.where(kept, b_s, 0.0) + tl.where(counts, b_g, 0.0)
                tl.store(p_out + o_v, b_g.to(p_out.dtype.element_ty), mask=m_v)
        of_q, of_p = tl.sum(b_of_q, 0), tl.sum(b_of_p, 0)
        tl.store(p_loss + i_row, tl.where(kept, loss_of(of_q, of_p, beta, KIND), 0.0))
        if STORE and not DIRECT:
            for i in range(0, V, BLOCK):
                o_v = i + tl.arange(0, BLOCK)
                m_v = o_v < V
                b_z, b_y, b_h = load_three(
                    p_a, p_bias, p_b, p_their_bias, o_v, m_v, scale, their_scale, hard_scale, HAS_BIAS, HAS_THEIR_BIAS
                )
                b_p, b_q, b_at_q, b_at_p = terms(b_z - top_p - rest_p, b_y - top_q - rest_q, beta, KIND)
                b_s = gradient(b_p, b_q, b_at_p, of_p, factor, beta, KIND)
                b_g = logit_gradient(b_h, o_v, i_t, lse, hard_factor, V, hard_scale, 0.0, smoothing, z_loss, False)
                b_g = tl.where(kept, b_s, 0.0) + tl.where(counts, b_g, 0.0)
                tl.store(p_out + o_v, b_g.to(p_out.dtype.element_ty), mask=m_v)


def block_of(V: int) -> tuple[int, int]:
    """Logits of each side at a time, and warps: as for the divergence alone, but no single warp, which spills."""
    return kl_div_triton.block_of(max(512, V))


_launches: dict[tuple[Any, ...], Launch] = {}


def triton_rows(
    student: Side,
    teacher: Side,
    keep: Tensor | None,
    target: Tensor,
    factors: Tensor | None,
    loss: Divergence,
    hard: RowLoss,
    *,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    a, b = student.a, teacher.a
    losses, hards = (torch.empty(len(a), dtype=torch.float32, device=a.device) for _ in range(2))
    if len(a):
        written = a if out is None else out
        operands = a, student.bias, b, teacher.bias, keep, target, factors
        key = (*map(layout, operands), layout(written), student.scale, teacher.scale, loss, hard, out is None)
        launch = _launches.get(key)
        if launch is None:
            launch = _launch_rows(student, teacher, keep, written, loss, hard, store=out is not None)
            remember(_launches, key, launch)
        launch(*operands, losses, hards, written)
    return losses, hards


def _launch_rows(
    student: Side, teacher: Side, keep: Tensor | None, written: Tensor, loss: Divergence, hard: RowLoss, *, store: bool
) -> Launch:
    n, V = student.a.shape
    block, warps = block_of(V)
    numbers = (
        student.a.stride(0), teacher.a.stride(0), written.stride(0), V, hard.ignore_index, student.scale, teacher.scale,
        loss.beta, hard.logit_scale, hard.label_smoothing, hard.z_loss,
        block, loss.kind, student.bias is not None, teacher.bias is not None, keep is not None,
        hard.label_smoothing != 0.0, store,
    )  # fmt: skip
    return Launch(distillation_rows_kernel, student.a.device, (n,), numbers, num_warps=warps)

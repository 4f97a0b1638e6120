"""The row-wise part of the distillation losses as Triton kernels; `kl_div_rows` has the mathematics.

One program a row. Rows of up to WHOLE logits are read once and kept in registers. Longer ones are read once for both
logsumexps, once for the loss, and where the gradient needs the loss (all but forward_kl and cross_entropy) once more;
every other time backwards, when most of a row is still in the L2 cache.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_compile.kernels.cross_entropy_triton import load_logits
from fla_compile.kernels.kl_div_rows import Divergence, Side
from fla_compile.kernels.launch import Launch, layout, remember

WHOLE = 2048  # 8 numbers of each side in each of 256 threads


@triton.jit
def load_both(
    p_a, p_bias, p_b, p_their_bias, o_v, m_v, scale, their_scale, HAS_BIAS: tl.constexpr, HAS_THEIR_BIAS: tl.constexpr
):
    b_z = load_logits(p_a, p_bias, o_v, m_v, scale, 0.0, HAS_BIAS, False)
    b_y = load_logits(p_b, p_their_bias, o_v, m_v, their_scale, 0.0, HAS_THEIR_BIAS, False)
    return tl.where(m_v, b_z, float("-inf")), tl.where(m_v, b_y, float("-inf"))


@triton.jit
def one_more(b_z, b_top, b_sum):
    """Each thread's maximum and sum of exponentials with one more logit."""
    b_e = tl.where(b_z == b_top, 1.0, tl.exp(-tl.abs(b_z - b_top)))  # -inf less -inf is no number
    return tl.maximum(b_top, b_z), tl.where(b_z > b_top, b_sum * b_e + 1.0, b_sum + b_e)


@triton.jit
def joined(b_top, b_sum):
    """A logsumexp in two parts, which are taken off one by one: their sum would round a small log probability."""
    top = tl.max(b_top, 0)
    return top, tl.log(tl.sum(b_sum * tl.where(b_top == top, 1.0, tl.exp(b_top - top)), 0))


@triton.jit
def terms(b_lp, b_lq, beta, KIND: tl.constexpr):
    """What the teacher's side adds to the loss and what the student's does, class by class."""
    b_p, b_q = tl.exp(b_lp), tl.exp(b_lq)
    b_d = b_lq - b_lp
    b_at_q, b_at_p = tl.zeros_like(b_lp), tl.zeros_like(b_lp)
    if KIND == "forward_kl":
        b_at_q = b_q * b_d
    elif KIND == "cross_entropy":
        b_at_q = -b_q * b_lp
    elif KIND == "reverse_kl":
        b_at_p = -b_p * b_d
    else:
        b_near = tl.log(1.0 + tl.where(b_d > 0.0, 1.0 - beta, beta) * (tl.exp(-tl.abs(b_d)) - 1.0))
        b_at_q = b_q * (tl.where(b_d > 0.0, 0.0, b_d) - b_near)
        b_at_p = b_p * (tl.where(b_d > 0.0, -b_d, 0.0) - b_near)
    return b_p, b_q, tl.where(b_q == 0.0, 0.0, b_at_q), tl.where(b_p == 0.0, 0.0, b_at_p)


@triton.jit
def loss_of(of_q, of_p, beta, KIND: tl.constexpr):
    if KIND == "jensen_shannon":
        return beta * of_q + (1.0 - beta) * of_p
    else:
        return of_q + of_p


@triton.jit
def gradient(b_p, b_q, b_at_p, of_p, factor, beta, KIND: tl.constexpr):
    if KIND == "forward_kl" or KIND == "cross_entropy":
        return factor * (b_p - b_q)
    elif KIND == "reverse_kl":
        return factor * (b_at_p - b_p * of_p)
    else:
        return factor * (1.0 - beta) * (b_at_p - b_p * of_p)


@triton.jit
def divergence_rows_kernel(
    p_a, p_bias, p_b, p_their_bias, p_keep, p_factor, p_loss, p_out, stride_a, stride_b, stride_out, stride_factor, V,
    scale, their_scale, beta,
    BLOCK: tl.constexpr, IS_WHOLE: tl.constexpr, KIND: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_THEIR_BIAS: tl.constexpr, HAS_KEEP: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """One program a row. `p_out` may be `p_a`: a number is read for the last time before the same thread writes its
    gradient there."""
    DIRECT: tl.constexpr = KIND == "forward_kl" or KIND == "cross_entropy"  # the gradient without the loss
    i_row = tl.program_id(0).to(tl.int64)
    p_a += i_row * stride_a
    p_b += i_row * stride_b
    p_out += i_row * stride_out
    kept = True
    if HAS_KEEP:
        kept = tl.load(p_keep + i_row) != 0
    if not kept:
        tl.store(p_loss + i_row, 0.0)
        if STORE:
            for i in range(0, V, BLOCK):
                o_v = i + tl.arange(0, BLOCK)
                tl.store(p_out + o_v, tl.zeros((BLOCK,), p_out.dtype.element_ty), mask=o_v < V)
    else:
        factor = 0.0
        if STORE:
            factor = tl.load(p_factor + i_row * stride_factor).to(tl.float32) * scale
        if IS_WHOLE:
            o_v = tl.arange(0, BLOCK)
            m_v = o_v < V
            b_z, b_y = load_both(p_a, p_bias, p_b, p_their_bias, o_v, m_v, scale, their_scale, HAS_BIAS, HAS_THEIR_BIAS)
            top_p, top_q = tl.max(b_z, 0), tl.max(b_y, 0)
            rest_p, rest_q = tl.log(tl.sum(tl.exp(b_z - top_p), 0)), tl.log(tl.sum(tl.exp(b_y - top_q), 0))
            b_p, b_q, b_at_q, b_at_p = terms(b_z - top_p - rest_p, b_y - top_q - rest_q, beta, KIND)
            of_q, of_p = tl.sum(b_at_q, 0), tl.sum(b_at_p, 0)
            tl.store(p_loss + i_row, loss_of(of_q, of_p, beta, KIND))
            if STORE:
                b_g = gradient(b_p, b_q, b_at_p, of_p, factor, beta, KIND)
                tl.store(p_out + o_v, b_g.to(p_out.dtype.element_ty), mask=m_v)
        else:
            # Each thread keeps maxima and sums of its own: none waits for another before the row is read.
            b_top_p = tl.full((BLOCK,), float("-inf"), tl.float32)
            b_top_q = tl.full((BLOCK,), float("-inf"), tl.float32)
            b_sum_p, b_sum_q = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
            for i in range(0, V, BLOCK):
                o_v = i + tl.arange(0, BLOCK)
                b_z, b_y = load_both(
                    p_a, p_bias, p_b, p_their_bias, o_v, o_v < V, scale, their_scale, HAS_BIAS, HAS_THEIR_BIAS
                )
                b_top_p, b_sum_p = one_more(b_z, b_top_p, b_sum_p)
                b_top_q, b_sum_q = one_more(b_y, b_top_q, b_sum_q)
            top_p, rest_p = joined(b_top_p, b_sum_p)
            top_q, rest_q = joined(b_top_q, b_sum_q)
            b_of_q, b_of_p = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
            for i in range(tl.cdiv(V, BLOCK) - 1, -1, -1):
                o_v = i * BLOCK + tl.arange(0, BLOCK)
                m_v = o_v < V
                b_z, b_y = load_both(
                    p_a, p_bias, p_b, p_their_bias, o_v, m_v, scale, their_scale, HAS_BIAS, HAS_THEIR_BIAS
                )
                b_p, b_q, b_at_q, b_at_p = terms(b_z - top_p - rest_p, b_y - top_q - rest_q, beta, KIND)
                b_of_q += b_at_q
                b_of_p += b_at_p
                if STORE and DIRECT:
                    b_g = gradient(b_p, b_q, b_at_p, 0.0, factor, beta, KIND)
                    tl.store(p_out + o_v, b_g.to(p_out.dtype.element_ty), mask=m_v)
            of_q, of_p = tl.sum(b_of_q, 0), tl.sum(b_of_p, 0)
            tl.store(p_loss + i_row, loss_of(of_q, of_p, beta, KIND))
            if STORE and not DIRECT:
                for i in range(0, V, BLOCK):
                    o_v = i + tl.arange(0, BLOCK)
                    m_v = o_v < V
                    b_z, b_y = load_both(
                        p_a, p_bias, p_b, p_their_bias, o_v, m_v, scale, their_scale, HAS_BIAS, HAS_THEIR_BIAS
                    )
                    b_p, b_q, b_at_q, b_at_p = terms(b_z - top_p - rest_p, b_y - top_q - rest_q, beta, KIND)
                    b_g = gradient(b_p, b_q, b_at_p, of_p, factor, beta, KIND)
                    tl.store(p_out + o_v, b_g.to(p_out.dtype.element_ty), mask=m_v)


def block_of(V: int) -> tuple[int, int]:
    """Logits of each side that a program holds at a time, and its warps: 8 in a thread, which spills nothing."""
    block = 2 * WHOLE if V > WHOLE else max(256, triton.next_power_of_2(V))
    return block, block // 256


_launches: dict[tuple[Any, ...], Launch] = {}


def triton_rows(
    student: Side, teacher: Side, keep: Tensor | None, scale: Tensor | None, loss: Divergence, *, out: Tensor | None
) -> Tensor:
    a, b = student.a, teacher.a
    losses = torch.empty(len(a), dtype=torch.float32, device=a.device)
    if len(a):
        written = a if out is None else out
        operands = a, student.bias, b, teacher.bias, keep, scale
        key = (*map(layout, operands), layout(written), student.scale, teacher.scale, loss, out is None)
        launch = _launches.get(key)
        if launch is None:
            launch = _launch_rows(student, teacher, keep, scale, written, loss, store=out is not None)
            remember(_launches, key, launch)
        launch(*operands, losses, written)
    return losses


def _launch_rows(
    student: Side, teacher: Side, keep: Tensor | None, scale: Tensor | None, written: Tensor, loss: Divergence,
    *, store: bool,
) -> Launch:  # fmt: skip
    n, V = student.a.shape
    block, warps = block_of(V)
    numbers = (
        student.a.stride(0), teacher.a.stride(0), written.stride(0), 0 if scale is None else scale.stride(0), V,
        student.scale, teacher.scale, loss.beta,
        block, V <= min(block, WHOLE), loss.kind, student.bias is not None, teacher.bias is not None,
        keep is not None, store,
    )  # fmt: skip
    return Launch(divergence_rows_kernel, student.a.device, (n,), numbers, num_warps=warps)

"""The row-wise part of the losses as Triton kernels; `cross_entropy_rows` has the mathematics.

One program a row. Rows of up to WHOLE logits are read once and kept in registers; longer ones are read twice, the
second time backwards, when most of a row is still in the L2 cache.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_compile.kernels.cross_entropy_rows import RowLoss
from fla_compile.kernels.launch import Launch, layout, remember

WHOLE = 4096  # 16 numbers in each of 256 threads
MIDDLE = 65536  # a processor has 2048 threads: two rows at work of up to this length, one beyond it, all in 40 MB of L2


@triton.jit
def capped(b_z, softcap):
    """tanh(z / softcap); near 0 by its series, where the difference would cancel."""
    b_u = b_z / softcap
    b_s = b_u * b_u
    b_series = b_u * (1.0 - b_s * (0.3333333333333333 - b_s * (0.13333333333333333 - b_s * 0.05396825396825397)))
    return tl.where(tl.abs(b_u) < 0.1, b_series, 2.0 * tl.sigmoid(2.0 * b_u) - 1.0)


@triton.jit
def load_logits(
    p_a, p_bias, o_v, m_v, logit_scale, softcap, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr
):  # fmt: skip
    b_z = tl.load(p_a + o_v, mask=m_v, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b_z += tl.load(p_bias + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_z *= logit_scale
    if SOFTCAP:
        b_z = softcap * capped(b_z, softcap)
    return b_z


@triton.jit
def logit_gradient(
    b_z, o_v, i_t, lse, scale, V, logit_scale, softcap, smoothing, z_loss, SOFTCAP: tl.constexpr
):  # fmt: skip
    b_g = tl.exp(b_z - lse) * (1.0 + 2.0 * z_loss * lse) - smoothing / V
    b_g = tl.where(o_v == i_t, b_g - (1.0 - smoothing), b_g)
    if SOFTCAP:
        b_t = b_z / softcap
        b_g *= 1.0 - b_t * b_t
    return b_g * (scale * logit_scale)


@triton.jit
def row_loss(lse, z_t, total, V, smoothing, z_loss):
    return lse - (1.0 - smoothing) * z_t - smoothing * (total / V) + z_loss * lse * lse


@triton.jit(do_not_specialize=["ignore_index"])
def loss_rows_kernel(
    p_a, p_bias, p_target, p_scale, p_loss, p_out, stride_a, stride_out, stride_scale, V, ignore_index,
    logit_scale, softcap, smoothing, z_loss,
    BLOCK: tl.constexpr, IS_WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    SMOOTHED: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """One program a row. `p_out` may be `p_a`: a number is read before the same thread writes its gradient there,
    and the target's logit before any sum over the row, which all threads wait for."""
    i_row = tl.program_id(0).to(tl.int64)
    p_a += i_row * stride_a
    i_t = tl.load(p_target + i_row)
    if i_t == ignore_index:
        tl.store(p_loss + i_row, 0.0)
        if STORE:
            for i in range(0, V, BLOCK):
                o_v = i + tl.arange(0, BLOCK)
                tl.store(p_out + i_row * stride_out + o_v, tl.zeros((BLOCK,), p_out.dtype.element_ty), mask=o_v < V)
    else:
        m_t = (i_t >= 0) & (i_t < V)
        z_t = load_logits(p_a, p_bias, i_t, m_t, logit_scale, softcap, HAS_BIAS, SOFTCAP)
        if IS_WHOLE:
            o_v = tl.arange(0, BLOCK)
            m_v = o_v < V
            b_z = load_logits(p_a, p_bias, o_v, m_v, logit_scale, softcap, HAS_BIAS, SOFTCAP)
            total = 0.0
            if SMOOTHED:
                total = tl.sum(tl.where(m_v, b_z, 0.0), 0)
            b_z = tl.where(m_v, b_z, float("-inf"))
            top = tl.max(b_z, 0)
            lse = top + tl.log(tl.sum(tl.exp(b_z - top), 0))
            tl.store(p_loss + i_row, row_loss(lse, z_t, total, V, smoothing, z_loss))
            if STORE:
                scale = tl.load(p_scale + i_row * stride_scale).to(tl.float32)
                b_g = logit_gradient(
                    b_z, o_v, i_t, lse, scale, V, logit_scale, softcap, smoothing, z_loss, SOFTCAP
                )  # fmt: skip
                tl.store(p_out + i_row * stride_out + o_v, b_g.to(p_out.dtype.element_ty), mask=m_v)
        else:
            # Each thread keeps maxima and sums of its own: none waits for another before the row is read.
            b_top = tl.full((BLOCK,), float("-inf"), tl.float32)
            b_sum = tl.zeros((BLOCK,), tl.float32)
            b_total = tl.zeros((BLOCK,), tl.float32)
            for i in range(0, V, BLOCK):
                o_v = i + tl.arange(0, BLOCK)
                m_v = o_v < V
                b_z = load_logits(p_a, p_bias, o_v, m_v, logit_scale, softcap, HAS_BIAS, SOFTCAP)
                if SMOOTHED:
                    b_total += tl.where(m_v, b_z, 0.0)
                b_z = tl.where(m_v, b_z, float("-inf"))
                b_e = tl.where(b_z == b_top, 1.0, tl.exp(-tl.abs(b_z - b_top)))  # -inf less -inf is no number
                b_sum = tl.where(b_z > b_top, b_sum * b_e + 1.0, b_sum + b_e)
                b_top = tl.maximum(b_top, b_z)
            top = tl.max(b_top, 0)
            b_sum *= tl.where(b_top == top, 1.0, tl.exp(b_top - top))
            lse = top + tl.log(tl.sum(b_sum, 0))
            tl.store(p_loss + i_row, row_loss(lse, z_t, tl.sum(b_total, 0), V, smoothing, z_loss))
            if STORE:
                scale = tl.load(p_scale + i_row * stride_scale).to(tl.float32)
                for i in range(tl.cdiv(V, BLOCK) - 1, -1, -1):
                    o_v = i * BLOCK + tl.arange(0, BLOCK)
                    m_v = o_v < V
                    b_z = load_logits(p_a, p_bias, o_v, m_v, logit_scale, softcap, HAS_BIAS, SOFTCAP)
                    b_g = logit_gradient(
                        b_z, o_v, i_t, lse, scale, V, logit_scale, softcap, smoothing, z_loss, SOFTCAP
                    )  # fmt: skip
                    tl.store(p_out + i_row * stride_out + o_v, b_g.to(p_out.dtype.element_ty), mask=m_v)


@triton.jit(do_not_specialize=["numel"])
def scale_kernel(p_x, p_factor, numel, BLOCK: tl.constexpr):
    """x *= factor in place; where the factor is 1 nothing is read."""
    factor = tl.load(p_factor).to(tl.float32)
    if factor != 1.0:
        i_first, step = tl.program_id(0).to(tl.int64) * BLOCK, tl.num_programs(0).to(tl.int64) * BLOCK
        for i in range(i_first, numel, step):
            o_x = i + tl.arange(0, BLOCK)
            m_x = o_x < numel
            b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32) * factor
            tl.store(p_x + o_x, b_x.to(p_x.dtype.element_ty), mask=m_x)


def block_of(V: int) -> tuple[int, int]:
    """Logits a program holds at a time, and its warps."""
    if V > WHOLE:
        warps = 16 if V <= MIDDLE else 32
        return 256 * warps, warps
    block = max(128, triton.next_power_of_2(V))
    return block, max(1, block // 512)


_launches: dict[tuple[Any, ...], Launch] = {}


def triton_rows(
    a: Tensor, bias: Tensor | None, target: Tensor, scale: Tensor | None, loss: RowLoss, *, out: Tensor | None
) -> Tensor:
    losses = torch.empty(len(a), dtype=torch.float32, device=a.device)
    if len(a):
        written = a if out is None else out
        key = (layout(a), layout(bias), layout(target), layout(scale), layout(written), loss, out is None)
        launch = _launches.get(key)
        if launch is None:
            launch = remember(_launches, key, _launch_rows(a, bias, scale, written, loss, store=out is not None))
        launch(a, bias, target, scale, losses, written)
    return losses


def _launch_rows(
    a: Tensor, bias: Tensor | None, scale: Tensor | None, written: Tensor, loss: RowLoss, *, store: bool
) -> Launch:
    n, V = a.shape
    block, warps = block_of(V)
    numbers = (
        a.stride(0), written.stride(0), 0 if scale is None else scale.stride(0), V, loss.ignore_index,
        loss.logit_scale, loss.softcap, loss.label_smoothing, loss.z_loss,
        block, V <= block, bias is not None, loss.softcap != 0.0, loss.label_smoothing != 0.0, store,
    )  # fmt: skip
    return Launch(loss_rows_kernel, a.device, (n,), numbers, num_warps=warps)


def scale_in_place(x: Tensor, factor: Tensor) -> None:
    """x *= factor, a tensor of one number that the host never reads; x is contiguous."""
    programs = min(2048, triton.cdiv(x.numel(), 4096))
    if programs:
        key = layout(x), layout(factor)
        launch = _launches.get(key)
        if launch is None:
            launch = Launch(scale_kernel, x.device, (programs,), (x.numel(), 4096), num_warps=8)
            remember(_launches, key, launch)
        launch(x, factor)

"""The gradient of a decay over keys, or of one a row, in chunks with a step that grows, for the split launch.

With P, dq', dk', S and D as in `decay_triton_grads`, for each channel

    dg_t = sum_v D exp(c_last) S + sum_{i >= t} q_i dq'_i + sum_{j < t} k_j dk'_j
         + scale * sum_{j < t <= i} q_i P_ij exp(c_i - c_j) k_j

Sums over the pairs from t on, taken from one another, cost nothing of this where no pair grows; where one grew by e^x
they leave 2^-24 e^x, however small dg_t. So where a decay is above one the pairs across t are added up by themselves,
under a decay over keys a column at a time.
"""

import torch
import triton
import triton.language as tl

from fla_compile.kernels.decay_scan_sums import sums_before
from fla_compile.kernels.decay_triton_common import (
    ROW_DECAY,
    SplitPlan,
    as_decay,
    chunk_program,
    launch_split,
    load_columns,
    load_rows,
    row_decay,
    store_rows,
)

__all__ = [
    "GROWTH",
    "chunk_grown_decay_grad_kernel",
    "chunk_grown_row_grad_kernel",
    "launch_grown_decay_grads",
    "launch_grown_row_grads",
    "pairs_across",
]

# 64 steps below it grow by less than e^2.
GROWTH = tl.constexpr(2.0 / 64)


@triton.jit(do_not_specialize=["T", "H"])
def chunk_grown_decay_grad_kernel(
    p_q, p_k, p_g, p_p, p_h, p_dh, p_dqs, p_dks, p_dg, scale, T, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    RQ: tl.constexpr, RK: tl.constexpr, RG: tl.constexpr,
):  # fmt: skip
    """Writes p_dg again where a step of the chunk grows; one program per (b, h, chunk, K block). dq' comes before the
    scale."""
    i_k, i_bt, _, t_0, i_row = chunk_program(T, H, C, K, BK)
    o_c = tl.arange(0, C)
    o_k = i_k * BK + tl.arange(0, BK)
    m_c = t_0 + o_c < T
    m_k = o_k < K
    b_g = as_decay(load_rows(p_g + i_row // RG * K, o_c * (H // RG), o_k, m_c, K))
    if tl.max(b_g) <= GROWTH:
        return
    p_h += i_bt.to(tl.int64) * (K * V)
    p_dh += i_bt.to(tl.int64) * (K * V)
    b_all = tl.exp(tl.sum(b_g, 0))
    b_ds = tl.zeros((BK,), tl.float32)
    for i_v in range(tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        b_st = load_columns(p_h, o_k, o_v, m_k, V).to(tl.float32)
        b_ds += tl.sum((b_st * b_all[None, :]) * load_columns(p_dh, o_k, o_v, m_k, V).to(tl.float32), 0)
    b_dk = load_rows(p_dks + i_row * K, o_c * H, o_k, m_c, K)
    b_dg = b_ds[None, :] + sums_before(load_rows(p_k + i_row // RK * K, o_c * (H // RK), o_k, m_c, K) * b_dk, 0)
    b_q = load_rows(p_q + i_row // RQ * K, o_c * (H // RQ), o_k, m_c, K) * scale
    b_dg += tl.cumsum(b_q * load_rows(p_dqs + i_row * K, o_c * H, o_k, m_c, K), 0, reverse=True)
    b_e = tl.zeros((C, BK), tl.float32)
    n_j = tl.minimum(T - t_0, C)
    for i_j in range(1, n_j):
        j = n_j - 1 - i_j
        b_gj = as_decay(tl.load(p_g + (i_row // RG + (j + 1) * (H // RG)) * K + o_k, mask=m_k, other=0.0))
        b_kj = tl.load(p_k + (i_row // RK + j * (H // RK)) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_pj = tl.load(p_p + (i_row + o_c * H) * C + j, mask=m_c & (o_c > j), other=0.0).to(tl.float32)
        b_e += tl.where((o_c > j)[:, None], b_gj[None, :], 0.0)
        b_w = b_q * b_pj[:, None] * tl.exp(b_e) * b_kj[None, :]
        b_dg += tl.where((o_c > j)[:, None], tl.cumsum(b_w, 0, reverse=True), 0.0)
    store_rows(p_dg + i_row * K, b_dg, o_c * H, o_k, m_c, K)


@triton.jit
def pairs_across(b_w, b_hi, b_lo, o_c):
    """sum_{j < t <= i} w_ij e^{c_i - c_j} [C], of c in the two parts of `row_decay`."""
    m_w = o_c[:, None] > o_c[None, :]
    b_e = (b_hi[:, None] - b_hi[None, :]) + (b_lo[:, None] - b_lo[None, :])
    b_w = tl.where(m_w, b_w * tl.exp(tl.where(m_w, b_e, 0.0)), 0.0)
    return tl.sum(tl.where(m_w, tl.cumsum(b_w, 0, reverse=True), 0.0), 1)


@triton.jit(do_not_specialize=["T", "H", "s_dg"])
def chunk_grown_row_grad_kernel(
    p_q, p_k, p_v, p_g, p_do, p_h, p_dh, p_dg, scale, T, H, s_dg,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
    RQ: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr, RG: tl.constexpr,
):  # fmt: skip
    """Writes the K block's share of dg of `chunk_query_key_grad_kernel`, whose programs it has, again where a step of
    the chunk grows."""
    i_k, i_bt, i_h, t_0, i_row = chunk_program(T, H, C, K, BK)
    o_c = tl.arange(0, C)
    o_k = i_k * BK + tl.arange(0, BK)
    m_c = t_0 + o_c < T
    m_k = o_k < K
    if tl.max(as_decay(tl.load(p_g + i_row // RG + o_c * (H // RG), mask=m_c, other=0.0))) <= GROWTH:
        return
    p_h += i_bt.to(tl.int64) * (K * V)
    p_dh += i_bt.to(tl.int64) * (K * V)
    b_hi, b_lo, s_hi, s_lo = row_decay(p_g, i_row, i_h, o_c, m_c, H, RG, ROW_DECAY, True)
    b_dk = tl.zeros((C, BK), tl.float32)
    b_ds = tl.zeros((BK,), tl.float32)
    for i_v in range(tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        b_v = load_rows(p_v + i_row // RV * V, o_c * (H // RV), o_v, m_c, V)
        b_dt = load_columns(p_dh, o_k, o_v, m_k, V)
        b_dk = tl.dot(b_v, b_dt, b_dk, input_precision=PRECISION)
        b_st = load_columns(p_h, o_k, o_v, m_k, V).to(tl.float32)
        b_ds += tl.sum((b_st * tl.exp(s_hi + s_lo)) * b_dt.to(tl.float32), 0)
    b_kdk = tl.sum(load_rows(p_k + i_row // RK * K, o_c * (H // RK), o_k, m_c, K) * b_dk, 1)
    b_kdk *= tl.exp((s_hi - b_hi) + (s_lo - b_lo))
    b_dg = tl.sum(b_ds, 0) + sums_before(b_kdk, 0)

    b_dq = tl.zeros((C, BK), tl.float32)
    b_p = tl.zeros((C, C), tl.float32)
    for i_v in range(tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        b_do = load_rows(p_do + i_row * V, o_c * H, o_v, m_c, V)
        b_st = load_columns(p_h, o_k, o_v, m_k, V)
        b_dq = tl.dot(b_do, b_st, b_dq, input_precision=PRECISION)
    for i_v in range(tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        b_do = load_rows(p_do + i_row * V, o_c * H, o_v, m_c, V)
        b_vt = load_columns(p_v + i_row // RV * V, o_c * (H // RV), o_v, m_c, V)
        b_p = tl.dot(b_do, b_vt, b_p, input_precision=PRECISION)
    b_q = load_rows(p_q + i_row // RQ * K, o_c * (H // RQ), o_k, m_c, K)
    b_kt = load_columns(p_k + i_row // RK * K, o_c * (H // RK), o_k, m_c, K)
    b_p *= tl.dot(b_q, b_kt, input_precision=PRECISION)
    b_qdq = tl.sum(b_q * b_dq, 1) * tl.exp(b_hi + b_lo)
    b_dg += scale * (tl.cumsum(b_qdq, 0, reverse=True) + pairs_across(b_p, b_hi, b_lo, o_c))
    tl.store(p_dg + i_k.to(tl.int64) * s_dg + i_row + o_c * H, b_dg, mask=m_c)


def launch_grown_decay_grads(
    plan: SplitPlan,
    q: torch.Tensor,
    k: torch.Tensor,
    g: torch.Tensor,
    p: torch.Tensor,
    h: torch.Tensor,
    dh: torch.Tensor,
    dqs: torch.Tensor,
    dks: torch.Tensor,
    dg: torch.Tensor,
    scale: float,
) -> None:
    """Fills dg, where it must, in place of `chunk_key_grad_kernel`."""
    programs = plan.B * plan.H * plan.chunks * plan.key_blocks
    operands = q, k, g, p, h, dh, dqs, dks, dg, float(scale)
    launch_split(plan, chunk_grown_decay_grad_kernel, programs, *operands)


def launch_grown_row_grads(
    plan: SplitPlan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    do: torch.Tensor,
    h: torch.Tensor,
    dh: torch.Tensor,
    shares: torch.Tensor,
    scale: float,
) -> None:
    """Fills the shares of dg, where it must, in place of `chunk_query_key_grad_kernel`."""
    programs = plan.B * plan.H * plan.chunks * plan.key_blocks
    operands = q, k, v, g, do, h, dh, shares, float(scale)
    launch_split(plan, chunk_grown_row_grad_kernel, programs, *operands, s_dg=plan.B * plan.T * plan.H)

"""Chunk kernels of the decayed outer product, forward.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = scale * q_t^T S_t

Shapes: q, k [B, T, H, K]; v, o [B, T, H, V]; S [B, H, K, V]; g absent, [H], [B, T, H] or [B, T, H, K] (natural log).

In chunks of C rows, with c_t the sum of g from the start of the chunk up to row t, and S the state before the chunk,

    o_i = scale * ((q_i exp(c_i))^T S + sum_{j <= i} A_ij v_j)       A_ij = sum_k q_ik k_jk exp(c_ik - c_jk)
    S'  = diag(exp(c_last)) S + sum_j (k_j exp(c_last - c_j)) v_j^T

Two launches compute the same thing. *Fused*: one program per (b, h, V block) keeps the whole state on chip and walks
the chunks once; right when there are enough programs to fill the device. *Split*: a sweep writes the state before each
chunk, in blocks of K and V, then all chunks are read out in parallel; right for few heads and long T.
Under a decay over keys both start from the scores A, computed for all chunks in parallel.

Sources: Yang et al. 2024 (arXiv:2312.06635), section 4; Dao and Gu 2024 (arXiv:2405.21060), section 6.
"""

import torch
import triton
import triton.language as tl

from fla_compile.kernels.decay_configs import Config
from fla_compile.kernels.decay_triton_bwd import chunk_backward
from fla_compile.kernels.decay_triton_common import (
    KEY_DECAY,
    KINDS,
    NO_DECAY,
    as_decay,
    chunk_program,
    launch_key_scores,
    launch_states,
    load_columns,
    load_rows,
    plan_launch,
    row_decay,
    store_rows,
    sweep_program,
)

__all__ = ["chunk_backward", "chunk_forward"]


@triton.jit(do_not_specialize=["T", "H"])
def chunk_fused_kernel(
    p_q, p_k, p_v, p_g, p_a, p_h0, p_o, p_ht, scale, T, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, HAS_H0: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BK covers all keys; p_a holds the scores under a decay over keys and is not read otherwise."""
    i_bh, i_b, i_h, _, i_v = sweep_program(H, K, V, BK, BV)
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K

    b_s = tl.zeros((BK, BV), tl.float32)
    if HAS_H0:
        b_s += load_rows(p_h0 + i_bh.to(tl.int64) * (K * V), o_k, o_v, m_k, V).to(tl.float32)
    for t_0 in range(0, T, C):
        i_row = (i_b * T + t_0) * H + i_h
        m_c = t_0 + o_c < T
        b_q = load_rows(p_q + i_row * K, o_c * H, o_k, m_c, K)
        b_kt = load_columns(p_k + i_row * K, o_c * H, o_k, m_c, K)
        b_v = load_rows(p_v + i_row * V, o_c * H, o_v, m_c, V)
        if DECAY == KEY_DECAY:
            p_gr = p_g + i_row * K
            m_next = (o_c + 1 < C) & (t_0 + o_c + 1 < T)
            b_g = as_decay(load_rows(p_gr, o_c * H, o_k, m_c, K))
            b_q = (b_q * tl.exp(tl.cumsum(b_g, 0))).to(b_v.dtype)
            b_next = as_decay(load_columns(p_gr, (o_c + 1) * H, o_k, m_next, K))
            b_first = as_decay(tl.load(p_gr + o_k, mask=m_k, other=0.0))
            b_kt = (b_kt * tl.exp(tl.cumsum(b_next, 1, reverse=True))).to(b_v.dtype)
            b_a = load_rows(p_a + i_row * C, o_c * H, o_c, m_c, C)
            b_o = tl.dot(b_q, b_s.to(b_v.dtype), input_precision=PRECISION)
            b_o = tl.dot(b_a, b_v, b_o, input_precision=PRECISION)
            b_s *= tl.exp(tl.sum(b_next, 1) + b_first)[:, None]
        else:
            b_a = tl.dot(b_q, b_kt, input_precision=PRECISION)
            m_a = o_c[:, None] >= o_c[None, :]
            if DECAY != NO_DECAY:
                b_hi, b_lo, s_hi, s_lo = row_decay(p_g, i_row, i_h, o_c, m_c, H, DECAY, b_v.dtype == tl.float32)
                b_d = (b_hi[:, None] - b_hi[None, :]) + (b_lo[:, None] - b_lo[None, :])
                b_a *= tl.exp(tl.where(m_a, b_d, 0.0))
            b_a = tl.where(m_a, b_a, 0.0).to(b_v.dtype)
            b_o = tl.dot(b_q, b_s.to(b_v.dtype), input_precision=PRECISION)
            if DECAY != NO_DECAY:
                b_o *= tl.exp(b_hi + b_lo)[:, None]
            b_o = tl.dot(b_a, b_v, b_o, input_precision=PRECISION)
            if DECAY != NO_DECAY:
                b_v = (b_v * tl.exp((s_hi - b_hi) + (s_lo - b_lo))[:, None]).to(b_v.dtype)
                b_s *= tl.exp(s_hi + s_lo)
        b_s = tl.dot(b_kt, b_v, b_s, input_precision=PRECISION)
        store_rows(p_o + i_row * V, b_o * scale, o_c * H, o_v, m_c, V)
    store_rows(p_ht + i_bh.to(tl.int64) * (K * V), b_s, o_k, o_v, m_k, V)


@triton.jit(do_not_specialize=["T", "H"])
def chunk_output_kernel(
    p_q, p_k, p_v, p_g, p_a, p_h, p_o, scale, T, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per (b, h, chunk, V block); p_h [B*H, chunks, K, V] holds the state before each chunk."""
    NK: tl.constexpr = tl.cdiv(K, BK)
    i_v, i_bt, i_h, t_0, i_row = chunk_program(T, H, C, V, BV)
    o_c = tl.arange(0, C)
    o_v = i_v * BV + tl.arange(0, BV)
    m_c = t_0 + o_c < T
    p_h += i_bt.to(tl.int64) * (K * V)

    b_o = tl.zeros((C, BV), tl.float32)
    b_a = tl.zeros((C, C), tl.float32)
    for i_k in range(NK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_q = load_rows(p_q + i_row * K, o_c * H, o_k, m_c, K)
        b_s = load_rows(p_h, o_k, o_v, o_k < K, V)
        if DECAY == KEY_DECAY:
            b_g = as_decay(load_rows(p_g + i_row * K, o_c * H, o_k, m_c, K))
            b_q = (b_q * tl.exp(tl.cumsum(b_g, 0))).to(b_s.dtype)
        else:
            b_kt = load_columns(p_k + i_row * K, o_c * H, o_k, m_c, K)
            b_a = tl.dot(b_q, b_kt, b_a, input_precision=PRECISION)
        b_o = tl.dot(b_q, b_s, b_o, input_precision=PRECISION)

    b_v = load_rows(p_v + i_row * V, o_c * H, o_v, m_c, V)
    if DECAY == KEY_DECAY:
        b_w = load_rows(p_a + i_row * C, o_c * H, o_c, m_c, C)
    else:
        m_a = o_c[:, None] >= o_c[None, :]
        if DECAY != NO_DECAY:
            b_hi, b_lo, _, _ = row_decay(p_g, i_row, i_h, o_c, m_c, H, DECAY, b_v.dtype == tl.float32)
            b_d = (b_hi[:, None] - b_hi[None, :]) + (b_lo[:, None] - b_lo[None, :])
            b_a *= tl.exp(tl.where(m_a, b_d, 0.0))
            b_o *= tl.exp(b_hi + b_lo)[:, None]
        b_w = tl.where(m_a, b_a, 0.0).to(b_v.dtype)
    b_o = tl.dot(b_w, b_v, b_o, input_precision=PRECISION)
    store_rows(p_o + i_row * V, b_o * scale, o_c * H, o_v, m_c, V)


def chunk_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    scale: float,
    *,
    config: Config | None = None,
    fused: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [B, T, H, V] in q's dtype and the final state [B, H, K, V] in float32.

    `config` and `fused` override the tables' choice. Raises ValueError for dtypes, sizes or shapes that do not fit.
    """
    plan = plan_launch(q, k, v, g, config, fused)
    o = torch.empty(plan.B, plan.T, plan.H, plan.V, dtype=q.dtype, device=q.device)
    if plan.B * plan.H == 0:
        return o, torch.empty(plan.B, plan.H, plan.K, plan.V, dtype=torch.float32, device=q.device)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    g = None if g is None else g.contiguous()
    h0 = None if initial_state is None else initial_state.contiguous()
    meta = dict(
        K=plan.K, V=plan.V, C=plan.config.chunk, BK=plan.block_k, BV=plan.block_v,
        DECAY=KINDS[plan.kind], PRECISION=plan.precision, **plan.options,
    )  # fmt: skip
    with torch.cuda.device_of(q):
        a = launch_key_scores(plan, q, k, g) if g is not None and plan.kind == "vector" else None
        if plan.fused:
            ht = torch.empty(plan.B, plan.H, plan.K, plan.V, dtype=torch.float32, device=q.device)
            chunk_fused_kernel[(plan.B * plan.H * plan.value_blocks,)](
                q, k, v, g, a, h0, o, ht, scale, plan.T, plan.H, HAS_H0=h0 is not None, **meta
            )
            return o, ht
        h, ht = launch_states(plan, k, v, g, h0, final=True)
        assert ht is not None
        chunk_output_kernel[(plan.B * plan.H * plan.chunks * plan.value_blocks,)](
            q, k, v, g, a, h, o, scale, plan.T, plan.H, **meta
        )
        return o, ht

"""Chunk kernels of the decayed outer product, backward.

With D the gradient of the state after a chunk, S the state before it, c_t the running sum of g in the chunk, and
P_ij = do_i . v_j for j <= i (A_ij and the forward: `decay_triton.py`):

    D_prev = diag(exp(c_last)) D + scale * sum_i (q_i exp(c_i)) do_i^T
    dv_j   = D^T (k_j exp(c_last - c_j)) + scale * sum_{i >= j} A_ij do_i
    dq_i   = scale * exp(c_i) * (S do_i)       + scale * sum_{j <= i} P_ij exp(c_i - c_j) k_j
    dk_j   = exp(c_last - c_j) * (D v_j)       + scale * sum_{i >= j} P_ij exp(c_i - c_j) q_i

The decay's gradient at row t collects every path that crosses t, each a product that dq and dk hold already. Writing
dq = dq' + dq", dk = dk' + dk" for the two terms above, the second without its diagonal i = j,

    dg_t = sum_{i >= t} q_i dq'_i + sum_{j < t} k_j dk'_j + exp(c_last) sum_v D S + sum_{i >= t} (q_i dq"_i - k_i dk"_i)

all within the chunk, in float32 before anything is rounded: no sum runs over the sequence, and paths that a strong
decay has cut contribute nothing. For one decay per row the terms are summed over keys.

Passes: states before each chunk (again), D after each chunk in reverse, then all chunks in parallel. Under a decay
over keys A and P are computed first, and the terms inside a chunk in 16-row blocks: against the columns before them
relative to the first of these rows, against the rows after them relative to the last of these columns.
"""

import torch
import triton
import triton.language as tl

from fla_compile.kernels.decay_configs import Config
from fla_compile.kernels.decay_triton_common import (
    KEY_DECAY,
    KINDS,
    NO_DECAY,
    SUB,
    Launch,
    as_decay,
    launch_key_scores,
    launch_states,
    load_columns,
    load_rows,
    plan_launch,
    row_decay,
    store_rows,
)


@triton.jit(do_not_specialize=["T", "H"])
def chunk_state_grad_kernel(
    p_q, p_do, p_g, p_dht, p_dh, p_dh0, scale, T, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, HAS_DHT: tl.constexpr, STORE_DH0: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per (b, h, K block, V block) walks back; p_dh [B*H, chunks, K, V] gets the D after each chunk."""
    NK: tl.constexpr = tl.cdiv(K, BK)
    NV: tl.constexpr = tl.cdiv(V, BV)
    i_p = tl.program_id(0)
    i_v = i_p % NV
    i_k = (i_p // NV) % NK
    i_bh = i_p // NV // NK
    i_b = (i_bh // H).to(tl.int64)
    i_h = i_bh % H
    n_t = tl.cdiv(T, C)
    o_c = tl.arange(0, C)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    p_dh += (i_bh.to(tl.int64) * n_t + n_t - 1) * (K * V)

    b_d = tl.zeros((BK, BV), tl.float32)
    if HAS_DHT:
        b_d += load_rows(p_dht + i_bh.to(tl.int64) * (K * V), o_k, o_v, m_k, V).to(tl.float32)
    for i_n in range(n_t):
        store_rows(p_dh, b_d, o_k, o_v, m_k, V)
        p_dh -= K * V
        t_0 = (n_t - 1 - i_n) * C
        i_row = (i_b * T + t_0) * H + i_h
        m_c = t_0 + o_c < T
        b_qt = load_columns(p_q + i_row * K, o_c * H, o_k, m_c, K)
        b_do = load_rows(p_do + i_row * V, o_c * H, o_v, m_c, V)
        if DECAY == KEY_DECAY:
            b_gt = as_decay(load_columns(p_g + i_row * K, o_c * H, o_k, m_c, K))
            b_qt = (b_qt * tl.exp(tl.cumsum(b_gt, 1))).to(b_do.dtype)
            b_d *= tl.exp(tl.sum(b_gt, 1))[:, None]
        elif DECAY != NO_DECAY:
            b_hi, b_lo, s_hi, s_lo = row_decay(p_g, i_row, i_h, o_c, m_c, H, DECAY, b_do.dtype == tl.float32)
            b_do = (b_do * tl.exp(b_hi + b_lo)[:, None]).to(b_do.dtype)
            b_d *= tl.exp(s_hi + s_lo)
        b_d += tl.dot(b_qt, b_do, input_precision=PRECISION) * scale
    if STORE_DH0:
        store_rows(p_dh0 + i_bh.to(tl.int64) * (K * V), b_d, o_k, o_v, m_k, V)


@triton.jit(do_not_specialize=["T", "H"])
def chunk_value_grad_kernel(
    p_q, p_k, p_g, p_a, p_do, p_dh, p_dv, scale, T, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv, one program per (b, h, chunk, V block)."""
    NV: tl.constexpr = tl.cdiv(V, BV)
    NK: tl.constexpr = tl.cdiv(K, BK)
    i_p = tl.program_id(0)
    n_t = tl.cdiv(T, C)
    i_v = i_p % NV
    i_bt = i_p // NV
    i_bh = i_bt // n_t
    i_h = i_bh % H
    t_0 = (i_bt % n_t) * C
    i_row = ((i_bh // H).to(tl.int64) * T + t_0) * H + i_h
    o_c = tl.arange(0, C)
    o_v = i_v * BV + tl.arange(0, BV)
    m_c = t_0 + o_c < T
    p_dh += i_bt.to(tl.int64) * (K * V)

    b_dv = tl.zeros((C, BV), tl.float32)
    b_at = tl.zeros((C, C), tl.float32)
    for i_k in range(NK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_k = load_rows(p_k + i_row * K, o_c * H, o_k, m_c, K)
        b_d = load_rows(p_dh, o_k, o_v, o_k < K, V)
        if DECAY == KEY_DECAY:
            m_next = (o_c + 1 < C) & (t_0 + o_c + 1 < T)
            b_next = as_decay(load_rows(p_g + i_row * K, (o_c + 1) * H, o_k, m_next, K))
            b_k = (b_k * tl.exp(tl.cumsum(b_next, 0, reverse=True))).to(b_d.dtype)
        else:
            b_qt = load_columns(p_q + i_row * K, o_c * H, o_k, m_c, K)
            b_at = tl.dot(b_k, b_qt, b_at, input_precision=PRECISION)
        b_dv = tl.dot(b_k, b_d, b_dv, input_precision=PRECISION)

    b_do = load_rows(p_do + i_row * V, o_c * H, o_v, m_c, V)
    if DECAY == KEY_DECAY:
        b_w = load_columns(p_a + i_row * C, o_c * H, o_c, m_c, C)
    else:
        m_at = o_c[:, None] <= o_c[None, :]
        if DECAY != NO_DECAY:
            b_hi, b_lo, s_hi, s_lo = row_decay(p_g, i_row, i_h, o_c, m_c, H, DECAY, b_do.dtype == tl.float32)
            b_e = (b_hi[None, :] - b_hi[:, None]) + (b_lo[None, :] - b_lo[:, None])
            b_at *= tl.exp(tl.where(m_at, b_e, 0.0))
            b_dv *= tl.exp((s_hi - b_hi) + (s_lo - b_lo))[:, None]
        b_w = tl.where(m_at, b_at, 0.0).to(b_do.dtype)
    b_dv += tl.dot(b_w, b_do, input_precision=PRECISION) * scale
    store_rows(p_dv + i_row * V, b_dv, o_c * H, o_v, m_c, V)


@triton.jit(do_not_specialize=["T", "H", "s_dg"])
def chunk_query_key_grad_kernel(
    p_q, p_k, p_v, p_g, p_do, p_h, p_dh, p_dq, p_dk, p_dg, scale, T, H, s_dg,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and each K block's share of dg (s_dg apart), one program per (b, h, chunk, K block).

    Under a decay over keys only the terms that go through S and D, in float32: dq' before the scale, dk', and in
    p_dg [B, T, H, K] the first three terms of dg.
    """
    NV: tl.constexpr = tl.cdiv(V, BV)
    NK: tl.constexpr = tl.cdiv(K, BK)
    i_p = tl.program_id(0)
    n_t = tl.cdiv(T, C)
    i_k = i_p % NK
    i_bt = i_p // NK
    i_bh = i_bt // n_t
    i_h = i_bh % H
    t_0 = (i_bt % n_t) * C
    i_row = ((i_bh // H).to(tl.int64) * T + t_0) * H + i_h
    o_c = tl.arange(0, C)
    o_k = i_k * BK + tl.arange(0, BK)
    m_c = t_0 + o_c < T
    m_k = o_k < K
    p_h += i_bt.to(tl.int64) * (K * V)
    p_dh += i_bt.to(tl.int64) * (K * V)

    # No row sees its own k dk'; the last one's, the only undecayed one, would drown the others in the sums below.
    m_kdk = (o_c + 1 < C) & (t_0 + o_c + 1 < T)

    b_dk = tl.zeros((C, BK), tl.float32)
    b_ds = tl.zeros((BK,), tl.float32)
    b_pt = tl.zeros((C, C), tl.float32)
    for i_v in range(NV):
        o_v = i_v * BV + tl.arange(0, BV)
        b_v = load_rows(p_v + i_row * V, o_c * H, o_v, m_c, V)
        b_dt = load_columns(p_dh, o_k, o_v, m_k, V)
        b_dk = tl.dot(b_v, b_dt, b_dk, input_precision=PRECISION)
        if DECAY != KEY_DECAY:
            b_dot = load_columns(p_do + i_row * V, o_c * H, o_v, m_c, V)
            b_pt = tl.dot(b_v, b_dot, b_pt, input_precision=PRECISION)
        if DECAY != NO_DECAY:
            b_st = load_columns(p_h, o_k, o_v, m_k, V)
            b_ds += tl.sum(b_st.to(tl.float32) * b_dt.to(tl.float32), 0)
    if DECAY == KEY_DECAY:
        p_gr = p_g + i_row * K
        b_next = as_decay(load_rows(p_gr, (o_c + 1) * H, o_k, m_kdk, K))
        b_dk *= tl.exp(tl.cumsum(b_next, 0, reverse=True))
        b_kdk = load_rows(p_k + i_row * K, o_c * H, o_k, m_kdk, K) * b_dk
        b_first = as_decay(tl.load(p_gr + o_k, mask=m_k, other=0.0))
        b_dg = (tl.exp(tl.sum(b_next, 0) + b_first) * b_ds)[None, :] + (tl.cumsum(b_kdk, 0) - b_kdk)
    else:
        m_pt = o_c[:, None] <= o_c[None, :]
        if DECAY != NO_DECAY:
            b_hi, b_lo, s_hi, s_lo = row_decay(p_g, i_row, i_h, o_c, m_c, H, DECAY, p_q.dtype.element_ty == tl.float32)
            b_e = (b_hi[None, :] - b_hi[:, None]) + (b_lo[None, :] - b_lo[:, None])
            b_pt *= tl.exp(tl.where(m_pt, b_e, 0.0))
            b_dk *= tl.exp((s_hi - b_hi) + (s_lo - b_lo))[:, None]
            b_kdk = tl.sum(load_rows(p_k + i_row * K, o_c * H, o_k, m_kdk, K) * b_dk, 1)
            b_dg = tl.exp(s_hi + s_lo) * tl.sum(b_ds, 0) + (tl.cumsum(b_kdk, 0) - b_kdk)
        b_q = load_rows(p_q + i_row * K, o_c * H, o_k, m_c, K)
        b_pt = tl.where(m_pt, b_pt, 0.0).to(b_q.dtype)
        b_dk += tl.dot(b_pt, b_q, input_precision=PRECISION) * scale
    store_rows(p_dk + i_row * K, b_dk, o_c * H, o_k, m_c, K)

    b_dq = tl.zeros((C, BK), tl.float32)
    b_p = tl.zeros((C, C), tl.float32)
    for i_v in range(NV):
        o_v = i_v * BV + tl.arange(0, BV)
        b_do = load_rows(p_do + i_row * V, o_c * H, o_v, m_c, V)
        b_st = load_columns(p_h, o_k, o_v, m_k, V)
        b_dq = tl.dot(b_do, b_st, b_dq, input_precision=PRECISION)
        if DECAY != KEY_DECAY:
            b_vt = load_columns(p_v + i_row * V, o_c * H, o_v, m_c, V)
            b_p = tl.dot(b_do, b_vt, b_p, input_precision=PRECISION)
    b_q = load_rows(p_q + i_row * K, o_c * H, o_k, m_c, K)
    if DECAY == KEY_DECAY:
        b_dq *= tl.exp(tl.cumsum(as_decay(load_rows(p_gr, o_c * H, o_k, m_c, K)), 0))
        b_dg += tl.cumsum(b_q * b_dq * scale, 0, reverse=True)
        store_rows(p_dg + i_row * K, b_dg, o_c * H, o_k, m_c, K)
    else:
        m_p = o_c[:, None] >= o_c[None, :]
        if DECAY != NO_DECAY:
            b_e = (b_hi[:, None] - b_hi[None, :]) + (b_lo[:, None] - b_lo[None, :])
            b_p *= tl.exp(tl.where(m_p, b_e, 0.0))
            b_dq *= tl.exp(b_hi + b_lo)[:, None]
            b_kt = load_columns(p_k + i_row * K, o_c * H, o_k, m_c, K)
            b_ap = tl.dot(b_q, b_kt, input_precision=PRECISION) * b_p
            b_ap = tl.where(o_c[:, None] > o_c[None, :], b_ap, 0.0)
            b_row = tl.sum(b_q * b_dq, 1) + (tl.sum(b_ap, 1) - tl.sum(b_ap, 0))
            b_dg += tl.cumsum(b_row * scale, 0, reverse=True)
            tl.store(p_dg + i_k.to(tl.int64) * s_dg + i_row + o_c * H, b_dg, mask=m_c)
        b_k = load_rows(p_k + i_row * K, o_c * H, o_k, m_c, K)
        b_p = tl.where(m_p, b_p, 0.0).to(b_k.dtype)
        b_dq = tl.dot(b_p, b_k, b_dq, input_precision=PRECISION) * scale
    store_rows(p_dq + i_row * K, b_dq, o_c * H, o_k, m_c, K)


@triton.jit(do_not_specialize=["T", "H"])
def chunk_value_scores_kernel(
    p_do, p_v, p_p, T, H,
    V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P_ij = do_i . v_j for j <= i in a chunk, p_p [B, T, H, C]; one program per (b, h, chunk)."""
    NV: tl.constexpr = tl.cdiv(V, BV)
    i_bt = tl.program_id(0)
    n_t = tl.cdiv(T, C)
    i_bh = i_bt // n_t
    i_h = i_bh % H
    t_0 = (i_bt % n_t) * C
    i_row = ((i_bh // H).to(tl.int64) * T + t_0) * H + i_h
    o_c = tl.arange(0, C)
    m_c = t_0 + o_c < T
    b_p = tl.zeros((C, C), tl.float32)
    for i_v in range(NV):
        o_v = i_v * BV + tl.arange(0, BV)
        b_do = load_rows(p_do + i_row * V, o_c * H, o_v, m_c, V)
        b_vt = load_columns(p_v + i_row * V, o_c * H, o_v, m_c, V)
        b_p = tl.dot(b_do, b_vt, b_p, input_precision=PRECISION)
    b_p = tl.where(o_c[:, None] >= o_c[None, :], b_p, 0.0)
    store_rows(p_p + i_row * C, b_p, o_c * H, o_c, m_c, C)


@triton.jit(do_not_specialize=["T", "H"])
def chunk_key_grad_kernel(
    p_q, p_k, p_g, p_p, p_dqs, p_dks, p_dgs, p_dq, p_dk, p_dg, scale, T, H,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the terms inside a chunk, and writes dq, dk, dg; one program per (b, h, chunk, K block), last rows first."""
    NS: tl.constexpr = C // SUB
    NK: tl.constexpr = tl.cdiv(K, BK)
    i_p = tl.program_id(0)
    n_t = tl.cdiv(T, C)
    i_k = i_p % NK
    i_bt = i_p // NK
    i_bh = i_bt // n_t
    i_h = i_bh % H
    t_0 = (i_bt % n_t) * C
    i_row = ((i_bh // H).to(tl.int64) * T + t_0) * H + i_h
    o_c = tl.arange(0, C)
    o_s = tl.arange(0, SUB)
    o_k = i_k * BK + tl.arange(0, BK)
    m_k = o_k < K
    p_qr = p_q + i_row * K
    p_kr = p_k + i_row * K
    p_gr = p_g + i_row * K
    p_pr = p_p + i_row * C

    b_carry = tl.zeros((BK,), tl.float32)
    for i_s in range(NS):
        r_0 = (NS - 1 - i_s) * SUB
        o_r = r_0 + o_s
        m_r = t_0 + o_r < T
        m_before = (o_c < r_0) & (t_0 + o_c < T)
        m_after = (o_c >= r_0 + SUB) & (t_0 + o_c < T)
        b_g = as_decay(load_rows(p_gr, o_r * H, o_k, m_r, K))
        b_next = as_decay(load_rows(p_gr, (o_r + 1) * H, o_k, (o_s + 1 < SUB) & (t_0 + o_r + 1 < T), K))

        b_x = load_rows(p_kr, o_c * H, o_k, m_before, K)
        b_gc = as_decay(load_rows(p_gr, (o_c + 1) * H, o_k, (o_c + 1 < r_0) & (t_0 + o_c + 1 < T), K))
        b_x = (b_x * tl.exp(tl.cumsum(b_gc, 0, reverse=True))).to(b_x.dtype)
        b_p = tl.load(p_pr + (o_r * H * C)[:, None] + o_c[None, :], mask=m_r[:, None] & m_before[None, :], other=0.0)
        b_dq = tl.dot(b_p, b_x, input_precision=PRECISION) * tl.exp(tl.cumsum(b_g, 0))

        b_x = load_rows(p_qr, o_c * H, o_k, m_after, K)
        b_gc = as_decay(load_rows(p_gr, o_c * H, o_k, m_after, K))
        b_x = (b_x * tl.exp(tl.cumsum(b_gc, 0))).to(b_x.dtype)
        b_p = tl.load(p_pr + (o_c * H * C)[None, :] + o_r[:, None], mask=m_r[:, None] & m_after[None, :], other=0.0)
        b_dk = tl.dot(b_p, b_x, input_precision=PRECISION) * tl.exp(tl.cumsum(b_next, 0, reverse=True))

        b_eq = tl.zeros((SUB, BK), tl.float32)
        b_ek = tl.zeros((SUB, BK), tl.float32)
        for i_d in range(1, SUB):
            j = SUB - 1 - i_d
            m_j = t_0 + r_0 + j < T
            m_g = t_0 + r_0 + j + 1 < T
            b_gj = as_decay(tl.load(p_gr + (r_0 + j + 1) * H * K + o_k, mask=m_k & m_g, other=0.0))
            b_kj = tl.load(p_kr + (r_0 + j) * H * K + o_k, mask=m_k & m_j, other=0.0).to(tl.float32)
            b_pj = tl.load(p_pr + o_r * H * C + r_0 + j, mask=m_r & (o_s > j), other=0.0).to(tl.float32)
            b_eq += tl.where((o_s > j)[:, None], b_gj[None, :], 0.0)
            b_dq += b_pj[:, None] * b_kj[None, :] * tl.exp(b_eq)

            m_i = t_0 + r_0 + i_d < T
            b_gi = as_decay(tl.load(p_gr + (r_0 + i_d) * H * K + o_k, mask=m_k & m_i, other=0.0))
            b_qi = tl.load(p_qr + (r_0 + i_d) * H * K + o_k, mask=m_k & m_i, other=0.0).to(tl.float32)
            b_pi = tl.load(p_pr + (r_0 + i_d) * H * C + o_r, mask=m_i & (o_s < i_d), other=0.0).to(tl.float32)
            b_ek += tl.where((o_s < i_d)[:, None], b_gi[None, :], 0.0)
            b_dk += b_pi[:, None] * b_qi[None, :] * tl.exp(b_ek)

        b_q = load_rows(p_qr, o_r * H, o_k, m_r, K).to(tl.float32)
        b_k = load_rows(p_kr, o_r * H, o_k, m_r, K).to(tl.float32)
        b_w = (b_q * b_dq - b_k * b_dk) * scale
        b_dg = load_rows(p_dgs + i_row * K, o_r * H, o_k, m_r, K)
        b_dg += tl.cumsum(b_w, 0, reverse=True) + b_carry[None, :]
        store_rows(p_dg + i_row * K, b_dg, o_r * H, o_k, m_r, K)
        b_carry += tl.sum(b_w, 0)

        b_pd = tl.load(p_pr + o_r * H * C + o_r, mask=m_r, other=0.0).to(tl.float32)[:, None]
        b_dq = (load_rows(p_dqs + i_row * K, o_r * H, o_k, m_r, K) + b_dq + b_pd * b_k) * scale
        b_dk = load_rows(p_dks + i_row * K, o_r * H, o_k, m_r, K) + (b_dk + b_pd * b_q) * scale
        store_rows(p_dq + i_row * K, b_dq, o_r * H, o_k, m_r, K)
        store_rows(p_dk + i_row * K, b_dk, o_r * H, o_k, m_r, K)


def chunk_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    scale: float,
    do: torch.Tensor,
    dht: torch.Tensor | None,
    *,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients (dq, dk, dv, dg, dh0); dg (shaped as g) and dh0 in float32, None where the input is None.

    `config` overrides the table's choice. Raises ValueError for dtypes, sizes or shapes that do not fit.
    """
    plan = plan_launch(q, k, v, g, config, False)
    q, k, v, do = q.contiguous(), k.contiguous(), v.contiguous(), do.to(q.dtype).contiguous()
    g = None if g is None else g.contiguous()
    h0 = None if initial_state is None else initial_state.contiguous()
    dht = None if dht is None else dht.contiguous()
    B, T, H, K, V = plan.B, plan.T, plan.H, plan.K, plan.V
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dh0 = None if h0 is None else torch.empty(B, H, K, V, dtype=torch.float32, device=q.device)
    if B * H == 0:
        return dq, dk, dv, None if g is None else torch.zeros_like(g, dtype=torch.float32), dh0
    meta = dict(C=plan.config.chunk, PRECISION=plan.precision, **plan.options)
    blocks = dict(K=K, V=V, BK=plan.block_k, BV=plan.block_v, DECAY=KINDS[plan.kind])
    per_chunk = B * H * plan.chunks
    with torch.cuda.device_of(q):
        h, _ = launch_states(plan, k, v, g, h0, final=False)
        dh = torch.empty_like(h)
        chunk_state_grad_kernel[(B * H * plan.key_blocks * plan.value_blocks,)](
            q, do, g, dht, dh, dh0, scale, T, H,
            HAS_DHT=dht is not None, STORE_DH0=dh0 is not None, **blocks, **meta,
        )  # fmt: skip
        a = launch_key_scores(plan, q, k, g) if g is not None and plan.kind == "vector" else None
        chunk_value_grad_kernel[(per_chunk * plan.value_blocks,)](q, k, g, a, do, dh, dv, scale, T, H, **blocks, **meta)
        if g is not None and plan.kind == "vector":
            return dq, dk, dv, launch_key_grads(plan, q, k, v, g, do, h, dh, dq, dk, scale), dh0
        shares = None if g is None else torch.empty(plan.key_blocks, B, T, H, dtype=torch.float32, device=q.device)
        chunk_query_key_grad_kernel[(per_chunk * plan.key_blocks,)](
            q, k, v, g, do, h, dh, dq, dk, shares, scale, T, H, B * T * H, **blocks, **meta
        )
    if shares is None:
        return dq, dk, dv, None, dh0
    dg = shares[0] if plan.key_blocks == 1 else shares.sum(0)
    return dq, dk, dv, dg.sum((0, 1)) if plan.kind == "constant" else dg, dh0


def launch_key_grads(
    plan: Launch,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    do: torch.Tensor,
    h: torch.Tensor,
    dh: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Fills dq and dk and returns dg, under a decay over keys."""
    B, T, H, K, V, C = plan.B, plan.T, plan.H, plan.K, plan.V, plan.config.chunk
    per_chunk = B * H * plan.chunks
    meta = dict(C=C, PRECISION=plan.precision, **plan.options)
    p = torch.empty(B, T, H, C, dtype=q.dtype, device=q.device)
    chunk_value_scores_kernel[(per_chunk,)](do, v, p, T, H, V=V, BV=plan.block_v, **meta)
    dqs, dks, dgs, dg = (torch.empty(B, T, H, K, dtype=torch.float32, device=q.device) for _ in range(4))
    chunk_query_key_grad_kernel[(per_chunk * plan.key_blocks,)](
        q, k, v, g, do, h, dh, dqs, dks, dgs, scale, T, H, 0,
        K=K, V=V, BK=plan.block_k, BV=plan.block_v, DECAY=KINDS["vector"], **meta,
    )  # fmt: skip
    chunk_key_grad_kernel[(per_chunk * plan.key_blocks,)](
        q, k, g, p, dqs, dks, dgs, dq, dk, dg, scale, T, H, K=K, BK=plan.block_k, **meta
    )
    return dg

"""Chunk kernels of the decayed outer product, backward: the gradients of q, k and the decay.

With S the state before a chunk, D the gradient of the state after it, c_t the running sum of g and P_ij = do_i . v_j
for j <= i, as in `decay_triton_bwd.py`:

    dq_i   = scale * exp(c_i) * (S do_i)       + scale * sum_{j <= i} P_ij exp(c_i - c_j) k_j
    dk_j   = exp(c_last - c_j) * (D v_j)       + scale * sum_{i >= j} P_ij exp(c_i - c_j) q_i

The decay's gradient at row t collects every path that crosses t, each a product that dq and dk hold already. Writing
dq = dq' + dq", dk = dk' + dk" for the two terms above, the second without its diagonal i = j,

    dg_t = sum_{i >= t} q_i dq'_i + sum_{j < t} k_j dk'_j + sum_v D exp(c_last) S + sum_{i >= t} (q_i dq"_i - k_i dk"_i)

all within the chunk, in float32 before anything is rounded: no sum runs over the sequence, and paths that a strong
decay has cut contribute nothing. For one decay per row the terms are summed over keys. The last term of dg is a
difference, which is right while no decay is above one; `decay_triton_grown` makes dg again elsewhere.

Under a decay over keys P is computed first, and the terms inside a chunk in 16-row blocks: against the columns before
them relative to the first of these rows, against the rows after them relative to the last of these columns.
"""

import torch
import triton
import triton.language as tl

from fla_compile.kernels.decay_triton_common import (
    KEY_DECAY,
    NO_DECAY,
    SUB,
    SplitPlan,
    as_decay,
    chunk_program,
    launch_split,
    load_columns,
    load_rows,
    row_decay,
    store_rows,
)
from fla_compile.kernels.decay_triton_grown import launch_grown_decay_grads, launch_grown_row_grads


@triton.jit(do_not_specialize=["T", "H", "s_dg"])
def chunk_query_key_grad_kernel(
    p_q, p_k, p_v, p_g, p_do, p_h, p_dh, p_dq, p_dk, p_dg, scale, T, H, s_dg,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DQ_ONLY: tl.constexpr, PRECISION: tl.constexpr,
    RQ: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr, RG: tl.constexpr,
):  # fmt: skip
    """dq, dk and each K block's share of dg (s_dg apart), one program per (b, h, chunk, K block).

    Under a decay over keys only the terms that go through S and D, in float32: dq' before the scale, dk', and in
    p_dg [B, T, H, K] the first three terms of dg. There DQ_ONLY stores dq' alone, and the compiler drops the others.
    """
    NV: tl.constexpr = tl.cdiv(V, BV)
    EXACT: tl.constexpr = p_q.dtype.element_ty == tl.float32
    i_k, i_bt, i_h, t_0, i_row = chunk_program(T, H, C, K, BK)
    o_c = tl.arange(0, C)
    o_k = i_k * BK + tl.arange(0, BK)
    m_c = t_0 + o_c < T
    m_k = o_k < K
    p_h += i_bt.to(tl.int64) * (K * V)
    p_dh += i_bt.to(tl.int64) * (K * V)

    # No row sees its own k dk'; the last one's, the only undecayed one, would drown the others in the sums below.
    m_kdk = (o_c + 1 < C) & (t_0 + o_c + 1 < T)

    # The state meets its gradient after the chunk's decay: where decays grow, both may be large on either side of it.
    if DECAY == KEY_DECAY:
        p_gr = p_g + i_row // RG * K
        b_total = tl.exp(tl.sum(as_decay(load_rows(p_gr, o_c * (H // RG), o_k, m_c, K)), 0))[None, :]
    elif DECAY != NO_DECAY:
        _, _, s_hi, s_lo = row_decay(p_g, i_row, i_h, o_c, m_c, H, RG, DECAY, EXACT)
        b_total = tl.exp(s_hi + s_lo)

    b_dk = tl.zeros((C, BK), tl.float32)
    b_ds = tl.zeros((BK,), tl.float32)
    b_pt = tl.zeros((C, C), tl.float32)
    for i_v in range(NV):
        o_v = i_v * BV + tl.arange(0, BV)
        b_v = load_rows(p_v + i_row // RV * V, o_c * (H // RV), o_v, m_c, V)
        b_dt = load_columns(p_dh, o_k, o_v, m_k, V)
        b_dk = tl.dot(b_v, b_dt, b_dk, input_precision=PRECISION)
        if DECAY != KEY_DECAY:
            b_dot = load_columns(p_do + i_row * V, o_c * H, o_v, m_c, V)
            b_pt = tl.dot(b_v, b_dot, b_pt, input_precision=PRECISION)
        if DECAY != NO_DECAY:
            b_st = load_columns(p_h, o_k, o_v, m_k, V)
            b_ds += tl.sum((b_st.to(tl.float32) * b_total) * b_dt.to(tl.float32), 0)
    if DECAY == KEY_DECAY:
        b_next = as_decay(load_rows(p_gr, (o_c + 1) * (H // RG), o_k, m_kdk, K))
        b_dk *= tl.exp(tl.cumsum(b_next, 0, reverse=True))
        b_kdk = load_rows(p_k + i_row // RK * K, o_c * (H // RK), o_k, m_kdk, K) * b_dk
        b_dg = b_ds[None, :] + (tl.cumsum(b_kdk, 0) - b_kdk)
    else:
        m_pt = o_c[:, None] <= o_c[None, :]
        if DECAY != NO_DECAY:
            b_hi, b_lo, s_hi, s_lo = row_decay(p_g, i_row, i_h, o_c, m_c, H, RG, DECAY, EXACT)
            b_e = (b_hi[None, :] - b_hi[:, None]) + (b_lo[None, :] - b_lo[:, None])
            b_pt *= tl.exp(tl.where(m_pt, b_e, 0.0))
            b_dk *= tl.exp((s_hi - b_hi) + (s_lo - b_lo))[:, None]
            b_kdk = tl.sum(load_rows(p_k + i_row // RK * K, o_c * (H // RK), o_k, m_kdk, K) * b_dk, 1)
            b_dg = tl.sum(b_ds, 0) + (tl.cumsum(b_kdk, 0) - b_kdk)
        b_q = load_rows(p_q + i_row // RQ * K, o_c * (H // RQ), o_k, m_c, K)
        b_pt = tl.where(m_pt, b_pt, 0.0).to(b_q.dtype)
        b_dk += tl.dot(b_pt, b_q, input_precision=PRECISION) * scale
    if not DQ_ONLY:
        store_rows(p_dk + i_row * K, b_dk, o_c * H, o_k, m_c, K)

    b_dq = tl.zeros((C, BK), tl.float32)
    b_p = tl.zeros((C, C), tl.float32)
    for i_v in range(NV):
        o_v = i_v * BV + tl.arange(0, BV)
        b_do = load_rows(p_do + i_row * V, o_c * H, o_v, m_c, V)
        b_st = load_columns(p_h, o_k, o_v, m_k, V)
        b_dq = tl.dot(b_do, b_st, b_dq, input_precision=PRECISION)
        if DECAY != KEY_DECAY:
            b_vt = load_columns(p_v + i_row // RV * V, o_c * (H // RV), o_v, m_c, V)
            b_p = tl.dot(b_do, b_vt, b_p, input_precision=PRECISION)
    b_q = load_rows(p_q + i_row // RQ * K, o_c * (H // RQ), o_k, m_c, K)
    if DECAY == KEY_DECAY:
        b_dq *= tl.exp(tl.cumsum(as_decay(load_rows(p_gr, o_c * (H // RG), o_k, m_c, K)), 0))
        b_dg += tl.cumsum(b_q * b_dq * scale, 0, reverse=True)
        if not DQ_ONLY:
            store_rows(p_dg + i_row * K, b_dg, o_c * H, o_k, m_c, K)
    else:
        m_p = o_c[:, None] >= o_c[None, :]
        if DECAY != NO_DECAY:
            b_e = (b_hi[:, None] - b_hi[None, :]) + (b_lo[:, None] - b_lo[None, :])
            b_p *= tl.exp(tl.where(m_p, b_e, 0.0))
            b_dq *= tl.exp(b_hi + b_lo)[:, None]
            b_kt = load_columns(p_k + i_row // RK * K, o_c * (H // RK), o_k, m_c, K)
            b_ap = tl.dot(b_q, b_kt, input_precision=PRECISION) * b_p
            b_ap = tl.where(o_c[:, None] > o_c[None, :], b_ap, 0.0)
            b_row = tl.sum(b_q * b_dq, 1) + (tl.sum(b_ap, 1) - tl.sum(b_ap, 0))
            b_dg += tl.cumsum(b_row * scale, 0, reverse=True)
            tl.store(p_dg + i_k.to(tl.int64) * s_dg + i_row + o_c * H, b_dg, mask=m_c)
        b_k = load_rows(p_k + i_row // RK * K, o_c * (H // RK), o_k, m_c, K)
        b_p = tl.where(m_p, b_p, 0.0).to(b_k.dtype)
        b_dq = tl.dot(b_p, b_k, b_dq, input_precision=PRECISION) * scale
    store_rows(p_dq + i_row * K, b_dq, o_c * H, o_k, m_c, K)


@triton.jit(do_not_specialize=["T", "H"])
def chunk_value_scores_kernel(
    p_do, p_v, p_p, T, H,
    V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, RV: tl.constexpr,
):  # fmt: skip
    """P_ij = do_i . v_j for j <= i in a chunk, p_p [B, T, H, C]; one program per (b, h, chunk)."""
    NV: tl.constexpr = tl.cdiv(V, BV)
    _, _, _, t_0, i_row = chunk_program(T, H, C, 1, 1)
    o_c = tl.arange(0, C)
    m_c = t_0 + o_c < T
    b_p = tl.zeros((C, C), tl.float32)
    for i_v in range(NV):
        o_v = i_v * BV + tl.arange(0, BV)
        b_do = load_rows(p_do + i_row * V, o_c * H, o_v, m_c, V)
        b_vt = load_columns(p_v + i_row // RV * V, o_c * (H // RV), o_v, m_c, V)
        b_p = tl.dot(b_do, b_vt, b_p, input_precision=PRECISION)
    b_p = tl.where(o_c[:, None] >= o_c[None, :], b_p, 0.0)
    store_rows(p_p + i_row * C, b_p, o_c * H, o_c, m_c, C)


@triton.jit(do_not_specialize=["T", "H"])
def chunk_key_grad_kernel(
    p_q, p_k, p_g, p_p, p_dqs, p_dks, p_dgs, p_dq, p_dk, p_dg, scale, T, H,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, DQ_ONLY: tl.constexpr, PRECISION: tl.constexpr,
    RQ: tl.constexpr, RK: tl.constexpr, RG: tl.constexpr,
):  # fmt: skip
    """Adds the terms inside a chunk, and writes dq, dk, dg, or dq alone; one program per (b, h, chunk, K block), last
    rows first."""
    NS: tl.constexpr = C // SUB
    i_k, _, _, t_0, i_row = chunk_program(T, H, C, K, BK)
    o_c = tl.arange(0, C)
    o_s = tl.arange(0, SUB)
    o_k = i_k * BK + tl.arange(0, BK)
    m_k = o_k < K
    p_qr = p_q + i_row // RQ * K
    p_kr = p_k + i_row // RK * K
    p_gr = p_g + i_row // RG * K
    p_pr = p_p + i_row * C

    b_carry = tl.zeros((BK,), tl.float32)
    for i_s in range(NS):
        r_0 = (NS - 1 - i_s) * SUB
        o_r = r_0 + o_s
        m_r = t_0 + o_r < T
        m_before = (o_c < r_0) & (t_0 + o_c < T)
        m_after = (o_c >= r_0 + SUB) & (t_0 + o_c < T)
        b_g = as_decay(load_rows(p_gr, o_r * (H // RG), o_k, m_r, K))
        b_next = as_decay(load_rows(p_gr, (o_r + 1) * (H // RG), o_k, (o_s + 1 < SUB) & (t_0 + o_r + 1 < T), K))

        b_x = load_rows(p_kr, o_c * (H // RK), o_k, m_before, K)
        b_gc = as_decay(load_rows(p_gr, (o_c + 1) * (H // RG), o_k, (o_c + 1 < r_0) & (t_0 + o_c + 1 < T), K))
        b_x = (b_x * tl.exp(tl.cumsum(b_gc, 0, reverse=True))).to(b_x.dtype)
        b_p = tl.load(p_pr + (o_r * H * C)[:, None] + o_c[None, :], mask=m_r[:, None] & m_before[None, :], other=0.0)
        b_dq = tl.dot(b_p, b_x, input_precision=PRECISION) * tl.exp(tl.cumsum(b_g, 0))

        if not DQ_ONLY:
            b_x = load_rows(p_qr, o_c * (H // RQ), o_k, m_after, K)
            b_gc = as_decay(load_rows(p_gr, o_c * (H // RG), o_k, m_after, K))
            b_x = (b_x * tl.exp(tl.cumsum(b_gc, 0))).to(b_x.dtype)
            b_p = tl.load(p_pr + (o_c * H * C)[None, :] + o_r[:, None], mask=m_r[:, None] & m_after[None, :], other=0.0)
            b_dk = tl.dot(b_p, b_x, input_precision=PRECISION) * tl.exp(tl.cumsum(b_next, 0, reverse=True))

        b_eq = tl.zeros((SUB, BK), tl.float32)
        b_ek = tl.zeros((SUB, BK), tl.float32)
        for i_d in range(1, SUB):
            j = SUB - 1 - i_d
            m_j = t_0 + r_0 + j < T
            m_g = t_0 + r_0 + j + 1 < T
            b_gj = as_decay(tl.load(p_gr + (r_0 + j + 1) * (H // RG) * K + o_k, mask=m_k & m_g, other=0.0))
            b_kj = tl.load(p_kr + (r_0 + j) * (H // RK) * K + o_k, mask=m_k & m_j, other=0.0).to(tl.float32)
            b_pj = tl.load(p_pr + o_r * H * C + r_0 + j, mask=m_r & (o_s > j), other=0.0).to(tl.float32)
            b_eq += tl.where((o_s > j)[:, None], b_gj[None, :], 0.0)
            b_dq += b_pj[:, None] * b_kj[None, :] * tl.exp(b_eq)

            if not DQ_ONLY:
                m_i = t_0 + r_0 + i_d < T
                b_gi = as_decay(tl.load(p_gr + (r_0 + i_d) * (H // RG) * K + o_k, mask=m_k & m_i, other=0.0))
                b_qi = tl.load(p_qr + (r_0 + i_d) * (H // RQ) * K + o_k, mask=m_k & m_i, other=0.0).to(tl.float32)
                b_pi = tl.load(p_pr + (r_0 + i_d) * H * C + o_r, mask=m_i & (o_s < i_d), other=0.0).to(tl.float32)
                b_ek += tl.where((o_s < i_d)[:, None], b_gi[None, :], 0.0)
                b_dk += b_pi[:, None] * b_qi[None, :] * tl.exp(b_ek)

        b_k = load_rows(p_kr, o_r * (H // RK), o_k, m_r, K).to(tl.float32)
        if not DQ_ONLY:
            b_q = load_rows(p_qr, o_r * (H // RQ), o_k, m_r, K).to(tl.float32)
            b_w = (b_q * b_dq - b_k * b_dk) * scale
            b_dg = load_rows(p_dgs + i_row * K, o_r * H, o_k, m_r, K)
            b_dg += tl.cumsum(b_w, 0, reverse=True) + b_carry[None, :]
            store_rows(p_dg + i_row * K, b_dg, o_r * H, o_k, m_r, K)
            b_carry += tl.sum(b_w, 0)

        b_pd = tl.load(p_pr + o_r * H * C + o_r, mask=m_r, other=0.0).to(tl.float32)[:, None]
        b_dq = (load_rows(p_dqs + i_row * K, o_r * H, o_k, m_r, K) + b_dq + b_pd * b_k) * scale
        store_rows(p_dq + i_row * K, b_dq, o_r * H, o_k, m_r, K)
        if not DQ_ONLY:
            b_dk = load_rows(p_dks + i_row * K, o_r * H, o_k, m_r, K) + (b_dk + b_pd * b_q) * scale
            store_rows(p_dk + i_row * K, b_dk, o_r * H, o_k, m_r, K)


def launch_query_key_grads(
    plan: SplitPlan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    do: torch.Tensor,
    h: torch.Tensor,
    dh: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    scale: float,
) -> torch.Tensor | None:
    """Fills dq and dk and returns dg, or, of one decay per row, what `sum_shares` makes it of."""
    if g is not None and plan.kind == "vector":
        dqs, dks, dgs, dg = (torch.empty(dk.shape, dtype=torch.float32, device=k.device) for _ in range(4))
        _launch_vector(plan, q, k, v, g, do, h, dh, (dqs, dks, dgs), (dq, dk, dg), scale)
        return dg
    B, T, H = plan.B, plan.T, plan.H
    shares = None if g is None else torch.empty(plan.key_blocks, B, T, H, dtype=torch.float32, device=q.device)
    programs = B * H * plan.chunks * plan.key_blocks
    operands = q, k, v, g, do, h, dh, dq, dk, shares, float(scale)
    launch_split(plan, chunk_query_key_grad_kernel, programs, *operands, s_dg=B * T * H, DQ_ONLY=False)
    if g is not None and shares is not None and plan.kind == "scalar":
        launch_grown_row_grads(plan, q, k, v, g, do, h, dh, shares, scale)
    return shares


def sum_shares(plan: SplitPlan, dg: torch.Tensor | None) -> torch.Tensor | None:
    """dg, of what `launch_query_key_grads` returns."""
    if dg is None or plan.kind == "vector":
        return dg
    dg = dg[0] if plan.key_blocks == 1 else dg.sum(0)
    return dg.sum((0, 1)) if plan.kind == "constant" else dg


def launch_query_grads(
    plan: SplitPlan,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    do: torch.Tensor,
    h: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """dq alone, under a decay over keys."""
    dq, dqs = torch.empty_like(k), torch.empty(k.shape, dtype=torch.float32, device=k.device)
    # the queries and dh reach only what is not stored
    _launch_vector(plan, k, k, v, g, do, h, h, (dqs, None, None), (dq, None, None), scale)
    return dq


def _launch_vector(
    plan: SplitPlan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    do: torch.Tensor,
    h: torch.Tensor,
    dh: torch.Tensor,
    through: tuple[torch.Tensor | None, ...],
    results: tuple[torch.Tensor | None, ...],
    scale: float,
) -> None:
    """Fills (dq, dk, dg), or dq alone where the others are None, and first what of them goes through the states."""
    B, T, H, C = plan.B, plan.T, plan.H, plan.config.chunk
    per_chunk, only = B * H * plan.chunks, results[1] is None
    p = torch.empty(B, T, H, C, dtype=q.dtype, device=q.device)
    launch_split(plan, chunk_value_scores_kernel, per_chunk, do, v, p)
    operands = q, k, v, g, do, h, dh, *through, float(scale)
    launch_split(plan, chunk_query_key_grad_kernel, per_chunk * plan.key_blocks, *operands, s_dg=0, DQ_ONLY=only)
    operands = q, k, g, p, *through, *results, float(scale)
    launch_split(plan, chunk_key_grad_kernel, per_chunk * plan.key_blocks, *operands, DQ_ONLY=only)
    dqs, dks, dg = *through[:2], results[2]
    if dqs is not None and dks is not None and dg is not None:
        launch_grown_decay_grads(plan, q, k, g, p, h, dh, dqs, dks, dg, scale)

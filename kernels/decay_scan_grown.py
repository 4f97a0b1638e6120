"""The gradient of one decay a row in chunks with a step that grows, for the fused launch.

With S the state before a chunk, c the sum of g from its start, X the paths across all of it and dk' the part of dk that
goes through it (`decay_scan_sums`),

    dg_t = X + scale * sum_{i >= t} e^{c_i} q_i . S do_i + sum_{j < t} k_j . dk'_j + scale * sum_{j < t <= i} W_ij
    W_ij = (q_i . k_j) (do_i . v_j) e^{c_i - c_j}

where `row_decay_grad_kernel` has the last term as a difference of sums, and the passes these sums. A pair that grew by
e^x leaves 2^-24 e^x of itself there, however small dg_t: so where a decay is above one the pairs across t are added up
by themselves.
"""

import triton
import triton.language as tl

from fla_compile.kernels.decay_scan_sums import SUMS, segment_of, sums_before
from fla_compile.kernels.decay_tiles import by_thread_at
from fla_compile.kernels.decay_triton_common import ROW_DECAY, load_columns, load_rows, row_decay
from fla_compile.kernels.decay_triton_grown import GROWTH, pairs_across

__all__ = ["grown_row_decay_grad_kernel"]


@triton.jit(do_not_specialize=["T", "L", "n_s", "n_p"])
def grown_row_decay_grad_kernel(
    p_q, p_k, p_v, p_do, p_g, p_h, p_sums, p_carry, p_dg, p_table, scale, T, L, n_s, n_p,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    NW: tl.constexpr, N: tl.constexpr, BH: tl.constexpr, SX: tl.constexpr, SW: tl.constexpr, TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
    RQ: tl.constexpr = 1, RK: tl.constexpr = 1, RV: tl.constexpr = 1, RG: tl.constexpr = 1,
):  # fmt: skip
    """Writes p_dg again where a step of the chunk grows. Programs, sums and p_dg as those of `row_decay_grad_kernel`;
    p_h holds the states [V, K] in tiles of SX and SW, by `store_product`, or [K, V] if TURNED. R.: as in
    `chunk_scan_kernel`, of q, k, v and g."""
    NH: tl.constexpr = tl.cdiv(H, BH)
    i_p = tl.program_id(0)
    i_n = i_p // NH // n_p
    h_0 = (i_p % NH) * BH
    o_h = h_0 + tl.arange(0, BH)
    o_c = tl.arange(0, C)
    i_b = (i_n // n_s).to(tl.int64)
    t_a, t_e, n_c, i_first = segment_of(p_table, i_n, T, H, L, n_s, C)
    for i_c in range((i_p // NH) % n_p, tl.cdiv(t_e - t_a, C), n_p):
        t_0 = t_a + i_c * C
        m_c = t_0 + o_c < t_e
        i_t = (i_b * T + t_0) * H
        m_g = m_c[:, None] & (o_h < H)[None, :]
        b_g = tl.load(p_g + i_t // RG + (o_c * (H // RG))[:, None] + (o_h // RG)[None, :], mask=m_g, other=0.0)
        if tl.max(b_g.to(tl.float32)) > GROWTH:
            for i_h in range(h_0, tl.minimum(h_0 + BH, H)):
                i_row = i_t + i_h
                i_state = i_first + i_h * n_c + i_c
                b_a = tl.zeros((C, C), tl.float32)
                b_to = tl.zeros((C,), tl.float32)
                for i_k in range(tl.cdiv(K, BK)):
                    o_k = i_k * BK + tl.arange(0, BK)
                    b_q = load_rows(p_q + i_row // RQ * K, o_c * (H // RQ), o_k, m_c, K)
                    b_kt = load_columns(p_k + i_row // RK * K, o_c * (H // RK), o_k, m_c, K)
                    b_a = tl.dot(b_q, b_kt, b_a, input_precision=PRECISION)
                    b_y = tl.zeros((C, BK), tl.float32)
                    for i_v in range(tl.cdiv(V, BV)):
                        o_v = i_v * BV + tl.arange(0, BV)
                        b_do = load_rows(p_do + i_row * V, o_c * H, o_v, m_c, V)
                        if TURNED:
                            b_s = load_columns(p_h + i_state * (K * V), o_k, o_v, o_k < K, V)
                        else:
                            o_s = (o_k // SW * (SX * SW))[None, :] + by_thread_at(o_v, o_k % SW, SX, SW)
                            m_s = (o_v < V)[:, None] & (o_k < K)[None, :]
                            b_s = tl.load(p_h + i_state * (NW * SX * SW) + o_s, mask=m_s, other=0.0)
                        b_y = tl.dot(b_do, b_s, b_y, input_precision=PRECISION)
                    b_to += tl.sum(b_q * b_y, 1)
                b_p = tl.zeros((C, C), tl.float32)
                for i_v in range(tl.cdiv(V, BV)):
                    o_v = i_v * BV + tl.arange(0, BV)
                    b_do = load_rows(p_do + i_row * V, o_c * H, o_v, m_c, V)
                    b_vt = load_columns(p_v + i_row // RV * V, o_c * (H // RV), o_v, m_c, V)
                    b_p = tl.dot(b_do, b_vt, b_p, input_precision=PRECISION)
                b_hi, b_lo, _, _ = row_decay(p_g, i_row, i_h, o_c, m_c, H, RG, ROW_DECAY, True)
                b_to *= tl.exp(b_hi + b_lo)
                b_dg = scale * (tl.cumsum(b_to, 0, reverse=True) + pairs_across(b_a * b_p, b_hi, b_lo, o_c))
                b_from = tl.zeros((C,), tl.float32)
                for i_w in tl.static_range(NW):
                    p_r = p_sums + (((i_b * H + i_h) * SUMS + 2) * NW + i_w) * T
                    b_from += tl.load(p_r + t_0 + o_c, mask=m_c, other=0.0)
                    b_dg += tl.sum(tl.load(p_carry + (i_state * NW + i_w) * N + tl.arange(0, N)), 0)
                tl.store(p_dg + i_row + o_c * H, b_dg + sums_before(b_from, 0), mask=m_c)

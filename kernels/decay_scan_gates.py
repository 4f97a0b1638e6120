"""The passes of `decay_scan` under a gate a channel: over the contracted axis X, or over the columns W.

    over X   forward   y_i = x_i^T S_i      S_i = diag(a_i) S_{i-1} + z_i w_i^T
    over W   forward   y_i = x_i^T S_i      S_i = S_{i-1} diag(a_i) + z_i w_i^T

and in reverse with R_j = a_{j+1} R_{j+1} + z_j w_j^T; g [B, T, H, X] or [B, T, H, W]. Under a decay over keys o and dv
are passes over X, dq and dk passes over W; under a decay over values the other way round.

Inside a chunk row i meets row j with exp(c_i - c_j), which is no product of two bounded factors. Taken relative to the
middle of the chunk's decay, m = L / 2, it is one of two factors between e^m and e^-m:

    e_i = c_i - m     x~_i = x_i exp(e_i)     z~_j = z_j exp(-e_j)     S~ = exp(m) S
    y_i = x~_i^T S~ + sum_{j <= i} (x~_i . z~_j) w_j      S' = exp(m) (S~ + sum_j z~_j w_j^T)

and in reverse with -e in the place of e; over W the factors go to w and y instead of z and x. Products inside the chunk
take each factor and the scores in two parts of the operands' dtype (`halves`): rounded once, they were most of the
error. Chunks shorter than LONG leave so much to the state that it takes both parts too. The factors must be in range:
sum_i |g_i| of a chunk must stay below a limit. The pass writes the largest such sum it met, and where that is above the
limit a second launch of the same program (EXACT) does its work again with every exp(c_i - c_j) by itself, a column at a
time; elsewhere it returns at once. So ordinary decays run at the speed of matrix products, and any decay is right.

The decay's gradient at row t collects every path from j < t to i >= t. With S before a chunk, D = R after it, dq' and
dk' the parts that go through them, and dq" and dk" the parts inside the chunk without their diagonal, for each channel

    dg_t = sum_{i >= t} q_i (dq'_i + dq"_i) + e^L <S, D> + sum_{j < t} k_j (dk'_j + dk"_j) - sum_j k_j dk"_j

where the last term takes away what the others count of pairs on one side of t. The pass for dq writes the first term
and S, the pass for dk adds the others. No sum leaves its chunk: paths that a strong decay has cut contribute nothing.
"""

import torch
import triton
import triton.language as tl

from fla_compile.kernels.decay_scan import (
    KEYS,
    LONG,
    QUERIES,
    load_state,
    load_tile,
    packed_program,
    packed_state,
    segment_program,
    store_packed,
    store_state,
    store_tile,
    tile_mask,
)
from fla_compile.kernels.decay_triton_common import LOG2_E, as_decay

__all__ = ["chunk_scan_columns_kernel", "chunk_scan_rows_kernel", "largest_range"]


def largest_range(dtype: torch.dtype) -> float:
    """The limit of sum_i |g_i| of a chunk, in base 2: factors reach 2^(limit / 2), and float16 ends at 2^16."""
    return 12.0 if dtype == torch.float16 else 200.0


@triton.jit
def load_gates(p_g, o_row, o_col, m_x, WIDTH: tl.constexpr):
    """Log decays in base 2."""
    return as_decay(load_tile(p_g, o_row, o_col, m_x, WIDTH)) * LOG2_E


@triton.jit
def load_row(p_x, o_col, WIDTH: tl.constexpr):
    return tl.load(p_x + o_col, mask=o_col < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def halves(b_x, dtype: tl.constexpr):
    """x as the sum of two numbers of a narrow dtype; rounded in integers, which is faster, a NaN may become zero."""
    b_hi = b_x.to(dtype)
    return b_hi, (b_x - b_hi.to(tl.float32)).to(dtype)


@triton.jit
def add_both(a_0, a_1, b_0, b_1):
    return a_0 + b_0, a_1 + b_1


@triton.jit
def chunk_range(b_g):
    """Sums over the chunk of g and of |g|, in one reduction."""
    return tl.reduce((b_g, tl.abs(b_g)), 0, add_both)


@triton.jit
def from_middle(b_g, b_all, REVERSE: tl.constexpr):
    """e, or -e in reverse."""
    b_e = tl.cumsum(b_g, 0) - 0.5 * b_all[None, :]
    if REVERSE:
        b_e = -b_e
    return b_e


@triton.jit(do_not_specialize=["T", "L", "n_s", "limit"])
def chunk_scan_rows_kernel(
    p_x, p_z, p_w, p_g, p_s0, p_y, p_st, p_gt, p_range, p_table, p_u, s_in, s_y, s_st, limit, T, L, n_s,
    H: tl.constexpr, X: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BW: tl.constexpr,
    REVERSE: tl.constexpr, OUTPUT: tl.constexpr, FINAL: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_S0: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    RX: tl.constexpr = 1, RZ: tl.constexpr = 1, RW: tl.constexpr = 1, RG: tl.constexpr = 1,
):  # fmt: skip
    """The gate is over X, the rows of the state; BX covers X. Arguments as for `chunk_scan_kernel`."""
    if EXACT:
        if tl.load(p_range + tl.program_id(0)) <= limit:
            return
    if p_table is None:
        i_w, i_nh, _, i_seq, t_a, t_e = segment_program(T, H, L, n_s, W, BW)
    else:
        i_w, i_nh, _, i_seq, t_a, t_e, _, i_u = packed_program(p_table, H, W, BW, C, REVERSE)
    dtype = p_w.dtype.element_ty
    n_c = tl.cdiv(t_e - t_a, C)
    o_c = tl.arange(0, C)
    o_x = tl.arange(0, BX)
    o_w = i_w * BW + tl.arange(0, BW)

    m_s = tile_mask(o_x < X, o_w, W, BW, BX == X)
    b_s = tl.zeros((BX, BW), tl.float32)
    b_total = tl.zeros((BX,), tl.float32)
    b_range = tl.zeros((BX,), tl.float32)
    if p_table is not None:
        b_s = packed_state(p_s0, p_u, i_nh, i_u, s_in, o_x, o_w, m_s, X, W, BX, BW, TRANSPOSED, HAS_S0)
    elif HAS_S0:
        b_s += load_state(p_s0, i_nh, o_x, o_w, m_s, X, W, TRANSPOSED) * s_in
    for i_n in range(n_c):
        t_0 = t_a + i_n * C
        if REVERSE:
            t_0 = t_a + (n_c - 1 - i_n) * C
        i_row = i_seq + t_0.to(tl.int64) * H
        o_t = t_0 + o_c
        m_c = o_t < t_e
        if REVERSE:
            m_a = o_t[None, :] >= o_t[:, None]
        else:
            m_a = o_t[:, None] >= o_t[None, :]
        m_x = tile_mask(m_c, o_x, X, BX, EVEN)
        m_w = tile_mask(m_c, o_w, W, BW, EVEN)
        if EXACT:
            if OUTPUT:  # first, while there are registers
                b_x = load_tile(p_x + i_row // RX * X, o_c * (H // RX), o_x, m_x, X)
                b_a = tl.zeros((C, C), tl.float32)
                b_e = tl.zeros((C, BX), tl.float32)
                n_j = tl.minimum(t_e - t_0, C)
                for i_j in range(n_j):
                    j = i_j
                    if not REVERSE:
                        j = n_j - 1 - i_j
                    b_gj = as_decay(load_row(p_g + (i_row + j * H) // RG * X, o_x, X)) * LOG2_E
                    b_zj = load_row(p_z + (i_row + j * H) // RZ * X, o_x, X)
                    if REVERSE:
                        b_e += tl.where((o_c < j)[:, None], b_gj[None, :], 0.0)
                    b_aj = tl.sum(tl.exp2(b_e) * b_zj[None, :] * b_x, 1)
                    b_a = tl.where(m_a & (o_c == j)[None, :], b_aj[:, None], b_a)
                    if not REVERSE:
                        b_e += tl.where((o_c >= j)[:, None], b_gj[None, :], 0.0)
        b_z = load_tile(p_z + i_row // RZ * X, o_c * (H // RZ), o_x, m_x, X)
        b_w = load_tile(p_w + i_row // RW * W, o_c * (H // RW), o_w, m_w, W)
        b_g = load_gates(p_g + i_row // RG * X, o_c * (H // RG), o_x, m_x, X)
        if EXACT:
            b_e = tl.cumsum(b_g, 0)
            b_all = tl.sum(b_g, 0)
            # e to the end of the chunk in forward direction: from row j on, or up to row j
            if REVERSE:
                b_z = (b_z * tl.exp2(b_e)).to(dtype)
                b_e = b_all[None, :] - b_e
            else:
                b_z = (b_z * tl.exp2(b_all[None, :] - b_e)).to(dtype)
            if OUTPUT:
                b_y = tl.dot((b_x * tl.exp2(b_e)).to(dtype), b_s.to(dtype), input_precision=PRECISION) * s_y
            b_s *= tl.exp2(b_all)[:, None]
        else:
            b_all, b_abs = chunk_range(b_g)
            b_range = tl.maximum(b_range, b_abs)
            b_e = from_middle(b_g, b_all, REVERSE)
            b_half = tl.exp2(0.5 * b_all)
            b_s *= b_half[:, None]
            b_z, b_zl = halves(b_z * tl.exp2(-b_e), dtype)
            if OUTPUT:
                b_x = load_tile(p_x + i_row // RX * X, o_c * (H // RX), o_x, m_x, X)
                b_x, b_xl = halves(b_x * tl.exp2(b_e), dtype)
                b_a = tl.dot(b_xl, tl.trans(b_z), input_precision=PRECISION)
                b_a = tl.dot(b_x, tl.trans(b_zl), b_a, input_precision=PRECISION)
                b_a = tl.dot(b_x, tl.trans(b_z), b_a, input_precision=PRECISION)
                b_a = tl.where(m_a, b_a, 0.0)
                b_y = tl.dot(b_x, b_s.to(dtype), input_precision=PRECISION) * s_y
        if not OUTPUT:
            b_total += b_all
        if OUTPUT:
            if EXACT:
                b_a = b_a.to(dtype)
            else:
                b_a, b_al = halves(b_a, dtype)
                b_y += tl.dot(b_al, b_w, input_precision=PRECISION) * s_y
            b_y += tl.dot(b_a, b_w, input_precision=PRECISION) * s_y
            store_tile(p_y + i_row * W, b_y, o_c * H, o_w, m_w, W)
        if C < LONG and not EXACT:
            b_s = tl.dot(tl.trans(b_zl), b_w, b_s, input_precision=PRECISION)
        b_s = tl.dot(tl.trans(b_z), b_w, b_s, input_precision=PRECISION)
        if not EXACT:
            b_s *= b_half[:, None]
    if FINAL:
        if p_table is None:
            store_state(p_st, i_nh, b_s * s_st, o_x, o_w, m_s, X, W)
        else:
            store_packed(p_st, p_table, b_s * s_st, o_x, o_w, m_s, H, X, W, BW, REVERSE)
    if not OUTPUT:
        tl.store(p_gt + i_nh * X + o_x, b_total, mask=(o_x < X) & (i_w == 0))
    if not EXACT:
        tl.store(p_range + tl.program_id(0), tl.max(b_range, 0))


@triton.jit(do_not_specialize=["T", "L", "n_s", "limit"])
def chunk_scan_columns_kernel(
    p_x, p_z, p_w, p_g, p_e, p_s0, p_y, p_st, p_range, p_h, p_dg, p_table, p_u, s_in, s_y, s_st, limit, T, L, n_s,
    H: tl.constexpr, X: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BW: tl.constexpr,
    REVERSE: tl.constexpr, PART: tl.constexpr, FINAL: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_S0: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    RX: tl.constexpr = 1, RZ: tl.constexpr = 1, RW: tl.constexpr = 1, RG: tl.constexpr = 1, RE: tl.constexpr = 1,
):  # fmt: skip
    """The gate is over W, the columns of the state; BX covers X. Arguments as for `chunk_scan_kernel`; p_dg
    [B, T, H, W] is written by the pass for dq and completed by the pass for dk, which cuts into the same chunks and
    blocks."""
    if EXACT:
        if tl.load(p_range + tl.program_id(0)) <= limit:
            return
    elif PART == KEYS:
        if tl.load(p_range + tl.program_id(0)) > limit:
            return
    if p_table is None:
        i_w, i_nh, _, i_seq, t_a, t_e = segment_program(T, H, L, n_s, W, BW)
    else:
        i_w, i_nh, _, i_seq, t_a, t_e, i_state, i_u = packed_program(p_table, H, W, BW, C, REVERSE)
    dtype = p_w.dtype.element_ty
    n_c = tl.cdiv(t_e - t_a, C)
    if p_table is None:
        i_state = i_nh * tl.cdiv(L, C)
    o_c = tl.arange(0, C)
    o_x = tl.arange(0, BX)
    o_w = i_w * BW + tl.arange(0, BW)

    m_s = tile_mask(o_x < X, o_w, W, BW, BX == X)
    b_s = tl.zeros((BX, BW), tl.float32)
    b_range = tl.zeros((BW,), tl.float32)
    if p_table is not None:
        b_s = packed_state(p_s0, p_u, i_nh, i_u, s_in, o_x, o_w, m_s, X, W, BX, BW, TRANSPOSED, HAS_S0)
    elif HAS_S0:
        b_s += load_state(p_s0, i_nh, o_x, o_w, m_s, X, W, TRANSPOSED) * s_in
    for i_n in range(n_c):
        i_c = i_n
        if REVERSE:
            i_c = n_c - 1 - i_n
        t_0 = t_a + i_c * C
        i_row = i_seq + t_0.to(tl.int64) * H
        o_t = t_0 + o_c
        m_c = o_t < t_e
        if REVERSE:
            m_a = o_t[None, :] > o_t[:, None]
        else:
            m_a = o_t[:, None] > o_t[None, :]
        m_x = tile_mask(m_c, o_x, X, BX, EVEN)
        m_w = tile_mask(m_c, o_w, W, BW, EVEN)
        b_x = load_tile(p_x + i_row // RX * X, o_c * (H // RX), o_x, m_x, X)
        b_z = load_tile(p_z + i_row // RZ * X, o_c * (H // RZ), o_x, m_x, X)
        b_w = load_tile(p_w + i_row // RW * W, o_c * (H // RW), o_w, m_w, W)
        b_g = load_gates(p_g + i_row // RG * W, o_c * (H // RG), o_w, m_w, W)
        if EXACT:
            b_e = tl.cumsum(b_g, 0)
            b_all = tl.sum(b_g, 0)
        else:
            if PART == KEYS:
                b_all = tl.sum(b_g, 0)
            else:
                b_all, b_abs = chunk_range(b_g)
                b_range = tl.maximum(b_range, b_abs)
            b_e = from_middle(b_g, b_all, REVERSE)
            b_out = tl.exp2(b_e)
            b_v, b_vl = halves(b_w * tl.exp2(-b_e), dtype)
        b_a = tl.dot(b_x, tl.trans(b_z), input_precision=PRECISION)
        b_d = tl.sum(tl.where(o_t[:, None] == o_t[None, :], b_a, 0.0), 1)[:, None] * b_w
        b_a = tl.where(m_a, b_a, 0.0)
        if PART == QUERIES:
            store_state(p_h, i_state + i_c, b_s, o_x, o_w, m_s, X, W)
        if PART == KEYS:
            b_h = load_state(p_h, i_state + i_c, o_x, o_w, m_s, X, W, False)
            b_k = load_tile(p_e + i_row // RE * W, o_c * (H // RE), o_w, m_w, W)
        if EXACT:
            b_rest = b_all[None, :] - b_e
            if REVERSE:
                b_in, b_out = b_e, b_rest
            else:
                b_in, b_out = b_rest, b_e
            b_v = (b_w * tl.exp2(b_in)).to(dtype)
            b_y = tl.dot(b_x, b_s.to(dtype), input_precision=PRECISION) * tl.exp2(b_out)
            if PART == KEYS:
                b_t = tl.sum(b_h * b_s, 0) * tl.exp2(b_all)
            b_s *= tl.exp2(b_all)[None, :]
            b_i = tl.zeros((C, BW), tl.float32)
            b_e = tl.zeros((C, BW), tl.float32)
            n_j = tl.minimum(t_e - t_0, C)
            for i_j in range(n_j):
                j = i_j
                if not REVERSE:
                    j = n_j - 1 - i_j
                b_gj = as_decay(load_row(p_g + (i_row + j * H) // RG * W, o_w, W)) * LOG2_E
                b_wj = load_row(p_w + (i_row + j * H) // RW * W, o_w, W)
                b_aj = tl.sum(tl.where((o_c == j)[None, :], b_a, 0.0), 1)
                if REVERSE:
                    b_e += tl.where((o_c < j)[:, None], b_gj[None, :], 0.0)
                b_i += b_aj[:, None] * b_wj[None, :] * tl.exp2(b_e)
                if not REVERSE:
                    b_e += tl.where((o_c >= j)[:, None], b_gj[None, :], 0.0)
            if PART == KEYS:
                b_t -= tl.sum(b_k * b_i, 0)
            b_y += b_i
        else:
            b_half = tl.exp2(0.5 * b_all)
            b_s *= b_half[None, :]
            if PART == KEYS:
                b_t = tl.sum(b_h * b_s, 0) * b_half
            b_a, b_al = halves(b_a, dtype)
            b_y = tl.dot(b_al, b_v, input_precision=PRECISION)
            b_y = tl.dot(b_a, b_vl, b_y, input_precision=PRECISION)
            b_y = tl.dot(b_a, b_v, b_y, input_precision=PRECISION)
            if PART == KEYS:
                b_t -= tl.sum(b_k * b_out * b_y, 0)
            b_y = tl.dot(b_x, b_s.to(dtype), b_y, input_precision=PRECISION) * b_out
        if PART == QUERIES:
            b_q = load_tile(p_e + i_row // RE * W, o_c * (H // RE), o_w, m_w, W)
            store_tile(p_dg + i_row * W, tl.cumsum(b_q * b_y, 0, reverse=True) * s_y, o_c * H, o_w, m_w, W)
        if PART == KEYS:
            b_kdk = tl.where(((o_c + 1 < C) & (o_t + 1 < t_e))[:, None], b_k * b_y, 0.0)
            b_dg = load_tile(p_dg + i_row * W, o_c * H, o_w, m_w, W)
            b_dg += (b_t[None, :] + (tl.cumsum(b_kdk, 0) - b_kdk)) * s_y
            store_tile(p_dg + i_row * W, b_dg, o_c * H, o_w, m_w, W)
        store_tile(p_y + i_row * W, (b_y + b_d) * s_y, o_c * H, o_w, m_w, W)
        if C < LONG and not EXACT:
            b_s = tl.dot(tl.trans(b_z), b_vl, b_s, input_precision=PRECISION)
        b_s = tl.dot(tl.trans(b_z), b_v, b_s, input_precision=PRECISION)
        if not EXACT:
            b_s *= b_half[None, :]
    if FINAL:
        if p_table is None:
            store_state(p_st, i_nh, b_s * s_st, o_x, o_w, m_s, X, W)
        else:
            store_packed(p_st, p_table, b_s * s_st, o_x, o_w, m_s, H, X, W, BW, REVERSE)
    if not EXACT:
        if PART != KEYS:
            tl.store(p_range + tl.program_id(0), tl.max(b_range, 0))

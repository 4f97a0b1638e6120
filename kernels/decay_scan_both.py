"""One pass of a decayed outer product under gates over both axes of the state: rows X and columns W.

    forward   y_i = x_i^T S_i      S_i = diag(a_i) S_{i-1} diag(b_i) + z_i w_i^T
    reverse   y_j = x_j^T R_j      R_j = diag(a_{j+1}) R_{j+1} diag(b_{j+1}) + z_j w_j^T

Shapes: x, z and the log of a [B, T, H, X]; w, y and the log of b [B, T, H, W]. The output and all three gradients of
o_t = scale * S_t^T q_t, S_t = diag(a_t) S_{t-1} diag(b_t) + k_t v_t^T are such passes, with ' for exchanged gates:

    o  = scale * forward(q, k, v)        dq = scale * forward'(do, v, k)
    dk = scale * reverse'(v, do, q)      dv = scale * reverse(k, q, do)

As in `decay_scan_gates`, with e_i and f_i the sums of log a and log b from the middle of the chunk to row i, and m and
n half of those over the chunk,

    x~_i = x_i e^{e_i}    z~_j = z_j e^{-e_j}    w~_j = w_j e^{-f_j}    S' = e^m (e^m S e^n + sum_j z~_j w~_j^T) e^n
    y_i  = e^{f_i} ((x~_i^T e^m S) e^n + sum_{j < i} (x~_i . z~_j) w~_j) + (x_i . z_i) w_i

and in reverse with -e and -f. x~, z~, w~ and the scores take part in two parts of the operands' dtype. All are in range
where sum_i |g_i| of a chunk stays below a limit on either axis; a product of factors of both is then one of float32.
The pass writes the largest such sum it met. Where that is above the limit, `step_scan_both_kernel` does the program's
work again, one step after another with the state in registers: no exponent but those of single steps, so that it is
right whatever the decay.

The gradient of log a_t is the row sums of D_t (a_t S_{t-1} b_t), D_t the gradient of S_t, and so collects every path
from j < t to i >= t. With S before a chunk, D after it, L its decays, dq and dk" inside the chunk without their
diagonal, dk' the part of dk that goes through D, for each channel

    dg_t = sum over the other axis of e^L S D + sum_{i >= t} (q_i dq_i - k_i dk"_i) + sum_{j < t} k_j dk'_j

in which pairs of rows before t are not met and those after it cancel; k_t dk'_t, which no decay before t cuts, is not
added to be taken away again. Of a pair that grew by e^x (g > 0) its rounding would be left, 2^-24 e^x: programs that
meet chunks that grow by more than 2^4 are done step by step too, and there the pass for dq adds up the pairs of j < t
<= i alone (`decay_scan_both_grown`). Of the gate over values it is the same with do, o, v and dv in the places of q,
dq, k and dk. The pass for dq (or o) writes q dq and S, the pass for dk (or dv) adds the others.
"""

import triton
import triton.language as tl

from fla_compile.kernels.decay_scan import (
    KEYS,
    LONG,
    QUERIES,
    chunk_at,
    first_state,
    packed_program,
    segment_program,
    store_last,
)
from fla_compile.kernels.decay_scan_both_grown import chunk_grows, load_row_gates, paths_of_queries
from fla_compile.kernels.decay_scan_gates import load_gates, load_row
from fla_compile.kernels.decay_scan_sums import add_both, halves, sums_before
from fla_compile.kernels.decay_tiles import load_state, load_tile, store_state, store_tile, tile_mask

__all__ = ["chunk_scan_both_kernel", "step_scan_both_kernel"]

# In a gradient's range growth by 2^4 is the limit: on both axes it leaves eight of the 16 bits that factors have in two
# parts of bfloat16.
GROWN = tl.constexpr(4.0)


@triton.jit
def chunks_program(
    p_table, T, H: tl.constexpr, L, n_s, W: tl.constexpr, BW: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr
):
    """As `walk_program`, with the number of chunks in the place of the head: counted after it, without a table the
    machine code was another."""
    if p_table is None:
        i_w, i_nh, _, i_seq, t_a, t_e = segment_program(T, H, L, n_s, W, BW)
        n_c = tl.cdiv(t_e - t_a, C)
        return i_w, i_nh, i_seq, t_a, t_e, n_c, i_nh * tl.cdiv(L, C), -1
    else:
        i_w, i_nh, _, i_seq, t_a, t_e, i_state, i_u = packed_program(p_table, H, W, BW, C, REVERSE)
        return i_w, i_nh, i_seq, t_a, t_e, tl.cdiv(t_e - t_a, C), i_state, i_u


@triton.jit
def chunk_range(b_g, limit, PART: tl.constexpr):
    """Sums over the chunk of g and of |g|, in one reduction; as QUERIES what grows counts more."""
    b_n = tl.abs(b_g)
    if PART == QUERIES:
        b_n = tl.maximum(b_n, b_g * (limit / GROWN))
    return tl.reduce((b_g, b_n), 0, add_both)


@triton.jit
def summed_from_middle(b_g, b_all, REVERSE: tl.constexpr):
    """e, or -e in reverse; by sums, which take fewer registers than the products of `decay_scan_gates`."""
    b_e = tl.cumsum(b_g, 0) - 0.5 * b_all[None, :]
    if REVERSE:
        b_e = -b_e
    return b_e


@triton.jit
def product_of_halves(b_x, b_xl, b_y, b_yl, b_sum):
    """x y + sum, all but the product of the smaller parts."""
    b_sum = tl.dot(b_xl, b_y, b_sum, input_precision="ieee")
    b_sum = tl.dot(b_x, b_yl, b_sum, input_precision="ieee")
    return tl.dot(b_x, b_y, b_sum, input_precision="ieee")


@triton.jit
def add_key_share(p_dg, b_k, b_dk, b_inside, b_across, s_y, o_row, o_w, m_w, W: tl.constexpr):
    """Completes dg of a chunk, from k, dk' and dk"."""
    b_dg = (sums_before(b_k * b_dk, 0) - tl.cumsum(b_k * b_inside, 0, reverse=True)) + b_across[None, :]
    store_tile(p_dg, load_tile(p_dg, o_row, o_w, m_w, W) + b_dg * s_y, o_row, o_w, m_w, W)


@triton.jit(do_not_specialize=["T", "L", "n_s", "limit"])
def chunk_scan_both_kernel(
    p_x, p_z, p_w, p_a, p_b, p_e, p_s0, p_y, p_st, p_ta, p_tb, p_range, p_h, p_dg, p_table, p_u,
    s_in, s_y, s_st, limit, T, L, n_s,
    H: tl.constexpr, X: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BW: tl.constexpr,
    REVERSE: tl.constexpr, PART: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One program for each sequence, segment of L steps, head and block of columns; BX covers X. p_a and p_b are the
    logarithms.

    The initial state, [X, W] or [W, X] if TRANSPOSED, is read times s_in, y is written times s_y, the final state times
    s_st; each may be absent. As QUERIES or KEYS the pass has its queries or keys in p_e; QUERIES writes p_dg
    [B, T, H, W] and the state before each chunk, p_h, and KEYS, over the same programs, completes p_dg. Without p_x
    only what each segment adds to the state is written, to p_st, and the sums of log a and log b over it, in base 2, to
    p_ta [B, segments, H, X] and p_tb [B, segments, H, W]. Packed sequences have a table, and states p_u where their
    segments meet if any does.
    """
    if PART == KEYS:
        if not (tl.load(p_range + tl.program_id(0)) <= limit):
            return
    i_w, i_nh, i_seq, t_a, t_e, n_c, i_state, i_u = chunks_program(p_table, T, H, L, n_s, W, BW, C, REVERSE)
    dtype = p_w.dtype.element_ty
    o_c = tl.arange(0, C)
    o_x = tl.arange(0, BX)
    o_w = i_w * BW + tl.arange(0, BW)
    m_s = tile_mask(o_x < X, o_w, W, BW, BX == X)
    b_s = first_state(p_s0, p_table, p_u, i_nh, i_u, s_in, o_x, o_w, m_s, X, W, BX, BW, TRANSPOSED, p_s0 is not None)
    b_range = tl.zeros((BX,), tl.float32)
    b_wide = tl.zeros((BW,), tl.float32)
    if p_x is None:
        b_ta = tl.zeros((BX,), tl.float32)
        b_tb = tl.zeros((BW,), tl.float32)
    for i_n in range(n_c):
        i_c, t_0, i_row = chunk_at(i_n, n_c, t_a, i_seq, H, C, REVERSE)
        o_t = t_0 + o_c
        m_c = o_t < t_e
        if REVERSE:
            m_a = o_t[None, :] > o_t[:, None]
        else:
            m_a = o_t[:, None] > o_t[None, :]
        m_x = tile_mask(m_c, o_x, X, BX, EVEN)
        m_w = tile_mask(m_c, o_w, W, BW, EVEN)
        if PART == QUERIES:
            store_state(p_h, i_state + i_c, b_s, o_x, o_w, m_s, X, W)
        b_z = load_tile(p_z + i_row * X, o_c * H, o_x, m_x, X)
        b_w = load_tile(p_w + i_row * W, o_c * H, o_w, m_w, W)
        if p_x is not None:
            b_x = load_tile(p_x + i_row * X, o_c * H, o_x, m_x, X)
            b_d = tl.sum(b_x.to(tl.float32) * b_z.to(tl.float32), 1)[:, None] * b_w.to(tl.float32)
        b_e = load_gates(p_a + i_row * X, o_c * H, o_x, m_x, X)
        b_f = load_gates(p_b + i_row * W, o_c * H, o_w, m_w, W)
        b_all, b_abs = chunk_range(b_e, limit, PART)
        b_sum, b_size = chunk_range(b_f, limit, PART)
        if PART != KEYS:
            b_range = tl.maximum(b_range, b_abs)
            b_wide = tl.maximum(b_wide, b_size)
        b_rows = tl.exp2(0.5 * b_all)
        b_columns = tl.exp2(0.5 * b_sum)
        b_e = summed_from_middle(b_e, b_all, REVERSE)
        b_z, b_zl = halves(b_z * tl.exp2(-b_e), dtype)
        b_f = summed_from_middle(b_f, b_sum, REVERSE)
        b_w, b_wl = halves(b_w * tl.exp2(-b_f), dtype)
        b_s *= b_rows[:, None]
        if p_x is not None:
            b_out = tl.exp2(b_f)
            b_x, b_xl = halves(b_x * tl.exp2(b_e), dtype)
            b_i = product_of_halves(b_x, b_xl, tl.trans(b_z), tl.trans(b_zl), None)
            b_a, b_al = halves(tl.where(m_a, b_i, 0.0), dtype, False)
            b_y = tl.dot(b_x, b_s.to(dtype), input_precision="ieee") * b_columns[None, :]
            if PART == KEYS:
                b_h = load_state(p_h, i_state + i_c, o_x, o_w, m_s, X, W, False)
                b_across = tl.sum(b_h * b_s * b_rows[:, None], 0) * b_columns * b_columns
                b_i = product_of_halves(b_a, b_al, b_w, b_wl, None) * b_out
                b_y *= b_out
                b_k = load_tile(p_e + i_row * W, o_c * H, o_w, m_w, W).to(tl.float32)
                add_key_share(p_dg + i_row * W, b_k, b_y, b_i, b_across, s_y, o_c * H, o_w, m_w, W)
                b_y += b_i
            else:
                b_y = product_of_halves(b_a, b_al, b_w, b_wl, b_y) * b_out
            if PART == QUERIES:
                b_q = load_tile(p_e + i_row * W, o_c * H, o_w, m_w, W).to(tl.float32)
                store_tile(p_dg + i_row * W, tl.cumsum(b_q * b_y, 0, reverse=True) * s_y, o_c * H, o_w, m_w, W)
            if p_y is not None:
                store_tile(p_y + i_row * W, (b_y + b_d) * s_y, o_c * H, o_w, m_w, W)
        else:
            b_ta += b_all
            b_tb += b_sum
        b_s *= b_columns[None, :]
        if C < LONG:
            b_s = product_of_halves(tl.trans(b_z), tl.trans(b_zl), b_w, b_wl, b_s)
        else:
            b_s = tl.dot(tl.trans(b_z), b_w, b_s, input_precision="ieee")
        b_s *= b_rows[:, None] * b_columns[None, :]
    if p_st is not None:
        store_last(p_st, p_table, i_nh, b_s * s_st, o_x, o_w, m_s, H, X, W, BW, REVERSE)
    if p_x is None:
        tl.store(p_ta + i_nh * X + o_x, b_ta, mask=(o_x < X) & (i_w == 0))
        tl.store(p_tb + i_nh * W + o_w, b_tb, mask=o_w < W)
    if PART != KEYS:
        tl.store(p_range + tl.program_id(0), tl.maximum(tl.max(b_range, 0), tl.max(b_wide, 0)))


@triton.jit(do_not_specialize=["T", "L", "n_s", "limit"])
def step_scan_both_kernel(
    p_x, p_z, p_w, p_a, p_b, p_e, p_s0, p_y, p_st, p_ta, p_tb, p_range, p_h, p_dg, p_table, p_u,
    s_in, s_y, s_st, limit, T, L, n_s,
    H: tl.constexpr, X: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BW: tl.constexpr,
    REVERSE: tl.constexpr, PART: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The work of the programs of `chunk_scan_both_kernel` that are above the limit, of all if p_range is absent.

    As KEYS what was there after the chunk and what is added inside it are two states.
    """
    if p_range is not None:
        if tl.load(p_range + tl.program_id(0)) <= limit:
            return
    i_w, i_nh, i_seq, t_a, t_e, n_c, i_state, i_u = chunks_program(p_table, T, H, L, n_s, W, BW, C, REVERSE)
    o_c = tl.arange(0, C)
    o_x = tl.arange(0, BX)
    o_w = i_w * BW + tl.arange(0, BW)
    m_s = tile_mask(o_x < X, o_w, W, BW, BX == X)
    b_s = first_state(p_s0, p_table, p_u, i_nh, i_u, s_in, o_x, o_w, m_s, X, W, BX, BW, TRANSPOSED, p_s0 is not None)
    if p_x is None:
        b_ta = tl.zeros((BX,), tl.float32)
        b_tb = tl.zeros((BW,), tl.float32)
    for i_n in range(n_c):
        i_c, t_0, i_row = chunk_at(i_n, n_c, t_a, i_seq, H, C, REVERSE)
        n_j = tl.minimum(t_e - t_0, C)
        m_w = tile_mask(o_c < n_j, o_w, W, BW, EVEN)
        if PART == QUERIES:
            store_state(p_h, i_state + i_c, b_s, o_x, o_w, m_s, X, W)
            grown = chunk_grows(p_a + i_row * X, p_b + i_row * W, n_j, o_x, o_w, H, X, W, BX, BW)
            if grown:
                b_dg = paths_of_queries(
                    p_x + i_row * X, p_z + i_row * X, p_w + i_row * W, p_a + i_row * X, p_b + i_row * W,
                    p_e + i_row * W, b_s, o_c, n_j, o_x, o_w, H, X, W, C, BX, BW, EVEN,
                )  # fmt: skip
                store_tile(p_dg + i_row * W, b_dg * s_y, o_c * H, o_w, m_w, W)
        if PART != 0:
            b_y = tl.zeros((C, BW), tl.float32)
        if PART == KEYS:
            b_r = tl.zeros((BX, BW), tl.float32)
            b_i = tl.zeros((C, BW), tl.float32)
        for i_j in range(n_j):
            j = i_j
            if REVERSE:
                j = n_j - 1 - i_j
            i_t = i_row + j * H
            b_z = load_row(p_z + i_t * X, o_x, X)
            b_w = load_row(p_w + i_t * W, o_w, W)
            b_ga = load_row_gates(p_a + i_t * X, o_x, X)
            b_gb = load_row_gates(p_b + i_t * W, o_w, W)
            b_a, b_b = tl.exp2(b_ga), tl.exp2(b_gb)
            if not REVERSE:
                b_s = b_s * b_a[:, None] * b_b[None, :]
            if p_x is not None:
                b_x = load_row(p_x + i_t * X, o_x, X)
                b_yj = tl.sum(b_x[:, None] * b_s, 0)
                if PART != 0:
                    b_y = tl.where((o_c == j)[:, None], b_yj[None, :], b_y)
                if PART == KEYS:
                    b_ij = tl.sum(b_x[:, None] * b_r, 0)
                    b_i = tl.where((o_c == j)[:, None], b_ij[None, :], b_i)
                    b_yj += b_ij
                if p_y is not None:
                    b_yj += tl.sum(b_x * b_z, 0) * b_w
                    tl.store(p_y + i_t * W + o_w, (b_yj * s_y).to(p_y.dtype.element_ty), mask=o_w < W)
            else:
                b_ta += b_ga
                b_tb += b_gb
            if PART == KEYS:
                b_r = (b_r + b_z[:, None] * b_w[None, :]) * b_a[:, None] * b_b[None, :]
            else:
                b_s += b_z[:, None] * b_w[None, :]
            if REVERSE:
                b_s = b_s * b_a[:, None] * b_b[None, :]
        if PART == QUERIES:
            if not grown:
                b_q = load_tile(p_e + i_row * W, o_c * H, o_w, m_w, W).to(tl.float32)
                store_tile(p_dg + i_row * W, tl.cumsum(b_q * b_y, 0, reverse=True) * s_y, o_c * H, o_w, m_w, W)
        if PART == KEYS:
            b_h = load_state(p_h, i_state + i_c, o_x, o_w, m_s, X, W, False)
            b_k = load_tile(p_e + i_row * W, o_c * H, o_w, m_w, W).to(tl.float32)
            grown = chunk_grows(p_a + i_row * X, p_b + i_row * W, n_j, o_x, o_w, H, X, W, BX, BW)
            b_i = tl.where(grown, 0.0, b_i)
            add_key_share(p_dg + i_row * W, b_k, b_y, b_i, tl.sum(b_h * b_s, 0), s_y, o_c * H, o_w, m_w, W)
            b_s += b_r
    if p_st is not None:
        store_last(p_st, p_table, i_nh, b_s * s_st, o_x, o_w, m_s, H, X, W, BW, REVERSE)
    if p_x is None:
        tl.store(p_ta + i_nh * X + o_x, b_ta, mask=(o_x < X) & (i_w == 0))
        tl.store(p_tb + i_nh * W + o_w, b_tb, mask=o_w < W)

"""The states at the ends of chunks under a gate a key, a block of keys and values a program.

What it leaves is the state S before a chunk, the gradient R of the state after it, or what a segment adds to either.
Its factors, e^{L - c_j} forward and e^{c_i} in reverse, as in `decay_chunk_gates`, are never out of range.
"""

import triton
import triton.language as tl

from fla_compile.kernels.decay_scan import chunk_at, first_state, store_last, walk_program
from fla_compile.kernels.decay_scan_gates import channel_sums, load_gates
from fla_compile.kernels.decay_scan_sums import halves
from fla_compile.kernels.decay_tiles import load_tile, store_state, tile_mask, touch

__all__ = ["chunk_states_kernel", "row_factors"]

# Where a float32 has its exponent.
EXPONENT = tl.constexpr(23)


@triton.jit
def sums_after_and_all(b_h, b_l, C: tl.constexpr, BX: tl.constexpr, PRECISION: tl.constexpr):
    """sum_{i > t} x_i [C, BX] and that of all rows [BX], x in two parts, by one product: what is read in two layouts
    is not copied ahead of time. Eight rows have the one and eight the other in turn, which a thread then has both."""
    o_m = tl.arange(0, 2 * C)
    m_all = (o_m // 8 % 2 == 1)[:, None] | ((o_m // 16 * 8 + o_m % 8)[:, None] < tl.arange(0, C)[None, :])
    b_m = m_all.to(b_h.dtype)
    b_y = tl.dot(b_m, b_l, tl.dot(b_m, b_h, input_precision=PRECISION), input_precision=PRECISION)
    b_y = tl.permute(tl.reshape(b_y, (C // 8, 2, 8, BX)), (0, 2, 3, 1))
    b_after, b_all = tl.split(b_y)
    return tl.reshape(b_after, (C, BX)), tl.max(tl.reshape(b_all, (C, BX)), 0)


@triton.jit
def row_factors(b_s):
    """Powers of two, and their inverses, that bring the rows of a state to where float16 has all its bits: up to 2^15.
    Rows below 2^-112 stay smaller; what is no number stays none."""
    b_x = tl.maximum((tl.max(tl.abs(b_s), 1)).to(tl.int32, bitcast=True) >> EXPONENT, 15)
    b_f, b_down = (b_x - 14) << EXPONENT, (268 - b_x) << EXPONENT
    return b_f.to(tl.float32, bitcast=True), b_down.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["T", "L", "n_s"])
def chunk_states_kernel(
    p_z, p_w, p_g, p_s0, p_st, p_gt, p_h, p_f, p_table, p_u, s_in, s_st, T, L, n_s,
    H: tl.constexpr, X: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BW: tl.constexpr,
    REVERSE: tl.constexpr, FINAL: tl.constexpr, HAS_S0: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    RZ: tl.constexpr = 1, RW: tl.constexpr = 1, RG: tl.constexpr = 1, BEFORE: tl.constexpr = False,
    CHUNKS: tl.constexpr = 1,
):  # fmt: skip
    """Arguments as for `chunk_scan_rows_kernel`, with no output, and a second axis of programs for the X blocks. p_h
    gets the state before every chunk, CHUNKS of which stand in the place of one, divided by the `row_factors` that p_f,
    if given, gets (forward, for BW that covers W); p_st with FINAL the last one, p_gt the segment's log decay in base
    2."""
    i_w, i_nh, _, i_seq, t_a, t_e, i_state, i_u = walk_program(p_table, T, H, L, n_s, W, BW, C * CHUNKS, REVERSE)
    i_state *= CHUNKS
    dtype = p_w.dtype.element_ty
    n_c = tl.cdiv(t_e - t_a, C)
    o_c = tl.arange(0, C)
    o_x = tl.arange(0, BX)
    if X > BX:
        o_x += tl.program_id(1) * BX
    o_w = i_w * BW + tl.arange(0, BW)
    m_s = tile_mask(o_x < X, o_w, W, BW, X % BX == 0)
    b_s = first_state(p_s0, p_table, p_u, i_nh, i_u, s_in, o_x, o_w, m_s, X, W, BX, BW, False, HAS_S0)
    b_total = tl.zeros((BX,), tl.float32)
    for i_n in tl.range(n_c, disable_licm=True):  # hoisted, what no step changes spilled 72 bytes
        i_c, t_0, i_row = chunk_at(i_n, n_c, t_a, i_seq, H, C, REVERSE)
        m_c = t_0 + o_c < t_e
        m_x = tile_mask(m_c, o_x, X, BX, EVEN)
        m_w = tile_mask(m_c, o_w, W, BW, EVEN)
        if X > BX:  # with two stages the next chunk is loaded when this one is done
            _, t_n, i_next = chunk_at(tl.minimum(i_n + 1, n_c - 1), n_c, t_a, i_seq, H, C, REVERSE)
            o_r, i_x = tl.minimum(o_c, t_e - 1 - t_n), tl.program_id(1) * BX
            touch(p_g + i_next // RG * X, o_r * (H // RG), i_x, X, BX)
            touch(p_z + i_next // RZ * X, o_r * (H // RZ), i_x, X, BX)
            touch(p_w + i_next // RW * W, o_r * (H // RW), i_w * BW, W, BW)
        b_z = load_tile(p_z + i_row // RZ * X, o_c * (H // RZ), o_x, m_x, X)
        b_w = load_tile(p_w + i_row // RW * W, o_c * (H // RW), o_w, m_w, W)
        b_gh, b_gl = halves(load_gates(p_g + i_row // RG * X, o_c * (H // RG), o_x, m_x, X), dtype, False)
        if p_h is not None:
            b_h = b_s
            if p_f is not None:
                b_f, b_down = row_factors(b_s)
                b_h *= b_down[:, None]
                tl.store(p_f + (i_state + i_c) * X + o_x, b_f, mask=o_x < X)
            store_state(p_h, i_state + i_c, b_h, o_x, o_w, m_s, X, W)
        if p_f is not None:
            tl.static_assert(not REVERSE, "sums up to a row are others")
            b_e, b_all = sums_after_and_all(b_gh, b_gl, C, BX, PRECISION)
        else:
            if REVERSE:
                b_m = (o_c[:, None] > o_c[None, :] if BEFORE else o_c[:, None] >= o_c[None, :]).to(dtype)
            else:
                b_m = (o_c[:, None] < o_c[None, :]).to(dtype)
            b_e = tl.dot(b_m, b_gl, tl.dot(b_m, b_gh, input_precision=PRECISION), input_precision=PRECISION)
            b_all = channel_sums(b_gh, b_gl, C, PRECISION)
        if p_gt is not None:
            b_total += b_all
        b_s *= tl.exp2(b_all)[:, None]
        b_s = tl.dot(tl.trans((b_z * tl.exp2(b_e)).to(dtype)), b_w, b_s, input_precision=PRECISION)
    if FINAL:
        store_last(p_st, p_table, i_nh, b_s * s_st, o_x, o_w, m_s, H, X, W, BW, REVERSE)
    if p_gt is not None:
        tl.store(p_gt + i_nh * X + o_x, b_total, mask=(o_x < X) & (i_w == 0))

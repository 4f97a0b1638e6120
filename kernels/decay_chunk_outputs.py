"""Outputs and dv under a gate a key from the state at each chunk's ends, all chunks side by side.

`chunk_states_kernel` leaves the states, a block of keys a program; a pass holds all keys and keeps none. With S the
state before a chunk, forward, or R the gradient of the state after it, in reverse,

    y_i = x~_i^T S~ + sum_{j <= i} (x~_i . z~_j) w_j

with the factors of `decay_scan_gates`, in two parts as there. The scores are sums over all keys, so a program takes the
keys block by block, and has a block of columns. One that meets a chunk out of range, by sum_i |g_i|, which is no less
than 2 max_i |e_i|, leaves that to a second launch of the same program (EXACT), which takes every exp(c_i - c_j) by
itself.
"""

import triton
import triton.language as tl

from fla_compile.kernels.decay_chunk_gates import load_masked
from fla_compile.kernels.decay_scan_gates import (
    any_beyond,
    channel_sums,
    exact_scores,
    from_middle,
    load_gates,
    met,
    with_own,
)
from fla_compile.kernels.decay_scan_sums import halves, sums_before
from fla_compile.kernels.decay_segments import chunk_of
from fla_compile.kernels.decay_tiles import load_tile, store_tile, tile_mask

__all__ = ["chunk_outputs_kernel"]


@triton.jit
def chunk_outputs(
    i_p, i_w, t_0, t_e, i_seq, i_state, p_x, p_z, p_w, p_g, p_h, p_y, p_range, p_own, s_y,
    H: tl.constexpr, X: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BW: tl.constexpr,
    REVERSE: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    RX: tl.constexpr, RZ: tl.constexpr, RW: tl.constexpr, RG: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """What program i_p of `chunk_outputs_kernel` does, for the block and chunk that `chunk_of` gives it."""
    dtype = p_w.dtype.element_ty
    PAIRED: tl.constexpr = W <= BW  # as in the order of chunks: of wider tiles more would spill
    o_c = tl.arange(0, C)
    o_w = i_w * BW + tl.arange(0, BW)
    i_row = i_seq + t_0.to(tl.int64) * H
    m_c = t_0 + o_c < t_e
    m_w = tile_mask(m_c, o_w, W, BW, EVEN)
    p_x += i_row // RX * X
    p_z += i_row // RZ * X
    p_g += i_row // RG * X
    p_h += i_state * (X * W)
    m_a = met(o_c, o_c, REVERSE, BEFORE)
    b_y = tl.zeros((C, BW), tl.float32)
    b_a = tl.zeros((C, C), tl.float32)
    b_range = tl.zeros((BX,), tl.float32)
    for i_x in range(tl.cdiv(X, BX)):
        o_x = i_x * BX + tl.arange(0, BX)
        m_x = tile_mask(m_c, o_x, X, BX, EVEN)
        m_s = tile_mask(o_x < X, o_w, W, BW, X % BX == 0)
        p_t = p_h + (o_x * W)[:, None] + o_w[None, :]
        if not EXACT:
            b_h = load_masked(p_t, m_s)
        b_x = load_tile(p_x, o_c * (H // RX), o_x, m_x, X)
        b_g = load_gates(p_g, o_c * (H // RG), o_x, m_x, X)
        if EXACT:
            n_j = tl.minimum(t_e - t_0, C)
            b_a += exact_scores(p_z, p_g, b_x, n_j, o_c, o_x, H // RZ, H // RG, X, C, BX, REVERSE, BEFORE)
            b_e = sums_before(b_g, 0) if BEFORE and not REVERSE else tl.cumsum(b_g, 0)
            if REVERSE:
                b_e = tl.sum(b_g, 0)[None, :] - b_e
            b_x = (b_x * tl.exp2(b_e)).to(dtype)
            b_h = load_masked(p_t, m_s)  # not before, while the scores take registers
        else:
            b_z = load_tile(p_z, o_c * (H // RZ), o_x, m_x, X)
            b_gh, b_gl = halves(b_g, dtype, PAIRED)
            b_e = from_middle(b_gh, b_gl, o_c, REVERSE, PRECISION, BEFORE and REVERSE)
            b_range = tl.maximum(b_range, channel_sums(tl.abs(b_gh), None, C, PRECISION))
            b_half = tl.exp2(0.5 * channel_sums(b_gh, b_gl, C, PRECISION))
            b_z, b_zl = halves(b_z * tl.exp2(-b_e), dtype, PAIRED)
            if BEFORE:
                b_e = from_middle(b_gh, b_gl, o_c, REVERSE, PRECISION, not REVERSE)
            b_f = b_x * tl.exp2(b_e)
            b_x, b_xl = halves(b_f, dtype, False)
            b_a = tl.dot(b_xl, tl.trans(b_z), b_a, input_precision=PRECISION)
            b_a = tl.dot(b_x, tl.trans(b_zl), b_a, input_precision=PRECISION)
            b_a = tl.dot(b_x, tl.trans(b_z), b_a, input_precision=PRECISION)
            b_x = (b_f * b_half[None, :]).to(dtype)
        b_y = tl.dot(b_x, b_h, b_y, input_precision=PRECISION)
    b_w = load_tile(p_w + i_row // RW * W, o_c * (H // RW), o_w, m_w, W)
    b_a = tl.where(m_a, b_a, 0.0)
    if p_own is not None:
        b_a = with_own(b_a, p_own + i_row, o_c, o_c, m_c, H)
    b_a, b_al = halves(b_a, dtype, PAIRED)
    b_y = tl.dot(b_al, b_w, b_y, input_precision=PRECISION)
    b_y = tl.dot(b_a, b_w, b_y, input_precision=PRECISION)
    store_tile(p_y + i_row * W, b_y * s_y, o_c * H, o_w, m_w, W)
    if not EXACT:
        tl.store(p_range + i_p, tl.max(b_range, 0))


@triton.jit(do_not_specialize=["T", "L", "n_s", "n_p", "limit"])
def chunk_outputs_kernel(
    p_x, p_z, p_w, p_g, p_h, p_y, p_range, p_table, p_own, s_y, limit, T, L, n_s, n_p,
    H: tl.constexpr, X: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BW: tl.constexpr,
    REVERSE: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    RX: tl.constexpr = 1, RZ: tl.constexpr = 1, RW: tl.constexpr = 1, RG: tl.constexpr = 1,
    BEFORE: tl.constexpr = False,
):  # fmt: skip
    """One of n_p programs for each chunk, head and W block; EXACT, fewer share what is beyond the limit. p_h holds the
    states. y is written times s_y. R.: as in `chunk_scan_kernel`; p_own and BEFORE as in `chunk_scan_rows_kernel`."""
    i_p = tl.program_id(0)
    if not EXACT:
        i_w, t_0, t_e, i_seq, i_state = chunk_of(i_p, p_table, T, H, L, n_s, W, BW, C, W > BW)
        if t_0 >= t_e:
            return
        chunk_outputs(
            i_p, i_w, t_0, t_e, i_seq, i_state, p_x, p_z, p_w, p_g, p_h, p_y, p_range, p_own, s_y,
            H, X, W, C, BX, BW, REVERSE, EVEN, EXACT, PRECISION, RX, RZ, RW, RG, BEFORE,
        )  # fmt: skip
    elif any_beyond(p_range, limit, n_p):
        for i_n in range(tl.cdiv(n_p - tl.program_id(0), tl.num_programs(0))):
            i_p = tl.program_id(0) + i_n * tl.num_programs(0)
            i_w, t_0, t_e, i_seq, i_state = chunk_of(i_p, p_table, T, H, L, n_s, W, BW, C, W > BW)
            if (t_0 < t_e) & ~(tl.load(p_range + i_p) <= limit):
                chunk_outputs(
                    i_p, i_w, t_0, t_e, i_seq, i_state, p_x, p_z, p_w, p_g, p_h, p_y, p_range, p_own, s_y,
                    H, X, W, C, BX, BW, REVERSE, EVEN, EXACT, PRECISION, RX, RZ, RW, RG, BEFORE,
                )  # fmt: skip

"""One pass of a decayed outer product over time, with the state on chip: no decay, or one per head or row.

    forward   y_i = x_i^T S_i      S_i = a_i S_{i-1} + z_i w_i^T
    reverse   y_j = x_j^T R_j      R_j = a_{j+1} R_{j+1} + z_j w_j^T

Shapes: x, z [B, T, H, X]; w, y [B, T, H, W]; the log decay g absent, [H] or [B, T, H]. With a_t = exp(g_t) the output
and all three gradients of o_t = scale * S_t^T q_t, S_t = a_t S_{t-1} + k_t v_t^T are such passes:

    o  = scale * forward(q, k, v)        dq = scale * forward(do, v, k)
    dk = scale * reverse(v, do, q)       dv = scale * reverse(k, q, do)

In chunks of C rows, with c_i the sum of g from the start of the chunk to row i and L its last,

    forward   y_i = e^{c_i} x_i^T S + sum_{j <= i} (x_i . z_j) e^{c_i - c_j} w_j
              S'  = e^L S + sum_j e^{L - c_j} z_j w_j^T
    reverse   y_j = e^{L - c_j} x_j^T R + sum_{i >= j} (x_j . z_i) e^{c_i - c_j} w_i
              R'  = e^L R + sum_i e^{c_i} z_i w_i^T

All exponents are <= 0 where g <= 0.

Time may be cut into segments of L steps, each its own program with its own initial state, or into those of a table of
packed sequences (`decay_segments`). With a *run-up* a program begins with the state of its sequence and walks what is
before its segment, in reverse after it, for the state alone. The passes for dq and dk also write what the decay's
gradient is made of (`decay_scan_sums`).
Sources: Yang et al. 2024 (arXiv:2312.06635), section 4; Dao and Gu 2024 (arXiv:2405.21060), section 6.
"""

import triton
import triton.language as tl

from fla_compile.kernels.decay_scan_sums import SUMS, halves, store_sums
from fla_compile.kernels.decay_segments import COLUMNS
from fla_compile.kernels.decay_tiles import (
    load_product,
    load_state,
    load_tile,
    product,
    product_threads,
    steps,
    store_product,
    store_state,
    store_tile,
    thread_sums,
    tile_mask,
    turn,
)
from fla_compile.kernels.decay_triton_common import CONSTANT_DECAY, LOG2_E, NO_DECAY, ROW_DECAY, as_decay, row_decay

__all__ = [
    "KEYS",
    "LONG",
    "PLAIN",
    "QUERIES",
    "chunk_at",
    "chunk_scan_kernel",
    "first_state",
    "packed_program",
    "segment_program",
    "store_last",
    "walk_program",
]

# What a pass computes beside y: nothing, or its share of the decay's gradient as the pass for dq or for dk.
PLAIN = tl.constexpr(0)
QUERIES = tl.constexpr(1)
KEYS = tl.constexpr(2)
# Rows of a chunk that fill a product of a warp group.
LONG = tl.constexpr(64)


@triton.jit
def segment_program(T, H: tl.constexpr, L, n_s, W: tl.constexpr, BW: tl.constexpr):
    """One program for each sequence, segment, head and W block: block, segment and head together, head, first row of
    the sequence, first and last step."""
    NW: tl.constexpr = tl.cdiv(W, BW)
    i_p = tl.program_id(0)
    i_nh = i_p // NW
    i_h = i_nh % H
    i_n = i_nh // H
    t_a = (i_n % n_s) * L
    return i_p % NW, i_nh.to(tl.int64), i_h, (i_n // n_s).to(tl.int64) * T * H + i_h, t_a, tl.minimum(t_a + L, T)


@triton.jit
def packed_program(p_table, H: tl.constexpr, W: tl.constexpr, BW: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr):
    """One program for each row of the table, head and W block: block, state and head together, head, first row, first
    and last step, first chunk, and joint and head together, below 0 where the sequence's own state is the first.
    """
    NW: tl.constexpr = tl.cdiv(W, BW)
    FROM: tl.constexpr = 5 if REVERSE else 4
    i_p = tl.program_id(0)
    i_h = (i_p // NW) % H
    p_row = p_table + (i_p // NW // H) * COLUMNS
    t_a = tl.load(p_row)
    t_e = tl.load(p_row + 1)
    i_c = tl.load(p_row + 2).to(tl.int64) * H + i_h * tl.cdiv(t_e - t_a, C)
    i_nh = tl.load(p_row + 3).to(tl.int64) * H + i_h
    i_u = tl.load(p_row + FROM).to(tl.int64) * H + i_h
    return i_p % NW, i_nh, i_h, i_h.to(tl.int64), t_a, t_e, i_c, i_u


@triton.jit
def walk_program(
    p_table, T, H: tl.constexpr, L, n_s, W: tl.constexpr, BW: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr
):
    """As `packed_program`, whether there is a table or not; C are the steps that a kept state stands for."""
    if p_table is None:
        i_w, i_nh, i_h, i_seq, t_a, t_e = segment_program(T, H, L, n_s, W, BW)
        return i_w, i_nh, i_h, i_seq, t_a, t_e, i_nh * tl.cdiv(L, C), -1
    else:
        return packed_program(p_table, H, W, BW, C, REVERSE)


@triton.jit
def chunk_at(i_n, n_c, t_a, i_seq, H: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr):
    """The chunk that a walk of n_c comes to as its i_n-th, its first step, and that step's first row."""
    i_c = i_n
    if REVERSE:
        i_c = n_c - 1 - i_n
    t_0 = t_a + i_c * C
    return i_c, t_0, i_seq + t_0.to(tl.int64) * H


@triton.jit
def packed_state(
    p_s0, p_u, i_nh, i_u, s_in, o_x, o_w, m_s,
    X: tl.constexpr, W: tl.constexpr, BX: tl.constexpr, BW: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_S0: tl.constexpr,
):  # fmt: skip
    """The state before a segment: that of a joint, or of the sequence."""
    b_s = tl.zeros((BX, BW), tl.float32)
    if p_u is not None:
        if i_u >= 0:
            b_s = load_state(p_u, i_u, o_x, o_w, m_s, X, W, TRANSPOSED)
        elif HAS_S0:
            b_s = load_state(p_s0, i_nh, o_x, o_w, m_s, X, W, TRANSPOSED) * s_in
    elif HAS_S0:
        b_s = load_state(p_s0, i_nh, o_x, o_w, m_s, X, W, TRANSPOSED) * s_in
    return b_s


@triton.jit
def first_state(
    p_s0, p_table, p_u, i_nh, i_u, s_in, o_x, o_w, m_s,
    X: tl.constexpr, W: tl.constexpr, BX: tl.constexpr, BW: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_S0: tl.constexpr,
):  # fmt: skip
    """The state that a walk begins with."""
    b_s = tl.zeros((BX, BW), tl.float32)
    if p_table is not None:
        b_s = packed_state(p_s0, p_u, i_nh, i_u, s_in, o_x, o_w, m_s, X, W, BX, BW, TRANSPOSED, HAS_S0)
    elif HAS_S0:
        b_s += load_state(p_s0, i_nh, o_x, o_w, m_s, X, W, TRANSPOSED) * s_in
    return b_s


@triton.jit
def store_packed(
    p_st, p_table, b_s, o_x, o_w, m_s,
    H: tl.constexpr, X: tl.constexpr, W: tl.constexpr, BW: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The state after a segment, where its sequence ends; the table is asked again: the loop has no register left."""
    TO: tl.constexpr = 4 if REVERSE else 5
    i_nh = tl.program_id(0) // tl.cdiv(W, BW)
    p_row = p_table + (i_nh // H) * COLUMNS
    if tl.load(p_row + TO) < 0:
        store_state(p_st, tl.load(p_row + 3).to(tl.int64) * H + i_nh % H, b_s, o_x, o_w, m_s, X, W)


@triton.jit
def store_last(
    p_st, p_table, i_nh, b_s, o_x, o_w, m_s,
    H: tl.constexpr, X: tl.constexpr, W: tl.constexpr, BW: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The state that a walk ends with."""
    if p_table is None:
        store_state(p_st, i_nh, b_s, o_x, o_w, m_s, X, W)
    else:
        store_packed(p_st, p_table, b_s, o_x, o_w, m_s, H, X, W, BW, REVERSE)


@triton.jit
def chunk_factors(
    p_g, s_g, b_total, i_row, i_h, t_0, t_e, o_c, m_c,
    H: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, EVEN: tl.constexpr, RG: tl.constexpr,
):  # fmt: skip
    """b_total + L and c_i in base 2, where each row has its decay, then e^L, e^{c_i} and e^{L - c_i} of a chunk; s_g is
    a constant decay in base 2."""
    if DECAY == CONSTANT_DECAY:
        n_r = C if EVEN else tl.minimum(t_e - t_0, C)
        b_r = tl.minimum(o_c + 1, n_r)
        return 0.0, 0.0, tl.exp2(n_r * s_g), tl.exp2(b_r * s_g), tl.exp2((n_r - b_r) * s_g)
    elif DECAY == ROW_DECAY:
        b_g, _, s_g, _ = row_decay(p_g, i_row, i_h, o_c, m_c, H, RG, DECAY, False)
        b_total += s_g
        b_g, s_g = b_g * LOG2_E, s_g * LOG2_E
        return b_total, b_g, tl.exp2(s_g), tl.exp2(b_g), tl.exp2(s_g - b_g)
    else:
        return 0.0, 0.0, 0.0, 0.0, 0.0


@triton.jit
def decayed_chunk(b_s, b_w, b_all, b_up, b_down, DECAY: tl.constexpr, REVERSE: tl.constexpr):
    """The state and the rows w that it is to take in, decayed up to the end that the walk leaves the chunk by."""
    if DECAY != NO_DECAY:
        if REVERSE:
            b_w = (b_w * b_up[:, None]).to(b_w.dtype)
        else:
            b_w = (b_w * b_down[:, None]).to(b_w.dtype)
        b_s *= b_all
    return b_s, b_w


@triton.jit
def run_up(
    p_z, p_w, p_g, b_s, s_g, i_seq, i_h, t_a, t_e, T, o_c, o_x, o_w,
    H: tl.constexpr, X: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BW: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, EVEN: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr,
    RZ: tl.constexpr, RW: tl.constexpr, RG: tl.constexpr,
):  # fmt: skip
    """The state before the segment of steps t_a to t_e, from that of the sequence."""
    # forward all chunks before a segment are whole
    WHOLE: tl.constexpr = EVEN or not REVERSE
    t_b, t_n = 0, t_a
    if REVERSE:
        t_b, t_n = t_e, T
    n_c = tl.cdiv(t_n - t_b, C)
    for i_n in range(n_c):
        _, t_0, i_row = chunk_at(i_n, n_c, t_b, i_seq, H, C, REVERSE)
        m_c = t_0 + o_c < t_n
        b_z = load_tile(p_z + i_row // RZ * X, o_c * (H // RZ), o_x, tile_mask(m_c, o_x, X, BX, WHOLE), X)
        b_w = load_tile(p_w + i_row // RW * W, o_c * (H // RW), o_w, tile_mask(m_c, o_w, W, BW, WHOLE), W)
        _, _, b_all, b_up, b_down = chunk_factors(
            p_g, s_g, 0.0, i_row, i_h, t_0, t_n, o_c, m_c, H, C, DECAY, WHOLE, RG
        )  # fmt: skip
        b_s, b_w = decayed_chunk(b_s, b_w, b_all, b_up, b_down, DECAY, REVERSE)
        b_s = product(tl.trans(b_z), b_w, b_s, TURNED, PRECISION)
    return b_s


@triton.jit
def sequence_state(n_s, H: tl.constexpr, W: tl.constexpr, BW: tl.constexpr):
    """The number of a program's sequence and head together, whatever its segment."""
    i_nh = tl.program_id(0) // tl.cdiv(W, BW)
    return (i_nh // H // n_s).to(tl.int64) * H + i_nh % H


@triton.jit(do_not_specialize=["T", "L", "n_s"])
def chunk_scan_kernel(
    p_x, p_z, p_w, p_g, p_s0, p_y, p_st, p_gt, p_e, p_h, p_sums, p_carry, p_table, p_u, s_in, s_y, s_st, T, L, n_s,
    H: tl.constexpr, X: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BW: tl.constexpr,
    DECAY: tl.constexpr, PART: tl.constexpr, REVERSE: tl.constexpr, OUTPUT: tl.constexpr, FINAL: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_S0: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    RX: tl.constexpr = 1, RZ: tl.constexpr = 1, RW: tl.constexpr = 1, RG: tl.constexpr = 1, RE: tl.constexpr = 1,
    RUNUP: tl.constexpr = False,
):  # fmt: skip
    """BX covers X. Without OUTPUT only the final state is written, to p_st, and the segment's decay to p_gt.

    The initial state is read times s_in, y is written times s_y, the final state times s_st. Packed sequences have a
    table, and states p_u where their segments meet if any does. As QUERIES or KEYS the pass has its queries or keys in
    p_e, and leaves what `Sums` names: sums of each row, the state before each chunk, p_h, and sums of it with its
    gradient. R.: of the H heads of y, neighbours that share one of x, z, w, g or e. With RUNUP the initial and
    the final state are those of sequences, not of segments.
    """
    if p_table is None:
        i_w, i_nh, i_h, i_seq, t_a, t_e = segment_program(T, H, L, n_s, W, BW)
        i_u = -1
    else:
        i_w, i_nh, i_h, i_seq, t_a, t_e, i_state, i_u = packed_program(p_table, H, W, BW, C, REVERSE)
    dtype = p_w.dtype.element_ty
    # The products of shorter chunks are taken transposed, and the state with them: then it is read from the registers
    # it lies in. Without a decay that measured slower (0.23 to 0.21 ms) for up to 128 rows of a state.
    TURNED: tl.constexpr = C < LONG and (DECAY != NO_DECAY or BX > 128)
    # Scores within a branch: they are waited for there, and what they read needs a buffer less, so that two programs
    # fit. Without sums, those of 64 rows of a state, which fit anyway, are slower so (`NOTES.md`).
    BRANCH: tl.constexpr = OUTPUT and not TURNED and (PART != PLAIN or (DECAY == ROW_DECAY and BX > 64))
    n_c = tl.cdiv(t_e - t_a, C)
    o_c = tl.arange(0, C)
    o_x = tl.arange(0, BX)
    o_w = i_w * BW + tl.arange(0, BW)
    m_s = tile_mask(o_x < X, o_w, W, BW, BX == X)
    i_0 = i_nh
    if RUNUP:
        i_0 = sequence_state(n_s, H, W, BW)
    b_s = first_state(p_s0, p_table, p_u, i_0, i_u, s_in, o_x, o_w, m_s, X, W, BX, BW, TRANSPOSED, HAS_S0)
    b_s = turn(b_s, TURNED)
    b_total = 0.0
    s_g = None
    if DECAY == CONSTANT_DECAY:
        # products with numbers of rows, which round once, where sums would round at every row; all decays in base 2
        s_g = as_decay(tl.load(p_g + i_h // RG))
        if not OUTPUT:
            tl.store(p_gt + i_nh, (t_e - t_a) * s_g, mask=i_w == 0)
        s_g *= LOG2_E
    if RUNUP:
        b_s = run_up(
            p_z, p_w, p_g, b_s, s_g, i_seq, i_h, t_a, t_e, T, o_c, o_x, o_w,
            H, X, W, C, BX, BW, DECAY, REVERSE, EVEN, TURNED, PRECISION, RZ, RW, RG,
        )  # fmt: skip
    if DECAY == CONSTANT_DECAY and OUTPUT:
        o_i, o_j = steps(o_c, TURNED != REVERSE)
        b_f = tl.exp2((o_i - o_j) * s_g)
    if PART != PLAIN:
        NW: tl.constexpr = tl.cdiv(W, BW)
        N: tl.constexpr = BW if TURNED else product_threads(BX)
        o_n = tl.arange(0, N)
        EARLY: tl.constexpr = not TURNED and DECAY == ROW_DECAY  # a constant one leaves too few registers
        m_h = tile_mask(o_w < W, o_x, X, BX, W % BW == 0)
        if p_table is None:
            i_state = i_nh * tl.cdiv(L, C)
            i_bh = i_0 if RUNUP else i_nh // H // n_s * H + i_h
        else:
            i_bh = i_h.to(tl.int64)
        p_r = p_sums + ((i_bh * SUMS + (PART - 1)) * NW + i_w) * T
    # what no step changes is not kept in registers where there are too few (`NOTES.md`)
    for i_n in tl.range(n_c, disable_licm=PART != PLAIN or BRANCH):
        i_c, t_0, i_row = chunk_at(i_n, n_c, t_a, i_seq, H, C, REVERSE)
        o_t = t_0 + o_c
        m_c = o_t < t_e
        # from o_t, not o_c: a mask that no step changes would be kept in registers through the loop
        o_i, o_j = steps(o_t, TURNED != REVERSE)
        m_a = o_i >= o_j
        if DECAY == CONSTANT_DECAY and REVERSE and not EVEN:
            m_a &= o_i < t_e  # beyond the end b_f goes on
        m_x = tile_mask(m_c, o_x, X, BX, EVEN)
        m_w = tile_mask(m_c, o_w, W, BW, EVEN)
        b_z = load_tile(p_z + i_row // RZ * X, o_c * (H // RZ), o_x, m_x, X)
        b_w = load_tile(p_w + i_row // RW * W, o_c * (H // RW), o_w, m_w, W)
        if PART != PLAIN:
            b_e = load_tile(p_e + i_row // RE * W, o_c * (H // RE), o_w, m_w, W)
            m_r = None if EVEN else m_c
        b_sum, b_g, b_all, b_up, b_down = chunk_factors(
            p_g, s_g, b_total, i_row, i_h, t_0, t_e, o_c, m_c, H, C, DECAY, EVEN, RG
        )  # fmt: skip
        if DECAY == ROW_DECAY:
            b_total = b_sum
        if OUTPUT:
            b_x = load_tile(p_x + i_row // RX * X, o_c * (H // RX), o_x, m_x, X)
            if BRANCH:
                b_a = tl.zeros((C, C), tl.float32)
                if t_0 < t_e:
                    b_a = product(b_x, tl.trans(b_z), None, TURNED, PRECISION)
            else:
                b_a = product(b_x, tl.trans(b_z), None, TURNED, PRECISION)
            if DECAY == CONSTANT_DECAY:
                b_a *= b_f  # what overflows here is masked next
            elif DECAY == ROW_DECAY:
                b_gi, b_gj = steps(b_g, TURNED != REVERSE)
                b_a *= tl.exp2(b_gi - b_gj)
            b_a = tl.where(m_a, b_a, 0.0)
            b_p = b_a.to(dtype)
            if PART == KEYS and EARLY:  # long before it is used
                b_h = load_product(p_h, (i_state + i_c) * NW + i_w, BX, BW)
            b_y = product(b_x, turn(b_s.to(dtype), TURNED), None, TURNED, PRECISION)
            if DECAY != NO_DECAY:
                if REVERSE:
                    b_y *= turn(b_down[:, None], TURNED)
                else:
                    b_y *= turn(b_up[:, None], TURNED)
            if PART == KEYS:
                b_i = product(turn(b_p, TURNED), b_w, None, TURNED, PRECISION)
                store_sums(p_r + o_t, b_i, b_e, s_y, m_r, TURNED)
                store_sums(p_r + NW * T + o_t, b_y, b_e, s_y, m_r, TURNED)
                b_y += b_i
            else:
                if TURNED and DECAY == ROW_DECAY and PART == PLAIN:
                    _hi, b_l = halves(b_a, dtype)
                    b_y = product(turn(b_l, TURNED), b_w, b_y, TURNED, PRECISION)
                b_y = product(turn(b_p, TURNED), b_w, b_y, TURNED, PRECISION)
            if PART == QUERIES:
                store_sums(p_r + o_t, b_y, b_e, s_y, m_r, TURNED)
                if TURNED:
                    store_state(p_h, i_state + i_c, b_s, o_w, o_x, m_h, W, X)
                else:
                    store_product(p_h, (i_state + i_c) * NW + i_w, b_s, BX, BW)
            store_tile(p_y + i_row * W, turn(b_y * s_y, TURNED), o_c * H, o_w, m_w, W)
        b_s, b_w = decayed_chunk(b_s, b_w, b_all, b_up, b_down, DECAY, REVERSE)
        if PART == KEYS:
            if TURNED:
                b_across = tl.sum(load_state(p_h, i_state + i_c, o_w, o_x, m_h, W, X, False) * b_s, 1)
            else:
                if not EARLY:
                    b_h = load_product(p_h, (i_state + i_c) * NW + i_w, BX, BW)
                b_across = thread_sums(b_h.to(tl.float32) * b_s, BX, BW, N)
            tl.store(p_carry + ((i_state + i_c) * NW + i_w) * N + o_n, b_across * s_y)
        b_s = product(tl.trans(b_z), b_w, b_s, TURNED, PRECISION)
    b_s = turn(b_s * s_st, TURNED)
    if RUNUP and FINAL:
        is_last = t_a == 0 if REVERSE else t_e == T
        if is_last:
            store_state(p_st, i_0, b_s, o_x, o_w, m_s, X, W)
    elif FINAL:
        store_last(p_st, p_table, i_nh, b_s, o_x, o_w, m_s, H, X, W, BW, REVERSE)
    if not OUTPUT:
        if DECAY == ROW_DECAY:
            tl.store(p_gt + i_nh, b_total, mask=i_w == 0)

"""Gradients under a gate a key from the states at each chunk's ends, all chunks side by side.

With S before a chunk, R the gradient of the state after it, P = tril(do v^T) without its diagonal and c the sum of g
from the start of the chunk, L its last,

    dq_i = e^{c_i} (S do_i + sum_{j < i} P_ij e^{-c_j} k_j) + (do_i . v_i) k_i
    dk_j = e^{L - c_j} R v_j + e^{-c_j} sum_{i > j} P_ij e^{c_i} q_i + (do_j . v_j) q_j

Nothing but P joins the keys, so a program has a block of them and all values, and no sum crosses programs. As in
`decay_scan_gates` the factors are taken from the middle of the chunk's decay and in two parts, and a program that meets
one out of range does its chunk again a column at a time (EXACT).

The decay's gradient at row t collects every path from j < t to i >= t. With dk' the part of dk through R, dk" that of P
and dq without its diagonal, for each channel

    dg_t = e^L <S, R> + sum_{i >= t} (q_i dq_i - k_i dk"_i) + sum_{j < t} k_j dk'_j

where pairs on one side of t cancel to rounding. No sum leaves its chunk: paths that a strong decay has cut contribute
nothing. Where a pair grew by e^x its rounding would be 2^-24 e^x, however small dg_t: so growth counts towards the
range (GROWTH), and EXACT adds up the pairs of j < t <= i alone.

Where the state is read BEFORE a step's update, c_i - g_i stands for c_i with q_i and dq_i, the steps' own terms are
times the bonus u, whose gradient is the sum of (do_i . v_i) q_i k_i, and the paths to i count for t < i.
"""

import triton
import triton.language as tl

from fla_compile.kernels.decay_scan_gates import any_beyond, load_gates, load_row
from fla_compile.kernels.decay_scan_sums import add_both, halves, sums_before
from fla_compile.kernels.decay_segments import chunk_of
from fla_compile.kernels.decay_tiles import load_tile, store_tile, tile_mask
from fla_compile.kernels.decay_triton_common import LOG2_E, as_decay

__all__ = [
    "GROWTH",
    "add_own",
    "chunk_grads_kernel",
    "exact_pairs",
    "load_block",
    "load_masked",
    "state_products",
]

# What grows by 2^x in a chunk takes x GROWTH of the range: of the largest, 200, so that no more than 2^10 is left to
# it, and seven bits of the factors' two parts in bfloat16. Float16's own range says less than 2^12.
GROWTH = tl.constexpr(20.0)
# What <S, R> may be, which has to come before e^L; above it, or no number, it is the exact launch's.
LARGEST = tl.constexpr(2.0**126)


@triton.jit
def state_products(b_h, b_d, b_all):
    """<S, R> over the values, with b_all e^L <S, R>, half of it with each: beyond float32 only if the result is."""
    b_h, b_d = b_h.to(tl.float32), b_d.to(tl.float32)
    if b_all is None:
        return tl.sum(b_h * b_d, 1)
    else:
        b_half = tl.exp2(0.5 * b_all)[:, None]
        return tl.sum((b_h * b_half) * (b_d * b_half), 1)


@triton.jit
def path_sums(b_to, b_from, o_c, dtype: tl.constexpr, PAIRED: tl.constexpr):
    """sum_{i >= t} to_i + sum_{j < t} from_j. Products in two parts, where the parts have float32's range."""
    if dtype == tl.bfloat16:
        m_to = (o_c[:, None] <= o_c[None, :]).to(dtype)
        m_from = (o_c[:, None] > o_c[None, :]).to(dtype)
        b_toh, b_tol = halves(b_to, dtype, PAIRED)
        b_fromh, b_froml = halves(b_from, dtype, PAIRED)
        return tl.dot(m_from, b_froml, tl.dot(m_from, b_fromh, tl.dot(m_to, b_tol, tl.dot(m_to, b_toh))))
    else:
        return tl.cumsum(b_to, 0, reverse=True) + sums_before(b_from, 0)


@triton.jit
def sums_after(b_x, o_c, dtype: tl.constexpr, PAIRED: tl.constexpr):
    """sum_{i > t} x_i, as `path_sums` has its sums."""
    if dtype == tl.bfloat16:
        m_after = (o_c[:, None] < o_c[None, :]).to(dtype)
        b_xh, b_xl = halves(b_x, dtype, PAIRED)
        return tl.dot(m_after, b_xl, tl.dot(m_after, b_xh))
    else:
        return sums_before(b_x, 0, True)


@triton.jit
def sums_from(b_x, BEFORE: tl.constexpr):
    """sum_{i >= t} x_i, or, read before the update, that of i > t."""
    if BEFORE:
        return sums_before(b_x, 0, True)
    else:
        return tl.cumsum(b_x, 0, reverse=True)


@triton.jit
def add_own(b_dx, b_own, b_x, p_bonus, o_k, K: tl.constexpr, BEFORE: tl.constexpr, TURNED: tl.constexpr = False):
    """A gradient with what a step's own key and query bring: BEFORE the update nothing, but by a bonus."""
    if TURNED:
        b_own = b_own[None, :]
    else:
        b_own = b_own[:, None]
    if not BEFORE:
        return b_dx + b_own * b_x
    elif p_bonus is not None:
        b_bonus = load_row(p_bonus, o_k, K)
        if TURNED:
            b_bonus = b_bonus[:, None]
        else:
            b_bonus = b_bonus[None, :]
        return b_dx + (b_own * b_bonus) * b_x
    else:
        return b_dx


@triton.jit
def exact_pairs(
    p_g, p_k, b_p, b_q, b_dq, n_j, o_c, o_k, HG: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, DK: tl.constexpr, DG: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """dq, dk and the decay's gradient of n_j rows of a chunk with what P brings, a column at a time. b_dq comes with
    what S brings; g and k have HG and HK heads. Without DK, or DG, the last two, or one, are zero."""
    if DG:
        b_dg = sums_from(b_q * b_dq, BEFORE)
    else:
        b_dg = tl.zeros((C, BK), tl.float32)
    b_dk = tl.zeros((C, BK), tl.float32)
    b_e = tl.zeros((C, BK), tl.float32)
    for i_j in range(n_j):
        j = n_j - 1 - i_j
        b_gj = as_decay(load_row(p_g + j * HG * K, o_k, K)) * LOG2_E
        b_kj = load_row(p_k + j * HK * K, o_k, K)
        b_pj = tl.sum(tl.where((o_c == j)[None, :], b_p, 0.0), 1)[:, None] * tl.exp2(b_e)
        b_dq += b_pj * b_kj[None, :]
        if DK:
            b_pj *= b_q
            b_dk += tl.where((o_c == j)[:, None], tl.sum(b_pj, 0)[None, :], 0.0)
            if DG:
                b_dg += tl.where((o_c > j)[:, None], sums_from(b_pj * b_kj[None, :], BEFORE), 0.0)
        b_e += tl.where((o_c > j if BEFORE else o_c >= j)[:, None], b_gj[None, :], 0.0)
    return b_dq, b_dk, b_dg


@triton.jit
def load_values(
    p_do, p_v, i_v, o_c, m_c,
    H: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, RV: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A block of columns of do and v."""
    o_v = i_v * BV + tl.arange(0, BV)
    m_v = tile_mask(m_c, o_v, V, BV, EVEN)
    return load_tile(p_do, o_c * H, o_v, m_v, V), load_tile(p_v, o_c * (H // RV), o_v, m_v, V)


@triton.jit
def load_block(p_s, i_v, o_k, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """A block of columns of a state."""
    o_v = i_v * BV + tl.arange(0, BV)
    return load_masked(p_s + (o_k * V)[:, None] + o_v[None, :], tile_mask(o_k < K, o_v, V, BV, K % BK == 0))


@triton.jit
def load_masked(p_x, m_x):
    if m_x is None:
        return tl.load(p_x)
    else:
        return tl.load(p_x, mask=m_x, other=0.0)


@triton.jit
def chunk_grads(
    i_p, i_k, t_0, t_e, i_seq, i_state,
    p_q, p_k, p_v, p_do, p_g, p_h, p_d, p_dq, p_dk, p_dg, p_range, p_bonus, p_du, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    EVEN: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    RQ: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr, RG: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """What program i_p of `chunk_grads_kernel` does, for the block and chunk that `chunk_of` gives it."""
    dtype = p_k.dtype.element_ty
    PAIRED: tl.constexpr = BK < K and V <= BV  # of other tiles that spills more
    o_c = tl.arange(0, C)
    o_k = i_k * BK + tl.arange(0, BK)
    i_row = i_seq + t_0.to(tl.int64) * H
    m_c = t_0 + o_c < t_e
    m_k = tile_mask(m_c, o_k, K, BK, EVEN)
    p_v += i_row // RV * V
    p_do += i_row * V
    p_h += i_state * (K * V)
    if p_d is not None:
        p_d += i_state * (K * V)
    if V > BV:  # block by block, first for dq, then for dk: all sums at once are more than there are registers
        b_p = tl.zeros((C, C), tl.float32)
        b_dq = tl.zeros((C, BK), tl.float32)
        for i_v in range(tl.cdiv(V, BV)):
            b_do, b_v = load_values(p_do, p_v, i_v, o_c, m_c, H, V, BV, RV, EVEN)
            b_h = load_block(p_h, i_v, o_k, K, V, BK, BV)
            b_p = tl.dot(b_do, tl.trans(b_v), b_p, input_precision=PRECISION)
            b_dq = tl.dot(b_do, tl.trans(b_h), b_dq, input_precision=PRECISION)
    b_g = load_gates(p_g + i_row // RG * K, o_c * (H // RG), o_k, m_k, K)
    if EXACT:
        b_all = tl.sum(b_g, 0)
    if V <= BV:
        b_do, b_v = load_values(p_do, p_v, 0, o_c, m_c, H, V, BV, RV, EVEN)
        b_h = load_block(p_h, 0, o_k, K, V, BK, BV)
    if p_d is not None:
        if V <= BV:
            b_d = load_block(p_d, 0, o_k, K, V, BK, BV)
            if p_dg is not None:
                b_x = state_products(b_h, b_d, b_all if EXACT else None)
        b_q = load_tile(p_q + i_row // RQ * K, o_c * (H // RQ), o_k, m_k, K)
    b_k = load_tile(p_k + i_row // RK * K, o_c * (H // RK), o_k, m_k, K)
    b_c = tl.cumsum(b_g, 0)
    if not EXACT:
        b_all, b_grown = tl.reduce((b_g, tl.maximum(b_g, 0.0)), 0, add_both)
        b_range = 2.0 * b_grown - b_all
        if p_dg is not None and dtype != tl.float16:
            b_range += GROWTH * b_grown
        s_range = tl.max(b_range, 0)
        b_e = b_c - 0.5 * b_all[None, :]
        b_up, b_down, b_half = tl.exp2(b_e - b_g if BEFORE else b_e), tl.exp2(-b_e), tl.exp2(0.5 * b_all)
        b_kh, b_kl = halves(b_k * b_down, dtype, PAIRED)
        if p_d is not None:
            b_qh, b_ql = halves(b_q * b_up, dtype, PAIRED)
    if V <= BV:
        b_p = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    b_own = tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_p, 0.0), 1)
    b_p = tl.where(o_c[:, None] > o_c[None, :], b_p, 0.0)
    if V <= BV:
        b_dq = tl.dot(b_do, tl.trans(b_h), input_precision=PRECISION)
    if EXACT:
        b_dq *= tl.exp2(sums_before(b_g, 0) if BEFORE else b_c)
        b_dq, b_dk, b_dg = exact_pairs(
            p_g + i_row // RG * K, p_k + i_row // RK * K, b_p, b_q if p_d is not None else None, b_dq,
            tl.minimum(t_e - t_0, C), o_c, o_k, H // RG, H // RK, K, C, BK, p_d is not None, p_dg is not None, BEFORE,
        )  # fmt: skip
    else:
        b_ph, b_pl = halves(b_p, dtype, PAIRED)
        b_dq *= b_half[None, :]
        b_dq = tl.dot(b_pl, b_kh, b_dq, input_precision=PRECISION)
        b_dq = tl.dot(b_ph, b_kl, b_dq, input_precision=PRECISION)
        b_dq = tl.dot(b_ph, b_kh, b_dq, input_precision=PRECISION) * b_up
    if p_bonus is not None:
        p_bonus += i_seq % H * K
    b_y = add_own(b_dq, b_own, b_k, p_bonus, o_k, K, BEFORE) * scale
    store_tile(p_dq + i_row * K, b_y, o_c * H, o_k, m_k, K)
    if p_d is not None:
        if V > BV:
            if not EXACT:
                b_pt = tl.zeros((C, C), tl.float32)
            b_dx = tl.zeros((C, BK), tl.float32)
            b_x = tl.zeros((BK,), tl.float32)
            for i_v in range(tl.cdiv(V, BV)):
                b_do, b_v = load_values(p_do, p_v, i_v, o_c, m_c, H, V, BV, RV, EVEN)
                b_d = load_block(p_d, i_v, o_k, K, V, BK, BV)
                if not EXACT:
                    b_pt = tl.dot(b_v, tl.trans(b_do), b_pt, input_precision=PRECISION)
                b_dx = tl.dot(b_v, tl.trans(b_d), b_dx, input_precision=PRECISION)
                if p_dg is not None:
                    b_h = load_block(p_h, i_v, o_k, K, V, BK, BV)
                    b_x += state_products(b_h, b_d, b_all if EXACT else None)
        if not EXACT:
            if not BEFORE:
                b_u = b_q * b_dq
            if V <= BV:  # computed again: transposed, it would go through shared memory
                b_pt = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
            b_ph, b_pl = halves(tl.where(o_c[:, None] < o_c[None, :], b_pt, 0.0), dtype, PAIRED)
            b_dk = tl.dot(b_pl, b_qh, input_precision=PRECISION)
            b_dk = tl.dot(b_ph, b_ql, b_dk, input_precision=PRECISION)
            b_dk = tl.dot(b_ph, b_qh, b_dk, input_precision=PRECISION) * b_down
        if V <= BV:
            b_dx = tl.dot(b_v, tl.trans(b_d), input_precision=PRECISION)
        if EXACT:
            b_dx *= tl.exp2(b_all[None, :] - b_c)
        else:
            b_dx *= b_half[None, :] * b_down
        if not EXACT:
            if BEFORE:
                b_u = -b_k * b_dk
            else:
                b_u -= b_k * b_dk
        b_y = add_own(b_dk + b_dx, b_own, b_q, p_bonus, o_k, K, BEFORE) * scale
        store_tile(p_dk + i_row * K, b_y, o_c * H, o_k, m_k, K)
        if p_dg is not None:
            if EXACT:
                b_dg += sums_before(b_k * b_dx, 0)
            else:
                b_dg = path_sums(b_u, b_k * b_dx, o_c, dtype, PAIRED)
                if BEFORE:
                    b_dg += sums_after(b_q * b_dq, o_c, dtype, PAIRED)
                s_range = tl.maximum(s_range, tl.max(tl.where(tl.abs(b_x) <= LARGEST, 0.0, float("inf")), 0))
                b_x *= tl.exp2(b_all)
            store_tile(p_dg + i_row * K, (b_dg + b_x[None, :]) * scale, o_c * H, o_k, m_k, K)
        if p_du is not None:
            b_y = tl.sum(b_own[:, None] * b_q * b_k, 0) * scale
            tl.store(p_du + (i_p // tl.cdiv(K, BK)).to(tl.int64) * K + o_k, b_y, mask=o_k < K)
    if not EXACT:
        tl.store(p_range + i_p, s_range)


@triton.jit(do_not_specialize=["T", "L", "n_s", "n_p", "limit"])
def chunk_grads_kernel(
    p_q, p_k, p_v, p_do, p_g, p_h, p_d, p_dq, p_dk, p_dg, p_range, p_table, p_bonus, p_du, scale, limit, T, L, n_s, n_p,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    EVEN: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    RQ: tl.constexpr = 1, RK: tl.constexpr = 1, RV: tl.constexpr = 1, RG: tl.constexpr = 1,
    BEFORE: tl.constexpr = False,
):  # fmt: skip
    """One of n_p programs for each chunk, head and block of keys; EXACT, fewer share what is beyond the limit. p_h and
    p_d hold S and R; without p_d only dq is written. Packed, n_s counts the rows of the table. R.: as in
    `chunk_scan_kernel`, of q, k, v and g; BEFORE as in `chunk_scan_rows_kernel`, with the bonus u [H, K], of whose
    gradient p_du [chunks, H, K] gets each chunk's share."""
    i_p = tl.program_id(0)
    if not EXACT:
        i_k, t_0, t_e, i_seq, i_state = chunk_of(i_p, p_table, T, H, L, n_s, K, BK, C)
        if t_0 >= t_e:
            return
        chunk_grads(
            i_p, i_k, t_0, t_e, i_seq, i_state,
            p_q, p_k, p_v, p_do, p_g, p_h, p_d, p_dq, p_dk, p_dg, p_range, p_bonus, p_du, scale,
            H, K, V, C, BK, BV, EVEN, EXACT, PRECISION, RQ, RK, RV, RG, BEFORE,
        )  # fmt: skip
    elif any_beyond(p_range, limit, n_p):
        for i_n in range(tl.cdiv(n_p - tl.program_id(0), tl.num_programs(0))):
            i_p = tl.program_id(0) + i_n * tl.num_programs(0)
            i_k, t_0, t_e, i_seq, i_state = chunk_of(i_p, p_table, T, H, L, n_s, K, BK, C)
            if (t_0 < t_e) & ~(tl.load(p_range + i_p) <= limit):
                chunk_grads(
                    i_p, i_k, t_0, t_e, i_seq, i_state,
                    p_q, p_k, p_v, p_do, p_g, p_h, p_d, p_dq, p_dk, p_dg, p_range, p_bonus, p_du, scale,
                    H, K, V, C, BK, BV, EVEN, EXACT, PRECISION, RQ, RK, RV, RG, BEFORE,
                )  # fmt: skip

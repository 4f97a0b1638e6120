"""The passes of `decay_scan` for the output and dv under a gate a channel, which decays the rows of the state.

    forward   y_i = x_i^T S_i      S_i = diag(a_i) S_{i-1} + z_i w_i^T
    reverse   y_j = x_j^T R_j      R_j = diag(a_{j+1}) R_{j+1} + z_j w_j^T

with g [B, T, H, X]: o = forward(q, k, v), dv = reverse(k, q, do). `decay_chunk_outputs` has either from states before
or after each chunk, and `decay_scan_grads` or `decay_chunk_gates` the other gradients. A decay over values is one over
keys in exchanged roles (`decay_triton_values`).

Inside a chunk row i meets row j with exp(c_i - c_j), which is no product of two bounded factors. Taken relative to the
middle of the chunk's decay, m = L / 2, it is one of two factors between e^m and e^-m:

    e_i = c_i - m     x~_i = x_i exp(e_i)     z~_j = z_j exp(-e_j)     S~ = exp(m) S
    y_i = x~_i^T S~ + sum_{j <= i} (x~_i . z~_j) w_j      S' = exp(m) (S~ + sum_j z~_j w_j^T)

and in reverse with -e in the place of e. Products inside the chunk take each factor and the scores in two parts of the
operands' dtype (`halves`): rounded once, they were most of the error. Chunks of a pass are short and leave so much to
the state that it takes both parts too, and where there are registers (SPARE) its query's as well. The sums over a
chunk's rows are products of the gates' two parts with a triangle: sums over rows wait for every warp, products do not.
m is e of the last row. The factors must be in range: 2 max_i |e_i| of a chunk must stay below a limit. The pass writes
the largest it met, and where that is above the limit a second launch of the same program (EXACT) does its work again
with every exp(c_i - c_j) by itself, a column at a time; elsewhere it returns at once. So ordinary decays run at the
speed of matrix products, and any decay is right.

RWKV-6 reads the state before a step's own update (BEFORE): the query of row i, x forward and z in reverse, then has
c_i - g_i in the place of c_i, rows meet earlier ones alone, and themselves with a score that is given, of the bonus.
"""

import torch
import triton
import triton.language as tl

from fla_compile.kernels.decay_scan import chunk_at, first_state, store_last, walk_program
from fla_compile.kernels.decay_scan_sums import halves, sums_before
from fla_compile.kernels.decay_tiles import load_tile, store_state, store_tile, tile_mask
from fla_compile.kernels.decay_triton_common import LOG2_E, as_decay

__all__ = [
    "SHARE",
    "any_beyond",
    "channel_sums",
    "chunk_scan_rows_kernel",
    "exact_scores",
    "from_middle",
    "largest_range",
    "load_gates",
    "load_row",
    "met",
    "with_own",
]

# The fewest columns of a product.
PADDED = tl.constexpr(16)
# Programs whose chunks one program of an exact launch looks after at most: one for each takes 2 ns though it return at
# once.
SHARE = tl.constexpr(32)


def largest_range(dtype: torch.dtype) -> float:
    """The limit of a chunk's range, in base 2: factors reach 2^(limit / 2), and float16 ends at 2^16."""
    return 12.0 if dtype == torch.float16 else 200.0


@triton.jit
def load_gates(p_g, o_row, o_col, m_x, WIDTH: tl.constexpr):
    """Log decays in base 2."""
    return as_decay(load_tile(p_g, o_row, o_col, m_x, WIDTH)) * LOG2_E


@triton.jit
def load_row(p_x, o_col, WIDTH: tl.constexpr):
    return tl.load(p_x + o_col, mask=o_col < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def any_beyond(p_range, limit, n_p):
    """Whether one of the ranges that this program looks after, of n_p, is beyond the limit, or no number."""
    o_p = tl.program_id(0) + tl.arange(0, SHARE) * tl.num_programs(0)
    m_p = o_p < n_p
    m_p &= ~(tl.load(p_range + o_p, mask=m_p, other=0.0) <= limit)
    return tl.max(m_p.to(tl.int32), 0) > 0


@triton.jit
def from_middle(b_h, b_l, o_c, REVERSE: tl.constexpr, PRECISION: tl.constexpr, BEFORE: tl.constexpr = False):
    """e, or -e in reverse, of gates in two parts; BEFORE: without a row's own gate."""
    b_m = tl.where(o_c[:, None] > o_c[None, :] if BEFORE else o_c[:, None] >= o_c[None, :], 0.5, -0.5)
    if REVERSE:
        b_m = -b_m
    b_m = b_m.to(b_h.dtype)
    return tl.dot(b_m, b_l, tl.dot(b_m, b_h, input_precision=PRECISION), input_precision=PRECISION)


@triton.jit
def larger(b_x, b_y):
    """The maximum, and no number where either is none."""
    return tl.maximum(b_x, b_y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_factors(b_range, b_e, C: tl.constexpr, BX: tl.constexpr):
    """b_range [8, BX / 8, 4] with the largest |e| of [C, BX], as far as threads have them to themselves."""
    b_e = tl.reshape(tl.abs(b_e), (C // 8, 8, BX // 8, 4, 2))
    return larger(b_range, tl.reduce(tl.reduce(b_e, 4, larger), 0, larger))


@triton.jit
def from_middle_to_end(b_e, o_c, C: tl.constexpr, REVERSE: tl.constexpr, BEFORE: tl.constexpr):
    """m, from what `from_middle` gives: half of the chunk's decay."""
    END: tl.constexpr = 0 if BEFORE else C - 1
    b_m = tl.sum(tl.where((o_c == END)[:, None], b_e, 0.0), 0)
    return b_m if REVERSE == BEFORE else -b_m


@triton.jit
def channel_sums(b_h, b_l, C: tl.constexpr, PRECISION: tl.constexpr):
    """The sums over the chunk of gates in two parts."""
    b_n = tl.full((C, PADDED), 1.0 / PADDED, b_h.dtype)
    b_s = tl.dot(tl.trans(b_h), b_n, input_precision=PRECISION)
    if b_l is not None:
        b_s = tl.dot(tl.trans(b_l), b_n, b_s, input_precision=PRECISION)
    return tl.sum(b_s, 1)


@triton.jit
def exact_scores(
    p_z, p_g, b_x, n_j, o_c, o_x, HZ: tl.constexpr, HG: tl.constexpr, X: tl.constexpr,
    C: tl.constexpr, BX: tl.constexpr, REVERSE: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """x_i . exp(c_i - c_j) z_j of the n_j rows of a chunk, each by itself; z and g have HZ and HG heads. What is not
    to be kept of it is masked after. BEFORE: without the query's own gate."""
    b_a = tl.zeros((C, C), tl.float32)
    b_e = tl.zeros((C, BX), tl.float32)
    for i_j in range(n_j):
        j = i_j
        if not REVERSE:
            j = n_j - 1 - i_j
        b_gj = as_decay(load_row(p_g + j * HG * X, o_x, X)) * LOG2_E
        b_zj = load_row(p_z + j * HZ * X, o_x, X)
        if REVERSE and not BEFORE:
            b_e += tl.where((o_c < j)[:, None], b_gj[None, :], 0.0)
        b_aj = tl.sum(tl.exp2(b_e) * b_zj[None, :] * b_x, 1)
        b_a = tl.where((o_c == j)[None, :], b_aj[:, None], b_a)
        if REVERSE:
            if BEFORE:
                b_e += tl.where((o_c < j)[:, None], b_gj[None, :], 0.0)
        elif BEFORE:
            b_e += tl.where((o_c > j)[:, None], b_gj[None, :], 0.0)
        else:
            b_e += tl.where((o_c >= j)[:, None], b_gj[None, :], 0.0)
    return b_a


@triton.jit
def met(o_x, o_z, REVERSE: tl.constexpr, BEFORE: tl.constexpr):
    """Which scores [x's row, z's row] there are."""
    if REVERSE:
        return o_z[None, :] > o_x[:, None] if BEFORE else o_z[None, :] >= o_x[:, None]
    else:
        return o_x[:, None] > o_z[None, :] if BEFORE else o_x[:, None] >= o_z[None, :]


@triton.jit
def with_own(b_a, p_own, o_x, o_z, m_x, H: tl.constexpr):
    """Scores in which each row meets itself with what p_own, that of the first row, holds for it."""
    b_own = tl.load(p_own + o_x * H, mask=m_x, other=0.0)
    return tl.where(o_x[:, None] == o_z[None, :], b_own[:, None], b_a)


@triton.jit
def stacked(b_h, b_l, C: tl.constexpr, N: tl.constexpr):
    """Two parts of a tile as rows of one, eight and eight in turn: so a thread has both of what it has of a row."""
    b_x = tl.permute(tl.reshape(tl.join(b_h, b_l), (C // 8, 8, N, 2)), (0, 3, 1, 2))
    return tl.reshape(b_x, (2 * C, N))


@triton.jit
def sum_parts(b_x, C: tl.constexpr, N: tl.constexpr):
    return tl.reshape(tl.sum(tl.reshape(b_x, (C // 8, 2, 8, N)), 1), (C, N))


@triton.jit
def both_parts(b_x, C: tl.constexpr, N: tl.constexpr):
    """The sum of two parts in the rows of each."""
    b_x = tl.sum(tl.reshape(b_x, (C // 8, 2, 8, N)), 1)
    return tl.reshape(tl.broadcast_to(b_x[:, None], (C // 8, 2, 8, N)), (2 * C, N))


@triton.jit
def stacked_outputs(
    b_x, b_xl, b_z, b_zl, b_w, b_s, t_0, t_e, p_own, i_row,
    H: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BW: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """y of a chunk with both parts of a query, and of a score, as rows of one product, which fill it."""
    o_c = tl.arange(0, C)
    o_p = tl.arange(0, 2 * C)
    o_r = o_p // 16 * 8 + o_p % 8
    b_q = stacked(b_x, b_xl, C, BX)
    b_a = tl.dot(b_q, tl.trans(b_zl), input_precision=PRECISION)
    b_a = both_parts(tl.dot(b_q, tl.trans(b_z), b_a, input_precision=PRECISION), C, C)
    b_a = tl.where(met(o_r, o_c, REVERSE, BEFORE), b_a, 0.0)
    if p_own is not None:
        b_a = with_own(b_a, p_own + i_row, o_r, o_c, t_0 + o_r < t_e, H)
    b_ah = b_a.to(b_x.dtype)
    b_a = tl.where((o_p // 8 % 2 == 0)[:, None], b_ah, (b_a - b_ah.to(tl.float32)).to(b_x.dtype))
    # summed after: added to one another, the two products would be given layouts that differ
    b_y = sum_parts(tl.dot(b_q, b_s.to(b_x.dtype), input_precision=PRECISION), C, BW)
    return b_y + sum_parts(tl.dot(b_a, b_w, input_precision=PRECISION), C, BW)


@triton.jit(do_not_specialize=["T", "L", "n_s", "limit"])
def chunk_scan_rows_kernel(
    p_x, p_z, p_w, p_g, p_s0, p_y, p_st, p_h, p_range, p_table, p_u, p_own, s_in, s_y, s_st, limit, T, L, n_s,
    H: tl.constexpr, X: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BW: tl.constexpr,
    REVERSE: tl.constexpr, FINAL: tl.constexpr, HAS_S0: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    RX: tl.constexpr = 1, RZ: tl.constexpr = 1, RW: tl.constexpr = 1, RG: tl.constexpr = 1,
    BEFORE: tl.constexpr = False, KEPT: tl.constexpr = 1, SPARE: tl.constexpr = True,
):  # fmt: skip
    """BX covers X. Arguments as for `chunk_scan_kernel`; p_h, if given, gets the state before every KEPT chunks. BEFORE
    a step's update it is read, with p_own, if given, [B, T, H] the rows' scores with themselves. SPARE: registers are
    left, so that what is known of e's range and last row comes from e (it spilled 440 bytes on sm_80) and y from
    `stacked_outputs`."""
    if EXACT:
        if tl.load(p_range + tl.program_id(0)) <= limit:
            return
    i_w, i_nh, _, i_seq, t_a, t_e, i_state, i_u = walk_program(p_table, T, H, L, n_s, W, BW, C * KEPT, REVERSE)
    dtype = p_w.dtype.element_ty
    n_c = tl.cdiv(t_e - t_a, C)
    o_c = tl.arange(0, C)
    o_x = tl.arange(0, BX)
    o_w = i_w * BW + tl.arange(0, BW)

    m_s = tile_mask(o_x < X, o_w, W, BW, BX == X)
    b_s = first_state(p_s0, p_table, p_u, i_nh, i_u, s_in, o_x, o_w, m_s, X, W, BX, BW, False, HAS_S0)
    if SPARE:
        b_range = tl.zeros((8, BX // 8, 4), tl.float32)
    else:
        b_range = tl.zeros((BX,), tl.float32)
    for i_n in tl.range(n_c, disable_licm=True):  # hoisted, what no step changes spilled up to 200 bytes
        i_c, t_0, i_row = chunk_at(i_n, n_c, t_a, i_seq, H, C, REVERSE)
        o_t = t_0 + o_c
        m_c = o_t < t_e
        m_a = met(o_t, o_t, REVERSE, BEFORE)
        m_x = tile_mask(m_c, o_x, X, BX, EVEN)
        m_w = tile_mask(m_c, o_w, W, BW, EVEN)
        if p_h is not None:  # in reverse the first of a walk may be the state of fewer chunks
            if i_n == 0 or i_c % KEPT == (KEPT - 1 if REVERSE else 0):
                store_state(p_h, i_state + i_c // KEPT, b_s, o_x, o_w, m_s, X, W)
        if EXACT:  # first, while there are registers
            b_x = load_tile(p_x + i_row // RX * X, o_c * (H // RX), o_x, m_x, X)
            n_j = tl.minimum(t_e - t_0, C)
            b_a = exact_scores(
                p_z + i_row // RZ * X, p_g + i_row // RG * X, b_x, n_j, o_c, o_x, H // RZ, H // RG, X, C, BX, REVERSE,
                BEFORE,
            )  # fmt: skip
            b_a = tl.where(m_a, b_a, 0.0)
        b_z = load_tile(p_z + i_row // RZ * X, o_c * (H // RZ), o_x, m_x, X)
        b_w = load_tile(p_w + i_row // RW * W, o_c * (H // RW), o_w, m_w, W)
        b_g = load_gates(p_g + i_row // RG * X, o_c * (H // RG), o_x, m_x, X)
        if EXACT:
            if p_own is not None:
                b_a = with_own(b_a, p_own + i_row, o_c, o_c, m_c, H)
            b_e = tl.cumsum(b_g, 0)
            b_all = tl.sum(b_g, 0)
            # e to the end of the chunk in forward direction: from row j on, or up to row j
            if REVERSE:
                b_z = (b_z * tl.exp2(sums_before(b_g, 0) if BEFORE else b_e)).to(dtype)
                b_e = b_all[None, :] - b_e
            else:
                b_z = (b_z * tl.exp2(b_all[None, :] - b_e)).to(dtype)
                if BEFORE:
                    b_e = sums_before(b_g, 0)
            b_y = tl.dot((b_x * tl.exp2(b_e)).to(dtype), b_s.to(dtype), input_precision=PRECISION)
            b_s *= tl.exp2(b_all)[:, None]
            b_y = tl.dot(b_a.to(dtype), b_w, b_y, input_precision=PRECISION)
        else:
            b_gh, b_gl = halves(b_g, dtype)
            b_e = from_middle(b_gh, b_gl, o_c, REVERSE, PRECISION, BEFORE and REVERSE)
            if SPARE:
                b_range = largest_factors(b_range, b_e, C, BX)
                b_half = tl.exp2(from_middle_to_end(b_e, o_c, C, REVERSE, BEFORE and REVERSE))
            else:
                b_range = larger(b_range, 0.5 * channel_sums(tl.abs(b_gh), None, C, PRECISION))
                b_half = tl.exp2(0.5 * channel_sums(b_gh, b_gl, C, PRECISION))
            b_s *= b_half[:, None]
            b_z, b_zl = halves(b_z * tl.exp2(-b_e), dtype)
            if BEFORE:
                b_e = from_middle(b_gh, b_gl, o_c, REVERSE, PRECISION, not REVERSE)
            b_x = load_tile(p_x + i_row // RX * X, o_c * (H // RX), o_x, m_x, X)
            b_x, b_xl = halves(b_x * tl.exp2(b_e), dtype)
            if SPARE:
                b_y = stacked_outputs(
                    b_x, b_xl, b_z, b_zl, b_w, b_s, t_0, t_e, p_own, i_row, H, C, BX, BW, REVERSE, PRECISION,
                    BEFORE,
                )  # fmt: skip
            else:
                b_a = tl.dot(b_xl, tl.trans(b_z), input_precision=PRECISION)
                b_a = tl.dot(b_x, tl.trans(b_zl), b_a, input_precision=PRECISION)
                b_a = tl.dot(b_x, tl.trans(b_z), b_a, input_precision=PRECISION)
                b_a = tl.where(m_a, b_a, 0.0)
                if p_own is not None:
                    b_a = with_own(b_a, p_own + i_row, o_c, o_c, m_c, H)
                b_a, b_al = halves(b_a, dtype)
                b_y = tl.dot(b_x, b_s.to(dtype), input_precision=PRECISION)
                b_y = tl.dot(b_al, b_w, b_y, input_precision=PRECISION)
                b_y = tl.dot(b_a, b_w, b_y, input_precision=PRECISION)
        store_tile(p_y + i_row * W, b_y * s_y, o_c * H, o_w, m_w, W)
        if not EXACT:
            b_s = tl.dot(tl.trans(b_zl), b_w, b_s, input_precision=PRECISION)
        b_s = tl.dot(tl.trans(b_z), b_w, b_s, input_precision=PRECISION)
        if not EXACT:
            b_s *= b_half[:, None]
    if FINAL:
        store_last(p_st, p_table, i_nh, b_s * s_st, o_x, o_w, m_s, H, X, W, BW, REVERSE)
    if not EXACT:
        tl.store(p_range + tl.program_id(0), 2.0 * tl.reduce(tl.ravel(b_range), 0, larger))

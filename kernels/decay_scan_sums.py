"""The gradient of one decay a head or row, from what the passes for dq and dk of `decay_scan` leave beside these.

The gradient at row t is the sum of all paths from j < t to i >= t. Counted by the rows they end or begin at, it is

    dg_t = dg_{t+1} + q_t . dq_t - k_t . dk_t

where the products must be those of the float32 sums: what cancels is larger than what stays. In a chunk, with X the sum
of the paths across all of it, dk' the part of dk that goes through the gradient R after the chunk and dk" the part
inside the chunk,

    dg_t = X + sum_{i >= t} (q_i . dq_i - k_i . dk"_i) + sum_{j < t} k_j . dk'_j

in which nothing is taken away that a decay has cut: dq and dk" have the same scores, so that their diagonals cancel to
the last digit. With S the state before the chunk and L its decay, X = e^L <S, R>. Where a decay is above one the
other pairs cancel less well, and `decay_scan_grown` makes dg again.

The pass for dq writes q . dq and S, the pass for dk writes k . dk", k . dk' and, from S, e^L S R; all are sums over the
program's own columns.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from fla_compile.kernels.decay_segments import COLUMNS
from fla_compile.kernels.decay_tiles import COMPILED, turn

__all__ = ["SUMS", "Sums", "add_both", "halves", "row_decay_grad_kernel", "segment_of", "store_sums", "sums_before"]

# Sums a row and block of columns: q . dq, k . dk" and k . dk'.
SUMS = tl.constexpr(3)
# Two numbers at a time, to the nearest; Triton's own conversion there and back takes them one by one (`NOTES.md`).
BFLOAT16_HALVES = tl.constexpr("""{
    .reg .b32 %a, %b;
    cvt.rn.bf16x2.f32 $0, $3, $2;
    shl.b32 %a, $0, 16;
    and.b32 %b, $0, 0xffff0000;
    sub.rn.f32 %a, $2, %a;
    sub.rn.f32 %b, $3, %b;
    cvt.rn.bf16x2.f32 $1, %b, %a;
}""")


@triton.jit
def add_before(a_0, a_1, b_0, b_1):
    return a_0 + a_1 + b_0, b_1


@triton.jit
def sums_before(b_x, axis: tl.constexpr, REVERSE: tl.constexpr = False):
    """sum_{j < t} x_j, or in reverse that of j > t. Taken from the sum up to t, x_t would leave its rounding where a
    decay has cut all before it."""
    b_sum, _ = tl.associative_scan((tl.zeros_like(b_x), b_x), axis, add_before, reverse=REVERSE)
    return b_sum


@triton.jit
def halves(b_x, dtype: tl.constexpr, PAIRED: tl.constexpr = True):
    """x as the sum of two numbers of a narrow dtype; PAIRED, two x at a time, unless that spills."""
    if COMPILED and PAIRED and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            BFLOAT16_HALVES, "=&r,=r,r,r", [b_x], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
    else:
        b_hi = b_x.to(dtype)
        return b_hi, (b_x - b_hi.to(tl.float32)).to(dtype)


@triton.jit
def add_both(a_x, a_y, b_x, b_y):
    """Two sums at once."""
    return a_x + b_x, a_y + b_y


@triton.jit
def store_sums(p_r, b_y, b_e, s_y, m_r, TURNED: tl.constexpr):
    """The rows' sums of y e over the columns."""
    tl.store(p_r, tl.sum(turn(b_y, TURNED) * b_e, 1) * s_y, mask=m_r)


@triton.jit
def segment_of(p_table, i_n, T, H: tl.constexpr, L, n_s, C: tl.constexpr):
    """First step of segment i_n and the one after its last, its number of chunks, and the first of its states."""
    if p_table is None:
        t_a = (i_n % n_s) * L
        t_e = tl.minimum(t_a + L, T)
        n_c = tl.cdiv(L, C)
        i_first = i_n.to(tl.int64) * H * n_c
    else:
        p_row = p_table + i_n * COLUMNS
        t_a = tl.load(p_row)
        t_e = tl.load(p_row + 1)
        n_c = tl.cdiv(t_e - t_a, C)
        i_first = tl.load(p_row + 2).to(tl.int64) * H
    return t_a, t_e, n_c, i_first


@triton.jit(do_not_specialize=["T", "L", "n_s", "n_p"])
def row_decay_grad_kernel(
    p_sums, p_carry, p_dg, p_table, T, L, n_s, n_p,
    H: tl.constexpr, C: tl.constexpr, NW: tl.constexpr, N: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """p_sums [B, H, 3, NW, T] and p_carry [B, segments, H, chunks, NW, N], where NW counts blocks of columns, to
    p_dg [B, T, H]; n_p programs for each of n_s segments and BH heads, which share its chunks."""
    NH: tl.constexpr = tl.cdiv(H, BH)
    i_p = tl.program_id(0)
    i_n = i_p // NH // n_p
    o_h = (i_p % NH) * BH + tl.arange(0, BH)
    o_c = tl.arange(0, C)
    o_n = tl.arange(0, N)
    m_h = o_h < H
    i_b = (i_n // n_s).to(tl.int64)
    t_a, t_e, n_c, i_first = segment_of(p_table, i_n, T, H, L, n_s, C)
    p_h = p_sums + ((i_b * H + o_h) * (SUMS * NW) * T)[:, None]
    for i_c in range((i_p // NH) % n_p, tl.cdiv(t_e - t_a, C), n_p):
        o_t = t_a + i_c * C + o_c
        m_t = m_h[:, None] & (o_t < t_e)[None, :]
        b_across = tl.zeros((BH,), tl.float32)
        b_to = tl.zeros((BH, C), tl.float32)
        b_from = tl.zeros((BH, C), tl.float32)
        for i_w in tl.static_range(NW):
            p_t = p_h + i_w * T + o_t[None, :]
            b_to += tl.load(p_t, mask=m_t, other=0.0) - tl.load(p_t + NW * T, mask=m_t, other=0.0)
            b_from += tl.load(p_t + 2 * NW * T, mask=m_t, other=0.0)
            p_s = p_carry + (((i_first + o_h * n_c + i_c) * NW + i_w) * N)[:, None] + o_n[None, :]
            b_across += tl.sum(tl.load(p_s, mask=m_h[:, None], other=0.0), 1)
        b_dg = b_across[:, None] + tl.cumsum(b_to, 1, reverse=True) + sums_before(b_from, 1)
        tl.store(p_dg + ((i_b * T + o_t) * H)[None, :] + o_h[:, None], b_dg, mask=m_t)


@dataclass(frozen=True)
class Sums:
    """What the passes leave: the state before each chunk, tiles of [V, K] by `store_product`, or [K, V] where the
    passes have it turned; the sums of each row; and those of the states with their gradients."""

    states: Tensor
    rows: Tensor
    carry: Tensor

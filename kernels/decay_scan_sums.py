"""The gradient of one decay a head or row, from what the passes for dq and dk of `decay_scan` leave beside these.

The gradient at row t is the sum of all paths from j < t to i >= t. Counted by the rows they end or begin at, it is

    dg_t = dg_{t+1} + q_t . dq_t - k_t . dk_t

where the products must be those of the float32 sums: what cancels is larger than what stays. Chunks are taken M at a
time, and each such block starts from the states again, so that no rounding goes far. In the block's last chunk, with S
the state before it, R the gradient after it and L its decay, dk' the part of dk that goes through R and dk" the part
inside the chunk,

    dg_t = e^L <S, R> + sum_{i >= t} (q_i . dq_i - k_i . dk"_i) + sum_{j < t} k_j . dk'_j

in which nothing is taken away that a decay has cut: a gradient of the final state, whose paths no later row has, does
not show beyond a decay of e^-100. dq and dk" have the same scores, so that their diagonals cancel to the last digit.

The pass for dq writes q . dq and the S of each block, the pass for dk writes k . dk", k . dk' and, from S, e^L R S; all
are sums over the program's own columns.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from fla_compile.kernels.decay_segments import COLUMNS

__all__ = ["BLOCK", "SUMS", "Sums", "row_decay_grad_kernel"]

# Steps of a block, at least: states cost as much as an operand at the head size.
BLOCK = 128

# Sums a row and block of columns: q . dq, k . dk" and k . dk'.
SUMS = tl.constexpr(3)


@triton.jit(do_not_specialize=["T", "L", "n_s", "n_p"])
def row_decay_grad_kernel(
    p_sums, p_carry, p_dg, p_table, T, L, n_s, n_p,
    H: tl.constexpr, C: tl.constexpr, M: tl.constexpr, NW: tl.constexpr, N: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """p_sums [B, H, 3, NW, T] and p_carry [B, segments, H, blocks, NW, N], where NW counts blocks of columns, to
    p_dg [B, T, H]; n_p programs for each of n_s segments and BH heads, which share its blocks."""
    NH: tl.constexpr = tl.cdiv(H, BH)
    A: tl.constexpr = C * M
    i_p = tl.program_id(0)
    i_n = i_p // NH // n_p
    o_h = (i_p % NH) * BH + tl.arange(0, BH)
    o_a = tl.arange(0, A)
    o_n = tl.arange(0, N)
    m_h = o_h < H
    i_b = (i_n // n_s).to(tl.int64)
    if p_table is None:
        t_a = (i_n % n_s) * L
        t_e = tl.minimum(t_a + L, T)
        n_b = tl.cdiv(L, A)
        i_first = i_n.to(tl.int64) * H * n_b
    else:
        p_row = p_table + i_n * COLUMNS
        t_a = tl.load(p_row)
        t_e = tl.load(p_row + 1)
        n_b = tl.cdiv(t_e - t_a, A)
        i_first = tl.load(p_row + 2).to(tl.int64) * H
    p_h = p_sums + ((i_b * H + o_h) * (SUMS * NW) * T)[:, None]
    for i_a in range((i_p // NH) % n_p, tl.cdiv(t_e - t_a, A), n_p):
        o_t = t_a + i_a * A + o_a
        t_last = t_a + ((tl.minimum(t_e - t_a, (i_a + 1) * A) - 1) // C) * C
        m_t = m_h[:, None] & (o_t < t_e)[None, :]
        b_all = tl.zeros((BH,), tl.float32)
        b_in = tl.zeros((BH, A), tl.float32)
        b_out = tl.zeros((BH, A), tl.float32)
        for i_w in tl.static_range(NW):
            p_t = p_h + i_w * T + o_t[None, :]
            b_q = tl.load(p_t, mask=m_t, other=0.0)
            b_in += b_q - tl.load(p_t + NW * T, mask=m_t, other=0.0)
            b_out += tl.load(p_t + 2 * NW * T, mask=m_t, other=0.0)
            o_s = ((i_first + o_h * n_b + i_a) * NW + i_w) * N
            b_all += tl.sum(tl.load(p_carry + o_s[:, None] + o_n[None, :], mask=m_h[:, None], other=0.0), 1)
        m_last = (o_t >= t_last)[None, :]
        b_up = tl.where(m_last, b_out, 0.0)
        b_dg = tl.cumsum(b_in - tl.where(m_last, 0.0, b_out), 1, reverse=True) + b_all[:, None]
        b_dg += tl.where(m_last, tl.cumsum(b_up, 1) - b_up, 0.0)
        tl.store(p_dg + ((i_b * T + o_t) * H)[None, :] + o_h[:, None], b_dg, mask=m_t)


@dataclass(frozen=True)
class Sums:
    """What the passes leave: a state [V, K] of each block, the sums of each row, and those of states."""

    states: Tensor
    rows: Tensor
    carry: Tensor

"""The gradient of a gate in chunks with a step that grows, for the step form of `decay_scan_both`.

With S before a chunk, dq' what goes through it, a and b the running sums of the rows' and the columns' gates,

    dg_t = sum over the other axis of e^L S D + sum_{i >= t} q_i dq'_i + sum_{j < t} k_j dk'_j + sum_{j < t <= i} w_ij
    w_ij = q_i (sum_x x_i z_j e^{a_i - a_j}) e^{b_i - b_j} k_j

for each channel, where the passes have the last term as a difference of sums, which leaves 2^-24 e^x of a pair that
grew by e^x. What one gate lets grow the other may take away again: the largest of e^{a_i - a_j} is taken out of the sum
over x and into the other factor, so that w_ij is out of range only where the state was.
"""

import triton
import triton.language as tl

from fla_compile.kernels.decay_scan_gates import load_row
from fla_compile.kernels.decay_tiles import load_tile, tile_mask
from fla_compile.kernels.decay_triton_common import LOG2_E, as_decay
from fla_compile.kernels.decay_triton_grown import GROWTH

__all__ = ["chunk_grows", "load_row_gates", "paths_of_queries"]


@triton.jit
def load_row_gates(p_g, o_col, WIDTH: tl.constexpr):
    """Log decays of one row in base 2."""
    return as_decay(load_row(p_g, o_col, WIDTH)) * LOG2_E


@triton.jit
def chunk_grows(
    p_a, p_b, n_j, o_x, o_w, H: tl.constexpr, X: tl.constexpr, W: tl.constexpr, BX: tl.constexpr, BW: tl.constexpr
):
    """Whether a step of a chunk of n_j does, in any row or in these columns; by single steps, which take few
    registers."""
    b_a = tl.zeros((BX,), tl.float32)
    b_b = tl.zeros((BW,), tl.float32)
    for j in range(n_j):
        b_a = tl.maximum(b_a, load_row(p_a + j * H * X, o_x, X))
        b_b = tl.maximum(b_b, load_row(p_b + j * H * W, o_w, W))
    return tl.maximum(tl.max(b_a), tl.max(b_b)) > GROWTH


@triton.jit
def paths_of_queries(
    p_x, p_z, p_w, p_a, p_b, p_e, b_s, o_c, n_j, o_x, o_w,
    H: tl.constexpr, X: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BW: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """sum_{i >= t} q_i dq'_i + sum_{j < t <= i} w_ij of a chunk of n_j steps, b_s the state before it. Pointers to its
    first row, as those of the pass for dq."""
    b_y = tl.zeros((C, BW), tl.float32)
    for j in range(n_j):
        b_s *= tl.exp2(load_row_gates(p_a + j * H * X, o_x, X))[:, None]
        b_s *= tl.exp2(load_row_gates(p_b + j * H * W, o_w, W))[None, :]
        b_yj = tl.sum(load_row(p_x + j * H * X, o_x, X)[:, None] * b_s, 0)
        b_y = tl.where((o_c == j)[:, None], b_yj[None, :], b_y)
    b_q = load_tile(p_e, o_c * H, o_w, tile_mask(o_c < n_j, o_w, W, BW, EVEN), W).to(tl.float32)
    b_dg = tl.cumsum(b_q * b_y, 0, reverse=True)
    b_x = load_tile(p_x, o_c * H, o_x, tile_mask(o_c < n_j, o_x, X, BX, EVEN), X).to(tl.float32)
    b_e = tl.where((o_x < X)[None, :], tl.zeros((C, BX), tl.float32), float("-inf"))
    b_f = tl.zeros((C, BW), tl.float32)
    for i_j in range(1, n_j):
        j = n_j - 1 - i_j
        m_i = ((o_c > j) & (o_c < n_j))[:, None]
        b_e += tl.where(m_i, load_row_gates(p_a + (j + 1) * H * X, o_x, X)[None, :], 0.0)
        b_f += tl.where(m_i, load_row_gates(p_b + (j + 1) * H * W, o_w, W)[None, :], 0.0)
        b_m = tl.max(b_e, 1)[:, None]
        b_a = tl.sum(b_x * load_row(p_z + j * H * X, o_x, X)[None, :] * tl.exp2(b_e - b_m), 1)
        b_w = b_q * b_a[:, None] * tl.exp2(b_f + b_m) * load_row(p_w + j * H * W, o_w, W)[None, :]
        b_w = tl.cumsum(tl.where(m_i, b_w, 0.0), 0, reverse=True)
        b_dg += tl.where(m_i, b_w, 0.0)
    return b_dg

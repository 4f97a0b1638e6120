"""Tiles of arrays and states as the passes of `decay_scan` and their like load, turn, multiply and store them."""

import triton
import triton.language as tl
from triton import knobs

__all__ = [
    "COMPILED",
    "load_state",
    "load_tile",
    "product",
    "steps",
    "store_state",
    "store_tile",
    "tile_mask",
    "touch",
    "turn",
]

COMPILED = tl.constexpr(not knobs.runtime.interpret)
# Bits of a cache line.
LINE = tl.constexpr(1024)
PREFETCH = tl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")


@triton.jit
def tile_mask(m_row, o_col, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """None where a tile [rows, columns] lies inside its array: masks cost registers. EVEN: all rows do."""
    m_x = None
    if WIDTH % BLOCK != 0:
        m_x = (o_col < WIDTH)[None, :]
        if not EVEN:
            m_x = m_row[:, None] & m_x
    elif not EVEN:
        m_x = m_row[:, None]
    return m_x


@triton.jit
def load_tile(p_x, o_row, o_col, m_x, WIDTH: tl.constexpr):
    p_t = p_x + (o_row * WIDTH)[:, None] + o_col[None, :]
    if m_x is None:
        return tl.load(p_t)
    else:
        return tl.load(p_t, mask=m_x, other=0.0)


@triton.jit
def touch(p_x, o_row, i_first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Have the rows of a tile of BLOCK columns from i_first on brought to the L2 cache, for a load that comes later."""
    if COMPILED:
        N: tl.constexpr = LINE // p_x.dtype.element_ty.primitive_bitwidth
        LINES: tl.constexpr = (BLOCK + N - 1) // N
        o_col = tl.minimum(i_first + tl.arange(0, LINES) * N, WIDTH - 1)
        p_t = p_x + (o_row * WIDTH)[:, None] + o_col[None, :]
        tl.inline_asm_elementwise(PREFETCH, "=r,l", [p_t.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def store_tile(p_x, b_x, o_row, o_col, m_x, WIDTH: tl.constexpr):
    tl.store(p_x + (o_row * WIDTH)[:, None] + o_col[None, :], b_x.to(p_x.dtype.element_ty), mask=m_x)


@triton.jit
def load_state(p_s, i_s, o_x, o_w, m_s, X: tl.constexpr, W: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Tile [BX, BW] of state number i_s, an array [X, W], or [W, X] if TRANSPOSED, in float32."""
    if TRANSPOSED:
        p_t = p_s + i_s * (X * W) + o_x[:, None] + (o_w * X)[None, :]
    else:
        p_t = p_s + i_s * (X * W) + (o_x * W)[:, None] + o_w[None, :]
    if m_s is None:
        return tl.load(p_t).to(tl.float32)
    else:
        return tl.load(p_t, mask=m_s, other=0.0).to(tl.float32)


@triton.jit
def store_state(p_s, i_s, b_s, o_x, o_w, m_s, X: tl.constexpr, W: tl.constexpr):
    p_t = p_s + i_s * (X * W) + (o_x * W)[:, None] + o_w[None, :]
    tl.store(p_t, b_s.to(p_s.dtype.element_ty), mask=m_s)


@triton.jit
def turn(b_x, TURNED: tl.constexpr):
    return tl.trans(b_x) if TURNED else b_x


@triton.jit
def steps(b_x, TURNED: tl.constexpr):
    """b_x [C] along the later and the earlier steps of a tile [later, earlier]."""
    if TURNED:
        return b_x[None, :], b_x[:, None]
    else:
        return b_x[:, None], b_x[None, :]


@triton.jit
def product(b_x, b_y, b_sum, TURNED: tl.constexpr, PRECISION: tl.constexpr):
    """x y + sum; where TURNED, the sum comes and goes transposed."""
    if TURNED:
        return tl.dot(tl.trans(b_y), tl.trans(b_x), b_sum, input_precision=PRECISION)
    else:
        return tl.dot(b_x, b_y, b_sum, input_precision=PRECISION)

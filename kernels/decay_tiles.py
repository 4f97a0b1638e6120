"""Tiles of arrays and states as the passes of `decay_scan` and their like load, turn, multiply and store them."""

import triton
import triton.language as tl
from triton import knobs

__all__ = [
    "COMPILED",
    "by_thread_at",
    "load_product",
    "load_state",
    "load_tile",
    "product",
    "product_threads",
    "product_warps",
    "steps",
    "store_product",
    "store_state",
    "store_tile",
    "thread_sums",
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


@triton.constexpr_function
def product_warps(BX):
    """Warps that have rows of their own in a product of BX: programs have four, or eight for more than 128 rows."""
    return min(8 if BX > 128 else 4, BX // 16)


@triton.constexpr_function
def product_threads(BX):
    """Threads of these warps."""
    return 32 * product_warps(BX)


@triton.jit
def by_thread(b_x, BX: tl.constexpr, BW: tl.constexpr):
    """The numbers of a tile with those side by side that a thread has of a product of `product_warps`, 8 of one
    thread, 8 of the next, and so on: so a tile is written and read without an exchange between threads."""
    WARPS: tl.constexpr = product_warps(BX)
    R: tl.constexpr = BX // (16 * WARPS)
    J: tl.constexpr = max(1, 2 // R)
    b_x = tl.reshape(b_x, (R, WARPS, 2, 8, BW // (8 * J), J, 4, 2))
    return tl.reshape(tl.permute(b_x, (4, 1, 3, 6, 0, 5, 2, 7)), (BX * BW,))


@triton.jit
def by_thread_at(o_x, o_w, BX: tl.constexpr, BW: tl.constexpr):
    """Where `by_thread` puts rows x and columns w."""
    WARPS: tl.constexpr = product_warps(BX)
    R: tl.constexpr = BX // (16 * WARPS)
    J: tl.constexpr = max(1, 2 // R)
    o_r = ((o_x // 16 % WARPS * 8 + o_x % 8) * 4 * R + o_x // (16 * WARPS)) * (4 * J) + o_x // 8 % 2 * 2
    o_j = o_w // 8
    o_c = (o_j // J * (WARPS * 32) + o_w % 8 // 2) * (4 * J * R) + o_j % J * 4 + o_w % 2
    return o_r[:, None] + o_c[None, :]


@triton.jit
def store_product(p_s, i_s, b_s, BX: tl.constexpr, BW: tl.constexpr):
    """Tile number i_s of so many, `by_thread`."""
    tl.store(p_s + i_s * (BX * BW) + tl.arange(0, BX * BW), by_thread(b_s.to(p_s.dtype.element_ty), BX, BW))


@triton.jit
def load_product(p_s, i_s, BX: tl.constexpr, BW: tl.constexpr):
    """What `store_product` wrote."""
    WARPS: tl.constexpr = product_warps(BX)
    R: tl.constexpr = BX // (16 * WARPS)
    J: tl.constexpr = max(1, 2 // R)
    b_s = tl.load(p_s + i_s * (BX * BW) + tl.arange(0, BX * BW))
    b_s = tl.reshape(b_s, (BW // (8 * J), WARPS, 8, 4, R, J, 2, 2))
    return tl.reshape(tl.permute(b_s, (4, 1, 6, 2, 0, 5, 3, 7)), (BX, BW))


@triton.jit
def thread_sums(b_x, BX: tl.constexpr, BW: tl.constexpr, N: tl.constexpr):
    """The sums of what each of N threads has of a tile."""
    b_x = tl.reshape(by_thread(b_x, BX, BW), (BX * BW // (8 * N), N, 8))
    return tl.sum(tl.sum(b_x, 2), 0)


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

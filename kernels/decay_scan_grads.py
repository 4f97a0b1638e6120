"""dq, dk and the decay's gradient under a gate a key, by one walk back through time that has R on chip.

The formulas are those of `decay_chunk_gates`, but R, the gradient of the state after a chunk, is the walk's own, and S,
the state before each chunk, comes from memory in float16 (`row_factors`): with chunks so short, rounding it to bfloat16
would be most of dq's error. Against chunks side by side a walk does not move R, and has the rows of the next chunks
copied while it works on one.

States, keys and gates are tiles turned, [keys, values] and [keys, rows]. So everything of which a gradient is a
product, R, S, k~ and q~, is a left operand, which a product reads from the registers that it was made in, and a key's
sums over rows and values need no other warp. R is held in two tiles where values are more than one has (BV): as one,
its operands spill.

R is left without the half of a chunk's decay that comes last, which the next chunk's first half takes along: once over
R's rows, not twice. Where the two together are below float32, that counts as out of range.
"""

import triton
import triton.language as tl

from fla_compile.kernels.decay_chunk_gates import GROWTH, add_own, exact_pairs, load_block, load_masked, state_products
from fla_compile.kernels.decay_chunk_states import row_factors
from fla_compile.kernels.decay_scan import chunk_at, first_state, walk_program
from fla_compile.kernels.decay_scan_gates import larger, load_gates, met
from fla_compile.kernels.decay_scan_sums import halves, sums_before
from fla_compile.kernels.decay_tiles import COMPILED, load_tile, store_tile, tile_mask
from fla_compile.kernels.decay_triton_common import LOG2_E, as_decay

__all__ = ["chunk_scan_grads_kernel"]

# The least normal number of float32.
LEAST = tl.constexpr(2.0**-126)


@triton.jit
def load_turned(p_x, o_row, o_col, m_x, WIDTH: tl.constexpr):
    p_t = p_x + (o_row * WIDTH)[None, :] + o_col[:, None]
    if m_x is None:
        return tl.load(p_t)
    else:
        return tl.load(p_t, mask=m_x, other=0.0)


@triton.jit
def load_ahead(p_x, o_row, o_col, m_x, WIDTH: tl.constexpr):
    """A turned tile, copied ahead of time into the order that it has in memory, and into no more buffers than stages:
    with a reader that has no layout, an instruction that is nothing, readers' layouts are not asked for."""
    b_x = load_turned(p_x, o_row, o_col, m_x, WIDTH)
    if COMPILED:
        N: tl.constexpr = 32 // b_x.dtype.primitive_bitwidth
        tl.inline_asm_elementwise("", "=r,r", [b_x], dtype=tl.int32 if N == 1 else tl.int16, is_pure=False, pack=N)
    return b_x


@triton.jit
def load_as_product(p_x, o_row, o_col, m_x, o_c, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """A turned tile in float32, as the product with a diagonal of ones: that reads it from shared memory as it came,
    where a thread would read two bytes at a time, and has the layout of its like."""
    b_x = load_ahead(p_x, o_row, o_col, m_x, WIDTH)
    return tl.dot(b_x, (o_c[:, None] == o_c[None, :]).to(b_x.dtype), input_precision=PRECISION)


@triton.jit
def store_turned(p_x, b_x, o_row, o_col, m_x, WIDTH: tl.constexpr):
    tl.store(p_x + (o_row * WIDTH)[None, :] + o_col[:, None], b_x.to(p_x.dtype.element_ty), mask=m_x)


@triton.jit
def parts_product(b_h, b_l, b_y, b_sum, PRECISION: tl.constexpr):
    """x y and a sum, of x in two parts."""
    b_sum = tl.dot(b_l, b_y, b_sum, input_precision=PRECISION)
    return tl.dot(b_h, b_y, b_sum, input_precision=PRECISION)


@triton.jit
def turned_sums(b_h, b_l, m_x, b_sum, PRECISION: tl.constexpr):
    """sum_i x_i m_it [keys, rows] and a sum, of x in two parts."""
    return parts_product(b_h, b_l, m_x.to(b_h.dtype), b_sum, PRECISION)


@triton.jit
def largest_of_keys(b_x, C: tl.constexpr, BK: tl.constexpr):
    """The largest of the rows of b_x [BK, C] as far as threads have them to themselves, [BK, 4]."""
    b_x = tl.reshape(b_x, (BK, C // 8, 4, 2))
    return tl.reduce(tl.reduce(b_x, 3, larger), 1, larger)


@triton.jit
def both(b_x, b_x2, b_y, b_y2, PRECISION: tl.constexpr):
    """x y^T over the values of both tiles, if there are two."""
    b_z = tl.dot(b_x, tl.trans(b_y), input_precision=PRECISION)
    if b_x2 is not None:
        b_z = tl.dot(b_x2, tl.trans(b_y2), b_z, input_precision=PRECISION)
    return b_z


@triton.jit
def state_product(b_s, b_x, b_sum, PRECISION: tl.constexpr):
    """S x^T [keys, rows] and a sum, with S in two parts where that is bfloat16."""
    dtype: tl.constexpr = b_x.dtype
    if dtype == tl.bfloat16:
        b_h, b_l = halves(b_s.to(tl.float32), dtype)
        return parts_product(b_h, b_l, tl.trans(b_x), b_sum, PRECISION)
    else:
        return tl.dot(b_s.to(dtype), tl.trans(b_x), b_sum, input_precision=PRECISION)


@triton.jit
def grad_product(b_r, b_x, b_sum, PRECISION: tl.constexpr):
    """R x^T [keys, rows] and a sum, as `state_product`; float16, whose range R may leave, with `row_factors`."""
    if b_x.dtype == tl.float16:
        b_f, b_down = row_factors(b_r)
        b_y = tl.dot((b_r * b_down[:, None]).to(tl.float16), tl.trans(b_x), input_precision=PRECISION)
        return b_sum + b_y * b_f[:, None]
    else:
        return state_product(b_r, b_x, b_sum, PRECISION)


@triton.jit
def decay_grad(b_u, b_w, b_f, o_c, dtype: tl.constexpr, BEFORE: tl.constexpr, PRECISION: tl.constexpr):
    """sum_{i >= t} (w_i - u_i) + sum_{j < t} f_j; BEFORE, w counts from i > t. As `path_sums` in decay_chunk_gates."""
    if dtype == tl.bfloat16:
        b_h, b_l = halves(b_f, dtype)
        b_dg = turned_sums(b_h, b_l, o_c[:, None] < o_c[None, :], tl.zeros(b_f.shape, tl.float32), PRECISION)
        b_h, b_l = halves(b_w - b_u, dtype)
        b_dg = turned_sums(b_h, b_l, met(o_c, o_c, False, BEFORE), b_dg, PRECISION)
        return b_dg - b_u if BEFORE else b_dg
    elif BEFORE:
        return sums_before(b_w, 1, True) - tl.cumsum(b_u, 1, reverse=True) + sums_before(b_f, 1)
    else:
        return tl.cumsum(b_w - b_u, 1, reverse=True) + sums_before(b_f, 1)


@triton.jit
def add_compensated(b_sum, b_off, b_x):
    """The sum with x, and what it is off by, which the next one takes back (Kahan). What is not finite makes NaN."""
    b_x -= b_off
    b_new = b_sum + b_x
    return b_new, (b_new - b_sum) - b_x


@triton.jit
def exact_chunk(
    p_q, p_k, p_g, p_h, p_f, p_dq, p_dk, p_dg, i_row, b_do, b_do2, b_v, b_v2, b_p, b_own, b_r, b_r2, o_c, o_k, m_k, m_f,
    n_j, p_bonus, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr, RQ: tl.constexpr, RK: tl.constexpr, RG: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """A chunk's gradients, a column at a time, written; R before it, and its share of du over the scale."""
    TWO: tl.constexpr = V > BV
    dtype = b_v.dtype
    b_g = load_gates(p_g, o_c * (H // RG), o_k, m_k, K)
    b_q = load_tile(p_q, o_c * (H // RQ), o_k, m_k, K).to(tl.float32)
    b_k = load_tile(p_k, o_c * (H // RK), o_k, m_k, K).to(tl.float32)
    b_all = tl.sum(b_g, 0)
    b_c = tl.cumsum(b_g, 0)
    b_to = tl.exp2(sums_before(b_g, 0) if BEFORE else b_c)
    b_f = load_masked(p_f, m_f)
    b_h = load_block(p_h, 0, o_k, K, V, BK, BV)
    b_h2 = b_h
    if TWO:
        b_h2 = load_block(p_h, 1, o_k, K, V, BK, BV)
    if p_dg is not None:
        b_x = state_products(b_h, b_r, b_all)
        if TWO:
            b_x += state_products(b_h2, b_r2, b_all)
        b_x *= b_f
    b_dq = both(b_do, b_do2 if TWO else None, b_h.to(dtype), b_h2.to(dtype), PRECISION) * b_f[None, :]
    b_dx = both(b_v, b_v2 if TWO else None, b_r.to(dtype), b_r2.to(dtype), PRECISION)
    b_dx *= tl.exp2(b_all[None, :] - b_c)
    b_dq, b_dk, b_dg = exact_pairs(
        p_g, p_k, b_p, b_q, b_dq * b_to, n_j, o_c, o_k, H // RG, H // RK, K, C, BK, True, p_dg is not None, BEFORE
    )
    store_tile(p_dq, add_own(b_dq, b_own, b_k, p_bonus, o_k, K, BEFORE) * scale, o_c * H, o_k, m_k, K)
    store_tile(p_dk, add_own(b_dk + b_dx, b_own, b_q, p_bonus, o_k, K, BEFORE) * scale, o_c * H, o_k, m_k, K)
    if p_dg is not None:
        b_dg += sums_before(b_k * b_dx, 0) + b_x[None, :]
        store_tile(p_dg + i_row * K, b_dg * scale, o_c * H, o_k, m_k, K)
    b_qt = tl.trans((b_q * b_to).to(dtype))
    b_all = tl.exp2(b_all)[:, None]
    b_r = tl.dot(b_qt, b_do, b_r * b_all, input_precision=PRECISION)
    if TWO:
        b_r2 = tl.dot(b_qt, b_do2, b_r2 * b_all, input_precision=PRECISION)
    else:
        b_r2 = b_r
    return b_r, b_r2, tl.sum(b_own[:, None] * (b_q * b_k), 0)


@triton.jit(do_not_specialize=["T", "L", "n_s", "limit"])
def chunk_scan_grads_kernel(
    p_q, p_k, p_v, p_do, p_g, p_h, p_f, p_s0, p_dq, p_dk, p_dg, p_range, p_table, p_u, p_bonus, p_du,
    s_in, scale, limit, T, L, n_s,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_S0: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    RQ: tl.constexpr = 1, RK: tl.constexpr = 1, RV: tl.constexpr = 1, RG: tl.constexpr = 1,
    BEFORE: tl.constexpr = False, CHUNKS: tl.constexpr = 1,
):  # fmt: skip
    """One program for each segment, head and block of keys; V is up to 2 BV. p_h and p_f hold the states before chunks,
    as `chunk_states_kernel` leaves them; p_s0, read times s_in, the gradient of the final state. p_du [segments, H, K]
    gets each segment's share in the gradient of the bonus. The rest as for `chunk_grads_kernel`, EXACT as for
    `chunk_scan_rows_kernel`."""
    TWO: tl.constexpr = V > BV
    if EXACT:
        if tl.load(p_range + tl.program_id(0)) <= limit:
            return
    i_k, i_nh, i_h, i_seq, t_a, t_e, i_state, i_u = walk_program(p_table, T, H, L, n_s, K, BK, C * CHUNKS, True)
    dtype = p_v.dtype.element_ty
    GROWS: tl.constexpr = p_dg is not None and dtype != tl.float16
    n_c = tl.cdiv(t_e - t_a, C)
    o_c = tl.arange(0, C)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    o_v2 = BV + o_v
    p_h += i_state * (CHUNKS * K * V)
    p_f += i_state * (CHUNKS * K)
    if p_bonus is not None:
        p_bonus += i_h * K
    m_s = tile_mask(o_k < K, o_v, V, BV, K % BK == 0)
    b_r = first_state(p_s0, p_table, p_u, i_nh, i_u, s_in, o_k, o_v, m_s, K, V, BK, BV, False, HAS_S0)
    b_r2 = b_r
    if TWO:
        m_s2 = tile_mask(o_k < K, o_v2, V, BV, K % BK == 0)
        b_r2 = first_state(p_s0, p_table, p_u, i_nh, i_u, s_in, o_k, o_v2, m_s2, K, V, BK, BV, False, HAS_S0)
    b_range = tl.zeros((BK, 4), tl.float32)
    b_last = tl.full((BK,), 1.0, tl.float32)
    b_least = tl.full((BK,), 1.0, tl.float32)
    b_du = tl.zeros((BK,), tl.float32)
    b_off = tl.zeros((BK,), tl.float32)
    for i_n in tl.range(n_c, disable_licm=True):
        i_c, t_0, i_row = chunk_at(i_n, n_c, t_a, i_seq, H, C, True)
        m_c = t_0 + o_c < t_e
        m_k = tile_mask(m_c, o_k, K, BK, EVEN)
        m_t = None if m_k is None else tl.trans(m_k)
        m_v = tile_mask(m_c, o_v, V, BV, EVEN)
        m_v2 = tile_mask(m_c, o_v2, V, BV, EVEN)
        p_qc, p_kc, p_gc = p_q + i_row // RQ * K, p_k + i_row // RK * K, p_g + i_row // RG * K
        p_vc, p_doc, p_hc = p_v + i_row // RV * V, p_do + i_row * V, p_h + i_c.to(tl.int64) * (K * V)
        p_fc = p_f + i_c.to(tl.int64) * K + o_k
        m_f = None if K % BK == 0 else o_k < K
        if not EXACT:
            if TWO:
                b_g = load_turned(p_gc, o_c * (H // RG), o_k, m_t, K)
            else:  # with one tile of values, in memory's order, it measured faster, with two slower
                b_g = load_ahead(p_gc, o_c * (H // RG), o_k, m_t, K)
            b_g = as_decay(b_g) * LOG2_E
            b_gh, b_gl = halves(b_g, dtype)
            m_e = tl.where(o_c[:, None] <= o_c[None, :], 0.5, -0.5)
            b_zero = tl.zeros((BK, C), tl.float32)
            b_e = turned_sums(b_gh, b_gl, m_e, b_zero, PRECISION)
            b_half = tl.sum(tl.where((o_c == C - 1)[None, :], b_e, 0.0), 1)
            b_to = b_e
            if BEFORE:
                b_to = turned_sums(b_gh, b_gl, o_c[:, None] < o_c[None, :], b_zero - b_half[:, None], PRECISION)
            b_half = tl.exp2(b_half)
            b_most = 2.0 * largest_of_keys(tl.abs(b_e), C, BK)
            if GROWS:  # all that pairs have is in the first of the sums
                b_grown = tl.maximum(b_g, 0.0).to(dtype)
                b_grown = tl.dot(b_grown, met(o_c, o_c, False, BEFORE).to(dtype), input_precision=PRECISION)
                b_most += GROWTH * largest_of_keys(b_grown, C, BK)
            b_range = larger(b_range, b_most)
        b_do = load_tile(p_doc, o_c * H, o_v, m_v, V)
        b_v = load_tile(p_vc, o_c * (H // RV), o_v, m_v, V)
        b_do2, b_v2 = b_do, b_v
        if TWO:
            b_do2 = load_tile(p_doc, o_c * H, o_v2, m_v2, V)
            b_v2 = load_tile(p_vc, o_c * (H // RV), o_v2, m_v2, V)
        b_p = both(b_do, b_do2 if TWO else None, b_v, b_v2, PRECISION)
        b_own = tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_p, 0.0), 1)
        b_p = tl.where(o_c[:, None] > o_c[None, :], b_p, 0.0)
        if EXACT:
            b_r, b_r2, b_y = exact_chunk(
                p_qc, p_kc, p_gc, p_hc, p_fc, p_dq + i_row * K, p_dk + i_row * K, p_dg, i_row, b_do, b_do2, b_v, b_v2,
                b_p, b_own, b_r, b_r2, o_c, o_k, m_k, m_f, tl.minimum(t_e - t_0, C), p_bonus, scale,
                H, K, V, C, BK, BV, PRECISION, RQ, RK, RG, BEFORE,
            )  # fmt: skip
            b_du += b_y  # which seldom runs, and has no register left for what the sum is off by
        else:
            b_ph, b_pl = halves(b_p, dtype)
            b_all = b_half * b_last
            b_least = tl.minimum(b_least, b_all)
            b_last = b_half
            b_r *= b_all[:, None]
            b_f = load_masked(p_fc, m_f)  # asked for late, as tiles are: until then it takes no registers
            if TWO:  # the order of what follows is what measured fastest with two tiles of values, and with one
                b_r2 *= b_all[:, None]
                b_dx = grad_product(b_r2, b_v2, grad_product(b_r, b_v, b_zero, PRECISION), PRECISION)
            b_h = load_block(p_hc, 0, o_k, K, V, BK, BV)
            b_x = tl.sum(b_h.to(tl.float32) * b_r, 1)
            b_dq = state_product(b_h, b_do, b_zero, PRECISION)
            if TWO:
                b_h = load_block(p_hc, 1, o_k, K, V, BK, BV)
                b_x += tl.sum(b_h.to(tl.float32) * b_r2, 1)
                b_dq = state_product(b_h, b_do2, b_dq, PRECISION)
            else:
                b_dx = grad_product(b_r, b_v, b_zero, PRECISION)
            b_x *= b_f
            b_dx *= tl.exp2(-b_e)
            b_q = load_as_product(p_qc, o_c * (H // RQ), o_k, m_t, o_c, K, PRECISION)
            b_qh, b_ql = halves(b_q * tl.exp2(b_to), dtype)
            if not TWO:
                b_r = parts_product(b_qh, b_ql, b_do, b_r, PRECISION)
            b_dk = tl.dot(b_ql, b_ph, input_precision=PRECISION)
            b_dk = tl.dot(b_qh, b_pl, b_dk, input_precision=PRECISION)
            b_dk = tl.dot(b_qh, b_ph, b_dk, input_precision=PRECISION) * tl.exp2(-b_e)
            b_y = add_own(b_dk + b_dx, b_own, b_q, p_bonus, o_k, K, BEFORE, True) * scale
            store_turned(p_dk + i_row * K, b_y, o_c * H, o_k, m_t, K)
            if TWO:
                b_r = parts_product(b_qh, b_ql, b_do, b_r, PRECISION)
                b_r2 = parts_product(b_qh, b_ql, b_do2, b_r2, PRECISION)
            b_k = load_as_product(p_kc, o_c * (H // RK), o_k, m_t, o_c, K, PRECISION)
            b_kh, b_kl = halves(b_k * tl.exp2(-b_e), dtype)
            b_dq *= b_f[:, None]
            b_dq *= b_half[:, None]
            b_dq = tl.dot(b_kl, tl.trans(b_ph), b_dq, input_precision=PRECISION)
            b_dq = tl.dot(b_kh, tl.trans(b_pl), b_dq, input_precision=PRECISION)
            b_dq = tl.dot(b_kh, tl.trans(b_ph), b_dq, input_precision=PRECISION) * tl.exp2(b_to)
            b_y = add_own(b_dq, b_own, b_k, p_bonus, o_k, K, BEFORE, True) * scale
            store_turned(p_dq + i_row * K, b_y, o_c * H, o_k, m_t, K)
            if p_du is not None:
                b_du, b_off = add_compensated(b_du, b_off, tl.sum(b_own[None, :] * (b_q * b_k), 1))
            if p_dg is not None:
                b_dg = decay_grad(b_k * b_dk, b_q * b_dq, b_k * b_dx, o_c, dtype, BEFORE, PRECISION)
                store_turned(p_dg + i_row * K, (b_dg + (b_x * b_half)[:, None]) * scale, o_c * H, o_k, m_t, K)
    if p_du is not None:
        tl.store(p_du + (tl.program_id(0) // tl.cdiv(K, BK)).to(tl.int64) * K + o_k, b_du * scale, mask=o_k < K)
    if not EXACT:
        s_range = tl.reduce(tl.ravel(b_range), 0, larger)
        s_range = tl.where(tl.min(b_least, 0) < LEAST, float("inf"), s_range)
        tl.store(p_range + tl.program_id(0), s_range)

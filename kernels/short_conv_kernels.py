"""The short convolution in Triton: every program walks down time in its own columns.

A program owns BD columns of SEG steps. It loads ROWS steps at once, keeps the last W - 1 inputs in registers, and so
reads each element once (but for W - 1 steps before a segment, and after it in the backward). The backward computes z
again and keeps the sums for the last W - 1 rows of dx, which later steps still add to; its shares of dweight and dbias
are written per segment, for the host to add up in a fixed order. `short_conv_triton` launches all of these.

Rows of x, y's residual and dy lie st_ apart and batches sb_; columns are dense, and so are all other tensors.
"""

# ruff: noqa: RUF005 - Triton unpacks nothing inside a tuple

import triton
import triton.language as tl


@triton.jit
def load_row(p_x, i_row, stride, o_d, m_d):
    """Row i_row [BD] of an array whose rows lie `stride` apart."""
    return tl.load(p_x + tl.cast(i_row, tl.int64) * stride + o_d, mask=m_d, other=0.0)


@triton.jit
def load_taps(p_w, o_d, m_d, W: tl.constexpr):
    b_w = ()
    for j in tl.static_range(W):
        b_w = b_w + (tl.load(p_w + o_d.to(tl.int64) * W + j, mask=m_d, other=0.0).to(tl.float32),)
    return b_w


@triton.jit
def state_rows(p_h, i_n, D, o_d, m_d, W: tl.constexpr, HAS_STATE: tl.constexpr, BD: tl.constexpr):
    """The W - 1 inputs before sequence i_n, oldest first."""
    b_x = ()
    for k in tl.static_range(W - 1):
        if HAS_STATE:
            b_x = b_x + (load_row(p_h, tl.cast(i_n, tl.int64) * (W - 1) + k, D, o_d, m_d).to(tl.float32),)
        else:
            b_x = b_x + (tl.zeros((BD,), tl.float32),)
    return b_x


@triton.jit
def past_rows(p_x, stride, p_h, i_n, t, i_pos, D, o_d, m_d, W: tl.constexpr, HAS_STATE: tl.constexpr):
    """The W - 1 inputs before step t, which is the i_pos-th of sequence i_n, oldest first."""
    b_x = ()
    for k in tl.static_range(W - 1):
        back = W - 1 - k
        b_k = load_row(p_x, t - back, stride, o_d, m_d & (i_pos >= back)).to(tl.float32)
        if HAS_STATE:
            row = tl.cast(i_n, tl.int64) * (W - 1) + i_pos + k
            b_k += load_row(p_h, row, D, o_d, m_d & (i_pos < back)).to(tl.float32)
        b_x = b_x + (b_k,)
    return b_x


@triton.jit
def segment(T, SEG, D, BD: tl.constexpr):
    """A program's row of x, its first step and the one after its last, its columns."""
    n_d = tl.cdiv(D, BD)
    i_s = tl.program_id(0) // n_d
    n_s = tl.cdiv(T, SEG)
    t_0 = (i_s % n_s) * SEG
    o_d = (tl.program_id(0) % n_d) * BD + tl.arange(0, BD)
    return i_s, i_s // n_s, t_0, tl.minimum(T, t_0 + SEG), o_d, o_d < D


@triton.jit
def weighted(b_w, b_x, b_now, W: tl.constexpr):
    """sum_k w_k x_{t - W + 1 + k}, the newest input apart."""
    b_z = b_w[W - 1] * b_now
    for k in tl.static_range(W - 1):
        b_z += b_w[k] * b_x[k]
    return b_z


@triton.jit
def sigmoid(b_z):
    return 1.0 / (1.0 + tl.exp(-b_z))


@triton.jit(do_not_specialize=["T", "SEG"])
def short_conv_forward_kernel(
    p_x, p_w, p_b, p_r, p_h, p_pos, p_seq, p_y, T, SEG, D, sb_x, st_x, sb_r, st_r,
    W: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_STATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """p_pos, p_seq [T]: a step's place in its sequence, and which sequence, where PACKED."""
    _, i_b, t_0, t_1, o_d, m_d = segment(T, SEG, D, BD)
    i_b = i_b.to(tl.int64)
    p_x += i_b * sb_x
    if HAS_RESIDUAL:
        p_r += i_b * sb_r
    p_y += i_b * T * D
    b_w = load_taps(p_w, o_d, m_d, W)
    b_b = tl.zeros((BD,), tl.float32)
    if HAS_BIAS:
        b_b += tl.load(p_b + o_d, mask=m_d, other=0.0).to(tl.float32)
    i_pos, i_n = t_0, i_b
    if PACKED:
        i_pos = tl.load(p_pos + t_0)
        i_n = tl.load(p_seq + t_0).to(tl.int64)
    b_x = past_rows(p_x, st_x, p_h, i_n, t_0, i_pos, D, o_d, m_d, W, HAS_STATE)
    for i in range(tl.cdiv(t_1 - t_0, ROWS)):
        t = t_0 + i * ROWS
        b_new = ()
        b_res = ()
        for r in tl.static_range(ROWS):
            b_new = b_new + (load_row(p_x, t + r, st_x, o_d, m_d & (t + r < t_1)),)
            if HAS_RESIDUAL:
                b_res = b_res + (load_row(p_r, t + r, st_r, o_d, m_d & (t + r < t_1)),)
        for r in tl.static_range(ROWS):
            if PACKED:
                i_pos = tl.load(p_pos + t + r, mask=t + r < t_1, other=1)
                if i_pos == 0:
                    i_n = tl.load(p_seq + t + r).to(tl.int64)
                    b_x = state_rows(p_h, i_n, D, o_d, m_d, W, HAS_STATE, BD)
            b_now = b_new[r].to(tl.float32)
            b_y = weighted(b_w, b_x, b_now, W) + b_b
            if SILU:
                b_y = b_y * sigmoid(b_y)
            if HAS_RESIDUAL:
                b_y += b_res[r].to(tl.float32)
            p_row = p_y + tl.cast(t + r, tl.int64) * D + o_d
            tl.store(p_row, b_y.to(p_y.dtype.element_ty), mask=m_d & (t + r < t_1))
            b_x = b_x[1:] + (b_now,)


@triton.jit(do_not_specialize=["T", "SEG"])
def short_conv_backward_kernel(
    p_x, p_w, p_b, p_h, p_pos, p_seq, p_dy, p_dx, p_dw, T, SEG, D, sb_x, st_x, sb_dy, st_dy,
    W: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """p_dw [segments, W + 1, D], the last row for the bias. Steps t_1 to t_1 + W - 2 only add to the dx before t_1."""
    i_s, i_b, t_0, t_1, o_d, m_d = segment(T, SEG, D, BD)
    i_b = i_b.to(tl.int64)
    p_x += i_b * sb_x
    p_dy += i_b * sb_dy
    p_dx += i_b * T * D
    t_2 = tl.minimum(T, t_1 + W - 1)
    b_w = load_taps(p_w, o_d, m_d, W)
    b_b = tl.zeros((BD,), tl.float32)
    if HAS_BIAS:
        b_b += tl.load(p_b + o_d, mask=m_d, other=0.0).to(tl.float32)
    i_pos, i_n = t_0, i_b
    if PACKED:
        i_pos = tl.load(p_pos + t_0)
        i_n = tl.load(p_seq + t_0).to(tl.int64)
    b_x = past_rows(p_x, st_x, p_h, i_n, t_0, i_pos, D, o_d, m_d, W, HAS_STATE)
    b_dx = ()  # of the W - 1 steps before t
    b_dw = ()
    for _ in tl.static_range(W - 1):
        b_dx = b_dx + (tl.zeros((BD,), tl.float32),)
    for _ in tl.static_range(W + 1):
        b_dw = b_dw + (tl.zeros((BD,), tl.float32),)
    for i in range(tl.cdiv(t_1 - t_0 + W - 1, ROWS)):
        t = t_0 + i * ROWS
        b_new = ()
        b_dy = ()
        for r in tl.static_range(ROWS):
            b_new = b_new + (load_row(p_x, t + r, st_x, o_d, m_d & (t + r < t_2)),)
            b_dy = b_dy + (load_row(p_dy, t + r, st_dy, o_d, m_d & (t + r < t_2)),)
        for r in tl.static_range(ROWS):
            if PACKED:
                i_pos = tl.load(p_pos + t + r, mask=t + r < t_2, other=W)
                if i_pos == 0:
                    i_n = tl.load(p_seq + t + r).to(tl.int64)
                    b_x = state_rows(p_h, i_n, D, o_d, m_d, W, HAS_STATE, BD)
            b_now = b_new[r].to(tl.float32)
            b_dz = b_dy[r].to(tl.float32)
            if SILU:
                b_z = weighted(b_w, b_x, b_now, W) + b_b
                b_s = sigmoid(b_z)
                b_dz *= b_s * (1.0 + b_z * (1.0 - b_s))
            b_sum = ()
            for k in tl.static_range(W - 1):
                b_part = b_w[k] * b_dz
                if PACKED:
                    b_part = tl.where(i_pos >= W - 1 - k, b_part, 0.0)
                b_sum = b_sum + (b_dx[k] + b_part,)
            b_sum = b_sum + (b_w[W - 1] * b_dz,)
            t_dx = t + r - (W - 1)
            p_row = p_dx + tl.cast(t_dx, tl.int64) * D + o_d
            tl.store(p_row, b_sum[0].to(p_dx.dtype.element_ty), mask=m_d & (t_dx >= t_0) & (t_dx < t_1))
            b_dx = b_sum[1:]
            b_own = tl.where(t + r < t_1, b_dz, 0.0)
            b_add = ()
            for k in tl.static_range(W - 1):
                b_add = b_add + (b_dw[k] + b_own * b_x[k],)
            b_dw = b_add + (b_dw[W - 1] + b_own * b_now, b_dw[W] + b_own)
            b_x = b_x[1:] + (b_now,)
    p_dw += tl.cast(i_s, tl.int64) * (W + 1) * D
    for k in tl.static_range(W + 1):
        tl.store(p_dw + tl.cast(k, tl.int64) * D + o_d, b_dw[k], mask=m_d)


@triton.jit(do_not_specialize=["T"])
def short_conv_state_grad_kernel(
    p_x, p_w, p_b, p_h, p_cu, p_dy, p_dh, T, D, sb_x, st_x, sb_dy, st_dy,
    W: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """p_dh [N, W - 1, D]: what the first W - 1 steps of each sequence ask of the inputs before it."""
    n_d = tl.cdiv(D, BD)
    i_n = (tl.program_id(0) // n_d).to(tl.int64)
    o_d = (tl.program_id(0) % n_d) * BD + tl.arange(0, BD)
    m_d = o_d < D
    if PACKED:
        t_0 = tl.load(p_cu + i_n).to(tl.int64)
        length = tl.load(p_cu + i_n + 1).to(tl.int64) - t_0
        p_x += t_0 * st_x
        p_dy += t_0 * st_dy
    else:
        length = T
        p_x += i_n * sb_x
        p_dy += i_n * sb_dy
    b_w = load_taps(p_w, o_d, m_d, W)
    b_b = tl.zeros((BD,), tl.float32)
    if HAS_BIAS:
        b_b += tl.load(p_b + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_x = state_rows(p_h, i_n, D, o_d, m_d, W, True, BD)
    b_dz = ()
    for t in tl.static_range(W - 1):
        b_now = load_row(p_x, t, st_x, o_d, m_d & (t < length)).to(tl.float32)
        b_z = weighted(b_w, b_x, b_now, W) + b_b
        b_t = load_row(p_dy, t, st_dy, o_d, m_d & (t < length)).to(tl.float32)
        if SILU:
            b_s = sigmoid(b_z)
            b_t *= b_s * (1.0 + b_z * (1.0 - b_s))
        b_dz = b_dz + (b_t,)
        b_x = b_x[1:] + (b_now,)
    for m in tl.static_range(W - 1):
        b_dh = tl.zeros((BD,), tl.float32)
        for t in tl.static_range(m + 1):
            b_dh += b_w[m - t] * b_dz[t]
        tl.store(p_dh + (i_n * (W - 1) + m) * D + o_d, b_dh.to(p_dh.dtype.element_ty), mask=m_d)


@triton.jit
def short_conv_sum_kernel(
    p_parts, p_dweight, p_dbias, parts, D, W: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Parts [parts, W + 1, D] added up, program (d, j) row j: p_dweight [D, W] from the first W, p_dbias the last."""
    j, o_d = tl.program_id(1), tl.program_id(0) * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_sum = tl.zeros((BP, BD), tl.float32)
    for i_p in range(0, parts, BP):
        o_p = i_p + tl.arange(0, BP)
        o = (o_p * (W + 1) + j).to(tl.int64)[:, None] * D + o_d[None, :]
        b_sum += tl.load(p_parts + o, mask=(o_p < parts)[:, None] & m_d[None, :], other=0.0)
    b_sum = tl.sum(b_sum, 0)
    tl.store(p_dweight + o_d * W + j, b_sum.to(p_dweight.dtype.element_ty), mask=m_d & (j < W))
    if HAS_BIAS:
        tl.store(p_dbias + o_d, b_sum.to(p_dbias.dtype.element_ty), mask=m_d & (j == W))


@triton.jit
def short_conv_step_kernel(
    p_x, p_w, p_b, p_r, p_h, p_y, D, sb_x, sb_r,
    W: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """One step; p_h [B, W - 1, D] moves on by one row in place."""
    n_d = tl.cdiv(D, BD)
    i_b = (tl.program_id(0) // n_d).to(tl.int64)
    o_d = (tl.program_id(0) % n_d) * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_w = load_taps(p_w, o_d, m_d, W)
    b_x = state_rows(p_h, i_b, D, o_d, m_d, W, True, BD)
    b_new = tl.load(p_x + i_b * sb_x + o_d, mask=m_d, other=0.0)
    b_y = weighted(b_w, b_x, b_new.to(tl.float32), W)
    if HAS_BIAS:
        b_y += tl.load(p_b + o_d, mask=m_d, other=0.0).to(tl.float32)
    if SILU:
        b_y = b_y * sigmoid(b_y)
    if HAS_RESIDUAL:
        b_y += tl.load(p_r + i_b * sb_r + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(p_y + i_b * D + o_d, b_y.to(p_y.dtype.element_ty), mask=m_d)
    b_x = b_x[1:] + (b_new.to(tl.float32),)
    for k in tl.static_range(W - 1):
        tl.store(p_h + (i_b * (W - 1) + k) * D + o_d, b_x[k].to(p_h.dtype.element_ty), mask=m_d)

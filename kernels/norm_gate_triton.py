"""Norm times gate, one Triton kernel forward, one backward, and one that adds up the weights' gradients.

A program holds BR rows of D elements whole, BD = D rounded up to a power of two, and every operand is read once. x and
gate may be strided: row r of an operand lies at (r // count) * outer + (r % count) * inner, its elements side by side,
so the heads of a slice of a wider projection need no copy. Results are dense.

Backward programs walk over tiles of rows and keep their sums for dweight and dbias in registers: [programs, G, D]
partial sums in float32, which a second kernel adds up, so that the result is the same in every run. Program (p, h)
takes the rows r with r % G = h, which share the weight h. The formulas are in `norm_gate_plain`.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_compile.kernels.launch import Launch, layout, multiprocessors, remember
from fla_compile.kernels.norm_gate_configs import Config, config_for
from fla_compile.kernels.norm_gate_forms import Form

__all__ = ["launch_backward", "launch_forward"]

# Partial sums that a program adds up at a time, and columns.
SUM_TILE = 256, 16


@triton.jit
def row_offsets(o_r, count, outer, inner):
    return (o_r // count).to(tl.int64) * outer + (o_r % count).to(tl.int64) * inner


@triton.jit
def norm_gate_forward_kernel(
    p_x, p_g, p_w, p_b, p_y, p_rstd, p_mean,
    rows, groups, eps, x_count, x_outer, x_inner, g_count, g_outer, g_inner,
    D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, LAYER: tl.constexpr, SILU: tl.constexpr,
    GATE_FIRST: tl.constexpr, HAS_W: tl.constexpr, HAS_B: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    o_r, o_d = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BD)
    m_r = o_r < rows
    m = m_r[:, None] & (o_d < D)[None, :]
    b_x = tl.load(p_x + row_offsets(o_r, x_count, x_outer, x_inner)[:, None] + o_d[None, :], mask=m, other=0.0)
    b_g = tl.load(p_g + row_offsets(o_r, g_count, g_outer, g_inner)[:, None] + o_d[None, :], mask=m, other=0.0)
    b_u, b_g = b_x.to(tl.float32), b_g.to(tl.float32)
    b_a = tl.sigmoid(b_g)
    if SILU:
        b_a *= b_g
    if GATE_FIRST:
        b_u *= b_a
    if LAYER:
        b_mean = tl.sum(b_u, 1) / D
        b_u = tl.where(m, b_u - b_mean[:, None], 0.0)
        tl.store(p_mean + o_r, b_mean, mask=m_r)
    b_rstd = tl.rsqrt(tl.sum(b_u * b_u, 1) / D + eps)
    tl.store(p_rstd + o_r, b_rstd, mask=m_r)
    b_n = b_u * b_rstd[:, None]
    o_w, m_w = o_d[None, :], (o_d < D)[None, :]
    if GROUPED:
        o_w += (o_r % groups)[:, None] * D
    if HAS_W:
        b_n *= tl.load(p_w + o_w, mask=m_w, other=0.0).to(tl.float32)
    if HAS_B:
        b_n += tl.load(p_b + o_w, mask=m_w, other=0.0).to(tl.float32)
    if not GATE_FIRST:
        b_n *= b_a
    tl.store(p_y + o_r.to(tl.int64)[:, None] * D + o_d[None, :], b_n.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def norm_gate_backward_kernel(
    p_x, p_g, p_w, p_b, p_rstd, p_mean, p_dy, p_dx, p_dg, p_dw, p_db, p_y,
    rows, groups, x_count, x_outer, x_inner, g_count, g_outer, g_inner, dy_count, dy_outer, dy_inner,
    D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, LAYER: tl.constexpr, SILU: tl.constexpr,
    GATE_FIRST: tl.constexpr, HAS_W: tl.constexpr, HAS_B: tl.constexpr, STORE_Y: tl.constexpr,
):  # fmt: skip
    i_p, i_h = tl.program_id(0), tl.program_id(1)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    if HAS_W:
        b_w = tl.load(p_w + i_h * D + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        b_dw = tl.zeros((BR, BD), tl.float32)
    if HAS_B:
        b_b = tl.load(p_b + i_h * D + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        b_db = tl.zeros((BR, BD), tl.float32)
    for i_t in range(i_p, tl.cdiv(rows // groups, BR), tl.num_programs(0)):
        o_k = i_t * BR + tl.arange(0, BR)
        m_r = o_k < rows // groups
        o_r = o_k * groups + i_h
        m = m_r[:, None] & m_d[None, :]
        b_x = tl.load(p_x + row_offsets(o_r, x_count, x_outer, x_inner)[:, None] + o_d[None, :], mask=m, other=0.0)
        b_g = tl.load(p_g + row_offsets(o_r, g_count, g_outer, g_inner)[:, None] + o_d[None, :], mask=m, other=0.0)
        b_dy = tl.load(p_dy + row_offsets(o_r, dy_count, dy_outer, dy_inner)[:, None] + o_d[None, :], mask=m, other=0.0)
        b_rstd = tl.load(p_rstd + o_r, mask=m_r, other=0.0)[:, None]
        b_x, b_g, b_dy = b_x.to(tl.float32), b_g.to(tl.float32), b_dy.to(tl.float32)
        b_s = tl.sigmoid(b_g)
        if SILU:
            b_a, b_slope = b_s * b_g, b_s * (1.0 + b_g * (1.0 - b_s))
        else:
            b_a, b_slope = b_s, b_s * (1.0 - b_s)
        b_h = b_x * b_a if GATE_FIRST else b_x
        if LAYER:
            b_h = tl.where(m, b_h - tl.load(p_mean + o_r, mask=m_r, other=0.0)[:, None], 0.0)
        b_h *= b_rstd
        b_dn = b_dy if GATE_FIRST else b_dy * b_a
        b_n, b_dh = b_h, b_dn
        if HAS_W:
            b_dw += b_dn * b_h
            b_n, b_dh = b_h * b_w, b_dn * b_w
        if HAS_B:
            b_db += b_dn
            b_n += b_b
        b_du = b_dh - b_h * (tl.sum(b_dh * b_h, 1) / D)[:, None]
        if LAYER:
            b_du -= (tl.sum(b_dh, 1) / D)[:, None]
        b_du *= b_rstd
        if GATE_FIRST:
            b_dx, b_dg, b_y = b_du * b_a, b_du * b_x * b_slope, b_n
        else:
            b_dx, b_dg, b_y = b_du, b_dy * b_n * b_slope, b_n * b_a
        o = o_r.to(tl.int64)[:, None] * D + o_d[None, :]
        tl.store(p_dx + o, b_dx.to(p_dx.dtype.element_ty), mask=m)
        tl.store(p_dg + o, b_dg.to(p_dg.dtype.element_ty), mask=m)
        if STORE_Y:
            tl.store(p_y + o, b_y.to(p_y.dtype.element_ty), mask=m)
    o_part = (i_p * groups + i_h) * D + o_d
    if HAS_W:
        tl.store(p_dw + o_part, tl.sum(b_dw, 0), mask=m_d)
    if HAS_B:
        tl.store(p_db + o_part, tl.sum(b_db, 0), mask=m_d)


@triton.jit
def sum_parts_kernel(
    p_x, p_y, p_x_sum, p_y_sum, parts, size, BP: tl.constexpr, BS: tl.constexpr, BOTH: tl.constexpr
):  # fmt: skip
    """p_x and, with BOTH, p_y [parts, size], added up over the parts; one program for each BS columns."""
    o_s = tl.program_id(0) * BS + tl.arange(0, BS)
    store_sum(p_x, p_x_sum, parts, size, o_s, BP, BS)
    if BOTH:
        store_sum(p_y, p_y_sum, parts, size, o_s, BP, BS)


@triton.jit
def store_sum(p_x, p_sum, parts, size, o_s, BP: tl.constexpr, BS: tl.constexpr):
    b_sum = tl.zeros((BP, BS), tl.float32)
    for i_p in range(0, parts, BP):
        o_p = i_p + tl.arange(0, BP)
        m = (o_p < parts)[:, None] & (o_s < size)[None, :]
        b_sum += tl.load(p_x + o_p[:, None] * size + o_s[None, :], mask=m, other=0.0)
    tl.store(p_sum + o_s, tl.sum(b_sum, 0).to(p_sum.dtype.element_ty), mask=o_s < size)


def as_rows(x: Tensor, width: int) -> tuple[Tensor, int, int, int]:
    """x [..., G * width] as rows, itself or a dense copy where that is no grid of rows; then count, outer, inner."""
    if x.is_contiguous():
        return x, 1, width, width
    groups = x.shape[-1] // width
    sizes, strides = [*x.shape[:-1], groups, width], [*x.stride()[:-1], x.stride(-1) * width, x.stride(-1)]
    axes: list[list[int]] = []  # [size, stride], neighbours merged where they lie end to end
    for size, stride in zip(sizes[:-1], strides[:-1], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = [axes[-1][0] * size, stride]
        else:
            axes.append([size, stride])
    if (strides[-1] != 1 and width > 1) or len(axes) > 2:
        return x.contiguous(), 1, width, width
    if len(axes) < 2:
        return x, 1, axes[0][1] if axes else width, width
    return x, axes[1][0], axes[0][1], axes[1][1]


class _Plan(NamedTuple):
    """What a call of known layouts needs: which of x, gate and dy to copy, and the launches."""

    copied: tuple[bool, ...]
    rows: int
    launch: Launch
    parts: tuple[int, int] = (0, 0)
    sum_parts: Launch | None = None


_plans: dict[tuple[Any, ...], _Plan] = {}


def launch_forward(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    form: Form,
    dtype: torch.dtype,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y [..., P] in `dtype`, rstd [N] and mean [N] (None for rms) in float32; x, gate [..., P]."""
    key = (form, config, layout(x), layout(gate), layout(weight), layout(bias), dtype)
    plan = _plans.get(key)
    if plan is None:
        plan = remember(_plans, key, _plan_forward(x, gate, weight, bias, form, config))
    y = dense_like(x, dtype)
    rstd = torch.empty(plan.rows, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if form.layer else None
    if plan.rows:
        copy_x, copy_gate = plan.copied
        x, gate = x.contiguous() if copy_x else x, gate.contiguous() if copy_gate else gate
        plan.launch(x, gate, weight, bias, y, rstd, mean)
    return y, rstd, mean


def _plan_forward(
    x: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, form: Form, config: Config | None
) -> _Plan:
    D, rows = form.width, x.numel() // form.width
    config = config or config_for(D, x.element_size())
    groups = groups_of(weight, bias, D)
    (dense_x, *x_rows), (dense_gate, *gate_rows) = as_rows(x, D), as_rows(gate, D)
    numbers = (
        rows, groups, form.eps, *x_rows, *gate_rows, D, config.rows, triton.next_power_of_2(D), form.layer, form.silu,
        form.gate_first, weight is not None, bias is not None, groups > 1,
    )  # fmt: skip
    grid = (triton.cdiv(rows, config.rows),)
    launch = Launch(norm_gate_forward_kernel, x.device, grid, numbers, num_warps=config.num_warps)
    return _Plan((dense_x is not x, dense_gate is not gate), rows, launch)


def launch_backward(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor,
    mean: Tensor | None,
    dy: Tensor,
    form: Form,
    y_dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dgate, dweight, dbias as their operands; and y again if `y_dtype` is given."""
    operands = x, gate, weight, bias, rstd, mean, dy
    key = (form, config, *map(layout, operands), y_dtype)
    plan = _plans.get(key)
    if plan is None:
        plan = remember(_plans, key, _plan_backward(x, gate, weight, bias, dy, form, y_dtype, config))
    dx, dg = dense_like(x, x.dtype), dense_like(x, gate.dtype)
    y = None if y_dtype is None else dense_like(x, y_dtype)
    dw, db = (None if p is None else dense_like(p, p.dtype) for p in (weight, bias))
    dw_parts, db_parts = (
        None if p is None else torch.empty(*plan.parts, dtype=torch.float32, device=x.device) for p in (weight, bias)
    )
    copy_x, copy_gate, copy_dy = plan.copied
    x, gate = x.contiguous() if copy_x else x, gate.contiguous() if copy_gate else gate
    dy = dy.contiguous() if copy_dy else dy
    plan.launch(x, gate, weight, bias, rstd, mean, dy, dx, dg, dw_parts, db_parts, y)
    if plan.sum_parts is not None:
        plan.sum_parts(*((dw_parts, db_parts, dw, db) if weight is not None else (db_parts, None, db, None)))
    return dx, dg, dw, db, y


def _plan_backward(
    x: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor, form: Form,
    y_dtype: torch.dtype | None, config: Config | None,
) -> _Plan:  # fmt: skip
    D, rows = form.width, x.numel() // form.width
    config = config or config_for(D, x.element_size())
    groups = groups_of(weight, bias, D)
    tiles = triton.cdiv(rows // groups, config.backward_rows)
    programs = max(1, min(tiles, multiprocessors(x.device) * config.programs // groups))
    (dense_x, *x_rows), (dense_gate, *gate_rows), (dense_dy, *dy_rows) = (as_rows(z, D) for z in (x, gate, dy))
    numbers = (
        rows, groups, *x_rows, *gate_rows, *dy_rows, D, config.backward_rows, triton.next_power_of_2(D), form.layer,
        form.silu, form.gate_first, weight is not None, bias is not None, y_dtype is not None,
    )  # fmt: skip
    launch = Launch(norm_gate_backward_kernel, x.device, (programs, groups), numbers, num_warps=config.backward_warps)
    copied = dense_x is not x, dense_gate is not gate, dense_dy is not dy
    if weight is None and bias is None:
        return _Plan(copied, rows, launch)
    size = groups * D
    numbers = programs, size, *SUM_TILE, weight is not None and bias is not None
    sum_parts = Launch(sum_parts_kernel, x.device, (triton.cdiv(size, SUM_TILE[1]),), numbers, num_warps=8)
    return _Plan(copied, rows, launch, (programs, size), sum_parts)


def dense_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def groups_of(weight: Tensor | None, bias: Tensor | None, width: int) -> int:
    """How many rows follow each other before the weights repeat."""
    return next((p.numel() // width for p in (weight, bias) if p is not None), 1)

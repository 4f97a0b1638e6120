"""The elementwise linear recurrence in Triton: every program walks all steps of its own columns, one after another.

    h_t = a_t h_{t-1} + x_t        dx_t = dh_t + a_{t+1} dx_{t+1}        da_t = dx_t h_{t-1}

Steps are loaded ROWS at a time, which is what is in flight, and the state is kept in float32 (float64 for float64):
the sums are those of the plain loop, for any a. Backward needs h_{t-1}. Where h is as wide as the state it is read;
where it is narrower, a pass over x and a leaves the state before every ROWS steps, from which they are computed again
on chip.

Bytes at w a number: forward 3 w B T D; backward 5 w, and 2 w more where h is narrow.
"""

# ruff: noqa: RUF005 - Triton unpacks nothing inside a tuple

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_compile.kernels.launch import Launch, compiled_together, layout, remember

__all__ = ["LONGEST", "backward", "forward"]

# One warp a program: its columns in one load of 64 bytes at least, its registers full of steps.
COLUMNS, ROWS = 32, 16
# Steps that follow each other take time however few columns there are; beyond, blocks of steps side by side are faster.
LONGEST = 1 << 16


@triton.jit
def load_step(p_x, t, T, stride, o_d, m_d, other: tl.constexpr):
    """Row t [BD] of an array whose rows lie `stride` apart; `other` where there is none."""
    return tl.load(p_x + tl.cast(t, tl.int64) * stride + o_d, mask=m_d & (t >= 0) & (t < T), other=other)


@triton.jit
def store_step(p_x, t, T, D, b_x, o_d, m_d):
    p_t = p_x + tl.cast(t, tl.int64) * D + o_d
    tl.store(p_t, b_x.to(p_x.dtype.element_ty), mask=m_d & (t < T))


@triton.jit
def columns_program(D, BD: tl.constexpr):
    """A program's row of x, its columns, and which of these exist."""
    n_d = tl.cdiv(D, BD)
    o_d = (tl.program_id(0) % n_d) * BD + tl.arange(0, BD)
    return (tl.program_id(0) // n_d).to(tl.int64), o_d, o_d < D


@triton.jit(do_not_specialize=["T"])
def linear_scan_forward_kernel(
    p_x, p_a, p_h0, p_h, p_final, p_kept, T, D, sb_x, st_x, sb_a, st_a,
    BD: tl.constexpr, ROWS: tl.constexpr, HAS_STATE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """h and the final state, or with KEEP, to p_kept [B, chunks, D], the state before every ROWS steps alone."""
    i_b, o_d, m_d = columns_program(D, BD)
    wide: tl.constexpr = p_kept.dtype.element_ty if KEEP else p_final.dtype.element_ty
    n_c = tl.cdiv(T, ROWS)
    p_x += i_b * sb_x
    p_a += i_b * sb_a
    b_h = tl.zeros((BD,), wide)
    if HAS_STATE:
        b_h += tl.load(p_h0 + i_b * D + o_d, mask=m_d, other=0.0).to(wide)
    for i in range(n_c):
        t = i * ROWS
        if KEEP:
            tl.store(p_kept + (i_b * n_c + i) * D + o_d, b_h, mask=m_d)
        b_x = ()
        b_a = ()
        for r in tl.static_range(ROWS):
            b_x = b_x + (load_step(p_x, t + r, T, st_x, o_d, m_d, 0.0),)
            b_a = b_a + (load_step(p_a, t + r, T, st_a, o_d, m_d, 1.0),)
        for r in tl.static_range(ROWS):
            b_h = b_a[r].to(wide) * b_h + b_x[r].to(wide)
            if not KEEP:
                store_step(p_h + i_b * T * D, t + r, T, D, b_h, o_d, m_d)
    if not KEEP:
        tl.store(p_final + i_b * D + o_d, b_h, mask=m_d)


@triton.jit(do_not_specialize=["T"])
def linear_scan_backward_kernel(
    p_source, p_a, p_h0, p_kept, p_dh, p_dht, p_dx, p_da, p_dh0, T, D, sb_s, st_s, sb_a, st_a, sb_dh, st_dh,
    BD: tl.constexpr, ROWS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_DHT: tl.constexpr, NEED_DA: tl.constexpr,
    AGAIN: tl.constexpr,
):  # fmt: skip
    """p_source is h, or x where h is computed AGAIN from p_kept."""
    i_b, o_d, m_d = columns_program(D, BD)
    wide: tl.constexpr = p_dh0.dtype.element_ty
    n_c = tl.cdiv(T, ROWS)
    p_source += i_b * sb_s
    p_a += i_b * sb_a
    p_dh += i_b * sb_dh
    b_g = tl.zeros((BD,), wide)  # what later steps ask of the state after step t
    if HAS_DHT:
        b_g += tl.load(p_dht + i_b * D + o_d, mask=m_d, other=0.0).to(wide)
    for i in range(n_c):
        t = (n_c - 1 - i) * ROWS
        b_a = ()
        b_dh = ()
        b_s = ()
        for r in tl.static_range(ROWS):
            b_a = b_a + (load_step(p_a, t + r, T, st_a, o_d, m_d, 1.0),)
            b_dh = b_dh + (load_step(p_dh, t + r, T, st_dh, o_d, m_d, 0.0),)
            if NEED_DA:
                row = t + r if AGAIN else t + r - 1
                b_s = b_s + (load_step(p_source, row, T, st_s, o_d, m_d, 0.0),)
        b_h = ()  # the state before each step
        if NEED_DA:
            if AGAIN:
                b_last = tl.load(p_kept + (i_b * n_c + n_c - 1 - i) * D + o_d, mask=m_d, other=0.0)
                for r in tl.static_range(ROWS):
                    b_h = b_h + (b_last,)
                    b_last = b_a[r].to(wide) * b_last + b_s[r].to(wide)
            else:
                for r in tl.static_range(ROWS):
                    b_before = b_s[r].to(wide)
                    if HAS_STATE and r == 0:
                        b_before += tl.load(p_h0 + i_b * D + o_d, mask=m_d & (t == 0), other=0.0).to(wide)
                    b_h = b_h + (b_before,)
        for k in tl.static_range(ROWS):
            b_g += b_dh[ROWS - 1 - k].to(wide)
            store_step(p_dx + i_b * T * D, t + ROWS - 1 - k, T, D, b_g, o_d, m_d)
            if NEED_DA:
                store_step(p_da + i_b * T * D, t + ROWS - 1 - k, T, D, b_g * b_h[ROWS - 1 - k], o_d, m_d)
            b_g *= b_a[ROWS - 1 - k].to(wide)
    tl.store(p_dh0 + i_b * D + o_d, b_g, mask=m_d)


# By kernel, what it writes, and layouts.
_launches: dict[tuple[Any, ...], Launch] = {}


def _dense_columns(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _grid(x: Tensor) -> tuple[int]:
    return (x.shape[0] * triton.cdiv(x.shape[2], COLUMNS),)


def _launch_forward(
    x: Tensor, a: Tensor, h0: Tensor | None, h: Tensor | None, final: Tensor | None, kept: Tensor | None
) -> None:
    operands = x, a, h0
    key = ("forward", kept is None, *map(layout, operands))
    launch = _launches.get(key)
    if launch is None:
        _, T, D = x.shape
        numbers = T, D, *x.stride()[:2], *a.stride()[:2], COLUMNS, ROWS, h0 is not None, kept is not None
        launch = Launch(linear_scan_forward_kernel, x.device, _grid(x), numbers, num_warps=1)
        remember(_launches, key, launch)
    launch(*operands, h, final, kept)


def forward(x: Tensor, a: Tensor, initial_state: Tensor | None, state_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """h [B, T, D] in x's dtype and the final state [B, D]."""
    x, a = _dense_columns(x), _dense_columns(a)
    h0 = None if initial_state is None else initial_state.contiguous()
    h = torch.empty(*x.shape, dtype=x.dtype, device=x.device)
    final = torch.empty(x.shape[0], x.shape[2], dtype=state_dtype, device=x.device)
    if final.numel():
        _launch_forward(x, a, h0, h, final, None)
    return h, final


@compiled_together
def backward(
    source: Tensor,
    a: Tensor,
    initial_state: Tensor | None,
    dh: Tensor,
    dht: Tensor | None,
    need_da: bool,
    state_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(dx, da or None, dh0). `source` is h; where h is narrower than the state it is x, and h is computed again."""
    source, a, dh = _dense_columns(source), _dense_columns(a), _dense_columns(dh)
    h0 = None if initial_state is None else initial_state.contiguous()
    dht = None if dht is None else dht.contiguous()
    B, T, D = source.shape
    dx = torch.empty(*source.shape, dtype=source.dtype, device=source.device)
    da = torch.empty(*a.shape, dtype=a.dtype, device=a.device) if need_da else None
    dh0 = torch.empty(B, D, dtype=state_dtype, device=source.device)
    if not dh0.numel():
        return dx, da, dh0
    again, kept = need_da and source.dtype != state_dtype, None
    if again:
        kept = torch.empty(B, triton.cdiv(T, ROWS), D, dtype=state_dtype, device=source.device)
        _launch_forward(source, a, h0, None, None, kept)
    operands = source, a, h0
    key = ("backward", again, need_da, *map(layout, (*operands, dh, dht)))
    launch = _launches.get(key)
    if launch is None:
        strides = *source.stride()[:2], *a.stride()[:2], *dh.stride()[:2]
        flags = h0 is not None, dht is not None, need_da, again
        launch = Launch(
            linear_scan_backward_kernel, source.device, _grid(source), (T, D, *strides, COLUMNS, ROWS, *flags),
            num_warps=1,
        )  # fmt: skip
        remember(_launches, key, launch)
    launch(*operands, kept, dh, dht, dx, da, dh0)
    return dx, da, dh0

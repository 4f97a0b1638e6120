"""Launches the Triton kernels of the short convolution: configurations, allocation, grids.

One table instead of autotuning. The steps that a program walks follow from the size of the problem and of the GPU.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from fla_compile.kernels import short_conv_kernels as kernels
from fla_compile.kernels.launch import Launch, layout, remember

__all__ = ["LARGEST_WIDTH", "TABLE", "Config", "backward", "config_for", "forward", "step"]

LARGEST_WIDTH = 8
# Partial sums that a program adds up at a time, and columns.
SUM_TILE = 64, 32


@dataclass(frozen=True)
class Config:
    """`block_d` columns a program, `rows` steps loaded at once."""

    block_d: int
    rows: int
    num_warps: int


# By kernel, bytes of an element and the largest W of a row; the same for sm_80, 90 and 100: nothing but registers
# counts here. No row spills; the tests prove it.
TABLE: dict[tuple[str, int, int], Config] = {
    ("forward", 2, 8): Config(256, 8, 2),
    ("forward", 4, 8): Config(256, 8, 2),
    ("backward", 2, 4): Config(256, 4, 2),
    ("backward", 2, 8): Config(256, 4, 2),
    ("backward", 4, 4): Config(256, 4, 2),
    ("backward", 4, 8): Config(256, 2, 2),
}

# As many programs a multiprocessor as keep a GPU busy to the end, each of at least SHORTEST and at most LONGEST steps.
PROGRAMS = {"forward": 16, "backward": 8}
SHORTEST, LONGEST = 32, 256


def config_for(kernel: str, nbytes: int, W: int) -> Config:
    return next(c for (name, size, width), c in TABLE.items() if name == kernel and size == nbytes and width >= W)


@dataclass(frozen=True)
class _Plan:
    config: Config
    block_d: int
    steps: int  # of a segment
    segments: int
    blocks: int

    @property
    def grid(self) -> tuple[int]:
        return (self.segments * self.blocks,)


def _plan(kernel: str, x: Tensor, W: int, config: Config | None) -> _Plan:
    return _plan_for(kernel, x.shape, x.element_size(), x.device, W, config)


@lru_cache(maxsize=1024)
def _plan_for(
    kernel: str, shape: torch.Size, nbytes: int, device: torch.device, W: int, config: Config | None
) -> _Plan:
    B, T, D = shape
    config = config or config_for(kernel, nbytes, W)
    block_d = min(config.block_d, triton.next_power_of_2(D))
    blocks = triton.cdiv(D, block_d)
    count = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    even = B * T * blocks // (PROGRAMS[kernel] * count)
    steps = min(LONGEST, max(SHORTEST, triton.next_power_of_2(max(1, even))))
    return _Plan(config, block_d, steps, B * triton.cdiv(T, steps), blocks)


# By kernel, options and layouts.
_launches: dict[tuple[Any, ...], Launch] = {}


def _dense_columns(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _places(cu_seqlens: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
    """For every step its place in its sequence, and which that is, [T] int32; the boundaries on the device."""
    if cu_seqlens is None:
        return None, None, None
    ends = cu_seqlens.to(x.device, torch.int32)
    t = torch.arange(x.shape[1], device=x.device, dtype=torch.int32)
    sequence = torch.searchsorted(ends[1:-1].contiguous(), t, right=True, out_int32=True)
    return t - ends[sequence], sequence, ends


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
    cu_seqlens: Tensor | None,
    config: Config | None = None,
) -> Tensor:
    """y [B, T, D]."""
    x, weight = _dense_columns(x), weight.contiguous()
    residual = None if residual is None else _dense_columns(residual)
    position, sequence, _ = _places(cu_seqlens, x)
    y = torch.empty(*x.shape, dtype=x.dtype, device=x.device)
    operands = x, weight, bias, residual, initial_state
    key = ("forward", silu, cu_seqlens is None, config, *map(layout, operands))
    launch = _launches.get(key)
    if launch is None:
        T, D, W = x.shape[1], x.shape[2], weight.shape[1]
        plan = _plan("forward", x, W, config)
        numbers = (
            T, plan.steps, D, x.stride(0), x.stride(1), *((0, 0) if residual is None else residual.stride()[:2]),
            W, plan.block_d, plan.config.rows, silu, bias is not None, residual is not None,
            initial_state is not None, cu_seqlens is not None,
        )  # fmt: skip
        launch = Launch(
            kernels.short_conv_forward_kernel, x.device, plan.grid, numbers, num_warps=plan.config.num_warps
        )
        remember(_launches, key, launch)
    launch(*operands, position, sequence, y)
    return y


def backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
    cu_seqlens: Tensor | None,
    dy: Tensor,
    need_state: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """dx [B, T, D], dweight [D, W] and dbias [D] as their operands, dinitial_state [N, W - 1, D] in float32 or None."""
    x, dy, weight = _dense_columns(x), _dense_columns(dy), weight.contiguous()
    position, sequence, ends = _places(cu_seqlens, x)
    D, W = x.shape[2], weight.shape[1]
    plan = _plan("backward", x, W, config)
    operands = x, weight, bias, initial_state
    layouts = (silu, cu_seqlens is None, config, *map(layout, operands), layout(dy))
    key = ("backward", *layouts)
    launch = _launches.get(key)
    if launch is None:
        numbers = (
            x.shape[1], plan.steps, D, x.stride(0), x.stride(1), dy.stride(0), dy.stride(1),
            W, plan.block_d, plan.config.rows, silu, bias is not None, initial_state is not None,
            cu_seqlens is not None,
        )  # fmt: skip
        launch = Launch(
            kernels.short_conv_backward_kernel, x.device, plan.grid, numbers, num_warps=plan.config.num_warps
        )
        remember(_launches, key, launch)
    dx = torch.empty(*x.shape, dtype=x.dtype, device=x.device)
    parts = torch.empty(plan.segments, W + 1, D, dtype=torch.float32, device=x.device)
    launch(*operands, position, sequence, dy, dx, parts)
    dh = None
    if initial_state is not None and need_state:
        dh = torch.empty(*initial_state.shape, dtype=torch.float32, device=x.device)
        key = ("state", *layouts, layout(ends))
        launch = _launches.get(key)
        if launch is None:
            numbers = (
                x.shape[1], D, x.stride(0), x.stride(1), dy.stride(0), dy.stride(1),
                W, plan.block_d, silu, bias is not None, cu_seqlens is not None,
            )  # fmt: skip
            grid = (initial_state.shape[0] * plan.blocks,)
            launch = Launch(
                kernels.short_conv_state_grad_kernel, x.device, grid, numbers, num_warps=plan.config.num_warps
            )
            remember(_launches, key, launch)
        launch(*operands, ends, dy, dh)
    dweight = torch.empty(D, W, dtype=weight.dtype, device=x.device)
    dbias = None if bias is None else torch.empty(D, dtype=bias.dtype, device=x.device)
    key = ("sum", plan.segments, config, x.device, weight.dtype, D, W, None if bias is None else bias.dtype)
    launch = _launches.get(key)
    if launch is None:
        numbers = plan.segments, D, W, *SUM_TILE, bias is not None
        grid = triton.cdiv(D, SUM_TILE[1]), W + (bias is not None)
        launch = Launch(kernels.short_conv_sum_kernel, x.device, grid, numbers, num_warps=plan.config.num_warps)
        remember(_launches, key, launch)
    launch(parts, dweight, dbias)
    return dx, dweight, dbias, dh


def step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, silu: bool) -> Tensor:
    """y [B, D] of x [B, D]; the state [B, W - 1, D], dense, moves on by one row."""
    x, weight = _dense_columns(x), weight.contiguous()
    residual = None if residual is None else _dense_columns(residual)
    y = torch.empty(*x.shape, dtype=x.dtype, device=x.device)
    operands = x, weight, bias, residual, state
    key = ("step", silu, *map(layout, operands))
    launch = _launches.get(key)
    if launch is None:
        B, D = x.shape
        block_d = min(256, triton.next_power_of_2(D))
        numbers = (
            D, x.stride(0), 0 if residual is None else residual.stride(0), weight.shape[1], block_d, silu,
            bias is not None, residual is not None,
        )  # fmt: skip
        launch = Launch(kernels.short_conv_step_kernel, x.device, (B * triton.cdiv(D, block_d),), numbers, num_warps=2)
        remember(_launches, key, launch)
    launch(*operands, y)
    return y

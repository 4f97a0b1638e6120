"""Launches of the decayed outer product under a decay over keys and one over values: passes of `decay_scan_both`.

    S_t = diag(exp(g_t)) S_{t-1} diag(exp(gv_t)) + k_t v_t^T        o_t = scale * S_t^T q_t

Shapes: q, k, g [B, T, H, K]; v, o, gv [B, T, H, V]; S [B, H, K, V].

The output is one pass. The gradients are two pairs of passes, forward and in reverse: o (not written) and dv leave dgv,
dq and dk leave dg. The first of a pair keeps the state before each chunk, rounded as the operands are, for the second;
both pairs use the same memory. Every pass has a second launch for those of its programs whose decays are too strong.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from fla_compile.kernels import decay_cpu
from fla_compile.kernels.decay_configs import LARGEST_BOTH, Config, both_config
from fla_compile.kernels.decay_scan import KEYS, PLAIN, QUERIES
from fla_compile.kernels.decay_scan_both import chunk_scan_both_kernel, step_scan_both_kernel
from fla_compile.kernels.decay_triton_common import check_shapes, device_arch
from fla_compile.kernels.launch import Launch, compiled_together, layout, remember

__all__ = ["STEP_OPTIONS", "chunk_backward", "chunk_forward", "largest_range"]

# So few steps are done one by one at once: nothing is gained by a product, and roundings are saved.
FEW_STEPS = 16
STEP_OPTIONS = {"num_warps": 8, "num_stages": 1}


def largest_range(dtype: torch.dtype) -> float:
    """The limit of sum_i |g_i| of a chunk, in base 2 and on either axis.

    Factors of one axis reach 2^(limit / 2), where float16 ends at 2^16, and products of both 2^limit in float32.
    """
    return 12.0 if dtype == torch.float16 else 100.0


_launches: dict[tuple[Any, ...], Launch] = {}


@compiled_together
def _forward(
    config: Config, limit: float, operands: tuple[Tensor, ...], h0: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    q, _, v, _, _ = operands
    B, _, H, K = q.shape
    o, ht = torch.empty_like(v), torch.empty(B, H, K, v.shape[-1], dtype=torch.float32, device=q.device)
    if B * H > 0:
        tensors = (*operands, None, h0, o, ht, _ranges(config, limit, operands), None, None)
        _launch(config, limit, tensors, (1.0, scale, 1.0), PLAIN.value)
    return o, ht


@compiled_together
def _backward(
    config: Config, limit: float, operands: tuple[Tensor, ...], h0: Tensor | None, scale: float, dht: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    q, k, v, g, gv, do = operands
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    dg, dgv = (torch.empty_like(x, dtype=torch.float32) for x in (g, gv))
    dh0 = None if h0 is None else torch.empty_like(h0, dtype=torch.float32)
    B, T, H, K = q.shape
    h = torch.empty(B, H, triton.cdiv(T, config.chunk), K, v.shape[-1], dtype=q.dtype, device=q.device)
    pairs = (
        ((q, k, v, g, gv, do), None, (k, q, do, g, gv, v), dv, dh0, dgv),
        ((do, v, k, gv, g, q), dq, (v, do, q, gv, g, k), dk, None, dg),
    )
    for i, (ahead, y, back, dy, final, grad) in enumerate(pairs):
        ranges = _ranges(config, limit, ahead)
        first, second = (*ahead, h0, y, None, ranges, h, grad), (*back, dht, dy, final, ranges, h, grad)
        _launch(config, limit, first, (1.0, scale, 1.0), QUERIES.value, turned=i == 1)
        _launch(config, limit, second, (1.0 / scale, scale, scale), KEYS.value, turned=i == 1)
    return dq, dk, dv, dg, dgv, dh0


def _launch(
    config: Config, limit: float, tensors: tuple[Tensor | None, ...], scales: tuple[float, float, float], part: int, *,
    turned: bool = False,
) -> None:  # fmt: skip
    """One pass over time, `turned` over a state [V, K]; `tensors` as the kernels take them."""
    layouts = tuple(map(layout, tensors))
    for kernel in (step_scan_both_kernel,) if limit < 0 else (chunk_scan_both_kernel, step_scan_both_kernel):
        key = (kernel.fn, config, part, turned, layouts)
        launch = _launches.get(key)
        if launch is None:
            x, _, w, *_ = tensors
            assert x is not None and w is not None
            _, T, H, X = x.shape
            numbers = (
                T, H, X, w.shape[-1], config.chunk, config.block_k, config.block_v, part == KEYS.value, part, turned,
                T % config.chunk == 0,
            )  # fmt: skip
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            if kernel is step_scan_both_kernel:
                options = STEP_OPTIONS
            launch = Launch(kernel, x.device, (_programs(config, x, w),), numbers, **options)
            remember(_launches, key, launch)
        launch(*tensors, *map(float, scales), float(limit))


def _programs(config: Config, x: Tensor, w: Tensor) -> int:
    return x.shape[0] * x.shape[2] * triton.cdiv(w.shape[-1], config.block_v)


def _ranges(config: Config, limit: float, operands: tuple[Tensor, ...]) -> Tensor | None:
    """Where a pass leaves the largest range each program met."""
    if limit < 0:
        return None
    x, _, w, *_ = operands
    return torch.empty(_programs(config, x, w), dtype=torch.float32, device=x.device)


def chunk_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, gv: Tensor, initial_state: Tensor | None, scale: float, *,
    config: Config | None = None, limit: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs [B, T, H, V] in q's dtype and the final state [B, H, K, V] in float32.

    `config` and `limit` stand in place of the table's tile and of `largest_range`; below zero all is done step by step.
    Raises ValueError for dtypes, sizes or shapes that do not fit.
    """
    plan = _plan(q, k, v, g, gv, config, limit)
    operands = tuple(x.contiguous() for x in (q, k, v, g, gv))
    with torch.cuda.device_of(q):
        return _forward(*plan, operands, _contiguous(initial_state), scale)


def chunk_backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, gv: Tensor, initial_state: Tensor | None, scale: float, do: Tensor,
    dht: Tensor | None, *, config: Config | None = None, limit: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients (dq, dk, dv, dg, dgv, dh0); the last three in float32, dh0 None without an initial state.

    `config` and `limit` as for `chunk_forward`. Raises ValueError for dtypes, sizes or shapes that do not fit.
    """
    plan = _plan(q, k, v, g, gv, config, limit)
    if scale == 0 or q.shape[0] * q.shape[2] == 0:  # the reverse passes divide by the scale
        return decay_cpu.chunk_gradients(q, k, v, g, gv, initial_state, scale, do, dht)
    operands = tuple(x.contiguous() for x in (q, k, v, g, gv, do.to(q.dtype)))
    with torch.cuda.device_of(q):
        return _backward(*plan, operands, _contiguous(initial_state), scale, _contiguous(dht))


def _plan(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, gv: Tensor, config: Config | None, limit: float | None
) -> tuple[Config, float]:
    kind, size = check_shapes(q, k, v, g), max(q.shape[-1], v.shape[-1])
    if kind != "vector" or gv.shape != v.shape:
        raise ValueError(f"q, v, g, gv have shapes {', '.join(str(tuple(x.shape)) for x in (q, v, g, gv))}")
    if size > LARGEST_BOTH:
        raise ValueError(f"K and V must be at most {LARGEST_BOTH}, got {q.shape[-1]} and {v.shape[-1]}")
    if limit is None:
        limit = largest_range(q.dtype) if q.shape[1] > FEW_STEPS else -1.0
    return config or both_config(device_arch(q.device), size), limit


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()

"""Launches of the decayed outer product under a decay over keys and one over values: passes of `decay_scan_both`.

    S_t = diag(exp(g_t)) S_{t-1} diag(exp(gv_t)) + k_t v_t^T        o_t = scale * S_t^T q_t

Shapes: q, k, g [B, T, H, K]; v, o, gv [B, T, H, V]; S [B, H, K, V].

The output is one pass. The gradients are two pairs of passes, forward and in reverse: o (not written) and dv leave dgv,
dq and dk leave dg. The first of a pair keeps the state before each chunk, rounded as the operands are, for the second;
both pairs use the same memory. Every pass has a second launch for those of its programs whose decays are too strong.
Where there are fewer programs than multiprocessors, time is cut into segments as in `decay_fused`.

Packed sequences are such segments, read from a table (`decay_segments`), where they lie: B = 1, states [N, H, K, V],
cu_seqlens [N + 1].
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fla_compile.kernels import decay_cpu
from fla_compile.kernels.decay_checks import check_shapes
from fla_compile.kernels.decay_configs import LARGEST_BOTH, Config, both_config
from fla_compile.kernels.decay_plan import FEW_STEPS
from fla_compile.kernels.decay_scan import KEYS, PLAIN, QUERIES
from fla_compile.kernels.decay_scan_both import chunk_scan_both_kernel, step_scan_both_kernel
from fla_compile.kernels.decay_segments import (
    Packing,
    Part,
    chain_joints,
    chain_segments,
    fits_table,
    pack,
    segment_count,
)
from fla_compile.kernels.decay_triton_common import KINDS, device_arch
from fla_compile.kernels.launch import Launch, compiled_together, contiguous, layout, multiprocessors, remember
from fla_compile.kernels.packed import sequence_bounds

__all__ = ["STEP_OPTIONS", "chunk_backward", "chunk_forward", "largest_range", "packed_backward", "packed_forward"]

STEP_OPTIONS = {"num_warps": 8, "num_stages": 1}


def largest_range(dtype: torch.dtype) -> float:
    """The limit of sum_i |g_i| of a chunk, in base 2 and on either axis.

    Factors of one axis reach 2^(limit / 2), where float16 ends at 2^16, and products of both 2^limit in float32.
    """
    return 12.0 if dtype == torch.float16 else 100.0


_launches: dict[tuple[Any, ...], Launch] = {}


@dataclass(frozen=True)
class Plan:
    """What the launches of one call share; segments but the last are whole chunks, `length` steps."""

    config: Config
    limit: float
    segments: int
    length: int


@compiled_together
def _forward(
    plan: Plan, operands: tuple[Tensor, ...], h0: Tensor | None, scale: float, packing: Packing | None = None
) -> tuple[Tensor, Tensor]:
    q, k, v, g, gv = operands
    B, _, H, K = q.shape
    states = B if packing is None else packing.sequences
    o, ht = torch.empty_like(v), torch.empty(states, H, K, v.shape[-1], dtype=torch.float32, device=q.device)
    if B * H > 0:
        final: Tensor | None = ht
        packed = None
        if packing is not None:
            packed = _packed_chain(plan, packing, (k, v, g, gv), h0, 1.0, reverse=False)
        elif plan.segments > 1:
            h0, final = _chain(plan, (k, v, g, gv), h0, ht, (1.0, 1.0), reverse=False), None
        tensors = (*operands, None, h0, o, final, None, None, _ranges(plan, q, v, packed), None, None)
        _launch(plan, tensors, (1.0, scale, 1.0), PLAIN.value, reverse=False, packed=packed)
    return o, ht


@compiled_together
def _backward(
    plan: Plan, operands: tuple[Tensor, ...], h0: Tensor | None, scale: float, dht: Tensor | None,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    q, k, v, g, gv, do = operands
    B, _, H, K = q.shape
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    dg, dgv = (torch.empty_like(x, dtype=torch.float32) for x in (g, gv))
    dh0 = None if h0 is None else torch.empty_like(h0, dtype=torch.float32)
    final, down = dh0, 1.0 / scale
    ahead_part = back_part = None
    if packing is not None:
        ahead_part = _packed_chain(plan, packing, (k, v, g, gv), h0, 1.0, reverse=False)
        back_part = _packed_chain(plan, packing, (q, do, g, gv), dht, down, reverse=True)
    elif plan.segments > 1:
        h0 = _chain(plan, (k, v, g, gv), h0, None, (1.0, 1.0), reverse=False)
        dht = _chain(plan, (q, do, g, gv), dht, dh0, (down, scale), reverse=True)
        final, down = None, 1.0
    chunks = B * plan.segments * triton.cdiv(plan.length, plan.config.chunk) if packing is None else packing.chunks
    h = torch.empty(chunks, H, K, v.shape[-1], dtype=q.dtype, device=q.device)
    pairs = (
        ((q, k, v, g, gv, do), None, (k, q, do, g, gv, v), dv, final, dgv),
        ((do, v, k, gv, g, q), dq, (v, do, q, gv, g, k), dk, None, dg),
    )
    for i, (ahead, y, back, dy, st, grad) in enumerate(pairs):
        rest = (None, None, _ranges(plan, ahead[0], ahead[2], ahead_part), h, grad)
        tensors, scales = (*ahead, h0, y, None, *rest), (1.0, scale, 1.0)
        _launch(plan, tensors, scales, QUERIES.value, reverse=False, turned=i == 1, packed=ahead_part)
        tensors, scales = (*back, dht, dy, st, *rest), (down, scale, scale)
        _launch(plan, tensors, scales, KEYS.value, reverse=True, turned=i == 1, packed=back_part)
    return dq, dk, dv, dg, dgv, dh0


def _chain(
    plan: Plan, operands: tuple[Tensor, ...], s0: Tensor | None, st: Tensor | None, scales: tuple[float, float], *,
    reverse: bool,
) -> Tensor:  # fmt: skip
    """The states before each segment [B, segments, H, K, V] from s0, read times scales[0]; the last, times scales[1],
    to st."""
    u, ta, tb = _sums(plan, operands, (operands[0].shape[0], plan.segments), reverse=reverse)
    chain_segments(u, ta, s0, st, KINDS["vector"], reverse=reverse, s_in=scales[0], s_st=scales[1], gv=tb)
    return u


def _packed_chain(
    plan: Plan, packing: Packing, operands: tuple[Tensor, ...], s0: Tensor | None, s_in: float, *, reverse: bool
) -> Part:
    """What a pass over the sequences is told: their table, and the states where segments meet if any do."""
    if not packing.joints:
        return packing.part(None)
    u, ta, tb = _sums(plan, operands, (packing.joints,), reverse=reverse, packed=packing.sums(reverse))
    chain_joints(u, ta, s0, packing.chain(), KINDS["vector"], reverse=reverse, s_in=s_in, gv=tb)
    return packing.part(u)


def _sums(
    plan: Plan, operands: tuple[Tensor, ...], count: tuple[int, ...], *, reverse: bool, packed: Part | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What each of the segments adds to the state [*count, H, K, V], and its log decays [.., K] and [.., V]."""
    k, v, _, _ = operands
    (_, _, H, K), V = k.shape, v.shape[-1]
    u, ta, tb = (torch.empty(*count, H, *sizes, dtype=torch.float32, device=k.device) for sizes in ((K, V), (K,), (V,)))
    tensors = (None, *operands, None, None, None, u, ta, tb, _ranges(plan, k, v, packed), None, None)
    _launch(plan, tensors, (1.0, 1.0, 1.0), PLAIN.value, reverse=reverse, packed=packed)
    return u, ta, tb


def _launch(
    plan: Plan, tensors: tuple[Tensor | None, ...], scales: tuple[float, float, float], part: int, *, reverse: bool,
    turned: bool = False, packed: Part | None = None,
) -> None:  # fmt: skip
    """One pass over time, `turned` over a state [V, K]; `tensors` as the kernels take them, but for `packed`."""
    tensors += (None, None) if packed is None else (packed.table, packed.joints)
    config, layouts = plan.config, tuple(map(layout, tensors))
    for kernel in (step_scan_both_kernel,) if plan.limit < 0 else (chunk_scan_both_kernel, step_scan_both_kernel):
        key = (kernel.fn, plan, part, reverse, turned, layouts)
        launch = _launches.get(key)
        if launch is None:
            _, z, w, *_ = tensors
            assert z is not None and w is not None
            _, T, H, X = z.shape
            numbers = (
                T, plan.length, plan.segments, H, X, w.shape[-1], config.chunk, config.block_k, config.block_v, reverse,
                part, turned, packed is None and T % config.chunk == 0,
            )  # fmt: skip
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            if kernel is step_scan_both_kernel:
                options = STEP_OPTIONS
            launch = Launch(kernel, z.device, (_programs(plan, z, w, packed),), numbers, **options)
            remember(_launches, key, launch)
        launch(*tensors, *map(float, scales), float(plan.limit))


def _programs(plan: Plan, z: Tensor, w: Tensor, packed: Part | None) -> int:
    segments = z.shape[0] * plan.segments if packed is None else packed.table.shape[0]
    return segments * z.shape[2] * triton.cdiv(w.shape[-1], plan.config.block_v)


def _ranges(plan: Plan, z: Tensor, w: Tensor, packed: Part | None) -> Tensor | None:
    """Where a pass over z and w leaves the largest range each program met."""
    if plan.limit < 0:
        return None
    return torch.empty(_programs(plan, z, w, packed), dtype=torch.float32, device=z.device)


def chunk_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, gv: Tensor, initial_state: Tensor | None, scale: float, *,
    config: Config | None = None, limit: float | None = None, segments: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs [B, T, H, V] in q's dtype and the final state [B, H, K, V] in float32.

    `config`, `limit` and `segments` stand in place of the table's tile, of `largest_range` (below zero all is done step
    by step) and of as many segments as fill the device.
    Raises ValueError for dtypes, sizes or shapes that do not fit.
    """
    plan = _plan(q, k, v, g, gv, config, limit, segments)
    operands = tuple(x.contiguous() for x in (q, k, v, g, gv))
    with torch.cuda.device_of(q):
        return _forward(plan, operands, contiguous(initial_state), scale)


def chunk_backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, gv: Tensor, initial_state: Tensor | None, scale: float, do: Tensor,
    dht: Tensor | None, *, config: Config | None = None, limit: float | None = None, segments: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients (dq, dk, dv, dg, dgv, dh0); the last three in float32 (as their inputs where
    matrix products stand in), dh0 None without an initial state.

    The choices are those of `chunk_forward`. Raises ValueError for dtypes, sizes or shapes that do not fit.
    """
    plan = _plan(q, k, v, g, gv, config, limit, segments)
    if scale == 0 or q.shape[0] * q.shape[2] == 0:  # the reverse passes divide by the scale
        return decay_cpu.chunk_gradients(q, k, v, g, gv, initial_state, scale, do, dht)
    operands = tuple(x.contiguous() for x in (q, k, v, g, gv, do.to(q.dtype)))
    with torch.cuda.device_of(q):
        return _backward(plan, operands, contiguous(initial_state), scale, contiguous(dht))


def packed_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, gv: Tensor, initial_state: Tensor | None, scale: float,
    cu_seqlens: Tensor, *, config: Config | None = None, limit: float | None = None, longest: int | None = None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Outputs [1, T, H, V] in q's dtype and the final states in float32; None where there is no table.

    `longest` asks for segments of so many steps at most, `config` and `limit` as in `chunk_forward`. Raises ValueError
    for dtypes, sizes or shapes that do not fit, and for sequences that are empty or do not end at T.
    """
    plan = _plan(q, k, v, g, gv, config, limit, 1)
    if not fits_table(q):
        return None
    with torch.cuda.device_of(q):
        packing = _pack(plan, q, v, cu_seqlens, longest)
        operands = tuple(x.contiguous() for x in (q, k, v, g, gv))
        return _forward(plan, operands, contiguous(initial_state), scale, packing)


def packed_backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, gv: Tensor, initial_state: Tensor | None, scale: float,
    cu_seqlens: Tensor, do: Tensor | None, dht: Tensor | None, *, config: Config | None = None,
    limit: float | None = None, longest: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None] | None:  # fmt: skip
    """Gradients (dq, dk, dv, dg, dgv, dh0), the last three in float32; None where there is no table, or the scale, by
    which the reverse passes divide, is zero. Arguments and errors as for `packed_forward`.
    """
    plan = _plan(q, k, v, g, gv, config, limit, 1)
    if not fits_table(q) or scale == 0:
        return None
    with torch.cuda.device_of(q):
        packing = _pack(plan, q, v, cu_seqlens, longest)
        do = torch.zeros_like(v) if do is None else do.to(q.dtype)
        operands = tuple(x.contiguous() for x in (q, k, v, g, gv, do))
        return _backward(plan, operands, contiguous(initial_state), scale, contiguous(dht), packing)


def _pack(plan: Plan, q: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int | None) -> Packing:
    _, T, H, K = q.shape
    cut = _cutting(H, K, v.shape[-1], q.device, plan.config)
    return pack(sequence_bounds(cu_seqlens, T), q.device, state_chunk=plan.config.chunk, longest=longest, **cut)


def _plan(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, gv: Tensor, config: Config | None, limit: float | None,
    segments: int | None,
) -> Plan:  # fmt: skip
    kind, size = check_shapes(q, k, v, g), max(q.shape[-1], v.shape[-1])
    if kind != "vector" or gv.shape != v.shape:
        raise ValueError(f"q, v, g, gv have shapes {', '.join(str(tuple(x.shape)) for x in (q, v, g, gv))}")
    if size > LARGEST_BOTH:
        raise ValueError(f"K and V must be at most {LARGEST_BOTH}, got {q.shape[-1]} and {v.shape[-1]}")
    return _plan_sizes(*q.shape, v.shape[-1], q.dtype, q.device, config, limit, segments)


@functools.lru_cache(maxsize=1024)
def _plan_sizes(
    B: int, T: int, H: int, K: int, V: int, dtype: torch.dtype, device: torch.device, config: Config | None,
    limit: float | None, segments: int | None,
) -> Plan:  # fmt: skip
    config = config or both_config(device_arch(device), max(K, V))
    if limit is None:
        limit = largest_range(dtype) if T > FEW_STEPS else -1.0
    if segments is None:
        segments = segment_count(T, steps=T, **_cutting(max(1, B * H), K, V, device, config))
    length = triton.cdiv(triton.cdiv(T, config.chunk), segments) * config.chunk
    return Plan(config, limit, triton.cdiv(T, length), length)


def _cutting(heads: int, K: int, V: int, device: torch.device, config: Config) -> dict[str, int]:
    """What `segment_count` is told of a device whose multiprocessors have a program each."""
    programs = heads * triton.cdiv(min(K, V), config.block_v)
    return dict(programs=programs, chunk=config.chunk, room=multiprocessors(device), resident=1)

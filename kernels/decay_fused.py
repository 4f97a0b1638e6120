"""Launches of the passes in `decay_scan` and `decay_scan_gates`: output and gradients of a decayed outer product.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = scale * q_t^T S_t

Every pass keeps its state on chip and walks time once; one program holds a block of columns for a head. Where these are
too few to fill the device, time is cut into segments: a first pass sums up what each segment adds to the state, the
sums are chained to the state before each segment, and the segments then run side by side.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_compile.kernels.decay_configs import Config, configs_for
from fla_compile.kernels.decay_scan import chunk_scan_kernel
from fla_compile.kernels.decay_scan_gates import (
    KEYS,
    PLAIN,
    QUERIES,
    chunk_scan_columns_kernel,
    chunk_scan_rows_kernel,
    largest_range,
)
from fla_compile.kernels.decay_triton_common import (
    KINDS,
    device_arch,
    multiprocessors,
    precision,
    shared_limit,
)
from fla_compile.kernels.launch import Launch, compiled_together, layout, remember

__all__ = ["Scans", "plan_scans", "scan_backward", "scan_forward", "scan_query_grad"]

# Programs that run side by side on a multiprocessor before it is full.
RESIDENT = 2
# A segment shorter than this many chunks costs more in states than it gains.
SHORTEST = 4
# So few steps are done one by one at once: nothing is gained by a product, and roundings are saved.
FEW_STEPS = 16
# The second launch of a pass with gates by channel works on few programs, if any: what counts is that it is right.
EXACT_OPTIONS = {"num_warps": 8, "num_stages": 1}


@triton.jit(do_not_specialize=["H", "n_s"])
def chain_segments_kernel(
    p_u, p_gt, p_s0, p_st, s_in, s_st, H, n_s,
    K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, HAS_S0: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """p_u [B, segments, H, K, V] holds what each segment adds, and gets the state before it; one program for
    each (b, h) and block of the state. p_gt: the segments' log decays [B, segments, H], or, in base 2, [.., K]."""
    NB: tl.constexpr = tl.cdiv(K * V, BLOCK)
    i_p = tl.program_id(0)
    i_bh = i_p // NB
    i_h = i_bh % H
    i_b = i_bh // H
    o_s = (i_p % NB) * BLOCK + tl.arange(0, BLOCK)
    m_s = o_s < K * V
    b_s = tl.zeros((BLOCK,), tl.float32)
    if HAS_S0:
        b_s += tl.load(p_s0 + i_bh.to(tl.int64) * (K * V) + o_s, mask=m_s, other=0.0).to(tl.float32) * s_in
    for i_n in range(n_s):
        i_s = i_n
        if REVERSE:
            i_s = n_s - 1 - i_n
        i_u = ((i_b * n_s + i_s) * H + i_h).to(tl.int64)
        b_u = tl.load(p_u + i_u * (K * V) + o_s, mask=m_s, other=0.0)
        tl.store(p_u + i_u * (K * V) + o_s, b_s, mask=m_s)
        if DECAY == 3:
            b_s *= tl.exp2(tl.load(p_gt + i_u * K + o_s // V, mask=m_s, other=0.0))
        elif DECAY != 0:
            b_s *= tl.exp(tl.load(p_gt + i_u))
        b_s += b_u
    if FINAL:
        tl.store(p_st + i_bh.to(tl.int64) * (K * V) + o_s, b_s * s_st, mask=m_s)


_launches: dict[tuple[Any, ...], Launch] = {}


@dataclass(frozen=True)
class Scans:
    """What the passes of one call share: `wide` walks states with K rows (o, dv), `tall` with V rows (dq, dk).

    Where outputs alone are planned, `tall` is `wide`.
    """

    B: int
    T: int
    H: int
    K: int
    V: int
    kind: str
    segments: int
    wide: Config
    tall: Config
    precision: str
    limit: float

    @property
    def length(self) -> int:
        """Steps of a segment, the same for both shapes of pass: whole chunks of either, but for the last one's."""
        chunk = max(self.wide.chunk, self.tall.chunk)
        return triton.cdiv(triton.cdiv(self.T, chunk), self.segments) * chunk


def plan_scans(q: Tensor, v: Tensor, kind: str, *, limit: float | None = None, segments: int | None = None,
               wide: Config | None = None, tall: Config | None = None,
               forward: bool = False) -> Scans | None:  # fmt: skip
    """None where there is no configuration for these operands; `forward` plans outputs alone, which are wide passes."""
    return _plan(*q.shape, v.shape[-1], q.dtype, q.device, kind, precision(q), limit, segments, wide, tall, forward)


@functools.lru_cache(maxsize=1024)
def _plan(
    B: int, T: int, H: int, K: int, V: int, dtype: torch.dtype, device: torch.device, kind: str, products: str,
    limit: float | None, segments: int | None, wide: Config | None, tall: Config | None, forward: bool,
) -> Scans | None:  # fmt: skip
    arch, shared = device_arch(device), shared_limit(device)
    found = []
    for given, launch, size in ((wide, "wide", K), (tall, "tall", V))[: 1 if forward else 2]:
        rows = (given,) if given else configs_for(arch, launch, kind, dtype.itemsize, size, shared)
        if not rows:
            return None
        found.append(rows[0])
    wide, tall = found[0], found[-1]
    if segments is None:
        blocks = triton.cdiv(V, wide.block_v)
        programs = B * H * (blocks if forward else min(blocks, triton.cdiv(K, tall.block_v)))
        room = RESIDENT * multiprocessors(device)
        most = T // (SHORTEST * max(wide.chunk, tall.chunk))
        segments = max(1, min(most, room // programs)) if programs < room // RESIDENT else 1
    # the two directions cut time alike, whatever their chunks
    chunk = max(wide.chunk, tall.chunk)
    segments = triton.cdiv(T, triton.cdiv(triton.cdiv(T, chunk), segments) * chunk)
    if limit is None:
        limit = largest_range(dtype) if T > FEW_STEPS else -1.0
    return Scans(B, T, H, K, V, kind, segments, wide, tall, products, limit)


def _launch(
    plan: Scans, x: Tensor | None, z: Tensor, w: Tensor, g: Tensor | None, y: Tensor | None, *, tall: bool,
    reverse: bool, s0: Tensor | None, scales: tuple[float, float, float], st: Tensor | None = None,
    gt: Tensor | None = None, part: int = 0, e: Tensor | None = None, h: Tensor | None = None,
    dg: Tensor | None = None, ranges: Tensor | None = None,
) -> None:  # fmt: skip
    """One pass over time. Without y only the segments' own states, to st, and decays, to gt."""
    operands: tuple[Tensor | None, ...] = x, z, w, g, s0, y, st, gt
    numbers, exacts = tuple(map(float, scales)), (False,)  # an integer would be a number of the compilation
    if plan.kind == "vector":
        if ranges is None:
            ranges = _ranges(plan, _programs(plan, w, tall), z)
        operands = (x, z, w, g, e, s0, y, st, ranges, h, dg) if tall else (*operands, ranges)
        numbers, exacts = (*numbers, float(plan.limit)), (True,) if plan.limit < 0 else (False, True)
    layouts = tuple(map(layout, operands))
    for exact in exacts:
        key = (plan, tall, reverse, part, exact, layouts)
        launch = _launches.get(key)
        if launch is None:
            launch = _launch_pass(plan, z, w, tall, reverse, part, exact, s0 is not None, y is not None, st is not None)
            remember(_launches, key, launch)
        launch(*operands, *numbers)


def _launch_pass(
    plan: Scans, z: Tensor, w: Tensor, tall: bool, reverse: bool, part: int, exact: bool, has_s0: bool, output: bool,
    final: bool,
) -> Launch:  # fmt: skip
    config = plan.tall if tall else plan.wide
    # only the tiles of the table are known to compile to what they mean: smaller sizes are masked, not given others
    sizes = (
        plan.T, plan.length, plan.segments, plan.H, z.shape[-1], w.shape[-1], config.chunk, config.block_k,
        config.block_v,
    )  # fmt: skip
    common = tall, has_s0, plan.T % config.chunk == 0
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    kernel: Any = chunk_scan_kernel
    flags: tuple[Any, ...] = (KINDS[plan.kind], reverse, output, final, *common)
    if plan.kind == "vector":
        kernel = chunk_scan_columns_kernel if tall else chunk_scan_rows_kernel
        flags = (reverse, part if tall else output, final, *common, exact)
        options = EXACT_OPTIONS if exact else options
    return Launch(kernel, z.device, (_programs(plan, w, tall),), (*sizes, *flags, plan.precision), **options)


def _programs(plan: Scans, w: Tensor, tall: bool) -> int:
    return plan.B * plan.segments * plan.H * triton.cdiv(w.shape[-1], (plan.tall if tall else plan.wide).block_v)


def _ranges(plan: Scans, programs: int, like: Tensor) -> Tensor:
    """Where a pass leaves the largest range each program met; with a limit below zero, all are beyond it."""
    new = torch.zeros if plan.limit < 0 else torch.empty
    return new(programs, dtype=torch.float32, device=like.device)


def _chain(
    plan: Scans, z: Tensor, w: Tensor, g: Tensor | None, s0: Tensor | None, st: Tensor | None, *, reverse: bool,
    s_in: float, s_st: float,
) -> Tensor:  # fmt: skip
    """The states before each segment [B, segments, H, K, V]; the last one to st."""
    B, H, K, V = plan.B, plan.H, plan.K, plan.V
    u = torch.empty(B, plan.segments, H, K, V, dtype=torch.float32, device=z.device)
    per_key = (K,) if plan.kind == "vector" else ()
    gt = torch.empty(B, plan.segments, H, *per_key, dtype=torch.float32, device=z.device)
    _launch(plan, None, z, w, g, None, tall=False, reverse=reverse, s0=None, scales=(1.0, 1.0, 1.0), st=u, gt=gt)
    key = ("chain", plan, reverse, layout(s0), layout(st), u.device)
    launch = _launches.get(key)
    if launch is None:
        block = min(1024, triton.next_power_of_2(K * V))
        numbers = H, plan.segments, K, V, block, KINDS[plan.kind], reverse, s0 is not None, st is not None
        launch = Launch(chain_segments_kernel, u.device, (B * H * triton.cdiv(K * V, block),), numbers, num_warps=4)
        remember(_launches, key, launch)
    launch(u, gt, s0, st, float(s_in), float(s_st))
    return u


@compiled_together
def scan_forward(
    plan: Scans, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, h0: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, V] and the final state [B, H, K, V] in float32; all operands contiguous."""
    o = torch.empty_like(v)
    ht = torch.empty(plan.B, plan.H, plan.K, plan.V, dtype=torch.float32, device=q.device)
    final: Tensor | None = ht
    if plan.segments > 1:
        h0, final = _chain(plan, k, v, g, h0, ht, reverse=False, s_in=1.0, s_st=1.0), None
    _launch(plan, q, k, v, g, o, tall=False, reverse=False, s0=h0, scales=(1.0, scale, 1.0), st=final)
    return o, ht


def scan_query_grad(
    plan: Scans, k: Tensor, v: Tensor, g: Tensor, h0: Tensor | None, scale: float, do: Tensor
) -> tuple[Tensor, Tensor]:
    """dq alone, and the final state with its axes exchanged, [B, H, V, K] in float32; all operands contiguous."""
    dq = torch.empty_like(k)
    ht = torch.empty(plan.B, plan.H, plan.V, plan.K, dtype=torch.float32, device=k.device)
    final: Tensor | None = ht
    if plan.segments > 1:
        last = torch.empty(plan.B, plan.H, plan.K, plan.V, dtype=torch.float32, device=k.device)
        h0, final = _chain(plan, k, v, g, h0, last, reverse=False, s_in=1.0, s_st=1.0), None
        ht.copy_(last.mT)
    _launch(plan, do, v, k, g, dq, tall=True, reverse=False, s0=h0, scales=(1.0, scale, 1.0), st=final)
    return dq, ht


@compiled_together
def scan_backward(
    plan: Scans, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, h0: Tensor | None, scale: float, do: Tensor,
    dht: Tensor | None, *, need_dg: bool, o: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients (dq, dk, dv, dg, dh0); dg as g and dh0 as h0 in float32; all operands contiguous.

    dg is None but for a decay over keys: the passes do not compute that of one decay per head or row. `o`, if given, is
    filled with the outputs.

    The reverse passes carry the state's gradient divided by the scale, which they multiply their results with.
    """
    B, T, H, K, V = plan.B, plan.T, plan.H, plan.K, plan.V
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    wide: dict[str, Any] = dict(dtype=torch.float32, device=q.device)
    dh0 = None if h0 is None else torch.empty(B, H, K, V, **wide)
    down, final = 1.0 / scale, dh0
    if plan.segments > 1:
        h0 = _chain(plan, k, v, g, h0, None, reverse=False, s_in=1.0, s_st=1.0)
        dht = _chain(plan, q, do, g, dht, dh0, reverse=True, s_in=down, s_st=scale)
        down, final = 1.0, None
    if o is not None:
        _launch(plan, q, k, v, g, o, tall=False, reverse=False, s0=h0, scales=(1.0, scale, 1.0))

    h = dg = ranges = None
    if plan.kind == "vector":
        ranges = _ranges(plan, _programs(plan, k, True), q)
    parts = (PLAIN.value, PLAIN.value)
    if plan.kind == "vector" and need_dg:
        parts = (QUERIES.value, KEYS.value)
        chunks = B * plan.segments * H * (plan.length // plan.tall.chunk)
        h = torch.empty(chunks, V, K, dtype=q.dtype, device=q.device)
        dg = torch.empty(B, T, H, K, **wide)
    _launch(
        plan, do, v, k, g, dq, tall=True, reverse=False, s0=h0, scales=(1.0, scale, 1.0),
        part=parts[0], e=q, h=h, dg=dg, ranges=ranges,
    )  # fmt: skip
    _launch(
        plan, v, do, q, g, dk, tall=True, reverse=True, s0=dht, scales=(down, scale, 1.0),
        part=parts[1], e=k, h=h, dg=dg, ranges=ranges,
    )  # fmt: skip
    _launch(plan, k, q, do, g, dv, tall=False, reverse=True, s0=dht, scales=(down, scale, scale), st=final)
    return dq, dk, dv, dg, dh0

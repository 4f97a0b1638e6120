"""Launches of the passes in `decay_scan` and `decay_scan_gates`: output and gradients of a decayed outer product.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = scale * q_t^T S_t

Every pass keeps its state on chip and walks time once; one program holds a block of columns for a head. Where these are
too few to fill the device, time is cut into segments: a first pass sums up what each segment adds to the state, the
sums are chained to the state before each segment, and the segments then run side by side. Packed sequences are such
segments too, of any length: operands are [1, T, H, ..] where they lie, states [N, H, ..] (`decay_segments`).

H is the number of heads of the output; operands that neighbours share have fewer (`decay_heads`) and are read where
they lie. Their gradients are written for all H, in the operands' dtype, and summed after.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fla_compile.kernels.decay_configs import Config, configs_for
from fla_compile.kernels.decay_heads import decay_heads, sum_decay_heads, sum_heads
from fla_compile.kernels.decay_scan import KEYS, LONG, PLAIN, QUERIES, chunk_scan_kernel
from fla_compile.kernels.decay_scan_gates import chunk_scan_columns_kernel, chunk_scan_rows_kernel, largest_range
from fla_compile.kernels.decay_scan_sums import SUMS, Sums, row_decay_grad_kernel
from fla_compile.kernels.decay_segments import (
    Packing,
    Part,
    chain_joints_kernel,
    chain_segments_kernel,
    pack,
    segment_count,
)
from fla_compile.kernels.decay_triton_common import (
    KINDS,
    device_arch,
    multiprocessors,
    precision,
    shared_limit,
)
from fla_compile.kernels.launch import Launch, compiled_together, layout, remember

__all__ = ["Scans", "pack_scans", "plan_scans", "scan_backward", "scan_forward", "scan_query_grad"]

# Programs that run side by side on a multiprocessor before it is full.
RESIDENT = 2
# So few steps are done one by one at once: nothing is gained by a product, and roundings are saved.
FEW_STEPS = 16
# The second launch of a pass with gates by channel works on few programs, if any: what counts is that it is right.
EXACT_OPTIONS = {"num_warps": 8, "num_stages": 1}
ROW_GRAD_OPTIONS = {"num_warps": 4}


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
        return triton.cdiv(triton.cdiv(self.T, self.chunk), self.segments) * self.chunk

    @property
    def chunk(self) -> int:
        """Segments but the last are whole chunks of so many steps: of either shape of pass."""
        return max(self.wide.chunk, self.tall.chunk)


def plan_scans(q: Tensor, v: Tensor, kind: str, *, heads: int | None = None, limit: float | None = None,
               segments: int | None = None, wide: Config | None = None, tall: Config | None = None,
               forward: bool = False, need_dg: bool = False) -> Scans | None:  # fmt: skip
    """None where there is no configuration for these operands; `heads` of the output, those of q if None.

    `forward` plans outputs alone, which are wide passes; `need_dg`, passes that also leave the decay's gradient.
    """
    launches = ("wide",) if forward else ("wide", "grads" if need_dg and kind in ("constant", "scalar") else "tall")
    B, T, H, K = q.shape
    sizes = B, T, heads or H, K, v.shape[-1]
    return _plan(*sizes, q.dtype, q.device, kind, precision(q), limit, segments, wide, tall, launches)


@functools.lru_cache(maxsize=1024)
def _plan(
    B: int, T: int, H: int, K: int, V: int, dtype: torch.dtype, device: torch.device, kind: str, products: str,
    limit: float | None, segments: int | None, wide: Config | None, tall: Config | None, launches: tuple[str, ...],
) -> Scans | None:  # fmt: skip
    arch, shared = device_arch(device), shared_limit(device)
    found = []
    for launch, given, size in zip(launches, (wide, tall), (K, V), strict=False):
        rows = (given,) if given else configs_for(arch, launch, kind, dtype.itemsize, size, shared)
        if not rows:
            return None
        found.append(rows[0])
    wide, tall = found[0], found[-1]
    # the two directions cut time alike, whatever their chunks
    chunk = max(wide.chunk, tall.chunk)
    if segments is None:
        cut = _cutting(device, H, V if len(launches) == 1 else K, V, wide, tall)
        segments = segment_count(T, steps=B * T, chunk=chunk, **cut)
    segments = triton.cdiv(T, triton.cdiv(triton.cdiv(T, chunk), segments) * chunk)
    if limit is None:
        limit = largest_range(dtype) if T > FEW_STEPS else -1.0
    return Scans(B, T, H, K, V, kind, segments, wide, tall, products, limit)


def _cutting(device: torch.device, H: int, K: int, V: int, wide: Config, tall: Config) -> dict[str, int]:
    """What `segment_count` is told of a device, and of the shape of pass that has fewer programs."""
    programs = H * min(triton.cdiv(V, wide.block_v), triton.cdiv(K, tall.block_v))
    return dict(programs=programs, room=RESIDENT * multiprocessors(device), resident=RESIDENT)


def pack_scans(plan: Scans, bounds: list[tuple[int, int]], device: torch.device, longest: int | None = None) -> Packing:
    """The segments of packed sequences from `bounds[n][0]` up to `bounds[n][1]` of plan.T steps.

    `longest` asks for segments of about so many steps at most, in place of what fills the device.
    """
    cut = _cutting(device, plan.H, plan.K, plan.V, plan.wide, plan.tall)
    return pack(bounds, device, chunk=plan.chunk, state_chunk=plan.tall.chunk, longest=longest, **cut)


def _launch(
    plan: Scans, x: Tensor | None, z: Tensor, w: Tensor, g: Tensor | None, y: Tensor | None, *, tall: bool,
    reverse: bool, s0: Tensor | None, scales: tuple[float, float, float], st: Tensor | None = None,
    gt: Tensor | None = None, part: int = 0, e: Tensor | None = None, h: Tensor | None = None,
    dg: Tensor | None = None, ranges: Tensor | None = None, sums: Sums | None = None, packed: Part | None = None,
) -> None:  # fmt: skip
    """One pass over time. Without y only the segments' own states, to st, and decays, to gt."""
    operands: tuple[Tensor | None, ...] = x, z, w, g, s0, y, st, gt
    numbers, exacts = tuple(map(float, scales)), (False,)  # an integer would be a number of the compilation
    if plan.kind == "vector":
        if ranges is None:
            ranges = _ranges(plan, _programs(plan, w, tall, packed), z)
        operands = (x, z, w, g, e, s0, y, st, ranges, h, dg) if tall else (*operands, ranges)
        numbers, exacts = (*numbers, float(plan.limit)), (True,) if plan.limit < 0 else (False, True)
    elif sums is None:
        operands += (None,) * 4
    else:
        operands += e, sums.states, sums.rows, sums.carry
    operands += (None, None) if packed is None else (packed.table, packed.joints)
    layouts = tuple(map(layout, operands))
    for exact in exacts:
        key = (plan, tall, reverse, part, exact, layouts)
        launch = _launches.get(key)
        if launch is None:
            given = s0 is not None, y is not None, st is not None
            shares = _shares(plan.H, x, z, w, g, e)
            launch = _launch_pass(plan, z, w, tall, reverse, part, exact, *given, packed, shares)
            remember(_launches, key, launch)
        launch(*operands, *numbers)


def _launch_pass(
    plan: Scans, z: Tensor, w: Tensor, tall: bool, reverse: bool, part: int, exact: bool, has_s0: bool, output: bool,
    final: bool, packed: Part | None, shares: tuple[int, ...],
) -> Launch:  # fmt: skip
    config = plan.tall if tall else plan.wide
    # only the tiles of the table are known to compile to what they mean: smaller sizes are masked, not given others
    sizes = (
        plan.T, plan.length, plan.segments, plan.H, z.shape[-1], w.shape[-1], config.chunk, config.block_k,
        config.block_v,
    )  # fmt: skip
    common = tall, has_s0, packed is None and plan.T % config.chunk == 0
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    kernel: Any = chunk_scan_kernel
    flags: tuple[Any, ...] = (KINDS[plan.kind], part, reverse, output, final, *common)
    if plan.kind == "vector":
        kernel = chunk_scan_columns_kernel if tall else chunk_scan_rows_kernel
        flags = (reverse, part if tall else output, final, *common, exact)
        options = EXACT_OPTIONS if exact else options
        shares = shares if tall else shares[:4]
    numbers = (*sizes, *flags, plan.precision, *shares)
    return Launch(kernel, z.device, (_programs(plan, w, tall, packed),), numbers, **options)


def _shares(H: int, x: Tensor | None, z: Tensor, w: Tensor, g: Tensor | None, e: Tensor | None) -> tuple[int, ...]:
    """How many of H neighbouring heads share one of each operand."""
    given = (0 if x is None else x.shape[2], z.shape[2], w.shape[2], decay_heads(g), 0 if e is None else e.shape[2])
    return tuple(H // (heads or H) for heads in given)


def _programs(plan: Scans, w: Tensor, tall: bool, packed: Part | None = None) -> int:
    segments = plan.B * plan.segments if packed is None else packed.table.shape[0]
    return segments * plan.H * triton.cdiv(w.shape[-1], (plan.tall if tall else plan.wide).block_v)


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


def _packed_chain(
    plan: Scans, packing: Packing, z: Tensor, w: Tensor, g: Tensor | None, s0: Tensor | None, *, reverse: bool,
    s_in: float,
) -> Part:  # fmt: skip
    """What a pass over the sequences is told: their table, and the states where segments meet if any do."""
    if not packing.joints:
        return packing.part(None)
    H, K, V = plan.H, plan.K, plan.V
    u = torch.empty(packing.joints, H, K, V, dtype=torch.float32, device=z.device)
    per_key = (K,) if plan.kind == "vector" else ()
    gt = torch.empty(packing.joints, H, *per_key, dtype=torch.float32, device=z.device)
    _launch(
        plan, None, z, w, g, None, tall=False, reverse=reverse, s0=None, scales=(1.0, 1.0, 1.0), st=u, gt=gt,
        packed=packing.sums(reverse),
    )  # fmt: skip
    rows = packing.chain()
    key = ("joints", plan, reverse, layout(s0), rows.shape, u.device)
    launch = _launches.get(key)
    if launch is None:
        block = min(1024, triton.next_power_of_2(K * V))
        numbers = H, K, V, block, KINDS[plan.kind], reverse, s0 is not None
        grid = (rows.shape[0] * H * triton.cdiv(K * V, block),)
        launch = Launch(chain_joints_kernel, u.device, grid, numbers, num_warps=4)
        remember(_launches, key, launch)
    launch(u, gt, s0, rows, float(s_in))
    return packing.part(u)


def _new_states(plan: Scans, like: Tensor, packing: Packing | None) -> Tensor:
    """A state for every chunk of a tall pass of each segment and head."""
    chunks = plan.B * plan.segments * triton.cdiv(plan.length, plan.tall.chunk) if packing is None else packing.chunks
    return torch.empty(chunks * plan.H, plan.V, plan.K, dtype=like.dtype, device=like.device)


def _new_sums(plan: Scans, like: Tensor, packing: Packing | None) -> Sums:
    """What the passes for dq and dk, [B, T, H, K], fill."""
    states = _new_states(plan, like, packing)
    columns = triton.cdiv(plan.K, plan.tall.block_v)
    # the sums run along a state's rows, which are its columns where it is turned
    side = plan.tall.block_v if plan.tall.chunk < LONG.value else plan.tall.block_k
    wide: dict[str, Any] = dict(dtype=torch.float32, device=like.device)
    rows = torch.empty(plan.B, plan.H, SUMS.value, columns, plan.T, **wide)
    return Sums(states, rows, torch.empty(states.shape[0], columns, side, **wide))


def _launch_row_grads(plan: Scans, sums: Sums, dg: Tensor, packing: Packing | None, packed: Part | None) -> None:
    B, T, H = plan.B, plan.T, plan.H
    segments = plan.segments if packing is None else packing.segments
    chunks = triton.cdiv(plan.length, plan.tall.chunk) if packing is None else triton.cdiv(packing.chunks, segments)
    table = None if packed is None else packed.table
    key = ("rows", plan, segments, chunks, layout(table), dg.device)
    launch = _launches.get(key)
    if launch is None:
        heads = min(16, triton.next_power_of_2(H))
        numbers = T, plan.length, segments, chunks, H, plan.tall.chunk, *sums.carry.shape[1:], heads
        grid = (B * segments * chunks * triton.cdiv(H, heads),)
        launch = Launch(row_decay_grad_kernel, dg.device, grid, numbers, **ROW_GRAD_OPTIONS)
        remember(_launches, key, launch)
    launch(sums.rows, sums.carry, dg, table)


@compiled_together
def scan_forward(
    plan: Scans, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, h0: Tensor | None, scale: float, *,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs [B, T, H, V] and the final state [B, H, K, V] (packed [N, ..]) in float32; all operands contiguous."""
    o = torch.empty(plan.B, plan.T, plan.H, plan.V, dtype=v.dtype, device=v.device)
    states = plan.B if packing is None else packing.sequences
    ht = torch.empty(states, plan.H, plan.K, plan.V, dtype=torch.float32, device=q.device)
    final: Tensor | None = ht
    packed = None
    if packing is not None:
        packed = _packed_chain(plan, packing, k, v, g, h0, reverse=False, s_in=1.0)
    elif plan.segments > 1:
        h0, final = _chain(plan, k, v, g, h0, ht, reverse=False, s_in=1.0, s_st=1.0), None
    _launch(plan, q, k, v, g, o, tall=False, reverse=False, s0=h0, scales=(1.0, scale, 1.0), st=final, packed=packed)
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


def scan_backward(
    plan: Scans, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, h0: Tensor | None, scale: float, do: Tensor,
    dht: Tensor | None, *, need_dg: bool, o: Tensor | None = None, packing: Packing | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients (dq, dk, dv, dg, dh0); dg as g and dh0 as h0 in float32; all operands contiguous.

    Without need_dg dg is None. `o`, if given, is filled with the outputs.

    The reverse passes carry the state's gradient divided by the scale, which they multiply their results with.
    """
    dq, dk, dv, dg, dh0 = _launch_backward(plan, q, k, v, g, h0, scale, do, dht, need_dg, o, packing)
    dq, dk, dv = (sum_heads(dx, 2, x.shape[2]) for dx, x in ((dq, q), (dk, k), (dv, v)))
    if g is not None and dg is not None:
        dg = sum_decay_heads(dg.sum((0, 1)) if plan.kind == "constant" else dg, g)
    return dq, dk, dv, dg, dh0


@compiled_together
def _launch_backward(
    plan: Scans, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, h0: Tensor | None, scale: float, do: Tensor,
    dht: Tensor | None, need_dg: bool, o: Tensor | None, packing: Packing | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """As `scan_backward`, but all have H heads, and dg of one decay a head has its steps still, [B, T, H]."""
    B, T, H, K = plan.B, plan.T, plan.H, plan.K
    dq, dk, dv = (torch.empty(B, T, H, size, dtype=q.dtype, device=q.device) for size in (K, K, plan.V))
    wide: dict[str, Any] = dict(dtype=torch.float32, device=q.device)
    dh0 = None if h0 is None else torch.empty(h0.shape, **wide)
    down, final = 1.0 / scale, dh0
    ahead = back = None
    if packing is not None:
        ahead = _packed_chain(plan, packing, k, v, g, h0, reverse=False, s_in=1.0)
        back = _packed_chain(plan, packing, q, do, g, dht, reverse=True, s_in=down)
    elif plan.segments > 1:
        h0 = _chain(plan, k, v, g, h0, None, reverse=False, s_in=1.0, s_st=1.0)
        dht = _chain(plan, q, do, g, dht, dh0, reverse=True, s_in=down, s_st=scale)
        down, final = 1.0, None
    if o is not None:
        _launch(plan, q, k, v, g, o, tall=False, reverse=False, s0=h0, scales=(1.0, scale, 1.0), packed=ahead)

    h = dg = ranges = sums = None
    parts = (PLAIN.value, PLAIN.value)
    if plan.kind == "vector":
        ranges = _ranges(plan, _programs(plan, k, True, ahead), q)
    if need_dg and plan.kind != "none":
        parts = (QUERIES.value, KEYS.value)
        dg = torch.empty(B, T, H, *([K] if plan.kind == "vector" else []), **wide)
        if plan.kind == "vector":
            h = _new_states(plan, q, packing)
        else:
            sums = _new_sums(plan, q, packing)
    _launch(
        plan, do, v, k, g, dq, tall=True, reverse=False, s0=h0, scales=(1.0, scale, 1.0),
        part=parts[0], e=q, h=h, dg=dg, ranges=ranges, sums=sums, packed=ahead,
    )  # fmt: skip
    _launch(
        plan, v, do, q, g, dk, tall=True, reverse=True, s0=dht, scales=(down, scale, 1.0),
        part=parts[1], e=k, h=h, dg=dg, ranges=ranges, sums=sums, packed=back,
    )  # fmt: skip
    if sums is not None and dg is not None:
        _launch_row_grads(plan, sums, dg, packing, ahead)
    _launch(plan, k, q, do, g, dv, tall=False, reverse=True, s0=dht, scales=(down, scale, scale), st=final, packed=back)
    return dq, dk, dv, dg, dh0

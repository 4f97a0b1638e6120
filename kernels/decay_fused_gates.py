"""Launches of the kernels for a gate a key, `decay_scan_gates` and `decay_chunk_*`, from the plan of a call."""

from typing import Any

import torch
from torch import Tensor

from fla_compile.kernels.decay_chunk_gates import chunk_grads_kernel
from fla_compile.kernels.decay_chunk_outputs import chunk_outputs_kernel
from fla_compile.kernels.decay_chunk_states import chunk_states_kernel
from fla_compile.kernels.decay_configs import Config
from fla_compile.kernels.decay_heads import shares
from fla_compile.kernels.decay_plan import Scans
from fla_compile.kernels.decay_scan_gates import SHARE, chunk_scan_rows_kernel
from fla_compile.kernels.decay_scan_grads import chunk_scan_grads_kernel
from fla_compile.kernels.decay_segments import Packing, Part, ceil_div
from fla_compile.kernels.launch import Launch, layout, remember
from fla_compile.kernels.launch_record import empty

__all__ = [
    "launch_grads",
    "launch_outputs",
    "launch_states",
    "launch_walk",
    "new_bonus_grads",
    "new_kept",
    "new_states",
    "segments_of",
]

# The second launch, for decays out of range, works on few programs, if any: what counts is that it is right.
EXACT_OPTIONS = {"num_warps": 8, "num_stages": 1}
# Chunks are shared among no fewer of its programs, which fill any device.
EXACT_PROGRAMS = 1024

_launches: dict[tuple[Any, ...], Launch] = {}


def segments_of(plan: Scans, packed: Part | None) -> int:
    return plan.B * plan.segments if packed is None else packed.table.shape[0]


def new_states(
    plan: Scans, like: Tensor, packing: Packing | None = None, shape: tuple[int, int] | None = None
) -> Tensor:
    """A state for every chunk of a tall pass of each segment and head, V x K numbers unless a shape is given."""
    count = _chunks(plan, packing)[2] * plan.H
    return empty(count, *(shape or (plan.V, plan.K)), dtype=like.dtype, device=like.device)


def new_kept(plan: Scans, like: Tensor, packing: Packing | None = None) -> tuple[Tensor, Tensor]:
    """What `kept` leaves: a state for every chunk of a walk, of two bytes in float16, and the factors of its rows."""
    count = _chunks(plan, packing)[2] * _walk_chunks(plan) * plan.H
    dtype = torch.float16 if like.element_size() == 2 else torch.float32
    h = empty(count, plan.K, plan.V, dtype=dtype, device=like.device)
    return h, empty(count, plan.K, dtype=torch.float32, device=like.device)


def launch_outputs(
    plan: Scans, x: Tensor, z: Tensor, w: Tensor, g: Tensor, y: Tensor, *, reverse: bool, s0: Tensor | None,
    scales: tuple[float, float, float], st: Tensor | None = None, h: Tensor | None = None, packed: Part | None = None,
    packing: Packing | None = None, own: Tensor | None = None,
) -> None:  # fmt: skip
    """o, or in reverse dv; to h, if given, the states at the ends of chunks, from which it is made where the plan has
    `chunks`; `own` are the rows' scores with themselves where the state is read before the update."""
    if not plan.held or (h is not None and plan.chunks is not None):
        h = new_states(plan, z, packing) if h is None else h
        s_in, s_y, s_st = scales
        launch_states(plan, z, w, g, reverse=reverse, s0=s0, st=st, h=h, scales=(s_in, s_st), packed=packed)
        _launch_chunks(plan, x, z, w, g, h, y, s_y, reverse=reverse, packing=packing, own=own)
        return
    config = plan.wide
    programs = segments_of(plan, packed) * plan.H * ceil_div(plan.V, config.block_v)
    operands = x, z, w, g, s0, y, st, h, _ranges(plan, programs, z), *_parts(packed), own
    flags = reverse, st is not None, s0 is not None, packed is None and plan.T % config.chunk == 0
    tile = config.chunk, config.block_k, config.block_v
    ways, numbers = (tile, flags, shares(plan.H, x, z, w, g)), (*scales, plan.limit)
    kept = 1 if h is None else plan.tall.chunk // config.chunk
    more = kept, config.spare
    _launch(chunk_scan_rows_kernel, plan, config, (programs,), operands, numbers, plan.segments, *ways, more)


def launch_states(
    plan: Scans, z: Tensor, w: Tensor, g: Tensor, *, reverse: bool, s0: Tensor | None = None, st: Tensor | None = None,
    gt: Tensor | None = None, h: Tensor | None = None, f: Tensor | None = None,
    scales: tuple[float, float] = (1.0, 1.0), packed: Part | None = None,
) -> None:  # fmt: skip
    """The states before each chunk to h, or with f as `new_kept` has both, the last to st, the decay of each segment to
    gt; s0 is read times the first of `scales`, st written times the second."""
    config, more = (plan.states, 1) if f is None else (plan.kept, _walk_chunks(plan))
    assert config is not None
    programs = segments_of(plan, packed) * plan.H * ceil_div(plan.V, config.block_v)
    grid = programs, ceil_div(plan.K, config.block_k)
    operands = z, w, g, s0, st, gt, h, f, *_parts(packed)
    flags = reverse, st is not None, s0 is not None, packed is None and plan.T % config.chunk == 0
    tile = config.chunk, config.block_k, config.block_v
    ways = tile, flags, shares(plan.H, z, w, g)
    _launch(chunk_states_kernel, plan, config, grid, operands, scales, plan.segments, *ways, (more,), exact=False)


def _launch_chunks(
    plan: Scans, x: Tensor, z: Tensor, w: Tensor, g: Tensor, h: Tensor, y: Tensor, scale: float, *, reverse: bool,
    packing: Packing | None, own: Tensor | None,
) -> None:  # fmt: skip
    """o, or in reverse dv, of each chunk from the states before or after it."""
    config = plan.chunks
    assert config is not None
    table, segments, chunks = _chunks(plan, packing)
    programs = chunks * plan.H * ceil_div(plan.V, config.block_v)
    operands = x, z, w, g, h, y, _ranges(plan, programs, z), table, own
    flags = reverse, table is None and plan.T % config.chunk == 0
    tile = config.chunk, config.block_k, config.block_v
    ways, numbers = (tile, flags, shares(plan.H, x, z, w, g)), (scale, plan.limit)
    _launch(chunk_outputs_kernel, plan, config, (programs,), operands, numbers, segments, *ways, shared=True)


def launch_grads(
    plan: Scans, q: Tensor | None, k: Tensor, v: Tensor, do: Tensor, g: Tensor, h: Tensor, d: Tensor | None,
    dq: Tensor, dk: Tensor | None, dg: Tensor | None, scale: float, *, packing: Packing | None = None,
    bonus: Tensor | None = None, du: Tensor | None = None,
) -> None:  # fmt: skip
    """dq, and with d, the gradients of states, dk and dg if given; with du, `new_bonus_grads`, the shares of chunks."""
    config = plan.tall
    table, segments, chunks = _chunks(plan, packing)
    programs = chunks * plan.H * ceil_div(plan.K, config.block_v)
    operands = q, k, v, do, g, h, d, dq, dk, dg, _ranges(plan, programs, k), table, bonus, du
    flags = (table is None and plan.T % config.chunk == 0,)
    tile = config.chunk, config.block_v, config.block_k
    ways, numbers = (tile, flags, shares(plan.H, q, k, v, g)), (scale, plan.limit)
    _launch(chunk_grads_kernel, plan, config, (programs,), operands, numbers, segments, *ways, shared=True)


def launch_walk(
    plan: Scans, q: Tensor, k: Tensor, v: Tensor, do: Tensor, g: Tensor, h: Tensor, f: Tensor, dq: Tensor, dk: Tensor,
    dg: Tensor | None, *, dht: Tensor | None, scales: tuple[float, float], packed: Part | None, bonus: Tensor | None,
    du: Tensor | None,
) -> None:  # fmt: skip
    """dq, dk, dg if given, and with du, `new_bonus_grads`, the shares of segments, from what `kept` left. dht is read
    times the first of `scales`, the gradients written times the second."""
    config = plan.walk
    assert config is not None
    programs = segments_of(plan, packed) * plan.H * ceil_div(plan.K, config.block_v)
    operands = q, k, v, do, g, h, f, dht, dq, dk, dg, _ranges(plan, programs, k), *_parts(packed), bonus, du
    flags = dht is not None, packed is None and plan.T % config.chunk == 0
    tile = config.chunk, config.block_v, config.block_k
    ways, numbers, more = (tile, flags, shares(plan.H, q, k, v, g)), (*scales, plan.limit), (_walk_chunks(plan),)
    _launch(chunk_scan_grads_kernel, plan, config, (programs,), operands, numbers, plan.segments, *ways, more)


def new_bonus_grads(plan: Scans, like: Tensor, packing: Packing | None) -> Tensor:
    """The share of each chunk, or with a walk of each segment, in the bonus's gradient [.., H, K]."""
    if plan.walk is not None:
        segments = plan.B * plan.segments if packing is None else packing.segments
        return empty(segments, plan.H, plan.K, dtype=torch.float32, device=like.device)
    # a last segment may have fewer
    chunks = _chunks(plan, packing)[2]
    whole = packing is not None or plan.B * plan.T == chunks * plan.tall.chunk
    return empty(chunks, plan.H, plan.K, dtype=torch.float32, device=like.device, zeros=not whole)


def _chunks(plan: Scans, packing: Packing | None) -> tuple[Tensor | None, int, int]:
    """The table of segments, their number, and that of chunks with a state for each head."""
    if packing is None:
        return None, plan.segments, plan.B * plan.segments * ceil_div(plan.length, plan.tall.chunk)
    return packing.part(None).table, packing.segments, packing.chunks


def _walk_chunks(plan: Scans) -> int:
    """Chunks of a walk in one of those that states are counted by."""
    assert plan.walk is not None
    return plan.tall.chunk // plan.walk.chunk


def _parts(packed: Part | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if packed is None else (packed.table, packed.joints)


def _ranges(plan: Scans, programs: int, like: Tensor) -> Tensor:
    """Where a launch leaves the largest range each program met; with a limit below zero, all are beyond it."""
    return empty(programs, dtype=torch.float32, device=like.device, zeros=plan.limit < 0)


def _launch(
    kernel: Any, plan: Scans, config: Config, grid: tuple[int, ...], operands: tuple[Tensor | None, ...],
    numbers: tuple[float, ...], segments: int, tile: tuple[int, ...], flags: tuple[int, ...],
    heads: tuple[int, ...], more: tuple[int, ...] = (), *, exact: bool = True, shared: bool = False,
) -> None:  # fmt: skip
    """`kernel` as the table has it, and again for what that finds out of range, which fewer programs look after where
    that is `shared` among them; `more` are constants of a pass."""
    layouts = tuple(map(layout, operands))
    for again in ((True,) if plan.limit < 0 else (False, True)) if exact else (None,):
        key = (kernel.fn, plan, grid, segments, flags, again, layouts)
        launch = _launches.get(key)
        if launch is None:
            # only the tiles of the table are known to compile to what they mean: smaller sizes are masked
            sizes = plan.T, plan.length, segments, *grid[:shared], plan.H, plan.K, plan.V, *tile
            rest = (*flags, *(() if again is None else (again,)), plan.precision, *heads, plan.before, *more)
            options = EXACT_OPTIONS if again else {"num_warps": config.num_warps, "num_stages": config.num_stages}
            device = next(x.device for x in operands if x is not None)
            few = (min(grid[0], max(EXACT_PROGRAMS, ceil_div(grid[0], SHARE.value))),)
            launch = Launch(kernel, device, few if shared and again else grid, (*sizes, *rest), **options)
            remember(_launches, key, launch)
        launch(*operands, *map(float, numbers))

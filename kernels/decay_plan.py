"""What the fused launch of a decayed outer product is planned from: tiles, segments of time, and packed sequences."""

import dataclasses
import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fla_compile.kernels.decay_configs import LARGEST_WALK, MORE_BEFORE, Config, configs_for
from fla_compile.kernels.decay_scan_gates import largest_range
from fla_compile.kernels.decay_segments import Packing, pack, segment_count
from fla_compile.kernels.decay_triton_common import device_arch, precision, shared_limit
from fla_compile.kernels.launch import multiprocessors

__all__ = ["FEW_STEPS", "Scans", "pack_scans", "plan_scans"]

# Programs that run side by side on a multiprocessor before it is full.
RESIDENT = 2
# Steps of the shortest segment, of chunks up to 32 and of longer ones, whose states cost less beside them.
SHORTEST = 128, 64
# Steps of the longest sequence with run-ups in place of a chain, whose two launches more take less time from some
# length on (`NOTES.md`); with a gate a key there are none.
RUNUP_STEPS = {"none": 1024, "constant": 512, "scalar": 512, "vector": 0}
# So few steps are done one by one at once: nothing is gained by a product, and roundings are saved.
FEW_STEPS = 16


@dataclass(frozen=True)
class Scans:
    """What the passes of one call share: `wide` and `dv` walk states with K rows (o, dv), `tall` with V rows (dq, dk).

    Under a gate a key no pass is `tall`: `states` leaves the states at the ends of chunks, or `wide` does, from which
    `chunks` makes outputs and `tall` gradients, a chunk a program. With a `walk`, that makes the gradients but dv, from
    what `kept` leaves, of chunks that those of `tall` are made of. Where no pass holds K rows, `wide` is `chunks`.
    Where outputs alone are planned, `dv` and `tall` are `wide`; so is `dv` but for one decay a row whose gradient is
    left, where the table has a row for it. With `runup` each segment's program walks what is before it too, and no
    states of segments are chained.
    """

    B: int
    T: int
    H: int
    K: int
    V: int
    kind: str
    segments: int
    wide: Config
    dv: Config
    tall: Config
    precision: str
    limit: float
    states: Config | None = None
    chunks: Config | None = None
    kept: Config | None = None
    walk: Config | None = None
    runup: bool = False
    before: bool = False  # the state is read before a step's update, as RWKV-6 does

    @property
    def chained(self) -> bool:
        """Segments begin with states that other launches leave."""
        return self.segments > 1 and not self.runup

    @property
    def held(self) -> bool:
        """There is a pass for the output, which holds all keys of a state."""
        return self.K <= self.wide.block_k

    @functools.cached_property
    def length(self) -> int:
        """Steps of a segment, the same for all passes: whole chunks of each, but for the last one's."""
        return triton.cdiv(triton.cdiv(self.T, self.chunk), self.segments) * self.chunk

    @functools.cached_property
    def chunk(self) -> int:
        """Segments but the last are whole chunks of so many steps: of every pass."""
        configs = self.wide, self.dv, self.tall, self.states
        return max(config.chunk for config in configs if config is not None)


def plan_scans(q: Tensor, v: Tensor, kind: str, *, heads: int | None = None, limit: float | None = None,
               segments: int | None = None, runup: bool | None = None, wide: Config | None = None,
               tall: Config | None = None, walk: Config | None = None, forward: bool = False, need_dg: bool = False,
               before: bool = False, few: bool | None = None) -> Scans | None:  # fmt: skip
    """None where there is no configuration for these operands; `heads` of the output, those of q if None.

    `forward` plans outputs alone, which are wide passes; `need_dg`, passes that also leave the decay's gradient;
    `before`, a gate a key whose state is read before the update. `wide`, which then is dv's too, `tall` and `walk` are
    asked for in place of the table's, `tall` alone without a `walk`; `segments`, `runup` and `few`, whether the tiles
    are the table's for few programs, in place of the rule's choice; segments asked for alone have no run-up. Raises
    ValueError for a run-up under a gate a key.
    """
    if runup and kind == "vector":
        raise ValueError(f"a gate a key has no run-up, got runup={runup} and kind={kind!r}")
    grads = need_dg and kind in ("constant", "scalar")
    launches = ["wide", *["states", "chunks"] * (kind == "vector"), *["grads" if grads else "tall"] * (not forward)]
    launches += ["dv"] * (kind == "scalar" and wide is None and need_dg and not forward)
    B, T, H, K = q.shape
    sizes, given = (B, T, heads or H, K, v.shape[-1]), (wide, tall, walk)
    choices = segments, runup, given, tuple(launches), before, few
    return _plan(*sizes, q.dtype, q.device, kind, precision(q), limit, *choices)


@functools.lru_cache(maxsize=1024)
def _plan(
    B: int, T: int, H: int, K: int, V: int, dtype: torch.dtype, device: torch.device, kind: str, products: str,
    limit: float | None, segments: int | None, runup: bool | None, given: tuple[Config | None, ...],
    launches: tuple[str, ...], before: bool, few: bool | None,
) -> Scans | None:  # fmt: skip
    arch, shared = device_arch(device), shared_limit(device)
    if before and shared is not None:
        shared -= MORE_BEFORE
    found: dict[str, Config] = {}
    for launch in launches:
        asked = None if launch == "dv" else given[launch != "wide"]
        size, columns = (V, K) if launch in ("tall", "grads") else (K, V)
        if asked:
            rows: tuple[Config, ...] = (asked,)
        else:
            steps = T if kind == "vector" and launch in ("chunks", "tall") else 1
            which = arch, launch, kind, dtype.itemsize, size, shared
            rows = _rows(which, B * H, steps, columns, few, multiprocessors(device))
        if kind != "vector":  # a pass holds all rows of a state
            rows = tuple(config for config in rows if size <= config.block_k)
        if rows:
            found[launch] = rows[0]
        elif launch != "dv" and (launch not in ("wide", "chunks") or kind != "vector"):
            return None
    states, chunks = found.get("states"), found.get("chunks")
    wide = found.get("wide") or chunks
    if wide is None or ("wide" not in found and K <= wide.block_k):  # a row that does not fit
        return None
    dv, tall = found.get("dv") or wide, found.get("tall") or found.get("grads") or wide
    if states is not None:  # what is left at the ends of chunks, by `states` or `wide`, is read by chunks as long
        if (states.chunk != chunks.chunk) if chunks is not None else states.chunk % wide.chunk:
            return None
        assert tall is wide or states.chunk == tall.chunk
    kept = walk = None
    if kind == "vector" and "tall" in launches and K <= wide.block_k:
        kept, walk = _walk(arch, kind, dtype, V, shared, given)
        assert walk is None or tall.chunk % walk.chunk == 0
    if limit is None:
        limit = largest_range(dtype) if T > FEW_STEPS else -1.0
    configs = states, chunks, kept, walk
    plan = Scans(B, T, H, K, V, kind, 1, wide, dv, tall, products, limit, *configs, before=before)
    chunk = plan.chunk  # the two directions cut time alike, whatever their chunks
    if segments is None:
        cut = _cutting(plan, device)
        if runup is None:
            runup = T <= RUNUP_STEPS[kind]
        if runup:  # one program a multiprocessor, of a chunk at least, which may be the last and not whole
            whole = triton.cdiv(T, chunk) * chunk
            alone = dict(shortest=chunk, room=multiprocessors(device), resident=1)
            segments = segment_count(whole, steps=B * whole, fewest=2, **cut | alone)
        else:
            segments = segment_count(T, steps=B * T, **cut)
    segments = triton.cdiv(T, triton.cdiv(triton.cdiv(T, chunk), segments) * chunk)
    return dataclasses.replace(plan, segments=segments, runup=bool(runup) and segments > 1)


def _rows(
    which: tuple[int, str, str, int, int, int | None], states: int, steps: int, columns: int, few: bool | None,
    room: int,
) -> tuple[Config, ...]:  # fmt: skip
    """The table's rows for so many states and columns of each, whose chunks of so many steps run side by side: those
    for few programs where these still have a multiprocessor each, unless `few` says which."""
    rows, narrow = configs_for(*which), configs_for(*which, few=True)
    if narrow == rows or not rows:
        return rows
    if few is None:
        block_v = narrow[0].block_v if narrow else rows[0].block_v // 2
        few = states * triton.cdiv(steps, rows[0].chunk) * triton.cdiv(columns, block_v) <= room
    return narrow if few else rows


def _walk(
    arch: int, kind: str, dtype: torch.dtype, V: int, shared: int | None, given: tuple[Config | None, ...]
) -> tuple[Config | None, Config | None]:
    """`kept` and `walk`, if there is one for so many values."""
    _, tall, walk = given
    kept = None
    if walk is not None:
        kept = dataclasses.replace(walk, block_k=walk.block_v, block_v=2 * walk.block_k)
    elif tall is None and V <= LARGEST_WALK:
        found = [configs_for(arch, launch, kind, dtype.itemsize, V, shared) for launch in ("kept", "walk")]
        kept, walk = (found[0][0], found[1][0]) if all(found) else (None, None)
    if kept is not None and walk is not None:
        assert kept.chunk == walk.chunk and V <= min(kept.block_v, 2 * walk.block_k)
    return kept, walk


def _cutting(plan: Scans, device: torch.device) -> dict[str, int]:
    """What `segment_count` is told of a device, and of the shape of pass that has fewer programs."""
    K, V, states, tall, chunk = plan.K, plan.V, plan.states, plan.tall, plan.chunk
    blocks = triton.cdiv(V, max(plan.wide.block_v, plan.dv.block_v))
    if states is None:
        blocks = blocks if tall is plan.wide else min(blocks, triton.cdiv(K, tall.block_v))
    elif plan.held:
        blocks = min(blocks, triton.cdiv(V, states.block_v))
        if plan.walk is not None:  # which has as many programs as what is kept for it
            blocks = min(blocks, triton.cdiv(K, plan.walk.block_v))
    else:
        blocks = triton.cdiv(K, states.block_k) * triton.cdiv(V, states.block_v)
    shortest = max(chunk, SHORTEST[chunk > 32])
    if states is not None and not plan.held:
        shortest = max(shortest, 2 * chunk)  # states and a chain for chunks that all run at once gain less
    # so large a tile has a multiprocessor to itself
    large = (config.block_k > 128 and config.num_warps > 4 for config in (plan.wide, plan.dv, plan.tall))
    resident = 1 if any(large) else RESIDENT
    room = resident * multiprocessors(device)
    return dict(programs=plan.H * blocks, chunk=chunk, room=room, resident=resident, shortest=shortest)


def pack_scans(plan: Scans, bounds: list[tuple[int, int]], device: torch.device, longest: int | None = None) -> Packing:
    """The segments of packed sequences from `bounds[n][0]` up to `bounds[n][1]` of plan.T steps.

    `longest` asks for segments of about so many steps at most, in place of what fills the device.
    """
    return pack(bounds, device, state_chunk=plan.tall.chunk, longest=longest, **_cutting(plan, device))

"""Launch configurations of the decayed outer product: one small table, no autotuning.

A row is keyed by architecture, launch, family of decays, bytes per operand and head size class. Families: `row` (no
decay, or one a head or row) and `key` (one a key). Launches: `split`, and the two shapes of pass of the fused one,
whose programs hold a state of all rows of the class and block_v columns: `wide` with K rows (the output and dv, which
under one decay a row is `dv` where there is one and the decay's gradient is left) and `tall` with V rows (dq and dk),
which are `grads` where they leave a decay's gradient too. In family `key` backward has no passes but dv's where its
chunks are as long: `states` leaves the states at the ends of chunks, in blocks of keys and values, from which `chunks`
makes dv and the output of heads that no pass holds, and `tall` dq, dk and the decay's gradient of block_v keys, block_k
values at a time. Where there are a `kept` and a `walk`, and a pass for the output, dv is a pass whatever its chunks;
the first leaves states of all values, from which the second makes the other gradients, block_v keys and twice block_k
values a program. Head size classes bound the larger of K and V, or the rows of the state, or for the last three the
values. Rows of `few` have narrower tiles, for where programs of these still have a multiprocessor each; an empty one
says that there is no pass where programs of half the columns would. Where there are no rows for a pass (sm_80 has them
for states of up to 128 rows, sm_90 of up to 256), the split launch runs, but not under a gate a key.
Narrow rows compile without spilling but where one says how much (`NOTES.md` has what other tiles measured), float32
rows with at most 16 bytes; the tests prove it.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = [
    "ARCHS",
    "BOTH",
    "CLASSES",
    "KINDS",
    "LARGEST_BOTH",
    "LARGEST_WALK",
    "MANY_STATES",
    "MORE_BEFORE",
    "STEPS",
    "STEPS_CHECKED",
    "TABLE",
    "WIDE_STEPS",
    "Config",
    "StepConfig",
    "all_configs",
    "both_config",
    "configs_for",
    "step_checked",
    "step_config",
]

ARCHS = (80, 90, 100)
CLASSES = (64, 128, 256)
KINDS = {"none": "row", "constant": "row", "scalar": "row", "vector": "key"}


@dataclass(frozen=True)
class Config:
    """`chunk` rows a chunk; `block_k`, `block_v` the largest tile sides; `shared` the most bytes a kernel needs and
    `stack` the most it spills; `spare`, whether registers are left (`chunk_scan_rows_kernel`)."""

    chunk: int
    block_k: int
    block_v: int
    num_warps: int
    num_stages: int
    shared: int
    stack: int = 0
    spare: bool = field(default=True, kw_only=True)


@dataclass(frozen=True)
class Row:
    arch: int
    launch: str
    family: str
    nbytes: int
    size: int
    few: bool = field(default=False, kw_only=True)


def _split(arch: int, family: str, nbytes: int, *config: int) -> dict[Row, tuple[Config, ...]]:
    """The split launch walks keys and values in blocks: one configuration serves every size."""
    return {Row(arch, "split", family, nbytes, size): (Config(*config),) for size in CLASSES}


def _passes(
    arch: int, size: int, wide: tuple[int, ...], tall: tuple[int, ...], grads: tuple[int, ...] = (), few: bool = False
) -> dict[Row, tuple[Config, ...]]:
    """The fused launch takes operands of two bytes, and all rows of a state at once."""
    shapes = {"wide": wide, "tall": tall} | ({} if few else {"grads": grads or tall})
    return {Row(arch, name, "row", 2, size, few=few): (Config(x[0], size, *x[1:]),) for name, x in shapes.items()}


def _gate(arch: int, size: int, launch: str, *config: int, spare: bool = True) -> dict[Row, tuple[Config, ...]]:
    """What the fused launch has for a gate a key: `wide` has all rows of a state at once, the others have blocks."""
    return {Row(arch, launch, "key", 2, size): (Config(*config, spare=spare),)}


# Columns: chunk, block_k, block_v, num_warps, num_stages, shared, stack; a pass has no block_k, and `wide` is first,
# then `tall`, then `grads`, if that is not `tall`.
TABLE: dict[Row, tuple[Config, ...]] = {
    **_split(80, "row", 2, 64, 32, 32, 4, 2, 16384),
    **_split(80, "key", 2, 64, 32, 64, 4, 2, 25088),
    **_split(80, "row", 4, 32, 16, 32, 4, 1, 10240),
    **_split(80, "key", 4, 32, 32, 32, 4, 2, 16896),
    **_split(90, "row", 2, 64, 64, 64, 4, 3, 73728, 72),
    **_split(90, "key", 2, 64, 32, 64, 4, 2, 32768),
    **_split(90, "row", 4, 32, 32, 32, 4, 2, 12416),
    **_split(90, "key", 4, 32, 32, 32, 4, 2, 16896),
    **_split(100, "row", 2, 64, 32, 32, 4, 2, 20512),
    **_split(100, "key", 2, 64, 32, 64, 4, 2, 32784),
    Row(100, "split", "key", 2, 64): (Config(64, 32, 64, 4, 2, 32784, 8),),
    **_split(100, "row", 4, 32, 16, 16, 4, 1, 8192),
    **_split(100, "key", 4, 32, 32, 32, 4, 2, 16896),
    **_passes(80, 64, (32, 64, 8, 2, 17408), (32, 64, 4, 2, 17408), (32, 64, 4, 2, 24576)),
    **_passes(80, 128, (32, 64, 8, 2, 37888), (32, 64, 8, 2, 37888)),
    **_gate(80, 64, "wide", 32, 64, 64, 4, 2, 28672, spare=False),
    **_gate(80, 64, "states", 32, 64, 64, 4, 2, 24576),
    **_gate(80, 64, "tall", 32, 64, 64, 4, 1, 24704),
    **_gate(80, 128, "wide", 32, 128, 64, 8, 2, 53248, 48, spare=False),
    **_gate(80, 128, "states", 32, 128, 64, 8, 2, 45056),
    **_gate(80, 128, "tall", 32, 128, 64, 4, 1, 32768),
    **_gate(80, 256, "states", 32, 64, 64, 4, 2, 24576),
    **_gate(80, 256, "chunks", 32, 64, 64, 4, 2, 32768),
    **_gate(80, 256, "tall", 32, 64, 64, 4, 1, 20608),
    **_passes(90, 64, (64, 64, 4, 3, 82944), (64, 64, 4, 3, 82944)),
    **_passes(90, 128, (32, 64, 4, 4, 80896), (32, 64, 4, 4, 80896), (64, 64, 4, 3, 115200, 48)),
    Row(90, "dv", "row", 2, 128): (Config(64, 128, 64, 4, 3, 115200, 16),),
    **_passes(90, 256, (32, 128, 8, 4, 135168, 64), (32, 128, 8, 4, 135168, 24), (64, 64, 8, 2, 139520, 168)),
    **_passes(90, 256, (32, 64, 4, 3, 79872, 112), (32, 64, 4, 3, 79872, 64), few=True),
    Row(90, "grads", "row", 2, 256, few=True): (),
    **_gate(90, 64, "wide", 32, 64, 64, 4, 4, 86016),
    **_gate(90, 64, "states", 64, 64, 64, 4, 3, 107520),
    **_gate(90, 64, "tall", 64, 64, 64, 4, 1, 65536, 16),
    **_gate(90, 64, "kept", 32, 64, 64, 4, 3, 53248),
    **_gate(90, 64, "walk", 32, 64, 64, 4, 3, 81920, 48),
    **_gate(90, 128, "wide", 32, 128, 128, 8, 3, 139264),
    **_gate(90, 128, "states", 64, 64, 128, 4, 2, 83968),
    **_gate(90, 128, "chunks", 64, 64, 128, 4, 2, 83968, 128),
    **_gate(90, 128, "tall", 64, 128, 64, 4, 1, 98304, 80),
    **_gate(90, 128, "kept", 32, 64, 128, 4, 3, 65536),
    **_gate(90, 128, "walk", 32, 64, 64, 4, 3, 114688, 40),
    **_gate(90, 256, "states", 64, 64, 128, 4, 2, 83968),
    **_gate(90, 256, "chunks", 64, 64, 128, 4, 2, 83968, 72),
    **_gate(90, 256, "tall", 64, 64, 64, 4, 1, 49152, 104),
    Row(90, "chunks", "key", 2, 256, few=True): (Config(64, 64, 64, 4, 3, 108544, 32),),
    Row(90, "tall", "key", 2, 256, few=True): (Config(64, 64, 32, 4, 2, 45056, 32),),
}


# The most values that a `walk` has.
LARGEST_WALK = 128

# Bytes of shared memory beyond its row's that a kernel needs where the state is read before the update.
MORE_BEFORE = 16384

# A decay over keys and one over values: the tile of all passes by architecture and the larger of K and V. Operands have
# two bytes; the columns are those of `TABLE`.
LARGEST_BOTH = 128
BOTH: dict[tuple[int, int], Config] = {
    (80, 64): Config(32, 64, 32, 4, 1, 20480),
    (80, 128): Config(32, 128, 32, 8, 1, 36864, 32),
    (90, 64): Config(32, 64, 32, 4, 3, 73728),
    (90, 128): Config(32, 128, 64, 8, 3, 147456),
    (100, 64): Config(32, 64, 32, 4, 3, 77824, 8),
    (100, 128): Config(16, 128, 64, 8, 2, 56832),
}


@dataclass(frozen=True)
class StepConfig:
    """The step kernel holds all keys of a state and `block_v` of its values; it needs next to no shared memory."""

    block_v: int
    num_warps: int


# By architecture and the largest number of keys. 16 values of a row are 64 bytes, what memory moves at once; blocks are
# small so that 32 heads make programs enough for an H100, and a thread holds 16 or 32 numbers of the state. Among such
# tiles a row has one that compiles without a stack for every family.
STEPS: dict[tuple[int, int], StepConfig] = {
    (80, 64): StepConfig(16, 1),
    (80, 128): StepConfig(16, 4),
    (80, 256): StepConfig(16, 4),
    (90, 64): StepConfig(16, 1),
    (90, 128): StepConfig(16, 4),
    (90, 256): StepConfig(16, 8),
    (100, 64): StepConfig(16, 1),
    (100, 128): StepConfig(8, 2),
    (100, 256): StepConfig(16, 8),
}

# As many states fill the device without small blocks, and wider ones move more at a time (`NOTES.md`).
MANY_STATES = 256
WIDE_STEPS: dict[tuple[int, int], StepConfig] = {(90, 128): StepConfig(32, 4), (90, 256): StepConfig(32, 8)}

# The architectures whose rows of both tables passed `pytest -m gpu tests/kernels/test_decay_step_triton.py`. On these,
# and on no other, the operators run the step kernel.
STEPS_CHECKED: tuple[int, ...] = (90,)


def _row_arch(arch: int) -> int:
    """The architecture of the table whose rows are read: the nearest at or below."""
    return max((a for a in ARCHS if a <= arch), default=ARCHS[0])


def both_config(arch: int, size: int) -> Config:
    """The tile for a decay over keys and one over values, of up to LARGEST_BOTH each."""
    return BOTH[_row_arch(arch), next(c for c in CLASSES if size <= c)]


def step_config(arch: int, keys: int, states: int = 1) -> StepConfig:
    """The step kernel's tile for up to 256 keys; `states` counts those written in place for one query each."""
    row = _row_arch(arch), next(c for c in CLASSES if keys <= c)
    return WIDE_STEPS.get(row, STEPS[row]) if states >= MANY_STATES else STEPS[row]


def step_checked(arch: int) -> bool:
    return _row_arch(arch) in STEPS_CHECKED


def configs_for(
    arch: int, launch: str, kind: str, nbytes: int, size: int, shared_limit: int | None = None, *, few: bool = False
) -> tuple[Config, ...]:
    """The configurations, best first, that fit `shared_limit` bytes of shared memory; empty where none does.

    `arch` is the compute capability as 80, 86, 90, ...; the nearest row at or below it is read. `few` reads what the
    table has for few programs, where it has a row for them.
    """
    size = next((c for c in CLASSES if size <= c), CLASSES[-1])
    row = Row(_row_arch(arch), launch, KINDS[kind], nbytes, size, few=few)
    if row not in TABLE:
        row = dataclasses.replace(row, few=False)
    return tuple(c for c in TABLE.get(row, ()) if shared_limit is None or c.shared <= shared_limit)


def all_configs() -> Iterator[tuple[Row, Config]]:
    """Every shipped configuration with its row."""
    for row, configs in TABLE.items():
        for config in configs:
            yield row, config

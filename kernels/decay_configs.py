"""Launch configurations of the decayed outer product: one small table, no autotuning.

A row is keyed by architecture, launch, family of decays, bytes per operand and head size class. Two launches:
`split` (its tiles serve the backward too) and `fused` (state on chip: a program holds all keys of the class). Families:
`row` (no decay, or one per head or row) and `key` (one per key). Head size classes bound the larger of K and V.
Where no fused row stands, the state would not fit in registers and the split launch runs. Narrow rows compile without
spilling, float32 rows with at most 16 bytes; the tests prove it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["ARCHS", "CLASSES", "KINDS", "TABLE", "Config", "all_configs", "configs_for"]

ARCHS = (80, 90, 100)
CLASSES = (64, 128, 256)
KINDS = {"none": "row", "constant": "row", "scalar": "row", "vector": "key"}


@dataclass(frozen=True)
class Config:
    """`chunk` rows a chunk; `block_k`, `block_v` the largest tile sides; `shared` the most bytes a kernel needs."""

    chunk: int
    block_k: int
    block_v: int
    num_warps: int
    num_stages: int
    shared: int


@dataclass(frozen=True)
class Row:
    arch: int
    launch: str
    family: str
    nbytes: int
    size: int


def _split(arch: int, family: str, nbytes: int, *config: int) -> dict[Row, tuple[Config, ...]]:
    """The split launch walks keys and values in blocks: one configuration serves every size."""
    return {Row(arch, "split", family, nbytes, size): (Config(*config),) for size in CLASSES}


def _fused(arch: int, family: str, nbytes: int, size: int, *config: int) -> dict[Row, tuple[Config, ...]]:
    return {Row(arch, "fused", family, nbytes, size): (Config(*config),)}


# Columns of a configuration: chunk, block_k, block_v, num_warps, num_stages, shared.
TABLE: dict[Row, tuple[Config, ...]] = {
    **_split(80, "row", 2, 64, 32, 32, 4, 2, 16384),
    **_split(80, "key", 2, 64, 32, 64, 4, 2, 25088),
    **_split(80, "row", 4, 32, 16, 32, 4, 1, 10240),
    **_split(80, "key", 4, 32, 32, 32, 4, 2, 16896),
    **_fused(80, "row", 2, 64, 64, 64, 32, 4, 1, 20480),
    **_fused(80, "row", 2, 128, 32, 128, 64, 4, 2, 36992),
    **_fused(80, "key", 2, 64, 64, 64, 64, 4, 1, 40960),
    **_fused(80, "key", 2, 128, 32, 128, 64, 4, 1, 38912),
    **_split(90, "row", 2, 64, 64, 64, 4, 1, 24576),
    **_split(90, "key", 2, 64, 32, 64, 4, 2, 32768),
    **_split(90, "row", 4, 32, 32, 32, 4, 2, 12416),
    **_split(90, "key", 4, 32, 32, 32, 4, 2, 16896),
    **_fused(90, "row", 2, 64, 64, 64, 64, 4, 2, 57344),
    **_fused(90, "row", 2, 128, 64, 128, 32, 4, 2, 81920),
    **_fused(90, "key", 2, 64, 64, 64, 64, 4, 2, 106496),
    **_fused(90, "key", 2, 128, 32, 128, 64, 4, 2, 88064),
    **_split(100, "row", 2, 64, 32, 32, 4, 2, 20512),
    **_split(100, "key", 2, 64, 32, 64, 4, 2, 32784),
    **_split(100, "row", 4, 32, 16, 16, 4, 1, 8192),
    **_split(100, "key", 4, 32, 32, 32, 4, 2, 16896),
    **_fused(100, "row", 2, 64, 64, 64, 64, 4, 2, 65584),
    **_fused(100, "row", 2, 128, 64, 128, 64, 4, 2, 114736),
    **_fused(100, "key", 2, 64, 64, 64, 64, 4, 2, 90416),
    **_fused(100, "key", 2, 128, 32, 128, 64, 4, 2, 80384),
}


def configs_for(
    arch: int, launch: str, kind: str, nbytes: int, size: int, shared_limit: int | None = None
) -> tuple[Config, ...]:
    """The configurations, best first, that fit `shared_limit` bytes of shared memory; empty where none does.

    `arch` is the compute capability as 80, 86, 90, ...; the nearest row at or below it is read.
    """
    row = Row(
        arch=max((a for a in ARCHS if a <= arch), default=ARCHS[0]),
        launch=launch,
        family=KINDS[kind],
        nbytes=nbytes,
        size=next((c for c in CLASSES if size <= c), CLASSES[-1]),
    )
    return tuple(c for c in TABLE.get(row, ()) if shared_limit is None or c.shared <= shared_limit)


def all_configs() -> Iterator[tuple[Row, Config]]:
    """Every shipped configuration with its row."""
    for row, configs in TABLE.items():
        for config in configs:
            yield row, config

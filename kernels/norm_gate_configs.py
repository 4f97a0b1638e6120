"""Launch configurations of norm times gate: one small table, no autotuning.

A row is keyed by width class and bytes per element of x. The kernels move bytes and little else, so the table is the
same for every architecture: what counts is that each thread has one to four 16-byte loads of each operand in flight,
and that a backward tile, which also keeps sums over rows, stays in registers. Tests compile every row for sm_80, sm_90
and sm_100 and see that none spills.
"""

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["LARGEST_WIDTH", "TABLE", "Config", "all_configs", "config_for"]


@dataclass(frozen=True)
class Config:
    """Tiles of `rows` rows and their warps, forward and backward; `programs` backward programs per multiprocessor."""

    rows: int
    num_warps: int
    backward_rows: int
    backward_warps: int
    programs: int


# Columns: rows, num_warps, backward_rows, backward_warps, programs.
TABLE: dict[tuple[int, int], Config] = {
    (64, 2): Config(32, 4, 16, 4, 8),
    (128, 2): Config(16, 4, 8, 4, 8),
    (256, 2): Config(8, 4, 4, 4, 8),
    (512, 2): Config(4, 4, 2, 4, 8),
    (1024, 2): Config(2, 4, 1, 4, 8),
    (2048, 2): Config(1, 4, 1, 8, 4),
    (4096, 2): Config(1, 8, 1, 16, 2),
    (64, 4): Config(16, 4, 16, 4, 8),
    (128, 4): Config(8, 4, 8, 4, 8),
    (256, 4): Config(4, 4, 4, 4, 8),
    (512, 4): Config(2, 4, 2, 4, 8),
    (1024, 4): Config(1, 4, 1, 4, 8),
    (2048, 4): Config(1, 8, 1, 8, 4),
    (4096, 4): Config(1, 16, 1, 16, 2),
}
LARGEST_WIDTH = max(width for width, _ in TABLE)


def config_for(width: int, nbytes: int) -> Config:
    """The row for rows of `width` elements of `nbytes` bytes each."""
    size = next(w for w, _ in TABLE if width <= w)
    return TABLE[size, 2 if nbytes <= 2 else 4]


def all_configs() -> Iterator[tuple[int, int, Config]]:
    for (width, nbytes), config in TABLE.items():
        yield width, nbytes, config

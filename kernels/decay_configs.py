"""Launch configurations of the decayed outer product: one small table, no autotuning.

Rows are keyed by (architecture, family, bytes per operand, largest of K and V rounded up to a class).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Tile sides and launch options of one row.

    `chunk` rows a chunk; `block_k`, `block_v` the largest tile sides in the split and backward kernels; `fused_v` the
    value columns a program of the fused forward keeps on chip with up to `fused_k` keys (0: fused is not offered).
    `shared` is the most shared memory, in bytes, that any kernel of the row needs; a test compiles them and compares.
    """

    chunk: int
    block_k: int
    block_v: int
    num_warps: int
    num_stages: int
    fused_k: int
    fused_v: int
    shared: int


KINDS = ("none", "constant", "scalar", "vector")
ARCHS = (80, 89, 90, 100)
CLASSES = (64, 128, 256)


# (architecture, family, bytes, class) -> candidates, best first.
TABLE: dict[tuple[int, str, int, int], tuple[Config, ...]] = {}
for _arch in ARCHS:
    for _size in CLASSES:
        TABLE[_arch, "row", 2, _size] = (Config(64, 64, 64, 4, 2, 128, 64, 0),)
        TABLE[_arch, "key", 2, _size] = (Config(64, 32, 64, 4, 2, 128, 64, 0),)
        TABLE[_arch, "row", 4, _size] = (Config(32, 32, 32, 4, 2, 64, 32, 0),)
        TABLE[_arch, "key", 4, _size] = (Config(32, 32, 32, 4, 2, 64, 32, 0),)


def configs_for(arch, kind, bytes_, size, shared_limit=None):
    return TABLE[arch, "key" if kind == "vector" else "row", bytes_, next(c for c in CLASSES if size <= c)]

"""What lifting knows of one time loop: the frozen records that the analysis hands to the rewriting."""

import ast
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Read:
    """A loop-invariant tensor indexed by time; looked at only where `guard` holds, and maybe None if optional."""

    base: ast.expr
    axis: int
    guard: ast.expr | None = None
    optional: bool = False


@dataclass(frozen=True)
class Access:
    """One subscript by time: which read or write it belongs to, and the index that is left without the time entry.

    `checked` holds positions in `rest` of entries that must take up exactly one axis.
    """

    which: int
    rest: tuple[ast.expr, ...]
    checked: frozenset[int]


@dataclass(frozen=True)
class Write:
    """A tensor filled step by step: by one whole assignment, or through a copy of its slice (`slot`, a read)."""

    name: str
    axis: int
    rest: tuple[ast.expr, ...] = ()
    slot: int | None = None


@dataclass(frozen=True)
class Carry:
    """A name whose value goes from step to step; `same_object` if the loop must leave it in the object it found."""

    name: str
    in_place: bool
    same_object: bool


@dataclass(frozen=True)
class Overlap:
    """Names of tensors that the loop changes in place, and of what it uses besides its reads by time."""

    changed: tuple[str, ...]
    others: tuple[str, ...]


@dataclass(frozen=True)
class LoopPlan:
    """All that the rewriting of one loop needs; sites and uses are keyed by the `id` of a syntax node."""

    loop: ast.For
    index: str
    start: ast.expr | None
    stop: ast.expr
    reads: tuple[Read, ...]
    writes: tuple[Write, ...]
    carries: tuple[Carry, ...]
    lists: tuple[str, ...]
    overlap: Overlap
    read_sites: Mapping[int, Access]
    write_sites: Mapping[int, Access]
    list_uses: frozenset[int]

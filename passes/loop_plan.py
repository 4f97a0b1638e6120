"""What lifting knows of one time loop: the frozen records that the analysis hands to the rewriting."""

import ast
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Steps:
    """Which part of an axis a step is: the index itself, the entry `at`, or the slice from `at` to `end`.

    Both are affine in the loop's index, which they name. A slice up to `min(end, limit)` is one to `end` where the
    limit is the size of the axis.
    """

    at: ast.expr | None = None
    end: ast.expr | None = None
    limit: ast.expr | None = None


@dataclass(frozen=True)
class Read:
    """A loop-invariant tensor indexed by time; looked at only where `guard` holds, and maybe None if optional."""

    base: ast.expr
    axis: int
    steps: Steps = Steps()
    guard: ast.expr | None = None
    optional: bool = False


@dataclass(frozen=True)
class Access:
    """One subscript by time: which read or write it belongs to, and the index that is left without the time entry.

    `checked` holds positions in `rest` of entries that must take up exactly one axis. A slice leaves `:` behind.
    """

    which: int
    rest: tuple[ast.expr, ...]
    checked: frozenset[int]


@dataclass(frozen=True)
class Write:
    """A tensor filled step by step: by one whole assignment, or through a copy of its slice (`slot`, a read)."""

    name: str
    axis: int
    steps: Steps = Steps()
    rest: tuple[ast.expr, ...] = ()
    slot: int | None = None


@dataclass(frozen=True)
class Number:
    """A Python number computed from the index alone and what the loop does not change: `0.9 ** t`."""

    value: ast.expr


@dataclass(frozen=True)
class Test:
    """`difference`, affine in the index, compared with 0: settled by the index alone, for each step before the loop."""

    op: str
    difference: ast.expr
    line: int


@dataclass(frozen=True)
class Watch:
    """What tracing is told of a state that calls may change in place; `tentative` if it is one only where they do.

    `fresh` if nothing else refers to its first value; `keys` are stored into it.
    """

    tentative: bool
    fresh: bool
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Carry:
    """A name whose value goes from step to step; `same_object` if the loop must leave it in the object it found.

    One without a value as the loop starts is not `defined`: its first step is run by itself.
    """

    name: str
    in_place: bool
    same_object: bool
    defined: bool = True
    watch: Watch | None = None


@dataclass(frozen=True)
class Filled:
    """A list that the loop fills: at its end, at its front, or (a list of a fixed length) at `steps`."""

    name: str
    front: bool = False
    steps: Steps | None = None


@dataclass(frozen=True)
class Overlap:
    """Names of tensors that the loop changes in place, and of what it uses besides its reads by time.

    Those in `apart` are only read, and may be views of another name that is: a scan takes no two names of one memory.
    """

    changed: tuple[str, ...]
    others: tuple[str, ...]
    apart: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoopPlan:
    """All that the rewriting of one loop needs; sites, uses and statements are keyed by the `id` of a syntax node.

    `dropped` are statements that only name the index anew.
    """

    loop: ast.For
    index: str
    start: ast.expr | None
    stop: ast.expr
    step: ast.expr | None
    reads: tuple[Read, ...]
    writes: tuple[Write, ...]
    numbers: tuple[Number, ...]
    tests: tuple[Test, ...]
    carries: tuple[Carry, ...]
    lists: tuple[Filled, ...]
    overlap: Overlap
    read_sites: Mapping[int, Access]
    write_sites: Mapping[int, Access]
    number_sites: Mapping[int, int]
    test_sites: Mapping[int, int]
    list_sites: Mapping[int, str]
    list_uses: Mapping[int, str]
    dropped: frozenset[int]

"""Fission: in which order the states of a step can be solved, and which of them are only delays.

Before: one body with several states. After: groups of states, each solved for all of time before the next begins.

    S, y = cell(x_t, S)         a group holds states that need each other (h and c of an LSTM); a state that needs only
    z = z + f(y)                the results of others comes after them

A state whose new value needs no state of its group is a *delay* of one step (`prev = x_t`); one that shifts its rows
along and takes in one new row is a *window* (the buffer of a convolution). Both are reads of an earlier time and cost
nothing. Legal because a group is solved only when everything it reads at step t is known for all t.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fla_compile.passes.step import Step, original, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Delay:
    """S_t is what the step computed one step before: `carry` after a step is a stateless node."""

    carry: int


@dataclass(frozen=True)
class Window:
    """The last W values of `new` along axis `dim` of the state, the newest last, or first where `newest_first`."""

    carry: int
    dim: int
    new: fx.Node
    newest_first: bool


@dataclass(frozen=True)
class _Row:
    """One row of a state along an axis: row `index` of `node`, or all of it where `index` is None."""

    node: fx.Node
    index: int | None


def ready(step: Step, solved: frozenset[int]) -> list[frozenset[int]]:
    """The groups of changing states that can be solved next, as what they need of others is in `solved`.

    Those whose state meets what is still unknown, a query computed from another state say, come last.
    """
    changing = [i for i in range(len(step.carries)) if i not in step.idle]
    needs = {i: step.depends[step.next_carries[i]] for i in changing}
    for _ in changing:
        needs = {i: needs[i].union(*(needs[j] for j in needs[i])) for i in changing}
    found: dict[frozenset[int], None] = {}
    for i in changing:
        group = frozenset({i}) | {j for j in needs[i] if i in needs[j]}
        if i not in solved and needs[i] <= solved | group:
            found[group] = None
    return sorted(found, key=lambda group: waits(step, group, frozenset(changing) - solved - group))


def waits(step: Step, group: frozenset[int], unknown: frozenset[int]) -> bool:
    """Whether an operation takes a state of the group, or a view of one, beside what depends on unknown states."""
    todo = [step.carries[i] for i in group] + [original(step.next_carries[i]) for i in group]
    while todo:
        node = todo.pop()
        for user in node.users:
            inputs = user.all_input_nodes if user.op != "output" else []
            if any(step.depends[n] & unknown for n in inputs if n is not node):
                return True
            if len(inputs) == 1:
                todo.append(user)
    return False


def delay_of(step: Step, group: frozenset[int]) -> Delay | Window | None:
    """The group as a delay or a window, None if it is a recurrence."""
    if len(group) > 1:
        return None
    (carry,) = group
    if carry not in step.depends[step.next_carries[carry]]:
        return Delay(carry)
    for dim in range(len(shape_of(step.carries[carry]))):
        rows = _rows(step, carry, step.next_carries[carry], dim)
        width = shape_of(step.carries[carry])[dim]
        if rows is None or len(rows) != width or width < 2:
            continue
        for newest_first in (False, True):
            ordered = rows[::-1] if newest_first else rows
            kept = [(r.node, r.index) for r in ordered[:-1]]
            olds = range(width)[::-1] if newest_first else range(width)
            new = ordered[-1]
            if kept == [(step.carries[carry], i) for i in list(olds)[1:]] and carry not in step.depends[new.node]:
                if new.index is None:
                    return Window(carry, dim, new.node, newest_first)
    return None


def _rows(step: Step, carry: int, node: fx.Node, dim: int) -> list[_Row] | None:
    """The rows of a node along `dim`, as rows of the state and of stateless nodes; None if it is no such thing."""
    node = original(node)
    size = shape_of(node)[dim]
    if not isinstance(size, int):
        return None
    if node is step.carries[carry]:
        return [_Row(node, i) for i in range(size)]
    if carry not in step.depends[node]:
        return [_Row(node, None)] if size == 1 else [_Row(node, i) for i in range(size)]
    args, rank = node.args, len(shape_of(node))
    if node.target is aten.cat.default:
        parts = [_rows(step, carry, part, dim) for part in args[0]]  # type: ignore[union-attr, arg-type]
        if (args[1] if len(args) > 1 else 0) % rank != dim or any(part is None for part in parts):  # type: ignore
            return None
        return [row for part in parts for row in part or []]
    source = _rows(step, carry, args[0], dim) if args and isinstance(args[0], fx.Node) and _same_rank(node) else None
    if source is None:
        return None
    if node.target is aten.slice.Tensor:
        axis, start, stop, stride = _bounds(args[1:])
        return source[start:stop:stride] if axis % rank == dim else None  # type: ignore[operator, misc]
    if node.target is aten.roll.default:
        shifts, axes = args[1], args[2] if len(args) > 2 else ()
        if [a % rank for a in axes] != [dim]:  # type: ignore[union-attr, operator]
            return None
        shift = shifts[0] % size  # type: ignore[index, operator]
        return source[size - shift :] + source[: size - shift]
    if node.target is aten.slice_scatter.default:
        axis, start, stop, stride = _bounds(args[2:])
        places = range(size)[start:stop:stride]  # type: ignore[misc]
        if axis % rank == dim and len(places) == 1:  # type: ignore[operator]
            return _replaced(source, places[0], _Row(args[1], None))  # type: ignore[arg-type]
    return None


def _bounds(args: tuple[Any, ...]) -> tuple[Any, Any, Any, Any]:
    """Axis, start, stop and stride of a slice, of which the last may be left out."""
    given: list[Any] = [*args, *[0, None, None, 1][len(args) :]]
    return given[0], given[1], given[2], given[3]


def _replaced(rows: list[_Row], at: int, row: _Row) -> list[_Row]:
    return [*rows[:at], row, *rows[at + 1 :]]


def _same_rank(node: fx.Node) -> bool:
    source = node.args[0].meta["val"]  # type: ignore[union-attr]
    return isinstance(source, torch.Tensor) and source.dim() == len(shape_of(node))

"""What a twin calls in place of a time loop: plain Python over torch, so that Dynamo inlines it.

    for t in range(start, stop):            reads = ((q, 1), (k, 1))
        S = S * a + k[:, t]          ->     (S,), writes, _ = run_loop(body, (start, stop, 1), (S,), reads, ...)
        o[:, t] = q[:, t] * S               write_time(o, 1, (), (start, stop, 1), writes[0], site)

Legal because `body` is the user's own loop body, run once per step in the same order by one `scan`, on the same slices.
The facts that only the values can tell are checked here, while Dynamo traces: a read that is no tensor, a state that
changes its shape or dtype, an index outside its axis. Each raises `NotLiftable`; the loop is then traced as written.
A state that a helper changes in place, and outputs that alias the state, make `scan` itself refuse in Dynamo.

A first or last step that differs from the others (a state that starts as None, `if t == 0`, `x[:, t - 1]` under
`if t > 0`) is run by itself, before or after the scan of all others.
"""

from collections.abc import Callable
from typing import Any

import torch

from fla_compile.passes.loop_effects import new_run, version
from fla_compile.passes.loop_refusal import fail
from fla_compile.passes.loop_scan import Loop, Watching, at_step, run_pieces
from fla_compile.passes.loop_states import check_overlap
from fla_compile.passes.loop_steps import check_axis, check_limit, count_steps, progression
from fla_compile.passes.loop_trees import flatten_all
from fla_compile.passes.loop_watch import lacks, may_change, touched


def snapshot(value: Any, o: torch.Tensor) -> torch.Tensor:
    """Return what `o[:, t] = value` stores, unaffected by later in-place updates of `value`."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return torch.full((), value, dtype=o.dtype, device=o.device)


def run_loop(
    body: Callable,
    bounds: tuple[int, int, int],
    carries: tuple,
    reads: tuple[tuple, ...],
    *,
    names: tuple[str, ...],
    in_place: tuple[bool, ...],
    defined: tuple[bool, ...],
    optional: tuple[bool, ...],
    slots: tuple[int, ...],
    targets: tuple,
    changed: tuple,
    others: tuple,
    numbers: tuple[Callable, ...],
    tests: tuple[tuple[str, Callable, int], ...],
    n_lists: int,
    site: str,
    watched: tuple[tuple[bool, bool] | None, ...] = (),
    keys: tuple[tuple[str, ...], ...] = (),
) -> tuple[tuple, tuple, tuple]:
    """Run `body(carries, reads_t, numbers_t, tests) -> (carries, writes, lists)` for every step, most as a `scan`.

    `bounds` are those of the range. `reads` are (tensor, time axis) or (tensor, axis, at, end) with functions of the
    index; an `optional` one may be None, and those at `slots` are of tensors that the loop writes, all of which are
    `targets`. Targets and carries that may have another name are `changed`; `others` is what the body uses besides
    reads and these. `numbers` and the differences in `tests` are functions of the index. A carry may start as a Python
    number: the first step, run once on the side, tells its shape; if it is None, or not `defined`, that step stands
    alone. What a call may change in place is `watched`: (whether it is a carry only then, whether it starts fresh);
    `keys` are stored into containers. Returns the final carries, for each target pairs (begin, values `[T, ...]`), and
    for each list runs of steps as `TimeList` has them; with no steps, the initial carries and empty tuples.

    Raises NotLiftable.
    """
    count = count_steps(*bounds)
    if count <= 0:
        if not all(defined):
            fail("state_escapes", "without a step a state has no value", site)
        return carries, ((),) * len(targets), ((),) * n_lists
    for o in targets:
        if not isinstance(o, torch.Tensor):
            fail("not_a_tensor", f"the loop stores its steps in a {type(o).__name__}", site)
    for read, may_be_absent in zip(reads, optional, strict=True):
        if read[0] is not None or not may_be_absent:
            check_axis(read[0], read[1], site)
            check_limit(read[0], read[1], site, *read[2:])
    check_overlap(changed, (*[read[0] for i, read in enumerate(reads) if i not in slots], *others), site)
    places = tuple([progression(bounds, site, *read[2:]) for read in reads])
    loop = Loop(body, bounds, count, reads, places, numbers, tests, names, in_place, site, Watching())
    if len(watched) == 0:
        return run_pieces(loop, carries, len(targets), n_lists)
    moving = [look is None or not look[0] for look in watched]
    tentative = tuple([not m and may_change(carry) for m, carry in zip(moving, carries, strict=True)])
    if any(tentative):

        def step(k: int, state: tuple) -> tuple:
            return at_step(loop, k, state)[0]

        # Only an index test makes the first or the last step differ from all others.
        which = [k for k in (0, 1) if k < count] if len(tests) == 0 or count < 3 else [0, 1, count - 1]
        changing = touched(step, carries, names, tentative, which)
        moving = [changes and (m or maybe) for changes, m, maybe in zip(changing, moving, tentative, strict=True)]
    return _run_moving(loop, carries, moving, watched, keys, len(targets), n_lists)


def _run_moving(
    loop: Loop, carries: tuple, moving: list[bool], watched: tuple, keys: tuple, n_writes: int, n_lists: int
) -> tuple[tuple, tuple, tuple]:
    """Run the loop with those carries that change; the others are what they are in every step."""

    def body(state: tuple, *rest: Any) -> tuple[tuple, tuple, tuple]:
        new, writes, lists = loop.body(_merged(carries, state, moving), *rest)
        return _chosen(new, moving), writes, lists

    names, in_place, looks, kept_keys = [_chosen(v, moving) for v in (loop.names, loop.in_place, watched, keys)]
    mine = _chosen(carries, moving)
    look = []
    for carry, mutated, seen in zip(mine, in_place, looks, strict=True):
        look.append(seen is not None and not (mutated and isinstance(carry, torch.Tensor)))
    fresh = tuple([seen is not None and seen[1] for seen in looks])
    lacking = any([lacks(carry, k) for carry, k in zip(mine, kept_keys, strict=True)])
    watch = Watching(new_run(), tuple(look), fresh, lacking) if any(look) else Watching()
    fixed = flatten_all(_chosen(carries, [not m for m in moving]), _chosen(loop.names, [not m for m in moving]))[0]
    versions = [version(leaf) for leaf in fixed]
    inner = Loop(body, *loop[1:-4], names, in_place, loop.site, watch)
    final, writes, lists = run_pieces(inner, mine, n_writes, n_lists)
    if versions != [version(leaf) for leaf in fixed]:
        fail("aliased_state", "the first or the last step alone changes a tensor in place", loop.site)
    return _merged(carries, final, moving), writes, lists


def _chosen(values: tuple, which: list[bool]) -> tuple:
    return tuple([value for value, here in zip(values, which, strict=True) if here])


def _merged(values: tuple, chosen: tuple, which: list[bool]) -> tuple:
    """`values` with the `chosen` ones in the places where they came from."""
    merged, place = [], 0
    for value, here in zip(values, which, strict=True):
        merged.append(chosen[place] if here else value)
        place += here
    return tuple(merged)

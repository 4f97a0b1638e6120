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
from typing import Any, NamedTuple

import torch
from torch._higher_order_ops.scan import scan

from fla_compile.passes.loop_numbers import numbers_of_step
from fla_compile.passes.loop_refusal import fail
from fla_compile.passes.loop_states import (
    changed_states,
    check_item,
    check_overlap,
    check_second_names,
    checked_carry,
    initial,
    own,
)
from fla_compile.passes.loop_steps import (
    HOLDS,
    check_axis,
    count_steps,
    is_integer,
    is_number,
    one_step,
    progression,
    stays_inside,
    time_first,
)
from fla_compile.passes.loop_trees import flatten_all, rebuild_all


class Loop(NamedTuple):
    """One loop as `run_loop` sees it; see there."""

    body: Callable
    bounds: tuple
    steps: int
    reads: tuple
    places: tuple
    numbers: tuple
    tests: tuple
    names: tuple[str, ...]
    in_place: tuple[bool, ...]
    site: str


def snapshot(value: Any, o: torch.Tensor) -> torch.Tensor:
    """Return what `o[:, t] = value` stores, unaffected by later in-place updates of `value`."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return torch.full((), value, dtype=o.dtype, device=o.device)


def _spread(xs: tuple, present: tuple[bool, ...]) -> tuple:
    """Put None back where a read was absent."""
    spread, i = [], 0
    for here in present:
        spread.append(xs[i] if here else None)
        i += here
    return tuple(spread)


def _settled(loop: Loop, begin: int, count: int) -> tuple[bool | None, ...]:
    """What each test says for all of these steps, None where it says now this, now that."""
    start, _, step = loop.bounds
    known = []
    for op, difference, line in loop.tests:
        first, last = difference(start + begin * step), difference(start + (begin + count - 1) * step)
        if not is_integer(first) or not is_integer(last):
            fail("loop_index_used", "the index is compared with something other than an integer", loop.site, line)
        # Branches make a plain bool, and a guard, of what may be symbolic.
        holds = True if HOLDS[op](first, 0) else False
        still = True if HOLDS[op](last, 0) else False
        if op in ("==", "!="):
            # Affine: with the same sign at both ends it is nowhere 0.
            constant = count == 1 or (first > 0 and last > 0) or (first < 0 and last < 0) or (first == 0 and last == 0)
            known.append(holds if constant else None)
        else:
            known.append(holds if holds == still else None)
    return tuple(known)


def _fit(loop: Loop, begin: int, count: int) -> bool:
    """Whether these steps of every shifted read or chunk lie inside its tensor."""
    for read, steps in zip(loop.reads, loop.places, strict=True):
        if len(read) > 2 and read[0] is not None and not stays_inside(read[0], read[1], steps, begin, count):
            return False
    return True


def _edges(loop: Loop, carries: tuple) -> tuple[int, int]:
    """How many steps at the start and at the end must be run by themselves for all others to be alike."""
    must = 1 if any([leaf is None for leaf in flatten_all(carries, loop.names)[0]]) else 0
    shifted = any([len(read) > 2 for read in loop.reads])
    if len(loop.tests) == 0 and not shifted:
        return must, 0
    settled = len(loop.tests) == 0
    for lead, tail in ((0, 0), (1, 0), (0, 1), (1, 1)):
        count = loop.steps - lead - tail
        if lead < must:
            continue
        if count <= 0:
            return lead, loop.steps - lead
        if None not in _settled(loop, lead, count):
            settled = True
            if not shifted or _fit(loop, lead, count):
                return lead, tail
    if settled:
        return fail("index_range", "the loop leaves the time axis of a tensor it reads", loop.site)
    for test, known in zip(loop.tests, _settled(loop, 1, loop.steps - 2), strict=True):
        if known is None:
            line = test[2]
    return fail("loop_index_used", "a branch changes in more than the first and the last step", loop.site, line)


def _run_step(loop: Loop, k: int, carries: tuple) -> tuple[tuple, tuple, tuple]:
    """Run step k by itself; its outputs are `[1, ...]`."""
    xs = []
    for read, steps in zip(loop.reads, loop.places, strict=True):
        xs.append(None if read[0] is None else one_step(read[0], read[1], steps, k, loop.site))
    index = loop.bounds[0] + k * loop.bounds[2]
    numbers = tuple([number(index) for number in loop.numbers])
    leaves, _, shapes = flatten_all(carries, loop.names)
    state = own(rebuild_all(shapes, leaves), loop.in_place)
    new, writes, lists = loop.body(state, tuple(xs), numbers, _settled(loop, k, 1))
    check_second_names(state, new, loop.in_place, loop.names, loop.site)
    for items in lists:
        for item in items:
            check_item(item, changed_states(state, new, loop.in_place), loop.site)
    # Later steps may not change in place what this one left.
    ys = tuple([y.clone().unsqueeze(0) for y in writes])
    return tuple(new), ys, tuple([tuple([item.clone().unsqueeze(0) for item in items]) for items in lists])


def _run_scan(loop: Loop, begin: int, count: int, carries: tuple) -> tuple[tuple, tuple, tuple]:
    """Run `count` steps from the `begin`th on as one scan, which carries the tensors that the states hold."""
    leaves, names, shapes = flatten_all(carries, loop.names)
    if all([shape is None for shape in shapes]):
        return _scan_tensors(loop, begin, count, carries)

    def body(state: tuple, *rest: Any) -> tuple[tuple, tuple, tuple]:
        new, writes, lists = loop.body(rebuild_all(shapes, list(state)), *rest)
        new_leaves, _, new_shapes = flatten_all(new, loop.names)
        if new_shapes != shapes:
            fail("carry_changes", "a container that is carried changes what it holds in a step", loop.site)
        return tuple(new_leaves), writes, lists

    in_place: list[bool] = []
    for shape, mutated, name, carry in zip(shapes, loop.in_place, loop.names, carries, strict=True):
        # A tensor in a container is not copied: a scan refuses to change it in place.
        in_place = in_place + [mutated and shape is None] * len(flatten_all((carry,), (name,))[0])
    inner = Loop(body, *loop[1:-3], tuple(names), tuple(in_place), loop.site)
    final, writes, lists = _scan_tensors(inner, begin, count, tuple(leaves))
    return rebuild_all(shapes, list(final)), writes, lists


def _scan_tensors(loop: Loop, begin: int, count: int, carries: tuple) -> tuple[tuple, tuple, tuple]:
    """`_run_scan` where every state is a tensor, or a number to start one from."""
    site, names, in_place = loop.site, loop.names, loop.in_place
    kept, present = [], []
    for (x, axis, *_), steps in zip(loop.reads, loop.places, strict=True):
        present.append(x is not None)
        if x is not None:
            kept.append(time_first(x, axis, steps, begin, count, site))
    xs, here = tuple(kept), tuple(present)
    init = initial(carries, names, site)
    start, _, step = loop.bounds
    tests = _settled(loop, begin, count)
    # At both ends: a number that Python cannot compute raises here as in eager.
    samples = tuple([number(start + begin * step) for number in loop.numbers])
    for number in loop.numbers:
        if is_number(last := number(start + (begin + count - 1) * step)):
            float(last)

    if any([not isinstance(carry, torch.Tensor) for carry in init]):
        first = tuple([x[0] for x in xs])
        after, _, _ = loop.body(own(init, (True,) * len(init)), _spread(first, here), samples, tests)
        shaped = []
        for carry, new, name in zip(init, after, names, strict=True):
            if not isinstance(new, torch.Tensor):
                fail("carry_not_tensor", f"{name} becomes a {type(new).__name__}", site)
            shaped.append(carry if isinstance(carry, torch.Tensor) else torch.full_like(new, carry).contiguous())
        init = tuple(shaped)

    if len(samples) > 0:
        some = [x for x in (*xs, *init) if isinstance(x, torch.Tensor)]
        device = some[0].device if some else torch.device("cpu")
        index = torch.arange(count, dtype=torch.float64, device=device) * step + (start + begin * step)
        xs = (*xs, index, *[number(index) for number, s in zip(loop.numbers, samples, strict=True) if is_number(s)])
    # A scan needs something to count the steps and something to carry.
    if len(xs) == 0:
        xs, here = (torch.zeros(count),), (*here, True)
    idle = len(init) == 0
    if idle:
        init = (xs[0].new_zeros(()),)

    def combine(carry: tuple, x: tuple) -> tuple:
        state = () if idle else own(carry, in_place)
        numbers = numbers_of_step(loop.numbers, samples, x[len(x) - 1 - sum([is_number(s) for s in samples]) :], site)
        new, writes, lists = loop.body(state, _spread(x, here), numbers, tests)
        out = [carry[0].clone()] if idle else []
        if not idle:
            for fresh, old, name in zip(new, carry, names, strict=True):
                out.append(checked_carry(fresh, old, name, site))
            check_second_names(state, new, in_place, names, site)
        changed = [] if idle else changed_states(state, new, in_place)
        stacked = []
        for items in lists:
            for item in items:
                check_item(item, changed, site)
            stacked.append(tuple([item.clone() for item in items]))
        return tuple(out), (tuple(writes), tuple(stacked))

    final, (writes, lists) = scan(combine, init, xs)
    return (() if idle else tuple(final)), writes, lists


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
) -> tuple[tuple, tuple, tuple]:
    """Run `body(carries, reads_t, numbers_t, tests) -> (carries, writes, lists)` for every step, most as a `scan`.

    `bounds` are those of the range. `reads` are (tensor, time axis) or (tensor, axis, at, end) with functions of the
    index; an `optional` one may be None, and those at `slots` are of tensors that the loop writes, all of which are
    `targets`. Targets and carries that may have another name are `changed`; `others` is what the body uses besides
    reads and these. `numbers` and the differences in `tests` are functions of the index. A carry may start as a Python
    number: the first step, run once on the side, tells its shape; if it is None, or not `defined`, that step stands
    alone. Returns the final carries, for each target pairs (begin, values `[T, ...]`), and for each list runs of steps
    as `TimeList` has them; with no steps, the initial carries and empty tuples.

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
    check_overlap(changed, (*[read[0] for i, read in enumerate(reads) if i not in slots], *others), site)
    places = tuple([progression(bounds, site, *read[2:]) for read in reads])
    loop = Loop(body, bounds, count, reads, places, numbers, tests, names, in_place, site)
    lead, tail = _edges(loop, carries)
    final = carries
    writes: list[tuple] = [()] * len(targets)
    lists: list[tuple] = [()] * n_lists
    middle = count - lead - tail
    for begin, some, run in ((0, lead, _run_step), (lead, middle, None), (count - tail, tail, _run_step)):
        if some <= 0:
            continue
        if run is None:
            final, ys, items = _run_scan(loop, begin, some, final)
        else:
            final, ys, items = run(loop, begin, final)
        writes = [(*pieces, (begin, y)) for pieces, y in zip(writes, ys, strict=True)]
        lists = [(*runs, streams) for runs, streams in zip(lists, items, strict=True)]
    return tuple(final), tuple(writes), tuple(lists)

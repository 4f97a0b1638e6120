"""A lifted loop as `loop_runtime` runs it: one scan, and first or last steps that differ by themselves.

All of this is traced by Dynamo. A scan carries tensors: states in containers are taken apart around it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._higher_order_ops.scan import scan, scan_op

from fla_compile.passes.loop_effects import holds_scan, is_used_inside, noted, version
from fla_compile.passes.loop_numbers import numbers_of_step
from fla_compile.passes.loop_refusal import fail
from fla_compile.passes.loop_states import (
    changed_states,
    check_item,
    check_second_names,
    checked_carry,
    initial,
    own,
)
from fla_compile.passes.loop_steps import (
    HOLDS,
    is_integer,
    is_number,
    one_step,
    stays_inside,
    time_first,
)
from fla_compile.passes.loop_trees import flatten, flatten_all, rebuild, rebuild_all, same_shape
from fla_compile.passes.loop_watch import check_apart, note_changes, note_containers, settle


class Watching(NamedTuple):
    """Which carries calls may change in place, and which of these start `fresh`; both empty where there are none.

    `lacking` if a container gets in its first step what all others find there.
    """

    run: int = 0
    carries: tuple[bool, ...] = ()
    fresh: tuple[bool, ...] = ()
    lacking: bool = False


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
    watch: Watching


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
    must = 1 if loop.watch.lacking or any([leaf is None for leaf in flatten_all(carries, loop.names)[0]]) else 0
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


def at_step(loop: Loop, k: int, state: tuple) -> tuple[tuple, tuple, tuple]:
    """What the body gives for step k and this state."""
    xs = []
    for read, steps in zip(loop.reads, loop.places, strict=True):
        xs.append(None if read[0] is None else one_step(read[0], read[1], steps, k, loop.site))
    index = loop.bounds[0] + k * loop.bounds[2]
    numbers = tuple([number(index) for number in loop.numbers])
    return loop.body(state, tuple(xs), numbers, _settled(loop, k, 1))


def _run_step(loop: Loop, k: int, carries: tuple) -> tuple[tuple, tuple, tuple]:
    """Run step k by itself; what it writes is `[1, ...]`, what it puts into lists as it is."""
    state = own(carries, loop.in_place)
    leaves, leaf_names, looks = _watched_leaves(loop, state)
    before = [version(leaf) for leaf in leaves]
    new, writes, lists = at_step(loop, k, state)
    check_second_names(state, new, loop.in_place, loop.names, loop.site)
    for items in lists:
        for item in items:
            check_item(item, changed_states(state, new, loop.in_place), loop.site)
    for leaf, name, look, count in zip(leaves, leaf_names, looks, before, strict=True):
        if look and version(leaf) != count:
            check_apart(leaf, name, [leaf, *[item for items in lists for item in items]], loop.site)
            if k > 0 and len(lists) > 0 and not noted(loop.watch.run, "changed", name):
                fail("aliased_state", f"the last step alone changes {name} in place", loop.site)
    # Later steps may not change in place what this one left.
    ys = tuple([y.clone().unsqueeze(0) for y in writes])
    return tuple(new), ys, lists


def _watched_leaves(loop: Loop, carries: tuple) -> tuple[list, list[str], list[bool]]:
    """The tensors that the states hold, their names, and which of them a call may change; none if no call may."""
    if len(loop.watch.carries) == 0:
        return [], [], []
    leaves, names, _ = flatten_all(carries, loop.names)
    looks: list[bool] = []
    for carry, name, look in zip(carries, loop.names, loop.watch.carries, strict=True):
        looks = looks + [look] * len(flatten(carry, name)[0])
    return leaves, names, looks


def _run_scan(loop: Loop, begin: int, count: int, carries: tuple, seen: list) -> tuple[tuple, tuple, tuple]:
    """Run `count` steps from the `begin`th on as one scan, which carries the tensors that the states hold.

    `seen` is what the step before it put into lists.
    """
    leaves, names, shapes = flatten_all(carries, loop.names)
    watch, site = loop.watch, loop.site
    if all([shape is None for shape in shapes]) and len(watch.carries) == 0:
        return _scan_tensors(loop, begin, count, carries)

    def body(state: tuple, *rest: Any) -> tuple[tuple, tuple, tuple]:
        given = rebuild_all(shapes, list(state))
        was = [flatten(value, "")[0::2] for value in given] if len(watch.carries) > 0 else []
        new, writes, lists = loop.body(given, *rest)
        if len(watch.carries) > 0:
            note_containers(watch.run, given, new, tuple(was), loop.names, watch.carries, site)
        new_leaves, _, new_shapes = flatten_all(new, loop.names)
        if not all([same_shape(a, b) for a, b in zip(shapes, new_shapes, strict=True)]):
            fail("carry_changes", "a container that is carried changes what it holds in a step", site)
        return tuple(new_leaves), writes, lists

    in_place: list[bool] = []
    for shape, mutated, name, carry in zip(shapes, loop.in_place, loop.names, carries, strict=True):
        in_place = in_place + [mutated and shape is None] * len(flatten(carry, name)[0])
    _, _, looks = _watched_leaves(loop, carries)
    inner = Loop(body, *loop[1:-4], tuple(names), tuple(in_place), site, Watching(watch.run, tuple(looks)))
    final, writes, lists = _scan_tensors(inner, begin, count, tuple(leaves))
    if len(watch.carries) == 0:
        return rebuild_all(shapes, list(final)), writes, lists
    states, place = [], 0
    others = [*[read[0] for read in loop.reads], *leaves, *seen]
    for carry, name, look, fresh in zip(carries, loop.names, watch.carries, watch.fresh, strict=True):
        size, _, shape = flatten(carry, name)
        values = list(final[place : place + len(size)])
        if look:
            states.append(settle(watch.run, carry, values, name, fresh, others, site))
        else:
            states.append(rebuild(shape, values)[0])
        place = place + len(size)
    return tuple(states), writes, lists


def _apart(*operands: Any, combine_fn: Callable, carries: int) -> tuple:
    return combine_fn(operands[:carries], operands[carries:])


def _scan(combine: Callable, init: tuple, xs: tuple) -> tuple[tuple, tuple]:
    """`scan`; in a trace the operator behind it, as Dynamo needs long to see that tuples of tensors are such trees."""
    if not torch.compiler.is_dynamo_compiling():
        return scan(combine, init, xs)
    step = functools.partial(_apart, combine_fn=combine, carries=len(init))
    return scan_op(step, list(init), list(xs), ())


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

    watched = list(loop.watch.carries) if len(loop.watch.carries) > 0 else [False] * len(in_place)
    copied = tuple([mutated or look for mutated, look in zip(in_place, watched, strict=True)])

    def combine(carry: tuple, x: tuple) -> tuple:
        state = () if idle else own(carry, copied)
        before = [version(s) if look else 0 for s, look in zip(state, watched, strict=True)]
        numbers = numbers_of_step(loop.numbers, samples, x[len(x) - 1 - sum([is_number(s) for s in samples]) :], site)
        new, writes, lists = loop.body(state, _spread(x, here), numbers, tests)
        if idle and holds_scan():
            fail("not_a_tensor", "the loop only repeats another one", site)
        out = [carry[0].clone()] if idle else []
        if not idle:
            for fresh, old, name in zip(new, carry, names, strict=True):
                out.append(checked_carry(fresh, old, name, site))
        at_once = in_place
        if any(watched):
            noticed = note_changes(loop.watch.run, names, state, new, before, watched)
            at_once = tuple([mutated or seen for mutated, seen in zip(in_place, noticed, strict=True)])
        if not idle:
            check_second_names(state, new, at_once, names, site)
        changed = [] if idle else changed_states(state, new, at_once)
        stacked = []
        for items in lists:
            for item in items:
                check_item(item, changed, site)
            stacked.append(tuple([item.clone() for item in items]))
        return tuple(out), (tuple(writes), tuple(stacked))

    final, (writes, lists) = _scan(combine, init, xs)
    for carry, name, mutated in zip(carries, names, in_place, strict=True):
        if mutated and isinstance(carry, torch.Tensor) and is_used_inside(carry):
            fail("mutates_input", f"the loop uses the memory of {name} by another name", site)
    return (() if idle else tuple(final)), writes, lists


def run_pieces(loop: Loop, carries: tuple, n_writes: int, n_lists: int) -> tuple[tuple, tuple, tuple]:
    """Run a first or last step by itself where it differs from the others, and the others as one scan."""
    count = loop.steps
    lead, tail = _edges(loop, carries)
    final = carries
    writes: list[tuple] = [()] * n_writes
    lists: list[tuple] = [()] * n_lists
    middle = count - lead - tail
    seen: list = []
    for begin, some, alone in ((0, lead, True), (lead, middle, False), (count - tail, tail, True)):
        if some <= 0:
            continue
        if alone:
            final, ys, kept = _run_step(loop, begin, final)
            items = tuple([tuple([item.clone().unsqueeze(0) for item in step]) for step in kept])
            seen = [*seen, *[item for step in kept for item in step]]
        else:
            final, ys, items = _run_scan(loop, begin, some, final, seen)
        writes = [(*pieces, (begin, y)) for pieces, y in zip(writes, ys, strict=True)]
        lists = [(*runs, streams) for runs, streams in zip(lists, items, strict=True)]
    return tuple(final), tuple(writes), tuple(lists)

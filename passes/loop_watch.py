"""States that a helper, a method or a store into a container may change in place.

    def update(S, k, v):                        for t in range(T):
        S.mul_(0.9).add_(k * v)                     update(S, k[:, t], v[:, t])

A step acts on copies, and what it changed shows in tracing (`loop_effects`). A tensor that every step changes, and
that is the same object after it, gets the final value, so that whatever refers to it sees the update as in eager; a
container that the steps store into gets their last tensors. What a step changes and then replaces is refused where
something else may refer to it, and so is memory that the loop also uses under another name.
"""

from collections.abc import Callable
from typing import Any

import torch

from fla_compile.passes.loop_effects import begin_aside, end_aside, is_used_inside, memory_of, note, noted, version
from fla_compile.passes.loop_refusal import fail
from fla_compile.passes.loop_trees import field_names, flatten, rebuild, same_shape


def touched(step: Callable, carries: tuple, names: tuple, tentative: tuple[bool, ...], which: list) -> list[bool]:
    """Which of the carries a step changes: `step(k, carries)` is run on the side for `which` steps."""
    found = [not maybe for maybe in tentative]
    state = carries
    begin_aside()
    for k in which:
        copies = []
        before = []
        for carry, name in zip(state, names, strict=True):
            leaves, _, shape = flatten(carry, name)
            own = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            copies.append(rebuild(shape, own)[0])
            before.append((shape, own, [version(leaf) for leaf in own]))
        state = step(k, tuple(copies))
        for i, (shape, own, versions) in enumerate(before):
            leaves, _, now = flatten(copies[i], names[i])
            if not same_shape(shape, now):
                found[i] = True
            else:
                same = [leaf is old and version(old) == v for leaf, old, v in zip(leaves, own, versions, strict=True)]
                found[i] = found[i] or not all(same)
    end_aside()
    return found


def may_change(value: Any) -> bool:
    """Whether there is anything in the value that a call could change and a loop carry."""
    leaves, _, shape = flatten(value, "")
    return any([isinstance(leaf, torch.Tensor) or (leaf is None and shape is not None) for leaf in leaves]) or (
        shape is not None and len(leaves) == 0
    )


def lacks(container: Any, keys: tuple[str, ...]) -> bool:
    """Whether the container is still to get something that every later step finds in it."""
    if isinstance(container, dict):
        return len(container) == 0 or not all([key in container for key in keys])
    return False


def note_changes(run: int, names: list, state: tuple, new: tuple, before: list, watched: list) -> list:
    """Note, inside a step, which states it replaced and which it changed in place; returns the latter as flags."""
    changed = []
    for old, fresh, name, count, look in zip(state, new, names, before, watched, strict=True):
        changed.append(look and version(old) != count)
        if changed[-1]:
            note(run, "changed", name)
        if look and fresh is not old:
            note(run, "replaced", name)
    return changed


def note_containers(run: int, given: tuple, new: tuple, was: tuple, names: tuple, watched: list, site: str) -> None:
    """Note, inside a step, which containers it stored into; one that it also replaced must be as it `was`."""
    for old, fresh, (leaves, shape), name, look in zip(given, new, was, names, watched, strict=True):
        if not look or shape is None:
            continue
        if not isinstance(old, tuple) and fresh is old:
            note(run, "same", name)
            continue
        now, _, now_shape = flatten(old, name)
        if not same_shape(shape, now_shape) or not all([a is b for a, b in zip(now, leaves, strict=True)]):
            fail("mutates_input", f"{name} is changed in place and rebound", site)


def settle(run: int, carry: Any, final: list, name: str, fresh: bool, others: list, site: str) -> Any:
    """The state after the scan: its tensors in `final`, in the objects that keep theirs."""
    leaves, names, shape = flatten(carry, name)
    kept = noted(run, "same", name)
    values = []
    for leaf, value, own in zip(leaves, final, names, strict=True):
        if isinstance(leaf, torch.Tensor):
            changed, replaced = noted(run, "changed", own), noted(run, "replaced", own)
            if (changed or (kept and replaced)) and is_used_inside(leaf):
                fail("mutates_input", f"the loop uses the memory of {own} by another name", site)
            if changed and replaced and not fresh:
                fail("mutates_input", f"{own} is updated in place and replaced, and may have another name", site)
            if changed:
                check_apart(leaf, own, others, site)
            if changed and not replaced and not fresh:
                leaf.copy_(value)
            if not replaced and not (changed and fresh):
                value = leaf
        values.append(value)
    if not kept:
        return rebuild(shape, values)[0]
    _store(carry, shape, values, site)
    return carry


def check_apart(leaf: torch.Tensor, name: str, values: list, site: str) -> None:
    """Refuse a change in place of what more than one of the values refers to."""
    place = memory_of(leaf)
    if len([value for value in values if isinstance(value, torch.Tensor) and memory_of(value) == place]) > 1:
        fail("aliased_state", f"{name}, which a step changes in place, may share memory with another value", site)


def _store(container: Any, shape: Any, values: list, site: str) -> None:
    if any([inner is not None for inner in shape[1]]):
        fail("state_escapes", "a container in a container that the loop changes", site)
    if isinstance(container, (list, dict)):
        keys = range(len(container)) if isinstance(container, list) else list(container)
        for key, value in zip(keys, values, strict=True):
            container[key] = value
    elif not isinstance(container, tuple):
        for field, value in zip(field_names(container), values, strict=True):
            setattr(container, field, value)

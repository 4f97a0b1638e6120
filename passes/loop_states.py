"""The states that a lifted loop carries: as a scan takes them, and whether they stay apart from all else."""

from typing import Any

import torch

from fla_compile.passes.loop_refusal import fail
from fla_compile.passes.loop_steps import is_number


def finish_in_place(initial: Any, final: Any) -> Any:
    """Give a state that was only updated in place its final value, in the object that it started in."""
    if not isinstance(initial, torch.Tensor) or final is initial:
        return final
    initial.copy_(final)
    return initial


def apart(value: Any) -> Any:
    """The value in memory of its own, for a body that only reads it."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def turned(value: Any, name: str) -> Any:
    """`value.T` and `value.mT`: Dynamo takes these of what it knows by name to be tensors of their own."""
    if not isinstance(value, torch.Tensor) or value.dim() != 2:
        return getattr(value, name)
    return value.transpose(0, 1)


def checked_carry(new: Any, old: torch.Tensor, name: str, site: str) -> torch.Tensor:
    if not isinstance(new, torch.Tensor):
        fail("carry_not_tensor", f"{name} becomes a {type(new).__name__}", site)
    if new.dim() != old.dim() or new.dtype != old.dtype or new.device != old.device:
        fail("carry_changes", f"{name} changes its number of axes, dtype or device in a step", site)
    for before, after in zip(old.shape, new.shape, strict=True):
        if before != after:
            fail("carry_changes", f"{name} changes its shape in a step", site)
    return new.clone(memory_format=torch.contiguous_format)


def changed_states(state: tuple, new: tuple, in_place: tuple[bool, ...]) -> list:
    """The states that a step updated in place, as it found and as it left them."""
    return [s for pair in zip(state, new, in_place, strict=True) if pair[2] for s in pair[:2]]


def check_second_names(state: tuple, new: tuple, in_place: tuple, names: tuple, site: str) -> None:
    """Refuse a state that is, or is a view of, another one that later steps update in place."""
    for i, fresh in enumerate(new):
        if isinstance(fresh, torch.Tensor):
            for j, mutated in enumerate(in_place):
                for other in (state[j], new[j]):
                    if mutated and i != j and isinstance(other, torch.Tensor) and _owner(fresh) is _owner(other):
                        fail("aliased_state", f"{names[i]} may share memory with {names[j]}", site)


def check_item(item: Any, states: list, site: str) -> None:
    """Refuse a list item that a later step would change because it is, or is a view of, a state updated in place."""
    if not isinstance(item, torch.Tensor):
        fail("output_list_used", f"the loop appends a {type(item).__name__}", site)
    for state in states:
        if isinstance(state, torch.Tensor) and _owner(item) is _owner(state):
            fail("aliased_state", "the loop appends a view of a state that it updates in place", site)


def check_overlap(changed: tuple, used: tuple, site: str) -> None:
    """Refuse a change in place of what the loop also uses under another name.

    Of two arguments that share memory Dynamo tells only some: the same tensor always, a view not under every guard.
    """
    for i, o in enumerate(changed):
        if not isinstance(o, torch.Tensor):
            continue
        for x in (*used, *changed[i + 1 :]):
            if isinstance(x, torch.Tensor) and _owner(x) is _owner(o):
                fail("mutates_input", "the loop changes a tensor in place that it also uses by another name", site)


def _owner(x: torch.Tensor) -> torch.Tensor:
    return x if x._base is None else x._base


def own(carries: tuple, in_place: tuple[bool, ...]) -> tuple:
    """Clone the carries that the body updates in place; a scan may not change its inputs."""
    own = []
    for carry, mutated in zip(carries, in_place, strict=True):
        own.append(carry.clone() if mutated and isinstance(carry, torch.Tensor) else carry)
    return tuple(own)


def initial(carries: tuple, names: tuple[str, ...], site: str) -> tuple:
    initial: list = []
    for carry, name in zip(carries, names, strict=True):
        if isinstance(carry, torch.Tensor):
            if not carry.is_contiguous():
                carry = carry.contiguous()
            for other in initial:
                if other is carry:
                    carry = carry.clone()
        elif not is_number(carry):
            fail("carry_not_tensor", f"{name} starts as a {type(carry).__name__}", site)
        initial.append(carry)
    return tuple(initial)

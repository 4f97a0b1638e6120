"""Launchers of many kernels without their own Python: what a call allocates and launches is recorded, and done again.

A launcher that is `recorded` has a key of its own: the `layout` of each operand and whatever else it was called with.
For the same key it allocates the same and launches the same, in which its arguments and what it allocated stand in the
same places. No record holds a tensor.
"""

import functools
from collections.abc import Callable
from operator import itemgetter
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fla_compile.kernels.launch import Launches, Made, layout, remember, this_thread

__all__ = ["empty", "recorded"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result", bound=tuple[Tensor | None, ...])


def empty(*sizes: int, dtype: torch.dtype, device: torch.device, zeros: bool = False) -> Tensor:
    """torch.empty, or torch.zeros, as a record can do it again."""
    make = functools.partial(torch.zeros if zeros else torch.empty, *sizes, dtype=dtype, device=device)
    x = make()
    if this_thread.made is not None:
        this_thread.made.append((x, make))
    return x


class _Record:
    """What one call allocated and launched, to be done again with other arguments.

    Raises KeyError for a tensor that is neither an argument nor from `empty`.
    """

    def __init__(self, args: tuple[Any, ...], made: Made, launches: Launches, results: tuple[Any, ...]) -> None:
        tensors = [*args, *(x for x, _ in made)]
        places = {id(x): i for i, x in enumerate(tensors) if isinstance(x, Tensor)}
        # All that kernels are told, after the arguments: tensors that are allocated in their turn, numbers and None
        self.rest: list[Any] = [None] * len(made)

        def place(x: Any) -> int:
            if isinstance(x, Tensor):
                return places[id(x)]
            self.rest.append(x)
            return len(args) + len(self.rest) - 1

        told = [[*map(place, (*first, *launch.numbers))] for launch, first in launches]
        self.results = [*map(place, results)]
        makers = {i: make for i, (_, make) in enumerate(made, len(args))}
        last = {i: n for n, read in enumerate(told) for i in read if i in makers and i not in self.results}
        self.steps = []
        for n, ((launch, _), read) in enumerate(zip(launches, told, strict=True)):
            new = [(i, makers.pop(i)) for i in read if i in makers]
            self.steps.append((new, launch.run, itemgetter(*read), [i for i in last if last[i] == n]))
        self.unread = [(i, makers[i]) for i in self.results if i in makers]
        self.device = launches[0][0].device

    def __call__(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        at = [*args, *self.rest]
        with torch.cuda.device(self.device):
            for new, run, read, over in self.steps:
                for i, make in new:
                    at[i] = make()
                run(*read(at))
                for i in over:
                    at[i] = None
            for i, make in self.unread:
                at[i] = make()
        return tuple([at[i] for i in self.results])


def recorded(launcher: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`launcher`, of which a call like an earlier one does what that one allocated and launched, and nothing else.

    All that it does follows from the layouts of its tensors, its other arguments, and how torch takes products of
    float32; nothing but kernels and `empty` writes to memory. A call is not recorded where torch makes one of the
    tensors that it launches with or returns, nor where it has an argument by keyword other than None, True and False.
    """
    records: dict[tuple[Any, ...], _Record | None] = {}

    @functools.wraps(launcher)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        for value in kwargs.values():
            if value is not None and value is not True and value is not False:
                return launcher(*args, **kwargs)
        if this_thread.noted is not None or this_thread.waiting is not None:
            return launcher(*args, **kwargs)
        layouts = [layout(x) if isinstance(x, Tensor) else x for x in args]
        key = (*layouts, *kwargs.items(), torch.get_float32_matmul_precision())
        if key in records:
            record = records[key]
            return launcher(*args, **kwargs) if record is None else record(args)
        alone = tuple([x.detach() if isinstance(x, Tensor) else x for x in args])  # one tensor may be two arguments
        launches: Launches = []
        made: Made = []
        this_thread.noted, this_thread.made = launches, made
        try:
            result = launcher(*alone, **kwargs)
        finally:
            this_thread.noted = this_thread.made = None
        try:
            record = _Record(alone, made, launches, result) if launches else None
        except KeyError:
            record = None
        remember(records, key, record)
        return result

    return run

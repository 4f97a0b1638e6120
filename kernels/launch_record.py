"""Launchers of many kernels without their own Python: what a call allocates and launches is recorded, and done again.

A launcher that is `recorded` has a key of its own: the `layout` of each operand and whatever else it was called with.
For the same key it allocates the same and launches the same, in which its arguments and what it allocated stand in the
same places. Kernels are given addresses, for which Triton's launcher need not ask, and all that is small and not handed
on is allocated at once. No record holds a tensor.
"""

import contextlib
import functools
from collections.abc import Callable
from itertools import accumulate
from operator import itemgetter
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fla_compile.kernels.launch import Launches, Made, layout, remember, this_thread

__all__ = ["empty", "recorded"]

# Bytes of what is allocated together, which torch would take from one block too, and where each begins
SMALL, ALIGNED = 1 << 20, 512

_NEW: Any = object()

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result", bound=tuple[Tensor | None, ...])


def empty(*sizes: int, dtype: torch.dtype, device: torch.device, zeros: bool = False) -> Tensor:
    """torch.empty, or torch.zeros, as a record can do it again."""
    new = torch.zeros if zeros else torch.empty
    x = new(*sizes, dtype=dtype, device=device)
    if this_thread.made is not None:
        this_thread.made.append((x, functools.partial(new, *sizes, dtype=dtype, device=device), zeros))
    return x


class _Record:
    """What one call allocated and launched, to be done again with other arguments.

    Raises KeyError for a tensor that is launched with but is neither an argument nor from `empty`, and for one that is
    returned but is not from `empty`.
    """

    def __init__(self, args: tuple[Any, ...], made: Made, launches: Launches, results: tuple[Any, ...]) -> None:
        returned = [*map(id, results)]
        alone: list[tuple[Tensor, Callable[[], Tensor]]] = []
        together: list[Tensor] = []
        for x, make, zeros in made:
            if zeros or x.nbytes > SMALL or id(x) in returned:
                alone.append((x, make))
            else:
                together.append(x)
        self.operands = [i for i, x in enumerate(args) if isinstance(x, Tensor)]
        self.makers = [make for _, make in alone]
        *self.offsets, size = accumulate((-(-x.nbytes // ALIGNED) * ALIGNED for x in together), initial=0)
        self.scratch = functools.partial(
            torch.empty, size // 4, dtype=torch.float32, device=args[self.operands[0]].device
        )
        tensors = [*(args[i] for i in self.operands), *(x for x, _ in alone), *together]
        places = {id(x): i for i, x in enumerate(tensors)}
        # All that kernels are told after the addresses of these
        self.rest: list[Any] = []

        def place(x: Any) -> int:
            if isinstance(x, Tensor):
                return places[id(x)]
            self.rest.append(x)
            return len(tensors) + len(self.rest) - 1

        told = [itemgetter(*map(place, (*first, *launch.numbers))) for launch, first in launches]
        self.steps = [*zip((launch.run for launch, _ in launches), told, strict=True)]
        kept = {id(x): i for i, (x, _) in enumerate(alone)} | {id(None): len(alone)}
        self.results = [kept[i] for i in returned]
        self.device = launches[0][0].device

    def __call__(self, args: tuple[Any, ...]) -> Any:
        new: list[Any] = [make() for make in self.makers]
        scratch = self.scratch()
        start = scratch.data_ptr()
        at = [args[i].data_ptr() for i in self.operands]
        at += [x.data_ptr() for x in new]
        at += [start + offset for offset in self.offsets]
        at += self.rest
        with torch.cuda.device(self.device):
            for run, told in self.steps:
                run(*told(at))
        new.append(None)
        return tuple([new[i] for i in self.results])


def recorded(launcher: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`launcher`, of which a call like an earlier one does what that one allocated and launched, and nothing else.

    All that it does follows from the layouts of its tensors and its other arguments; nothing but kernels and `empty`
    writes to memory. A call is not recorded where torch makes one of the tensors that it launches with or returns, nor
    where it has an argument by keyword other than None, True and False.
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
        key = (*layouts, *kwargs.items())
        record = records.get(key, _NEW)
        if record is not _NEW:
            return launcher(*args, **kwargs) if record is None else record(args)
        # one tensor may be two arguments
        alone: Any = tuple([x.detach() if isinstance(x, Tensor) else x for x in args])
        launches: Launches = []
        made: Made = []
        this_thread.noted, this_thread.made = launches, made
        try:
            result = launcher(*alone, **kwargs)
        finally:
            this_thread.noted = this_thread.made = None
        record = None
        if launches and all(launch.run is not None for launch, _ in launches):
            with contextlib.suppress(KeyError):
                record = _Record(alone, made, launches, result)
        remember(records, key, record)
        return result

    return run

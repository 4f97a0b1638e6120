"""Launches of Triton kernels without Triton's look at every argument, which costs more time than most kernels take.

A launcher keeps a plan for each key: all that a compiled kernel, its grid and its numbers depend on, which is the
`layout` of every operand that it did not allocate itself (what torch allocates begins at a multiple of 16 bytes) and
whatever else it was called with. Triton compiles one way for numbers equal to 1 and another for those divisible by 16:
equal keys mean equal numbers, so what it compiled at a key's first launch is right for all that follow. No key or plan
holds a tensor.

What a call compiles first is most of its time: a launcher that is `compiled_together` has all its kernels compiled side
by side before the first of them runs. One of many launches is `recorded`: what it allocates and launches is noted for
each key of its own operands and then done again, without its Python.
"""

import functools
import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from typing import Any, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel, compiler
from triton.runtime import _async_compile

__all__ = ["MOST_PLANS", "Launch", "compiled_together", "empty", "layout", "recorded", "remember"]

# Plans of a launcher: a server has a few shapes a batch size.
MOST_PLANS = 4096

Plan = TypeVar("Plan")
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


def layout(x: Tensor | None) -> tuple[Any, ...] | None:
    """All that a launch depends on but the operand's values and place in memory."""
    return None if x is None else (x.device, x.dtype, x.shape, x.stride(), x.data_ptr() % 16 == 0)


def remember(plans: dict[Any, Plan], key: Hashable, plan: Plan) -> Plan:
    """`plan`, from now on that of `key`; all are forgotten when there are MOST_PLANS."""
    if len(plans) >= MOST_PLANS:
        plans.clear()
    plans[key] = plan
    return plan


class Launch:
    """A kernel on its device and grid: called with its first arguments, tensors, None and numbers of type float.

    `numbers` are all its other arguments in order, constants of the compilation too; options are num_warps and the
    like. The first call is Triton's; later ones go straight to what it compiled, if it did not interpret.
    """

    __slots__ = ("device", "grid", "kernel", "numbers", "options", "run")

    def __init__(
        self, kernel: Any, device: torch.device, grid: tuple[int, ...], numbers: tuple[Any, ...], **options: int
    ) -> None:
        self.kernel, self.numbers, self.options = kernel, numbers, options
        self.device = device.index if device.type == "cuda" else -1
        self.grid = (*grid, 1, 1)[:3]
        self.run: Any = None

    def __call__(self, *first: Tensor | float | None) -> None:
        """Runs on the device's current stream, inside `compiled_together` at the latest at its end."""
        waiting = _waiting.launches
        if waiting is not None and (waiting or self.run is None or _waiting.made is not None):
            waiting.append((self, first))
            return
        with torch.cuda.device(self.device):
            if self.run is not None:
                self.run(*first, *self.numbers)
                return
            compiled = self.kernel[self.grid](*first, *self.numbers, **self.options)
            if compiled is None:
                self.run = self._interpreted
            else:
                self.run = _direct(compiled, self.grid, self.device)

    def _interpreted(self, *args: Any) -> None:
        self.kernel[self.grid](*args, **self.options)

    def compile(self, *first: Tensor | float | None) -> None:
        with torch.cuda.device(self.device):
            self.kernel.warmup(*first, *self.numbers, grid=self.grid, **self.options)


def _direct(compiled: Any, grid: tuple[int, ...], device: int) -> Callable[..., None]:
    """`compiled[grid]`; where nobody listens to launches, without what Triton collects for those who do."""
    watched = compiled[grid]
    if not isinstance(compiled, CompiledKernel):
        return watched
    launch, function, packed, runtime = compiled.run, compiled.function, compiled.packed_metadata, knobs.runtime
    stream_of = compiler.driver.active.get_current_stream

    def run(*args: Any) -> None:
        # A chain of hooks, or one function that was put in its place
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            watched(*args)
        else:
            launch(*grid, stream_of(device), function, packed, None, None, None, *args)

    return run


Launches = list[tuple[Launch, tuple[Tensor | float | None, ...]]]


Made = list[tuple[Tensor, Callable[[], Tensor]]]


class _Waiting(threading.local):
    launches: Launches | None = None
    made: Made | None = None  # where a call is recorded, what it allocated and how


_waiting = _Waiting()


def compiled_together(launcher: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`launcher`; where it meets a kernel that is not compiled, that and all later launches wait for its end.

    It must not read, by torch operations or on the host, what a launch of its own writes.
    """

    @functools.wraps(launcher)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if _waiting.launches is not None:
            return launcher(*args, **kwargs)
        launches: Launches = []
        _waiting.launches = launches
        try:
            result = launcher(*args, **kwargs)
        finally:
            _waiting.launches = None
        if launches:
            _run(launches)
        return result

    return run


def _run(launches: Launches) -> None:
    new = {launch: first for launch, first in launches if launch.run is None}
    # Triton has one such mode at a time, and a caller's serves as well
    if len(new) > 1 and _async_compile.active_mode.get() is None:
        with ThreadPoolExecutor(min(len(new), os.cpu_count() or 1)) as pool, triton.AsyncCompileMode(pool):
            for launch, first in new.items():
                launch.compile(*first)
    for launch, first in launches:
        launch(*first)


def empty(*sizes: int, dtype: torch.dtype, device: torch.device, zeros: bool = False) -> Tensor:
    """torch.empty, or torch.zeros; where a launcher that is `recorded` takes its memory from."""
    make = functools.partial(torch.zeros if zeros else torch.empty, *sizes, dtype=dtype, device=device)
    x = make()
    if _waiting.made is not None:
        _waiting.made.append((x, make))
    return x


class _Call:
    """What a launcher allocated and launched, done again for other arguments of the same key."""

    def __init__(self, args: tuple[Any, ...], made: Made, launches: Launches, results: tuple[Tensor | None, ...]) -> None:
        self.device = launches[0][0].device
        tensors = *args, *(x for x, _ in made)
        places = {id(x): i for i, x in enumerate(tensors) if isinstance(x, Tensor)}
        # after the arguments: what is made, None until then, and whatever else is told to a kernel
        self.rest: list[Any] = [None] * len(made)

        def place(x: Tensor | float | None) -> int:
            if isinstance(x, Tensor):
                return places[id(x)]
            self.rest.append(x)
            return len(args) + len(self.rest) - 1

        taken = [[*map(place, first)] for _, first in launches]
        self.results = [*map(place, results)]
        waiting = {len(args) + i: make for i, (_, make) in enumerate(made)}
        uses = [*taken, self.results]
        last = {i: n for n, places_of in enumerate(uses) for i in places_of if i in waiting}
        new = [[(i, waiting.pop(i)) for i in dict.fromkeys(places_of) if i in waiting] for places_of in uses]
        self.left = new.pop()
        over = [[i for i, n in last.items() if n == step] for step in range(len(launches))]
        runs = [(launch.run, launch.numbers) for launch, _ in launches]
        self.steps = [*zip(new, runs, map(_taker, taken), over, strict=True)]

    def __call__(self, args: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
        at = [*args, *self.rest]
        with torch.cuda.device(self.device):
            for new, (run, numbers), take, over in self.steps:
                for i, make in new:
                    at[i] = make()
                run(*take(at), *numbers)
                for i in over:
                    at[i] = None
            for i, make in self.left:
                at[i] = make()
        return tuple([at[i] for i in self.results])


def _taker(places: list[int]) -> Callable[[list[Any]], tuple[Any, ...]]:
    return itemgetter(*places) if len(places) > 1 else lambda at: tuple(at[i] for i in places)


def recorded(
    launcher: Callable[Arguments, tuple[Tensor | None, ...]],
) -> Callable[Arguments, tuple[Tensor | None, ...]]:
    """`launcher`, `compiled_together` and, for arguments like those of an earlier call, no more than its launches.

    Its arguments are tensors and what they are launched by; it takes all memory from `empty`, gives tensors to kernels
    whole, does nothing else to them, and returns new ones. A call with an argument by keyword is not recorded.
    """
    together = compiled_together(launcher)
    calls: dict[tuple[Any, ...], _Call] = {}

    @functools.wraps(launcher)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> tuple[Tensor | None, ...]:
        if kwargs or _waiting.launches is not None:
            return together(*args, **kwargs)
        key = tuple([layout(x) if isinstance(x, Tensor) else x for x in args])
        call = calls.get(key)
        if call is not None:
            return call(args)
        alone = tuple([x.detach() if isinstance(x, Tensor) else x for x in args])  # one tensor may be two arguments
        launches: Launches = []
        made: Made = []
        _waiting.launches, _waiting.made = launches, made
        try:
            results = launcher(*alone)
        finally:
            _waiting.launches = _waiting.made = None
        _run(launches)
        remember(calls, key, _Call(alone, made, launches, results))
        return results

    return run

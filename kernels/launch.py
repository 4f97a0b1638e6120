"""Launches of Triton kernels without Triton's look at every argument, which costs more time than most kernels take.

A launcher keeps a plan for each key: all that a compiled kernel, its grid and its numbers depend on, which is the
`layout` of every operand that it did not allocate itself (what torch allocates begins at a multiple of 16 bytes) and
whatever else it was called with. Triton compiles one way for numbers equal to 1 and another for those divisible by 16:
equal keys mean equal numbers, so what it compiled at a key's first launch is right for all that follow. No key or plan
holds a tensor.

What a call compiles first is most of its time: a launcher that is `compiled_together` has all its kernels compiled side
by side before the first of them runs.
"""

import functools
import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel, compiler
from triton.runtime import _async_compile

from fla_compile.kernels.library_hash import wait_for_hash

__all__ = [
    "MOST_PLANS",
    "Launch",
    "Launches",
    "Made",
    "compiled_together",
    "contiguous",
    "layout",
    "multiprocessors",
    "remember",
    "this_thread",
]

# Plans of a launcher: a server has a few shapes a batch size.
MOST_PLANS = 4096

Plan = TypeVar("Plan")
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


def layout(x: Tensor | None) -> tuple[Any, ...] | None:
    """All that a launch depends on but the operand's values and place in memory."""
    return None if x is None else (x.device, x.dtype, x.shape, x.stride(), x.data_ptr() % 16 == 0)


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """Those of a GPU; of an H100, where the interpreter stands in for a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def remember(plans: dict[Any, Plan], key: Hashable, plan: Plan) -> Plan:
    """`plan`, from now on that of `key`; all are forgotten when there are MOST_PLANS."""
    if len(plans) >= MOST_PLANS:
        plans.clear()
    plans[key] = plan
    return plan


class Launch:
    """A kernel on its device and grid: called with its first arguments, tensors, None and numbers of type float.

    `numbers` are all its other arguments in order, constants of the compilation too; options are num_warps and the
    like. The first call is Triton's; if it compiled, not interpreted, later ones go straight to what it compiled.
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
        waiting = this_thread.waiting
        if waiting is not None and (waiting or self.run is None):
            waiting.append((self, first))
            return
        if this_thread.noted is not None:
            this_thread.noted.append((self, first))
        with torch.cuda.device(self.device):
            if self.run is not None:
                self.run(*first, *self.numbers)
                return
            wait_for_hash()
            compiled = self.kernel[self.grid](*first, *self.numbers, **self.options)
            if isinstance(compiled, _async_compile.FutureKernel):  # in a mode of the caller's
                compiled = compiled.result()
            if compiled is not None:
                self.run = _direct(compiled, self.grid, self.device)

    def compile(self, *first: Tensor | float | None) -> None:
        wait_for_hash()
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
# What was allocated, how it is done again, and whether with zeros
Made = list[tuple[Tensor, Callable[[], Tensor], bool]]


class _Thread(threading.local):
    waiting: Launches | None = None  # until all are compiled
    # What a call launches, and the memory that it takes, where `launch_record` asks for it
    noted: Launches | None = None
    made: Made | None = None


this_thread = _Thread()


def compiled_together(launcher: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`launcher`; where it meets a kernel that is not compiled, that and all later launches wait for its end.

    It must not read, by torch operations or on the host, what a launch of its own writes.
    """

    @functools.wraps(launcher)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if this_thread.waiting is not None:
            return launcher(*args, **kwargs)
        launches: Launches = []
        this_thread.waiting = launches
        try:
            result = launcher(*args, **kwargs)
        finally:
            this_thread.waiting = None
        if launches:
            _run(launches)
        return result

    return run


def _run(launches: Launches) -> None:
    new = {launch: first for launch, first in launches if launch.run is None}
    # Triton has one such mode at a time: in a caller's, each is waited for
    if len(new) > 1 and _async_compile.active_mode.get() is None:
        try:
            with ThreadPoolExecutor(min(len(new), os.cpu_count() or 1)) as pool, triton.AsyncCompileMode(pool):
                for launch, first in new.items():
                    launch.compile(*first)
        except BaseException:
            # Triton's mode would stay active with a pool that is shut down, and kernels keep what nobody waited for
            _async_compile.active_mode.set(None)
            for launch in new:
                for cache, *_ in getattr(launch.kernel, "device_caches", {}).values():
                    for key in [key for key, made in cache.items() if isinstance(made, _async_compile.FutureKernel)]:
                        del cache[key]
            raise
    for launch, first in launches:
        launch(*first)

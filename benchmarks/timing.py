"""Milliseconds of small operations, forward and with backward, on CUDA or the CPU, and of the bytes they must move."""

import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

BYTES_PER_MS = 3.0e9  # an H100's measured copy: read plus written


def milliseconds(f: Callable[[], Any], device: str) -> float:
    """Median of a call."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(f, return_mode="median"))
    times: list[float] = []
    f()
    while sum(times) < 1.0 or len(times) < 5:
        start = time.perf_counter()
        f()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]


def kernel_milliseconds(f: Callable[[], Any], repeats: int = 10) -> float:
    """What the kernels of a call take on the GPU, without the launches that it may wait for; L2 is not emptied."""
    from torch.profiler import ProfilerActivity, profile

    f()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            f()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profiler.key_averages()) / repeats / 1e3


def measure(
    f: Callable[..., Tensor | tuple[Tensor, ...]], leaves: Sequence[Tensor], dout: Tensor | Sequence[Tensor]
) -> dict[str, Any]:
    """Forward without gradients, what it keeps with them, forward with backward; or the message of what `f` raised.

    `dout` is the gradient of `f`'s result, of each where there are several. "ms" are of calls, "kernels ms" of forward
    and backward on the GPU alone.
    """
    device, found = leaves[0].device.type, dict[str, Any]()

    def both() -> None:
        torch.autograd.grad(f(*leaves), leaves, dout)

    try:
        with torch.no_grad():
            found["fwd ms"] = milliseconds(lambda: f(*leaves), device)
        both()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out = f(*leaves)
            own = _bytes([out] if isinstance(out, Tensor) else out)
            found["kept MiB"] = (torch.cuda.memory_allocated() - before - own) / 2**20
            del out
        found["fwd+bwd ms"] = milliseconds(both, device)
        if device == "cuda":
            found["kernels ms"] = kernel_milliseconds(both)
    except Exception as error:  # a peer's refusal is a result
        found["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    return found


def floors(leaves: Sequence[Tensor], out: Tensor | Sequence[Tensor], *, keeps: bool = True) -> dict[str, float]:
    """Milliseconds to copy what must move; backward reads the operands only if it `keeps` them."""
    read, written = _bytes(leaves), _bytes([out] if isinstance(out, Tensor) else out)
    both = (3 if keeps else 2) * read + 2 * written
    return {"floor fwd": (read + written) / BYTES_PER_MS, "floor fwd+bwd": both / BYTES_PER_MS}


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def peer(module: str, name: str) -> Callable | None:
    """A function of another library, or None where that is not installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None

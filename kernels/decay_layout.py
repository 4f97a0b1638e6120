"""Slabs of a call, cut into chunks of C steps, and the memory that one slab after another is worked on in."""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

CHUNK = 64

# Elements of one operand that are worked on together: a slab and its temporaries should stay in cache.
SLAB = 1 << 18

# Largest workspace, in bytes, that a thread keeps from call to call, so that its pages are not faulted in again.
KEPT = 1 << 26

P = ParamSpec("P")
R = TypeVar("R")

_kept = threading.local()


class Workspace:
    """Named blocks of `size` elements in one allocation, which slab after slab is worked on in."""

    def __init__(self, names: Sequence[str], size: int, like: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        memory = _memory(len(names) * size * dtype.itemsize, like.device).view(dtype).view(len(names), size)
        self._blocks = dict(zip(names, memory.unbind(0), strict=True))

    def __call__(self, name: str, shape: Sequence[int]) -> Tensor:
        size = 1
        for n in shape:
            size *= n
        return self._blocks[name][:size].view(*shape)


def _memory(size: int, device: torch.device) -> Tensor:
    if device.type != "cpu" or size > KEPT:
        return torch.empty(size, dtype=torch.uint8, device=device)
    kept: Tensor | None = getattr(_kept, "memory", None)
    if kept is None or kept.numel() < size:
        with torch.inference_mode(False):  # or it could not be written to outside of inference mode
            kept = _kept.memory = torch.empty(size, dtype=torch.uint8)
    return kept[:size]


def without_autocast(kernel: Callable[P, R]) -> Callable[P, R]:
    """Keep autocast out of a kernel whose first argument is a tensor: it would round every product inside."""

    @functools.wraps(kernel)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast(args[0].device.type, enabled=False):  # type: ignore[attr-defined]
            return kernel(*args, **kwargs)

    return run


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_size(T: int) -> int:
    C = 2  # a chunk of one row has no halves
    while C < min(T, CHUNK):
        C *= 2
    return C


def slab_sizes(B: int, H: int, elements: int) -> tuple[int, int]:
    """Sequences and heads of a slab, of `elements` each: whole sequences, which lie together in memory, if they fit."""
    b = max(1, min(B, SLAB // max(1, elements * H)))
    return b, H if b > 1 else max(1, min(H, SLAB // max(1, elements)))


def slabs(B: int, H: int, elements: int) -> Iterator[tuple[tuple[slice, slice, slice], tuple[slice, slice]]]:
    """Indices into [B, T, H, ...] and [B, H, ...], for about SLAB elements at a time."""
    b, h = slab_sizes(B, H, elements)
    for i in range(0, B, b):
        for j in range(0, H, h):
            rows, heads = slice(i, i + b), slice(j, j + h)
            yield (rows, slice(None), heads), (rows, heads)


def take(x: Tensor, rows: tuple[slice, slice, slice], heads: int) -> Tensor:
    """x[rows] as if x [B, T, H, K] had as many heads, where neighbours may share those that it has."""
    share = heads // x.shape[2]
    if share == 1:
        return x[rows]
    batch, steps, wanted = rows
    first, last = wanted.start // share, -(-min(wanted.stop, heads) // share)
    spread = x[batch, steps, first:last].repeat_interleave(share, 2)
    return spread[:, :, wanted.start - first * share : wanted.stop - first * share]


def gate_rows(g: Tensor | None, B: int, T: int) -> Tensor | None:
    """g as [B, T, H, K or 1]."""
    if g is None or g.ndim == 4:
        return g
    return (g.expand(B, T, -1) if g.ndim == 1 else g).unsqueeze(-1)


def cut(x: Tensor, C: int, work: Workspace, name: str) -> Tensor:
    """[B, T, H, K] -> [B, H, NT, C, K], the last chunk filled with zeros: gates of one, keys of zero.

    A view of x, not contiguous and never to be written to, where x has the workspace's dtype and C divides T.
    """
    B, T, H, K = x.shape
    full, rest = T // C, T % C
    chunks = x[:, : full * C].unflatten(1, (full, C)).permute(0, 3, 1, 2, 4) if full else x
    if not rest and x.dtype == work.dtype:
        return chunks
    y = work(name, (B, H, full + (rest > 0), C, K))
    if full:
        y[:, :, :full].copy_(chunks)
    if rest:
        y[:, :, full, :rest].copy_(x[:, full * C :].transpose(1, 2))
        y[:, :, full, rest:].zero_()
    return y


def paste(x: Tensor, y: Tensor, factor: Tensor | None = None) -> None:
    """x [B, H, NT, C, K], times factor [B, H, NT, C, K or 1], into y [B, T, H, K]; what lies beyond T is dropped."""
    T, C = y.shape[1], x.shape[3]
    full, rest = T // C, T % C
    if full:
        whole = y[:, : full * C].unflatten(1, (full, C)).permute(0, 3, 1, 2, 4)
        _move(x[:, :, :full], None if factor is None else factor[:, :, :full], whole)
    if rest:
        last = None if factor is None else factor[:, :, full, :rest]
        _move(x[:, :, full, :rest], last, y[:, full * C :].transpose(1, 2))


def _move(x: Tensor, factor: Tensor | None, y: Tensor) -> None:
    if factor is None:
        y.copy_(x)
    else:
        torch.mul(x, factor, out=y)


def to_chunks(x: Tensor, C: int, dtype: torch.dtype) -> Tensor:
    """[B, T, H, K] -> [NT, B, H, C, K], contiguous, the last chunk filled with zeros: gates of one, keys of zero."""
    B, T, H, K = x.shape
    full, rest = T // C, T % C
    y = torch.empty((full + (rest > 0), B, H, C, K), dtype=dtype, device=x.device)
    if full:
        y[:full].copy_(x[:, : full * C].unflatten(1, (full, C)).permute(1, 0, 3, 2, 4))
    if rest:
        y[full, :, :, :rest].copy_(x[:, full * C :].transpose(1, 2))
        y[full, :, :, rest:].zero_()
    return y


def from_chunks(x: Tensor, y: Tensor) -> None:
    """[NT, B, H, C, K] into y [B, T, H, K]; what lies beyond T is dropped."""
    paste(x.permute(1, 2, 0, 3, 4), y)

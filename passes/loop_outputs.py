"""Lists that a lifted loop filled: stacked tensors in place of T items, and what may be done with them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fla_compile.passes.loop_refusal import fail
from fla_compile.passes.loop_steps import progression


class TimeList(NamedTuple):
    """A list that the loop filled: runs of steps, each with one stacked tensor `[T, ...]` for each item of a step.

    `backwards` if the list holds the last item first.
    """

    runs: tuple[tuple[torch.Tensor, ...], ...]
    backwards: bool = False


def time_list(runs: tuple, front: bool) -> TimeList:
    """Wrap the stacked items of a list that was filled at its end, or at its `front`; with no steps it is empty."""
    # What a step puts at the front comes in the order of the list: the last one first.
    return TimeList(tuple([run[::-1] for run in runs]), True) if front else TimeList(tuple(runs))


def place_list(initial: Any, runs: tuple, bounds: tuple, at: Callable, site: str) -> Any:
    """Wrap the items that `outs[at(t)] = y` put into a list of a given length; they must fill it in order."""
    if len(runs) == 0:
        return initial
    first, stride, _ = progression(bounds, site, at)
    count = sum([run[0].shape[0] for run in runs])
    if not isinstance(initial, list) or len(initial) != count:
        fail("output_list_used", "the loop does not fill the whole list", site)
    if stride == 1 and first == 0:
        return TimeList(tuple(runs))
    if stride == -1 and first == count - 1:
        return TimeList(tuple(runs), True)
    return fail("output_list_used", "the loop does not fill the list in order", site)


def _items(items: TimeList, site: str) -> torch.Tensor:
    """All items in the order of the list: `[T * items of a step, ...]`."""
    runs = []
    for streams in items.runs:
        for stream in streams[1:]:
            if stream.shape != streams[0].shape:
                fail("output_list_used", "the items of the list differ in shape", site)
        if len(streams) == 1:
            runs.append(streams[0])
        elif len(streams) > 1:
            runs.append(torch.stack(streams, 1).flatten(0, 1))
    for run in runs[1:]:
        if run.shape[1:] != runs[0].shape[1:] or run.dtype != runs[0].dtype:
            fail("output_list_used", "the items of the list differ in shape or dtype", site)
    whole = runs[0] if len(runs) == 1 else torch.cat(runs)
    return whole.flip(0) if items.backwards else whole


def stack_time(ys: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """`torch.stack(list, dim)` of the items `ys[0], ys[1], ...`."""
    return (ys.movedim(0, dim) if dim else ys).contiguous()


def cat_time(ys: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """`torch.cat(list, dim)` of the items `ys[0], ys[1], ...`."""
    dim = dim if dim >= 0 else dim + ys.dim() - 1
    return (ys.movedim(0, dim) if dim else ys).flatten(dim, dim + 1).contiguous()


def over_time(join: Callable, items: Any, *args: Any, site: str, **kwargs: Any) -> torch.Tensor:
    """`join(items, ...)` for `torch.stack` and its like, where `items` may come from a lifted loop."""
    if not isinstance(items, TimeList):
        return join(items, *args, **kwargs)
    if len_time(items) == 0:
        return join([], *args, **kwargs)
    if "axis" in kwargs and "dim" not in kwargs:
        kwargs = {("dim" if key == "axis" else key): value for key, value in kwargs.items()}
    if join in (torch.cat, torch.concat, torch.concatenate) and len(items.runs) > 1 and not items.backwards:
        return _cat_runs(items, *args, site=site, **kwargs)
    ys = _items(items, site)
    axes = ys.dim() - 1
    if join is torch.stack:
        return stack_time(ys, *args, **kwargs)
    if join is torch.cat or join is torch.concat or join is torch.concatenate:
        if axes == 0:
            fail("output_list_used", "cat of tensors without axes", site)
        return cat_time(ys, *args, **kwargs)
    if (join is torch.vstack or join is torch.hstack) and len(args) == 0 and len(kwargs) == 0 and axes > 0:
        if axes == 1:
            return stack_time(ys) if join is torch.vstack else cat_time(ys)
        return cat_time(ys, 0 if join is torch.vstack else 1)
    if getattr(join, "__name__", "") == "rearrange" and (join.__module__ or "").startswith("einops"):
        return join(ys, *args, **kwargs)
    return fail("output_list_used", "the list goes to something other than stack or cat", site)


def _cat_runs(items: TimeList, dim: int = 0, *, site: str) -> torch.Tensor:
    """`torch.cat(list, dim)` of items that may be shorter in the first or last step."""
    parts = []
    for streams in items.runs:
        if len(streams) > 0:
            ys = _items(TimeList((streams,)), site)
            if ys.dim() == 1:
                fail("output_list_used", "cat of tensors without axes", site)
            parts.append(cat_time(ys, dim))
    return torch.cat(parts, dim)


def grow(items: TimeList, o: torch.Tensor, dim: int, site: str) -> torch.Tensor:
    """The result of `o = torch.cat([o, y], dim)` in every step."""
    if len_time(items) == 0:
        return o
    if not isinstance(o, torch.Tensor) or o.dim() != items.runs[0][0].dim() - 1:
        fail("carry_not_tensor", "what grows by cat does not start as a tensor of as many axes", site)
    return torch.cat([o, over_time(torch.cat, items, dim, site=site)], dim)


def len_time(items: Any) -> int:
    """`len(items)`, where `items` may come from a lifted loop."""
    if not isinstance(items, TimeList):
        return len(items)
    return sum([len(streams) * streams[0].shape[0] for streams in items.runs if len(streams) > 0])


def backwards(items: Any) -> Any:
    """`items[::-1]`, where `items` may come from a lifted loop."""
    return TimeList(items.runs, not items.backwards) if isinstance(items, TimeList) else items[::-1]


def as_list(items: Any) -> Any:
    """`list(items)`, where `items` may come from a lifted loop."""
    return items if isinstance(items, TimeList) else list(items)


def item_time(items: Any, i: int, site: str) -> Any:
    """`items[i]`, where `items` may come from a lifted loop."""
    if not isinstance(items, TimeList):
        return items[i]
    if not -len_time(items) <= i < len_time(items):
        return [][i]
    last = items.runs[-1 if (i < 0) != items.backwards else 0]
    if len(last) == 1 and i in (-1, 0):
        return last[0][-1 if (i < 0) != items.backwards else 0]
    return _items(items, site)[i]

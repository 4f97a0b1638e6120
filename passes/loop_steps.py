"""What the steps of a lifted loop are: indices, the slices of a tensor that they pick, and numbers that they decide.

Step k of `range(start, stop, step)` has the index start + k step, and every entry that is affine in the index is
again such a progression: (first, stride, width) says that step k is `first + k stride`, or the slice of `width`
entries from there (None: no slice). All of a loop's slices are then one view with time first, [T, ...].
"""

import operator
from collections.abc import Callable
from typing import Any

import torch

from fla_compile.passes.loop_refusal import fail

# A loop of up to so many steps over windows that overlap is a convolution over its taps: left as it is written.
MOST_TAPS = 8

HOLDS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def is_integer(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def count_steps(start: int, stop: int, step: int) -> int:
    """`len(range(start, stop, step))`, negative where that is 0."""
    if step == 1:
        return stop - start
    if step > 0:
        return (stop - start + step - 1) // step
    return (start - stop - step - 1) // -step


def at_least_none(count: int) -> int:
    """The number of rounds of a loop that may not run at all."""
    return count if count > 0 else 0


def are_tensors(*values: Any) -> bool:
    """Whether a loop over these runs over the first axes of tensors."""
    return all([isinstance(value, torch.Tensor) for value in values])


def shortest(*counts: int, strict: bool, site: str) -> int:
    """How often `zip` goes round; with `strict` all must be as long."""
    least = counts[0]
    for count in counts[1:]:
        if strict and count != least:
            fail("index_range", "zip takes sequences of different lengths", site)
        if count < least:
            least = count
    return least


def chunk_width(x: torch.Tensor, parts: Any, axis: int, split: bool, site: str) -> int:
    """The width of each slice of `x.split(parts, axis)` or `x.chunk(parts, axis)`, where all are alike."""
    if not is_integer(parts):
        fail("index_range", "the loop runs over pieces of different sizes", site)
    size = x.shape[axis]
    width = parts if split else size // parts
    if parts <= 0 or width == 0 or (not split and size % parts != 0):
        fail("index_range", f"an axis of {size} steps does not fall into equal pieces of {width}", site)
    return width


def progression(bounds: tuple, site: str, at: Callable | None = None, end: Callable | None = None, *_: Any) -> tuple:
    """(first, stride, width) of the entry `at(index)`, or of the slice `at(index) : end(index)`."""
    start, _, step = bounds
    if at is None:
        return start, step, None
    first, following = at(start), at(start + step)
    if not is_integer(first) or not is_integer(following):
        fail("loop_index_used", f"an entry computed from the index is a {type(first).__name__}", site)
    if end is None:
        return first, following - first, None
    width = end(start) - first
    if not is_integer(width) or end(start + step) - following != width or width <= 0:
        fail("loop_index_used", "a slice changes its width from step to step", site)
    return first, following - first, width


def stays_inside(x: torch.Tensor, axis: int, steps: tuple, begin: int, count: int) -> bool:
    """Whether `count` steps from the `begin`th on lie on the axis, counted from its front."""
    first, stride, width = steps
    low, high = first + begin * stride, first + (begin + count - 1) * stride
    if stride < 0:
        low, high = high, low
    return low >= 0 and high + (1 if width is None else width) <= x.shape[axis]


def check_axis(x: Any, axis: int, site: str) -> None:
    """Refuse what is no tensor with this axis."""
    if not isinstance(x, torch.Tensor):
        fail("not_a_tensor", f"the loop indexes a {type(x).__name__} by time", site)
    if axis >= x.dim() or axis < -x.dim():
        fail("index_axis", f"time is axis {axis} of a tensor with {x.dim()} axes", site)


def time_first(x: Any, axis: int, steps: tuple, begin: int, count: int, site: str) -> torch.Tensor:
    """Return `count` steps of `x` from the `begin`th on, [count, ...]: a view, unless they run from right to left."""
    check_axis(x, axis, site)
    axis = axis if axis >= 0 else axis + x.dim()
    first, stride, width = steps
    if stride == 1 and width is None:
        first = first + begin
        if axis != 0:
            x = x.movedim(axis, 0)
        if first == 0 and count == x.shape[0]:
            return x
        if first < 0 or first + count > x.shape[0]:
            fail("index_range", "the loop leaves the time axis of a tensor it reads or writes", site)
        return x.narrow(0, first, count)
    if not stays_inside(x, axis, steps, begin, count):
        fail("index_range", "the loop leaves the time axis of a tensor it reads or writes", site)
    if stride == 0:
        fail("loop_index_used", "every step picks the same entry", site)
    gap = stride if stride > 0 else -stride
    low = first + (begin if stride > 0 else begin + count - 1) * stride
    if width is None:
        x = x.movedim(axis, 0)[low : low + (count - 1) * gap + 1 : gap]
    elif gap == width:
        x = x.narrow(axis, low, count * width).unflatten(axis, (count, width)).movedim(axis, 0)
    else:
        if gap < width and count <= MOST_TAPS and count < width:
            fail("taps", "a few steps read windows that overlap", site)
        x = x.narrow(axis, low, (count - 1) * gap + width).unfold(axis, width, gap).movedim((axis, -1), (0, axis + 1))
    return x if stride > 0 else x.flip(0)


def check_limit(x: Any, axis: int, site: str, *entry: Callable) -> None:
    """Refuse a slice `at : min(end, limit)` that the axis alone would not cut as short."""
    if len(entry) > 2 and entry[2](0) != x.shape[axis]:
        fail("index_range", "a slice is cut short before the end of the axis", site)


def one_step(x: Any, axis: int, steps: tuple, k: int, site: str) -> torch.Tensor | None:
    """Return step k of `x` as the loop's own subscript gives it, None where that would raise."""
    check_axis(x, axis, site)
    first, stride, width = steps
    place, size = first + k * stride, x.shape[axis]
    if width is None:
        return x.select(axis, place) if -size <= place and place < size else None
    around = axis if axis >= 0 else axis + x.dim()
    return x[(*[slice(None)] * around, slice(place, place + width))]


def one_axis(entry: Any, site: str) -> Any:
    """Return an index entry that stands before the time index, after checking that it takes up exactly one axis."""
    if isinstance(entry, torch.Tensor):
        if entry.dtype in (torch.bool, torch.uint8):
            fail("index_axis", "a mask stands beside the time index", site)
    elif entry is None or entry is Ellipsis or isinstance(entry, bool):
        fail("index_axis", f"{entry} stands beside the time index", site)
    return entry


def write_time(o: Any, axis: int, rest: tuple, bounds: tuple, pieces: tuple, site: str, *entry: Callable) -> None:
    """Do all of `o[..., t, ...] = y`: `rest` is the index without its time entry, `entry` the time entry's functions.

    `pieces` are pairs (begin, ys) of values `[T, ...]` for consecutive steps.
    """
    steps = progression(bounds, site, *entry)
    check_limit(o, axis, site, *entry)
    width, gap = steps[2], steps[1] if steps[1] > 0 else -steps[1]
    if width is not None and gap < width:
        fail("reads_own_output", "steps write to the same place", site)
    for begin, ys in pieces:
        first, count = steps[0] + begin * steps[1], ys.shape[0]
        if steps[1] < 0:
            # What runs from right to left is written from left to right: only so is the place a view.
            first, ys = first + (count - 1) * steps[1], ys.flip(0)
        if width is not None and count == 1 and isinstance(o, torch.Tensor):
            view = one_step(o, axis, (first, gap, width), 0, site).unsqueeze(0)  # type: ignore[union-attr]
        else:
            view = time_first(o, axis, (first, gap, width), 0, count, site)
        if rest:
            view = view[(slice(None), *rest)]
        extra = ys.dim() - view.dim()
        if extra > 0:
            # As in a plain assignment, surplus leading axes must have size 1.
            for size in ys.shape[1 : 1 + extra]:
                if size != 1:
                    fail("unsupported_target", "the value has more axes than the place it is written to", site)
            ys = ys.reshape(ys.shape[0], *ys.shape[1 + extra :])
        for _ in range(-extra):
            ys = ys.unsqueeze(1)
        view.copy_(ys)

"""What a twin calls in place of a time loop: plain Python over torch, so that Dynamo inlines it.

    for t in range(start, stop):            reads = ((q, 1), (k, 1))
        S = S * a + k[:, t]          ->     (S,), writes, _ = run_loop(body, start, stop, (S,), reads, ...)
        o[:, t] = q[:, t] * S               write_time(o, 1, (), start, stop, writes[0], site)

Legal because `body` is the user's own loop body, run once per step in the same order by one `scan`, on the same slices.
The facts that only the values can tell are checked here, while Dynamo traces: a read that is no tensor, a state that
changes its shape or dtype, an index outside its axis. Each raises `NotLiftable`; the loop is then traced as written.
A state that a helper changes in place, and outputs that alias the state, make `scan` itself refuse in Dynamo.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch._higher_order_ops.scan import scan


class NotLiftable(Exception):
    """Raised while a twin is traced; `args` are the reason, a detail and the loop's "path/file.py:LINE"."""


_told: list[tuple[str, str, str]] = []


@torch._dynamo.assume_constant_result
def _tell(reason: str, detail: str, site: str) -> bool:
    """Dynamo runs this for real while it traces; of an exception that the traced program raises it keeps little."""
    _told.append((reason, detail, site))
    return True


def not_liftable(error: BaseException) -> tuple[str, str, str] | None:
    """Return (reason, detail, site) if a `NotLiftable` is behind this error of Dynamo's, else None."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, NotLiftable):
            return seen.args[0], seen.args[1], seen.args[2]
        if "NotLiftable" in f"{type(seen).__name__} {seen}":
            return _told[-1] if _told else None
        seen = seen.__cause__ or seen.__context__
    return None


class TimeList(NamedTuple):
    """A list that the loop appended to: one stacked tensor `[T, ...]` for each append of a step."""

    streams: tuple[torch.Tensor, ...]
    steps: int


def _fail(reason: str, detail: str, site: str) -> NoReturn:
    _tell(reason, detail, site)
    raise NotLiftable(reason, detail, site)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def time_first(x: Any, axis: int, start: int, stop: int, site: str) -> torch.Tensor:
    """Return `x` with its time axis first, restricted to steps start to stop; a view."""
    if not isinstance(x, torch.Tensor):
        _fail("not_a_tensor", f"the loop indexes a {type(x).__name__} by time", site)
    if axis >= x.dim() or axis < -x.dim():
        _fail("index_axis", f"time is axis {axis} of a tensor with {x.dim()} axes", site)
    if axis != 0 and axis != -x.dim():
        x = x.movedim(axis, 0)
    if start == 0 and stop == x.shape[0]:
        return x
    if start < 0 or stop > x.shape[0]:
        _fail("index_range", "the loop leaves the time axis of a tensor it reads or writes", site)
    return x.narrow(0, start, stop - start)


def one_axis(entry: Any, site: str) -> Any:
    """Return an index entry that stands before the time index, after checking that it takes up exactly one axis."""
    if isinstance(entry, torch.Tensor):
        if entry.dtype in (torch.bool, torch.uint8):
            _fail("index_axis", "a mask stands beside the time index", site)
    elif entry is None or entry is Ellipsis or isinstance(entry, bool):
        _fail("index_axis", f"{entry} stands beside the time index", site)
    return entry


def snapshot(value: Any, o: torch.Tensor) -> torch.Tensor:
    """Return what `o[:, t] = value` stores, unaffected by later in-place updates of `value`."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return torch.full((), value, dtype=o.dtype, device=o.device)


def _checked_carry(new: Any, old: torch.Tensor, name: str, site: str) -> torch.Tensor:
    if not isinstance(new, torch.Tensor):
        _fail("carry_not_tensor", f"{name} becomes a {type(new).__name__}", site)
    if new.dim() != old.dim() or new.dtype != old.dtype or new.device != old.device:
        _fail("carry_changes", f"{name} changes its number of axes, dtype or device in a step", site)
    for before, after in zip(old.shape, new.shape, strict=True):
        if before != after:
            _fail("carry_changes", f"{name} changes its shape in a step", site)
    return new.clone(memory_format=torch.contiguous_format)


def _check_item(item: Any, states: list[torch.Tensor], site: str) -> None:
    """Refuse a list item that a later step would change because it is, or is a view of, a state updated in place."""
    if not isinstance(item, torch.Tensor):
        _fail("output_list_used", f"the loop appends a {type(item).__name__}", site)
    for state in states:
        if item is state or item._base is state or (item._base is not None and item._base is state._base):
            _fail("aliased_state", "the loop appends a view of a state that it updates in place", site)


def _check_overlap(changed: tuple, used: tuple, site: str) -> None:
    """Refuse a change in place of what the loop also uses under another name.

    Of two arguments that share memory Dynamo tells only some: the same tensor always, a view not under every guard.
    """
    for i, o in enumerate(changed):
        if not isinstance(o, torch.Tensor):
            continue
        for x in (*used, *changed[i + 1 :]):
            if isinstance(x, torch.Tensor) and _owner(x) is _owner(o):
                _fail("mutates_input", "the loop changes a tensor in place that it also uses by another name", site)


def _owner(x: torch.Tensor) -> torch.Tensor:
    return x if x._base is None else x._base


def _own(carries: tuple, in_place: tuple[bool, ...]) -> tuple:
    """Clone the carries that the body updates in place; a scan may not change its inputs."""
    own = []
    for carry, mutated in zip(carries, in_place, strict=True):
        own.append(carry.clone() if mutated and isinstance(carry, torch.Tensor) else carry)
    return tuple(own)


def _spread(xs: tuple, present: tuple[bool, ...]) -> tuple:
    """Put None back where a read was absent."""
    spread, i = [], 0
    for here in present:
        spread.append(xs[i] if here else None)
        i += here
    return tuple(spread)


def _initial(carries: tuple, names: tuple[str, ...], site: str) -> tuple:
    initial: list = []
    for carry, name in zip(carries, names, strict=True):
        if isinstance(carry, torch.Tensor):
            if not carry.is_contiguous():
                carry = carry.contiguous()
            for other in initial:
                if other is carry:
                    carry = carry.clone()
        elif not _is_number(carry):
            _fail("carry_not_tensor", f"{name} starts as a {type(carry).__name__}", site)
        initial.append(carry)
    return tuple(initial)


def run_loop(
    body: Callable,
    start: int,
    stop: int,
    carries: tuple,
    reads: tuple[tuple[Any, int], ...],
    *,
    names: tuple[str, ...],
    in_place: tuple[bool, ...],
    optional: tuple[bool, ...],
    slots: tuple[int, ...],
    targets: tuple,
    changed: tuple,
    others: tuple,
    n_lists: int,
    site: str,
) -> tuple[tuple, tuple, tuple]:
    """Run `body(carries, reads_t) -> (carries, writes, lists)` for every step as one `scan`.

    `reads` are pairs (tensor, time axis); an `optional` one may be None, and those at `slots` are of tensors that the
    loop writes, all of which are `targets`. Targets and carries that may have another name are `changed`; `others` is
    what the body uses besides reads and these. A carry may start as a Python number: the first step, run once on the
    side, tells its shape. Returns the final carries and, time first, the stacked writes and list items; with no steps,
    the initial carries, `None` for each write and an empty tuple for each list.

    Raises NotLiftable.
    """
    if stop - start <= 0:
        return carries, (None,) * len(targets), ((),) * n_lists
    for o in targets:
        if not isinstance(o, torch.Tensor):
            _fail("not_a_tensor", f"the loop stores its steps in a {type(o).__name__}", site)
    kept, present = [], []
    for (x, axis), may_be_absent in zip(reads, optional, strict=True):
        present.append(not (may_be_absent and x is None))
        if present[-1]:
            kept.append(time_first(x, axis, start, stop, site))
    _check_overlap(changed, (*[x for i, (x, _) in enumerate(reads) if i not in slots], *others), site)
    xs, here = tuple(kept), tuple(present)
    init = _initial(carries, names, site)

    if any([not isinstance(carry, torch.Tensor) for carry in init]):
        first = tuple([x[0] for x in xs])
        after, _, _ = body(_own(init, (True,) * len(init)), _spread(first, here))
        shaped = []
        for carry, new, name in zip(init, after, names, strict=True):
            if not isinstance(new, torch.Tensor):
                _fail("carry_not_tensor", f"{name} becomes a {type(new).__name__}", site)
            shaped.append(carry if isinstance(carry, torch.Tensor) else torch.full_like(new, carry).contiguous())
        init = tuple(shaped)

    # A scan needs something to count the steps and something to carry.
    if len(xs) == 0:
        xs, here = (torch.zeros(stop - start),), (*here, True)
    idle = len(init) == 0
    if idle:
        init = (xs[0].new_zeros(()),)

    def combine(carry: tuple, x: tuple) -> tuple:
        state = () if idle else _own(carry, in_place)
        new, writes, lists = body(state, _spread(x, here))
        out = [carry[0].clone()] if idle else []
        if not idle:
            for fresh, old, name in zip(new, carry, names, strict=True):
                out.append(_checked_carry(fresh, old, name, site))
        changed = [s for pair in zip(state, new, in_place, strict=True) if pair[2] for s in pair[:2]]
        stacked = []
        for items in lists:
            for item in items:
                _check_item(item, changed, site)
            stacked.append(tuple([item.clone() for item in items]))
        return tuple(out), (tuple(writes), tuple(stacked))

    final, (writes, lists) = scan(combine, init, xs)
    return (() if idle else tuple(final)), writes, lists


def finish_in_place(initial: Any, final: Any) -> Any:
    """Give a state that was only updated in place its final value, in the object that it started in."""
    if not isinstance(initial, torch.Tensor) or final is initial:
        return final
    initial.copy_(final)
    return initial


def write_time(o: Any, axis: int, rest: tuple, start: int, stop: int, ys: torch.Tensor | None, site: str) -> None:
    """Do all of `o[..., t, ...] = y`: `rest` is the index without its time entry, `ys` is `[T, ...]`."""
    if ys is None:
        return
    view = time_first(o, axis, start, stop, site)
    if rest:
        view = view[(slice(None), *rest)]
    extra = ys.dim() - view.dim()
    if extra > 0:
        # As in a plain assignment, surplus leading axes must have size 1.
        for size in ys.shape[1 : 1 + extra]:
            if size != 1:
                _fail("unsupported_target", "the value has more axes than the place it is written to", site)
        ys = ys.reshape(ys.shape[0], *ys.shape[1 + extra :])
    for _ in range(-extra):
        ys = ys.unsqueeze(1)
    view.copy_(ys)


def time_list(streams: tuple, start: int, stop: int) -> TimeList:
    """Wrap the stacked items of a list; with no steps it is an empty list."""
    return TimeList(tuple(streams), max(0, stop - start))


def _in_order(items: TimeList, site: str) -> torch.Tensor:
    """Return the items of all appends of a step, in the order of the list: `[T * appends, ...]`."""
    if len(items.streams) == 1:
        return items.streams[0]
    for stream in items.streams[1:]:
        if stream.shape != items.streams[0].shape:
            _fail("output_list_used", "the items of the list differ in shape", site)
    return torch.stack(items.streams, 1).flatten(0, 1)


def stack_time(ys: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """`torch.stack(list, dim)` of the items `ys[0], ys[1], ...`."""
    return (ys.movedim(0, dim) if dim else ys).contiguous()


def cat_time(ys: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """`torch.cat(list, dim)` of the items `ys[0], ys[1], ...`."""
    dim = dim if dim >= 0 else dim + ys.dim() - 1
    return (ys.movedim(0, dim) if dim else ys).flatten(dim, dim + 1).contiguous()


def over_time(join: Callable, items: Any, *args: Any, site: str, **kwargs: Any) -> torch.Tensor:
    """`join(items, ...)` for `torch.stack` and `torch.cat`, where `items` may come from a lifted loop."""
    if not isinstance(items, TimeList):
        return join(items, *args, **kwargs)
    if len(items.streams) == 0:
        return join([], *args, **kwargs)
    if join is torch.stack:
        return stack_time(_in_order(items, site), *args, **kwargs)
    if join is torch.cat or join is torch.concat or join is torch.concatenate:
        if items.streams[0].dim() < 2:
            _fail("output_list_used", "cat of tensors without axes", site)
        return cat_time(_in_order(items, site), *args, **kwargs)
    return _fail("output_list_used", "the list goes to something other than stack or cat", site)


def len_time(items: Any) -> int:
    """`len(items)`, where `items` may come from a lifted loop."""
    return len(items.streams) * items.steps if isinstance(items, TimeList) else len(items)

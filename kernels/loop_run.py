"""Run a registered step over time, forward and backward, on real tensors.

    forward     carries and products of every step are kept, or the carries of every `segment` steps, or nothing
    backward    from the last step to the first, or by segments, each run forward again first

What is kept of every step is a stack [T, ...] for each saved product and [T + 1, ...] for each carry that the backward
needs, the initial one first. A carry that is also an output is kept by that output.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fla_compile.kernels.loop_compile import Loop, sum_dtype
from fla_compile.kernels.loop_epilogue import OverTime
from fla_compile.kernels.loop_split import Label
from fla_compile.kernels.loop_step import STEPS, Step, results_of
from fla_compile.kernels.loop_trace import Spec, trace_backward, trace_forward

# What is kept of every step may take this much for one loop; beyond it carries are kept every SEGMENT steps only.
KEPT_BYTES = 2**29
SEGMENT = 64

# How the forward keeps: a number above 1 is the length of a segment.
NOTHING, EVERY_STEP, BY_SIZE = 0, 1, -1

# Loops that are kept for the shapes they are compiled for, the latest used last.
LOOPS = 256
_loops: dict[tuple[Any, ...], Loop] = {}
_lock = threading.Lock()


@dataclass
class Call:
    """One call of the operator: operands as the compiled steps take them."""

    step: Step
    tensors: list[Tensor]
    numbers: tuple[Any, ...]
    specs: tuple[Spec, ...]
    T: int

    @staticmethod
    def of(key: str, tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float], T: int) -> "Call":
        step = STEPS[key]
        last = step.carries + step.reads
        every = [x.detach().contiguous() for x in tensors[: step.carries]]
        every += [_per_step(x.detach()) for x in tensors[step.carries : last]]
        every += [_dense(x.detach()) for x in (*tensors[last:], *step.constants)]
        specs = [Spec.contiguous(x, x.shape) for x in every[: step.carries]]
        specs += [Spec.contiguous(x, x.shape[1:]) for x in every[step.carries : last]]
        specs += [Spec.of(x) for x in every[last:]]
        parts = {"int": iter(ints), "float": iter(floats), "fixed": iter(step.fixed)}
        numbers = tuple(next(parts[kind]) for kind in step.kinds if kind != "tensor")
        return Call(step, every, numbers, tuple(specs), T)

    @property
    def carries(self) -> list[Tensor]:
        return self.tensors[: self.step.carries]

    def reads(self, start: int, stop: int) -> dict[Label, Tensor]:
        first, last = self.step.carries, self.step.carries + self.step.reads
        return {("read", j): x[start:stop] for j, x in enumerate(self.tensors[first:last])}

    def forward_loop(self, kept: bool) -> Loop:
        def make() -> Loop:
            body = trace_forward(self.step, self.specs, self.numbers, kept)
            _check(self.step, results_of(body.graph), self.carries)
            return Loop(body, f"step {self.step.key}", reverse=False)

        return _remembered((self.step.key, self.specs, self.numbers, kept), make)

    def backward_loop(self, wanted: Sequence[int], given: Sequence[int]) -> Loop:
        def make() -> Loop:
            body = trace_backward(self.step, self.specs, self.numbers, wanted, given)
            return Loop(body, f"step {self.step.key}", reverse=True)

        return _remembered((self.step.key, self.specs, self.numbers, tuple(wanted), tuple(given)), make)

    def segment(self, segment: int) -> int:
        if segment != BY_SIZE:
            return segment
        results = self.forward_loop(True).results
        own = [self.tensors[i] for i in self.step.own()]
        return choose_segment(self.T, [*own, *(x for label, x in results.items() if label[0] == "saved")])


def choose_segment(T: Any, kept: Sequence[Tensor]) -> int:
    """EVERY_STEP if T steps of what is `kept` of one fit into KEPT_BYTES, else SEGMENT; T and sizes may be symbolic."""
    size = sum(x.numel() * x.element_size() for x in kept)
    return EVERY_STEP if T * size <= KEPT_BYTES else SEGMENT


def _remembered(key: tuple[Any, ...], make: Callable[[], Loop]) -> Loop:
    with _lock:
        loop = _loops.pop(key, None) or make()
        _loops[key] = loop
        if len(_loops) > LOOPS:
            del _loops[next(iter(_loops))]
    return loop


def _per_step(x: Tensor) -> Tensor:
    """`x` [T, ...] so that its slices are contiguous and no stride depends on T."""
    if x.is_contiguous() or (x.stride(0) == 0 and x.shape[0] > 1 and x[0].is_contiguous()):
        return x
    return x.contiguous()


def _dense(x: Tensor) -> Tensor:
    """`x` with strides that follow from its shape and the order of its axes: other strides may change with T."""
    return x if torch.ops.aten.is_non_overlapping_and_dense(x) else x.contiguous()


def _check(step: Step, results: Any, carries: Sequence[Tensor]) -> None:
    for i, (old, new) in enumerate(zip(carries, results, strict=False)):
        if old.shape != new.meta["val"].shape:
            raise ValueError(f"carry {i} must stay {tuple(old.shape)}, got {tuple(new.meta['val'].shape)}")


def _empty(like: Tensor, lead: int) -> Tensor:
    return torch.empty((lead, *like.shape), dtype=like.dtype, device=like.device)


def run_forward(
    key: str, tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float], T: int, segment: int
) -> list[Tensor]:
    """Final carries, outputs [T, ...] and what is kept."""
    call = Call.of(key, tensors, ints, floats, T)
    segment = call.segment(segment)
    loop = call.forward_loop(segment == EVERY_STEP)
    outputs = {x: _empty(y, T) for x, y in loop.results.items() if x[0] == "output"}
    if segment in (NOTHING, EVERY_STEP):
        kept = _places(call, loop, T) if segment == EVERY_STEP else {}
        finals = _advance(call, loop, call.carries, 0, T, outputs, kept)
        stacks = [*outputs.values(), *kept.values()]
        return [*_own(finals, [*tensors, *stacks]), *stacks]
    carries, marks = call.carries, [_empty(c, -(-T // segment)) for c in call.carries]
    for n, start in enumerate(range(0, T, segment)):
        for mark, carry in zip(marks, carries, strict=True):
            mark[n].copy_(carry)
        stop = min(start + segment, T)
        carries = _advance(call, loop, carries, start, stop, {x: y[start:stop] for x, y in outputs.items()}, {})
    stacks = [*outputs.values(), *marks]
    return [*_own(carries, [*tensors, *stacks]), *stacks]


def _places(call: Call, loop: Loop, T: int) -> dict[Label, Tensor]:
    """Room for what is kept of every one of T steps."""
    kept = {("next", i): _empty(call.carries[i], T + 1) for i in call.step.own()}
    return kept | {x: _empty(y, T) for x, y in loop.results.items() if x[0] == "saved"}


def _advance(
    call: Call,
    loop: Loop,
    carries: Sequence[Tensor],
    start: int,
    stop: int,
    outputs: dict[Label, Tensor],
    kept: dict[Label, Tensor],
) -> list[Tensor]:
    """Steps start to stop; `outputs` and `kept` begin at `start`."""
    places = dict(outputs)
    for label, place in kept.items():
        if label[0] == "next":
            place[0].copy_(carries[label[1]])
            place = place[1:]
        places[label] = place
    invariants = loop.invariants(call.tensors)
    return loop.run(carries, call.reads(start, stop), invariants, places, {}, stop - start)


def run_backward(
    key: str,
    tensors: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    T: int,
    segment: int,
    kept: Sequence[Tensor],
    shared: Sequence[Tensor],
    slopes: Sequence[Tensor],
    given: Sequence[int],
    wanted: Sequence[int],
) -> list[Tensor]:
    """Gradients of the tensor operands in `wanted`.

    `shared` are the outputs that keep carries, `slopes` the gradients of the final carries and outputs in `given`.
    """
    call = Call.of(key, tensors, ints, floats, T)
    step, segment = call.step, call.segment(segment)
    n = step.carries
    last = n + step.reads
    kept, shared = [x.contiguous() for x in kept], [x.contiguous() for x in shared]
    loop = call.backward_loop(wanted, [i - n for i in given if i >= n])
    final = {i: x for i, x in zip(given, slopes, strict=True) if i < n}
    gradients = [final[i].contiguous() if i in final else torch.zeros_like(call.carries[i]) for i in loop.body.carried]
    streams = {("slope", i - n): _per_step(x) for i, x in zip(given, slopes, strict=True) if i >= n}
    streams |= call.reads(0, T)
    places: dict[Label, Tensor] = {
        ("gradient", i): torch.empty(x.shape, dtype=x.dtype, device=x.device) for i, x in _at(call, wanted, n, last)
    }
    sums: dict[Label, Tensor] = {
        ("gradient", i): torch.zeros(x.shape, dtype=sum_dtype(x), device=x.device)
        for i, x in _at(call, wanted, last, len(call.tensors))
    }
    invariants = loop.invariants(call.tensors)
    if segment == EVERY_STEP:
        labels = [*(("next", i) for i in step.own()), *(("saved", k) for k in range(step.saved))]
        known = dict(zip(labels, kept, strict=True))
        same = dict(zip(_kept_by_outputs(step), shared, strict=True))
        stacks = streams | _carried_stacks(call.carries, known, same)
        gradients = _retreat(loop, gradients, stacks, invariants, places, sums, T)
    elif T > 0:
        if segment == NOTHING:
            segment = SEGMENT
            kept = run_forward(key, tensors, ints, floats, T, segment)[n + step.outputs :]
        again = call.forward_loop(True)
        for m in reversed(range(len(range(0, T, segment)))):
            start, stop = m * segment, min((m + 1) * segment, T)
            carries = [mark[m] for mark in kept]
            outputs = {x: _empty(y, stop - start) for x, y in again.results.items() if x[0] == "output"}
            fresh = _places(call, again, stop - start)
            _advance(call, again, carries, start, stop, outputs, fresh)
            same = {i: outputs["output", j] for i, j in _kept_by_outputs(step).items()}
            stacks = {x: y[start:stop] for x, y in streams.items()} | _carried_stacks(carries, fresh, same)
            there = {x: y[start:stop] for x, y in places.items()}
            gradients = _retreat(loop, gradients, stacks, invariants, there, sums, stop - start)
    found = {i: x for i, x in zip(loop.body.carried, gradients, strict=True)}
    results = [
        found[i] if i < n else places["gradient", i] if i < last else sums["gradient", i].to(call.tensors[i].dtype)
        for i in wanted
    ]
    return _own(results, [*tensors, *kept, *shared, *slopes])


def _at(call: Call, wanted: Sequence[int], start: int, stop: int) -> list[tuple[int, Tensor]]:
    return [(i, call.tensors[i]) for i in wanted if start <= i < stop]


def shared_outputs(step: Step) -> list[int]:
    """The outputs that stand for carries which the backward needs."""
    return list(_kept_by_outputs(step).values())


def _kept_by_outputs(step: Step) -> dict[int, int]:
    return {i: j for i, j in enumerate(step.shared) if step.keep[i] and j is not None}


def _carried_stacks(
    initial: Sequence[Tensor], kept: dict[Label, Tensor], same: dict[int, Tensor]
) -> dict[Label, Tensor]:
    """Stacks of the carries before and after each step, and of the saved products."""
    stacks = {label: x for label, x in kept.items() if label[0] == "saved"}
    full = {label[1]: x for label, x in kept.items() if label[0] == "next"}
    full |= {i: torch.cat([initial[i][None], x]) for i, x in same.items()}
    for i, x in full.items():
        stacks["previous", i], stacks["next", i] = x[:-1], x[1:]
    return stacks


def _retreat(
    loop: Loop,
    gradients: list[Tensor],
    stacks: dict[Label, Tensor],
    invariants: dict[Label, Tensor],
    places: dict[Label, Tensor],
    sums: dict[Label, Tensor],
    T: int,
) -> list[Tensor]:
    """The loop backward over T steps, then its epilogue; adds to `sums`."""
    body, cuts = loop.body, {x: _empty(y, T) for x, y in loop.results.items() if x[0] == "cut"}
    gradients = loop.run(gradients, stacks, invariants, places | cuts, sums, T)
    if body.epilogue is not None and T > 0:
        after = OverTime(body.epilogue, stacks | places | cuts, invariants)
        for label, node in body.epilogue.written.items():
            places[label].copy_(after.value(node))
        for label, node in body.epilogue.summed.items():
            sums[label].add_(after.summed(node))
    return gradients


def _own(results: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """The results, copied where they share memory with `others` or each other, or are part of a larger tensor."""
    taken, own = {x.untyped_storage().data_ptr() for x in others}, []
    for x in results:
        storage = x.untyped_storage()
        whole = x.is_contiguous() and storage.nbytes() == x.numel() * x.element_size()
        if storage.data_ptr() in taken or not whole:
            x = x.clone(memory_format=torch.contiguous_format)
        taken.add(x.untyped_storage().data_ptr())
        own.append(x)
    return own

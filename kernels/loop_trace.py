"""Trace one step of a loop at concrete shapes, forward and backward, and split it (see `loop_split`).

The forward and the backward of a step both become a body that is looped. In the backward the carried values are
gradients, and the values that the forward kept stand in for the nodes that computed them.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fla_compile.kernels.loop_split import Body, Label, split
from fla_compile.kernels.loop_step import Step, for_any_strides, results_of, source


@dataclass(frozen=True)
class Spec:
    """What a trace knows of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(x: Tensor) -> "Spec":
        return Spec(tuple(x.shape), tuple(x.stride()), x.dtype, x.device)

    @staticmethod
    def contiguous(x: Tensor, shape: Sequence[int]) -> "Spec":
        stride = [1] * len(shape)
        for i in range(len(shape) - 1, 0, -1):
            stride[i - 1] = stride[i] * max(shape[i], 1)
        return Spec(tuple(shape), tuple(stride), x.dtype, x.device)

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


def trace(fn: Callable[..., Any], specs: Sequence[Spec]) -> fx.Graph:
    """`fn` of tensors as functional ATen in Inductor's set of operations, whatever modes the caller is under."""

    def work() -> fx.Graph:
        from torch._inductor.decomposition import select_decomp_table

        mode = FakeTensorMode()
        with mode:
            fakes = [spec.empty() for spec in specs]
            functional = torch.func.functionalize(fn, remove="mutations")
            graph = make_fx(functional, decomposition_table=select_decomp_table())(*fakes).graph
        graph.eliminate_dead_code()
        for_any_strides(graph)
        return graph

    return in_clean_thread(work)


def in_clean_thread(work: Callable[[], Any]) -> Any:
    """`work()` in a thread of its own: gradients on, no autocast, no modes, whatever the caller of the operator has."""
    box: list[Any] = []
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            # A backward runs on the device's own thread, which waits here: it cannot serve this one's gradients.
            with torch.autograd.set_multithreading_enabled(False):
                box.extend((work(), None))
        except BaseException as error:
            box.extend((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if box[1] is not None:
        raise box[1]
    return box[0]


def trace_forward(step: Step, specs: Sequence[Spec], numbers: Sequence[Any], kept: bool) -> Body:
    """The forward of a step; `specs` of tensor operands and constants, `kept` if a backward will follow."""

    def run(*tensors: Tensor) -> Any:
        return step.graph(*merged(step, tensors, numbers))

    graph = trace(run, specs)
    operands = graph.find_nodes(op="placeholder")
    results = results_of(graph)
    written: dict[Label, fx.Node] = {("output", j): results[step.carries + j] for j in range(step.outputs)}
    if kept:
        written |= {("next", i): results[i] for i in step.own()}
        written |= {("saved", k): results[step.carries + step.outputs + k] for k in range(step.saved)}
    inputs = _operand_labels(step, operands)
    return split(graph, operands[: step.carries], range(step.carries), inputs, results[: step.carries], written, {})


def trace_backward(
    step: Step, specs: Sequence[Spec], numbers: Sequence[Any], wanted: Sequence[int], given: Sequence[int]
) -> Body:
    """The backward of a step for the `wanted` tensor operands, from the gradients of the outputs in `given`.

    Carried are the gradients of the carries that depend on what is wanted, whether the first is wanted or not.
    """
    active = _active(step, wanted)
    outer = [i for i in wanted if i >= step.carries]
    chosen = [*active, *outer]
    ends = [*active, *(step.carries + j for j in given)]

    def run(*tensors: Tensor) -> Any:
        values, slopes = tensors[: len(specs)], tensors[len(specs) :]

        def forward(*some: Tensor) -> Any:
            every = list(values)
            for i, x in zip(chosen, some, strict=True):
                every[i] = x
            results = step.graph(*merged(step, every, numbers))
            return [results[i] for i in ends], list(results)

        if not ends:
            return [*forward(*(values[i] for i in chosen))[1], *(torch.zeros_like(values[i]) for i in chosen)]
        found: Any = torch.func.vjp(forward, *(values[i] for i in chosen), has_aux=True)
        _, vjp, results = found
        return [*results, *vjp(list(slopes))]

    shaped = trace(lambda *tensors: step.graph(*merged(step, tensors, numbers)), specs)
    outputs = [n.meta["val"] for n in results_of(shaped)]
    slopes = [Spec.contiguous(outputs[i], outputs[i].shape) for i in ends]
    graph = trace(run, [*specs, *slopes])
    operands = graph.find_nodes(op="placeholder")
    results = results_of(graph)
    total = step.carries + step.outputs + step.saved
    forward, grads = results[:total], results[total:]
    inputs = _operand_labels(step, operands[: len(specs)])
    for i, node in enumerate(operands[: step.carries]):
        inputs[node] = ("previous", i)
    for j, node in zip(given, operands[len(specs) + len(active) :], strict=True):
        inputs[node] = ("slope", j)
    kept = [(("next", i), forward[i]) for i in range(step.carries) if step.keep[i]]
    kept += [(("saved", k), forward[step.carries + step.outputs + k]) for k in range(step.saved)]
    for label, node in kept:
        node = source(node)
        if node.all_input_nodes:
            inputs.setdefault(node, label)
    written: dict[Label, fx.Node] = {}
    summed: dict[Label, fx.Node] = {}
    for i, node in zip(outer, grads[len(active) :], strict=True):
        (written if i < step.carries + step.reads else summed)[("gradient", i)] = node
    carried = operands[len(specs) : len(specs) + len(active)]
    return split(graph, carried, active, inputs, grads[: len(active)], written, summed, defer=True)


def merged(step: Step, tensors: Sequence[Any], numbers: Sequence[Any]) -> list[Any]:
    """Tensors, constants last, and numbers in the order of the step's graph."""
    own, others = iter(tensors), iter(numbers)
    operands = [next(own) if kind == "tensor" else next(others) for kind in step.kinds]
    return [*operands, *own]


def _operand_labels(step: Step, operands: Sequence[fx.Node]) -> dict[fx.Node, Label]:
    first, last = step.carries, step.carries + step.reads
    labels: dict[fx.Node, Label] = {node: ("read", j) for j, node in enumerate(operands[first:last])}
    return labels | {node: ("operand", last + n) for n, node in enumerate(operands[last:])}


def _active(step: Step, wanted: Sequence[int]) -> list[int]:
    """The carries through which a gradient of `wanted` may flow."""
    placeholders = step.graph.graph.find_nodes(op="placeholder")
    tensors = [n for n, kind in zip(placeholders, step.kinds, strict=False) if kind == "tensor"]
    results = results_of(step.graph.graph)
    active = {i for i in wanted if i < step.carries}
    while True:
        reached = {tensors[i] for i in (*active, *wanted)}
        for node in step.graph.graph.nodes:
            if any(n in reached for n in node.all_input_nodes):
                reached.add(node)
        more = {i for i in range(step.carries) if results[i] in reached and step.dtypes[i].is_floating_point}
        if more <= active:
            return sorted(active)
        active |= more

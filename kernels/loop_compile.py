"""Compile the body of a loop for one step, and run it over time.

    carried = step([*carried, *streams[t], *places[t], *invariants, *sums])

What a step writes goes to its place in preallocated stacks inside the compiled function, and sums over time are added
to where they are, so that Python does one call a step and no other work. A carried value that is also written is not
returned: the next step reads it from its place. (Eight steps unrolled into one function were no faster on a CPU, and
took four times as long to compile.)
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fla_compile.kernels.loop_split import Body, Label
from fla_compile.kernels.loop_step import results_of, source
from fla_compile.kernels.loop_trace import in_clean_thread

log = logging.getLogger("fla_compile")
aten = torch.ops.aten

# Slices of the stacks are made for this many steps at a time.
_BLOCK = 256

_warned: set[str] = set()


class Loop:
    """A body that runs over time, forward or in `reverse`, compiled at its first step; a warning calls it `name`."""

    def __init__(self, body: Body, name: str, *, reverse: bool):
        self.body, self.name, self.reverse = body, name, reverse
        self.results = body.results
        self.placed = placed(body)
        self.step: Callable[[list[Any]], Any] | None = None

    def invariants(self, tensors: Sequence[Tensor]) -> dict[Label, Tensor]:
        """The loop's invariants from the tensor operands, with what is computed from them once a call."""
        known: dict[Label, Tensor] = {("operand", n): x for n, x in enumerate(tensors)}
        if self.body.prologue is not None:
            values = self.body.prologue(*(tensors[n] for n in self.body.hoisted_from))
            known |= {("hoisted", h): x.contiguous() for h, x in enumerate(values)}
        return known

    def run(
        self,
        carried: Sequence[Tensor],
        stacks: Mapping[Label, Tensor],
        invariants: Mapping[Label, Tensor],
        places: Mapping[Label, Tensor],
        sums: Mapping[Label, Tensor],
        T: int,
    ) -> list[Tensor]:
        """Run T steps; streams are read from `stacks` [T, ...] and written to `places` [T, ...]."""
        if T == 0:
            return list(carried)
        if self.step is None:
            self.step = in_clean_thread(lambda: compiled(*writing(self.body), self.name))
        step = self.step
        timed = [*(stacks[label] for label in self.body.streams), *(places[label] for label in self.body.written)]
        rest = [*(invariants[label] for label in self.body.invariants), *(sums[label] for label in self.body.summed)]
        for start in reversed(range(0, T, _BLOCK)) if self.reverse else range(0, T, _BLOCK):
            steps = min(_BLOCK, T - start)
            rows = list(zip(*(x.narrow(0, start, steps).unbind(0) for x in timed), strict=True)) or [()] * steps
            for row in reversed(rows) if self.reverse else rows:
                returned = iter(step([*carried, *row, *rest]))
                carried = [next(returned) if i is None else row[i] for i in self.placed]
        return list(carried)


def placed(body: Body) -> list[int | None]:
    """For each carried value: where among a step's streams and places it is written anyway, if it is."""
    results = results_of(body.graph)
    first, last = len(body.carried), len(body.carried) + len(body.written)
    sources = [source(node) for node in results]
    where: list[int | None] = []
    for i in range(first):
        same = (j for j in range(first, last) if sources[j] is sources[i])
        where.append(next((len(body.streams) + j - first for j in same), None))
    return where


def writing(body: Body) -> tuple[fx.GraphModule, list[Tensor]]:
    """The body as a graph that writes its results to operands and returns what is carried besides; with examples."""
    graph = fx.Graph()
    inner = body.graph.find_nodes(op="placeholder")
    first, last = len(body.carried), len(body.carried) + len(body.streams)
    mode = next(n.meta["val"].fake_mode for n in body.graph.nodes if isinstance(n.meta.get("val"), Tensor))
    examples: list[Tensor] = []

    def operand(name: str, value: Tensor) -> fx.Node:
        node = graph.placeholder(name)
        node.meta["val"] = value
        examples.append(value)
        return node

    def call(target: Any, *args: Any, value: Tensor, **kwargs: Any) -> fx.Node:
        node = graph.call_function(target, args, kwargs)
        node.meta["val"] = value
        return node

    def empty(like: Tensor, dtype: torch.dtype) -> Tensor:
        with mode:
            return torch.empty(like.shape, dtype=dtype, device=like.device)

    timed = [operand(node.name, node.meta["val"]) for node in inner[:last]]
    places = [
        operand(f"place_{i}", empty(body.results[label], body.results[label].dtype))
        for i, label in enumerate(body.written)
    ]
    fixed = [operand(node.name, node.meta["val"]) for node in inner[last:]]
    sums = [
        operand(f"sum_{i}", empty(body.results[label], sum_dtype(body.results[label])))
        for i, label in enumerate(body.summed)
    ]
    outputs: Any = graph.graph_copy(body.graph, dict(zip(inner, [*timed, *fixed], strict=True)))
    carried, written, parts = outputs[:first], outputs[first : first + len(places)], outputs[first + len(places) :]
    finals = []
    for node in (node for node, place in zip(carried, placed(body), strict=True) if place is None):
        value = node.meta["val"]
        if not value.is_contiguous():
            value = empty(value, value.dtype)
            node = call(aten.clone.default, node, value=value, memory_format=torch.contiguous_format)
        finals.append(node)
    totals = []
    for total, part in zip(sums, parts, strict=True):
        value = total.meta["val"]
        if part.meta["val"].dtype != value.dtype:
            part = call(aten._to_copy.default, part, value=value, dtype=value.dtype)
        totals.append(call(aten.add.Tensor, total, part, value=value))
    for place, node in [*zip(places, written, strict=True), *zip(sums, totals, strict=True)]:
        call(aten.copy_.default, place, node, value=place.meta["val"])
    graph.output(tuple(finals))
    # Without it Inductor may pad a result's rows, and what the next step takes has the strides of the trace.
    graph.output_node().meta["user_visible_output_idxs"] = list(range(len(finals)))
    return fx.GraphModule(torch.nn.Module(), graph), examples


def sum_dtype(x: Tensor) -> torch.dtype:
    """Sums over time are kept in float32 at least."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def compiled(gm: fx.GraphModule, examples: list[Tensor], name: str) -> Callable[[list[Any]], Any]:
    """The graph by Inductor, as a function of one list; as the graph it is where Inductor cannot."""
    try:
        return by_inductor(gm, examples)
    except Exception as error:  # whatever goes wrong inside the compiler, the graph itself can run
        if name not in _warned:
            _warned.add(name)
            log.warning("%s runs uncompiled, Inductor fails: %s: %s", name, type(error).__name__, error)
        return lambda arguments: gm(*arguments)


def by_inductor(gm: fx.GraphModule, examples: list[Tensor]) -> Callable[[list[Any]], Any]:
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.virtualized import V

    mode = examples[0].fake_mode  # type: ignore[attr-defined]
    with torch.no_grad(), V.set_fake_mode(mode), tracing(TracingContext(mode)):
        run: Any = compile_fx_inner(gm, examples)
    return run

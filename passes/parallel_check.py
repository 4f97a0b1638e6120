"""Check: run a piece of a graph and what replaces it on small random data; values and gradients must agree.

In float64, at the sizes of the program, but for a long time axis: its size is replaced wherever it stands as a number,
in both programs alike.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from fla_compile.passes.parallel_regions import elements
from fla_compile.passes.records import Refused
from fla_compile.passes.validate import TOLERANCE, concrete, error, gradients, in_float64

STEPS = 21
SMALL = 1 << 18  # elements of the largest tensor
LARGE = 1 << 24


def check(
    before: fx.GraphModule,
    after: fx.GraphModule,
    inputs: Sequence[fx.Node],
    decays: dict[int, str],
    time: Any,
    near: int = 0,
) -> float:
    """The largest relative error of `after`; raises `Refused("validation_failed")` beyond tolerance.

    `inputs` are the operands with their fake values; `decays` says which are decays ("decay") or their logarithms
    ("log"), `time` is the size of the time axis. Numbers up to `near` away from it stand for it plus or minus a few.
    """
    largest = max(elements(node) for node in before.graph.nodes)
    steps = concrete(time)
    if largest > SMALL and steps > STEPS:
        try:
            short = _shortened(before, time, near), _shortened(after, time, near)
            return _compare(short[0], short[1], inputs, decays, lambda size: _short(size, time, near))
        except _CannotRun as why:
            if largest > LARGE:
                told = f"{largest} elements are too many to run on random data, and with fewer steps: {why}"
                raise Refused("validation_failed", told) from None
    try:
        return _compare(before, after, inputs, decays, concrete)
    except _CannotRun as why:
        raise Refused("validation_failed", f"the two do not run on random data: {why}") from None


class _CannotRun(Exception):
    pass


@contextmanager
def _double() -> Iterator[None]:
    """Powers and products of whole numbers in float64 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _short(size: Any, time: Any, near: int) -> int:
    """A size with fewer steps in it."""
    if isinstance(size, int):
        return STEPS + size - time if isinstance(time, int) and abs(size - time) <= near else size
    if isinstance(time, int):
        return concrete(size)
    expression, known = size.node.expr, size.node.shape_env.backed_var_to_val
    return int(expression.subs({s: STEPS if s == time.node.expr else known[s] for s in expression.free_symbols}))


def _shortened(gm: fx.GraphModule, time: Any, near: int) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    if isinstance(time, int):
        for node in graph.nodes:
            node.args, node.kwargs = map_aggregate(  # slices too
                (node.args, node.kwargs), lambda x: _short(x, time, near) if type(x) is int else x
            )
    return fx.GraphModule(gm, graph)


def _compare(
    before: fx.GraphModule,
    after: fx.GraphModule,
    inputs: Sequence[fx.Node],
    decays: dict[int, str],
    sized: Callable[[Any], int],
) -> float:
    told = "the program gives no finite numbers on random data"
    with _double(), torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        for positive in (False, True):
            generator = torch.Generator().manual_seed(0)
            fakes = [node.meta["example_value"] for node in inputs]
            differentiable = any(isinstance(fake, torch.Tensor) and fake.requires_grad for fake in fakes)
            operands = [_random(fake, decays.get(i), positive, sized, generator) for i, fake in enumerate(fakes)]
            wanted = [x for x in operands if isinstance(x, torch.Tensor) and x.is_floating_point()]
            wanted = [x.requires_grad_() for x in wanted] if differentiable else []
            try:
                want = in_float64(before)(*operands)
                slopes = gradients(want, wanted)
                if not all(torch.isfinite(x).all() for x in (*want, *slopes)):
                    continue
                got = in_float64(after)(*operands)
                pairs = [("value", error(a, b)) for a, b in zip(got, want, strict=True)]
                pairs += [("gradient", error(a, b)) for a, b in zip(gradients(got, wanted), slopes, strict=True)]
            except Exception as why:
                # A replacement that cannot run must not cost the user the program.
                raise _CannotRun(f"{type(why).__name__}: {why}") from why
            kind, size = max(pairs, key=lambda pair: pair[1] if pair[1] == pair[1] else float("inf"))
            if size <= TOLERANCE[torch.float64]:
                return size
            told = f"{kind} of program and kernel differ by {size:.2e} > {TOLERANCE[torch.float64]:.0e}"
            break
    raise Refused("validation_failed", told)


def _random(
    fake: Any, kind: str | None, positive: bool, sized: Callable[[Any], int], generator: torch.Generator
) -> Any:
    if not isinstance(fake, torch.Tensor):
        if isinstance(fake, torch.SymFloat):
            return float(fake.node.hint)
        return sized(fake) if isinstance(fake, torch.SymInt) else fake
    shape = tuple(sized(size) for size in fake.shape)
    if not fake.dtype.is_floating_point:
        return torch.randint(0, 2, shape, generator=generator).to(fake.device, fake.dtype)
    data = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind is not None:
        data = -0.3 * data.abs()
        data = data.exp() if kind == "decay" else data
    elif positive:
        data = data.abs() + 0.1
    return data.to(fake.device)

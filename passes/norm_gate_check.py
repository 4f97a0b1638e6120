"""Check a norm with a gate against what replaces it, on random data in float64, values and gradients.

Rows do not know of each other, so a few of them tell: the large sizes among the leading axes are made small, wherever
they stand as numbers in the two programs, alone or multiplied with their neighbours.
"""

import math
from typing import Any

from torch import fx
from torch.utils._pytree import tree_map

from fla_compile.passes.norm_gate_uses import Match
from fla_compile.passes.parallel_check import LARGE, SMALL, _CannotRun, _compare
from fla_compile.passes.parallel_regions import elements
from fla_compile.passes.records import Refused
from fla_compile.passes.spellings import tensor_of
from fla_compile.passes.validate import concrete

LEAST = 17  # smaller numbers may be axes, exponents or heads
FEW = (5, 7, 11, 13)


def check(before: fx.GraphModule, after: fx.GraphModule, match: Match) -> float:
    """The largest relative error of `after`; raises `Refused("validation_failed")` beyond tolerance."""
    largest = max(elements(node) for node in (*match.inputs, *match.interior))
    if largest > SMALL:
        sizes = small_sizes(match)
        short = [with_sizes(gm, sizes) for gm in (before, after)]
        try:
            return _compare(short[0], short[1], match.inputs, {}, lambda size: small(size, sizes))
        except _CannotRun:
            if largest > LARGE:
                raise Refused("validation_failed", f"{largest} elements are too many to run on random data") from None
    try:
        return _compare(before, after, match.inputs, {}, concrete)
    except _CannotRun as why:
        raise Refused("validation_failed", f"the two do not run on random data: {why}") from None


def small_sizes(match: Match) -> dict[int, int]:
    """What to put for which number; those that also mean something else are left out."""
    shapes = [
        [concrete(s) for s in x.shape] for n in (*match.inputs, *match.interior) if (x := tensor_of(n)) is not None
    ]
    work = [concrete(size) for size in match.emission.shape[:-1]]
    own = [concrete(size) for size in tensor_of(match.emission.x).shape]
    rest = behind(own, math.prod(work))
    lead, rest = (own[: len(own) - len(rest)], rest) if rest != own else (work, [])
    other = {match.reading.width}.union(*(behind(shape, math.prod(work)) for shape in shapes))
    large = dict.fromkeys(size for size in lead if size >= LEAST and size not in other)
    new = dict(zip(large, FEW, strict=False))
    found, axes = {}, [(size, new.get(size, size)) for size in lead] + [(size, size) for size in rest]
    for first in range(len(lead)):
        for last in range(first + 1, len(axes) + 1):
            old, few = zip(*axes[first:last], strict=True)
            found[math.prod(old)] = math.prod(few)
    return {old: few for old, few in found.items() if old >= LEAST and old not in other}


def behind(shape: list[int], rows: int) -> list[int]:
    """The sizes behind the leading axes that make so many rows, or times more; all of them where none do."""
    for i in range(1, len(shape) + 1):
        if math.prod(shape[:i]) % rows == 0:
            return shape[i:]
    return shape


def small(size: Any, sizes: dict[int, int]) -> int:
    if isinstance(size, int):
        return sizes.get(size, size)
    expression, known = size.node.expr, size.node.shape_env.backed_var_to_val
    return int(expression.subs({s: sizes.get(int(known[s]), known[s]) for s in expression.free_symbols}))


def with_sizes(gm: fx.GraphModule, sizes: dict[int, int]) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for node in graph.nodes:
        node.args, node.kwargs = tree_map(lambda x: sizes.get(x, x) if type(x) is int else x, (node.args, node.kwargs))
    return fx.GraphModule(gm, graph)

"""Write a norm times a gate into a graph: what is read, in which shape, and the weights that belong to it.

The operators want x and gate as [..., P] with rows of D elements that divide P, and weights of D or P elements. The
program's tensors are brought there by merging and splitting trailing axes, which moves nothing, and from there the
result to its shape.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fla_compile.kernels.norm_gate import has_triton
from fla_compile.kernels.norm_gate_linear import norm_gate_linear_op  # noqa: F401
from fla_compile.passes.norm_gate_form import Reading
from fla_compile.passes.normal_form import same_size
from fla_compile.passes.row_algebra import Poly
from fla_compile.passes.row_values import sizes_of
from fla_compile.passes.spellings import is_reshape, keeps_value, tensor_of

Shape = Sequence[Any]
Weights = tuple[tuple[float, tuple[tuple[fx.Node, int, int], ...]], ...]  # terms: coefficient, (leaf, block, exponent)


@dataclass(frozen=True)
class Emission:
    """`shape` is [..., P], in which the operator works; `options` are those of `naive_norm_gate`.

    Where `operator` is not set, nothing of this is written: no kernel of ours is faster there.
    """

    x: fx.Node
    gate: fx.Node
    weight: Weights | None
    bias: Weights | None
    period: int  # elements of weight and bias
    shape: tuple[Any, ...]
    result: tuple[Any, ...]
    options: Mapping[str, Any]
    operator: bool
    linear: tuple[fx.Node, fx.Node | None] | None = None

    @property
    def leaves(self) -> tuple[fx.Node, ...]:
        terms = (*(self.weight or ()), *(self.bias or ()))
        own = (n for _, factors in terms for n, _, _ in factors)
        return tuple(dict.fromkeys((self.x, self.gate, *own, *(n for n in self.linear or () if n is not None))))

    @property
    def kernel(self) -> str:
        if not self.operator:
            return "as written (Inductor)"
        return "row kernel (Triton)" if tensor_of(self.x).device.type == "cuda" else "row kernel (plain operations)"

    def with_linear(self, data: fx.Node, weight: fx.Node, bias: fx.Node | None) -> "Emission | None":
        """The same with the linear layer that reads the result as `data`."""
        shape = sizes_of(tensor_of(data).shape)
        if not fits(shape, self.options["width"], self.period):
            return None
        if any(steps(tensor_of(n).shape, shape) is None for n in (self.x, self.gate)):
            return None
        return replace(self, shape=shape, result=(), linear=(weight, bias))


def plan(root: fx.Node, reading: Reading, kernel: bool | None) -> Emission | None:
    """What to write for a pattern, or None where shapes or weights are of a kind that the operators do not take."""
    value, D = tensor_of(root), reading.width
    weight, bias = (None if p is None else weights_of(p) for p in (reading.weight, reading.bias))
    if (reading.weight is not None and weight is None) or (reading.bias is not None and bias is None):
        return None
    sizes = [block * tensor_of(n).numel() for terms in (weight, bias) for _, fs in terms or () for n, block, _ in fs]
    period = max([D, *sizes])
    if any(period % size for size in (D, *sizes)):
        return None
    shape = working_shape(tuple(value.shape), D, period)
    if shape is None or steps(shape, value.shape) is None:
        return None
    x, gate = (nearest(n, shape) for n in (reading.x, reading.gate))
    if x is None or gate is None or len({tensor_of(n).device for n in (x, gate, root)}) != 1:
        return None
    options = {
        "norm": "layer" if reading.layer else "rms", "activation": "silu" if reading.silu else "sigmoid",
        "eps": reading.eps, "gate_first": reading.gate_first, "width": D, "dtype": value.dtype,
    }  # fmt: skip
    types = {tensor_of(n).dtype for terms in (weight, bias) for _, fs in terms or () for n, _, _ in fs}
    dtypes = {tensor_of(x).dtype, tensor_of(gate).dtype, value.dtype, *types}
    runs = has_triton(value.device.type, D, *dtypes) if kernel is None else kernel
    return Emission(x, gate, weight, bias, period, shape, tuple(value.shape), options, runs)


def weights_of(value: Poly) -> Weights | None:
    """The terms of a polynomial of weights, in a fixed order; None if it is more than sums of products of tensors."""
    terms = []
    for product, c in value.terms:
        factors = []
        for atom, n in product:
            if atom.kind != "leaf" or n.denominator != 1 or not isinstance(tensor_of(atom.of).numel(), int):
                return None
            factors.append((atom.of, atom.block, int(n)))
        terms.append((c, tuple(sorted(factors, key=str))))
    return tuple(sorted(terms, key=str))


def fits(shape: Shape, width: int, period: int) -> bool:
    last = shape[-1] if shape else 0
    return isinstance(last, int) and last > 0 and last % width == 0 and period in (width, last)


def working_shape(shape: Shape, width: int, period: int) -> tuple[Any, ...] | None:
    """`shape` with as few of its trailing axes merged as make rows, and the weights, fit into the last."""
    shape = sizes_of(shape)
    for k in range(len(shape) - 1, -1, -1):
        if not all(isinstance(size, int) for size in shape[k:]):
            return None
        merged = (*shape[:k], math.prod(shape[k:]))
        if fits(merged, width, period):
            return merged
    return None


def nearest(node: fx.Node, shape: Shape) -> fx.Node | None:
    """The tensor to read: as far behind casts and reshapes as the shape can be reached from."""
    found = None
    while True:
        if steps(tensor_of(node).shape, shape) is not None:
            found = node
        if not (keeps_value(node) or is_reshape(node)):
            return found
        node = node.args[0] if node.args else node.kwargs["input"]


def steps(have: Shape, want: Shape) -> list[tuple[str, tuple[Any, ...]]] | None:
    """The method calls that bring a tensor from one shape to another with the same elements; None if not known."""
    have, want, same = sizes_of(have), sizes_of(want), 0
    while same < min(len(have), len(want)) and same_size(have[same], want[same]):
        same += 1
    if same == len(have) == len(want):
        return []
    if all(isinstance(size, int) for size in want):
        return [("reshape", (list(want),))]
    dynamic = [i for i, size in enumerate(want) if not isinstance(size, int)]
    if len(dynamic) == 1:
        return [("reshape", ([-1 if i in dynamic else size for i, size in enumerate(want)],))]
    tail, rest = have[same:], want[same:]
    if not tail or not rest or not all(isinstance(size, int) for size in (*tail, *rest)):
        return None
    merged = [("flatten", (same, -1))] if len(tail) > 1 else []
    return merged + ([("unflatten", (same, tuple(rest)))] if len(rest) > 1 else [])


def reshaped(graph: fx.Graph, node: fx.Node, have: Shape, want: Shape) -> fx.Node:
    for method, args in steps(have, want) or ():
        node = graph.call_method(method, (node, *args))
    return node


def emit(emission: Emission, graph: fx.Graph, env: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """Write the pattern at the graph's insertion point; `env` stands for nodes of the program. Returns the result."""
    e = emission

    def here(node: fx.Node) -> fx.Node:
        return env.get(node, node)

    x, gate = (reshaped(graph, here(n), tensor_of(n).shape, e.shape) for n in (e.x, e.gate))
    device = tensor_of(e.x).device
    weight, bias = (
        None if terms is None else emit_weights(graph, terms, e.period, device, here) for terms in (e.weight, e.bias)
    )
    o = e.options
    form = o["width"], o["eps"], o["norm"] == "layer", o["activation"] == "silu", o["gate_first"]
    if e.linear is not None:
        linear = (None if n is None else here(n) for n in e.linear)
        target = torch.ops.fla_compile.norm_gate_linear.default
        return first(graph, graph.call_function(target, (x, gate, weight, bias, *linear, *form)))
    target = torch.ops.fla_compile.norm_gate.default
    result = first(graph, graph.call_function(target, (x, gate, weight, bias, *form, o["dtype"])))
    return reshaped(graph, result, e.shape, e.result)


def first(graph: fx.Graph, call: fx.Node) -> fx.Node:
    """The result of an operator that also returns statistics."""
    return graph.call_function(operator.getitem, (call, 0))


def emit_weights(graph: fx.Graph, terms: Weights, period: int, device: torch.device, here: Any) -> fx.Node:
    """A polynomial of weights as a tensor of `period` elements; a weight that stands alone as it is."""
    total: fx.Node | None = None
    for c, factors in terms:
        product: Any = None
        for node, block, exponent in factors:
            value, size = tensor_of(node), block * tensor_of(node).numel()
            factor = here(node)
            alone = len(terms) == len(factors) == 1 and c == 1 and exponent == 1 and block == 1 and size == period
            if alone:
                return factor
            if value.dtype in (torch.float16, torch.bfloat16):
                factor = graph.call_method("to", (factor, torch.float32))
            factor = graph.call_method("reshape", (factor, [-1]))
            if block > 1:
                factor = graph.call_method("repeat_interleave", (factor, block))
            if size < period:
                factor = graph.call_method("repeat", (factor, period // size))
            if exponent != 1:
                factor = graph.call_function(torch.pow, (factor, exponent))
            product = factor if product is None else graph.call_function(torch.mul, (product, factor))
        if product is None:
            kind = {"dtype": torch.float32, "device": device}
            product = graph.call_function(torch.full, ([period], c), kind)
        elif c != 1:
            product = graph.call_function(torch.mul, (product, c))
        total = product if total is None else graph.call_function(torch.add, (total, product))
    assert total is not None, "a weight of no terms"
    return total

"""The polynomial of each node of Dynamo's graph (see `row_algebra.py`), by one rule an operation.

A node without a rule, or in `cuts`, is a leaf. Casts are no operations: what is rounded on the way is part of the
program's arithmetic, which the kernel does in float32 throughout. Only what is narrowed before anything is computed
from it is a leaf of its own, as the kernel must read what the program read.
"""

import math
from collections.abc import Callable, Container, Iterable
from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from fla_compile.passes.data_flow import Flow
from fla_compile.passes.normal_form import same_size
from fla_compile.passes.row_algebra import (
    HALF,
    Opaque,
    Poly,
    add,
    constant,
    exp,
    leaf,
    mean,
    multiply,
    power,
    repeat,
    sigmoid,
)
from fla_compile.passes.spellings import Call, call_of, is_cast, is_reshape, keeps_value, tensor_of


class Values:
    """`of(node)` is the polynomial of a node over its own flat index."""

    def __init__(self, cuts: Container[fx.Node], flow: Flow):
        self.cuts, self.flow = cuts, flow
        self.known: dict[fx.Node, Poly] = {}

    def of(self, node: fx.Node) -> Poly:
        if node not in self.known:
            self.known[node] = leaf(node) if node in self.cuts else self.opened(node)
        return self.known[node]

    def opened(self, node: fx.Node) -> Poly:
        """The same for a node that is itself a leaf to others."""
        try:
            return self._compute(node)
        except (Opaque, OverflowError, ZeroDivisionError):
            return leaf(node)

    def _compute(self, node: fx.Node) -> Poly:
        value, call = tensor_of(node), call_of(node)
        if call is None or value is None or not value.dtype.is_floating_point:
            return leaf(node)
        call = self.as_read(node, call)
        if is_reshape(node):
            return self.of(call.get("input"))
        if is_cast(node):
            inner = self.of(call.get("input"))
            return leaf(node) if is_leaf(inner) and not keeps_value(node) else inner
        rule = RULES.get(call.name)
        return leaf(node) if rule is None else rule(self, node, call)

    def as_read(self, node: fx.Node, call: Call) -> Call:
        """The call with each argument replaced by the node whose value it has by now."""
        if not self.flow.writers:
            return call

        def read(n: fx.Node) -> fx.Node:
            found = self.flow.read(node, n)
            if found is None:
                raise Opaque
            return found

        return replace(call, args={key: fx.map_arg(x, read) for key, x in call.args.items()})

    def operand(self, x: Any, shape: Any) -> Poly:
        """An argument of an elementwise operation with results of this shape."""
        if isinstance(x, bool) or not isinstance(x, int | float | fx.Node):
            raise Opaque
        if not isinstance(x, fx.Node):
            return constant(x)
        if isinstance(x.meta.get("example_value"), torch.SymFloat):
            return constant(number(x))
        value = tensor_of(x)
        if value is None or not value.dtype.is_floating_point:
            raise Opaque
        return aligned(self.of(x), value.shape, shape)


def number(x: Any) -> float:
    """A number, or the present value of one that may change between calls; whoever builds on that has to `fix` it."""
    value = x.meta.get("example_value") if isinstance(x, fx.Node) else x
    value = value.node.hint if isinstance(value, torch.SymFloat) else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Opaque
    return float(value)


def fix(nodes: Iterable[fx.Node]) -> None:
    """Have the program compiled again when one of the numbers among these nodes changes."""
    for node in nodes:
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymFloat):
            float(value)


def is_leaf(value: Poly) -> bool:
    """Whether a value is a tensor of the program as it is."""
    if len(value.terms) != 1:
        return False
    ((product, c),) = value.terms
    return c == 1 and len(product) == 1 and all(a.kind == "leaf" and n == 1 for a, n in product)


def aligned(value: Poly, shape: Any, target: Any) -> Poly:
    """A value broadcast to a larger shape: its axes must be neighbours there."""
    padded = (1,) * (len(target) - len(shape)) + tuple(shape)
    own = [axis for axis, size in enumerate(padded) if not same_size(size, 1)]
    first, last = (own[0], own[-1] + 1) if own else (len(target), len(target))
    if any(not same_size(padded[axis], target[axis]) for axis in range(first, last)):
        raise Opaque
    if not own:
        return repeat(value, period=1)
    many = any(not same_size(size, 1) for size in target[:first])
    return repeat(value, each=size_of(target[last:]), period=size_of(target[first:]) if many else None)


def sizes_of(shape: Any) -> tuple[Any, ...]:
    """Sizes as numbers, those too that only turned out to be fixed."""
    return tuple(size if isinstance(size, int) or size.node.maybe_as_int() is None else int(size) for size in shape)


def size_of(shape: Any) -> int:
    shape = sizes_of(shape)
    if not all(isinstance(size, int) for size in shape):
        raise Opaque
    return math.prod(shape)


def row_width(node: fx.Node, dim: Any) -> int:
    """The elements of the trailing axes `dim` over which an operation reduces."""
    shape = tensor_of(node).shape
    dims = range(len(shape)) if dim is None or dim in ((), []) else [dim] if isinstance(dim, int) else list(dim)
    if not all(isinstance(d, int) for d in dims):
        raise Opaque
    axes = sorted(d % len(shape) for d in dims)
    if not axes or axes != list(range(len(shape) - len(axes), len(shape))):
        raise Opaque
    return size_of([shape[axis] for axis in axes])


Rule = Callable[[Values, fx.Node, Call], Poly]


def _numbers(call: Call, *names: str) -> list[float]:
    found = [call.get(name, 1) for name in names]
    if not all(isinstance(x, int | float) for x in found):
        raise Opaque
    return found


def _both(values: Values, node: fx.Node, call: Call, *names: str) -> list[Poly]:
    if any(name not in call.args for name in names):
        raise Opaque
    return [values.operand(call.get(name), tensor_of(node).shape) for name in names]


def _add(values: Values, node: fx.Node, call: Call) -> Poly:
    a, b = _both(values, node, call, "input", "other")
    (alpha,) = _numbers(call, "alpha")
    return add(a, b, alpha if call.name == "add" else -alpha)


def _mul(values: Values, node: fx.Node, call: Call) -> Poly:
    return multiply(*_both(values, node, call, "input", "other"))


def _div(values: Values, node: fx.Node, call: Call) -> Poly:
    if call.get("rounding_mode") is not None:
        raise Opaque
    a, b = _both(values, node, call, "input", "other")
    return multiply(a, power(b, Fraction(-1)))


def _addcmul(values: Values, node: fx.Node, call: Call) -> Poly:
    a, b, c = _both(values, node, call, "input", "tensor1", "tensor2")
    (scale,) = _numbers(call, "value")
    return add(a, multiply(b, c if call.name == "addcmul" else power(c, Fraction(-1))), scale)


def _pow(values: Values, node: fx.Node, call: Call) -> Poly:
    n = call.get("exponent")
    if not isinstance(n, int | float) or isinstance(n, bool) or abs(n) > 4 or 2 * n != int(2 * n):
        raise Opaque
    return power(_both(values, node, call, "input")[0], Fraction(n))


def _power(n: Fraction) -> Rule:
    return lambda values, node, call: power(_both(values, node, call, "input")[0], n)


def _abs(values: Values, node: fx.Node, call: Call) -> Poly:
    return power(power(_both(values, node, call, "input")[0], Fraction(2)), HALF)


def _neg(values: Values, node: fx.Node, call: Call) -> Poly:
    return add(constant(0), _both(values, node, call, "input")[0], -1.0)


def _reduced(call: Call) -> fx.Node:
    x, dtype = call.get("input"), call.get("dtype")
    value = tensor_of(x)
    if value is None or not value.dtype.is_floating_point or (dtype is not None and not dtype.is_floating_point):
        raise Opaque
    return x


def _mean(values: Values, node: fx.Node, call: Call) -> Poly:
    x = _reduced(call)
    width = row_width(x, call.get("dim"))
    return multiply(constant(width if call.name == "sum" else 1), mean(values.of(x), width))


def _var(values: Values, node: fx.Node, call: Call) -> Poly:
    x = _reduced(call)
    width = row_width(x, call.get("dim"))
    correction = call.get("correction", 1)
    if call.get("unbiased") is not None:
        correction = int(call.get("unbiased"))
    value = values.of(x)
    centred = add(mean(power(value, Fraction(2)), width), power(mean(value, width), Fraction(2)), -1.0)
    variance = multiply(constant(width / (width - (1 if correction is None else correction))), centred)
    return power(variance, HALF) if call.name == "std" else variance


def _norm(values: Values, node: fx.Node, call: Call) -> Poly:
    x = _reduced(call)
    if call.get("ord", call.get("p", 2)) not in (2, 2.0, "fro", None):
        raise Opaque
    width = row_width(x, call.get("dim"))
    square = mean(power(values.of(x), Fraction(2)), width)
    return power(multiply(constant(width), square), HALF)


def _getitem(values: Values, node: fx.Node, call: Call) -> Poly:
    """A part of torch.var_mean."""
    whole = call_of(call.get("input")) if isinstance(call.get("input"), fx.Node) else None
    whole = None if whole is None else values.as_read(call.get("input"), whole)
    if whole is None or whole.name not in ("var_mean", "std_mean") or call.get("index") not in (0, 1):
        raise Opaque
    if call.get("index") == 1:
        return _mean(values, node, Call("mean", {k: v for k, v in whole.args.items() if k in ("input", "dim")}))
    return _var(values, node, Call(whole.name[:3], whole.args))


def _sigmoid(values: Values, node: fx.Node, call: Call) -> Poly:
    return sigmoid(_both(values, node, call, "input")[0])


def _silu(values: Values, node: fx.Node, call: Call) -> Poly:
    (x,) = _both(values, node, call, "input")
    return multiply(x, sigmoid(x))


def _tanh(values: Values, node: fx.Node, call: Call) -> Poly:
    """tanh(x) = 2 sigmoid(2 x) - 1"""
    (x,) = _both(values, node, call, "input")
    return add(multiply(constant(2), sigmoid(multiply(constant(2), x))), constant(1), -1.0)


def _exp(values: Values, node: fx.Node, call: Call) -> Poly:
    return exp(_both(values, node, call, "input")[0])


def _expand(values: Values, node: fx.Node, call: Call) -> Poly:
    return _both(values, node, call, "input")[0]


def _rms_norm(values: Values, node: fx.Node, call: Call) -> Poly:
    return _native(values, call, size_of(call.get("normalized_shape")), default_eps(tensor_of(node).dtype), False)


def _layer_norm(values: Values, node: fx.Node, call: Call) -> Poly:
    return _native(values, call, size_of(call.get("normalized_shape")), 1e-5, True)


def _group_norm(values: Values, node: fx.Node, call: Call) -> Poly:
    """Over groups of channels; what follows the channels must be of size 1."""
    shape, groups = tensor_of(call.get("input")).shape, call.get("num_groups")
    if not isinstance(groups, int) or any(not same_size(size, 1) for size in shape[2:]):
        raise Opaque
    return _native(values, call, size_of(shape[1:2]) // groups, 1e-5, True, per_channel=size_of(shape[1:2]))


def _native(values: Values, call: Call, width: int, eps: float, centred: bool, per_channel: int | None = None) -> Poly:
    x = values.of(call.get("input"))
    given = call.get("eps")
    eps = eps if given is None else number(given)
    variance = mean(power(x, Fraction(2)), width)
    if centred:
        average = mean(x, width)
        x = add(x, repeat(average, each=width), -1.0)
        variance = add(variance, power(average, Fraction(2)), -1.0)
    y = multiply(x, power(repeat(add(variance, constant(eps)), each=width), -HALF))
    for name, combine in (("weight", multiply), ("bias", add)):
        p = call.get(name)
        if isinstance(p, fx.Node):
            y = combine(y, repeat(values.of(p), period=per_channel or width))
        elif p is not None:
            raise Opaque
    return y


@cache
def default_eps(dtype: torch.dtype) -> float:
    """The eps of `F.rms_norm` where none is given: measured, as it depends on the type and on torch's version."""
    x = torch.full((1,), 2.0**-14, dtype=dtype)
    with torch.no_grad(), _disable_current_modes():
        ratio = float(x.double() / F.rms_norm(x, (1,)).double()) ** 2
    found = ratio - float(x.double()) ** 2
    return min((torch.finfo(t).eps for t in {dtype, torch.float32, torch.float64}), key=lambda e: abs(e - found))


RULES: dict[str, Rule] = {
    "add": _add,
    "sub": _add,
    "mul": _mul,
    "div": _div,
    "addcmul": _addcmul,
    "addcdiv": _addcmul,
    "neg": _neg,
    "pow": _pow,
    "square": _power(Fraction(2)),
    "sqrt": _power(HALF),
    "rsqrt": _power(-HALF),
    "reciprocal": _power(Fraction(-1)),
    "abs": _abs,
    "mean": _mean,
    "sum": _mean,
    "var": _var,
    "std": _var,
    "getitem": _getitem,
    "norm": _norm,
    "vector_norm": _norm,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "sigmoid": _sigmoid,
    "silu": _silu,
    "tanh": _tanh,
    "exp": _exp,
    "expand": _expand,
    "expand_as": _expand,
    "broadcast_to": _expand,
}
REDUCTIONS = {"mean", "sum", "var", "std", "var_mean", "std_mean", "norm", "vector_norm"}
NORMS = {"rms_norm", "layer_norm", "group_norm"}
ACTIVATIONS = {"sigmoid", "silu", "tanh", "exp"}

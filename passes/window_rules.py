"""The rules by which operations become sums of products of windows: one for each of a small closed set.

    rule(windows, node, call) -> the value of a node, or None where the rule has nothing to say about it

A rule raises `NoNormalForm` where the operation has no meaning in the normal form.
"""

from collections.abc import Set

from torch import fx

from fla_compile.passes import normal_form as nf
from fla_compile.passes.normal_form import NoNormalForm, Value, same_size
from fla_compile.passes.spellings import Call, tensor_of
from fla_compile.passes.window_families import summed
from fla_compile.passes.window_views import VIEW_RULES, padded
from fla_compile.passes.windows import LONGEST_PREFIX, Rule, Windows, fixed


def analyse(graph: fx.Graph, opaque: Set[fx.Node] = frozenset()) -> Windows:
    """The values of all tensors of a graph, of which `opaque` ones are made of nothing but themselves."""
    return Windows(graph, RULES, opaque)


def _mul(w: Windows, node: fx.Node, call: Call) -> Value:
    a, b = w.of(call.args["input"]), w.of(call.args["other"])
    if min(len(a.terms), len(b.terms)) > 1:
        raise NoNormalForm("a product of two sums")
    return nf.multiply(w.space, a, b)


def _div(w: Windows, node: fx.Node, call: Call) -> Value | None:
    by = call.args["other"]
    if not isinstance(by, int | float) or not by or call.get("rounding_mode") is not None:
        return None
    return nf.scaled(w.of(call.args["input"]), 1.0 / by)


def _neg(w: Windows, node: fx.Node, call: Call) -> Value:
    return nf.scaled(w.of(call.args["input"]), -1.0)


def _add(sign: float) -> Rule:
    def rule(w: Windows, node: fx.Node, call: Call) -> Value:
        return nf.add(w.space, w.of(call.args["input"]), w.of(call.args["other"]), sign * float(call.get("alpha", 1)))

    return rule


def _addcmul(w: Windows, node: fx.Node, call: Call) -> Value:
    product = nf.multiply(w.space, w.of(call.args["tensor1"]), w.of(call.args["tensor2"]))
    return nf.add(w.space, w.of(call.args["input"]), product, float(call.get("value", 1)))


def _lerp(w: Windows, node: fx.Node, call: Call) -> Value:
    a, b = w.of(call.args["input"]), w.of(call.args["end"])
    return nf.add(w.space, a, nf.multiply(w.space, w.of(call.args["weight"]), nf.add(w.space, b, a, -1.0)))


def _sum(w: Windows, node: fx.Node, call: Call) -> Value | None:
    value, dim = w.of(call.args["input"]), call.get("dim")
    axes = range(len(value.dims)) if dim is None else [dim] if isinstance(dim, int) else dim
    return summed(w, value, axes, bool(call.get("keepdim", False)))


def _einsum(w: Windows, node: fx.Node, call: Call) -> Value | None:
    operands = [x for key, x in call.args.items() if key != "input"]
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = list(operands[0])
    equation = call.args["input"].replace(" ", "")
    if "->" not in equation or "." in equation or len(operands) != 2:
        return None
    inputs, output = equation.split("->")
    names = [*dict.fromkeys(output + inputs.replace(",", ""))]
    parts = []
    for letters, operand in zip(inputs.split(","), operands, strict=True):
        if len(set(letters)) != len(letters):
            return None
        value = w.of(operand)
        dims = dict(zip(letters, value.dims, strict=True))
        parts.append(Value(tuple(dims.get(name, ()) for name in names), value.terms))
    if min(len(part.terms) for part in parts) > 1:
        return None
    product = nf.multiply(w.space, *parts)
    return summed(w, product, range(len(output), len(names)), False) if len(names) > len(output) else product


def _matmul(w: Windows, node: fx.Node, call: Call) -> Value | None:
    """Matrices times matrices, with the same batch axes."""
    a, b = w.of(call.args["input"]), w.of(call.args["other"])
    if len(a.dims) != len(b.dims) or len(a.dims) < 2 or min(len(a.terms), len(b.terms)) > 1:
        return None
    left = Value((*a.dims, ()), a.terms)
    right = Value((*b.dims[:-2], (), *b.dims[-2:]), b.terms)
    return summed(w, nf.multiply(w.space, left, right), [len(a.dims) - 1], False)


def _conv1d(w: Windows, node: fx.Node, call: Call) -> Value | None:
    """A depthwise convolution as the sum that it is."""
    x, weight, bias = call.args["input"], call.args["weight"], call.get("bias")
    first = {name: call.get(name, default) for name, default in (("stride", 1), ("dilation", 1), ("padding", 0))}
    stride, dilation, padding = (v[0] if isinstance(v, tuple | list) else v for v in first.values())
    shape, channels = tensor_of(weight).shape, tensor_of(x).shape[-2]
    depthwise = same_size(call.get("groups", 1), channels) and same_size(shape[0], channels) and shape[1] == 1
    width = shape[2]
    if not depthwise or stride != 1 or not isinstance(width, int) or not 1 < width <= LONGEST_PREFIX:
        return None
    total = dilation * (width - 1)
    if isinstance(padding, str):
        before = total // 2 if padding == "same" else 0
        after = total - before if padding == "same" else 0
    else:
        before = after = padding
    axis = len(tensor_of(x).shape) - 1
    value = padded(w, x, axis, before, after)
    length = fixed(tensor_of(node).shape[-1])
    total_value: Value | None = None
    for j in range(width):
        tap = w.cut(w.of(weight), 2, j, 1)
        tap = Value((tap.dims[0], ()), tap.terms)
        term = nf.multiply(w.space, w.cut(value, axis, j * dilation, length), tap)
        total_value = term if total_value is None else nf.add(w.space, total_value, term)
    assert total_value is not None
    if bias is not None:
        own = w.of(bias)
        total_value = nf.add(w.space, total_value, Value((own.dims[0], ()), own.terms))
    return total_value


RULES: dict[str, Rule] = VIEW_RULES | {
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "add": _add(1.0),
    "sub": _add(-1.0),
    "addcmul": _addcmul,
    "lerp": _lerp,
    "sum": _sum,
    "einsum": _einsum,
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    "conv1d": _conv1d,
}

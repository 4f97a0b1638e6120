"""The rules by which operations become sums of products of windows: one for each of a small closed set.

    rule(windows, node, call) -> the value of a node, or None where the rule has nothing to say about it

A rule raises `NoNormalForm` where the operation has no meaning in the normal form.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from fla_compile.passes import normal_form as nf
from fla_compile.passes.normal_form import Factor, Labels, NoNormalForm, Term, Value, same_size
from fla_compile.passes.scans import ZEROS
from fla_compile.passes.spellings import Call, tensor_of
from fla_compile.passes.windows import (
    LONGEST_PREFIX,
    ZERO,
    Family,
    Row,
    Rule,
    Window,
    Windows,
    extended,
    fixed,
    size_of,
)


def analyse(graph: fx.Graph) -> Windows:
    """The values of all tensors of a graph."""
    return Windows(graph, RULES)


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


def summed(w: Windows, value: Value, axes: Iterable[int], keepdim: bool) -> Value:
    """The sum over axes; terms with a family along one of them become one term for each of its members."""
    for axis in sorted((axis % len(value.dims) for axis in axes), reverse=True):
        labels = value.dims[axis]
        families = [t for t in value.terms if labels and any(_runs_along(w, f, labels) for f in t.factors)]
        rest = Value(value.dims, tuple(t for t in value.terms if t not in families))
        total = nf.reduce_sum(w.space, rest, [axis], keepdim)
        written = [t for term in families for t in written_out(w, term, labels)]
        value = nf.collect(Value(total.dims, (*total.terms, *written)))
    return value


def _runs_along(w: Windows, f: Factor, labels: Labels) -> bool:
    return isinstance(w.atoms[f.atom], Family) and f.axes[-1] == labels


def written_out(w: Windows, term: Term, labels: Labels) -> list[Term]:
    """The sum of a term over the axis of a family, member by member."""
    family = next(f for f in term.factors if _runs_along(w, f, labels))
    count = len(w.atoms[family.atom].members)  # type: ignore[union-attr]
    return [Term(term.coef, tuple(picked(w, f, labels, i) for f in term.factors)) for i in range(count)]


def picked(w: Windows, f: Factor, labels: Labels, i: int) -> Factor:
    """Entry i of a factor along an axis."""
    what = w.atoms[f.atom]
    if isinstance(what, Family) and _runs_along(w, f, labels):
        return Factor(what.members[i], f.axes[:-1])
    for at, own in enumerate(f.axes):
        if own == labels:
            atom = w.moved(f.atom, at, lambda x: Window(x.node, x.axis, x.start + i, 1, x.prefix, x.suffix))
            return Factor(atom, (*f.axes[:at], (), *f.axes[at + 1 :]))
    if labels[0] in f.labels:
        raise NoNormalForm("a part of a merged axis")
    return f


def _permute(w: Windows, node: fx.Node, call: Call) -> Value:
    value = w.of(call.args["input"])
    return nf.permute(value, [axis % len(value.dims) for axis in call.args["dims"]])


def _transpose(w: Windows, node: fx.Node, call: Call) -> Value:
    value = w.of(call.args["input"])
    order = list(range(len(value.dims)))
    i, j = call.args["dim0"], call.args["dim1"]
    order[i], order[j] = order[j], order[i]
    return nf.permute(value, order)


def _turned(w: Windows, node: fx.Node, call: Call) -> Value:
    """x.mT, and the t of a matrix."""
    value = w.of(call.args["input"])
    return nf.permute(value, [*range(len(value.dims) - 2), len(value.dims) - 1, len(value.dims) - 2])


def _movedim(w: Windows, node: fx.Node, call: Call) -> Value:
    value = w.of(call.args["input"])
    source, target = call.args["other"], call.args["arg2"]
    order = list(range(len(value.dims)))
    order.insert(target % len(order), order.pop(source % len(order)))
    return nf.permute(value, order)


def _reshape(w: Windows, node: fx.Node, call: Call) -> Value:
    """Of a sum only what adds or drops axes of size 1."""
    value, shape = w.of(call.args["input"]), tensor_of(node).shape
    if len(value.terms) == 1:
        return nf.reshape(w.space, value, shape)
    rest = [axis for axis in value.dims if axis]
    dims = [() if same_size(size, 1) else rest.pop(0) for size in shape]
    if rest:
        raise NoNormalForm("a sum in another shape")
    return Value(tuple(dims), value.terms)


def _same(w: Windows, node: fx.Node, call: Call) -> Value:
    return w.of(call.args["input"])


def _cast(w: Windows, node: fx.Node, call: Call) -> Value | None:
    have, want = tensor_of(call.args["input"]), tensor_of(node)
    lossless = have.device == want.device and torch.promote_types(have.dtype, want.dtype) == want.dtype
    return w.of(call.args["input"]) if lossless else None


def _expand(w: Windows, node: fx.Node, call: Call) -> Value:
    return nf.expand(w.space, w.of(call.args["input"]), tensor_of(node).shape)


def _constant(w: Windows, node: fx.Node, call: Call) -> Value | None:
    if call.name in ZEROS:
        return w.space.constant(0.0, tensor_of(node).shape)
    return None


def _getitem(w: Windows, node: fx.Node, call: Call) -> Value | None:
    """Slices, numbers, None and ... of a tensor."""
    value, index = w.of(call.args["input"]), call.args["index"]
    index = list(index) if isinstance(index, tuple) else [index]
    if any(not (i is None or i is Ellipsis or isinstance(i, slice | int)) for i in index):
        return None
    given = sum(i is not None and i is not Ellipsis for i in index)
    if Ellipsis not in index:
        index.append(Ellipsis)
    at = index.index(Ellipsis)
    index[at : at + 1] = [slice(None)] * (len(value.dims) - given)
    out, axis = 0, 0  # of the result, of what is left of the operand
    sizes = list(tensor_of(call.args["input"]).shape)
    for i in index:
        if i is None:
            value = Value((*value.dims[:axis], (), *value.dims[axis:]), value.terms)
            sizes.insert(axis, 1)
            axis, out = axis + 1, out + 1
        elif isinstance(i, int):
            value = w.cut(value, axis, i if i >= 0 else i + sizes[axis], 1)
            value = Value((*value.dims[:axis], *value.dims[axis + 1 :]), value.terms)
            sizes.pop(axis)
        else:
            if i.step not in (None, 1):
                return None
            length = fixed(tensor_of(node).shape[out])
            value = w.cut(value, axis, first_step(size_of(i.start), sizes[axis]), length)
            axis, out = axis + 1, out + 1
    return value


def first_step(start: Any, size: Any) -> Any:
    """Where a slice begins."""
    if start is None:
        return 0
    negative = start < 0 if isinstance(start, int) else bool(start.node.hint < 0)
    return fixed(start + size) if negative else fixed(start)


def _narrow(w: Windows, node: fx.Node, call: Call) -> Value:
    axis = call.args["dim"]
    source = call.args["input"]
    start = first_step(size_of(call.args["start"]), tensor_of(source).shape[axis])
    return w.cut(w.of(source), axis, start, fixed(tensor_of(node).shape[axis]))


def _slice(w: Windows, node: fx.Node, call: Call) -> Value | None:
    """aten.slice(x, dim, start, end, step)."""
    given = [call.args["input"], *(call.get(name) for name in ("other", "arg2", "arg3", "arg4"))]
    source, axis, start, _, step = given
    axis = axis or 0
    if step not in (None, 1):
        return None
    begin = first_step(size_of(start), tensor_of(source).shape[axis])
    return w.cut(w.of(source), axis, begin, fixed(tensor_of(node).shape[axis]))


def _select(w: Windows, node: fx.Node, call: Call) -> Value:
    source, axis, index = call.args["input"], call.args["dim"], size_of(call.args["index"])
    size = tensor_of(source).shape[axis]
    value = w.cut(w.of(source), axis, first_step(index, size), 1)
    axis %= len(value.dims)
    return Value((*value.dims[:axis], *value.dims[axis + 1 :]), value.terms)


def _pad(w: Windows, node: fx.Node, call: Call) -> Value | None:
    """F.pad of one axis with zeros; negative amounts cut."""
    if call.get("mode", "constant") != "constant" or call.get("value") not in (None, 0, 0.0):
        return None
    source, amounts = call.args["input"], [size_of(x) for x in call.args["pad"]]
    touched = [i for i in range(len(amounts) // 2) if amounts[2 * i] or amounts[2 * i + 1]]
    if len(touched) != 1:
        return None
    (i,) = touched
    return padded(w, source, len(tensor_of(source).shape) - 1 - i, amounts[2 * i], amounts[2 * i + 1])


def padded(w: Windows, source: fx.Node, axis: int, before: int, after: int) -> Value:
    rows = [ZERO] * max(0, before)
    if before >= 0 and after >= 0:
        return w.grown(source, axis, rows, after)
    start, size = max(0, -before), fixed(tensor_of(source).shape[axis] + min(0, before) + min(0, after))
    value = w.cut(w.of(source), axis, start, size)
    if not all(any(value.dims[axis] in f.axes for f in t.factors) for t in value.terms):
        raise NoNormalForm("zeros beside what is the same at every step")
    length = fixed(size + len(rows) + max(0, after))
    return w.along(value, axis, length, lambda x: extended(x, rows, max(0, after)))


def _cat(w: Windows, node: fx.Node, call: Call) -> Value | None:
    """Some steps, zeros or those of other tensors, then a tensor, then zeros."""
    pieces, axis = list(call.args["tensors"]), call.get("dim", 0)
    order = tuple(range(len(tensor_of(node).shape)))
    axis %= len(order)
    if len({tensor_of(piece).dtype for piece in pieces}) > 1:
        return None
    after = 0
    while len(pieces) > 1 and w.zeros(pieces[-1]):
        after += int(tensor_of(pieces.pop()).shape[axis])
    main = pieces.pop()
    rows: list[Row] = []
    for piece in pieces:
        count = fixed(tensor_of(piece).shape[axis])
        if not isinstance(count, int) or count > LONGEST_PREFIX:
            return None
        rows += [ZERO if w.zeros(piece) else Row(piece, i, axis, order) for i in range(count)]
    return w.grown(main, axis, rows[::-1], after)


def _unfold(w: Windows, node: fx.Node, call: Call) -> Value | None:
    """x.unfold(dim, W, 1): a last axis of W windows."""
    width, axis = call.args["size"], call.args["dimension"]
    if call.args.get("step") != 1 or not isinstance(width, int) or not 1 < width <= LONGEST_PREFIX:
        return None
    value = w.of(call.args["input"])
    axis %= len(value.dims)
    length = fixed(tensor_of(node).shape[axis])
    return stacked(w, [w.cut(value, axis, j, length) for j in range(width)])


def _stack(w: Windows, node: fx.Node, call: Call) -> Value | None:
    value = stacked(w, [w.of(x) for x in call.args["tensors"]])
    axis = call.get("dim", 0) % len(value.dims)
    order = list(range(len(value.dims) - 1))
    order.insert(axis, len(order))
    return nf.permute(value, order)


def stacked(w: Windows, values: Sequence[Value]) -> Value:
    """Views of windows with the same axes, along a new last axis."""
    first = w.single(values[0])
    members = []
    for value in values:
        own = w.single(value)
        names = dict(zip((x for axis in value.dims for x in axis), (x for d in values[0].dims for x in d), strict=True))
        axes = tuple(tuple(names[label] for label in axis) for axis in own.axes)
        if axes != first.axes or isinstance(w.atoms[own.atom], Family):
            raise NoNormalForm("a stack of different things")
        members.append(own.atom)
    label = w.space.axis(len(members))
    factor = Factor(w.atom(Family(tuple(members))), (*first.axes, label))
    return Value((*values[0].dims, label), (Term(1.0, (factor,)),))


def _flip(w: Windows, node: fx.Node, call: Call) -> Value | None:
    """Along the axis of a family: its members the other way round."""
    value, dims = w.of(call.args["input"]), call.args["other"] if "other" in call.args else call.args["dims"]
    dims = [dims] if isinstance(dims, int) else list(dims)
    factor = w.single(value)
    what = w.atoms[factor.atom]
    if not isinstance(what, Family) or len(dims) != 1 or value.dims[dims[0]] != factor.axes[-1]:
        return None
    return Value(value.dims, (Term(1.0, (Factor(w.atom(Family(what.members[::-1])), factor.axes),)),))


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


RULES: dict[str, Rule] = {
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "add": _add(1.0),
    "sub": _add(-1.0),
    "addcmul": _addcmul,
    "lerp": _lerp,
    "sum": _sum,
    "einsum": _einsum,
    "conv1d": _conv1d,
    "pad": _pad,
    "cat": _cat,
    "stack": _stack,
    "unfold": _unfold,
    "flip": _flip,
    "getitem": _getitem,
    "narrow": _narrow,
    "slice": _slice,
    "select": _select,
    "permute": _permute,
    "transpose": _transpose,
    "mT": _turned,
    "T": _turned,
    "t": _turned,
    "movedim": _movedim,
    **dict.fromkeys(("view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "view_as"), _reshape),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("contiguous", "clone", "alias"), _same),
    "to": _cast,
    **dict.fromkeys(ZEROS, _constant),
}

"""The rules of views: axes, slices, and what puts steps in front of a tensor or windows of it side by side."""

from typing import Any

import torch
from torch import fx

from fla_compile.passes import normal_form as nf
from fla_compile.passes.normal_form import Factor, NoNormalForm, Term, Value, same_size
from fla_compile.passes.scans import ZEROS
from fla_compile.passes.spellings import Call, tensor_of
from fla_compile.passes.window_families import joined, stacked, with_axis
from fla_compile.passes.windows import LONGEST_PREFIX, ZERO, Family, Row, Rule, Windows, extended, fixed, size_of


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
    """x.mT, x.T, and the t of a matrix."""
    value = w.of(call.args["input"])
    if call.name == "T":
        return nf.permute(value, range(len(value.dims))[::-1])
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
    whole = joined(w, [w.of(piece) for piece in pieces], axis)
    if whole is not None:
        return whole
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
    return with_axis(value, call.get("dim", 0) % len(value.dims))


def _flip(w: Windows, node: fx.Node, call: Call) -> Value | None:
    """Along the axis of a family: its members the other way round."""
    value, dims = w.of(call.args["input"]), call.args["other"] if "other" in call.args else call.args["dims"]
    dims = [dims] if isinstance(dims, int) else list(dims)
    factor = w.single(value)
    what = w.atoms[factor.atom]
    if not isinstance(what, Family) or len(dims) != 1 or value.dims[dims[0]] != factor.axes[-1]:
        return None
    return Value(value.dims, (Term(1.0, (Factor(w.atom(Family(what.members[::-1])), factor.axes),)),))


VIEW_RULES: dict[str, Rule] = {
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
    **dict.fromkeys(("mT", "T", "t"), _turned),
    "movedim": _movedim,
    **dict.fromkeys(("view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "view_as"), _reshape),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("contiguous", "clone", "alias"), _same),
    "to": _cast,
    **dict.fromkeys(ZEROS, _constant),
}

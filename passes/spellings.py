"""One name and one set of arguments for an operation, however the program spells it.

`x * y`, `x.mul(y)`, `torch.multiply(input=x, other=y)`, `x.mul_(y)`, `x *= y` and `aten.mul.Tensor(x, y)` are all
`Call("mul", {"input": x, "other": y}, ...)`. For the passes that read Dynamo's graph, where functions, methods and
operators stand as the user wrote them. Nothing here knows a pattern, and deciding never changes a graph.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fla_compile.passes.log_decay import op_name

ALIASES = {
    "multiply": "mul", "divide": "div", "subtract": "sub", "negative": "neg", "absolute": "abs", "truediv": "div",
    "true_divide": "div", "clip": "clamp", "concat": "cat", "concatenate": "cat", "swapaxes": "transpose",
    "swapdims": "transpose", "moveaxis": "movedim", "greater": "gt", "greater_equal": "ge", "less": "lt",
    "less_equal": "le", "not_equal": "ne", "special_expit": "sigmoid", "special_softmax": "softmax",
    "special_log_softmax": "log_softmax", "special_logsumexp": "logsumexp", "special_exp2": "exp2",
    "special_log1p": "log1p", "special_expm1": "expm1", "_softmax": "softmax", "_log_softmax": "log_softmax",
    "_unsafe_view": "view", "linalg_vector_norm": "vector_norm", "linalg_norm": "norm",
    "nll_loss_nd": "nll_loss", "float": "to", "double": "to", "half": "to", "bfloat16": "to", "type": "to",
    "type_as": "to", "_to_copy": "to", "constant_pad_nd": "pad",
}  # fmt: skip

# Arguments by position, for what passes ask about; methods have their tensor first. An operation that is not listed
# has "input", "other" and then numbers.
SIGNATURES: dict[str, tuple[str, ...]] = {
    "add": ("input", "other", "alpha"),
    "sub": ("input", "other", "alpha"),
    "mul": ("input", "other"),
    "div": ("input", "other", "rounding_mode"),
    "pow": ("input", "exponent"),
    "float_power": ("input", "exponent"),
    "addcmul": ("input", "tensor1", "tensor2", "value"),
    "addcdiv": ("input", "tensor1", "tensor2", "value"),
    "lerp": ("input", "end", "weight"),
    "where": ("condition", "input", "other"),
    "masked_fill": ("input", "mask", "value"),
    "clamp": ("input", "min", "max"),
    "mean": ("input", "dim", "keepdim", "dtype"),
    "sum": ("input", "dim", "keepdim", "dtype"),
    "nanmean": ("input", "dim", "keepdim", "dtype"),
    "amax": ("input", "dim", "keepdim"),
    "var": ("input", "dim", "unbiased", "keepdim", "correction"),
    "std": ("input", "dim", "unbiased", "keepdim", "correction"),
    "var_mean": ("input", "dim", "unbiased", "keepdim", "correction"),
    "std_mean": ("input", "dim", "unbiased", "keepdim", "correction"),
    "norm": ("input", "p", "dim", "keepdim", "out", "dtype"),
    "vector_norm": ("input", "ord", "dim", "keepdim", "dtype"),
    "normalize": ("input", "p", "dim", "eps"),
    "logsumexp": ("input", "dim", "keepdim"),
    "softmax": ("input", "dim", "_stacklevel", "dtype"),
    "log_softmax": ("input", "dim", "_stacklevel", "dtype"),
    "silu": ("input", "inplace"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "linear": ("input", "weight", "bias"),
    "matmul": ("input", "other"),
    "addmm": ("input", "mat1", "mat2", "beta", "alpha"),
    "gather": ("input", "dim", "index"),
    "take_along_dim": ("input", "index", "dim"),
    "nll_loss": ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction"),
    "cross_entropy": (
        "input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing",
    ),
    "kl_div": ("input", "target", "size_average", "reduce", "reduction", "log_target"),
    "conv1d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "pad": ("input", "pad", "mode", "value"),
    "unfold": ("input", "dimension", "size", "step"),
    "cat": ("tensors", "dim"),
    "stack": ("tensors", "dim"),
    "getitem": ("input", "index"),
    "view": ("input", "size"),
    "reshape": ("input", "size"),
    "expand": ("input", "size"),
    "repeat": ("input", "size"),
    "permute": ("input", "dims"),
    "transpose": ("input", "dim0", "dim1"),
    "unsqueeze": ("input", "dim"),
    "squeeze": ("input", "dim"),
    "flatten": ("input", "start_dim", "end_dim"),
    "unflatten": ("input", "dim", "sizes"),
    "narrow": ("input", "dim", "start", "length"),
    "select": ("input", "dim", "index"),
    "to": ("input", "dtype"),
}  # fmt: skip
VARIADIC = {"view", "reshape", "expand", "repeat", "permute"}  # x.view(2, 3) is x.view((2, 3))
RENAMED = {
    "self": "input", "axis": "dim", "keepdims": "keepdim", "shape": "size", "x": "input", "value2": "value",
    "indices": "index",
}  # fmt: skip

_IN_PLACE = {
    operator.iadd: "add", operator.isub: "sub", operator.imul: "mul", operator.itruediv: "div", operator.ipow: "pow",
    operator.imatmul: "matmul", operator.iand: "and", operator.ior: "or",
}  # fmt: skip
_CASTS = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Call:
    """An operation and the arguments that were given; `in_place` if it writes its result over its input."""

    name: str
    args: Mapping[str, Any]
    in_place: bool = False

    def get(self, name: str, default: Any = None) -> Any:
        return self.args.get(name, default)


def call_of(node: fx.Node) -> Call | None:
    """What a node calls; None for what calls nothing, and for arguments that fit no signature."""
    if node.op not in ("call_function", "call_method"):
        return None
    raw, in_place = op_name(node), False
    if node.target in _IN_PLACE:
        raw, in_place = _IN_PLACE[node.target], True  # type: ignore[index]
    elif raw.startswith("__") and raw.endswith("__"):
        raw = raw.strip("_")
        reflected = raw[1:] in ("sub", "truediv", "pow", "add", "mul")
        raw = {"rsub": "rsub", "rtruediv": "rdiv", "rpow": "rpow"}.get(raw, raw[1:]) if reflected else raw
    elif raw.endswith("_") and not raw.endswith("__"):
        raw, in_place = raw[:-1], True
    args, kwargs = list(node.args), {RENAMED.get(key, key): value for key, value in node.kwargs.items()}
    name = ALIASES.get(raw, raw)
    if kwargs.get("inplace") is True or (name == "silu" and len(args) > 1 and args[1] is True):
        in_place = True
    if name in ("rsub", "rdiv", "rpow"):
        name, args[:2] = name[1:], args[1::-1]
    if name == "where" and node.op == "call_method" and len(args) == 3:
        args = [args[1], args[0], args[2]]
    if name in VARIADIC and len(args) > 1 and not isinstance(args[1], tuple | list):
        args = [args[0], tuple(args[1:])]
    if name == "to":
        cast = _CASTS.get(raw) or next((x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.dtype)), None)
        value = tensor_of(node)
        dtype = cast or (value.dtype if value is not None else None)
        return Call(name, {"input": args[0] if args else kwargs.get("input"), "dtype": dtype}, in_place)
    if name in ("var", "std", "var_mean", "std_mean") and len(args) > 1 and isinstance(args[1], bool):
        args = [args[0], None, *args[1:]]
    names = SIGNATURES.get(name, ("input", "other", *(f"arg{i}" for i in range(2, len(args)))))
    if len(args) > len(names) or any(key in kwargs for key in names[: len(args)]):
        return None
    return Call(name, {**dict(zip(names, args, strict=False)), **kwargs}, in_place)


def tensor_of(node: Any) -> torch.Tensor | None:
    """The fake tensor that a node of Dynamo's graph, or of a traced one, stands for."""
    value = node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def is_cast(node: fx.Node) -> bool:
    """A change of floating type alone: same shape, same device."""
    call = call_of(node)
    if call is None or call.name != "to" or call.in_place:
        return False
    have, want = tensor_of(call.get("input")), tensor_of(node)
    if have is None or want is None or have.device != want.device or have.shape != want.shape:
        return False
    return have.dtype.is_floating_point and want.dtype.is_floating_point


def keeps_value(node: fx.Node) -> bool:
    """A cast that rounds nothing."""
    if not is_cast(node):
        return False
    have, want = tensor_of(node.args[0]), tensor_of(node)
    return torch.promote_types(have.dtype, want.dtype) == want.dtype


_RESHAPES = {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "reshape_as", "ravel"}
_COPIES = {"contiguous", "clone", "alias"}


def is_reshape(node: fx.Node) -> bool:
    """The same elements in the same (row-major) order: views that only split, merge, add or drop axes, and copies."""
    call = call_of(node)
    if call is None or call.in_place:
        return False
    have, want = tensor_of(call.get("input")), tensor_of(node)
    if have is None or want is None or have.dtype != want.dtype or have.device != want.device:
        return False
    if call.name in _RESHAPES:
        return True
    if call.name in _COPIES:
        return have.shape == want.shape
    if call.name == "getitem":
        index = call.get("index")
        index = index if isinstance(index, tuple) else (index,)
        return all(i is None or i is Ellipsis or i == slice(None) for i in index)
    return False


def peel(node: Any, *, casts: bool = True, reshapes: bool = True) -> Any:
    """Behind the casts that round nothing and the reshapes in front of a value."""
    while isinstance(node, fx.Node):
        if not ((casts and keeps_value(node)) or (reshapes and is_reshape(node))):
            break
        node = node.args[0] if node.args else node.kwargs["input"]
    return node

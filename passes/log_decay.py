"""Is a decay known to be positive, and what is its logarithm?

A decay may live in log space when the program itself proves that it is positive: `exp(x)`, `sigmoid(x)`,
`1 - sigmoid(x)`, powers, products and views of these, or a constant whose values were looked at. `log_of` decides and
answers with a small expression; `emit` writes that expression into a graph. Deciding never changes a graph.

A decay of unknown sign that needs no gradient (a buffer, any decay in inference) goes as `magnitude`: the log of its
absolute value, zero included, while its signs are multiplied into q and k (see lower_recurrence.py). With a gradient
this would be wrong at zero, so there it is refused.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

VIEWS = {
    "movedim", "moveaxis", "transpose", "swapaxes", "permute", "unsqueeze", "squeeze", "view", "reshape", "expand",
    "contiguous", "clone", "alias", "getitem", "select", "narrow", "flatten", "unflatten", "t", "_unsafe_view",
    "expand_as", "view_as", "slice", "T", "mT",
}  # fmt: skip
# Operations that only move elements to other places, as a loop that runs backwards does.
MOVES = {"flip", "roll", "repeat", "tile", "repeat_interleave", "index_select", "fliplr", "flipud"}
CASTS = {"to", "float", "double", "_to_copy", "type_as"}
CREATION = {"arange", "tensor", "as_tensor", "full", "ones", "linspace", "logspace", "zeros", "scalar_tensor", "eye"}
MAX_CONSTANT = 1 << 16
LOG_ZERO = -1e4  # exp of it is 0 in every type, and sums of it stay finite


@dataclass(frozen=True)
class Log:
    """log(decay) as an expression: `op` applied to `args`; a leaf is a graph node or a number."""

    op: str
    args: tuple[Any, ...]
    proof: str


def op_name(node: fx.Node) -> str:
    """One name for an operation however it was called: torch.exp, Tensor.exp, aten.exp.default, operator.mul."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        packet = getattr(node.target, "overloadpacket", None)
        name = packet.__name__ if packet is not None else getattr(node.target, "__name__", str(node.target))
        if name == "getattr":  # x.mT
            name = str(node.args[1])
    else:
        return node.op
    return {"truediv": "div", "true_divide": "div", "special_expit": "sigmoid", "expit": "sigmoid"}.get(name, name)


def log_of(node: Any, operand: Callable[[fx.Node], Log | None]) -> Log | None:
    """The logarithm of `node`, or None where nothing proves it positive; `operand` answers for placeholders."""
    if isinstance(node, int | float):
        return Log("number", (math.log(node),), "constant") if node > 0 else None
    if not isinstance(node, fx.Node):
        return None
    name, args = op_name(node), node.args
    if node.op == "placeholder":
        return operand(node)
    if node.kwargs and name not in VIEWS | CASTS | MOVES and constant_value(node) is None:
        return None  # a rounding mode, an `out`
    if name == "exp":
        return Log("node", (args[0],), "exp")
    if name == "exp2":
        return Log("scale", (Log("node", (args[0],), "exp"), math.log(2.0)), "exp")
    if name == "sigmoid":
        return Log("logsigmoid", (args[0],), "sigmoid")
    if name in CASTS and _is_mask(args[0]):
        return Log("mask", (args[0],), "mask")
    if name == "where" and len(args) == 3:
        a, b = (_branch(x, operand) for x in args[1:])
        return Log("where", (args[0], a, b), "mask") if a is not None and b is not None else None
    if name == "masked_fill" and len(args) == 3:
        a, b = _branch(args[2], operand), _branch(args[0], operand)
        return Log("where", (args[1], a, b), "mask") if a is not None and b is not None else None
    if name in ("rsub", "sub") and _one_minus(node) is not None:
        inner = _one_minus(node)
        if op_name(inner) == "sigmoid":  # type: ignore[arg-type]
            return Log("logsigmoid_negative", (inner.args[0],), "sigmoid")  # type: ignore[union-attr]
    if name in ("mul", "div") and len(args) == 2:
        a, b = log_of(args[0], operand), log_of(args[1], operand)
        if a is not None and b is not None:
            return Log("add" if name == "mul" else "subtract", (a, b), a.proof)
    if name in ("pow", "pow_") and len(args) == 2 and isinstance(args[1], int | float):
        base = log_of(args[0], operand)
        return Log("scale", (base, float(args[1])), base.proof) if base is not None else None
    if name in ("sqrt", "rsqrt", "reciprocal"):
        base = log_of(args[0], operand)
        power = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}[name]
        return Log("scale", (base, power), base.proof) if base is not None else None
    if name in VIEWS | MOVES and _is_tensor(args[0]):
        base = log_of(args[0], operand)
        return Log("view", (node, base), base.proof) if base is not None else None
    if name in CASTS and _device(node) == _device(args[0]) and _is_float(node) and _is_float(args[0]):
        return log_of(args[0], operand)
    constant = constant_value(node)
    if constant is not None and bool((constant > 0).all()) and bool(torch.isfinite(constant).all()):
        return Log("log", (node,), "constant")
    return None


def _is_mask(node: Any) -> bool:
    return _is_tensor(node) and _value(node).dtype == torch.bool


def _branch(x: Any, operand: Callable[[fx.Node], Log | None]) -> Log | None:
    """A branch of a `where`, which may be zero: a reset."""
    if isinstance(x, int | float) and x == 0:
        return Log("number", (LOG_ZERO,), "constant")
    if isinstance(x, fx.Node) and x.op != "placeholder":
        fixed = constant_value(x)
        if fixed is not None and not fixed.any():
            return Log("number", (LOG_ZERO,), "constant")
    return log_of(x, operand)


def _one_minus(node: fx.Node) -> fx.Node | None:
    a, b = (node.args[1], node.args[0]) if op_name(node) == "rsub" else (node.args[0], node.args[1])
    return b if isinstance(a, int | float) and a == 1 and isinstance(b, fx.Node) and not node.kwargs else None


def _is_tensor(node: Any) -> bool:
    return isinstance(_value(node), torch.Tensor)


def _is_float(node: Any) -> bool:
    return _is_tensor(node) and _value(node).dtype.is_floating_point


def _value(node: Any) -> Any:
    return node.meta.get("val", node.meta.get("example_value")) if isinstance(node, fx.Node) else None


def _device(node: Any) -> Any:
    return _value(node).device if _is_tensor(node) else None


def root_of(node: fx.Node) -> fx.Node:
    """The tensor that `node` is a view of, as far as the graph shows."""
    while op_name(node) in VIEWS and node.all_input_nodes and _is_tensor(node.args[0]):
        node = node.args[0]  # type: ignore[assignment]
    return node


def constant_value(node: fx.Node) -> torch.Tensor | None:
    """The value of a small tensor that depends on nothing but numbers in the program."""
    order: list[fx.Node] = []
    todo, seen = [node], set()
    while todo:
        here = todo.pop()
        if here in seen:
            continue
        seen.add(here)
        order.append(here)
        if here.op not in ("call_function", "call_method") or len(order) > 64:
            return None
        if not here.all_input_nodes and op_name(here) not in CREATION:
            return None
        todo.extend(here.all_input_nodes)
    fake = _value(node)
    if not isinstance(fake, torch.Tensor) or not all(isinstance(s, int) for s in fake.shape):
        return None
    if fake.numel() > MAX_CONSTANT or not fake.dtype.is_floating_point:
        return None
    env: dict[fx.Node, Any] = {}
    with torch._guards.tracing(None), torch.no_grad():
        for here in sorted(seen):
            args, kwargs = fx.map_arg((here.args, here.kwargs), lambda n: env[n])
            if here.op == "call_method":
                env[here] = getattr(args[0], str(here.target))(*args[1:], **kwargs)
            else:
                env[here] = here.target(*args, **kwargs)  # type: ignore[operator]
    return env[node] if isinstance(env[node], torch.Tensor) else None


def emit(log: Log, graph: fx.Graph) -> fx.Node | float:
    """Write the expression into `graph` at its insertion point."""
    args = log.args
    if log.op in ("number", "node"):
        return args[0]
    if args and _is_float(args[0]) and _value(args[0]).dtype in (torch.float16, torch.bfloat16):
        args = (graph.call_method("to", (args[0], torch.float32)), *args[1:])
    if log.op == "logsigmoid":
        return graph.call_function(torch.nn.functional.logsigmoid, (args[0],))
    if log.op == "logsigmoid_negative":
        return graph.call_function(torch.nn.functional.logsigmoid, (graph.call_function(torch.neg, (args[0],)),))
    if log.op == "log":
        return graph.call_function(torch.log, (args[0],))
    if log.op == "magnitude":
        size = graph.call_function(torch.log, (graph.call_function(torch.abs, (args[0],)),))
        return graph.call_function(torch.clamp, (size,), {"min": LOG_ZERO})
    if log.op == "mask":
        return graph.call_function(torch.where, (args[0], 0.0, LOG_ZERO))
    if log.op == "where":
        return graph.call_function(torch.where, (args[0], emit(args[1], graph), emit(args[2], graph)))
    if log.op == "scale":
        return graph.call_function(operator.mul, (emit(args[0], graph), args[1]))
    if log.op in ("add", "subtract"):
        function = operator.add if log.op == "add" else operator.sub
        return graph.call_function(function, (emit(args[0], graph), emit(args[1], graph)))
    if log.op == "view":
        view, inner = args[0], emit(args[1], graph)
        return graph.create_node(view.op, view.target, (inner, *view.args[1:]), dict(view.kwargs))
    raise ValueError(f"log has an unknown op: {log.op}")

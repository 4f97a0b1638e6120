"""Open the parts of a lowered loop that read a rolling buffer, so that other passes see what they compute.

Before: call_module part(unfold(cat([buffer, x])), ...), the body of the loop mapped over all steps.
After: its operations, over all steps, as nodes of the graph. They compute the same: they are what the part runs.
A part that cannot be traced, or holds tensors of its own, stays as it is.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fla_compile.passes.autocast import entered
from fla_compile.passes.normalise import trace_step
from fla_compile.passes.over_time import OverTime
from fla_compile.passes.spellings import call_of, tensor_of

VIEWS = {"movedim", "flip", "narrow", "getitem", "unfold"}


def inline_parts(gm: fx.GraphModule) -> int:
    """Open every part that reads windows of a tensor, in place; returns how many."""
    parts = [node for node in gm.graph.find_nodes(op="call_module") if _reads_windows(gm, node)]
    if not parts:
        return 0
    with _no_guards(gm):
        give_values(gm, parts)
        return sum(_inline(gm, node) for node in parts)


def _fake_mode(gm: fx.GraphModule) -> Any:
    fakes = (node.meta.get("example_value") for node in gm.graph.nodes)
    return next((x.fake_mode for x in fakes if hasattr(x, "fake_mode")), None)


def _no_guards(gm: fx.GraphModule) -> Any:
    """What is asked here is only in which order strides are: no reason to compile again for another length."""
    shapes = getattr(_fake_mode(gm), "shape_env", None)
    return contextlib.nullcontext() if shapes is None else shapes.suppress_guards()


def _reads_windows(gm: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(gm.get_submodule(node.target), OverTime) and any(map(_is_window, node.all_input_nodes))


def _is_window(node: fx.Node) -> bool:
    call = call_of(node)
    while call is not None and call.name in VIEWS and isinstance(call.get("input"), fx.Node):
        if call.name == "unfold":
            return True
        call = call_of(call.args["input"])
    return False


def give_values(gm: fx.GraphModule, wanted: Sequence[fx.Node]) -> None:
    """Fake values for what these nodes are computed from and has none: what replaced a loop."""
    mode = _fake_mode(gm)
    missing, todo = set[fx.Node](), list(wanted)
    while todo:
        node = todo.pop()
        if node not in missing and node.all_input_nodes and "example_value" not in node.meta:
            missing.add(node)
            todo += node.all_input_nodes
    with torch._guards.tracing(None), mode or contextlib.nullcontext(), torch.no_grad():
        for node in sorted(missing):
            if all("example_value" in n.meta for n in node.all_input_nodes):
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
                node.meta["example_value"] = _run(gm, node, args, kwargs)


def _run(gm: fx.GraphModule, node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op == "call_module":
        return gm.get_submodule(node.target)(*args, **kwargs)
    if node.target is torch.narrow:  # outside of Dynamo it would make a dynamic length a constant
        x, axis, start, length = args
        return x[(*[slice(None)] * axis, slice(start, start + length))]
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _inline(gm: fx.GraphModule, node: fx.Node) -> bool:
    operands = list(node.args)
    if any(not isinstance(x, fx.Node) or "example_value" not in x.meta for x in operands):
        return False
    # it runs without autocast, whatever the caller's
    devices = {x.device.type for x in map(tensor_of, operands) if x is not None}
    graph = fx.Graph()
    places = []
    for i, operand in enumerate(operands):
        places.append(graph.placeholder(f"operand_{i}"))
        places[-1].meta["example_value"] = operand.meta["example_value"]
    graph.output(graph.call_module(node.target, tuple(places)))
    try:
        step = trace_step(fx.GraphModule(gm, graph), entered([(device, None, False, None) for device in devices]))
    except Exception:  # whatever the part's operations raise without data
        return False
    if step.graph.find_nodes(op="get_attr"):
        return False
    env: dict[fx.Node, Any] = dict(zip(step.graph.find_nodes(op="placeholder"), operands, strict=True))
    with gm.graph.inserting_before(node):
        for inner in step.graph.nodes:
            if inner.op in ("placeholder", "output"):
                continue
            env[inner] = gm.graph.node_copy(inner, env.__getitem__)
            env[inner].meta = {"stack_trace": node.meta.get("stack_trace")}
            if "val" in inner.meta:
                env[inner].meta["example_value"] = inner.meta["val"]
    results = [env[result] for result in step.graph.output_node().args[0]]  # type: ignore[union-attr]
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)
    gm.delete_submodule(node.target)
    return True

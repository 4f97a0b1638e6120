"""Put a lowered module in the place of its scan, in the user's graph."""

import torch
from torch import fx

from fla_compile.kernels.loop_ops import BY_SIZE, NOTHING, register_step, sort_operands
from fla_compile.passes.autocast import ENTER, EXIT, active, regions_at
from fla_compile.passes.log_decay import VIEWS, Log, emit, op_name
from fla_compile.passes.lower import Lowered
from fla_compile.passes.lowering import Looped
from fla_compile.passes.memory import memory, written
from fla_compile.passes.scans import ZEROS, Scan, needs_gradient

LOOP = torch.ops.fla_compile.loop.default


def splice(gm: fx.GraphModule, scan: Scan, lowered: Lowered, outer: dict[int, Log]) -> int:
    """Put the module's nodes in place of the scan; returns how many there are."""
    graph, inner = gm.graph, lowered.module.graph
    known = set(graph.nodes)
    changed = written(graph)
    with graph.inserting_before(scan.node):
        # The kernel may keep an operand for its backward where the loop kept only what it computed from it.
        operands = [graph.call_method("clone", (n,)) if memory(n) & changed else n for n in scan.operands]
        values = [*operands, *(emit(outer[index], graph) for index in lowered.logs)]
        env = dict(zip(inner.find_nodes(op="placeholder"), values, strict=True))
        targets = {}
        for name, child in lowered.module.named_children():
            target = f"{name}_of_{scan.node.name}"
            gm.add_module(target, child)
            targets[name] = target
        casts = [d for d in devices_of(scan) if active(d, regions_at(scan.node))]
        # The step's own casts are operations by now; autocast would add others.
        regions = [graph.call_function(ENTER, (device, None, False, None)) for device in casts]
        results = graph.graph_copy(inner, env)
        for region in reversed(regions):
            graph.call_function(EXIT, (region,))
        for node in inner.find_nodes(op="call_module"):
            env[node].target = targets[node.target]  # type: ignore[index]
        run_loops_as_operators(gm, graph, scan)
    for user in list(scan.node.users):
        results[user.args[1]].meta.setdefault("example_value", user.meta.get("example_value"))
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    body = scan.node.args[0]
    graph.erase_node(scan.node)
    if not body.users:
        graph.erase_node(body)
        delattr(gm, body.target)
    for node in reversed(list(graph.nodes)):
        # Only nodes known to be pure: Dynamo's graphs hold in-place methods that nothing reads.
        if not node.users and (node not in known or op_name(node) in VIEWS | ZEROS):
            if node.op.startswith("call_") and node.target not in (ENTER, EXIT):
                graph.erase_node(node)
    fresh = [node for node in graph.nodes if node not in known]
    for node in fresh:
        node.meta.setdefault("stack_trace", scan.node.meta.get("stack_trace"))
    return len(fresh)


def devices_of(scan: Scan) -> set[str]:
    values = [n.meta.get("example_value") for n in scan.operands if isinstance(n, fx.Node)]
    return {x.device.type for x in values if isinstance(x, torch.Tensor)}


def run_loops_as_operators(gm: fx.GraphModule, graph: fx.Graph, scan: Scan) -> None:
    """Replace each loop that was checked as Python by the operator that runs it."""
    keep = BY_SIZE if any(needs_gradient(operand) for operand in scan.operands) else NOTHING
    for node in graph.find_nodes(op="call_module"):
        looped = gm.get_submodule(node.target)
        if isinstance(looped, Looped):
            length, operands = node.args[0], node.args[1:]
            key = register_step(looped.step, looped.carries, looped.reads)
            with graph.inserting_before(node):
                sorted_operands = sort_operands(key, operands)
                call = graph.call_function(LOOP, (key, *sorted_operands, length, keep))
            node.replace_all_uses_with(call)
            graph.erase_node(node)
            gm.delete_submodule(node.target)

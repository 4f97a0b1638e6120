"""Find the time loops of a graph and run each as a kernel.

Before: `scan(body, states, reads, invariants)` nodes, from lifted loops or written by the user.
After: for each loop that is a recurrence of a known family, the nodes of `lower_recurrence` in its place.
Refused: everything that `normalise`, `classify` or `validate` refuses, with the reason and the user's line; the graph
then keeps its scan, and the caller decides what becomes of it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fla_compile.passes.classify import Plan, classify
from fla_compile.passes.log_decay import (
    VIEWS,
    Log,
    constant_value,
    emit,
    log_of,
    op_name,
    root_of,
)
from fla_compile.passes.lower_recurrence import Lowered, Lowering
from fla_compile.passes.memory import memory, written
from fla_compile.passes.normalise import Step, normalise, short_source, source_of
from fla_compile.passes.records import Refusal, Refused, Rewrite
from fla_compile.passes.validate import Claim, validate

ZEROS = {"zeros", "zeros_like", "new_zeros"}


@dataclass(frozen=True)
class Scan:
    """One scan node taken apart; `zero_init` says which states are known to start at zero."""

    node: fx.Node
    body: fx.GraphModule
    init: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    invariants: tuple[Any, ...]
    zero_init: tuple[bool, ...]

    @property
    def operands(self) -> tuple[Any, ...]:
        return (*self.init, *self.reads, *self.invariants)

    @property
    def place(self) -> tuple[str, int] | None:
        return source_of(self.node)


@dataclass
class Found:
    """What the pass did: rewrites, and refusals beside the scan that each of them leaves in the graph."""

    rewrites: list[Rewrite] = field(default_factory=list)
    refusals: list[tuple[Refusal, Scan]] = field(default_factory=list)
    validation_seconds: float = 0.0


def inner_scans(gm: fx.GraphModule) -> list[fx.Node]:
    """The scans of all graphs inside this one."""
    inner = [child for child in gm.modules() if isinstance(child, fx.GraphModule)]
    return [node for child in inner for node in scan_nodes(child)]


def nested_graphs(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """This graph and those of its regions (activation checkpoints and the like), bodies of scans excepted."""
    found = [gm]
    bodies = {node.args[0].target for node in scan_nodes(gm)}
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule) and name not in bodies:
            found += nested_graphs(child)
    return found


def scan_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    return gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.scan)


def take_apart(gm: fx.GraphModule, node: fx.Node) -> Scan:
    body, init, reads, invariants = node.args[:4]
    changed = written(gm.graph, before=node)
    zero = tuple(op_name(root_of(n)) in ZEROS and not memory(root_of(n)) & changed for n in init)
    return Scan(node, getattr(gm, body.target), tuple(init), tuple(reads), tuple(invariants), zero)


def log_of_outer(node: fx.Node) -> Log | None:
    """`log_of` in the graph around the loop, where an in-place write to any tensor on the way spoils the proof."""
    log = log_of(node, lambda _: None)
    if log is None:
        return None
    changed, leaves = written(node.graph), proof_leaves(log)
    todo, seen = [node], set()
    while todo:
        here = todo.pop()
        if here in seen:
            continue
        seen.add(here)
        if memory(here) & changed:
            return None
        if here not in leaves:
            todo.extend(here.all_input_nodes)
    return log


def proof_leaves(log: Log) -> set[fx.Node]:
    """Where a proof ends: tensors of any value. Constants are no end, all that made them counts."""
    if log.op in ("node", "logsigmoid", "logsigmoid_negative"):
        return {arg for arg in log.args if isinstance(arg, fx.Node)}
    return set().union(*(proof_leaves(arg) for arg in log.args if isinstance(arg, Log)))


def prover(step: Step, scan: Scan) -> tuple[Callable[[fx.Node], Log | None], dict[int, Log]]:
    """How `classify` asks for the log of a decay; proofs found outside the loop are noted by operand."""
    operands = [*step.carries, *step.reads, *step.invariants]
    outer: dict[int, Log] = {}

    def prove(node: fx.Node) -> Log | None:
        if node not in operands:
            return log_of(node, lambda _: None)
        index = operands.index(node)
        source = scan.operands[index]
        log = log_of_outer(source) if isinstance(source, fx.Node) else None
        if log is not None:
            outer[index] = log
            return Log("outer", (index,), log.proof)
        value = source.meta.get("example_value") if isinstance(source, fx.Node) else None
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point and not value.requires_grad:
            return Log("magnitude", (node,), "measured")
        return None

    return prove, outer


def check_memory(scan: Scan) -> None:
    """Refuse a loop that reads an argument which the program writes to, where that could be seen.

    The lifted loop reads all of its operands before anything is written; the loop as written may see its own writes.
    """
    graph = scan.node.graph
    changed = written(graph)
    roots = {root_of(n) for n in (*scan.init, *scan.reads) if isinstance(n, fx.Node)}
    arguments = [r for r in graph.find_nodes(op="placeholder") if memory(r) & changed]
    for root in roots:
        if root.op == "placeholder" and any(memory(r) & memory(root) for r in arguments if r is not root):
            raise Refused("mutates_input", "the program writes to memory that the loop reads under another name")
    tensors = [n for n in scan.operands if isinstance(n, fx.Node)]
    if any(getattr(n.meta.get("example_value"), "requires_grad", False) for n in tensors):
        # The kernel's backward needs its operands; what an argument held before a write is gone by then.
        held = frozenset[int]().union(*(memory(n) for n in tensors))
        if any(memory(r) & held for r in arguments):
            raise Refused("mutates_input", "the program writes to an argument that the loop's gradient needs")


def recognise(scan: Scan) -> tuple[Step, Plan, dict[int, Log]]:
    check_memory(scan)
    step = normalise(scan.body, len(scan.init), len(scan.reads))
    prove, outer = prover(step, scan)
    return step, classify(step, prove), outer


def check(scan: Scan, lowered: Lowered, outer: dict[int, Log]) -> None:
    fakes = [node.meta["example_value"] for node in scan.body.graph.find_nodes(op="placeholder")]
    fixed = {}
    for index in lowered.logs:
        value = constant_value(scan.operands[index])
        if value is not None:
            fixed[index] = value
    validate(
        Claim(
            scan.body, lowered.module, fakes, len(scan.init), len(scan.reads), lowered.logs, fixed, scan.zero_init
        )
    )


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
        for name, child in lowered.module.named_children():
            target = f"{name}_of_{scan.node.name}"
            gm.add_module(target, child)
            for node in inner.find_nodes(op="call_module", target=name):
                node.target = target
        results = graph.graph_copy(inner, env)
    for user in list(scan.node.users):
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
            if node.op.startswith("call_"):
                graph.erase_node(node)
    fresh = [node for node in graph.nodes if node not in known]
    for node in fresh:
        node.meta.setdefault("stack_trace", scan.node.meta.get("stack_trace"))
    return len(fresh)


def match_recurrences(
    gm: fx.GraphModule, *, validated: bool = True, kernel: Callable[[Step, Plan], str]
) -> Found:
    """Rewrite every recognised scan of `gm`, in place; `kernel` names the kernel of a plan or raises `Refused`."""
    found = Found()
    for node in scan_nodes(gm):
        scan = take_apart(gm, node)
        if inner_scans(scan.body):
            refused = Refused("unknown_recurrence", "the loop has another loop inside")
            found.refusals.append((refused.record("recurrence", short_source(scan.place)), scan))
            continue
        source = short_source(scan.place)
        try:
            step, plan, outer = recognise(scan)
            name = kernel(step, plan)
            lowered = Lowering(step, plan, scan.zero_init, sorted(outer)).module()
            if validated:
                start = time.perf_counter()
                check(scan, lowered, outer)
                found.validation_seconds += time.perf_counter() - start
        except Refused as refused:
            found.refusals.append((refused.record("recurrence", source), scan))
            continue
        before = 1 + len(scan.body.graph.nodes)
        after = splice(gm, scan, lowered, outer)
        equation = "; ".join(dict.fromkeys(r.equation for r in plan.recurrences))
        found.rewrites.append(Rewrite("recurrence", plan.families, equation, name, source, before, after))
    if found.rewrites:
        gm.graph.lint()
        gm.recompile()
    return found

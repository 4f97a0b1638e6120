"""Proofs that a decay is positive, looked for in the loop's body and in the graph around it."""

from collections.abc import Callable

from torch import fx

from fla_compile.passes.log_decay import Log, log_of
from fla_compile.passes.memory import memory, written
from fla_compile.passes.scans import Scan, needs_gradient
from fla_compile.passes.step import Step


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
        if node in step.carries and step.carries.index(node) not in step.idle:
            return None
        if node in operands:
            index = operands.index(node)
            source = scan.operands[index]
            log = log_of_outer(source) if isinstance(source, fx.Node) else None
            if log is not None:
                outer[index] = log
                return Log("outer", (index,), log.proof)
        else:
            log = log_of(node, lambda _: None)
            if log is not None:
                return log
        return None if depends_on_gradient(node) else Log("magnitude", (node,), "measured")

    def depends_on_gradient(node: fx.Node) -> bool:
        if node not in operands:
            return any(depends_on_gradient(n) for n in node.all_input_nodes)
        changing = node in step.carries and step.carries.index(node) not in step.idle
        return changing or needs_gradient(scan.operands[operands.index(node)])

    return prove, outer

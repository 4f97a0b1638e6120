"""The scans of a captured graph, from lifted loops or written by the user, and where they stand."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fla_compile.passes.autocast import regions_at
from fla_compile.passes.log_decay import constant_value, op_name, root_of
from fla_compile.passes.memory import memory, written
from fla_compile.passes.places import source_of
from fla_compile.passes.records import Refused

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
    def single(self) -> bool:
        """Whether it is known to take exactly one step."""
        length = self.reads[0].meta["example_value"].shape[0] if self.reads else None
        return isinstance(length, int) and length == 1

    @property
    def place(self) -> tuple[str, int] | None:
        return source_of(self.node)


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


def identities(scan: Scan) -> frozenset[int]:
    """The invariants that are identity matrices, as constants of the program."""
    found = set()
    for i, operand in enumerate(scan.operands):
        value = operand.meta.get("example_value") if isinstance(operand, fx.Node) else None
        square = isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[0] == value.shape[1]
        if i < len(scan.init) + len(scan.reads) or not square:
            continue
        constant = constant_value(operand)
        if constant is not None and torch.equal(constant, torch.eye(len(constant), dtype=constant.dtype)):
            if not memory(operand) & written(operand.graph):
                found.add(i)
    return frozenset(found)


def needs_gradient(operand: Any) -> bool:
    value = operand.meta.get("example_value") if isinstance(operand, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.requires_grad


def signature(scan: Scan) -> tuple | None:
    """Equal for scans that compute the same from equal operands; None where the body holds more than operations."""
    place: dict[fx.Node, int] = {}
    parts: list[Any] = [scan.zero_init, scan.single, repr(regions_at(scan.node))]
    for node in scan.body.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            return None
        place[node] = len(place)
        args = repr(fx.map_arg((node.args, node.kwargs), lambda n: _Place(place[n])))
        parts.append((node.op, str(node.target) if node.op != "placeholder" else "", args))
        if node.op == "placeholder":
            value = node.meta["example_value"]
            parts.append(repr((str(value.shape), value.dtype, value.device) if hasattr(value, "shape") else value))
    parts.append(identities(scan))
    parts += [needs_gradient(operand) for operand in scan.operands]
    return tuple(parts)


@dataclass(frozen=True)
class _Place:
    """Stands for a node where names do not count."""

    index: int

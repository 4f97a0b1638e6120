"""One time step of a loop: its graph, its states, and what is known of each of its nodes.

A node is an *atom* (an opaque tensor with labelled axes), a `Value` over atoms (see normal_form.py), or blocked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fla_compile.passes.normal_form import Factor, Space, Value
from fla_compile.passes.places import short_source, source_of
from fla_compile.passes.records import Refused

aten = torch.ops.aten


@dataclass
class Atom:
    """An opaque tensor of the step: a node of the step graph; `expansion` when it is itself a sum or a contraction,
    `eye` when it is the identity matrix, `has_eye` when there is one somewhere in the expansion."""

    node: fx.Node
    carry: int | None = None
    expansion: Value | None = None
    eye: bool = False
    has_eye: bool = False


@dataclass
class Step:
    """One traced time step and, for the states in focus, the normal form of its nodes.

    `values[node]` is missing exactly for the nodes in `blocked`. `depends` tells which changing states a node is
    computed from; a state that every step hands on as it is counts as an invariant.
    """

    gm: fx.GraphModule
    carries: list[fx.Node]
    reads: list[fx.Node]
    invariants: list[fx.Node]
    next_carries: list[fx.Node]
    outputs: list[fx.Node]
    eyes: frozenset[int] = frozenset()  # operands known to be identity matrices
    idle: frozenset[int] = frozenset()
    depends: dict[fx.Node, frozenset[int]] = field(default_factory=dict)
    timed: set[fx.Node] = field(default_factory=set)
    space: Space = field(default_factory=Space)
    atoms: list[Atom] = field(default_factory=list)
    alike: dict[tuple, tuple] = field(default_factory=dict)  # see alike.py: the atom of an operation, and its axes
    core: frozenset[int] = frozenset()
    solved: frozenset[int] = frozenset()
    known: set[fx.Node] = field(default_factory=set)  # what the solved states were read as
    values: dict[fx.Node, Value] = field(default_factory=dict)
    blocked: dict[fx.Node, Refused] = field(default_factory=dict)
    rounded: set[fx.Node] = field(default_factory=set)  # computed from a state rounded to less than its own type

    def __post_init__(self) -> None:
        pairs = enumerate(zip(self.carries, self.next_carries, strict=True))
        self.idle = frozenset(i for i, (old, new) in pairs if original(new) is old)
        for node in self.gm.graph.nodes:
            if node.op != "output":
                self.adopt(node)

    def adopt(self, node: fx.Node) -> None:
        """Note what a node, perhaps a new one, is computed from."""
        inputs = node.all_input_nodes
        changing = node in self.carries and self.carries.index(node) not in self.idle
        own = frozenset({self.carries.index(node)}) if changing else frozenset[int]()
        self.depends[node] = own.union(*(self.depends[n] for n in inputs))
        if changing or node in self.reads or any(n in self.timed for n in inputs):
            self.timed.add(node)

    def stateful(self, node: fx.Node) -> bool:
        """Whether a node is computed from a state in focus."""
        return bool(self.depends[node] & self.core)

    def pending(self, node: fx.Node) -> bool:
        """Whether a node is computed from a state that is neither in focus nor solved."""
        return bool(self.depends[node] - self.core - self.solved)

    def new_atom(
        self, node: fx.Node, carry: int | None = None, expansion: Value | None = None, eye: bool = False
    ) -> Value:
        has_eye = expansion is not None and any(self.atoms[i].eye or self.atoms[i].has_eye for i in expansion.atoms)
        self.atoms.append(Atom(node, carry, expansion, eye, has_eye))
        return self.space.atom(len(self.atoms) - 1, shape_of(node))

    def is_carry(self, atom: int) -> bool:
        return self.atoms[atom].carry is not None

    def is_timed(self, factor: Factor) -> bool:
        return self.atoms[factor.atom].node in self.timed

    def source(self, node: fx.Node) -> str:
        return short_source(source_of(node))


def original(node: fx.Node) -> fx.Node:
    """Behind the copies that a lifted loop makes of its states and outputs."""
    while node.target in (aten.clone.default, aten.alias.default):
        node = node.args[0]  # type: ignore[assignment]
    return node


def shape_of(node: fx.Node) -> Sequence[Any]:
    return node.meta["val"].shape


def elements(node: fx.Node) -> int:
    """Elements of a node's value, by hint where a size is dynamic; a number counts as none."""
    value = node.meta.get("val")
    total = 1
    for size in getattr(value, "shape", ()):
        total *= size if isinstance(size, int) else int(size.node.hint or 1)
    return total if hasattr(value, "shape") else 0

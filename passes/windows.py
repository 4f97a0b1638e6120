"""Values of a graph as sums of products of *windows*: parts of a tensor along one of its axes, zeros or a state before.

    F.pad(x, (3, 0))[..., j : j + T]      the window of x that starts at j - 3, with zeros before its first step
    torch.cat([state, x], 1)[:, j:j + T]  the same with the steps of `state` before
    x.unfold(1, W, 1), torch.stack(...)   a family of windows along a new axis

A value is in the normal form of `normal_form.py`, with windows for atoms: so a convolution over time, in any spelling,
is one sum of weights times windows of one tensor. Whatever has no rule here is an atom, namely all of itself.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fla_compile.passes.memory import _writes, memory
from fla_compile.passes.normal_form import Factor, NoNormalForm, Space, Term, Value, same_size
from fla_compile.passes.spellings import Call, call_of, tensor_of

LONGEST_PREFIX = 32
MAX_TERMS = 24
MAX_FACTORS = 4


@dataclass(frozen=True)
class Row:
    """One step before a tensor's first: step `index` of `node` along its axis `axis`, or zeros where there is no node.

    `order` says which axis of `node` each axis of the tensor is.
    """

    node: fx.Node | None = None
    index: int = 0
    axis: int = 0
    order: tuple[int, ...] = ()


ZERO = Row()


@dataclass(frozen=True)
class Window:
    """`length` steps of `node` along `axis` from step `start`, which may be negative.

    `prefix` are the steps before the first, nearest first; `suffix` counts zeros after the last. All of a tensor is a
    window without an axis.
    """

    node: fx.Node
    axis: int | None = None
    start: Any = 0
    length: Any = 0
    prefix: tuple[Row, ...] = ()
    suffix: int = 0

    @property
    def key(self) -> tuple:
        """Equal for equal windows: sizes that are dynamic have no hash."""
        return self.node, self.axis, _plain(self.start), _plain(self.length), self.prefix, self.suffix


@dataclass(frozen=True)
class Family:
    """Windows with the same axes, stacked along a new last axis."""

    members: tuple[int, ...]

    @property
    def key(self) -> tuple:
        return self.members


def _plain(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def fixed(size: Any) -> Any:
    """A size as a number where it is one."""
    if isinstance(size, torch.SymInt) and size.node.expr.is_number:
        return int(size.node.expr)
    return size


def statically(a: Any, b: Any) -> bool:
    """Whether a <= b for sure."""
    return statically_known_true(a <= b)


def size_of(x: Any) -> Any:
    """A bound of a slice: a number, or the value of a node."""
    return fixed(x.meta["example_value"]) if isinstance(x, fx.Node) else x


@dataclass
class Windows:
    """The values of all floating tensors of a graph, and what the atoms in them are; `opaque` nodes are atoms."""

    graph: fx.Graph
    rules: Mapping[str, "Rule"]
    opaque: Set[fx.Node] = frozenset()
    space: Space = field(default_factory=Space)
    atoms: list[Window | Family] = field(default_factory=list)
    known: dict[tuple, int] = field(default_factory=dict)
    values: dict[fx.Node, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lost: set[fx.Node] = set()  # what they held has been written over
        holders: dict[int, list[fx.Node]] = {}
        for node in self.graph.nodes:
            value = tensor_of(node)
            if node.op == "output" or value is None or not value.dtype.is_floating_point:
                lost.update(*(holders.get(storage, ()) for storage in _writes_of(node)))
                continue
            unseen = node in self.opaque or any(n in lost for n in node.all_input_nodes)
            found = None if unseen else self.apply(node)
            for storage in _writes_of(node):
                lost.update(holders.get(storage, ()))
            self.values[node] = self.whole(node) if found is None else found
            for storage in memory(node):
                holders.setdefault(storage, []).append(node)

    def apply(self, node: fx.Node) -> Value | None:
        call = call_of(node)
        rule = self.rules.get(call.name) if call is not None else None
        if call is None or rule is None:
            return None
        try:
            value = rule(self, node, call)
        except (NoNormalForm, KeyError, TypeError, AttributeError, IndexError):
            return None  # arguments that the rule does not know
        if value is None or len(value.terms) > MAX_TERMS or any(len(t.factors) > MAX_FACTORS for t in value.terms):
            return None
        shape = tensor_of(node).shape
        fits = len(value.dims) == len(shape) and all(
            same_size(self.space.total(axis), size) for axis, size in zip(value.dims, shape, strict=True)
        )
        return value if fits else None

    def atom(self, what: Window | Family) -> int:
        if what.key not in self.known:
            self.known[what.key] = len(self.atoms)
            self.atoms.append(what)
        return self.known[what.key]

    def whole(self, node: fx.Node) -> Value:
        return self.space.atom(self.atom(Window(node)), [fixed(size) for size in tensor_of(node).shape])

    def of(self, x: Any) -> Value:
        if isinstance(x, int | float):
            return self.space.constant(float(x), ())
        return self.values[x]

    def window(self, atom: int, axis: int) -> Window:
        """An atom as a window along this axis; raises NoNormalForm where it is one along another."""
        what = self.atoms[atom]
        if isinstance(what, Family) or what.axis not in (None, axis):
            raise NoNormalForm("cut along two axes")
        if what.axis is None:
            return Window(what.node, axis, 0, fixed(tensor_of(what.node).shape[axis]))
        return what

    def moved(self, atom: int, axis: int, change: Callable[[Window], Window]) -> int:
        """The atom, or all members of a family, changed along this axis."""
        what = self.atoms[atom]
        if isinstance(what, Family):
            return self.atom(Family(tuple(self.moved(member, axis, change) for member in what.members)))
        return self.atom(change(self.window(atom, axis)))

    def along(self, value: Value, axis: int, length: Any, change: Callable[[Window], Window]) -> Value:
        """`value` with an axis of another length, and every factor that runs along it changed."""
        labels = value.dims[axis]
        if len(labels) != 1:
            raise NoNormalForm("a merged axis, or one of size 1, is cut")
        fresh = self.space.axis(length)
        terms = []
        for term in value.terms:
            factors = []
            for f in term.factors:
                places = [i for i, own in enumerate(f.axes) if own == labels]
                if not places and labels[0] in f.labels:
                    raise NoNormalForm("a part of a merged axis is cut")
                if len(places) > 1:
                    raise NoNormalForm("a diagonal is cut")
                if not places:
                    factors.append(f)
                    continue
                at = places[0]
                axes = (*f.axes[:at], fresh, *f.axes[at + 1 :])
                factors.append(Factor(self.moved(f.atom, at, change), axes))
            terms.append(Term(term.coef, tuple(factors)))
        return Value((*value.dims[:axis], fresh, *value.dims[axis + 1 :]), tuple(terms))

    def cut(self, value: Value, axis: int, start: Any, length: Any) -> Value:
        """`length` steps of an axis, from `start`."""
        axis %= len(value.dims)
        if same_size(self.space.total(value.dims[axis]), length):
            return value

        def change(w: Window) -> Window:
            return Window(w.node, w.axis, fixed(w.start + start), length, w.prefix, w.suffix)

        return self.along(value, axis, length, change)

    def grown(self, node: fx.Node, axis: int, before: Sequence[Row], after: int) -> Value:
        """`node` with steps before it, nearest first, and zeros after it."""
        value, size = self.of(node), tensor_of(node).shape[axis]
        length, stated = fixed(size + len(before) + after), any(row.node is not None for row in before)
        if not same_size(size, 1) and not stated:
            if not all(any(value.dims[axis] in f.axes for f in t.factors) for t in value.terms):
                raise NoNormalForm("zeros beside what is the same at every step")
            return self.along(value, axis, length, lambda x: extended(x, before, after))
        axes = self.single(value).axes if stated else value.dims
        if same_size(size, 1) or len(axes) != len(value.dims) or (axes != value.dims and not all(axes)):
            # an axis without a label, or others than the steps before have
            dims = tuple(self.space.axis(fixed(s)) for s in tensor_of(node).shape)
            atom = self.atom(extended(Window(node, axis, 0, size), before, after))
            dims = (*dims[:axis], self.space.axis(length), *dims[axis + 1 :])
            return Value(dims, (Term(1.0, (Factor(atom, dims),)),))
        order = tuple(value.dims.index(own) for own in axes) if axes != value.dims else None
        if order is not None:
            before = [row if row.node is None else replace(row, order=order) for row in before]
        return self.along(value, axis, length, lambda x: extended(x, before, after))

    def single(self, value: Value) -> Factor:
        """The factor of a value that is a view of one window."""
        if len(value.terms) != 1 or len(value.terms[0].factors) != 1 or value.terms[0].coef != 1.0:
            raise NoNormalForm("no view of one tensor")
        return value.terms[0].factors[0]

    def zeros(self, node: fx.Node) -> bool:
        return not self.values[node].terms


def _writes_of(node: fx.Node) -> frozenset[int]:
    return _writes(node) if node.op in ("call_function", "call_method") else frozenset()


def extended(x: Window, before: Sequence[Row], after: int) -> Window:
    """A window with steps before it, nearest first, and zeros after it."""
    size = tensor_of(x.node).shape[x.axis]
    if before and not same_size(x.start, 0):
        if not (isinstance(x.start, int) and -len(x.prefix) <= x.start < 0):
            raise NoNormalForm("steps in front of a later part")
    if after and not same_size(x.start + x.length, size + x.suffix):
        raise NoNormalForm("steps behind an earlier part")
    prefix = x.prefix
    if before:
        prefix = (*x.prefix[: -x.start if x.start else 0], *before)
    if len(prefix) > LONGEST_PREFIX:
        raise NoNormalForm("many steps in front")
    length = fixed(x.length + len(before) + after)
    return Window(x.node, x.axis, fixed(x.start - len(before)), length, prefix, x.suffix + after)


Rule = Callable[[Windows, fx.Node, Call], Value | None]

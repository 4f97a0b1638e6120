"""What a tensor computed from the logits of a linear layer is, in the algebra of cross entropies.

With z [rows, V] the logits and t the targets, a value is one of

    class    coef z + R          exp       coef exp(z + R)          over rows and classes
    row      R                   exprow    exp(R)                   over rows
    total    the sum of R over all rows

and R is a polynomial over what may stand in a loss: the logsumexp, the target's logit, the sum and the maximum of a
row's logits, and factors that do not come from the logits (masks, weights, counts). Spelling disappears: a softmax by
hand, shifted by its maximum, has the same R as `log_softmax`.

Axes are tuples of labels. A label is an axis of the linear layer's input, a slice of one, or the classes; views merge
labels into one axis and split a label into parts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fla_compile.passes.memory import memory
from fla_compile.passes.normal_form import same_size
from fla_compile.passes.spellings import is_reshape


@dataclass(eq=False)
class Label:
    """One axis; `span` is the (start, stop) that was cut from `parent`, `parts` what a view made of it; the axis of
    classes stays `whole`."""

    size: Any
    parent: "Label | None" = None
    span: tuple[int | None, int | None] | None = None
    parts: tuple["Label", ...] = ()
    cuts: list["Label"] = field(default_factory=list)
    whole: bool = False

    def cut(self, start: int | None, stop: int | None, size: Any) -> "Label":
        """The same cut is the same label, so that two slices alike are one."""
        for other in self.cuts:
            if other.span == (start, stop):
                return other
        self.cuts.append(Label(size, self, (start, stop)))
        return self.cuts[-1]


Axis = tuple[Label, ...]
Dims = tuple[Axis, ...]


def leaves(labels: Iterable[Label]) -> tuple[Label, ...]:
    return tuple(leaf for label in labels for leaf in (leaves(label.parts) if label.parts else (label,)))


def flat(dims: Dims) -> tuple[Label, ...]:
    return leaves(label for axis in dims for label in axis)


def resolved(dims: Dims) -> Dims:
    return tuple(leaves(axis) for axis in dims)


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def settled(size: Any) -> Any:
    """A size as a number where the program has fixed it meanwhile."""
    if isinstance(size, torch.SymInt) and size.node.expr.is_number:
        return int(size.node.expr)
    return size


@dataclass(frozen=True)
class Form:
    """z = cap tanh(scale a / cap) of the layer's output a, or scale a without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def times(self, number: float) -> "Form":
        return Form(self.scale * number, None if self.cap is None else self.cap * number)


@dataclass(eq=False)
class Root:
    """The layer: `node` gives the logits of x [*rows, D] by weight [V, D], or by [D, V] where `transposed`.

    Logits of whatever origin [*rows, V] have no weight, and are x themselves.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    transposed: bool
    rows: tuple[Label, ...]
    classes: Label


@dataclass(frozen=True)
class Target:
    """Integers over rows, those below zero counted from the last class where it `wraps`; equal where the same tensor is
    laid over the same rows."""

    root: fx.Node
    order: tuple[Label, ...]
    node: fx.Node = field(compare=False)
    dims: Dims = field(compare=False)
    wraps: bool = False

    @staticmethod
    def of(node: fx.Node, dims: Dims, wraps: bool = False) -> "Target":
        root = node
        while is_reshape(root) and memory(root) & memory(root.all_input_nodes[0]):  # a copy is another tensor
            root = root.all_input_nodes[0]
        return Target(root, flat(dims), node, dims, wraps)


# An atom is a tuple that starts with its kind: ("lse",), ("pick", Target), ("sum",), ("max",), ("valid", Target, index)
# for a target that counts, ("count", Target, index) for one over their number, ("rows",) for one over the number of
# rows, ("node", node, dims) a factor, ("over", node) a divisor, ("keep", mask, sense, dims) where the rest is zeroed.
Atom = tuple[Any, ...]
Poly = dict[tuple[Atom, ...], float]


LSE, SUM, MAX = ("lse",), ("sum",), ("max",)


def _ordered(atoms: Iterable[Atom]) -> tuple[Atom, ...]:
    def key(atom: Atom) -> tuple[str, ...]:
        return atom[0], *(str(part) for part in atom[1:] if isinstance(part, fx.Node))

    return tuple(sorted(atoms, key=key))


def poly(*atoms: Atom, coef: float = 1.0) -> Poly:
    return {_ordered(atoms): coef}


def add(a: Poly, b: Poly, factor: float = 1.0) -> Poly:
    total = dict(a)
    for monomial, coef in b.items():
        total[monomial] = total.get(monomial, 0.0) + factor * coef
    largest = max((abs(c) for c in (*a.values(), *b.values())), default=0.0)
    return {monomial: coef for monomial, coef in total.items() if abs(coef) > 1e-14 * largest}


def times(a: Poly, b: Poly) -> Poly:
    total: Poly = {}
    for left, p in a.items():
        for right, q in b.items():
            total = add(total, {_ordered((*left, *right)): p * q})
    return total


def scaled(a: Poly, number: float) -> Poly:
    return {monomial: coef * number for monomial, coef in a.items() if number}


@dataclass(frozen=True, eq=False)
class Value:
    root: Root
    form: Form
    kind: str
    dims: Dims
    rows: Poly
    coef: float = 1.0
    onehot: Target | None = None  # a class value times the indicator of its target

    def over(self, dims: Dims) -> "Value":
        return replace(self, dims=dims)

    @property
    def plain(self) -> bool:
        """The logits themselves."""
        return self.kind == "class" and self.coef == 1.0 and not self.rows and self.onehot is None

    @property
    def class_axis(self) -> int | None:
        return next((i for i, axis in enumerate(self.dims) if self.root.classes in axis), None)


@dataclass
class Losses:
    """What is known of a graph: `values` by node, and how what does not come from logits lies over their rows."""

    values: dict[fx.Node, Value] = field(default_factory=dict)
    pairs: set[fx.Node] = field(default_factory=set)  # x.max(dim), of which only the values are used
    laid: dict[fx.Node, Dims] = field(default_factory=dict)  # over which axes an operand from elsewhere lies
    one_hots: dict[fx.Node, Target] = field(default_factory=dict)
    picks: dict[fx.Node, fx.Node] = field(default_factory=dict)  # a[arange(n), t], and t
    writes: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)  # what writes over a value, for later readers

    def of(self, operand: Any) -> Value | None:
        return self.values.get(operand) if isinstance(operand, fx.Node) else None

    def depends(self, operand: Any) -> bool:
        """Whether an operand comes from logits: then it is no factor."""
        return isinstance(operand, fx.Node) and operand in self.values

    def target(self, node: fx.Node, dims: Dims, wraps: bool = False) -> Target:
        self.laid[node] = dims
        return Target.of(node, dims, wraps)


def aligned(a: Dims, b: Dims) -> Dims | None:
    """The axes of a broadcast of both; None where two different axes meet."""
    a, b = resolved(a), resolved(b)
    longer = max(len(a), len(b))
    out: list[Axis] = []
    for p, q in zip(((),) * (longer - len(a)) + a, ((),) * (longer - len(b)) + b, strict=True):
        if p and q and p != q:
            return None
        out.append(p or q)
    labels = [label for axis in out for label in axis]
    return tuple(out) if len(set(labels)) == len(labels) else None  # each row with each other row is no loss


def laid_over(shape: Iterable[Any], dims: Dims) -> Dims | None:
    """The axes of a tensor that is broadcast to `dims` and not beyond; None where a size does not fit."""
    sizes = list(shape)
    if len(sizes) > len(dims):
        return None
    out: list[Axis] = []
    for size, axis in zip(sizes, dims[len(dims) - len(sizes) :], strict=True):
        if is_one(size):
            out.append(())
        elif axis and same_size(size, extent(axis)):
            out.append(axis)
        else:
            return None
    return tuple(out)


def extent(axis: Axis) -> Any:
    total: Any = 1
    for label in axis:
        total = total * label.size
    return total


def viewed(dims: Dims, shape: Iterable[Any]) -> Dims | None:
    """The axes after a view to `shape`: labels merged, and split where a part of one is asked for."""
    pieces, out = list(flat(dims)), []
    for size in shape:
        axis: list[Label] = []
        have: Any = 1
        while not same_size(have, size):
            if not pieces:
                return None
            piece = pieces.pop(0)
            if _divides(have, size) and _larger(have * piece.size, size):
                parts = _split(piece, size // have)
                if parts is None:
                    return None
                piece, rest = parts
                pieces.insert(0, rest)
            axis.append(piece)
            have = have * piece.size
            if isinstance(have, int) and isinstance(size, int) and have > size:
                return None
        out.append(tuple(axis))
    return None if pieces else tuple(out)


def _divides(have: Any, size: Any) -> bool:
    return isinstance(have, int) and isinstance(size, int) and have > 0 and size % have == 0


def _larger(a: Any, b: Any) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a > b


def _split(label: Label, first: int) -> tuple[Label, Label] | None:
    if label.whole or not isinstance(label.size, int) or label.size % first or label.cuts:
        return None
    label.parts = Label(first, label), Label(label.size // first, label)
    return label.parts

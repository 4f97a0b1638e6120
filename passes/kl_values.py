"""Divergences of two layers' softmaxes in the algebra of `loss_values`.

With p and q the softmaxes of two layers' scaled logits, a value of kind "terms" is a polynomial over rows and classes
in p, q, log p, log q, and log m for mixtures m = u p + w q, with factors of the rows. Summed over classes the products
of these become one atom each, and the value is a row or total of `loss_values`, whose rules then serve both.

All layers whose logits have the same rows and classes share their labels, and one `Root` that stands for all.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from fla_compile.passes.loss_decide import CLOSE, roots_of
from fla_compile.passes.loss_values import (
    LSE,
    Atom,
    Axis,
    Dims,
    Form,
    Label,
    Losses,
    Poly,
    Root,
    Value,
    add,
    extent,
    flat,
    is_one,
    poly,
    scaled,
)
from fla_compile.passes.normal_form import same_size
from fla_compile.passes.records import Refused


@dataclass(frozen=True)
class Side:
    """One distribution: a layer and what is done to its logits before the softmax."""

    root: Root
    form: Form


# Atoms over classes: ("prob", Side, node), ("log", Side, node), ("logmix", ((Side, weight), (Side, weight))); of a sum
# over them: ("inner", atoms, labels of the rows); of a reduction: ("axis", labels) for one over an axis' size. What one
# layer's logits and labels give, added to these: ("labelled", Side, atoms).
OVER_CLASSES = ("prob", "log", "logmix")
OF_LABELS = ("lse", "pick", "sum", "max")
FACTORS = ("valid", "count", "rows", "node", "over", "keep")
Weights = tuple[tuple[Side, float], ...]


def prob(side: Side) -> Atom:
    return "prob", side, side.root.node


def log(side: Side) -> Atom:
    return "log", side, side.root.node


@dataclass
class Pairs(Losses):
    """`spaces` has the shared root of every layer, by the node of its logits."""

    spaces: dict[fx.Node, Root] = field(default_factory=dict)

    def is_shared(self, value: Value | None) -> bool:
        return value is not None and any(value.root is space for space in self.spaces.values())


def pairs_of(graph: fx.Graph) -> Pairs:
    """The logits of all linear layers, those alike over the same labels."""
    found = Pairs(roots_of(graph))
    known: list[Root] = []
    for node, value in sorted(found.values.items(), key=lambda item: -len(item[1].root.rows)):
        root, first = value.root, len(value.dims) > 1 and value.class_axis == 0
        for space in known:
            rows = _as_rows(root.rows, space.rows)
            if rows is not None and space.classes.size == root.classes.size:
                root.rows, root.classes = rows, space.classes
                break
        else:
            space = replace(root)
            known.append(space)
        axes: list[Axis] = [() if is_one(label.size) else (label,) for label in root.rows]
        found.values[node] = value.over(((root.classes,), *axes) if first else (*axes, (root.classes,)))
        found.spaces[node] = space
    return found


def _as_rows(rows: tuple[Label, ...], known: tuple[Label, ...]) -> tuple[Label, ...] | None:
    """Rows named as `known` ones of the same sizes; one axis may be two of them merged."""
    if len(rows) == len(known):
        return known if all(same_size(a.size, b.size) for a, b in zip(rows, known, strict=True)) else None
    longer = tuple(label for label in known if not is_one(label.size))
    if len(rows) != 1 or not isinstance(rows[0].size, int) or rows[0].size != extent(longer):
        return None
    if len(longer) == 1:
        return longer
    if len(longer) != 2:
        return None
    return (Label(rows[0].size, parts=longer),)


def terms(losses: Pairs, operand: Any) -> Value | None:
    """A value over classes as a polynomial in probabilities and their logarithms; None where it is none."""
    value = losses.of(operand)
    if value is None or value.kind == "terms" or value.onehot is not None or value.class_axis is None:
        return value if value is not None and value.kind == "terms" else None
    side, space = Side(value.root, value.form), losses.spaces.get(value.root.node)
    if space is None or value.kind not in ("class", "exp"):
        return None
    rest = add(value.rows, poly(LSE), value.coef)  # beside coef log p, or log p itself
    if set(rest) - {()}:
        return None
    constant = rest.get((), 0.0)
    if value.kind == "exp":
        found = poly(prob(side), coef=math.exp(constant))
    else:
        found = add(poly(log(side), coef=value.coef), {(): constant} if constant else {})
    return Value(space, Form(), "terms", value.dims, found)


def log_of(x: Poly) -> Poly | None:
    """The logarithm of one distribution or of a mixture of two."""
    if not 1 <= len(x) <= 2 or any(coef <= 0.0 for coef in x.values()):
        return None
    if any(len(monomial) != 1 or monomial[0][0] != "prob" for monomial in x):
        return None
    total = sum(x.values())
    sides = [(monomial[0], coef / total) for monomial, coef in x.items()]
    if len(sides) == 1:
        found = poly(log(sides[0][0][1]))
    else:
        weights = sorted(((atom[1], round(w, 12)) for atom, w in sides), key=lambda pair: str(pair[0].root.node))
        found = poly(("logmix", tuple(weights)))
    rest = math.log(total)
    return found if abs(rest) < CLOSE else add(found, {(): rest})


def exp_of(x: Poly) -> Poly | None:
    """The distribution, or mixture, that a logarithm belongs to, times a number."""
    (*atoms,) = (monomial for monomial in x if monomial)
    if len(atoms) != 1 or len(atoms[0]) != 1 or abs(x[atoms[0]] - 1.0) > CLOSE:
        return None
    kind, what = atoms[0][0][:2]
    factor = math.exp(x.get((), 0.0))
    if kind == "log":
        return poly(prob(what), coef=factor)
    if kind != "logmix":
        return None
    found: Poly = {}
    for side, weight in what:
        found = add(found, poly(prob(side), coef=weight * factor))
    return found


def inner(x: Poly, dims: Dims, classes: Label) -> Poly | None:
    """The sum over classes."""
    labels = tuple(label for label in flat(dims) if label is not classes)
    found: Poly = {}
    for monomial, coef in x.items():
        own = tuple(atom for atom in monomial if atom[0] in OVER_CLASSES)
        rest = tuple(atom for atom in monomial if atom[0] not in OVER_CLASSES)
        if not own:
            return None
        whole = len(own) == 1 and own[0][0] == "prob"  # probabilities add up to 1
        summed = poly(*rest) if whole else poly(("inner", own, labels), *rest)
        found = add(found, scaled(summed, coef))
    return found


def beside(losses: Pairs, operand: Any) -> Value | None:
    """A loss of one layer, or of two, as what both may be added to; None where it is none."""
    value = losses.of(operand)
    if value is None or value.kind not in ("row", "total"):
        return None
    if losses.is_shared(value):
        return value
    space, side = losses.spaces.get(value.root.node), Side(value.root, value.form)
    rows: Poly = {}
    for monomial, coef in value.rows.items():
        own = tuple(atom for atom in monomial if atom[0] in OF_LABELS)
        if not own:
            return None
        rest = (atom for atom in monomial if atom[0] not in OF_LABELS)
        rows = add(rows, poly(("labelled", side, own), *rest, coef=coef))
    return None if space is None else Value(space, Form(), value.kind, value.dims, rows)


def parted(value: Value) -> tuple[Value, Value | None]:
    """What in a sum compares two layers, and what one has of its labels; raises `Refused` for products of both."""
    soft: Poly = {}
    hard: Poly = {}
    sides: dict[Side, None] = {}
    for monomial, coef in value.rows.items():
        own = [atom for atom in monomial if atom[0] == "labelled"]
        if not own:
            soft[monomial] = coef
            continue
        rest = [atom for atom in monomial if atom[0] != "labelled"]
        if len(own) > 1 or any(atom[0] not in FACTORS for atom in rest):
            raise Refused("unsupported_loss", "it is a product of losses")
        sides[own[0][1]] = None
        hard = add(hard, poly(*own[0][2], *rest, coef=coef))
    if not sides:
        return value, None
    if len(sides) > 1:
        raise Refused("unsupported_loss", "it has labels for two layers' logits, or for one's at two scales")
    (side,) = sides
    return replace(value, rows=soft), Value(side.root, side.form, value.kind, value.dims, hard)


def between(losses: Pairs, node: fx.Node, sides: Iterable[Side]) -> list[fx.Node]:
    """The nodes from both layers to a value, in order."""
    roots = {side.root.node for side in sides}
    found, todo = set[fx.Node](), [node]
    while todo:
        here = todo.pop()
        if here not in found:
            found.add(here)
            todo += losses.writes.get(here, [])
            if here not in roots:
                todo += [n for n in here.all_input_nodes if n in losses.values or n in losses.pairs]
    return [n for n in node.graph.nodes if n in found]

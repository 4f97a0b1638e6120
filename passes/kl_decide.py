"""Which divergence of student and teacher a value is: from polynomials to the arguments of the kernel.

With p the student's and q the teacher's distribution and m = w q + (1 - w) p, sums over classes of

    q (log q - log p)        - q log p        p (log p - log q)        w q (log q - log m) + (1 - w) p (log p - log m)

times any number and times factors of the rows that all terms share. Whatever else is a sum of such terms is refused.
"""

from dataclasses import dataclass

from torch import fx

from fla_compile.passes.kl_values import Side
from fla_compile.passes.loss_decide import CLOSE
from fla_compile.passes.loss_values import Atom, Axis, Dims, Label, Value, leaves
from fla_compile.passes.records import Refused


@dataclass(frozen=True)
class Divided:
    """A recognised divergence; `factor`, `over` and `axes` are applied after the kernel, `weights`, `keeps` in it."""

    value: Value
    student: Side
    teacher: Side
    kind: str
    beta: float
    factor: float
    reduction: str  # "none", "sum", "mean"
    rows: tuple[Label, ...]
    over_rows: bool
    weights: tuple[tuple[fx.Node, Dims], ...]
    keeps: tuple[tuple[fx.Node, bool, Dims], ...]
    over: tuple[fx.Node, ...]
    axes: tuple[Axis, ...]


def sides_of(value: Value) -> list[Side]:
    """The distributions in a value, in the order of the program."""
    found: dict[Side, None] = {}
    for monomial in value.rows:
        for atom in monomial:
            for own in atom[1] if atom[0] == "inner" else (atom,):
                if own[0] in ("prob", "log"):
                    found[own[1]] = None
                elif own[0] == "logmix":
                    found |= dict.fromkeys(side for side, _ in own[1])
    nodes = [side.root.node for side in found]
    order = {node: i for i, node in enumerate(nodes[0].graph.nodes)} if nodes else {}
    return sorted(found, key=lambda side: order[side.root.node])


def compares(value: Value) -> bool:
    """Whether it has products of a probability and a logarithm, of two sides together: then it was meant as a loss."""
    kinds = {own[0] for m in value.rows for atom in m for own in (atom[1] if atom[0] == "inner" else (atom,))}
    return len(sides_of(value)) > 1 and "prob" in kinds and bool(kinds & {"log", "logmix"})


def decode(value: Value, student: Side, teacher: Side) -> Divided:
    """The divergence that a value is; raises `Refused` where it is none that the kernel has."""
    if value.kind not in ("row", "total"):
        raise Refused("unsupported_loss", "terms of single classes are wanted, not their sum")
    if any(side.form.cap is not None for side in (student, teacher)):
        raise Refused("unsupported_loss", "the logits are capped")
    parts: dict[str, float] = {}
    shared: tuple[Atom, ...] | None = None
    rows: tuple[Label, ...] = ()
    weights: set[float] = set()
    for monomial, coef in value.rows.items():
        own = [atom for atom in monomial if atom[0] == "inner"]
        if not own and abs(coef) < CLOSE:
            continue
        if len(own) != 1:
            raise Refused("unsupported_loss", "it has a term that is no sum over classes, or a product of two")
        rest = tuple(atom for atom in monomial if atom is not own[0])
        labels = leaves(own[0][2])
        if shared is not None and (rest != shared or labels != rows):
            raise Refused("unsupported_loss", "its terms weigh the rows differently")
        shared, rows = rest, labels
        name = "*".join(sorted(_name(atom, student, teacher, weights) for atom in own[0][1]))
        parts[name] = parts.get(name, 0.0) + coef
    kind, beta, factor = _kind(parts, weights)
    return _with_factors(value, (student, teacher), (kind, beta, factor), rows, shared or ())


def _name(atom: Atom, student: Side, teacher: Side, weights: set[float]) -> str:
    letters = {student: "p", teacher: "q"}
    if atom[0] != "logmix":
        if atom[1] not in letters:
            raise Refused("unsupported_loss", "it has more than two distributions")
        return letters[atom[1]] if atom[0] == "prob" else f"log {letters[atom[1]]}"
    mixture = dict(atom[1])
    if set(mixture) != {student, teacher}:
        raise Refused("unsupported_loss", "it has a mixture of other distributions")
    weights.add(mixture[teacher])
    return "log m"


def _kind(parts: dict[str, float], weights: set[float]) -> tuple[str, float, float]:
    """Divergence, weight of the teacher in the mixture, and factor."""
    if len(weights) > 1:
        raise Refused("unsupported_loss", "it has two mixtures")
    beta = weights.pop() if weights else 0.5
    of_q, of_p = parts.get("log q*q", 0.0), parts.get("log p*p", 0.0)
    f = of_q + of_p
    known = {
        "forward_kl": (of_q, {"log q*q": 1.0, "log p*q": -1.0}),
        "reverse_kl": (of_p, {"log p*p": 1.0, "log q*p": -1.0}),
        "cross_entropy": (-parts.get("log p*q", 0.0), {"log p*q": -1.0}),
        "jensen_shannon": (f, {"log q*q": beta, "log m*q": -beta, "log p*p": 1.0 - beta, "log m*p": beta - 1.0}),
    }
    for kind, (factor, wanted) in known.items():
        names = wanted.keys() | parts.keys()
        largest = max((abs(c) for c in parts.values()), default=0.0)
        if factor and all(abs(parts.get(n, 0.0) - factor * wanted.get(n, 0.0)) <= CLOSE * largest for n in names):
            return kind, beta, factor
    told = " ".join(f"{coef:+.3g} {name.replace('*', ' ')}" for name, coef in sorted(parts.items()))
    raise Refused("unsupported_loss", f"it is no divergence of the kernel's: {told}, p the student's")


def _with_factors(
    value: Value, sides: tuple[Side, Side], what: tuple[str, float, float], rows: tuple[Label, ...], shared: tuple
) -> Divided:
    by_kind: dict[str, list[Atom]] = {}
    for atom in shared:
        by_kind.setdefault(atom[0], []).append(atom)
    counts = by_kind.get("rows", [])
    if len(counts) > 1 or (counts and by_kind.get("axis")) or len(by_kind.get("axis", [])) > 1:
        raise Refused("unsupported_loss", "it is a mean of means")
    weights = tuple((atom[1], atom[2]) for atom in by_kind.get("node", []))
    keeps = tuple((atom[1], atom[2], atom[3]) for atom in by_kind.get("keep", []))
    reduction, over_rows = "none" if value.kind == "row" else "sum", bool(counts)
    if counts and not keeps:
        reduction, over_rows = "mean", False
    over = tuple(atom[1] for atom in by_kind.get("over", []))
    axes = tuple(leaves(atom[1]) for atom in by_kind.get("axis", []))
    return Divided(value, *sides, *what, reduction, rows, over_rows, weights, keeps, over, axes)

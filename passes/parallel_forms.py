"""The normal form of a piece of a graph that builds T x T matrices: masks, decays and positions as atoms of known kind.

On top of `normal_form`, where a tensor is a sum of products of atoms, four kinds of atoms carry a meaning:

    pos[i]       the position i itself, from `arange`
    ind_d[i,j]   1 where i - j >= d, else 0: every causal mask, however it is built
    inf          infinity, the fill of a mask in front of an exponential
    exp[..]      an exponential whose logarithm is known as a value

A mask is a polynomial in `ind`: `not m` is 1 - m, `where(m, a, b)` is m a + (1 - m) b, `ind_d ind_e = ind_max(d,e)`. A
function of a masked value is taken on each side of the mask alone, so exp(masked_fill(x, ~m, -inf)) is m exp(x).
A cumulative sum is a contraction with ind_0 that remembers its `gain`, the value summed up.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fla_compile.passes import normal_form as nf
from fla_compile.passes.normal_form import Factor, Labels, NoNormalForm, Space, Term, Value

MAX_KEPT = 16
Terms = tuple[Term, ...]


@dataclass
class Atom:
    """An opaque tensor; `node` computes it, or it is None and the tables of `Forms` say what it is."""

    node: fx.Node | None
    expansion: Value | None = None


@dataclass
class Forms:
    """Values of the nodes of one traced piece, and the kinds of its atoms.

    `logs[a]` is the logarithm of an exponential, `gains[a]` the axis of a cumulative sum and what it sums, both over
    the axes of the atom; `log_of[a]` is the atom of which a is the logarithm. Of a tensor in
    `measured` that is the logarithm of its magnitude; `sign_of[a]` is then the atom whose sign at time t, +1 where t is
    even, is a.
    """

    gm: fx.GraphModule
    space: Space = field(default_factory=Space)
    atoms: list[Atom] = field(default_factory=list)
    values: dict[fx.Node, Value] = field(default_factory=dict)
    inds: dict[int, int] = field(default_factory=dict)
    logs: dict[int, Value] = field(default_factory=dict)
    gains: dict[int, tuple[int, Value]] = field(default_factory=dict)
    log_of: dict[int, int] = field(default_factory=dict)
    bools: set[int] = field(default_factory=set)
    provable: Callable[[fx.Node], bool] = lambda node: False
    measured: set[fx.Node] = field(default_factory=set)
    sign_of: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pos, self.inf = self.symbol(), self.symbol()

    def symbol(self) -> int:
        self.atoms.append(Atom(None))
        return len(self.atoms) - 1

    def new_atom(self, node: fx.Node) -> Value:
        self.atoms.append(Atom(node))
        atom = len(self.atoms) - 1
        if node.meta["val"].dtype == torch.bool:
            self.bools.add(atom)
        return self.space.atom(atom, node.meta["val"].shape)

    def scalar(self, node: fx.Node) -> Value:
        """A number that changes from call to call, such as a size."""
        self.atoms.append(Atom(node))
        return Value((), (Term(1.0, (Factor(len(self.atoms) - 1, ()),)),))

    def contraction(self, node: fx.Node, value: Value) -> Value:
        """An atom that keeps the axes of its expansion apart where they are merged."""
        self.atoms.append(Atom(node, self.space.renamed(value)))
        return Value(value.dims, (Term(1.0, (Factor(len(self.atoms) - 1, value.dims),)),))

    def ind(self, d: int, row: int, column: int) -> Factor:
        """1 where position `row` - position `column` >= d."""
        atom = next((a for a, offset in self.inds.items() if offset == d), None)
        if atom is None:
            atom = self.symbol()
            self.inds[atom] = d
        return Factor(atom, ((row,), (column,)))

    def position(self, label: int) -> Factor:
        return Factor(self.pos, ((label,),))

    def masks(self, term: Term) -> list[Factor]:
        return [f for f in term.factors if f.atom in self.inds]

    def masked(self, value: Value) -> bool:
        return any(f.atom in self.inds or f.atom == self.inf for t in value.terms for f in t.factors)

    def has_inf(self, value: Value) -> bool:
        return any(f.atom == self.inf for t in value.terms for f in t.factors)

    def simplify(self, value: Value) -> Value:
        """One ind for each pair of axes, written from the lower label to the higher; like terms added up."""
        done: list[Term] = []
        todo = list(value.terms)
        while todo:
            if len(todo) + len(done) > nf.MAX_TERMS:
                raise NoNormalForm("the value has too many terms")
            term = todo.pop()
            kept: dict[tuple[int, int], int] = {}
            others: list[Factor] = []
            for n, factor in enumerate(term.factors):
                if factor.atom not in self.inds:
                    if factor.atom not in self.bools or factor not in others:
                        others.append(factor)
                    continue
                row, column = (single(axis) for axis in factor.axes)
                d = self.inds[factor.atom]
                if row > column:
                    rest = term.factors[:n] + term.factors[n + 1 :]
                    todo.append(Term(term.coef, rest))
                    todo.append(Term(-term.coef, (*rest, self.ind(1 - d, column, row))))
                    break
                kept[row, column] = max(d, kept.get((row, column), d))
            else:
                masks = (self.ind(d, *pair) for pair, d in kept.items())
                done.append(Term(term.coef, (*masks, *others)))
        return nf.collect(Value(value.dims, tuple(done)))

    def settled(self, node: fx.Node, value: Value) -> Value:
        """Products and masked values stay polynomials; contractions and other sums become atoms with an expansion."""
        value = self.simplify(value)
        dims = {label for axis in value.dims for label in axis}
        if any(term.labels - dims for term in value.terms):
            return self.contraction(node, value)
        if len(value.terms) > 1 and (not self.masked(value) or len(value.terms) > MAX_KEPT):
            return self.contraction(node, value)
        return value

    def summed(self, atom: int) -> bool:
        """Whether an atom is a contraction."""
        expansion = self.atoms[atom].expansion
        if expansion is None:
            return False
        dims = {label for axis in expansion.dims for label in axis}
        return any(term.labels - dims for term in expansion.terms)

    def opened(self, value: Value) -> Value:
        """All sums written out, down to contractions."""
        while True:
            inner = [a for a in value.atoms if self.atoms[a].expansion is not None and not self.summed(a)]
            if not inner:
                return value
            if len(value.terms) > MAX_KEPT:
                raise NoNormalForm("the value has too many terms")
            value = self.simplify(nf.inline(self.space, value, inner[0], self.atoms[inner[0]].expansion))

    def piecewise(self, value: Value, function: Callable[[Terms], Terms]) -> Value:
        """`function` of a masked value: on each side of the mask it is a function of what holds there."""
        value = self.opened(value)
        pairs = {f.labels for term in value.terms for f in self.masks(term)}
        if len(pairs) > 1:
            raise NoNormalForm("a function of two masks")
        steps = sorted({self.inds[f.atom] for term in value.terms for f in self.masks(term)})
        terms: list[Term] = []
        last: Terms = ()
        for start in [None, *steps]:
            held = tuple(
                Term(t.coef, tuple(f for f in t.factors if f.atom not in self.inds))
                for t in value.terms
                if all(start is not None and self.inds[f.atom] <= start for f in self.masks(t))
            )
            here = function(nf.collect(Value(value.dims, held)).terms)
            if start is None:
                terms += here
            else:
                mask = self.ind(start, *next(iter(pairs)))
                terms += [Term(t.coef, (*t.factors, mask)) for t in here]
                terms += [Term(-t.coef, (*t.factors, mask)) for t in last]
            last = here
        return self.simplify(Value(value.dims, tuple(terms)))

    def exponential(self, terms: Terms, node: fx.Node | None = None, dims: tuple[Labels, ...] = ()) -> Terms:
        """exp of a sum without masks; `node` where it computes just this, over `dims`."""
        infinite = [t for t in terms if any(f.atom == self.inf for f in t.factors)]
        if infinite:
            if len(infinite) == 1 and len(infinite[0].factors) == 1 and infinite[0].coef < 0:
                return ()
            raise NoNormalForm("the exponential of a product with infinity")
        if not terms:
            return (Term(1.0, ()),)
        if len(terms) == 1 and not terms[0].factors:
            number = float(torch.tensor(terms[0].coef, dtype=torch.float64).exp())
            return (Term(number, ()),) if number else ()
        labels = tuple(sorted(set[int]().union(*(t.labels for t in terms))))
        axes: tuple[Labels, ...] = tuple((label,) for label in labels)
        if node is not None and set(labels) == {label for axis in dims for label in axis}:
            axes = dims
        else:
            node = None
        self.atoms.append(Atom(node))
        atom = len(self.atoms) - 1
        self.logs[atom] = self.space.renamed(Value(axes, terms))
        return (Term(1.0, (Factor(atom, axes),)),)

    def logarithm(self, terms: Terms) -> Terms | None:
        """log of one product, where each factor is an exponential or a tensor proved positive."""
        if not terms:
            return (Term(-1.0, (Factor(self.inf, ()),)),)
        if len(terms) != 1 or terms[0].coef <= 0:
            return None
        constant = float(torch.tensor(terms[0].coef, dtype=torch.float64).log())
        total: list[Term] = [Term(constant, ())] if constant else []
        for factor in terms[0].factors:
            if factor.atom in self.logs:
                total += self.applied(self.logs[factor.atom], factor)
                continue
            node = self.atoms[factor.atom].node
            if node is None or not self.provable(node):
                return None
            known = next((a for a, of in self.log_of.items() if of == factor.atom), None)
            if known is None:
                known = self.symbol()
                self.log_of[known] = factor.atom
            total.append(Term(1.0, (Factor(known, factor.axes),)))
        return tuple(total)

    def applied(self, value: Value, factor: Factor) -> Terms:
        """The terms of a value over the axes of an atom, at the labels of one use of it."""
        labels = tuple(dict.fromkeys(factor.labels))
        holder = Value(tuple((x,) for x in labels), (Term(1.0, (factor,)),))
        terms = nf.inline(self.space, holder, factor.atom, value)
        if terms.dims != holder.dims:
            raise NoNormalForm("an axis is cut")
        return terms.terms

    def affine(self, terms: Terms) -> tuple[float, int | None, int | None, float] | None:
        """(c, a, b, d) of c (pos[a] - pos[b]) + d with whole numbers; (0, None, None, d) for a number."""
        number, slopes = 0.0, dict[int, float]()
        for term in terms:
            if not term.factors:
                number += term.coef
            elif len(term.factors) == 1 and term.factors[0].atom == self.pos:
                (label,) = term.factors[0].labels
                slopes[label] = slopes.get(label, 0.0) + term.coef
            else:
                return None
        if not slopes:
            return 0.0, None, None, number
        if len(slopes) != 2 or sum(slopes.values()) or not all(x.is_integer() for x in (number, *slopes.values())):
            return None
        (a, c), (b, _) = slopes.items()
        return (c, a, b, number) if c > 0 else (-c, b, a, number)

    def at_least(self, terms: Terms, strict: bool) -> Terms | None:
        """The mask terms >= 0, or > 0; None where that depends on data."""
        form = self.affine(terms)
        if form is None:
            return None
        c, a, b, d = form
        if a is None or b is None:
            return (Term(1.0, ()),) if d > 0 or (d == 0 and not strict) else ()
        bound = -d // c + 1 if strict else -(d // c)
        return (Term(1.0, (self.ind(int(bound), a, b),)),)


def negated(terms: Iterable[Term]) -> Terms:
    return tuple(Term(-t.coef, t.factors) for t in terms)


def single(axis: Sequence[int]) -> int:
    if len(axis) != 1:
        raise NoNormalForm("a mask over an axis of size 1 or a merged one")
    return axis[0]


def number_of(value: Any) -> float | None:
    """A value that is one number everywhere."""
    if any(t.factors for t in value.terms):
        return None
    return sum(t.coef for t in value.terms)

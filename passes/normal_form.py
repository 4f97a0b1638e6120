"""The normal form: tensors as sums of products of atoms over labelled axes.

A `Value` stands for one tensor. Every axis of it is a tuple of labels, row-major (two labels where the program merged
two axes, none where the axis has size 1). A `Term` is a coefficient times atoms indexed by labels; a label that is in
no axis of the value is summed over, as in einsum:

    einsum("bhk,bhkv->bhv", q, S)  ==  Value(dims=((b,), (h,), (v,)), terms=(1.0 * q[b,h,k] * S[b,h,k,v],))

Labels are local to a value: two operands are renamed apart before their axes are aligned, so the same atom may be used
in two roles (k k^T). Two programs that compute the same polynomial get the same terms, whatever their spelling.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import permutations, product
from typing import Any

from torch.fx.experimental.symbolic_shapes import statically_known_true

Labels = tuple[int, ...]
MAX_TERMS = 64
MAX_SUMMED = 5


class NoNormalForm(Exception):
    """The operation has no meaning in the normal form (an axis cut in the middle, too many terms)."""


@dataclass(frozen=True)
class Factor:
    """An atom and the labels of each of its axes."""

    atom: int
    axes: tuple[Labels, ...]

    @property
    def labels(self) -> Labels:
        return tuple(label for axis in self.axes for label in axis)


@dataclass(frozen=True)
class Term:
    coef: float
    factors: tuple[Factor, ...]

    @property
    def labels(self) -> set[int]:
        return {label for factor in self.factors for label in factor.labels}


@dataclass(frozen=True)
class Value:
    dims: tuple[Labels, ...]
    terms: tuple[Term, ...]

    @property
    def atoms(self) -> set[int]:
        return {factor.atom for term in self.terms for factor in term.factors}


def same_size(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return statically_known_true(a == b)


@dataclass
class Space:
    """The labels of one analysis and their sizes (ints, or SymInts where a dimension is dynamic)."""

    sizes: list[Any] = field(default_factory=list)

    def fresh(self, size: Any) -> int:
        self.sizes.append(size)
        return len(self.sizes) - 1

    def axis(self, size: Any) -> Labels:
        return () if same_size(size, 1) else (self.fresh(size),)

    def atom(self, atom: int, shape: Sequence[Any]) -> Value:
        dims = tuple(self.axis(size) for size in shape)
        return Value(dims, (Term(1.0, (Factor(atom, dims),)),))

    def constant(self, number: float, shape: Sequence[Any]) -> Value:
        return Value(tuple(self.axis(size) for size in shape), (Term(number, ()),) if number else ())

    def total(self, labels: Iterable[int]) -> Any:
        size: Any = 1
        for label in labels:
            size = size * self.sizes[label]
        return size

    def renamed(self, value: Value) -> Value:
        labels = {label for axis in value.dims for label in axis}.union(*(term.labels for term in value.terms))
        return substitute(value, {label: (self.fresh(self.sizes[label]),) for label in sorted(labels)})

    def split(self, label: int, outer: Any) -> dict[int, Labels]:
        """Cut one label into (outer, rest)."""
        size = self.sizes[label]
        if not (isinstance(size, int) and isinstance(outer, int) and outer and size % outer == 0):
            raise NoNormalForm(f"an axis of size {size} is cut at {outer}")
        return {label: (self.fresh(outer), self.fresh(size // outer))}

    def unify(self, a: Value, i: int, b: Value, j: int) -> tuple[Value, Value]:
        """Make axis i of `a` and axis j of `b` carry the same labels (both of size > 1)."""
        at = 0
        while at < max(len(a.dims[i]), len(b.dims[j])):
            if at >= min(len(a.dims[i]), len(b.dims[j])):
                raise NoNormalForm("aligned axes differ in size")
            la, lb = a.dims[i][at], b.dims[j][at]
            size_a, size_b = self.sizes[la], self.sizes[lb]
            if same_size(size_a, size_b):
                b = substitute(b, {lb: (la,)})
                at += 1
            elif isinstance(size_a, int) and isinstance(size_b, int) and size_a > size_b:
                a = substitute(a, self.split(la, size_b))
            else:
                b = substitute(b, self.split(lb, size_a))
        return a, b


def substitute(value: Value, mapping: dict[int, Labels]) -> Value:
    def axis(labels: Labels) -> Labels:
        return tuple(new for label in labels for new in mapping.get(label, (label,)))

    return Value(
        tuple(axis(labels) for labels in value.dims),
        tuple(
            Term(term.coef, tuple(Factor(f.atom, tuple(axis(labels) for labels in f.axes)) for f in term.factors))
            for term in value.terms
        ),
    )


def canonical(term: Term, dims: tuple[Labels, ...]) -> tuple:
    """A key equal for equal products: axes by position, summed labels in the order that sorts first."""
    place: dict[int, tuple] = {label: (0, i, j) for i, axis in enumerate(dims) for j, label in enumerate(axis)}
    summed = sorted(term.labels - set(place))
    if len(summed) > MAX_SUMMED:
        raise NoNormalForm(f"{len(summed)} axes are summed over in one product")
    keys = []
    for order in permutations(range(len(summed))):
        names = place | {label: (1, rank, 0) for label, rank in zip(summed, order, strict=True)}
        factors = ((f.atom, tuple(tuple(names[label] for label in axis) for axis in f.axes)) for f in term.factors)
        keys.append(tuple(sorted(factors)))
    return min(keys)


def collect(value: Value) -> Value:
    """Add up like terms and drop those that vanish."""
    total: dict[tuple, tuple[float, Term]] = {}
    for term in value.terms:
        key = canonical(term, value.dims)
        coef = total[key][0] if key in total else 0.0
        total[key] = (coef + term.coef, term)
    return Value(value.dims, tuple(Term(coef, term.factors) for coef, term in total.values() if coef != 0.0))


def align(space: Space, a: Value, b: Value) -> tuple[Value, Value, tuple[Labels, ...]]:
    """Rename apart, then broadcast from the right as PyTorch does; returns both and the result's axes."""
    a, b = space.renamed(a), space.renamed(b)
    rank = max(len(a.dims), len(b.dims))
    a = Value(((),) * (rank - len(a.dims)) + a.dims, a.terms)
    b = Value(((),) * (rank - len(b.dims)) + b.dims, b.terms)
    for i in range(rank):
        if a.dims[i] and b.dims[i]:
            a, b = space.unify(a, i, b, i)
    return a, b, tuple(x or y for x, y in zip(a.dims, b.dims, strict=True))


def multiply(space: Space, a: Value, b: Value) -> Value:
    if len(a.terms) * len(b.terms) > MAX_TERMS:
        raise NoNormalForm("the product has too many terms")
    a, b, dims = align(space, a, b)
    terms = tuple(Term(s.coef * t.coef, s.factors + t.factors) for s, t in product(a.terms, b.terms))
    return collect(Value(dims, terms))


def add(space: Space, a: Value, b: Value, alpha: float = 1.0) -> Value:
    a, b, dims = align(space, a, b)
    return collect(Value(dims, a.terms + tuple(Term(alpha * t.coef, t.factors) for t in b.terms)))


def scaled(value: Value, number: float) -> Value:
    return Value(value.dims, tuple(Term(number * t.coef, t.factors) for t in value.terms) if number else ())


def reduce_sum(space: Space, value: Value, axes: Iterable[int], keepdim: bool) -> Value:
    axes = {axis % len(value.dims) for axis in axes}
    gone = [label for axis in axes for label in value.dims[axis]]
    terms = []
    for term in value.terms:
        coef = term.coef
        for label in gone:
            if label not in term.labels:
                if not isinstance(space.sizes[label], int):
                    raise NoNormalForm("a broadcast axis of unknown size is summed")
                coef *= space.sizes[label]
        terms.append(Term(coef, term.factors))
    dims = [() if i in axes else d for i, d in enumerate(value.dims) if keepdim or i not in axes]
    return collect(Value(tuple(dims), tuple(terms)))


def contract(space: Space, a: Value, b: Value, batch: int) -> Value:
    """Matrix product over leading `batch` axes: [..., N, D] x [..., D, M] -> [..., N, M]."""
    left = Value((*a.dims, ()), a.terms)  # [..., N, D, 1]
    right = Value((*b.dims[:batch], (), *b.dims[batch:]), b.terms)  # [..., 1, D, M]
    return reduce_sum(space, multiply(space, left, right), [batch + 1], keepdim=False)


def permute(value: Value, order: Sequence[int]) -> Value:
    return Value(tuple(value.dims[i] for i in order), value.terms)


def expand(space: Space, value: Value, shape: Sequence[Any]) -> Value:
    dims = ((),) * (len(shape) - len(value.dims)) + value.dims
    return Value(tuple(d or space.axis(size) for d, size in zip(dims, shape, strict=True)), value.terms)


def reshape(space: Space, value: Value, shape: Sequence[Any]) -> Value:
    """Merge and split axes, row-major; a label that straddles a boundary is cut in two."""
    rest = [label for axis in value.dims for label in axis]
    dims: list[Labels] = []
    for size in shape:
        taken: list[int] = []
        while not same_size(space.total(taken), size):
            if not rest:
                raise NoNormalForm("the new shape does not fit")
            want, have = size, space.total(taken)
            if isinstance(want, int) and isinstance(have, int) and isinstance(space.sizes[rest[0]], int):
                if want % have:
                    raise NoNormalForm("the new shape cuts across axes")
                if space.sizes[rest[0]] > want // have:
                    mapping = space.split(rest[0], want // have)
                    value = substitute(value, mapping)
                    rest[0:1] = mapping[rest[0]]
                    dims = [tuple(new for old in axis for new in mapping.get(old, (old,))) for axis in dims]
            taken.append(rest.pop(0))
        dims.append(tuple(taken))
    if rest:
        raise NoNormalForm("the new shape does not fit")
    return Value(tuple(dims), value.terms)


def inline(space: Space, value: Value, atom: int, definition: Value) -> Value:
    """Replace every use of `atom` by its definition (two programs may name the same product differently)."""
    rank = len(value.dims)
    terms: list[Term] = []
    for term in value.terms:
        uses = [factor for factor in term.factors if factor.atom == atom]
        partial = Value(value.dims, (Term(term.coef, tuple(f for f in term.factors if f.atom != atom)),))
        for use in uses:
            held, body = Value(partial.dims + use.axes, partial.terms), space.renamed(definition)
            for i, axis in enumerate(use.axes):
                if axis:
                    held, body = space.unify(held, rank + i, body, i)
            products = product(held.terms, body.terms)
            partial = Value(held.dims[:rank], tuple(Term(s.coef * t.coef, s.factors + t.factors) for s, t in products))
        if partial.dims != value.dims:
            raise NoNormalForm("a definition cuts the axes of the value that uses it")
        terms.extend(partial.terms)
    return collect(Value(value.dims, tuple(terms)))

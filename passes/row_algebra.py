"""Sums of products of powers over rows: the algebra in which a norm and a gate are recognised.

A value is a polynomial, {product: coefficient}, a product {atom: exponent} with rational exponents. Every tensor is
read as a function of one flat index i in row-major order, so that reshapes disappear, and an atom says how it follows
i: it is its tensor's element (i % period) // block. A full tensor has block 1 and no period, a statistic of rows of D
elements block D, a weight over the last axis a period. Atoms are

    leaf      a tensor of the program
    mean      the mean over rows of `width` elements of a polynomial
    base      a sum of several terms that is raised to a power which is no whole number, or negative
    sigmoid, exp      of a polynomial

Everything is multiplied out and equal factors are collected, so programs that compute the same by other steps have
the same polynomial: sqrt(x)^2 is x, 1 / (1 + exp(-x)) is sigmoid(x), mean((x - mean(x))^2) is mean(x^2) - mean(x)^2.
A square root of a square stays one: it is no longer x. Coefficients are rounded to twelve digits.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

__all__ = ["Atom", "Opaque", "Poly", "add", "constant", "exp", "leaf", "mean", "multiply", "power", "repeat", "sigmoid"]

LARGEST = 48  # terms of a polynomial
HALF = Fraction(1, 2)

Product = frozenset  # of (Atom, Fraction)


class Opaque(Exception):
    """The value has no polynomial here; it stays a tensor of the program."""


@dataclass(frozen=True)
class Poly:
    terms: frozenset[tuple[Product, float]]

    @cached_property
    def as_dict(self) -> dict[Product, float]:
        return dict(self.terms)

    @cached_property
    def _hash(self) -> int:
        return hash(self.terms)

    def __hash__(self) -> int:
        return self._hash

    @property
    def number(self) -> float | None:
        """Its value if it is a constant."""
        if not self.terms:
            return 0.0
        return self.as_dict.get(ONE) if len(self.terms) == 1 else None


@dataclass(frozen=True)
class Atom:
    """`of` is a node of the program for a leaf, a `Poly` otherwise; `block` and `period` belong to leaf and mean."""

    kind: str
    of: Any
    width: int = 0
    block: int = 1
    period: int | None = None

    @property
    def full(self) -> bool:
        return self.block == 1 and self.period is None

    @cached_property
    def order(self) -> str:
        return f"{self.kind} {self.width} {self.block} {self.period} " + (
            str(self.of) if self.kind == "leaf" else " + ".join(sorted(f"{_order(p)} {c}" for p, c in self.of.terms))
        )


ONE: Product = frozenset()


def _order(product: Product) -> str:
    return " ".join(sorted(f"{atom.order}^{n}" for atom, n in product))


def poly(terms: Mapping[Product, float]) -> Poly:
    largest = max((abs(c) for c in terms.values()), default=0.0)
    kept = {p: float(f"{c:.12g}") for p, c in terms.items() if abs(c) > 1e-12 * largest}
    if len(kept) > LARGEST or not all(math.isfinite(c) for c in kept.values()):
        raise Opaque
    return Poly(frozenset(kept.items()))


def constant(number: float) -> Poly:
    return poly({ONE: float(number)})


def leaf(node: Any) -> Poly:
    return single(Atom("leaf", node))


def single(atom: Atom, exponent: Fraction = Fraction(1), coefficient: float = 1.0) -> Poly:
    return poly({frozenset({(atom, exponent)}): coefficient})


def add(a: Poly, b: Poly, scale: float = 1.0) -> Poly:
    terms = dict(a.terms)
    for product, c in b.terms:
        terms[product] = terms.get(product, 0.0) + scale * c
    return poly(terms)


def multiply(a: Poly, b: Poly) -> Poly:
    if len(a.terms) * len(b.terms) > 4 * LARGEST:
        raise Opaque
    total = poly({})
    plain: dict[Product, float] = {}
    for p, c in a.terms:
        for q, d in b.terms:
            product, opened = _times(p, q)
            if opened is None:
                plain[product] = plain.get(product, 0.0) + c * d
            else:
                total = add(total, multiply(poly({product: c * d}), opened))
    return add(poly(plain), total)


def _times(p: Product, q: Product) -> tuple[Product, Poly | None]:
    """The product of two products; a base that comes out as a whole power is handed back multiplied out."""
    exponents = dict(p)
    for atom, n in q:
        exponents[atom] = exponents.get(atom, Fraction(0)) + n
    opened = None
    for atom, n in list(exponents.items()):
        if n == 0:
            del exponents[atom]
        elif atom.kind == "base" and n > 0 and n.denominator == 1:
            del exponents[atom]
            whole = power(atom.of, n)
            opened = whole if opened is None else multiply(opened, whole)
    return frozenset(exponents.items()), opened


def power(a: Poly, n: Fraction) -> Poly:
    """a^n, as a real number where a is such that it exists."""
    if n == 0:
        return constant(1)
    if n > 0 and n.denominator == 1 and (len(a.terms) > 1 or n == 1):
        result = a
        for _ in range(int(n) - 1):
            result = multiply(result, a)
        return result
    if not a.terms:
        raise Opaque
    if len(a.terms) == 1:
        ((product, c),) = a.terms
        if n.denominator == 1 or (c > 0 and all(nonnegative(atom) for atom, _ in product)):
            return multiply(constant(c ** float(n)), poly({frozenset((atom, m * n) for atom, m in product): 1.0}))
    # (c P)^n = |c|^n (P sign(c))^n: the first term of a base has the coefficient 1 or -1.
    first = min((p for p, _ in a.terms if p), key=_order, default=ONE)
    scale = abs(a.as_dict[first])
    base = poly({p: c / scale for p, c in a.terms})
    factor = scale ** float(n)
    one_plus_exp = [p for p, c in base.terms if c == 1 and len(p) == 1 and next(iter(p))[0].kind == "exp"]
    if len(base.terms) == 2 and len(one_plus_exp) == 1 and base.as_dict.get(ONE) == 1:
        ((atom, m),) = one_plus_exp[0]
        argument = add(constant(0), atom.of, -float(m))
        return poly({frozenset({(Atom("sigmoid", argument), -n)}): factor})
    return single(Atom("base", base), n, factor)


def nonnegative(atom: Atom) -> bool:
    """Whether an atom is never below zero, so that its powers multiply."""
    if atom.kind in ("sigmoid", "exp"):
        return True
    if atom.kind == "leaf":
        return False
    return all(
        c > 0 and all(nonnegative(a) or (m.denominator == 1 and m % 2 == 0) for a, m in p) for p, c in atom.of.terms
    )


def sigmoid(a: Poly) -> Poly:
    return single(Atom("sigmoid", a))


def exp(a: Poly) -> Poly:
    return single(Atom("exp", a))


def mean(a: Poly, width: int) -> Poly:
    """The mean over rows of `width` elements, as a function of the row."""
    total = poly({})
    for product, c in a.terms:
        inside = frozenset((atom, n) for atom, n in product if not constant_in_rows(atom, width))
        result = poly({frozenset((_narrowed(atom, width), n) for atom, n in product - inside): c})
        if inside:
            if not any(varies(atom) for atom, _ in inside):
                raise Opaque  # a mean over weights alone
            result = multiply(result, single(Atom("mean", poly({inside: 1.0}), width)))
        total = add(total, result)
    return total


def parts(atom: Atom) -> Iterable[Atom]:
    """The leaves and means that follow the index, of which an elementwise atom is made."""
    if atom.kind in ("leaf", "mean"):
        yield atom
    else:
        for product, _ in atom.of.terms:
            for inner, _ in product:
                yield from parts(inner)


def constant_in_rows(atom: Atom, width: int) -> bool:
    return all(part.block % width == 0 for part in parts(atom))


def varies(atom: Atom) -> bool:
    """Whether an atom differs from row to row of the whole tensor, as weights do not."""
    return any(part.period is None for part in parts(atom))


def _narrowed(atom: Atom, width: int) -> Atom:
    def narrow(part: Atom) -> Atom:
        period = None if part.period is None else part.period // width
        return replace(part, block=part.block // width, period=period)

    return _mapped(atom, narrow)


def _mapped(atom: Atom, change: Any) -> Atom:
    if atom.kind in ("leaf", "mean"):
        return change(atom)
    return replace(atom, of=_mapped_poly(atom.of, change))


def _mapped_poly(a: Poly, change: Any) -> Poly:
    return poly({frozenset((_mapped(atom, change), n) for atom, n in product): c for product, c in a.terms})


def repeat(a: Poly, *, each: int = 1, period: int | None = None) -> Poly:
    """Broadcast: every element `each` times in a row, then the whole, of `period` elements, over and over."""

    def change(part: Atom) -> Atom:
        old = None if part.period is None else part.period * each
        return replace(part, block=part.block * each, period=period if old is None else old)

    return a if each == 1 and period is None else _mapped_poly(a, change)

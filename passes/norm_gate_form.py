"""Is a polynomial over rows a norm times a gate? See `row_algebra.py` for the polynomials.

With M the mean over rows of D elements, R = (M(u^2) + eps)^(-1/2), or (M(u^2) - M(u)^2 + eps)^(-1/2) centred,

    rms     u R w A + b A            layer     u R w A - M(u) R w A + b A

A is sigmoid(g) or g sigmoid(g) and u one tensor x; or A is 1 and u is x sigmoid(g) or x g sigmoid(g), the gate first.
w and b are polynomials of weights, which do not change from row to row; constant factors of whatever origin, such as
the sqrt(D) of a norm that sums instead of averaging, belong to w. Where w is but such a factor this is an l2norm, and
without weights neither that nor the norm of silu(x) is worth a kernel: Inductor has one for them already.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from fla_compile.passes.row_algebra import HALF, ONE, Atom, Poly, Product, leaf, mean, poly, repeat, varies

__all__ = ["Reading", "read"]

CLOSE = 1e-9


@dataclass(frozen=True)
class Reading:
    """`x` and `gate` are nodes; `weight` and `bias` polynomials of weights, None for 1 and for 0."""

    x: Any
    gate: Any
    weight: Poly | None
    bias: Poly | None
    width: int
    eps: float
    layer: bool
    silu: bool
    gate_first: bool

    @property
    def family(self) -> str:
        norm, act = "layer_norm" if self.layer else "rms_norm", "silu" if self.silu else "sigmoid"
        return f"{norm}(x * {act}(gate))" if self.gate_first else f"{norm}(x) * {act}(gate)"

    @property
    def equation(self) -> str:
        act = "silu(g)" if self.silu else "sigmoid(g)"
        u = f"u = x * {act}" if self.gate_first else "u = x"
        centred = "u - mean(u)" if self.layer else "u"
        second = "var(u)" if self.layer else "mean(u^2)"
        bias = "" if self.bias is None else " + b"
        affine = "" if self.weight is None else " * w"
        y = f"{centred} / sqrt({second} + eps)".replace("u - mean(u) /", "(u - mean(u)) /") + affine + bias
        if not self.gate_first:
            y = f"({y}) * {act}" if bias else f"{y} * {act}"
        return f"{u}, y = {y}"


@dataclass(frozen=True)
class Root:
    """R = factor * atom^(-1/2), with u as a product; `layer` if it is centred."""

    atom: Atom
    factor: float
    u: Product
    width: int
    eps: float
    layer: bool


def read(value: Poly) -> Reading | None:
    """The norm and gate that a value is, or None."""
    roots = {atom for product, _ in value.terms for atom, n in product if n == -HALF and atom.kind in ("base", "mean")}
    if len(roots) != 1:
        return None
    root = read_root(next(iter(roots)))
    if root is None:
        return None
    average = repeat(mean(poly({root.u: 1.0}), root.width), each=root.width)
    ((average_product, _),) = average.terms
    scaled, centring, plain = dict[Product, float](), dict[Product, float](), dict[Product, float]()
    for product, c in value.terms:
        rest = divided(product, {root.atom: -HALF})
        if rest is None:
            plain[product] = c
        elif (own := divided(rest, dict(root.u))) is not None:
            scaled[own] = c * root.factor
        elif (own := divided(rest, dict(average_product))) is not None:
            centring[own] = c * root.factor
        else:
            return None
    if not same(centring, {p: -c for p, c in scaled.items()} if root.layer else {}):
        return None
    split = [split_weights(part) for part in (scaled, plain)]
    gates = {gate for part in split for gate in part}
    if len(gates) != 1 or not scaled:
        return None
    (gate,) = gates
    weight, bias = (poly(part.get(gate, {})) for part in split)
    found = gated(root.u, gate)
    if found is None or root.eps < 0:
        return None
    x, g, silu, gate_first = found
    if weight.number not in (None, 1) or (x is g and weight.number is not None):
        return None
    return Reading(
        x,
        g,
        None if weight.number == 1 else weight,
        None if not bias.terms else bias,
        root.width,
        root.eps,
        root.layer,
        silu,
        gate_first,
    )


def read_root(atom: Atom) -> Root | None:
    """The statistic under a square root, seen from the elements of its rows."""
    terms = atom.of.as_dict if atom.kind == "base" else {frozenset({(atom, Fraction(1))}): 1.0}
    eps, second, centre = 0.0, None, None
    for product, c in terms.items():
        if product == ONE:
            eps = c
            continue
        ((inner, n), *more) = product
        if more or inner.kind != "mean" or inner.block != inner.width or inner.period is not None:
            return None
        if n == 1 and second is None:
            second = (inner, c)
        elif n == 2 and centre is None:
            centre = (inner, c)
        else:
            return None
    if second is None or second[1] <= 0:
        return None
    (square, scale), width = second, second[0].width
    ((product, _),) = square.of.terms
    if any(n.denominator != 1 or n % 2 for _, n in product):
        return None
    u = frozenset((a, n / 2) for a, n in product)
    if centre is not None:
        off = abs(centre[1] / scale + 1) > CLOSE
        if off or centre[0].of != poly({u: 1.0}) or centre[0].width != width:
            return None
    return Root(atom, scale**-0.5, u, width, eps / scale, centre is not None)


def divided(product: Product, by: Mapping[Atom, Fraction]) -> Product | None:
    """The product without these factors, or None where it does not hold them."""
    exponents = dict(product)
    for atom, n in by.items():
        have = exponents.get(atom, Fraction(0))
        if have == 0 or (have < 0) != (n < 0) or abs(have) < abs(n):
            return None
        exponents[atom] = have - n
    return frozenset((a, n) for a, n in exponents.items() if n)


def same(a: Mapping[Product, float], b: Mapping[Product, float]) -> bool:
    return a.keys() == b.keys() and all(abs(a[p] - b[p]) <= CLOSE * abs(b[p]) for p in a)


def split_weights(terms: Mapping[Product, float]) -> dict[Product, dict[Product, float]]:
    """The terms by what changes from row to row in them."""
    found: dict[Product, dict[Product, float]] = {}
    for product, c in terms.items():
        varying = frozenset((a, n) for a, n in product if varies(a))
        found.setdefault(varying, {})[product - varying] = c
    return found


def gated(u: Product, gate: Product) -> tuple[Any, Any, bool, bool] | None:
    """x, gate, whether silu, whether the gate comes first."""
    if gate:
        act, x = activation(gate), only_leaf(u)
        return None if act is None or x is None or act[2] else (x, act[0], act[1], False)
    act = activation(u)
    if act is None:
        return None
    g, silu, x = act
    if x is None:  # norm(silu(g)) is norm(g * sigmoid(g))
        return (g, g, False, True) if silu else None
    return x, g, silu, True


def only_leaf(product: Product) -> Any | None:
    if len(product) != 1:
        return None
    ((atom, n),) = product
    return atom.of if atom.kind == "leaf" and atom.full and n == 1 else None


def activation(product: Product) -> tuple[Any, bool, Any | None] | None:
    """(g, silu, what else is multiplied with it) for sigmoid(g) or g sigmoid(g)."""
    sigmoids = [(a, n) for a, n in product if a.kind == "sigmoid"]
    if len(sigmoids) != 1 or sigmoids[0][1] != 1:
        return None
    argument = sigmoids[0][0].of
    leaves = [a for p, c in argument.terms for a, n in p if c == 1 and n == 1 and a.kind == "leaf" and a.full]
    if len(leaves) != 1 or argument != leaf(leaves[0].of):
        return None
    g = leaves[0]
    rest = dict(product)
    del rest[sigmoids[0][0]]
    if g in rest and rest[g] == 1 and len(rest) == 1:
        return g.of, True, None
    silu = rest.pop(g, Fraction(0)) if len(rest) > 1 else Fraction(0)
    if silu not in (0, 1):
        return None
    if not rest:
        return g.of, silu == 1, None
    other = only_leaf(frozenset(rest.items()))
    return None if other is None else (g.of, silu == 1, other)

"""Values over rows as polynomials: equal programs have equal polynomials, and unequal ones do not."""

import itertools
from fractions import Fraction

import pytest
import torch

from fla_compile.passes.row_algebra import (
    HALF,
    Opaque,
    add,
    constant,
    exp,
    leaf,
    mean,
    multiply,
    power,
    repeat,
    sigmoid,
)

D = 4
x, y = leaf("x"), leaf("y")
two = Fraction(2)


def spread(a):
    return repeat(a, each=D)


def minus(a, b):
    return add(a, b, -1.0)


EQUAL = {
    "product": (multiply(add(x, y), minus(x, y)), minus(power(x, two), power(y, two))),
    "cancelled": (minus(add(x, y), y), x),
    "square of a root": (power(power(add(power(x, two), constant(1)), HALF), two), add(power(x, two), constant(1))),
    "inverse": (multiply(power(add(x, y), -HALF), power(add(x, y), HALF)), constant(1)),
    "scale of a root": (
        power(add(multiply(constant(4), power(x, two)), constant(8)), HALF),
        multiply(constant(2), power(add(power(x, two), constant(2)), HALF)),
    ),
    "root of a mean": (power(power(mean(power(x, two), D), HALF), two), mean(power(x, two), D)),
    "variance": (
        mean(power(minus(x, spread(mean(x, D))), two), D),
        minus(mean(power(x, two), D), power(mean(x, D), two)),
    ),
    "mean of a mean": (mean(spread(mean(x, D)), D), mean(x, D)),
    "linear": (mean(add(x, multiply(constant(3), y)), D), add(mean(x, D), multiply(constant(3), mean(y, D)))),
    "logistic": (power(add(constant(1), exp(multiply(constant(-1), x))), Fraction(-1)), sigmoid(x)),
    "absolute value, squared": (power(power(power(x, two), HALF), two), power(x, two)),
}
UNEQUAL = {
    "root of a square": (power(power(x, two), HALF), x),
    "mean of a product": (mean(multiply(x, y), D), multiply(mean(x, D), mean(y, D))),
    "other rows": (mean(x, D), mean(x, 2 * D)),
    "row and column": (repeat(x, each=D), repeat(x, period=D)),
    "sigmoid of minus": (sigmoid(x), sigmoid(multiply(constant(-1), x))),
    "eps": (add(x, constant(1e-5)), add(x, constant(1e-6))),
}


@pytest.mark.parametrize(("a", "b"), EQUAL.values(), ids=EQUAL)
def test_equal(a, b):
    assert a == b and hash(a) == hash(b)


@pytest.mark.parametrize(("a", "b"), UNEQUAL.values(), ids=UNEQUAL)
def test_unequal(a, b):
    assert a != b


def evaluate(value, leaves, n):
    """A polynomial on data: the elements 0 to n - 1 of the tensor that it stands for."""
    total = torch.zeros(n, dtype=torch.float64)
    for product, c in value.terms:
        term = torch.full((n,), c, dtype=torch.float64)
        for atom, exponent in product:
            term = term * evaluate_atom(atom, leaves, n) ** float(exponent)
        total = total + term
    return total


def evaluate_atom(atom, leaves, n):
    if atom.kind in ("leaf", "mean"):
        i = torch.arange(n)
        i = (i if atom.period is None else i % atom.period) // atom.block
        if atom.kind == "leaf":
            return leaves[atom.of][i]
        rows = int(i.max()) + 1
        return evaluate(atom.of, leaves, rows * atom.width).view(rows, atom.width).mean(1)[i]
    inner = evaluate(atom.of, leaves, n)
    return {"base": inner, "sigmoid": inner.sigmoid(), "exp": inner.exp()}[atom.kind]


# Each takes two polynomials and, beside them, the tensors that they stand for.
STEPS = [
    lambda a, s, b, t: (multiply(a, b), s * t),
    lambda a, s, b, t: (add(a, b, -0.5), s - 0.5 * t),
    lambda a, s, b, t: (spread(mean(multiply(a, b), D)), (s * t).view(3, D).mean(1).repeat_interleave(D)),
    lambda a, s, b, t: (power(add(power(a, two), constant(1)), -HALF), torch.rsqrt(s**2 + 1)),
    lambda a, s, b, t: (power(power(a, two), HALF), s.abs()),
    lambda a, s, b, t: (sigmoid(a), s.sigmoid()),
    lambda a, s, b, t: (power(add(constant(1), exp(a)), Fraction(-1)), 1 / (1 + s.exp())),
]


@pytest.mark.parametrize("seed", range(40))
def test_random_programs(seed):
    """Random steps on tensors and on polynomials, which evaluate to the tensors."""
    generator = torch.Generator().manual_seed(seed)

    def draw(choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    leaves = {name: torch.randn(3 * D, generator=generator, dtype=torch.float64) for name in "xy"}
    leaves["w"] = torch.randn(D, generator=generator, dtype=torch.float64)
    known = [(x, leaves["x"]), (y, leaves["y"]), (repeat(leaf("w"), period=D), leaves["w"].repeat(3))]
    for _ in range(6):
        try:
            known.append(draw(STEPS)(*draw(known), *draw(known)))
        except Opaque:
            continue
    for value, tensor in known:
        torch.testing.assert_close(evaluate(value, leaves, 3 * D), tensor, rtol=1e-6, atol=1e-8)


def test_what_grows_too_large_is_opaque():
    total = x
    with pytest.raises(Opaque):
        for i in itertools.count():
            total = multiply(total, add(leaf(f"a{i}"), leaf(f"b{i}")))

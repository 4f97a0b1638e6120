"""The normal form against PyTorch: whatever a program does to axes, its value is what PyTorch computes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fla_compile.passes import normal_form as nf
from fla_compile.passes.normal_form import Factor, NoNormalForm, Space, Term, Value


def evaluate(space: Space, value: Value, atoms: list[torch.Tensor]) -> torch.Tensor:
    """The tensor that a value stands for: one einsum over all labels for each term."""
    kept = [label for axis in value.dims for label in axis]
    total = torch.zeros([space.sizes[label] for label in kept], dtype=torch.float64)
    for term in value.terms:
        seen = sorted(term.labels | set(kept))
        letters = {label: chr(ord("a") + i) for i, label in enumerate(seen)}
        inputs, operands = [], []
        for factor in term.factors:
            inputs.append("".join(letters[label] for label in factor.labels))
            operands.append(atoms[factor.atom].reshape([space.sizes[label] for label in factor.labels]))
        inputs += [letters[label] for label in kept]
        operands += [torch.ones(space.sizes[label], dtype=torch.float64) for label in kept]
        equation = ",".join(inputs) + "->" + "".join(letters[label] for label in kept)
        total = total + term.coef * (torch.einsum(equation, *operands) if operands else torch.ones(()))
    return total.reshape([math.prod(space.sizes[label] for label in axis) for axis in value.dims])


class Pair:
    """A value and the tensor that it should stand for, through the same operations."""

    def __init__(self, *shapes: tuple[int, ...]):
        self.space, self.atoms = Space(), [torch.rand(shape, dtype=torch.float64) - 0.3 for shape in shapes]
        self.items = [(self.space.atom(i, shape), self.atoms[i]) for i, shape in enumerate(shapes)]

    def check(self, value: Value, tensor: torch.Tensor) -> None:
        got = evaluate(self.space, value, self.atoms)
        torch.testing.assert_close(got, tensor, rtol=1e-12, atol=1e-12)


SHAPES = [(2, 3, 4), (3, 4), (4,), (2, 3, 1), (2, 1, 4), (6, 4), (2, 12), (24,), (2, 3, 4), (1, 3, 4)]


def step(draw, pair: Pair) -> None:
    """One random operation on what there is; the result joins it."""
    space, items = pair.space, pair.items
    a, x = items[draw(st.integers(0, len(items) - 1))]
    b, y = items[draw(st.integers(0, len(items) - 1))]
    kind = draw(st.sampled_from(["mul", "add", "sum", "permute", "reshape", "matmul", "expand", "scale", "unsqueeze"]))
    if kind in ("mul", "add"):
        try:
            torch.broadcast_shapes(x.shape, y.shape)
        except RuntimeError:
            return
        alpha = draw(st.sampled_from([1.0, -1.0, 0.5]))
        result = nf.multiply(space, a, b) if kind == "mul" else nf.add(space, a, b, alpha)
        items.append((result, x * y if kind == "mul" else x + alpha * y))
    elif kind == "sum" and x.dim():
        axes = draw(st.sets(st.integers(-x.dim(), x.dim() - 1).map(lambda i: i % x.dim()), min_size=1))
        keepdim = draw(st.booleans())
        items.append((nf.reduce_sum(space, a, axes, keepdim), x.sum(tuple(axes), keepdim=keepdim)))
    elif kind == "permute":
        order = draw(st.permutations(range(x.dim())))
        items.append((nf.permute(a, order), x.permute(order)))
    elif kind == "reshape":
        shape = draw(st.sampled_from([s for s in SHAPES if math.prod(s) == x.numel()] or [tuple(x.shape)]))
        items.append((nf.reshape(space, a, shape), x.reshape(shape)))
    elif kind == "matmul" and x.dim() == y.dim() == 2 and x.shape[1] == y.shape[0]:
        items.append((nf.contract(space, a, b, batch=0), x @ y))
    elif kind == "expand" and 1 in x.shape:
        shape = [3 if size == 1 else size for size in x.shape]
        items.append((nf.expand(space, a, shape), x.expand(shape)))
    elif kind == "scale":
        number = draw(st.sampled_from([2.0, -1.0, 0.0]))
        items.append((nf.scaled(a, number), x * number))
    elif kind == "unsqueeze" and x.dim() < 4:
        at = draw(st.integers(0, x.dim()))
        items.append((nf.reshape(space, a, x.unsqueeze(at).shape), x.unsqueeze(at)))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_programs(data):
    pair = Pair(*data.draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3)))
    for _ in range(data.draw(st.integers(1, 8))):
        try:
            step(data.draw, pair)
        except NoNormalForm:
            continue
    for value, tensor in pair.items:
        assert tuple(pair.space.total(axis) for axis in value.dims) == tuple(tensor.shape)
        pair.check(value, tensor)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_random_einsums(data):
    """Products over random letters, summed to random outputs: the order of factors and letters does not matter."""
    size = {"a": 2, "b": 3, "c": 4, "d": 1}
    parts = data.draw(st.lists(st.permutations("abcd").map(lambda p: "".join(p[:2])), min_size=1, max_size=3))
    letters = sorted(set("".join(parts)))
    output = "".join(data.draw(st.permutations(letters))[: data.draw(st.integers(0, len(letters)))])
    space = Space()
    atoms = [torch.rand([size[c] for c in part], dtype=torch.float64) for part in parts]

    def product(order: list[int], letters: list[str]) -> Value:
        total = space.constant(1.0, ())
        for i in order:
            order_of = sorted(range(2), key=lambda j, part=parts[i]: letters.index(part[j]))
            value = nf.permute(space.atom(i, atoms[i].shape), order_of)
            full = [size[c] if c in parts[i] else 1 for c in letters]
            total = nf.multiply(space, total, nf.reshape(space, value, full))
        total = nf.reduce_sum(space, total, [letters.index(c) for c in letters if c not in output], keepdim=False)
        kept = [c for c in letters if c in output]
        return nf.permute(total, [kept.index(c) for c in output])

    value = product(list(range(len(parts))), letters)
    want = torch.einsum(",".join(parts) + "->" + output, *atoms)
    torch.testing.assert_close(evaluate(space, value, atoms), want, rtol=1e-12, atol=1e-12)
    other = product(data.draw(st.permutations(range(len(parts)))), data.draw(st.permutations(letters)))
    keys = [{nf.canonical(t, x.dims): t.coef for t in x.terms} for x in (value, other)]
    assert keys[0] == keys[1]


def test_one_polynomial_in_four_spellings():
    space = Space()
    shapes = {"q": (2, 3), "S": (2, 3, 4)}
    q, S = (space.atom(i, shape) for i, shape in enumerate(shapes.values()))
    wide = nf.expand(space, nf.reshape(space, q, (2, 3, 1)), (2, 3, 4))
    spellings = [
        nf.reduce_sum(space, nf.multiply(space, nf.reshape(space, q, (2, 3, 1)), S), [1], keepdim=False),
        nf.reshape(space, nf.contract(space, nf.reshape(space, q, (2, 1, 3)), S, batch=1), (2, 4)),
        nf.reduce_sum(space, nf.multiply(space, nf.permute(S, (2, 0, 1)), q), [2], keepdim=False),
        nf.reduce_sum(space, nf.multiply(space, S, wide), [-2], keepdim=False),
    ]
    spellings[2] = nf.permute(spellings[2], (1, 0))
    forms = [[(nf.canonical(t, v.dims), t.coef) for t in v.terms] for v in spellings]
    assert all(form == forms[0] for form in forms) and len(forms[0]) == 1


def test_broadcast_against_an_axis_of_size_one():
    pair = Pair((2, 1, 4), (3, 1))
    (a, x), (b, y) = pair.items
    pair.check(nf.multiply(pair.space, a, b), x * y)
    pair.check(nf.add(pair.space, a, b, -2.0), x - 2 * y)


def test_a_broadcast_axis_that_is_summed_counts_its_size():
    pair = Pair((2, 1))
    a, x = pair.items[0]
    wide = nf.expand(pair.space, a, (2, 5))
    summed = nf.reduce_sum(pair.space, wide, [1], keepdim=False)
    assert summed.terms[0].coef == 5.0
    pair.check(summed, x.expand(2, 5).sum(1))


def test_merged_axes_are_cut_where_another_operand_needs_it():
    pair = Pair((2, 12), (3, 4), (2, 2, 6))
    (a, x), (b, y), (c, z) = pair.items
    split = nf.reshape(pair.space, a, (2, 3, 4))
    pair.check(nf.multiply(pair.space, split, b), x.view(2, 3, 4) * y)
    pair.check(nf.multiply(pair.space, nf.reshape(pair.space, c, (2, 12)), a), z.view(2, 12) * x)
    # [2, 2, 6] merged and cut again at 4: the two cuts of 12 have no common refinement.
    pair.check(nf.reshape(pair.space, nf.reshape(pair.space, c, (2, 12)), (24,)), z.view(24))
    with pytest.raises(NoNormalForm):
        nf.multiply(pair.space, nf.reshape(pair.space, c, (2, 12)), nf.reshape(pair.space, split, (2, 12)))


@pytest.mark.parametrize("shape", [(4, 6), (5, 5), (2, 3, 5), (2, 3, 4, 2)])
def test_reshapes_that_cut_across(shape):
    space = Space()
    a = space.atom(0, (3, 8))
    with pytest.raises(NoNormalForm):
        nf.reshape(space, a, shape)


def test_one_atom_in_two_roles():
    pair = Pair((2, 3))
    k, x = pair.items[0]
    row, column = nf.reshape(pair.space, k, (2, 1, 3)), nf.reshape(pair.space, k, (2, 3, 1))
    outer = nf.multiply(pair.space, row, column)
    assert len(outer.terms) == 1 and len(outer.terms[0].labels) == 3
    pair.check(outer, x[:, None, :] * x[:, :, None])
    trace = nf.reduce_sum(pair.space, nf.multiply(pair.space, k, k), [1], keepdim=False)
    pair.check(trace, (x * x).sum(1))


def test_like_terms_add_up_and_vanish():
    space = Space()
    a, b = space.atom(0, (2, 3)), space.atom(1, (3,))
    ab, ba = nf.multiply(space, a, b), nf.multiply(space, b, a)
    assert [t.coef for t in nf.add(space, ab, ba).terms] == [2.0]
    assert nf.add(space, ab, ba, -1.0).terms == ()
    assert nf.scaled(ab, 0.0).terms == () and space.constant(0.0, (3,)).terms == ()
    both = nf.add(space, ab, nf.add(space, a, ba, -1.0))
    assert [t.coef for t in both.terms] == [1.0] and both.atoms == {0}


def test_transposed_is_not_like():
    space = Space()
    a = space.atom(0, (3, 3))
    assert len(nf.add(space, a, nf.permute(a, (1, 0)), -1.0).terms) == 2


def test_inline_opens_a_definition_in_every_use():
    pair = Pair((2, 3), (2, 3))
    (a, x), (b, y) = pair.items
    pair.atoms.append((x * y).sum(1))
    c = pair.space.atom(2, (2,))
    definition = nf.reduce_sum(pair.space, nf.multiply(pair.space, a, b), [1], keepdim=False)
    used = nf.multiply(pair.space, nf.multiply(pair.space, c, c), nf.permute(a, (1, 0)))
    opened = nf.inline(pair.space, used, 2, definition)
    assert opened.atoms == {0, 1} and used.atoms == {0, 2}
    pair.check(opened, pair.atoms[2] ** 2 * x.T)
    assert nf.inline(pair.space, used, 1, definition).terms == nf.collect(used).terms


def test_inline_of_a_sum_multiplies_out():
    pair = Pair((3,), (3,))
    (a, x), (b, y) = pair.items
    pair.atoms.append(x - y)
    c = pair.space.atom(2, (3,))
    square = nf.inline(pair.space, nf.multiply(pair.space, c, c), 2, nf.add(pair.space, a, b, -1.0))
    assert sorted(t.coef for t in square.terms) == [-2.0, 1.0, 1.0]
    pair.check(square, (x - y) ** 2)


def test_inline_refuses_to_cut_the_axes_of_the_value():
    space = Space()
    a, c = space.atom(0, (2, 3)), space.atom(1, (6,))
    with pytest.raises(NoNormalForm):
        nf.inline(space, c, 1, nf.reshape(space, a, (6,)))


def test_limits():
    space = Space()
    many = space.atom(0, (2,))
    for i in range(1, 9):
        many = nf.add(space, many, space.atom(i, (2,)))
    with pytest.raises(NoNormalForm, match="too many terms"):
        nf.multiply(space, many, many)
    deep = space.atom(0, (2,) * (nf.MAX_SUMMED + 1))
    with pytest.raises(NoNormalForm, match="summed over"):
        nf.reduce_sum(space, deep, range(nf.MAX_SUMMED + 1), keepdim=False)


def test_values_are_plain_data():
    space = Space()
    value = space.atom(7, (2, 1, 3))
    assert value == Value(((0,), (), (1,)), (Term(1.0, (Factor(7, ((0,), (), (1,))),)),))
    assert nf.same_size(2, 2) and not nf.same_size(2, 3)

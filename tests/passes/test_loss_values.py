"""Axes through views and slices, and sums of products of what a loss is made of."""

import pytest
from torch import fx

from fla_compile.passes.loss_decide import decode
from fla_compile.passes.loss_values import (
    LSE,
    SUM,
    Form,
    Label,
    Root,
    Target,
    Value,
    add,
    aligned,
    flat,
    laid_over,
    poly,
    scaled,
    times,
    viewed,
)
from fla_compile.passes.loss_views import from_end
from fla_compile.passes.records import Refused


def labels(*sizes):
    return [Label(size) for size in sizes]


def test_views_merge_and_keep_axes():
    b, t, v = labels(2, 5, 20)
    dims = ((b,), (t,), (v,))
    assert viewed(dims, (10, 20)) == ((b, t), (v,))
    assert viewed(((b, t), (v,)), (2, 1, 5, 20)) == ((b,), (), (t,), (v,))
    assert viewed(dims, (2, 100)) == ((b,), (t, v))
    assert viewed(dims, (5, 2, 20)) is None
    assert viewed(dims, (2, 5)) is None


def test_views_split_axes():
    n, v = labels(10, 20)
    first, second, classes = viewed(((n,), (v,)), (2, 5, 20))
    assert [label.size for label in (*first, *second)] == [2, 5] and classes == (v,)
    assert flat(((n,), (v,))) == (*first, *second, v)  # whoever has the axis sees its parts
    whole = Label(20, whole=True)
    assert viewed(((whole,),), (4, 5)) is None


def test_equal_slices_are_one_label():
    (t,) = labels(7)
    assert t.cut(0, -1, 6) is t.cut(0, -1, 6)
    assert t.cut(0, -1, 6) is not t.cut(1, None, 6)
    assert [from_end(stop, 7) for stop in (None, -1, 6, 7, 9)] == [None, -1, -1, None, None]


def test_broadcasts():
    b, t, v = labels(2, 5, 20)
    assert aligned(((b,), (t,), (v,)), ((b,), (t,), ())) == ((b,), (t,), (v,))
    assert aligned(((b,), (t,)), ((t,),)) == ((b,), (t,))
    assert aligned(((b,), (t,)), ((b,),)) is None
    assert aligned(((b,),), ((b,), ())) is None  # each row with each other row
    assert laid_over((1, 5), ((b,), (t,))) == ((), (t,))
    assert laid_over((2, 5, 1), ((b,), (t,))) is None and laid_over((4,), ((b,), (t,))) is None


def test_polynomials():
    a = add(poly(LSE), poly(SUM, coef=2.0))
    assert add(a, a, -1.0) == {}
    assert times(a, poly(LSE)) == {(LSE, LSE): 1.0, (LSE, SUM): 2.0}
    assert scaled(a, -0.5) == {(LSE,): -0.5, (SUM,): -1.0}


def value(rows, kind="row"):
    n, v = Label(4), Label(20, whole=True)
    graph = fx.Graph()
    node = graph.placeholder("t")
    root = Root(node, node, node, None, False, (n,), v)
    target = Target(node, (n,), node, ((n,),))
    return Value(root, Form(), kind, ((n,),), rows(("pick", target)))


@pytest.mark.parametrize(
    ("rows", "factor", "smoothing", "z_loss"),
    [
        (lambda pick: add(poly(LSE), poly(pick), -1.0), 1.0, 0.0, 0.0),
        (lambda pick: scaled(add(poly(LSE), poly(pick), -1.0), -2.5), -2.5, 0.0, 0.0),
        (lambda pick: add(add(poly(LSE), poly(pick), -0.8), poly(SUM), -0.2 / 20), 1.0, 0.2, 0.0),
        (lambda pick: add(add(poly(LSE), poly(pick), -1.0), poly(LSE, LSE), 0.5), 1.0, 0.0, 0.5),
    ],
    ids=["plain", "factor", "smoothing", "z-loss"],
)
def test_decoding(rows, factor, smoothing, z_loss):
    loss = decode(value(rows))
    assert (loss.factor, loss.z_loss) == (factor, z_loss) and abs(loss.smoothing - smoothing) < 1e-12
    assert loss.reduction == "none"


@pytest.mark.parametrize(
    "rows",
    [
        lambda pick: poly(LSE),
        lambda pick: poly(pick),
        lambda pick: add(poly(LSE), poly(pick), -0.5),
        lambda pick: add(add(poly(LSE), poly(pick), -1.0), poly(), 3.0),
        lambda pick: add(add(poly(LSE), poly(pick), -1.0), poly(("max",))),
        lambda pick: add(add(poly(LSE), poly(pick), -1.2), poly(SUM), 0.2 / 20),
        lambda pick: add(poly(LSE), poly(pick, pick), -1.0),
        lambda pick: add(poly(LSE), poly(pick, ("rows",)), -1.0),
    ],
    ids=["no target", "no sum", "half", "constant", "maximum", "negative smoothing", "squared", "weighed differently"],
)
def test_no_loss(rows):
    with pytest.raises(Refused, match="unsupported_loss"):
        decode(value(rows))

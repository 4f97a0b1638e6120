"""One name and one set of arguments for each way to write an operation."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from fla_compile.passes.spellings import call_of, is_cast, is_reshape, keeps_value, peel, tensor_of

X, Y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)


def captured(fn, *args):
    """The graph that Dynamo makes of a function."""
    graphs = []

    def keep(gm, example_inputs):
        graphs.append(gm.graph)
        return gm.forward

    torch.compile(fn, backend=keep, fullgraph=True)(*args)
    return graphs[0]


def last_call(fn, *args):
    return call_of(captured(fn, *args).output_node().args[0][0])


def in_place(method):
    def fn(x, y):
        return method(x.clone(), y)

    return fn


def imul(x, y):
    z = x.clone()
    z *= y
    return z


PRODUCTS = {
    "operator": lambda x, y: x * y,
    "function": lambda x, y: torch.mul(x, y),
    "alias": lambda x, y: torch.multiply(x, other=y),
    "keywords": lambda x, y: torch.mul(input=x, other=y),
    "method": lambda x, y: x.mul(y),
    "in place": in_place(lambda z, y: z.mul_(y)),
    "augmented": imul,
    "aten": lambda x, y: torch.ops.aten.mul.Tensor(x, y),
}


@pytest.mark.parametrize("fn", PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_has_one_spelling(fn):
    graph = captured(fn, X, Y)
    call = call_of(graph.output_node().args[0][0])
    assert call.name == "mul" and set(call.args) == {"input", "other"}
    x, y = graph.find_nodes(op="placeholder")
    assert peel(call.get("input")) is x and call.get("other") is y
    assert call.in_place == (fn in (PRODUCTS["in place"], PRODUCTS["augmented"]))


CALLS = {
    "mean by axis": (lambda x, y: x.mean(axis=-1, keepdims=True), "mean", {"dim": -1, "keepdim": True}),
    "mean by position": (lambda x, y: torch.mean(x, -1, True), "mean", {"dim": -1, "keepdim": True}),
    "reflected division": (lambda x, y: 1 / x, "div", {"input": 1}),
    "reflected difference": (lambda x, y: torch.rsub(x, 1), "sub", {"input": 1}),
    "rms norm": (lambda x, y: F.rms_norm(x, (4,), eps=0.1), "rms_norm", {"normalized_shape": (4,), "eps": 0.1}),
    "silu": (lambda x, y: torch.nn.SiLU()(x), "silu", {}),
    "sigmoid": (lambda x, y: torch.special.expit(x), "sigmoid", {}),
    "view": (lambda x, y: x.view(2, 12), "view", {"size": (2, 12)}),
    "view of a tuple": (lambda x, y: x.view((2, 12)), "view", {"size": (2, 12)}),
    "cast": (lambda x, y: x.double(), "to", {"dtype": torch.float64}),
    "cast by keyword": (lambda x, y: x.to(dtype=torch.float64), "to", {"dtype": torch.float64}),
    "cast like": (lambda x, y: x.type_as(y.double()), "to", {"dtype": torch.float64}),
    "where": (lambda x, y: torch.where(x > 0, x, y), "where", {}),
    "variance": (lambda x, y: x.var(-1, unbiased=False), "var", {"dim": -1, "unbiased": False}),
    "vector norm": (lambda x, y: torch.linalg.vector_norm(x, dim=-1), "vector_norm", {"dim": -1}),
    "softmax": (lambda x, y: F.softmax(x, dim=-1), "softmax", {"dim": -1}),
    "cat": (lambda x, y: torch.concat([x, y], 1), "cat", {"dim": 1}),
    "pad": (lambda x, y: F.pad(x, (1, 0)), "pad", {"pad": (1, 0)}),
}


@pytest.mark.parametrize(("fn", "name", "args"), CALLS.values(), ids=CALLS)
def test_calls(fn, name, args):
    call = last_call(fn, X, Y)
    assert call.name == name and not call.in_place
    for key, value in args.items():
        have = call.get(key)
        assert (tuple(have) if isinstance(have, list) else have) == value


def test_where_as_a_method_has_the_condition_first():
    graph = captured(lambda x, y: x.where(x > 0, y), X, Y)
    call = call_of(graph.output_node().args[0][0])
    assert call_of(call.get("condition")).name == "gt"
    assert [call.get("input"), call.get("other")] == graph.find_nodes(op="placeholder")


def test_what_fits_no_signature_is_none():
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert call_of(x) is None
    assert call_of(graph.call_function(torch.mean, (x, 0, True, None, 5))) is None
    assert call_of(graph.call_function(operator.mul, (x, x), {"input": x})) is None


def test_casts_and_reshapes():
    def fn(x, y):
        narrow = x.bfloat16()
        wide = narrow.float()
        heads = wide.unflatten(-1, (2, 2))[..., None]
        return narrow, wide, heads, wide.transpose(0, 1)

    narrow, wide, heads, turned = captured(fn, X, Y).output_node().args[0]
    assert is_cast(narrow) and not keeps_value(narrow)
    assert is_cast(wide) and keeps_value(wide)
    assert is_reshape(heads) and tensor_of(heads).shape == (2, 3, 2, 2, 1)
    assert not is_reshape(turned)
    assert peel(heads) is narrow
    assert peel(heads, casts=False) is wide
    assert peel(wide, casts=False) is wide

"""Parts that run on all steps at once: what vmap gives, without a copy where rows lie batch first."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fla_compile.passes.over_time import OverTime, linear

T, B, D, E = 6, 3, 4, 5


def affine(x, w, b):
    return torch.addmm(b, torch.mm(x.sin(), w), w[:, : w.shape[1]].T @ w).cos(), torch.mm(w.mT, w)


def operands(batch=B, bias=(E,)):
    torch.manual_seed(0)
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((batch, T, D), (D, E), bias)]


def traced(f, *args):
    return make_fx(f, tracing_mode="fake")(*(x.detach() for x in args))


@pytest.mark.parametrize("batch_first", [True, False])
def test_values_gradients_and_order(batch_first):
    x, w, b = operands()
    step = traced(affine, x[:, 0], w, b)
    rows = x.movedim(1, 0) if batch_first else x.movedim(1, 0).contiguous()
    want = torch.vmap(affine, in_dims=(0, None, None))(rows, w, b)
    got = OverTime(step, [True, False, False])(rows, w, b)
    calls = [node.target for node in step.graph.nodes if node.op == "call_function"]
    assert calls.count(linear) == 2 and calls.count(torch.ops.aten.mm.default) == 2, "those without time stay"
    torch.testing.assert_close(got, want)
    assert got[0].movedim(0, 1).is_contiguous() == batch_first
    for y in zip(*(torch.autograd.grad(y[0].square().sum(), (x, w, b)) for y in (got, want)), strict=True):
        torch.testing.assert_close(*y)


def test_rows_in_order_are_not_copied():
    x, w, b = operands()
    part = OverTime(traced(affine, x[:, 0], w, b), [True, False, False])
    whole = make_fx(lambda x, w, b: part(x.movedim(1, 0), w, b)[0])(x, w, b)
    targets = [node.target for node in whole.graph.nodes]
    assert torch.ops.aten.clone.default not in targets and torch.ops.aten.bmm.default not in targets


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("batch", [B, T])
@pytest.mark.parametrize("bias", [(E,), (1,), (), "rows", "columns"])
def test_what_is_added(bias, batch, batch_first):
    """A matrix that is added belongs to the batch, which is as long as time for once."""
    x, w, b = operands(batch, {"rows": (batch, E), "columns": (batch, 1)}.get(bias, bias))
    rows = x.movedim(1, 0) if batch_first else x.movedim(1, 0).contiguous()
    step = traced(lambda x, w, b: (torch.addmm(b, x, w),), x[:, 0], w, b)
    got = OverTime(step, [True, False, False])(rows, w, b)
    torch.testing.assert_close(got, (rows @ w + b,))
    assert any(node.target is linear for node in step.graph.nodes) == isinstance(bias, tuple)


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_product_of_one_step(has_bias):
    x, w, b = operands()
    assert torch.autograd.gradcheck(linear, (x[:, 0].detach().requires_grad_(), w, *[b] * has_bias))

"""Norm times gate followed by a linear layer, as one operator that does not keep what lies between them.

    y = norm(x) * weight * act(gate)        out = y @ linear_weight^T + linear_bias

As with `norm_gate` alone, x, gate and one or two statistics a row are saved for backward, and y is not: the backward
kernel, which reads x and gate anyway, writes y again for the gradient of the linear's weight.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fla_compile.kernels.norm_gate import check_operands, fake_statistics, forward, gradients, tensor_or_empty
from fla_compile.kernels.norm_gate_forms import ACTIVATIONS, Form, naive_norm_gate
from fla_compile.kernels.operators import operator, register_autograd, register_fake

__all__ = ["naive_norm_gate_linear", "norm_gate_linear"]


@operator("norm_gate_linear")
def norm_gate_linear_op(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    width: int,
    eps: float,
    layer: bool,
    silu: bool,
    gate_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    form = Form(width, eps, layer, silu, gate_first)
    y, rstd, mean = forward(x, gate, weight, bias, form, linear_weight.dtype)
    return F.linear(y, linear_weight, linear_bias), rstd, mean


@register_fake(norm_gate_linear_op)
def _norm_gate_linear_fake(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    width: int,
    eps: float,
    layer: bool,
    silu: bool,
    gate_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    out = linear_weight.new_empty((*x.shape[:-1], linear_weight.shape[0]))
    return out, *fake_statistics(x, gate, weight, bias, width, layer)


@operator("norm_gate_linear_backward")
def norm_gate_linear_backward(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    linear_weight: Tensor,
    rstd: Tensor,
    mean: Tensor,
    dout: Tensor,
    eps: float,
    width: int,
    layer: bool,
    silu: bool,
    gate_first: bool,
    need_linear: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    form = Form(width, eps, layer, silu, gate_first)
    dy = dout @ linear_weight
    y_dtype = linear_weight.dtype if need_linear else None
    dx, dg, dw, db, y = gradients(x, gate, weight, bias, rstd, mean, dy, form, y_dtype)
    dl = None if y is None else dout.reshape(-1, dout.shape[-1]).T @ y.view(-1, y.shape[-1])
    return dx, dg, tensor_or_empty(dw, x), tensor_or_empty(db, x), tensor_or_empty(dl, x)


@register_fake(norm_gate_linear_backward)
def _norm_gate_linear_backward_fake(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    linear_weight: Tensor,
    rstd: Tensor,
    mean: Tensor,
    dout: Tensor,
    eps: float,
    width: int,
    layer: bool,
    silu: bool,
    gate_first: bool,
    need_linear: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dw, db = (x.new_empty(0) if p is None else p.new_empty(p.shape) for p in (weight, bias))
    dl = linear_weight.new_empty(linear_weight.shape) if need_linear else x.new_empty(0)
    return x.new_empty(x.shape), gate.new_empty(x.shape), dw, db, dl


def _setup_linear_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gate, weight, bias, linear_weight, linear_bias, width, eps, layer, silu, gate_first = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gate, weight, bias, linear_weight, *output[1:])
    ctx.form, ctx.linear_bias = (eps, width, layer, silu, gate_first), linear_bias is not None


def _linear_backward(ctx: Any, dout: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 11
    x, gate, weight, bias, linear_weight, rstd, mean = ctx.saved_tensors
    need = ctx.needs_input_grad[4]
    operands = x, gate, weight, bias, linear_weight, rstd, mean, dout
    dx, dg, dw, db, dl = norm_gate_linear_backward(*operands, *ctx.form, need)
    dw, db, dl = None if weight is None else dw, None if bias is None else db, dl if need else None
    has_bias = ctx.linear_bias and ctx.needs_input_grad[5]
    return dx, dg, dw, db, dl, dout.flatten(0, -2).sum(0) if has_bias else None, *(None,) * 5


register_autograd(norm_gate_linear_op, _linear_backward, setup_context=_setup_linear_context)


def norm_gate_linear(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
    *,
    norm: str = "rms",
    activation: str = "silu",
    eps: float = 1e-5,
    gate_first: bool = False,
    width: int | None = None,
) -> Tensor:
    """`norm_gate` followed by a linear layer, without keeping what lies between them for backward.

    Arguments as in `norm_gate`; linear_weight [O, P], linear_bias [O]. Returns [..., O] in linear_weight's dtype.
    """
    D = check_operands(x, gate, weight, bias, norm, activation, width)
    if linear_weight.ndim != 2 or linear_weight.shape[1] != x.shape[-1]:
        raise ValueError(f"linear_weight has shape {tuple(linear_weight.shape)}, x has P={x.shape[-1]}")
    layer, silu = norm == "layer", ACTIVATIONS[activation] == "silu"
    return norm_gate_linear_op(x, gate, weight, bias, linear_weight, linear_bias, D, eps, layer, silu, gate_first)[0]


def naive_norm_gate_linear(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
    *,
    norm: str = "rms",
    activation: str = "silu",
    eps: float = 1e-5,
    gate_first: bool = False,
    width: int | None = None,
) -> Tensor:
    """As `norm_gate_linear`, in plain operations."""
    y = naive_norm_gate(
        x, gate, weight, bias, norm=norm, activation=activation, eps=eps, gate_first=gate_first, width=width,
        dtype=linear_weight.dtype,
    )  # fmt: skip
    return F.linear(y, linear_weight, linear_bias)

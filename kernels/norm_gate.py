"""Norm times gate as an operator; the mathematics are in `norm_gate_forms`.

    y = norm(x) * weight * act(gate)

x, gate and one or two statistics a row are saved for backward. CPU and float64 run `norm_gate_plain`, CUDA runs
`norm_gate_triton`.
"""

from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fla_compile.kernels.norm_gate_configs import LARGEST_WIDTH
from fla_compile.kernels.norm_gate_forms import ACTIVATIONS, NORMS, Form, naive_norm_gate, wide_dtype
from fla_compile.kernels.norm_gate_plain import plain_backward, plain_forward
from fla_compile.kernels.operators import operator, register_autograd, register_fake

__all__ = ["check_operands", "forward", "gradients", "has_triton", "naive_norm_gate", "norm_gate"]


def has_triton(device_type: str, width: int, *dtypes: torch.dtype) -> bool:
    """Whether operands of these types run the Triton kernels."""
    narrow = all(dtype in (torch.float16, torch.bfloat16, torch.float32) for dtype in dtypes)
    return device_type == "cuda" and width <= LARGEST_WIDTH and narrow


_has_triton = lru_cache(has_triton)


def _uses_triton(form: Form, x: Tensor, *others: Tensor | None) -> bool:
    return _has_triton(x.device.type, form.width, x.dtype, *[y.dtype for y in others if y is not None])


@cache
def _triton() -> ModuleType:
    from fla_compile.kernels import norm_gate_triton

    return norm_gate_triton


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def forward(
    x: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, form: Form, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = _dense(weight), _dense(bias)
    if _uses_triton(form, x, gate, weight, bias):
        y, rstd, mean = _triton().launch_forward(x, gate, weight, bias, form, dtype)
    else:
        rows = (-1, form.width)
        y, rstd, mean = plain_forward(x.reshape(rows), gate.reshape(rows), weight, bias, form, dtype)
        y = y.view(x.shape)
    return y, rstd, rstd.new_empty(0) if mean is None else mean


def gradients(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor,
    mean: Tensor,
    dy: Tensor,
    form: Form,
    y_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    weight, bias = _dense(weight), _dense(bias)
    statistics = rstd, mean if form.layer else None
    if _uses_triton(form, x, gate, weight, bias):
        return _triton().launch_backward(x, gate, weight, bias, *statistics, dy, form, y_dtype)
    rows = (-1, form.width)
    operands = x.reshape(rows), gate.reshape(rows), weight, bias, *statistics, dy.reshape(rows)
    dx, dg, dw, db, y = plain_backward(*operands, form, y_dtype)
    return dx.view(x.shape), dg.view(x.shape), dw, db, None if y is None else y.view(x.shape)


# An operator returns tensors only: an empty one stands where there is none.
def tensor_or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


@operator("norm_gate")
def norm_gate_op(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    width: int,
    eps: float,
    layer: bool,
    silu: bool,
    gate_first: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return forward(x, gate, weight, bias, Form(width, eps, layer, silu, gate_first), dtype)


@register_fake(norm_gate_op)
def _norm_gate_fake(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    width: int,
    eps: float,
    layer: bool,
    silu: bool,
    gate_first: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    rstd, mean = fake_statistics(x, gate, weight, bias, width, layer)
    return x.new_empty(x.shape, dtype=dtype), rstd, mean


def fake_statistics(
    x: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, width: int, layer: bool
) -> tuple[Tensor, Tensor]:
    rstd = x.new_empty(x.numel() // width, dtype=wide_dtype(x, gate, weight, bias))
    return rstd, rstd.new_empty(rstd.shape if layer else 0)


@operator("norm_gate_backward")
def norm_gate_backward(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor,
    mean: Tensor,
    dy: Tensor,
    eps: float,
    width: int,
    layer: bool,
    silu: bool,
    gate_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    form = Form(width, eps, layer, silu, gate_first)
    dx, dg, dw, db, _ = gradients(x, gate, weight, bias, rstd, mean, dy, form)
    return dx, dg, tensor_or_empty(dw, x), tensor_or_empty(db, x)


@register_fake(norm_gate_backward)
def _norm_gate_backward_fake(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor,
    mean: Tensor,
    dy: Tensor,
    eps: float,
    width: int,
    layer: bool,
    silu: bool,
    gate_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dw, db = (x.new_empty(0) if p is None else p.new_empty(p.shape) for p in (weight, bias))
    return x.new_empty(x.shape), gate.new_empty(x.shape), dw, db


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gate, weight, bias, width, eps, layer, silu, gate_first, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gate, weight, bias, *output[1:])
    ctx.form = eps, width, layer, silu, gate_first


def _backward(ctx: Any, dy: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 10
    x, gate, weight, bias, rstd, mean = ctx.saved_tensors
    dx, dg, dw, db = norm_gate_backward(x, gate, weight, bias, rstd, mean, dy, *ctx.form)
    return dx, dg, None if weight is None else dw, None if bias is None else db, *(None,) * 6


register_autograd(norm_gate_op, _backward, setup_context=_setup_context)


def norm_gate(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: str = "rms",
    activation: str = "silu",
    eps: float = 1e-5,
    gate_first: bool = False,
    width: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """norm(x) * weight + bias, times act(gate); with `gate_first`, norm(x * act(gate)) * weight + bias.

    x and gate [..., P]; `width` D divides P, and each run of D elements is normalised alone (all of P if None); weight
    and bias of D or P elements. `norm` is "rms" or "layer", `activation` "silu", "swish" or "sigmoid". Computed in
    float32, or float64 if an operand is. Returns [..., P] in `dtype`, x's if None. Raises ValueError for shapes, names
    or devices that do not agree. Source: Zhang and Sennrich 2019, arXiv:1910.07467; Sun et al. 2023, arXiv:2307.08621.
    """
    D = check_operands(x, gate, weight, bias, norm, activation, width)
    layer, silu = norm == "layer", ACTIVATIONS[activation] == "silu"
    return norm_gate_op(x, gate, weight, bias, D, eps, layer, silu, gate_first, dtype or x.dtype)[0]


def check_operands(
    x: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, activation: str, width: int | None
) -> int:
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if x.ndim == 0 or gate.shape != x.shape:
        raise ValueError(f"gate has shape {tuple(gate.shape)}, x has {tuple(x.shape)}")
    D = x.shape[-1] if width is None else width
    if D < 1 or x.shape[-1] % D:
        raise ValueError(f"width must divide the last axis of x, got {D} and {x.shape[-1]}")
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.numel() not in (D, x.shape[-1]):
            raise ValueError(f"{name} has {p.numel()} elements, x has rows of {D} and a last axis of {x.shape[-1]}")
    if weight is not None and bias is not None and weight.numel() != bias.numel():
        raise ValueError(f"bias has {bias.numel()} elements, weight has {weight.numel()}")
    for name, p in (("x", x), ("gate", gate), ("weight", weight), ("bias", bias)):
        if p is not None and (not p.dtype.is_floating_point or p.device != x.device):
            raise ValueError(f"{name} must be floating point on {x.device}, got {p.dtype} on {p.device}")
    return D

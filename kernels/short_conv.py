"""The short convolution over time as an operator: checks, `torch.library` registration, public functions.

    z_t = sum_j weight[:, j] x_{t-W+1+j} + bias        y_t = act(z_t) + residual_t        act: identity or SiLU

Causal and depthwise: x, y [B, T, D], weight [D, W]. The W - 1 inputs before the first step are the initial state
[B, W - 1, D], oldest first, or zeros; the last W - 1 inputs are the final state. With dz_t = act'(z_t) dy_t:

    dx_t = sum_j weight[:, j] dz_{t+W-1-j}        dweight_j = sum_t dz_t x_{t-W+1+j}        dbias = sum_t dz_t

z is not kept but computed again. CUDA runs `short_conv_triton`; the CPU, and float64, `short_conv_cpu`.
"""

from typing import Any

import torch
from torch import Tensor

from fla_compile.kernels import short_conv_cpu
from fla_compile.kernels.linear_scan import check_operand
from fla_compile.kernels.operators import DEVICES, operator, register_autograd, register_fake
from fla_compile.kernels.packed import check_packed, sequence_bounds
from fla_compile.kernels.short_conv_states import add_final, final_state

__all__ = ["kernel_name", "short_conv", "short_conv_op", "short_conv_step", "supports"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ACTIVATIONS = (None, "silu", "swish")
LARGEST_WIDTH_CUDA = 8


def supports(device_type: str, dtype: torch.dtype, W: int) -> str | None:
    """None if the convolution runs there, else the reason why not."""
    if device_type not in DEVICES:
        return f"device {device_type!r} is not one of {', '.join(DEVICES)}"
    if dtype not in DTYPES:
        return f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}"
    if W < 2:
        return f"W={W} is no convolution, at least W=2 is needed"
    if device_type == "cuda" and W > LARGEST_WIDTH_CUDA:
        return f"W={W} exceeds {LARGEST_WIDTH_CUDA} on cuda"
    return None


def kernel_name(device_type: str, dtype: torch.dtype) -> str:
    """What runs where `supports` accepts, for reports."""
    return "conv (Triton)" if device_type == "cuda" and dtype != torch.float64 else "conv (slabs)"


def _on_triton(x: Tensor) -> bool:
    return kernel_name(x.device.type, x.dtype) == "conv (Triton)"


@operator("short_conv")
def short_conv_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    bounds = _bounds(cu_seqlens, x)
    state = None if initial_state is None else initial_state.to(x.dtype).contiguous()
    final = final_state(x, state, weight.shape[1], cu_seqlens) if output_final_state else x.new_empty(0)
    if _on_triton(x):
        from fla_compile.kernels import short_conv_triton  # triton may be absent

        return short_conv_triton.forward(x, weight, bias, residual, state, silu, cu_seqlens), final
    if bounds is None:
        return short_conv_cpu.forward(x, weight, bias, residual, state, silu), final
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for n, (start, stop) in enumerate(bounds):
        own = None if residual is None else residual[:, start:stop]
        past = None if state is None else state[n : n + 1]
        y[:, start:stop] = short_conv_cpu.forward(x[:, start:stop], weight, bias, own, past, silu)
    return y, final


@register_fake(short_conv_op)
def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = (N, weight.shape[1] - 1, x.shape[2]) if output_final_state else (0,)
    return x.new_empty(x.shape), x.new_empty(final)


# An operator returns tensors only: where a gradient is not wanted, an empty one stands in its place.
@operator("short_conv_backward")
def short_conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
    cu_seqlens: Tensor | None,
    dy: Tensor | None,
    dfinal: Tensor | None,
    need_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bounds = _bounds(cu_seqlens, x)
    state = None if initial_state is None else initial_state.to(x.dtype).contiguous()
    dbias: Tensor | None
    dh: Tensor | None
    if dy is None:
        dx, dweight, dbias = x.new_zeros(x.shape), torch.zeros_like(weight), weight.new_zeros(x.shape[2])
        dh = None if state is None else torch.zeros_like(state)
    elif _on_triton(x):
        from fla_compile.kernels import short_conv_triton

        dx, dweight, dbias, dh = short_conv_triton.backward(x, weight, bias, state, silu, cu_seqlens, dy, need_state)
    elif bounds is None:
        dx, dweight, dbias, dh = short_conv_cpu.backward(x, weight, bias, state, silu, dy)
    else:
        dx, dweight, dbias, dh = _each_backward(x, weight, bias, state, silu, bounds, dy)
    if dfinal is not None:
        dx, dh = add_final(dx, dh, dfinal, weight.shape[1], cu_seqlens)
    if dy is None or not _on_triton(x):
        dweight = dweight.to(weight.dtype, copy=True, memory_format=torch.contiguous_format)
    keep_state = need_state and dh is not None and initial_state is not None
    return (
        dx,
        dweight,
        x.new_empty(0) if bias is None or dbias is None else dbias.to(bias.dtype),
        dh.to(initial_state.dtype) if keep_state else x.new_empty(0),  # type: ignore[union-attr]
    )


@register_fake(short_conv_backward)
def _backward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
    cu_seqlens: Tensor | None,
    dy: Tensor | None,
    dfinal: Tensor | None,
    need_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keep_state = need_state and initial_state is not None
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        initial_state.new_empty(initial_state.shape) if keep_state else x.new_empty(0),  # type: ignore[union-attr]
    )


def _each_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    silu: bool,
    bounds: list[tuple[int, int]],
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`short_conv_cpu.backward` on one sequence after another."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums: list[tuple[Tensor, Tensor]] = []
    states: list[Tensor] = []
    for n, (start, stop) in enumerate(bounds):
        past = None if state is None else state[n : n + 1]
        steps = slice(start, stop)
        dx[:, steps], *own, dh = short_conv_cpu.backward(x[:, steps], weight, bias, past, silu, dy[:, steps])
        sums.append((own[0], own[1]))
        states.append(dh)
    dweight, dbias = (torch.stack(part).sum(0) for part in zip(*sums, strict=True))
    return dx, dweight, dbias, torch.cat(states)


def _bounds(cu_seqlens: Tensor | None, x: Tensor) -> list[tuple[int, int]] | None:
    """The boundaries on the host, checked; not while a CUDA graph is captured, which cannot look at them."""
    if cu_seqlens is None or (x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return None
    return sequence_bounds(cu_seqlens, x.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, residual, initial_state, silu, output_final_state, cu_seqlens = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)
    ctx.silu, ctx.final = silu, output_final_state
    ctx.residual_dtype = None if residual is None else residual.dtype


def _autograd(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    dfinal = dfinal if ctx.final else None
    if dy is None and dfinal is None:
        return (None,) * 8
    need_bias = bias is not None and ctx.needs_input_grad[2]
    need_state = initial_state is not None and ctx.needs_input_grad[4]
    dx, dweight, dbias, dh = short_conv_backward(
        x, weight, bias, initial_state, ctx.silu, cu_seqlens, dy, dfinal, need_state
    )
    dresidual = dy.to(ctx.residual_dtype) if dy is not None and ctx.needs_input_grad[3] else None
    return dx, dweight, dbias if need_bias else None, dresidual, dh if need_state else None, None, None, None


register_autograd(short_conv_op, _autograd, setup_context=_setup_context)


# the state is updated in place: no gradient
@operator("short_conv_step", mutates=("state",))
def short_conv_step_op(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, silu: bool
) -> Tensor:
    if _on_triton(x) and state.is_contiguous():
        from fla_compile.kernels import short_conv_triton

        return short_conv_triton.step(x, state, weight, bias, residual, silu)
    inputs = torch.cat([state.to(x.dtype), x[:, None]], 1)
    own = None if residual is None else residual[:, None]
    y = short_conv_cpu.forward(inputs[:, -1:], weight, bias, own, inputs[:, :-1], silu)
    state.copy_(inputs[:, 1:])
    return y[:, 0].contiguous()


@register_fake(short_conv_step_op)
def _step_fake(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, silu: bool
) -> Tensor:
    return x.new_empty(x.shape)


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal depthwise convolution over time, y_t = act(sum_j weight[:, j] x_{t-W+1+j} + bias) + residual_t.

    x [B, T, D]; weight [D, W], the newest step last, W from 2 to 8 on CUDA; bias [D]; activation None or "silu";
    residual [B, T, D]; initial_state [B, W - 1, D], the inputs before the first step, oldest first; cu_seqlens
    [N + 1], int32 or int64, where row 0 packs N sequences (B = 1, states [N, W - 1, D]). Sums in float32 (float64 for
    float64). Returns y [B, T, D] and the final state [B, W - 1, D], the last W - 1 inputs, or None in its place, in x's
    dtype. Raises ValueError for shapes, dtypes or devices that do not agree, and for an empty sequence. Source: Gu
    and Dao 2023, arXiv:2312.00752.
    """
    first = check_packed("x", x, cu_seqlens, initial_state)
    _check(x, "BTD", weight, bias, residual, first, "BSD", activation)
    y, final = short_conv_op(
        x, weight, bias, residual, initial_state, activation is not None, output_final_state, cu_seqlens
    )
    return y, final if output_final_state else None


def short_conv_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """One step of `short_conv`, for decoding: y [B, D] of x [B, D], without gradient.

    state [B, W - 1, D], the inputs before, oldest first, is updated in place; weight [D, W]; bias [D]; activation None
    or "silu"; residual [B, D]. Raises ValueError for shapes, dtypes or devices that do not agree.
    """
    _check(x, "BD", weight, bias, residual, state, "BSD", activation)
    return short_conv_step_op(x, state, weight, bias, residual, activation is not None)


def _check(
    x: Tensor,
    axes: str,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    state: Tensor | None,
    state_axes: str,
    activation: str | None,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None, 'silu' or 'swish', got {activation!r}")
    check_operand("x", x, axes, x, "x", axes)
    if 0 in x.shape:
        raise ValueError(f"x has an axis of size 0: {tuple(x.shape)}")
    check_operand("weight", weight, "DW", x, "x", axes)
    for name, operand, own in (("bias", bias, "D"), ("residual", residual, axes), ("initial_state", state, state_axes)):
        if operand is not None:
            check_operand(name, operand, own, x, "x", axes)
    if state is not None and state.shape[1] != weight.shape[1] - 1:
        raise ValueError(f"initial_state has {state.shape[1]} steps, weight has W={weight.shape[1]}")
    reason = supports(x.device.type, x.dtype, weight.shape[1])
    if reason is not None:
        raise ValueError(f"x, weight: {reason}")

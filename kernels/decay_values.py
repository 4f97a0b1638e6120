"""The decayed outer product with a decay over values, or over keys and values, as one operator.

    S_t = diag(exp(g_t)) S_{t-1} diag(exp(gv_t)) + k_t v_t^T        o_t = scale * S_t^T q_t

q, k [B, T, H, K]; v [B, T, H, V]; g None or [B, T, H, K]; gv [B, T, H, V]; the state [B, H, K, V]. CPU runs the chunks
of `decay_cpu` in matrix products. For a decay over values alone CUDA runs `decay_triton_values`, up to K = 512 and
V = 256; for both decays `decay_triton_both`, in two bytes and up to 128 of either; forward over few steps
`decay_step_triton` where that is checked; and matrix products for the rest. Packed sequences run in Triton's kernels as
they lie, in two bytes, and are gathered elsewhere (`packed`).
"""

from typing import Any

import torch
from torch import Tensor

from fla_compile.kernels import decay_cpu
from fla_compile.kernels.decay_checks import both_kernels_for, state_dtype, steps_for, value_kernels_for
from fla_compile.kernels.operators import operator, register_autograd, register_fake
from fla_compile.kernels.packed import register_packed


@operator("gla_values")
def gla_values(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    steps = steps_for(q, v)
    if steps is not None:
        return steps.step_forward(q, k, v, g, initial_state, scale, gv=gv)
    kernels = value_kernels_for(q, v) if g is None else both_kernels_for(q, v)
    if kernels is None:
        return decay_cpu.chunk_forward(q, k, v, g, initial_state, scale, gv=gv)
    gates = (gv,) if g is None else (g, gv)
    return kernels.chunk_forward(q, k, v, *gates, initial_state, scale)


@register_fake(gla_values)
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    B, _, H, K = q.shape
    return v.new_empty(v.shape), v.new_empty((B, H, K, v.shape[-1]), dtype=state_dtype(q))


# An operator returns tensors only: an empty one stands for the gradient of what is absent.
@operator("gla_values_backward")
def gla_values_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor,
    initial_state: Tensor | None,
    scale: float,
    do: Tensor,
    dht: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernels = value_kernels_for(q, v) if g is None else both_kernels_for(q, v)
    dg: Tensor | None = None
    if kernels is None:
        dq, dk, dv, dg, dgv, dh0 = decay_cpu.chunk_gradients(q, k, v, g, gv, initial_state, scale, do, dht)
    elif g is None:
        dq, dk, dv, dgv, dh0 = kernels.chunk_backward(q, k, v, gv, initial_state, scale, do, dht)
    else:
        dq, dk, dv, dg, dgv, dh0 = kernels.chunk_backward(q, k, v, g, gv, initial_state, scale, do, dht)
    assert dgv is not None
    dg, dh0 = (
        q.new_empty(0) if x is None or of is None else x.to(of.dtype) for x, of in ((dg, g), (dh0, initial_state))
    )
    return dq, dk, dv, dg, dgv.to(gv.dtype), dh0


@register_fake(gla_values_backward)
def _backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor,
    initial_state: Tensor | None,
    scale: float,
    do: Tensor,
    dht: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dgv = (x.new_empty(x.shape) for x in (q, k, v, gv))
    dg, dh0 = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (g, initial_state))
    return dq, dk, dv, dg, dgv, dh0


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, do: Tensor | None, dht: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, g, gv, initial_state = ctx.saved_tensors
    if do is None and dht is None:
        return (None,) * 7
    if do is None:
        do = torch.zeros_like(v)
    dq, dk, dv, dg, dgv, dh0 = gla_values_backward(q, k, v, g, gv, initial_state, ctx.scale, do, dht)
    return dq, dk, dv, None if g is None else dg, dgv, None if initial_state is None else dh0, None


register_autograd(gla_values, _backward, setup_context=_setup_context)


def _forward_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor,
    initial_state: Tensor | None,
    scale: float,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor] | None:
    kernels = value_kernels_for(q, v) if g is None else both_kernels_for(q, v)
    gates = (gv,) if g is None else (g, gv)
    return None if kernels is None else kernels.packed_forward(q, k, v, *gates, initial_state, scale, cu_seqlens)


def _backward_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor,
    initial_state: Tensor | None,
    scale: float,
    cu_seqlens: Tensor,
    do: Tensor | None,
    dht: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor | None, ...] | None:
    kernels = value_kernels_for(q, v) if g is None else both_kernels_for(q, v)
    if kernels is None:
        return None
    gates = (gv,) if g is None else (g, gv)
    grads = kernels.packed_backward(q, k, v, *gates, initial_state, scale, cu_seqlens, do, dht)
    return grads if g is not None or grads is None else (*grads[:3], None, *grads[3:])


gla_values_packed = register_packed(
    gla_values, _setup_context, _backward, forward_packed=_forward_packed, backward_packed=_backward_packed
)

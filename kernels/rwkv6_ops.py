"""RWKV-6's recurrence: a decayed outer product, read before the update, with a bonus for the step itself.

    o_t = scale * (S_{t-1} + diag(u) k_t v_t^T)^T q_t        S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T

q, k [B, T, H, K]; v [B, T, H, V]; g [B, T, H, K]; u [H, K] or None (no bonus); the state [B, H, K, V].

On CUDA operands of two bytes run in `rwkv6_triton`, packed sequences too. All else is gated linear attention with k, v
and g delayed by one step, since what is read before step t is the state after step t - 1: the first step decays nothing
and adds nothing, and one step more reads nothing and ends in S_T. The bonus is a product of rows there, o_t += scale *
(sum_k q_tk u_k k_tk) v_t.
Source: Peng et al. 2024, arXiv:2404.05892, section 4.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fla_compile.kernels.decay_checks import (
    FAMILIES,
    check_gate,
    check_operands,
    chunks_for,
    kernel_name,
    state_dtype,
    steps_for,
)
from fla_compile.kernels.operators import operator, register_autograd, register_fake
from fla_compile.kernels.packed import call_packed, check_packed, register_packed

__all__ = ["rwkv6"]


@operator("rwkv6")
def rwkv6_op(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, u: Tensor | None, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    steps = steps_for(q, v)
    if steps is not None:
        return steps.step_forward(q, k, v, g, initial_state, scale, u=u, before=True)
    kernels = _kernels(q, v)
    found = None if kernels is None else kernels.forward(q, k, v, g, u, initial_state, scale)
    if found is not None:
        return found
    chunks = chunks_for(q, v)
    y, final = chunks.chunk_forward(*_delayed(q, k, v, g), initial_state, scale)
    y = y[:, :-1]
    if u is not None:
        wide = state_dtype(q)
        y = y.to(wide).addcmul((q * u.to(wide) * k).sum(-1, keepdim=True), v.to(wide), value=scale)
    return _like(y, v), final


@register_fake(rwkv6_op)
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, u: Tensor | None, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    B, _, H, K = q.shape
    return v.new_empty(v.shape), v.new_empty((B, H, K, v.shape[-1]), dtype=state_dtype(q))


# An operator returns tensors only: an empty one stands for the gradient of what is absent.
@operator("rwkv6_backward")
def rwkv6_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    u: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    do: Tensor,
    dht: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernels = _kernels(q, v)
    found = None if kernels is None else kernels.backward(q, k, v, g, u, initial_state, scale, do, dht)
    if found is not None:
        dq, dk, dv, dg, *rest = found
        du, dh0 = (
            q.new_empty(0) if x is None or of is None else x.to(of.dtype)
            for x, of in zip(rest, (u, initial_state), strict=True)
        )
        return dq, dk, dv, dg.to(g.dtype), du, dh0
    chunks = chunks_for(q, v)
    delayed = _delayed(q, k, v, g)
    dy = pad(do.to(delayed[0].dtype), _LAST)
    dq, dk, dv, dg, dh0 = chunks.chunk_backward(*delayed, initial_state, scale, dy, dht)
    dq, dk, dv, dg = dq[:, :-1], dk[:, 1:], dv[:, 1:], dg[:, 1:]
    du = q.new_empty(0)
    if u is not None:
        wide = state_dtype(q)
        qw, kw, bonus = q.to(wide), k.to(wide), u.to(wide)
        weight = (qw * bonus * kw).sum(-1, keepdim=True)
        dweight = scale * (do.to(wide) * v).sum(-1, keepdim=True)
        dq = dq.to(wide).addcmul(dweight * bonus, kw)
        dk = dk.to(wide).addcmul(dweight * bonus, qw)
        dv = dv.to(wide).addcmul(weight, do.to(wide), value=scale)
        du = (dweight * qw * kw).sum((0, 1)).to(u.dtype)
    dq, dk, dv, dg = (_like(dx, x) for dx, x in ((dq, q), (dk, k), (dv, v), (dg, g)))
    dh0 = q.new_empty(0) if dh0 is None or initial_state is None else dh0.to(initial_state.dtype)
    return dq, dk, dv, dg, du, dh0


@register_fake(rwkv6_backward)
def _backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    u: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    do: Tensor,
    dht: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dg = (x.new_empty(x.shape) for x in (q, k, v, g))
    du, dh0 = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (u, initial_state))
    return dq, dk, dv, dg, du, dh0


def _kernels(q: Tensor, v: Tensor) -> ModuleType | None:
    if kernel_name("rwkv6", q.device.type, q.dtype, q.shape[-1], v.shape[-1]) != "chunk (Triton)":
        return None
    from fla_compile.kernels import rwkv6_triton  # triton may be absent

    return rwkv6_triton


def _forward_packed(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, u: Tensor | None, initial_state: Tensor | None, scale: float,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    kernels = _kernels(q, v)
    return None if kernels is None else kernels.forward(q, k, v, g, u, initial_state, scale, cu_seqlens)


def _backward_packed(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, u: Tensor | None, initial_state: Tensor | None, scale: float,
    cu_seqlens: Tensor, do: Tensor | None, dht: Tensor | None, wanted: list[bool],
) -> tuple[Tensor | None, ...] | None:  # fmt: skip
    kernels = _kernels(q, v)
    return None if kernels is None else kernels.backward(q, k, v, g, u, initial_state, scale, do, dht, cu_seqlens)


# One more step in front, or at the end, of [B, T, H, K].
_FIRST, _LAST = (0, 0, 0, 0, 1, 0), (0, 0, 0, 0, 0, 1)


def _delayed(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[B, T + 1, H, ...]; on the CPU in the wide dtype, so that o is rounded once, after the bonus."""
    dtype = q.dtype if q.is_cuda else state_dtype(q)
    return pad(q.to(dtype), _LAST), pad(k.to(dtype), _FIRST), pad(v.to(dtype), _FIRST), pad(g, _FIRST)


def _like(x: Tensor, other: Tensor) -> Tensor:
    return x.to(other.dtype, copy=True, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, do: Tensor | None, dht: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, g, u, initial_state = ctx.saved_tensors
    if do is None and dht is None:
        return (None,) * 7
    if do is None:
        do = torch.zeros_like(v)
    dq, dk, dv, dg, du, dh0 = rwkv6_backward(q, k, v, g, u, initial_state, ctx.scale, do, dht)
    return dq, dk, dv, dg, None if u is None else du, None if initial_state is None else dh0, None


register_autograd(rwkv6_op, _backward, setup_context=_setup_context)
rwkv6_packed = register_packed(
    rwkv6_op,
    _setup_context,
    _backward,
    shared=("u",),
    forward_packed=_forward_packed,
    backward_packed=_backward_packed,
)


def rwkv6(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    u: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """RWKV-6, o_t = scale * (S_{t-1} + diag(u) k_t v_t^T)^T q_t and S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T.

    q, k [B, T, H, K]; v [B, T, H, V]; g [B, T, H, K], the natural logarithm of the decay, best kept in float32; u [H,
    K], the bonus of the step itself, zero if None; initial_state [B, H, K, V]; cu_seqlens [N + 1], int32 or int64,
    where row 0 packs N sequences (B = 1, states [N, H, K, V]); scale K^-0.5 if None. Returns o [B, T, H, V] in v's
    dtype and the final state [B, H, K, V] in float32 (float64 for float64), or None in its place. Raises ValueError for
    shapes, dtypes or devices that do not agree, and for an empty sequence. Source: Peng et al. 2024, arXiv:2404.05892.
    """
    check_operands("rwkv6", q, k, v, check_packed("q", q, cu_seqlens, initial_state))
    check_gate("g", g, FAMILIES["rwkv6"], q, v)
    if u is not None:
        check_gate("u", u, "HK", q, v)
    operands = q, k, v, g, u, initial_state, q.shape[-1] ** -0.5 if scale is None else scale
    o, final = rwkv6_op(*operands) if cu_seqlens is None else call_packed(rwkv6_packed, *operands, cu_seqlens)
    return o, final if output_final_state else None

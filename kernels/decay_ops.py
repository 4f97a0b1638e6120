"""The decayed outer product as operators: checks, `torch.library` registration, public functions.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t        a_t = exp(g_t)

One forward operator for each family in `OPS`, so that a graph says what it runs, and one backward for all of them:
the rank of g tells the families apart. CPU runs `decay_cpu`, CUDA runs `decay_triton`, and forward over few steps
`decay_step_triton` where that is checked. Packed sequences run `decay_triton_packed` as they lie where it takes them,
and are gathered elsewhere (`packed`). A decay over values and RWKV-6's reading are operators of their own, in
`decay_values` and `rwkv6_ops`; `decay_step` has those that update a state in place.

Neighbouring heads may share operands, as `decay_heads` says; k and v are not repeated for them.
"""

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from fla_compile.kernels import decay_cpu
from fla_compile.kernels.decay_agreed import check_call
from fla_compile.kernels.decay_checks import (
    FAMILIES,
    check_gate,
    check_operands,
    chunks_for,
    kernel_name,
    packed_kernels_for,
    state_dtype,
    steps_for,
    supports,
)
from fla_compile.kernels.decay_heads import (
    at_first_alike,
    first_alike,
    output_heads,
    spread,
    state_heads,
    sum_heads,
)
from fla_compile.kernels.decay_retnet import retnet_decay
from fla_compile.kernels.decay_values import gla_values, gla_values_packed
from fla_compile.kernels.operators import operator, register_autograd, register_fake, register_kernel
from fla_compile.kernels.packed import call_packed, check_packed, register_packed
from fla_compile.kernels.rwkv6_ops import rwkv6

__all__ = ["FAMILIES", "gla", "kernel_name", "linear_attention", "retention", "rwkv6", "simple_gla", "supports"]


def _forward_cpu(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    states, _, h0 = _for_each_head(q, k, v, g, initial_state)
    o, final = decay_cpu.chunk_forward(q, k, v, g, h0, scale)
    return o, first_alike(final, states)


def _forward_cuda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    steps = steps_for(q, v)
    if steps is not None:
        return steps.step_forward(q, k, v, g, initial_state, scale)
    states, _, h0 = _for_each_head(q, k, v, g, initial_state)
    o, final = chunks_for(q, v).chunk_forward(q, k, v, g, h0, scale)
    return o, first_alike(final, states)


def _for_each_head(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None
) -> tuple[int, int, Tensor | None]:
    """The number of states, that of heads of the output, and the initial state of each of these."""
    states = state_heads(k, v, g, initial_state)
    heads = max(states, q.shape[2])
    return states, heads, None if initial_state is None else spread(initial_state, 1, heads)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    B, T, _, K = q.shape
    H, V = state_heads(k, v, g, initial_state), v.shape[-1]
    return v.new_empty((B, T, max(H, q.shape[2]), V)), v.new_empty((B, H, K, V), dtype=state_dtype(q))


# An operator returns tensors only: where dg or dh0 is not wanted, an empty one stands in its place.
@operator("decay_backward")
def decay_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    do: Tensor,
    dht: Tensor | None,
    need_dg: bool,
    need_dh0: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    states, heads, h0 = _for_each_head(q, k, v, g, initial_state)
    grads = chunks_for(q, v).chunk_backward(q, k, v, g, h0, scale, do, at_first_alike(dht, heads), need_dg=need_dg)
    dq, dk, dv, dg, dh0 = grads
    dh0 = None if dh0 is None else sum_heads(dh0, 1, states)
    return dq, dk, dv, _wanted(dg, g, need_dg, q), _wanted(dh0, initial_state, need_dh0, q)


@register_fake(decay_backward)
def _backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    do: Tensor,
    dht: Tensor | None,
    need_dg: bool,
    need_dh0: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dg = q.new_empty(0) if g is None or not need_dg else g.new_empty(g.shape)
    keep_h0 = initial_state is not None and need_dh0
    dh0 = initial_state.new_empty(initial_state.shape) if keep_h0 and initial_state is not None else q.new_empty(0)
    return dq, dk, dv, dg, dh0


def _wanted(grad: Tensor | None, of: Tensor | None, need: bool, like: Tensor) -> Tensor:
    if grad is None or of is None or not need:
        return like.new_empty(0)
    return grad.to(of.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, g, initial_state, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, g, initial_state)
    ctx.scale = scale


def _backward(ctx: Any, do: Tensor | None, dht: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, g, initial_state = ctx.saved_tensors
    if do is None and dht is None:
        return None, None, None, None, None, None
    if do is None:
        do = v.new_zeros(*v.shape[:2], output_heads(q, k, v, g, initial_state), v.shape[-1])
    need_dg = g is not None and ctx.needs_input_grad[3]
    need_dh0 = initial_state is not None and ctx.needs_input_grad[4]
    dq, dk, dv, dg, dh0 = decay_backward(q, k, v, g, initial_state, ctx.scale, do, dht, need_dg, need_dh0)
    return dq, dk, dv, dg if need_dg else None, dh0 if need_dh0 else None, None


def _register(family: str) -> OpOverload:
    op = operator(family, devices=("cpu",))(_forward_cpu)
    register_kernel(op, "cuda")(_forward_cuda)
    register_fake(op)(_forward_fake)
    register_autograd(op, _backward, setup_context=_setup_context)
    return op


OPS = {family: _register(family) for family in ("linear_attention", "retention", "simple_gla", "gla")}


def _forward_packed(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, scale: float, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor] | None:
    kernels = packed_kernels_for(q, v)
    if kernels is None:
        return None
    states, _, h0 = _for_each_head(q, k, v, g, initial_state)
    found = kernels.packed_forward(q, k, v, g, h0, scale, cu_seqlens)
    return None if found is None else (found[0], first_alike(found[1], states))


def _backward_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    cu_seqlens: Tensor,
    do: Tensor | None,
    dht: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor | None, ...] | None:
    kernels = packed_kernels_for(q, v)
    if kernels is None:
        return None
    states, heads, h0 = _for_each_head(q, k, v, g, initial_state)
    operands = q, k, v, g, h0, scale, cu_seqlens, do, at_first_alike(dht, heads)
    found = kernels.packed_backward(*operands, need_dg=g is not None and wanted[3])
    if found is None:
        return None
    *grads, dh0 = found
    return *grads, None if dh0 is None else sum_heads(dh0, 1, states)


# A constant decay would go on through the steps that fill a batch: gathered, retention is simple_gla.
def _forward_retention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor | None, scale: float, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    whole = _forward_packed(q, k, v, g, initial_state, scale, cu_seqlens)
    if whole is not None:
        return whole
    return PACKED["simple_gla"](q, k, v, g.expand(*q.shape[:2], -1), initial_state, scale, cu_seqlens)


def _backward_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    scale: float,
    cu_seqlens: Tensor,
    do: Tensor | None,
    dht: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    whole = _backward_packed(q, k, v, g, initial_state, scale, cu_seqlens, do, dht, wanted)
    if whole is not None:
        return whole
    operands = q, k, v, g.expand(*q.shape[:2], -1), initial_state, scale, cu_seqlens, None, do, dht
    dq, dk, dv, dg, dh0 = torch.ops.fla_compile.simple_gla_packed_backward(*operands, wanted[:5])
    return dq, dk, dv, dg.sum((0, 1)) if wanted[3] else None, dh0


PACKED = {
    family: register_packed(
        OPS[family], _setup_context, _backward, forward_packed=_forward_packed, backward_packed=_backward_packed
    )
    for family in OPS
    if family != "retention"
}
PACKED["retention"] = register_packed(
    OPS["retention"],
    _setup_context,
    _backward,
    shared=("g",),
    forward_packed=_forward_retention,
    backward_packed=_backward_retention,
)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention without normaliser, S_t = S_{t-1} + k_t v_t^T and o_t = scale * S_t^T q_t.

    q [B, T, HQ, K], k [B, T, HK, K], v [B, T, HV, V]; initial_state [B, H, K, V]; cu_seqlens [N + 1], int32 or int64,
    where row 0 packs N sequences (B = 1, states [N, H, K, V]); scale K^-0.5 if None. HK and HV are H or a divisor of
    it, neighbouring heads sharing one; HQ too, o then having H heads, or HQ is a multiple of H, whose queries read the
    same state. Without initial_state H is the larger of HK and HV. Returns o [B, T, HQ, V] in v's dtype and the final
    state [B, H, K, V] in float32 (float64 for float64), or None in its place. Raises ValueError for shapes, dtypes or
    devices that do not agree, and for an empty sequence. Source: Katharopoulos et al. 2020, arXiv:2006.16236.
    """
    return _run("linear_attention", q, k, v, None, scale, initial_state, output_final_state, cu_seqlens)


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Retention, S_t = gamma S_{t-1} + k_t v_t^T and o_t = scale * S_t^T q_t, with gamma constant for each head.

    q [B, T, HQ, K], k [B, T, HK, K], v [B, T, HV, V]; gamma [HG] in (0, 1], a factor and not its logarithm, if None 1 -
    2^(-5-h), one for each head of initial_state or else of o; initial_state [B, H, K, V]; cu_seqlens [N + 1], int32 or
    int64, where row 0 packs N sequences (B = 1, states [N, H, K, V]); scale K^-0.5 if None. HK, HV and HG are H or a
    divisor of it, neighbouring heads sharing one; HQ too, o then having H heads, or HQ is a multiple of H, whose
    queries read the same state. Without initial_state H is the largest of HK, HV and HG. Returns o [B, T, HQ, V] in v's
    dtype and the final state [B, H, K, V] in float32 (float64 for float64), or None in its place. Raises ValueError for
    shapes, dtypes or devices that do not agree, and for an empty sequence. Source: Sun et al. 2023, arXiv:2307.08621.
    """
    check_call("retention", q, k, v, gamma, initial_state, cu_seqlens, gate="gamma")
    if gamma is None:
        heads = output_heads(q, k, v, None, None) if initial_state is None else initial_state.shape[1]
        g = retnet_decay(heads, q.device, state_dtype(q))[1]
    else:
        g = gamma.to(state_dtype(q)).log()
    return _call("retention", q, k, v, g, scale, initial_state, output_final_state, cu_seqlens)


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with one gate a head and step, S_t = exp(g_t) S_{t-1} + k_t v_t^T and o_t = scale * S_t^T q_t.

    q [B, T, HQ, K], k [B, T, HK, K], v [B, T, HV, V]; g [B, T, HG], the natural logarithm of the decay, best kept in
    float32; initial_state [B, H, K, V]; cu_seqlens [N + 1], int32 or int64, where row 0 packs N sequences (B = 1,
    states [N, H, K, V]); scale K^-0.5 if None. HK, HV and HG are H or a divisor of it, neighbouring heads sharing one;
    HQ too, o then having H heads, or HQ is a multiple of H, whose queries read the same state. Without initial_state H
    is the largest of HK, HV and HG. Returns o [B, T, HQ, V] in v's dtype and the final state [B, H, K, V] in float32
    (float64 for float64), or None in its place. Raises ValueError for shapes, dtypes or devices that do not agree, and
    for an empty sequence. Source: Dao and Gu 2024, arXiv:2405.21060.
    """
    return _run("simple_gla", q, k, v, g, scale, initial_state, output_final_state, cu_seqlens)


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gv: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention, S_t = diag(exp(g_t)) S_{t-1} diag(exp(gv_t)) + k_t v_t^T and o_t = scale * S_t^T q_t.

    q [B, T, HQ, K], k [B, T, HK, K], v [B, T, HV, V]; g [B, T, HG, K] and gv [B, T, H, V], one of them or both, the
    natural logarithms of the decays, best kept in float32; initial_state [B, H, K, V]; cu_seqlens [N + 1], int32 or
    int64, where row 0 packs N sequences (B = 1, states [N, H, K, V]); scale K^-0.5 if None. Without gv HK, HV and HG
    are H or a divisor of it, neighbouring heads sharing one; HQ too, o then having H heads, or HQ is a multiple of H,
    whose queries read the same state; without initial_state H is the largest of HK, HV and HG. With gv all are H.
    Returns o [B, T, HQ, V] in v's dtype and the final state [B, H, K, V] in float32 (float64 for float64), or None in
    its place. Raises ValueError for shapes, dtypes or devices that do not agree, and for an empty sequence. Source:
    Yang et al. 2023, arXiv:2312.06635.
    """
    if gv is None:
        if g is None:
            raise ValueError("gla needs a gate: g over keys, gv over values, or both; linear_attention has none")
        return _run("gla", q, k, v, g, scale, initial_state, output_final_state, cu_seqlens)
    check_operands("gla_values", q, k, v, check_packed("q", q, cu_seqlens, initial_state))
    if g is not None:
        check_gate("g", g, FAMILIES["gla"], q, v)
    check_gate("gv", gv, "BTHV", q, v)
    operands = q, k, v, g, gv, initial_state, q.shape[-1] ** -0.5 if scale is None else scale
    o, final = gla_values(*operands) if cu_seqlens is None else call_packed(gla_values_packed, *operands, cu_seqlens)
    return o, final if output_final_state else None


def _run(
    family: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    check_call(family, q, k, v, g, initial_state, cu_seqlens)
    return _call(family, q, k, v, g, scale, initial_state, output_final_state, cu_seqlens)


def _call(
    family: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    operands = q, k, v, g, initial_state, q.shape[-1] ** -0.5 if scale is None else scale
    o, final = OPS[family](*operands) if cu_seqlens is None else call_packed(PACKED[family], *operands, cu_seqlens)
    return o, final if output_final_state else None

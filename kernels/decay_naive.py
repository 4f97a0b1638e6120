"""The decayed outer product, one time step after another: the definition that every other form must equal.

    S_t = diag(a_t) S_{t-1} diag(w_t) + k_t v_t^T        o_t = scale * S_t^T q_t        a_t = exp(g_t)

    family              g               paper
    linear_attention    none            Katharopoulos et al. 2020, arXiv:2006.16236
    retention           [H]             RetNet, arXiv:2307.08621
    simple_gla          [B, T, H]       one gate per head and step, as in Mamba-2, arXiv:2405.21060
    gla                 [B, T, H, K]    Gated linear attention, arXiv:2312.06635
    rwkv6               [B, T, H, K]    RWKV-6, arXiv:2404.05892: reads S_{t-1} + diag(u) k_t v_t^T instead

w_t = exp(gv_t), with gv [B, T, H, V], is one but in gla, where it may take a_t's place or stand beside it.
q and k are [B, T, H, K], v and o are [B, T, H, V], the state is [B, H, K, V]; neighbouring heads may share operands
(`decay_heads`). Narrow operands are computed in float32, float64 operands in float64. All are differentiable by
autograd.
"""

from functools import partial

import torch
from torch import Tensor

from fla_compile.kernels.decay_heads import check_heads, first_alike, output_heads, spread, state_heads
from fla_compile.kernels.packed import each_sequence

__all__ = [
    "naive_gla",
    "naive_linear_attention",
    "naive_retention",
    "naive_rwkv6",
    "naive_simple_gla",
    "retnet_gamma",
]


def retnet_gamma(heads: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """RetNet's constant decay of head h, 1 - 2^(-5-h), as [H]."""
    return 1 - torch.exp2(-5 - torch.arange(heads, device=device, dtype=dtype))


def naive_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = S_{t-1} + k_t v_t^T."""
    return _recur(q, k, v, None, scale, initial_state, output_final_state, cu_seqlens)


def naive_retention(
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
    """S_t = gamma S_{t-1} + k_t v_t^T, gamma [H] constant in time (None: RetNet's)."""
    if gamma is None:
        heads = output_heads(q, k, v, None, None) if initial_state is None else initial_state.shape[1]
        gamma = retnet_gamma(heads, device=q.device, dtype=_wide(q.dtype))
    a = gamma.to(_wide(q.dtype)).view(1, 1, -1, 1).expand(q.shape[0], q.shape[1], -1, 1)
    return _recur(q, k, v, a, scale, initial_state, output_final_state, cu_seqlens)


def naive_simple_gla(
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
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T, g [B, T, H]."""
    a = g.to(_wide(q.dtype)).exp().unsqueeze(-1)
    return _recur(q, k, v, a, scale, initial_state, output_final_state, cu_seqlens)


def naive_gla(
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
    """S_t = diag(exp(g_t)) S_{t-1} diag(exp(gv_t)) + k_t v_t^T, g [B, T, H, K] or gv [B, T, H, V] or both."""
    if g is None and gv is None:
        raise ValueError("gla needs a gate: g over keys, gv over values, or both; linear_attention has none")
    a, w = (None if x is None else x.to(_wide(q.dtype)).exp() for x in (g, gv))
    return _recur(q, k, v, a, scale, initial_state, output_final_state, cu_seqlens, w=w)


def naive_rwkv6(
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
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T, o_t = scale * (S_{t-1} + diag(u) k_t v_t^T)^T q_t, u [H, K] or None."""
    a = g.to(_wide(q.dtype)).exp()
    u = q.new_zeros(q.shape[2:], dtype=_wide(q.dtype)) if u is None else u.to(_wide(q.dtype))
    return _recur(q, k, v, a, scale, initial_state, output_final_state, cu_seqlens, u=u)


def _recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,  # [B, T, H, K or 1]
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    *,
    w: Tensor | None = None,  # [B, T, H, V]
    u: Tensor | None = None,  # [H, K]; given, the state is read before the update
) -> tuple[Tensor, Tensor | None]:
    check_heads(q, k, v, a, initial_state, "the decay")
    states = max(state_heads(k, v, a, initial_state), 0 if w is None else w.shape[2])
    heads = max(q.shape[2], states)
    q, k, v = (spread(x, 2, heads) for x in (q, k, v))
    a, w = (None if x is None else spread(x, 2, heads) for x in (a, w))
    h0 = None if initial_state is None else spread(initial_state, 1, heads)
    if cu_seqlens is None:
        o, final = naive_loop(q, k, v, a, scale, h0, output_final_state, w=w, u=u)
    else:
        rows = {"q": q, "k": k, "v": v, "a": a, "w": w}
        o, final = each_sequence(partial(naive_loop, scale=scale, u=u), cu_seqlens, rows, h0, output_final_state)
    return o, None if final is None else first_alike(final, states)


def naive_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    *,
    w: Tensor | None = None,
    u: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    B, T, H, K = q.shape
    dtype = _wide(q.dtype)
    scale = K**-0.5 if scale is None else scale
    out_dtype = v.dtype
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if initial_state is None:
        S = q.new_zeros(B, H, K, v.shape[-1])
    else:
        S = initial_state.to(dtype, copy=True)
    o = []
    # unbind, not q[:, t]: the backward of T slices would write T whole tensors
    factors = ([None] * T if x is None else x.unbind(1) for x in (a, w))
    for q_t, k_t, v_t, a_t, w_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), *factors, strict=True):
        update = k_t[:, :, :, None] * v_t[:, :, None, :]
        read = None if u is None else S + u[:, :, None] * update
        if a_t is not None:
            S = S * a_t[:, :, :, None]
        if w_t is not None:
            S = S * w_t[:, :, None, :]
        S = S + update
        o.append(scale * torch.einsum("bhk,bhkv->bhv", q_t, S if read is None else read))
    return torch.stack(o, dim=1).to(out_dtype), S if output_final_state else None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32

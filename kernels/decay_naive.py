"""The decayed outer product, one time step after another: the definition that every other form must equal.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t        a_t = exp(g_t)

    family              g               paper
    linear_attention    none            Katharopoulos et al. 2020, arXiv:2006.16236
    retention           [H]             RetNet, arXiv:2307.08621
    simple_gla          [B, T, H]       one gate per head and step, as in Mamba-2, arXiv:2405.21060
    gla                 [B, T, H, K]    Gated linear attention, arXiv:2312.06635

q and k are [B, T, H, K], v and o are [B, T, H, V], the state is [B, H, K, V]. Narrow operands are computed in
float32, float64 operands in float64. All four are differentiable by autograd.
"""

import torch
from torch import Tensor

__all__ = ["naive_gla", "naive_linear_attention", "naive_retention", "naive_simple_gla", "retnet_gamma"]


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
) -> tuple[Tensor, Tensor | None]:
    """S_t = S_{t-1} + k_t v_t^T."""
    return _recur(q, k, v, None, scale, initial_state, output_final_state)


def naive_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """S_t = gamma S_{t-1} + k_t v_t^T, gamma [H] constant in time (None: RetNet's)."""
    if gamma is None:
        gamma = retnet_gamma(q.shape[2], device=q.device, dtype=_wide(q.dtype))
    a = gamma.to(_wide(q.dtype)).view(1, 1, -1, 1).expand(q.shape[0], q.shape[1], -1, 1)
    return _recur(q, k, v, a, scale, initial_state, output_final_state)


def naive_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T, g [B, T, H]."""
    a = g.to(_wide(q.dtype)).exp().unsqueeze(-1)
    return _recur(q, k, v, a, scale, initial_state, output_final_state)


def naive_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T, g [B, T, H, K]."""
    a = g.to(_wide(q.dtype)).exp()
    return _recur(q, k, v, a, scale, initial_state, output_final_state)


def _recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,  # [B, T, H, K or 1]
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
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
    steps = zip(q.unbind(1), k.unbind(1), v.unbind(1), [None] * T if a is None else a.unbind(1), strict=True)
    for q_t, k_t, v_t, a_t in steps:
        if a_t is not None:
            S = S * a_t[:, :, :, None]
        S = S + k_t[:, :, :, None] * v_t[:, :, None, :]
        o.append(scale * torch.einsum("bhk,bhkv->bhv", q_t, S))
    return torch.stack(o, dim=1).to(out_dtype), S if output_final_state else None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32

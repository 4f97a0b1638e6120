"""The decayed delta, one time step after another: the definition that every other form must equal.

    o_t = scale * S_t^T q_t        a_t = exp(g_t)

    family              state update                                         paper
    delta_rule          S' = (I - beta k k^T) S + beta k v^T                 Yang et al. 2024, arXiv:2406.06484
    gated_delta_rule    S' = a (I - beta k k^T) S + beta k v^T               Yang et al. 2024, arXiv:2412.06464
    kda                 S' = (I - beta k k^T) diag(a) S + beta k v^T         Kimi Linear, arXiv:2510.26692
    dplr                S' = (diag(a) + b c^T) S + k v^T                     RWKV-7, arXiv:2503.14456

q, k, b and c are [B, T, H, K], v and o are [B, T, H, V], beta is [B, T, H], the state is [B, H, K, V]; g is [B, T, H]
in gated_delta_rule and [B, T, H, K] in kda and dplr. Narrow operands are computed in float32, float64 operands in
float64. All four are differentiable by autograd.
"""

from functools import partial

import torch
from torch import Tensor

from fla_compile.kernels.packed import each_sequence

__all__ = ["naive_delta_rule", "naive_dplr", "naive_gated_delta_rule", "naive_kda"]


def naive_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T."""
    return _delta(q, k, v, None, beta, scale, initial_state, output_final_state, cu_seqlens)


def naive_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, g [B, T, H]."""
    return _delta(q, k, v, g.unsqueeze(-1), beta, scale, initial_state, output_final_state, cu_seqlens)


def naive_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T, g [B, T, H, K]."""
    return _delta(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens)


def naive_dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = (diag(exp(g_t)) + b_t c_t^T) S_{t-1} + k_t v_t^T, g [B, T, H, K]."""
    if cu_seqlens is None:
        return _dplr(q, k, v, g, b, c, scale, initial_state, output_final_state)
    rows = {"q": q, "k": k, "v": v, "g": g, "b": b, "c": c}
    return each_sequence(partial(_dplr, scale=scale), cu_seqlens, rows, initial_state, output_final_state)


def _dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    c: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    dtype = _wide(q.dtype)
    S = _start(q, v, initial_state)
    o = []
    # unbind, not q[:, t]: the backward of T slices would write T whole tensors
    for q_t, k_t, v_t, g_t, b_t, c_t in zip(*(x.to(dtype).unbind(1) for x in (q, k, v, g, b, c)), strict=True):
        S = g_t.exp()[..., None] * S + _outer(b_t, _read(S, c_t)) + _outer(k_t, v_t)
        o.append(_read(S, q_t))
    return _result(o, S, q, v, scale, output_final_state)


def _delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,  # [B, T, H, K or 1]
    beta: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    if cu_seqlens is None:
        return _loop(q, k, v, g, beta, scale, initial_state, output_final_state)
    rows = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    return each_sequence(partial(_loop, scale=scale), cu_seqlens, rows, initial_state, output_final_state)


def _loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    dtype = _wide(q.dtype)
    S = _start(q, v, initial_state)
    gates = [None] * q.shape[1] if g is None else g.to(dtype).unbind(1)
    o = []
    steps = zip(*(x.to(dtype).unbind(1) for x in (q, k, v, beta.unsqueeze(-1))), gates, strict=True)
    for q_t, k_t, v_t, beta_t, g_t in steps:
        if g_t is not None:
            S = g_t.exp()[..., None] * S
        S = S + _outer(k_t, beta_t * (v_t - _read(S, k_t)))
        o.append(_read(S, q_t))
    return _result(o, S, q, v, scale, output_final_state)


def _start(q: Tensor, v: Tensor, initial_state: Tensor | None) -> Tensor:
    B, _, H, K = q.shape
    if initial_state is None:
        return q.new_zeros((B, H, K, v.shape[-1]), dtype=_wide(q.dtype))
    return initial_state.to(_wide(q.dtype), copy=True)


def _read(S: Tensor, x: Tensor) -> Tensor:
    """S^T x, [B, H, V]."""
    return torch.einsum("bhkv,bhk->bhv", S, x)


def _outer(x: Tensor, y: Tensor) -> Tensor:
    """x y^T, [B, H, K, V]."""
    return x[..., :, None] * y[..., None, :]


def _result(
    o: list[Tensor], S: Tensor, q: Tensor, v: Tensor, scale: float | None, output_final_state: bool
) -> tuple[Tensor, Tensor | None]:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (scale * torch.stack(o, dim=1)).to(v.dtype), S if output_final_state else None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32

"""Decode steps by the naive loop: the state [B, H, K, V] is updated in place; heads that are shared are repeated.

The operands are those of `decay_step`'s functions of the same names.
"""

import torch
from torch import Tensor

from fla_compile.kernels.decay_naive import naive_loop, retnet_gamma

__all__ = [
    "naive_gla_step",
    "naive_linear_attention_step",
    "naive_retention_step",
    "naive_rwkv6_step",
    "naive_simple_gla_step",
]


def naive_linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, scale: float | None = None
) -> Tensor:
    """S <- S + k v^T."""
    return _steps(q, k, v, state, None, scale=scale)


def naive_retention_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, gamma: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """S <- gamma S + k v^T, gamma [HG] (None: RetNet's)."""
    if gamma is None:
        gamma = retnet_gamma(state.shape[1], device=q.device, dtype=_wide(q))
    a = gamma.expand(*q.shape[:2], -1).unsqueeze(-1)
    return _steps(q, k, v, state, a, scale=scale, log=False)


def naive_simple_gla_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, g: Tensor, *, scale: float | None = None, log: bool = True
) -> Tensor:
    """S <- exp(g_t) S + k v^T, or g_t S + k v^T, g [B, T, HG]."""
    return _steps(q, k, v, state, g.unsqueeze(-1), scale=scale, log=log)


def naive_gla_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    g: Tensor | None = None,
    gv: Tensor | None = None,
    *,
    scale: float | None = None,
    log: bool = True,
) -> Tensor:
    """S <- diag(exp(g_t)) S diag(exp(gv_t)) + k v^T, or without exp, g [B, T, HG, K] and gv [B, T, HW, V]."""
    if g is None and gv is None:
        raise ValueError("gla_step needs a gate: g over keys, gv over values, or both; linear_attention_step has none")
    return _steps(q, k, v, state, g, gv, scale=scale, log=log)


def naive_rwkv6_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    g: Tensor,
    u: Tensor | None = None,
    *,
    scale: float | None = None,
    log: bool = True,
) -> Tensor:
    """S <- diag(exp(g_t)) S + k v^T, read before as S + diag(u) k v^T, g [B, T, HG, K], u [HU, K] (None: zero)."""
    u = q.new_zeros(1, q.shape[-1]) if u is None else u
    return _steps(q, k, v, state, g, scale=scale, log=log, u=u)


def _steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    a: Tensor | None,  # [B, T, HG, K or 1]
    w: Tensor | None = None,  # [B, T, HW, V]
    *,
    scale: float | None,
    log: bool = True,
    u: Tensor | None = None,
) -> Tensor:
    heads = max(q.shape[2], state.shape[1])
    q, k, v = (_for_heads(x, 2, heads) for x in (q, k, v))
    a, w = (None if x is None else _for_heads(x.to(_wide(q)), 2, heads) for x in (a, w))
    if log:
        a, w = (None if x is None else x.exp() for x in (a, w))
    u = None if u is None else _for_heads(u.to(_wide(q)), 0, heads)
    o, final = naive_loop(q, k, v, a, scale, _for_heads(state, 1, heads), True, w=w, u=u)
    assert final is not None
    state.copy_(final[:, :: heads // state.shape[1]])  # queries that share a state have each made the same of it
    return o


def _for_heads(x: Tensor, axis: int, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[axis], axis)


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32

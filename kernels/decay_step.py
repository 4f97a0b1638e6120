"""The decayed outer product for decoding: a few steps that update the caller's state in place, without gradient.

    S_t = diag(a_t) S_{t-1} diag(w_t) + k_t v_t^T        o_t = scale * S_t^T q_t
    rwkv6: o_t = scale * (S_{t-1} + diag(u) k_t v_t^T)^T q_t

One operator for every family, `fla_compile::decay_step_`: the rank of g says whether a_t is one of a head, of a head
and step, or of a key. CUDA runs `decay_step_triton` where that is checked, else, as the CPU, plain torch operations,
one step after another.

Neighbouring heads may share operands: of H states [B, H, K, V], k, v and the decays have H heads or a divisor of H, and
q has H, a divisor of H, or a multiple of H, whose queries then read the same state.
"""

import torch
from torch import Tensor

from fla_compile.kernels.decay_checks import has_step_kernel, state_dtype
from fla_compile.kernels.decay_retnet import retnet_decay
from fla_compile.kernels.decay_step_checks import check_no_gradient, check_rank, check_steps
from fla_compile.kernels.operators import operator, register_fake

__all__ = [
    "decay_step_op",
    "gla_step",
    "kernel_name",
    "linear_attention_step",
    "retention_step",
    "rwkv6_step",
    "simple_gla_step",
]


def kernel_name(device: torch.device, dtype: torch.dtype, K: int, V: int) -> str:
    """What runs the steps, for reports."""
    return "step (Triton)" if has_step_kernel(device, dtype, K, V) else "step (torch)"


@operator("decay_step_", mutates=("state",))
def decay_step_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    log: bool,
    before: bool,
    scale: float,
) -> Tensor:
    if has_step_kernel(q.device, q.dtype, q.shape[-1], v.shape[-1]):
        from fla_compile.kernels import decay_step_triton  # triton may be absent

        return decay_step_triton.step_in_place(q, k, v, state, g, gv, u, log=log, before=before, scale=scale)
    check_steps(q, k, v, state, g, gv, u)
    with torch.autocast(q.device.type, enabled=False):
        return _plain_step(q, k, v, state, g, gv, u, log, before, scale)


@register_fake(decay_step_op)
def _step_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    log: bool,
    before: bool,
    scale: float,
) -> Tensor:
    check_steps(q, k, v, state, g, gv, u)
    B, T, heads, _ = q.shape
    return v.new_empty((B, T, max(heads, state.shape[1]), v.shape[-1]))


def _plain_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    log: bool,
    before: bool,
    scale: float,
) -> Tensor:
    B, T = q.shape[:2]
    H, V = state.shape[1], v.shape[-1]
    wide, heads, narrow = state_dtype(q), max(H, q.shape[2]), v.dtype
    S = state.to(wide)  # the state itself where it has this dtype
    if g is not None and g.ndim < 4:
        g = g.expand(B, T, -1).unsqueeze(-1)
    k, v = (_for_heads(x, 2, H).to(wide) for x in (k, v))
    a, w = (None if x is None else _for_heads(x, 2, H).to(wide) for x in (g, gv))
    if log:
        a, w = (None if x is None else x.exp() for x in (a, w))
    q = (scale * _for_heads(q, 2, heads).to(wide)).unflatten(2, (H, heads // H))
    weight = None
    if u is not None:
        own = _for_heads(u, 0, heads).to(wide).unflatten(0, (H, heads // H))
        weight = (q * own * k.unsqueeze(3)).sum(-1, keepdim=True)
    o = torch.empty((B, T, H, heads // H, V), dtype=wide, device=v.device)
    for t in range(T):
        if before:
            o[:, t] = _read(q[:, t], S)
        if a is not None:
            S.mul_(a[:, t].unsqueeze(-1))
        if w is not None:
            S.mul_(w[:, t].unsqueeze(-2))
        S.addcmul_(k[:, t].unsqueeze(-1), v[:, t].unsqueeze(-2))
        if not before:
            o[:, t] = _read(q[:, t], S)
    if weight is not None:
        o.addcmul_(weight, v.unsqueeze(3))
    if S is not state:
        state.copy_(S)
    return o.flatten(2, 3).to(narrow)


def _read(q: Tensor, S: Tensor) -> Tensor:
    """q [B, H, G, K] times S [B, H, K, V]; on CUDA no matrix product, which may be one of TF32."""
    return (q.unsqueeze(-1) * S.unsqueeze(2)).sum(-2) if S.is_cuda else q @ S


def _for_heads(x: Tensor, axis: int, heads: int) -> Tensor:
    """Every head of x for the neighbouring heads that share it."""
    return x if x.shape[axis] == heads else x.repeat_interleave(heads // x.shape[axis], axis)


def linear_attention_step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, scale: float | None = None) -> Tensor:
    """Steps of `linear_attention` for decoding: o [B, T, HQ, V] in v's dtype, without gradient.

    q [B, T, HQ, K], k [B, T, HK, K], v [B, T, HV, V], T from 1 to 16; state [B, H, K, V], best kept in float32, is
    updated in place. HK and HV are H or a divisor of it; HQ too, o then having H heads, or HQ is a multiple of H, whose
    queries read the same state. scale K^-0.5 if None. Raises ValueError for shapes, dtypes or devices that do not agree
    and where a gradient is asked for. Source: Katharopoulos et al. 2020, arXiv:2006.16236.
    """
    return _run(q, k, v, state, scale=scale)


def retention_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, gamma: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """Steps of `retention` for decoding: o [B, T, HQ, V] in v's dtype, without gradient.

    q [B, T, HQ, K], k [B, T, HK, K], v [B, T, HV, V], T from 1 to 16; state [B, H, K, V], best kept in float32, is
    updated in place; gamma [HG], the factor and not its logarithm, RetNet's if None. HK, HV and HG are H or a divisor
    of it; HQ too, o then having H heads, or HQ is a multiple of H, whose queries read the same state. scale K^-0.5 if
    None. Raises ValueError for shapes, dtypes or devices that do not agree and where a gradient is asked for. Source:
    Sun et al. 2023, arXiv:2307.08621.
    """
    if gamma is None:
        gamma = retnet_decay(state.shape[1], q.device, state_dtype(q))[0]
    check_rank("gamma", gamma, 1)
    return _run(q, k, v, state, gamma, scale=scale, log=False)


def simple_gla_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, g: Tensor, *, scale: float | None = None, log: bool = True
) -> Tensor:
    """Steps of `simple_gla` for decoding: o [B, T, HQ, V] in v's dtype, without gradient.

    q [B, T, HQ, K], k [B, T, HK, K], v [B, T, HV, V], T from 1 to 16; state [B, H, K, V], best kept in float32, is
    updated in place; g [B, T, HG], the natural logarithm of the decay, or, if log is False, the decay itself, of any
    sign. HK, HV and HG are H or a divisor of it; HQ too, o then having H heads, or HQ is a multiple of H, whose queries
    read the same state. scale K^-0.5 if None. Raises ValueError for shapes, dtypes or devices that do not agree and
    where a gradient is asked for. Source: Dao and Gu 2024, arXiv:2405.21060.
    """
    check_rank("g", g, 3)
    return _run(q, k, v, state, g, scale=scale, log=log)


def gla_step(
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
    """Steps of `gla` for decoding: o [B, T, HQ, V] in v's dtype, without gradient.

    q [B, T, HQ, K], k [B, T, HK, K], v [B, T, HV, V], T from 1 to 16; state [B, H, K, V], best kept in float32, is
    updated in place; g [B, T, HG, K] and gv [B, T, HW, V], one of them or both, the natural logarithms of the decays,
    or, if log is False, the decays themselves, of any sign. HK, HV, HG and HW are H or a divisor of it; HQ too, o then
    having H heads, or HQ is a multiple of H, whose queries read the same state. scale K^-0.5 if None. Raises ValueError
    for shapes, dtypes or devices that do not agree and where a gradient is asked for. Source: Yang et al. 2023,
    arXiv:2312.06635.
    """
    if g is None and gv is None:
        raise ValueError("gla_step needs a gate: g over keys, gv over values, or both; linear_attention_step has none")
    if g is not None:
        check_rank("g", g, 4)
    return _run(q, k, v, state, g, gv, scale=scale, log=log)


def rwkv6_step(
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
    """Steps of `rwkv6` for decoding: o [B, T, HQ, V] in v's dtype, without gradient.

    q [B, T, HQ, K], k [B, T, HK, K], v [B, T, HV, V], T from 1 to 16; state [B, H, K, V], best kept in float32, is
    updated in place; g [B, T, HG, K], the natural logarithm of the decay, or, if log is False, the decay itself, of any
    sign; u [HU, K], the bonus, zero if None. HK, HV and HG are H or a divisor of it; HQ too, o then having H heads, or
    HQ is a multiple of H, whose queries read the same state; HU is o's heads or a divisor. scale K^-0.5 if None. Raises
    ValueError for shapes, dtypes or devices that do not agree and where a gradient is asked for. Source: Peng et al.
    2024, arXiv:2404.05892.
    """
    check_rank("g", g, 4)
    return _run(q, k, v, state, g, u=u, scale=scale, log=log, before=True)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    g: Tensor | None = None,
    gv: Tensor | None = None,
    u: Tensor | None = None,
    *,
    scale: float | None,
    log: bool = True,
    before: bool = False,
) -> Tensor:
    check_no_gradient(q=q, k=k, v=v, state=state, g=g, gv=gv, u=u)
    return decay_step_op(q, k, v, state, g, gv, u, log, before, q.shape[-1] ** -0.5 if scale is None else float(scale))

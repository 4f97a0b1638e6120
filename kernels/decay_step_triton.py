"""The decayed outer product step by step, for decoding: one launch reads the state once and writes it once.

    S_t = diag(a_t) S_{t-1} diag(w_t) + k_t v_t^T        o_t = scale * S_t^T q_t
    rwkv6: o_t = scale * (S_{t-1} + diag(u) k_t v_t^T)^T q_t

Shapes: q [B, T, HQ, K]; k [B, T, HK, K]; v [B, T, HV, V]; S [B, H, K, V]; the decays a absent, [HG], [B, T, HG] or
[B, T, HG, K] and w absent or [B, T, HW, V], themselves or their logarithms; u [HU, K]; o [B, T, max(H, HQ), V].
Neighbouring heads share: a state's operands have H heads or a divisor of it, q may have a multiple, whose queries read
one state. All strides are the tensors' own.

One program holds all keys and `block_v` values of a state and does all T steps in order. Every decay is applied by
itself, so none is too strong. At one step the state is all the traffic: 8 * B * H * K * V bytes.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_compile.kernels.decay_configs import StepConfig, step_config
from fla_compile.kernels.decay_heads import state_heads
from fla_compile.kernels.decay_step_checks import check_steps
from fla_compile.kernels.decay_triton_common import device_arch
from fla_compile.kernels.launch import Launch, layout, remember

__all__ = ["step_forward", "step_in_place"]


# T = 1 has no loop; other lengths share one compilation
@triton.jit(do_not_specialize=["H"], do_not_specialize_on_alignment=["T"])
def decay_step_kernel(
    p_q, p_k, p_v, p_g, p_w, p_u, p_s, p_o, p_f, scale, T, H,
    sb_q, st_q, sh_q, sc_q, sb_k, st_k, sh_k, sc_k, sb_v, st_v, sh_v, sc_v,
    sb_g, st_g, sh_g, sc_g, sb_w, st_w, sh_w, sc_w, sh_u, sc_u, sb_s, sh_s, sk_s, sv_s,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    RK: tl.constexpr, RV: tl.constexpr, RG: tl.constexpr, RW: tl.constexpr, RQ: tl.constexpr, RU: tl.constexpr,
    QUERIES: tl.constexpr, PER_KEY: tl.constexpr, LOG: tl.constexpr, BEFORE: tl.constexpr, IN_PLACE: tl.constexpr,
    HAS_G: tl.constexpr, HAS_W: tl.constexpr, HAS_U: tl.constexpr, HAS_S: tl.constexpr,
):  # fmt: skip
    """One program for each (b, h, V block). R.: heads of the state, or of the output for q and u, that share one head.

    The final state goes to p_s if IN_PLACE, else to p_f [B, H, K, V], dense. BEFORE reads before the update.
    """
    NV: tl.constexpr = tl.cdiv(V, BV)
    i_p = tl.program_id(0)
    i_bh = (i_p // NV).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    o_k = tl.arange(0, BK).to(tl.int64)
    o_v = (i_p % NV).to(tl.int64) * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_s = m_k[:, None] & m_v[None, :]
    p_q += i_b * sb_q + o_k * sc_q
    p_k += i_b * sb_k + (i_h // RK) * sh_k + o_k * sc_k
    p_v += i_b * sb_v + (i_h // RV) * sh_v + o_v * sc_v
    p_o += (i_b * T * H + i_h) * (QUERIES * V) + o_v
    if HAS_G:
        p_g += i_b * sb_g + (i_h // RG) * sh_g
        if PER_KEY:
            p_g += o_k * sc_g
    if HAS_W:
        p_w += i_b * sb_w + (i_h // RW) * sh_w + o_v * sc_w

    b_s = tl.zeros((BK, BV), tl.float32)
    if HAS_S:
        p_s += i_b * sb_s + i_h * sh_s
        p_tile = p_s + (o_k * sk_s)[:, None] + (o_v * sv_s)[None, :]
        b_s = tl.load(p_tile, mask=m_s, other=0.0).to(tl.float32)
    for _ in range(T):
        b_k = tl.load(p_k, mask=m_k, other=0.0).to(tl.float32)
        b_v = tl.load(p_v, mask=m_v, other=0.0).to(tl.float32)
        if BEFORE:
            read_state(
                p_q, p_u, p_o, b_s, b_k, b_v, i_h, o_k, m_k, m_v, scale, sh_q, sh_u, sc_u, V, QUERIES, RQ, RU, HAS_U
            )
        if HAS_G:
            if PER_KEY:
                b_s *= as_factor(tl.load(p_g, mask=m_k, other=0.0), LOG)[:, None]
            else:
                b_s *= as_factor(tl.load(p_g), LOG)
            p_g += st_g
        if HAS_W:
            b_s *= as_factor(tl.load(p_w, mask=m_v, other=0.0), LOG)[None, :]
            p_w += st_w
        b_s += b_k[:, None] * b_v[None, :]
        if not BEFORE:
            read_state(
                p_q, p_u, p_o, b_s, b_k, b_v, i_h, o_k, m_k, m_v, scale, sh_q, sh_u, sc_u, V, QUERIES, RQ, RU, False
            )
        p_q += st_q
        p_k += st_k
        p_v += st_v
        p_o += H * (QUERIES * V)
    if IN_PLACE:
        tl.store(p_tile, b_s.to(p_s.dtype.element_ty), mask=m_s)
    else:
        p_f += i_bh * (K * V)
        tl.store(p_f + (o_k * V)[:, None] + o_v[None, :], b_s, mask=m_s)


@triton.jit
def as_factor(b_g, LOG: tl.constexpr):
    b_g = b_g.to(tl.float32)
    if LOG:
        b_g = tl.exp(b_g)
    return b_g


@triton.jit
def read_state(
    p_q, p_u, p_o, b_s, b_k, b_v, i_h, o_k, m_k, m_v, scale, sh_q, sh_u, sc_u,
    V: tl.constexpr, QUERIES: tl.constexpr, RQ: tl.constexpr, RU: tl.constexpr, HAS_U: tl.constexpr,
):  # fmt: skip
    """What the queries of a state read at one step, with the bonus."""
    for i_q in range(QUERIES):
        i_o = i_h * QUERIES + i_q
        b_q = tl.load(p_q + (i_o // RQ) * sh_q, mask=m_k, other=0.0).to(tl.float32)
        b_o = tl.sum(b_q[:, None] * b_s, 0)
        if HAS_U:
            b_u = tl.load(p_u + (i_o // RU) * sh_u + o_k * sc_u, mask=m_k, other=0.0).to(tl.float32)
            b_o += tl.sum(b_q * b_u * b_k, 0) * b_v
        tl.store(p_o + i_q * V, (b_o * scale).to(p_o.dtype.element_ty), mask=m_v)


class _Plan(NamedTuple):
    """What a call of known layouts needs: the shape of its output, and the launch if that has elements."""

    shape: tuple[int, int, int, int]
    launch: Launch | None


_plans: dict[tuple[Any, ...], _Plan] = {}


def step_in_place(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, g: Tensor | None, gv: Tensor | None, u: Tensor | None,
    *, log: bool, before: bool, scale: float, config: StepConfig | None = None,
) -> Tensor:  # fmt: skip
    """Outputs [B, T, max(H, HQ), V] in v's dtype; `state` [B, H, K, V] becomes the final one.

    Raises ValueError for operands that do not agree.
    """
    return _launch(q, k, v, g, gv, u, state, None, log, before, scale, config)


def step_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, scale: float,
    *, gv: Tensor | None = None, u: Tensor | None = None, before: bool = False, config: StepConfig | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs [B, T, max(H, HQ), V] in v's dtype, final state [B, H, K, V] in float32; g and gv are logarithms."""
    H, K = state_heads(k, v, g, initial_state), q.shape[-1]
    final = torch.empty((q.shape[0], H, K, v.shape[-1]), dtype=torch.float32, device=q.device)
    return _launch(q, k, v, g, gv, u, initial_state, final, True, before, scale, config), final


def _launch(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor | None, u: Tensor | None, state: Tensor | None,
    final: Tensor | None, log: bool, before: bool, scale: float, config: StepConfig | None,
) -> Tensor:  # fmt: skip
    operands = q, k, v, g, gv, u, state
    key = (final is None, log, before, config, *map(layout, operands))
    plan = _plans.get(key)
    if plan is None:
        if final is None and state is not None:
            check_steps(q, k, v, state, g, gv, u)
        plan = remember(_plans, key, _plan(q, k, v, g, gv, u, state, final, log, before, config))
    o = torch.empty(*plan.shape, dtype=v.dtype, device=v.device)
    if plan.launch is not None:
        plan.launch(*operands, o, final, float(scale))
    return o


def _plan(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor | None, u: Tensor | None, state: Tensor | None,
    final: Tensor | None, log: bool, before: bool, config: StepConfig | None,
) -> _Plan:  # fmt: skip
    kept = state if final is None else final
    assert kept is not None
    B, H, K, V = kept.shape
    heads = max(H, q.shape[2])
    states = B * H if final is None and heads == H else 1  # several queries of a state would spill in wide tiles
    config = config or step_config(device_arch(q.device), K, states)
    block_v = min(config.block_v, triton.next_power_of_2(V))
    g_strides: tuple[int, ...] = (0, 0, 0, 0)
    if g is not None:
        g_strides = (0, 0, *g.stride(), 0) if g.dim() == 1 else (*g.stride(), 0)[:4]
    strides = (
        *q.stride(), *k.stride(), *v.stride(), *g_strides, *((0,) * 4 if gv is None else gv.stride()),
        *((0, 0) if u is None else u.stride()), *((0,) * 4 if state is None else state.stride()),
    )  # fmt: skip
    shares = (
        H // k.shape[2], H // v.shape[2], 1 if g is None else H // g.shape[-1 if g.dim() == 1 else 2],
        1 if gv is None else H // gv.shape[2], heads // q.shape[2], 1 if u is None else heads // u.shape[0],
    )  # fmt: skip
    flags = (
        g is not None and g.dim() == 4, log, before, final is None,
        *(x is not None for x in (g, gv, u, state)),
    )  # fmt: skip
    numbers = (
        q.shape[1], H, *strides, K, V, triton.next_power_of_2(K), block_v, *shares, heads // H, *flags,
    )  # fmt: skip
    programs = B * H * triton.cdiv(V, block_v)
    launch = Launch(decay_step_kernel, q.device, (programs,), numbers, num_warps=config.num_warps, num_stages=1)
    return _Plan((B, q.shape[1], heads, V), launch if programs else None)

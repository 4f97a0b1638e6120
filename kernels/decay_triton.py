"""Chunk kernels of the decayed outer product, forward.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = scale * q_t^T S_t

Shapes: q, k [B, T, H, K]; v, o [B, T, H, V]; S [B, H, K, V]; g absent, [H], [B, T, H] or [B, T, H, K] (natural log).

In chunks of C rows, with c_t the sum of g from the start of the chunk up to row t, and S the state before the chunk,

    o_i = scale * ((q_i exp(c_i))^T S + sum_{j <= i} A_ij v_j)       A_ij = sum_k q_ik k_jk exp(c_ik - c_jk)
    S'  = diag(exp(c_last)) S + sum_j (k_j exp(c_last - c_j)) v_j^T

Two launches compute the same thing. *Fused* (`decay_fused`): passes over time with the state on chip, for operands of
two bytes. *Split* (here): a sweep writes the state before each chunk, in blocks of K and V, then all chunks are read
out in parallel; for float32, whose products are too slow to repeat, and where the fused launch has no configuration.
Under a decay over keys it starts from the scores A, computed for all chunks in parallel.

Sources: Yang et al. 2024 (arXiv:2312.06635), section 4; Dao and Gu 2024 (arXiv:2405.21060), section 6.
"""

import torch
import triton
import triton.language as tl

from fla_compile.kernels.decay_checks import check_shapes
from fla_compile.kernels.decay_configs import Config
from fla_compile.kernels.decay_fused import Scans, plan_scans, scan_forward
from fla_compile.kernels.decay_heads import output_heads, shares
from fla_compile.kernels.decay_triton_bwd import chunk_backward
from fla_compile.kernels.decay_triton_common import (
    KEY_DECAY,
    NO_DECAY,
    SplitPlan,
    as_decay,
    chunk_program,
    launch_key_scores,
    launch_split,
    launch_states,
    load_columns,
    load_rows,
    plan_launch,
    row_decay,
    store_rows,
)
from fla_compile.kernels.launch import compiled_together
from fla_compile.kernels.launch_record import recorded

__all__ = ["chunk_backward", "chunk_forward", "launch_outputs"]


@triton.jit(do_not_specialize=["T", "H"])
def chunk_output_kernel(
    p_q, p_k, p_v, p_g, p_a, p_h, p_o, scale, T, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, PRECISION: tl.constexpr,
    RQ: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr, RG: tl.constexpr,
):  # fmt: skip
    """One program per (b, h, chunk, V block); p_h [B*H, chunks, K, V] holds the state before each chunk."""
    NK: tl.constexpr = tl.cdiv(K, BK)
    i_v, i_bt, i_h, t_0, i_row = chunk_program(T, H, C, V, BV)
    o_c = tl.arange(0, C)
    o_v = i_v * BV + tl.arange(0, BV)
    m_c = t_0 + o_c < T
    p_h += i_bt.to(tl.int64) * (K * V)

    b_o = tl.zeros((C, BV), tl.float32)
    b_a = tl.zeros((C, C), tl.float32)
    for i_k in range(NK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_q = load_rows(p_q + i_row // RQ * K, o_c * (H // RQ), o_k, m_c, K)
        b_s = load_rows(p_h, o_k, o_v, o_k < K, V)
        if DECAY == KEY_DECAY:
            b_g = as_decay(load_rows(p_g + i_row // RG * K, o_c * (H // RG), o_k, m_c, K))
            b_q = (b_q * tl.exp(tl.cumsum(b_g, 0))).to(b_s.dtype)
        else:
            b_kt = load_columns(p_k + i_row // RK * K, o_c * (H // RK), o_k, m_c, K)
            b_a = tl.dot(b_q, b_kt, b_a, input_precision=PRECISION)
        b_o = tl.dot(b_q, b_s, b_o, input_precision=PRECISION)

    b_v = load_rows(p_v + i_row // RV * V, o_c * (H // RV), o_v, m_c, V)
    if DECAY == KEY_DECAY:
        b_w = load_rows(p_a + i_row * C, o_c * H, o_c, m_c, C)
    else:
        m_a = o_c[:, None] >= o_c[None, :]
        if DECAY != NO_DECAY:
            b_hi, b_lo, _, _ = row_decay(p_g, i_row, i_h, o_c, m_c, H, RG, DECAY, b_v.dtype == tl.float32)
            b_d = (b_hi[:, None] - b_hi[None, :]) + (b_lo[:, None] - b_lo[None, :])
            b_a *= tl.exp(tl.where(m_a, b_d, 0.0))
            b_o *= tl.exp(b_hi + b_lo)[:, None]
        b_w = tl.where(m_a, b_a, 0.0).to(b_v.dtype)
    b_o = tl.dot(b_w, b_v, b_o, input_precision=PRECISION)
    store_rows(p_o + i_row * V, b_o * scale, o_c * H, o_v, m_c, V)


@recorded
def chunk_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    scale: float,
    *,
    config: Config | None = None,
    scans: Scans | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [B, T, H, V] in q's dtype and the final state [B, H, K, V] in float32, H heads as the output has.

    Operands that heads share (`decay_heads`) are read where they lie.
    `config` asks for the split launch and `scans` for the fused one, in place of the tables' choice. Raises ValueError
    for dtypes, sizes or shapes that do not fit.
    """
    H = output_heads(q, k, v, g, initial_state)
    kind = check_shapes(q, k, v, g, heads=H)
    B, T, _, K = q.shape
    V = v.shape[-1]
    if B * H == 0:
        return v.new_empty(B, T, H, V), torch.empty(B, H, K, V, dtype=torch.float32, device=q.device)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    g = None if g is None else g.contiguous()
    h0 = None if initial_state is None else initial_state.contiguous()
    with torch.cuda.device_of(q):
        if config is None and scans is None:
            scans = plan_scans(q, v, kind, heads=H, forward=True)
        if scans is not None:
            return scan_forward(scans, q, k, v, g, h0, scale)
        plan = plan_launch(q, v, kind, config, shared=shares(H, q, k, v, g))
        return _launch_all(plan, q, k, v, g, h0, scale)


@compiled_together
def _launch_all(
    plan: SplitPlan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    h0: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    a = launch_key_scores(plan, q, k, g) if g is not None and plan.kind == "vector" else None
    h, ht = launch_states(plan, k, v, g, h0, final=True)
    assert ht is not None
    return launch_outputs(plan, q, k, v, g, a, h, scale), ht


def launch_outputs(
    plan: SplitPlan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    a: torch.Tensor | None,
    h: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Outputs [B, T, H, V] of the split launch, from its scores and states."""
    o = torch.empty(plan.B, plan.T, plan.H, plan.V, dtype=v.dtype, device=v.device)
    programs = plan.B * plan.H * plan.chunks * plan.value_blocks
    launch_split(plan, chunk_output_kernel, programs, q, k, v, g, a, h, o, float(scale))
    return o

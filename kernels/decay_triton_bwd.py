"""Chunk kernels of the decayed outer product, backward: the gradients of the states and of v, and the launches.

With D the gradient of the state after a chunk, S the state before it, c_t the running sum of g in the chunk, and A as
in `decay_triton.py`:

    D_prev = diag(exp(c_last)) D + scale * sum_i (q_i exp(c_i)) do_i^T
    dv_j   = D^T (k_j exp(c_last - c_j)) + scale * sum_{i >= j} A_ij do_i

Passes: states before each chunk (again), D after each chunk in reverse, then all chunks in parallel: dv here, the
gradients of q, k and the decay in `decay_triton_grads.py`. Under a decay over keys A is computed first.
"""

import torch
import triton
import triton.language as tl

from fla_compile.kernels.decay_checks import check_shapes
from fla_compile.kernels.decay_configs import Config
from fla_compile.kernels.decay_fused import Scans, plan_scans, scan_backward
from fla_compile.kernels.decay_heads import output_heads, shares, sum_decay_heads, sum_heads
from fla_compile.kernels.decay_segments import chain_segments
from fla_compile.kernels.decay_triton_common import (
    KEY_DECAY,
    KINDS,
    NO_DECAY,
    SplitPlan,
    as_decay,
    chunk_program,
    launch_key_scores,
    launch_split,
    launch_states,
    launch_sweep,
    load_columns,
    load_rows,
    new_sums,
    plan_launch,
    row_decay,
    store_decay,
    store_rows,
    sweep_program,
)
from fla_compile.kernels.decay_triton_grads import launch_query_key_grads, sum_shares
from fla_compile.kernels.launch import compiled_together
from fla_compile.kernels.launch_record import recorded

__all__ = ["chunk_backward", "launch_gradients"]


@triton.jit(do_not_specialize=["T", "H", "L", "n_s"])
def chunk_state_grad_kernel(
    p_q, p_do, p_g, p_dht, p_dh, p_dh0, p_gt, scale, T, H, L, n_s,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, HAS_DHT: tl.constexpr, STORE_DH: tl.constexpr, STORE_DH0: tl.constexpr,
    PRECISION: tl.constexpr, RQ: tl.constexpr, RG: tl.constexpr,
):  # fmt: skip
    """One program per (b, segment, h, K block, V block) walks back, from a D of p_dht [B, segments, H, K, V] to one of
    p_dh0; p_dh [B*H, chunks, K, V] gets the D after each chunk, or p_gt, without STORE_DH, the segment's log decay."""
    i_nh, i_b, i_h, n_t, i_a, i_e, i_k, i_v = sweep_program(T, H, L, n_s, C, K, V, BK, BV)
    o_c = tl.arange(0, C)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K

    b_d = tl.zeros((BK, BV), tl.float32)
    b_total = tl.zeros((BK,), tl.float32) if DECAY == KEY_DECAY else 0.0
    if STORE_DH:
        p_dh += ((i_b * H + i_h) * n_t + i_e - 1) * (K * V)
    if HAS_DHT:
        b_d += load_rows(p_dht + i_nh * (K * V), o_k, o_v, m_k, V).to(tl.float32)
    for _ in range(i_e - i_a):
        if STORE_DH:
            store_rows(p_dh, b_d, o_k, o_v, m_k, V)
            p_dh -= K * V
        i_e -= 1
        t_0 = i_e * C
        i_row = (i_b * T + t_0) * H + i_h
        m_c = t_0 + o_c < T
        b_qt = load_columns(p_q + i_row // RQ * K, o_c * (H // RQ), o_k, m_c, K)
        b_do = load_rows(p_do + i_row * V, o_c * H, o_v, m_c, V)
        if DECAY == KEY_DECAY:
            b_gt = as_decay(load_columns(p_g + i_row // RG * K, o_c * (H // RG), o_k, m_c, K))
            b_qt = (b_qt * tl.exp(tl.cumsum(b_gt, 1))).to(b_do.dtype)
            b_all = tl.sum(b_gt, 1)
            b_total += b_all
            b_d *= tl.exp(b_all)[:, None]
        elif DECAY != NO_DECAY:
            b_hi, b_lo, s_hi, s_lo = row_decay(p_g, i_row, i_h, o_c, m_c, H, RG, DECAY, b_do.dtype == tl.float32)
            b_do = (b_do * tl.exp(b_hi + b_lo)[:, None]).to(b_do.dtype)
            b_total += s_hi + s_lo
            b_d *= tl.exp(s_hi + s_lo)
        if STORE_DH:
            b_d += tl.dot(b_qt, b_do, input_precision=PRECISION) * scale
        else:
            b_d = tl.dot(b_qt, b_do, b_d, input_precision=PRECISION)
    if not STORE_DH:
        b_d *= scale
    if STORE_DH0:
        store_rows(p_dh0 + i_nh * (K * V), b_d, o_k, o_v, m_k, V)
    if not STORE_DH:
        store_decay(p_gt, b_total, i_nh, i_k, i_v, K, BK, DECAY)


@triton.jit(do_not_specialize=["T", "H"])
def chunk_value_grad_kernel(
    p_q, p_k, p_g, p_a, p_do, p_dh, p_dv, scale, T, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, PRECISION: tl.constexpr, RQ: tl.constexpr, RK: tl.constexpr, RG: tl.constexpr,
):  # fmt: skip
    """dv, one program per (b, h, chunk, V block)."""
    NK: tl.constexpr = tl.cdiv(K, BK)
    i_v, i_bt, i_h, t_0, i_row = chunk_program(T, H, C, V, BV)
    o_c = tl.arange(0, C)
    o_v = i_v * BV + tl.arange(0, BV)
    m_c = t_0 + o_c < T
    p_dh += i_bt.to(tl.int64) * (K * V)

    b_dv = tl.zeros((C, BV), tl.float32)
    b_at = tl.zeros((C, C), tl.float32)
    for i_k in range(NK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_k = load_rows(p_k + i_row // RK * K, o_c * (H // RK), o_k, m_c, K)
        b_d = load_rows(p_dh, o_k, o_v, o_k < K, V)
        if DECAY == KEY_DECAY:
            m_next = (o_c + 1 < C) & (t_0 + o_c + 1 < T)
            b_next = as_decay(load_rows(p_g + i_row // RG * K, (o_c + 1) * (H // RG), o_k, m_next, K))
            b_k = (b_k * tl.exp(tl.cumsum(b_next, 0, reverse=True))).to(b_d.dtype)
        else:
            b_qt = load_columns(p_q + i_row // RQ * K, o_c * (H // RQ), o_k, m_c, K)
            b_at = tl.dot(b_k, b_qt, b_at, input_precision=PRECISION)
        b_dv = tl.dot(b_k, b_d, b_dv, input_precision=PRECISION)

    b_do = load_rows(p_do + i_row * V, o_c * H, o_v, m_c, V)
    if DECAY == KEY_DECAY:
        b_w = load_columns(p_a + i_row * C, o_c * H, o_c, m_c, C)
    else:
        m_at = o_c[:, None] <= o_c[None, :]
        if DECAY != NO_DECAY:
            b_hi, b_lo, s_hi, s_lo = row_decay(p_g, i_row, i_h, o_c, m_c, H, RG, DECAY, b_do.dtype == tl.float32)
            b_e = (b_hi[None, :] - b_hi[:, None]) + (b_lo[None, :] - b_lo[:, None])
            b_at *= tl.exp(tl.where(m_at, b_e, 0.0))
            b_dv *= tl.exp((s_hi - b_hi) + (s_lo - b_lo))[:, None]
        b_w = tl.where(m_at, b_at, 0.0).to(b_do.dtype)
    b_dv += tl.dot(b_w, b_do, input_precision=PRECISION) * scale
    store_rows(p_dv + i_row * V, b_dv, o_c * H, o_v, m_c, V)


@recorded
def chunk_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    scale: float,
    do: torch.Tensor,
    dht: torch.Tensor | None,
    *,
    need_dg: bool = True,
    config: Config | None = None,
    scans: Scans | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients (dq, dk, dv, dg, dh0); dg (shaped as g) and dh0 in float32, None where the input is None.

    `config` and `scans` as for `chunk_forward`. Without `need_dg` dg may be None too. Raises ValueError for dtypes,
    sizes or shapes that do not fit.
    """
    H = output_heads(q, k, v, g, initial_state)
    kind = check_shapes(q, k, v, g, heads=H)
    q, k, v, do = q.contiguous(), k.contiguous(), v.contiguous(), do.to(q.dtype).contiguous()
    g = None if g is None else g.contiguous()
    h0 = None if initial_state is None else initial_state.contiguous()
    dht = None if dht is None else dht.contiguous()
    B, _, _, K = q.shape
    V = v.shape[-1]
    if B * H == 0:
        dg, dh0 = (None if x is None else torch.zeros_like(x, dtype=torch.float32) for x in (g, h0))
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dg, dh0
    with torch.cuda.device_of(q):
        if config is None and scans is None and scale != 0:  # the fused launch divides by it
            scans = plan_scans(q, v, kind, heads=H, need_dg=need_dg)
        if scans is not None:
            return scan_backward(scans, q, k, v, g, h0, scale, do, dht, need_dg=need_dg)
        plan = plan_launch(q, v, kind, config, shared=shares(H, q, k, v, g))
        dh0 = None if h0 is None else torch.empty(B, H, K, V, dtype=torch.float32, device=q.device)
        dq, dk, dv, dg = _launch_all(plan, q, k, v, g, h0, scale, do, dht, dh0)
        dq, dk, dv = (sum_heads(dx, 2, x.shape[2]) for dx, x in ((dq, q), (dk, k), (dv, v)))
        dg = sum_shares(plan, dg)
        return dq, dk, dv, dg if dg is None or g is None else sum_decay_heads(dg, g), dh0


@compiled_together
def _launch_all(
    plan: SplitPlan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    h0: torch.Tensor | None,
    scale: float,
    do: torch.Tensor,
    dht: torch.Tensor | None,
    dh0: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    h, _ = launch_states(plan, k, v, g, h0, final=False)
    a = launch_key_scores(plan, q, k, g) if g is not None and plan.kind == "vector" else None
    return launch_gradients(plan, q, k, v, g, a, h, scale, do, dht, dh0)


def launch_gradients(
    plan: SplitPlan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    a: torch.Tensor | None,
    h: torch.Tensor,
    scale: float,
    do: torch.Tensor,
    dht: torch.Tensor | None,
    dh0: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients (dq, dk, dv, and dg for `sum_shares`) of the split launch, from its scores and states; fills dh0.

    All are for each of the plan's H heads.
    """
    B, T, H, K, V = plan.B, plan.T, plan.H, plan.K, plan.V
    dq, dk, dv = (torch.empty(B, T, H, size, dtype=q.dtype, device=q.device) for size in (K, K, V))
    dh = torch.empty_like(h)
    _launch_state_grads(plan, q, g, scale, do, dht, dh, dh0)
    programs = B * H * plan.chunks * plan.value_blocks
    launch_split(plan, chunk_value_grad_kernel, programs, q, k, g, a, do, dh, dv, float(scale))
    return dq, dk, dv, launch_query_key_grads(plan, q, k, v, g, do, h, dh, dq, dk, scale)


def _launch_state_grads(
    plan: SplitPlan,
    q: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    do: torch.Tensor,
    dht: torch.Tensor | None,
    dh: torch.Tensor,
    dh0: torch.Tensor | None,
) -> None:
    """Fills dh and dh0."""
    sweep = chunk_state_grad_kernel
    if plan.segments > 1:
        u, gt = new_sums(plan)
        flags = dict(HAS_DHT=False, STORE_DH=False, STORE_DH0=True)
        launch_sweep(plan, sweep, q, do, g, None, None, u, gt, float(scale), **flags)
        chain_segments(u, gt, dht, dh0, KINDS[plan.kind], reverse=True, s_in=1.0, s_st=1.0)
        dht, dh0 = u, None
    flags = dict(HAS_DHT=dht is not None, STORE_DH=True, STORE_DH0=dh0 is not None)
    launch_sweep(plan, sweep, q, do, g, dht, dh, dh0, None, float(scale), **flags)

"""The gradient of a decay over keys in chunks with a step that grows, for the split launch.

With P and the first three terms of dg as in `decay_triton_grads`, for each channel

    dg_t = those + scale * sum_{j < t <= i} q_i P_ij exp(c_i - c_j) k_j

Sums over the pairs from t on, taken from one another, cost nothing of this where no pair grows; where one grew by e^x
they leave 2^-24 e^x, however small dg_t. So where a decay is above one the pairs across t are added up by themselves, a
column at a time.
"""

import torch
import triton
import triton.language as tl

from fla_compile.kernels.decay_triton_common import (
    SplitPlan,
    as_decay,
    chunk_program,
    launch_split,
    load_rows,
    store_rows,
)

__all__ = ["chunk_grown_decay_grad_kernel", "launch_grown_decay_grads"]

# 64 steps below it grow by less than e^2.
GROWTH = tl.constexpr(2.0 / 64)


@triton.jit(do_not_specialize=["T", "H"])
def chunk_grown_decay_grad_kernel(
    p_q, p_k, p_g, p_p, p_dgs, p_dg, scale, T, H,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Writes p_dg again where a step of the chunk grows; one program per (b, h, chunk, K block)."""
    i_k, _, _, t_0, i_row = chunk_program(T, H, C, K, BK)
    o_c = tl.arange(0, C)
    o_k = i_k * BK + tl.arange(0, BK)
    m_c = t_0 + o_c < T
    m_k = o_k < K
    if tl.max(as_decay(load_rows(p_g + i_row * K, o_c * H, o_k, m_c, K))) <= GROWTH:
        return
    b_q = load_rows(p_q + i_row * K, o_c * H, o_k, m_c, K) * scale
    b_dg = load_rows(p_dgs + i_row * K, o_c * H, o_k, m_c, K)
    b_e = tl.zeros((C, BK), tl.float32)
    n_j = tl.minimum(T - t_0, C)
    for i_j in range(1, n_j):
        j = n_j - 1 - i_j
        b_gj = as_decay(tl.load(p_g + (i_row + (j + 1) * H) * K + o_k, mask=m_k, other=0.0))
        b_kj = tl.load(p_k + (i_row + j * H) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_pj = tl.load(p_p + (i_row + o_c * H) * C + j, mask=m_c & (o_c > j), other=0.0).to(tl.float32)
        b_e += tl.where((o_c > j)[:, None], b_gj[None, :], 0.0)
        b_w = b_q * b_pj[:, None] * tl.exp(b_e) * b_kj[None, :]
        b_dg += tl.where((o_c > j)[:, None], tl.cumsum(b_w, 0, reverse=True), 0.0)
    store_rows(p_dg + i_row * K, b_dg, o_c * H, o_k, m_c, K)


def launch_grown_decay_grads(
    plan: SplitPlan,
    q: torch.Tensor,
    k: torch.Tensor,
    g: torch.Tensor,
    p: torch.Tensor,
    dgs: torch.Tensor,
    dg: torch.Tensor,
    scale: float,
) -> None:
    """Fills dg, where it must, in place of `chunk_key_grad_kernel`."""
    programs = plan.B * plan.H * plan.chunks * plan.key_blocks
    launch_split(plan, chunk_grown_decay_grad_kernel, programs, q, k, g, p, dgs, dg, float(scale))

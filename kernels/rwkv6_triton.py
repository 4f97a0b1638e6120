"""RWKV-6's recurrence (`rwkv6_ops`) in the fused launch of gated linear attention, which reads BEFORE the update.

Operands of two bytes and up to 256 keys, as they lie, packed sequences too; for all else the functions return None.
The bonus is a row's score with itself, w_t = sum_k q_tk u_k k_tk, made by a kernel of its own: sums over columns beside
the scores of a chunk have no registers left. As any score it must be within float16 where the operands are.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_compile.kernels.decay_fused import Scans, pack_scans, plan_scans, scan_backward_before, scan_forward
from fla_compile.kernels.decay_segments import Packing, ceil_div, fits_table
from fla_compile.kernels.launch import Launch, contiguous, layout, remember
from fla_compile.kernels.packed import sequence_bounds

__all__ = ["backward", "forward"]

# Numbers of q and k that a program holds
BLOCK = 8192


@triton.jit(do_not_specialize=["n_rows"])
def own_scores_kernel(
    p_q, p_k, p_u, p_own, n_rows, H: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr
):
    """q, k [n_rows, K], of H heads in turn, and u [H, K] to p_own [n_rows]."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_k = tl.arange(0, BK)
    m_x = (o_r < n_rows)[:, None] & (o_k < K)[None, :]
    o_x = o_r[:, None] * K + o_k[None, :]
    b_q = tl.load(p_q + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_k = tl.load(p_k + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_u = tl.load(p_u + (o_r % H)[:, None] * K + o_k[None, :], mask=m_x, other=0.0).to(tl.float32)
    tl.store(p_own + o_r, tl.sum(b_q * b_u * b_k, 1), mask=o_r < n_rows)


_launches: dict[tuple[Any, ...], Launch] = {}


def _own_scores(q: Tensor, k: Tensor, u: Tensor | None) -> Tensor | None:
    """w [B, T, H] in float32; all operands contiguous."""
    if u is None:
        return None
    B, T, H, K = q.shape
    own = torch.empty(B, T, H, dtype=torch.float32, device=q.device)
    key = layout(q), layout(k), layout(u)
    launch = _launches.get(key)
    if launch is None:
        keys = triton.next_power_of_2(K)
        rows = BLOCK // keys
        grid = (ceil_div(B * T * H, rows),)
        launch = Launch(own_scores_kernel, q.device, grid, (B * T * H, H, K, rows, keys), num_warps=4)
        remember(_launches, key, launch)
    launch(q, k, u, own)
    return own


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    u: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None = None,
    *,
    scans: Scans | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Outputs [B, T, H, V] in v's dtype and the final state [B, H, K, V] in float32.

    q, k, g [B, T, H, K]; v [B, T, H, V]; u [H, K] or None; with cu_seqlens B = 1 and states [N, H, K, V]. `scans` and
    `longest`, the most steps of a packed segment, are asked for in place of the tables' choice.
    """
    with torch.cuda.device_of(q):
        plan, packing = _planned(q, v, cu_seqlens, scans, longest)
        if plan is None:
            return None
        q, k, v, g = (x.contiguous() for x in (q, k, v, g))
        own = _own_scores(q, k, contiguous(u))
        return scan_forward(plan, q, k, v, g, contiguous(initial_state), scale, own, packing=packing)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    u: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    do: Tensor | None,
    dht: Tensor | None,
    cu_seqlens: Tensor | None = None,
    *,
    scans: Scans | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None] | None:
    """Gradients (dq, dk, dv, dg, du, dh0), the last three in float32; arguments as for `forward`.

    None for a scale of zero too, which the launch divides by.
    """
    if scale == 0:
        return None
    with torch.cuda.device_of(q):
        plan, packing = _planned(q, v, cu_seqlens, scans, longest)
        if plan is None:
            return None
        do = torch.zeros_like(v) if do is None else do.to(q.dtype)
        q, k, v, g, do = (x.contiguous() for x in (q, k, v, g, do))
        u, h0, dht = (contiguous(x) for x in (u, initial_state, dht))
        own = _own_scores(q, k, u)
        return scan_backward_before(plan, q, k, v, g, u, own, h0, scale, do, dht, packing=packing)


def _planned(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, scans: Scans | None, longest: int | None
) -> tuple[Scans | None, Packing | None]:
    B, T, H, _ = q.shape
    if B * H == 0 or not (cu_seqlens is None or fits_table(q)):
        return None, None
    scans = scans or plan_scans(q, v, "vector", before=True, few=None if cu_seqlens is None else False)
    if scans is None or cu_seqlens is None:
        return scans, None
    return scans, pack_scans(scans, sequence_bounds(cu_seqlens, T), q.device, longest)

"""The fused launch of the decayed outer product on packed sequences, as they lie: no padding, gathering or copies.

Shapes: q, k [1, T, H, K]; v [1, T, H, V]; g absent, [H], [1, T, H] or [1, T, H, K]; states [N, H, K, V]; cu_seqlens
[N + 1]; operands that heads share have fewer (`decay_heads`). The programs of `decay_fused` are segments of time
already; here these come from a table (`decay_segments`).
"""

import torch
from torch import Tensor

from fla_compile.kernels.decay_checks import check_shapes
from fla_compile.kernels.decay_fused import Scans, pack_scans, plan_scans, scan_backward, scan_forward
from fla_compile.kernels.decay_heads import output_heads
from fla_compile.kernels.decay_segments import fits_table
from fla_compile.kernels.launch import contiguous
from fla_compile.kernels.packed import sequence_bounds

__all__ = ["packed_backward", "packed_forward"]


def packed_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    cu_seqlens: Tensor,
    *,
    scans: Scans | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Outputs [1, T, H, V] in q's dtype and the final states in float32; None where there is no fused launch.

    `scans` and `longest`, the most steps of a segment, are asked for in place of the table's choice. Raises ValueError
    for dtypes, sizes or shapes that do not fit, and for sequences that are empty or do not end at T.
    """
    heads = output_heads(q, k, v, g, initial_state)
    kind = check_shapes(q, k, v, g, heads=heads)
    if not fits_table(q):
        return None
    with torch.cuda.device_of(q):
        scans = scans or plan_scans(q, v, kind, heads=heads, few=False)
        if scans is None:
            return None
        packing = pack_scans(scans, sequence_bounds(cu_seqlens, q.shape[1]), q.device, longest)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        return scan_forward(scans, q, k, v, contiguous(g), contiguous(initial_state), scale, packing=packing)


def packed_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    cu_seqlens: Tensor,
    do: Tensor | None,
    dht: Tensor | None,
    *,
    need_dg: bool,
    scans: Scans | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None] | None:
    """Gradients (dq, dk, dv, dg, dh0), dg and dh0 in float32; None where there is no fused launch, as for a scale
    of zero, which it divides by. Arguments and errors as for `packed_forward`.
    """
    heads = output_heads(q, k, v, g, initial_state)
    kind = check_shapes(q, k, v, g, heads=heads)
    if not fits_table(q) or scale == 0:
        return None
    with torch.cuda.device_of(q):
        scans = scans or plan_scans(q, v, kind, heads=heads, need_dg=need_dg, few=False)
        if scans is None:
            return None
        packing = pack_scans(scans, sequence_bounds(cu_seqlens, q.shape[1]), q.device, longest)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        do = v.new_zeros(*v.shape[:2], heads, v.shape[-1]) if do is None else do.to(q.dtype).contiguous()
        h0, dht = contiguous(initial_state), contiguous(dht)
        return scan_backward(scans, q, k, v, contiguous(g), h0, scale, do, dht, need_dg=need_dg, packing=packing)

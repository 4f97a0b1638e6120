"""Launches of the decayed outer product under a decay over values: those of a decay over keys, in exchanged roles.

    S_t = S_{t-1} diag(exp(gv_t)) + k_t v_t^T        o_t = scale * S_t^T q_t

Shapes: q, k [B, T, H, K]; v, o, gv [B, T, H, V]; S [B, H, K, V].

The transposed state Z = S^T decays over its rows: Z_t = diag(exp(gv_t)) Z_{t-1} + v_t k_t^T is the state of a decay
over keys whose keys are v and whose values are k. With E_t the gradient of S_t, by all that reads it,

    o_t  = scale * Z_t q_t         dv_t = E_t^T k_t        E_{t-1} = E_t diag(exp(gv_t)) + scale * q_{t-1} do_{t-1}^T
    dq_t = scale * Z_t^T do_t      dk_t = E_t v_t          dgv_t   = sum_k E_t S_{t-1} exp(gv_t)

and under a decay over keys, with queries q' = do, keys k' = v, values v' = k and do' = q,

    dq'_t = scale * Z_t do'_t      dk'_t = D_t v'_t        D_{t-1} = diag(exp(gv_t)) D_t + scale * q'_{t-1} do'_{t-1}^T
    o'_t  = scale * Z_t^T q'_t     dv'_t = D_t^T k'_t      dg'_t   = sum_(v') D_t Z_{t-1} exp(gv_t)

so that D = E^T, and o = dq', dq = o', dk = dv', dv = dk', dgv = dg'; states and their gradients are transposed. The
forward is the pass for dq' alone; the backward has all of them, since dgv sums shares of dq' = o before it is rounded.

Packed sequences run as they lie, as in `decay_triton_packed`: B = 1, states [N, H, K, V], cu_seqlens [N + 1].
"""

import torch
from torch import Tensor

from fla_compile.kernels.decay_checks import check_shapes
from fla_compile.kernels.decay_configs import Config
from fla_compile.kernels.decay_fused import Scans, pack_scans, plan_scans, scan_backward, scan_query_grad
from fla_compile.kernels.decay_segments import fits_table
from fla_compile.kernels.decay_triton import launch_outputs
from fla_compile.kernels.decay_triton_bwd import launch_gradients
from fla_compile.kernels.decay_triton_common import launch_key_scores, launch_states, plan_launch
from fla_compile.kernels.decay_triton_grads import launch_query_grads
from fla_compile.kernels.packed import sequence_bounds

__all__ = ["chunk_backward", "chunk_forward", "packed_backward", "packed_forward"]


def chunk_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gv: Tensor,
    initial_state: Tensor | None,
    scale: float,
    *,
    config: Config | None = None,
    scans: Scans | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, V] in q's dtype and the final state [B, H, K, V] in float32.

    `config` asks for the split launch and `scans` for the fused one (both for keys v and values k), in place of the
    tables' choice. Raises ValueError for dtypes, sizes or shapes that do not fit.
    """
    kind = _check(q, k, v, gv)
    B, _, H, K = q.shape
    if B * H == 0:
        return torch.empty_like(v), torch.empty(B, H, K, v.shape[-1], dtype=torch.float32, device=q.device)
    q, k, v, gv = (x.contiguous() for x in (q, k, v, gv))
    h0 = _transposed(initial_state)
    with torch.cuda.device_of(q):
        if config is None and scans is None:
            scans = plan_scans(v, k, kind)
        if scans is not None:
            o, ht = scan_query_grad(scans, v, k, gv, h0, scale, q)
            return o, ht.mT.contiguous()
        plan = plan_launch(v, k, kind, config)
        h, ht = launch_states(plan, v, k, gv, h0, final=True)
        assert ht is not None
        return launch_query_grads(plan, v, k, gv, q, h, scale), ht.mT.contiguous()


def chunk_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gv: Tensor,
    initial_state: Tensor | None,
    scale: float,
    do: Tensor,
    dht: Tensor | None,
    *,
    config: Config | None = None,
    scans: Scans | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients (dq, dk, dv, dgv, dh0); dgv and dh0 in float32, dh0 None without an initial state.

    `config` and `scans` as for `chunk_forward`. Raises ValueError for dtypes, sizes or shapes that do not fit.
    """
    kind = _check(q, k, v, gv)
    q, k, v, gv, do = (x.contiguous() for x in (q, k, v, gv, do.to(q.dtype)))
    h0, dht = _transposed(initial_state), _transposed(dht)
    dq = torch.empty_like(q)
    dh0 = None if h0 is None else torch.empty_like(h0, dtype=torch.float32)
    if q.shape[0] * q.shape[2] == 0:
        return dq, torch.empty_like(k), torch.empty_like(v), torch.empty_like(gv, dtype=torch.float32), _transposed(dh0)
    with torch.cuda.device_of(q):
        if config is None and scans is None and scale != 0:  # the fused launch divides by it
            scans = plan_scans(v, k, kind)
        if scans is not None:
            _, dv, dk, dgv, dh0 = scan_backward(scans, do, v, k, gv, h0, scale, q, dht, need_dg=True, o=dq)
        else:
            plan = plan_launch(v, k, kind, config)
            h, _ = launch_states(plan, v, k, gv, h0, final=False)
            a = launch_key_scores(plan, do, v, gv)
            dq = launch_outputs(plan, do, v, k, gv, a, h, scale)
            _, dv, dk, dgv = launch_gradients(plan, do, v, k, gv, a, h, scale, q, dht, dh0)
    assert dgv is not None
    return dq, dk, dv, dgv, _transposed(dh0)


def packed_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gv: Tensor,
    initial_state: Tensor | None,
    scale: float,
    cu_seqlens: Tensor,
    *,
    scans: Scans | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Outputs [1, T, H, V] in q's dtype and the final states in float32; None where there is no fused launch.

    `scans`, for keys v and values k, and `longest`, the most steps of a segment, are asked for in place of the table's
    choice. Raises ValueError for dtypes, sizes or shapes that do not fit, and for sequences that are empty or do not
    end at T.
    """
    kind = _check(q, k, v, gv)
    if not fits_table(q):
        return None
    with torch.cuda.device_of(q):
        scans = scans or plan_scans(v, k, kind, few=False)
        if scans is None:
            return None
        packing = pack_scans(scans, sequence_bounds(cu_seqlens, q.shape[1]), q.device, longest)
        q, k, v, gv = (x.contiguous() for x in (q, k, v, gv))
        o, ht = scan_query_grad(scans, v, k, gv, _transposed(initial_state), scale, q, packing=packing)
    return o, ht.mT.contiguous()


def packed_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gv: Tensor,
    initial_state: Tensor | None,
    scale: float,
    cu_seqlens: Tensor,
    do: Tensor | None,
    dht: Tensor | None,
    *,
    scans: Scans | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None] | None:
    """Gradients (dq, dk, dv, dgv, dh0), dgv and dh0 in float32; None where there is no fused launch, as for a scale
    of zero, which it divides by. Arguments and errors as for `packed_forward`.
    """
    kind = _check(q, k, v, gv)
    if not fits_table(q) or scale == 0:
        return None
    with torch.cuda.device_of(q):
        scans = scans or plan_scans(v, k, kind, few=False)
        if scans is None:
            return None
        packing = pack_scans(scans, sequence_bounds(cu_seqlens, q.shape[1]), q.device, longest)
        do = torch.zeros_like(v) if do is None else do.to(q.dtype)
        q, k, v, gv, do = (x.contiguous() for x in (q, k, v, gv, do))
        states = _transposed(initial_state), scale, q, _transposed(dht)
        dq = torch.empty_like(q)
        _, dv, dk, dgv, dh0 = scan_backward(scans, do, v, k, gv, *states, need_dg=True, o=dq, packing=packing)
    assert dgv is not None
    return dq, dk, dv, dgv, _transposed(dh0)


def _check(q: Tensor, k: Tensor, v: Tensor, gv: Tensor) -> str:
    kind = check_shapes(v, v, k, gv)
    if q.shape != k.shape or gv.shape != v.shape:
        raise ValueError(f"q, k, v, gv have shapes {', '.join(str(tuple(x.shape)) for x in (q, k, v, gv))}")
    return kind


def _transposed(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.mT.contiguous()

"""Launches of the passes in `decay_scan`: output and gradients of a decayed outer product.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = scale * q_t^T S_t

Every pass keeps its state on chip and walks time once; one program holds a block of columns for a head. Under a gate a
key the output is one, for up to 128 keys, and where the table has a walk, for up to 128 values, so is dv, and the walk
makes the other gradients; all else comes from states at the chunks' ends (`decay_fused_gates`). Where programs are too
few to fill the device, time is cut into segments: a first pass sums up what each segment adds to the state, the sums
are chained to the state before each segment, and the segments then run side by side. Where time is short there are no
such sums: each program walks what is before its segment too, for the state alone (a run-up). Packed sequences are
segments too, of any length: operands are [1, T, H, ..] where they lie, states [N, H, ..] (`decay_segments`).

H is the number of heads of the output; operands that neighbours share have fewer (`decay_heads`) and are read where
they lie. Their gradients are written for all H, in the operands' dtype, and summed after.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from fla_compile.kernels.decay_fused_gates import (
    launch_grads,
    launch_outputs,
    launch_states,
    launch_walk,
    new_bonus_grads,
    new_kept,
    new_states,
    segments_of,
)
from fla_compile.kernels.decay_heads import shares, sum_decay_heads, sum_heads
from fla_compile.kernels.decay_plan import Scans, pack_scans, plan_scans
from fla_compile.kernels.decay_scan import KEYS, LONG, PLAIN, QUERIES, chunk_scan_kernel
from fla_compile.kernels.decay_scan_grown import grown_row_decay_grad_kernel
from fla_compile.kernels.decay_scan_sums import SUMS, Sums, row_decay_grad_kernel
from fla_compile.kernels.decay_segments import Packing, Part, ceil_div, chain_joints, chain_segments
from fla_compile.kernels.decay_tiles import product_threads
from fla_compile.kernels.decay_triton_common import KINDS
from fla_compile.kernels.launch import Launch, compiled_together, layout, remember
from fla_compile.kernels.launch_record import empty, recorded

__all__ = [
    "Scans",
    "pack_scans",
    "plan_scans",
    "scan_backward",
    "scan_backward_before",
    "scan_forward",
    "scan_query_grad",
]

ROW_GRAD_OPTIONS = {"num_warps": 4}
# Of `grown_row_decay_grad_kernel`, which seldom has work: what counts is that it is right.
GROWN_OPTIONS = {"num_warps": 4, "num_stages": 1}
# Columns of q and k, and of v, that it takes at a time.
GROWN_BLOCKS = 64, 64


_launches: dict[tuple[Any, ...], Launch] = {}


def _launch(
    plan: Scans, x: Tensor | None, z: Tensor, w: Tensor, g: Tensor | None, y: Tensor | None, *, tall: bool,
    reverse: bool, s0: Tensor | None, scales: tuple[float, float, float], st: Tensor | None = None,
    gt: Tensor | None = None, part: int = 0, e: Tensor | None = None, sums: Sums | None = None,
    packed: Part | None = None,
) -> None:  # fmt: skip
    """One pass over time. Without y only the segments' own states, to st, and decays, to gt."""
    operands: tuple[Tensor | None, ...] = x, z, w, g, s0, y, st, gt
    operands += (None,) * 4 if sums is None else (e, sums.states, sums.rows, sums.carry)
    operands += (None, None) if packed is None else (packed.table, packed.joints)
    key = (plan, tall, reverse, part, *map(layout, operands))
    launch = _launches.get(key)
    if launch is None:
        config = plan.tall if tall else plan.dv if reverse and y is not None else plan.wide
        # only the tiles of the table are known to compile to what they mean: smaller sizes are masked, not given others
        numbers = (
            plan.T, plan.length, plan.segments, plan.H, z.shape[-1], w.shape[-1], config.chunk, config.block_k,
            config.block_v, KINDS[plan.kind], part, reverse, y is not None, st is not None, tall, s0 is not None,
            packed is None and plan.T % config.chunk == 0, plan.precision, *shares(plan.H, x, z, w, g, e),
            packed is None and plan.runup,
        )  # fmt: skip
        programs = segments_of(plan, packed) * plan.H * ceil_div(w.shape[-1], config.block_v)
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        launch = Launch(chunk_scan_kernel, z.device, (programs,), numbers, **options)
        remember(_launches, key, launch)
    launch(*operands, *map(float, scales))  # an integer would be a number of the compilation


def _add_up(
    plan: Scans, z: Tensor, w: Tensor, g: Tensor | None, u: Tensor, gt: Tensor, *, reverse: bool,
    packed: Part | None = None,
) -> None:  # fmt: skip
    """What each segment adds to its state, to u, and its log decay, to gt."""
    if plan.kind == "vector":
        assert g is not None
        launch_states(plan, z, w, g, reverse=reverse, st=u, gt=gt, packed=packed)
        return
    scales = 1.0, 1.0, 1.0
    _launch(plan, None, z, w, g, None, tall=False, reverse=reverse, s0=None, scales=scales, st=u, gt=gt, packed=packed)


def _chain(
    plan: Scans, z: Tensor, w: Tensor, g: Tensor | None, s0: Tensor | None, st: Tensor | None, *, reverse: bool,
    s_in: float, s_st: float,
) -> Tensor:  # fmt: skip
    """The states before each segment [B, segments, H, K, V]; the last one to st."""
    B, H, K, V = plan.B, plan.H, plan.K, plan.V
    u = empty(B, plan.segments, H, K, V, dtype=torch.float32, device=z.device)
    per_key = (K,) if plan.kind == "vector" else ()
    gt = empty(B, plan.segments, H, *per_key, dtype=torch.float32, device=z.device)
    _add_up(plan, z, w, g, u, gt, reverse=reverse)
    chain_segments(u, gt, s0, st, KINDS[plan.kind], reverse=reverse, s_in=s_in, s_st=s_st)
    return u


def _packed_chain(
    plan: Scans, packing: Packing, z: Tensor, w: Tensor, g: Tensor | None, s0: Tensor | None, *, reverse: bool,
    s_in: float,
) -> Part:  # fmt: skip
    """What a pass over the sequences is told: their table, and the states where segments meet if any do."""
    if not packing.joints:
        return packing.part(None)
    H, K, V = plan.H, plan.K, plan.V
    u = empty(packing.joints, H, K, V, dtype=torch.float32, device=z.device)
    per_key = (K,) if plan.kind == "vector" else ()
    gt = empty(packing.joints, H, *per_key, dtype=torch.float32, device=z.device)
    _add_up(plan, z, w, g, u, gt, reverse=reverse, packed=packing.sums(reverse))
    chain_joints(u, gt, s0, packing.chain(), KINDS[plan.kind], reverse=reverse, s_in=s_in)
    return packing.part(u)


def _new_sums(plan: Scans, like: Tensor, packing: Packing | None) -> Sums:
    """What the passes for dq and dk, [B, T, H, K], fill."""
    tall, columns = plan.tall, ceil_div(plan.K, plan.tall.block_v)
    if tall.chunk < LONG.value:
        states, side = new_states(plan, like, packing), tall.block_v
    else:  # in whole tiles, and sums of threads
        states = new_states(plan, like, packing, (columns * tall.block_v, tall.block_k))
        side = product_threads(tall.block_k)
    wide: dict[str, Any] = dict(dtype=torch.float32, device=like.device)
    rows = empty(plan.B, plan.H, SUMS.value, columns, plan.T, **wide)
    return Sums(states, rows, empty(states.shape[0], columns, side, **wide))


def _launch_row_grads(
    plan: Scans, q: Tensor, k: Tensor, v: Tensor, do: Tensor, g: Tensor | None, sums: Sums, dg: Tensor, scale: float,
    packing: Packing | None, packed: Part | None,
) -> None:  # fmt: skip
    """dg of one decay a head and step, from what the passes left, and again where a step grows."""
    B, T, H, tile = plan.B, plan.T, plan.H, plan.tall
    segments = plan.segments if packing is None else packing.segments
    chunks = ceil_div(plan.length, tile.chunk) if packing is None else ceil_div(packing.chunks, segments)
    table = None if packed is None else packed.table
    heads = min(16, triton.next_power_of_2(H))
    grid = (B * segments * chunks * ceil_div(H, heads),)
    times, sides = (T, plan.length, segments, chunks), sums.carry.shape[1:]
    key = ("rows", plan, segments, chunks, layout(table), dg.device)
    launch = _launches.get(key)
    if launch is None:
        numbers = *times, H, tile.chunk, *sides, heads
        launch = Launch(row_decay_grad_kernel, dg.device, grid, numbers, **ROW_GRAD_OPTIONS)
        remember(_launches, key, launch)
    launch(sums.rows, sums.carry, dg, table)
    if plan.kind != "scalar":
        return
    operands = q, k, v, do, g
    key = ("grown", plan, segments, chunks, layout(table), *map(layout, operands))
    launch = _launches.get(key)
    if launch is None:
        turned = tile.chunk < LONG.value
        numbers = (
            *times, H, plan.K, plan.V, tile.chunk, *GROWN_BLOCKS, *sides, heads, tile.block_k, tile.block_v, turned,
            plan.precision, *shares(H, q, k, v, g),
        )  # fmt: skip
        launch = Launch(grown_row_decay_grad_kernel, dg.device, grid, numbers, **GROWN_OPTIONS)
        remember(_launches, key, launch)
    launch(*operands, sums.states, sums.rows, sums.carry, dg, table, float(scale))


@recorded
@compiled_together
def scan_forward(
    plan: Scans, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, h0: Tensor | None, scale: float,
    own: Tensor | None = None, *, packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs [B, T, H, V] and the final state [B, H, K, V] (packed [N, ..]) in float32; all operands contiguous. `own`
    [B, T, H] are the rows' scores with themselves for plans that read the state before the update."""
    o = empty(plan.B, plan.T, plan.H, plan.V, dtype=v.dtype, device=v.device)
    states = plan.B if packing is None else packing.sequences
    ht = empty(states, plan.H, plan.K, plan.V, dtype=torch.float32, device=q.device)
    final: Tensor | None = ht
    packed = None
    if packing is not None:
        packed = _packed_chain(plan, packing, k, v, g, h0, reverse=False, s_in=1.0)
    elif plan.chained:
        h0, final = _chain(plan, k, v, g, h0, ht, reverse=False, s_in=1.0, s_st=1.0), None
    scales = 1.0, scale, 1.0
    if plan.kind == "vector":
        assert g is not None
        where: dict[str, Any] = dict(packed=packed, packing=packing, own=own)
        launch_outputs(plan, q, k, v, g, o, reverse=False, s0=h0, scales=scales, st=final, **where)
    else:
        _launch(plan, q, k, v, g, o, tall=False, reverse=False, s0=h0, scales=scales, st=final, packed=packed)
    return o, ht


@recorded
@compiled_together
def scan_query_grad(
    plan: Scans, k: Tensor, v: Tensor, g: Tensor, h0: Tensor | None, scale: float, do: Tensor, *,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dq alone under a gate a key, and the final state [B, H, K, V] (packed [N, ..]) in float32; all operands
    contiguous."""
    dq = empty(*k.shape, dtype=k.dtype, device=k.device)
    states = plan.B if packing is None else packing.sequences
    ht = empty(states, plan.H, plan.K, plan.V, dtype=torch.float32, device=k.device)
    final: Tensor | None = ht
    packed = None
    if packing is not None:
        packed = _packed_chain(plan, packing, k, v, g, h0, reverse=False, s_in=1.0)
    elif plan.chained:
        h0, final = _chain(plan, k, v, g, h0, ht, reverse=False, s_in=1.0, s_st=1.0), None
    h = new_states(plan, k, packing)
    launch_states(plan, k, v, g, reverse=False, s0=h0, st=final, h=h, packed=packed)
    launch_grads(plan, None, k, v, do, g, h, None, dq, None, None, scale, packing=packing)
    return dq, ht


def scan_backward(
    plan: Scans, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, h0: Tensor | None, scale: float, do: Tensor,
    dht: Tensor | None, *, need_dg: bool, o: Tensor | None = None, packing: Packing | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients (dq, dk, dv, dg, dh0); dg as g and dh0 as h0 in float32; all operands contiguous.

    Without need_dg dg is None. `o`, if given, is filled with the outputs.

    The reverse passes carry the state's gradient divided by the scale, which they multiply their results with.
    """
    grads = _launch_backward(plan, q, k, v, g, h0, scale, do, dht, need_dg, o, None, None, packing=packing)
    dq, dk, dv, dg, _, dh0 = grads
    dq, dk, dv = (sum_heads(dx, 2, x.shape[2]) for dx, x in ((dq, q), (dk, k), (dv, v)))
    if g is not None and dg is not None:
        dg = sum_decay_heads(dg.sum((0, 1)) if plan.kind == "constant" else dg, g)
    return dq, dk, dv, dg, dh0


def scan_backward_before(
    plan: Scans, q: Tensor, k: Tensor, v: Tensor, g: Tensor, bonus: Tensor | None, own: Tensor | None,
    h0: Tensor | None, scale: float, do: Tensor, dht: Tensor | None, *, packing: Packing | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients (dq, dk, dv, dg, du, dh0) where the state is read before the update, in so far as `scan_backward`; du
    of the bonus [H, K]. No heads are shared."""
    grads = _launch_backward(plan, q, k, v, g, h0, scale, do, dht, True, None, bonus, own, packing=packing)
    dq, dk, dv, dg, du, dh0 = grads
    assert dg is not None
    return dq, dk, dv, dg, None if du is None else du.sum(0), dh0


@recorded
@compiled_together
def _launch_backward(
    plan: Scans, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, h0: Tensor | None, scale: float, do: Tensor,
    dht: Tensor | None, need_dg: bool, o: Tensor | None, bonus: Tensor | None, own: Tensor | None, *,
    packing: Packing | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """As `scan_backward`, but all have H heads, and dg of one decay a head has its steps still, [B, T, H]; before dh0
    stands what the gradient of the bonus is the sum of."""
    B, T, H, K = plan.B, plan.T, plan.H, plan.K
    dq, dk, dv = (empty(B, T, H, size, dtype=q.dtype, device=q.device) for size in (K, K, plan.V))
    wide: dict[str, Any] = dict(dtype=torch.float32, device=q.device)
    dh0 = None if h0 is None else empty(*h0.shape, **wide)
    down, final = 1.0 / scale, dh0
    ahead = back = None
    if packing is not None:
        ahead = _packed_chain(plan, packing, k, v, g, h0, reverse=False, s_in=1.0)
        back = _packed_chain(plan, packing, q, do, g, dht, reverse=True, s_in=down)
    elif plan.chained:
        h0 = _chain(plan, k, v, g, h0, None, reverse=False, s_in=1.0, s_st=1.0)
        dht = _chain(plan, q, do, g, dht, dh0, reverse=True, s_in=down, s_st=scale)
        down, final = 1.0, None
    if plan.kind == "vector":
        assert g is not None
        dg = empty(B, T, H, K, **wide) if need_dg else None
        du = None if bonus is None else new_bonus_grads(plan, q, packing)
        to_dv: dict[str, Any] = dict(scales=(down, scale, scale), st=final, packed=back, packing=packing, own=own)
        to_o: dict[str, Any] = dict(scales=(1.0, scale, 1.0), packed=ahead, packing=packing)
        if plan.walk is not None:
            if o is not None:
                launch_outputs(plan, q, k, v, g, o, reverse=False, s0=h0, **to_o)
            kept, f = new_kept(plan, q, packing)
            launch_states(plan, k, v, g, reverse=False, s0=h0, h=kept, f=f, packed=ahead)
            launch_outputs(plan, k, q, do, g, dv, reverse=True, s0=dht, **to_dv)
            more: dict[str, Any] = dict(scales=(down, scale), packed=back, bonus=bonus, du=du)
            launch_walk(plan, q, k, v, do, g, kept, f, dq, dk, dg, dht=dht, **more)
            return dq, dk, dv, dg, du, dh0
        h, d = new_states(plan, q, packing), new_states(plan, q, packing)
        if o is None:
            launch_states(plan, k, v, g, reverse=False, s0=h0, h=h, packed=ahead)
        else:
            launch_outputs(plan, q, k, v, g, o, reverse=False, s0=h0, h=h, **to_o)
        launch_outputs(plan, k, q, do, g, dv, reverse=True, s0=dht, h=d, **to_dv)
        launch_grads(plan, q, k, v, do, g, h, d, dq, dk, dg, scale, packing=packing, bonus=bonus, du=du)
        return dq, dk, dv, dg, du, dh0

    dg = sums = None
    parts = (PLAIN.value, PLAIN.value)
    if need_dg and plan.kind != "none":
        parts = (QUERIES.value, KEYS.value)
        dg, sums = empty(B, T, H, **wide), _new_sums(plan, q, packing)
    _launch(
        plan, do, v, k, g, dq, tall=True, reverse=False, s0=h0, scales=(1.0, scale, 1.0), part=parts[0], e=q, sums=sums,
        packed=ahead,
    )  # fmt: skip
    _launch(
        plan, v, do, q, g, dk, tall=True, reverse=True, s0=dht, scales=(down, scale, 1.0), part=parts[1], e=k,
        sums=sums, packed=back,
    )  # fmt: skip
    if sums is not None and dg is not None:
        _launch_row_grads(plan, q, k, v, do, g, sums, dg, scale, packing, ahead)
    _launch(plan, k, q, do, g, dv, tall=False, reverse=True, s0=dht, scales=(down, scale, scale), st=final, packed=back)
    return dq, dk, dv, dg, None, dh0

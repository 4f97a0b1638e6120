"""The decayed outer product in chunks of C steps, as matrix products for the CPU, forward and backward.

    S_t = diag(a_t) S_{t-1} diag(w_t) + k_t v_t^T        o_t = scale * S_t^T q_t        a_t = exp(g_t)  w_t = exp(gv_t)

With b and c the cumulative sums of g and gv inside a chunk, S_0 the state before it, D_C the gradient of the state
after it, and o' = o / scale, do' = scale * do:

    A_ij  = sum_k q_ik k_jk e^{b_ik - b_jk}
    o'_i  = e^{c_i} (S_0^T (q_i e^{b_i})) + sum_{j<=i} A_ij v_j e^{c_i - c_j}
    S_C   = diag(e^{b_C}) S_0 diag(e^{c_C}) + sum_j (k_j e^{b_C - b_j}) (v_j e^{c_C - c_j})^T
    D_0   = diag(e^{b_C}) D_C diag(e^{c_C}) + sum_i (q_i e^{b_i}) (do'_i e^{c_i})^T
    dg_t  = sum_v S_0 D_0 - sum_{s<t} (q_s dq_s - k_s dk_s)
    dgv_t = sum_k S_0 D_0 - sum_{s<t} (do'_s o'_s - v_s dv_s)

dg is per key (a scalar gate sums it over keys). Its sums stay inside the chunk, so that rounding errors do not add up
over T. `decay_factors` says how A is made of matrices without overflow, `decay_pairs` makes the sums over pairs.

Inside this file tensors are [B, H, NT, C, K]: NT chunks. A state or its gradient is kept at the anchor to which the
rows of its chunk are linked, `decays`'s `state_q` and `state_k` away from the chunk's boundary.
Source: Yang et al. 2023, arXiv:2312.06635, section 4; the anchors and the backward are derived here.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fla_compile.kernels.decay_factors import Decay, decays, flat, scores, sum_values
from fla_compile.kernels.decay_heads import output_heads, sum_decay_heads, sum_heads
from fla_compile.kernels.decay_layout import (
    Workspace,
    chunk_size,
    cut,
    gate_rows,
    paste,
    slab_sizes,
    slabs,
    take,
    wide,
    without_autocast,
)
from fla_compile.kernels.decay_pairs import add_row_sums, pair_gradients

__all__ = ["chunk_backward", "chunk_forward", "chunk_gradients"]

FORWARD = ("q", "k", "v", "g", "gv", "qs", "ks", "vs", "A", "U", "M")
BACKWARD = (*FORWARD, "do", "dos", "W", "E", "dA", "dv", "dq", "dk", "scratch")


@dataclass(frozen=True, slots=True)
class _Carry:
    """Factors between the anchors of states, [B, H, NT or NT + 1, K or 1, V or 1]; None is a factor of one."""

    across: Tensor | None  # from the anchor of the state before a chunk to that after it
    between: Tensor | None  # [NT + 1]: over the boundary, to the next chunk's anchor; first and last: to the ends of T


@without_autocast
def chunk_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    *,
    gv: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(o [B, T, H, V] in v's dtype, final state [B, H, K, V]).

    g is None, [H], [B, T, H] or [B, T, H, K]; gv is None or [B, T, H, V]. Without gv heads may be shared
    (`decay_heads`); H is that of o.
    """
    B, T, _, K = q.shape
    H, V = output_heads(q, k, v, g, initial_state), v.shape[-1]
    dtype, C = wide(q.dtype), chunk_size(T)
    o = torch.empty((B, T, H, V), dtype=v.dtype, device=v.device)
    final = torch.empty((B, H, K, V), dtype=dtype, device=v.device)
    gates = gate_rows(g, B, T)
    work = _workspace(FORWARD, q, H, V, C, dtype)
    for rows, state in slabs(B, H, T * max(K, V)):
        qc, kc, vc = (cut(take(x, rows, H), C, work, name) for name, x in (("q", q), ("k", k), ("v", v)))
        keys = decays(None if gates is None else cut(take(gates, rows, H), C, work, "g"), C)
        values = decays(None if gv is None else cut(gv[rows], C, work, "gv"), C)
        qc, qs = _linked(qc, keys, keys.chunk_q, work, "q")
        kc, ks = _linked(kc, keys, keys.chunk_k, work, "k")
        vc, vs = _linked(vc, values, values.chunk_k, work, "v")
        h0 = None if initial_state is None else initial_state[state]
        M = _states(ks, vs, _carry(keys, values), h0, final[state], work)
        A = _score_matrix(qc, kc, qs, ks, keys, work, "A")
        y = _product(qs, M, work, "U")
        add_row_sums(A, vc, vs, y, values)
        paste(y.mul_(scale), o[rows], values.row_factor)
    return o, final


def chunk_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    do: Tensor,
    dht: Tensor | None,
    *,
    need_dg: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dq, dk, dv, dg or None, dh0 or None), each in the dtype of what it is the gradient of."""
    dq, dk, dv, dg, _, dh0 = chunk_gradients(q, k, v, g, None, initial_state, scale, do, dht, need_dg=need_dg)
    return dq, dk, dv, dg, dh0


@without_autocast
def chunk_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    do: Tensor,
    dht: Tensor | None,
    *,
    need_dg: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dq, dk, dv, dg or None, dgv or None, dh0 or None), each in the dtype of what it is the gradient of."""
    B, T, _, K = q.shape
    H, V = output_heads(q, k, v, g, initial_state), v.shape[-1]
    dtype, C = wide(q.dtype), chunk_size(T)
    dq, dk, dv = (torch.empty((B, T, H, x.shape[-1]), dtype=x.dtype, device=x.device) for x in (q, k, v))
    dh0 = None if initial_state is None else torch.empty((B, H, K, V), dtype=initial_state.dtype, device=v.device)
    gates = gate_rows(g, B, T)
    dg = None if gates is None or not need_dg else torch.empty((B, T, H, gates.shape[-1]), dtype=dtype, device=v.device)
    dgv = None if gv is None or not need_dg else torch.empty(gv.shape, dtype=gv.dtype, device=v.device)
    work = _workspace(BACKWARD, q, H, V, C, dtype)
    for rows, state in slabs(B, H, T * max(K, V)):
        qc, kc, vc = (cut(take(x, rows, H), C, work, name) for name, x in (("q", q), ("k", k), ("v", v)))
        doc = torch.mul(cut(do[rows], C, work, "do"), scale, out=work("do", vc.shape))
        keys = decays(None if gates is None else cut(take(gates, rows, H), C, work, "g"), C)
        values = decays(None if gv is None else cut(gv[rows], C, work, "gv"), C)
        qc, qs = _linked(qc, keys, keys.chunk_q, work, "q")
        kc, ks = _linked(kc, keys, keys.chunk_k, work, "k")
        vc, vs = _linked(vc, values, values.chunk_k, work, "v")
        doc, dos = _linked(doc, values, values.chunk_q, work, "do")
        carry = _carry(keys, values)
        M = _states(ks, vs, carry, None if initial_state is None else initial_state[state], None, work)
        E, W = _state_gradients(qs, dos, carry, None if dht is None else dht[state], work)

        A = _score_matrix(qc, kc, qs, ks, keys, work, "A")
        dA = _score_matrix(doc, vc, dos, vs, values, work, "dA")
        dqc, dkc, dvc = _product(dos, M.mT, work, "dq"), _product(vs, E.mT, work, "dk"), _product(ks, E, work, "dv")
        yc = None if gv is None else _product(qs, M, work, "U")

        # E and W become S D, per key and value: what passes through a chunk whole, and all that enters it
        passed = E if carry.across is None else E.mul_(carry.across)
        entered = W.add_(passed)
        if dh0 is not None:
            D = entered[:, :, 0]
            dh0[state] = D if carry.between is None else D * carry.between[:, :, 0]
        several_leaves = [bool(side.levels) for side, grad in ((keys, dg), (values, dgv)) if grad is not None]
        if any(several_leaves):
            passed.mul_(M)
        if not all(several_leaves):
            entered.mul_(M)

        if gates is None:
            flat(dqc).baddbmm_(dA, flat(ks))
            flat(dkc).baddbmm_(dA.mT, flat(qs))
        else:
            through = None if dg is None else sum_values(passed if keys.levels else entered, gates)
            dgc = pair_gradients(qc, kc, qs, ks, dA, dqc, dkc, keys, through, work("scratch", qc.shape))
            if dg is not None and dgc is not None:
                paste(dgc, dg[rows])
        if gv is None or yc is None:
            flat(dvc).baddbmm_(A.mT, flat(doc))
        else:
            through = None if dgv is None else sum_values((passed if values.levels else entered).mT, gv)
            dgvc = pair_gradients(doc, vc, dos, vs, A, yc, dvc, values, through, work("scratch", vc.shape))
            if dgv is not None and dgvc is not None:
                paste(dgvc, dgv[rows])
        paste(dqc, dq[rows], keys.row_factor)
        paste(dkc, dk[rows], keys.column_factor)
        paste(dvc, dv[rows], values.column_factor)
    dq, dk, dv = (sum_heads(dx, 2, x.shape[2]) for dx, x in ((dq, q), (dk, k), (dv, v)))
    if g is None or dg is None:
        return dq, dk, dv, None, dgv, dh0
    if g.ndim < 4:
        dg = dg.squeeze(-1)
    if g.ndim == 1:
        dg = dg.sum((0, 1))
    return dq, dk, dv, sum_decay_heads(dg, g).to(g.dtype), dgv, dh0


def _states(
    ks: Tensor, vs: Tensor, carry: _Carry, initial_state: Tensor | None, final: Tensor | None, work: Workspace
) -> Tensor:
    """The state before each chunk, at its anchor, [B, H, NT, K, V]; `final` [B, H, K, V] is written to."""
    B, H, NT, _, K = ks.shape
    shape = (B, H, NT, K, vs.shape[-1])
    M, U = work("M", shape), _product(ks.mT, vs, work, "U")
    first = M[:, :, 0]
    if initial_state is None:
        first.zero_()
    elif carry.between is None:
        first.copy_(initial_state)
    else:
        torch.mul(initial_state, carry.between[:, :, 0], out=first)
    if carry.between is not None:
        U.mul_(carry.between[:, :, 1:])
    factor = _product_of(carry.across, None if carry.between is None else carry.between[:, :, 1:])
    outs = M.unbind(2)[1:] if final is None else (*M.unbind(2)[1:], final)
    _chain(first, U.unbind(2), None if factor is None else factor.unbind(2), outs)
    return M


def _state_gradients(
    qs: Tensor, dos: Tensor, carry: _Carry, dht: Tensor | None, work: Workspace
) -> tuple[Tensor, Tensor]:
    """E, the gradient of the state after each chunk, at that state's anchor, and W, what each chunk adds to it."""
    B, H, NT, _, K = qs.shape
    E, W = work("E", (B, H, NT, K, dos.shape[-1])), _product(qs.mT, dos, work, "W")
    last = E[:, :, -1]
    if dht is None:
        last.zero_()
    elif carry.between is None:
        last.copy_(dht)
    else:
        torch.mul(dht, carry.between[:, :, -1], out=last)
    outs = E.unbind(2)[-2::-1]
    added = W.unbind(2)[:0:-1]
    if carry.between is not None:
        torch.mul(W[:, :, 1:], carry.between[:, :, 1:-1], out=E[:, :, :-1])
        added = outs
    factor = _product_of(carry.across, None if carry.between is None else carry.between[:, :, :-1])
    _chain(last, added, None if factor is None else factor.unbind(2)[:0:-1], outs)
    return E, W


def _chain(state: Tensor, added: Iterable[Tensor], factors: Iterable[Tensor] | None, outs: Iterable[Tensor]) -> None:
    """outs_n = factors_n outs_{n-1} + added_n, from `state`; as many as there are outs."""
    if factors is None:
        for add, out in zip(added, outs, strict=False):
            state = torch.add(add, state, out=out)
    else:
        for add, factor, out in zip(added, factors, outs, strict=False):
            state = torch.addcmul(add, state, factor, out=out)


def _carry(keys: Decay, values: Decay) -> _Carry:
    across = [None if side.state_q is not None else side.total for side in (keys, values)]
    between = [_between(side) for side in (keys, values)]
    return _Carry(_outer(*across), _outer(*between))


def _between(decay: Decay) -> Tensor | None:
    """e to the sum from the middle of each chunk to the middle of the next, [B, H, NT + 1, K or 1, 1]."""
    if decay.state_q is None or decay.state_k is None:
        return None
    B, H, NT, K, _ = decay.state_q.shape
    factors = decay.state_q.new_ones((B, H, NT + 1, K, 1))
    factors[:, :, :-1].mul_(decay.state_q)
    factors[:, :, 1:].mul_(decay.state_k)
    return factors


def _outer(keys: Tensor | None, values: Tensor | None) -> Tensor | None:
    """[..., K or 1, 1] and [..., V, 1] -> [..., K or 1, V or 1]."""
    return _product_of(keys, None if values is None else values.mT)


def _product_of(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    if x is None or y is None:
        return y if x is None else x
    return x * y


def _score_matrix(q: Tensor, k: Tensor, qs: Tensor, ks: Tensor, decay: Decay, work: Workspace, name: str) -> Tensor:
    C = q.shape[-2]
    return scores(q, k, qs, ks, decay, 1.0, out=work(name, (flat(q).shape[0], C, C)))


def _linked(x: Tensor, decay: Decay, factor: Tensor | None, work: Workspace, name: str) -> tuple[Tensor, Tensor]:
    """x, contiguous where it is read more than once, and x times the factor to the chunk's boundary."""
    if not decay.levels and factor is not None:
        return x, torch.mul(x, factor, out=work(f"{name}s", x.shape))
    if not x.is_contiguous():
        x = work(name, x.shape).copy_(x)
    return x, x if factor is None else torch.mul(x, factor, out=work(f"{name}s", x.shape))


def _product(x: Tensor, y: Tensor, work: Workspace, name: str) -> Tensor:
    """x [B, H, NT, L, M] times y [B, H, NT, M, N]."""
    out = work(name, (*x.shape[:-1], y.shape[-1]))
    torch.bmm(flat(x), flat(y), out=flat(out))
    return out


def _workspace(names: tuple[str, ...], q: Tensor, H: int, V: int, C: int, dtype: torch.dtype) -> Workspace:
    B, T, _, K = q.shape
    b, h = slab_sizes(B, H, T * max(K, V))
    block = max(C * K, C * V, C * C, K * V)
    return Workspace(names, b * h * -(-T // C) * block, q, dtype)

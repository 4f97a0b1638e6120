"""The decayed outer product in chunks of C steps, as matrix products for the CPU, forward and backward.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t        a_t = exp(g_t)

With b the cumulative sum of g inside a chunk, S_0 the state before it and D_C the gradient of the state after it:

    o_i  = scale * S_0^T (q_i e^{b_i}) + sum_{j<=i} A_ij v_j       A_ij = scale * sum_k q_ik k_jk e^{b_ik - b_jk}
    S_C  = diag(e^{b_C}) S_0 + sum_j (k_j e^{b_C - b_j}) v_j^T
    D_0  = diag(e^{b_C}) D_C + scale * sum_i (q_i e^{b_i}) do_i^T
    dg_t = sum_{t<=s<=C} (q_s dq_s - k_s dk_s) + sum_v S_C D_C

The last line is per key (a scalar gate sums it over keys). Its sums stop at the end of the chunk, so that rounding
errors do not add up over T. The terms with i = j cancel in q dq - k dk and are left out before the subtraction.

How A is factored into two matrices depends on how strong the decay is. A block of n rows is *mild* when the decay
summed over each half of it is below `MILD`: then A = (q e^x)(k e^{-x})^T with x the sum counted from the middle of the
block. The largest n for which all blocks are mild is the *leaf*. Blocks on the diagonal are leaves; a block below the
diagonal, rows in one half of 2n and columns in the half before, is anchored at the boundary between the two, where
both factors are decays and cannot overflow. Sums run only over the steps between a row and its anchor, so a reset of
-100 leaves the precision of its neighbours alone. For such a block dg needs no subtraction either: the pair (i, j)
spans the boundary, and its share q_ik dq_ik = k_jk dk_jk belongs to every step after j up to i.

Inside this file tensors are [NT, B, H, C, K]: NT chunks outermost, so that the loop over states reads whole blocks.
Source: Yang et al. 2023, arXiv:2312.06635, section 4; the anchors and the backward are derived here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["chunk_backward", "chunk_forward"]

CHUNK = 64

# Largest sum of |g| over half a leaf: e^16 leaves room in float32, and sums to 16 keep 1e-6 of relative precision.
MILD = 16.0

# Elements of one operand that are worked on together: a slab and its temporaries should stay in cache.
SLAB = 1 << 18


@dataclass(frozen=True, slots=True)
class _Level:
    """Factors of the blocks below the diagonal: n rows after the boundary, n columns before it."""

    n: int
    after: Tensor  # [NT, B, H, C / 2n, n, K or 1]
    before: Tensor


@dataclass(frozen=True, slots=True)
class _Decay:
    """All exponentials of one slab. None stands for a factor of one."""

    leaf: int
    leaf_q: Tensor | None  # [NT, B, H, C, K or 1]
    leaf_k: Tensor | None
    levels: tuple[_Level, ...]
    # Row factors that link q and k to the chunk's boundaries. Where the chunk is one leaf these are the leaf's own
    # factors, and `state_q` and `state_k` carry the rest on the state, which is cheaper: [NT, B, H, K or 1, 1].
    chunk_q: Tensor | None
    chunk_k: Tensor | None
    state_q: Tensor | None
    state_k: Tensor | None
    total: Tensor | None  # e^{b_C}, [NT, B, H, K or 1, 1]


def chunk_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(o [B, T, H, V] in v's dtype, final state [B, H, K, V]); g is None, [H], [B, T, H] or [B, T, H, K]."""
    B, T, H, K = q.shape
    V = v.shape[-1]
    dtype, C = _wide(q.dtype), _chunk_size(T)
    o = torch.empty((B, T, H, V), dtype=v.dtype, device=v.device)
    final = torch.empty((B, H, K, V), dtype=dtype, device=v.device)
    gates = _gate_rows(g, B, T)
    for rows, state in _slabs(B, H, T * max(K, V)):
        qc, kc, vc = (_to_chunks(x[rows], C, dtype) for x in (q, k, v))
        decay = _decays(None if gates is None else _to_chunks(gates[rows], C, dtype), C)
        qs, ks, S = _states(qc, kc, vc, decay, None if initial_state is None else initial_state[state])
        final[state] = S[-1]
        A = _scores(qc, kc, qs, ks, decay, scale)
        y = torch.bmm(A, _flat(vc))
        y.baddbmm_(_flat(qs), _flat(_times(S[:-1], decay.state_q)), alpha=scale)
        _from_chunks(y.view_as(vc), o[rows])
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
    B, T, H, K = q.shape
    V = v.shape[-1]
    dtype, C = _wide(q.dtype), _chunk_size(T)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dh0 = None if initial_state is None else torch.empty((B, H, K, V), dtype=initial_state.dtype, device=v.device)
    gates = _gate_rows(g, B, T)
    dgates = None
    if gates is not None and need_dg:
        dgates = torch.empty(gates.shape, dtype=dtype, device=v.device)
    for rows, state in _slabs(B, H, T * max(K, V)):
        qc, kc, vc, doc = (_to_chunks(x[rows], C, dtype) for x in (q, k, v, do))
        decay = _decays(None if gates is None else _to_chunks(gates[rows], C, dtype), C)
        qs, ks, S = _states(qc, kc, vc, decay, None if initial_state is None else initial_state[state])
        D = _state_gradients(qs, doc, decay, scale, None if dht is None else dht[state])
        if dh0 is not None:
            dh0[state] = D[0]
        S_in, D_out = _flat(_times(S[:-1], decay.state_q)), _flat(_times(D[1:], decay.state_k))
        A = _scores(qc, kc, qs, ks, decay, scale)
        dvc = torch.bmm(A.mT, _flat(doc)).baddbmm_(_flat(ks), D_out)
        _from_chunks(dvc.view_as(vc), dv[rows])

        dA = torch.bmm(_flat(doc), _flat(vc).mT)
        own = (scale * dA.diagonal(dim1=1, dim2=2)).unsqueeze(-1)  # the terms with i = j
        dA.mul_(_causal(C, dA, scale, strict=True))
        dqc = torch.bmm(_flat(doc), S_in.mT).mul_(scale).view_as(qc)
        dkc = torch.bmm(_flat(vc), D_out.mT).view_as(kc)
        if decay.leaf == C:
            _flat(dqc).baddbmm_(dA, _flat(ks))
            _flat(dkc).baddbmm_(dA.mT, _flat(qs))
            dqc, dkc = _times_(dqc, decay.chunk_q), _times_(dkc, decay.chunk_k)
            if dgates is not None:
                dgc = _keys(qc * dqc, dgates).sub_(_keys(kc * dkc, dgates))
                dgc[..., -1, :] += _values(S[1:] * D[1:], dgates)
                _from_chunks(_suffix_sum_(dgc), dgates[rows])
        else:
            dgc = _blocked_gradients(qc, kc, decay, dA, dqc, dkc, dgates)
            if dgates is not None and decay.total is not None:
                dgc += _values(S[:-1] * D[1:] * decay.total, dgates).unsqueeze(-2)
                _from_chunks(dgc, dgates[rows])
        _flat(dqc).addcmul_(own, _flat(kc))
        _flat(dkc).addcmul_(own, _flat(qc))
        _from_chunks(dqc, dq[rows])
        _from_chunks(dkc, dk[rows])
    if g is None or dgates is None:
        return dq, dk, dv, None, dh0
    if g.ndim == 1:
        dgates = dgates.sum((0, 1))
    return dq, dk, dv, dgates.reshape(g.shape).to(g.dtype), dh0


def _states(
    q: Tensor, k: Tensor, v: Tensor, decay: _Decay, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k linked to the chunk's boundaries, and the state at each of them, [NT + 1, B, H, K, V]."""
    qs, ks = _times(q, decay.chunk_q), _times(k, decay.chunk_k)
    NT, B, H, _, K = k.shape
    V = v.shape[-1]
    S = torch.empty((NT + 1, B, H, K, V), dtype=k.dtype, device=k.device)
    if initial_state is None:
        S[0].zero_()
    else:
        S[0].copy_(initial_state)
    torch.bmm(_flat(ks).mT, _flat(v), out=_flat(S[1:]))
    if decay.state_k is not None:
        S[1:].mul_(decay.state_k)
    for n in range(NT):
        if decay.total is None:
            S[n + 1].add_(S[n])
        else:
            S[n + 1].addcmul_(S[n], decay.total[n])
    return qs, ks, S


def _state_gradients(qs: Tensor, do: Tensor, decay: _Decay, scale: float, dht: Tensor | None) -> Tensor:
    """The gradient of the state at each boundary, [NT + 1, B, H, K, V]."""
    NT, B, H, _, K = qs.shape
    V = do.shape[-1]
    D = torch.empty((NT + 1, B, H, K, V), dtype=qs.dtype, device=qs.device)
    if dht is None:
        D[-1].zero_()
    else:
        D[-1].copy_(dht)
    torch.bmm(_flat(qs).mT, _flat(do), out=_flat(D[:-1]))
    D[:-1].mul_(scale if decay.state_q is None else decay.state_q * scale)
    for n in range(NT - 1, -1, -1):
        if decay.total is None:
            D[n].add_(D[n + 1])
        else:
            D[n].addcmul_(D[n + 1], decay.total[n])
    return D


def _scores(q: Tensor, k: Tensor, qs: Tensor, ks: Tensor, decay: _Decay, scale: float) -> Tensor:
    """A [N, C, C]."""
    *_, C, K = q.shape
    n = decay.leaf
    if n == C:
        A = torch.bmm(_flat(qs), _flat(ks).mT)
        return A.mul_(_causal(C, A, scale, strict=False))
    leaf_q = _times(q, decay.leaf_q).view(-1, n, K)
    leaf_k = _times(k, decay.leaf_k).view(-1, n, K)
    leaf_A = torch.bmm(leaf_q, leaf_k.mT)
    leaf_A.mul_(_causal(n, leaf_A, scale, strict=False))
    A = torch.zeros((q.shape[:-2].numel(), C, C), dtype=q.dtype, device=q.device)
    _diagonal_blocks(A, n).copy_(leaf_A.view(-1, C // n, n, n))
    for level in decay.levels:
        m = level.n
        block = torch.matmul(_halves(q, m)[1] * level.after, (_halves(k, m)[0] * level.before).mT)
        _diagonal_blocks(A, 2 * m)[..., m:, :m].copy_(block.flatten(0, 2)).mul_(scale)
    return A


def _blocked_gradients(
    q: Tensor, k: Tensor, decay: _Decay, dA: Tensor, dq: Tensor, dk: Tensor, gates: Tensor | None
) -> Tensor:
    """dg without what passes through the chunk, and dq, dk in place, for a chunk of several leaves.

    On entry dq and dk hold what came through the states, relative to `chunk_q` and `chunk_k`.
    """
    *lead, _, K = q.shape
    n = decay.leaf
    dq, dk = _times_(dq, decay.chunk_q), _times_(dk, decay.chunk_k)
    dg = q.new_empty(0)
    if gates is not None:
        dg = _suffix_sum_(_keys(q * dq, gates))
        dg[..., 1:, :] += _prefix_sum_(_keys(k * dk, gates))[..., :-1, :]
    if decay.leaf_q is not None and decay.leaf_k is not None:
        dblock = _diagonal_blocks(dA, n).reshape(-1, n, n)
        dq_n = torch.bmm(dblock, (k * decay.leaf_k).view(-1, n, K)).view_as(q).mul_(decay.leaf_q)
        dk_n = torch.bmm(dblock.mT, (q * decay.leaf_q).view(-1, n, K)).view_as(k).mul_(decay.leaf_k)
        dq += dq_n
        dk += dk_n
        if gates is not None:
            db = _keys(q * dq_n, gates).sub_(_keys(k * dk_n, gates))
            dg += _suffix_sum_(db.unflatten(-2, (-1, n))).flatten(-3, -2)
    for level in decay.levels:
        m = level.n
        q_m, k_m = _halves(q, m)[1], _halves(k, m)[0]  # [NT, B, H, C / 2m, m, K]
        dblock = _diagonal_blocks(dA, 2 * m)[..., m:, :m].reshape(*lead, -1, m, m)
        dq_m = torch.matmul(dblock, k_m * level.before).mul_(level.after)
        dk_m = torch.matmul(dblock.mT, q_m * level.after).mul_(level.before)
        _halves(dq, m)[1].add_(dq_m)
        _halves(dk, m)[0].add_(dk_m)
        if gates is not None:
            before, after = _halves(dg, m)
            after += _suffix_sum_(_keys(q_m * dq_m, gates))
            before[..., 1:, :] += _prefix_sum_(_keys(k_m * dk_m, gates))[..., :-1, :]
    return dg


def _decays(g: Tensor | None, C: int) -> _Decay:
    """The factors for g [NT, B, H, C, K or 1], on the largest leaf on which they are safe."""
    if g is None:
        return _Decay(C, None, None, (), None, None, None, None, None)
    leaf = _leaf_size(g)
    leaf_q = leaf_k = None
    levels = []
    # up_i is the sum from the block's first row to row i, down_j that from row j + 1 to the block's end.
    up, down = g.clone(), torch.zeros_like(g)
    n = 1
    while n < C:
        (up_first, up_second), (down_first, _) = _halves(up, n), _halves(down, n)
        if 2 * n == leaf:
            leaf_q = torch.cat((-down_first, up_second), dim=-2).view_as(g).exp_()
            leaf_k = leaf_q.reciprocal()
            if leaf == C:
                state_q, state_k = (x[..., -1:, :].squeeze(-3).mT.exp() for x in (up_first, up_second))
                return _Decay(C, leaf_q, leaf_k, (), leaf_q, leaf_k, state_q, state_k, state_q * state_k)
        if n >= leaf:
            levels.append(_Level(n, up_second.exp(), down_first.exp()))
        down_first.add_(up_second[..., -1:, :])
        up_second.add_(up_first[..., -1:, :])
        n *= 2
    up.exp_()
    return _Decay(leaf, leaf_q, leaf_k, tuple(levels), up, down.exp_(), None, None, up[..., -1:, :].mT)


def _leaf_size(g: Tensor) -> int:
    """The largest power of two n <= C such that no half of a block of n rows decays (or grows) by more than MILD."""
    size = g.abs()
    n = g.shape[-2]
    while n > 1:
        if size.unflatten(-2, (-1, n // 2)).sum(-2).max().item() <= MILD:
            return n
        n //= 2
    return 1


def _prefix_sum_(x: Tensor) -> Tensor:
    """x_i := sum_{j<=i} x_j over dimension -2, a power of two, in place; additions in a tree."""
    n = 1
    while n < x.shape[-2]:
        first, second = _halves(x, n)
        second.add_(first[..., -1:, :])
        n *= 2
    return x


def _suffix_sum_(x: Tensor) -> Tensor:
    """x_i := sum_{j>=i} x_j over dimension -2, a power of two, in place; additions in a tree."""
    n = 1
    while n < x.shape[-2]:
        first, second = _halves(x, n)
        first.add_(second[..., :1, :])
        n *= 2
    return x


def _halves(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Views of the first and second n rows of each block of 2n: [..., C, K] -> twice [..., C / 2n, n, K]."""
    first, second = x.unflatten(-2, (-1, 2, n)).unbind(-3)
    return first, second


def _diagonal_blocks(x: Tensor, n: int) -> Tensor:
    """A view of the blocks on the diagonal: [N, C, C] -> [N, C / n, n, n]."""
    return x.unflatten(2, (-1, n)).unflatten(1, (-1, n)).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _causal(n: int, like: Tensor, scale: float, *, strict: bool) -> Tensor:
    return torch.full((n, n), scale, dtype=like.dtype, device=like.device).tril_(-1 if strict else 0)


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _times_(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x.mul_(factor)


def _flat(x: Tensor) -> Tensor:
    """[NT, B, H, C, K] -> [N, C, K]."""
    return x.flatten(0, 2)


def _keys(x: Tensor, gates: Tensor) -> Tensor:
    """x [..., K], summed over K where the gate is one for all keys."""
    return x.sum(-1, keepdim=True) if gates.shape[-1] == 1 else x


def _values(x: Tensor, gates: Tensor) -> Tensor:
    """[..., K, V] -> [..., K], or [..., 1] where the gate is one for all keys."""
    return x.sum((-2, -1)).unsqueeze(-1) if gates.shape[-1] == 1 else x.sum(-1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunk_size(T: int) -> int:
    C = 2  # a chunk of one row has no halves
    while C < min(T, CHUNK):
        C *= 2
    return C


def _slabs(B: int, H: int, elements: int) -> Iterator[tuple[tuple[slice, slice, slice], tuple[slice, slice]]]:
    """Indices into [B, T, H, ...] and [B, H, ...], for about SLAB elements at a time."""
    b = max(1, SLAB // max(1, elements * H))
    h = H if b > 1 else max(1, min(H, SLAB // max(1, elements)))
    for i in range(0, B, b):
        for j in range(0, H, h):
            rows, heads = slice(i, i + b), slice(j, j + h)
            yield (rows, slice(None), heads), (rows, heads)


def _gate_rows(g: Tensor | None, B: int, T: int) -> Tensor | None:
    """g as [B, T, H, K or 1]."""
    if g is None or g.ndim == 4:
        return g
    return (g.expand(B, T, -1) if g.ndim == 1 else g).unsqueeze(-1)


def _to_chunks(x: Tensor, C: int, dtype: torch.dtype) -> Tensor:
    """[B, T, H, K] -> [NT, B, H, C, K], contiguous, the last chunk filled with zeros: gates of one, keys of zero."""
    B, T, H, K = x.shape
    full, rest = T // C, T % C
    y = torch.empty((full + (rest > 0), B, H, C, K), dtype=dtype, device=x.device)
    if full:
        y[:full].copy_(x[:, : full * C].unflatten(1, (full, C)).permute(1, 0, 3, 2, 4))
    if rest:
        y[full, :, :, :rest].copy_(x[:, full * C :].transpose(1, 2))
        y[full, :, :, rest:].zero_()
    return y


def _from_chunks(x: Tensor, y: Tensor) -> None:
    """[NT, B, H, C, K] into y [B, T, H, K]; what lies beyond T is dropped."""
    T, C = y.shape[1], x.shape[3]
    full, rest = T // C, T % C
    if full:
        y[:, : full * C].unflatten(1, (full, C)).copy_(x[:full].permute(1, 0, 3, 2, 4))
    if rest:
        y[:, full * C :].copy_(x[full, :, :, :rest].transpose(1, 2))

"""The decayed delta in chunks of C steps, as matrix products for CPU and CUDA, forward and backward.

Every family is one recurrence with a rank-one erase, read either after the decay (delta_rule, gated_delta_rule, kda)
or before it (dplr):

    S_t = diag(a_t) S_{t-1} + b_t u_t^T [+ k_t v_t^T]        o_t = scale * S_t^T q_t        a_t = exp(g_t)

    delta families    b = k,  c = -beta k,  u_t = beta_t v_t + (diag(a_t) S_{t-1})^T c_t,  no further write
    dplr              u_t = S_{t-1}^T c_t,  and k v^T is written beside it

With S_0 the state before a chunk and A^{rw}_ij the decayed inner product of reader r_i and writer w_j, j <= i
(`delta_links`), unrolling the state gives for the rows u of the chunk a unit lower-triangular system (the WY, or UT,
representation of a product of rank-one updates):

    U = R + c^ S_0 + A^{cb} U      R = beta v, or A^{ck} V in dplr      c^, q^ linked to the chunk's start
      = U_0 + W S_0                U_0 = M R,  W = M c^,  M = (I - A^{cb})^{-1}
    O = scale * (q^ S_0 + A^{qb} U [+ A^{qk} V])
    S_C = diag(e^{b_C}) S_0 + b^^T U [+ k^^T V]                         b^, k^ linked to the chunk's end

A^{cb} is strictly lower: after the decay its diagonal is removed, before the decay the reader c_i stands at step
i - 1, so c is moved up a row, read like q, and the result is moved down a row. Only U = U_0 + W S_0 and S_C are
sequential, over chunks.

Backward, with D_C the gradient of S_C and dO that of O times scale:

    Z   = M^T (A^{qb}^T dO + b^ D_C)                                    the gradient of R and of c^ S_0
    D_0 = diag(e^{b_C}) D_C + q^^T dO + c^^T Z
    dA^{q.} = dO U^T, dO V^T      dA^{c.} = Z U^T, Z V^T                for writers b and k
    dq^ = dO S_0^T                dc^ = Z S_0^T
    db^ = U D_C^T                 dk^ = V D_C^T

so that again only Z and D_0 are sequential. States are kept at chunk boundaries alone.
Tensors are [NT, B, H, C, K]: NT chunks outermost, so that the loop over states reads whole blocks.
Source: Yang et al. 2024, arXiv:2406.06484 and arXiv:2412.06464; the backward is derived here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fla_compile.kernels.decay_factors import diagonal_blocks, flat, times, times_
from fla_compile.kernels.decay_layout import chunk_size, from_chunks, slabs, to_chunks, wide
from fla_compile.kernels.delta_links import Links, boundary_gate_gradient, make_links, score_gradients, scores

__all__ = ["Gradients", "Operands", "chunk_backward", "chunk_forward"]

# Rows that one triangular solve inverts; larger inverses are put together from these by products.
SOLVE = 32

# A GPU wants more work in one product than what fits a CPU's cache.
CUDA_SLABS = 64


@dataclass(frozen=True, slots=True)
class Operands:
    """beta is set in the delta families, b and c in dplr; g is None, [B, T, H] or [B, T, H, K]."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None
    b: Tensor | None
    c: Tensor | None
    initial_state: Tensor | None
    scale: float


@dataclass(frozen=True, slots=True)
class Gradients:
    """Each in the dtype of what it is the gradient of; None where there is no such operand, or no wish for dg."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None
    b: Tensor | None
    c: Tensor | None
    initial_state: Tensor | None


@dataclass(frozen=True, slots=True)
class _Slab:
    """Operands of one slab in chunks."""

    k: Tensor  # [NT, B, H, C, K]
    v: Tensor  # [NT, B, H, C, V]
    beta: Tensor | None  # [NT, B, H, C, 1]
    c: Tensor
    readers: tuple[Tensor, Tensor]  # q, and c placed where it is read
    writers: tuple[Tensor, ...]  # b, and k in dplr
    gates: Tensor | None  # [NT, B, H, C, K or 1]
    links: Links


@dataclass(frozen=True, slots=True)
class _Solved:
    A: list[list[Tensor]]  # by reader and writer, [N, C, C]; the diagonal of A^{cb} counts only in dplr
    M: Tensor  # [N, C, C]
    to_start: tuple[Tensor, Tensor]  # q^ and c^
    to_end: tuple[Tensor, ...]  # b^ and k^
    values: tuple[Tensor, ...]  # U and V, what the writers write
    S: Tensor  # the state at each boundary, [NT + 1, B, H, K, V]


def chunk_forward(x: Operands) -> tuple[Tensor, Tensor]:
    """(o [B, T, H, V] in v's dtype, final state [B, H, K, V])."""
    B, T, H, K = x.q.shape
    V = x.v.shape[-1]
    o = torch.empty((B, T, H, V), dtype=x.v.dtype, device=x.v.device)
    final = torch.empty((B, H, K, V), dtype=wide(x.q.dtype), device=x.v.device)
    for rows, state in _parts(x):
        slab = _load(x, rows)
        solved = _solve(slab, None if x.initial_state is None else x.initial_state[state])
        final[state] = solved.S[-1]
        y = torch.bmm(flat(solved.to_start[0]), flat(solved.S[:-1]))
        for A, value in zip(solved.A[0], solved.values, strict=True):
            y.baddbmm_(A, flat(value))
        from_chunks(y.mul_(x.scale).view_as(slab.v), o[rows])
    return o, final


def chunk_backward(x: Operands, do: Tensor, dht: Tensor | None, *, need_dg: bool = True) -> Gradients:
    """Gradients of all operands, from those of o and of the final state."""
    grads = Gradients(
        *(torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in (x.q, x.k, x.v)),
        *(
            None if y is None else torch.empty(y.shape, dtype=y.dtype, device=y.device)
            for y in (x.g if need_dg else None, x.beta, x.b, x.c, x.initial_state)
        ),
    )
    for rows, state in _parts(x):
        slab = _load(x, rows)
        solved = _solve(slab, None if x.initial_state is None else x.initial_state[state])
        doc = to_chunks(do[rows], slab.k.shape[-2], slab.k.dtype).mul_(x.scale)
        Z, D = _adjoint(slab, solved, doc, None if dht is None else dht[state])
        if grads.initial_state is not None:
            grads.initial_state[state] = D[0]
        (dq, dc), dwriters, dgates = _product_gradients(slab, solved, doc, Z, D, need_dg)
        from_chunks(dq, grads.q[rows])
        if grads.g is not None and dgates is not None:
            from_chunks(dgates, _gate_view(grads.g)[rows])
        if slab.beta is not None and grads.beta is not None:
            dbeta = (Z * slab.v).sum(-1, keepdim=True).sub_((slab.k * dc).sum(-1, keepdim=True))
            from_chunks(dbeta, grads.beta.unsqueeze(-1)[rows])
            from_chunks(dwriters[0].addcmul_(dc, slab.beta, value=-1), grads.k[rows])
            from_chunks(Z.mul_(slab.beta), grads.v[rows])
        elif grads.b is not None and grads.c is not None:
            dv = torch.bmm(solved.A[0][1].mT, flat(doc)).baddbmm_(solved.A[1][1].mT, flat(_moved_up(Z)))
            dv.baddbmm_(flat(solved.to_end[1]), flat(D[1:]))
            from_chunks(dv.view_as(slab.v), grads.v[rows])
            # the first step of a chunk reads the state before the chunk, as it is
            first = torch.matmul(solved.S[:-1], Z[..., 0, :, None]).squeeze(-1)
            from_chunks(_moved_down(dc, first), grads.c[rows])
            from_chunks(dwriters[0], grads.b[rows])
            from_chunks(dwriters[1], grads.k[rows])
    return grads


def _load(x: Operands, rows: tuple[slice, slice, slice]) -> _Slab:
    dtype, C = wide(x.q.dtype), chunk_size(x.q.shape[1])
    q, k, v = (to_chunks(y[rows], C, dtype) for y in (x.q, x.k, x.v))
    gates = None if x.g is None else to_chunks(_gate_view(x.g)[rows], C, dtype)
    links = make_links(gates, k)
    if x.beta is not None:
        beta = to_chunks(x.beta.unsqueeze(-1)[rows], C, dtype)
        c = (k * beta).neg_()
        return _Slab(k, v, beta, c, (q, c), (k,), gates, links)
    assert x.b is not None and x.c is not None
    b, c = (to_chunks(y[rows], C, dtype) for y in (x.b, x.c))
    return _Slab(k, v, None, c, (q, _moved_up(c)), (b, k), gates, links)


def _solve(slab: _Slab, initial_state: Tensor | None) -> _Solved:
    links = slab.links
    A = [[scores(links, reader, writer) for writer in slab.writers] for reader in slab.readers]
    q_start, c_start = (times(reader, links.read) for reader in slab.readers)
    if slab.beta is not None:
        R = slab.v * slab.beta
    else:
        c_start = _moved_down(c_start, slab.c[..., 0, :])
        R = _moved_down(torch.bmm(A[1][1], flat(slab.v)).view_as(slab.v), 0)
    to_end = tuple(times(writer, links.write) for writer in slab.writers)
    M = _inverse(A[1][0] if slab.beta is not None else _moved_down(A[1][0], 0))
    U = torch.bmm(M, flat(R)).view_as(R)
    W = torch.bmm(M, flat(c_start)).view_as(c_start)

    NT, B, H, _, K = c_start.shape
    S = torch.empty((NT + 1, B, H, K, R.shape[-1]), dtype=R.dtype, device=R.device)
    if initial_state is None:
        S[0].zero_()
    else:
        S[0].copy_(initial_state)
    if slab.beta is None:
        torch.bmm(flat(to_end[1]).mT, flat(slab.v), out=flat(S[1:]))
    else:
        S[1:].zero_()
    _advance(S, U, W, to_end[0], links.total, range(NT), 0)
    return _Solved(A, M, (q_start, c_start), to_end, (U,) if slab.beta is not None else (U, slab.v), S)


def _adjoint(slab: _Slab, solved: _Solved, do: Tensor, dht: Tensor | None) -> tuple[Tensor, Tensor]:
    """Z [NT, B, H, C, V] and the gradient of the state at each boundary, [NT + 1, B, H, K, V]."""
    q_start, c_start = solved.to_start
    Z = torch.bmm(solved.M.mT, torch.bmm(solved.A[0][0].mT, flat(do))).view_as(do)
    Y = torch.bmm(solved.M.mT, flat(solved.to_end[0])).view_as(c_start)
    D = torch.empty_like(solved.S)
    if dht is None:
        D[-1].zero_()
    else:
        D[-1].copy_(dht)
    torch.bmm(flat(q_start).mT, flat(do), out=flat(D[:-1]))
    _advance(D, Z, Y, c_start, slab.links.total, range(len(Z) - 1, -1, -1), 1)
    return Z, D


def _advance(S: Tensor, U: Tensor, W: Tensor, writer: Tensor, total: Tensor | None, chunks: range, source: int) -> None:
    """For each chunk n in turn, in place: U_n += W_n S, and S' += diag(total_n) S + writer_n^T U_n.

    S is the state at boundary n + source, S' that at the chunk's other boundary: time runs backwards for source = 1.
    """
    U, W, writer = U.flatten(1, 2), W.flatten(1, 2), writer.flatten(1, 2)
    for n in chunks:
        now, then = S[n + source].flatten(0, 1), S[n + 1 - source].flatten(0, 1)
        U[n].baddbmm_(W[n], now)
        if total is None:
            then.add_(now)
        else:
            then.addcmul_(now, total[n].flatten(0, 1))
        then.baddbmm_(writer[n].mT, U[n])


def _product_gradients(
    slab: _Slab, solved: _Solved, do: Tensor, Z: Tensor, D: Tensor, need_dg: bool
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Gradients of the readers, the writers and the gates."""
    links = slab.links
    read_out = (do, Z if slab.beta is not None else _moved_up(Z))
    dA = [[torch.bmm(flat(dy), flat(value).mT) for value in solved.values] for dy in read_out]
    if slab.beta is not None:
        dA[1][0].tril_(-1)
    dreaders = [times_(torch.matmul(dy, solved.S[:-1].mT), links.read) for dy in read_out]
    dwriters = [times_(torch.matmul(value, D[1:].mT), links.write) for value in solved.values]
    dgates = None
    if slab.gates is not None and need_dg:
        through = solved.S[:-1] * D[1:]
        dgates = boundary_gate_gradient(links, slab.readers, slab.writers, dreaders, dwriters, through, slab.gates)
    score_gradients(links, slab.readers, slab.writers, solved.A, dA, dreaders, dwriters, dgates)
    return dreaders, dwriters, dgates


def _inverse(A: Tensor) -> Tensor:
    """(I - A)^{-1} for the strictly lower part of A [N, C, C], the rest of which is not read; C is a power of two.

    Diagonal blocks by substitution, then [[P, 0], [Q, R]]^{-1} = [[P', 0], [-R' Q P', R']] with ' the inverse. A sum
    of powers of A would be cheaper, but its terms can be larger than the inverse by orders of magnitude.
    """
    C = A.shape[-1]
    n = min(SOLVE, C)
    blocks = -diagonal_blocks(A, n)
    eye = torch.eye(n, dtype=A.dtype, device=A.device).expand(blocks.shape)
    M = torch.zeros_like(A)
    diagonal_blocks(M, n).copy_(torch.linalg.solve_triangular(blocks, eye, upper=False, unitriangular=True))
    while n < C:
        pairs, found = diagonal_blocks(A, 2 * n), diagonal_blocks(M, 2 * n)
        inner = torch.matmul(pairs[..., n:, :n], found[..., :n, :n])
        found[..., n:, :n].copy_(torch.matmul(found[..., n:, n:], inner))
        n *= 2
    return M


def _moved_down(x: Tensor, first: Tensor | float) -> Tensor:
    """Row i of x [..., C, K] in row i + 1, `first` in row 0; the last row is dropped."""
    y = torch.empty_like(x)
    y[..., 1:, :] = x[..., :-1, :]
    y[..., 0, :] = first
    return y


def _moved_up(x: Tensor) -> Tensor:
    """Row i + 1 of x [..., C, K] in row i, zeros in the last row."""
    y = torch.empty_like(x)
    y[..., :-1, :] = x[..., 1:, :]
    y[..., -1, :] = 0
    return y


def _gate_view(g: Tensor) -> Tensor:
    """A view of g as [B, T, H, K or 1]."""
    return g if g.ndim == 4 else g.unsqueeze(-1)


def _parts(x: Operands) -> Iterator[tuple[tuple[slice, slice, slice], tuple[slice, slice]]]:
    _, T, H, K = x.q.shape
    size = T * max(K, x.v.shape[-1])
    return slabs(x.q.shape[0], H, size // CUDA_SLABS if x.q.is_cuda else size)

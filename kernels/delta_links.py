"""What decay leaves between two steps of a chunk: inner products of readers and writers, and their gradients.

A *writer* w_j adds a row to the state at step j, a *reader* r_i reads the state after step i. With b the cumulative
sum of g inside the chunk of C steps,

    A_ij = sum_k r_ik w_jk e^{b_ik - b_jk}   for j <= i, else 0

and the chunk's boundaries are linked to readers by e^{b_i} and to writers by e^{b_C - b_j}.

No decay and a decay that is one for all keys: the exponentials leave the sum, A = (r w^T) * P, with P_ij the
exponential of sum_{j<s<=i} g_s. That sum is built from blocks of 1, 2, 4, ... rows, never as a difference of two
cumulative sums, so a reset of -1e4 leaves the precision of its neighbours alone and no exponent exceeds what the
recurrence itself would see. Its gradient needs no subtraction either: with E = dA * A,

    dg_s = sum_{j<s<=i} E_ij

A decay for each key: the leaves and levels of `decay_factors`, which factor A over blocks, each anchored inside itself.

Inside this file tensors are [NT, B, H, C, K]: NT chunks outermost; N = NT * B * H.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fla_compile.kernels import decay_factors
from fla_compile.kernels.decay_factors import (
    Decay,
    decays,
    diagonal_blocks,
    flat,
    halves_of,
    prefix_sum_,
    suffix_sum_,
    sum_keys,
    sum_values,
    times,
)

__all__ = ["Links", "boundary_gate_gradient", "make_links", "score_gradients", "scores"]


@dataclass(frozen=True, slots=True)
class Links:
    """All exponentials of one slab. Exactly one of `pair` and `keys` is set; None elsewhere is a factor of one."""

    pair: Tensor | None  # e^{b_i - b_j} for j <= i, else 0: [N, C, C], or [C, C] without decay
    keys: Decay | None
    read: Tensor | None  # e^{b_i}, [NT, B, H, C, K or 1]
    write: Tensor | None  # e^{b_C - b_j}
    total: Tensor | None  # e^{b_C}, [NT, B, H, K or 1, 1]


def make_links(g: Tensor | None, like: Tensor) -> Links:
    """g is None or [NT, B, H, C, K or 1]; `like` is any operand [NT, B, H, C, K]."""
    C = like.shape[-2]
    if g is None:
        return Links(torch.ones((C, C), dtype=like.dtype, device=like.device).tril_(), None, None, None, None)
    if g.shape[-1] == 1:
        return _scalar_links(g)
    decay = decays(g, C)
    read, write = decay.chunk_q, decay.chunk_k
    if decay.state_q is not None and decay.state_k is not None and read is not None and write is not None:
        # the chunk is one leaf: its own factors count from the middle
        read, write = read * decay.state_q.mT, write * decay.state_k.mT
    return Links(None, decay, read, write, decay.total)


def scores(links: Links, reader: Tensor, writer: Tensor) -> Tensor:
    """A [N, C, C]."""
    if links.pair is not None:
        return torch.bmm(flat(reader), flat(writer).mT).mul_(links.pair)
    decay = links.keys
    assert decay is not None
    if decay.leaf < reader.shape[-2]:
        return decay_factors.scores(reader, writer, reader, writer, decay, 1.0)
    return decay_factors.scores(reader, writer, times(reader, decay.leaf_q), times(writer, decay.leaf_k), decay, 1.0)


def score_gradients(
    links: Links,
    readers: Sequence[Tensor],
    writers: Sequence[Tensor],
    A: Sequence[Sequence[Tensor]],
    dA: Sequence[Sequence[Tensor]],
    dreaders: Sequence[Tensor],
    dwriters: Sequence[Tensor],
    dg: Tensor | None,
) -> None:
    """Adds to dreaders, dwriters and dg what passes through A[reader][writer]; overwrites dA.

    Entries of dA above the diagonal are ignored.
    """
    if links.pair is None:
        assert links.keys is not None
        _key_gradients(links.keys, readers, writers, dA, dreaders, dwriters, dg)
        return
    if dg is not None:
        products = [a * da for row, drow in zip(A, dA, strict=True) for a, da in zip(row, drow, strict=True)]
        dg += _pair_gate_gradient(sum(products[1:], products[0])).view_as(dg)
    for x, reader in enumerate(readers):
        for y, writer in enumerate(writers):
            masked = dA[x][y].mul_(links.pair)
            flat(dreaders[x]).baddbmm_(masked, flat(writer))
            flat(dwriters[y]).baddbmm_(masked.mT, flat(reader))


def boundary_gate_gradient(
    links: Links,
    readers: Sequence[Tensor],
    writers: Sequence[Tensor],
    dreaders: Sequence[Tensor],
    dwriters: Sequence[Tensor],
    through: Tensor,
    gates: Tensor,
) -> Tensor:
    """dg [NT, B, H, C, K or 1] of what enters or leaves the chunk, from gradients that came through its boundaries.

    `through` [NT, B, H, K, V] is the state at the chunk's start times the gradient of the state at its end.
    """
    dg = suffix_sum_(_key_sum(readers, dreaders, gates))
    dg[..., 1:, :] += prefix_sum_(_key_sum(writers, dwriters, gates))[..., :-1, :]
    dg += sum_values(times(through, links.total), gates).unsqueeze(-2)
    return dg


def _scalar_links(g: Tensor) -> Links:
    C = g.shape[-2]
    # up_i is the sum from the block's first row to row i, down_j that from row j + 1 to the block's end.
    up, down = g.clone(), torch.zeros_like(g)
    between = g.new_zeros((g.shape[:-2].numel(), C, C))
    n = 1
    while n < C:
        (up_first, up_second), (down_first, _) = halves_of(up, n), halves_of(down, n)
        block = up_second + down_first.mT  # [NT, B, H, C / 2n, n, n]
        diagonal_blocks(between, 2 * n)[..., n:, :n].copy_(block.flatten(0, 2))
        down_first.add_(up_second[..., -1:, :])
        up_second.add_(up_first[..., -1:, :])
        n *= 2
    _exp_(up)
    return Links(_exp_(between).tril_(), None, up, _exp_(down), up[..., -1:, :])


def _exp_(x: Tensor) -> Tensor:
    """e^x in place, with zero for what would be subnormal: there a CPU's exp takes 15 to 40 times as long."""
    tiny = torch.finfo(x.dtype).tiny
    lowest = math.ceil(math.log(tiny))
    return torch.threshold_(x.clamp_(min=lowest).exp_(), 1.01 * math.exp(lowest), 0.0)


def _pair_gate_gradient(E: Tensor) -> Tensor:
    """sum_{j<s<=i} E_ij for each s, [N, C]."""
    C = E.shape[-1]
    lower = torch.ones((C, C), dtype=E.dtype, device=E.device).tril_()
    before = torch.matmul(E, lower.tril(-1).mT)  # sum_{j<s} E_ij
    return before.mul_(lower).sum(-2)


def _key_gradients(
    decay: Decay,
    readers: Sequence[Tensor],
    writers: Sequence[Tensor],
    dA: Sequence[Sequence[Tensor]],
    dreaders: Sequence[Tensor],
    dwriters: Sequence[Tensor],
    dg: Tensor | None,
) -> None:
    n = decay.leaf
    pairs = [(x, y) for x in range(len(readers)) for y in range(len(writers))]
    for x, y in pairs:
        # The terms with i = j have no decay: they are kept out of dg before anything is subtracted there.
        own = dA[x][y].diagonal(dim1=1, dim2=2).unsqueeze(-1)
        flat(dreaders[x]).addcmul_(own, flat(writers[y]))
        flat(dwriters[y]).addcmul_(own, flat(readers[x]))
        dA[x][y].tril_(-1)
    if decay.leaf_q is not None and decay.leaf_k is not None:
        blocks = [[diagonal_blocks(da, n).flatten(0, 1) for da in row] for row in dA]
        r_n = [(r * decay.leaf_q).view(-1, n, r.shape[-1]) for r in readers]
        w_n = [(w * decay.leaf_k).view(-1, n, w.shape[-1]) for w in writers]
        dr, dw = _block_gradients(blocks, r_n, w_n)
        dr = [x.view_as(readers[0]).mul_(decay.leaf_q) for x in dr]
        dw = [x.view_as(writers[0]).mul_(decay.leaf_k) for x in dw]
        _add(dreaders, dr)
        _add(dwriters, dw)
        if dg is not None:
            db = _key_sum(readers, dr, dg).sub_(_key_sum(writers, dw, dg))
            dg += suffix_sum_(db.unflatten(-2, (-1, n))).flatten(-3, -2)
    for level in decay.levels:
        m = level.n
        # [NT, B, H, C / 2m, m, K]: rows after the boundary read, rows before it wrote.
        r_m, w_m = [halves_of(r, m)[1] for r in readers], [halves_of(w, m)[0] for w in writers]
        lead = readers[0].shape[:3]
        blocks = [[diagonal_blocks(da, 2 * m)[..., m:, :m].unflatten(0, lead) for da in row] for row in dA]
        dr, dw = _block_gradients(blocks, [r * level.after for r in r_m], [w * level.before for w in w_m])
        dr, dw = [x.mul_(level.after) for x in dr], [x.mul_(level.before) for x in dw]
        _add([halves_of(d, m)[1] for d in dreaders], dr)
        _add([halves_of(d, m)[0] for d in dwriters], dw)
        if dg is not None:
            before, after = halves_of(dg, m)
            after += suffix_sum_(_key_sum(r_m, dr, dg))
            before[..., 1:, :] += prefix_sum_(_key_sum(w_m, dw, dg))[..., :-1, :]


def _block_gradients(
    dA: Sequence[Sequence[Tensor]], readers: Sequence[Tensor], writers: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Those of readers and writers for A = reader writer^T, block by block."""
    dreaders = [_sum_of_products(row, writers) for row in dA]
    dwriters = [_sum_of_products([row[y].mT for row in dA], readers) for y in range(len(writers))]
    return dreaders, dwriters


def _sum_of_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    total = _product(left[0], right[0])
    for x, y in zip(left[1:], right[1:], strict=True):
        total += _product(x, y)
    return total


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x y; the smallest as sums of outer products, in which they take a tenth of the time."""
    m = x.shape[-1]
    if m > 2:
        return torch.matmul(x, y)
    total = x[..., :1] * y[..., :1, :]
    for j in range(1, m):
        total.addcmul_(x[..., j : j + 1], y[..., j : j + 1, :])
    return total


def _key_sum(xs: Sequence[Tensor], dxs: Sequence[Tensor], gates: Tensor) -> Tensor:
    """The sum of x dx over `xs`, over keys too where the gate is one for all keys."""
    total = xs[0] * dxs[0]
    for x, dx in zip(xs[1:], dxs[1:], strict=True):
        total.addcmul_(x, dx)
    return sum_keys(total, gates)


def _add(targets: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    for target, part in zip(targets, parts, strict=True):
        target += part

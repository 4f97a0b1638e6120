"""How a decay inside a chunk becomes factors of two matrices, whatever its strength.

With b the cumulative sum of g over the C rows of a chunk, pairs of rows are linked by

    A_ij = sum_k x_ik y_jk e^{b_ik - b_jk}        j <= i

How A is factored into two matrices depends on how strong the decay is. A block of n rows is *mild* when the decay
summed over each half of it is below `MILD`, where steps that grow, up to `GROWN` of them, weigh more: then A = (x
e^s)(y e^{-s})^T with s the sum counted from the middle of the block. The largest n for which all blocks are mild is the
*leaf*. Blocks on the diagonal are leaves; a block below the diagonal, rows in one half of 2n and columns in the half
before, is anchored at the boundary between the two, where both factors are decays and cannot overflow. Sums run only
over the steps between a row and its anchor, so a reset of -100 leaves the precision of its neighbours alone.

Tensors are [..., C, K] with three leading dimensions of which this file knows nothing; N is their product.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Largest sum of |g| over half a leaf: e^16 leaves room in float32, and sums to 16 keep 1e-6 of relative precision.
MILD = 16.0
# Largest sum of the steps of half a leaf that grow: of the pairs of a leaf, all that do not span a step cancel in its
# gradient, to 2^-24 of the largest.
GROWN = 3.0


@dataclass(frozen=True, slots=True)
class Level:
    """Factors of the blocks below the diagonal: n rows after the boundary, n columns before it."""

    n: int
    after: Tensor  # [..., C / 2n, n, K or 1]
    before: Tensor


@dataclass(frozen=True, slots=True)
class Decay:
    """All exponentials of one slab. None stands for a factor of one."""

    leaf: int
    leaf_q: Tensor | None  # [..., C, K or 1]
    leaf_k: Tensor | None
    levels: tuple[Level, ...]
    # Row factors that link q and k to the chunk's boundaries. Where the chunk is one leaf these are the leaf's own
    # factors, and `state_q` and `state_k` carry the rest on the state, which is cheaper: [..., K or 1, 1].
    chunk_q: Tensor | None
    chunk_k: Tensor | None
    state_q: Tensor | None
    state_k: Tensor | None
    total: Tensor | None  # e^{b_C}, [..., K or 1, 1]

    @property
    def row_factor(self) -> Tensor | None:
        """What sums over a chunk of one leaf are still to be multiplied by."""
        return None if self.levels else self.chunk_q

    @property
    def column_factor(self) -> Tensor | None:
        return None if self.levels else self.chunk_k


def decays(g: Tensor | None, C: int) -> Decay:
    """The factors for g [..., C, K or 1], on the largest leaf on which they are safe."""
    if g is None:
        return Decay(C, None, None, (), None, None, None, None, None)
    if g.device.type != "cpu":
        return _blocked_decays(g, 1)
    sums = torch.empty(g.shape, dtype=g.dtype, device=g.device).copy_(g)
    first, second = (x.squeeze(-3) for x in halves_of(sums, C // 2))
    prefix_sum_(sums.unflatten(-2, (2, -1)))
    low, high = (x.item() for x in sums.aminmax())
    mild = high - low <= MILD and -MILD <= low and high <= MILD  # NaN is not mild either
    if not mild or (g.max().item() > 0 and g.clamp(min=0).sum(-2).max().item() > 2 * GROWN):
        return _blocked_decays(g, leaf_size(g))
    state_q, state_k = (x[..., -1:, :].mT.exp() for x in (first, second))
    first.sub_(first[..., -1:, :].clone())
    leaf_q = sums.exp_()
    leaf_k = leaf_q.reciprocal()
    return Decay(C, leaf_q, leaf_k, (), leaf_q, leaf_k, state_q, state_k, state_q * state_k)


def _blocked_decays(g: Tensor, leaf: int) -> Decay:
    C = g.shape[-2]
    leaf_q = leaf_k = None
    levels = []
    # up_i is the sum from the block's first row to row i, down_j that from row j + 1 to the block's end.
    up, down = g.clone(), torch.zeros_like(g)
    n = 1
    while n < C:
        (up_first, up_second), (down_first, _) = halves_of(up, n), halves_of(down, n)
        if 2 * n == leaf:
            leaf_q = torch.cat((-down_first, up_second), dim=-2).view(g.shape).exp_()
            leaf_k = leaf_q.reciprocal()
        if n >= leaf:
            levels.append(Level(n, up_second.exp(), down_first.exp()))
        down_first.add_(up_second[..., -1:, :])
        up_second.add_(up_first[..., -1:, :])
        n *= 2
    up.exp_()
    return Decay(leaf, leaf_q, leaf_k, tuple(levels), up, down.exp_(), None, None, up[..., -1:, :].mT)


def leaf_size(g: Tensor) -> int:
    """The largest power of two n < C such that no half of a block of n rows has more than MILD of decay and growth, of
    which GROWN weighs as much as MILD."""
    size = torch.maximum(-g, g * (MILD / GROWN))
    n = g.shape[-2] // 2
    while n > 1:
        if size.unflatten(-2, (-1, n // 2)).sum(-2).max().item() <= MILD:
            return n
        n //= 2
    return 1


def scores(
    q: Tensor, k: Tensor, qs: Tensor, ks: Tensor, decay: Decay, scale: float, *, out: Tensor | None = None
) -> Tensor:
    """A [N, C, C], zero above the diagonal; qs and ks are q and k times `chunk_q` and `chunk_k`."""
    *lead, C, K = q.shape
    A = torch.empty((flat(q).shape[0], C, C), dtype=q.dtype, device=q.device) if out is None else out
    n = decay.leaf
    if n == C:
        torch.bmm(flat(qs), flat(ks).mT, out=A)
        return (A if scale == 1.0 else A.mul_(scale)).tril_()
    A.zero_()
    leaf_q = times(q, decay.leaf_q).reshape(-1, n, K)
    leaf_k = times(k, decay.leaf_k).reshape(-1, n, K)
    diagonal_blocks(A, n).copy_(torch.bmm(leaf_q, leaf_k.mT).tril_().view(-1, C // n, n, n))
    for level in decay.levels:
        m = level.n
        block = torch.matmul(halves_of(q, m)[1] * level.after, (halves_of(k, m)[0] * level.before).mT)
        diagonal_blocks(A, 2 * m)[..., m:, :m].copy_(block.flatten(0, len(lead) - 1))
    return A if scale == 1.0 else A.mul_(scale)


def prefix_sum_(x: Tensor) -> Tensor:
    """x_i := sum_{j<=i} x_j over dimension -2, a power of two, in place; additions in a tree."""
    n = 1
    while n < x.shape[-2]:
        first, second = halves_of(x, n)
        second.add_(first[..., -1:, :])
        n *= 2
    return x


def suffix_sum_(x: Tensor) -> Tensor:
    """x_i := sum_{j>=i} x_j over dimension -2, a power of two, in place; additions in a tree."""
    n = 1
    while n < x.shape[-2]:
        first, second = halves_of(x, n)
        first.add_(second[..., :1, :])
        n *= 2
    return x


def halves_of(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Views of the first and second n rows of each block of 2n: [..., C, K] -> twice [..., C / 2n, n, K]."""
    first, second = x.unflatten(-2, (-1, 2, n)).unbind(-3)
    return first, second


def diagonal_blocks(x: Tensor, n: int) -> Tensor:
    """A view of the blocks on the diagonal: [N, C, C] -> [N, C / n, n, n]."""
    return x.unflatten(2, (-1, n)).unflatten(1, (-1, n)).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def times_(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x.mul_(factor)


def flat(x: Tensor) -> Tensor:
    """[..., C, K] -> [N, C, K]."""
    return x.flatten(0, 2)


def sum_keys(x: Tensor, gates: Tensor) -> Tensor:
    """x [..., K], summed over K where the gate is one for all keys."""
    return x.sum(-1, keepdim=True) if gates.shape[-1] == 1 else x


def sum_values(x: Tensor, gates: Tensor) -> Tensor:
    """[..., K, V] -> [..., K], or [..., 1] where the gate is one for all keys."""
    return x.sum((-2, -1)).unsqueeze(-1) if gates.shape[-1] == 1 else x.sum(-1)

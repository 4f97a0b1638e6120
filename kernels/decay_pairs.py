"""Sums over the pairs of rows of a chunk, weighted by a lower triangular matrix W and by decay, and their gradients.

    dx_i = sum_{j<=i} W_ij y_j e^{b_i - b_j} + e^{b_i} p_i
    dy_j = sum_{i>=j} W_ij x_i e^{b_i - b_j} + e^{b_C - b_j} r_j

p and r came through the states before and after the chunk. The decayed outer product needs these sums four times: for
dq and dk, with W from do and v, and, where values decay, for o and dv, with W from q and k. Each time the gate's
gradient is that of F = sum_i x_i dx_i = sum_j y_j dy_j, a product of two rows and the decay between them.
"""

import torch
from torch import Tensor

from fla_compile.kernels.decay_factors import (
    Decay,
    diagonal_blocks,
    flat,
    halves_of,
    prefix_sum_,
    suffix_sum_,
    sum_keys,
    times,
    times_,
)


def add_row_sums(W: Tensor, y: Tensor, ys: Tensor, dx: Tensor, decay: Decay) -> Tensor:
    """dx / row_factor, where dx holds p on entry, in place; ys is y linked to the end of the chunk, W [N, C, C]."""
    *_, C, K = y.shape
    if decay.leaf == C:
        flat(dx).baddbmm_(W, flat(ys))
        return dx
    times_(dx, decay.chunk_q)
    n = decay.leaf
    y_n = times(y, decay.leaf_k).reshape(-1, n, K)
    dx += times_(torch.bmm(diagonal_blocks(W, n).reshape(-1, n, n), y_n).view(dx.shape), decay.leaf_q)
    for level in decay.levels:
        block = _below_diagonal(W, level.n, y)
        rows = torch.matmul(block, halves_of(y, level.n)[0] * level.before).mul_(level.after)
        halves_of(dx, level.n)[1].add_(rows)
    return dx


def pair_gradients(
    x: Tensor,
    y: Tensor,
    xs: Tensor,
    ys: Tensor,
    W: Tensor,
    dx: Tensor,
    dy: Tensor,
    decay: Decay,
    through: Tensor | None,
    scratch: Tensor,
) -> Tensor | None:
    """dx / row_factor and dy / column_factor, where p and r are on entry, and the gate's gradient [..., C, K or 1].

    xs and ys are x and y linked to the chunk's boundaries. W is overwritten: its diagonal, where no decay acts and
    whose shares in x dx and y dy cancel, is left out of the gate's gradient before any subtraction. `through`
    [..., K or 1] is the gradient of the state before the chunk times that state, or, for a chunk of several leaves,
    its part that passes through the whole chunk; None if the gate's gradient is not wanted. `scratch` is as large as x.
    """
    own = W.diagonal(dim1=1, dim2=2).unsqueeze(-1).clone()
    W.tril_(-1)
    if decay.leaf < x.shape[-2]:
        dg = _blocked_gradients(x, y, decay, W, dx, dy, through)
        flat(dx).addcmul_(own, flat(y))
        flat(dy).addcmul_(own, flat(x))
        return dg
    flat(dx).baddbmm_(W, flat(ys))
    flat(dy).baddbmm_(W.mT, flat(xs))
    dg = None
    if through is not None:
        scratch[..., 0, :].zero_()
        later = scratch[..., 1:, :]
        torch.mul(ys[..., :-1, :], dy[..., :-1, :], out=later).addcmul_(xs[..., :-1, :], dx[..., :-1, :], value=-1)
        dg = sum_keys(scratch, through)
        dg[..., 0, :] = through
        prefix_sum_(dg)
    flat(dx).addcmul_(own, flat(ys))
    flat(dy).addcmul_(own, flat(xs))
    return dg


def _blocked_gradients(
    x: Tensor, y: Tensor, decay: Decay, W: Tensor, dx: Tensor, dy: Tensor, through: Tensor | None
) -> Tensor | None:
    """As `pair_gradients`, for a chunk of several leaves.

    For a block below the diagonal dg needs no subtraction: the pair (i, j) spans the block's anchor, and its share
    x_i dx_i = y_j dy_j belongs to every step after j up to i. So it is for pairs that span a boundary of the chunk.
    """
    K = x.shape[-1]
    n = decay.leaf
    times_(dx, decay.chunk_q)
    times_(dy, decay.chunk_k)
    dg = None
    if through is not None:
        dg = suffix_sum_(sum_keys(x * dx, through)).add_(through.unsqueeze(-2))
        dg[..., 1:, :] += prefix_sum_(sum_keys(y * dy, through))[..., :-1, :]
    if decay.leaf_q is not None and decay.leaf_k is not None:
        block = diagonal_blocks(W, n).reshape(-1, n, n)
        dx_n = torch.bmm(block, (y * decay.leaf_k).view(-1, n, K)).view(x.shape).mul_(decay.leaf_q)
        dy_n = torch.bmm(block.mT, (x * decay.leaf_q).view(-1, n, K)).view(y.shape).mul_(decay.leaf_k)
        dx += dx_n
        dy += dy_n
        if dg is not None and through is not None:
            db = sum_keys(dx_n.mul_(x), through).sub_(sum_keys(dy_n.mul_(y), through))
            dg += suffix_sum_(db.unflatten(-2, (-1, n))).flatten(-3, -2)
    for level in decay.levels:
        m = level.n
        x_m, y_m = halves_of(x, m)[1], halves_of(y, m)[0]  # [..., C / 2m, m, K]
        block = _below_diagonal(W, m, x)
        dx_m = torch.matmul(block, y_m * level.before).mul_(level.after)
        dy_m = torch.matmul(block.mT, x_m * level.after).mul_(level.before)
        halves_of(dx, m)[1].add_(dx_m)
        halves_of(dy, m)[0].add_(dy_m)
        if dg is not None and through is not None:
            before, after = halves_of(dg, m)
            after += suffix_sum_(sum_keys(dx_m.mul_(x_m), through))
            before[..., 1:, :] += prefix_sum_(sum_keys(dy_m.mul_(y_m), through))[..., :-1, :]
    return dg


def _below_diagonal(W: Tensor, n: int, like: Tensor) -> Tensor:
    """Blocks of n rows and the n columns before them: [N, C, C] -> [..., C / 2n, n, n]."""
    return diagonal_blocks(W, 2 * n)[..., n:, :n].reshape(*like.shape[:-2], -1, n, n)

"""The final state of a short convolution, the last W - 1 inputs of every sequence, and what its gradient adds."""

import torch
from torch import Tensor

__all__ = ["add_final", "final_state"]


def _final_rows(x: Tensor, W: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which steps of x [1, T, D] the final states [N, W - 1] are, where there are, and which entries of the state."""
    assert cu_seqlens is not None
    ends = cu_seqlens.to(x.device, torch.int64)
    rows = ends[1:, None] - (W - 1) + torch.arange(W - 1, device=x.device)
    return rows, rows - ends[:-1, None]  # negative: that many before the first step


def final_state(x: Tensor, state: Tensor | None, W: int, cu_seqlens: Tensor | None) -> Tensor:
    """The last W - 1 inputs of every sequence [N, W - 1, D], in x's dtype."""
    B, T, D = x.shape
    if cu_seqlens is None:
        if T >= W - 1:
            return x[:, T - W + 1 :].clone(memory_format=torch.contiguous_format)
        past = x.new_zeros(B, W - 1, D) if state is None else state
        return torch.cat([past[:, T:], x], 1)
    rows, place = _final_rows(x, W, cu_seqlens)
    found = x[0, rows.clamp(min=0)]
    if state is None:
        return found.masked_fill_((place < 0)[..., None], 0.0)
    before = (place + W - 1).clamp(max=W - 2)[..., None].expand(found.shape)
    return torch.where((place < 0)[..., None], state.gather(1, before), found)


def add_final(
    dx: Tensor, dh: Tensor | None, dfinal: Tensor, W: int, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Adds the gradient of the final state to those of the inputs that it holds."""
    T = dx.shape[1]
    if cu_seqlens is None:
        kept = min(T, W - 1)
        dx[:, T - kept :] += dfinal[:, W - 1 - kept :]
        if dh is not None and kept < W - 1:
            dh[:, kept:] += dfinal[:, : W - 1 - kept]
        return dx, dh
    rows, place = _final_rows(dx, W, cu_seqlens)
    own = dfinal.masked_fill((place < 0)[..., None], 0.0).to(dx.dtype)
    # no step belongs to two states, and a step of none gets zeros: the sum has no order
    dx[0].index_add_(0, rows.clamp(min=0).flatten(), own.flatten(0, 1))
    if dh is not None:
        before = (place + W - 1).clamp(max=W - 2)[..., None].expand(dfinal.shape)
        dh = dh.scatter_add(1, before, dfinal.masked_fill((place >= 0)[..., None], 0.0).to(dh.dtype))
    return dx, dh

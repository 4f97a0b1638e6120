"""The short convolution in whole-tensor operations, in slabs that stay in cache; on any device.

A slab is some sequences times some steps, with the W - 1 inputs before it and, in the backward, W - 1 steps after it.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["backward", "forward"]

SLAB = {"cpu": 1 << 15, "cuda": 1 << 24}  # elements


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, initial_state: Tensor | None, silu: bool
) -> Tensor:
    """y [B, T, D]."""
    taps = _taps(x, weight)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for rows, start, stop in _slabs(x):
        z = _convolved(_inputs(x, initial_state, rows, start, stop, taps), taps, bias)
        if silu:
            F.silu(z, inplace=True)
        if residual is not None:
            z += residual[rows, start:stop]
        y[rows, start:stop] = z
    return y


def backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, silu: bool, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx [B, T, D]; dweight [D, W], dbias [D] and dinitial_state [B, W - 1, D] in float32, or float64 for float64."""
    (B, T, D), W = x.shape, weight.shape[1]
    taps = _taps(x, weight)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dtaps, dbias = torch.zeros_like(taps), taps.new_zeros(D)
    dh = taps.new_zeros(B, W - 1, D)
    for rows, start, stop in _slabs(x):
        beyond = min(T, stop + W - 1)
        inputs = _inputs(x, initial_state, rows, start, beyond, taps)
        dz = dy[rows, start:beyond].to(taps.dtype)
        if silu:
            dz = torch.ops.aten.silu_backward(dz, _convolved(inputs, taps, bias))
        L = stop - start
        dx_s = dz[:, :L] * taps[W - 1]
        for back in range(1, W):
            later = dz[:, back : back + L]
            dx_s[:, : later.shape[1]].addcmul_(later, taps[W - 1 - back])
        dx[rows, start:stop] = dx_s
        dbias += dz[:, :L].sum((0, 1))
        for j in range(W):
            dtaps[j] += (dz[:, :L] * inputs[:, j : j + L]).sum((0, 1))
        if start == 0:
            for t in range(min(W - 1, beyond)):
                dh[rows, t:] += dz[:, t : t + 1] * taps[: W - 1 - t]
    return dx, dtaps.T, dbias, dh


def _taps(x: Tensor, weight: Tensor) -> Tensor:
    """The weight as [W, D], in the type of the sums."""
    return weight.T.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _inputs(x: Tensor, state: Tensor | None, rows: slice, start: int, stop: int, taps: Tensor) -> Tensor:
    """Steps start - W + 1 to stop of some sequences, in the type of the sums."""
    before = len(taps) - 1
    if start >= before:
        return x[rows, start - before : stop].to(taps.dtype)
    inputs = x[rows, :stop].to(taps.dtype)
    if state is None:
        return F.pad(inputs, (0, 0, before - start, 0))
    return torch.cat([state[rows, start:].to(taps.dtype), inputs], 1)


def _convolved(inputs: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    W = len(taps)
    L = inputs.shape[1] - W + 1
    z = inputs[:, W - 1 :] * taps[W - 1]
    for j in range(W - 1):
        z.addcmul_(inputs[:, j : j + L], taps[j])
    return z if bias is None else z.add_(bias)


def _slabs(x: Tensor) -> Iterator[tuple[slice, int, int]]:
    B, T, D = x.shape
    size = SLAB[x.device.type]
    L = max(1, min(T, size // D))
    b = max(1, size // (L * D))
    for i in range(0, B, b):
        for t in range(0, T, L):
            yield slice(i, i + b), t, min(T, t + L)

"""Norm times gate by hand in plain operations, with its backward: the CPU's, and CUDA's where Triton has no kernel.

With a = act(g), h = (u - mean) * rstd (rms: u * rstd), n = h * w + b, and M the mean over a row:

    dn = dy * a (gate after) or dy       dw = sum dn * h       db = sum dn       dh = dn * w
    du = rstd * (dh - h * M(dh * h) [- M(dh)])
    gate after:  dx = du       dg = dy * n * a'          gate first:  dx = du * a       dg = du * x * a'
    a' = s * (1 - s) for sigmoid, s * (1 + g * (1 - s)) for silu, s = sigmoid(g)

Rows of D elements; x, gate [N, D], weight and bias [G, D] with row r under weight r % G.
"""

import torch
from torch import Tensor

from fla_compile.kernels.norm_gate_forms import Form, wide_dtype

__all__ = ["plain_backward", "plain_forward"]


def _gate(g: Tensor, form: Form) -> Tensor:
    return torch.nn.functional.silu(g) if form.silu else torch.sigmoid(g)


def _slope(g: Tensor, form: Form) -> Tensor:
    s = torch.sigmoid(g)
    return s * (1 + g * (1 - s)) if form.silu else s * (1 - s)


def _affine(h: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """h * w + b; h [N, D]."""
    D = h.shape[-1]
    if weight is not None:
        w = weight.to(h.dtype).reshape(-1, D)
        h = (h.unflatten(0, (-1, len(w))) * w).flatten(0, 1)
    if bias is not None:
        b = bias.to(h.dtype).reshape(-1, D)
        h = (h.unflatten(0, (-1, len(b))) + b).flatten(0, 1)
    return h


def plain_forward(
    x: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, form: Form, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y [N, D] in `dtype`, rstd [N], mean [N] (None for rms)."""
    wide = wide_dtype(x, gate, weight, bias)
    a, u = _gate(gate.to(wide), form), x.to(wide)
    u = u * a if form.gate_first else u
    mean = None
    if form.layer:
        mean = u.mean(-1)
        u = u - mean[:, None]
    rstd = torch.rsqrt(torch.linalg.vecdot(u, u).div_(form.width).add_(form.eps))
    n = _affine(u * rstd[:, None], weight, bias)
    return (n if form.gate_first else n * a).to(dtype), rstd, mean


def plain_backward(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor,
    mean: Tensor | None,
    dy: Tensor,
    form: Form,
    y_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dgate, dweight, dbias as their operands; and y again if `y_dtype` is given."""
    wide, D = rstd.dtype, form.width
    g, dy, x_wide = gate.to(wide), dy.to(wide), x.to(wide)
    a = _gate(g, form)
    u = x_wide * a if form.gate_first else x_wide
    h = (u if mean is None else u - mean[:, None]) * rstd[:, None]
    dn = dy if form.gate_first else dy * a
    n = _affine(h, weight, bias)
    dw = None if weight is None else (dn * h).unflatten(0, (-1, weight.numel() // D)).sum(0)
    db = None if bias is None else dn.unflatten(0, (-1, bias.numel() // D)).sum(0)
    dh = dn if weight is None else _affine(dn, weight, None)
    du = dh - h * (torch.linalg.vecdot(dh, h) / D)[:, None]
    du = (du if mean is None else du - dh.mean(-1, keepdim=True)) * rstd[:, None]
    if form.gate_first:
        dx, dg, y = du * a, du * x_wide * _slope(g, form), n
    else:
        dx, dg, y = du, dy * n * _slope(g, form), n * a
    return (
        dx.to(x.dtype),
        dg.to(gate.dtype),
        None if dw is None or weight is None else dw.reshape(weight.shape).to(weight.dtype),
        None if db is None or bias is None else db.reshape(bias.shape).to(bias.dtype),
        None if y_dtype is None else y.to(y_dtype),
    )

"""The short convolution tap by tap: the definition, in any floating type."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fla_compile.kernels.packed import each_sequence

__all__ = ["naive_short_conv", "naive_short_conv_step"]


def naive_short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y_t = act(sum_j weight[:, j] x_{t-W+1+j} + bias) + residual_t, with x before the first step from the state."""
    convolve = partial(_convolve, weight=weight, bias=bias, activation=activation)
    if cu_seqlens is None:
        return convolve(x, residual=residual, initial_state=initial_state, output_final_state=output_final_state)
    return each_sequence(convolve, cu_seqlens, {"x": x, "residual": residual}, initial_state, output_final_state)


def _convolve(
    x: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    (B, T, D), W = x.shape, weight.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    past = x.new_zeros(B, W - 1, D) if initial_state is None else initial_state.to(x.dtype)
    inputs = torch.cat([past, x], 1)
    z = torch.zeros(B, T, D, dtype=wide, device=x.device)
    for j in range(W):
        z = z + weight[:, j].to(wide) * inputs[:, j : j + T].to(wide)
    if bias is not None:
        z = z + bias.to(wide)
    y = F.silu(z) if activation == "silu" else z
    if residual is not None:
        y = y + residual.to(wide)
    return y.to(x.dtype), inputs[:, T:].clone() if output_final_state else None


def naive_short_conv_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """One step of x [B, D]; the state [B, W - 1, D] is updated in place."""
    residual = None if residual is None else residual[:, None]
    y, after = naive_short_conv(
        x[:, None], weight, bias, activation=activation, residual=residual, initial_state=state, output_final_state=True
    )
    assert after is not None
    state.copy_(after)
    return y[:, 0]

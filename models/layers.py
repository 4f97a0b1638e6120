"""Small modules that mixers are built from: norms, gated norms, short convolutions, rotary positions, feed-forward."""

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import initialization as init
from transformers.activations import ACT2FN

from fla_compile.models.cache import Context, pack_right


def activation(name: str | None) -> Callable[[Tensor], Tensor]:
    """The activation or elementwise feature map of this name; identity for None."""
    own: dict[str | None, Callable[[Tensor], Tensor]] = {
        None: lambda x: x,
        "swish": F.silu,
        "sqrelu": lambda x: F.relu(x).square(),
        "logsigmoid": F.logsigmoid,
        "elu_p1": lambda x: F.elu(x) + 1,
    }
    return own[name] if name in own else ACT2FN[name]


def widen(x: Tensor) -> Tensor:
    """Half precision as float32; wider types as they are. Recurrences and norms accumulate in this."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def split_heads(x: Tensor, head_dim: int, groups: int = 1) -> Tensor:
    """[B, T, H * head_dim] to [B, T, H * groups, head_dim]; each head repeated for the `groups` heads that share it."""
    x = x.unflatten(2, (-1, head_dim))
    return x if groups == 1 else x.repeat_interleave(groups, dim=2)


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last axis, computed wide."""
    y = widen(x)
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def init_time_step(bias: Tensor, low: float = 1e-3, high: float = 0.1, floor: float = 1e-4) -> None:
    """Fill `bias` so that softplus(bias) is log-uniform in [low, high], and at least `floor`."""
    step = torch.exp(torch.rand_like(bias) * (math.log(high) - math.log(low)) + math.log(low)).clamp(min=floor)
    init.copy_(bias, step + torch.log(-torch.expm1(-step)))


class RMSNorm(nn.Module):
    """x / rms(x) * weight (+ bias), over the last axis, computed wide."""

    def __init__(
        self, hidden_size: int, elementwise_affine: bool | None = True, bias: bool = False, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size)) if elementwise_affine else None
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if elementwise_affine and bias else None

    def normalise(self, x: Tensor) -> Tensor:
        y = widen(x)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            y = y * self.weight
        return y if self.bias is None else y + self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(x).to(x.dtype)


class GatedRMSNorm(RMSNorm):
    """RMSNorm(x) * activation(gate), all of it wide: fla's FusedRMSNormGated."""

    def __init__(
        self, hidden_size: int, elementwise_affine: bool | None = True, eps: float = 1e-5, activation: str = "swish"
    ) -> None:
        super().__init__(hidden_size, elementwise_affine, eps=eps)
        gates: dict[str, Callable[[Tensor], Tensor]] = {"swish": F.silu, "silu": F.silu, "sigmoid": torch.sigmoid}
        self.gate = gates[activation]

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return (self.normalise(x) * self.gate(widen(gate))).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm with fla's argument names; computed wide."""

    def __init__(
        self, hidden_size: int, elementwise_affine: bool | None = True, bias: bool = False, eps: float = 1e-5
    ) -> None:
        super().__init__(hidden_size, eps=eps, elementwise_affine=bool(elementwise_affine), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if p is None else widen(p) for p in (self.weight, self.bias))
        return F.layer_norm(widen(x), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class ShortConvolution(nn.Conv1d):
    """Depthwise causal convolution over time; it keeps the last W - 1 real inputs of each row."""

    def __init__(self, hidden_size: int, kernel_size: int, bias: bool = False, activation: str | None = "silu") -> None:
        super().__init__(hidden_size, hidden_size, kernel_size, padding=kernel_size - 1, groups=hidden_size, bias=bias)
        if activation not in (None, "silu", "swish"):
            raise ValueError(f"activation must be None, 'silu' or 'swish', got {activation!r}")
        self.activation = activation

    def forward(  # type: ignore[override]
        self, x: Tensor, mask: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, D], mask [B, T], state [B, W - 1, D] (None: zeros) -> y [B, T, D], new state [B, W - 1, D]."""
        B, T, D = x.shape
        W = self.kernel_size[0]
        x = torch.cat([x.new_zeros(B, W - 1, D) if state is None else state.to(x.dtype), x], 1)
        if mask is not None:
            # Padding moves out of the way, in front of the state, so that every window holds real inputs only.
            place, (x,) = pack_right(F.pad(mask, (W - 1, 0), value=True), x)
        # Tap by tap, wide: Inductor fuses this, but fails on the gradient of conv1d at a dynamic length.
        y = cast(Tensor, sum(widen(x[:, j : j + T]) * self.weight[:, 0, j] for j in range(W)))
        y = y if self.bias is None else y + self.bias
        if mask is not None:
            y = y.gather(1, (place[:, W - 1 :] - (W - 1)).clamp(min=0)[..., None].expand_as(y))
        return (y if self.activation is None else F.silu(y)).to(x.dtype), x[:, T:]

    def step(self, x: Tensor, context: Context, name: str) -> Tensor:
        """The same with its state in the cache, under this name."""
        y, state = self(x, context.mask, context.load(name))
        context.store_part(name, state)
        return y


class Rotary(nn.Module):
    """Rotary positions in two halves; frequencies base^(-2i/K), computed in float32 where they are used."""

    def __init__(self, dim: int, base: float = 10000.0) -> None:
        super().__init__()
        self.dim, self.base = dim, float(base)

    def forward(self, positions: Tensor, *xs: Tensor) -> list[Tensor]:
        """positions [B or 1, T]; each x [B, T, H, K], turned."""
        exponent = torch.arange(0, self.dim, 2, device=positions.device, dtype=torch.float32) / self.dim
        angle = positions[..., None, None].float() * self.base**-exponent
        cos, sin = angle.cos(), angle.sin()

        def turn(x: Tensor) -> Tensor:
            a, b = widen(x).chunk(2, -1)
            return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)

        return [turn(x) for x in xs]


class LowRank(nn.Sequential):
    """Two linear maps through a narrow waist, `0` and `1`; with a module between them, `0` and `2`."""

    def __init__(self, size: int, rank: int, out_size: int, bias: bool = True, act: nn.Module | None = None) -> None:
        middle = [] if act is None else [act]
        super().__init__(nn.Linear(size, rank, bias=False), *middle, nn.Linear(rank, out_size, bias=bias))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)); the width defaults to 2/3 hidden_ratio hidden_size, rounded up to 256s."""

    def __init__(
        self,
        hidden_size: int,
        hidden_ratio: int | float | None = None,
        intermediate_size: int | None = None,
        hidden_act: str = "swish",
        fuse_swiglu: bool = True,
    ) -> None:
        super().__init__()
        if intermediate_size is None:
            intermediate_size = -(-int(hidden_size * (hidden_ratio or 4) * 2 / 3) // 256) * 256
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = activation(hidden_act)

    def forward(self, x: Tensor, **kwargs: object) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

"""Mamba-2 (Dao and Gu, 2024, arXiv:2405.21060): a state space with one decay per head, hence linear attention."""

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig
from transformers import initialization as init

from fla_compile.models.cache import Context
from fla_compile.models.decoder import define
from fla_compile.models.layers import ShortConvolution, activation, init_time_step, widen
from fla_compile.models.mamba import MambaBlock, StateSpaceConfig, rescale
from fla_compile.models.mixer import TokenMixer, initial_state


class Mamba2Config(StateSpaceConfig):
    """Fields as in fla-hub/mamba2-*."""

    model_type = "mamba2"
    native = "Mamba2Config"

    head_dim: int = 64
    state_size: int = 128
    n_groups: int = 1
    conv_init: float | None = None
    A_init_range: tuple[float, float] | list[float] = (1, 16)
    D_has_hdim: bool = False
    residual_in_fp32: bool = True
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    dt_limit: tuple[float, float] | list[float] = (0.0, math.inf)
    rescale_prenorm_residual: bool = True
    rmsnorm: bool = True
    norm_before_gate: bool = False
    chunk_size: int = 256

    def __post_init__(self, **kwargs: Any) -> None:
        if not 0 < self.A_init_range[0] <= self.A_init_range[1] or not 0 < self.dt_min <= self.dt_max:
            raise ValueError(
                f"A_init_range {self.A_init_range} and dt_min, dt_max {self.dt_min, self.dt_max} must ascend"
            )
        self.num_heads = int(self.expand * self.hidden_size / self.head_dim)
        super().__post_init__(**{**kwargs, "num_heads": self.num_heads})


def state_space_duality(x: Tensor, g: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = exp(g_t) h_{t-1} + B_t x_t^T, y_t = h_t^T C_t; x [B, T, H, P], g [B, T, H], B, C [B, T, H, N]."""
    ys = []
    for t in range(x.shape[1]):
        h = g[:, t].exp()[..., None, None] * h + widen(B[:, t])[..., None] * widen(x[:, t])[:, :, None]
        ys.append((widen(C[:, t])[..., None] * h).sum(2))
    return torch.stack(ys, dim=1), h


class GroupedRMSNorm(nn.Module):
    """RMS norm over each group of channels, weighted, and the gate silu(z) before or after it."""

    def __init__(self, size: int, groups: int, eps: float, norm_before_gate: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.groups, self.eps, self.norm_before_gate = groups, eps, norm_before_gate

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        gate = F.silu(widen(z))
        y = y if self.norm_before_gate else y * gate
        grouped = y.unflatten(-1, (self.groups, -1))
        y = F.rms_norm(grouped, grouped.shape[-1:], eps=self.eps).flatten(-2) * self.weight
        return y * gate if self.norm_before_gate else y


class Mamba2(TokenMixer):
    def __init__(
        self,
        num_heads: int | None = None,
        head_dim: int = 64,
        hidden_size: int = 2048,
        state_size: int = 128,
        expand: int = 2,
        n_groups: int = 1,
        conv_kernel: int = 4,
        conv_init: float | None = None,
        use_conv_bias: bool = True,
        hidden_act: str = "silu",
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        use_bias: bool = False,
        norm_eps: float = 1e-5,
        chunk_size: int = 256,
        layer_idx: int | None = None,
        backend: str = "cuda",
    ) -> None:
        super().__init__()
        size = int(expand * hidden_size)
        H = num_heads or size // head_dim
        if H * head_dim != size or H % n_groups:
            raise ValueError(f"{H} heads of {head_dim} in {n_groups} groups do not fit expand * hidden_size = {size}")
        self.H, self.P, self.G, self.N, self.layer_idx = H, head_dim, n_groups, state_size, layer_idx
        self.A_init_range, self.conv_init, self.dt_limit = A_init_range, conv_init, dt_limit
        self.dt_bounds = dt_min, dt_max, dt_init_floor
        self.act = activation(hidden_act)
        self.widths = [size, size + 2 * n_groups * state_size, H]
        self.in_proj = nn.Linear(hidden_size, sum(self.widths), bias=use_bias)
        self.conv1d = ShortConvolution(self.widths[1], conv_kernel, bias=use_conv_bias, activation=None)
        self.dt_bias, self.A_log = nn.Parameter(torch.empty(H)), nn.Parameter(torch.empty(H))
        self.D = nn.Parameter(torch.empty(size if D_has_hdim else H))
        self.norm = GroupedRMSNorm(size, n_groups, norm_eps, norm_before_gate) if rmsnorm else None
        self.out_proj = nn.Linear(size, hidden_size, bias=use_bias)
        self.init_weights()

    def init_weights(self, config: PreTrainedConfig | None = None) -> None:
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(*self.A_init_range).log())
        init.ones_(self.D)
        init_time_step(self.dt_bias, *self.dt_bounds)
        if self.conv_init is not None:
            init.uniform_(self.conv1d.weight, -self.conv_init, self.conv_init)
        rescale(self.out_proj, config)

    def mix(self, x: Tensor, context: Context) -> Tensor:
        z, u, dt = self.in_proj(x).split(self.widths, dim=-1)
        u = self.act(self.conv1d.step(u, context, "conv1d"))
        u, B, C = u.split([self.widths[0], self.G * self.N, self.G * self.N], dim=-1)
        u = u.unflatten(-1, (self.H, self.P))
        B, C = (y.unflatten(-1, (self.G, self.N)).repeat_interleave(self.H // self.G, 2) for y in (B, C))
        # A step of length zero neither writes nor decays.
        dt = context.hide(F.softplus(widen(dt) + self.dt_bias).clamp(*self.dt_limit))
        h = initial_state(context, dt, self.H, self.N, self.P)
        y, h = state_space_duality((dt[..., None] * u).to(u.dtype), -widen(self.A_log).exp() * dt, B, C, h)
        context.store("recurrent", h)
        y = (y + self.D.view(self.H, -1) * widen(u)).flatten(2)
        y = y * self.act(widen(z)) if self.norm is None else self.norm(y, z)
        return self.out_proj(y.to(x.dtype))


Mamba2PreTrainedModel, Mamba2Model, Mamba2ForCausalLM = define(
    Mamba2Config, Mamba2, MambaBlock, base_model_prefix="backbone", final_norm_name="norm_f"
)

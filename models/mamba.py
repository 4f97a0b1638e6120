"""Mamba (Gu and Dao, 2023, arXiv:2312.00752): a state space per channel whose step, input and output the token sets."""

import math
from typing import Any, ClassVar, Self

import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import PreTrainedConfig
from transformers import initialization as init

from fla_compile.models.cache import Context
from fla_compile.models.configuration import LinearAttentionConfig
from fla_compile.models.decoder import Block, define
from fla_compile.models.layers import ShortConvolution, activation, init_time_step, widen
from fla_compile.models.mixer import TokenMixer, initial_state


class StateSpaceConfig(LinearAttentionConfig):
    """What Mamba's configs share. Where transformers has the `model_type` too, it keeps the configs with its fields."""

    native: ClassVar[str] = ""

    num_hidden_layers: int = 48
    norm_eps: float = 1e-5
    pad_token_id: int | None = 0
    expand: int = 2
    conv_kernel: int = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: str = "silu"

    def __post_init__(self, **kwargs: Any) -> None:
        self.intermediate_size = int(self.expand * self.hidden_size)
        for name in ("dt_rank", "time_step_rank"):
            if getattr(self, name, None) == "auto":
                setattr(self, name, math.ceil(self.hidden_size / 16))
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        foreign = getattr(transformers, cls.native) if "layer_norm_epsilon" in config_dict and cls.native else None
        return super().from_dict(config_dict, **kwargs) if foreign is None else foreign.from_dict(config_dict, **kwargs)


class MambaConfig(StateSpaceConfig):
    """Fields as in fla-hub/mamba-*."""

    model_type = "mamba"
    native = "MambaConfig"

    state_size: int = 16
    residual_in_fp32: bool = False
    dt_rank: str | int = "auto"
    dt_scale: float = 1.0
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_scheme: str = "random"
    dt_init_floor: float = 1e-4
    rescale_prenorm_residual: bool = False


def rescale(projection: nn.Linear, config: PreTrainedConfig | None) -> None:
    """Where the config wants it, smaller weights the more layers add to the residual."""
    if config is not None and config.rescale_prenorm_residual:
        bound = (projection.in_features * config.num_hidden_layers) ** -0.5
        init.uniform_(projection.weight, -bound, bound)


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t; x, dt [B, T, D], A, h_t [D, N], B, C [B, T, N]."""
    y = []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        y.append((h * C[:, t, None, :]).sum(-1))
    return torch.stack(y, 1), h


class Mamba(TokenMixer):
    config_names: ClassVar[dict[str, str | None]] = {"dt_init": "dt_init_scheme"}

    def __init__(
        self,
        hidden_size: int = 2048,
        state_size: int = 16,
        conv_kernel: int = 4,
        use_conv_bias: bool = True,
        intermediate_size: int = 2048,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        use_bias: bool = False,
        hidden_act: str = "silu",
        layer_idx: int | None = None,
        backend: str = "cuda",
    ) -> None:
        super().__init__()
        if dt_init not in ("random", "constant"):
            raise ValueError(f"dt_init must be 'random' or 'constant', got {dt_init!r}")
        D, N = intermediate_size, state_size
        self.rank = math.ceil(hidden_size / 16) if isinstance(dt_rank, str) else dt_rank
        self.dt_init, self.dt_scale, self.dt_bounds = dt_init, dt_scale, (dt_min, dt_max, dt_init_floor)
        self.layer_idx, self.act = layer_idx, activation(hidden_act)
        self.in_proj = nn.Linear(hidden_size, 2 * D, bias=use_bias)
        self.conv1d = ShortConvolution(D, conv_kernel, bias=use_conv_bias, activation=None)
        self.x_proj = nn.Linear(D, self.rank + 2 * N, bias=False)
        self.dt_proj = nn.Linear(self.rank, D)
        self.A_log, self.D = nn.Parameter(torch.empty(D, N)), nn.Parameter(torch.empty(D))
        self.out_proj = nn.Linear(D, hidden_size, bias=use_bias)
        self.init_weights()

    def init_weights(self, config: PreTrainedConfig | None = None) -> None:
        D, N = self.A_log.shape
        init.copy_(self.A_log, torch.arange(1, N + 1, device=self.A_log.device).log().expand(D, N))
        init.ones_(self.D)
        bound = self.rank**-0.5 * self.dt_scale
        init.uniform_(self.dt_proj.weight, -bound if self.dt_init == "random" else bound, bound)
        init_time_step(self.dt_proj.bias, *self.dt_bounds)
        init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5))
        rescale(self.out_proj, config)

    def mix(self, x: Tensor, context: Context) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.act(self.conv1d.step(u, context, "conv1d"))
        D, N = self.A_log.shape
        dt, B, C = self.x_proj(u).split([self.rank, N, N], dim=-1)
        # A step of length zero neither writes nor decays.
        dt = context.hide(F.softplus(widen(self.dt_proj(dt))))
        y, h = selective_scan(u, dt, -widen(self.A_log).exp(), B, C, initial_state(context, dt, D, N))
        context.store("recurrent", h)
        y = (y + self.D * widen(u)) * self.act(widen(z))
        return self.out_proj(y.to(x.dtype))


class MambaBlock(Block):
    mixer_name, mixer_norm_name = "mixer", "norm"

    @staticmethod
    def new_mlp(config: LinearAttentionConfig, layer_idx: int) -> nn.Module | None:
        return None


MambaPreTrainedModel, MambaModel, MambaForCausalLM = define(
    MambaConfig, Mamba, MambaBlock, base_model_prefix="backbone", final_norm_name="norm_f"
)

"""RWKV-7, "Goose" (Peng et al., 2025, arXiv:2503.14456): a delta rule with a decay and a rate per key channel."""

import math
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor
from transformers import PreTrainedConfig
from transformers import initialization as init

from fla_compile.models import rwkv
from fla_compile.models.cache import Context
from fla_compile.models.layers import split_heads, widen
from fla_compile.models.mixer import TokenMixer, initial_state


class RWKV7Config(rwkv.RWKVConfig):
    """Fields as in fla-hub/rwkv7-*."""

    model_type = "rwkv7"

    head_dim: int | None = 64
    num_heads: int | None = None
    decay_low_rank_dim: int | None = 64
    gate_low_rank_dim: int | None = 128
    a_low_rank_dim: int | None = 64
    v_low_rank_dim: int | None = 16
    use_l2warp: bool = True
    value_dim: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.head_dim = self.head_dim or self.hidden_size // (self.num_heads or 1)
        self.num_heads = self.hidden_size // self.head_dim
        if not isinstance(self.value_dim, list):
            self.value_dim = [self.value_dim or self.hidden_size] * self.num_hidden_layers
        super().__post_init__(**kwargs)


def rwkv7_recurrence(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, b: Tensor, S: Tensor
) -> tuple[Tensor, Tensor]:
    """S_t = (diag(exp(w_t)) - b_t kk_t^T) S_{t-1} + k_t v_t^T, o_t = S_t^T r_t; r, w, k, kk, b [B, T, H, K]."""
    o = []
    for t in range(r.shape[1]):
        found = (widen(kk[:, t])[..., None] * S).sum(-2, keepdim=True)  # [B, H, 1, V]: what the state holds under kk
        kv = widen(k[:, t])[..., None] * widen(v[:, t])[..., None, :]
        S = S * w[:, t].exp()[..., None] - widen(b[:, t])[..., None] * found + kv
        o.append((widen(r[:, t])[..., None] * S).sum(-2))
    return torch.stack(o, 1), S


class RWKV7Attention(TokenMixer):
    carries = "v_first"
    config_names: ClassVar[dict[str, str | None]] = {"elementwise_affine": None}

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        head_dim: int | None = 64,
        num_heads: int | None = None,
        decay_low_rank_dim: int | None = None,
        gate_low_rank_dim: int | None = None,
        a_low_rank_dim: int | None = None,
        v_low_rank_dim: int | None = None,
        elementwise_affine: bool | None = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
        fuse_norm: bool = False,
        value_dim: int | list[int] | None = None,
        num_hidden_layers: int | None = None,
    ) -> None:
        super().__init__()
        self.K = head_dim or hidden_size // (num_heads or 1)
        self.H = hidden_size // self.K
        value_dim = value_dim[layer_idx or 0] if isinstance(value_dim, list) else value_dim or hidden_size
        self.V, self.layer_idx = value_dim // self.H, layer_idx
        if self.H * self.K != hidden_size or self.H * self.V != value_dim:
            raise ValueError(f"hidden_size and value_dim must fit heads of {self.K}, got {hidden_size} and {value_dim}")
        self.kk_eps = 1e-6 if fuse_norm else 1e-24  # of the squared norm: fla has two norms for it
        for name in "rwkvag":
            self.register_parameter(f"x_{name}", nn.Parameter(torch.zeros(1, 1, hidden_size)))
        self.k_k, self.k_a = (nn.Parameter(torch.zeros(hidden_size)) for _ in range(2))
        self.r_k = nn.Parameter(torch.zeros(self.H, self.K))
        D, wide = hidden_size, self.K / 64
        self.r_proj, self.k_proj = (nn.Linear(D, D, bias=False) for _ in range(2))
        self.v_proj, self.o_proj = nn.Linear(D, value_dim, bias=False), nn.Linear(value_dim, D, bias=False)
        self.w_lora = rwkv.LoRA(D, D, decay_low_rank_dim, act=nn.Tanh(), scale=2.5 * wide)
        self.a_lora = rwkv.LoRA(D, D, a_low_rank_dim, scale=2.5 * wide)
        if layer_idx != 0:
            self.v_lora = rwkv.LoRA(D, value_dim, v_low_rank_dim, scale=1.7 * wide)
        self.g_lora = rwkv.LoRA(D, value_dim, gate_low_rank_dim, bias=False, act=nn.Sigmoid(), scale=5.0)
        self.g_norm = rwkv.HeadNorm(value_dim, elementwise_affine, self.K * norm_eps)

    def init_weights(self, config: PreTrainedConfig) -> None:
        deep, shallow = rwkv.depth(self.layer_idx or 0, config)
        for name, power in zip("rwkvag", (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
            init.copy_(getattr(self, f"x_{name}"), rwkv.first_mix(config.hidden_size, power * shallow).view(1, 1, -1))
        channel, within = torch.linspace(0, 1, self.H * self.K), torch.linspace(-1, 1, self.K).repeat(self.H)
        zigzag = within * within.abs()
        init.copy_(self.k_k, 0.76 - 0.1 * channel)
        init.constant_(self.k_a, 1.02)
        init.constant_(self.r_k, -0.04)
        init.copy_(self.w_lora.up.bias, 6 * channel ** (1 + deep**0.3) - 5.5 + 2.5 * zigzag)
        init.copy_(self.a_lora.up.bias, 0.4 * channel - 0.39 + 0.3 * zigzag)
        if self.layer_idx != 0:
            init.copy_(self.v_lora.up.bias, 0.93 - 0.4 * torch.linspace(0, 1, self.H * self.V))
        for projection, gain in ((self.r_proj, 1.0), (self.k_proj, 0.1), (self.v_proj, 1.0), (self.o_proj, 0.0)):
            init.orthogonal_(projection.weight, gain=gain)
        if self.g_norm.weight is not None:
            init.constant_(self.g_norm.weight, (((self.layer_idx or 0) + 1) / config.num_hidden_layers) ** 0.7)

    def mix(self, x: Tensor, context: Context) -> Tensor:
        delta = rwkv.token_shift(x, context, "shift")
        x_r, x_w, x_k, x_v, x_a, x_g = (x + delta * getattr(self, f"x_{name}") for name in "rwkvag")
        r, k, v, a = self.r_proj(x_r), self.k_proj(x_k), self.v_proj(x_v), self.a_lora(x_a).sigmoid()
        w = -math.exp(-0.5) * widen(self.w_lora(x_w)).sigmoid()
        context.carried = v if context.carried is None else context.carried
        if self.layer_idx != 0:
            v = torch.lerp(v, context.carried, self.v_lora(x_v).sigmoid())
        kk = widen(split_heads(k * self.k_k, self.K))
        kk = (kk * torch.rsqrt(kk.square().sum(-1, keepdim=True) + self.kk_eps)).to(x.dtype)
        k = k + k * (a - 1) * self.k_a
        v, (r, w, k, a) = split_heads(v, self.V), (split_heads(y, self.K) for y in (r, w, k, a))
        k, w, kk = context.hide(k, w, kk)
        S = initial_state(context, v, self.H, self.K, self.V)
        o, S = rwkv7_recurrence(r, w, k, v, kk, kk * a, S)
        context.store("recurrent", S)
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v
        return self.o_proj((self.g_norm(o.to(x.dtype)) + bonus.flatten(2)) * self.g_lora(x_g))


class RWKV7FeedForward(rwkv.ChannelMixing):
    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx, hidden_ratio=4)
        self.x_k = nn.Parameter(torch.zeros(config.hidden_size))
        self.key = nn.Linear(config.hidden_size, self.intermediate_size, bias=False)

    def init_weights(self, config: PreTrainedConfig) -> None:
        _, shallow = rwkv.depth(self.layer_idx, config)
        init.copy_(self.x_k, rwkv.first_mix(config.hidden_size, shallow**4))
        init.orthogonal_(self.key.weight)
        init.zeros_(self.value.weight)

    def mix(self, x: Tensor, delta: Tensor) -> Tensor:
        return self.value(self.act_fn(self.key(x + delta * self.x_k)))


RWKV7PreTrainedModel, RWKV7Model, RWKV7ForCausalLM = rwkv.define_rwkv(RWKV7Config, RWKV7Attention, RWKV7FeedForward)

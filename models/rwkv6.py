"""RWKV-6, "Finch" (Peng et al., 2024, arXiv:2404.05892): the decay and the token shift depend on the data."""

from typing import ClassVar, cast

import torch
import torch.nn as nn
from torch import Tensor
from transformers import PreTrainedConfig
from transformers import initialization as init

from fla_compile.models import rwkv
from fla_compile.models.cache import Context
from fla_compile.models.layers import activation, split_heads, widen
from fla_compile.models.mixer import TokenMixer, exact_size, initial_state


class RWKV6Config(rwkv.RWKVConfig):
    """Fields as in fla-hub/rwkv6-*."""

    model_type = "rwkv6"

    expand_k: float = 0.5
    expand_v: float = 1.0
    hidden_ratio: int | float | None = 3.5
    num_heads: int = 4
    proj_low_rank_dim: int = 32
    gate_low_rank_dim: int = 64


def rwkv6_recurrence(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """o_t = (S_{t-1} + u k_t v_t^T)^T r_t, S_t = diag(exp(w_t)) S_{t-1} + k_t v_t^T; r, k, w [B, T, H, K], u [H, K]."""
    o = []
    for t in range(r.shape[1]):
        kv = widen(k[:, t])[..., None] * widen(v[:, t])[..., None, :]
        o.append((widen(r[:, t])[..., None] * (S + u[..., None] * kv)).sum(-2))
        S = S * w[:, t].exp()[..., None] + kv
    return torch.stack(o, 1), S


class LerpLinear(nn.Module):
    """A linear map, perhaps of low rank, of a point between x_t and x_{t-1}: at `mu`, its own or the caller's."""

    def __init__(self, size: int, out_size: int, rank: int | None = None, has_mu: bool = True) -> None:
        super().__init__()
        full = rank is None
        self.linear = nn.Linear(size, out_size, bias=False) if full else rwkv.LoRA(size, out_size, rank, act=nn.Tanh())
        self.mu = nn.Parameter(torch.zeros(size)) if has_mu else None

    def forward(self, x: Tensor, delta: Tensor, mu: Tensor | None = None) -> Tensor:
        mu = self.mu if mu is None else mu
        assert mu is not None, "a map without a mu of its own must be given one"
        return self.linear(x + delta * mu)


class RWKV6Attention(TokenMixer):
    config_names: ClassVar[dict[str, str | None]] = {"gate_fn": None, "elementwise_affine": None}

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        num_heads: int = 4,
        gate_fn: str = "swish",
        proj_low_rank_dim: int = 32,
        gate_low_rank_dim: int = 64,
        fuse_norm: bool = True,
        elementwise_affine: bool | None = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        key_dim = exact_size(hidden_size, expand_k, num_heads, "expand_k")
        value_dim = exact_size(hidden_size, expand_v, num_heads, "expand_v")
        self.K, self.V, self.H, self.layer_idx = key_dim // num_heads, value_dim // num_heads, num_heads, layer_idx
        mixing = LerpLinear(hidden_size, proj_low_rank_dim * 5)
        self.x_proj = nn.Sequential(mixing, nn.Tanh(), nn.Linear(proj_low_rank_dim * 5, hidden_size, bias=False))
        self.x_bias = nn.Parameter(torch.zeros(5, hidden_size))
        self.r_proj = LerpLinear(hidden_size, key_dim, has_mu=False)
        self.w_proj = LerpLinear(hidden_size, key_dim, gate_low_rank_dim, has_mu=False)
        self.k_proj = LerpLinear(hidden_size, key_dim, has_mu=False)
        self.v_proj = LerpLinear(hidden_size, value_dim, has_mu=False)
        self.g_proj = LerpLinear(hidden_size, value_dim, has_mu=False)
        self.bonus = nn.Parameter(torch.zeros(num_heads, self.K))
        self.g_norm = rwkv.HeadNorm(value_dim, elementwise_affine, norm_eps)
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)
        self.gate = activation(gate_fn)

    def init_weights(self, config: PreTrainedConfig) -> None:
        deep, shallow = rwkv.depth(self.layer_idx or 0, config)
        r, w = (rwkv.first_mix(config.hidden_size, power * shallow) for power in (0.5, 1.0))
        mixing, decay = cast(LerpLinear, self.x_proj[0]), cast(rwkv.LoRA, self.w_proj.linear)
        init.copy_(cast(Tensor, mixing.mu), w)
        init.zeros_(cast(nn.Linear, mixing.linear).weight)
        init.copy_(self.x_bias, torch.stack([r, w, w, w - 0.3 * deep, r]))
        channel = torch.arange(self.H * self.K) / (self.H * self.K - 1)
        init.copy_(decay.up.bias, 5 * channel ** (0.7 + 1.3 * deep) - 6)
        zigzag = (torch.arange(1, self.H * self.K + 1) % 3 - 1) * 0.1
        init.copy_(self.bonus, (deep * (1 - channel) + zigzag).view_as(self.bonus))

    def mix(self, x: Tensor, context: Context) -> Tensor:
        delta = rwkv.token_shift(x, context, "shift")
        low = self.x_proj[0](x, delta).tanh().unflatten(-1, (5, -1))
        apart = torch.eye(5, dtype=low.dtype, device=low.device)[:, None, None, :, None] * low  # a fifth beside zeros
        mu = self.x_proj[2](apart.flatten(-2)) + self.x_bias[:, None, None]  # [5, B, T, D], by a call: adapters count
        projections = (self.r_proj, self.w_proj, self.k_proj, self.v_proj, self.g_proj)
        r, w, k, v, g = (project(x, delta, mu[n]) for n, project in enumerate(projections))
        r, w, k, v = split_heads(r, self.K), split_heads(w, self.K), split_heads(k, self.K), split_heads(v, self.V)
        k, w = context.hide(k, -widen(w).exp())
        S = initial_state(context, v, self.H, self.K, self.V)
        o, S = rwkv6_recurrence(r, k, v, w, widen(self.bonus), S)
        context.store("recurrent", S)
        return self.o_proj(self.g_norm(o.to(x.dtype)) * self.gate(g))


class RWKV6FeedForward(rwkv.ChannelMixing):
    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx, hidden_ratio=3.5)
        self.key = LerpLinear(config.hidden_size, self.intermediate_size)
        self.receptance = LerpLinear(config.hidden_size, config.hidden_size)

    def init_weights(self, config: PreTrainedConfig) -> None:
        _, shallow = rwkv.depth(self.layer_idx, config)
        for part in (self.key, self.receptance):
            init.copy_(cast(Tensor, part.mu), rwkv.first_mix(config.hidden_size, shallow))

    def mix(self, x: Tensor, delta: Tensor) -> Tensor:
        return self.receptance(x, delta).sigmoid() * self.value(self.act_fn(self.key(x, delta)))


RWKV6PreTrainedModel, RWKV6Model, RWKV6ForCausalLM = rwkv.define_rwkv(RWKV6Config, RWKV6Attention, RWKV6FeedForward)

"""What RWKV-6 and RWKV-7 share: token shift, low-rank maps, the norm of each head, channel mixing, first values."""

import math
from typing import cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig
from transformers import initialization as init

from fla_compile.models.cache import Context, StateCache
from fla_compile.models.configuration import LinearAttentionConfig
from fla_compile.models.decoder import Block, DecoderForCausalLM, DecoderModel, DecoderPreTrainedModel, define
from fla_compile.models.layers import LayerNorm, LowRank, activation, widen
from fla_compile.models.mixer import TokenMixer


class RWKVConfig(LinearAttentionConfig):
    """Fields that the configs of both have."""

    hidden_act: str = "sqrelu"
    norm_first: bool = True
    norm_bias: bool = True
    norm_eps: float = 1e-5


class RWKVPreTrainedModel(DecoderPreTrainedModel):
    """Embeddings start near zero, behind a norm of their own, and the head orthogonal."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -1e-4, 1e-4)
        elif module is getattr(self, "lm_head", None):
            init.orthogonal_(module.weight, gain=0.5 * math.sqrt(max(1.0, module.out_features / module.in_features)))


class RWKVBlock(Block):
    """Layer norms throughout, and `ffn` mixes channels; `pre_norm` follows the embeddings."""

    mlp_name = "ffn"
    mlp_norm_name = "ffn_norm"

    @staticmethod
    def new_norm(config: LinearAttentionConfig) -> nn.Module:
        return LayerNorm(config.hidden_size, bias=config.norm_bias, eps=config.norm_eps)


class ChannelMixing(nn.Module):
    """Feed-forward over each token and its predecessor; a subclass writes `mix(x, delta)`, delta = x_{t-1} - x_t."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int, hidden_ratio: float) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        width = int(config.hidden_size * (config.hidden_ratio or hidden_ratio))
        self.intermediate_size = config.intermediate_size or -(-width // 32) * 32
        self.value = nn.Linear(self.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = activation(config.hidden_act)

    def mix(self, x: Tensor, delta: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, attention_mask: Tensor | None, past_key_values: StateCache | None) -> Tensor:
        context = Context(x, attention_mask, past_key_values, self.layer_idx)
        return self.mix(x, token_shift(x, context, "ffn_shift"))


class LoRA(nn.Module):
    """A map of low rank, zero at first but for its bias. No rank: `scale` sqrt(size), to the nearest 32."""

    def __init__(
        self,
        size: int,
        out_size: int,
        rank: int | None,
        bias: bool = True,
        act: nn.Module | None = None,
        scale: float = 0.0,
    ) -> None:
        super().__init__()
        rank = rank or max(32, round(scale * math.sqrt(size) / 32) * 32)
        self.lora = LowRank(size, rank, out_size, bias, act or nn.Identity())

    @property
    def up(self) -> nn.Linear:
        return cast(nn.Linear, self.lora[2])

    def init_weights(self, config: PreTrainedConfig) -> None:
        init.zeros_(cast(nn.Linear, self.lora[0]).weight)
        out_size, rank = self.up.weight.shape
        init.orthogonal_(self.up.weight, gain=0.1 * math.sqrt(max(1.0, rank / out_size)))

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(x)


class HeadNorm(nn.Module):
    """Group norm, computed wide: [B, T, H, V] normalised over V, scaled and shifted per channel; to [B, T, H * V]."""

    def __init__(self, size: int, elementwise_affine: bool | None = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size)) if elementwise_affine else None
        self.bias = nn.Parameter(torch.zeros(size)) if elementwise_affine else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(widen(x), x.shape[-1:], eps=self.eps).flatten(2)
        if self.weight is not None and self.bias is not None:
            y = y * self.weight + self.bias
        return y.to(x.dtype)


def token_shift(x: Tensor, context: Context, name: str) -> Tensor:
    """x_{t-1} - x_t for x [B, T, D], where t-1 is the real token before t; the cache keeps the last one as `name`."""
    B, T, D = x.shape
    last = context.load(name)
    past = torch.cat([x.new_zeros(B, 1, D) if last is None else last.to(x.dtype), x], 1)
    if context.mask is not None:
        steps = torch.arange(1, T + 1, device=x.device)
        latest = F.pad(context.mask * steps, (1, 0)).cummax(1).values  # the last real entry of `past`, up to each
        past = past.gather(1, latest[..., None].expand_as(past))
    context.store(name, past[:, -1:])
    return past[:, :-1] - x


def depth(layer_idx: int, config: PreTrainedConfig) -> tuple[float, float]:
    """How deep a layer lies: 0 at the first .. 1 at the last, and 1 .. almost 0."""
    return layer_idx / max(1, config.num_hidden_layers - 1), 1 - layer_idx / config.num_hidden_layers


def first_mix(size: int, power: float) -> Tensor:
    """Initial mixing amounts of the channels, from 1 (all of x_{t-1}) towards 0 (all of x_t)."""
    return 1 - (torch.arange(size) / size) ** power


def define_rwkv(
    config_class: type[RWKVConfig], mixer_class: type[TokenMixer], ffn_class: type[ChannelMixing]
) -> tuple[type[DecoderPreTrainedModel], type[DecoderModel], type[DecoderForCausalLM]]:
    """`define` for a model of blocks with this mixer of time and this mixer of channels."""
    block = type("Block", (RWKVBlock,), {"new_mlp": staticmethod(ffn_class)})
    return define(config_class, mixer_class, block, base_class=RWKVPreTrainedModel)

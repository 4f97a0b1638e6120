"""RetNet (Sun et al., 2023, arXiv:2307.08621): one constant decay per head, and rotary positions."""

import torch
from torch import Tensor

from fla_compile.models.cache import Context
from fla_compile.models.configuration import LinearAttentionConfig
from fla_compile.models.decoder import define
from fla_compile.models.layers import Rotary, activation, widen
from fla_compile.models.mixer import HeadMixer, initial_state


class RetNetConfig(LinearAttentionConfig):
    """Fields as in fla-hub/retnet-*."""

    model_type = "retnet"

    hidden_ratio: int | float | None = 2
    expand_k: float = 1.0
    expand_v: float = 2.0
    num_heads: int = 8
    num_kv_heads: int | None = None
    feature_map: str | None = None
    use_short_conv: bool = False
    conv_size: int = 4
    use_output_gate: bool = True


def retention(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """S_t = gamma S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(K); q, k [B, T, H, K], v [B, T, H, V], gamma [H]."""
    o = []
    for t in range(q.shape[1]):
        S = gamma[:, None, None] * S + torch.einsum("bhk,bhv->bhkv", widen(k[:, t]), widen(v[:, t]))
        o.append(torch.einsum("bhk,bhkv->bhv", widen(q[:, t]) * q.shape[-1] ** -0.5, S))
    return torch.stack(o, 1), S


def padded_retention(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Retention whose decay is told token by token, gamma [B, T, H]: 1 at padding."""
    o = []
    for t in range(q.shape[1]):
        S = gamma[:, t, :, None, None] * S + torch.einsum("bhk,bhv->bhkv", widen(k[:, t]), widen(v[:, t]))
        o.append(torch.einsum("bhk,bhkv->bhv", widen(q[:, t]) * q.shape[-1] ** -0.5, S))
    return torch.stack(o, 1), S


class MultiScaleRetention(HeadMixer):
    config_names = {"use_short_conv": None, "conv_size": None}  # noqa: RUF012

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        feature_map: str | None = None,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        use_output_gate: bool = True,
        gate_fn: str = "swish",
        elementwise_affine: bool | None = True,
        norm_eps: float = 1e-5,
        fuse_norm: bool = True,
        layer_idx: int | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__()
        conv = conv_size if use_short_conv else None
        self.add_grouped_heads(hidden_size, expand_k, expand_v, num_heads, num_kv_heads, conv, conv_bias)
        self.feature_map, self.rotary, self.layer_idx = activation(feature_map), Rotary(self.K), layer_idx
        self.add_output(
            hidden_size, num_heads, self.V, use_output_gate, gate_fn, fuse_norm, elementwise_affine, norm_eps
        )

    def mix(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = self.grouped_heads(x, context)
        q, k = self.rotary(context.positions(), self.feature_map(q), self.feature_map(k))
        k, S = context.hide(k), initial_state(context, v, self.H, self.K, self.V)
        gamma = 1 - torch.exp2(-5 - torch.arange(self.H, device=x.device, dtype=S.dtype))
        if context.mask is None:
            o, S = retention(q, k, v, gamma, S)
        else:
            o, S = padded_retention(q, k, v, torch.where(context.mask[..., None], gamma, 1.0), S)
        context.store("recurrent", S)
        return self.output(o, x)


RetNetPreTrainedModel, RetNetModel, RetNetForCausalLM = define(RetNetConfig, MultiScaleRetention)

"""Gated Linear Attention (Yang et al., 2023, arXiv:2312.06635): a decay per key channel, of low rank in the input."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fla_compile.models.cache import Context
from fla_compile.models.configuration import LinearAttentionConfig
from fla_compile.models.decoder import define
from fla_compile.models.layers import LowRank, activation, split_heads, widen
from fla_compile.models.mixer import HeadMixer, initial_state


class GLAConfig(LinearAttentionConfig):
    """Fields as in fla-hub/gla-*."""

    model_type = "gla"

    expand_k: float = 0.5
    expand_v: float = 1.0
    num_heads: int = 4
    num_kv_heads: int | None = None
    feature_map: str | None = None
    use_short_conv: bool = False
    conv_size: int = 4
    use_output_gate: bool = True
    clamp_min: float | None = None
    use_gk: bool = True
    use_gv: bool = False


def gla_recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(K); q, k, g [B, T, H, K], v [B, T, H, V]."""
    o = []
    for t in range(q.shape[1]):
        q_t, k_t, v_t = widen(q[:, t]) * q.shape[-1] ** -0.5, widen(k[:, t]), widen(v[:, t])
        S = S * g[:, t].exp()[..., None] + k_t[..., None] * v_t[:, :, None]
        o.append((q_t[..., None] * S).sum(-2))
    return torch.stack(o, 1), S


class GatedLinearAttention(HeadMixer):
    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        feature_map: str | None = None,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        use_output_gate: bool = True,
        gate_fn: str = "swish",
        elementwise_affine: bool | None = True,
        norm_eps: float = 1e-5,
        gate_logit_normalizer: int = 16,
        gate_low_rank_dim: int = 16,
        clamp_min: float | None = None,
        fuse_norm: bool = True,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        conv = conv_size if use_short_conv else None
        self.add_grouped_heads(hidden_size, expand_k, expand_v, num_heads, num_kv_heads, conv, conv_bias)
        self.feature_map = activation(feature_map)
        self.gate_logit_normalizer, self.clamp_min, self.layer_idx = gate_logit_normalizer, clamp_min, layer_idx
        self.gk_proj = LowRank(hidden_size, gate_low_rank_dim, num_heads // self.groups * self.K)
        self.add_output(
            hidden_size, num_heads, self.V, use_output_gate, gate_fn, fuse_norm, elementwise_affine, norm_eps
        )

    def mix(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = self.grouped_heads(x, context)
        q, k = self.feature_map(q), self.feature_map(k)
        g = F.logsigmoid(widen(split_heads(self.gk_proj(x), self.K, self.groups))) / self.gate_logit_normalizer
        if self.clamp_min is not None:
            g = g.clamp(min=self.clamp_min)
        k, g = context.hide(k, g)
        S = initial_state(context, v, self.H, self.K, self.V)
        o, S = gla_recurrence(q, k, v, g, S)
        context.store("recurrent", S)
        return self.output(o, x)


GLAPreTrainedModel, GLAModel, GLAForCausalLM = define(GLAConfig, GatedLinearAttention)

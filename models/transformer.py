"""Transformer++: softmax attention at every layer, the baseline of the linear models."""

from fla_compile.models.attention import Attention
from fla_compile.models.configuration import LinearAttentionConfig
from fla_compile.models.decoder import define


class TransformerConfig(LinearAttentionConfig):
    """Fields as in fla-hub/transformer-*."""

    model_type = "transformer"

    num_heads: int = 32
    num_kv_heads: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    window_size: int | None = None
    rope_theta: float | None = 10000.0


TransformerPreTrainedModel, TransformerModel, TransformerForCausalLM = define(TransformerConfig, Attention)

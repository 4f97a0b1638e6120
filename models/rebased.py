"""ReBased (Aksenov et al., 2024, arXiv:2402.10644): linear attention by a quadratic kernel with learned extrema."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from fla_compile.models.based import BasedLinearAttention, square_features
from fla_compile.models.configuration import LinearAttentionConfig
from fla_compile.models.decoder import define
from fla_compile.models.layers import widen


class RebasedConfig(LinearAttentionConfig):
    """fla has the layer only: these are its arguments."""

    model_type = "rebased"

    attn_mode: str = "parallel"
    feature_dim: int = 16
    num_heads: int = 16
    num_key_value_heads: int = 16
    use_gamma: bool = True
    use_beta: bool = True
    normalize: bool = True
    eps: float = 1e-5


class RebasedFeatures(nn.Module):
    """phi with phi(q)^T phi(k) = (q'^T k')^2 / D, where x' = gamma * norm(x) + beta."""

    def __init__(self, size: int, use_gamma: bool, use_beta: bool, normalize: bool) -> None:
        super().__init__()
        if not (use_gamma or normalize):
            raise ValueError(f"use_gamma or normalize is needed, got {use_gamma}, {normalize}")
        self.normalize = normalize
        self.gamma = nn.Parameter(torch.ones(size)) if use_gamma else None
        self.beta = nn.Parameter(torch.zeros(size)) if use_beta else None

    def init_weights(self, config: PreTrainedConfig) -> None:
        if self.gamma is not None:
            init.ones_(self.gamma)
        if self.beta is not None:
            init.zeros_(self.beta)

    def forward(self, x: Tensor) -> Tensor:
        if self.normalize:
            x = F.layer_norm(x, x.shape[-1:], eps=1e-5)
        if self.gamma is not None:
            x = x * widen(self.gamma)
        if self.beta is not None:
            x = x + widen(self.beta)
        return square_features(x * x.shape[-1] ** -0.25)


class ReBasedLinearAttention(BasedLinearAttention):
    """The recurrence of Based with other features; q and k share gamma and beta."""

    def __init__(
        self,
        hidden_size: int,
        l_max: int = 2048,
        feature_dim: int = 16,
        num_key_value_heads: int = 16,
        num_heads: int = 16,
        use_gamma: bool = True,
        use_beta: bool = True,
        normalize: bool = True,
        causal: bool = True,
        eps: float = 1e-5,
        mode: str = "parallel",
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(
            hidden_size, feature_dim, num_key_value_heads, num_heads, eps=eps, causal=causal, layer_idx=layer_idx
        )
        self.feature_map = RebasedFeatures(feature_dim, use_gamma, use_beta, normalize)

    def features(self, x: Tensor) -> Tensor:
        return self.feature_map(x)


RebasedPreTrainedModel, RebasedModel, RebasedForCausalLM = define(RebasedConfig, ReBasedLinearAttention)

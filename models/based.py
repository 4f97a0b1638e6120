"""Based (Arora et al., 2024, arXiv:2402.18668): linear attention by the Taylor expansion of exp to second order."""

import torch
from torch import Tensor, nn

from fla_compile.models.cache import Context
from fla_compile.models.configuration import LinearAttentionConfig
from fla_compile.models.decoder import define
from fla_compile.models.layers import split_heads, widen
from fla_compile.models.mixer import HeadMixer, initial_state


class BasedConfig(LinearAttentionConfig):
    """fla has the layer only: these are its arguments. The paper's sliding windows are `attn`, with window_size 64."""

    model_type = "based"

    attn_mode: str = "parallel"
    feature_dim: int = 16
    num_heads: int = 16
    num_key_value_heads: int = 16
    feature_name: str = "taylor_exp"
    eps: float = 1e-6


def square_features(x: Tensor) -> Tensor:
    """phi with phi(x)^T phi(y) = (x^T y)^2: the upper triangle of x x^T; x [..., D] -> [..., D (D + 1) / 2]."""
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    twice = 2 - (i == j).to(x.dtype)  # an entry beside the diagonal stands for two
    return (x[..., :, None] * x[..., None, :])[..., i, j] * twice.sqrt()


def taylor_features(x: Tensor) -> Tensor:
    """phi with phi(x)^T phi(y) = 1 + s + s^2 / 2, s = x^T y / sqrt(D); x [..., D] -> [..., 1 + D + D (D + 1) / 2]."""
    x = x * x.shape[-1] ** -0.25
    return torch.cat([torch.ones_like(x[..., :1]), x, square_features(x) * 0.5**0.5], -1)


def normalised_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """S_t = S_{t-1} + k_t v_t^T, z_t = z_{t-1} + k_t, o_t = S_t^T q_t / (z_t^T q_t + eps).

    q, k [B, T, H, K] are features, v [B, T, H, V], S [B, H, K, V], z [B, H, K].
    """
    o = []
    for t in range(q.shape[1]):
        S = S + k[:, t, :, :, None] * widen(v[:, t, :, None, :])
        z = z + k[:, t]
        total = (q[:, t] * z).sum(-1, keepdim=True)
        o.append((q[:, t, :, :, None] * S).sum(-2) / (total + eps))
    return torch.stack(o, 1), S, z


class BasedLinearAttention(HeadMixer):
    """`eps` is that of fla's parallel kernel, which divides by the sum of weights + 1e-6 whatever its layer is told."""

    def __init__(
        self,
        hidden_size: int,
        feature_dim: int = 16,
        num_key_value_heads: int = 12,
        num_heads: int = 12,
        feature_name: str = "taylor_exp",
        eps: float = 1e-6,
        causal: bool = True,
        mode: str = "parallel",
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        if feature_name != "taylor_exp" or not causal:
            raise ValueError(f"only causal taylor_exp features are known, got {feature_name!r}, causal={causal}")
        self.add_heads(hidden_size, feature_dim, num_heads, num_key_value_heads)
        self.eps, self.layer_idx = eps, layer_idx

    def add_heads(self, hidden_size: int, feature_dim: int, num_heads: int, num_key_value_heads: int) -> None:
        if num_heads != num_key_value_heads or hidden_size < num_heads:
            raise ValueError(
                "num_heads must equal num_key_value_heads and be at most hidden_size, "
                f"got {num_heads}, {num_key_value_heads}, {hidden_size}"
            )
        self.K, self.V, self.H = feature_dim, hidden_size // num_heads, num_heads
        self.add_projections(hidden_size, q=self.H * self.K, k=self.H * self.K, v=self.H * self.V)
        self.o_proj = nn.Linear(self.H * self.V, hidden_size, bias=False)

    def features(self, x: Tensor) -> Tensor:
        return taylor_features(x)

    def mix(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = self.project(x, context, "q", "k", "v")
        q, k = (self.features(widen(split_heads(y, self.K))) for y in (q, k))
        k, v = context.hide(k), split_heads(v, self.V)
        S = initial_state(context, v, self.H, k.shape[-1], self.V)
        z = initial_state(context, v, self.H, k.shape[-1], name="normaliser")
        o, S, z = normalised_linear_attention(q, k, v, S, z, self.eps)
        context.store("recurrent", S)
        context.store("normaliser", z)
        return self.o_proj(o.to(x.dtype).flatten(2))


BasedPreTrainedModel, BasedModel, BasedForCausalLM = define(BasedConfig, BasedLinearAttention)

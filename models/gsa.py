"""Gated Slot Attention (Zhang et al., 2024, arXiv:2409.07146): slots that forget, each at its rate."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fla_compile.models.abc import SlotConfig
from fla_compile.models.cache import Context
from fla_compile.models.decoder import define
from fla_compile.models.layers import RMSNorm, activation, split_heads, widen
from fla_compile.models.mixer import HeadMixer, exact_size, initial_state


class GSAConfig(SlotConfig):
    """Fields as in fla-hub/gsa-*."""

    model_type = "gsa"

    gate_logit_normalizer: int | None = 8
    num_kv_heads: int | None = None
    feature_map: str = "swish"
    use_output_gate: bool = False
    use_norm: bool = True


def gsa_recurrence(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor, scale: float, K: Tensor, V: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """K_t = K_{t-1} diag(a_t) + k_t (1 - a_t)^T, V_t = diag(a_t) V_{t-1} + (1 - a_t) v_t^T, a = exp(f),
    o_t = V_t^T softmax(scale K_t^T q_t).

    q, k [B, T, H, K], v [B, T, H, V], f [B, T, H, M] for M slots; K [B, H, K, M], V [B, H, M, V].
    """
    o = []
    for t in range(q.shape[1]):
        a = f[:, t].exp()
        K = K * a[..., None, :] + widen(k[:, t, :, :, None]) * (1 - a)[..., None, :]
        V = V * a[..., :, None] + (1 - a)[..., :, None] * widen(v[:, t, :, None, :])
        p = ((widen(q[:, t]) * scale)[..., None] * K).sum(-2).softmax(-1)
        o.append((p[..., None] * V).sum(-2))
    return torch.stack(o, 1), K, V


class T2R(nn.Module):
    """A learned feature map (Kasai et al., 2021): relu(W x) per head."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.layer = nn.Linear(head_dim, head_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x))


class GatedSlotAttention(HeadMixer):
    """As in fla, `use_output_gate` and `use_norm` change nothing, and `g_norm` has eps 1e-5 whatever `norm_eps` is."""

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        num_slots: int | None = None,
        elementwise_affine: bool | None = True,
        norm_eps: float = 1e-5,
        gate_logit_normalizer: int = 8,
        feature_map: str = "swish",
        use_output_gate: bool = False,
        use_norm: bool = True,
        layer_idx: int | None = None,
        scale: float | None = 1.0,
        **kwargs: object,
    ) -> None:
        super().__init__()
        if expand_v != 1:
            raise ValueError(f"expand_v must be 1: the norm is of hidden_size, got {expand_v}")
        if feature_map not in ("swish", "relu", "t2r"):
            raise ValueError(f"feature_map must be 'swish', 'relu' or 't2r', got {feature_map!r}")
        key_dim = exact_size(hidden_size, expand_k, num_heads, "expand_k")
        if num_heads % (num_kv_heads or num_heads) or hidden_size % num_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads, and that hidden_size: {num_kv_heads}, {num_heads}, {hidden_size}"
            )
        self.K, self.V, self.H = key_dim // num_heads, hidden_size // num_heads, num_heads
        self.M, self.groups = num_slots or self.K, num_heads // (num_kv_heads or num_heads)
        self.scale, self.gate_logit_normalizer = self.K**-0.5 if scale is None else scale, gate_logit_normalizer
        self.layer_idx = layer_idx
        self.feature_map = T2R(self.K) if feature_map == "t2r" else activation(feature_map)
        conv, kv_heads = conv_size if use_short_conv else None, num_heads // self.groups
        self.add_projections(hidden_size, conv, conv_bias, q=key_dim, k=kv_heads * self.K, v=kv_heads * self.V)
        self.add_projections(hidden_size, f=kv_heads * self.M)
        self.g_norm = RMSNorm(hidden_size, elementwise_affine)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def mix(self, x: Tensor, context: Context) -> Tensor:
        q, k, v, f = self.project(x, context, "q", "k", "v", "f")
        q, k = self.feature_map(split_heads(q, self.K)), self.feature_map(split_heads(k, self.K, self.groups))
        v = F.silu(split_heads(v, self.V, self.groups))
        f = F.logsigmoid(widen(split_heads(f, self.M, self.groups))) / self.gate_logit_normalizer
        K = initial_state(context, v, self.H, self.K, self.M, name="slot_keys")
        V = initial_state(context, v, self.H, self.M, self.V, name="slot_values")
        o, K, V = gsa_recurrence(q, k, v, context.hide(f), self.scale, K, V)
        context.store("slot_keys", K)
        context.store("slot_values", V)
        return self.o_proj(self.g_norm(F.silu(o.to(x.dtype).flatten(2))))


GSAPreTrainedModel, GSAModel, GSAForCausalLM = define(GSAConfig, GatedSlotAttention)

"""ABC (Peng et al., 2021, arXiv:2110.02488): attention over a bounded number of slots that gather keys and values."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fla_compile.models.cache import Context
from fla_compile.models.configuration import LinearAttentionConfig
from fla_compile.models.decoder import define
from fla_compile.models.layers import GatedRMSNorm, RMSNorm, Rotary, split_heads, widen
from fla_compile.models.mixer import HeadMixer, exact_size, initial_state


class SlotConfig(LinearAttentionConfig):
    """The fields that ABC and GSA share. Where fla saves expand_k and expand_v, it is given exapnd_k and exapnd_v."""

    num_heads: int = 4
    num_slots: int | None = 64
    use_short_conv: bool = False
    conv_size: int = 4
    expand_k: float = 1
    expand_v: float = 1
    clamp_min: float | None = None
    clamp_max: float | None = None

    def __post_init__(self, exapnd_k: float | None = None, exapnd_v: float | None = None, **kwargs: Any) -> None:
        self.expand_k = self.expand_k if exapnd_k is None else exapnd_k
        self.expand_v = self.expand_v if exapnd_v is None else exapnd_v
        super().__post_init__(**kwargs)


class ABCConfig(SlotConfig):
    """Fields as in fla's ABCConfig."""

    model_type = "abc"

    expand_k: float = 0.5
    gate_low_rank_dim: int = 16
    clamp_min: float | None = -32
    clamp_max: float | None = 32
    use_rope: bool = True


def abc_recurrence(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, K: Tensor, N: Tensor, V: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K_t = K_{t-1} + k_t w_t^T, V_t = V_{t-1} + w_t v_t^T, N_t = N_{t-1} + w_t,
    o_t = (V_t / N_t)^T softmax(K_t^T q_t / (sqrt(K) N_t)).

    q, k [B, T, H, K], v [B, T, H, V], w [B, T, H, M] weights of M slots; K [B, H, K, M], N [B, H, M], V [B, H, M, V].
    """
    o = []
    for t in range(q.shape[1]):
        K = K + widen(k[:, t, :, :, None]) * w[:, t, :, None, :]
        V = V + w[:, t, :, :, None] * widen(v[:, t, :, None, :])
        N = N + w[:, t]
        total = torch.where(N > 0, N, 1.0)  # no slot holds anything before the first real token
        p = ((widen(q[:, t, :, :, None]) * K).sum(-2) * q.shape[-1] ** -0.5 / total).softmax(-1)
        o.append(((p / total)[..., None] * V).sum(-2))
    return torch.stack(o, 1), K, N, V


class ABCAttention(HeadMixer):
    def __init__(
        self,
        hidden_size: int = 1024,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        num_heads: int = 4,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        num_slots: int | None = None,
        elementwise_affine: bool | None = True,
        norm_eps: float = 1e-5,
        gate_low_rank_dim: int = 16,
        gate_logit_normalizer: int = 16,
        use_rope: bool = True,
        use_input_gate: bool = False,
        use_output_gate: bool = True,
        use_norm: bool = True,
        clamp_min: float | None = -32,
        clamp_max: float | None = 32,
        layer_idx: int | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__()
        if clamp_min is None or clamp_max is None or max(-clamp_min, clamp_max) > 40:
            raise ValueError(f"exp(s) is summed in float32: clamps within 40 are needed, got {clamp_min}, {clamp_max}")
        key_dim = exact_size(hidden_size, expand_k, num_heads, "expand_k")
        value_dim = exact_size(hidden_size, expand_v, num_heads, "expand_v")
        self.K, self.V, self.H = key_dim // num_heads, value_dim // num_heads, num_heads
        self.M, self.clamp, self.layer_idx = num_slots or self.K, (clamp_min, clamp_max), layer_idx
        self.use_input_gate = use_input_gate
        conv = conv_size if use_short_conv else None
        self.add_projections(hidden_size, conv, conv_bias, q=key_dim, k=key_dim, v=value_dim)
        self.add_projections(hidden_size, s=self.H * self.M)
        if use_output_gate:
            self.add_projections(hidden_size, g=value_dim)
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)
        if use_norm:
            norm = GatedRMSNorm if use_output_gate else RMSNorm
            self.g_norm = norm(self.V, elementwise_affine, eps=norm_eps)
        if use_rope:
            self.rotary = Rotary(self.K)

    def mix(self, x: Tensor, context: Context) -> Tensor:
        q, k, v, s = self.project(x, context, "q", "k", "v", "s")
        if self.use_input_gate:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q, k, v = split_heads(q, self.K), split_heads(k, self.K), split_heads(v, self.V)
        if hasattr(self, "rotary"):
            q, k = self.rotary(context.positions(), q, k)
        w = context.hide(widen(split_heads(s, self.M)).clamp(*self.clamp).exp())
        K = initial_state(context, v, self.H, self.K, self.M, name="slot_keys")
        N = initial_state(context, v, self.H, self.M, name="slot_weights")
        V = initial_state(context, v, self.H, self.M, self.V, name="slot_values")
        o, K, N, V = abc_recurrence(q, k, v, w, K, N, V)
        for name, state in (("slot_keys", K), ("slot_weights", N), ("slot_values", V)):
            context.store(name, state)
        return self.output(o, x)

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        o = o.to(x.dtype)
        gate = split_heads(self.g_proj(x), self.V) if hasattr(self, "g_proj") else None
        if hasattr(self, "g_norm"):
            o = self.g_norm(o) if gate is None else self.g_norm(o, gate)
        elif gate is not None:
            o = F.silu(gate) * o
        return self.o_proj(o.flatten(2))


ABCPreTrainedModel, ABCModel, ABCForCausalLM = define(ABCConfig, ABCAttention)

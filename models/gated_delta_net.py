"""Gated DeltaNet (Yang et al., 2024, arXiv:2412.06464): the delta rule on a memory that fades, one rate per head."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig
from transformers import initialization as init

from fla_compile.models.cache import Context
from fla_compile.models.configuration import LinearAttentionConfig
from fla_compile.models.decoder import define
from fla_compile.models.delta_net import DeltaMixer
from fla_compile.models.layers import GatedRMSNorm, RMSNorm, init_time_step, l2norm, widen
from fla_compile.models.mixer import exact_size


class GatedDeltaNetConfig(LinearAttentionConfig):
    """Fields as in fla-hub/gated_deltanet-*."""

    model_type = "gated_deltanet"

    expand_v: float = 2.0
    use_gate: bool = True
    use_short_conv: bool = True
    allow_neg_eigval: bool = False
    conv_size: int = 4
    head_dim: int = 256
    num_heads: int = 6
    num_v_heads: int | None = None
    num_hidden_layers: int = 21
    output_gate_activation: str = "swish"


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t / sqrt(K); g [B, T, H]."""
    scale, reads = q.shape[-1] ** -0.5, []
    for t in range(q.shape[1]):
        key, strength = widen(k[:, t, :, :, None]), beta[:, t, :, None, None]
        S = torch.exp(g[:, t, :, None, None]) * S
        S = S + strength * key * (widen(v[:, t, :, None, :]) - (key * S).sum(-2, keepdim=True))
        reads.append((scale * widen(q[:, t, :, :, None]) * S).sum(-2))
    return torch.stack(reads, dim=1), S


class GatedDeltaNet(DeltaMixer):
    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 2,
        head_dim: int = 256,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_gate: bool = True,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        output_gate_activation: str = "swish",
        **kwargs: object,
    ) -> None:
        super().__init__()
        HV, V = num_v_heads or num_heads, exact_size(head_dim, expand_v, 1, "expand_v")
        self.allow_neg_eigval, self.layer_idx = allow_neg_eigval, layer_idx
        self.add_heads(hidden_size, conv_size if use_short_conv else None, conv_bias, num_heads, HV, head_dim, V)
        self.a_proj = nn.Linear(hidden_size, HV, bias=False)
        self.b_proj = nn.Linear(hidden_size, HV, bias=False)
        if use_gate:
            self.g_proj = nn.Linear(hidden_size, HV * V, bias=False)
            self.o_norm = GatedRMSNorm(V, eps=norm_eps, activation=output_gate_activation)
        else:
            self.o_norm = RMSNorm(V, eps=norm_eps)
        self.A_log, self.dt_bias = nn.Parameter(torch.empty(HV)), nn.Parameter(torch.empty(HV))
        self.init_weights()

    def init_weights(self, config: PreTrainedConfig | None = None) -> None:
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(0, 16).log())
        init_time_step(self.dt_bias)

    def mix(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = self.heads(x, context)
        g = -widen(self.A_log).exp() * F.softplus(widen(self.a_proj(x)) + self.dt_bias)
        k, g = context.hide(l2norm(k), g)
        o, S = gated_delta_rule(l2norm(q), k, v, g, self.write_strength(x), self.state(context, v))
        return self.finish(o, S, x, context)


GatedDeltaNetPreTrainedModel, GatedDeltaNetModel, GatedDeltaNetForCausalLM = define(GatedDeltaNetConfig, GatedDeltaNet)

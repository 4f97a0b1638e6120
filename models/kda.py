"""Kimi Delta Attention (Kimi Team, 2025, arXiv:2510.26692): the gated delta rule with a fading rate per key channel."""

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
from fla_compile.models.layers import GatedRMSNorm, LowRank, init_time_step, l2norm, widen
from fla_compile.models.mixer import exact_size


class KDAConfig(LinearAttentionConfig):
    """Fields as in fla's KDA models. With `lower_bound`, log decays lie in (lower_bound, 0)."""

    model_type = "kda"

    expand_v: float = 1.0
    use_short_conv: bool = True
    allow_neg_eigval: bool = False
    safe_gate: bool = False
    lower_bound: float | None = None
    conv_size: int = 4
    head_dim: int = 128
    num_heads: int = 16
    num_v_heads: int | None = None


def kimi_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t / sqrt(K)."""
    outputs = []
    for t in range(q.shape[1]):
        faded = g[:, t].exp().unsqueeze(-1) * S
        k_t = widen(k[:, t]).unsqueeze(-1)
        missing = widen(v[:, t]) - (faded * k_t).sum(dim=-2)
        S = faded + k_t * (beta[:, t].unsqueeze(-1) * missing).unsqueeze(-2)
        outputs.append((S * widen(q[:, t]).unsqueeze(-1)).sum(dim=-2) / k.shape[-1] ** 0.5)
    return torch.stack(outputs, 1), S


class KimiDeltaAttention(DeltaMixer):
    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 1,
        head_dim: int = 128,
        num_heads: int = 16,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        safe_gate: bool = False,
        lower_bound: float | None = None,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        **kwargs: object,
    ) -> None:
        super().__init__()
        if safe_gate and lower_bound is None:
            raise ValueError("safe_gate needs a lower_bound, got None")
        H, K, V = num_v_heads or num_heads, head_dim, exact_size(head_dim, expand_v, 1, "expand_v")
        self.add_heads(hidden_size, conv_size if use_short_conv else None, conv_bias, num_heads, H, K, V)
        self.f_proj = LowRank(hidden_size, V, H * K, bias=False)
        self.b_proj = nn.Linear(hidden_size, H, bias=False)
        self.add_module("g_proj", LowRank(hidden_size, V, H * V))
        self.o_norm = GatedRMSNorm(V, eps=norm_eps, activation="sigmoid")
        self.A_log = nn.Parameter(torch.empty(H))
        self.dt_bias = nn.Parameter(torch.empty(H * K))
        self.allow_neg_eigval, self.safe_gate, self.lower_bound = allow_neg_eigval, safe_gate, lower_bound
        self.layer_idx = layer_idx
        self.init_weights()

    def init_weights(self, config: PreTrainedConfig | None = None) -> None:
        rates = torch.ones_like(self.A_log) if self.safe_gate else torch.empty_like(self.A_log).uniform_(1, 16)
        init.copy_(self.A_log, rates.log())
        init_time_step(self.dt_bias)

    def log_decay(self, x: Tensor) -> Tensor:
        """g [B, T, H, K]: -exp(A) softplus(f(x) + b), or lower_bound sigmoid(exp(A) (f(x) + b)), which is bounded."""
        f = (widen(self.f_proj(x)) + self.dt_bias).unflatten(-1, (self.HV, self.K))
        rate = widen(self.A_log).exp()[:, None]
        return -rate * F.softplus(f) if self.lower_bound is None else self.lower_bound * torch.sigmoid(rate * f)

    def mix(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = self.heads(x, context)
        k, g = context.hide(l2norm(k), self.log_decay(x))
        o, S = kimi_delta_rule(l2norm(q), k, v, g, self.write_strength(x), self.state(context, v))
        return self.finish(o, S, x, context)


KDAPreTrainedModel, KDAModel, KDAForCausalLM = define(KDAConfig, KimiDeltaAttention)

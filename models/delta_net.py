"""DeltaNet (Yang et al., 2024, arXiv:2406.06484): a memory that writes only what it would not have recalled."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla_compile.models.cache import Context
from fla_compile.models.configuration import LinearAttentionConfig
from fla_compile.models.decoder import define
from fla_compile.models.layers import GatedRMSNorm, RMSNorm, ShortConvolution, activation, l2norm, split_heads, widen
from fla_compile.models.mixer import HeadMixer, exact_size, initial_state


class DeltaNetConfig(LinearAttentionConfig):
    """Fields as in fla-hub/delta_net-*; `use_output_norm` has no effect there either."""

    model_type = "delta_net"

    expand_k: float = 1.0
    expand_v: float = 1.0
    use_gate: bool = False
    use_short_conv: bool = True
    allow_neg_eigval: bool = False
    conv_size: int = 4
    use_beta: bool = True
    use_output_norm: bool = True
    num_heads: int = 16
    qk_norm: str = "l2"
    qk_activation: str = "silu"


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T, o_t = S_t^T q_t / sqrt(K); k [B, T, H, K], v [B, T, H, V]."""
    o = []
    for t in range(q.shape[1]):
        # Columns and a row: products and sums, unlike matrix products, stay wide under autocast.
        q_t, k_t, v_t = widen(q[:, t, :, :, None]), widen(k[:, t, :, :, None]), widen(v[:, t, :, None, :])
        recalled = (k_t * S).sum(-2, keepdim=True)
        S = S + beta[:, t, :, None, None] * k_t * (v_t - recalled)
        o.append((q.shape[-1] ** -0.5 * q_t * S).sum(-2))
    return torch.stack(o, 1), S


def sum_norm(x: Tensor) -> Tensor:
    return F.normalize(widen(x), p=1, dim=-1, eps=1e-6).to(x.dtype)


class DeltaMixer(HeadMixer):
    """What layers of the delta rule share: H key heads, each serving HV / H value heads, and `o_norm` at the end."""

    b_proj: nn.Linear
    o_norm: nn.Module
    q_conv1d: ShortConvolution
    k_conv1d: ShortConvolution
    use_beta, allow_neg_eigval = True, False

    def add_heads(self, D: int, conv_size: int | None, conv_bias: bool, H: int, HV: int, K: int, V: int) -> None:
        """Projections of q and k to H heads and of v to HV, then silu (in the convolution if there is one)."""
        if HV % H:
            raise ValueError(f"num_v_heads must be a multiple of num_heads, got {HV} and {H}")
        self.HV, self.groups, self.K, self.V = HV, HV // H, K, V
        self.add_projections(D, conv_size, conv_bias, q=H * K, k=H * K, v=HV * V)
        self.o_proj = nn.Linear(HV * V, D, bias=False)
        self.phi = self.phi_v = activation("silu" if conv_size is None else None)

    def heads(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [B, T, HV, K], not yet normalised, and v [B, T, HV, V]."""
        q, k, v = self.project(x, context, "q", "k", "v")
        q, k = (split_heads(self.phi(y), self.K, self.groups) for y in (q, k))
        return q, k, split_heads(self.phi_v(v), self.V)

    def write_strength(self, x: Tensor) -> Tensor:
        """beta [B, T, HV] in (0, 1), or in (0, 2): above 1 a write flips the sign of what it replaces."""
        beta = widen(self.b_proj(x)).sigmoid() if self.use_beta else widen(x).new_ones(*x.shape[:2], self.HV)
        return 2 * beta if self.allow_neg_eigval else beta

    def state(self, context: Context, v: Tensor) -> Tensor:
        return initial_state(context, v, self.HV, self.K, self.V)

    def finish(self, o: Tensor, S: Tensor, x: Tensor, context: Context) -> Tensor:
        """Keep the state S; norm, gate and project the read-outs o [B, T, HV, V] of the layer's input x."""
        context.store("recurrent", S)
        gate = [split_heads(self.g_proj(x), self.V)] if hasattr(self, "g_proj") else []
        return self.o_proj(self.o_norm(o.to(x.dtype), *gate).flatten(2))


class DeltaNet(DeltaMixer):
    def __init__(
        self,
        mode: str = "chunk",
        d_model: int | None = None,
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 4,
        use_beta: bool = True,
        use_gate: bool = False,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        allow_neg_eigval: bool = False,
        layer_idx: int | None = None,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
        norm_eps: float = 1e-5,
        **kwargs: object,
    ) -> None:
        super().__init__()
        if qk_activation not in ("silu", "relu", "elu", "identity") or qk_norm not in ("l2", "sum"):
            raise ValueError(f"unknown qk_activation {qk_activation!r} or qk_norm {qk_norm!r}")
        D = d_model or hidden_size
        K, V = (exact_size(D, expand, num_heads, "expand") // num_heads for expand in (expand_k, expand_v))
        self.use_beta, self.allow_neg_eigval, self.layer_idx = use_beta, allow_neg_eigval, layer_idx
        self.add_heads(D, conv_size if use_short_conv else None, conv_bias, num_heads, num_heads, K, V)
        if qk_activation != "silu":
            self.phi = activation({"relu": "relu", "elu": "elu_p1", "identity": None}[qk_activation])
            for conv in (self.q_conv1d, self.k_conv1d) if use_short_conv else ():
                conv.activation = None
        self.normalise = l2norm if qk_norm == "l2" else sum_norm
        if use_beta:
            self.b_proj = nn.Linear(D, num_heads, bias=False)
        if use_gate:
            self.g_proj = nn.Linear(D, num_heads * V, bias=False)
        self.o_norm = GatedRMSNorm(V, eps=norm_eps) if use_gate else RMSNorm(V, eps=norm_eps)

    def mix(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = self.heads(x, context)
        q, k = self.normalise(q), self.normalise(k)
        beta = self.write_strength(x)
        o, S = delta_rule(q, context.hide(k), v, beta, self.state(context, v))
        return self.finish(o, S, x, context)


DeltaNetPreTrainedModel, DeltaNetModel, DeltaNetForCausalLM = define(DeltaNetConfig, DeltaNet)

"""HGRN (Qin et al., 2023, arXiv:2311.04823): forget gates, bounded below layer by layer, on a vector."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from fla_compile.models.cache import Context
from fla_compile.models.configuration import LinearAttentionConfig
from fla_compile.models.decoder import DecoderModel, define
from fla_compile.models.layers import GatedRMSNorm, ShortConvolution, widen
from fla_compile.models.mixer import HeadMixer, initial_state


class HGRNConfig(LinearAttentionConfig):
    """Fields as in fla-hub/hgrn-*."""

    model_type = "hgrn"

    attn_mode: str = "fused_recurrent"
    expand_ratio: int | float | None = 1
    use_short_conv: bool = False
    conv_size: int = 4
    use_lower_bound: bool = True

    @property
    def forget_size(self) -> int:
        return int(self.hidden_size * (self.expand_ratio or 1))


def hgrn_recurrence(i: Tensor, f: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = exp(f_t) h_{t-1} + i_t, elementwise; i, f [B, T, D], h [B, D]."""
    o = []
    for t in range(i.shape[1]):
        h = f[:, t].exp() * h + i[:, t]
        o.append(h)
    return torch.stack(o, 1), h


class LowerBoundedModel(DecoderModel):
    """A decoder that learns the lower bounds of its forget gates: 0 in the first layer, growing from layer to layer."""

    def __init__(self, config: LinearAttentionConfig) -> None:
        super().__init__(config)
        if config.use_lower_bound:
            self.lower_bounds = nn.Parameter(torch.zeros(config.num_hidden_layers, config.forget_size))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and hasattr(self, "lower_bounds"):
            init.zeros_(self.lower_bounds)

    def first_carried(self) -> Tensor | None:
        """The bounds [L, D]: running sums, without its first row, of a distribution over the layers."""
        if not self.config.use_lower_bound:
            return None
        share = widen(self.lower_bounds).softmax(0)
        return share.cumsum(0) - share[0]


class LowerBoundedMixer(HeadMixer):
    """Forget gates f in log space, `lower_bound` [D], or [L, D] for all layers of a model, being their least exp."""

    carries = "lower_bound"

    def add_convolutions(self, conv_size: int, conv_bias: bool, *names: str) -> None:
        """Behind the named projections, with no activation."""
        for name in names:
            size = getattr(self, f"{name}_proj").out_features
            self.add_module(f"{name}_conv1d", ShortConvolution(size, conv_size, conv_bias, activation=None))

    def log_forget(self, f: Tensor, context: Context) -> Tensor:
        """log(bound + (1 - bound) sigmoid(f)), and 0, which forgets nothing, at padding; f [B, T, D]."""
        f, bound = F.logsigmoid(widen(f)), context.carried
        if bound is not None and self.layer_idx != 0:
            bound = widen(bound if bound.ndim == 1 else bound[self.layer_idx])
            f = torch.logaddexp(bound.log(), torch.log1p(-bound) + f)
        return context.hide(f)


class HGRNAttention(LowerBoundedMixer):
    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_ratio: int | float | None = 1,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        elementwise_affine: bool | None = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        size, self.layer_idx = int(hidden_size * (expand_ratio or 1)), layer_idx
        self.add_projections(hidden_size, i=size, f=size, g=size)
        if use_short_conv:
            self.add_convolutions(conv_size, conv_bias, "f", "i")
        self.g_norm = GatedRMSNorm(size, elementwise_affine, eps=norm_eps)
        self.o_proj = nn.Linear(size, hidden_size, bias=False)

    def mix(self, x: Tensor, context: Context) -> Tensor:
        i, f = self.project(x, context, "i", "f")
        f = self.log_forget(f, context)
        i = F.silu(widen(i)) * (1 - f.exp())
        o, h = hgrn_recurrence(i, f, initial_state(context, i, i.shape[-1]))
        context.store("recurrent", h)
        return self.o_proj(self.g_norm(o.to(x.dtype), self.g_proj(x)))


HGRNPreTrainedModel, HGRNModel, HGRNForCausalLM = define(HGRNConfig, HGRNAttention, model_class=LowerBoundedModel)

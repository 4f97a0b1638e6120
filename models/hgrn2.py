"""HGRN2 (Qin et al., 2024, arXiv:2404.07904): HGRN with an outer product as its state, keys tied to gates."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fla_compile.models.cache import Context
from fla_compile.models.configuration import LinearAttentionConfig
from fla_compile.models.decoder import define
from fla_compile.models.hgrn import LowerBoundedMixer, LowerBoundedModel
from fla_compile.models.layers import RMSNorm, split_heads, widen
from fla_compile.models.mixer import initial_state


def head_size(hidden_size: int, num_heads: int | None, expand_ratio: int | None) -> int:
    """`expand_ratio`, or the share of one of `num_heads`."""
    if expand_ratio is not None:
        return expand_ratio
    if num_heads is None:
        raise ValueError("one of expand_ratio and num_heads is needed, got neither")
    return hidden_size // num_heads


class HGRN2Config(LinearAttentionConfig):
    """Fields as in fla-hub/hgrn2-*; `expand_ratio` is the size of a head."""

    model_type = "hgrn2"

    num_heads: int | None = None
    expand_ratio: int | None = 128
    use_short_conv: bool = False
    conv_size: int = 4
    use_lower_bound: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.expand_ratio = head_size(self.hidden_size, self.num_heads, self.expand_ratio)
        self.num_heads = self.num_heads or self.hidden_size // self.expand_ratio
        super().__post_init__(**kwargs)

    @property
    def forget_size(self) -> int:
        return self.hidden_size


def hgrn2_recurrence(q: Tensor, f: Tensor, i: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """S_t = diag(a_t) S_{t-1} + (1 - a_t) i_t^T, o_t = S_t^T q_t / sqrt(K), a = exp(f).

    q, f [B, T, H, K], i [B, T, H, V], S [B, H, K, V].
    """
    o = []
    for t in range(q.shape[1]):
        a = f[:, t].exp()
        S = S * a[..., None] + (1 - a)[..., None] * widen(i[:, t, :, None, :])
        o.append((widen(q[:, t, :, :, None]) * S).sum(-2) * q.shape[-1] ** -0.5)
    return torch.stack(o, 1), S


class HGRN2Attention(LowerBoundedMixer):
    """As in fla, `expand_ratio` goes before `num_heads`, and `g_norm` has eps 1e-5 whatever `norm_eps` is."""

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        num_heads: int | None = None,
        expand_ratio: int | None = 128,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        elementwise_affine: bool | None = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.K = head_size(hidden_size, num_heads, expand_ratio)
        if hidden_size % self.K:
            raise ValueError(f"expand_ratio must divide hidden_size, got {self.K}, {hidden_size}")
        self.H, self.layer_idx = hidden_size // self.K, layer_idx
        self.add_projections(hidden_size, q=hidden_size, f=hidden_size, i=hidden_size)
        if use_short_conv:
            self.add_convolutions(conv_size, conv_bias, "q", "f", "i")
        self.g_norm = RMSNorm(hidden_size, elementwise_affine)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def mix(self, x: Tensor, context: Context) -> Tensor:
        q, f, i = self.project(x, context, "q", "f", "i")
        f = self.log_forget(f, context)
        q, f, i = (split_heads(y, self.K) for y in (F.silu(q), f, i))
        S = initial_state(context, i, self.H, self.K, self.K)
        o, S = hgrn2_recurrence(q, f, i, S)
        context.store("recurrent", S)
        return self.o_proj(self.g_norm(o.to(x.dtype).flatten(2)))


HGRN2PreTrainedModel, HGRN2Model, HGRN2ForCausalLM = define(HGRN2Config, HGRN2Attention, model_class=LowerBoundedModel)

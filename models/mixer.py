"""What token-mixing layers share: the call that users and the decoder make, projections, convolutions, output gates."""

import inspect
from collections.abc import Iterator
from typing import Any, ClassVar

import torch.nn as nn
from torch import Tensor
from transformers import PreTrainedConfig

from fla_compile.models.cache import Context, StateCache
from fla_compile.models.layers import GatedRMSNorm, RMSNorm, ShortConvolution, activation, split_heads, widen

REFUSED = ("cu_seqlens", "cu_seq_lens_q", "position_ids", "seq_idx")


class TokenMixer(nn.Module):
    """Base of all mixers: a subclass writes `mix(x, context)`; the rest of the call is here."""

    config_names: ClassVar[dict[str, str | None]] = {}  # argument -> config field, or None to leave it at its default
    carries: ClassVar[str | None] = None  # argument and fourth result, `context.carried`, that goes from layer to layer
    layer_idx: int | None = None

    @classmethod
    def from_config(cls, config: PreTrainedConfig, layer_idx: int) -> "TokenMixer":
        """The layer of a model: each argument from the config field of its name, or of the name in `config_names`."""
        names = {"mode": "attn_mode", "gate_fn": "hidden_act", **cls.config_names}
        found: dict[str, Any] = {"layer_idx": layer_idx}
        for argument in inspect.signature(cls.__init__).parameters:
            field = names.get(argument, argument)
            if field is not None and argument not in ("self", "layer_idx", "kwargs") and hasattr(config, field):
                found[argument] = getattr(config, field)
        return cls(**found)

    def init_weights(self, config: PreTrainedConfig) -> None:
        """Initial values other than the usual ones; by `transformers.initialization`, which spares loaded weights."""

    def mix(self, x: Tensor, context: Context) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Mix [B, T, D] over time. `attention_mask` [B, T or more] is 1 at real tokens; a cache, if given, moves on."""
        for name in REFUSED:
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is not supported: packed sequences and chosen positions would be mixed up")
        context = Context(hidden_states, attention_mask, past_key_values, self.layer_idx)
        if self.carries is not None:
            context.carried = kwargs.get(self.carries)
        o = self.mix(hidden_states, context)
        context.close()
        results = (o, None, past_key_values)
        return results if self.carries is None else (*results, context.carried)


class HeadMixer(TokenMixer):
    """A mixer over heads: projections `q_proj, k_proj, ...`, convolved or not; a normalised output, gated or not."""

    def add_projections(
        self, hidden_size: int, conv_size: int | None = None, conv_bias: bool = False, **sizes: int
    ) -> None:
        """`{name}_proj` for each name = width, and `{name}_conv1d` behind it if `conv_size` is given."""
        for name, size in sizes.items():
            self.add_module(f"{name}_proj", nn.Linear(hidden_size, size, bias=False))
            if conv_size is not None:
                self.add_module(f"{name}_conv1d", ShortConvolution(size, conv_size, bias=conv_bias))

    def add_grouped_heads(
        self,
        hidden_size: int,
        expand_k: float,
        expand_v: float,
        num_heads: int,
        num_kv_heads: int | None,
        conv_size: int | None,
        conv_bias: bool,
    ) -> None:
        """Projections q, k, v to H heads of sizes K and V, of which `groups` share a key and a value."""
        q_size = exact_size(hidden_size, expand_k, num_heads, "expand_k")
        v_size = exact_size(hidden_size, expand_v, num_heads, "expand_v")
        self.H, self.K, self.V = num_heads, q_size // num_heads, v_size // num_heads
        self.groups = num_heads // (num_kv_heads or num_heads)
        sizes = {"q": q_size, "k": q_size // self.groups, "v": v_size // self.groups}
        self.add_projections(hidden_size, conv_size, conv_bias, **sizes)

    def grouped_heads(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """q and k [B, T, H, K], v [B, T, H, V] of the layer's input x [B, T, D]."""
        q, k, v = self.project(x, context, "q", "k", "v")
        k, v = split_heads(k, self.K, self.groups), split_heads(v, self.V, self.groups)
        return split_heads(q, self.K), k, v

    def project(self, x: Tensor, context: Context, *names: str) -> Iterator[Tensor]:
        """The named projections of x [B, T, D], each through its convolution where it has one."""
        for name in names:
            y = getattr(self, f"{name}_proj")(x)
            conv = getattr(self, f"{name}_conv1d", None)
            yield y if conv is None else conv.step(y, context, f"{name}_conv1d")

    def add_output(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        use_output_gate: bool = True,
        gate_fn: str = "swish",
        fuse_norm: bool = True,
        elementwise_affine: bool | None = True,
        norm_eps: float = 1e-5,
    ) -> None:
        """`o_proj`, `g_proj`, and the norm of each head, whose published name depends on `fuse_norm`."""
        self.head_dim = head_dim
        self.gate = activation(gate_fn)
        if use_output_gate:
            self.g_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        if gate_fn == "swish" and fuse_norm and use_output_gate:
            self.g_norm_swish_gate = GatedRMSNorm(head_dim, elementwise_affine, norm_eps)
        else:
            self.g_norm = RMSNorm(head_dim, elementwise_affine, eps=norm_eps)

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        """Norm, gate and project the read-outs o [B, T, H, V] of the layer's input x [B, T, D]."""
        o = o.to(x.dtype)
        if hasattr(self, "g_norm_swish_gate"):
            o = self.g_norm_swish_gate(o, split_heads(self.g_proj(x), self.head_dim)).flatten(2)
        else:
            o = self.g_norm(o).flatten(2)
            o = o * self.gate(self.g_proj(x)) if hasattr(self, "g_proj") else o
        return self.o_proj(o)


def initial_state(context: Context, like: Tensor, *shape: int, name: str = "recurrent") -> Tensor:
    """The state [B, *shape] that the cache holds, or zeros; in float32 or wider."""
    state = context.load(name)
    return widen(like).new_zeros(like.shape[0], *shape) if state is None else state


def exact_size(hidden_size: int, ratio: float, num_heads: int, name: str) -> int:
    """hidden_size * ratio as an integer that the heads divide; ValueError otherwise."""
    size = round(hidden_size * ratio)
    if abs(size - hidden_size * ratio) > 1e-6 * size or size % num_heads:
        raise ValueError(f"{name} * hidden_size must be a multiple of num_heads: {ratio} * {hidden_size}, {num_heads}")
    return size

"""Softmax attention for hybrids and for the Transformer++ baseline: grouped heads, rotary positions, sliding window."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla_compile.models.cache import Context, pack_right
from fla_compile.models.layers import RMSNorm, Rotary, split_heads
from fla_compile.models.mixer import TokenMixer


class Attention(TokenMixer):
    """Causal attention by SDPA; with a `window_size` of w a token sees the last w, itself included."""

    def __init__(
        self,
        hidden_size: int = 2048,
        num_heads: int = 32,
        num_kv_heads: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        window_size: int | None = None,
        rope_theta: float | None = 10000.0,
        max_position_embeddings: int | None = None,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        if hidden_size % num_heads or num_heads % num_kv_heads:
            sizes = (hidden_size, num_heads, num_kv_heads)
            raise ValueError(f"hidden_size, num_heads, num_kv_heads must each be a multiple of the next, got {sizes}")
        self.head_dim, self.grouped = hidden_size // num_heads, num_kv_heads < num_heads
        self.window_size, self.layer_idx = window_size, layer_idx
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        if qk_norm:
            self.q_norm, self.k_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)
        self.rotary = Rotary(self.head_dim, rope_theta or 10000.0)

    def mix(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = (split_heads(proj(x), self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        positions = context.positions()
        q, k = self.rotary(positions, q, k)
        if self.window_size is None and context.mask is None and context.load("keys") is None:
            visible = None
            context.store("keys", k)
            context.store("values", v)
            context.store_part("places", positions.expand(len(k), -1))
        else:
            k, v, places = self.remember(k, v, context.mark(positions), context)
            distance = positions[:, :, None] - places[:, None, :]  # [B, T, S]
            visible = (places >= 0)[:, None, :] & (distance >= 0)
            if self.window_size is not None:
                visible = visible & (distance < self.window_size)
            visible = visible[:, None]
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None, enable_gqa=self.grouped
        )
        return self.o_proj(o.transpose(1, 2).flatten(2))

    def remember(self, k: Tensor, v: Tensor, places: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and their positions, those of the cache first; the cache keeps what may be seen again."""
        places = places.expand(k.shape[0], -1)
        if context.state is None:
            return k, v, places
        past = [context.load(name) for name in ("keys", "values", "places")]
        if past[0] is None and self.window_size is not None:
            # An empty window has its full size from the start: a cache of constant shape needs no second compilation.
            room = (0, 0) * 2 + (self.window_size - 1, 0)
            past = [F.pad(z[:, :0], room) for z in (k, v)] + [F.pad(places[:, :0], room[4:], value=-1)]
        new = (k, v, places)
        seen = [z if before is None else torch.cat([before, z], 1) for before, z in zip(past, new, strict=True)]
        kept = seen
        if self.window_size is not None:
            if context.mask is not None:
                _, kept = pack_right(seen[2] >= 0, *seen)
            kept = [z[:, z.shape[1] - self.window_size + 1 :] for z in kept]
        store = context.store if self.window_size is None else context.store_part
        for name, z in zip(("keys", "values", "places"), kept, strict=True):
            store(name, z)
        return seen[0], seen[1], seen[2]

"""What a model remembers between calls: named tensors per layer, of constant size but for the keys of full attention.

`StateCache` is a `transformers.Cache`, so that generate, beam search and chunked prefill handle it; `Context` is what a
layer sees of it during one call, together with the padding of the tokens at hand.
"""

from dataclasses import fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

# What outputs and `generate` call it: `cache` since transformers 5.24.
CACHE_NAME = "cache" if any(f.name == "cache" for f in fields(BaseModelOutputWithPast)) else "past_key_values"


class LayerState(CacheLayerMixin):
    """The tensors of one layer by name, batch first, and how many tokens it has seen, padding included.

    The count is a tensor: as a Python number it would be a constant of compiled code, compiled anew for each token.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, Tensor] = {}
        self.seen: Tensor | None = None

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to allocate ahead: every tensor comes from the layer that stores it."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("a StateCache has no keys and values to update; layers store tensors through a Context")

    def get_seq_length(self) -> int:
        return 0 if self.seen is None else int(self.seen)

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        self.tensors, self.seen = {}, None

    def offload(self) -> None:
        raise ValueError("a StateCache is small and stays on its device: offloading is not supported")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.tensors = {name: x.index_select(0, beam_idx.to(x.device)) for name, x in self.tensors.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.tensors = {name: x.repeat_interleave(repeats, dim=0) for name, x in self.tensors.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        self.tensors = {name: x[indices] for name, x in self.tensors.items()}

    def crop(self, *args: Any) -> None:
        raise ValueError("a recurrent state cannot be cropped: what it forgot is gone")


class StateCache(Cache):
    """The states of all layers. A fresh one is empty; layers are added as they are asked for."""

    def __init__(self, num_layers: int = 0) -> None:
        super().__init__(layers=[LayerState() for _ in range(num_layers)])

    def layer(self, layer_idx: int) -> LayerState:
        while len(self.layers) <= layer_idx:
            self.layers.append(LayerState())
        return cast(LayerState, self.layers[layer_idx])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layer(layer_idx).get_seq_length() if layer_idx < len(self.layers) else 0


def given_cache(past_key_values: Any, cache: Any, others: dict[str, Any]) -> StateCache | None:
    """The cache under either of its names; ValueError if it is of another kind, or among the other arguments."""
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of one argument, got both")
    given = cache if past_key_values is None else past_key_values
    if given is not None and not isinstance(given, StateCache):
        raise ValueError(f"past_key_values must be a StateCache, got {type(given).__name__}")
    for name, value in others.items():
        if isinstance(value, Cache):  # it would be dropped, and the tokens before it with it
            raise ValueError(f"a cache is given as past_key_values or as cache, got one as {name}")
    return given


class Context:
    """One call of one layer: its state and the padding of its T tokens.

    `mask` is [B, T], True at real tokens, or None where all are real. At padding a layer writes nothing to its state,
    decays nothing and convolves nothing: `hide`, `shift` and `ShortConvolution` see to it.
    """

    def __init__(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        layer_idx: int | None = None,
    ) -> None:
        self.carried: Tensor | None = None
        self.shape = x.shape[:2]
        self.device = x.device
        self.mask = None if attention_mask is None else attention_mask[:, -x.shape[1] :].bool()
        self.state: LayerState | None = None
        if past_key_values is not None:
            if layer_idx is None:
                raise ValueError("a layer needs layer_idx to use past_key_values, got layer_idx=None")
            self.state = past_key_values.layer(layer_idx)

    def load(self, name: str) -> Tensor | None:
        """The tensor that an earlier call stored, or None."""
        return None if self.state is None else self.state.tensors.get(name)

    def store(self, name: str, value: Tensor) -> None:
        """Keep a tensor [B, ...] for the next call, if there is a cache."""
        if self.state is not None:
            self.state.tensors[name] = value

    def store_part(self, name: str, value: Tensor) -> None:
        """Keep a copy of a slice, laid out alike at every call: the slice itself would keep the whole alive."""
        if self.state is not None:
            self.store(name, value.clone(memory_format=torch.contiguous_format))

    def hide(self, *xs: Tensor) -> Any:
        """Each x [B, T, ...] with zeros at padding."""
        hidden = list(xs)
        if self.mask is not None:
            hidden = [x.masked_fill(~self.mask.view(*self.shape, *[1] * (x.ndim - 2)), 0) for x in xs]
        return hidden[0] if len(hidden) == 1 else hidden

    def positions(self) -> Tensor:
        """[B, T] (or [1, T]): how many real tokens came before each one. Call it once per layer and call."""
        before = self.load("length")
        if self.mask is None:
            positions = torch.arange(self.shape[1], device=self.device)[None]
            length = torch.full((self.shape[0],), self.shape[1], device=self.device)
        else:
            positions = (self.mask.long().cumsum(1) - 1).clamp(min=0)
            length = self.mask.long().sum(1)
        if before is not None:
            positions, length = positions + before[:, None], length + before
        self.store("length", length)
        return positions

    def mark(self, positions: Tensor) -> Tensor:
        """The positions with -1 at padding."""
        return positions if self.mask is None else positions.masked_fill(~self.mask, -1)

    def shift(self, x: Tensor, name: str) -> Tensor:
        """x [B, T, D] one real token later; zeros before the first. The last one is kept under this name."""
        last = self.load(name)
        x = torch.cat([torch.zeros_like(x[:, :1]) if last is None else last, x], 1)
        previous = x[:, :-1]
        if self.mask is not None:
            place, (x,) = pack_right(F.pad(self.mask, (1, 0), value=True), x)
            previous = x.gather(1, (place[:, 1:] - 1).clamp(min=0)[..., None].expand_as(previous))
        self.store_part(name, x[:, -1:])
        return previous

    def close(self) -> None:
        """Count this call's tokens as seen."""
        if self.state is not None:
            before = self.state.seen
            seen = torch.full((), self.shape[1], device=self.device)
            self.state.seen = seen if before is None else before + seen


def pack_right(mask: Tensor, *xs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Move the real entries of each x [B, S, ...] to the right end, in order; first, where each went, [B, S]."""
    order = mask.int().argsort(dim=1, stable=True)
    packed = [x.gather(1, order.view(*order.shape, *[1] * (x.ndim - 2)).expand_as(x)) for x in xs]
    return order.argsort(dim=1), packed

"""The configuration that all models share: the fields of fla's configs, checked once."""

from typing import Any

from transformers import PreTrainedConfig


def normalise_attention(attn: dict | list | None, num_hidden_layers: int) -> dict | list | None:
    """`config.attn` with its defaults filled in; ValueError where a field is missing, or a layer absent or taken."""
    taken: set[int] = set()

    def one(spec: dict) -> dict:
        if missing := {"layers", "num_heads"} - spec.keys():
            raise ValueError(f"attn needs the fields {sorted(missing)}, got {sorted(spec)}")
        filled = {"num_kv_heads": None, "qkv_bias": False, "window_size": None, "rope_theta": 10000.0, **spec}
        filled["num_kv_heads"] = filled["num_kv_heads"] or filled["num_heads"]
        filled["layers"] = list(spec["layers"])
        for layer in filled["layers"]:
            if not 0 <= layer < num_hidden_layers or layer in taken:
                raise ValueError(f"attn.layers must be distinct and below {num_hidden_layers}, got {spec['layers']}")
            taken.add(layer)
        return filled

    if attn is None:
        return None
    return one(attn) if isinstance(attn, dict) else [one(spec) for spec in attn]


class LinearAttentionConfig(PreTrainedConfig):
    """Base of all configs. `fuse_*` and `attn_mode` pick kernels in fla; here parameter names depend on some of them.

    `fuse_linear_cross_entropy`: in training with labels the loss comes alone, its logits None, so that the compiled
    model never forms them. `fuse_cross_entropy` is saved as False beside it, as fla takes only one of them.
    """

    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    attn_mode: str = "chunk"
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    hidden_ratio: int | float | None = 4
    intermediate_size: int | None = None
    hidden_act: str = "swish"
    vocab_size: int = 32000
    max_position_embeddings: int | None = 2048
    norm_eps: float = 1e-6
    elementwise_affine: bool | None = True
    initializer_range: float = 0.02
    attn: dict | list | None = None
    attnres_block_size: int | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    fuse_norm: bool = True
    fuse_swiglu: bool = True
    fuse_cross_entropy: bool = True
    fuse_linear_cross_entropy: bool = False
    use_l2warp: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.attnres_block_size is not None:
            raise ValueError(f"attnres_block_size must be None (attention residuals), got {self.attnres_block_size}")
        self.attn = normalise_attention(self.attn, self.num_hidden_layers)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        found = super().to_dict()
        if self.fuse_linear_cross_entropy:
            found["fuse_cross_entropy"] = False
        return found

    def attention_at(self, layer_idx: int) -> dict[str, Any] | None:
        """The arguments of the softmax attention that a hybrid has at this layer, or None."""
        specs = self.attn if isinstance(self.attn, list) else [self.attn] if self.attn else []
        for spec in specs:
            if layer_idx in spec["layers"]:
                return {name: value for name, value in spec.items() if name != "layers"}
        return None

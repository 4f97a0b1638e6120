"""The one decoder: pre-norm blocks of a mixer and a feed-forward, and the Hugging Face classes around them.

`define(XConfig, XMixer)` makes XPreTrainedModel, XModel and XForCausalLM and registers them with the Auto classes.
"""

import sys
from typing import Any, ClassVar, cast

import torch
import torch.nn as nn
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from fla_compile.models.attention import Attention
from fla_compile.models.cache import CACHE_NAME, StateCache, given_cache
from fla_compile.models.configuration import LinearAttentionConfig
from fla_compile.models.layers import GatedMLP, RMSNorm, widen
from fla_compile.models.loss import pull_of_largest
from fla_compile.models.mixer import TokenMixer


class Block(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x)). Models with other parts or names override what is above `__init__`."""

    mixer_class: ClassVar[type[TokenMixer]]
    mixer_name: ClassVar[str] = "attn"
    mixer_norm_name: ClassVar[str] = "attn_norm"
    mlp_name: ClassVar[str] = "mlp"
    mlp_norm_name: ClassVar[str] = "mlp_norm"

    @staticmethod
    def new_norm(config: LinearAttentionConfig) -> nn.Module:
        return RMSNorm(config.hidden_size, eps=config.norm_eps)

    @staticmethod
    def new_mlp(config: LinearAttentionConfig, layer_idx: int) -> nn.Module | None:
        """Takes hidden states, `attention_mask=` and `past_key_values=`; None for a block without feed-forward."""
        return GatedMLP(config.hidden_size, config.hidden_ratio, config.intermediate_size, config.hidden_act)

    def __init__(self, config: LinearAttentionConfig, layer_idx: int) -> None:
        super().__init__()
        self.residual_in_fp32 = getattr(config, "residual_in_fp32", False)
        if getattr(config, "norm_first", False) and layer_idx == 0:
            self.pre_norm = self.new_norm(config)
        self.add_module(self.mixer_norm_name, self.new_norm(config))
        spec = config.attention_at(layer_idx)
        if spec is None:
            mixer = self.mixer_class.from_config(config, layer_idx)
        else:
            mixer = Attention(config.hidden_size, layer_idx=layer_idx, **spec)
        self.add_module(self.mixer_name, mixer)
        mlp = self.new_mlp(config, layer_idx)
        if mlp is not None:
            self.add_module(self.mlp_norm_name, self.new_norm(config))
            self.add_module(self.mlp_name, mlp)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        carried: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, T, D], and what mixers hand from layer to layer."""
        shared = {"attention_mask": attention_mask, "past_key_values": past_key_values}
        x = self.pre_norm(hidden_states) if hasattr(self, "pre_norm") else hidden_states
        mixer = getattr(self, self.mixer_name)
        if mixer.carries is not None:
            kwargs[mixer.carries] = carried
        y, _, _, *rest = mixer(getattr(self, self.mixer_norm_name)(x), **shared, **kwargs)
        x = self.add_residual(x, y)
        if hasattr(self, self.mlp_name):
            y = getattr(self, self.mlp_name)(getattr(self, self.mlp_norm_name)(x), **shared)
            x = self.add_residual(x, y)
        return x, rest[0] if rest else carried

    def add_residual(self, x: Tensor, y: Tensor) -> Tensor:
        return (widen(x) + y).to(y.dtype) if self.residual_in_fp32 else x + y


class DecoderPreTrainedModel(PreTrainedModel):
    """Base of all models: initialisation, embeddings, and what transformers may assume."""

    config_class = LinearAttentionConfig
    block_class: ClassVar[type[Block]] = Block
    final_norm_name: ClassVar[str] = "norm"
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _input_embed_layer = "embeddings"
    _is_stateful = True
    _supports_sdpa = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        own = None if isinstance(module, PreTrainedModel) else getattr(module, "init_weights", None)
        if callable(own):
            own(self.config)


class DecoderModel(DecoderPreTrainedModel):
    """Embeddings, blocks and a final norm."""

    def __init__(self, config: LinearAttentionConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(self.block_class(config, i) for i in range(config.num_hidden_layers))
        self.add_module(self.final_norm_name, self.block_class.new_norm(config))
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = cast(nn.Embedding, value)

    def first_carried(self) -> Tensor | None:
        """What the first mixer receives of what goes from layer to layer."""
        return None

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: StateCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: StateCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, T] or inputs_embeds [B, T, D]; attention_mask [B, T or more], 1 at real tokens.

        `cache` is another name of `past_key_values`, the one that transformers uses since 5.24.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if isinstance(attention_mask, dict):
            attention_mask = next((mask for mask in attention_mask.values() if mask is not None), None)
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"attention_mask must be [B, T], got the shape {tuple(attention_mask.shape)}")
        past_key_values = given_cache(past_key_values, cache, kwargs)
        if self.gradient_checkpointing and self.training:
            past_key_values = None  # the backward runs layers again: they would move it on twice
        elif past_key_values is None and use_cache:
            past_key_values = StateCache(self.config.num_hidden_layers)

        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        carried = self.first_carried()
        shared: dict[str, Any] = {
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            **kwargs,
        }
        seen: list[Tensor] = []
        for layer in self.layers:
            if output_hidden_states:
                seen.append(x)
            x, carried = layer(x, carried, **shared)
        x = getattr(self, self.final_norm_name)(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*seen, x) if output_hidden_states else None,  # type: ignore[arg-type]
            **cast(Any, {CACHE_NAME: past_key_values if use_cache else None}),
        )


class DecoderForCausalLM(DecoderPreTrainedModel, GenerationMixin):
    """A model with a language-modelling head."""

    model_class: ClassVar[type[DecoderModel]] = DecoderModel

    def __init__(self, config: LinearAttentionConfig) -> None:
        super().__init__(config)
        self.add_module(self.base_model_prefix, self.model_class(config))
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return cast(DecoderModel, self.base_model).embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        cast(DecoderModel, self.base_model).embeddings = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_decoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.base_model

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        cache: StateCache | None = None,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocabulary], or the last `logits_to_keep`, and the loss of `labels` [B, T], shifted inside.

        A keyword `shift_labels` [B, T] gives labels shifted already. With `skip_logits` the loss comes alone, logits
        None, and the compiled model never forms them; so in training under `config.fuse_linear_cross_entropy`.
        """
        shift_labels = kwargs.pop("shift_labels", None)  # no parameter: Trainer would want every label that it finds
        labelled = labels is not None or shift_labels is not None
        if skip_logits is None:
            skip_logits = labelled and self.training and self.config.fuse_linear_cross_entropy
        elif skip_logits and not labelled:
            raise ValueError("skip_logits must be False without labels, as nothing would come back, got True")
        outputs = getattr(self, self.base_model_prefix)(
            input_ids,
            attention_mask,
            inputs_embeds,
            past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cache=cache,
            **kwargs,
        )
        x, loss = outputs.last_hidden_state, None
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x if labelled else x[:, kept])
        if labelled:
            extra = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels}
            extra = {name: value for name, value in extra.items() if value is not None}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **extra)
            if self.config.use_l2warp:
                loss = loss + pull_of_largest(self.lm_head, x, None if skip_logits else logits)
            logits = None if skip_logits else logits[:, kept]
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE_NAME: getattr(outputs, CACHE_NAME)}
        )

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError(f"cache_implementation must be None, got {generation_config.cache_implementation!r}")
        if model_kwargs.get(CACHE_NAME) is not None:
            model_kwargs[CACHE_NAME]._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = StateCache(self.config.num_hidden_layers)


def define(
    config_class: type[LinearAttentionConfig],
    mixer_class: type[TokenMixer],
    block_class: type[Block] = Block,
    *,
    base_model_prefix: str = "model",
    final_norm_name: str = "norm",
    base_class: type[DecoderPreTrainedModel] = DecoderPreTrainedModel,
    model_class: type[DecoderModel] = DecoderModel,
) -> tuple[type[DecoderPreTrainedModel], type[DecoderModel], type[DecoderForCausalLM]]:
    """Make XPreTrainedModel, XModel and XForCausalLM for XConfig, and register them with the Auto classes."""
    name = config_class.__name__.removesuffix("Config")
    home = {"__module__": config_class.__module__}
    block = type(f"{name}Block", (block_class,), {**home, "mixer_class": mixer_class})
    traits = {
        **home,
        "config_class": config_class,
        "block_class": block,
        "base_model_prefix": base_model_prefix,
        "final_norm_name": final_norm_name,
        "_no_split_modules": [block.__name__],
    }
    base: Any = type(f"{name}PreTrainedModel", (base_class,), traits)
    model: Any = type(f"{name}Model", (base, model_class), dict(home))
    tied = {"lm_head.weight": f"{base_model_prefix}.embeddings.weight"}
    causal: Any = type(
        f"{name}ForCausalLM", (base, DecoderForCausalLM), {**home, "model_class": model, "_tied_weights_keys": tied}
    )
    setattr(sys.modules[config_class.__module__], block.__name__, block)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model, exist_ok=True)
    AutoModelForCausalLM.register(config_class, causal, exist_ok=True)
    return base, model, causal

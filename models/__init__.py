"""Hugging Face models whose token mixing is a plain PyTorch recurrence."""

from fla_compile.models.abc import ABCAttention, ABCConfig, ABCForCausalLM, ABCModel, ABCPreTrainedModel
from fla_compile.models.attention import Attention
from fla_compile.models.based import (
    BasedConfig,
    BasedForCausalLM,
    BasedLinearAttention,
    BasedModel,
    BasedPreTrainedModel,
)
from fla_compile.models.cache import StateCache
from fla_compile.models.configuration import LinearAttentionConfig
from fla_compile.models.delta_net import (
    DeltaNet,
    DeltaNetConfig,
    DeltaNetForCausalLM,
    DeltaNetModel,
    DeltaNetPreTrainedModel,
)
from fla_compile.models.gated_delta_net import (
    GatedDeltaNet,
    GatedDeltaNetConfig,
    GatedDeltaNetForCausalLM,
    GatedDeltaNetModel,
    GatedDeltaNetPreTrainedModel,
)
from fla_compile.models.gla import GatedLinearAttention, GLAConfig, GLAForCausalLM, GLAModel, GLAPreTrainedModel
from fla_compile.models.gsa import GatedSlotAttention, GSAConfig, GSAForCausalLM, GSAModel, GSAPreTrainedModel
from fla_compile.models.hgrn import HGRNAttention, HGRNConfig, HGRNForCausalLM, HGRNModel, HGRNPreTrainedModel
from fla_compile.models.hgrn2 import HGRN2Attention, HGRN2Config, HGRN2ForCausalLM, HGRN2Model, HGRN2PreTrainedModel
from fla_compile.models.kda import KDAConfig, KDAForCausalLM, KDAModel, KDAPreTrainedModel, KimiDeltaAttention
from fla_compile.models.mamba import Mamba, MambaConfig, MambaForCausalLM, MambaModel, MambaPreTrainedModel
from fla_compile.models.mamba2 import Mamba2, Mamba2Config, Mamba2ForCausalLM, Mamba2Model, Mamba2PreTrainedModel
from fla_compile.models.rebased import (
    RebasedConfig,
    RebasedForCausalLM,
    ReBasedLinearAttention,
    RebasedModel,
    RebasedPreTrainedModel,
)
from fla_compile.models.retnet import (
    MultiScaleRetention,
    RetNetConfig,
    RetNetForCausalLM,
    RetNetModel,
    RetNetPreTrainedModel,
)
from fla_compile.models.rwkv6 import (
    RWKV6Attention,
    RWKV6Config,
    RWKV6ForCausalLM,
    RWKV6Model,
    RWKV6PreTrainedModel,
)
from fla_compile.models.rwkv7 import (
    RWKV7Attention,
    RWKV7Config,
    RWKV7ForCausalLM,
    RWKV7Model,
    RWKV7PreTrainedModel,
)
from fla_compile.models.samba import SambaConfig, SambaForCausalLM, SambaModel, SambaPreTrainedModel
from fla_compile.models.transformer import (
    TransformerConfig,
    TransformerForCausalLM,
    TransformerModel,
    TransformerPreTrainedModel,
)

__all__ = [
    "ABCAttention",
    "ABCConfig",
    "ABCForCausalLM",
    "ABCModel",
    "ABCPreTrainedModel",
    "Attention",
    "BasedConfig",
    "BasedForCausalLM",
    "BasedLinearAttention",
    "BasedModel",
    "BasedPreTrainedModel",
    "DeltaNet",
    "DeltaNetConfig",
    "DeltaNetForCausalLM",
    "DeltaNetModel",
    "DeltaNetPreTrainedModel",
    "GLAConfig",
    "GLAForCausalLM",
    "GLAModel",
    "GLAPreTrainedModel",
    "GSAConfig",
    "GSAForCausalLM",
    "GSAModel",
    "GSAPreTrainedModel",
    "GatedDeltaNet",
    "GatedDeltaNetConfig",
    "GatedDeltaNetForCausalLM",
    "GatedDeltaNetModel",
    "GatedDeltaNetPreTrainedModel",
    "GatedLinearAttention",
    "GatedSlotAttention",
    "HGRN2Attention",
    "HGRN2Config",
    "HGRN2ForCausalLM",
    "HGRN2Model",
    "HGRN2PreTrainedModel",
    "HGRNAttention",
    "HGRNConfig",
    "HGRNForCausalLM",
    "HGRNModel",
    "HGRNPreTrainedModel",
    "KDAConfig",
    "KDAForCausalLM",
    "KDAModel",
    "KDAPreTrainedModel",
    "KimiDeltaAttention",
    "LinearAttentionConfig",
    "Mamba",
    "Mamba2",
    "Mamba2Config",
    "Mamba2ForCausalLM",
    "Mamba2Model",
    "Mamba2PreTrainedModel",
    "MambaConfig",
    "MambaForCausalLM",
    "MambaModel",
    "MambaPreTrainedModel",
    "MultiScaleRetention",
    "RWKV6Attention",
    "RWKV6Config",
    "RWKV6ForCausalLM",
    "RWKV6Model",
    "RWKV6PreTrainedModel",
    "RWKV7Attention",
    "RWKV7Config",
    "RWKV7ForCausalLM",
    "RWKV7Model",
    "RWKV7PreTrainedModel",
    "ReBasedLinearAttention",
    "RebasedConfig",
    "RebasedForCausalLM",
    "RebasedModel",
    "RebasedPreTrainedModel",
    "RetNetConfig",
    "RetNetForCausalLM",
    "RetNetModel",
    "RetNetPreTrainedModel",
    "SambaConfig",
    "SambaForCausalLM",
    "SambaModel",
    "SambaPreTrainedModel",
    "StateCache",
    "TransformerConfig",
    "TransformerForCausalLM",
    "TransformerModel",
    "TransformerPreTrainedModel",
]

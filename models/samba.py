"""Samba (Ren et al., 2024, arXiv:2406.07522): Mamba for what lies far back, attention in a window for what is near."""

from dataclasses import field
from typing import Any, ClassVar

from fla_compile.models.configuration import LinearAttentionConfig
from fla_compile.models.decoder import define
from fla_compile.models.layers import GatedMLP
from fla_compile.models.mamba import Mamba, MambaBlock, StateSpaceConfig


def every_other_layer() -> dict[str, Any]:
    heads = {"num_heads": 18, "num_kv_heads": 18, "qkv_bias": False}
    return {"layers": [*range(1, 18, 2)], **heads, "window_size": 2048, "rope_theta": 10000.0}


class SambaConfig(StateSpaceConfig):
    """Fields as in fla-hub/samba-*; the default `attn` is cut to the layers there are, None means Mamba throughout."""

    model_type = "samba"

    hidden_size: int = 2304
    state_size: int = 16
    num_hidden_layers: int = 18
    hidden_act: str = "swish"
    residual_in_fp32: bool = False
    time_step_rank: str | int = "auto"
    time_step_scale: float = 1.0
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_init_scheme: str = "random"
    time_step_floor: float = 1e-4
    attn: dict | list | None = field(default_factory=every_other_layer)
    rescale_prenorm_residual: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if (
            isinstance(self.attn, dict)
            and {**self.attn, "layers": [*self.attn.get("layers", ())]} == every_other_layer()
        ):
            self.attn = {**self.attn, "layers": [*range(1, min(18, self.num_hidden_layers), 2)]}
        super().__post_init__(**kwargs)


class SambaMixer(Mamba):
    """Mamba by Samba's field names; silu and a bias in its convolution, whatever the config says."""

    config_names: ClassVar[dict[str, str | None]] = {
        "dt_rank": "time_step_rank",
        "dt_scale": "time_step_scale",
        "dt_min": "time_step_min",
        "dt_max": "time_step_max",
        "dt_init": "time_step_init_scheme",
        "dt_init_floor": "time_step_floor",
        "use_conv_bias": None,
        "hidden_act": None,
    }


class SambaBlock(MambaBlock):
    mixer_norm_name = "mixer_norm"

    @staticmethod
    def new_mlp(config: LinearAttentionConfig, layer_idx: int) -> GatedMLP:
        return GatedMLP(config.hidden_size, config.hidden_ratio, hidden_act=config.hidden_act)


SambaPreTrainedModel, SambaModel, SambaForCausalLM = define(
    SambaConfig, SambaMixer, SambaBlock, base_model_prefix="backbone", final_norm_name="norm_f"
)

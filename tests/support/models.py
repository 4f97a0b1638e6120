"""Every registered model, tiny, with what is expected of it: the tests of models run over this table."""

import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peers import peer
from torch import nn
from transformers import PreTrainedModel

import fla_compile.models

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}

STATE_SPACE = ("num_heads", "intermediate_size", "max_position_embeddings")


@dataclass(frozen=True)
class Case:
    """`name` is the X of XConfig and XForCausalLM; `families` the recurrences of a training step, layer by layer.

    `masked_families`: the same with an attention mask, where it differs. `peer`: X in fla.models, "" if it is the same,
    None if fla has only the layer, as `peer_layer` (`fla.layers...`), which is `layer` here.
    """

    name: str
    families: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict)
    masked_families: tuple[str, ...] | None = None
    peer: str | None = ""
    layer: str = ""
    peer_layer: str = ""
    layer_arguments: dict[str, Any] = field(default_factory=lambda: {"hidden_size": 32, "num_heads": 2})
    label: str = ""
    convolutions: int = 0  # short ones, in a layer
    without: tuple[str, ...] = ()  # fields of TINY that this config does not have

    def __str__(self) -> str:
        return self.label or self.name

    def fields(self, **changes: Any) -> dict[str, Any]:
        return {k: v for k, v in {**TINY, **self.config, **changes}.items() if k not in self.without}

    @property
    def model_class(self) -> Any:
        return getattr(fla_compile.models, f"{self.name}ForCausalLM")

    def new_config(self, **changes: Any) -> Any:
        return getattr(fla_compile.models, f"{self.name}Config")(**self.fields(**changes))

    def new_model(self, seed: int = 0, **changes: Any) -> PreTrainedModel:
        """A model of which no parameter is at a special value, and no greedy choice a tie."""
        torch.manual_seed(seed)
        model = self.model_class(self.new_config(**changes))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        return model

    def new_pair(self, **changes: Any) -> tuple[nn.Module, nn.Module]:
        """Our model, or layer, and fla's of the same arguments, with the same weights."""
        if self.peer is None:
            arguments = {**self.layer_arguments, **changes}
            torch.manual_seed(0)
            ours: nn.Module = getattr(fla_compile.models, self.layer)(**arguments)
            with torch.no_grad():
                for p in ours.parameters():
                    p.add_(0.1 * torch.randn_like(p))
            theirs = peer(self.peer_layer)(**arguments)
        else:
            ours, name = self.new_model(**changes), f"fla.models.{self.peer or self.name}"
            theirs = peer(f"{name}ForCausalLM")(peer(f"{name}Config")(**self.fields(**changes)))
        theirs.load_state_dict(ours.state_dict(), strict=True)
        return ours, theirs


MODELS = (
    Case("RetNet", ("retention",) * 2, masked_families=("simple_gla",) * 2),
    Case("GLA", ("gla",) * 2),
    Case(
        "GLA",
        ("gla",) * 2,
        {"use_short_conv": True, "num_heads": 4, "num_kv_heads": 2},
        label="GLA-conv-grouped",
        convolutions=3,
    ),
    Case(
        "GLA",
        ("gla",),
        {"attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 6}},
        label="GLA-hybrid",
    ),
    Case(
        "Based",
        ("linear_attention",) * 2,
        {"num_key_value_heads": 2, "feature_dim": 4},
        peer=None,
        layer="BasedLinearAttention",
        peer_layer="fla.layers.based.BasedLinearAttention",
        layer_arguments={"hidden_size": 32, "num_heads": 2, "num_key_value_heads": 2},
    ),
    Case(
        "Rebased",
        ("linear_attention",) * 2,
        # eps: o_1 = a v / (a + eps) with a = (q^T k)^2, and near a = 0 an eps of 1e-5 shows float32's roundings.
        {"num_key_value_heads": 2, "feature_dim": 4, "eps": 0.01},
        peer=None,
        layer="ReBasedLinearAttention",
        peer_layer="fla.layers.rebased.ReBasedLinearAttention",
        layer_arguments={"hidden_size": 32, "num_heads": 2, "num_key_value_heads": 2},
    ),
    Case("ABC", ("linear_attention + linear_scan",) * 2, {"num_slots": 16}),
    Case(
        "ABC",
        ("linear_attention + linear_scan",) * 2,
        {"num_slots": 16, "use_short_conv": True},
        label="ABC-conv",
        convolutions=3,
    ),
    Case("GSA", ("gla",) * 2, {"num_slots": 16}),
    Case(
        "GSA",
        ("gla",) * 2,
        {"num_slots": 16, "num_kv_heads": 1, "use_short_conv": True, "feature_map": "t2r"},
        label="GSA-conv-grouped",
        convolutions=3,
    ),
    Case("HGRN", ("linear_scan",) * 2, without=("num_heads",)),
    Case(
        "HGRN",
        ("linear_scan",) * 2,
        {"use_short_conv": True},
        without=("num_heads",),
        label="HGRN-conv",
        convolutions=2,
    ),
    Case("HGRN2", ("gla",) * 2, {"expand_ratio": None}),
    Case("HGRN2", ("gla",) * 2, {"expand_ratio": None, "use_short_conv": True}, label="HGRN2-conv", convolutions=3),
    Case("RWKV6", ("rwkv6",) * 2, {"proj_low_rank_dim": 8, "gate_low_rank_dim": 8}),
    Case(
        "RWKV7",
        ("dplr",) * 2,
        {"head_dim": 16, **{f"{name}_low_rank_dim": 8 for name in ("decay", "gate", "a", "v")}},
    ),
    Case("DeltaNet", ("delta_rule",) * 2, convolutions=3),
    Case(
        "DeltaNet",
        ("delta_rule",) * 2,
        {"use_gate": True, "use_beta": False, "allow_neg_eigval": True, "qk_activation": "elu", "qk_norm": "sum"},
        label="DeltaNet-gated",
        convolutions=3,
    ),
    Case(
        "DeltaNet",
        ("delta_rule",) * 2,
        {"use_short_conv": False, "qk_activation": "relu", "expand_k": 0.5},
        label="DeltaNet-plain",
    ),
    Case("GatedDeltaNet", ("gated_delta_rule",) * 2, {"head_dim": 16}, convolutions=3),
    Case(
        "GatedDeltaNet",
        ("gated_delta_rule",) * 2,
        {"head_dim": 16, "num_v_heads": 4, "use_gate": False, "allow_neg_eigval": True},
        label="GatedDeltaNet-grouped",
        convolutions=3,
    ),
    Case("KDA", ("kda",) * 2, {"head_dim": 16}, convolutions=3),
    Case(
        "KDA",
        ("kda",) * 2,
        {"head_dim": 16, "num_v_heads": 4, "expand_v": 2.0, "lower_bound": -5.0},
        label="KDA-grouped",
        convolutions=3,
    ),
    Case("Mamba", ("selective_scan",) * 2, without=STATE_SPACE, convolutions=1),
    Case("Mamba2", ("simple_gla",) * 2, {"head_dim": 16, "state_size": 8}, without=STATE_SPACE, convolutions=1),
    Case(
        "Mamba2",
        ("simple_gla",) * 2,
        {"head_dim": 8, "state_size": 8, "D_has_hdim": True, "norm_before_gate": True, "dt_limit": (0.01, 0.2)},
        without=STATE_SPACE,
        convolutions=1,
        label="Mamba2-limited",
    ),
    Case(
        "Samba",
        ("selective_scan",),
        {"attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 6}},
        without=STATE_SPACE,
        convolutions=1,
    ),
    Case("Transformer", (), {"num_heads": 4, "num_kv_heads": 2}),
    Case("Transformer", (), {"window_size": 5, "qk_norm": True, "qkv_bias": True}, label="Transformer-window"),
)


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids [B, T], none of them padding."""
    return torch.randint(1, TINY["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def corpus(length: int) -> torch.Tensor:
    """The first bytes of the standard library's source, [length]."""
    text, folder = b"", Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(folder.glob("*.py")):
        text += file.read_bytes()
        if len(text) >= length:
            return torch.frombuffer(bytearray(text[:length]), dtype=torch.uint8).long()
    raise ValueError(f"the standard library in {folder} has {len(text)} bytes, {length} are needed")

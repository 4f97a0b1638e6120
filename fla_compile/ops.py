"""The operators as plain functions, each with the time loop that defines it."""

from importlib import import_module
from importlib.util import find_spec

import torch

from fla_compile.kernels.cross_entropy import cross_entropy, naive_cross_entropy
from fla_compile.kernels.decay_naive import (
    naive_gla,
    naive_linear_attention,
    naive_retention,
    naive_rwkv6,
    naive_simple_gla,
)
from fla_compile.kernels.decay_ops import gla, linear_attention, retention, simple_gla
from fla_compile.kernels.decay_step import (
    gla_step,
    linear_attention_step,
    retention_step,
    rwkv6_step,
    simple_gla_step,
)
from fla_compile.kernels.decay_step_naive import (
    naive_gla_step,
    naive_linear_attention_step,
    naive_retention_step,
    naive_rwkv6_step,
    naive_simple_gla_step,
)
from fla_compile.kernels.delta_naive import naive_delta_rule, naive_dplr, naive_gated_delta_rule, naive_kda
from fla_compile.kernels.delta_ops import delta_rule, dplr, gated_delta_rule, kda
from fla_compile.kernels.linear_cross_entropy import linear_cross_entropy, naive_linear_cross_entropy
from fla_compile.kernels.linear_kl_div import linear_kl_div, naive_linear_kl_div
from fla_compile.kernels.linear_scan import linear_scan, naive_linear_scan
from fla_compile.kernels.norm_gate import naive_norm_gate, norm_gate
from fla_compile.kernels.norm_gate_linear import naive_norm_gate_linear, norm_gate_linear
from fla_compile.kernels.rwkv6_ops import rwkv6
from fla_compile.kernels.selective_scan import naive_selective_scan, selective_scan
from fla_compile.kernels.short_conv import short_conv, short_conv_step
from fla_compile.kernels.short_conv_naive import naive_short_conv, naive_short_conv_step

__all__ = [
    "cross_entropy",
    "delta_rule",
    "dplr",
    "gated_delta_rule",
    "gla",
    "gla_step",
    "kda",
    "linear_attention",
    "linear_attention_step",
    "linear_cross_entropy",
    "linear_kl_div",
    "linear_scan",
    "naive_cross_entropy",
    "naive_delta_rule",
    "naive_dplr",
    "naive_gated_delta_rule",
    "naive_gla",
    "naive_gla_step",
    "naive_kda",
    "naive_linear_attention",
    "naive_linear_attention_step",
    "naive_linear_cross_entropy",
    "naive_linear_kl_div",
    "naive_linear_scan",
    "naive_norm_gate",
    "naive_norm_gate_linear",
    "naive_retention",
    "naive_retention_step",
    "naive_rwkv6",
    "naive_rwkv6_step",
    "naive_selective_scan",
    "naive_short_conv",
    "naive_short_conv_step",
    "naive_simple_gla",
    "naive_simple_gla_step",
    "norm_gate",
    "norm_gate_linear",
    "retention",
    "retention_step",
    "rwkv6",
    "rwkv6_step",
    "selective_scan",
    "short_conv",
    "short_conv_step",
    "simple_gla",
    "simple_gla_step",
]

if torch.backends.cuda.is_built() and find_spec("triton"):
    # Most of a first call that finds its kernels on disk. No GPU is looked for here: that would spoil a later fork.
    import_module("fla_compile.kernels.decay_triton")
    import_module("fla_compile.kernels.library_hash").begin_hash()

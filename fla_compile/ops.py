"""The operators as plain functions, each with the time loop that defines it."""

from fla_compile.kernels.decay_naive import (
    naive_gla,
    naive_linear_attention,
    naive_retention,
    naive_simple_gla,
)
from fla_compile.kernels.decay_ops import gla, linear_attention, retention, simple_gla

__all__ = [
    "gla",
    "linear_attention",
    "naive_gla",
    "naive_linear_attention",
    "naive_retention",
    "naive_simple_gla",
    "retention",
    "simple_gla",
]

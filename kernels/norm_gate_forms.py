"""Norm times gate: the definition, in plain operations, and what all its implementations share.

    u = x                   (gate after)      or    u = x * act(gate)        (gate first)
    n = (u - mean(u)) * rsqrt(var(u) + eps) * weight + bias       rms: without the mean
    y = n * act(gate)       (gate after)      or    y = n            (gate first)

x, gate, y [..., P] with P = G * D: each run of D elements, a row, is normalised alone. D = P is a norm over the last
axis; D < P is one for each head, which is what GroupNorm over heads means. weight and bias [G, D] or [D], any shape.
act is silu(g) = g sigmoid(g) or sigmoid(g). Statistics and everything else in float32 (float64 with float64 operands),
rounded once, to `dtype`.

Sources: Zhang and Sennrich 2019 (arXiv:1910.07467); Ba et al. 2016 (arXiv:1607.06450); Wu and He 2018
(arXiv:1803.08494); the gate as in Sun et al. 2023 (arXiv:2307.08621) and Dao and Gu 2024 (arXiv:2405.21060).
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ACTIVATIONS", "NORMS", "Form", "naive_norm_gate", "wide_dtype"]

NORMS = ("rms", "layer")
ACTIVATIONS = {"silu": "silu", "swish": "silu", "sigmoid": "sigmoid"}


class Form(NamedTuple):
    """What is computed: rows of `width` elements; `layer` subtracts the mean; `silu` or the sigmoid alone."""

    width: int
    eps: float
    layer: bool
    silu: bool
    gate_first: bool


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any of them is, else float32."""
    doubles = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if doubles else torch.float32


def naive_norm_gate(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: str = "rms",
    activation: str = "silu",
    eps: float = 1e-5,
    gate_first: bool = False,
    width: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """As `norm_gate`, in plain operations: the definition, and what Inductor fuses on the CPU."""
    wide = wide_dtype(x, gate, weight, bias)
    D = x.shape[-1] if width is None else width
    G = x.shape[-1] // D
    g = gate.to(wide)
    act = torch.sigmoid(g) * g if ACTIVATIONS[activation] == "silu" else torch.sigmoid(g)
    u = x.to(wide)
    u = (u * act if gate_first else u).unflatten(-1, (G, D))
    if norm == "layer":
        u = u - u.mean(-1, keepdim=True)
    n = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps)
    n = n if weight is None else n * weight.to(wide).reshape(-1, D)
    n = n if bias is None else n + bias.to(wide).reshape(-1, D)
    n = n.flatten(-2)
    return (n if gate_first else n * act).to(x.dtype if dtype is None else dtype)

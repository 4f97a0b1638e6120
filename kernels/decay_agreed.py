"""Checks of the decayed ops' operands, made once for operands of the same sizes, types and devices."""

from typing import Any

import torch
from torch import Tensor

from fla_compile.kernels.decay_checks import FAMILIES, check_gate, check_operands
from fla_compile.kernels.decay_heads import check_heads
from fla_compile.kernels.decay_retnet import seen_by_others
from fla_compile.kernels.packed import check_packed

__all__ = ["MOST_AGREED", "check_call"]

# What was found to agree, so that a call need not look again: sizes, types and devices are all that is looked at.
MOST_AGREED = 4096
_agreed: set[tuple[Any, ...]] = set()


def check_call(
    family: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    gate: str = "g",
) -> None:
    """Raises ValueError for operands of a public op of heads that may be shared, naming the argument."""
    forms: tuple[Any, ...] | None = None
    known = not torch.compiler.is_compiling() and type(q) is Tensor and not seen_by_others()  # sizes are numbers
    if known and cu_seqlens is None:
        operands = q, k, v, g, initial_state
        forms = (family, *[None if x is None else (x.shape, x.dtype, x.device) for x in operands])
        if forms in _agreed:
            return
    check_operands(family, q, k, v, check_packed("q", q, cu_seqlens, initial_state), shared=True)
    if g is not None:
        check_gate(gate, g, FAMILIES[family], q, v, shared=True)
    check_heads(q, k, v, g, initial_state, gate)
    if forms is not None:
        if len(_agreed) >= MOST_AGREED:
            _agreed.clear()
        _agreed.add(forms)

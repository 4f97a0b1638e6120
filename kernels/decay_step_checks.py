"""The checks of operands of a decode step, whose heads may be fewer than the state's."""

import torch
from torch import Tensor

from fla_compile.kernels.decay_checks import DTYPES, MOST_STEPS
from fla_compile.kernels.operators import refuse_tangents

__all__ = ["check_no_gradient", "check_rank", "check_steps"]

# Axes of heads: those of an operand that states share, of q, and of the bonus.
HEADS = "GQU"
AXES = {1: "G", 3: "BTG", 4: "BTGK"}  # of g, by their number


def check_rank(name: str, x: Tensor, rank: int) -> None:
    if x.ndim != rank:
        raise ValueError(f"{name} must have {rank} dimensions, got {x.ndim}")


def check_no_gradient(**operands: Tensor | None) -> None:
    refuse_tangents(operands.values())
    if torch.is_grad_enabled():
        for name, x in operands.items():
            if x is not None and x.requires_grad:
                raise ValueError(f"{name} requires a gradient, which a decode step has not: use torch.no_grad()")


def check_steps(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, g: Tensor | None, gv: Tensor | None, u: Tensor | None
) -> None:
    """Raises ValueError naming the argument and both values; g of one dimension is called gamma."""
    if g is not None and g.ndim not in AXES:
        raise ValueError(f"g must have 1, 3 or 4 dimensions, got {g.ndim}")
    gate = ("gamma" if g is not None and g.ndim == 1 else "g", g, "" if g is None else AXES[g.ndim])
    operands = [("q", q, "BTQK"), ("k", k, "BTGK"), ("v", v, "BTGV"), ("state", state, "BHKV")]
    optional = [gate, ("gv", gv, "BTGV"), ("u", u, "UK")]
    operands += [(name, x, axes) for name, x, axes in optional if x is not None]
    for name, x, axes in operands:
        check_rank(name, x, len(axes))
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {x.dtype}, not one of {', '.join(map(str, DTYPES))}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q is on {q.device}")
        if name in ("k", "v") and x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}, q has {q.dtype}")
    if not 1 <= q.shape[1] <= MOST_STEPS:
        raise ValueError(f"q has T={q.shape[1]}, a decode step has 1 to {MOST_STEPS}; the chunk ops take more")
    if 0 in state.shape[1:]:
        raise ValueError(f"state has an axis of size 0: {tuple(state.shape)}")
    if any(stride == 0 and size > 1 for stride, size in zip(state.stride(), state.shape, strict=True)):
        raise ValueError(f"state is to be updated in place but shares memory with itself: strides {state.stride()}")
    B, H, K, V = state.shape
    sizes = {"B": ("state", B), "T": ("q", q.shape[1]), "H": ("state", H), "K": ("state", K), "V": ("state", V)}
    for name, x, axes in operands:
        for size, axis in zip(x.shape, axes, strict=True):
            if axis not in HEADS:
                of, expected = sizes[axis]
                if size != expected:
                    raise ValueError(f"{name} has {axis}={size}, {of} has {axis}={expected}")
                continue
            of, heads = ("o", max(H, q.shape[2])) if axis == "U" else ("state", H)
            several = axis == "Q" and size % heads == 0
            if size == 0 or (heads % size and not several):
                wanted = "a divisor or a multiple" if axis == "Q" else "a divisor"
                raise ValueError(f"{name} has H={size}, {of} has H={heads}, of which it must be {wanted}")

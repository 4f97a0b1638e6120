"""A part of the step that runs on all steps at once: vmap over time, but for products, which take rows as they lie.

Programs keep [B, T, ...], a time loop reads [T, B, ...]: views of one another, until a product makes rows of both axes
and copies what is not in order. Which of the two comes first is nothing to a product with a matrix that is the same at
every step, so it takes the one that needs no copy.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

__all__ = ["OverTime"]


class _Linear(torch.autograd.Function):
    """x w + b of one step, x [B, D] and w [D, E]; over all steps x is [T, B, D] in any order."""

    @staticmethod
    def forward(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, w.mT, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # over time it is not asked: below vmap, F.linear has gradients of its own
        x, w = ctx.saved_tensors
        return dy @ w.mT, x.mT @ dy, dy.sum(0) if ctx.needs_input_grad[2] else None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None, None], x: torch.Tensor, w: torch.Tensor,
             b: torch.Tensor | None) -> tuple[torch.Tensor, int]:  # fmt: skip
        x = x.movedim(in_dims[0], 0)
        if x.stride(0) < x.stride(1):
            return F.linear(x.movedim(0, 1), w.mT, b), 1
        return F.linear(x, w.mT, b), 0


def linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    return _Linear.apply(x, w, b)  # type: ignore[no-any-return]


def _is_row(bias: fx.Node) -> bool:
    """Whether every row gets the same: what `addmm` adds may also be a matrix, of a row each."""
    value = bias.meta.get("val")
    return value is not None and value.ndim <= 1


def _keep_order(step: fx.GraphModule, timed: Sequence[bool]) -> None:
    """Make `linear` of the products of rows that have time with matrices that have none."""
    placeholders = step.graph.find_nodes(op="placeholder")
    over_time = {node for node, t in zip(placeholders, timed, strict=True) if t}
    for node in step.graph.nodes:
        if any(n in over_time for n in node.all_input_nodes):
            over_time.add(node)
        if node.target is torch.ops.aten.mm.default:
            (x, w), b = node.args, None
        elif node.target is torch.ops.aten.addmm.default and not node.kwargs and _is_row(node.args[0]):
            b, x, w = node.args
        else:
            continue
        if x in over_time and w not in over_time and b not in over_time:
            node.target, node.args = linear, (x, w, b)
    step.recompile()


class OverTime(nn.Module):
    """Runs a module written for one time step on all of them: operands with time lead by [T, ...]."""

    def __init__(self, step: fx.GraphModule, timed: Sequence[bool]):
        super().__init__()
        self.step = step
        self.in_dims = tuple(0 if t else None for t in timed)
        _keep_order(step, timed)

    def forward(self, *operands: Any) -> tuple[torch.Tensor, ...]:
        return torch.vmap(self.step, in_dims=self.in_dims)(*operands)

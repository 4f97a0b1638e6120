"""What the operators of losses share: factors of rows, reductions, gradients that are computed with the loss.

The loss is L = sum_i r_i l_i, or that over the number of rows that count, and the gradients of a row are known as soon
as the row is, up to the factor dL: the forward computes them and the backward multiplies. Without a reduction the
factor is one a row and comes too late: there the forward computes the losses alone, and the backward starts again.

float16 gradients are kept in float32 until the factor is known, and their rows lifted by a power of two inside: a loss
scale must be able to lift them before they are rounded.

Source: Hsu et al. 2024 (arXiv:2410.10989) for gradients in the forward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fla_compile.kernels.cross_entropy_rows import scale_in_place, wide_dtype
from fla_compile.kernels.linear_loss_chunks import Gradients, Plan, chunk_linear_loss
from fla_compile.kernels.operators import DEVICES

REDUCTIONS = ("none", "sum", "mean")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Need = tuple[bool, bool, bool]  # whether x, weight and bias get gradients


def refusal(op: str, device: str, *dtypes: torch.dtype) -> str | None:
    """Why `op` does not run there with operands of these types; None if it does."""
    if device not in DEVICES:
        return f"{op} runs on {' and '.join(DEVICES)}, not on {device}"
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"{op} takes {', '.join(str(d)[6:] for d in DTYPES)}, not {str(dtype)[6:]}"
    return None


def check_rows(
    name: str, x: Tensor, target: Tensor | None, row_weight: Tensor | None, *, target_name: str = "target"
) -> None:
    """Raises ValueError for what does not fit rows of x [..., *], which the message calls `name`."""
    for other, operand in ((target_name, target), ("row_weight", row_weight)):
        if operand is not None and (x.ndim < 1 or operand.shape != x.shape[:-1]):
            wanted = f"{list(x.shape[:-1])} as {name} is {list(x.shape)}"
            raise ValueError(f"{other} must be {wanted}, got {list(operand.shape)}")
        if operand is not None and operand.device != x.device:
            raise ValueError(f"{other} is on {operand.device}, {name} is on {x.device}")
    if target is not None and (target.dtype.is_floating_point or target.dtype == torch.bool):
        raise ValueError(f"{target_name} must hold integers, got {target.dtype}")
    if row_weight is not None and row_weight.requires_grad:
        raise ValueError("row_weight must not require a gradient")


def check_targets(target: Tensor, V: int, ignore_index: int) -> None:
    """As torch: an IndexError on the CPU, an assertion of the device on CUDA."""
    legal = ((target >= 0) & (target < V)) | (target == ignore_index)
    if target.device.type == "cpu":
        if not legal.all():
            raise IndexError(f"Target {int(target[~legal][0])} is out of bounds.")
    else:
        torch._assert_async(legal.all())


def row_factors(
    shape: torch.Size, keep: Tensor | None, row_weight: Tensor | None, reduction: str, like: Tensor
) -> Tensor:
    """The factor of each row's loss in the loss; `keep` says which rows count, None if all do."""
    one = like.new_ones((), dtype=wide_dtype(like.dtype))
    if reduction == "mean":
        one = one / (shape.numel() if keep is None else keep.sum())
    return one.expand(shape) if row_weight is None else row_weight.to(one.dtype) * one


def reduced(losses: Tensor, keep: Tensor | None, row_weight: Tensor | None, reduction: str) -> Tensor:
    """The loss of losses [N]."""
    if row_weight is not None:
        losses = losses * row_weight
    if reduction == "none":
        return losses
    # no row that counts: 0 / 0, as torch has it
    return losses.sum() / (len(losses) if keep is None else keep.sum()) if reduction == "mean" else losses.sum()


def lifted_linear_loss(
    x: Tensor,
    weight: Tensor,
    factor: Tensor,
    rows: Callable[[Tensor, slice, Tensor, Tensor | None], Tensor],
    need: Need,
    *,
    lift: float,
    plan: Plan | None = None,
) -> tuple[Tensor, Gradients]:
    """Losses [N] and the gradients of sum_i factor_i l_i, chunk by chunk.

    `rows(a, part, factor, out)` gives the losses of the products a of the rows `part`, and writes their gradients to
    `out` unless it is None; float16 ones are computed `lift` times as large.
    """
    graded, unlift = any(need), None
    if x.dtype == torch.float16 and graded and len(x):
        top = factor.abs().max()
        top = torch.where(torch.isfinite(top) & (top > 0), top, 1.0)
        factor, unlift = factor / top * lift, top / lift

    def loss_of(a: Tensor, first: int) -> Tensor:
        part = slice(first, first + len(a))
        return rows(a, part, factor[part], a if graded else None)

    losses, found = chunk_linear_loss(x, weight, loss_of, need_dx=need[0], need_dw=need[1], need_db=need[2], plan=plan)
    if unlift is not None:
        for grad in (found.dx, found.dw, found.db):
            if grad is not None:
                scale_in_place(grad, unlift)
    return losses, found


def filled(found: Gradients, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An operator returns tensors only: where a gradient is not wanted, an empty one stands in its place."""
    dx, dw, db = (x.new_empty(0) if grad is None else grad for grad in (found.dx, found.dw, found.db))
    return dx, dw, db


def filled_fake(x: Tensor, weight: Tensor, need: Need) -> tuple[Tensor, Tensor, Tensor]:
    held = torch.float32 if x.dtype == torch.float16 else x.dtype
    return (
        x.new_empty(x.shape if need[0] else 0, dtype=held if need[0] else x.dtype),
        x.new_empty(weight.shape if need[1] else 0, dtype=held if need[1] else x.dtype),
        x.new_empty(weight.shape[0] if need[2] else 0, dtype=wide_dtype(x.dtype) if need[2] else x.dtype),
    )


def keep_for_backward(
    ctx: Any, operands: tuple[Any, ...], output: tuple[Tensor, ...], reduction: str, need: tuple[Any, ...]
) -> None:
    """Of a loss of a linear layer, whose `operands` begin with x, weight and bias: its gradients, or all it takes."""
    ctx.set_materialize_grads(False)
    ctx.dtypes = tuple(None if x is None else x.dtype for x in operands[:3])
    ctx.reduction, ctx.need = reduction, need
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*(operands if reduction == "none" else output[1:]))


def layer_gradients(
    ctx: Any, dloss: Tensor | None, op: str, again: Callable[..., tuple[Tensor, ...]] | None = None
) -> tuple[Tensor | None, ...]:
    """Those of x, weight and bias; `again(operands, wanted)` computes them where the forward could not."""
    if dloss is None:
        return None, None, None
    wanted = ctx.needs_input_grad[:3]
    if any(wish and not had for wish, had in zip(wanted, ctx.need, strict=True)):
        raise RuntimeError(f"{op} was told in the forward that this gradient is not needed")
    if ctx.reduction == "none":
        assert again is not None
        found = again(ctx.saved_tensors, wanted)
    else:
        saved = zip(ctx.saved_tensors, wanted, strict=True)
        found = tuple(multiplied(grad, dloss) if wish else grad for grad, wish in saved)
    return tuple(g.to(d) if wish else None for g, d, wish in zip(found, ctx.dtypes, wanted, strict=True))


def multiplied(saved: Tensor, factor: Tensor) -> Tensor:
    """A saved gradient times a number; in its own memory where nobody will ask for it again."""
    if type(saved) is not Tensor or keeps_graph():
        return saved * factor
    saved = saved.detach()
    scale_in_place(saved, factor)
    return saved


def keeps_graph() -> bool:
    """Whether the running backward was asked to keep its graph for another one."""
    return torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]

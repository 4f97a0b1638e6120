"""A linear layer and a loss of its rows in chunks of rows, forward and backward in one go; logits never exist whole.

For each chunk of n rows: a = x W^T, the losses of its rows with g = dl/da written over a (`cross_entropy_rows`), then

    dx = g W        dW += g^T x        db += sum of g over its rows

Three products of 2 N D V operations: each tile of logits is computed once, and everything else is memory traffic.
What the chunks cost, beside the products, in bytes (w bytes a logit):

    a and g      4 w N V        written, read, written over, read by two products: the same for any n
    W, dW        (N / n) V D (w + 2 s)        read, and the sum of dW read and written: s bytes a number

so chunks should be large, and memory says how large: w n V for the logits, and (s - w) V D where dW is summed in a type
wider than its own. Each sum of narrow numbers that is rounded again adds its error to that of the last rounding: with a
sum of c chunks the variance is (c + 1) / 2 that of one rounding.

The plan on CUDA (`plan_chunks`) for narrow operands, where not all rows fit in LOGITS bytes:
- float32 sums where they cost no more than WIDER bytes beyond dW itself, and the logits then have the rest of LOGITS;
- else FEW chunks, or up to MOST where that makes whole waves, their sums rounded to dW's type, where their logits take
  no more than float32 sums would;
- else float32 sums all the same: they are then the smaller part.
Rows come in multiples that fill the processors once with tiles of 128 x 256 of dx, the product with the fewest tiles.

For 16384 x 2048 x 32000 in bfloat16 that is 8 chunks of 2048 rows, 131 MB of logits and 131 MB for float32 sums; for
8192 x 4096 x 128256 it is 8 chunks of 1024 rows, 263 MB of logits, where float32 sums would take 1051 MB more.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fla_compile.kernels.cross_entropy_rows import wide_dtype

__all__ = ["Gradients", "Plan", "chunk_linear_loss", "plan_chunks"]

LOGITS = 272 << 20
WIDER = 256 << 20
FEW, MOST = 4, 8
TILE = 128, 256
CPU_LOGITS = 1 << 20  # elements: 4 MiB of float32
CPU_ROWS = 128  # fewer rows read all of W for too little work

# (products a [n, V], first row) -> losses [n]; with gradients wanted, a is overwritten by dl/da
RowFunction = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Plan:
    """`rows` a chunk; dW summed over chunks in `sums`."""

    rows: int
    sums: torch.dtype


@dataclass(frozen=True)
class Gradients:
    """Those that were asked for; dx and dW in the operands' dtype, float32 where that is float16, db wide."""

    dx: Tensor | None
    dw: Tensor | None
    db: Tensor | None


def plan_chunks(N: int, D: int, V: int, dtype: torch.dtype, processors: int, *, need_dw: bool = True) -> Plan:
    """`processors` is 0 for the CPU."""
    wide = wide_dtype(dtype)
    if not processors:
        return Plan(max(1, min(N, max(CPU_ROWS, CPU_LOGITS // V))), wide)
    fit, size = LOGITS // (V * dtype.itemsize), dtype.itemsize
    if N <= fit:
        return Plan(max(1, N), wide if dtype == torch.float16 else dtype)
    if not need_dw or size >= 4:
        return Plan(_whole_waves(fit, D, processors), wide)
    extra = V * D * (4 - size)
    if extra <= WIDER:
        return Plan(_whole_waves(max(LOGITS - extra, LOGITS // 4) // (V * size), D, processors), wide)
    wave = _wave(D, processors)
    rows = min(-(-N // FEW), -(-N // (MOST * wave)) * wave)
    if rows * V * size <= extra and dtype != torch.float16:
        return Plan(rows, dtype)
    return Plan(_whole_waves(fit, D, processors), wide)


def _whole_waves(rows: int, D: int, processors: int) -> int:
    """The largest number of rows, not over `rows`, whose tiles of dx fill all processors."""
    wave, tall = _wave(D, processors), TILE[0]
    if rows >= wave:
        return rows // wave * wave
    return max(1, rows // tall * tall or rows)


def _wave(D: int, processors: int) -> int:
    """Rows whose tiles of dx fill all processors once."""
    tall, broad = TILE
    return tall * max(1, processors // -(-D // broad))


def chunk_linear_loss(
    x: Tensor,
    weight: Tensor,
    loss_of: RowFunction,
    *,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    plan: Plan | None = None,
) -> tuple[Tensor, Gradients]:
    """Losses [N] of x [N, D] and weight [V, D], and the gradients that are needed; deterministic."""
    (N, D), V, dtype = x.shape, weight.shape[0], x.dtype
    if plan is None:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 0
        plan = plan_chunks(N, D, V, dtype, processors, need_dw=need_dw)
    held = torch.float32 if dtype == torch.float16 else dtype  # what a loss scale must still be able to reach
    losses = x.new_empty(N, dtype=wide_dtype(dtype))
    dx = x.new_empty((N, D), dtype=held) if need_dx else None
    sums = x.new_empty((V, D), dtype=plan.sums) if need_dw else None
    db = x.new_zeros(V, dtype=wide_dtype(dtype)) if need_db else None
    pitch = -(-V // 64) * 64  # rows that start on 128 bytes: an odd vocabulary would slow every product
    a = buffer = x.new_empty((min(plan.rows, N), pitch))
    for first in range(0, N, plan.rows):
        x_c = x[first : first + plan.rows]
        a = buffer[: len(x_c), :V]
        torch.mm(x_c, weight.t(), out=a)
        losses[first : first + len(x_c)] = loss_of(a, first)
        if dx is not None:
            _product(a, weight, dx[first : first + len(x_c)], False)
        if sums is not None:
            _product(a.t(), x_c, sums, first > 0)
        if db is not None:
            db += a.sum(0, dtype=db.dtype)
    if sums is not None and not N:
        sums.zero_()
    del a, buffer  # before dW takes its own dtype beside the sums
    return losses, Gradients(dx, None if sums is None else sums.to(held), db)


def _product(left: Tensor, right: Tensor, out: Tensor, add: bool) -> None:
    """out = left right, or out += left right, summed in float32 at least."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, out=out) if add else torch.mm(left, right, out=out)
    elif left.is_cuda:
        # The batched form takes sums of another type than the operands in every torch from 2.11 on; addmm does not.
        one = out.unsqueeze(0)
        torch.ops.aten.baddbmm.dtype_out(
            one, left.unsqueeze(0), right.unsqueeze(0), out.dtype, beta=1 if add else 0, out=one
        )
    else:
        out.addmm_(left.to(out.dtype), right.to(out.dtype), beta=1 if add else 0)

"""A time loop of no known family as one operator: `fla_compile::loop` runs a registered step over time.

    carries, outputs_t = step(carries, reads_t, invariants)        for t = 0 .. T-1

The step is compiled once for its shapes and called by a loop in Python, forward and, by its vector-Jacobian product,
backward. To Dynamo, AOTAutograd and Inductor it is opaque, so that capture and compile time do not depend on T.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from fla_compile.kernels import loop_run
from fla_compile.kernels.loop_run import BY_SIZE, EVERY_STEP, NOTHING
from fla_compile.kernels.loop_step import STEPS, Step, register_step

__all__ = ["loop", "loop_backward", "loop_forward", "register_step", "sort_operands"]


def _without_autocast() -> Any:
    """Casts are part of the step; what the caller's autocast would add are none of it."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    return torch._C._ExcludeDispatchKeyGuard(keys | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA))


@torch.library.custom_op("fla_compile::loop", mutates_args=(), device_types=("cpu", "cuda"))
def loop_forward(
    step: str, tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float], length: int, segment: int
) -> list[Tensor]:
    """Final carries, outputs [length, ...] and what the backward needs by `segment`: see `loop`."""
    with _without_autocast():
        return loop_run.run_forward(step, tensors, ints, floats, length, segment)


@loop_forward.register_fake
def _forward_fake(
    step: str, tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float], length: int, segment: int
) -> list[Tensor]:
    known = STEPS[step]
    carries, results = _one_step(known, tensors, ints, floats)
    own = [carries[i] for i in known.own()]
    outputs, saved = results[known.carries : known.carries + known.outputs], results[known.carries + known.outputs :]
    if segment == BY_SIZE:
        segment = loop_run.choose_segment(length, [*own, *saved])
    if segment == EVERY_STEP:
        kept = [_stack(c, length + 1) for c in own] + [_stack(x, length) for x in saved]
    else:
        kept = [] if segment == NOTHING else [_stack(c, (length + segment - 1) // segment) for c in carries]
    return [*(c.new_empty(c.shape) for c in carries), *(_stack(y, length) for y in outputs), *kept]


def _stack(x: Tensor, lead: int) -> Tensor:
    return x.new_empty((lead, *x.shape))


def _one_step(
    step: Step, tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]
) -> tuple[list[Tensor], list[Tensor]]:
    """The carries, and what one step makes of them."""
    last = step.carries + step.reads
    carries = [x.new_empty(x.shape) for x in tensors[: step.carries]]
    reads = [x.new_empty(x.shape[1:]) for x in tensors[step.carries : last]]
    sorted_back = step.operands([*carries, *reads, *tensors[last:]], ints, floats)
    constants = [torch.empty(c.shape, dtype=c.dtype, device=c.device) for c in step.constants]
    return carries, list(step.graph(*sorted_back, *constants))


@torch.library.custom_op("fla_compile::loop_backward", mutates_args=(), device_types=("cpu", "cuda"))
def loop_backward(
    step: str,
    tensors: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    length: int,
    segment: int,
    kept: Sequence[Tensor],
    shared: Sequence[Tensor],
    slopes: Sequence[Tensor],
    given: Sequence[int],
    wanted: Sequence[int],
) -> list[Tensor]:
    """Gradients of the `wanted` tensors from the gradients `slopes` of the results in `given`."""
    with _without_autocast():
        return loop_run.run_backward(step, tensors, ints, floats, length, segment, kept, shared, slopes, given, wanted)


@loop_backward.register_fake
def _backward_fake(
    step: str,
    tensors: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    length: int,
    segment: int,
    kept: Sequence[Tensor],
    shared: Sequence[Tensor],
    slopes: Sequence[Tensor],
    given: Sequence[int],
    wanted: Sequence[int],
) -> list[Tensor]:
    return [tensors[i].new_empty(tensors[i].shape) for i in wanted]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    key, tensors, ints, floats, length, segment = inputs
    step = STEPS[key]
    ctx.set_materialize_grads(False)
    first, last = step.carries, step.carries + step.outputs
    kept = output[last:]
    shared = [output[first + j] for j in loop_run.shared_outputs(step)]
    ctx.save_for_backward(*tensors, *kept, *shared)
    ctx.counts = (len(tensors), len(kept))
    ctx.rest = (key, ints, floats, length, segment)


def _backward(ctx: Any, slopes: list[Tensor | None]) -> tuple[Any, ...]:
    key, ints, floats, length, segment = ctx.rest
    step = STEPS[key]
    a, b = ctx.counts
    saved = ctx.saved_tensors
    tensors, kept, shared = saved[:a], saved[a : a + b], saved[a + b :]
    given = [i for i, x in enumerate(slopes[: step.carries + step.outputs]) if x is not None]
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1]) if needed]
    grads: list[Tensor | None] = [None] * a
    if given:
        found = loop_backward(
            key, list(tensors), ints, floats, length, segment,
            list(kept), list(shared), [slopes[i] for i in given], given, wanted,
        )  # fmt: skip
        for i, x in zip(wanted, found, strict=True):
            grads[i] = x
    # An empty list counts as a list of tensors.
    return None, grads, None if ints else [], None if floats else [], None, None


loop_forward.register_autograd(_backward, setup_context=_setup_context)


def sort_operands(key: str, operands: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Operands in the step's order as the operator takes them: tensors, ints, floats; they may be FX nodes.

    Raises ValueError for another number of operands, or another value of one that the step's trace has fixed.
    """
    kinds = STEPS[key].kinds
    if len(kinds) != len(operands):
        raise ValueError(f"operands must be {len(kinds)}, got {len(operands)}")
    found: dict[str, list[Any]] = {"tensor": [], "int": [], "float": [], "fixed": []}
    for kind, operand in zip(kinds, operands, strict=True):
        found[kind].append(operand)
    for value, operand in zip(STEPS[key].fixed, found["fixed"], strict=True):
        if not isinstance(operand, fx.Node) and operand != value:
            raise ValueError(f"the step was traced with {value} for an operand, got {operand}")
    return found["tensor"], found["int"], found["float"]


def loop(key: str, operands: Sequence[Any], *, length: int | SymInt | None = None) -> list[Tensor]:
    """Run the registered step for all steps; returns final carries and outputs [T, ...], all fresh and contiguous.

    operands: carries, reads [T, ...] and invariants in the step's order; `length` is T where there are no reads.
    Differentiable in all floating tensors. Raises ValueError for operands that do not fit the step.
    """
    step = STEPS[key]
    tensors, ints, floats = sort_operands(key, operands)
    reads = tensors[step.carries : step.carries + step.reads]
    if length is None:
        if not reads:
            raise ValueError("length must be given for a step without reads")
        length = reads[0].shape[0]
    for i, (x, dtype) in enumerate(zip(tensors, step.dtypes, strict=True)):
        if x.dtype != dtype:
            raise ValueError(f"operand {i} has dtype {x.dtype}, the step has {dtype}")
    wanted = torch.is_grad_enabled() and any([x.requires_grad for x in tensors])
    results = torch.ops.fla_compile.loop(key, tensors, ints, floats, length, BY_SIZE if wanted else NOTHING)
    return results[: step.carries + step.outputs]

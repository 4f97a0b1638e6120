"""Packed sequences: one row of steps [1, T, ...] that holds N sequences end to end, each with a state of its own.

Sequence n is steps cu_seqlens[n] to cu_seqlens[n + 1] - 1; cu_seqlens [N + 1] starts at 0, rises, and ends at T. States
are [N, ...]. `register_packed` makes of an operator another one, `<name>_packed`, that takes cu_seqlens. Kernels that
take sequences as they lie run where there are any. Elsewhere sequences of about the same length are gathered into
batches of the operator, filled up with steps that leave the state alone (decays of one, keys and inputs of zero), and
the results are put back in place. Lengths are rounded up to three binary digits, so a batch is at most a quarter larger
than what it holds, and there are at most four for each doubling of the length.

The boundaries are read on the host, once forward and once backward: keep cu_seqlens on the CPU where that matters.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fla_compile.kernels.operators import refuse_tangents

__all__ = ["call_packed", "check_packed", "each_sequence", "register_packed", "sequence_bounds"]

# How an argument varies: with the steps, with the sequences, or not at all.
STEPS, SEQUENCES, SHARED = "steps", "sequences", "shared"

Op = Callable[..., tuple[Tensor, Tensor]]
Backward = Callable[[Any, Tensor | None, Tensor | None], tuple[Tensor | None, ...]]


@dataclass(frozen=True, slots=True)
class _Batch:
    sequences: list[int]
    rows: Tensor  # [n, L], into T; what lies beyond a sequence repeats row 0
    inside: Tensor | None  # [n, L], None if all of it is


class _Context:
    """Stands in for autograd's, so that an operator's own backward runs on a batch."""

    saved_tensors: tuple[Tensor | None, ...]

    def __init__(self, needs: Sequence[bool]) -> None:
        self.needs_input_grad = tuple(needs)

    def set_materialize_grads(self, value: bool) -> None:
        pass

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


def sequence_bounds(cu_seqlens: Tensor, T: int) -> list[tuple[int, int]]:
    """First step of every sequence, and the step after its last. Raises ValueError for an empty one, or a wrong end."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != T:
        raise ValueError(f"cu_seqlens must run from 0 to T={T}, it runs from {ends[0]} to {ends[-1]}")
    bounds = [*pairwise(ends)]
    for n, (start, end) in enumerate(bounds):
        if end <= start:
            raise ValueError(f"cu_seqlens must rise: sequence {n} is from {start} to {end}")
    return bounds


def check_packed(name: str, x: Tensor, cu_seqlens: Tensor | None, initial_state: Tensor | None) -> Tensor | None:
    """The initial state as an operator on one sequence would be given it, after checks that need no look inside.

    `name` is what x [B, T, ...] is called. Raises ValueError naming the argument.
    """
    if cu_seqlens is None:
        return initial_state
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must be [N + 1] with N >= 1, got shape {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.device.type != "cpu" and cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, {name} is on {x.device}")
    if x.ndim and x.shape[0] != 1:
        raise ValueError(f"{name} has B={x.shape[0]}, cu_seqlens needs B=1")
    if initial_state is None or initial_state.ndim == 0:
        return initial_state
    N = cu_seqlens.shape[0] - 1
    if initial_state.shape[0] != N:
        raise ValueError(f"initial_state has N={initial_state.shape[0]}, cu_seqlens has N={N}")
    return initial_state[:1]


def each_sequence(
    naive: Callable[..., tuple[Tensor, Tensor | None]],
    cu_seqlens: Tensor,
    rows: Mapping[str, Tensor | None],
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """`naive` on one sequence after another, o [1, T, ...] and the final states [N, ...], from rows [1, T, ...]."""
    T = next(x.shape[1] for x in rows.values() if x is not None)
    o: list[Tensor] = []
    finals: list[Tensor] = []
    for n, (start, end) in enumerate(sequence_bounds(cu_seqlens, T)):
        steps = {name: None if x is None else x[:, start:end] for name, x in rows.items()}
        state = None if initial_state is None else initial_state[n : n + 1]
        o_n, final = naive(**steps, initial_state=state, output_final_state=True)
        assert final is not None
        o.append(o_n)
        finals.append(final)
    return torch.cat(o, 1), torch.cat(finals) if output_final_state else None


def register_packed(
    op: Any,
    setup_context: Callable[[Any, tuple[Any, ...], tuple[Any, ...]], None],
    backward: Backward,
    *,
    shared: Sequence[str] = (),
    fill: Mapping[str, float] | None = None,
    keep_output: bool = False,
    forward_packed: Callable[..., tuple[Tensor, Tensor] | None] | None = None,
    backward_packed: Callable[..., tuple[Tensor | None, ...] | None] | None = None,
) -> torch.library.CustomOpDef:
    """The operator `<name>_packed`: the arguments of `op`, then cu_seqlens; states and outputs as this file has them.

    `setup_context` and `backward` are what `op` has registered. `shared` names its tensors without steps, `fill` what
    fills the steps beyond a sequence where that is not zero, `keep_output` says that `setup_context` reads the output.

    `forward_packed(*arguments, cu_seqlens)` and `backward_packed(*arguments, cu_seqlens, do, dht, wanted)`, with a
    gradient for each argument of `op` that is `wanted`, take the sequences as they lie, or return None: gathered, then.
    """
    schema = op._schema
    names = [argument.name for argument in schema.arguments]
    types = [str(argument.type).replace("Optional[Tensor]", "Tensor?") for argument in schema.arguments]
    kinds: list[str | None] = [
        None if "Tensor" not in kind else SEQUENCES if name == "initial_state" else SHARED if name in shared else STEPS
        for name, kind in zip(names, types, strict=True)
    ]
    fills = [(fill or {}).get(name, 0.0) for name in names]
    arguments = ", ".join(f"{kind} {name}" for kind, name in zip(types, names, strict=True))
    size = len(names)
    tensors = [i for i, kind in enumerate(kinds) if kind is not None]
    qualified = f"{schema.name}_packed"

    def batch_arguments(args: Sequence[Any], batch: _Batch) -> list[Any]:
        return [
            x if x is None or kind is None else _gather(x, kind, batch, value)
            for x, kind, value in zip(args, kinds, fills, strict=True)
        ]

    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        *own, cu_seqlens = args
        whole = None if forward_packed is None else forward_packed(*args)
        if whole is not None:
            return whole
        o = final = None
        for batch in _batches(cu_seqlens, own[0]):
            found, state = op(*batch_arguments(own, batch))
            if o is None or final is None:
                o = found.new_empty(1, own[0].shape[1], *found.shape[2:])
                final = state.new_empty(cu_seqlens.shape[0] - 1, *state.shape[1:])
            _scatter(found, STEPS, batch, o)
            _scatter(state, SEQUENCES, batch, final)
        assert o is not None and final is not None
        return o, final

    def forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
        *own, cu_seqlens = args
        o, state = op(
            *(x[:1] if kind == SEQUENCES and x is not None else x for x, kind in zip(own, kinds, strict=True))
        )
        return o, state.new_empty(cu_seqlens.shape[0] - 1, *state.shape[1:])

    def gradients(*args: Any) -> list[Tensor]:
        own, (cu_seqlens, o, do, dht, needs) = args[:size], args[size:]
        wanted = [False] * size
        for i, need in zip(tensors, needs, strict=True):
            wanted[i] = need
        whole = None if backward_packed is None else backward_packed(*own, cu_seqlens, do, dht, wanted)
        if whole is not None:
            return [_given(whole[i], own[i] if need else None, own[0]) for i, need in zip(tensors, needs, strict=True)]
        found = [_empty(own[i] if need else None, kinds[i], own[0]) for i, need in zip(tensors, needs, strict=True)]
        for batch in _batches(cu_seqlens, own[0]):
            inputs = batch_arguments(own, batch)
            ctx = _Context(wanted)
            setup_context(ctx, tuple(inputs), (None if o is None else _gather(o, STEPS, batch, 0.0), None))
            grads = backward(
                ctx,
                None if do is None else _gather(do, STEPS, batch, 0.0),
                None if dht is None else _gather(dht, SEQUENCES, batch, 0.0),
            )
            for i, total, need in zip(tensors, found, needs, strict=True):
                grad = grads[i]
                if need and grad is not None:
                    _scatter(grad, kinds[i], batch, total)
        return [total.to(own[i].dtype) if need else total for i, total, need in zip(tensors, found, needs, strict=True)]

    def gradients_fake(*args: Any) -> list[Tensor]:
        own, needs = args[:size], args[-1]
        return [
            own[i].new_empty(own[i].shape) if need and own[i] is not None else own[0].new_empty(0)
            for i, need in zip(tensors, needs, strict=True)
        ]

    packed = torch.library.custom_op(
        qualified, forward, mutates_args=(), schema=f"({arguments}, Tensor cu_seqlens) -> (Tensor, Tensor)"
    )
    packed_backward = torch.library.custom_op(
        f"{qualified}_backward",
        gradients,
        mutates_args=(),
        schema=f"({arguments}, Tensor cu_seqlens, Tensor? o, Tensor? do, Tensor? dht, bool[] needs) -> Tensor[]",
    )

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.others = [None if kind is not None else x for x, kind in zip(inputs[:size], kinds, strict=True)]
        ctx.save_for_backward(*(inputs[i] for i in tensors), inputs[size], output[0] if keep_output else None)

    def differentiate(ctx: Any, do: Tensor | None, dht: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, cu_seqlens, o = ctx.saved_tensors
        result: list[Tensor | None] = [None] * (size + 1)
        if do is None and dht is None:
            return tuple(result)
        args = list(ctx.others)
        for i, x in zip(tensors, saved, strict=True):
            args[i] = x
        needs = [x is not None and ctx.needs_input_grad[i] for i, x in zip(tensors, saved, strict=True)]
        grads = packed_backward(*args, cu_seqlens, o, do, dht, needs)
        for i, need, grad in zip(tensors, needs, grads, strict=True):
            result[i] = grad if need else None
        return tuple(result)

    packed.register_fake(forward_fake)
    packed_backward.register_fake(gradients_fake)
    packed.register_autograd(differentiate, setup_context=save)
    return packed


def call_packed(packed: torch.library.CustomOpDef, *operands: Any) -> tuple[Tensor, Tensor]:
    refuse_tangents(operands)
    return packed(*operands)


def _batches(cu_seqlens: Tensor, like: Tensor) -> Iterator[_Batch]:
    by_size: dict[int, list[int]] = {}
    bounds = sequence_bounds(cu_seqlens, like.shape[1])
    for n, (start, end) in enumerate(bounds):
        by_size.setdefault(_rounded_up(end - start), []).append(n)
    for _, members in sorted(by_size.items()):
        starts, lengths = (
            torch.tensor(column, device=like.device).unsqueeze(-1)
            for column in zip(*((bounds[n][0], bounds[n][1] - bounds[n][0]) for n in members), strict=True)
        )
        longest = max(bounds[n][1] - bounds[n][0] for n in members)
        steps = torch.arange(longest, device=like.device)
        inside = steps < lengths
        same = all(bounds[n][1] - bounds[n][0] == longest for n in members)
        yield _Batch(members, torch.where(inside, starts + steps, 0), None if same else inside)


def _rounded_up(length: int) -> int:
    unit = 1 << max(0, length.bit_length() - 3)
    return -(-length // unit) * unit


def _gather(x: Tensor, kind: str, batch: _Batch, value: float) -> Tensor:
    if kind == SHARED:
        return x
    if kind == SEQUENCES:
        return x[batch.sequences]
    rows = x[0, batch.rows]
    if batch.inside is None:
        return rows
    return rows.masked_fill_(~batch.inside.view(*batch.inside.shape, *[1] * (rows.ndim - 2)), value)


def _scatter(x: Tensor, kind: str | None, batch: _Batch, out: Tensor) -> None:
    """Puts a batch's results in place; adds those that all sequences share."""
    if kind == SHARED:
        out += x
    elif kind == SEQUENCES:
        out[batch.sequences] = x.to(out.dtype)
    elif batch.inside is None:
        out[0, batch.rows] = x.to(out.dtype)
    else:
        out[0, batch.rows[batch.inside]] = x[batch.inside].to(out.dtype)


def _empty(x: Tensor | None, kind: str | None, like: Tensor) -> Tensor:
    """Room for the gradient of x, sums in float32 at least; an operator returns tensors only, so also without x."""
    if x is None:
        return like.new_empty(0)
    if kind == SHARED:
        return torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _given(grad: Tensor | None, x: Tensor | None, like: Tensor) -> Tensor:
    """The gradient of x in its dtype; an operator returns tensors only, so also without x."""
    if x is None:
        return like.new_empty(0)
    assert grad is not None
    return grad.to(x.dtype)

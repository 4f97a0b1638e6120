"""The decayed delta one step after another, forward and backward: exact where a growing state rules the chunks out.

    S_t = diag(a_t) S_{t-1} + b_t u_t^T [+ k_t v_t^T]        o_t = scale * S_t^T q_t        (as in `delta_chunk`)

Chunks carry every step's write to the chunk's end before the later steps erase it. Under a decay that grows, e^{g} with
g > 0, that costs as many digits as the state would have grown without erasing, and products of a grown state and a
grown gradient overflow. Here each step is the recurrence itself, so whatever is finite in the plain loop is finite.

Backward, with D_t the gradient of S_t, R = diag(a_t) S_{t-1} and D_t = scale * q_t do_t^T + what step t + 1 hands down:

    delta families    u = beta (v - R^T k)    y = D^T k    dk = D u - beta R y    dv = beta y    dbeta = y (v - R^T k)
                      F = D - beta k y^T      dg = sum_v F R                      handed down: diag(a) F
    dplr              u = S_{t-1}^T c         y = D^T b    db = D u    dk = D v   dv = D^T k     dc = S_{t-1} y
                      dg = sum_v D R          handed down: diag(a) D + c y^T

Inside this file tensors are [T, B, H, ...]. The states before each segment of steps are kept, those inside recomputed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import pad

from fla_compile.kernels.decay_layout import CHUNK, wide
from fla_compile.kernels.delta_chunk import Gradients, Operands

__all__ = ["grows", "steps_backward", "steps_forward", "tame"]

# Sums of the positive log decays: over a chunk, where e^6 roundings of 2^-24 are still 2e-5, and over all steps, where
# a state and a gradient of e^40 each can still be multiplied.
CHUNK_GROWTH = 6.0
GROWTH = 40.0

SEGMENT = 64


@dataclass(frozen=True, slots=True)
class _Step:
    q: Tensor  # [B, H, K]
    k: Tensor
    v: Tensor  # [B, H, V]
    a: Tensor | None  # [B, H, K or 1, 1]
    beta: Tensor | None  # [B, H, 1]
    b: Tensor | None
    c: Tensor | None


def grows(g: Tensor | None) -> bool:
    """Whether the state may grow more than chunks allow; asks the device."""
    return g is not None and not (g.max() <= 0).item() and not tame(g).all().item()


def tame(g: Tensor) -> Tensor:
    """Which sequences and heads [B, H] grow little enough for chunks."""
    growth = (g if g.ndim == 4 else g.unsqueeze(-1)).clamp(min=0)
    chunks = pad(growth, (0, 0, 0, 0, 0, -growth.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK)).sum(2)
    return ((chunks <= CHUNK_GROWTH).all(1) & (chunks.sum(1) <= GROWTH)).all(-1)


def steps_forward(x: Operands) -> tuple[Tensor, Tensor]:
    """(o [B, T, H, V] in v's dtype, final state [B, H, K, V])."""
    o = torch.empty(x.v.shape, dtype=x.v.dtype, device=x.v.device)
    S = _start(x)
    for t, step in _steps(x, 0, x.q.shape[1]):
        S = _advance(step, S)
        o[:, t] = _read(S, step.q) * x.scale
    return o, S


def steps_backward(x: Operands, do: Tensor, dht: Tensor | None, *, need_dg: bool = True) -> Gradients:
    """Gradients of all operands, from those of o and of the final state."""
    T, dtype = x.q.shape[1], wide(x.q.dtype)
    found: dict[str, Tensor] = {}
    for field in fields(Gradients):
        operand = getattr(x, field.name)
        if operand is not None and field.name != "initial_state" and (field.name != "g" or need_dg):
            found[field.name] = torch.empty(operand.shape, dtype=operand.dtype, device=operand.device)
    starts = [_start(x)]
    for first in range(0, T - SEGMENT, SEGMENT):
        S = starts[-1]
        for _, step in _steps(x, first, first + SEGMENT):
            S = _advance(step, S)
        starts.append(S)
    D = torch.zeros_like(starts[0]) if dht is None else dht.to(dtype)
    for n in range(len(starts) - 1, -1, -1):
        steps = [*_steps(x, n * SEGMENT, min(T, (n + 1) * SEGMENT))]
        states = [starts.pop()]
        for _, step in steps:
            states.append(_advance(step, states[-1]))
        for t, step in reversed(steps):
            do_t = do[:, t].to(dtype) * x.scale
            found["q"][:, t] = _weigh(states.pop(), do_t)
            D = D + _outer(step.q, do_t)
            grads, D = _step_back(step, states[-1], D)
            for name, grad in grads.items():
                if name in found:
                    found[name][:, t] = grad if grad.ndim == found[name][:, t].ndim else grad.sum(-1)
    if x.initial_state is not None:
        found["initial_state"] = D.to(x.initial_state.dtype)
    return Gradients(**{field.name: found.get(field.name) for field in fields(Gradients)})  # type: ignore[arg-type]


def _advance(step: _Step, S: Tensor) -> Tensor:
    R = S if step.a is None else step.a * S
    if step.beta is not None:
        return R + _outer(step.k, step.beta * (step.v - _read(R, step.k)))
    assert step.b is not None and step.c is not None
    return R + _outer(step.b, _read(S, step.c)) + _outer(step.k, step.v)


def _step_back(step: _Step, S: Tensor, D: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of one step's operands, and of the state S before it, from D, that of the state after it."""
    R = S if step.a is None else step.a * S
    if step.beta is not None:
        error = step.v - _read(R, step.k)
        y = _read(D, step.k)
        F = D - _outer(step.k, step.beta * y)
        grads = {
            "k": _weigh(D, step.beta * error) - _weigh(R, step.beta * y),
            "v": step.beta * y,
            "beta": (y * error).sum(-1),
        }
        handed_down = F if step.a is None else step.a * F
    else:
        assert step.a is not None and step.b is not None and step.c is not None
        y = _read(D, step.b)
        F = D
        grads = {
            "k": _weigh(D, step.v),
            "v": _read(D, step.k),
            "b": _weigh(D, _read(S, step.c)),
            "c": _weigh(S, y),
        }
        handed_down = step.a * D + _outer(step.c, y)
    grads["g"] = (F * R).sum(-1)
    return grads, handed_down


def _steps(x: Operands, first: int, last: int) -> Iterator[tuple[int, _Step]]:
    dtype = wide(x.q.dtype)
    rows = {
        field.name: None if (y := getattr(x, field.name)) is None else y[:, first:last].to(dtype)
        for field in fields(Gradients)
        if field.name != "initial_state"
    }
    g, beta = rows.pop("g"), rows["beta"]
    rows["a"] = None if g is None else (g if g.ndim == 4 else g.unsqueeze(-1)).exp().unsqueeze(-1)
    rows["beta"] = None if beta is None else beta.unsqueeze(-1)
    for i in range(last - first):
        yield first + i, _Step(**{name: None if y is None else y[:, i] for name, y in rows.items()})  # type: ignore[arg-type]


def _start(x: Operands) -> Tensor:
    B, _, H, K = x.q.shape
    dtype = wide(x.q.dtype)
    if x.initial_state is None:
        return torch.zeros((B, H, K, x.v.shape[-1]), dtype=dtype, device=x.q.device)
    return x.initial_state.to(dtype, copy=True)


def _read(S: Tensor, x: Tensor) -> Tensor:
    """S^T x, [B, H, V]."""
    return torch.matmul(x.unsqueeze(-2), S).squeeze(-2)


def _weigh(S: Tensor, y: Tensor) -> Tensor:
    """S y, [B, H, K]."""
    return torch.matmul(S, y.unsqueeze(-1)).squeeze(-1)


def _outer(x: Tensor, y: Tensor) -> Tensor:
    return x.unsqueeze(-1) * y.unsqueeze(-2)

"""Heads that neighbours share in the decayed outer product, as in a decode step (`decay_step`).

Of H states [B, H, K, V], k, v and the decay have H heads or a divisor of H, and q has H, a divisor of H, or a multiple
of H, whose queries then read the same state; the output has as many heads as q, but at least H. H is that of the
initial state, and without one the most heads of k, v and the decay.

Chunk kernels work for each head of the output. Operands with fewer heads they read where these lie; their gradients
come for each head of the output and are summed, in float32. States are theirs for each head of the output, of which the
first of those alike is handed on.
"""

from torch import Tensor


def decay_heads(g: Tensor | None) -> int:
    """Heads of g, [H], [B, T, H] or [B, T, H, K]; 0 where there is none."""
    if g is None:
        return 0
    return g.shape[2] if g.ndim > 2 else g.shape[0]


def shares(H: int, *operands: Tensor | None) -> tuple[int, ...]:
    """How many of H neighbouring heads share one of each operand; 1 where there is none."""
    return tuple(H // (decay_heads(x) or H) for x in operands)


def state_heads(k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None) -> int:
    if initial_state is not None:
        return initial_state.shape[1]
    return max(k.shape[2], v.shape[2], decay_heads(g))


def output_heads(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None) -> int:
    return max(q.shape[2], state_heads(k, v, g, initial_state))


def check_heads(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, gate: str = "g"
) -> None:
    """Raises ValueError naming the argument and both numbers; `gate` is what g is called."""
    shared = {"q": q.shape[2], "k": k.shape[2], "v": v.shape[2]}
    if g is not None:
        shared[gate] = decay_heads(g)
    H = state_heads(k, v, g, initial_state)
    if all(heads == H for heads in shared.values()):
        return
    of = "initial_state" if initial_state is not None else next(name for name, heads in shared.items() if heads == H)
    for name, heads in shared.items():
        several = name == "q" and H > 0 and heads % H == 0
        if heads == 0 or (H % heads and not several):
            wanted = "a divisor or a multiple" if name == "q" else "a divisor"
            raise ValueError(f"{name} has H={heads}, {of} has H={H}, of which it must be {wanted}")


def spread(x: Tensor, axis: int, heads: int) -> Tensor:
    """Every head of x for the neighbouring heads that share it."""
    return x if x.shape[axis] == heads else x.repeat_interleave(heads // x.shape[axis], axis)


def sum_heads(dx: Tensor, axis: int, heads: int) -> Tensor:
    """The gradient of x, which has `heads` heads, from that of each head that shares one; torch sums in float32."""
    return dx if dx.shape[axis] == heads else dx.unflatten(axis, (heads, -1)).sum(axis + 1)


def sum_decay_heads(dg: Tensor, g: Tensor) -> Tensor:
    return sum_heads(dg, 0 if g.ndim == 1 else 2, decay_heads(g))


def first_alike(state: Tensor, heads: int) -> Tensor:
    """One of the states [B, H, K, V] of each of `heads`, the same for all that share it."""
    return state if state.shape[1] == heads else state[:, :: state.shape[1] // heads].contiguous()


def at_first_alike(dstate: Tensor | None, heads: int) -> Tensor | None:
    """The gradient [B, heads, K, V] of `first_alike`."""
    if dstate is None or dstate.shape[1] == heads:
        return dstate
    whole = dstate.new_zeros(dstate.shape[0], heads, *dstate.shape[2:])
    whole[:, :: heads // dstate.shape[1]] = dstate
    return whole

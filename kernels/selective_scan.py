"""The selective scan of Mamba, forward and backward, in vectorised steps.

    S_t = exp(dt_t A) * S_{t-1} + u_t B_t^T        y_t = S_t C_t        S [D, N]

    u, dt, y [B, T, D]        A [D, N]        B, C [B, T, N]        the state [B, D, N]

With E_t = exp(dt_t A), P_t = E_t * S_{t-1} and G_t the gradient of S_t (that of the final state added to G_T):

    G_t = dy_t C_t^T + E_{t+1} * G_{t+1}        dS_0 = E_1 * G_1
    du_t = G_t B_t        dB_t = G_t^T u_t        dC_t = S_t^T dy_t
    ddt_t = sum_n (G_t P_t A)        dA = sum_{b,t} dt_t (G_t P_t)

No array of [B, T, D, N] is ever made: a slab of rows and columns of D runs through T in segments. The backward walks
once through the states to keep those between segments, then back through the segments, each computed again from its
own. Inside this file a slab is [T, b, N, d]: D is innermost, so that both outer products run along dense rows. Any sign
of dt A is right.

Source: Gu and Dao 2023, arXiv:2312.00752.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fla_compile.kernels.linear_scan import check_operand, scan_into, supports
from fla_compile.kernels.operators import operator, register_autograd, register_fake
from fla_compile.kernels.packed import call_packed, check_packed, each_sequence, register_packed

__all__ = ["naive_selective_scan", "selective_scan", "supports"]

# Elements of one step of a slab, and of one segment of it.
WIDTH = {"cpu": 1 << 15, "cuda": 1 << 22}
SEGMENT = {"cpu": 1 << 18, "cuda": 1 << 24}


def naive_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = exp(dt_t A) * S_{t-1} + dt_t x_t B_t^T and y_t = S_t C_t, one step after another."""
    if cu_seqlens is None:
        return _loop(x, dt, A, B, C, initial_state, output_final_state)
    rows = {"x": x, "dt": dt, "B": B, "C": C}
    return each_sequence(partial(_loop, A=A), cu_seqlens, rows, initial_state, output_final_state)


def _loop(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    dtype = _wide(x.dtype)
    out_dtype = x.dtype
    x, dt, A, B, C = (z.to(dtype) for z in (x, dt, A, B, C))
    S = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state.to(dtype)
    y = []
    # unbind, not x[:, t]: the backward of T slices would write T whole tensors
    for x_t, dt_t, B_t, C_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        S = torch.exp(dt_t[:, :, None] * A) * S + (dt_t * x_t)[:, :, None] * B_t[:, None, :]
        y.append(torch.einsum("bdn,bn->bd", S, C_t))
    return torch.stack(y, dim=1).to(out_dtype), S if output_final_state else None


def _forward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = _wide(u.dtype)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    final = torch.empty((u.shape[0], *A.shape), dtype=dtype, device=u.device)
    rates = A.to(dtype).mT.contiguous()
    for rows, columns, segments, (E_, S_) in _slabs(u, A, 2):
        u_s, dt_s = (_time_first(z[rows, :, columns], dtype).unsqueeze(2) for z in (u, dt))
        B_s, C_s = (_time_first(z[rows], dtype).unsqueeze(3) for z in (B, C))
        y_s = torch.empty_like(u_s)
        state = _state(initial_state, rows, columns, dtype)
        for steps in segments:
            E = _decays(dt_s[steps], rates[:, columns], E_)
            S = _outer(u_s[steps], B_s[steps], S_)
            state = scan_into(S, S, E, state).clone()  # the buffer is written again
            torch.bmm(_flat(C_s[steps]).mT, _flat(S), out=_flat(y_s[steps]))
        y[rows, :, columns] = y_s.squeeze(2).transpose(0, 1)
        final[rows, columns] = 0.0 if state is None else state.mT
    return y, final


def _backward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    dy: Tensor,
    dST: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(du, ddt, dA, dB, dC, dS0); those that are sums over slabs, and dS0, in the state's dtype."""
    dtype = _wide(u.dtype)
    du, ddt = (torch.empty(z.shape, dtype=z.dtype, device=u.device) for z in (u, dt))
    dA = torch.zeros(A.mT.shape, dtype=dtype, device=u.device)  # [N, D]
    dB, dC = (torch.zeros(z.shape, dtype=dtype, device=u.device) for z in (B, C))
    dS0 = torch.empty((u.shape[0], *A.shape), dtype=dtype, device=u.device)
    rates = A.to(dtype).mT.contiguous()
    for rows, columns, segments, (E_, S_, G_, P_) in _slabs(u, A, 4):
        u_s, dt_s, dy_s = (_time_first(z[rows, :, columns], dtype).unsqueeze(2) for z in (u, dt, dy))
        B_s, C_s = (_time_first(z[rows], dtype).unsqueeze(3) for z in (B, C))
        du_s, ddt_s, dB_s, dC_s = (torch.empty_like(z) for z in (u_s, dt_s, B_s, C_s))
        rate = rates[:, columns]
        starts = [_state(initial_state, rows, columns, dtype)]  # the states before each segment
        for steps in segments[:-1]:
            E, S = _decays(dt_s[steps], rate, E_), _outer(u_s[steps], B_s[steps], S_)
            starts.append(scan_into(S, S, E, starts[-1]).clone())
        g = _state(dST, rows, columns, dtype)  # the gradient that comes from later steps
        for steps, start in zip(reversed(segments), reversed(starts), strict=True):
            u_l, dt_l, dy_l, B_l, C_l = u_s[steps], dt_s[steps], dy_s[steps], B_s[steps], C_s[steps]
            E, S, G, P = _decays(dt_l, rate, E_), _outer(u_l, B_l, S_), _outer(dy_l, C_l, G_), P_[: len(u_l)]
            scan_into(S, S, E, start)
            if g is not None:
                G[-1] += g
            if len(G) > 1:
                scan_into(G[:-1], G[:-1], E[1:], G[-1], reverse=True)
            torch.bmm(_flat(B_l).mT, _flat(G), out=_flat(du_s[steps]))
            torch.bmm(_flat(G), _flat(u_l).mT, out=_flat(dB_s[steps]))
            torch.bmm(_flat(S), _flat(dy_l).mT, out=_flat(dC_s[steps]))
            E.mul_(G)
            g = E[0].clone()
            torch.mul(E[1:], S[:-1], out=P[1:])
            P[0] = 0.0 if start is None else g * start
            torch.mul(P, rates[:, columns], out=E)
            torch.sum(E, 2, keepdim=True, out=ddt_s[steps])
            dA[:, columns] += P.mul_(dt_l).sum((0, 1))
        du[rows, :, columns] = du_s.squeeze(2).transpose(0, 1)
        ddt[rows, :, columns] = ddt_s.squeeze(2).transpose(0, 1)
        dB[rows] += dB_s.squeeze(3).transpose(0, 1)
        dC[rows] += dC_s.squeeze(3).transpose(0, 1)
        dS0[rows, columns] = 0.0 if g is None else g.mT
    return du, ddt, dA.mT, dB, dC, dS0


def _decays(dt: Tensor, rate: Tensor, buffer: Tensor) -> Tensor:
    """exp(dt A) [L, b, N, d], of dt [L, b, 1, d]."""
    return torch.mul(dt, rate, out=buffer[: len(dt)]).exp_()


def _outer(x: Tensor, y: Tensor, buffer: Tensor) -> Tensor:
    """[L, b, 1, d] and [L, b, N, 1] -> [L, b, N, d]."""
    return torch.mul(x, y, out=buffer[: len(x)])


def _time_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[b, T, ...] -> [T, b, ...], dense."""
    return x.transpose(0, 1).to(dtype).contiguous()


def _state(S: Tensor | None, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor | None:
    """[B, D, N] -> [b, N, d]."""
    return None if S is None else S[rows, columns].to(dtype).mT.contiguous()


def _flat(x: Tensor) -> Tensor:
    """[L, b, ...] -> [L b, ...]."""
    return x.flatten(0, 1)


def _slabs(u: Tensor, A: Tensor, buffers: int) -> Iterator[tuple[slice, slice, list[slice], list[Tensor]]]:
    """Rows and columns of each slab, at most WIDTH elements a step, its segments, and buffers [L, b, N, d] for one."""
    B, T, D = u.shape
    N = A.shape[1]
    width = WIDTH[u.device.type]
    d = max(1, min(D, width // max(1, N)))
    b = max(1, min(B, width // max(1, d * N)))
    length = min(T, max(1, SEGMENT[u.device.type] // max(1, b * d * N)))
    segments = [slice(t, min(t + length, T)) for t in range(0, T, length)]
    memory = torch.empty((buffers, length * b * N * d), dtype=_wide(u.dtype), device=u.device)
    for i in range(0, B, b):
        for j in range(0, D, d):
            shape = (length, min(b, B - i), N, min(d, D - j))
            parts = [part[: math.prod(shape)].view(shape) for part in memory.unbind(0)]
            yield slice(i, i + b), slice(j, j + d), segments, parts


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@operator("selective_scan")
def selective_scan_op(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _forward(u, dt, A, B, C, initial_state)


@register_fake(selective_scan_op)
def _forward_fake(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), u.new_empty((u.shape[0], *A.shape), dtype=_wide(u.dtype))


# An operator returns tensors only: where dS0 is not wanted, an empty one stands in its place.
@operator("selective_scan_backward")
def selective_scan_backward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    dy: Tensor,
    dST: Tensor | None,
    need_dS0: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    du, ddt, dA, dB, dC, dS0 = _backward(u, dt, A, B, C, initial_state, dy, dST)
    keep_S0 = initial_state is not None and need_dS0
    return (
        du,
        ddt,
        dA.to(A.dtype).contiguous(),
        dB.to(B.dtype),
        dC.to(C.dtype),
        dS0.to(initial_state.dtype) if keep_S0 and initial_state is not None else u.new_empty(0),
    )


@register_fake(selective_scan_backward)
def _backward_fake(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    dy: Tensor,
    dST: Tensor | None,
    need_dS0: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    du, ddt, dA, dB, dC = (z.new_empty(z.shape) for z in (u, dt, A, B, C))
    keep_S0 = initial_state is not None and need_dS0
    dS0 = initial_state.new_empty(initial_state.shape) if keep_S0 and initial_state is not None else u.new_empty(0)
    return du, ddt, dA, dB, dC, dS0


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, dy: Tensor | None, dST: Tensor | None) -> tuple[Tensor | None, ...]:
    u, dt, A, B, C, initial_state = ctx.saved_tensors
    if dy is None and dST is None:
        return None, None, None, None, None, None
    if dy is None:
        dy = u.new_zeros(1).expand(u.shape)
    need_dS0 = initial_state is not None and ctx.needs_input_grad[5]
    *grads, dS0 = selective_scan_backward(u, dt, A, B, C, initial_state, dy, dST, need_dS0)
    return *grads, dS0 if need_dS0 else None


register_autograd(selective_scan_op, _autograd, setup_context=_setup_context)
selective_scan_packed = register_packed(selective_scan_op, _setup_context, _autograd, shared=("A",))


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Mamba's selective scan, S_t = exp(dt_t A) * S_{t-1} + dt_t x_t B_t^T and y_t = S_t C_t.

    x and dt [B, T, D]; A [D, N], usually negative; B and C [B, T, N]; initial_state [B, D, N]; cu_seqlens, int32 or
    int64, where row 0 packs sequences (B = 1, states [sequences, D, N]). dt is the step size after its softplus,
    best kept in float32. Returns y [B, T, D] in x's dtype and the final state [B, D, N] in float32 (float64 for
    float64), or None in its place. Raises ValueError for shapes, dtypes or devices that do not agree, and for an empty
    sequence. Source: Gu and Dao 2023, arXiv:2312.00752.
    """
    check_operand("x", x, "BTD", x, "x", "BTD")
    check_operand("dt", dt, "BTD", x, "x", "BTD")
    check_operand("A", A, "DN", x, "x", "BTD")
    first = check_packed("x", x, cu_seqlens, initial_state)
    for name, z, axes in (("B", B, "BTN"), ("C", C, "BTN"), ("initial_state", first, "BDN")):
        if z is not None:
            check_operand(name, z, axes, x, "x", "BTD")
            check_operand(name, z, axes, A, "A", "DN")
    if x.shape[1] == 0:
        raise ValueError("x has T=0, at least T=1 is needed")
    reason = supports(x.device.type, x.dtype)
    if reason is not None:
        raise ValueError(f"x: {reason}")
    wide = _wide(x.dtype)
    operands = dt.to(wide) * x.to(wide), dt, A, B, C, initial_state
    y, final = (
        selective_scan_op(*operands)
        if cu_seqlens is None
        else call_packed(selective_scan_packed, *operands, cu_seqlens)
    )
    return y.to(x.dtype), final if output_final_state else None

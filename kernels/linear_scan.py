"""The elementwise linear recurrence with a factor of any sign, forward and backward, in vectorised steps on the CPU.

    h_t = a_t h_{t-1} + x_t        x, a, h [B, T, D], the state [B, D]

With dh_t the gradient of h_t, and that of the final state added to dh_T:

    dx_t = dh_t + a_{t+1} dx_{t+1}        da_t = dx_t h_{t-1}        dh_0 = a_1 dx_1

a is the factor itself, never its logarithm: zero, negative and larger than one are all exact. HGRN (arXiv:2311.04823),
RG-LRU (Griffin, arXiv:2402.19427) and minGRU (arXiv:2410.01201) are of this form.

CUDA runs `linear_scan_triton`, but for sequences too long to be walked step by step, which run as here.

Where a step is wide, one fused multiply-add for each step is as fast as memory. Where it is narrow, T is cut into NT
blocks of C steps which advance together, in three passes of C, NT and C steps: the product p and the sum e that a
block makes of a zero state, then S_{n+1} = p_n S_n + e_n over the blocks, then the recurrence itself in every block
from its S_n. The first two run in float64, and they are kept only if

    max |a|^C <= 2^300 and |S_n| <= 2^128 for all n          (max |a| <= 1 and |S_n| <= 2^200 for float64 operands)

Then no p or e overflows, and what underflows in them is below 2^-594, nothing to float32 (2^-822, and it never grows
again). Otherwise, as for infinities and NaN, the steps are taken one by one. So h is finite wherever the plain loop
is finite, and differs from it by rounding only: a = 1e20 followed by 0, or 1e30 followed by 1e-30, is as good as in
the loop. Between blocks a state may survive that float32 would have lost to underflow.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fla_compile.kernels.operators import DEVICES, operator, register_autograd, register_fake
from fla_compile.kernels.packed import call_packed, check_packed, each_sequence, register_packed

__all__ = ["kernel_name", "linear_scan", "naive_linear_scan", "scan_into", "supports"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Elements of one step, and of one segment of steps, that are worked on together: on the CPU they should stay in cache.
WIDTH = {"cpu": 1 << 15, "cuda": 1 << 24}
SEGMENT = {"cpu": 1 << 18, "cuda": 1 << 26}

# A step of up to NARROW elements costs more to start than to do: from LONG steps on, blocks pay.
NARROW = {"cpu": 1 << 9, "cuda": 1 << 20}
LONG = {"cpu": 128, "cuda": 32}

# Exponents of two: the growth allowed in a block, and the size of the states between blocks.
GROWTH = {torch.float32: 300, torch.float64: 0}
LARGEST_STATE = {torch.float32: 128, torch.float64: 200}


def naive_linear_scan(
    x: Tensor,
    a: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """h_t = a_t h_{t-1} + x_t, one step after another; x and a [B, T, D], initial_state [B, D]."""
    if cu_seqlens is None:
        return _loop(x, a, initial_state, output_final_state)
    return each_sequence(_loop, cu_seqlens, {"x": x, "a": a}, initial_state, output_final_state)


def _loop(x: Tensor, a: Tensor, initial_state: Tensor | None, output_final_state: bool) -> tuple[Tensor, Tensor | None]:
    dtype = _wide(x.dtype)
    h = x.new_zeros(x.shape[0], x.shape[2], dtype=dtype) if initial_state is None else initial_state.to(dtype)
    steps = []
    # unbind, not x[:, t]: the backward of T slices would write T whole tensors
    for x_t, a_t in zip(x.to(dtype).unbind(1), a.to(dtype).unbind(1), strict=True):
        h = a_t * h + x_t
        steps.append(h)
    return torch.stack(steps, dim=1).to(x.dtype), h if output_final_state else None


def scan_into(out: Tensor, x: Tensor, a: Tensor, state: Tensor | None, *, reverse: bool = False) -> Tensor:
    """Writes h_t = a_t h_{t-1} + x_t into `out` and returns the last h; all [T, ...] in one dtype, state [...] or None.

    `reverse` runs from the last step to the first. `out` may be x itself; the result is a view of it.
    """
    device = x.device.type
    capturing = (
        device == "cuda" and torch.cuda.is_current_stream_capturing()
    )  # whether the bounds hold, the host decides
    if len(x) >= LONG[device] and x.shape[1:].numel() <= NARROW[device] and not capturing:
        last = _scan_blocks(out, x, a, state, reverse)
        if last is not None:
            return last
    return _scan_steps(out, x, a, state, reverse)


def _scan_steps(out: Tensor, x: Tensor, a: Tensor, state: Tensor | None, reverse: bool) -> Tensor:
    h = state
    steps: Sequence[tuple[Tensor, Tensor, Tensor]] = [*zip(out.unbind(0), x.unbind(0), a.unbind(0), strict=True)]
    for h_t, x_t, a_t in reversed(steps) if reverse else steps:
        if h is None:
            h_t.copy_(x_t)
        else:
            torch.addcmul(x_t, a_t, h, out=h_t)
        h = h_t
    assert h is not None, "no steps"
    return h


def _scan_blocks(out: Tensor, x: Tensor, a: Tensor, state: Tensor | None, reverse: bool) -> Tensor | None:
    """As `scan_into`, in blocks; None, with nothing written, if the bounds do not hold."""
    T = x.shape[0]
    C = _block_size(T)
    NT, rest = T // C, T % C
    body, tail = (slice(rest, T), slice(0, rest)) if reverse else (slice(0, T - rest), slice(T - rest, T))
    out_c, x_c, a_c = (y[body].unflatten(0, (NT, C)).unbind(1) for y in (out, x, a))
    positions, blocks = [*range(C)], [*range(NT)]
    if reverse:
        positions.reverse()
        blocks.reverse()

    e, p = (y[positions[0]].to(torch.float64, copy=True) for y in (x_c, a_c))  # [NT, ...]
    for i in positions[1:]:
        torch.addcmul(x_c[i], a_c[i], e, out=e)
        p.mul_(a_c[i])
    S = torch.empty_like(e)
    S[blocks[0]] = 0.0 if state is None else state
    S_n, e_n, p_n = S.unbind(0), e.unbind(0), p.unbind(0)
    for n, following in pairwise(blocks):
        torch.addcmul(e_n[n], p_n[n], S_n[n], out=S_n[following])
    tame = torch.linalg.vector_norm(a[body], ord=torch.inf) <= 2.0 ** (GROWTH[x.dtype] / C)
    tame &= torch.linalg.vector_norm(S, ord=torch.inf) <= 2.0 ** LARGEST_STATE[x.dtype]
    if not tame.item():
        return None

    h = S.to(x.dtype)
    for i in positions:
        torch.addcmul(x_c[i], a_c[i], h, out=out_c[i])
        h = out_c[i]
    last = h[blocks[-1]]
    return _scan_steps(out[tail], x[tail], a[tail], last, reverse) if rest else last


@lru_cache(maxsize=1024)
def _block_size(T: int) -> int:
    """The C of fewest steps: the first pass has two operations a step, what is left of T follows one by one."""
    return min(range(2, T + 1), key=lambda C: 3 * C + T // C + T % C)


def _forward(x: Tensor, a: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    B, _, D = x.shape
    dtype = _wide(x.dtype)
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = torch.empty((B, D), dtype=dtype, device=x.device)
    for rows, columns in _slabs(x):
        state = None if initial_state is None else initial_state[rows, columns].to(dtype)
        x_s, a_s, h_s = (y[rows, :, columns].transpose(0, 1) for y in (x, a, h))  # [T, b, d]
        for steps in _segments(x_s):
            x_l, a_l = _dense(x_s[steps], dtype), _dense(a_s[steps], dtype)
            out = h_s[steps] if h.dtype == dtype else torch.empty_like(x_l)
            state = scan_into(out, x_l, a_l, state)
            if h.dtype != dtype:
                h_s[steps].copy_(out)
        final[rows, columns] = 0.0 if state is None else state
    return h, final


def _backward(
    source: Tensor,
    a: Tensor,
    initial_state: Tensor | None,
    dh: Tensor,
    dht: Tensor | None,
    need_da: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(dx, da or None, dh0). `source` is h; where h is narrower than the state it is x, and h is computed again."""
    B, _, D = source.shape
    dtype = _wide(source.dtype)
    again = source.dtype != dtype
    dx = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    da = torch.empty(a.shape, dtype=a.dtype, device=a.device) if need_da else None
    dh0 = torch.empty((B, D), dtype=dtype, device=a.device)
    for rows, columns in _slabs(source):
        source_s, a_s, dh_s, dx_s = (y[rows, :, columns].transpose(0, 1) for y in (source, a, dh, dx))
        state = None if initial_state is None else initial_state[rows, columns].to(dtype)
        segments = [*_segments(source_s)]
        starts = [state]  # the states before each segment
        if again and need_da:
            for steps in segments[:-1]:
                x_l = source_s[steps].to(dtype)
                # a clone: a view would keep the whole segment
                starts.append(scan_into(x_l, x_l, _dense(a_s[steps], dtype), starts[-1]).clone())
        elif need_da:
            starts += [source_s[steps.stop - 1] for steps in segments[:-1]]
        g = None if dht is None else dht[rows, columns].to(dtype)  # the gradient that comes from later steps
        for n in range(len(segments) - 1, -1, -1):
            steps = segments[n]
            a_l, dh_l = _dense(a_s[steps], dtype), _dense(dh_s[steps], dtype)
            dx_l = torch.empty_like(dh_l) if again else dx_s[steps]
            torch.add(dh_l[-1], 0.0 if g is None else g, out=dx_l[-1])
            if len(dx_l) > 1:
                scan_into(dx_l[:-1], dh_l[:-1], a_l[1:], dx_l[-1], reverse=True)
            g = a_l[0] * dx_l[0]
            if again:
                dx_s[steps].copy_(dx_l)
            if da is not None:
                h_l = source_s[steps]
                if again:
                    h_l = h_l.to(dtype)
                    scan_into(h_l, h_l, a_l, starts[n])
                da_l = da[rows, steps, columns].transpose(0, 1)
                torch.mul(dx_l[1:], h_l[:-1], out=da_l[1:])
                before = starts[n]
                da_l[0] = 0.0 if before is None else dx_l[0] * before
        dh0[rows, columns] = 0.0 if g is None else g
    return dx, da, dh0


def _slabs(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the state [B, D], at most WIDTH elements at a time."""
    B, _, D = x.shape
    width = WIDTH[x.device.type]
    d = max(1, min(D, width))
    b = max(1, width // d)
    for i in range(0, B, b):
        for j in range(0, D, d):
            yield slice(i, i + b), slice(j, j + d)


def _segments(x: Tensor) -> Iterator[slice]:
    """Steps of x [T, b, d], about SEGMENT elements at a time."""
    T = x.shape[0]
    length = max(1, SEGMENT[x.device.type] // max(1, x.shape[1:].numel()))
    for t in range(0, T, length):
        yield slice(t, min(t + length, T))


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [T, b, d] in `dtype` with the last axis dense, itself if it is so already: steps over gaps are slow."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _kernels_for(x: Tensor) -> ModuleType | None:
    """Where the Triton kernels are, for operands like x; None: here."""
    if x.device.type != "cuda":
        return None
    from fla_compile.kernels import linear_scan_triton  # triton may be absent

    return linear_scan_triton if x.shape[1] <= linear_scan_triton.LONGEST else None


@operator("linear_scan")
def linear_scan_op(x: Tensor, a: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    kernels = _kernels_for(x)
    if kernels is not None:
        return kernels.forward(x, a, initial_state, _wide(x.dtype))
    return _forward(x, a, initial_state)


@register_fake(linear_scan_op)
def _forward_fake(x: Tensor, a: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], x.shape[2]), dtype=_wide(x.dtype))


# An operator returns tensors only: where da or dh0 is not wanted, an empty one stands in its place.
@operator("linear_scan_backward")
def linear_scan_backward(
    source: Tensor,
    a: Tensor,
    initial_state: Tensor | None,
    dh: Tensor,
    dht: Tensor | None,
    need_da: bool,
    need_dh0: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _kernels_for(source)
    if kernels is not None:
        dx, da, dh0 = kernels.backward(source, a, initial_state, dh, dht, need_da, _wide(source.dtype))
    else:
        dx, da, dh0 = _backward(source, a, initial_state, dh, dht, need_da)
    keep_h0 = initial_state is not None and need_dh0
    return (
        dx,
        a.new_empty(0) if da is None else da,
        dh0.to(initial_state.dtype) if keep_h0 and initial_state is not None else a.new_empty(0),
    )


@register_fake(linear_scan_backward)
def _backward_fake(
    source: Tensor,
    a: Tensor,
    initial_state: Tensor | None,
    dh: Tensor,
    dht: Tensor | None,
    need_da: bool,
    need_dh0: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    keep_h0 = initial_state is not None and need_dh0
    return (
        source.new_empty(source.shape),
        a.new_empty(a.shape if need_da else (0,)),
        initial_state.new_empty(initial_state.shape) if keep_h0 and initial_state is not None else a.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, a, initial_state = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0] if x.dtype == _wide(x.dtype) else x, a, initial_state)


def _autograd(ctx: Any, dh: Tensor | None, dht: Tensor | None) -> tuple[Tensor | None, ...]:
    source, a, initial_state = ctx.saved_tensors
    if dh is None and dht is None:
        return None, None, None
    if dh is None:
        dh = source.new_zeros(1).expand(source.shape)
    need_da = ctx.needs_input_grad[1]
    need_dh0 = initial_state is not None and ctx.needs_input_grad[2]
    dx, da, dh0 = linear_scan_backward(source, a, initial_state, dh, dht, need_da, need_dh0)
    return dx, da if need_da else None, dh0 if need_dh0 else None


register_autograd(linear_scan_op, _autograd, setup_context=_setup_context)
linear_scan_packed = register_packed(linear_scan_op, _setup_context, _autograd, fill={"a": 1.0}, keep_output=True)


def supports(device_type: str, dtype: torch.dtype) -> str | None:
    """None if the scan runs there, else the reason why not."""
    if device_type not in DEVICES:
        return f"device {device_type!r} is not one of {', '.join(DEVICES)}"
    if dtype not in DTYPES:
        return f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}"
    return None


def kernel_name(device_type: str) -> str:
    """What runs there, for reports; on CUDA blocks take over where steps are too many to be walked."""
    return "scan (Triton)" if device_type == "cuda" else "scan in blocks"


def linear_scan(
    x: Tensor,
    a: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The elementwise recurrence h_t = a_t h_{t-1} + x_t.

    x and a [B, T, D], a the factor itself and of any sign; initial_state [B, D]; cu_seqlens [N + 1], int32 or int64,
    where row 0 packs N sequences (B = 1, states [N, D]). Returns h [B, T, D] in x's dtype and the final state [B, D] in
    float32 (float64 for float64), or None in its place. Raises ValueError for shapes, dtypes or devices that do not
    agree, and for an empty sequence. Source: Qin et al. 2023, arXiv:2311.04823.
    """
    check_operand("x", x, "BTD", x, "x", "BTD")
    check_operand("a", a, "BTD", x, "x", "BTD")
    first = check_packed("x", x, cu_seqlens, initial_state)
    if first is not None:
        check_operand("initial_state", first, "BD", x, "x", "BTD")
    if x.shape[1] == 0:
        raise ValueError("x has T=0, at least T=1 is needed")
    reason = supports(x.device.type, x.dtype)
    if reason is not None:
        raise ValueError(f"x: {reason}")
    operands = x, a, initial_state
    h, final = (
        linear_scan_op(*operands) if cu_seqlens is None else call_packed(linear_scan_packed, *operands, cu_seqlens)
    )
    return h, final if output_final_state else None


def check_operand(name: str, x: Tensor, axes: str, other: Tensor, other_name: str, other_axes: str) -> None:
    """Raises ValueError if x is not floating point, on `other`'s device and of its size on every shared axis."""
    if x.ndim != len(axes):
        raise ValueError(f"{name} must have {len(axes)} dimensions, got {x.ndim}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name} must be floating point, got {x.dtype}")
    for axis, size in zip(axes, x.shape, strict=True):
        if axis in other_axes and size != (expected := other.shape[other_axes.index(axis)]):
            raise ValueError(f"{name} has {axis}={size}, {other_name} has {axis}={expected}")
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}, {other_name} is on {other.device}")

"""The decayed outer product as operators: checks, `torch.library` registration, public functions.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t        a_t = exp(g_t)

One forward operator for each family in `FAMILIES`, so that a graph says what it runs, and one backward for all of
them: the rank of g tells the families apart. CPU runs `decay_cpu`, CUDA runs `decay_triton`.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fla_compile.kernels import decay_cpu
from fla_compile.kernels.decay_naive import retnet_gamma

__all__ = ["FAMILIES", "gla", "linear_attention", "retention", "simple_gla", "supports"]

# The axes of g.
FAMILIES: dict[str, tuple[str, ...] | None] = {
    "linear_attention": None,
    "retention": ("H",),
    "simple_gla": ("B", "T", "H"),
    "gla": ("B", "T", "H", "K"),
}
DEVICES = ("cpu", "cuda")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST_HEAD_CUDA = 256


def _forward_cpu(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return decay_cpu.chunk_forward(q, k, v, g, initial_state, scale)


def _cuda_chunks(q: Tensor) -> ModuleType:
    """Triton; in float64, which it does not do, the same chunks as matrix products."""
    if q.dtype == torch.float64:
        return decay_cpu
    from fla_compile.kernels import decay_triton  # triton may be absent

    return decay_triton


def _forward_cuda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return _cuda_chunks(q).chunk_forward(q, k, v, g, initial_state, scale)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    B, _, H, K = q.shape
    return v.new_empty(v.shape), v.new_empty((B, H, K, v.shape[-1]), dtype=_state_dtype(q))


# An operator returns tensors only: where dg or dh0 is not wanted, an empty one stands in its place.
@torch.library.custom_op("fla_compile::decay_backward", mutates_args=(), device_types="cpu")
def decay_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    do: Tensor,
    dht: Tensor | None,
    need_dg: bool,
    need_dh0: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dg, dh0 = decay_cpu.chunk_backward(q, k, v, g, initial_state, scale, do, dht, need_dg=need_dg)
    return dq, dk, dv, _wanted(dg, g, need_dg, q), _wanted(dh0, initial_state, need_dh0, q)


@decay_backward.register_kernel("cuda")
def _backward_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    do: Tensor,
    dht: Tensor | None,
    need_dg: bool,
    need_dh0: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dg, dh0 = _cuda_chunks(q).chunk_backward(q, k, v, g, initial_state, scale, do, dht)
    return dq, dk, dv, _wanted(dg, g, need_dg, q), _wanted(dh0, initial_state, need_dh0, q)


@decay_backward.register_fake
def _backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    do: Tensor,
    dht: Tensor | None,
    need_dg: bool,
    need_dh0: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dg = q.new_empty(0) if g is None or not need_dg else g.new_empty(g.shape)
    keep_h0 = initial_state is not None and need_dh0
    dh0 = initial_state.new_empty(initial_state.shape) if keep_h0 and initial_state is not None else q.new_empty(0)
    return dq, dk, dv, dg, dh0


def _wanted(grad: Tensor | None, of: Tensor | None, need: bool, like: Tensor) -> Tensor:
    if grad is None or of is None or not need:
        return like.new_empty(0)
    return grad.to(of.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, g, initial_state, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, g, initial_state)
    ctx.scale = scale


def _backward(ctx: Any, do: Tensor | None, dht: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, g, initial_state = ctx.saved_tensors
    if do is None and dht is None:
        return None, None, None, None, None, None
    if do is None:
        do = torch.zeros_like(v)
    need_dg = g is not None and ctx.needs_input_grad[3]
    need_dh0 = initial_state is not None and ctx.needs_input_grad[4]
    dq, dk, dv, dg, dh0 = decay_backward(q, k, v, g, initial_state, ctx.scale, do, dht, need_dg, need_dh0)
    return dq, dk, dv, dg if need_dg else None, dh0 if need_dh0 else None, None


def _register(family: str) -> torch.library.CustomOpDef:
    op = torch.library.custom_op(f"fla_compile::{family}", _forward_cpu, mutates_args=(), device_types="cpu")
    op.register_kernel("cuda")(_forward_cuda)
    op.register_fake(_forward_fake)
    op.register_autograd(_backward, setup_context=_setup_context)
    return op


OPS = {family: _register(family) for family in FAMILIES}


def supports(family: str, device_type: str, dtype: torch.dtype, K: int, V: int) -> str | None:
    """None if there is a kernel, else the reason why not."""
    if family not in FAMILIES:
        return f"family {family!r} is not one of {', '.join(FAMILIES)}"
    if device_type not in DEVICES:
        return f"device {device_type!r} is not one of {', '.join(DEVICES)}"
    if dtype not in DTYPES:
        return f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}"
    if device_type == "cuda" and (K > LARGEST_HEAD_CUDA or V > LARGEST_HEAD_CUDA):
        return f"head sizes K={K}, V={V} exceed {LARGEST_HEAD_CUDA} on cuda"
    return None


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention without normaliser, S_t = S_{t-1} + k_t v_t^T and o_t = scale * S_t^T q_t.

    q, k [B, T, H, K]; v [B, T, H, V]; initial_state [B, H, K, V]; scale K^-0.5 if None. Returns o [B, T, H, V] in v's
    dtype and the final state [B, H, K, V] in float32 (float64 for float64), or None in its place. Raises ValueError
    for shapes, dtypes or devices that do not agree. Source: Katharopoulos et al. 2020, arXiv:2006.16236.
    """
    return _run("linear_attention", q, k, v, None, scale, initial_state, output_final_state)


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Retention, S_t = gamma S_{t-1} + k_t v_t^T and o_t = scale * S_t^T q_t, with gamma constant for each head.

    q, k [B, T, H, K]; v [B, T, H, V]; gamma [H] in (0, 1], a factor and not its logarithm, 1 - 2^(-5-h) if None;
    initial_state [B, H, K, V]; scale K^-0.5 if None. Returns o [B, T, H, V] in v's dtype and the final state
    [B, H, K, V] in float32 (float64 for float64), or None in its place. Raises ValueError for shapes, dtypes or
    devices that do not agree. Source: Sun et al. 2023, arXiv:2307.08621.
    """
    _check_operands("retention", q, k, v, initial_state)
    if gamma is None:
        gamma = retnet_gamma(q.shape[2], device=q.device, dtype=_state_dtype(q))
    else:
        _check_gate("retention", "gamma", gamma, q)
    return _run("retention", q, k, v, gamma.to(_state_dtype(q)).log(), scale, initial_state, output_final_state)


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with one gate a head and step, S_t = exp(g_t) S_{t-1} + k_t v_t^T and o_t = scale * S_t^T q_t.

    q, k [B, T, H, K]; v [B, T, H, V]; g [B, T, H], the natural logarithm of the decay, best kept in float32;
    initial_state [B, H, K, V]; scale K^-0.5 if None. Returns o [B, T, H, V] in v's dtype and the final state
    [B, H, K, V] in float32 (float64 for float64), or None in its place. Raises ValueError for shapes, dtypes or
    devices that do not agree. Source: Dao and Gu 2024, arXiv:2405.21060.
    """
    return _run("simple_gla", q, k, v, g, scale, initial_state, output_final_state)


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention, S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T and o_t = scale * S_t^T q_t.

    q, k [B, T, H, K]; v [B, T, H, V]; g [B, T, H, K], the natural logarithm of the decay, best kept in float32;
    initial_state [B, H, K, V]; scale K^-0.5 if None. Returns o [B, T, H, V] in v's dtype and the final state
    [B, H, K, V] in float32 (float64 for float64), or None in its place. Raises ValueError for shapes, dtypes or
    devices that do not agree. Source: Yang et al. 2023, arXiv:2312.06635.
    """
    return _run("gla", q, k, v, g, scale, initial_state, output_final_state)


def _run(
    family: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    _check_operands(family, q, k, v, initial_state)
    if g is not None:
        _check_gate(family, "g", g, q)
    o, final = OPS[family](q, k, v, g, initial_state, q.shape[-1] ** -0.5 if scale is None else scale)
    return o, final if output_final_state else None


def _check_operands(family: str, q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions, got {x.ndim}")
        if not x.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}, q has {q.dtype}")
    for name, x, size in (("k", k, 4), ("v", v, 3)):
        _check_shape(name, x, "BTHK"[:size], q)
    if initial_state is not None:
        if initial_state.ndim != 4:
            raise ValueError(f"initial_state must have 4 dimensions, got {initial_state.ndim}")
        _check_shape("initial_state", initial_state, "BHK", q)
        if initial_state.shape[-1] != v.shape[-1]:
            raise ValueError(f"initial_state has V={initial_state.shape[-1]}, v has V={v.shape[-1]}")
        _check_float_on("initial_state", initial_state, q)
    for name, x in (("k", k), ("v", v)):
        _check_float_on(name, x, q)
    if q.shape[1] == 0:
        raise ValueError("q has T=0, at least T=1 is needed")
    reason = supports(family, q.device.type, q.dtype, q.shape[-1], v.shape[-1])
    if reason is not None:
        raise ValueError(f"q, k, v: {reason}")


def _check_gate(family: str, name: str, g: Tensor, q: Tensor) -> None:
    axes = "".join(FAMILIES[family] or ())
    if g.ndim != len(axes):
        raise ValueError(f"{name} must have {len(axes)} dimensions, got {g.ndim}")
    _check_shape(name, g, axes, q)
    _check_float_on(name, g, q)


def _check_shape(name: str, x: Tensor, axes: str, q: Tensor) -> None:
    for i, axis in enumerate(axes):
        expected = q.shape["BTHK".index(axis)]
        if x.shape[i] != expected:
            raise ValueError(f"{name} has {axis}={x.shape[i]}, q has {axis}={expected}")


def _check_float_on(name: str, x: Tensor, q: Tensor) -> None:
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name} must be floating point, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}, q is on {q.device}")


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32

"""The decayed delta as operators: checks, `torch.library` registration, public functions.

    S_t = A_t S_{t-1} + B_t        o_t = scale * S_t^T q_t        with A_t and B_t as in `delta_naive`

One forward operator for each family in `FAMILIES`, so that a graph says what it runs, and one backward for all of
them: which of g, beta, b and c are there tells the families apart.

CPU and CUDA run `delta_chunk`. Where log decays are positive and add up to more than `delta_steps.tame` allows, the
steps are taken one by one. Asking waits for the device; a CUDA graph being captured cannot wait, and gives NaN for
those sequences and heads.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from fla_compile.kernels.decay_checks import DTYPES, check_gate, state_dtype
from fla_compile.kernels.delta_chunk import Gradients, Operands, chunk_backward, chunk_forward
from fla_compile.kernels.delta_steps import grows, steps_backward, steps_forward, tame
from fla_compile.kernels.operators import DEVICES, operator, register_autograd, register_fake
from fla_compile.kernels.packed import call_packed, check_packed, register_packed

__all__ = ["FAMILIES", "delta_rule", "dplr", "gated_delta_rule", "kda", "supports"]

# The operands beside q, k and v, in order, and their axes.
FAMILIES: dict[str, dict[str, str]] = {
    "delta_rule": {"beta": "BTH"},
    "gated_delta_rule": {"g": "BTH", "beta": "BTH"},
    "kda": {"g": "BTHK", "beta": "BTH"},
    "dplr": {"g": "BTHK", "b": "BTHK", "c": "BTHK"},
}


def _operands(family: str, args: tuple[Any, ...]) -> Operands:
    """From an operator's arguments: q, k, v, the family's own operands, initial_state, scale."""
    names = ("q", "k", "v", *FAMILIES[family], "initial_state", "scale")
    return Operands(**{"g": None, "beta": None, "b": None, "c": None, **dict(zip(names, args, strict=True))})


def _run_forward(x: Operands) -> tuple[Tensor, Tensor]:
    # autocast reaches into operators: it would round every product in here to a narrow type
    with torch.autocast(x.q.device.type, enabled=False):
        captured = in_cuda_graph(x.q)
        if not captured and grows(x.g):
            return steps_forward(x)
        o, final = chunk_forward(x)
        return (where_tame(o, x, 1), where_tame(final, x, 0)) if captured else (o, final)


def _run_backward(x: Operands, do: Tensor, dht: Tensor | None, need_dg: bool) -> Gradients:
    with torch.autocast(x.q.device.type, enabled=False):
        captured = in_cuda_graph(x.q)
        if not captured and grows(x.g):
            return steps_backward(x, do, dht, need_dg=need_dg)
        # every gradient is a sum over do
        return chunk_backward(x, where_tame(do, x, 1) if captured else do, dht, need_dg=need_dg)


def in_cuda_graph(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def where_tame(y: Tensor, x: Operands, axis: int) -> Tensor:
    """y [B, T, H, V] or [B, H, K, V], NaN where the chunks cannot tell; `axis` is where T is or, with 0, none."""
    if x.g is None:
        return y
    known = tame(x.g)[..., None, None] if axis == 0 else tame(x.g)[:, None, :, None]
    return torch.where(known, y, torch.nan)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, _T, H, K = q.shape
    return v.new_empty(v.shape), v.new_empty((B, H, K, v.shape[-1]), dtype=state_dtype(q))


# An operator returns tensors only: in place of the gradient of an absent operand, or one nobody wants, stands an
# empty tensor.
@operator("delta_backward")
def delta_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    do: Tensor,
    dht: Tensor | None,
    need_dg: bool,
    need_dh0: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = Operands(q, k, v, g, beta, b, c, initial_state, scale)
    d = _run_backward(x, do, dht, need_dg)
    own = [q.new_empty(0) if grad is None else grad for grad in (d.g, d.beta, d.b, d.c)]
    dh0 = d.initial_state if need_dh0 and d.initial_state is not None else q.new_empty(0)
    return d.q, d.k, d.v, own[0], own[1], own[2], own[3], dh0


@register_fake(delta_backward)
def _backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    do: Tensor,
    dht: Tensor | None,
    need_dg: bool,
    need_dh0: bool,
) -> tuple[Tensor, ...]:
    wanted = (q, k, v, g if need_dg else None, beta, b, c, initial_state if need_dh0 else None)
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in wanted)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.scale = scale


def _backward(family: str, ctx: Any, do: Tensor | None, dht: Tensor | None) -> tuple[Tensor | None, ...]:
    names = ("q", "k", "v", *FAMILIES[family], "initial_state", "scale")
    needs = dict(zip(names, ctx.needs_input_grad[: len(names)], strict=True))
    if do is None and dht is None:
        return (None,) * len(names)
    x = _operands(family, (*ctx.saved_tensors, ctx.scale))
    if do is None:
        do = torch.zeros_like(x.v)
    need_dg, need_dh0 = needs.get("g", False), x.initial_state is not None and needs["initial_state"]
    grads = delta_backward(x.q, x.k, x.v, x.g, x.beta, x.b, x.c, x.initial_state, x.scale, do, dht, need_dg, need_dh0)
    found = dict(zip(("q", "k", "v", "g", "beta", "b", "c", "initial_state"), grads, strict=True))
    if not need_dh0:
        found["initial_state"] = None
    return tuple(found.get(name) if needs[name] else None for name in names)


def _register(family: str) -> OpOverload:
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _run_forward(_operands(family, args))

    tensors = ", ".join(f"Tensor {name}" for name in ("q", "k", "v", *FAMILIES[family]))
    schema = f"({tensors}, Tensor? initial_state, float scale) -> (Tensor, Tensor)"
    op = operator(family, schema=schema)(forward)
    register_fake(op)(_forward_fake)
    register_autograd(op, partial(_backward, family), setup_context=_setup_context)
    return op


OPS = {family: _register(family) for family in FAMILIES}
PACKED = {family: register_packed(OPS[family], _setup_context, partial(_backward, family)) for family in FAMILIES}


def supports(family: str, device_type: str, dtype: torch.dtype, K: int, V: int) -> str | None:
    """None if there is a kernel, else the reason why not. Head sizes K and V are not limited."""
    if family not in FAMILIES:
        return f"family {family!r} is not one of {', '.join(FAMILIES)}"
    if device_type not in DEVICES:
        return f"device {device_type!r} is not one of {', '.join(DEVICES)}"
    if dtype not in DTYPES:
        return f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}"
    return None


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule, S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T and o_t = scale * S_t^T q_t.

    q, k [B, T, H, K]; v [B, T, H, V]; beta [B, T, H], any real; initial_state [B, H, K, V]; cu_seqlens [N + 1], int32
    or int64, where row 0 packs N sequences (B = 1, states [N, H, K, V]); scale K^-0.5 if None. Keys are taken as they
    are: the state stays bounded only for 0 <= beta |k|^2 <= 2. Returns o [B, T, H, V] in v's dtype and the final state
    [B, H, K, V] in float32 (float64 for float64), or None in its place. Raises ValueError for shapes, dtypes or devices
    that do not agree, and for an empty sequence. Source: Yang et al. 2024, arXiv:2406.06484.
    """
    return _run("delta_rule", q, k, v, {"beta": beta}, scale, initial_state, output_final_state, cu_seqlens)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule, S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = scale * S_t^T q_t.

    q, k [B, T, H, K]; v [B, T, H, V]; g [B, T, H], the natural logarithm of the decay, best kept in float32; beta [B,
    T, H], any real; initial_state [B, H, K, V]; cu_seqlens [N + 1], int32 or int64, where row 0 packs N sequences (B =
    1, states [N, H, K, V]); scale K^-0.5 if None. Returns o [B, T, H, V] in v's dtype and the final state [B, H, K, V]
    in float32 (float64 for float64), or None in its place. Raises ValueError for shapes, dtypes or devices that do not
    agree, and for an empty sequence. Source: Yang et al. 2024, arXiv:2412.06464.
    """
    return _run(
        "gated_delta_rule", q, k, v, {"g": g, "beta": beta}, scale, initial_state, output_final_state, cu_seqlens
    )


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Kimi delta attention, S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T.

    o_t = scale * S_t^T q_t; q, k [B, T, H, K]; v [B, T, H, V]; g [B, T, H, K], the natural logarithm of the decay, best
    kept in float32; beta [B, T, H], any real; initial_state [B, H, K, V]; cu_seqlens [N + 1], int32 or int64, where row
    0 packs N sequences (B = 1, states [N, H, K, V]); scale K^-0.5 if None. Returns o [B, T, H, V] in v's dtype and the
    final state [B, H, K, V] in float32 (float64 for float64), or None in its place. Raises ValueError for shapes,
    dtypes or devices that do not agree, and for an empty sequence. Source: Kimi Team 2025, arXiv:2510.26692.
    """
    return _run("kda", q, k, v, {"g": g, "beta": beta}, scale, initial_state, output_final_state, cu_seqlens)


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Diagonal plus low rank (RWKV-7), S_t = (diag(exp(g_t)) + b_t c_t^T) S_{t-1} + k_t v_t^T, o_t = scale * S_t^T q_t.

    q, k, b, c [B, T, H, K]; v [B, T, H, V]; g [B, T, H, K], the natural logarithm of the decay, best kept in float32;
    initial_state [B, H, K, V]; cu_seqlens [N + 1], int32 or int64, where row 0 packs N sequences (B = 1, states [N, H,
    K, V]); scale K^-0.5 if None. Returns o [B, T, H, V] in v's dtype and the final state [B, H, K, V] in float32
    (float64 for float64), or None in its place. Raises ValueError for shapes, dtypes or devices that do not agree, and
    for an empty sequence. Source: Peng et al. 2025, arXiv:2503.14456.
    """
    return _run("dplr", q, k, v, {"g": g, "b": b, "c": c}, scale, initial_state, output_final_state, cu_seqlens)


def _run(
    family: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own: dict[str, Tensor],
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    _check(family, {"q": q, "k": k, "v": v, **own}, check_packed("q", q, cu_seqlens, initial_state))
    operands = q, k, v, *own.values(), initial_state, q.shape[-1] ** -0.5 if scale is None else scale
    o, final = OPS[family](*operands) if cu_seqlens is None else call_packed(PACKED[family], *operands, cu_seqlens)
    return o, final if output_final_state else None


def _check(family: str, operands: dict[str, Tensor], initial_state: Tensor | None) -> None:
    q, v = operands["q"], operands["v"]
    layouts = {"q": "BTHK", "k": "BTHK", "v": "BTHV"} | FAMILIES[family]
    for name, x in operands.items():
        check_gate(name, x, layouts[name], q, v)
        if name not in ("g", "beta") and x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}, q has {q.dtype}")
    if initial_state is not None:
        check_gate("initial_state", initial_state, "BHKV", q, v)
    if q.shape[1] == 0:
        raise ValueError("q has T=0, at least T=1 is needed")
    reason = supports(family, q.device.type, q.dtype, q.shape[-1], v.shape[-1])
    if reason is not None:
        raise ValueError(f"q, k, v: {reason}")

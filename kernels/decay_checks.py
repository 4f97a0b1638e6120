"""Which decayed outer products there are kernels for, and the checks of their operands.

family              state update                                  axes of g
linear_attention    S_t = S_{t-1} + k_t v_t^T                     none
retention           S_t = gamma S_{t-1} + k_t v_t^T               H
simple_gla          S_t = a_t S_{t-1} + k_t v_t^T                 B, T, H
gla                 S_t = diag(a_t) S_{t-1} + k_t v_t^T           B, T, H, K
gla_values          S_t = S_{t-1} diag(w_t) + k_t v_t^T           none, and B, T, H, V for w
gla_both            S_t = diag(a_t) S_{t-1} diag(w_t) + k_t v_t^T B, T, H, K, and B, T, H, V for w
rwkv6               as gla, read before the update                B, T, H, K
"""

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fla_compile.kernels import decay_cpu
from fla_compile.kernels.decay_configs import LARGEST_BOTH, step_checked
from fla_compile.kernels.decay_heads import decay_heads
from fla_compile.kernels.operators import DEVICES

# The axes of g.
FAMILIES: dict[str, tuple[str, ...] | None] = {
    "linear_attention": None,
    "retention": ("H",),
    "simple_gla": ("B", "T", "H"),
    "gla": ("B", "T", "H", "K"),
    "gla_values": None,
    "gla_both": ("B", "T", "H", "K"),
    "rwkv6": ("B", "T", "H", "K"),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What the Triton chunk kernels take, K and V; under a decay over values they have each other's place.
LARGEST_KEYS, LARGEST_VALUES = 256, 512

# What the step kernel takes; a longer sequence is for the chunk kernels.
MOST_STEPS = 16
LARGEST_STEP_KEYS, LARGEST_STEP_VALUES = 256, 512


def supports(family: str, device_type: str, dtype: torch.dtype, K: int, V: int) -> str | None:
    """None if there is a kernel, else the reason why not. Head sizes K and V are not limited."""
    if family not in FAMILIES:
        return f"family {family!r} is not one of {', '.join(FAMILIES)}"
    if device_type not in DEVICES:
        return f"device {device_type!r} is not one of {', '.join(DEVICES)}"
    if dtype not in DTYPES:
        return f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}"
    return None


def kernel_name(family: str, device_type: str, dtype: torch.dtype | None = None, K: int = 1, V: int = 1) -> str:
    """What runs a family that `supports` accepts, for reports; float64 is none of Triton's types."""
    if family == "gla_values":
        K, V = V, K
    fits = K <= LARGEST_KEYS and V <= LARGEST_VALUES and dtype != torch.float64
    if family == "gla_both":
        fits = max(K, V) <= LARGEST_BOTH and dtype in (torch.float16, torch.bfloat16)
    return "chunk (Triton)" if fits and device_type == "cuda" else "chunk (matrix products)"


def chunks_for(q: Tensor, v: Tensor) -> ModuleType:
    """Where `chunk_forward` and `chunk_backward` without a decay over values are for operands like q and v."""
    if kernel_name("gla", q.device.type, q.dtype, q.shape[-1], v.shape[-1]) != "chunk (Triton)":
        return decay_cpu
    from fla_compile.kernels import decay_triton  # triton may be absent

    return decay_triton


def packed_kernels_for(q: Tensor, v: Tensor) -> ModuleType | None:
    """Where `packed_forward` and `packed_backward` are for operands like q and v, if there are any."""
    if kernel_name("gla", q.device.type, q.dtype, q.shape[-1], v.shape[-1]) != "chunk (Triton)":
        return None
    from fla_compile.kernels import decay_triton_packed  # triton may be absent

    return decay_triton_packed


def value_kernels_for(q: Tensor, v: Tensor) -> ModuleType | None:
    """Where `chunk_forward` and `chunk_backward` of a decay over values alone are; None: in `decay_cpu`."""
    if kernel_name("gla_values", q.device.type, q.dtype, q.shape[-1], v.shape[-1]) != "chunk (Triton)":
        return None
    from fla_compile.kernels import decay_triton_values  # triton may be absent

    return decay_triton_values


def both_kernels_for(q: Tensor, v: Tensor) -> ModuleType | None:
    """Where `chunk_forward` and `chunk_backward` of decays over keys and values are; None: in `decay_cpu`."""
    if kernel_name("gla_both", q.device.type, q.dtype, q.shape[-1], v.shape[-1]) != "chunk (Triton)":
        return None
    from fla_compile.kernels import decay_triton_both  # triton may be absent

    return decay_triton_both


def has_step_kernel(device: torch.device, dtype: torch.dtype, K: int, V: int) -> bool:
    """Whether up to `MOST_STEPS` steps of any family run the step kernel there."""
    fits = dtype != torch.float64 and K <= LARGEST_STEP_KEYS and V <= LARGEST_STEP_VALUES
    return fits and device.type == "cuda" and _step_checked(device)


@cache
def _step_checked(device: torch.device) -> bool:
    major, minor = torch.cuda.get_device_capability(device)
    return step_checked(10 * major + minor)


def steps_for(q: Tensor, v: Tensor) -> ModuleType | None:
    """Where `step_forward` is, for operands like q and v of so few steps that it runs them; else None."""
    if q.shape[1] > MOST_STEPS or not has_step_kernel(q.device, q.dtype, q.shape[-1], v.shape[-1]):
        return None
    from fla_compile.kernels import decay_step_triton

    return decay_step_triton


def check_operands(
    family: str, q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, *, shared: bool = False
) -> None:
    """Raises ValueError naming the argument and both values; `shared` leaves heads to `decay_heads.check_heads`."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions, got {x.ndim}")
        if not x.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}, q has {q.dtype}")
    for name, x, size in (("k", k, 4), ("v", v, 3)):
        _check_shape(name, x, "BTHK"[:size], q, v, shared)
    if initial_state is not None:
        if initial_state.ndim != 4:
            raise ValueError(f"initial_state must have 4 dimensions, got {initial_state.ndim}")
        _check_shape("initial_state", initial_state, "BHKV", q, v, shared)
        _check_float_on("initial_state", initial_state, q)
    for name, x in (("k", k), ("v", v)):
        _check_float_on(name, x, q)
    if q.shape[1] == 0:
        raise ValueError("q has T=0, at least T=1 is needed")
    reason = supports(family, q.device.type, q.dtype, q.shape[-1], v.shape[-1])
    if reason is not None:
        raise ValueError(f"q, k, v: {reason}")


def check_gate(name: str, x: Tensor, axes: Sequence[str] | None, q: Tensor, v: Tensor, *, shared: bool = False) -> None:
    axes = axes or ()
    if x.ndim != len(axes):
        raise ValueError(f"{name} must have {len(axes)} dimensions, got {x.ndim}")
    _check_shape(name, x, axes, q, v, shared)
    _check_float_on(name, x, q)


def check_shapes(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, *, heads: int | None = None) -> str:
    """The kind of decay that g is; raises ValueError for what the Triton chunk kernels do not take.

    Of so many `heads` neighbours may share operands (`decay_heads`); if None, none do.
    """
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"q must be float32, float16 or bfloat16, got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}, q has {q.dtype}")
        if x.shape[:2] != q.shape[:2] or (x.shape[2] != q.shape[2] and heads is None):
            raise ValueError(f"{name} has shape {tuple(x.shape)}, q has {tuple(q.shape)}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k has shape {tuple(k.shape)}, q has {tuple(q.shape)}")
    B, T, H, K = q.shape
    V = v.shape[-1]
    if heads is not None and g is not None and g.dim() in (1, 3, 4):
        H = decay_heads(g)
    for name, size, largest in (("K", K, LARGEST_KEYS), ("V", V, LARGEST_VALUES)):
        if not 1 <= size <= largest:
            raise ValueError(f"{name} must be between 1 and {largest}, got {size}")
    shapes = {"none": None, "constant": (H,), "scalar": (B, T, H), "vector": (B, T, H, K)}
    shape = None if g is None else tuple(g.shape)
    dims = {None: "none", 1: "constant", 3: "scalar", 4: "vector"}
    kind = dims.get(None if g is None else g.dim())
    if kind is None or shape != shapes[kind]:
        raise ValueError(f"g has shape {shape}; expected {(H,)}, {(B, T, H)} or {(B, T, H, K)}")
    if heads is not None:
        own = {"q": q.shape[2], "k": k.shape[2], "v": v.shape[2], "g": heads if g is None else decay_heads(g)}
        for name, shared in own.items():
            if shared != heads and (shared == 0 or heads % shared):
                raise ValueError(f"{name} has H={shared}, of H={heads} it must be a divisor")
    return kind


def _check_shape(name: str, x: Tensor, axes: Sequence[str], q: Tensor, v: Tensor, shared: bool) -> None:
    for i, axis in enumerate(axes):
        if shared and axis == "H":
            continue
        of, expected = ("v", v.shape[3]) if axis == "V" else ("q", q.shape["BTHK".index(axis)])
        if x.shape[i] != expected:
            raise ValueError(f"{name} has {axis}={x.shape[i]}, {of} has {axis}={expected}")


def _check_float_on(name: str, x: Tensor, q: Tensor) -> None:
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name} must be floating point, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}, q is on {q.device}")


def state_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32

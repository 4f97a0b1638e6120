"""RetNet's decays, which most calls of retention want and which take more launches than a kernel is worth."""

import torch
from torch import Tensor

from fla_compile.kernels.decay_naive import retnet_gamma

__all__ = ["retnet_decay", "seen_by_others"]

# Nothing here is ever freed: a CUDA graph may read it.
_known: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}


def retnet_decay(heads: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """gamma [H] and its logarithm, to be read alone: every later call gets the same ones, but for those traced."""
    if torch.compiler.is_compiling() or seen_by_others():
        return _make(heads, device, dtype)
    key = heads, device, dtype
    if key in _known:
        return _known[key]
    with torch.inference_mode(False):  # or no gradient could be taken beside them
        made = _make(heads, device, dtype)
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():  # only a replay computes them
                return made
            torch.cuda.current_stream().synchronize()  # other streams read them too
    _known[key] = made
    return made


def _make(heads: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    gamma = retnet_gamma(heads, device=device, dtype=dtype)
    return gamma, gamma.log()


def seen_by_others() -> bool:
    """Whether a mode or a transform of torch.func makes other tensors of what is computed, or records it."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()

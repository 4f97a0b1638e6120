"""The decayed ops that benchmarks call, ours and flash-linear-attention's, and operands for them."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timing import peer
from torch import Tensor

import fla_compile.ops

Shape = tuple[int, int, int, int]  # B, T, H, K = V
FLA = {
    "linear_attention": ("fla.ops.linear_attn", "chunk_linear_attn", {"normalize": False}),
    "retention": ("fla.ops.retention", "chunk_retention", {}),
    "simple_gla": ("fla.ops.simple_gla", "chunk_simple_gla", {}),
    "gla": ("fla.ops.gla", "chunk_gla", {}),
    "rwkv6": ("fla.ops.rwkv6", "chunk_rwkv6", {}),
}


def operands(op: str, shape: Shape, device: str) -> list[Tensor]:
    """q, k, v and, where `op` takes one, its log decay, and its bonus; retention decays as RetNet does, in both
    libraries."""
    B, T, H, D = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, T, H, D, device=device, dtype=dtype) for _ in range(3))
    gates = {"simple_gla": (B, T, H), "gla": (B, T, H, D), "rwkv6": (B, T, H, D)}
    gate = [F.logsigmoid(torch.randn(gates[op], device=device)) / 16] if op in gates else []
    if op == "rwkv6":
        gate.append(torch.randn(H, D, device=device))
    return [x.requires_grad_() for x in (q, F.normalize(k.float(), dim=-1).to(dtype), v, *gate)]


def decayed(who: str, op: str) -> Callable | None:
    """The op of "ours" or of "fla", with the same operands; None if that is not installed."""
    if who == "ours":
        return getattr(fla_compile.ops, op)
    module, name, options = FLA[op]
    theirs = peer(module, name)
    return None if theirs is None else partial(theirs, **options)

"""Check heads that a kernel is to share against those that the program repeats for it, on random data.

An operand must be, bit for bit, every head of the one that takes its place in turn; and the kernel must give for a few
steps of the one what it gives for the other, gradients included.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from fla_compile.kernels.decay_checks import FAMILIES
from fla_compile.passes.log_decay import op_name
from fla_compile.passes.norm_gate_check import FEW, LEAST, small
from fla_compile.passes.parallel_check import LARGE
from fla_compile.passes.parallel_regions import elements
from fla_compile.passes.records import Refused
from fla_compile.passes.repeated_heads import Repeated
from fla_compile.passes.validate import TOLERANCE, concrete, error, gradients

B, T, K, V = 2, 3, 4, 5


def check_operand(operand: fx.Node, repeated: Repeated, all_heads: int) -> None:
    """Large sizes are made small, wherever they stand; raises `Refused("validation_failed")`."""
    source, known = repeated.source, (repeated.heads, all_heads, all_heads // repeated.heads)
    own = [concrete(size) for size in source.meta["example_value"].shape]
    large = dict.fromkeys(size for size in own if size >= LEAST and size not in known)
    few = dict(zip(large, FEW, strict=False))
    for sizes in (few, {}) if few else ({},):
        if not sizes and elements(source) * known[2] > LARGE:
            raise Refused("validation_failed", f"{source.name} is too large to run on random data")
        try:
            same = _same(operand, repeated, known[2], sizes)
        except Exception as why:
            told = f"{operand.name} does not run on random data: {type(why).__name__}: {why}"
            continue
        if same:
            return
        told = f"{operand.name} does not repeat heads of {source.name} for their neighbours"
        break
    raise Refused("validation_failed", told)


def _same(operand: fx.Node, repeated: Repeated, times: int, sizes: Mapping[int, int]) -> bool:
    fake = repeated.source.meta["example_value"]
    shape = [small(size, sizes) for size in fake.shape]
    data = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(8).to(fake.dtype)

    def value(x: Any) -> Any:
        if isinstance(x, fx.Node):
            return value(x.meta["example_value"])
        return small(x, sizes) if isinstance(x, torch.SymInt) or type(x) is int else x

    def run(node: fx.Node, x: Any) -> torch.Tensor:
        args, kwargs = tree_map(value, (node.args[1:], node.kwargs), is_leaf=lambda y: isinstance(y, fx.Node))
        return getattr(x, node.target)(*args, **kwargs) if node.op == "call_method" else node.target(x, *args, **kwargs)  # type: ignore

    chain: list[fx.Node] = []
    node: Any = operand
    while node is not repeated.source:
        chain.append(node)
        node = node.args[0]
    wide, narrow = data, data if repeated.squeezed is None else data.squeeze(repeated.squeezed)
    for node in reversed(chain):
        wide = run(node, wide)
    for node in reversed(repeated.moves):
        narrow = run(node, narrow)
    return torch.equal(wide, narrow.repeat_interleave(times, 2))


def check_call(call: fx.Node, before: Mapping[str, int], after: Mapping[str, int], states: Sequence[int]) -> None:
    """`states` are those before and after; raises `Refused("validation_failed")`."""
    generator = torch.Generator().manual_seed(0)
    axes = {"q": "BTHK", "k": "BTHK", "v": "BTHV", "g": FAMILIES[op_name(call)] or (), "state": "BHKV"}
    narrow: list[torch.Tensor | None] = []
    for name, letters in axes.items():
        size = {"B": B, "T": T, "H": after[name], "K": K, "V": V}
        x = torch.randn([size[letter] for letter in letters], generator=generator, dtype=torch.float64)
        x = -x.abs() if name == "g" else x
        narrow.append(x.requires_grad_() if after[name] else None)
    wide = [
        None if x is None else x.repeat_interleave(before[name] // after[name], letters.index("H"))
        for (name, letters), x in zip(axes.items(), narrow, strict=True)
    ]
    wanted = [x for x in narrow if x is not None]
    with torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        try:
            want = call.target(*wide, 0.5)  # type: ignore[operator]
            o, final = call.target(*narrow, 0.5)  # type: ignore[operator]
            got = o, final.repeat_interleave(states[0] // states[1], 1)
            slopes = gradients(got, wanted), gradients(want, wanted)
            sizes = [error(a, b) for a, b in (*zip(got, want, strict=True), *zip(*slopes, strict=True))]
        except Exception as why:
            detail = f"shared heads do not run on random data: {type(why).__name__}: {why}"
            raise Refused("validation_failed", detail) from why
    if not all(size <= TOLERANCE[torch.float64] for size in sizes):
        raise Refused("validation_failed", f"shared and repeated heads differ by {max(sizes):.2e}")

"""Validate: run the loop and what replaces it on small random data; values and gradients must agree.

A few steps at the real head sizes, in float64 with the program's own roundings left out. A matcher's bug thus costs a
refusal (`validation_failed`), never a wrong number. The user's random state is left alone.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fla_compile.passes.records import Refused

STEPS = 5
# In float64 both sides agree to ~1e-13; the bound leaves room for sums of many terms. Where constants depend on the
# type (the default eps of a norm), only the program's own types compare: a few roundings of their eps over STEPS steps.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
_NARROW = (torch.float32, torch.float16, torch.bfloat16)


def concrete(size: Any) -> int:
    """The hint of a dynamic size; reading it adds no guard."""
    return size if isinstance(size, int) else int(size.node.hint)


def in_float64(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy in which every cast to a narrower floating type is one to float64: what the program means, unrounded."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))

    def widened(value: Any) -> Any:
        return torch.float64 if value in _NARROW else value

    for node in graph.nodes:
        node.args = torch.utils._pytree.tree_map(widened, node.args)
        node.kwargs = torch.utils._pytree.tree_map(widened, node.kwargs)
        if node.op == "call_method" and node.target in ("float", "half", "bfloat16"):
            node.target = "double"
    wide = fx.GraphModule(gm, graph)
    for node in graph.find_nodes(op="call_module"):
        child = wide.get_submodule(node.target)
        if isinstance(child, fx.GraphModule):
            setattr(wide, node.target, in_float64(child))
        else:  # a module around a traced one, such as vmap over it
            holder = copy.copy(child)
            holder._modules = {name: in_float64(inner) for name, inner in child._modules.items()}  # type: ignore
            setattr(wide, node.target, holder)
    return wide


def random_like(fake: Any, lead: tuple[int, ...], generator: torch.Generator, wide: bool, positive: bool) -> Any:
    if not isinstance(fake, torch.Tensor):
        return concrete(fake) if isinstance(fake, torch.SymInt) else fake
    shape = (*lead, *(concrete(s) for s in fake.shape))
    if not fake.dtype.is_floating_point:
        return torch.randint(0, 2, shape, generator=generator).to(fake.dtype).to(fake.device)
    data = torch.randn(shape, generator=generator, dtype=torch.float64)
    if positive:
        data = data.abs() + 0.1
    return data.to(fake.device, torch.float64 if wide else fake.dtype)


def looped(body: fx.GraphModule, carries: int, reads: int, steps: int) -> Callable[..., list[torch.Tensor]]:
    def run(*operands: Any) -> list[torch.Tensor]:
        state, xs = list(operands[:carries]), operands[carries : carries + reads]
        invariants, outputs = operands[carries + reads :], []
        for t in range(steps):
            result = body(*state, *(x[t] for x in xs), *invariants)
            state = list(result[:carries])
            outputs.append(result[carries:])
        return state + [torch.stack(ys) for ys in zip(*outputs, strict=True)]

    return run


def gradients(results: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of a fixed mixture of all results."""
    total = torch.zeros((), dtype=torch.float64)
    for i, result in enumerate(results):
        if result.dtype.is_floating_point:
            weight = torch.cos(torch.arange(result.numel(), dtype=torch.float64, device=result.device) + i)
            total = total.to(result.device) + (result.double().reshape(-1) * weight).sum()
    if not total.requires_grad:
        return []
    grads = torch.autograd.grad(total, wanted, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True)]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape:
        raise ValueError(f"its shape is {list(got.shape)}, not {list(want.shape)}")
    if not got.numel():
        return 0.0
    return float((got - want).norm() / (want.norm() + 1e-6 * want.numel() ** 0.5))


@dataclass(frozen=True)
class Claim:
    """`module(*operands, *logs)` does what `steps` calls of `body` do.

    `fakes` are the body's operands: `carries` states, `reads` slices, invariants. `logs` are operands that the module
    also gets as logarithms, `fixed` operands with known values, `zero_init` says which states start at zero. `pure` is
    the body without writes in place, asked for where autograd cannot differentiate the body because of them.
    """

    body: fx.GraphModule
    module: fx.GraphModule
    fakes: Sequence[Any]
    carries: int
    reads: int
    logs: Sequence[int]
    fixed: Mapping[int, torch.Tensor]
    zero_init: Sequence[bool]
    pure: Callable[[], fx.GraphModule] | None = None
    steps: int = STEPS

    def largest_error(self, wide: bool, positive: bool) -> tuple[str, float] | None:
        """The worst of values and gradients, in float64 or in the program's own types; None if not finite."""
        generator = torch.Generator().manual_seed(0)
        before_in: list[Any] = []
        for i, fake in enumerate(self.fakes):
            lead = (self.steps,) if self.carries <= i < self.carries + self.reads else ()
            value = random_like(fake, lead, generator, wide, positive)
            if i in self.fixed:
                value = self.fixed[i].to(value.dtype)
            elif i < self.carries and self.zero_init[i]:
                value = torch.zeros_like(value)
            elif isinstance(value, torch.Tensor) and value.dtype.is_floating_point and i not in self.logs:
                value.requires_grad_()
            before_in.append(value)
        logs = []
        for i in self.logs:
            if i in self.fixed:
                logs.append(torch.log(before_in[i]))
            else:
                logs.append((-before_in[i].abs()).requires_grad_())
                before_in[i] = logs[-1].exp()
        after_in = list(before_in)
        body, module = (in_float64(self.body), in_float64(self.module)) if wide else (self.body, self.module)
        before = looped(body, self.carries, self.reads, self.steps)(*before_in)
        if not all(torch.isfinite(x).all() for x in before if x.dtype.is_floating_point):
            return None
        after = list(module(*after_in, *logs))
        wanted = [x for x in (*after_in, *logs) if isinstance(x, torch.Tensor) and x.requires_grad and x.is_leaf]
        pairs = [("value", error(a, b)) for a, b in zip(after, before, strict=True)]
        try:
            true_slopes = gradients(before, wanted)
        except RuntimeError as refused:
            if self.pure is None or "modified by an inplace operation" not in str(refused):
                raise
            pure_body = in_float64(self.pure()) if wide else self.pure()
            pure = looped(pure_body, self.carries, self.reads, self.steps)(*before_in)
            pairs += [("value", error(a, b)) for a, b in zip(pure, before, strict=True)]
            true_slopes = gradients(pure, wanted)
        slopes = zip(gradients(after, wanted), true_slopes, strict=True)
        pairs += [("gradient", error(a, b)) for a, b in slopes]
        return max(pairs, key=lambda pair: pair[1] if pair[1] == pair[1] else float("inf"), default=("value", 0.0))


def validate(claim: Claim) -> float:
    """The largest relative error of the replacement; raises `Refused("validation_failed")` beyond tolerance."""
    own = [x.dtype for x in claim.fakes if isinstance(x, torch.Tensor) and x.dtype in TOLERANCE]
    own += [value for node in claim.body.graph.nodes for value in node.args if isinstance(value, torch.dtype)]
    narrowest = max((d for d in own if d in TOLERANCE), key=lambda d: TOLERANCE[d], default=torch.float32)
    told = "the loop gives no finite numbers on random data"
    with torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        for wide in (True, False):
            for positive in (False, True):
                try:
                    found = claim.largest_error(wide, positive)
                except Exception as error:
                    # A replacement that cannot run must not cost the user the program.
                    detail = f"loop and kernel do not run on random data: {type(error).__name__}: {error}"
                    raise Refused("validation_failed", detail) from error
                if found is None:
                    continue
                kind, size = found
                limit = TOLERANCE[torch.float64 if wide else narrowest]
                if size <= limit:
                    return size
                told = f"{kind} of loop and kernel differ by {size:.2e} > {limit:.0e}"
                break
    raise Refused("validation_failed", told)

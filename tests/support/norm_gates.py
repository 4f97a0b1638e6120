"""What the tests of norms with a gate share: a backend of this pass alone, and its verdicts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from programs import assert_same, here

from fla_compile import dynamo
from fla_compile.passes.match_norm_gate import Found, match_norm_gate
from fla_compile.passes.records import Refusal


@dataclass(eq=False)
class NormGates:
    """A backend that runs this pass and hands the rest to another one; `kernel` as in `match_norm_gate`."""

    kernel: bool | None = True  # the operators, on the CPU too
    then: str = "eager"
    found: list[Found] = field(default_factory=list)
    graph: torch.fx.Graph | None = None

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable:
        with dynamo.untraced():
            self.found.append(match_norm_gate(gm, kernel=self.kernel))
        self.graph = gm.graph
        return torch._dynamo.lookup_backend(self.then)(gm, example_inputs)

    @property
    def targets(self) -> list[str]:
        assert self.graph is not None
        return [str(getattr(n.target, "__name__", n.target)) for n in self.graph.nodes if n.op.startswith("call_")]


# What a norm is made of: none of it may be left beside the kernel.
GONE = {
    "rms_norm", "layer_norm", "group_norm", "silu", "sigmoid", "mean", "sum", "var", "rsqrt", "sqrt", "pow", "mul",
    "vector_norm", "norm", "linear",
}  # fmt: skip


def assert_matched(
    fn: Callable,
    args: Sequence[torch.Tensor],
    *families: str,
    then: str = "eager",
    tolerance: float | None = None,
    left: Sequence[str] = (),
    **how: Any,
) -> NormGates:
    """Each norm and gate of `fn` becomes one node of its family; values and gradients stay, its operations are gone."""
    backend = NormGates(then=then)
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True, **how), args, tolerance)
    found = backend.found[-1]
    assert found.refusals == [], found.refusals
    assert tuple(r.family for r in found.rewrites) == families, found.rewrites
    assert all(r.pattern == "norm_gate" and r.source.startswith("test_") for r in found.rewrites)
    assert sum(t in ("norm_gate.default", "norm_gate_linear.default") for t in backend.targets) == len(families)
    assert not (GONE & set(backend.targets)) - set(left), backend.targets
    return backend


def assert_left(fn: Callable, args: Sequence[torch.Tensor], **how: Any) -> None:
    """Nothing of `fn` is touched or remarked on."""
    backend = NormGates()
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True, **how), args)
    assert backend.found[-1].rewrites == [] and backend.found[-1].refusals == []
    assert not any("norm_gate" in target for target in backend.targets)


def refused(fn: Callable, args: Sequence[torch.Tensor], reason: str, detail: str = "", **how: Any) -> Refusal:
    """`fn` is refused at the line marked "# here" and computes what it did."""
    backend = NormGates()
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True, **how), args)
    (refusal,) = backend.found[-1].refusals
    assert backend.found[-1].rewrites == []
    assert (refusal.pattern, refusal.reason) == ("norm_gate", reason), refusal
    assert detail in refusal.detail, refusal
    assert refusal.source == here(fn), refusal
    return refusal

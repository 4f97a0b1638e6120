"""What the tests of the parallel forms share: a backend of this pass alone, and its verdicts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from programs import assert_same, here, operands

from fla_compile import dynamo
from fla_compile.passes.match_parallel import Found, match_parallel

__all__ = ["Parallel", "assert_left", "assert_matched", "operands", "refused"]


@dataclass(eq=False)
class Parallel:
    """A backend that runs this pass and hands the rest to another one."""

    then: str = "eager"
    validated: bool = True
    found: list[Found] = field(default_factory=list)
    graph: torch.fx.Graph | None = None

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable:
        with dynamo.untraced():
            self.found.append(match_parallel(gm, validated=self.validated))
        self.graph = gm.graph
        return torch._dynamo.lookup_backend(self.then)(gm, example_inputs)

    def over_two_times(self, T: int) -> list[str]:
        """Nodes with two axes of T steps, or more elements than a state a step."""
        assert self.graph is not None
        values = ((node.name, node.meta.get("example_value")) for node in self.graph.nodes if node.op != "placeholder")
        return [name for name, x in values if isinstance(x, torch.Tensor) and [int(s) for s in x.shape].count(T) > 1]


def assert_matched(
    fn: Callable,
    args: Sequence[torch.Tensor],
    *families: str,
    pattern: str = "parallel_attention",
    T: int = 7,
    tolerance: float | None = None,
    then: str = "eager",
    **how: Any,
) -> Found:
    """Each read-out of `fn` becomes the operators of its family; values and gradients stay, no T x T tensor does."""
    backend = Parallel(then)
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True, **how), args, tolerance)
    found = backend.found[-1]
    assert found.refusals == []
    assert tuple(r.family for r in found.rewrites) == families
    assert {r.pattern for r in found.rewrites} == {pattern}
    assert all(r.source.startswith("test_") for r in found.rewrites)
    targets = [str(node.target) for node in backend.graph.nodes]
    for family in {name for names in families for name in names.split(" + ")}:
        assert f"fla_compile.{family}.default" in targets
    assert backend.over_two_times(T) == []
    return found


def assert_left(fn: Callable, args: Sequence[torch.Tensor], **how: Any) -> None:
    """Nothing of `fn` is touched or remarked on."""
    backend = Parallel()
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True, **how), args)
    assert backend.found[-1].rewrites == [] and backend.found[-1].refusals == []
    assert not any("fla_compile" in str(node.target) for node in backend.graph.nodes)


def refused(
    fn: Callable,
    args: Sequence[torch.Tensor],
    reason: str,
    detail: str = "",
    pattern: str = "parallel_attention",
    **how: Any,
) -> None:
    """`fn` is refused at the line marked "# here" and computes what it did."""
    backend = Parallel()
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True, **how), args)
    (refusal,) = backend.found[-1].refusals
    assert backend.found[-1].rewrites == []
    assert (refusal.pattern, refusal.reason) == (pattern, reason), refusal
    assert detail in refusal.detail, refusal
    assert refusal.source == here(fn), refusal
    assert not any("fla_compile" in str(node.target) for node in backend.graph.nodes)

"""What the tests of losses over logits that exist share: a backend of this pass alone, and its verdicts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from losses import B, T, V
from programs import assert_same, here

from fla_compile import dynamo
from fla_compile.passes.match_cross_entropy import Found, match_cross_entropy

OPERATOR = "cross_entropy.default"


@dataclass(eq=False)
class CrossEntropies:
    """A backend that runs this pass and hands the rest to another one; `kernel` as in `match_cross_entropy`."""

    kernel: bool | None = True
    then: str = "eager"
    found: list[Found] = field(default_factory=list)
    graph: torch.fx.Graph | None = None

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable:
        with dynamo.untraced():
            self.found.append(match_cross_entropy(gm, kernel=self.kernel))
        self.graph = gm.graph
        return torch._dynamo.lookup_backend(self.then)(gm, example_inputs)

    @property
    def targets(self) -> list[str]:
        assert self.graph is not None
        return [str(getattr(n.target, "__name__", n.target)) for n in self.graph.nodes if n.op.startswith("call_")]


def assert_taken(fn: Callable, args: Sequence[Any], kernel: bool | None = True, **how: Any) -> CrossEntropies:
    """The loss of `fn` runs as the operator, or as torch's: same values and gradients, nothing else of it left."""
    backend = CrossEntropies(kernel)
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True, **how), args)
    found = backend.found[-1]
    assert found.refusals == [], found.refusals
    (rewrite,) = found.rewrites
    assert (rewrite.pattern, rewrite.kernel) == (
        "cross_entropy", "rows (torch)" if kernel else "torch's loss (Inductor)",
    )  # fmt: skip
    assert rewrite.source.startswith("test_")
    assert backend.targets.count(OPERATOR if kernel else "cross_entropy") == 1
    gone = {"log_softmax", "softmax", "gather", "nll_loss", "amax", "cross_entropy" if kernel else OPERATOR}
    assert not gone & set(backend.targets), backend.targets
    return backend


def assert_as_written(fn: Callable, args: Sequence[Any], kernel: bool | None = None) -> None:
    """The loss of `fn` is recognised and left as it is."""
    backend = CrossEntropies(kernel)
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), args)
    assert [r.kernel for r in backend.found[-1].rewrites] == ["as written (Inductor)"]
    assert backend.found[-1].refusals == [] and OPERATOR not in backend.targets


def assert_left(fn: Callable, args: Sequence[Any], kernel: bool | None = True, **how: Any) -> None:
    """Nothing of `fn` is touched or remarked on."""
    backend = CrossEntropies(kernel)
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True, **how), args)
    assert all(not found.rewrites and not found.refusals for found in backend.found)
    assert OPERATOR not in backend.targets


def assert_refused(fn: Callable, args: Sequence[Any], reason: str, detail: str = "", **how: Any) -> None:
    """`fn` is refused at the line marked "# here" and computes what it did."""
    backend = CrossEntropies()
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True, **how), args)
    (refusal,) = backend.found[-1].refusals
    assert backend.found[-1].rewrites == [] and OPERATOR not in backend.targets
    assert (refusal.pattern, refusal.reason) == ("cross_entropy", reason), refusal
    assert detail in refusal.detail and refusal.source == here(fn), refusal


def logits(dtype=torch.float32):
    return torch.randn(B, T, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)

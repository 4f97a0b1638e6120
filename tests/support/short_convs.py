"""What the tests of short convolutions share: a backend of this pass alone, operands, and the verdict of being left."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from programs import assert_same, here

from fla_compile import dynamo
from fla_compile.passes import match_short_conv
from fla_compile.passes.match_short_conv import Found

B, T, D, W = 2, 9, 6, 4


@dataclass(eq=False)
class ShortConv:
    """A backend that runs this pass and hands the rest to another one."""

    then: str = "eager"
    found: list[Found] = field(default_factory=list)
    graph: torch.fx.Graph | None = None

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable:
        with dynamo.untraced():
            self.found.append(match_short_conv.match_short_conv(gm))
        self.graph = gm.graph
        return torch._dynamo.lookup_backend(self.then)(gm, example_inputs)

    def count(self, *names: str) -> int:
        return sum(any(name in str(node.target) for name in names) for node in self.graph.nodes)


def operands(x="btd"):
    torch.manual_seed(0)
    sizes = {"b": B, "t": T, "d": D}
    made = [torch.randn([sizes[a] for a in x]), torch.randn(D, W), torch.randn(D), torch.randn(B, W - 1, D)]
    return [y.requires_grad_() for y in made]


def left(fn, args, reason=None, detail="", *, pattern="short_conv"):
    backend = ShortConv()
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), args)
    found = backend.found[-1]
    assert found.rewrites == [] and backend.count("short_conv") == 0
    if reason is None:
        assert found.refusals == []
        return
    (refusal,) = found.refusals
    assert (refusal.pattern, refusal.reason) == (pattern, reason) and detail in refusal.detail, refusal
    assert refusal.source == here(fn)

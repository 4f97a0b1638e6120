"""What the tests of the passes share: data, a backend that stops after our passes, and the two kinds of verdict."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fla_compile import dynamo
from fla_compile.backend import report_on
from fla_compile.options import Options
from fla_compile.report import Report

B, T, H, K, V = 2, 7, 2, 4, 6
# float32 on both sides; what differs is the order of sums of a few hundred numbers of size 1.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 5e-2}


@dataclass(eq=False)
class Passes:
    """A backend that runs our passes as "fla" does and hands the rest to another one; keeps every report."""

    options: Options = field(default_factory=Options)
    then: str = "eager"
    reports: list[Report] = field(default_factory=list)
    graphs: int = 0
    is_fla_backend: bool = True

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable:
        report, unlift = report_on(gm, example_inputs, self.options)
        self.reports.append(report)
        if unlift:
            raise dynamo.leave_loops(unlift)
        self.graphs += 1
        return torch._dynamo.lookup_backend(self.then)(gm, example_inputs)

    @property
    def report(self) -> Report:
        return self.reports[-1]


def operands(*axes: str, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int) -> list[torch.Tensor]:
    """Random tensors, one for each string of axis letters: "bthk bthv"."""
    size = {"b": B, "t": T, "h": H, "k": K, "v": V, **sizes}
    generator = torch.Generator().manual_seed(seed)
    shapes = [[size[letter] for letter in letters] for letters in " ".join(axes).split()]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def tensors(result: Any) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]


def outcome(fn: Callable, args: Sequence[Any]) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Values of a call, and the gradients of a fixed mixture of them for each floating argument."""
    leaves = [
        x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in args
    ]
    torch.manual_seed(0)
    values = tensors(fn(*leaves))
    wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
    total: Any = 0
    for i, value in enumerate(values):
        weight = torch.cos(torch.arange(value.numel(), dtype=torch.float64) + i).view(value.shape)
        total = total + (value.double() * weight).sum()
    return values, list(torch.autograd.grad(total, wanted, allow_unused=True))


def assert_same(fn: Callable, compiled: Callable, args: Sequence[Any], tolerance: float | None = None) -> None:
    """`compiled` gives the values and gradients of `fn`."""
    (values, slopes), (true_values, true_slopes) = outcome(compiled, args), outcome(fn, args)
    pairs: list[tuple[str, Sequence, Sequence]] = [("value", values, true_values), ("gradient", slopes, true_slopes)]
    for name, got, want in pairs:
        assert len(got) == len(want)
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            if a is None or b is None:
                assert a is None or not a.any(), f"{name} {i}"
                assert b is None or not b.any(), f"{name} {i}"
                continue
            limit = TOLERANCE[b.dtype] if tolerance is None else tolerance
            assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{name} {i}"
            worst = (a.double() - b.double()).abs().max().item()
            assert worst <= limit * max(1.0, b.abs().max().item()), f"{name} {i} differs by {worst:.1e}"


def assert_rewritten(
    fn: Callable,
    args: Sequence[Any],
    *families: str,
    then: str = "eager",
    tolerance: float | None = None,
    reference: Callable | None = None,
) -> Report:
    """Each loop of `fn` becomes the kernel of its family ("a + b" for two states), and nothing else changes.

    `reference` is `fn` itself unless eager autograd cannot differentiate it.
    """
    backend = Passes(then=then)
    assert_same(reference or fn, torch.compile(fn, backend=backend, fullgraph=True), args, tolerance)
    report = backend.report
    assert report.refusals == ()
    assert tuple(r.family for r in report.rewrites) == families
    after = report.graph("after")
    for family in {name for names in families for name in names.split(" + ")}:
        assert f"torch.ops.fla_compile.{family}" in after
    assert "higher_order.scan" in report.graph("before") and "higher_order.scan" not in after
    return report


def assert_refused(
    fn: Callable, args: Sequence[Any], reason: str, detail: str = "", tolerance: float | None = None
) -> Report:
    """The loop of `fn` is refused at the line marked "# here", and then computes what it did."""
    backend = Passes()
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), args, tolerance)
    report = backend.report
    assert report.rewrites == ()
    (refusal,) = report.refusals
    assert (refusal.pattern, refusal.reason) == ("recurrence", reason), refusal
    assert detail in refusal.detail, refusal
    assert refusal.source == here(fn), refusal
    assert "torch.ops.fla_compile" not in report.graph("after")
    return report


def here(fn: Callable) -> str:
    """ "file.py:12" of the line marked "# here" in the source of `fn`."""
    lines, first = inspect.getsourcelines(fn)
    (marked,) = [first + i for i, line in enumerate(lines) if line.rstrip().endswith("# here")]
    return f"{Path(inspect.getsourcefile(fn) or '').name}:{marked}"

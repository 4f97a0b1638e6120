"""What the tests of the passes share: data, a backend that stops after our passes, and the three kinds of verdict."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from fla_compile import dynamo
from fla_compile.backend import report_on
from fla_compile.options import Options
from fla_compile.passes.recurrence import EQUATIONS
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


class Cases(list):
    """Programs of one test: `@cases("gla", "bthk bthv")` adds one, to be called with operands of these axes.

    `@cases.cell` adds a step of time, see `over_time`.
    """

    def __call__(self, families: str, axes: str, **sizes: int) -> Callable[[Callable], Callable]:
        def add(fn: Callable) -> Callable:
            self.append(pytest.param(fn, families, axes, sizes, id=fn.__name__))
            return fn

        return add

    def cell(self, families: str, axes: str, **sizes: int) -> Callable[[Callable], Callable]:
        def add(fn: Callable) -> Callable:
            self.append(pytest.param(over_time(fn, axes), families, axes, sizes, id=fn.__name__))
            return fn

        return add


def bare(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """An empty state [B,H,K,V] for q [B,T,H,K] and v [B,T,H,V]."""
    return q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])


def read(q: torch.Tensor, S: torch.Tensor) -> torch.Tensor:
    """q^T S for q [B,H,K] and S [B,H,K,V]."""
    return torch.einsum("bhk,bhkv->bhv", q, S)


def write(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """k v^T [B,H,K,V]."""
    return k[..., None] * v[..., None, :]


def compiled_as(
    fn: Callable, args: Sequence[Any], then: str, tolerance: float | None, reference: Callable | None
) -> tuple[Report, str]:
    """The report on `fn` and the graph after the passes, once values and gradients are those of eager."""
    backend = Passes(then=then)
    assert_same(reference or fn, torch.compile(fn, backend=backend, fullgraph=True), args, tolerance)
    report = backend.report
    after = report.graph("after")
    assert "higher_order.scan" in report.graph("before"), report.refusals
    assert "higher_order.scan" not in after, report.refusals
    return report, after


def assert_families(report: Report, after: str, families: Sequence[str]) -> None:
    """The loops are of these families, and the operator of each is in the graph; convolutions may be beside them."""
    loops = [r for r in report.rewrites if r.pattern != "short_conv"]
    assert tuple(r.family for r in loops) == tuple(families), report.refusals
    for rewrite in loops:
        names = rewrite.family.split(" + ")
        assert rewrite.pattern == "recurrence"
        if rewrite.kernel.startswith("step"):  # of a loop of one step: no operator
            continue
        assert rewrite.equation == "; ".join(EQUATIONS[name] for name in names if name in EQUATIONS)
        for name in names:
            if name in EQUATIONS:
                assert f"torch.ops.fla_compile.{'loop' if name == 'generic' else name}" in after


def assert_rewritten(
    fn: Callable,
    args: Sequence[Any],
    *families: str,
    then: str = "eager",
    tolerance: float | None = None,
    reference: Callable | None = None,
) -> Report:
    """Each loop of `fn` becomes the kernels of its families ("a + b" for two states), and nothing else changes.

    `reference` is `fn` itself unless eager autograd cannot differentiate it.
    """
    report, after = compiled_as(fn, args, then, tolerance, reference)
    assert report.refusals == ()
    assert_families(report, after, families)
    assert "torch.ops.fla_compile.loop" not in after
    return report


def assert_looped(
    fn: Callable,
    args: Sequence[Any],
    reason: str,
    detail: str = "",
    *,
    families: str = "generic",
    then: str = "eager",
    tolerance: float | None = None,
    reference: Callable | None = None,
) -> Report:
    """The loop of `fn` runs as a loop, with known stages beside it; one refusal says why, at the line "# here"."""
    report, after = compiled_as(fn, args, then, tolerance, reference)
    assert_families(report, after, [families])
    assert families.split(" + ").count("generic") == 1
    assert_told(fn, report, reason, detail)
    return report


def assert_refused(
    fn: Callable, args: Sequence[Any], reason: str, detail: str = "", tolerance: float | None = None
) -> Report:
    """The loop of `fn` is refused at the line marked "# here", and then traced as plain `torch.compile` would."""
    backend = Passes()
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), args, tolerance)
    report = backend.report
    assert report.rewrites == ()
    assert_told(fn, report, reason, detail)
    assert "torch.ops.fla_compile" not in report.graph("after")
    return report


def assert_told(fn: Callable, report: Report, reason: str, detail: str) -> None:
    (refusal,) = report.refusals
    assert (refusal.pattern, refusal.reason) == ("recurrence", reason), refusal
    assert detail in refusal.detail, refusal
    assert refusal.source == here(fn), refusal


def over_time(cell: Callable, axes: str) -> Callable:
    """The program that calls `y, state = cell(state, *reads, *invariants)` at each step, and returns both.

    axes: those of the first state, then of what has time (two to six tensors), then of what has not.
    """
    timed = sum("t" in letters for letters in axes.split()[1:])

    def of_two(S, a, b, *fixed):
        outs = []
        for t in range(a.shape[1]):
            y, S = cell(S, a[:, t], b[:, t], *fixed)
            outs.append(y)
        return torch.stack(outs, 1), S

    def of_three(S, a, b, c, *fixed):
        outs = []
        for t in range(a.shape[1]):
            y, S = cell(S, a[:, t], b[:, t], c[:, t], *fixed)
            outs.append(y)
        return torch.stack(outs, 1), S

    def of_four(S, a, b, c, d, *fixed):
        outs = []
        for t in range(a.shape[1]):
            y, S = cell(S, a[:, t], b[:, t], c[:, t], d[:, t], *fixed)
            outs.append(y)
        return torch.stack(outs, 1), S

    def of_five(S, a, b, c, d, e, *fixed):
        outs = []
        for t in range(a.shape[1]):
            y, S = cell(S, a[:, t], b[:, t], c[:, t], d[:, t], e[:, t], *fixed)
            outs.append(y)
        return torch.stack(outs, 1), S

    def of_six(S, a, b, c, d, e, f, *fixed):
        outs = []
        for t in range(a.shape[1]):
            y, S = cell(S, a[:, t], b[:, t], c[:, t], d[:, t], e[:, t], f[:, t], *fixed)
            outs.append(y)
        return torch.stack(outs, 1), S

    program: Any = {2: of_two, 3: of_three, 4: of_four, 5: of_five, 6: of_six}[timed]
    program.cell = cell
    return program


def dynamic_in_time(compiled: Callable, axes: str) -> Callable:
    """`compiled` with the axis "t" of its operands marked as dynamic, where it is longer than 1."""

    def call(*args):
        for x, letters in zip(args, axes.split(), strict=True):
            if "t" in letters and x.shape[letters.index("t")] > 1:
                torch._dynamo.mark_dynamic(x, letters.index("t"))
        return compiled(*args)

    return call


def here(fn: Callable) -> str:
    """ "file.py:12" of the line marked "# here" in the source of `fn`, or of its cell."""
    fn = getattr(fn, "cell", fn)
    lines, first = inspect.getsourcelines(fn)
    (marked,) = [first + i for i, line in enumerate(lines) if line.rstrip().endswith("# here")]
    return f"{Path(inspect.getsourcefile(fn) or '').name}:{marked}"

"""Run a generated program compiled and in eager, compare all values and gradients, and say what was recognised."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from generator import Program, load, operands_of
from programs import TOLERANCE, Passes, tensors

from fla_compile.kernels import loop_compile
from fla_compile.options import Options
from fla_compile.report import Report

TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}


class Wrong(AssertionError):
    """The compiled program differs from eager."""


class Unplaced(Wrong):
    """A refusal names no line."""


class NoTruth(Exception):
    """Eager autograd cannot differentiate the program."""


@dataclass(frozen=True)
class Verdict:
    """What became of a program: its families, and why it counts as missed ("" if it is recognised)."""

    families: tuple[str, ...]
    missed: str
    reports: tuple[Report, ...]


@contextmanager
def plain_steps() -> Iterator[None]:
    """The step of a loop runs as the graph that Inductor would compile: the C++ compiler takes seconds for each."""
    with mock.patch.object(loop_compile, "by_inductor", lambda gm, _: lambda arguments: gm(*arguments)):
        yield


def check(program: Program) -> Verdict:
    """Raises `Wrong`."""
    fn, operands = with_parameters(load(program.source)), operands_of(program)
    values, slopes, plain = truth_of(program, fn, operands)
    backend = Passes(Options(validate=program.validate))
    compiled: Any = torch.compile(fn, backend=backend, fullgraph=program.fullgraph, dynamic=False)
    try:
        got, got_slopes = outcome(compiled, operands, slopes is not None)
    except NoTruth as error:
        if plain:
            raise Wrong(f"no gradient: {error}") from error
        (got, got_slopes), slopes = outcome(compiled, operands, False), None  # left as it was, it fails as in eager
    tolerance = tolerance_of(program)
    try:
        compare("value", got, values, tolerance)
        if slopes is not None:
            compare("gradient", got_slopes, slopes, tolerance)
    except Wrong:
        if program.spec.dtype != "float32" or program.edit is not None:
            raise
        assert_no_worse(program, fn, operands, (got, values), (got_slopes, slopes))
    for report in backend.reports:
        for refusal in report.refusals:
            if not re.fullmatch(r"[\w.]+\.py:[1-9]\d*", refusal.source):
                raise Unplaced(f"a refusal without a line: {refusal}")
    found = verdict(program, backend.reports)
    if (program.edit or "").startswith("random") and found.families:
        raise Wrong(f"random numbers in a loop that was rewritten as {found.families}")
    return found


def verdict(program: Program, reports: Sequence[Report]) -> Verdict:
    rewrites = [r for report in reports[-1:] for r in report.rewrites]
    refusals = [r for report in reports[-1:] for r in report.refusals]
    families = tuple(name for r in rewrites for name in r.family.split(" + "))
    missed = ""
    if refusals:
        missed = f"{refusals[0].reason}: {refusals[0].detail}"
    elif not rewrites:
        missed = "nothing rewritten"
    elif not set(families) <= program.families:
        missed = f"recognised as {' + '.join(families)}"
    return Verdict(families, missed, tuple(reports))


def with_parameters(fn: Any) -> Any:
    if isinstance(fn, torch.nn.Module):
        generator = torch.Generator().manual_seed(1)
        for p in fn.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return fn


def tolerance_of(program: Program) -> float:
    """That of the narrowest type which the program rounds to: kernels keep the state wider."""
    names = [program.spec.dtype, *re.findall(r"\.to\(torch\.(\w+)\)", program.source)]
    return max(TOLERANCE.get(TYPES.get(name, torch.bfloat16), 0.0) for name in names)


def truth_of(program: Program, fn: Any, operands: list[torch.Tensor]) -> tuple[list, list | None, bool]:
    """Values and gradients in eager, and whether eager can differentiate the program itself.

    Where eager cannot differentiate writes in place: the gradients of the program without them, None where the writes
    change what it computes.
    """
    try:
        return *outcome(fn, operands, True), True
    except NoTruth:
        values, _ = outcome(fn, operands, False)
    try:
        others, slopes = outcome(with_parameters(load(program.pure)), operands, True)
    except NoTruth:
        return values, None, False
    same = [torch.allclose(a, b, 1e-4, 1e-4, equal_nan=True) for a, b in zip(values, others, strict=True)]
    return values, slopes if all(same) else None, False


def assert_no_worse(program: Program, fn: Any, operands: list, *pairs: tuple[list, list | None]) -> None:
    """In float32, where steps amplify rounding: what was computed may be 4 times as far from float64 as eager is."""
    wide: Any = load(program.pure.replace("float32", "float64"))
    if isinstance(wide, torch.nn.Module):
        wide.load_state_dict(fn.state_dict())
    truths = outcome(wide, [x.double() for x in operands], True)
    for kind, truth, (got, eager) in zip(("value", "gradient"), truths, pairs, strict=True):
        for i, (t, a, b) in enumerate(zip(truth, got, eager or [], strict=eager is not None)):
            if t is not None and a is not None and b is not None:
                ours, theirs = ((x.detach().double() - t.detach()).abs().max().item() for x in (a, b))
                if not ours <= 4 * theirs + TOLERANCE[torch.float32]:
                    raise Wrong(f"{kind} {i} is {ours:.1e} from float64, eager {theirs:.1e}")


def outcome(fn: Callable, operands: list[torch.Tensor], gradients: bool) -> tuple[list, list]:
    """Values, and the gradients of a fixed mixture of them for all operands and parameters."""
    leaves = [x.detach().clone().requires_grad_(gradients) for x in operands]
    torch.manual_seed(0)
    with torch.set_grad_enabled(gradients):
        values = tensors(fn(*leaves))
    if not gradients:
        return values, []
    wanted = leaves + (list(fn.parameters()) if isinstance(fn, torch.nn.Module) else [])
    total: Any = 0
    for i, value in enumerate(values):
        weight = torch.cos(torch.arange(value.numel(), dtype=torch.float64) + i).view(value.shape)
        total = total + (value.double() * weight).sum()
    try:
        return values, list(torch.autograd.grad(total, wanted, allow_unused=True))
    except RuntimeError as error:
        if "inplace operation" not in str(error) and "does not require grad" not in str(error):
            raise
        raise NoTruth(str(error)) from error


def compare(kind: str, got: list, want: list, tolerance: float) -> None:
    """Raises `Wrong` unless all are equal within `tolerance` of the largest element."""
    if len(got) != len(want):
        raise Wrong(f"{len(got)} results, not {len(want)}")
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if a is None or b is None:
            one = b if a is None else a
            if one is not None and one.any():
                raise Wrong(f"{kind} {i} is {'missing' if a is None else 'not zero'}")
            continue
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            raise Wrong(f"{kind} {i} is {a.dtype}{list(a.shape)}, not {b.dtype}{list(b.shape)}")
        if not torch.equal(a.isfinite(), b.isfinite()):
            raise Wrong(f"{kind} {i} is finite elsewhere than in eager")
        if a.numel():
            worst = (a.detach().double() - b.detach().double()).nan_to_num().abs().max().item()
            size = b.detach().double().nan_to_num(posinf=0.0, neginf=0.0).abs().max().item()
            if worst > tolerance * max(1.0, size):
                raise Wrong(f"{kind} {i} differs by {worst:.1e}, its largest element is {size:.1e}")

"""What the tests of the loss passes share: operands, and the three verdicts."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from programs import Passes, assert_same, here
from torch import Tensor

from fla_compile.options import Options
from fla_compile.report import Report

B, T, D, V = 2, 5, 8, 20
OP = "fla_compile.linear_cross_entropy.default"


def layer(*, bias: bool = False, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x [B, T, D] and weight [V, D], with a bias [V] or without."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, D), (V, D), *([(V,)] if bias else [])]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def targets(*, ignored: int | None = None) -> Tensor:
    """Classes [B, T], some of them `ignored`."""
    found = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
    if ignored is not None:
        found[0, 2] = found[1, 0] = ignored
    return found


def mask() -> Tensor:
    return torch.rand(B, T, generator=torch.Generator().manual_seed(2)) > 0.3


def code(report: Report) -> str:
    """The program after the passes, without the lines of the user's that print_readable quotes."""
    lines = report.graph("after").splitlines()
    return "\n".join(line for line in lines if not line.strip().startswith("#"))


def assert_fused(
    fn: Callable, args: Sequence[Any], *, then: str = "eager", tolerance: float | None = None, **how: Any
) -> Report:
    """`fn` runs as one linear cross entropy: same values and gradients, no logits, nothing refused."""
    backend = Passes(then=then)
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True, **how), args, tolerance)
    report = backend.report
    assert report.refusals == ()
    (rewrite,) = report.rewrites
    assert (rewrite.pattern, rewrite.family) == ("linear_cross_entropy", "linear_cross_entropy")
    assert rewrite.source.startswith("test_") and rewrite.nodes_before > 0
    after = code(report)
    assert after.count("torch.ops.fla_compile.linear_cross_entropy.default(") == 1
    gone = "softmax", "logsumexp", "_nn.linear", "matmul", "einsum", "functional.cross"
    assert not any(name in after for name in gone)
    return report


def assert_refused(
    fn: Callable, args: Sequence[Any], reason: str, detail: str = "", *, beside: tuple[str, ...] = (), **how: Any
) -> None:
    """`fn` is refused at the line marked "# here" and computes what it did; `beside` are kernels of other patterns."""
    backend = Passes()
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True, **how), args)
    (refusal,) = backend.report.refusals
    assert tuple((r.pattern, r.kernel) for r in backend.report.rewrites) == tuple(("cross_entropy", k) for k in beside)
    assert (refusal.pattern, refusal.reason) == ("linear_cross_entropy", reason), refusal
    assert detail in refusal.detail and refusal.source == here(fn), refusal
    assert "fla_compile" not in backend.report.graph("after")


def assert_left(fn: Callable, args: Sequence[Any], *, options: Options | None = None) -> None:
    """Nothing of `fn` is touched or remarked on."""
    backend = Passes(options or Options())
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), args)
    assert backend.report.rewrites == () and backend.report.refusals == ()
    assert "fla_compile" not in backend.report.graph("after")

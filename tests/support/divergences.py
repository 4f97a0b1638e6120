"""What the tests of the distillation pass share: operands, and the verdicts."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from losses import code
from programs import Passes, assert_same, here
from torch import Tensor

from fla_compile.report import Report

B, T, D, E, V = 2, 5, 8, 6, 20


def layers(*, bias: bool = False, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x [B, T, D], weight [V, D], teacher's x [B, T, E], weight [V, E]; and both biases [V]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, D), (V, D), (B, T, E), (V, E), *([(V,), (V,)] if bias else [])]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def assert_divided(
    fn: Callable, args: Sequence[Any], kind: str, *, then: str = "eager", tolerance: float | None = None
) -> Report:
    """`fn` runs as one distillation loss: same values and gradients, no logits, nothing refused."""
    backend = Passes(then=then)
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), args, tolerance)
    report = backend.report
    assert report.refusals == (), report.refusals
    (rewrite,) = report.rewrites
    assert (rewrite.pattern, rewrite.family) == ("linear_kl_div", "linear_kl_div")
    assert rewrite.source.startswith("test_") and rewrite.nodes_before > 0
    after = code(report)
    assert after.count("torch.ops.fla_compile.linear_kl_div.default(") == 1 and f"'{kind}'" in after
    gone = "softmax", "logsumexp", "_nn.linear", "matmul", "einsum", "kl_div(", "functional.cross"
    assert not any(name in after for name in gone), after
    return report


def assert_labelled(fn: Callable, args: Sequence[Any], op: str, kind: str = "forward_kl", **how: Any) -> Report:
    """`fn` runs as one divergence and one cross entropy of the same logits by `op`; nothing is refused."""
    backend = Passes()
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True, **how), args)
    report = backend.report
    assert report.refusals == (), report.refusals
    (rewrite,) = report.rewrites
    assert rewrite.pattern == "linear_kl_div" and rewrite.equation.endswith("l = logsumexp(W x) - (W x)_t")
    assert rewrite.source.startswith("test_") and rewrite.nodes_before > 0
    after = code(report)
    assert after.count(f"torch.ops.fla_compile.{op}.default(") == after.count("torch.ops.fla_compile") == 1
    gone = "softmax", "logsumexp", "_nn.linear", "matmul", "einsum", "kl_div(", "nll_loss", "functional.cross"
    assert f"'{kind}'" in after and not any(name in after for name in gone), after
    return report


def assert_refused(fn: Callable, args: Sequence[Any], reason: str, detail: str = "") -> None:
    """`fn` is refused at the line marked "# here" and computes what it did."""
    backend = Passes()
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), args)
    (refusal,) = backend.report.refusals
    assert backend.report.rewrites == ()
    assert (refusal.pattern, refusal.reason) == ("linear_kl_div", reason), refusal
    assert detail in refusal.detail and refusal.source == here(fn), refusal
    assert "fla_compile" not in backend.report.graph("after")

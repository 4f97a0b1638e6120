"""Loops with a rolling buffer: once the loop is gone, what it computed of the buffer is one convolution."""

import pytest
import torch
import torch.nn.functional as F
from programs import Passes, assert_same

from fla_compile import explain
from fla_compile.options import Options
from fla_compile.passes import match_short_conv

B, T, D, W = 2, 9, 6, 4


def operands():
    torch.manual_seed(0)
    return [torch.randn(B, T, D), torch.randn(D, W), torch.randn(D), torch.randn(B, W - 1, D)]


def buffer_of_all_taps(x, w, b, s):
    """The last W inputs [B, D, W], as Mamba keeps them."""
    buffer, o = F.pad(s.mT, (1, 0)), torch.zeros_like(x)
    for t in range(x.shape[1]):
        buffer = torch.roll(buffer, -1, -1)
        buffer[:, :, -1] = x[:, t]
        o[:, t] = F.silu((buffer * w).sum(-1) + b)
    return o, buffer


def buffer_of_the_past(x, w, b, s):
    """The W - 1 inputs before, joined with each new one."""
    o = []
    for t in range(x.shape[1]):
        window = torch.cat([s, x[:, t : t + 1]], 1)
        o.append(torch.einsum("bwd,dw->bd", window, w))
        s = window[:, 1:]
    return torch.stack(o, 1) + x


def newest_first(x, w, b, s):
    buffer, o = x.new_zeros(B, W, D), []
    for x_t in x.unbind(1):
        buffer = torch.cat([x_t[:, None], buffer[:, :-1]], 1)
        o.append((buffer * w.T).sum(1) + b)
    return torch.stack(o)


def with_a_recurrence(x, w, b, s):
    """The convolution feeds a state; both are recognised."""
    buffer, h, o = x.new_zeros(B, D, W), x.new_zeros(B, D), []
    for t in range(x.shape[1]):
        buffer = torch.cat([buffer[:, :, 1:], x[:, t, :, None]], -1)
        h = 0.9 * h + F.silu((buffer * w).sum(-1))
        o.append(h)
    return torch.stack(o, 1)


LOOPS = {
    buffer_of_all_taps: ["elementwise"],
    buffer_of_the_past: ["elementwise"],
    newest_first: ["elementwise"],
    with_a_recurrence: ["linear_scan"],
}


@pytest.mark.parametrize("kernel", ["op", "taps"])
@pytest.mark.parametrize("fn", LOOPS, ids=lambda f: f.__name__)
def test_rolling_buffers(fn, kernel, monkeypatch):
    monkeypatch.setattr(match_short_conv, "choose_kernel", lambda x, trains: kernel)
    backend = Passes()
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), operands())
    report = backend.report
    assert [r.family for r in report.rewrites] == [*LOOPS[fn], "short_conv"] and not report.refusals
    assert report.graph("after").count("fla_compile.short_conv") == (kernel == "op")


def taps_one_by_one(x, w, b, s):
    """A loop over taps, not over time: it is not lifted, and nothing is said of it."""
    padded, y = torch.cat([s, x], 1), b
    for j in range(W):
        y = y + padded[:, j : j + T] * w[:, j]
    return F.silu(y)


def test_a_loop_over_taps():
    backend = Passes(Options(strict=True))
    assert_same(taps_one_by_one, torch.compile(taps_one_by_one, backend=backend, fullgraph=True), operands())
    assert [r.pattern for r in backend.report.rewrites] == ["short_conv"] and not backend.report.refusals


def test_disabled():
    backend = Passes(Options(disable=("short_conv",)))
    assert_same(buffer_of_all_taps, torch.compile(buffer_of_all_taps, backend=backend, fullgraph=True), operands())
    assert [r.pattern for r in backend.report.rewrites] == ["recurrence"]
    assert "unfold" in backend.report.graph("after")


def test_explained():
    report = explain(buffer_of_the_past, *operands())
    (rewrite,) = [r for r in report.rewrites if r.pattern == "short_conv"]
    assert rewrite.kernel == "conv (taps, Inductor)" and rewrite.source.startswith("test_inline_parts.py:")
    assert "short_conv" in str(report)

"""Norms with a gate in compiled programs on a CUDA device: recognised, run by the Triton kernel, right, and smaller."""

import pytest
import torch
import torch.nn.functional as F
from programs import Passes

pytestmark = pytest.mark.gpu
D = 128


def gated(x, g, w, p):
    x, g = (y.unflatten(-1, (-1, D)) for y in (x, g))
    return F.linear((F.rms_norm(x, (D,), w, 1e-5) * F.silu(g)).flatten(2), p)


def grouped(x, g, w, p):
    """A group norm over heads with weights of its own for each, in float32, and a sigmoid."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, weight = x.to(wide).flatten(0, 1), w.to(wide).repeat(x.shape[-1] // D)
    n = F.group_norm(rows, x.shape[-1] // D, weight, None).view_as(x)
    return F.linear((n * torch.sigmoid(g.to(wide))).to(x.dtype), p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fn", [gated, grouped], ids=lambda f: f.__name__)
def test_compiled(fn, dtype):
    torch.manual_seed(0)
    x, g = (torch.randn(2, 100, 4 * D, device="cuda", dtype=dtype) for _ in range(2))
    w, p = torch.randn(D, device="cuda", dtype=dtype), torch.randn(64, 4 * D, device="cuda", dtype=dtype) / 20
    backend = Passes(then="inductor")
    compiled = torch.compile(fn, backend=backend, fullgraph=True)
    dout = torch.randn(2, 100, 64, device="cuda", dtype=dtype)

    def outcome(fn, *args):
        leaves = [y.detach().requires_grad_() for y in args]
        out = fn(*leaves)
        return out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))

    got, eager = outcome(compiled, x, g, w, p), outcome(fn, x, g, w, p)
    truth = outcome(fn, *(y.double() for y in (x, g, w, p)))
    (rewrite,) = backend.report.rewrites
    assert rewrite.kernel == "row kernel (Triton)" and rewrite.family.endswith(" + linear")
    for mine, theirs, exact in zip(got, eager, truth, strict=True):
        error, allowed = ((y.double() - exact).norm() / exact.norm() for y in (mine, theirs))
        assert error <= 1.5 * allowed + 1e-6, f"{error:.1e} > 1.5 * {allowed:.1e}"


def test_memory():
    """Between forward and backward a training step holds x, the gate and the result, and nothing between them."""
    x, g = (torch.randn(8, 2048, 16 * D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    w, p = (torch.ones(size, device="cuda", dtype=x.dtype, requires_grad=True) for size in ((D,), (64, 16 * D)))
    compiled = torch.compile(lambda: gated(x, g, w, p), backend="fla", fullgraph=True)
    compiled().sum().backward()
    before = torch.cuda.memory_allocated()
    out = compiled()
    held = torch.cuda.memory_allocated() - before - out.numel() * out.element_size()
    assert held < 0.1 * x.numel() * x.element_size(), f"{held / 2**20:.0f} MiB held"

"""The whole road on a CUDA device: a naive loop, recognised, run by the Triton kernels, against float64."""

import pytest
import torch
import torch.nn.functional as F

from fla_compile import explain
from fla_compile.kernels import decay_naive

pytestmark = pytest.mark.gpu


def loop(q, k, v, g):
    S = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    o = torch.zeros_like(v)
    for t in range(q.shape[1]):
        a = g[:, t].exp()
        S = S * (a[..., None] if a.dim() == 3 else a[..., None, None]) + k[:, t, :, :, None] * v[:, t, :, None]
        o[:, t] = (q[:, t, :, :, None] * S).sum(-2).to(v.dtype)
    return o


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gla", "simple_gla"])
def test_loop_runs_as_kernel(family, dtype):
    compiled = torch.compile(loop, backend="fla", fullgraph=True, options={"strict": True})
    for T in (65, 300, 1000):
        q, k, v = (torch.randn(2, T, 3, 64, device="cuda", dtype=dtype) for _ in range(3))
        g = F.logsigmoid(torch.randn(2, T, 3, 64, device="cuda")) / 4
        g = g if family == "gla" else g[..., 0].contiguous()
        inputs = [x.requires_grad_() for x in (q, k, v, g)]
        if T == 65:
            report = explain(loop, *inputs)
            assert [(r.family, r.kernel) for r in report.rewrites] == [(family, "chunk (Triton)")]
        do = torch.randn(2, T, 3, 64, device="cuda", dtype=dtype)
        o = compiled(*inputs)
        grads = torch.autograd.grad(o, inputs, do)
        wide = [x.detach().double().requires_grad_() for x in inputs]
        truth, _ = getattr(decay_naive, f"naive_{family}")(*wide, scale=1.0)
        truths = (truth, *torch.autograd.grad(truth, wide, do.double()))
        limit = 2e-2 if dtype == torch.bfloat16 else 1e-4
        for name, got, want in zip(("o", "dq", "dk", "dv", "dg"), (o, *grads), truths, strict=True):
            assert ((got.double() - want).norm() / want.norm()).item() < limit, (name, T)

"""The whole road on a CUDA device: a naive loop, recognised, run by the Triton kernels, against float64."""

import pytest
import torch
import torch.nn.functional as F

from fla_compile import explain, ops
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


# The operands beside q, k and v, by the axes of each; "g" and "gv" are logs of decays.
FAMILIES = {
    "delta_rule": {"beta": "BTH"},
    "gated_delta_rule": {"g": "BTH", "beta": "BTH"},
    "kda": {"g": "BTHK", "beta": "BTH"},
    "dplr": {"g": "BTHK", "b": "BTHK", "c": "BTHK"},
    "rwkv6": {"g": "BTHK", "u": "HK"},
    "gla": {"g": "BTHK", "gv": "BTHV"},
}
SIZES = {"B": 2, "T": 130, "H": 3, "K": 64, "V": 32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_op(family, dtype):
    generator = torch.Generator("cuda").manual_seed(0)

    def random(axes):
        return torch.randn([SIZES[a] for a in axes], generator=generator, device="cuda", dtype=torch.float64)

    named = {"q": random("BTHK"), "k": F.normalize(random("BTHK"), dim=-1), "v": random("BTHV")}
    for name, axes in FAMILIES[family].items():
        x = random(axes)
        named[name] = (
            F.logsigmoid(x) if name in ("g", "gv") else x.sigmoid() if name == "beta" else F.normalize(x, dim=-1) / 2
        )
    named["initial_state"] = random("BHKV")
    narrow = {n: x.to(torch.float32 if n in ("g", "gv", "initial_state") else dtype) for n, x in named.items()}
    got = _outcome(getattr(ops, family), narrow)
    want = _outcome(getattr(ops, f"naive_{family}"), {n: x.double() for n, x in narrow.items()})
    limit = 2e-2 if dtype == torch.bfloat16 else 2e-5
    for name in want:
        error = (got[name].double() - want[name]).norm() / want[name].norm()
        assert error < limit, (name, error)


def _outcome(op, operands):
    leaves = {name: x.detach().clone().requires_grad_() for name, x in operands.items()}
    o, final = op(**leaves, output_final_state=True)
    total = (o.double() * torch.cos(torch.arange(o.numel(), device="cuda")).view(o.shape)).sum() + final.double().sum()
    grads = torch.autograd.grad(total, list(leaves.values()))
    return {"o": o, "final": final, **{f"d{name}": g for name, g in zip(leaves, grads, strict=True)}}


def lstm(x, w, u):
    h = c = x.new_zeros(x.shape[0], u.shape[0])
    out = []
    for t in range(x.shape[1]):
        i, f, g, o = (x[:, t] @ w + h @ u).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        out.append(h)
    return torch.stack(out, 1)


def minimal_gru(x, w, u):
    h = torch.zeros_like(x[:, 0])
    out = torch.empty_like(x)
    for t in range(x.shape[1]):
        z = torch.sigmoid(x[:, t] @ w)
        h = (1 - z) * h + z * (x[:, t] @ u)
        out[:, t] = h
    return out


def mamba(x, w, u):
    dt, A = F.softplus(x), -u.exp()
    h = x.new_zeros(x.shape[0], x.shape[2], A.shape[1])
    out = []
    for t in range(x.shape[1]):
        h = h * (dt[:, t, :, None] * A).exp() + (dt[:, t] * x[:, t])[..., None] * (x[:, t] @ w)[:, None, :]
        out.append((h * torch.tanh(x[:, t] @ w)[:, None, :]).sum(-1))
    return torch.stack(out, 1)


@pytest.mark.parametrize(
    ("program", "family", "shapes"),
    [
        (lstm, "generic", ((4, 33, 16), (16, 64), (16, 64))),
        (minimal_gru, "linear_scan", ((4, 70, 64), (64, 64), (64, 64))),
        (mamba, "selective_scan", ((2, 70, 32), (32, 16), (32, 16))),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)
def test_program(program, family, shapes):
    inputs = [0.3 * torch.randn(shape, device="cuda") for shape in shapes]
    inputs = [x.requires_grad_() for x in inputs]
    assert [r.family for r in explain(program, *inputs).rewrites] == [family]
    out = torch.compile(program, backend="fla", fullgraph=True)(*inputs)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    truth = program(*wide)
    slope = torch.randn_like(out)
    got, want = torch.autograd.grad(out, inputs, slope), torch.autograd.grad(truth, wide, slope.double())
    for a, b in zip((out, *got), (truth, *want), strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convolution_runs_as_kernel(dtype):
    """conv1d, cut and SiLU, of every length in one compilation; against float64."""
    weight, bias = torch.randn(256, 1, 4, device="cuda", dtype=dtype), torch.randn(256, device="cuda", dtype=dtype)

    def convolve(x, weight, bias):
        return F.silu(F.conv1d(x.mT, weight, bias, padding=3, groups=256)[..., : x.shape[1]]).mT

    compiled = torch.compile(convolve, backend="fla", fullgraph=True, dynamic=True, options={"strict": True})
    for T in (65, 300):
        inputs = [y.requires_grad_() for y in (torch.randn(2, T, 256, device="cuda", dtype=dtype), weight, bias)]
        if T == 65:
            report = explain(convolve, *inputs)
            assert [(r.pattern, r.kernel) for r in report.rewrites] == [("short_conv", "conv (Triton)")]
        dy = torch.randn(2, T, 256, device="cuda", dtype=dtype)
        y = compiled(*inputs)
        wide = [x.detach().double().requires_grad_() for x in inputs]
        truth = convolve(*wide)
        got, truths = (y, *torch.autograd.grad(y, inputs, dy)), (truth, *torch.autograd.grad(truth, wide, dy.double()))
        for name, a, b in zip(("y", "dx", "dweight", "dbias"), got, truths, strict=True):
            assert ((a.double() - b).norm() / b.norm()).item() < (2e-2 if dtype == torch.bfloat16 else 1e-5), (name, T)

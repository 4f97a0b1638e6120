"""A decay over values on the Triton kernels of a decay over keys: interpreted, and on a GPU.

Run as a script (with TRITON_INTERPRET=1) this file is the interpreted part; pytest starts it in a process of its own,
as for `test_decay_triton`, which also compiles ahead of time what is launched here.
"""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has no build for this system")

from decay_cases import SCALE, Case, Inputs, make_inputs, naive_results, results  # noqa: E402
from interpreted import interpreted  # noqa: E402
from range_cases import check_where_finite  # noqa: E402
from range_cases import log_decay as extreme_decay  # noqa: E402
from test_decay_triton import check_results, on_gpu  # noqa: E402

from fla_compile import explain, ops  # noqa: E402
from fla_compile.kernels import decay_fused, decay_naive, decay_ops, decay_triton_values, decay_values  # noqa: E402
from fla_compile.kernels.decay_checks import value_kernels_for  # noqa: E402
from fla_compile.kernels.decay_configs import Config  # noqa: E402

NAMES = ("o", "final_state", "dq", "dk", "dv", "dg", "dh0")
SPLIT, SCAN = Config(32, 16, 16, 4, 1, 0), Config(32, 32, 16, 4, 1, 0)


def value_case(T, decay="strong", B=1, H=1, K=8, V=16):
    return Case("gla_values", T, B=B, H=H, K=K, V=V, value_decay=decay)


def run_kernels(x, **how):
    """All results by name, gv's gradient as dg, with every allocation the launchers make filled with NaN."""
    empty, empty_like = torch.empty, torch.empty_like
    torch.empty = lambda *a, **kw: empty(*a, **kw).fill_(torch.nan)
    torch.empty_like = lambda *a, **kw: empty_like(*a, **kw).fill_(torch.nan)
    try:
        found = decay_triton_values.chunk_forward(x.q, x.k, x.v, x.gv, x.h0, SCALE, **how)
        found += decay_triton_values.chunk_backward(x.q, x.k, x.v, x.gv, x.h0, SCALE, x.do, x.dht, **how)
    finally:
        torch.empty, torch.empty_like = empty, empty_like
    return dict(zip(NAMES, found, strict=True))


def looped(case, x, dtype):
    return dict(zip(NAMES, naive_results(case, x, dtype).values(), strict=True))


def narrow_results(x, dtype, names=NAMES):
    """The loop as torch runs it when everything in it has the narrow dtype, the state too; with g, if given, first."""
    gates = [x.gv] if x.g is None else [x.g, x.gv]
    leaves = [y.to(dtype).detach().requires_grad_() for y in (x.q, x.k, x.v, *gates, x.h0)]
    q, k, v, *gates, S = leaves
    o = []
    for t in range(q.shape[1]):
        for g, over in zip(reversed(gates), (-2, -1), strict=False):
            S = S * g[:, t].exp().unsqueeze(over)
        S = S + k[:, t, :, :, None] * v[:, t, :, None, :]
        o.append(SCALE * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    o = torch.stack(o, 1)
    grads = torch.autograd.grad([o, S], leaves, [x.do.to(dtype), x.dht.to(dtype)])
    return dict(zip(names, (o.detach(), S.detach(), *grads), strict=True))


def check(case, x, dtype, *launches):
    """Holds every launch to the budget; prints the relative rms errors of those on a GPU, run twice alike."""
    truth = looped(case, x, torch.float64)
    eager = looped(case, x, dtype) if dtype == torch.float32 else narrow_results(x, dtype)
    for how in launches:
        got = run_kernels(x, **how)
        errors = check_results(case, x, got, dtype, truth, eager)
        if x.q.is_cuda:
            print(case, dtype, *how, *(f"{name} {error:.1e}" for name, error in errors.items()))
            again = run_kernels(x, **how)
            assert all(torch.equal(y, again[name]) for name, y in got.items()), f"{case} differs from run to run"


def scans_of(x, config=None, **choices):
    return dict(scans=decay_fused.plan_scans(x.v, x.k, "vector", wide=config, tall=config, **choices))


def interpret() -> None:
    """Small shapes with several blocks of keys, values and time, both launches, float32 and float16."""
    sizes = value_case(37, K=20, V=24)
    resets = value_case(33, "resets", K=4)
    for case in (sizes, value_case(1, V=8), resets):
        check(case, make_inputs(case, torch.float32), torch.float32, dict(config=SPLIT))
        print("ok split", case)
    whole = value_case(64, K=16, V=32)
    strong = value_case(33, "very_strong", K=4)
    walk = Config(16, 16, 16, 4, 1, 0)
    ways = (sizes, 1, None), (resets, 1, None), (strong, 2, None), (whole, 2, None), (sizes, 2, walk), (resets, 1, walk)
    for case, segments, walk in ways:
        x = make_inputs(case, torch.float16)
        check(case, x, torch.float16, scans_of(x, SCAN, segments=segments, walk=walk))
        print("ok fused", case)
    views()
    operator()


def operator() -> None:
    """The operator as CUDA runs it, with its autograd and its sequences packed."""
    decay_values.value_kernels_for = lambda *_: decay_triton_values
    case = value_case(7, H=2, K=4, V=8)
    x = make_inputs(case, torch.float32)
    got = dict(zip(NAMES, results(decay_ops.gla, case, x, torch.float32).values(), strict=True))
    check_results(case, x, got, torch.float32, looped(case, x, torch.float64), looped(case, x, torch.float32))
    lengths = torch.tensor([0, 3, 7])
    found = [fn(x.q, x.k, x.v, gv=x.gv, cu_seqlens=lengths)[0] for fn in (decay_ops.gla, decay_naive.naive_gla)]
    torch.testing.assert_close(*found)
    print("ok operator")


def views() -> None:
    """Views as operands, resets by a decay of zero; no initial state and no gradient of the final one."""
    case = value_case(17, H=2, K=4, V=4)
    x = make_inputs(case, torch.float32)
    gv = extreme_decay("some_infinite", x.gv.shape).transpose(1, 2).contiguous().transpose(1, 2)
    v = torch.stack([x.v, x.v], -1)[..., 0]
    x = Inputs(x.q, x.k, v, None, x.h0.mT.contiguous().mT, x.do.expand_as(x.do), x.dht.mT.contiguous().mT, gv)
    truth, eager = looped(case, x, torch.float64), looped(case, x, torch.float32)
    for name, y in run_kernels(x, config=SPLIT).items():
        assert y.is_contiguous()
        check_where_finite(f"{case} {name}", y, truth[name], eager[name])
    found = decay_triton_values.chunk_forward(x.q, x.k, v, gv, None, SCALE, config=SPLIT)
    found += decay_triton_values.chunk_backward(x.q, x.k, v, gv, None, SCALE, x.do, None, config=SPLIT)
    zero = torch.zeros_like(x.h0)
    want = run_kernels(Inputs(x.q, x.k, v, None, zero, x.do, zero, gv), config=SPLIT)
    assert found[-1] is None
    for y, name in zip(found[:-1], NAMES, strict=False):
        assert torch.equal(y, want[name]), name
    print("ok views")


def test_interpreted():
    assert interpreted(__file__) == 11


@pytest.mark.parametrize(
    ("K", "V", "dtype"),
    [(64, 257, torch.bfloat16), (513, 64, torch.bfloat16), (8, 8, torch.float64)],
    ids=["V", "K", "float64"],
)
def test_what_has_no_kernel(K, V, dtype):
    q, v = (torch.empty(1, 1, 1, size, dtype=dtype, device="meta") for size in (K, V))
    on_gpu = type("OnGpu", (), {"device": torch.device("cuda"), "dtype": dtype, "shape": q.shape})()
    assert value_kernels_for(on_gpu, v) is None
    on_gpu.dtype, on_gpu.shape = torch.bfloat16, (1, 1, 1, 8)
    assert value_kernels_for(on_gpu, on_gpu) is decay_triton_values


def test_refuses():
    x = torch.zeros(1, 2, 1, 4)
    with pytest.raises(ValueError, match="between 1 and 256"):
        decay_triton_values.chunk_forward(x, x, torch.zeros(1, 2, 1, 300), torch.zeros(1, 2, 1, 300), None, 1.0)
    for gv, message in ((torch.zeros(1, 2, 1, 5), "g has shape"), (torch.zeros(1, 2, 1), "q, k, v, gv have shapes")):
        with pytest.raises(ValueError, match=message):
            decay_triton_values.chunk_forward(x, x, x, gv, None, 1.0)


# Whole tiles of two classes; parts of tiles; sizes that no pass holds.
GPU = {
    torch.bfloat16: [
        *(value_case(192, decay, H=2, K=128, V=128) for decay in ("strong", "very_strong", "resets")),
        value_case(192, "mixed", H=2, K=64, V=64),
        value_case(1000, "weak", B=2, H=3, K=72, V=40),
        value_case(130, "resets", H=2, K=96, V=200),
        value_case(130, "mixed", H=2, K=512, V=64),
    ],
    torch.float16: [value_case(130, decay, H=2, K=48, V=64) for decay in ("zero", "mixed")],
    torch.float32: [value_case(T, decay, B=2, H=3, K=40, V=72) for T, decay in ((1, "weak"), (130, "resets"))],
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU, ids=str)
def test_gpu(dtype):
    for case in GPU[dtype]:
        x = on_gpu(make_inputs(case, dtype))
        fused = dtype != torch.float32
        assert (scans_of(x)["scans"] is not None) == fused
        segments = (1, 2) if case.T == 1000 else (1,)
        check(case, x, dtype, *([scans_of(x, segments=n) for n in segments] if fused else [{}]))


def loop(q, k, v, gv):
    S = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    o = torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * gv[:, t].exp()[..., None, :] + k[:, t, :, :, None] * v[:, t, :, None]
        o[:, t] = (q[:, t, :, :, None] * S).sum(-2).to(v.dtype)
    return o


@pytest.mark.gpu
def test_gpu_loop():
    """A naive loop under the backend, and packed sequences, through the operator and its autograd."""
    x = on_gpu(make_inputs(value_case(130, "strong", H=2, K=48, V=64), torch.bfloat16))
    inputs = [y.requires_grad_() for y in (x.q, x.k, x.v, x.gv)]
    assert [(r.family, r.kernel) for r in explain(loop, *inputs).rewrites] == [("gla", "chunk (Triton)")]
    o = torch.compile(loop, backend="fla", fullgraph=True, options={"strict": True})(*inputs)
    lengths = torch.tensor([0, 37, 130])
    packed, _ = ops.gla(*inputs[:3], gv=x.gv, scale=1.0, cu_seqlens=lengths)
    wide = [y.detach().double().requires_grad_() for y in inputs]
    whole, _ = decay_naive.naive_gla(*wide[:3], gv=wide[3], scale=1.0)
    parts, _ = decay_naive.naive_gla(*wide[:3], gv=wide[3], scale=1.0, cu_seqlens=lengths)
    for got, want in ((o, whole), (packed, parts)):
        grads = torch.autograd.grad(got, inputs, x.do)
        truths = torch.autograd.grad(want, wide, x.do.double())
        for y, truth in zip((got, *grads), (want, *truths), strict=True):
            assert ((y.double() - truth).norm() / truth.norm()).item() < 2e-2


if __name__ == "__main__":
    interpret()

"""A decay over values on the Triton kernels of a decay over keys: interpreted, compiled ahead of time, and on a GPU.

Run as a script (with TRITON_INTERPRET=1) this file is the interpreted part, as `test_decay_triton` is.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has no build for this system")

from decay_cases import SCALE, Case, Inputs, make_inputs, naive_results  # noqa: E402
from machine_code import stack_bytes  # noqa: E402
from range_cases import check_where_finite  # noqa: E402
from range_cases import log_decay as extreme_decay  # noqa: E402
from test_decay_triton import STACK, check_results, compile_kernel, on_gpu  # noqa: E402

from fla_compile.kernels import (  # noqa: E402
    decay_cpu,
    decay_fused,
    decay_ops,
    decay_scan_gates,
    decay_triton_common,
    decay_triton_grads,
    decay_triton_values,
)
from fla_compile.kernels.decay_checks import value_kernels_for  # noqa: E402
from fla_compile.kernels.decay_configs import TABLE, Config, all_configs, configs_for  # noqa: E402

FAMILY = "gla_values"
NAMES = ("o", "final_state", "dq", "dk", "dv", "dg", "dh0")


def run_kernels(x: Inputs, dht=True, **how):
    """All results by name, gv's gradient as dg, with every allocation the launchers make filled with NaN."""
    empty, empty_like = torch.empty, torch.empty_like
    torch.empty = lambda *a, **kw: empty(*a, **kw).fill_(torch.nan)
    torch.empty_like = lambda *a, **kw: empty_like(*a, **kw).fill_(torch.nan)
    try:
        results = decay_triton_values.chunk_forward(x.q, x.k, x.v, x.gv, x.h0, SCALE, **how)
        results += decay_triton_values.chunk_backward(x.q, x.k, x.v, x.gv, x.h0, SCALE, x.do, x.dht, **how)
    finally:
        torch.empty, torch.empty_like = empty, empty_like
    return dict(zip(NAMES, results, strict=True))


def named(results):
    return {"dg" if name == "dgv" else name: y for name, y in results.items()}


def narrow_results(x, dtype):
    """The loop as torch runs it when everything in it has the narrow dtype, the state too."""
    leaves = [y.to(dtype).detach().requires_grad_() for y in (x.q, x.k, x.v, x.gv, x.h0)]
    q, k, v, gv, S = leaves
    w, o = gv.exp(), []
    for t in range(q.shape[1]):
        S = S * w[:, t, :, None, :] + k[:, t, :, :, None] * v[:, t, :, None, :]
        o.append(SCALE * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    o = torch.stack(o, 1)
    grads = torch.autograd.grad([o, S], leaves, [x.do.to(dtype), x.dht.to(dtype)])
    return dict(zip(NAMES, (o.detach(), S.detach(), *grads), strict=True))


def check(case, dtype, launches, x=None):
    """Holds every launch to the budget, twice the same; the relative rms errors by launch and name."""
    x = x or make_inputs(case, dtype)
    truth = named(naive_results(case, x, torch.float64))
    eager = named(naive_results(case, x, dtype)) if dtype == torch.float32 else narrow_results(x, dtype)
    errors = {}
    for name, how in launches.items():
        got = run_kernels(x, **how)
        errors |= {(name, key): error for key, error in check_results(case, x, got, dtype, truth, eager).items()}
        if x.q.is_cuda:
            again = run_kernels(x, **how)
            assert all(torch.equal(y, again[key]) for key, y in got.items()), f"{case} {name} differs from run to run"
    return errors


def scans_of(x, config=None, **choices):
    return decay_fused.plan_scans(x.v, x.k, "vector", wide=config, tall=config, **choices)


def value_case(T, decay="strong", B=1, H=1, K=8, V=16):
    return Case(FAMILY, T, B=B, H=H, K=K, V=V, value_decay=decay)


def interpret() -> None:
    """Small shapes with several blocks of keys, values and time, both launches, float32 and float16."""
    split, scan = Config(32, 16, 16, 4, 1, 0), Config(32, 32, 16, 4, 1, 0)
    cases = [
        value_case(37, H=2, K=20, V=24),
        value_case(1, B=2),
        value_case(33, "very_strong"),
        value_case(33, "resets"),
    ]
    for case in (*cases, value_case(33, "zero"), value_case(33, "growing")):
        check(case, torch.float32, {"split": dict(config=split)})
        print("ok split", case)
    check(cases[0], torch.float16, {"split": dict(config=split)})
    for case in (*cases, value_case(96, K=32)):  # whole tiles, and every chunk again
        x = make_inputs(case, torch.float16)
        choices = dict(segments=1), dict(segments=2), dict(segments=2, limit=-1.0)
        launches = {str(c): dict(scans=scans_of(x, scan, **c)) for c in choices[: 3 if case.T == 96 else 1]}
        check(case, torch.float16, launches, x)
        print("ok fused", case)
    operators(split)


def operators(config: Config) -> None:
    """Through autograd, with views as operands, decays of zero, and sizes and gates that have no kernel."""
    case = value_case(33, H=2, K=16, V=24)
    x = make_inputs(case, torch.float32)
    gv = extreme_decay("some_infinite", x.gv.shape)
    gv = gv.transpose(1, 2).contiguous().transpose(1, 2)
    x = Inputs(
        x.q, x.k.flip(1).flip(1), torch.stack([x.v, x.v], -1)[..., 0], None, x.h0.mT.contiguous().mT, x.do, x.dht, gv
    )
    got = run_kernels(x, config=config)
    truth, eager = (named(naive_results(case, x, dtype)) for dtype in (torch.float64, torch.float32))
    for name, y in got.items():
        check_where_finite(f"{case} {name}", y, truth[name], eager[name])
    o, final = decay_triton_values.chunk_forward(x.q, x.k, x.v, x.gv, None, SCALE, config=config)
    *grads, dh0 = decay_triton_values.chunk_backward(x.q, x.k, x.v, x.gv, None, SCALE, x.do, None, config=config)
    zero = torch.zeros_like(x.h0)
    want = run_kernels(Inputs(x.q, x.k, x.v, None, zero, x.do, zero, gv), config=config)
    assert dh0 is None
    for y, name in zip((o, final, *grads), NAMES, strict=False):
        assert y.is_contiguous() and torch.equal(y, want[name]), name
    print("ok operands")


def test_interpreted():
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    path = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support"), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(path)
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("ok ") == 12


if __name__ == "__main__":
    interpret()

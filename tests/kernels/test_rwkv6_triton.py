"""RWKV-6 in Triton: interpreted, compiled ahead of time, and on a GPU.

Run as a script (with TRITON_INTERPRET=1) this file is the interpreted part.
"""

import sys
from itertools import pairwise

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has no build for this system")

from budget import check_budget  # noqa: E402
from decay_ahead import compile_kernel, gates_of, most_stack, name_of  # noqa: E402
from decay_cases import SCALE, Case, Inputs, make_inputs, naive_results  # noqa: E402
from interpreted import interpreted  # noqa: E402
from machine_code import check_memory  # noqa: E402
from range_cases import FLOOR, check_where_finite  # noqa: E402
from test_decay_triton import CAP, SMALLEST  # noqa: E402

from fla_compile.kernels import decay_naive, rwkv6_ops, rwkv6_triton  # noqa: E402
from fla_compile.kernels.decay_configs import MORE_BEFORE, TABLE, Config, all_configs  # noqa: E402
from fla_compile.kernels.decay_fused import plan_scans  # noqa: E402

NAMES = ("o", "final_state", "dq", "dk", "dv", "dg", "du", "dh0")
# A row of the decay's gradient between steps that grow is a sum of both signs, of few terms.
GROWING, GROWN = ("alternating", "peak", "dip", "valley"), 1e-4
# Sums of g reach 100 and more, of which float32 keeps less than the budget's floor.
LARGE = ("very_strong", "resets", "hard_resets")
# What is spilled where that is more than `TABLE` has for gated linear attention, by architecture, launch, size, and
# whether exact
STACK = {
    (80, "wide", 64, False): 8,
    (80, "wide", 128, False): 56,
    (90, "tall", 64, False): 136,
    (90, "walk", 64, False): 64,
    (90, "walk", 128, False): 64,
    (90, "chunks", 128, False): 312,
    (90, "chunks", 256, False): 224,
    (90, "tall", 128, False): 152,
    (90, "tall", 256, False): 728,
    (90, "tall", 256, True): 120,
    (90, "chunks-few", 256, False): 128,
    (90, "tall-few", 256, False): 88,
}


def run_kernels(x, cu_seqlens=None, **choices):
    """All results by name, with every allocation the launchers make filled with NaN."""
    empty = torch.empty
    torch.empty = lambda *a, **kw: empty(*a, **kw).fill_(torch.nan)
    operands = x.q, x.k, x.v, x.g, x.u, x.h0, SCALE
    try:
        results = rwkv6_triton.forward(*operands, cu_seqlens, **choices)
        results += rwkv6_triton.backward(*operands, x.do, x.dht, cu_seqlens, **choices)
    finally:
        torch.empty = empty
    return {n: y for n, y in zip(NAMES, results, strict=True) if y is not None}


def narrow_results(x, dtype):
    """The loop as torch runs it when everything in it has the narrow dtype, the state too."""
    leaves = {
        n: y.to(dtype).detach().requires_grad_() for n in ("q", "k", "v", "g", "u", "h0")
        if (y := getattr(x, n)) is not None
    }  # fmt: skip
    S, o, a = leaves["h0"], [], leaves["g"].exp()
    for t in range(x.q.shape[1]):
        q, k, v = (leaves[n][:, t] for n in "qkv")
        kv = k[..., None] * v[..., None, :]
        read = S if x.u is None else S + leaves["u"][..., None] * kv
        o.append(SCALE * torch.einsum("bhk,bhkv->bhv", q, read))
        S = S * a[:, t, ..., None] + kv
    o = torch.stack(o, 1)
    grads = torch.autograd.grad([o, S], list(leaves.values()), [x.do.to(dtype), x.dht.to(dtype)])
    return {"o": o.detach(), "final_state": S.detach()} | dict(zip((f"d{n}" for n in leaves), grads, strict=True))


def check(case, x, got, dtype):
    truth = naive_results(case, x, torch.float64)
    eager = naive_results(case, x, dtype) if dtype == torch.float32 else narrow_results(x, dtype)
    assert got.keys() == truth.keys()
    for name, y in got.items():
        each = case.decay in GROWING
        if each or (case.decay in LARGE and dtype == torch.float32):
            floor = FLOOR if not each else GROWN if dtype == torch.float32 else 2.0**-5
            check_where_finite(f"{case} {name}", y, truth[name], eager[name].to(y.dtype), floor=floor, every_row=each)
        else:
            kind = "forward" if name in ("o", "final_state") else "backward"
            check_budget(f"{case} {name}", y, truth[name], eager[name].to(y.dtype), kind)
            if dtype != torch.float32:
                size = max(truth[name].square().mean().sqrt().item(), SMALLEST[dtype])
                error = (y.double() - truth[name]).square().mean().sqrt().item() / size
                assert error <= CAP[dtype] * (4 if name == "dg" else 1), f"{case} {name}: {error:.1e}"


def check_sequences(case, x, got, cu_seqlens, dtype):
    """`got` of packed sequences against each of these alone."""
    ends = cu_seqlens.tolist()
    du = None
    for n, (start, end) in enumerate(pairwise(ends)):
        rows = {name: getattr(x, name)[:, start:end] for name in ("q", "k", "v", "g", "do")}
        one = Inputs(**rows, h0=x.h0[n : n + 1], dht=x.dht[n : n + 1], u=x.u)
        own = {
            name: y[n : n + 1] if name in ("final_state", "dh0") else y[:, start:end]
            for name, y in got.items() if name != "du"
        }  # fmt: skip
        truth = naive_results(case, one, torch.float64)
        eager = naive_results(case, one, dtype) if dtype == torch.float32 else narrow_results(one, dtype)
        for name, y in own.items():
            kind = "forward" if name in ("o", "final_state") else "backward"
            check_budget(f"{case} {n} {name}", y, truth[name], eager[name].to(y.dtype), kind)
        du = truth["du"] if du is None else du + truth["du"]
    error = (got["du"].double() - du).norm() / du.norm()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2), f"{case} du: {error:.1e}"


def packed_inputs(case, lengths, dtype):
    x = make_inputs(case, dtype)
    states = torch.randn(2, len(lengths), case.H, case.K, case.V, dtype=x.h0.dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    return Inputs(x.q, x.k, x.v, x.g, states[0], x.do, states[1], u=x.u), cu_seqlens


def interpret(thorough: bool) -> None:
    # all keys in a pass, as long as chunks of states and shorter; keys and values in blocks
    held, short = Config(32, 32, 16, 4, 1, 0), Config(16, 32, 16, 4, 1, 0)
    blocks = Config(32, 16, 16, 4, 1, 0)
    # values in one tile and in two, chunks of what states are counted by and shorter
    walk, walk_short = Config(32, 32, 16, 4, 1, 0), Config(16, 16, 16, 4, 1, 0)
    ways = (
        dict(wide=held, tall=held, segments=1),
        dict(wide=blocks, tall=blocks, segments=2),
        dict(wide=held, tall=held, walk=walk_short, segments=1, limit=-1.0),
        dict(wide=held, tall=held, walk=walk_short, segments=1),
        dict(wide=held, tall=held, walk=walk, segments=2),
        dict(wide=held, tall=held, segments=1, limit=-1.0),
        dict(wide=short, tall=held, segments=2),
        dict(wide=blocks, tall=blocks, segments=1, limit=-1.0),
    )
    cases = [("rwkv6", 45, torch.float32), ("rwkv6", 1, torch.float32)]
    if thorough:
        cases += [("rwkv6", 75, torch.float16), ("rwkv6_no_bonus", 64, torch.float32)]
    for way in ways if thorough else ways[:4]:
        for family, T, dtype in cases:
            case = Case(family, T, "strong", B=2 if T == 1 else 1, H=1 + (T > 45), K=24, V=20)
            x = make_inputs(case, dtype)
            scans = plan_scans(x.q, x.v, "vector", before=True, **way)
            check(case, x, run_kernels(x, scans=scans), dtype)
            print("ok", case, dtype)
    for decay in ("zero", "very_strong", "resets", "hard_resets", *GROWING) if thorough else ("resets", "peak"):
        case = Case("rwkv6", 96 if decay == "valley" else 40, decay, B=1, H=1, K=8, V=8)
        x = make_inputs(case, torch.float32)
        for way in (*ways[:2], ways[3]) if thorough else (ways[0], ways[3]):
            scans = plan_scans(x.q, x.v, "vector", before=True, **way)
            check(case, x, run_kernels(x, scans=scans), torch.float32)
        print("ok", case)
    for way in (ways[1], ways[3], ways[6]) if thorough else (ways[0], ways[3]):
        case = Case("rwkv6", 70, "weak", B=1, H=1, K=24, V=20)
        x, cu_seqlens = packed_inputs(case, (1, 37, 32), torch.float32)
        scans = plan_scans(x.q, x.v, "vector", before=True, **way | dict(segments=1))
        got = run_kernels(x, cu_seqlens, scans=scans, longest=32)
        check_sequences(case, x, got, cu_seqlens, torch.float32)
        print("ok packed", case)


def test_interpreted():
    assert interpreted(__file__) == 4 * 2 + 2 + 2


@pytest.mark.slow
def test_interpreted_thorough():
    assert interpreted(__file__, "thorough") == 8 * 4 + 8 + 3


def test_no_kernel_for_four_bytes():
    x = make_inputs(Case("rwkv6", 20, B=1), torch.float32)
    assert rwkv6_triton.forward(x.q, x.k, x.v, x.g, x.u, x.h0, SCALE) is None
    assert rwkv6_triton.backward(x.q, x.k, x.v, x.g, x.u, x.h0, SCALE, x.do, x.dht) is None


def test_no_kernel_for_a_scale_of_zero():
    x = make_inputs(Case("rwkv6", 20, B=1), torch.float16)
    assert rwkv6_triton.backward(x.q, x.k, x.v, x.g, x.u, x.h0, 0.0, x.do, x.dht) is None


def ahead_of_time():
    for row, _ in all_configs():
        if row.family == "key" and row.launch in ("wide", "states", "chunks", "tall", "kept", "walk"):
            quick = row.arch == 90 and row.size == 64
            yield pytest.param(
                row, id=f"sm{row.arch}-{name_of(row)}-{row.size}", marks=[] if quick else pytest.mark.slow
            )


@pytest.mark.parametrize("row", list(ahead_of_time()))
def test_compiles(row):
    size = row.size
    own = rwkv6_triton.own_scores_kernel, dict(H=4, K=size, BR=rwkv6_triton.BLOCK // size, BK=size)
    for packed in (False,) if row.few else (False, True):
        for kernel, constants in (*gates_of(row, packed=packed, bonus=True), own):
            compiled = compile_kernel(kernel, constants, row, "vector", "ieee")
            place = row.arch, name_of(row), row.size, constants.get("EXACT", False)
            stack = STACK.get(place, most_stack(row, kernel, constants))
            check_memory(compiled, TABLE[row][0].shared + MORE_BEFORE, stack)


def on_gpu(x):
    return type(x)(**{n: None if y is None else y.cuda() for n, y in vars(x).items()})


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "V"), [(40, 72), (64, 64), (128, 128), (256, 128), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gpu(dtype, K, V):
    decays = "zero", "weak", "strong", "very_strong", "resets"
    cases = [Case("rwkv6", 130, decay, B=1, H=2, K=K, V=V) for decay in decays]
    cases += [Case("rwkv6", T, "weak", B=2, H=3, K=K, V=V) for T in (17, 64, 65, 330)]  # few programs, and many
    cases += [Case("rwkv6_no_bonus", 130, "weak", B=1, H=2, K=K, V=V)]
    if dtype == torch.bfloat16:
        cases += [Case("rwkv6", 130, decay, B=1, H=2, K=K, V=V) for decay in GROWING]
    for case in cases:
        x = on_gpu(make_inputs(case, dtype))
        got, again = run_kernels(x), run_kernels(x)
        for name in got:
            assert torch.equal(got[name], again[name]), f"{case} {name} differs from run to run"
        check(case, x, got, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("K", [64, 128, 256])
def test_gpu_packed(K):
    case = Case("rwkv6", 430, "strong", B=1, H=2, K=K, V=64)
    x, cu_seqlens = packed_inputs(case, (1, 200, 64, 165), torch.bfloat16)
    x = on_gpu(x)
    for longest in (None, 64):
        check_sequences(case, x, run_kernels(x, cu_seqlens, longest=longest), cu_seqlens, torch.bfloat16)


@pytest.mark.gpu
def test_gpu_operator():
    """Through autograd, packed and not."""
    case = Case("rwkv6", 300, "weak", B=1, H=2, K=64, V=64)
    x = on_gpu(make_inputs(case, torch.bfloat16))
    for cu_seqlens in (None, torch.tensor([0, 100, 300])):
        results = []
        for fn, dtype in ((rwkv6_ops.rwkv6, torch.bfloat16), (decay_naive.naive_rwkv6, torch.float64)):
            leaves = [y.to(dtype).detach().requires_grad_() for y in (x.q, x.k, x.v)]
            leaves += [
                y.to(max(dtype, torch.float32, key=lambda d: d.itemsize)).detach().requires_grad_() for y in (x.g, x.u)
            ]
            o, _ = fn(*leaves, cu_seqlens=cu_seqlens)
            results.append((o, *torch.autograd.grad(o, leaves, x.do.to(o.dtype))))
        for got, want in zip(*results, strict=True):
            assert ((got.double() - want).norm() / want.norm()) < 1e-2


if __name__ == "__main__":
    interpret(sys.argv[1:] == ["thorough"])

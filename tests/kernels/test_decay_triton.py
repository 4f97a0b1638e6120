"""The Triton kernels of the decayed outer product: interpreted, compiled ahead of time, and on a GPU.

Run as a script (with TRITON_INTERPRET=1) this file is the interpreted part; pytest starts it in a process of its own,
since Triton decides at import whether it interprets.
"""

from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has no build for this system")

from budget import check_budget  # noqa: E402
from decay_ahead import compile_kernel, kernels_of, kinds_of, most_stack, name_of  # noqa: E402
from decay_cases import FAMILIES, NAMES, Case, make_inputs, naive_results  # noqa: E402
from interpreted import interpreted  # noqa: E402
from machine_code import DEVICE_SHARED, check_memory  # noqa: E402
from range_cases import FLOOR, check_where_finite  # noqa: E402

from fla_compile.kernels import (  # noqa: E402
    decay_fused,
    decay_fused_gates,
    decay_triton,
    decay_triton_common,
)
from fla_compile.kernels.decay_configs import KINDS, TABLE, Config, all_configs, configs_for  # noqa: E402

SCALE = 0.3
KIND = dict(zip(FAMILIES, ("none", "constant", "scalar", "vector"), strict=True))
# Relative rms error a narrow kernel may have whatever the narrow loop does: four roundings of its operands, and for
# dg, a difference of such sums, sixteen.
CAP = {torch.bfloat16: 4 * 2.0**-9, torch.float16: 4 * 2.0**-12}
# A row of a gradient between steps that grow is a sum of both signs, of few terms.
GROWING, GROWN = ("alternating", "peak", "dip"), 1e-4
# Below this a narrow product underflows (float16 keeps 2^-24), and an error relative to it says nothing.
SMALLEST = {torch.bfloat16: 1e-30, torch.float16: 1e-5}


def run_kernels(x, config=None, scans=None):
    """All results by name, with every allocation the launchers make filled with NaN."""
    empty, empty_like = torch.empty, torch.empty_like
    torch.empty = lambda *a, **kw: empty(*a, **kw).fill_(torch.nan)
    torch.empty_like = lambda *a, **kw: empty_like(*a, **kw).fill_(torch.nan)
    how = dict(config=config, scans=scans)
    try:
        results = decay_triton.chunk_forward(x.q, x.k, x.v, x.g, x.h0, SCALE, **how)
        results += decay_triton.chunk_backward(x.q, x.k, x.v, x.g, x.h0, SCALE, x.do, x.dht, **how)
    finally:
        torch.empty, torch.empty_like = empty, empty_like
    return {n: y for n, y in zip(NAMES, results, strict=True) if y is not None}


def scans_of(case, x, config=None, **choices):
    return decay_fused.plan_scans(x.q, x.v, KIND[case.family], wide=config, tall=config, **choices)


def narrow_results(case, x, dtype):
    """The loop as torch runs it when everything in it has the narrow dtype, the state too."""
    leaves = [None if y is None else y.to(dtype).detach().requires_grad_() for y in (x.q, x.k, x.v, x.g, x.h0)]
    q, k, v, g, S = leaves
    a = None if g is None else g.exp().expand(q.shape[:3]) if case.family == "retention" else g.exp()
    o = []
    for t in range(case.T):
        if a is not None:
            S = S * a[:, t].reshape(case.B, case.H, -1, 1)
        S = S + k[:, t, :, :, None] * v[:, t, :, None, :]
        o.append(SCALE * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    o = torch.stack(o, 1)
    wanted = [y for y in leaves if y is not None]
    grads = iter(torch.autograd.grad([o, S], wanted, [x.do.to(dtype), x.dht.to(dtype)]))
    found = [o.detach(), S.detach(), *(None if y is None else next(grads) for y in leaves)]
    return {n: y for n, y in zip(NAMES, found, strict=True) if y is not None}


def check_results(case, x, got, dtype, truth=None, eager=None):
    """Holds every result to the budget; returns the relative rms errors by name."""
    truth = truth or naive_results(case, x, torch.float64)
    eager = eager or (naive_results if dtype == torch.float32 else narrow_results)(case, x, dtype)
    errors = {}
    for name, y in got.items():
        kind = "forward" if name in ("o", "final_state") else "backward"
        each = not {case.decay, case.value_decay}.isdisjoint({*GROWING, "valley"})
        if each or case.decay == "hills":  # sums of g reach 70: they keep less than the budget's floor
            check_where_finite(
                f"{case} {name}", y, truth[name], eager[name], floor=GROWN if each else FLOOR, every_row=each
            )
        else:
            check_budget(f"{case} {name}", y, truth[name], eager[name].to(y.dtype), kind)
        size = truth[name].double().square().mean().sqrt().item()
        error = (y.double() - truth[name]).square().mean().sqrt().item()
        errors[name] = error / max(size, SMALLEST.get(dtype, 1e-30))
        if dtype != torch.float32:
            cap = CAP[dtype] * (4 if name == "dg" else 1)
            # One gate a head sums B * T terms of both signs: what cancels there, the narrow loop's error measures.
            assert errors[name] <= cap or case.family == "retention", f"{case} {name}: {errors[name]:.1e} > {cap:.1e}"
    return errors


def interpret() -> None:
    """Small shapes with several blocks of keys, values and time, both launches, float32 and float16."""
    small, larger, scan = Config(16, 16, 16, 4, 1, 0), Config(32, 32, 32, 4, 1, 0), Config(32, 32, 16, 4, 1, 0)
    cases = [Case(f, 37, "strong", B=1, H=2, K=20, V=24) for f in FAMILIES]
    cases += [Case(f, 1, "weak", B=2, H=1, K=16, V=8) for f in FAMILIES]
    cases += [Case(f, 33, d, B=1, H=1, K=8, V=16) for f in FAMILIES[1:] for d in ("very_strong", "resets", "growing")]
    cases += [Case(f, 193, "hills", B=1, H=1, K=8, V=8) for f in ("simple_gla", "gla")]
    for dtype in (torch.float32, torch.float16):
        for case in cases if dtype == torch.float32 else cases[: 2 * len(FAMILIES)]:
            x = make_inputs(case, dtype)
            truth = naive_results(case, x, torch.float64)
            for config in (small, larger) if case.T == 37 else (larger,):
                check_results(case, x, run_kernels(x, config), dtype, truth)
            print("ok", dtype, case)
    for dtype in (torch.float32, torch.float16):  # more values than keys, as the tables choose
        for family in FAMILIES:
            case = Case(family, 70, "strong", B=1, H=1, K=8, V=272)
            x = make_inputs(case, dtype)
            check_results(case, x, run_kernels(x), dtype)
            print("ok values", dtype, case)
    # the fused launch is for two bytes, which cannot hold what grows by e^70; then whole tiles, and every chunk again
    whole = [Case(f, 96, "strong", B=1, H=1, K=16, V=32) for f in FAMILIES]
    for case in [*(case for case in cases if case.decay != "hills"), *whole]:
        dtype = torch.float16
        x = make_inputs(case, dtype)
        truth = naive_results(case, x, torch.float64)
        ways = dict(segments=1), dict(segments=2, limit=-1.0)
        for choices in ways[: 2 if case.T == 96 else 1]:
            check_results(case, x, run_kernels(x, scans=scans_of(case, x, scan, **choices)), dtype, truth)
        print("ok fused", case)
    for family, config in zip(FAMILIES[2:], (small, larger), strict=True):
        for decay in GROWING:
            case = Case(family, 17, decay, B=1, H=1, K=8 if family == "gla" else 20, V=8)
            x = make_inputs(case, torch.float32)
            check_results(case, x, run_kernels(x, config), torch.float32)
            print("ok", case)
    # float32 stands in for bfloat16, whose limit it has
    for limit, decay, T in ((None, "peak", 40), (-1.0, "peak", 40), (None, "alternating", 40), (None, "valley", 96)):
        case = Case("gla", T, decay, B=1, H=1, K=8, V=8)
        x = make_inputs(case, torch.float32)
        scans = scans_of(case, x, scan, segments=1, limit=limit)
        check_results(case, x, run_kernels(x, scans=scans), torch.float32)
        print("ok fused", case)
    blocks = Config(32, 16, 16, 4, 1, 0)  # more keys and values than a program holds; a pass of other chunks
    ways = dict(segments=2), dict(limit=-1.0), dict(wide=Config(16, 32, 16, 4, 1, 0))
    for choices in ways:
        case = Case("gla", 70, "strong", B=1, H=1, K=24, V=40)
        x = make_inputs(case, torch.float16)
        tiles = dict(wide=blocks, tall=blocks) | choices
        scans = decay_fused.plan_scans(x.q, x.v, KIND[case.family], **tiles)
        assert scans is not None
        check_results(case, x, run_kernels(x, scans=scans), torch.float16)
        print("ok fused", case)
    lean = replace(blocks, spare=False)
    for T, decay in ((70, "strong"), (40, "resets")):
        case = Case("gla", T, decay, B=1, H=1, K=24, V=40)
        x = make_inputs(case, torch.float16)
        scans = decay_fused.plan_scans(x.q, x.v, "vector", wide=lean, tall=blocks)
        check_results(case, x, run_kernels(x, scans=scans), torch.float16)
        print("ok fused", case)
    for limit in (1.0, -1.0):  # two programs share what is out of range: all but the short last chunk, and that too
        case = Case("gla", 70, "weak", B=1, H=2, K=24, V=40)
        x = make_inputs(case, torch.float16)
        scans = decay_fused.plan_scans(x.q, x.v, "vector", wide=blocks, tall=blocks, limit=limit, segments=1)
        alone = run_kernels(x, scans=scans)
        few, decay_fused_gates.EXACT_PROGRAMS = decay_fused_gates.EXACT_PROGRAMS, 2
        decay_fused_gates._launches.clear()
        shared = run_kernels(x, scans=scans)
        grids = [launch.grid for launch in decay_fused_gates._launches.values()]
        decay_fused_gates.EXACT_PROGRAMS = few
        decay_fused_gates._launches.clear()
        assert grids.count((2, 1, 1)) == 3, f"o, dv and the other gradients share: {grids}"
        for name in alone:
            assert torch.equal(alone[name], shared[name]), f"{case} {name} differs where programs share chunks"
        check_results(case, x, shared, torch.float16)
        print("ok fused", case)
    tiles = [(32, 128, 16, 72, "alternating"), (64, 128, 16, 72, "peak"), (64, 64, 64, 40, "alternating")]
    tiles.append((64, 256, 16, 136, "peak"))
    for chunk, rows, columns, V, decay in tiles:
        case = Case("simple_gla", 40, decay, B=1, H=1, K=20, V=V)
        x = make_inputs(case, torch.float32)
        scans = scans_of(case, x, Config(chunk, rows, columns, 4, 1, 0), segments=2)
        check_results(case, x, run_kernels(x, scans=scans), torch.float32)
        print("ok fused", case)
    for family in FAMILIES[:3]:  # more than 128 keys and values
        case = Case(family, 70, "strong", B=1, H=1, K=136, V=144)
        x = make_inputs(case, torch.float16)
        scans = scans_of(case, x, Config(32, 256, 128, 4, 1, 0), segments=2)
        check_results(case, x, run_kernels(x, scans=scans), torch.float16)
        print("ok fused", case)
    for family in FAMILIES[1:3]:  # a decay's gradient from block to block, and where nothing of the states is left
        for decay in ("zero", "very_strong", "resets"):
            case = Case(family, 100, decay, B=1, H=2, K=20, V=16)
            x = make_inputs(case, torch.float16)
            check_results(case, x, run_kernels(x, scans=scans_of(case, x, scan, segments=1)), torch.float16)
            print("ok fused", case)
    for family in FAMILIES[:3]:  # chunks long enough that nothing is transposed
        case = Case(family, 130, "strong", B=1, H=1, K=16, V=16)
        x = make_inputs(case, torch.float16)
        long = Config(64, 16, 16, 4, 1, 0)
        ways = [scans_of(case, x, long, segments=2)]
        if family == "simple_gla":  # dv's alone
            ways.append(replace(scans_of(case, x, replace(long, chunk=16), segments=2), dv=long))
        for scans in ways:
            check_results(case, x, run_kernels(x, scans=scans), torch.float16)
            print("ok fused", case)


def test_interpreted():
    assert interpreted(__file__) == 9 * len(FAMILIES) + 54


def test_every_size_has_a_split_row():
    for arch in (80, 86, 89, 90, 100, 103, 120):
        for kind in KINDS:
            for nbytes in (2, 4):
                for size in (1, 64, 65, 256):
                    assert configs_for(arch, "split", kind, nbytes, size, 99 * 1024)


def test_shared_memory_filters():
    for row, config in all_configs():
        assert config.shared <= DEVICE_SHARED[row.arch]
    assert not configs_for(90, "wide", "vector", 2, 64, 16 * 1024)
    assert not configs_for(90, "wide", "vector", 4, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 2, 1, 4, dtype=torch.float64)}, "q must be"),
        ({"v": torch.zeros(1, 2, 1, 4, dtype=torch.float16)}, "v has dtype"),
        ({"v": torch.zeros(1, 2, 1, 513)}, "V between 1 and 512"),
        ({"k": torch.zeros(1, 2, 1, 5)}, "k has shape"),
        ({"g": torch.zeros(1, 2)}, "g has shape"),
    ],
    ids=["float64", "mixed", "large", "k", "g"],
)
def test_refuses(change, message):
    args = {n: torch.zeros(1, 2, 1, 4) for n in "qkv"} | {"g": None} | change
    with pytest.raises(ValueError, match=message):
        decay_triton.chunk_forward(*args.values(), None, 1.0)


def ahead_of_time():
    for row, _ in all_configs():
        for kind in kinds_of(row):
            for precision in ("ieee", "tf32") if row.nbytes == 4 else ("ieee",):
                quick = row.size == 128 and kind in ("scalar", "vector") and precision == "ieee"
                quick &= row.arch == 90 or (row.nbytes == 2 and row.launch == "split")
                name = f"sm{row.arch}-{name_of(row)}-{kind}-{8 * row.nbytes}bit-{row.size}-{precision}"
                yield pytest.param(row, kind, precision, id=name, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("row", "kind", "precision"), list(ahead_of_time()))
def test_compiles(row, kind, precision):
    for kernel, constants in kernels_of(row, kind):
        compiled = compile_kernel(kernel, constants, row, kind, precision)
        check_memory(compiled, TABLE[row][0].shared, most_stack(row, kernel, constants))


# Every row of the table is met by every family; lengths and decays at length by the families with most code.
SHAPES = {
    torch.bfloat16: [(40, 72), (48, 64), (128, 96), (128, 256), (256, 256)],
    torch.float16: [(40, 72), (128, 96)],
    torch.float32: [(40, 72), (256, 96)],
}
DECAYS = ("zero", "weak", "strong", "very_strong", "resets")


def gpu_cases(family, K, V, dtype):
    """One shape at every length and decay, so that kernels are compiled once a shape."""
    if family in ("linear_attention", "retention") and K != 40:
        return [Case(family, 130, "weak", B=1, H=2, K=K, V=V)]
    cases = [Case(family, T, "weak", B=2, H=3, K=K, V=V) for T in (1, 63, 64, 65)]
    cases += [Case(family, 130, d, B=1, H=2, K=K, V=V) for d in DECAYS if family != "linear_attention"]
    if dtype == torch.float32 and family in ("simple_gla", "gla"):
        cases.append(Case(family, 193, "hills", B=1, H=2, K=K, V=V))
    return [*cases, Case(family, 1000, "weak", B=1, H=2, K=K, V=V)] if K < 64 else cases


def on_gpu(x):
    return type(x)(**{n: None if y is None else y.cuda() for n, y in vars(x).items()})


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "K", "V"), [(dtype, *sizes) for dtype in SHAPES for sizes in SHAPES[dtype]], ids=str)
def test_gpu(family, dtype, K, V, record_property):
    arch = decay_triton_common.device_arch(torch.device("cuda"))
    shared = decay_triton_common.shared_limit(torch.device("cuda"))
    configs = configs_for(arch, "split", KIND[family], dtype.itemsize, max(K, V), shared)
    worst = {}
    for case in gpu_cases(family, K, V, dtype):
        x = on_gpu(make_inputs(case, dtype))
        truth = naive_results(case, x, torch.float64)
        eager = (naive_results if dtype == torch.float32 else narrow_results)(case, x, dtype)
        launches = {f"split {c}": dict(config=c) for c in configs}
        for segments, few in [(1, False), (1, True), (2, False), (2, True)] if case.T > 64 else [(1, False)]:
            scans = scans_of(case, x, segments=segments, need_dg=segments == 1, few=few)
            if scans is not None:
                launches[f"fused {segments} {scans.wide} {scans.tall}"] = dict(scans=scans)
        held = 256 if arch == 90 else 128
        fused = dtype != torch.float32 and (max(K, V) <= held or KIND[family] == "vector")
        assert (len(launches) > len(configs)) == fused, "the fused launch is for two bytes, and passes for some rows"
        for launch, how in launches.items():
            got, again = run_kernels(x, **how), run_kernels(x, **how)
            for name in got:
                assert torch.equal(got[name], again[name]), f"{case} {name} differs from run to run"
            for name, error in check_results(case, x, got, dtype, truth, eager).items():
                worst[launch, name] = max(worst.get((launch, name), 0.0), error)
    for key, error in worst.items():
        line = " ".join((family, str(dtype)[6:], f"{K} {V}", *key))
        print(f"{error:.1e}  {line}")
        record_property(line, error)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES[2:])
def test_gpu_tf32(family):
    """TF32 keeps ten bits: as far from the truth as float16 operands."""
    case = Case(family, 130, "weak", B=1, H=2, K=40, V=72)
    x = on_gpu(make_inputs(case, torch.float32))
    truth = naive_results(case, x, torch.float64)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        got = run_kernels(x)
    finally:
        torch.set_float32_matmul_precision(before)
    for name, y in got.items():
        error = ((y - truth[name]).norm() / truth[name].norm()).item()
        print(f"{error:.1e}  {case} {name}")
        assert error < (2e-2 if name == "dg" else 2e-3), f"{name}: {error:.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES[2:])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_gpu_growing(family, size):
    """Every row of a decay's gradient, however small beside those of steps that grow."""
    dtype = torch.bfloat16
    for decay in (*GROWING, "valley"):
        case = Case(family, 130, decay, B=1, H=2, K=size, V=size)
        x = on_gpu(make_inputs(case, dtype))
        truth, eager = naive_results(case, x, torch.float64)["dg"], narrow_results(case, x, dtype)["dg"]
        tiles = {} if size < 256 else {"scans": scans_of(case, x, need_dg=True, few=False)}
        for how in ({}, tiles) if tiles else ({},):  # as the rule has it for few heads, and as for many
            got = run_kernels(x, **how)["dg"]
            check_where_finite(str(case), got, truth, eager.to(got.dtype), floor=4 * CAP[dtype], every_row=True)


@pytest.mark.gpu
def test_gpu_shared_chunks():
    """More chunks than an exact launch has programs, some out of range, some not."""
    dtype = torch.bfloat16
    case = Case("gla", 1030, "weak", B=4, H=16, K=72, V=136)  # values beyond what a walk has
    x = make_inputs(case, dtype)
    x = on_gpu(replace(x, g=torch.where(torch.rand(*x.g.shape[:3], 1) < 4e-3, -100.0, x.g)))
    got, again = run_kernels(x), run_kernels(x)
    few = decay_fused_gates.EXACT_PROGRAMS
    grids = [launch.grid for launch in decay_fused_gates._launches.values()]
    assert grids.count((few, 1, 1)) >= 2, f"what is out of range is shared by {few} programs: {grids}"
    for name in got:
        assert torch.equal(got[name], again[name]), f"{case} {name} differs from run to run"
    check_results(case, x, got, dtype, naive_results(case, x, torch.float64), narrow_results(case, x, dtype))


@pytest.mark.gpu
def test_gpu_strided_and_absent():
    """Views as inputs, no initial state, no gradient of the final state, decays in the operands' dtype."""
    case = Case("gla", 70, "strong", B=2, H=2, K=48, V=64)
    x = on_gpu(make_inputs(case, torch.bfloat16))
    g = x.g.bfloat16()
    q = x.q.transpose(1, 2).contiguous().transpose(1, 2)
    v = torch.stack([x.v, x.v], -1)[..., 0]
    zero = torch.zeros_like(x.h0)
    o, final = decay_triton.chunk_forward(q, x.k, v, g, None, SCALE)
    want = decay_triton.chunk_forward(x.q, x.k, x.v, g.float(), zero, SCALE)
    assert torch.equal(o, want[0]) and torch.equal(final, want[1])
    *grads, dh0 = decay_triton.chunk_backward(q, x.k, v, g, None, SCALE, x.do, None)
    wanted = decay_triton.chunk_backward(x.q, x.k, x.v, g.float(), zero, SCALE, x.do, zero)
    assert dh0 is None
    for got, y in zip(grads, wanted, strict=False):  # other code for absent gradients: other roundings
        assert (got - y).norm() <= 1e-3 * y.norm()


if __name__ == "__main__":
    interpret()

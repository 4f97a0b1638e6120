"""The Triton rows of the distillation losses: interpreted, compiled ahead of time, and on a GPU.

Run as a script (with TRITON_INTERPRET=1) this file is the interpreted part; pytest starts it in a process of its own,
since Triton decides at import whether it interprets.
"""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has no build for this system")

from interpreted import interpreted  # noqa: E402
from linear_kl_cases import CASES, KINDS, Case, check_results, make_operands, options, results  # noqa: E402
from machine_code import check_memory  # noqa: E402

from fla_compile.kernels import distillation_rows, distillation_triton, kl_div_rows, kl_div_triton  # noqa: E402
from fla_compile.kernels.cross_entropy_rows import RowLoss  # noqa: E402
from fla_compile.kernels.kl_div_rows import Divergence, Side  # noqa: E402
from fla_compile.kernels.linear_kl_div import linear_kl_div  # noqa: E402

SIZES = [(2, None), (50, None), (300, 128), (128, 128)]  # V, and the block where it is not the rule's


def check_rows(dtype, theirs, V, loss, biased, in_place, spread=3.0, block=None, device="cpu", n=4, confident=False):
    """The kernel against the same in torch operations in float64, from products of one type."""
    generator = torch.Generator().manual_seed(V)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    a, b = (spread * draw(n, V + 5).to(device, d) for d in (dtype, theirs))
    a, b = a[:, :V], b[:, :V]  # rows further apart than they are long
    bias, their_bias = draw(V).to(device, dtype), draw(V).to(device, theirs)
    if biased and V > 2:
        bias[1] = their_bias[1] = -torch.inf
    a[0], keep = torch.inf, torch.arange(n, device=device) % 3 != 0
    if not biased:
        keep, a[0] = None, 1.0
    sides = [Side(y, v if biased else None, s) for y, v, s in ((a, bias, 0.7), (b, their_bias, 1.3))]
    factor = draw(n).to(device)
    want = torch.full((n, V), torch.nan, dtype=torch.float64, device=device)
    exact = [Side(side.a.double(), side.bias, side.scale) for side in sides]
    truth = kl_div_rows.torch_rows(*exact, keep, factor.double(), loss, out=want)
    # The results lie as the products do: with another alignment the threads share a row, and its sums, otherwise.
    out = a.clone() if in_place else torch.full((n, V + 5), torch.nan, dtype=dtype, device=device)[:, :V]
    own = Side(out if in_place else a, sides[0].bias, sides[0].scale)
    before = kl_div_triton.block_of
    kl_div_triton.block_of = before if block is None else lambda V: (block, 4)
    kl_div_triton._launches.clear()  # they know no block
    try:
        alone = kl_div_triton.triton_rows(own, sides[1], keep, None, loss, out=None)
        got = kl_div_triton.triton_rows(own, sides[1], keep, factor, loss, out=out)
    finally:
        kl_div_triton.block_of = before
    assert torch.equal(alone, got)
    tolerance = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert (got.double() - truth).abs().max() <= 3e-6 * (1.0 + truth.abs().max())
    allowed = tolerance * want.abs().max()
    if confident:  # the gradient is the difference of two numbers near one: torch's rows in float32 round it as much
        plain = torch.empty((n, V), dtype=torch.float32, device=device)
        kl_div_rows.torch_rows(*sides, keep, factor, loss, out=plain)
        allowed = max(allowed, 3.0 * (plain.double() - want).abs().max())
    assert (out.double() - want).abs().max() <= allowed
    assert keep is None or out[::3].eq(0).all()


def check_both(dtype, theirs, V, loss, hard, biased, in_place, spread=3.0, block=None, device="cpu", n=12):
    """Both losses of a row, and their one gradient, against torch's rows in float64; row 0 counts for neither."""
    generator = torch.Generator().manual_seed(V)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    a, b = (spread * draw(n, V + 5).to(device, d)[:, :V] for d in (dtype, theirs))
    bias, their_bias = draw(V).to(device, dtype), draw(V).to(device, theirs)
    sides = [Side(y, v if biased else None, s) for y, v, s in ((a, bias, 0.7), (b, their_bias, 1.3))]
    i = torch.arange(n, device=device)
    keep = i % 3 != 0 if biased else None
    target = torch.randint(0, V, (n,), generator=generator).to(device)
    target[i % 6 == 0] = hard.ignore_index
    target[1] = hard.ignore_index
    if biased:
        b[3], a[0] = torch.nan, torch.inf  # what the divergence, or neither loss, may look at
    factors = draw(n, 2).to(device)
    want = torch.full((n, V), torch.nan, dtype=torch.float64, device=device)
    exact = [Side(side.a.double(), side.bias, side.scale) for side in sides]
    truth = distillation_rows.torch_rows(*exact, keep, target, factors.double(), loss, hard, out=want)
    out = a.clone() if in_place else torch.full((n, V + 5), torch.nan, dtype=dtype, device=device)[:, :V]
    own = Side(out if in_place else a, sides[0].bias, sides[0].scale)
    before = distillation_triton.block_of
    distillation_triton.block_of = before if block is None else lambda V: (block, 4)
    distillation_triton._launches.clear()  # they know no block
    try:
        alone = distillation_triton.triton_rows(own, sides[1], keep, target, None, loss, hard, out=None)
        got = distillation_triton.triton_rows(own, sides[1], keep, target, factors, loss, hard, out=out)
    finally:
        distillation_triton.block_of = before
    for first, y, exact in zip(alone, got, truth, strict=True):
        assert torch.equal(first, y)
        assert exact.isfinite().all() and (y.double() - exact).abs().max() <= 3e-6 * (1.0 + exact.abs().max())
    tolerance = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert (out.double() - want).abs().max() <= tolerance * want.abs().max()
    assert not biased or (out[0].eq(0).all() and got[0][::3].eq(0).all() and got[0][1] != 0 and got[1][1] == 0)


HARD = (RowLoss(), RowLoss(ignore_index=-1, label_smoothing=0.1, logit_scale=1.4, z_loss=0.02))


def interpret() -> None:
    for dtype, theirs in ((torch.float32, torch.float16), (torch.float16, torch.float32)):
        for i, kind in enumerate(KINDS):
            for V, block in SIZES:
                check_both(dtype, theirs, V, Divergence(kind, 0.3), HARD[(i + V) % 2], V != 50, V != 300, block=block)
                print("ok both", dtype, V, kind)
    for dtype, theirs in ((torch.float32, torch.float16), (torch.float16, torch.float32)):
        for kind in KINDS:
            for V, block in SIZES:
                loss = Divergence(kind, 0.5 if V == 50 else 0.3)
                check_rows(dtype, theirs, V, loss, biased=V != 50, in_place=V != 300, block=block)
                print("ok rows", dtype, V, loss)
    for kind in KINDS:
        check_rows(torch.float32, torch.float32, 300, Divergence(kind), False, True, spread=100.0, block=128)
        print("ok strong", kind)


@pytest.mark.slow
def test_interpreted():
    assert interpreted(__file__) == 2 * 2 * 4 * 4 + 4


def compile_kernel(arch, dtype, constants, warps, kernel=kl_div_triton.divergence_rows_kernel):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    narrow = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    wide = dict.fromkeys(("p_factor", "p_factors", "p_loss", "p_hard"), "*fp32")
    wide |= {"p_keep": "*i1", "p_target": "*i64"}
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
        elif name.startswith("p_"):
            signature[name] = wide.get(name, narrow)
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if name.startswith("stride") or name in ("V", "ignore_index") else "fp32"
            if name in ("stride_a", "stride_b", "stride_out"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})


def check_compiles(arch, V, dtype, kind, everything):
    block, warps = kl_div_triton.block_of(V)
    constants = dict(
        BLOCK=block, IS_WHOLE=V <= kl_div_triton.WHOLE, KIND=kind, HAS_BIAS=everything, HAS_THEIR_BIAS=everything,
        HAS_KEEP=everything, STORE=True,
    )  # fmt: skip
    compiled = compile_kernel(arch, dtype, constants, warps)
    check_memory(compiled, 16 * 1024)


@pytest.mark.parametrize("V", [256, 2048, 32000])
@pytest.mark.parametrize("arch", [80, 90])
def test_compiles(arch, V):
    """The one with most in registers; `test_compiles_all` has the others."""
    check_compiles(arch, V, torch.bfloat16, "jensen_shannon", True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("V", [256, 2048, 32000])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_all(arch, V, dtype, kind):
    for everything in (False, True):
        check_compiles(arch, V, dtype, kind, everything)


def check_both_compiles(arch, V, dtype, kind, everything):
    block, warps = distillation_triton.block_of(V)
    constants = dict(
        BLOCK=block, KIND=kind, HAS_BIAS=everything, HAS_THEIR_BIAS=everything, HAS_KEEP=everything,
        SMOOTHED=everything, STORE=True,
    )  # fmt: skip
    compiled = compile_kernel(arch, dtype, constants, warps, distillation_triton.distillation_rows_kernel)
    check_memory(compiled, 16 * 1024)


@pytest.mark.parametrize("V", [32000])
@pytest.mark.parametrize("arch", [80, 90])
def test_both_compile(arch, V):
    """The one with most in registers; `test_both_compile_all` has the others."""
    check_both_compiles(arch, V, torch.bfloat16, "jensen_shannon", True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("V", [256, 2048, 32000])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_both_compile_all(arch, V, dtype, kind):
    for everything in (False, True):
        check_both_compiles(arch, V, dtype, kind, everything)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("V", [2, 50, 4096, 4097, 32000, 128256])
def test_gpu_both(V, kind, dtype):
    for biased, hard in zip((False, True), HARD, strict=True):
        check_both(dtype, dtype, V, Divergence(kind, 0.3), hard, biased, biased, device="cuda", n=37)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("V", [2, 50, 4096, 4097, 32000, 50257, 128256])
def test_gpu_rows(V, kind, dtype):
    for biased in (False, True):
        for spread in (3.0, 30.0):
            own = dict(device="cuda", n=37, confident=spread > 3.0)
            check_rows(dtype, dtype, V, Divergence(kind, 0.3), biased, biased, spread, **own)


GPU_CASES = [
    *(case for case in CASES if case.name in ("all", "weighted-none", "reverse_kl-warm", "forward_kl-strong")),
    *(Case(f"long-{kind}", N=300, D=64, E=96, V=1000, bias=True, dropped=0.2, options=options(divergence=kind))
      for kind in KINDS),
    *(Case(f"odd-{kind}", N=130, D=72, E=64, V=50257, options=options(divergence=kind, temperature=2.0))
      for kind in KINDS),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu(case, dtype):
    """The whole operator, twice for determinism; float64 over torch's rows."""
    given = make_operands(case, dtype, "cuda")
    got = results(linear_kl_div, case, given, dtype)
    again = results(linear_kl_div, case, given, dtype)
    assert all(torch.equal(a, b) for a, b in zip(got.values(), again.values(), strict=True))
    check_results(case, given, got, dtype)


@pytest.mark.gpu
def test_gpu_memory():
    """Beside operands and gradients a call needs both layers' chunk of logits and the wider sums."""
    N, D, E, V = 16384, 256, 512, 32000
    made = lambda *shape: (torch.randn(shape, device="cuda") / shape[1] ** 0.5).bfloat16()  # noqa: E731
    x, weight, theirs, matrix = made(N, D), made(V, D), made(N, E), made(V, E)
    x.requires_grad_(), weight.requires_grad_()
    torch.autograd.grad(linear_kl_div(x, weight, theirs, matrix), (x, weight))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(linear_kl_div(x, weight, theirs, matrix), (x, weight))
    over = torch.cuda.max_memory_allocated() - before
    assert over <= 2 * (272 << 20) + 8 * weight.numel() + 2 * x.numel() + (8 << 20) < 2 * 2 * N * V


if __name__ == "__main__":
    interpret()

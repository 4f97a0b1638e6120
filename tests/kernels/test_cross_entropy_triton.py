"""The Triton kernels of the losses: interpreted, compiled ahead of time, and on a GPU.

Run as a script (with TRITON_INTERPRET=1) this file is the interpreted part; pytest starts it in a process of its own,
since Triton decides at import whether it interprets.
"""

from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has no build for this system")

from interpreted import interpreted  # noqa: E402
from linear_loss_cases import CASES, Case, check_results, make_operands, options, results  # noqa: E402
from machine_code import check_memory  # noqa: E402

from fla_compile.kernels import cross_entropy as over_logits  # noqa: E402
from fla_compile.kernels import cross_entropy_rows, cross_entropy_triton  # noqa: E402
from fla_compile.kernels.cross_entropy import cross_entropy, naive_cross_entropy  # noqa: E402
from fla_compile.kernels.cross_entropy_rows import RowLoss  # noqa: E402
from fla_compile.kernels.linear_cross_entropy import linear_cross_entropy, naive_linear_cross_entropy  # noqa: E402
from fla_compile.kernels.linear_cross_entropy_ops import forward_chunks  # noqa: E402
from fla_compile.kernels.linear_loss_chunks import Plan  # noqa: E402

ROW_LOSSES = [
    RowLoss(),
    RowLoss(label_smoothing=0.1, logit_scale=0.7),
    RowLoss(3, 0.2, 2.0, 1.3, 0.01),
]


def check_rows(dtype, n, V, loss, bias, in_place, block=None):
    """The kernel against the same in torch operations, from products of one type."""
    generator = torch.Generator().manual_seed(n * V)
    a = (3 * torch.randn(n, V + 5, generator=generator)).to(dtype)[:, :V]  # rows further apart than they are long
    target = torch.randint(0, V, (n,), generator=generator)
    target[::3] = loss.ignore_index
    a[n - 1] = torch.inf if target[n - 1] == loss.ignore_index else a[n - 1]
    scale = torch.rand(n, generator=generator)
    b = torch.randn(V, generator=generator).to(dtype) if bias else None
    want = torch.full((n, V), torch.nan, dtype=torch.float32)
    losses = cross_entropy_rows.torch_rows(a.double(), b, target, scale, loss, out=want)
    out = a.clone() if in_place else torch.full_like(a, torch.nan)
    given = out if in_place else a
    before = cross_entropy_triton.block_of
    cross_entropy_triton.block_of = before if block is None else lambda V: (block, 4)
    cross_entropy_triton._launches.clear()  # they know no block
    try:
        alone = cross_entropy_triton.triton_rows(given, b, target, None, loss, out=None)
        got = cross_entropy_triton.triton_rows(given, b, target, scale, loss, out=out)
    finally:
        cross_entropy_triton.block_of = before
    assert torch.equal(alone, got)
    tolerance = {torch.float32: 3e-6, torch.float16: 2e-3}[dtype]
    assert (got.double() - losses).abs().max() <= 3e-6 * (1.0 + losses.abs().max())
    assert (out.float() - want).abs().max() <= tolerance * want.abs().max()
    assert out[::3].eq(0).all()


def check_logits(device, dtype, reduction, V=70, **given):
    """The operator over a slice of logits whose rows lie apart, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    made = (3 * torch.randn(3, 6, V + 5, generator=generator)).to(device, dtype)
    target = torch.randint(0, V, (3, 5), generator=generator).to(device)
    target[1, 2:4] = given.get("ignore_index", -100)
    found = []
    for fn, given_type in ((cross_entropy, dtype), (naive_cross_entropy, torch.float64)):
        z = made.to(given_type).requires_grad_()
        loss = fn(z[:, :-1, :V], target, reduction=reduction, **given)
        found.append((loss, torch.autograd.grad(loss, z, torch.full_like(loss, -0.7))[0]))
    (loss, grad), (true, slope) = found
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert (loss - true).abs().max() <= 1e-5 * (1.0 + true.abs().max())
    assert grad.dtype == dtype and (grad.double() - slope).abs().max() <= tolerance * slope.abs().max()


OVER_LOGITS = [
    (torch.float32, "mean", {}),
    (torch.float32, "none", dict(ignore_index=3, label_smoothing=0.1, softcap=4.0, z_loss=0.01)),
    (torch.float16, "sum", dict(logit_scale=0.7)),
]


def interpret() -> None:
    over_logits.runs_triton = cross_entropy_rows.runs_triton = lambda x: True
    for dtype, reduction, given in OVER_LOGITS:
        check_logits("cpu", dtype, reduction, **given)
        print("ok logits", dtype, reduction)
    for dtype in (torch.float32, torch.float16):
        for loss in ROW_LOSSES:
            for V, block in ((2, None), (50, None), (300, 128), (128, 128), (1000, 256)):
                check_rows(dtype, 4, V, loss, bias=V != 50, in_place=V != 300, block=block)
                print("ok rows", dtype, V, loss)
    x = torch.randn(1000)
    for factor in (1.0, 0.5):
        y = x.clone()
        cross_entropy_triton.scale_in_place(y, torch.tensor(factor))
        assert torch.equal(y, x * factor)
        print("ok scale", factor)


def test_interpreted():
    assert interpreted(__file__) == 2 * 3 * 5 + 2 + len(OVER_LOGITS)


def compile_kernel(kernel, arch, dtype, constants, warps):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    narrow = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float16: "*fp16"}[dtype]
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
        elif name.startswith("p_"):
            wide = {"p_target": "*i64", "p_scale": "*fp32", "p_loss": "*fp32", "p_factor": "*fp32"}
            signature[name] = wide.get(name, narrow)
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            whole = name.startswith("stride") or name in ("V", "numel")
            signature[name] = "i64" if name == "ignore_index" else "i32" if whole else "fp32"
            if name in ("stride_a", "stride_out"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("V", [256, 4096, 32000, 128256])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles(arch, V, dtype):
    block, warps = cross_entropy_triton.block_of(V)
    for everything in (False, True):
        constants = dict(
            BLOCK=block, IS_WHOLE=block >= V, HAS_BIAS=everything, SOFTCAP=everything, SMOOTHED=everything,
            STORE=True,
        )  # fmt: skip
        compiled = compile_kernel(cross_entropy_triton.loss_rows_kernel, arch, dtype, constants, warps)
        check_memory(compiled, 16 * 1024)
    compiled = compile_kernel(cross_entropy_triton.scale_kernel, arch, dtype, dict(BLOCK=4096), 8)
    check_memory(compiled)


GPU_CASES = [
    *(case for case in CASES if case.name in ("none", "ignored-mean", "index", "smoothing-none", "weighted", "all")),
    Case("long", N=300, D=64, V=1000, bias=True, ignored=0.2),
    Case("odd", N=130, D=72, V=50257, options=options(label_smoothing=0.1)),
    Case("capped", N=70, D=64, V=40000, ignored=0.2, options=options(softcap=5.0, z_loss=1e-3, reduction="none")),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu(case, dtype):
    given = make_operands(case, dtype, "cuda")
    got = results(linear_cross_entropy, case, given, dtype)
    again = results(linear_cross_entropy, case, given, dtype)
    assert all(torch.equal(a, b) for a, b in zip(got.values(), again.values(), strict=True))
    check_results(case, given, got, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sums", [torch.float32, None], ids=["wide", "own"])
def test_gpu_chunks(dtype, sums):
    """Several chunks and a shorter last one, dW summed in float32 and in its own type."""
    if sums is None and dtype != torch.bfloat16:
        sums = torch.float32
    case = Case("chunks", N=1000, D=136, V=517, bias=True, ignored=0.2)
    given = make_operands(case, dtype, "cuda")

    def chunked(x, weight, target, *, bias, row_weight):
        plan = Plan(300, sums or dtype)
        found = forward_chunks(x, weight, bias, target, row_weight, RowLoss(), "mean", (True, True, True), plan)
        return [y.detach() for y in found]

    loss, dx, dw, db = chunked(given.x, given.weight, given.target, bias=given.bias, row_weight=None)
    scaled = [y * given.dloss.to(y.dtype) for y in (dx, dw, db)]
    got = dict(zip(("loss", "dx", "dweight", "dbias"), (loss, *(y.to(dtype) for y in scaled)), strict=True))
    check_results(case, given, got, dtype)


@pytest.mark.gpu
def test_gpu_edges():
    """All targets ignored, a kept graph, a factor that is not one, and a frozen weight."""
    x = torch.randn(40, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16)
    none = torch.full((40,), -100, device="cuda")
    loss = linear_cross_entropy(x, weight, none)
    assert loss.isnan() and torch.autograd.grad(loss, x)[0].eq(0).all()
    target = torch.arange(40, device="cuda")
    loss = linear_cross_entropy(x, weight, target)
    first = torch.autograd.grad(loss, x, torch.tensor(3.0, device="cuda"), retain_graph=True)[0]
    again = torch.autograd.grad(loss, x, torch.tensor(3.0, device="cuda"), retain_graph=True)[0]
    last = torch.autograd.grad(loss, x, torch.tensor(0.5, device="cuda"))[0]
    assert torch.equal(first, again) and torch.allclose(6 * last.float(), first.float(), rtol=2e-2, atol=1e-6)
    truth = x.detach().double().requires_grad_()
    want = torch.autograd.grad(0.5 * naive_linear_cross_entropy(truth, weight.double(), target), truth)[0]
    assert (last.double() - want).norm() / want.norm() < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("V", [70, 5000, 40000])
@pytest.mark.parametrize(("dtype", "reduction", "given"), [*OVER_LOGITS, (torch.bfloat16, "mean", {})], ids=str)
def test_gpu_logits(dtype, reduction, given, V):
    check_logits("cuda", dtype, reduction, V, **given)


@pytest.mark.gpu
def test_gpu_memory_over_logits():
    """Eager: one tensor of the logits' size, the gradient."""
    z = torch.randn(1024, 32000, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(0, 32000, (1024,), device="cuda")
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(cross_entropy(z, target) * 0.5, z)
        over = torch.cuda.max_memory_allocated() - before
    assert over <= 2 * z.numel() + (1 << 20)


@pytest.mark.gpu
def test_gpu_memory():
    """Logits never exist whole: what a call needs beside operands and gradients is the chunk and the wider sums."""
    N, D, V = 4096, 512, 32000
    x = torch.randn(N, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(V, D, device="cuda") / D**0.5).bfloat16().requires_grad_()
    target = torch.randint(0, V, (N,), device="cuda")
    plan = Plan(512, torch.float32)
    with torch.no_grad():
        args = x, weight, None, target, None, RowLoss(), "mean", (True, True, False), plan
        forward_chunks(*args)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_chunks(*args)
        over = torch.cuda.max_memory_allocated() - before
    gradients = 2 * (x.numel() + weight.numel())
    assert over - gradients <= 2 * 512 * V + 2 * weight.numel() + (8 << 20)


@pytest.mark.gpu
def test_gpu_compiled():
    case = replace(GPU_CASES[1], name="compiled")
    given = make_operands(case, torch.bfloat16, "cuda")
    compiled = torch.compile(lambda *a, **kw: linear_cross_entropy(*a, **kw), fullgraph=True)
    check_results(case, given, results(compiled, case, given, torch.bfloat16), torch.bfloat16)


if __name__ == "__main__":
    interpret()

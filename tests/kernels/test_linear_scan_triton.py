"""The Triton kernels of the elementwise recurrence: interpreted, compiled ahead of time, and on a GPU."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has no build for this system")

from budget import check_budget  # noqa: E402
from interpreted import interpreted  # noqa: E402
from machine_code import check_memory  # noqa: E402
from test_linear_scan import NAMES, TAME, Case, _inputs, _results  # noqa: E402

from fla_compile.kernels import linear_scan_triton as module  # noqa: E402
from fla_compile.kernels.linear_scan import kernel_name, linear_scan, naive_linear_scan  # noqa: E402

SIZES = [Case(1, D=5), Case(32, D=32), Case(65, D=40, B=1)]
FACTORS = [Case(40, factor, B=1, D=3) for factor in (*TAME, "explosive")]


def inputs_of(case, dtype, a_dtype=None, device="cpu"):
    tame = Case(case.T, "signed", case.B, case.D) if case.factor == "explosive" else case
    x, a, *others = _inputs(tame, dtype, a_dtype)
    if case.factor == "explosive":  # grows beyond what blocks may, and is lost again: as good as in the loop
        a[:, ::5], a[:, 3::5] = 1e3, 0.0
    return [y.to(device) for y in (x, a, *others)]


def run_kernels(x, a, h0, dh, dht, need_da=True):
    """All results by name, with every allocation the launchers make filled with NaN."""
    empty, wide = torch.empty, torch.promote_types(x.dtype, torch.float32)
    torch.empty = lambda *args, **how: empty(*args, **how).fill_(torch.nan)
    try:
        h, final = module.forward(x, a, h0, wide)
        dx, da, dh0 = module.backward(h if x.dtype == wide else x, a, h0, dh, dht, need_da, wide)
    finally:
        torch.empty = empty
    return dict(zip(NAMES, (h, final, dx, da, dh0), strict=True))


def check(case, got, inputs):
    eager = _results(naive_linear_scan, *inputs)
    truth = _results(naive_linear_scan, *(y.double() for y in inputs))
    for name, y in got.items():
        kind = "forward" if name in ("h", "final_state") else "backward"
        check_budget(f"{case} {name}", y, truth[name], eager[name].to(y.dtype), kind)


def interpret() -> None:
    for case in (*SIZES, *FACTORS):
        inputs = inputs_of(case, torch.float32)
        check(case, run_kernels(*inputs), inputs)
        print("ok", case)
    half = torch.float16
    for case, *dtypes in ((FACTORS[1], torch.float64), (SIZES[2], half), (FACTORS[2], half, torch.float32)):
        inputs = inputs_of(case, *dtypes)
        check(case, run_kernels(*inputs), inputs)
        print("ok", case, *dtypes)
    # views, nothing given that may be absent, and no gradient of a
    x, a, _, dh, _ = inputs_of(Case(34, D=3), torch.float32)
    slices = [torch.stack([y, y], 2)[:, :, 0] for y in (x, a, dh)]
    found = run_kernels(slices[0], slices[1].mT.contiguous().mT, None, slices[2], None, need_da=False)
    zero = torch.zeros(2, 3)
    want = run_kernels(x, a, zero, dh, zero)
    assert found.pop("da") is None and all(torch.equal(y, want[name]) for name, y in found.items())
    print("ok views")


def test_interpreted():
    assert interpreted(__file__) == len(SIZES) + len(FACTORS) + 4


def test_names():
    assert kernel_name("cuda") == "scan (Triton)" and kernel_name("cpu") == "scan in blocks"


POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64"}
WIDE = {"p_h0", "p_final", "p_kept", "p_dht", "p_dh0"}
FLAGS = {"HAS_STATE": True, "HAS_DHT": True, "NEED_DA": True}


@pytest.mark.parametrize("dtype", list(POINTERS), ids=str)
@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100))])
def test_compiles(arch, dtype):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    wide = torch.promote_types(dtype, torch.float32)
    launches = [(module.linear_scan_forward_kernel, {"KEEP": keep}) for keep in (False, dtype != wide)]
    launches.append((module.linear_scan_backward_kernel, {"AGAIN": dtype != wide}))
    for kernel, constants in launches:
        constants = {"BD": module.COLUMNS, "ROWS": module.ROWS, **FLAGS, **constants}
        if constants.get("KEEP") is False:
            constants["p_kept"] = None
        signature, values = {}, {}
        for i, name in enumerate(kernel.arg_names):
            if name in constants:
                signature[name], values[(i,)] = "constexpr", constants[name]
            elif name.startswith("p_"):
                signature[name] = POINTERS[wide if name in WIDE else dtype]
            else:
                signature[name] = "i32"
        target = GPUTarget("cuda", arch, 32)
        compiled = triton.compile(ASTSource(kernel, signature, values), target=target, options={"num_warps": 1})
        check_memory(compiled)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(POINTERS), ids=str)
def test_gpu(dtype):
    for case in (*SIZES, *FACTORS, Case(1000, "decay", B=3, D=129)):
        if case.factor == "explosive" and dtype.itemsize == 2:
            continue
        inputs = inputs_of(case, dtype, device="cuda")
        got, again = run_kernels(*inputs), run_kernels(*inputs)
        assert all(torch.equal(y, again[name]) for name, y in got.items())
        check(case, got, inputs)


@pytest.mark.gpu
def test_gpu_graph():
    """No host waits for a number: a CUDA graph captures forward and backward."""
    x, a, h0, *_ = (y.requires_grad_() for y in inputs_of(Case(130, "decay", D=64), torch.float32, device="cuda"))
    want = _results(linear_scan, x, a, h0, x, h0)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        got = _results(linear_scan, x, a, h0, x.detach(), h0.detach())
    graph.replay()
    assert all(torch.equal(y, want[name]) for name, y in got.items())


if __name__ == "__main__":
    interpret()

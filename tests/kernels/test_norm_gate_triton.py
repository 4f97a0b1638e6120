"""The Triton kernels of norm times gate: interpreted, compiled ahead of time, and on a GPU.

Run as a script (with TRITON_INTERPRET=1) this file is the interpreted part; pytest starts it in a process of its own,
since Triton decides at import whether it interprets.
"""

import itertools

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has no build for this system")

from budget import check_budget  # noqa: E402
from interpreted import interpreted  # noqa: E402
from machine_code import check_memory  # noqa: E402
from norm_gate_cases import CASES, Case, make_inputs, naive_results, results  # noqa: E402

from fla_compile.kernels import norm_gate_triton  # noqa: E402
from fla_compile.kernels.norm_gate_configs import Config, all_configs, config_for  # noqa: E402
from fla_compile.kernels.norm_gate_forms import Form  # noqa: E402

SMALL = Config(4, 4, 4, 4, 2)


def run_kernels(case, x, dtype, config=None):
    """All results by name, with every allocation the launchers make filled with NaN."""
    empty, empty_like = torch.empty, torch.empty_like
    torch.empty = lambda *a, **kw: empty(*a, **kw).fill_(torch.nan)
    torch.empty_like = lambda *a, **kw: empty_like(*a, **kw).fill_(torch.nan)
    try:
        y, rstd, mean = norm_gate_triton.launch_forward(x.x, x.gate, x.weight, x.bias, case.form, dtype, config)
        dx, dg, dw, db, again = norm_gate_triton.launch_backward(
            x.x, x.gate, x.weight, x.bias, rstd, mean, x.dy, case.form, dtype, config
        )
    finally:
        torch.empty, torch.empty_like = empty, empty_like
    assert torch.equal(y, again) or (y - again).float().abs().max() <= 1e-2 * y.float().abs().max()
    found = {"y": y, "dx": dx, "dgate": dg, "dweight": dw, "dbias": db}
    return {name: z for name, z in found.items() if z is not None}


def check_case(case, dtype, config=None, device="cpu"):
    x = make_inputs(case, dtype, device)
    got, truth, eager = run_kernels(case, x, dtype, config), naive_results(case, x, torch.float64), results(case, x)
    assert set(got) == set(truth)
    for name, y in got.items():
        check_budget(f"{case} {name}", y, truth[name], eager[name], "forward" if name == "y" else "backward")
    return x, got


def interpret() -> None:
    norm_gate_triton.multiprocessors = lambda device: 1
    for dtype, case in itertools.product((torch.float32, torch.float16), CASES):
        check_case(case, dtype, SMALL)
        print("ok", dtype, case)


def test_interpreted():
    assert interpreted(__file__) == 2 * len(CASES)


def test_every_width_has_a_row():
    for width, nbytes in itertools.product((1, 17, 64, 65, 2048, 4096), (2, 4)):
        assert config_for(width, nbytes).rows >= 1


@pytest.mark.parametrize(
    ("shape", "strides", "width", "rows"),
    [
        ((4, 6, 8), (48, 8, 1), 8, (1, 8, 8)),
        ((4, 6, 8), (48, 8, 1), 4, (1, 4, 4)),
        ((4, 6, 8), (120, 20, 1), 8, (1, 20, 8)),
        ((4, 6, 8), (120, 20, 1), 4, (2, 20, 4)),
        ((4, 6, 8), (200, 20, 1), 8, (6, 200, 20)),
        ((1, 6, 8), (999, 20, 1), 8, (1, 20, 8)),
    ],
    ids=["dense", "dense-heads", "slice", "slice-heads", "slice-of-slice", "one"],
)
def test_rows_are_addressed_in_place(shape, strides, width, rows):
    storage = torch.randn(2000)
    x = storage.as_strided(shape, strides)
    same, count, outer, inner = norm_gate_triton.as_rows(x, width)
    assert same is x and (count, outer) == rows[:2] and (count == 1 or inner == rows[2])
    at = [(r // count) * outer + (r % count) * inner for r in range(x.numel() // width)]
    assert torch.equal(torch.stack([storage[i : i + width] for i in at]), x.reshape(-1, width))


@pytest.mark.parametrize(
    ("shape", "strides", "width"), [((4, 6, 8), (200, 20, 1), 4), ((4, 8), (1, 4), 8)], ids=["three levels", "columns"]
)
def test_other_layouts_are_copied(shape, strides, width):
    x = torch.randn(2000).as_strided(shape, strides)
    dense, count, outer, _ = norm_gate_triton.as_rows(x, width)
    assert dense.is_contiguous() and torch.equal(dense, x) and (count, outer) == (1, width)


def compile_kernel(kernel, arch, width, nbytes, config, form):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    forward = kernel is norm_gate_triton.norm_gate_forward_kernel
    constants = dict(
        D=width, BR=config.rows if forward else config.backward_rows, BD=triton.next_power_of_2(width),
        LAYER=form.layer, SILU=form.silu, GATE_FIRST=form.gate_first, HAS_W=True, HAS_B=form.layer,
    )  # fmt: skip
    constants |= {"GROUPED": form.layer} if forward else {"STORE_Y": True}
    constants |= {} if form.layer else {"p_mean": None, "p_b": None, "p_db": None}
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
        elif name.startswith("p_"):
            wide = name in ("p_w", "p_b", "p_rstd", "p_mean", "p_dw", "p_db")
            signature[name] = "*fp32" if wide or nbytes == 4 else "*bf16"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
            if name.endswith(("outer", "inner")):
                attributes[(i,)] = [["tt.divisibility", 16]]
    options = {"num_warps": config.num_warps if forward else config.backward_warps}
    return triton.compile(
        ASTSource(kernel, signature, values, attributes), target=GPUTarget("cuda", arch, 32), options=options
    )


def ahead_of_time():
    for arch, (width, nbytes, config) in itertools.product((80, 90, 100), all_configs()):
        for layer in (False, True):
            quick = width in (128, 2048) and nbytes == 2 and arch == 90
            name = f"sm{arch}-{width}-{8 * nbytes}bit-{'layer' if layer else 'rms'}"
            yield pytest.param(arch, width, nbytes, config, layer, id=name, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("arch", "width", "nbytes", "config", "layer"), list(ahead_of_time()))
def test_compiles(arch, width, nbytes, config, layer):
    for kernel in (norm_gate_triton.norm_gate_forward_kernel, norm_gate_triton.norm_gate_backward_kernel):
        compiled = compile_kernel(kernel, arch, width, nbytes, config, Form(width, 1e-5, layer, True, False))
        check_memory(compiled, 48 * 1024)
        if width * nbytes >= 128:
            assert "ld.global.v4.b32" in compiled.asm["ptx"], f"{kernel.fn.__name__}: loads of less than 16 bytes"


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_sum_of_parts_compiles(arch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, (rows, columns) = norm_gate_triton.sum_parts_kernel.arg_names, norm_gate_triton.SUM_TILE
    types = ["*fp32", "*fp32", "*bf16", "*bf16", "i32", "i32", *["constexpr"] * 3]
    constants = {(6,): rows, (7,): columns, (8,): True}
    attributes = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 3, 5)}
    source = ASTSource(
        norm_gate_triton.sum_parts_kernel, dict(zip(names, types, strict=True)), constants, attributes
    )  # fmt: skip
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 8})
    check_memory(compiled, 48 * 1024)
    assert "ld.global.v4.b32" in compiled.asm["ptx"]


ON_GPU = {
    torch.bfloat16: [
        Case(4099, 64),
        Case(2051, 128, groups=3, per_head=True, layout="slices"),
        Case(1025, 256, affine="wb", norm="layer", groups=2, activation="sigmoid"),
        Case(513, 512, gate_first=True),
        Case(515, 1000, affine=""),
        Case(1300, 2048, affine="wb", norm="layer"),
        Case(131, 4096, gate_first=True, norm="layer"),
    ],
    torch.float16: [Case(2051, 128)],
    torch.float32: [*CASES, Case(20000, 128), Case(70, 4096, affine="wb", norm="layer")],
}


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "case"), [(d, c) for d, cases in ON_GPU.items() for c in cases], ids=str)
def test_gpu(dtype, case):
    """Against float64, and the same bits in a second run."""
    x, got = check_case(case, dtype, device="cuda")
    again = run_kernels(case, x, dtype)
    assert all(torch.equal(got[name], again[name]) for name in got)


@pytest.mark.gpu
def test_gpu_launched_by_layout():
    """What was compiled for one layout serves new tensors, and no other size, alignment, type or epsilon."""
    cases = [Case(33, 64, affine=a, norm=norm) for a, norm in (("", "rms"), ("b", "rms"), ("wb", "layer"))]
    cases += [Case(33, 64), Case(33, 64, eps=0.1), Case(1, 64), Case(48, 16), Case(33, 64, groups=2, layout="slices")]
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for dtype, case, device in itertools.product((torch.float32, torch.bfloat16), cases, devices):
        for seed in range(3):
            x = make_inputs(case, dtype, device)
            x.x, x.gate, x.dy = (y.roll(seed, 0) for y in (x.x, x.gate, x.dy)) if seed else (x.x, x.gate, x.dy)
            check_results(case, x)
            for name in ("x", "gate", "weight", "bias", "dy") if dtype == torch.bfloat16 else ():
                y = getattr(x, name)
                if y is not None:
                    shifted = torch.empty(y.numel() + 1, dtype=y.dtype, device=device)[1:].view(y.shape)
                    setattr(x, name, shifted.copy_(y))
                    check_results(case, x)


def check_results(case, x):
    from fla_compile.ops import norm_gate

    got, truth, eager = results(case, x, norm_gate), naive_results(case, x, torch.float64), results(case, x)
    for name, y in got.items():
        check_budget(f"{case} {name}", y, truth[name], eager[name], "forward" if name == "y" else "backward")


@pytest.mark.gpu
@pytest.mark.parametrize("warm", [False, True], ids=["first launch before", "launched twice before"])
def test_gpu_graph(warm):
    """Captured after Triton compiled it, or after what it compiled was launched; replayed on new operands."""
    from fla_compile.ops import norm_gate

    case = Case(513, 96, affine="wb", norm="layer", eps=0.01 + warm)  # not a form that another test has launched
    x = make_inputs(case, torch.bfloat16, "cuda")
    leaves = [y.detach().requires_grad_() for y in (x.x, x.gate, x.weight, x.bias)]

    def step():
        y = norm_gate(*leaves, norm="layer", eps=case.eps)
        return y.detach(), *torch.autograd.grad(y, leaves, x.dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(1 + warm):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for _ in range(3):
        with torch.no_grad():
            leaves[0].neg_()
            x.dy.mul_(0.5)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, step(), strict=True))


@pytest.mark.gpu
def test_gpu_operators():
    """The operators run these kernels, take what the kernels do not, and agree with the CPU's."""
    from fla_compile.ops import norm_gate, norm_gate_linear

    for dtype, width in ((torch.float32, 64), (torch.float64, 64), (torch.float32, 5000)):
        case = Case(33, width, affine="wb", norm="layer")
        found = {}
        for device in ("cpu", "cuda"):
            x = make_inputs(case, dtype, device)
            found[device] = results(case, x, norm_gate)
        for name, y in found["cpu"].items():
            torch.testing.assert_close(found["cuda"][name].cpu(), y, rtol=1e-4, atol=1e-4)
    case = Case(33, 64, groups=2)
    x = make_inputs(case, torch.bfloat16, "cuda")
    linear = torch.randn(48, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    leaves = [y.detach().requires_grad_() for y in (x.x, x.gate, x.weight)]
    out = norm_gate_linear(*leaves, None, linear, width=64)
    want = norm_gate(*leaves, width=64) @ linear.T
    dout = torch.randn_like(out)
    got, expected = (torch.autograd.grad(y, [*leaves, linear], dout) for y in (out, want))
    for a, b in zip(got, expected, strict=True):
        assert (a - b).float().norm() <= 1e-2 * b.float().norm()


@pytest.mark.gpu
def test_gpu_beyond_int32():
    """Elements behind the first 2^31."""
    case, rows = Case(1, 128), 2**31 // 128 + 100
    x, gate = (torch.randn(rows, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    y, rstd, _ = norm_gate_triton.launch_forward(x, gate, None, None, case.form, torch.bfloat16)
    dx, dg, *_ = norm_gate_triton.launch_backward(x, gate, None, None, rstd, None, y, case.form)
    last = slice(rows - 64, rows)
    small = [z[last].contiguous() for z in (x, gate)]
    want, rstd, _ = norm_gate_triton.launch_forward(*small, None, None, case.form, torch.bfloat16)
    slopes = norm_gate_triton.launch_backward(*small, None, None, rstd, None, want, case.form)
    for a, b in ((y, want), (dx, slopes[0]), (dg, slopes[1])):
        assert torch.equal(a[last], b)


if __name__ == "__main__":
    interpret()

"""The Triton kernels of the short convolution: interpreted, compiled ahead of time, and on a GPU.

Run as a script (with TRITON_INTERPRET=1) this file is the interpreted part; pytest starts it in a process of its own,
since Triton decides at import whether it interprets.
"""

from itertools import product

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has no build for this system")

from budget import check_budget  # noqa: E402
from interpreted import interpreted  # noqa: E402
from machine_code import check_memory  # noqa: E402
from short_conv_cases import Case, make_gradients, make_operands, truth_and_eager  # noqa: E402

from fla_compile.kernels import short_conv_kernels, short_conv_triton  # noqa: E402
from fla_compile.kernels.short_conv_naive import naive_short_conv_step  # noqa: E402
from fla_compile.kernels.short_conv_triton import SUM_TILE, TABLE, Config, config_for  # noqa: E402


def run_kernels(case, operands, forward=None, backward=None):
    """y and the gradients by name, with every allocation the launchers make filled with NaN."""
    x, weight = operands["x"], operands["weight"]
    bias, residual, state = (operands.get(n) for n in ("bias", "residual", "initial_state"))
    silu, cu = case.activation == "silu", case.cu_seqlens
    dy, _ = make_gradients(case, operands)
    empty = torch.empty
    torch.empty = lambda *a, **kw: empty(*a, **kw).fill_(torch.nan)
    try:
        y = short_conv_triton.forward(x, weight, bias, residual, state, silu, cu, forward)
        grads = short_conv_triton.backward(x, weight, bias, state, silu, cu, dy, state is not None, backward)
    finally:
        torch.empty = empty
    dx, dweight, dbias, dh = grads
    found = {"y": y, "dx": dx, "dweight": dweight.to(weight.dtype)}
    if bias is not None:
        found["dbias"] = dbias.to(bias.dtype)
    if state is not None:
        found["dinitial_state"] = dh.to(state.dtype)
    return found


def check(case, operands, got):
    truth, eager = truth_and_eager(case, operands, final=False)
    for name, y in got.items():
        check_budget(f"{case} {name}", y, truth[name], eager[name], "forward" if name == "y" else "backward")


# Narrow, so that two blocks of columns and two segments of steps are few programs.
CASES = [
    Case(W=4, T=33, B=1, D=9),
    Case(W=4, D=9, lengths=(1, 25, 2, 5), parts=("initial_state",)),
    Case(W=2, T=1, D=9),
    Case(W=8, T=34, B=1, D=5),
    Case(W=8, T=3, D=9),
    Case(W=3, T=33, B=1, D=1, activation=None, parts=()),
    Case(W=4, T=9, D=9, parts=("residual",), scale=30.0),
    Case(W=7, D=5, lengths=(1, 2, 33, 7), parts=("initial_state",)),
    Case(W=4, D=5, lengths=(30, 1, 7), parts=("bias",)),
    Case(W=2, T=1, B=SUM_TILE[0] + 1, D=3, parts=("bias",)),
]
NARROW = CASES[:2]


def interpret() -> None:
    for dtype, cases in ((torch.float32, CASES), (torch.float16, NARROW)):
        for case in cases:
            operands = make_operands(case, dtype)
            check(case, operands, run_kernels(case, operands, Config(8, 3, 1), Config(8, 4, 1)))
            print("ok", dtype, case)
    step_on("cpu")


def step_on(device: str) -> None:
    for W, parts in ((2, ()), (4, ("bias", "residual"))):
        operands = make_operands(Case(W=W, T=1, B=3, D=20, parts=(*parts, "initial_state")), torch.float32, device)
        x, weight, state = operands["x"][:, 0], operands["weight"], operands["initial_state"]
        bias, residual = operands.get("bias"), operands["residual"][:, 0] if parts else None
        own = state.clone()
        y = short_conv_triton.step(x, own, weight, bias, residual, True)
        want = naive_short_conv_step(x, state, weight, bias, activation="silu", residual=residual)
        torch.testing.assert_close(y, want)
        assert torch.equal(own, state)
        print("ok step", W)


def test_interpreted():
    assert interpreted(__file__) == len(CASES) + len(NARROW) + 2


def test_every_width_has_a_row():
    assert {W for _, _, W in TABLE} == {4, short_conv_triton.LARGEST_WIDTH}
    for kernel, nbytes, W in product(("forward", "backward"), (2, 4), range(2, 9)):
        assert config_for(kernel, nbytes, W) in TABLE.values()


POINTERS = {2: "*bf16", 4: "*fp32"}
FLAGS = dict(SILU=True, HAS_BIAS=True, HAS_RESIDUAL=True, HAS_STATE=True)


def compile_kernel(kernel, nbytes, W, arch, packed):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    config = config_for("forward" if kernel == "forward" else "backward", nbytes, W)
    function = getattr(short_conv_kernels, f"short_conv_{kernel}_kernel")
    given = dict(FLAGS, W=W, BD=config.block_d, ROWS=config.rows, PACKED=packed)
    if kernel == "sum":
        given |= {"BP": SUM_TILE[0], "BD": SUM_TILE[1]}
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if name in given or (not packed and name in ("p_pos", "p_seq", "p_cu")):
            signature[name], values[(i,)] = "constexpr", given.get(name)
        elif name.startswith("p_"):
            own = dict.fromkeys(("p_pos", "p_seq", "p_cu"), "*i32") | dict.fromkeys(
                ("p_dw", "p_dh", "p_parts"), "*fp32"
            )
            signature[name] = own.get(name, POINTERS[nbytes])
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if name not in ("T", "SEG", "parts"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": config.num_warps})


def ahead_of_time():
    kernels = [(k, n, W) for k, n, W in product(("forward", "backward"), (2, 4), (4, 8))]
    kernels += [("state_grad", 2, 8), ("step", 2, 4), ("step", 4, 8), ("sum", 2, 4), ("sum", 4, 8)]
    for (kernel, nbytes, W), arch, packed in product(kernels, (80, 90, 100), (False, True)):
        if packed and kernel in ("step", "sum"):
            continue
        quick = arch == 90 and nbytes == 2 and W == 4 and not packed
        marks = [] if quick else pytest.mark.slow
        name = f"{kernel}-{8 * nbytes}bit-W{W}-sm{arch}{'-packed' * packed}"
        yield pytest.param(kernel, nbytes, W, arch, packed, id=name, marks=marks)


@pytest.mark.parametrize(("kernel", "nbytes", "W", "arch", "packed"), list(ahead_of_time()))
def test_compiles(kernel, nbytes, W, arch, packed):
    compiled = compile_kernel(kernel, nbytes, W, arch, packed)
    check_memory(compiled, 16 * 1024)


GPU_CASES = {
    torch.bfloat16: [
        *(Case(W=W, T=T, D=264) for W in (2, 4, 8) for T in (1, 63, 64, 65, 1000)),
        Case(W=3, T=130, D=100),
        Case(W=4, T=300, D=1024, activation=None, parts=()),
        Case(W=4, T=300, D=264, scale=30.0),
        Case(W=4, T=2000, D=2048, B=4, parts=()),  # segments of more than the fewest steps
        Case(W=4, D=264, lengths=(1, 64, 500, 2, 3, 300), parts=("bias",)),
        Case(W=8, D=264, lengths=(1, 64, 500, 2, 3, 300)),
    ],
    torch.float16: [Case(W=4, T=65, D=264), Case(W=4, D=264, lengths=(5, 64, 2))],
    torch.float32: [*(Case(W=W, T=65, D=264) for W in (4, 8)), Case(W=4, D=264, lengths=(5, 64, 2))],
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_CASES, ids=str)
def test_gpu(dtype):
    for case in GPU_CASES[dtype]:
        operands = make_operands(case, dtype, "cuda")
        got, again = run_kernels(case, operands), run_kernels(case, operands)
        for name in got:
            assert torch.equal(got[name], again[name]), f"{case} {name} differs from run to run"
        check(case, operands, got)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["chunk", "channels_first"])
def test_gpu_strided(layout):
    """x as half of a projection, or as [B, D, T] seen from the side."""
    case = Case(W=4, T=130, D=256, parts=("residual",))
    operands = make_operands(case, torch.bfloat16, "cuda")
    want = run_kernels(case, operands)
    for name in ("x", "residual"):
        x = operands[name]
        chunked = torch.cat([x, x], -1).chunk(2, -1)[1]
        operands[name] = chunked if layout == "chunk" else x.transpose(1, 2).contiguous().transpose(1, 2)
        assert not operands[name].is_contiguous()
    got = run_kernels(case, operands)
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.gpu
def test_gpu_step():
    step_on("cuda")


if __name__ == "__main__":
    interpret()

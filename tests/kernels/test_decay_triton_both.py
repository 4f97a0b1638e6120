"""Decays over keys and values together on the Triton kernels: interpreted, compiled ahead of time, and on a GPU.

Run as a script (with TRITON_INTERPRET=1) this file is the interpreted part; pytest starts it in a process of its own,
as for `test_decay_triton`.
"""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has no build for this system")

from decay_ahead import POINTERS, STACK, WIDE  # noqa: E402
from decay_cases import SCALE, Case, Inputs, make_inputs, naive_results, results  # noqa: E402
from interpreted import interpreted  # noqa: E402
from machine_code import check_memory  # noqa: E402
from test_decay_triton import check_results, on_gpu  # noqa: E402
from test_decay_triton_values import narrow_results  # noqa: E402

from fla_compile import explain, ops  # noqa: E402
from fla_compile.kernels import decay_cpu, decay_naive, decay_ops, decay_triton_both, decay_values  # noqa: E402
from fla_compile.kernels.decay_checks import both_kernels_for  # noqa: E402
from fla_compile.kernels.decay_configs import BOTH, Config  # noqa: E402
from fla_compile.kernels.decay_scan_both import chunk_scan_both_kernel, step_scan_both_kernel  # noqa: E402

NAMES = ("o", "final_state", "dq", "dk", "dv", "dg", "dgv", "dh0")
SUMS = -1  # beside the parts of a pass: what segments add to the state
TILE = Config(16, 32, 16, 4, 1, 0)
# Of packed passes beside what the table says, by architecture.
PACKED_STACK = {100: 16}


def both_case(T, decay="strong", value_decay="weak", B=1, H=1, K=8, V=8):
    return Case("gla_both", T, decay, B=B, H=H, K=K, V=V, value_decay=value_decay)


def run_kernels(x, **how):
    """All results by name, with every allocation the launchers make filled with NaN."""
    empty, empty_like = torch.empty, torch.empty_like
    torch.empty = lambda *a, **kw: empty(*a, **kw).fill_(torch.nan)
    torch.empty_like = lambda *a, **kw: empty_like(*a, **kw).fill_(torch.nan)
    gates = x.g, x.gv, x.h0, SCALE
    try:
        found = decay_triton_both.chunk_forward(x.q, x.k, x.v, *gates, **how)
        found += decay_triton_both.chunk_backward(x.q, x.k, x.v, *gates, x.do, x.dht, **how)
    finally:
        torch.empty, torch.empty_like = empty, empty_like
    return dict(zip(NAMES, found, strict=True))


def check(case, x, dtype, **how):
    """Holds every result to the budget; on a GPU runs twice alike, and prints the relative rms errors."""
    truth = naive_results(case, x, torch.float64)
    eager = naive_results(case, x, dtype) if dtype == torch.float32 else narrow_results(x, dtype, NAMES)
    got = run_kernels(x, **how)
    errors = check_results(case, x, got, dtype, truth, eager)
    if x.q.is_cuda:
        print(case, dtype, how, *(f"{name} {error:.1e}" for name, error in errors.items()))
        again = run_kernels(x, **how)
        assert all(torch.equal(y, again[name]) for name, y in got.items()), f"{case} differs from run to run"


def interpret() -> None:
    """Small shapes with several blocks of columns and of time, by products, by steps and by both."""
    for case, dtype, segments in (
        (both_case(33, B=2), torch.float32, 2),
        (both_case(1, V=5), torch.float32, 1),
        (both_case(24, "growing", "resets", K=20), torch.float32, 2),
        (both_case(17, "very_strong", "very_strong"), torch.float32, 1),
        (both_case(19, "steep", "steep"), torch.float32, 1),
        (both_case(19, "rising", "steep", K=9, V=7), torch.float32, 1),
        (both_case(17, "alternating", K=9, V=20), torch.float32, 1),
        (both_case(19, "weak", "peak"), torch.float32, 1),
        (both_case(24, "weak", V=20), torch.float16, 1),
        (both_case(17, "hard_resets", "mixed"), torch.float16, 1),
    ):
        check(case, make_inputs(case, dtype), dtype, config=TILE, segments=segments)
        print("ok", case)
    some_programs()
    nothing_grows()
    views()
    operator()


def some_programs() -> None:
    """A head with a value that decays too much for products, beside one without."""
    case = both_case(17, "weak", H=2)
    x = make_inputs(case, torch.float32)
    x.gv[:, :, 1, 5] = -30.0
    check(case, x, torch.float32, config=TILE)
    print("ok some")


def nothing_grows() -> None:
    """A state of zero stays zero through segments whose growth is beyond float32."""
    x = make_inputs(both_case(32, "weak", K=4, V=4), torch.float32)
    k, g = x.k.clone(), torch.zeros_like(x.g)
    k[:, :16], g[:, :16] = 0.0, 6.0
    h0 = torch.zeros_like(x.h0)
    o, final = decay_triton_both.chunk_forward(x.q, k, x.v, g, x.gv, h0, SCALE, config=TILE, segments=2)
    want = decay_triton_both.chunk_forward(x.q, k, x.v, g, x.gv, h0, SCALE, config=TILE, segments=1)
    torch.testing.assert_close((o, final), want)
    print("ok zero")


def views() -> None:
    """Views as operands; no initial state and no gradient of the final one; no scale at all."""
    case = both_case(17, "weak", K=4, V=4)
    x = make_inputs(case, torch.float32)
    zero = torch.zeros_like(x.h0)
    want = run_kernels(Inputs(x.q, x.k, x.v, x.g, zero, x.do, zero, x.gv), config=TILE)
    q, g = (y.mT.contiguous().mT for y in (x.q, x.g))
    v, gv = (torch.stack([y, y], -1)[..., 0] for y in (x.v, x.gv))
    found = decay_triton_both.chunk_forward(q, x.k, v, g, gv, None, SCALE, config=TILE)
    found += decay_triton_both.chunk_backward(q, x.k, v, g, gv, None, SCALE, x.do, None, config=TILE)
    assert found[-1] is None
    for y, name in zip(found[:-1], NAMES, strict=False):
        assert torch.equal(y, want[name]) and y.is_contiguous(), name
    rest = 0.0, x.do, x.dht
    found = decay_triton_both.chunk_backward(x.q, x.k, x.v, x.g, x.gv, x.h0, *rest)
    for y, z in zip(found, decay_cpu.chunk_gradients(x.q, x.k, x.v, x.g, x.gv, x.h0, *rest), strict=True):
        assert torch.equal(y, z)
    print("ok views")


def operator() -> None:
    """The operator as CUDA runs it, with its autograd and its sequences packed."""
    decay_values.both_kernels_for = lambda *_: decay_triton_both
    case = both_case(7, H=2, K=4)
    x = make_inputs(case, torch.float32)
    got = results(decay_ops.gla, case, x, torch.float32)
    truth, eager = naive_results(case, x, torch.float64), naive_results(case, x, torch.float32)
    check_results(case, x, got, torch.float32, truth, eager)
    lengths = torch.tensor([0, 3, 7])
    found = [fn(x.q, x.k, x.v, x.g, x.gv, cu_seqlens=lengths)[0] for fn in (decay_ops.gla, decay_naive.naive_gla)]
    torch.testing.assert_close(*found)
    print("ok operator")


def test_interpreted():
    assert interpreted(__file__) == 14


@pytest.mark.parametrize(
    ("K", "V", "dtype"),
    [(129, 8, torch.bfloat16), (8, 129, torch.bfloat16), (8, 8, torch.float32), (8, 8, torch.float64)],
)
def test_what_has_no_kernel(K, V, dtype):
    def on_cuda(size, dtype):
        return type("OnGpu", (), {"device": torch.device("cuda"), "dtype": dtype, "shape": (1, 1, 1, size)})()

    assert both_kernels_for(on_cuda(K, dtype), on_cuda(V, dtype)) is None
    assert both_kernels_for(*(on_cuda(min(size, 128), torch.float16) for size in (K, V))) is decay_triton_both


def test_refuses():
    x, wide = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 129)
    with pytest.raises(ValueError, match="at most 128"):
        decay_triton_both.chunk_forward(x, x, wide, x, wide, None, 1.0)
    for g, gv in ((x[..., 0], x), (x, x[..., 0])):
        with pytest.raises(ValueError, match="q, v, g, gv have shapes"):
            decay_triton_both.chunk_forward(x, x, x, g, gv, None, 1.0)


def test_segments():
    """Time is cut where programs are too few to fill the device, into whole chunks, the last segment apart."""
    few = torch.empty(1, 10_000, 2, 128, dtype=torch.bfloat16, device="meta")
    plan = decay_triton_both._plan(few, few, few, few, few, None, None, None)
    assert plan.segments > 16 and plan.length % plan.config.chunk == 0
    assert (plan.segments - 1) * plan.length < 10_000 <= plan.segments * plan.length
    for B, H in ((8, 32), (0, 2)):
        many = torch.empty(B, 10_000, H, 128, dtype=torch.bfloat16, device="meta")
        assert decay_triton_both._plan(many, many, many, many, many, None, None, None).length >= 10_000 * bool(B)


def compile_pass(kernel, arch, size, part, even, packed=False):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    config = BOTH[arch, size]
    constants = dict(
        H=32, X=size, W=size, C=config.chunk, BX=size, BW=config.block_v, REVERSE=part == 2, PART=max(part, 0),
        TRANSPOSED=part > 0, EVEN=even,
    )  # fmt: skip
    absent = {SUMS: ("p_x", "p_y", "p_s0"), 0: (), 1: ("p_st",), 2: ()}[part]
    constants |= dict.fromkeys((*absent, *(("p_e", "p_h", "p_dg") if part < 1 else ())))
    constants |= dict.fromkeys(("p_ta", "p_tb") if part != SUMS else ())
    constants |= dict.fromkeys(() if packed else ("p_table", "p_u"))
    constants |= dict.fromkeys(("p_u",) if part == SUMS else ())
    wide = {*WIDE, "p_a", "p_b", "p_ta", "p_tb"}
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
        elif name.startswith("p_"):
            signature[name] = "*i32" if name == "p_table" else "*fp32" if name in wide else POINTERS[2]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if name in ("T", "L", "n_s") else "fp32"
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if kernel is step_scan_both_kernel:
        options = decay_triton_both.STEP_OPTIONS
    return triton.compile(
        ASTSource(kernel, signature, values, attributes), target=GPUTarget("cuda", arch, 32), options=options
    )


def ahead_of_time():
    for arch, size in BOTH:
        for part in range(SUMS, 3):
            quick = (arch, size, part) == (90, 128, 2)
            yield pytest.param(arch, size, part, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("arch", "size", "part"), list(ahead_of_time()))
def test_compiles(arch, size, part):
    config = BOTH[arch, size]
    assert config.shared <= {80: 99, 90: 227, 100: 227}[arch] * 1024
    for kernel in (chunk_scan_both_kernel, step_scan_both_kernel):
        for even, packed in ((True, False), (False, False), (False, True)):
            compiled = compile_pass(kernel, arch, size, part, even, packed)
            allowed = STACK[4] if kernel is step_scan_both_kernel else config.stack
            check_memory(compiled, config.shared, allowed + PACKED_STACK.get(arch, 0) * packed)


# Whole tiles of both classes; parts of tiles; what products do, what steps do, and both.
GPU = {
    torch.bfloat16: [
        *(both_case(192, *decays, H=2, K=128, V=128) for decays in (("strong", "weak"), ("weak", "strong"))),
        *(both_case(192, decay, decay, H=2, K=128, V=128) for decay in ("steep", "very_strong")),
        both_case(192, "resets", "hard_resets", H=2, K=128, V=128),
        both_case(192, "mixed", H=2, K=64, V=64),
        both_case(1000, "weak", B=2, H=3, K=72, V=40),
        both_case(16, "weak", B=2, H=3, K=72, V=40),
        both_case(130, "zero", "growing", H=2, K=40, V=128),
    ],
    torch.float16: [both_case(130, decay, H=2, K=48, V=64) for decay in ("zero", "weak", "mixed")],
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU, ids=str)
def test_gpu(dtype):
    for case in GPU[dtype]:
        x = on_gpu(make_inputs(case, dtype))
        for limit in (None, -1.0) if case.T == 192 else (None,):
            for segments in (1, 3) if case.T > 16 else (1,):
                check(case, x, dtype, limit=limit, segments=segments)


def loop(q, k, v, g, gv):
    S = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    o = torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * g[:, t].exp()[..., None] * gv[:, t].exp()[..., None, :] + k[:, t, :, :, None] * v[:, t, :, None]
        o[:, t] = (q[:, t, :, :, None] * S).sum(-2).to(v.dtype)
    return o


@pytest.mark.gpu
def test_gpu_loop():
    """A naive loop under the backend, and packed sequences, through the operator and its autograd."""
    x = on_gpu(make_inputs(both_case(130, "weak", "strong", H=2, K=48, V=64), torch.bfloat16))
    inputs = [y.requires_grad_() for y in (x.q, x.k, x.v, x.g, x.gv)]
    assert [(r.family, r.kernel) for r in explain(loop, *inputs).rewrites] == [("gla", "chunk (Triton)")]
    o = torch.compile(loop, backend="fla", fullgraph=True, options={"strict": True})(*inputs)
    lengths = torch.tensor([0, 37, 130])
    packed, _ = ops.gla(*inputs, scale=1.0, cu_seqlens=lengths)
    wide = [y.detach().double().requires_grad_() for y in inputs]
    whole, _ = decay_naive.naive_gla(*wide, scale=1.0)
    parts, _ = decay_naive.naive_gla(*wide, scale=1.0, cu_seqlens=lengths)
    for got, want in ((o, whole), (packed, parts)):
        grads = torch.autograd.grad(got, inputs, x.do)
        truths = torch.autograd.grad(want, wide, x.do.double())
        for y, truth in zip((got, *grads), (want, *truths), strict=True):
            assert ((y.double() - truth).norm() / truth.norm()).item() < 2e-2


if __name__ == "__main__":
    interpret()

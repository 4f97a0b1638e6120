"""The Triton kernel of the decode step: interpreted, compiled ahead of time, and on a GPU.

Run as a script (with TRITON_INTERPRET=1) this file is the interpreted part; pytest starts it in a process of its own,
since Triton decides at import whether it interprets.
"""

from itertools import product

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has no build for this system")

from decay_cases import SCALE  # noqa: E402
from decay_step_cases import DECAYS, FAMILIES, GROUPED, Case, check, make_operands, run  # noqa: E402
from interpreted import interpreted  # noqa: E402
from machine_code import check_memory  # noqa: E402

from fla_compile import ops  # noqa: E402
from fla_compile.kernels import (  # noqa: E402
    decay_checks,
    decay_configs,
    decay_ops,
    decay_step,
    decay_step_triton,
    decay_values,
    rwkv6_ops,
)
from fla_compile.kernels.decay_configs import ARCHS, CLASSES, MANY_STATES, WIDE_STEPS, StepConfig, step_config  # noqa: E402

SHARING = ("retention", "simple_gla", "gla_both", "rwkv6")  # every axis of gates, and the bonus
NARROW = StepConfig(block_v=8, num_warps=1)  # several blocks of values in small states


def run_kernel(case, x, config=None, *, in_place=True):
    """Output and state, with every allocation the launcher makes filled with NaN."""
    g = x.get("gamma", x.get("g"))
    log, before = case.log, "rwkv6" in case.family
    empty = torch.empty
    torch.empty = lambda *a, **kw: empty(*a, **kw).fill_(torch.nan)
    try:
        if in_place:
            state = x["state"].clone()
            o = decay_step_triton.step_in_place(
                x["q"], x["k"], x["v"], state, g, x.get("gv"), x.get("u"), log=log, before=before, scale=SCALE,
                config=config,
            )  # fmt: skip
            return {"o": o, "state": state}
        g = g.log() if case.family == "retention" else g
        o, final = decay_step_triton.step_forward(
            x["q"], x["k"], x["v"], g, x["state"], SCALE, gv=x.get("gv"), u=x.get("u"), before=before, config=config
        )
    finally:
        torch.empty = empty
    return {"o": o, "state": final}


def interpret() -> None:
    cases = [Case(f, T=T, B=1, H=2, K=5, V=19, decay=d) for f in FAMILIES for T, d in ((1, "weak"), (3, "forget"))]
    cases += [Case(f, T=2, B=1, H=4, K=3, V=9, **heads) for f in FAMILIES if f in SHARING for heads in GROUPED]
    cases += [Case("gla_both", T=2, B=1, H=1, K=5, V=7, decay=d) for d in DECAYS]
    cases += [Case("gla", T=16, B=1, H=1, K=33, V=1), Case("gla_values", B=1, H=1, K=1, V=16, state=torch.float16)]
    for dtype, chosen in ((torch.float32, cases), (torch.float16, cases[1:16:2])):
        for case in chosen:
            x = make_operands(case, dtype)
            check(case, x, run_kernel(case, x, NARROW))
            if {case.HQ, case.HK, case.HV, case.HG, case.state} == {None} and case.decay != "signed":
                check(case, x, run_kernel(case, x, NARROW, in_place=False))
            print("ok", dtype, case)
    layouts("cpu", NARROW)
    print("ok layouts")
    dispatch()


def dispatch() -> None:
    """The operators, as they run where the architecture is marked; 17 steps are not for this kernel."""
    decay_checks.has_step_kernel = decay_step.has_step_kernel = lambda *_: True
    for family in FAMILIES:
        case = Case(family, T=2, B=1, H=2, K=5, V=19)
        x = make_operands(case, torch.float32)
        before = len(decay_step_triton._plans)
        check(case, x, run("", ops, case, x))
        g = x["gamma"].log() if "gamma" in x else x.get("g")
        if "gv" in x:
            o, final = decay_values.gla_values(x["q"], x["k"], x["v"], g, x["gv"], x["state"], SCALE)
        elif "rwkv6" in family:
            o, final = rwkv6_ops.rwkv6_op(x["q"], x["k"], x["v"], g, x.get("u"), x["state"], SCALE)
        else:
            o, final = decay_ops._forward_cuda(x["q"], x["k"], x["v"], g, x["state"], SCALE)
        check(case, x, {"o": o, "state": final})
        assert len(decay_step_triton._plans) == before + 2, "the step kernel ran both"
        print("ok dispatch", family)
    long = torch.zeros(1, 17, 2, 5)
    assert decay_checks.steps_for(long, long) is None


def layouts(device: str, config: StepConfig | None = None) -> None:
    """Every operand in another order in memory, and no initial state."""
    case = Case("gla_both", T=3, B=2, H=2, K=5, V=19)
    x = make_operands(case, torch.float32, device)
    turned = {
        n: y.permute(*reversed(range(y.ndim))).contiguous().permute(*reversed(range(y.ndim))) for n, y in x.items()
    }
    assert not any(y.is_contiguous() for y in turned.values())
    want = run_kernel(case, x, config)
    state = turned["state"]
    got = decay_step_triton.step_in_place(
        turned["q"], turned["k"], turned["v"], state, turned["g"], turned["gv"], None, log=True, before=False,
        scale=SCALE, config=config,
    )  # fmt: skip
    torch.testing.assert_close(got, want["o"])
    torch.testing.assert_close(state, want["state"])
    assert got.is_contiguous()

    empty = x | {"state": torch.zeros_like(x["state"])}
    want = run_kernel(case, empty, config)
    o, final = decay_step_triton.step_forward(x["q"], x["k"], x["v"], x["g"], None, SCALE, gv=x["gv"], config=config)
    torch.testing.assert_close(o, want["o"])
    torch.testing.assert_close(final, want["state"])


def test_interpreted():
    assert interpreted(__file__) == 4 * len(FAMILIES) + 3 * len(SHARING) + len(DECAYS) + 2 + 1


class Recorder:
    """Stands in for a kernel that Triton compiles at the first launch, or for what it made of it."""

    def __init__(self, calls, compiled=None):
        self.calls, self.compiled = calls, compiled

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.calls.append((grid, args, options))
            return self.compiled

        return launch


def test_launched_again_by_layout(monkeypatch):
    """The first launch is Triton's own; the next of the same layout go to what it compiled, with all arguments."""
    first, again = [], []
    names = decay_step_triton.decay_step_kernel.arg_names
    monkeypatch.setattr(decay_step_triton, "decay_step_kernel", Recorder(first, Recorder(again)))
    monkeypatch.setattr(decay_step_triton, "_plans", {})
    case = Case("gla_both", T=2)
    for n, dtype in enumerate((torch.float32, torch.float32, torch.float32, torch.float16)):
        x = make_operands(case, dtype)
        run_kernel(case, x)
        assert (len(first), len(again)) == ((1, 0), (1, 1), (1, 2), (2, 2))[n]
        grid, args, options = (first if n in (0, 3) else again)[-1]
        given = dict(zip(names, args, strict=True))
        assert given["p_q"] is x["q"] and given["p_w"] is x["gv"] and given["p_u"] is None and given["p_f"] is None
        assert given["scale"] == SCALE and given["T"] == 2 and given["PER_KEY"] and given["IN_PLACE"]
        assert (given["sb_w"], given["st_w"], given["sh_w"], given["sc_w"]) == x["gv"].stride()
        assert (given["sb_s"], given["sh_s"], given["sk_s"], given["sv_s"]) == x["state"].stride()
        assert grid == (case.B * case.H * triton.cdiv(case.V, given["BV"]), 1, 1)
        assert set(options) == ({"num_warps", "num_stages"} if n in (0, 3) else set())
    run_kernel(
        case, {n: y.mT.contiguous().mT if n == "gv" else y for n, y in make_operands(case, torch.float32).items()}
    )
    assert len(first) == 3, "another layout is another launch"
    with pytest.raises(ValueError, match="v has T=1, q has T=2"):
        run_kernel(case, x | {"v": x["v"][:, :1]})


POINTERS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
FLAGS = {
    "linear_attention": (),
    "retention": ("HAS_G",),
    "simple_gla": ("HAS_G", "LOG"),
    "gla": ("HAS_G", "LOG", "PER_KEY"),
    "gla_values": ("HAS_W", "LOG"),
    "gla_both": ("HAS_G", "HAS_W", "LOG", "PER_KEY"),
    "rwkv6": ("HAS_G", "HAS_U", "LOG", "PER_KEY", "BEFORE"),
    "rwkv6_no_bonus": ("HAS_G", "LOG", "PER_KEY", "BEFORE"),
}
ALL_FLAGS = ("PER_KEY", "LOG", "BEFORE", "IN_PLACE", "HAS_G", "HAS_W", "HAS_U", "HAS_S")
OPTIONAL = {"p_g": "HAS_G", "p_w": "HAS_W", "p_u": "HAS_U"}


def compile_kernel(family, dtype, arch, size, *, states=1, steps, dense=True, queries=1, in_place=True):
    """Dense operands have rows that begin at multiples of 16 numbers; others any stride at all, of 64 bits."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    flags = {*FLAGS[family], "HAS_S", *(("IN_PLACE",) if in_place else ())}
    config, V = step_config(arch, size, states), 512 if size == CLASSES[-1] else size
    constants = dict(K=size, V=V, BK=size, BV=config.block_v, RK=1, RV=1, RG=1, RW=1, RQ=1, RU=1, QUERIES=queries)
    constants |= {flag: flag in flags for flag in ALL_FLAGS}
    constants |= {name: None for name, flag in OPTIONAL.items() if flag not in flags}
    constants |= {"p_f": None} if in_place else {}
    constants |= {"T": 1} if steps == 1 else {}
    kernel = decay_step_triton.decay_step_kernel
    constants |= {name: 1 for name in kernel.arg_names if dense and name.startswith(("sc_", "sv_"))}
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
        elif name.startswith("p_"):
            signature[name] = POINTERS[dtype] if name in ("p_q", "p_k", "p_v", "p_o") else "*fp32"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name == "scale":
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if dense or name in ("T", "H") else "i64"
            if dense and name not in ("T", "H"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    options = {"num_warps": config.num_warps, "num_stages": 1}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def ahead_of_time():
    for family, dtype, arch, size in product(FAMILIES, POINTERS, ARCHS, CLASSES):
        quick = family in ("gla_both", "rwkv6") and dtype == "bf16" and arch == 90 and size == 256
        for states in (1, MANY_STATES) if (arch, size) in WIDE_STEPS else (1,):
            name = f"sm{arch}-{family}-{dtype}-{size}{'-wide' * (states > 1)}"
            yield pytest.param(family, dtype, arch, size, states, id=name, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("family", "dtype", "arch", "size", "states"), list(ahead_of_time()))
def test_compiles(family, dtype, arch, size, states):
    """Nothing spills, and the state moves 16 bytes a thread."""
    forms = [dict(steps=1), dict(steps=16), dict(steps=4, dense=False)]
    forms += [dict(steps=16, queries=8, in_place=False)] if states == 1 else []
    for form in forms:
        compiled = compile_kernel(family, dtype, arch, size, states=states, **form)
        check_memory(compiled, 16 * 1024, case=form)
        if form.get("dense", True):
            for access in ("ld.global.v4.b32", "st.global.v4.b32"):
                assert access in compiled.asm["ptx"], (form, access)


GPU_CASES = [
    *(Case("gla", T=T, H=4, K=K, V=V) for K, V in ((40, 72), (64, 64), (128, 96), (256, 512)) for T in (1, 2, 16)),
    *(Case("gla_both", T=5, decay=d, H=2, K=100, V=130) for d in DECAYS),
    *(Case(family, T=T, B=3, H=2, K=33, V=48) for family in FAMILIES for T in (1, 7)),
    *(Case(family, T=3, H=4, K=64, V=32, **heads) for family in ("gla_both", "rwkv6") for heads in GROUPED),
    Case("retention", T=4, decay="signed"),
    Case("simple_gla", T=4, decay="signed"),
    Case("gla", T=3, K=1, V=1),
    Case("gla", T=3, state=torch.bfloat16),
    Case("rwkv6", B=64, H=32, K=64, V=64),
    *(Case(family, T=T, B=16, H=16, K=K, V=V) for family in FAMILIES for T, K, V in ((1, 128, 40), (3, 200, 256))),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gpu(dtype):
    """Every case in place and not, each twice: what is compiled, and what is launched again by its layout."""
    for case in GPU_CASES:
        x = make_operands(case, dtype, "cuda")
        got = run_kernel(case, x)
        check(case, x, got)
        again = run_kernel(case, x)
        grouped = {case.HQ, case.HK, case.HV, case.HG, case.state} != {None}
        if not grouped and case.decay != "signed":
            apart = run_kernel(case, x, in_place=False)
            check(case, x, apart)
            twice = run_kernel(case, x, in_place=False)
            assert all(torch.equal(apart[n], twice[n]) for n in apart), f"{case} differs from run to run"
        assert all(torch.equal(got[n], again[n]) for n in got), f"{case} differs from run to run"


@pytest.mark.gpu
def test_gpu_layouts():
    layouts("cuda")
    layouts("cuda")  # launched again without a look at the arguments


@pytest.mark.gpu
def test_gpu_same_layout_other_tensors():
    """What was prepared for one layout serves new tensors, scales and lengths, and no other alignment or dtype."""
    for dtype, T in ((torch.bfloat16, 1), (torch.float32, 1), (torch.bfloat16, 2), (torch.bfloat16, 16)):
        case = Case("gla", T=T, B=2, H=2, K=32, V=32)
        for seed in range(3):
            x = make_operands(case, dtype, "cuda")
            x = {n: y.roll(seed, 0) for n, y in x.items()}
            check(case, x, run_kernel(case, x))
            shifted = {
                n: torch.empty(y.numel() + 1, dtype=y.dtype, device="cuda")[1:].view(y.shape) for n, y in x.items()
            }
            for name, y in shifted.items():
                y.copy_(x[name])
            check(case, shifted, run_kernel(case, shifted))


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("T", [1, 4])
def test_gpu_graph(family, T):
    """Captured once, replayed on a state that goes on from replay to replay, and on new operands."""
    case = Case(family, T=T, B=2, H=4, K=64, V=64)
    x = make_operands(case, torch.bfloat16, "cuda")
    run_kernel(case, x)
    state, first = x["state"].clone(), x["state"].clone()
    arguments = x["q"], x["k"], x["v"], state, x.get("gamma", x.get("g")), x.get("gv"), x.get("u")
    how = dict(log=case.log, before="rwkv6" in family, scale=SCALE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = decay_step_triton.step_in_place(*arguments, **how)
    assert torch.equal(state, first), "capture runs nothing"
    for _ in range(3):
        x["q"].neg_()
        graph.replay()
        want = decay_step_triton.step_in_place(x["q"], x["k"], x["v"], first, *arguments[4:], **how)
        assert torch.equal(o, want) and torch.equal(state, first)


@pytest.mark.gpu
@pytest.mark.parametrize("checked", [False, True], ids=["plain", "kernel"])
def test_gpu_ops(checked, monkeypatch):
    """The operators before and after the architecture is marked: in place, compiled, and over the sequence."""
    arch = decay_step_triton.device_arch(torch.device("cuda"))
    marked = (decay_configs._row_arch(arch),) if checked else ()
    monkeypatch.setattr(decay_configs, "STEPS_CHECKED", marked)
    decay_checks._step_checked.cache_clear()
    name = decay_step.kernel_name(torch.device("cuda", 0), torch.bfloat16, 24, 40)
    assert name == ("step (Triton)" if checked else "step (torch)")
    try:
        for family, T in product(FAMILIES, (1, 4)):
            case = Case(family, T=T)
            x = make_operands(case, torch.bfloat16, "cuda")
            check(case, x, run("", ops, case, x))
            op, gates = FAMILIES[family]
            o, final = getattr(ops, op)(
                x["q"], x["k"], x["v"], **{n: x[n] for n in gates}, scale=SCALE, initial_state=x["state"],
                output_final_state=True,
            )  # fmt: skip
            if checked:  # of the chunk kernels other tests hold what they must
                check(case, x, {"o": o, "state": final})
        compiled = torch.compile(ops.gla_step, mode="reduce-overhead", fullgraph=True)
        case = Case("gla", B=2, H=4, K=64, V=64)
        x = make_operands(case, torch.bfloat16, "cuda")
        own, other = x["state"].clone(), x["state"].clone()
        with torch.no_grad():
            for _ in range(4):
                got = compiled(x["q"], x["k"], x["v"], own, x["g"], scale=SCALE).clone()
                want = ops.gla_step(x["q"], x["k"], x["v"], other, x["g"], scale=SCALE)
                assert torch.equal(got, want) and torch.equal(own, other)
    finally:
        decay_checks._step_checked.cache_clear()


if __name__ == "__main__":
    interpret()

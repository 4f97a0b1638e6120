"""Launches by layout: what Triton compiled is launched again with the same arguments, and only where it fits."""

import gc
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has no build for this system")

import triton.language as tl  # noqa: E402
from norm_gate_cases import Case, make_inputs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from fla_compile.kernels import launch, norm_gate_triton  # noqa: E402
from fla_compile.kernels.launch import Launch, compiled_together, layout, remember  # noqa: E402
from fla_compile.kernels.norm_gate_configs import Config  # noqa: E402

CPU = torch.device("cpu")


class Recorder:
    """Stands in for a kernel that Triton compiles at the first launch, or for what it made of it."""

    def __init__(self, compiled=None):
        self.calls, self.compiled = [], compiled

    def __getitem__(self, grid):
        def run(*args, **options):
            self.calls.append((grid, args, options))
            return self.compiled

        return run

    def warmup(self, *args, grid, **options):
        self.calls.append(("compile", args, options))


def test_the_second_launch_is_of_what_the_first_compiled():
    again = Recorder()
    first = Recorder(again)
    run = Launch(first, CPU, (7, 2), (3, 4, True), num_warps=8)
    x, y = torch.zeros(3), torch.zeros(2)
    for z in (x, y, x):
        run(z, None, 0.5)
    assert first.calls == [((7, 2, 1), (x, None, 0.5, 3, 4, True), {"num_warps": 8})]
    (one, two) = again.calls
    assert one[0] == two[0] == (7, 2, 1) and one[2] == two[2] == {}
    assert one[1][0] is y and two[1][0] is x and one[1][1:] == two[1][1:] == (None, 0.5, 3, 4, True)


def test_interpreted_kernels_stay():
    kernel = Recorder(None)
    run = Launch(kernel, CPU, (1,), (), num_warps=1)
    for _ in range(3):
        run(torch.zeros(1))
    assert [options for *_, options in kernel.calls] == [{"num_warps": 1}] * 3


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(launch, "MOST_PLANS", 3)
    plans = {}
    for n in range(10):
        assert remember(plans, n, str(n)) == str(n) and plans[n] == str(n)
        assert len(plans) <= 3


def test_layouts():
    x = torch.zeros(64)
    a = x[:32].view(4, 8)
    assert layout(None) is None and layout(a) == layout(x[32:].view(4, 8)) and hash(layout(a)) is not None
    others = x[1:33].view(4, 8), a.mT, a[:, :7], x[:32].view(8, 4), a.double(), a.to("meta")
    assert len({layout(y) for y in (a, *others)}) == 7


def test_what_is_not_compiled_waits_for_the_end():
    names, order = "abc", []
    kernels = {name: Recorder(Recorder()) for name in names}
    for kernel in kernels.values():
        kernel.calls = order
        kernel.compiled.calls = order
    runs = {name: Launch(kernel, CPU, (1,), (name,), num_warps=1) for name, kernel in kernels.items()}

    @compiled_together
    def inner(last):
        runs[last]()

    @compiled_together
    def launcher(last, fails=False):
        for name in "aba":
            runs[name]()
        inner(last)
        if fails:
            raise ValueError("before anything ran")
        return len(order)

    runs["a"]()
    order.clear()
    with pytest.raises(ValueError, match="before"):
        launcher("c", fails=True)
    assert [args for _, args, _ in order] == [("a",)]
    order.clear()
    assert launcher("c") == 1  # what is compiled runs at once, in its place; nothing overtakes
    compiled = [args[0] for what, args, _ in order if what == "compile"]
    assert sorted(compiled) == ["b", "c"] and [args[0] for what, args, _ in order if what != "compile"] == list("abac")
    order.clear()
    assert launcher("c") == 4
    assert [(what, args) for what, args, _ in order] == [((1, 1, 1), (name,)) for name in "abac"]


NAMES = "norm_gate_forward_kernel", "norm_gate_backward_kernel", "sum_parts_kernel"


@pytest.fixture
def kernels(monkeypatch):
    """The kernels of norm times gate replaced."""
    found = [Recorder(Recorder()) for _ in NAMES]
    for name, kernel in zip(NAMES, found, strict=True):
        monkeypatch.setattr(norm_gate_triton, name, kernel)
    monkeypatch.setattr(norm_gate_triton, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(norm_gate_triton, "_plans", {})
    return found


def run_both(x, case, dtype=torch.float32, config=None, y_dtype=None):
    _, rstd, mean = norm_gate_triton.launch_forward(x.x, x.gate, x.weight, x.bias, case.form, dtype, config)
    operands = x.x, x.gate, x.weight, x.bias, rstd, mean, x.dy
    return norm_gate_triton.launch_backward(*operands, case.form, y_dtype, config)


def test_norm_gate_by_layout(kernels):
    case = Case(64, 16, affine="wb", norm="layer")
    x = make_inputs(case, torch.float32)
    run_both(x, case)
    run_both(make_inputs(case, torch.float32), case)
    for kernel in kernels:
        (jit,), (direct,) = kernel.calls, kernel.compiled.calls
        assert jit[0] == direct[0] and len(jit[1]) == len(direct[1])
        for a, b in zip(jit[1], direct[1], strict=True):
            assert layout(a) == layout(b) if isinstance(a, torch.Tensor) else a == b and type(a) is type(b)
        assert set(jit[2]) == {"num_warps"} and direct[2] == {}


def changed(case):
    """Calls of which none may run what another compiled."""
    plain = make_inputs(case, torch.float32)
    yield "the first", plain, case, {}
    for name in ("x", "gate", "weight", "bias", "dy"):
        x, y = make_inputs(case, torch.float32), getattr(plain, name)
        setattr(x, name, torch.empty(y.numel() + 1)[1:].view(y.shape).copy_(y))
        yield f"{name} begins elsewhere", x, case, {}
    for name in ("x", "gate", "dy"):
        x = make_inputs(case, torch.float32)
        setattr(x, name, torch.cat([getattr(x, name)] * 2, 1)[:, : case.width])
        yield f"{name} is a slice", x, case, {}
    yield "half", make_inputs(case, torch.float16), case, {}
    for other in (Case(65, 16, affine="wb"), Case(64, 32, affine="wb"), Case(64, 16, affine="b"), Case(64, 16)):
        yield str(other), make_inputs(other, torch.float32), other, {}
    for change in ({"eps": 1e-3}, {"norm": "layer"}, {"activation": "sigmoid"}, {"gate_first": True}):
        other = Case(64, 16, affine="wb", **change)
        yield str(change), plain, other, {}
    yield "rows", plain, case, {"config": Config(4, 4, 4, 4, 2)}
    yield "warps", plain, case, {"config": Config(4, 8, 4, 8, 2)}
    yield "types", plain, case, {"dtype": torch.float16, "y_dtype": torch.float16}


def test_what_is_another_launch(kernels):
    for what, x, case, how in changed(Case(64, 16, affine="wb")):
        before = len(kernels[0].calls), len(kernels[1].calls)
        run_both(x, case, **how)
        after = before[0] + (not what.startswith("dy")), before[1] + 1
        for _ in range(2):
            assert (len(kernels[0].calls), len(kernels[1].calls)) == after, what
            run_both(x, case, **how)


def test_no_tensor_is_kept(kernels):
    case = Case(8, 16, affine="wb", norm="layer", layout="slices")
    x = make_inputs(case, torch.float32)
    alive = [weakref.ref(y) for y in vars(x).values()]
    alive += [weakref.ref(y) for _ in range(2) for y in run_both(x, case) if y is not None]
    for kernel in kernels:
        kernel.calls.clear()
        kernel.compiled.calls.clear()
    del x
    gc.collect()
    assert len(norm_gate_triton._plans) == 2 and not any(y() is not None for y in alive)


class Driver:
    """Of a GPU that is not there: kernels are compiled for it, and their launches noted."""

    def __init__(self):
        self.launches, self.utils = [], self

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

    def load_binary(self, *args):
        return None, None, 0, 0, 1024

    def launcher_cls(self, source, metadata):
        return lambda *args: self.launches.append((metadata.num_warps, args))


@triton.jit(do_not_specialize=["n"])
def example_kernel(p_x, p_y, p_z, scale, n, one, many, SIZE: tl.constexpr, HAS_Y: tl.constexpr):
    o = tl.arange(0, SIZE) * one + many
    b_x = tl.load(p_x + o, mask=o < n, other=0.0) * scale
    if HAS_Y:
        b_x += tl.load(p_y + o, mask=o < n, other=0.0)
    tl.store(p_z + o, b_x, mask=o < n)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A driver that launches nothing, in the place of Triton's, and an empty cache."""
    driver = Driver()
    for module in ("triton.runtime.jit", "triton.compiler.compiler"):
        monkeypatch.setattr(f"{module}.driver", SimpleNamespace(active=driver))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return driver


def test_as_triton_launches(fake):
    """The driver gets the same from a first launch, which Triton prepares, a second one, and one by keywords."""
    x, z = torch.zeros(16), torch.zeros(16)
    run = Launch(example_kernel, CPU, (3,), (16, 1, 32, 16, False), num_warps=2)
    for scale in (0.5, 0.5, 2.0):
        run(x, None, z, scale)
    example_kernel[(3,)](x, None, z, 0.5, 16, 1, 32, SIZE=16, HAS_Y=False, num_warps=2)
    one, two, three, four = ([warps, *args[:4], *args[9:]] for warps, args in fake.launches)
    assert one == [2, 3, 1, 1, 0, x, None, z, 0.5, 16, 1, 32, 16, False]
    assert one == two == four and three[8] == 2.0 and three[:8] + three[9:] == one[:8] + one[9:]


def test_whoever_listens_to_launches_hears_of_all(fake, monkeypatch):
    """Triton collects what hooks are told only where there are any: now, not when the kernel was compiled."""
    runtime = launch.knobs.runtime
    x, z = torch.zeros(16), torch.zeros(16)
    run = Launch(example_kernel, CPU, (3,), (16, 1, 32, 16, False), num_warps=2)

    def told():
        """Whether the launches had metadata, and a hook before and one after."""
        fake.launches.clear()
        for _ in range(2):
            run(x, None, z, 0.5)
        return [(args[6] and args[6].data["name"], *args[7:9]) for _, args in fake.launches]

    run(x, None, z, 0.5)
    assert told() == [(None, None, None)] * 2
    for name in ("launch_enter_hook", "launch_exit_hook"):
        with monkeypatch.context() as patch:
            patch.setattr(runtime, name, lambda metadata: None)
            hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
            assert told() == [("example_kernel", *hooks)] * 2
        chain = getattr(runtime, name)
        monkeypatch.setattr(chain, "calls", [print])
        assert told() == [("example_kernel", runtime.launch_enter_hook, runtime.launch_exit_hook)] * 2
        monkeypatch.setattr(chain, "calls", [])
    assert told() == [(None, None, None)] * 2


def test_kernels_compile_side_by_side(fake, monkeypatch):
    """Triton compiles both in threads, and the driver gets what it gets of launches one by one."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    threads, begin = set(), threading.Barrier(2, timeout=60)
    example_kernel.device_caches[0]  # what sets `compile`
    compile_kernel = example_kernel.compile

    def noted(*args, **kwargs):
        threads.add(threading.current_thread().name)
        begin.wait()
        return compile_kernel(*args, **kwargs)

    monkeypatch.setattr(example_kernel, "compile", noted)
    x, z = torch.zeros(16), torch.zeros(16)
    runs = [Launch(example_kernel, CPU, (3,), (16, 1, many, 16, False), num_warps=4) for many in (32, 7)]

    @compiled_together
    def launcher():
        for run in runs:
            run(x, None, z, 0.5)

    launcher()
    launcher()
    assert len(threads) == 2 and threading.main_thread().name not in threads
    assert [args[15] for _, args in fake.launches] == [32, 7, 32, 7]


def test_in_a_callers_mode(fake):
    """Triton may hand out a kernel that is still being compiled."""
    x, z = torch.zeros(16), torch.zeros(16)
    run = Launch(example_kernel, CPU, (3,), (16, 1, 64, 16, False), num_warps=1)
    with ThreadPoolExecutor(1) as pool, triton.AsyncCompileMode(pool):
        run(x, None, z, 0.5)
        run(x, None, z, 0.5)
    assert [args[15] for _, args in fake.launches] == [64, 64]


@triton.jit
def broken_kernel(p_z, SIZE: tl.constexpr):
    tl.static_assert(SIZE > 16, "too few")
    tl.store(p_z, SIZE)


def test_after_a_kernel_that_does_not_compile(fake):
    """The error is that kernel's, anew at every call; all others compile, those of its call too."""
    x, z = torch.zeros(16), torch.zeros(16)
    broken = Launch(broken_kernel, CPU, (3,), (16,), num_warps=1)
    here, later = (Launch(example_kernel, CPU, (3,), (16, 1, many, 16, False), num_warps=1) for many in (32, 7))

    @compiled_together
    def launcher(*others, fails=False):
        if fails:
            broken(z)
        for run in others:
            run(x, None, z, 0.5)

    errors = []
    for _ in range(2):
        with pytest.raises(triton.CompilationError, match="too few") as error:
            launcher(here, fails=True)
        errors.append(error.value)
    launcher(later, here)
    launcher(later, here)
    assert [args[15] for _, args in fake.launches] == [7, 32, 7, 32] and errors[0] is not errors[1]

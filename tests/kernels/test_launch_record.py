"""Recorded launchers: a later call does what the first one did, with its own tensors, and only where that is known."""

import gc
import weakref

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has no build for this system")

from fla_compile.kernels import (  # noqa: E402
    decay_fused,
    decay_fused_gates,
    decay_segments,
    decay_triton,
    launch_record,
    rwkv6_triton,
)
from fla_compile.kernels.decay_fused import plan_scans  # noqa: E402
from fla_compile.kernels.launch import Launch  # noqa: E402
from fla_compile.kernels.launch_record import empty, recorded  # noqa: E402

CPU = torch.device("cpu")
F32 = dict(dtype=torch.float32, device=CPU)


class Kernel:
    """Stands in for a kernel and for what Triton makes of it; notes its name, its grid and what it is told."""

    def __init__(self, name, calls, compiles=True):
        self.name, self.calls, self.compiles, self.fn = name, calls, compiles, name

    def __getitem__(self, grid):
        def run(*args, **options):
            self.calls.append((self.name, grid, args))
            return self if self.compiles else None

        return run

    def warmup(self, *args, **options):
        pass


def told(calls, **tensors):
    """`calls` with a name for each tensor or address: its own, or one by the order in which they come."""
    names = {x.data_ptr(): name for name, x in tensors.items()}

    def name(x):
        address = x.data_ptr() if isinstance(x, torch.Tensor) else x
        return names.setdefault(address, f"new {len(names)}")

    return [
        (
            kernel,
            grid,
            [name(x) if isinstance(x, torch.Tensor) or (type(x) is int and x > 1 << 30) else x for x in args],
        )
        for kernel, grid, args in calls
    ]


def launcher_of(calls, **how):
    """A launcher of two kernels that counts its own runs, and these."""
    first, second = (Launch(Kernel(name, calls, **how), CPU, (n,), (7, name)) for n, name in ((2, "a"), (3, "b")))
    runs = []

    @recorded
    def launcher(x, y, scale, *, flag=None):
        runs.append((x, y))
        z = empty(*x.shape, **F32)
        part, large = empty(3, **F32), empty(launch_record.SMALL, **F32)
        first(x, y, part, large, float(scale))
        second(part, None, empty(4, **F32, zeros=True), large, z)
        return z, None, empty(2, **F32)

    return launcher, runs


def test_a_later_call_launches_the_same_with_its_own_tensors():
    calls = []
    launcher, runs = launcher_of(calls)
    seen = []
    for _ in range(3):
        x, y = torch.zeros(8), torch.zeros(5)
        calls.clear()
        z, none, left = launcher(x, y, 0.5)
        assert none is None and (z.shape, left.shape) == ((8,), (2,)) and z.dtype == left.dtype == torch.float32
        seen.append(told(calls, x=x, y=y, z=z))
        assert len(runs) == 1 and len({x.data_ptr(), y.data_ptr(), z.data_ptr(), left.data_ptr()}) == 4
    (a, grid, args), (b, _, more) = seen[0]
    assert (a, b, grid, args[:2], args[4:], more[4]) == ("a", "b", (2, 1, 1), ["x", "y"], [0.5, 7, "a"], "z")
    assert seen[0] == seen[1] == seen[2]


def test_zeros_are_zeros_again():
    calls, found = [], []
    kernel = Launch(Kernel("a", calls), CPU, (1,), ())

    @recorded
    def launcher(x):
        z = empty(16, **F32, zeros=True)
        kernel(x, z)
        return (z,)

    for _ in range(3):
        (z,) = launcher(torch.ones(2))
        found.append(z.clone())
        z.fill_(3)
    assert all(not z.any() for z in found)


def test_one_tensor_twice_is_not_two_that_are_alike():
    calls = []
    launcher, runs = launcher_of(calls)
    x, y = torch.zeros(8), torch.zeros(8)
    for one, other in ((x, x), (x, y), (y, x)):
        calls.clear()
        launcher(one, other, 0.5)
        addresses = [z.data_ptr() if isinstance(z, torch.Tensor) else z for z in calls[0][2][:2]]
        assert addresses == [one.data_ptr(), other.data_ptr()]
    assert len(runs) == 1


def test_what_is_another_call():
    launcher, runs = launcher_of([])
    x, y = torch.zeros(8), torch.zeros(5)
    others = [
        lambda: launcher(x, y, 0.5),
        lambda: launcher(x, y, 0.25),
        lambda: launcher(y, x, 0.5),
        lambda: launcher(torch.zeros(9)[1:], y, 0.5),
        lambda: launcher(torch.zeros(8, 2)[:, 0], y, 0.5),
        lambda: launcher(x, y.double(), 0.5),
        lambda: launcher(x, y, 0.5, flag=False),
        lambda: launcher(x, y, 0.5, flag=True),
    ]
    for n, call in enumerate(others):
        for _ in range(3):
            call()
            assert len(runs) == n + 1


def test_what_is_not_recorded():
    x, y = torch.zeros(8), torch.zeros(5)
    for how, flag in ((dict(compiles=False), None), ({}, x), ({}, 3)):
        launcher, runs = launcher_of([], **how)
        for n in range(3):
            launcher(x, y, 0.5, flag=flag)
            assert len(runs) == n + 1
    kernel = Launch(Kernel("a", []), CPU, (1,), ())
    bodies = {
        "launches with a copy": lambda x: (kernel(x + 1, x), (empty(1, **F32),))[1],
        "returns a sum": lambda x: (kernel(x, x), (x.sum(),))[1],
        "returns its argument": lambda x: (kernel(x, x), (x,))[1],
        "launches with a part": lambda x: (kernel(x[1:], x), (None,))[1],
        "launches nothing": lambda x: (x,),
    }
    for what, body in bodies.items():
        ran = []
        launcher = recorded(lambda x, body=body, ran=ran: (ran.append(x), body(x))[1])
        for n in range(3):
            launcher(torch.zeros(4))
            assert len(ran) == n + 1, what


def test_inside_of_another_and_after_a_failure():
    calls = []
    inner, runs = launcher_of(calls)
    fails = [True]

    @recorded
    def outer(x):
        z, _, left = inner(x, x, 0.5)
        if fails[0]:
            raise ValueError("after its launches")
        return z, left

    with pytest.raises(ValueError, match="after"):
        outer(torch.zeros(4))
    fails[0] = False
    for _ in range(3):
        outer(torch.zeros(4))
    assert len(runs) == 2 and len(calls) == 8


def test_no_tensor_is_kept():
    calls = []
    launcher, runs = launcher_of(calls)
    alive = []
    for _ in range(2):
        x, y = torch.zeros(8), torch.zeros(5)
        alive += [weakref.ref(z) for z in (x, y, *launcher(x, y, 0.5)) if z is not None]
    del x, y
    for notes in (calls, runs):
        notes.clear()
    gc.collect()
    assert len(alive) == 8 and not any(z() is not None for z in alive)


KERNELS = {
    decay_fused: ("chunk_scan_kernel", "row_decay_grad_kernel", "grown_row_decay_grad_kernel"),
    decay_fused_gates: (
        "chunk_scan_rows_kernel",
        "chunk_states_kernel",
        "chunk_outputs_kernel",
        "chunk_grads_kernel",
        "chunk_scan_grads_kernel",
    ),
    decay_segments: ("chain_segments_kernel",),
    rwkv6_triton: ("own_scores_kernel",),
}
GATES = {"linear_attention": None, "retention": (4,), "simple_gla": (2, "T", 4), "gla": (2, "T", 4, "D")}
GATES["rwkv6"] = GATES["gla"]
INNER = decay_fused.scan_forward, decay_fused._launch_backward


@pytest.mark.parametrize("T", [8, 256, 2048])
@pytest.mark.parametrize(
    ("family", "D"), [*((family, 64) for family in GATES), ("gla", 128), ("gla", 200), ("rwkv6", 128)]
)
def test_decayed_ops(family, D, T, monkeypatch):
    """Recorded and not, both directions are told the same, with and without states, and where heads share operands."""
    calls = []
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, Kernel(name, calls))
        monkeypatch.setattr(module, "_launches", {})
    taken, new = [], torch.empty  # all of it lives on: an address has one name

    def empty(*sizes, **how):
        taken.append(new(*sizes, **how))
        return taken[-1]

    monkeypatch.setattr(torch, "empty", empty)
    shape = GATES[family]
    gate = None if shape is None else tuple({"T": T, "D": D}.get(n, n) for n in shape)

    def run(forward, backward, states, heads):
        q, k, v, do = (torch.zeros(2, T, H, D, dtype=torch.bfloat16) for H in (heads, heads, 4, 4))
        g = None if gate is None else torch.zeros(gate)
        h0, dht = (torch.zeros(2, 4, D, D) if states else None for _ in range(2))
        bonus = (torch.zeros(4, D),) * (family == "rwkv6")
        operands = dict(q=q, k=k, v=v, do=do, g=g, h0=h0, dht=dht) | dict(zip(("u",), bonus, strict=False))
        common = q, k, v, g, *bonus, h0, 0.125
        found = []
        for launcher, args, names in (
            (forward, common, ("o", "ht")),
            (backward, (*common, do, dht), ("dq", "dk", "dv", "dg", *("du",) * len(bonus), "dh0")),
        ):
            calls.clear()
            results = dict(zip(names, launcher(*args), strict=True))
            known = {name: x for name, x in (operands | results).items() if x is not None}
            found.append((told(calls, **known), {name: (x.shape, x.dtype) for name, x in known.items()}))
        return found

    def patch_inner(how):
        """The launchers below with nothing recorded yet."""
        scan_forward, launch_backward = (how(fn.__wrapped__) for fn in INNER)
        monkeypatch.setattr(decay_triton, "scan_forward", scan_forward)
        monkeypatch.setattr(rwkv6_triton, "scan_forward", scan_forward)
        monkeypatch.setattr(decay_fused, "_launch_backward", launch_backward)

    scans = plan_scans(torch.zeros(2, T, 4, 64, dtype=torch.bfloat16), torch.zeros(1, 1, 1, 64), "none")
    assert (scans.runup, scans.chained) == (T == 256, T == 2048)
    outer = decay_triton.chunk_forward.__wrapped__, decay_triton.chunk_backward.__wrapped__
    if family == "rwkv6":
        outer = rwkv6_triton.forward, rwkv6_triton.backward
    for states in (False, True):
        for heads in (4, 2)[: 1 if family == "rwkv6" else 2]:
            patch_inner(lambda launcher: launcher)
            want = run(*outer, states, heads)
            patch_inner(recorded)
            fresh = outer if family == "rwkv6" else [*map(recorded, outer)]
            for _ in range(3):
                assert run(*fresh, states, heads) == want
            # a launcher that takes memory elsewhere than from `empty` is not recorded, and is told tensors
            others = [args for kernel, _, args in calls if kernel != "own_scores_kernel"]
            assert not any(isinstance(x, torch.Tensor) for args in others for x in args)

"""An operator of ours is what `torch.library.custom_op` makes of the same functions."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from fla_compile import ops
from fla_compile.kernels.operators import operator, register_autograd, register_fake


def scaled(x: Tensor, y: Tensor, factor: float, more: Tensor | None) -> tuple[Tensor, Tensor]:
    return x * y * factor, x + 1


def fake(x: Tensor, y: Tensor, factor: float, more: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def keep(ctx, inputs, output):
    x, y, ctx.factor, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, y)


def slopes(ctx, da, db):
    x, y = ctx.saved_tensors
    parts = [None if da is None else da * y * ctx.factor, db]
    dx = sum((part for part in parts if part is not None), torch.zeros_like(x))
    dy = da * x * ctx.factor if da is not None and ctx.needs_input_grad[1] else None
    return dx, dy, None, None


ours = operator("test_scaled")(scaled)
register_fake(ours)(fake)
register_autograd(ours, slopes, setup_context=keep)


def test_values_and_gradients():
    x, y = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.library.opcheck(ours, (x, y, 3.0, None))
    torch.library.opcheck(ours, (x.detach(), y, 3.0, x.detach()))
    assert torch.autograd.gradcheck(lambda x, y: ours(x, y, 3.0, None), (x, y))
    assert torch.autograd.gradcheck(lambda x: ours(x, y.detach(), 3.0, None)[1], (x,))
    with torch.no_grad():
        assert not ours(x, y, 3.0, None)[0].requires_grad


def test_whatever_lies_above_the_kernel_is_still_asked():
    """Only where nothing does is the kernel called and not dispatched to: modes, transforms and lazy negation are."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    for requires_grad in (True, False):
        x, y = (torch.randn(5, requires_grad=requires_grad) for _ in range(2))
        with Watch():
            ours(x, y, 3.0, None)
        assert seen.count(ours) == 1 + (not requires_grad)
        torch.testing.assert_close(ours(torch._neg_view(x), y, 3.0, None)[0], -x * y * 3.0)
    rows = torch.randn(4, 5)
    many = torch.func.vmap(lambda x: ours(x, x, 3.0, None)[0])(rows)
    torch.testing.assert_close(many, rows * rows * 3.0)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: ours(x, x, 3.0, None)[0].sum())(rows)


def test_dynamo_leaves_a_kernel_alone():
    """Where a program calls an operator between two graphs, Dynamo looks at every Python frame that this runs."""
    seen = []

    def backend(gm, inputs):
        seen.extend(str(node.target) for node in gm.graph.nodes)
        return gm

    @torch._dynamo.disable(recursive=False)
    def between(x):
        return ours(x, x, 2.0, None)[0]

    x = torch.randn(3)
    got = torch.compile(lambda x: between(x + 1) - 1, backend=backend)(x)
    torch.testing.assert_close(got, 2 * (x + 1) ** 2 - 1)
    assert any("add" in target for target in seen) and not any("mul" in target for target in seen)


ON_A_CUDA_BUILD = """
import sys, torch
torch.backends.cuda.is_built = lambda: True
import fla_compile.ops
assert "fla_compile.kernels.decay_triton" in sys.modules
assert "torch._dynamo" not in sys.modules and not torch.cuda.is_initialized()
from fla_compile.kernels import library_hash
assert library_hash._thread is not None
"""


def test_a_build_for_cuda_imports_its_kernels_and_looks_for_no_device():
    pytest.importorskip("triton", reason="triton has no build for this system")
    done = subprocess.run([sys.executable, "-c", ON_A_CUDA_BUILD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


BEFORE_DYNAMO = """
import sys, torch
from fla_compile import ops
x = torch.randn(1, 8, 1, 4, requires_grad=True)
ops.linear_attention(x, x, x)[0].sum().backward()
assert "torch._dynamo" not in sys.modules and "sympy" not in sys.modules
targets = []
def backend(gm, inputs):
    targets.extend(str(node.target) for node in gm.graph.nodes if node.op == "call_function")
    return gm
@torch._dynamo.disable(recursive=False)
def between(x):
    return torch.ops.fla_compile.linear_attention(x, x, x, None, None, 1.0)[0]
got = torch.compile(lambda x: between(x + 1) - 1, backend=backend)(x)
torch.testing.assert_close(got, between(x + 1) - 1)
assert targets == ["<built-in function add>", "<built-in function sub>"], targets
"""


def test_a_call_does_not_import_dynamo_and_is_left_alone_once_it_is():
    """The import takes seconds. What was registered before it is no more traced than what comes after."""
    done = subprocess.run([sys.executable, "-c", BEFORE_DYNAMO], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_a_kernel_writes_is_told():
    """Through memory that torch does not see written, as a Triton kernel's: backward must not take what was saved."""

    def kernel(x: Tensor, state: Tensor) -> Tensor:
        state.numpy()[:] = 2.0
        return x + 1

    writes = operator("test_writes", mutates=("state",))(kernel)
    register_fake(writes)(lambda x, state: torch.empty_like(x))
    x, state = torch.ones(3, requires_grad=True), torch.ones(3)
    y = (x * state).sum()
    writes(x.detach(), state)
    assert state.tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with torch.inference_mode():
        writes(x.detach(), torch.ones(3))
    compiled = torch.compile(lambda x, state: (writes(x, state), state * 2), backend="aot_eager", fullgraph=True)
    _, after = compiled(x.detach(), torch.ones(3))
    assert after.tolist() == [4.0, 4.0, 4.0]


def test_defaults_are_refused():
    def kernel(x: Tensor, factor: float = 1.0) -> Tensor:
        return x * factor

    with pytest.raises(ValueError, match="no defaults: test_defaults"):
        operator("test_defaults")(kernel)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ours(x, x, 3.0, None)[0],
        lambda x: ops.norm_gate(x, x),
        lambda x: ops.gla(*[x.view(1, 4, 1, 2)] * 4)[0],
    ],
    ids=["registered", "norm_gate", "gla"],
)
def test_second_derivatives_are_refused(call):
    """The kernels of gradients know no gradients: torch would take their results for constants, with a warning."""
    x = torch.randn(8, requires_grad=True)
    (slope,) = torch.autograd.grad(call(x).sum(), x, retain_graph=True)
    assert not slope.requires_grad
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(call(x).sum(), x, create_graph=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: ops.norm_gate(x, y),
        lambda x, y: ops.gla(x, y, y, y, cu_seqlens=torch.tensor([0, 1, 4])),
        lambda x, y: ops.delta_rule(x, y, y, y[..., 0], cu_seqlens=torch.tensor([0, 1, 4])),
        lambda x, y: ops.gla_step(x, y, y, torch.zeros(1, 1, 2, 2), y),
    ],
    ids=["norm_gate", "packed gla", "packed delta_rule", "step"],
)
def test_tangents_are_refused(call):
    x = torch.randn(1, 4, 1, 2)
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            call(dual, x)
        call(x, x)

"""Cross entropy of logits on the CPU: losses and gradients against the definition, what is written, what is kept."""

import pytest
import torch
import torch.nn.functional as F
from budget import FACTOR, FLOOR, check_budget
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fla_compile.kernels import cross_entropy as module
from fla_compile.kernels.cross_entropy import (
    cross_entropy,
    cross_entropy_backward,
    cross_entropy_forward,
    naive_cross_entropy,
    supports,
)

B, T, V = 3, 7, 41
OPTIONS = {
    "plain": {},
    "index": dict(ignore_index=7),
    "smoothing": dict(label_smoothing=0.1),
    "softcap": dict(softcap=2.0, logit_scale=0.7),
    "z-loss": dict(z_loss=0.02),
    "weighted": dict(row_weight=torch.rand(B, T, generator=torch.Generator().manual_seed(3))),
    "all": dict(
        softcap=5.0, logit_scale=1.7, label_smoothing=0.2, z_loss=0.01,
        row_weight=torch.rand(B, T, generator=torch.Generator().manual_seed(4)),
    ),
}  # fmt: skip


def logits(*shape, dtype=torch.float64):
    drawn = 3 * torch.randn(shape or (B, T, V), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn.to(dtype).requires_grad_()


def targets(ignored=-100):
    generator = torch.Generator().manual_seed(1)
    found = torch.randint(0, V, (B, T), generator=generator)
    return found.masked_fill(torch.rand(B, T, generator=generator) < 0.3, ignored)


def results(fn, z, target, **options):
    """Loss, and gradient of a fixed mixture of losses."""
    loss = fn(z, target, **options)
    dloss = torch.cos(torch.arange(loss.numel(), dtype=torch.float64)).view(loss.shape) - 0.3
    return loss.detach(), torch.autograd.grad(loss, z, dloss.to(loss.dtype))[0]


@pytest.fixture
def few_rows(monkeypatch):
    """A few rows at a time, so that every test has several blocks and a shorter last one."""
    monkeypatch.setattr(module, "CPU_LOGITS", 5 * V)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OPTIONS)
def test_against_naive(name, reduction, dtype, few_rows):
    options = OPTIONS[name] | {"reduction": reduction}
    target, z = targets(options.get("ignore_index", -100)), logits(dtype=dtype)
    loss, grad = results(cross_entropy, z, target, **options)
    exact = z.detach().double().requires_grad_()
    (true, slope), (eager, eager_slope) = (results(naive_cross_entropy, x, target, **options) for x in (exact, z))
    if dtype == torch.float64:
        torch.testing.assert_close(loss, true, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, slope, rtol=1e-12, atol=1e-12)
        return
    if reduction == "none":
        check_budget("loss", loss, true, eager, "forward")
    else:  # one number: eager's may be right by chance
        rows = [naive_cross_entropy(x, target, **options | {"reduction": "none"}).double() for x in (z, exact)]
        allowed = FACTOR["forward"] * (rows[0] - rows[1]).norm() + FLOOR[torch.float32] * rows[1].norm()
        count = (target != options.get("ignore_index", -100)).sum() if reduction == "mean" else 1
        assert loss.dtype == torch.float32 and (loss - true).abs() <= (B * T) ** 0.5 * allowed / count
    check_budget("gradient", grad, slope, eager_slope, "backward")


class Sizes(TorchDispatchMode):
    """Bytes of every tensor that an operation makes, views not counted."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        new = {x.untyped_storage()._cdata: x for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        self.made += [x.untyped_storage().nbytes() for storage, x in new.items() if storage not in before]
        return out


@pytest.mark.parametrize("form", ["whole", "shifted", "far rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_only_the_gradient_has_the_size_of_the_logits(dtype, form, monkeypatch):
    monkeypatch.setattr(module, "CPU_LOGITS", 200)
    made = logits(4, 12, 103, dtype=dtype).detach()
    z = {"whole": made[..., :100].contiguous(), "shifted": made[:, :-1, :100].requires_grad_(), "far rows": made}[form]
    z = z.detach().requires_grad_()
    target = torch.randint(0, 100, z.shape[:-1])
    with Sizes() as sizes:
        loss = cross_entropy(z, target)
        torch.autograd.grad(loss, z, torch.tensor(0.5))
    large = [n for n in sizes.made if n > 2 * 4 * 200]
    assert large == [z.numel() * z.element_size()]


def test_the_gradient_is_scaled_in_its_own_memory():
    """No logits are kept for backward, and its result is the memory that forward wrote."""
    z, target = logits(dtype=torch.float32), targets()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss = cross_entropy(z, target)
    (kept,) = saved
    assert kept.data_ptr() != z.data_ptr()
    unscaled = kept.clone()
    grad = torch.autograd.grad(loss, z, torch.tensor(0.5))[0]
    assert grad.data_ptr() == kept.data_ptr()
    torch.testing.assert_close(grad, 0.5 * unscaled)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_backward_twice_and_two_uses(reduction, dtype):
    """A kept graph gives the same gradient again, whatever was done to the first; uses of loss and logits add up."""
    z, target = logits(dtype=dtype), targets()
    loss = cross_entropy(z, target, reduction=reduction).sum()
    first = torch.autograd.grad(3 * loss, z, retain_graph=True)[0]
    kept = first.clone()
    first.zero_()
    assert torch.equal(torch.autograd.grad(3 * loss, z, retain_graph=True)[0], kept)
    torch.testing.assert_close(torch.autograd.grad(loss + 2 * loss, z, retain_graph=True)[0], kept)
    torch.testing.assert_close(torch.autograd.grad(3 * loss + z.sum(), z)[0], kept + 1)


def test_accumulated_gradients():
    """What backward hands on is nobody else's: gradients of two losses of one tensor of logits add up."""
    z, target = logits(), targets()
    cross_entropy(z, target).backward()
    once = z.grad.clone()
    (2 * cross_entropy(z, target)).backward()
    torch.testing.assert_close(z.grad, 3 * once)


def test_not_twice_differentiable():
    z = logits()
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(cross_entropy(z, targets()), z, create_graph=True)


def test_logits_changed_before_a_late_backward():
    z = logits() * 1
    loss = cross_entropy(z, targets(), reduction="none")
    z.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored_as_torch(reduction, smoothing):
    """A mean over no targets is NaN; its gradient is zero, whatever the rows hold."""
    target = torch.full((5,), -100)
    found = []
    for fn in (cross_entropy, F.cross_entropy):
        z = logits(5, V, dtype=torch.float32).detach().requires_grad_()
        loss = fn(z, target, reduction=reduction, label_smoothing=smoothing)
        found.append((loss, torch.autograd.grad(loss.sum(), z)[0]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    z = torch.full((5, V), torch.inf, requires_grad=True)
    assert torch.autograd.grad(cross_entropy(z, target, reduction=reduction).sum(), z)[0].eq(0).all()


def test_masked_classes():
    """A logit of -inf takes a class out, as in eager."""
    found = []
    for fn in (cross_entropy, F.cross_entropy):
        z = logits(4, V).detach()
        z[:, 3] = -torch.inf
        z.requires_grad_()
        loss = fn(z, torch.tensor([0, 1, 2, 9]))
        found.append((loss, torch.autograd.grad(loss, z)[0]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_loss_scale_reaches_float16():
    """Gradients of 2^-26, lost in float16, are there when the loss is scaled as by a GradScaler."""
    z = (0.001 * logits(512, 16)).half().detach().requires_grad_()
    target = torch.randint(0, 16, (512,), generator=torch.Generator().manual_seed(0))
    grad = torch.autograd.grad(cross_entropy(z / 64, target) * 2.0**16, z)[0]
    exact = z.detach().double().requires_grad_()
    truth = torch.autograd.grad(F.cross_entropy(exact / 64, target) * 2.0**16, exact)[0]
    assert (grad.double() - truth).norm() / truth.norm() < 2e-3


STRIDES = {
    "shifted": lambda z: z[:, :-1],
    "transposed rows": lambda z: z.transpose(0, 1),
    "every other": lambda z: z[:, ::2],
    "expanded": lambda z: z[:, :1].expand(B, 5, V),
    "classes first": lambda z: z.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "one row": lambda z: z[0, 0],
    "many slices": lambda z: z.repeat(30, 1, 1)[:, :-1],
    "no rows": lambda z: z[:0],
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("form", STRIDES)
def test_strides(form, reduction):
    z = logits()
    view = STRIDES[form](z)
    target = torch.randint(0, V, view.shape[:-1], generator=torch.Generator().manual_seed(2))
    found = [results(lambda x, t, fn=fn: fn(STRIDES[form](x), t, reduction=reduction), z, target)
             for fn in (cross_entropy, naive_cross_entropy)]  # fmt: skip
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_without_gradients():
    z = logits()
    with torch.no_grad():
        assert not cross_entropy(z, targets()).requires_grad
    torch.testing.assert_close(cross_entropy(z.detach(), targets()), naive_cross_entropy(z, targets()).detach())
    _, grad = cross_entropy_forward(z.detach(), targets(), None, -100, 0.0, 0.0, 1.0, 0.0, "mean", False)
    assert grad.numel() == 0


def test_targets_out_of_range():
    for bad in (V, -1):
        with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
            cross_entropy(logits(2, V), torch.tensor([0, bad]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(3, dtype=torch.long)}, r"target must be \[2\] as logits is \[2, 4\]"),
        ({"target": torch.zeros(2)}, "target must hold integers"),
        ({"row_weight": torch.zeros(3)}, r"row_weight must be \[2\]"),
        ({"row_weight": torch.zeros(2).requires_grad_()}, "must not require a gradient"),
        ({"reduction": "max"}, "reduction must be one of"),
        ({"label_smoothing": 1.5}, "label_smoothing must be"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"logits": torch.zeros(2, 4, dtype=torch.int64)}, "cross_entropy takes float16"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(**{"logits": torch.zeros(2, 4), "target": torch.zeros(2, dtype=torch.long)} | change)


def test_supports():
    assert supports("cpu", torch.bfloat16) is None and supports("cuda", torch.float64) is None
    assert "mps" in supports("mps", torch.float32)


@pytest.mark.parametrize(("reduction", "with_gradient"), [("mean", True), ("none", False)])
def test_opcheck(reduction, with_gradient):
    z, weight = logits(dtype=torch.float32), torch.rand(B, T)
    options = -100, 0.1, 2.0, 1.3, 0.01
    torch.library.opcheck(cross_entropy_forward, (z, targets(), weight, *options, reduction, with_gradient))
    torch.library.opcheck(cross_entropy_backward, (z.detach(), targets(), weight, *options))


def test_compiles_once():
    """One graph serves every batch and length, a shift too; the gradient is written once, with its factor."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *a: cross_entropy(*a), backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for b, length in ((2, 5), (3, 9), (4, 6)):
        z, target = torch.randn(b, length, V, requires_grad=True), torch.randint(0, V, (b, length - 1))
        found = []
        for fn in (compiled, naive_cross_entropy):
            loss = fn(z[:, :-1], target)
            found.append((loss, torch.autograd.grad(2 * loss, z)[0]))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1]

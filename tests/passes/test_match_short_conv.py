"""Short convolutions in many spellings: recognised, with the values and gradients of the program."""

import operator
from functools import reduce

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from programs import assert_same
from short_convs import B, D, ShortConv, T, W, operands
from torch._dynamo.testing import CompileCounterWithBackend

from fla_compile.passes import match_short_conv

OP = torch.ops.fla_compile.short_conv.default


@pytest.fixture(params=["op", "taps"])
def kernel(request, monkeypatch):
    monkeypatch.setattr(match_short_conv, "choose_kernel", lambda x, trains: request.param)
    return request.param


def matched(fn, args, kernel, *, count=1, then="eager", tolerance=None, **how):
    backend = ShortConv(then)
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True, **how), args, tolerance)
    found = backend.found[-1]
    assert found.refusals == []
    assert [(r.pattern, r.family) for r in found.rewrites] == [("short_conv", "short_conv")] * count
    assert all(r.source.startswith("test_") for r in found.rewrites)
    assert backend.count("short_conv") == (count if kernel == "op" else 0)
    assert backend.count("conv1d", "unfold", "einsum") == 0
    return backend


# [B, T, D], weight [D, W], bias [D], state [B, W - 1, D]


def by_conv1d(x, w, b, s):
    return F.conv1d(x.transpose(1, 2), w[:, None], b, padding=W - 1, groups=D)[..., :T].transpose(1, 2)


def by_conv1d_cut_from_the_end(x, w, b, s):
    return F.conv1d(x.mT, w.unsqueeze(1), b, 1, W - 1, 1, D)[:, :, : -(W - 1)].mT


def by_conv1d_of_padded(x, w, b, s):
    return F.conv1d(F.pad(x.mT, (W - 1, 0)), w.view(D, 1, W), b, groups=x.shape[2]).mT


def by_conv1d_of_joined(x, w, b, s):
    y = torch.cat([torch.zeros(B, D, W - 1), x.permute(0, 2, 1)], -1)
    return torch.conv1d(y, weight=w[:, None, :], groups=D).permute(0, 2, 1) + b


def by_conv1d_with_a_state(x, w, b, s):
    return F.conv1d(torch.cat([s, x], dim=1).mT, w[:, None], b, groups=D).mT


def by_unfold(x, w, b, s):
    return (F.pad(x, (0, 0, W - 1, 0)).unfold(1, W, 1) * w).sum(-1) + b


def by_unfold_and_einsum(x, w, b, s):
    return torch.einsum("btdw,dw->btd", torch.cat([s, x], 1).unfold(1, W, 1), w)


def by_slices(x, w, b, s):
    y = F.pad(x, (0, 0, W - 1, 0))
    return sum(y[:, j : j + T] * w[:, j] for j in range(W)) + b


def by_a_loop_in_place(x, w, b, s):
    padded, y = torch.cat([s, x], 1), torch.zeros_like(x)
    for j in range(W):
        y += padded[:, j : j + T] * w[:, j]
    return y


def by_shifts(x, w, b, s):
    def shift(d):
        return torch.cat([x.new_zeros(B, d, D), x[:, :-d]], 1)

    return x * w[:, 3] + shift(1) * w[:, 2] + shift(2) * w[:, 1] + shift(3) * w[:, 0]


def by_negative_padding(x, w, b, s):
    y = torch.addcmul(b, x, w[:, 3])
    for d in (1, 2, 3):
        y = torch.addcmul(y, F.pad(x, (0, 0, d, -d)), w[:, 3 - d])
    return y


def by_stacked_shifts(x, w, b, s):
    y = F.pad(x, (0, 0, W - 1, 0))
    return (torch.stack([y.narrow(1, j, T) for j in range(W)], -1) * w).sum(dim=-1)


def by_shifts_of_weighted(x, w, b, s):
    """The product first, then the shift."""
    y = x * w[:, 3]
    for d in (1, 2, 3):
        y = y + F.pad(x * w[:, 3 - d], (0, 0, d, 0))[:, :T]
    return y


def by_other_weights(x, w, b, s):
    """Taps of three tensors and numbers, in any order, with a bias that is a product."""
    y = F.pad(x, (0, 0, 2, 0))
    return y[:, 2:] * (0.5 * w[:, 0]) - y[:, 1:-1] / 2 * b + y[:, :-2] * w[:, 3] * w[:, 1] + b * w[:, 2]


def by_lerp(x, w, b, s):
    """(1 - w) x_t + w x_{t-1}, and a third tap."""
    y = F.pad(x, (0, 0, 2, 0))
    return torch.lerp(y[:, 2:], y[:, 1:-1], w[:, 0]) + y[:, :-2] * w[:, 1]


def of_a_part(x, w, b, s):
    """The steps before the part are the state."""
    return F.conv1d(x[:, 1:].mT, w[:, None], b, groups=D).mT


def with_another_state(x, w, b, s):
    """A state of two tensors and a zero, and only some of its steps."""
    y = torch.cat([torch.zeros(B, 1, D), s[:, 1:2], s, x], 1)
    return F.conv1d(y.mT, w[:, None], groups=D).mT[:, -T:]


TIME_LAST = [f for n, f in list(globals().items()) if n.startswith(("by_", "of_a", "with_"))]


@pytest.mark.parametrize("fn", TIME_LAST, ids=lambda f: f.__name__)
def test_spellings(fn, kernel):
    matched(fn, operands(), kernel)


def time_first(x, w, b, s):
    y = F.pad(x, (0, 0, 0, 0, W - 1, 0))
    return reduce(operator.add, [y[j : j + T] * w[:, j] for j in range(W)]) + b


def channels_first(x, w, b, s):
    y = F.pad(x, (W - 1, 0))
    return sum((y[..., j : j + T] * w[:, j, None] for j in range(W)), b[:, None])


def one_sequence(x, w, b, s):
    return F.conv1d(x.T, w[:, None], b, padding=W - 1, groups=D)[:, :T].T


def heads(x, w, b, s):
    """Channels over two axes, batch over two."""
    x, w = x.view(1, B, T, 2, D // 2), w.view(2, D // 2, W)
    y = F.pad(x, (0, 0, 0, 0, W - 1, 0))
    return sum(y[:, :, j : j + T] * w[..., j] for j in range(W))


@pytest.mark.parametrize(
    ("fn", "axes"), [(time_first, "tbd"), (channels_first, "bdt"), (one_sequence, "td"), (heads, "btd")]
)
def test_axes(fn, axes, kernel):
    matched(fn, operands(axes), kernel)


def silu_before_the_turn(x, w, b, s):
    return F.silu(F.conv1d(x.mT, w[:, None], b, padding=W - 1, groups=D)[..., :T]).mT


def silu_by_hand_and_residual(x, w, b, s):
    z = by_unfold(x, w, b, s)
    return z * torch.sigmoid(z) + s.sum() * x


def residual_alone(x, w, b, s):
    return x + by_slices(x, w, b, s)


def residual_of_another(x, w, b, s):
    return by_slices(x, w, b, s) + x.mT.tanh().mT


def wide_in_narrow_out(x, w, b, s):
    y = torch.cat([s.bfloat16(), x.bfloat16()], 1)
    return F.silu(sum(y[:, j : j + T].float() * w[:, j] for j in range(W))).to(y.dtype)


@pytest.mark.parametrize(
    "fn", [silu_before_the_turn, silu_by_hand_and_residual, residual_alone, residual_of_another, wide_in_narrow_out]
)
def test_what_follows(fn, kernel):
    backend = matched(fn, operands(), kernel, tolerance=2e-2 if "narrow" in fn.__name__ else None)
    if kernel == "op":
        (call,) = backend.graph.find_nodes(op="call_function", target=OP)
        assert call.args[5] == ("silu" in fn.__name__ or "wide" in fn.__name__)
        assert (call.args[3] is not None) == ("residual" in fn.__name__)
        assert backend.count("silu", "sigmoid") == 0


def widened_after(x, w, b, s):
    """A cast that makes the result wider is no part of it."""
    return by_conv1d(x, w, b, s).double() * 2


def without_gradients(x, w, b, s):
    """Of the convolution, but not of SiLU: they stay apart."""
    with torch.no_grad():
        z = by_conv1d(x, w, b, s)
    return F.silu(z + 0 * x) + F.silu(z)


@pytest.mark.parametrize("fn", [widened_after, without_gradients])
def test_what_does_not_belong_to_it(fn, kernel):
    backend = matched(fn, operands(), kernel, tolerance=1e-5)
    if kernel == "op":
        (call,) = backend.graph.find_nodes(op="call_function", target=OP)
        assert call.args[5] is False and call.meta["example_value"][0].dtype == torch.float32


def of_masked(x, w, b, s):
    """What padding must not bring in, as transformers' mamba does."""
    keep = (torch.arange(T) > 1).to(x.dtype)
    return by_conv1d(x * keep[:, None], w, b, s)


def of_masked_by_slices(x, w, b, s):
    return by_slices(x * torch.sigmoid(s.sum((1, 2)))[:, None, None], w, b, s)


def of_a_sum_that_is_used_again(x, w, b, s):
    y = x + x.mT.cos().mT
    return by_conv1d(y, w, b, s) * y


def of_joined_channels(x, w, b, s):
    """One convolution for queries and keys, as transformers' gated delta rule has it."""
    y = torch.cat([x, x.cos()], -1)
    z = F.conv1d(y.mT, torch.cat([w, w.sin()])[:, None], torch.cat([b, b]), padding=W - 1, groups=2 * D)[..., :T].mT
    q, k = F.silu(z).split(D, -1)
    return q * k


@pytest.mark.parametrize("fn", [of_masked, of_masked_by_slices, of_a_sum_that_is_used_again, of_joined_channels])
def test_what_comes_before(fn, kernel):
    backend = matched(fn, operands(), kernel)
    assert backend.count("silu") == (kernel == "taps" and fn is of_joined_channels)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(D, D, W, padding=W - 1, groups=D)

    def forward(self, x):
        return F.silu(self.conv(x.mT)[..., : x.shape[1]].mT)


def test_modules_one_after_another(kernel):
    """The second reads what the first computes; both are checked, once."""
    torch.manual_seed(0)
    model = nn.Sequential(Layer(), Layer())
    matched(lambda x: model(x), operands()[:1], kernel, count=2)


def test_every_length_in_one_graph(kernel):
    counter = CompileCounterWithBackend("eager")
    model, backend = Layer(), ShortConv("aot_eager")
    counter.backend = backend
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for length in (5, 17, 30):
        x = torch.randn(3, length, D)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1 and len(backend.found[-1].rewrites) == 1


def with_final_state(x, w, b, s):
    y = torch.cat([s, x], 1)
    return sum(y[:, j : j + x.shape[1]] * w[:, j] for j in range(W)), y[:, x.shape[1] :].clone()


@pytest.mark.parametrize("steps", [1, 2, T])
def test_final_state(steps, kernel):
    """What is left of prompts and of single tokens: the operator gives it, nothing is joined any more."""
    x, w, b, s = operands()
    backend = matched(with_final_state, [x.detach()[:, :steps].clone().requires_grad_(), w, b, s], kernel)
    assert backend.count("cat") == (0 if kernel == "op" else 2)


def mixed(x, w, b, s):
    with torch.autocast("cpu", torch.bfloat16):
        return F.conv1d(x.mT, w[:, None], b, padding=W - 1, groups=D)[..., :T].mT


def test_autocast(kernel):
    """In bfloat16, as conv1d under autocast."""
    x, w, b, s = operands()
    backend = ShortConv()
    y = torch.compile(mixed, backend=backend, fullgraph=True)(x, w, b, s)
    assert y.dtype == torch.bfloat16 and len(backend.found[-1].rewrites) == 1
    torch.testing.assert_close(y.float(), by_conv1d(x, w, b, s), rtol=2e-2, atol=2e-2)


def test_kernel_on_the_cpu():
    """The operator only where it was measured to win: large tensors that are trained."""
    kernels = {}
    for grad, length in ((False, 1 << 16), (True, 1 << 16), (True, T)):
        _, w, b, _ = operands()
        x = torch.randn(4, length, D, requires_grad=grad)
        backend = ShortConv()
        with torch.set_grad_enabled(grad):
            torch._dynamo.reset()
            torch.compile(
                lambda x, w, b: F.conv1d(x.mT, w[:, None], b, padding=W - 1, groups=D)[..., : x.shape[1]],
                backend=backend,
            )(x, w.detach(), b.detach())
        kernels[grad, length] = backend.found[-1].rewrites[0].kernel
    assert list(kernels.values()) == ["conv (taps, Inductor)", "conv (slabs)", "conv (taps, Inductor)"]

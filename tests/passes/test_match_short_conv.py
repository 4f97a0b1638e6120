"""Short convolutions in many spellings: recognised, with the values and gradients of the program."""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from programs import assert_same, here
from torch._dynamo.testing import CompileCounterWithBackend

from fla_compile import dynamo
from fla_compile.passes import match_short_conv
from fla_compile.passes.match_short_conv import Found

B, T, D, W = 2, 9, 6, 4
OP = torch.ops.fla_compile.short_conv.default


@dataclass(eq=False)
class ShortConv:
    """A backend that runs this pass and hands the rest to another one."""

    then: str = "eager"
    found: list[Found] = field(default_factory=list)
    graph: torch.fx.Graph | None = None

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable:
        with dynamo.untraced():
            self.found.append(match_short_conv.match_short_conv(gm))
        self.graph = gm.graph
        return torch._dynamo.lookup_backend(self.then)(gm, example_inputs)

    def count(self, *names: str) -> int:
        return sum(any(name in str(node.target) for name in names) for node in self.graph.nodes)


@pytest.fixture(params=["op", "taps"])
def kernel(request, monkeypatch):
    monkeypatch.setattr(match_short_conv, "choose_kernel", lambda device: request.param)
    return request.param


def operands(x="btd"):
    torch.manual_seed(0)
    sizes = {"b": B, "t": T, "d": D}
    made = [torch.randn([sizes[a] for a in x]), torch.randn(D, W), torch.randn(D), torch.randn(B, W - 1, D)]
    return [y.requires_grad_() for y in made]


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


# Near misses that are refused, and what is refused for what is around it.


def left(fn, args, reason=None, detail="", *, pattern="short_conv"):
    backend = ShortConv()
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), args)
    found = backend.found[-1]
    assert found.rewrites == [] and backend.count("short_conv") == 0
    if reason is None:
        assert found.refusals == []
        return
    (refusal,) = found.refusals
    assert (refusal.pattern, refusal.reason) == (pattern, reason) and detail in refusal.detail, refusal
    assert refusal.source == here(fn)


def the_last_steps(x, w, b, s):
    return F.conv1d(x.mT, w[:, None], b, padding=W - 1, groups=D)[..., W - 1 :]  # here


def all_steps(x, w, b, s):
    return F.conv1d(x.mT, w[:, None], b, padding=W - 1, groups=D).mT  # here


def one_step_late(x, w, b, s):
    return F.conv1d(x.mT, w[:, None], b, padding=W - 1, groups=D)[..., 1 : T + 1]  # here


def dilated(x, w, b, s):
    return F.conv1d(F.pad(x.mT, (2 * W - 2, 0)), w[:, None], b, dilation=2, groups=D)  # here


def too_wide(x, w, b, s):
    return F.conv1d(x.mT, w.repeat(1, 3)[:, None], b, padding=3 * W - 1, groups=D)[..., :T]  # here


def used_before_the_cut(x, w, b, s):
    y = F.conv1d(x.mT, w[:, None], b, padding=W - 1, groups=D)
    return y[..., :T], y.sum()  # here


def a_sum_in_part_used(x, w, b, s):
    y = F.pad(x, (0, 0, 2, 0))
    z = y[:, 2:] * w[:, 0] + y[:, 1:-1] * w[:, 1]
    return z + y[:, :-2] * w[:, 2], z.tanh()  # here


def a_view_of_the_sum_used(x, w, b, s):
    """What is added in place is seen through a view."""
    padded, y = F.pad(x, (0, 0, 2, 0)), torch.zeros_like(x)
    first = y[:, 0]
    for j in range(3):
        y += padded[:, j : j + T] * w[:, j]  # here
    return y, 2 * first


REFUSED = {
    a_view_of_the_sum_used: "intermediate_used",
    the_last_steps: "not_causal",
    all_steps: "not_causal",
    one_step_late: "not_causal",
    dilated: "no_kernel",
    too_wide: "no_kernel",
    used_before_the_cut: "intermediate_used",
    a_sum_in_part_used: "intermediate_used",
}


@pytest.mark.parametrize("fn", REFUSED, ids=lambda f: f.__name__)
def test_refuses(fn):
    left(fn, operands(), REFUSED[fn])


def written_before_it_is_done(x, w, b, s):
    x = x.cos()
    y = F.pad(x, (0, 0, W - 1, 0))
    parts = [y[:, j : j + T] * w[:, j] for j in range(W)]
    x.mul_(2)
    return sum(parts)  # here


def test_refuses_writes_in_between():
    left(written_before_it_is_done, operands(), "mutates_input", "before it is done")


# What looks like none is left without a word.


def same_padding(x, w, b, s):
    return F.conv1d(x.mT, w[:, :3].unsqueeze(1), b, padding="same", groups=D)


def not_depthwise(x, w, b, s):
    return F.conv1d(x.mT, w[:, None].expand(D, D, W), b, padding=W - 1)[..., :T]


def strided(x, w, b, s):
    return F.conv1d(x.mT, w[:, None], b, padding=W - 1, stride=2, groups=D)[..., :T]


def two_taps(x, w, b, s):
    """A token shift."""
    return x * w[:, 0] + F.pad(x, (0, 0, 1, -1)) * w[:, 1]


def weights_of_time(x, w, b, s):
    y = F.pad(x, (0, 0, 2, 0))
    return y[:, 2:] * w[:, 0] + y[:, 1:-1] * x + y[:, :-2] * w[:, 2]


def differences(x, w, b, s):
    """Weights that are numbers: a stencil."""
    return x[:, 2:] - 2 * x[:, 1:-1] + x[:, :-2]


def the_future(x, w, b, s):
    y = F.pad(x, (0, 0, 0, 2))
    return y[:, 2:] * w[:, 0] + y[:, 1:-1] * w[:, 1] + y[:, :-2] * w[:, 2]


def other_padding(x, w, b, s):
    return F.conv1d(F.pad(x.mT, (W - 1, 0), value=1.0)[..., :T], w[:, None], b, padding=1, groups=D)


def rotary(x, w, b, s):
    a, c = x[..., :3], x[..., 3:]
    return torch.cat([a * b[:3] - c * b[3:], a * b[3:] + c * b[:3]], -1)


def written_between_the_taps(x, w, b, s):
    """Every tap sees another padded x."""
    y = F.pad(x, (0, 0, 2, 0)).clone()
    z = y[:, 2:] * w[:, 0].detach()
    y.mul_(2)
    return z + y[:, 1:-1] * w[:, 1] + y[:, :-2] * w[:, 2]


SILENT = [
    same_padding, not_depthwise, strided, two_taps, weights_of_time, differences, the_future, other_padding, rotary,
    written_between_the_taps,
]  # fmt: skip


@pytest.mark.parametrize("fn", SILENT, ids=lambda f: f.__name__)
def test_leaves(fn):
    left(fn, operands())


def test_a_wrong_rewrite_is_refused(monkeypatch):
    """A pass that took the taps in the wrong order would cost speed, not the result."""
    right = match_short_conv.Emitter.weight
    monkeypatch.setattr(
        match_short_conv.Emitter, "weight", lambda self, conv: self.call(torch.flip, right(self, conv), [1])
    )

    def fn(x, w, b, s):
        return F.conv1d(x.mT, w[:, None], b, padding=W - 1, groups=D)[..., :T]  # here

    left(fn, operands(), "validation_failed", "differ by")


def test_what_cannot_be_written_is_refused(monkeypatch):
    """A mistake in writing the kernel's operands costs the rewrite, not the program."""

    def broken(self, conv):
        raise KeyError("no weight")

    monkeypatch.setattr(match_short_conv.Emitter, "weight", broken)

    def fn(x, w, b, s):
        return F.conv1d(x.mT, w[:, None], b, padding=W - 1, groups=D)[..., :T]  # here

    left(fn, operands(), "validation_failed", "cannot be written: KeyError")

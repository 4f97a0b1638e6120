"""Short convolutions that are refused, and what looks like one and is left without a word."""

import pytest
import torch
import torch.nn.functional as F
from short_convs import D, T, W, left, operands

from fla_compile.passes import match_short_conv

# Near misses that are refused, and what is refused for what is around it.


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


def a_product_written_before_it_is_done(x, w, b, s):
    x = x * (b > 0)
    y = F.pad(x, (0, 0, W - 1, 0))
    parts = [y[:, j : j + T] * w[:, j] for j in range(W)]
    x.mul_(2)
    return sum(parts)  # here


@pytest.mark.parametrize("fn", [written_before_it_is_done, a_product_written_before_it_is_done])
def test_refuses_writes_in_between(fn):
    left(fn, operands(), "mutates_input", "before it is done")


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


def masked_between_the_taps(x, w, b, s):
    keep = torch.cos(torch.arange(T))[:, None]
    y = F.pad(x, (0, 0, W - 1, 0))
    return sum(y[:, j : j + T] * keep.roll(j, 0) * w[:, j] for j in range(W))


SILENT = [
    masked_between_the_taps,
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

"""What looks like a distillation loss of two layers and is another: refused with a reason and a line, same numbers."""

import pytest
import torch
import torch.nn.functional as F
from divergences import B, T, V, assert_refused, layers
from programs import Passes, assert_same, here

from fla_compile.options import Options

MASK = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) > 0.3


def logs(x, w, tx, tw):
    """Log probabilities of the student and of the teacher."""
    return F.linear(x, w).log_softmax(-1), F.linear(tx, tw).detach().log_softmax(-1)


def logits_returned(x, w, tx, tw):
    z, t = F.linear(x, w), F.linear(tx, tw).detach()
    loss = F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="batchmean")  # here
    return loss, z


def teacher_logits_returned(x, w, tx, tw):
    z, t = F.linear(x, w), F.linear(tx, tw).detach()
    loss = F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="batchmean")  # here
    return loss, t.sin()


def rows_returned(x, w, tx, tw):
    s, t = logs(x, w, tx, tw)
    rows = (t.exp() * (t - s)).sum(-1)
    return rows.mean(), rows.sin()  # here


ESCAPES = [logits_returned, teacher_logits_returned]


@pytest.mark.parametrize("fn", ESCAPES, ids=lambda fn: fn.__name__)
def test_escapes(fn):
    assert_refused(fn, layers(), "logits_used", "return the loss alone")


def test_rows_that_are_used_twice():
    """The rows are themselves a loss of the kernel's, and what is made of them stays."""
    backend = Passes()
    assert_same(rows_returned, torch.compile(rows_returned, backend=backend, fullgraph=True), layers())
    assert [r.pattern for r in backend.report.rewrites] == ["linear_kl_div"]


def a_teacher_that_learns(x, w, tx, tw):
    s, t = F.linear(x, w).log_softmax(-1), F.linear(tx, tw).log_softmax(-1)
    return F.kl_div(s, t, reduction="batchmean", log_target=True)  # here


def test_a_teacher_that_learns():
    assert_refused(a_teacher_that_learns, layers(), "teacher_gradient", "torch.no_grad()")


def over_the_wrong_axis(x, w, tx, tw):
    s, t = logs(x, w, tx, tw)
    return (t.exp() * (t - s)).mean(1).square().sum()  # here


def over_part_of_the_rows(x, w, tx, tw):
    s, t = logs(x, w, tx, tw)
    return (t.exp() * (t - s)).sum((1, 2)).square().sum()  # here


def weights_that_do_not_match(x, w, tx, tw):
    s, t = logs(x, w, tx, tw)
    return (t.exp() * (t - 0.5 * s)).sum(-1).mean()  # here


def swapped_in_one_place(x, w, tx, tw):
    s, t = logs(x, w, tx, tw)
    return (t.exp() * s - s.exp() * t).sum(-1).mean()  # here


def both_directions(x, w, tx, tw):
    s, t = logs(x, w, tx, tw)
    return ((t.exp() - s.exp()) * (t - s)).sum(-1).mean()  # here


def a_mixture_weighed_otherwise(x, w, tx, tw):
    s, t = logs(x, w, tx, tw)
    m = (0.3 * t.exp() + 0.7 * s.exp()).log()
    return (0.5 * t.exp() * (t - m) + 0.5 * s.exp() * (s - m)).sum(-1).mean()  # here


def a_skewed_divergence(x, w, tx, tw):
    s, t = logs(x, w, tx, tw)
    m = (0.1 * t.exp() + 0.9 * s.exp()).log()
    return F.kl_div(m, t, reduction="batchmean", log_target=True)  # here


def a_mixture_that_is_no_distribution(x, w, tx, tw):
    s, t = logs(x, w, tx, tw)
    m = (t.exp() + s.exp()).log()
    return (t.exp() * (t - m) + 2 * s.exp() * (s - m)).sum(-1).mean()  # here


def two_temperatures_of_one_side(x, w, tx, tw):
    z, t = F.linear(x, w), F.linear(tx, tw).detach().log_softmax(-1)
    return (z.softmax(-1) * ((z / 2).log_softmax(-1) - t)).sum(-1).mean()  # here


def means_of_other_rows(x, w, tx, tw):
    s, t = logs(x, w, tx, tw)
    q = t.exp()
    return (q * t).sum(-1).mean() - ((q * s).sum(-1) * MASK).sum() / MASK.sum()  # here


def capped_logits(x, w, tx, tw):
    s = (5 * torch.tanh(F.linear(x, w) / 5)).log_softmax(-1)
    t = F.linear(tx, tw).detach().softmax(-1)
    return F.kl_div(s, t, reduction="batchmean")  # here


def a_detached_part(x, w, tx, tw):
    s, t = logs(x, w, tx, tw)
    return (s.exp().detach() * (s - t)).sum(-1).mean()  # here


def a_part_without_gradient(x, w, tx, tw):
    s, t = logs(x, w, tx, tw)
    with torch.no_grad():
        p = s.exp()  # here
    return (p * (s - t)).sum(-1).mean()


def a_softmax_over_another_axis(x, w, tx, tw):
    s, t = F.linear(x, w).log_softmax(-1), F.linear(tx, tw).detach().softmax(1)
    return F.kl_div(s, t, reduction="batchmean")  # here


def raw_logits(x, w, tx, tw):
    z, t = F.linear(x, w), F.linear(tx, tw).detach().softmax(-1)
    return F.kl_div(z, t, reduction="batchmean")  # here


def a_teacher_from_elsewhere(x, w, tx, tw):
    t = (tx[..., :1] * torch.arange(V)).detach().softmax(-1) + 0 * F.linear(tx, tw).detach().mean()
    return F.kl_div(F.linear(x, w).log_softmax(-1), t, reduction="batchmean")  # here


def another_order_of_rows(x, w, tx, tw):
    s, t = F.linear(x[:, :B], w).log_softmax(-1), F.linear(tx[:, :B], tw).detach().softmax(-1)
    return F.kl_div(s, t.transpose(0, 1), reduction="batchmean")  # here


NEAR_MISSES = [
    over_the_wrong_axis, over_part_of_the_rows, weights_that_do_not_match, swapped_in_one_place, both_directions,
    a_mixture_weighed_otherwise, a_skewed_divergence, a_mixture_that_is_no_distribution, two_temperatures_of_one_side,
    means_of_other_rows, capped_logits, a_detached_part, a_part_without_gradient, a_softmax_over_another_axis,
    raw_logits, a_teacher_from_elsewhere, another_order_of_rows,
]  # fmt: skip


@pytest.mark.parametrize("fn", NEAR_MISSES, ids=lambda fn: fn.__name__)
def test_near_misses(fn):
    assert_refused(fn, layers(), "unsupported_loss")


def writes_to_the_input(x, w, tx, tw):
    x, t = x * 1.0, F.linear(tx, tw).log_softmax(-1)
    s = F.linear(x, w).log_softmax(-1)
    x.zero_()
    return F.kl_div(s, t, reduction="batchmean", log_target=True)  # here


def writes_to_the_teacher(x, w, tx, tw):
    tx = tx * 1.0
    t = F.linear(tx, tw).log_softmax(-1)
    tx.zero_()
    return F.kl_div(F.linear(x, w).log_softmax(-1), t, reduction="batchmean", log_target=True)  # here


def writes_to_the_mask(x, w, tx, tw):
    s, t, mask = *logs(x, w, tx, tw), MASK.float()
    rows = (t.exp() * (t - s)).sum(-1) * mask
    mask.zero_()
    return rows.sum()


@pytest.mark.parametrize("fn", [writes_to_the_input, writes_to_the_teacher])
def test_writes_in_between(fn):
    operands = layers()
    backend = Passes()
    with torch.no_grad():
        got = torch.compile(fn, backend=backend)(*operands)
    torch.testing.assert_close(got, fn(*operands))
    assert [(r.reason, r.source) for r in backend.report.refusals] == [("mutates_input", here(fn))]


def test_a_mask_that_changes():
    """The rows in front of the write are a loss by themselves. Without gradients: with them eager itself refuses."""
    operands, backend = layers(), Passes()
    with torch.no_grad():
        got = torch.compile(writes_to_the_mask, backend=backend)(*operands)
    torch.testing.assert_close(got, writes_to_the_mask(*operands))
    assert [r.pattern for r in backend.report.rewrites] == ["linear_kl_div"] and not backend.report.refusals
    assert "'none'" in backend.report.graph("after")


def logits_alike(x, w, tx, tw):
    return (F.linear(x, w) - F.linear(tx, tw).detach()).square().mean()


def probabilities_alike(x, w, tx, tw):
    return (F.linear(x, w).softmax(-1) - F.linear(tx, tw).detach().softmax(-1)).abs().sum()


@pytest.mark.parametrize("fn", [logits_alike, probabilities_alike], ids=lambda fn: fn.__name__)
def test_no_divergences(fn):
    backend = Passes()
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), layers())
    assert backend.report.rewrites == () and backend.report.refusals == ()


def plain(x, w, tx, tw):
    s, t = logs(x, w, tx, tw)
    return F.kl_div(s, t, reduction="batchmean", log_target=True)  # here


def test_disabled():
    backend = Passes(Options(disable=("linear_kl_div", "linear_cross_entropy")))
    assert_same(plain, torch.compile(plain, backend=backend, fullgraph=True), layers())
    assert backend.report.rewrites == () and backend.report.refusals == ()


def test_a_wrong_kernel_is_found(monkeypatch):
    """Validation runs both programs: with the direction mixed up on the way, nothing is rewritten."""
    from fla_compile.passes import kl_decide

    decide = kl_decide._kind
    monkeypatch.setattr(kl_decide, "_kind", lambda parts, weights: ("reverse_kl", *decide(parts, weights)[1:]))
    assert_refused(plain, layers(), "validation_failed", "differ by")

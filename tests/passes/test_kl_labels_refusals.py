"""Students whose logits have more uses than a divergence and a cross entropy of labels: why they stay as written."""

import pytest
import torch
import torch.nn.functional as F
from divergences import V, assert_labelled, layers
from programs import Passes, assert_same, here
from test_kl_labels import LABELS, ROWS, logits, soft_loss, sum_of_torch_losses

from fla_compile.options import Options


def logits_returned(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    hard = F.cross_entropy(z.view(-1, V), LABELS.view(-1))
    return hard + soft_loss(z, t), z  # here


def a_second_loss_of_labels(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    first, second = (F.cross_entropy(z.view(-1, V), y.view(-1)) for y in (LABELS, LABELS.clamp(min=3)))
    return soft_loss(z, t).sin() + first.sin() + second.cos()


def log_probabilities_returned(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    logp = z.view(-1, V).log_softmax(-1)
    return F.nll_loss(logp, LABELS.view(-1)) + soft_loss(z, t), logp.sin()  # here


def class_weights(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    return soft_loss(z, t) + F.cross_entropy(z.view(-1, V), LABELS.view(-1), weight=torch.arange(1.0, V + 1))


def another_loss_of_the_logits(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    return soft_loss(z, t) + F.multi_margin_loss(z.view(-1, V), LABELS.clamp(min=0).view(-1))


def one_loss_added_to_many(x, w, tx, tw):
    """The first step's cross entropy on top of the divergence of each."""
    z, t = logits(x, w, tx, tw)
    hard = F.cross_entropy(z[:, :1].reshape(-1, V), LABELS[:, :1].clamp(min=0).reshape(-1), reduction="none")
    return (hard[:, None] + F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="none").sum(-1)).sum()  # here


def written_before_the_other(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    hard, seen = F.cross_entropy(z.view(-1, V), LABELS.view(-1)), x.detach().mean() * 1.0
    loss = hard.sin() * (seen + hard)
    seen.add_(1.0)
    return loss + soft_loss(z, t).cos() * seen


ESCAPES = {
    logits_returned: logits_returned,
    log_probabilities_returned: log_probabilities_returned,
    one_loss_added_to_many: one_loss_added_to_many,
    a_second_loss_of_labels: soft_loss,
    class_weights: soft_loss,
    another_loss_of_the_logits: soft_loss,
    written_before_the_other: soft_loss,
}  # and in what of them the loss is that is refused


def refused(fn):
    """Why, and where, the pass leaves `fn` as it is; its numbers are those of eager."""
    backend = Passes(Options(disable=("linear_cross_entropy", "cross_entropy")))
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), layers())
    assert backend.report.rewrites == () and "fla_compile" not in backend.report.graph("after")
    (refusal,) = backend.report.refusals
    assert refusal.pattern == "linear_kl_div"
    return refusal.reason, refusal.source


@pytest.mark.parametrize("fn", ESCAPES, ids=lambda fn: fn.__name__)
def test_escapes(fn):
    assert refused(fn) == ("logits_used", here(ESCAPES[fn]))


def labels_of_the_teacher(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    return soft_loss(z, t) + F.cross_entropy(t.view(-1, V), LABELS.view(-1))  # here


def capped_logits(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    hard = F.cross_entropy((5 * torch.tanh(z / 5)).view(-1, V), LABELS.view(-1))
    return soft_loss(z, t) + hard  # here


def a_product_of_both(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    hard = F.cross_entropy(z.transpose(1, 2), LABELS, reduction="none")
    soft = F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="none").sum(-1)
    return (soft + hard).square().sum()  # here


def a_loss_without_its_target(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    return z.logsumexp(-1).mean() + soft_loss(z, t)  # here


def two_sets_of_labels(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    first, second = (F.cross_entropy(z.view(-1, V), y.view(-1)) for y in (LABELS, LABELS.clamp(min=3)))
    return soft_loss(z, t) + first + second  # here


def labels_at_two_scales(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    first, second = (F.cross_entropy(y.view(-1, V), LABELS.view(-1)) for y in (z, z / 2))
    return soft_loss(z, t) + first + second  # here


def a_detached_part(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    return soft_loss(z, t) + F.cross_entropy(z.view(-1, V).detach(), LABELS.view(-1))  # here


def a_constant_divergence(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    with torch.no_grad():
        soft = soft_loss(z, t)
    return soft, F.cross_entropy(z.view(-1, V), LABELS.view(-1))  # here


NEAR_MISSES = [
    labels_of_the_teacher, capped_logits, a_loss_without_its_target, two_sets_of_labels, labels_at_two_scales,
    a_detached_part, a_constant_divergence,
]  # fmt: skip


@pytest.mark.parametrize("fn", NEAR_MISSES, ids=lambda fn: fn.__name__)
def test_near_misses(fn):
    assert refused(fn) == ("unsupported_loss", here(fn))


def test_rows_that_are_multiplied():
    """What is made of both rows stays; the rows themselves are the kernel's."""
    assert_labelled(a_product_of_both, layers(), ROWS)


def writes_to_the_labels(x, w, tx, tw):
    labels = LABELS.clone()
    z, t = logits(x, w, tx, tw)
    hard = F.cross_entropy(z.view(-1, V), labels.view(-1))
    labels.zero_()
    return hard + soft_loss(z, t)  # here


def test_writes_to_the_labels():
    operands, backend = layers(), Passes(Options(disable=("linear_cross_entropy", "cross_entropy")))
    with torch.no_grad():
        got = torch.compile(writes_to_the_labels, backend=backend)(*operands)
    torch.testing.assert_close(got, writes_to_the_labels(*operands))
    assert "mutates_input" in [r.reason for r in backend.report.refusals] and backend.report.rewrites == ()


def test_a_wrong_kernel_is_found(monkeypatch):
    """Validation runs both programs: with a wrong scale of the labels' logits nothing is rewritten."""
    from fla_compile.passes import kl_labels

    decode = kl_labels.decode

    def wrong(value):
        found = decode(value)
        object.__setattr__(found, "smoothing", 0.1)
        return found

    monkeypatch.setattr(kl_labels, "decode", wrong)
    assert refused(sum_of_torch_losses)[0] == "validation_failed"

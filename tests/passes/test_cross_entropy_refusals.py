"""Cross entropies of logits that exist which are refused with reason and line, or left as none of ours."""

import pytest
import torch
import torch.nn.functional as F
from logits import CrossEntropies, assert_left, assert_refused, assert_taken, logits
from losses import B, T, V, mask, targets
from programs import assert_same

TARGET, IGNORED, MASK = targets(), targets(ignored=-100), mask()
CLASS_WEIGHTS = torch.arange(1.0, V + 1)


def class_weights(z):
    return F.cross_entropy(z.view(-1, V), TARGET.view(-1), weight=CLASS_WEIGHTS)  # here


def soft_targets(z):
    return F.cross_entropy(z.view(-1, V), torch.softmax(torch.arange(B * T * V).view(B * T, V).sin(), -1))  # here


def classes_in_the_middle(z):
    return F.cross_entropy(z.view(B, T, V), TARGET[:, :1].expand(B, V) % T)  # here


@pytest.mark.parametrize("fn", [class_weights, soft_targets, classes_in_the_middle], ids=lambda fn: fn.__name__)
def test_near_misses(fn):
    assert_refused(fn, [logits()], "unsupported_loss", "cross_entropy")
    assert_left(fn, [logits()], kernel=None)  # where nothing would be gained, nothing is said


def another_axis(z):
    return -F.log_softmax(z, 1).gather(-1, TARGET.unsqueeze(-1)).mean()


def half_a_target(z):
    return (z.logsumexp(-1) - 0.5 * z.gather(-1, TARGET.unsqueeze(-1)).squeeze(-1)).mean()


def logits_on_the_way(z):
    return F.cross_entropy((z * MASK.float().unsqueeze(-1)).view(-1, V), TARGET.view(-1))


def a_router(z):
    return torch.softmax(z, -1).topk(2, dim=-1).values.sum()


def a_softmax_of_scores(z):
    return torch.softmax(z @ z.mT, -1) @ z


@pytest.mark.parametrize(
    "fn",
    [another_axis, half_a_target, logits_on_the_way, a_router, a_softmax_of_scores],
    ids=lambda fn: fn.__name__,
)
def test_no_losses_of_ours(fn):
    assert_left(fn, [logits()])


def log_probabilities_returned(z):
    logp = F.log_softmax(z, -1)
    return -logp.gather(-1, TARGET.unsqueeze(-1)).mean(), logp  # here


def an_entropy_beside(z):
    logp = F.log_softmax(z, -1)
    entropy = -(logp.exp() * logp).sum(-1).mean()
    return -logp.gather(-1, TARGET.unsqueeze(-1)).mean() - 0.01 * entropy  # here


@pytest.mark.parametrize("fn", [log_probabilities_returned, an_entropy_beside], ids=lambda fn: fn.__name__)
def test_escapes(fn):
    assert_refused(fn, [logits()], "intermediate_used", "used at")


def two_losses(z):
    first = F.cross_entropy(z.view(-1, V), TARGET.view(-1))  # here
    return first.sin() + F.cross_entropy(z.view(-1, V), TARGET.flip(0).reshape(-1)).cos()


def test_two_losses():
    assert_refused(two_losses, [logits()], "logits_used", "another loss")


def writes_over_a_copy(z):
    z = z.float() + 0.0
    y = z.view(-1, V).clone()
    y.div_(2.0)
    return F.cross_entropy(y, TARGET.view(-1)), y


def writes_over_given_logits(z):
    z.mul_(0.5)
    return -F.log_softmax(z, -1).gather(-1, TARGET.unsqueeze(-1)).mean()  # here


def writes_to_the_target(z):
    t = TARGET.clone()
    found = F.log_softmax(z, -1).gather(-1, t.unsqueeze(-1))
    t.zero_()
    return -found.mean()


def test_writes():
    """What is written over is not read again; none of these is rewritten, and all give eager's numbers."""
    backend = CrossEntropies()
    assert_same(writes_over_a_copy, torch.compile(writes_over_a_copy, backend=backend, fullgraph=True), [logits()])
    assert not backend.found[-1].rewrites
    for fn in (writes_over_given_logits, writes_to_the_target):
        backend, given = CrossEntropies(), logits().requires_grad_()

        def run(z, fn=fn):
            return fn(z * 1.0 if fn is writes_to_the_target else z)

        with torch.no_grad():
            got, want = torch.compile(run, backend=backend)(given.clone()), run(given.clone())
        torch.testing.assert_close(got, want)
        assert "cross_entropy.default" not in backend.targets


def test_labels_prepared_in_place():
    """Writes to the targets before the loss reads them are no harm."""

    def fn(z):
        t = TARGET.clone()
        t[:, 0] = -100
        return F.cross_entropy(z.view(-1, V), t.view(-1))

    assert_taken(fn, [logits()])


def test_a_wrong_operator_is_found(monkeypatch):
    from fla_compile.passes import logits_emit

    monkeypatch.setattr(logits_emit.OverLogits, "uncut", lambda self, rows, order, axes, fill: self.method(
        "reshape", self.call(torch.zeros_like, rows), list(axes.values())))  # fmt: skip

    def fn(z):
        return F.cross_entropy(z.view(-1, V), TARGET.view(-1))  # here

    assert_refused(fn, [logits()], "validation_failed", "differ by")


# The surroundings.

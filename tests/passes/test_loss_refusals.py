"""What looks like the cross entropy of a layer and is another: refused with a reason and a line, same numbers."""

import pytest
import torch
import torch.nn.functional as F
from losses import B, T, V, assert_left, assert_refused, layer, mask, targets
from programs import Passes, assert_same, here

from fla_compile import explain
from fla_compile.backend import RefusedError
from fla_compile.options import Options

TARGET, IGNORED, MASK = targets(), targets(ignored=-100), mask()


def logits_returned(x, w):
    z = F.linear(x, w)
    loss = F.cross_entropy(z.view(-1, V), IGNORED.view(-1))  # here
    return loss, z


def logits_in_a_metric(x, w):
    z = F.linear(x, w)
    hits = (z.argmax(-1) == TARGET).float().mean()
    return F.cross_entropy(z.view(-1, V), TARGET.view(-1)) + 0 * hits  # here


def log_probabilities_returned(x, w):
    logp = F.log_softmax(F.linear(x, w), -1)
    return -logp.gather(-1, TARGET.unsqueeze(-1)).mean(), logp  # here


def two_losses(x, w):
    z = F.linear(x, w).view(-1, V)
    first = F.cross_entropy(z, TARGET.view(-1))  # here
    return first.sin() + F.cross_entropy(z, TARGET.flip(0).reshape(-1)).cos()


@pytest.mark.parametrize("fn", [logits_returned, logits_in_a_metric], ids=lambda fn: fn.__name__)
def test_escapes(fn):
    """The report also says what becomes of the loss over these logits."""
    assert_refused(fn, layer(), "logits_used", "return the loss alone", beside=("as written (Inductor)",))


@pytest.mark.parametrize("fn", [log_probabilities_returned, two_losses], ids=lambda fn: fn.__name__)
def test_escapes_of_more_than_logits(fn):
    assert_refused(fn, layer(), "logits_used", "return the loss alone")


def another_axis(x, w):
    return -F.log_softmax(F.linear(x, w), 1).gather(-1, TARGET.unsqueeze(-1)).mean()  # here


def class_weights(x, w):
    return F.cross_entropy(F.linear(x, w).view(-1, V), TARGET.view(-1), weight=torch.arange(1.0, V + 1))  # here


def soft_targets(x, w):
    q = torch.softmax(torch.arange(B * T * V).view(B * T, V).sin(), -1)
    return F.cross_entropy(F.linear(x, w).view(-1, V), q)  # here


def a_temperature_per_row(x, w):
    z = F.linear(x, w) * (1.0 + MASK.float()).unsqueeze(-1)  # here
    return F.cross_entropy(z.view(-1, V), TARGET.view(-1))


def a_temperature_per_class(x, w):
    z = F.linear(x, w) * torch.arange(1.0, V + 1)  # here
    return F.cross_entropy(z.view(-1, V), TARGET.view(-1))


def another_cap(x, w):
    z = torch.sigmoid(F.linear(x, w))  # here
    return F.cross_entropy(z.view(-1, V), TARGET.view(-1))


def soft_probabilities(x, w):
    q = torch.softmax(torch.arange(B * T * V).view(B, T, V).sin(), -1)
    return -(q * F.log_softmax(F.linear(x, w), -1)).sum(-1).mean()  # here


def targets_of_other_rows(x, w):
    z = F.linear(x, w).view(-1, V)
    return -z.log_softmax(-1)[torch.arange(B * T).flip(0), TARGET.view(-1)].mean()  # here


def targets_of_every_other_row(x, w):
    z = torch.cat([x, x]).view(-1, x.shape[-1]) @ w.T
    return -z.log_softmax(-1)[torch.arange(0, 2 * B * T, 2), TARGET.view(-1)].mean()  # here


def targets_from_the_second_row(x, w):
    z = F.linear(x, w).view(-1, V)
    return -z.log_softmax(-1)[torch.arange(-1, B * T - 1), TARGET.view(-1)].mean()  # here


def targets_of_rows_that_move(x, w):
    rows, z = torch.arange(B * T), F.linear(x, w).view(-1, V)
    rows -= 1
    return -z.log_softmax(-1)[rows, TARGET.view(-1)].mean()  # here


def targets_of_rows_that_move_before_a_cast(x, w):
    rows, z = torch.arange(B * T, dtype=torch.int32), F.linear(x, w).view(-1, V)
    rows -= 1
    return -z.log_softmax(-1)[rows.to(torch.int64), TARGET.view(-1)].mean()  # here


def targets_of_rows_that_were_rounded(x, w):
    rows, z = torch.arange(B * T, dtype=torch.float16).to(torch.int64), F.linear(x, w).view(-1, V)
    return -z.log_softmax(-1)[rows, TARGET.view(-1)].mean()  # here


def an_entropy_term(x, w):
    z = F.linear(x, w)
    lse = z.logsumexp(-1)
    return (lse - 0.5 * z.gather(-1, TARGET.unsqueeze(-1)).squeeze(-1)).mean()  # here


def z_loss_over_other_rows(x, w):
    z = F.linear(x, w).view(-1, V)
    return F.cross_entropy(z, IGNORED.view(-1)) + 0.1 * (z.logsumexp(-1) ** 2).mean()  # here


@pytest.mark.parametrize(
    ("fn", "detail"),
    [
        (another_axis, "log_softmax"),
        (class_weights, "cross_entropy"),
        (soft_targets, "cross_entropy"),
        (a_temperature_per_row, "other logits"),
        (a_temperature_per_class, "other logits"),
        (another_cap, "other logits"),
        (soft_probabilities, "log probabilities"),
        (targets_of_other_rows, "log probabilities"),
        (targets_of_every_other_row, "log probabilities"),
        (targets_from_the_second_row, "log probabilities"),
        (targets_of_rows_that_move, "log probabilities"),
        (targets_of_rows_that_move_before_a_cast, "log probabilities"),
        (targets_of_rows_that_were_rounded, "log probabilities"),
        (an_entropy_term, "0.5"),
        (z_loss_over_other_rows, "rows differently"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_near_misses(fn, detail):
    assert_refused(fn, layer(), "unsupported_loss", detail)


def a_detached_part(x, w):
    z = F.linear(x, w)
    return (z.logsumexp(-1).detach() - z.gather(-1, TARGET.unsqueeze(-1)).squeeze(-1)).mean()


def a_part_without_gradient(x, w):
    z = F.linear(x, w)
    with torch.no_grad():
        lse = z.logsumexp(-1)
    return (lse - z.gather(-1, TARGET.unsqueeze(-1)).squeeze(-1)).mean()  # here


def test_a_part_without_gradient():
    assert_refused(a_part_without_gradient, layer(), "unsupported_loss", "takes no gradient")


def test_a_detached_part():
    """No loss of ours at all: what is left of the layer is no logsumexp."""
    x, w = layer()
    backend = Passes()
    assert_same(a_detached_part, torch.compile(a_detached_part, backend=backend), (x, w))
    assert backend.report.rewrites == ()


def writes_to_the_input(x, w):
    x = x * 1.0
    z = F.linear(x, w)
    x.zero_()
    return F.cross_entropy(z.view(-1, V), TARGET.view(-1))  # here


def writes_to_the_target(x, w):
    t = TARGET.clone()
    z = F.log_softmax(F.linear(x, w), -1).gather(-1, t.unsqueeze(-1))
    t.zero_()
    return -z.mean()  # here


def writes_to_the_target_of_a_one_hot(x, w):
    t = TARGET.clone()
    hot = F.one_hot(t, V)
    t.zero_()
    return -(hot * F.log_softmax(F.linear(x, w), -1)).sum(-1).mean()  # here


def writes_to_the_target_between_its_uses(x, w):
    t = TARGET.clone()
    z = F.linear(x, w)
    first = z.gather(-1, t.unsqueeze(-1)).squeeze(-1)
    t.zero_()
    second = z.gather(-1, t.unsqueeze(-1)).squeeze(-1)
    return (z.logsumexp(-1) - 0.5 * first - 0.5 * second).mean()  # here


@pytest.mark.parametrize(
    "fn",
    [
        writes_to_the_input,
        writes_to_the_target,
        writes_to_the_target_of_a_one_hot,
        writes_to_the_target_between_its_uses,
    ],
    ids=lambda fn: fn.__name__,
)
def test_writes_in_between(fn):
    """Without gradients: with them eager itself refuses the second."""
    x, w = layer()
    backend = Passes()
    with torch.no_grad():
        got = torch.compile(fn, backend=backend)(x, w)
    torch.testing.assert_close(got, fn(x, w))
    assert [(r.reason, r.source) for r in backend.report.refusals] == [("mutates_input", here(fn))]


def a_router(x, w):
    return torch.softmax(F.linear(x, w), -1).topk(2, dim=-1).values.sum()


def attention(x, w):
    return torch.softmax(x @ x.mT, -1) @ x


def a_gated_layer(x, w):
    return torch.tanh(F.linear(x, w)).exp().sum(-1).log()


@pytest.mark.parametrize("fn", [a_router, attention, a_gated_layer], ids=lambda fn: fn.__name__)
def test_no_losses(fn):
    x, w = layer()
    assert_left(fn, (x, w) if fn is not attention else (x, x))


def plain(x, w):
    return F.cross_entropy(F.linear(x, w).view(-1, V), TARGET.view(-1))


def test_disabled():
    assert_left(plain, layer(), options=Options(disable=("linear_cross_entropy",)))


def test_strict():
    x, w = layer()
    with pytest.raises(RefusedError, match="linear_cross_entropy refused: logits_used"):
        torch.compile(logits_returned, backend="fla", options={"strict": True})(x, w)


def test_a_wrong_kernel_is_found(monkeypatch):
    """Validation runs both programs: with the smoothing lost on the way, nothing is rewritten."""
    from fla_compile.passes import loss_decide

    decide = loss_decide._with_factors
    monkeypatch.setattr(loss_decide, "_with_factors", lambda v, t, s, f, smoothing, z: decide(v, t, s, f, 0.0, z))

    def smoothed(x, w):
        return F.cross_entropy(F.linear(x, w).view(-1, V), TARGET.view(-1), label_smoothing=0.1)  # here

    assert_refused(smoothed, layer(), "validation_failed", "differ by")


def test_a_large_vocabulary_is_checked_on_few_rows():
    """4096 rows of 50,000 classes: nothing of that size is made to check it."""
    x, w = torch.randn(4, 1024, 16), torch.randn(50000, 16)
    target = torch.randint(0, 50000, (4, 1024))
    report = explain(
        lambda x, w, t: F.cross_entropy(F.linear(x, w)[:, :-1].reshape(-1, 50000), t[:, 1:].reshape(-1)), x, w, target
    )
    assert [r.pattern for r in report.rewrites] == ["linear_cross_entropy"]
    assert 0 < report.validation_seconds < 10

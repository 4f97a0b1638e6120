"""A student with a cross entropy of its labels beside the divergence: one operator, or a reason why not."""

import pytest
import torch
import torch.nn.functional as F
from divergences import B, D, E, T, V, assert_labelled, layers
from programs import Passes, assert_same
from torch import nn

from fla_compile import explain

LABELS = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
LABELS[0, 2] = LABELS[1, 0] = -100
MASK = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) > 0.3
ALPHA, TEMPERATURE = 0.3, 2.0
SUM, ROWS = "linear_distillation", "linear_distillation_rows"


def logits(x, w, tx, tw):
    """Of the student and of the teacher."""
    return F.linear(x, w), F.linear(tx, tw).detach()


def soft_loss(z, t):
    """The usual one: times T^2, over the batch."""
    logp, q = F.log_softmax(z / TEMPERATURE, -1), F.softmax(t / TEMPERATURE, -1)
    return F.kl_div(logp, q, reduction="batchmean") * TEMPERATURE**2  # here


def sum_of_torch_losses(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    hard = F.cross_entropy(z.view(-1, V), LABELS.view(-1))
    return ALPHA * hard + (1 - ALPHA) * soft_loss(z, t)


def sum_of_log_softmax_and_nll_loss(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    hard = F.nll_loss(F.log_softmax(z, -1).view(-1, V), LABELS.view(-1), reduction="sum")
    return soft_loss(z, t) + hard / 7


def sum_of_shifted_labels(x, w, tx, tw):
    """Labels a step ahead, the divergence of all steps; logits cast to float32."""
    z, t = (y.float() for y in logits(x, w, tx, tw))
    hard = F.cross_entropy(z[:, :-1].reshape(-1, V), LABELS[:, 1:].reshape(-1))
    return torch.add(soft_loss(z, t), hard, alpha=0.5)


def sum_of_a_shift_for_both(x, w, tx, tw):
    z, t = (y[..., :-1, :].contiguous().view(-1, V) for y in logits(x, w, tx, tw))
    return 0.1 * soft_loss(z, t) + 0.9 * nn.CrossEntropyLoss()(z, LABELS[..., 1:].reshape(-1))


def sum_of_padded_labels(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    shifted = F.pad(LABELS, (0, 1), value=-100)[..., 1:].contiguous()
    return soft_loss(z, t) + F.cross_entropy(z.float().view(-1, V), shifted.view(-1), ignore_index=-100)


def sum_of_a_divergence_of_some_rows(x, w, tx, tw):
    """The labels of all rows, the divergence of a part and masked."""
    z, t = logits(x, w, tx, tw)
    rows = F.kl_div(z[:, 1:].log_softmax(-1), t[:, 1:].softmax(-1), reduction="none").sum(-1) * MASK[:, 1:]
    return rows.sum() / MASK[:, 1:].sum() + F.cross_entropy(z.view(-1, V), LABELS.view(-1), reduction="sum") / 9


def sum_over_rows(x, w, tx, tw):
    """Row by row, then one mask for both."""
    z, t = logits(x, w, tx, tw)
    hard = -z.log_softmax(-1).gather(-1, LABELS.clamp(min=0)[..., None]).squeeze(-1)
    soft = F.kl_div((z / 3).log_softmax(-1), (t / 3).log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return ((0.2 * hard + 0.8 * 9 * soft) * MASK).sum() / MASK.sum()


def sum_by_index(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    labels = LABELS.view(-1).clamp(min=-V)  # those below zero count from the last
    hard = z.view(-1, V).log_softmax(-1)[torch.arange(B * T), labels]
    return soft_loss(z, t) - (hard * MASK.view(-1)).sum()


def sum_with_a_tensor_for_a_weight(x, w, tx, tw, alpha=torch.tensor(0.3)):  # noqa: B008
    z, t = logits(x, w, tx, tw)
    return alpha * F.cross_entropy(z.view(-1, V), LABELS.view(-1)) + (1 - alpha) * soft_loss(z, t)


def sum_by_lerp(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    return torch.lerp(soft_loss(z, t), F.cross_entropy(z.view(-1, V), LABELS.view(-1)), 0.25)


def sum_in_place(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    loss = 0.0
    loss += F.cross_entropy(z.view(-1, V), LABELS.view(-1))
    loss += soft_loss(z, t)
    return loss


def sum_of_smoothed_labels(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    return soft_loss(z, t) + F.cross_entropy(z.view(-1, V), LABELS.view(-1), label_smoothing=0.1)


def sum_with_a_z_loss(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    lse = z.logsumexp(-1)
    rows = lse - z.gather(-1, LABELS.clamp(min=0)[..., None]).squeeze(-1) + 0.01 * lse.square()
    return rows.mean() + soft_loss(z, t)


def sum_of_weighted_rows(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    each = F.cross_entropy(z.view(-1, V), LABELS.view(-1), reduction="none").view(B, T)
    return soft_loss(z, t) + (each * torch.linspace(0.0, 1.0, T)).sum() / (LABELS != -100).sum()


def sum_at_one_temperature(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    logp = z.log_softmax(-1)
    hard = F.nll_loss(logp.view(-1, V), LABELS.view(-1))
    return hard + F.kl_div(logp, t.softmax(-1), reduction="batchmean")


SUMS = [fn for name, fn in list(globals().items()) if name.startswith("sum_")]
MORE = [sum_of_padded_labels, sum_of_a_shift_for_both, sum_of_weighted_rows, sum_at_one_temperature, sum_in_place]


@pytest.mark.parametrize("fn", [fn for fn in SUMS if fn not in MORE], ids=lambda fn: fn.__name__)
def test_sums(fn):
    assert_labelled(fn, layers(), SUM)


@pytest.mark.slow
@pytest.mark.parametrize("fn", MORE, ids=lambda fn: fn.__name__)
def test_more_sums(fn):
    assert_labelled(fn, layers(), SUM)


def mixture(z, t):
    p, q = z.softmax(-1), t.softmax(-1)
    logm = (0.5 * (p + q)).log()
    return 0.5 * (F.kl_div(logm, p, reduction="batchmean") + F.kl_div(logm, q, reduction="batchmean"))


def reverse(z, t):
    logp, logq = z.log_softmax(-1), t.log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1).mean()


@pytest.mark.parametrize(("soft", "kind"), [(mixture, "jensen_shannon"), (reverse, "reverse_kl")])
def test_kinds(soft, kind):
    def fn(x, w, tx, tw):
        z, t = logits(x, w, tx, tw)
        return soft(z, t) + 0.5 * F.cross_entropy(z.view(-1, V), LABELS.view(-1))

    assert_labelled(fn, layers(), SUM, kind)


def rows_of_parts_returned(x, w, tx, tw):
    """What is logged is returned beside the loss."""
    z, t = logits(x, w, tx, tw)
    hard, soft = F.cross_entropy(z.view(-1, V), LABELS.view(-1)), soft_loss(z, t)
    return ALPHA * hard + (1 - ALPHA) * soft, hard, soft.detach()


def rows_of_two_losses(x, w, tx, tw):
    """Losses that meet in no sum."""
    z, t = logits(x, w, tx, tw)
    soft = soft_loss(z, t)
    return soft.sqrt() * F.cross_entropy(z[:, :-1].reshape(-1, V), LABELS[:, 1:].reshape(-1)).square()


def rows_with_a_learned_weight(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    alpha = x.mean().sigmoid()
    return alpha * F.cross_entropy(z.view(-1, V), LABELS.view(-1)) + (1 - alpha) * soft_loss(z, t)


def rows_of_a_teacher_that_comes_last(x, w, tx, tw):
    """The cross entropy is in use before the teacher has run, which switches gradients off and on."""
    z = F.linear(x, w)
    hard = F.cross_entropy(z.view(-1, V), LABELS.view(-1)).sqrt() * x.mean()
    with torch.no_grad():
        t = F.linear(tx, tw)
    return hard + soft_loss(z, t)


def rows_with_a_mask_of_the_other(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    hard = F.cross_entropy(z.transpose(1, 2), LABELS, reduction="none")
    rows = F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="none").sum(-1)
    return (rows * (hard.detach() > 2.0)).sum() * hard.sum()


def rows_themselves(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    hard = F.cross_entropy(z.transpose(1, 2), LABELS, reduction="none")
    return hard, F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="none").sum(-1) * MASK


def rows_of_fewer_labels(x, w, tx, tw):
    z, t = logits(x, w, tx, tw)
    hard = F.cross_entropy(z[:, :-1].transpose(1, 2), LABELS[:, 1:], reduction="none")
    return hard.cos(), F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="none").sum(-1).mean(0)


def rows_added(x, w, tx, tw):
    """A sum for each row, and then what no operator has."""
    z, t = logits(x, w, tx, tw)
    hard = F.cross_entropy(z.transpose(1, 2), LABELS, reduction="none")
    return (hard + F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="none").sum(-1)).tanh()


SEVERAL = [fn for name, fn in list(globals().items()) if name.startswith("rows_")]


@pytest.mark.parametrize("fn", SEVERAL, ids=lambda fn: fn.__name__)
def test_losses_of_any_use(fn):
    assert_labelled(fn, layers(), ROWS)


def test_biases_and_dtypes():
    def fn(x, w, tx, tw, b, tb):
        z, t = x @ w.T + b, F.linear(tx, tw, tb).detach()
        return soft_loss(z, t) + F.cross_entropy(z.view(-1, V), LABELS.view(-1))

    report = assert_labelled(fn, layers(bias=True, dtype=torch.float64), SUM)
    assert "torch.float64" in report.graph("after") and ", True, True, True)" in report.graph("after")

    def upcast(x, w, tx, tw):
        z, t = (y.float() for y in logits(x, w, tx, tw))
        return soft_loss(z, t) + F.cross_entropy(z.view(-1, V), LABELS.view(-1))

    assert_labelled(upcast, layers(dtype=torch.bfloat16), SUM)


def test_autocast():
    """Under autocast both layers run in bfloat16: as near to the truth as eager."""
    fn, operands, found = sum_of_torch_losses, layers(), []
    for compiled in (False, True):
        leaves = [y.clone().requires_grad_() for y in operands]
        run = torch.compile(fn, backend=(backend := Passes())) if compiled else fn
        with torch.autocast("cpu", torch.bfloat16):
            loss = run(*leaves)
        found.append((loss, *torch.autograd.grad(loss, leaves[:2])))
    assert [r.pattern for r in backend.report.rewrites] == ["linear_kl_div"]
    truth = fn(*(y.double() for y in operands))
    assert abs(found[1][0] - truth) <= 2 * abs(found[0][0] - truth) + 1e-3
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=2e-2)
        assert a.dtype == b.dtype == torch.float32


def test_a_batch_of_one():
    x, w, tx, tw = layers()

    def fn(x, w, tx, tw):
        z, t = logits(x, w, tx, tw)
        return soft_loss(z, t) + F.cross_entropy(z[:, :-1].reshape(-1, V), LABELS[:1, 1:].reshape(-1))

    assert_labelled(fn, (x[:1], w, tx[:1], tw), SUM)


def test_no_labels_at_all():
    """A mean of no rows is NaN, as eager has it, and the student's gradient is that of the divergence."""

    def fn(x, w, tx, tw):
        z, t = logits(x, w, tx, tw)
        return soft_loss(z, t) + F.cross_entropy(z.view(-1, V), torch.full((B * T,), -100))

    operands, backend = layers(), Passes()
    loss = torch.compile(fn, backend=backend)(operands[0].requires_grad_(), *operands[1:])
    assert loss.isnan() and [r.pattern for r in backend.report.rewrites] == ["linear_kl_div"]


@pytest.mark.parametrize("fn", [sum_of_torch_losses, rows_of_two_losses], ids=lambda fn: fn.__name__)
def test_without_gradients(fn):
    operands = [y.requires_grad_() for y in layers()]
    backend = Passes()
    with torch.no_grad():
        got = torch.compile(fn, backend=backend)(*operands)
    torch.testing.assert_close(got, fn(*operands).detach())
    assert [r.pattern for r in backend.report.rewrites] == ["linear_kl_div"] and not backend.report.refusals


def test_without_gradients_the_labels_tell_the_student():
    """In evaluation the other direction has a name too: of the two layers the one with labels is the student."""

    def fn(x, w, tx, tw):
        z, t = logits(x, w, tx, tw)
        return reverse(z, t).sin(), F.cross_entropy(z.view(-1, V), LABELS.view(-1))

    operands, backend = layers(), Passes()
    with torch.no_grad():
        got = torch.compile(fn, backend=backend)(*operands)
        torch.testing.assert_close(got, fn(*operands))
    assert [r.pattern for r in backend.report.rewrites] == ["linear_kl_div"]
    assert "'reverse_kl'" in backend.report.graph("after")


def test_dynamic_sizes():
    """One graph serves every batch and length, with labels of fewer rows than the divergence has."""

    def fn(x, w, tx, tw, labels):
        z, t = logits(x, w, tx, tw)
        return soft_loss(z, t) + F.cross_entropy(z[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))

    def dynamic(y, axes):
        torch._dynamo.mark_dynamic(y, [0, 1] if axes > 1 else [])
        return y

    backend = Passes()
    compiled = torch.compile(fn, backend=backend, fullgraph=True)
    for b, length in ((2, 5), (3, 9)):
        labels = torch.randint(0, V, (b, length))
        operands = torch.randn(b, length, D), torch.randn(V, D), torch.randn(b, length, E), torch.randn(V, E)

        def run(*given, labels=labels):
            return compiled(*(dynamic(y, y.ndim - 1) for y in given), dynamic(labels, 2))

        assert_same(lambda *given, labels=labels: fn(*given, labels), run, operands)
    (report,) = backend.reports
    assert [r.pattern for r in report.rewrites] == ["linear_kl_div"] and not report.refusals


class Distilled(nn.Module):
    """A small student that learns from labels and from a frozen teacher of another width."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V)
        self.teacher = nn.Sequential(nn.Embedding(V, E), nn.Tanh(), nn.Linear(E, V, bias=False))

    def forward(self, tokens):
        with torch.no_grad():
            t = self.teacher(tokens).float()
        z = self.head(torch.tanh(self.embed(tokens))).float()
        hard = F.cross_entropy(z[:, :-1].reshape(-1, V), tokens[:, 1:].reshape(-1))
        return ALPHA * hard + (1 - ALPHA) * soft_loss(z, t)


@pytest.mark.parametrize("then", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_training(then):
    """Some steps give the weights that eager gives."""
    tokens, found = torch.randint(0, V, (4, T)), []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Distilled()
        step = torch.compile(model, backend=(backend := Passes(then=then)), fullgraph=True) if compiled else model
        optimizer = torch.optim.SGD([*model.embed.parameters(), *model.head.parameters()], 1.0)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = step(tokens)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        found.append([torch.tensor(losses), *(p.detach() for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert [r.pattern for r in backend.report.rewrites] == ["linear_kl_div"] and not backend.report.refusals


def test_two_losses_in_training():
    """The rows' operator under AOTAutograd, where both losses get gradients that nobody knows before."""
    backend = Passes(then="aot_eager")
    fn = rows_of_parts_returned
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), layers())
    assert [r.pattern for r in backend.report.rewrites] == ["linear_kl_div"]


def test_explain():
    report = explain(sum_of_torch_losses, *layers())
    (rewrite,) = report.rewrites
    assert rewrite.equation == "l = KL(softmax(W' x'), softmax(W x)), l = logsumexp(W x) - (W x)_t"
    assert rewrite.kernel == "chunks of rows (matrix products, torch)" and report.refusals == ()

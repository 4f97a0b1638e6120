"""Distillation losses in many spellings: recognised, with the values and gradients of the program."""

import pytest
import torch
import torch.nn.functional as F
from divergences import B, D, E, T, V, assert_divided, layers
from programs import Passes, assert_same
from torch import nn

from fla_compile import explain

MASK = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) > 0.3
TEMPERATURE = 2.0


def forward_by_kl_div(x, w, tx, tw):
    s, t = F.linear(x, w), F.linear(tx, tw).detach()
    return F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="batchmean")


def forward_by_log_target(x, w, tx, tw):
    with torch.no_grad():
        t = F.log_softmax(tx @ tw.t() / TEMPERATURE, dim=-1)
    s = F.log_softmax(x @ w.t() / TEMPERATURE, dim=-1)
    return F.kl_div(s, t, reduction="batchmean", log_target=True) * TEMPERATURE**2


def forward_by_module(x, w, tx, tw):
    s, t = (F.linear(x, w).view(-1, V) / 3, F.linear(tx, tw).detach().view(-1, V) / 3)
    return nn.KLDivLoss(reduction="batchmean")(s.log_softmax(1), t.softmax(1)) * 9


def forward_by_sum(x, w, tx, tw):
    s, t = F.linear(x, w).float(), F.linear(tx, tw).detach().float()
    return F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1, dtype=torch.float32), reduction="sum") / 7


def forward_by_mean_of_elements(x, w, tx, tw):
    s, t = F.linear(x, w), F.linear(tx, tw).detach()
    return F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1))


def forward_by_rows(x, w, tx, tw):
    s, t = F.linear(x, w), F.linear(tx, tw).detach()
    return F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="none").sum(-1).mean()


def forward_by_rows_alone(x, w, tx, tw):
    s, t = F.linear(x, w), F.linear(tx, tw).detach()
    return F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="none").sum(-1)


def forward_by_hand(x, w, tx, tw):
    p = F.softmax(F.linear(tx, tw).detach(), -1)
    return (p * (p.log() - F.log_softmax(F.linear(x, w), -1))).sum(-1).mean()


def forward_by_entropies(x, w, tx, tw):
    t, s = F.linear(tx, tw).detach().log_softmax(-1), F.linear(x, w).log_softmax(-1)
    return (t.exp() * t).sum(-1).mean() - (t.exp() * s).sum(-1).mean()


def forward_by_exp_and_sum(x, w, tx, tw):
    z, y = F.linear(x, w), F.linear(tx, tw).detach()
    logp = z - z.logsumexp(-1, keepdim=True)
    y = y - y.amax(-1, keepdim=True)
    q = y.exp() / y.exp().sum(-1, keepdim=True)
    return (q * (torch.log(q) - logp)).sum()


def forward_by_xlogy(x, w, tx, tw):
    q = torch.softmax(F.linear(tx, tw).detach(), -1)
    return (torch.xlogy(q, q) - q * torch.log_softmax(F.linear(x, w), -1)).sum(-1).mean()


def forward_by_shift(x, w, tx, tw):
    s, t = F.linear(x, w)[:, :-1], F.linear(tx, tw)[:, :-1].detach()
    return F.kl_div(s.reshape(-1, V).log_softmax(-1), t.reshape(-1, V).softmax(-1), reduction="batchmean")


def forward_by_masked_mean(x, w, tx, tw):
    s, t = F.linear(x, w), F.linear(tx, tw).detach()
    rows = F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="none").sum(-1)
    return (rows * MASK).sum() / MASK.sum()


def forward_by_masked_elements(x, w, tx, tw):
    s, t = F.linear(x, w), F.linear(tx, tw).detach()
    each = F.kl_div(F.log_softmax(s, -1), F.log_softmax(t, -1), reduction="none", log_target=True)
    return (each * MASK.unsqueeze(-1).float()).sum() / MASK.float().sum()


def forward_by_where(x, w, tx, tw):
    s, t = F.linear(x, w), F.linear(tx, tw).detach()
    rows = F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="none").sum(-1)
    return torch.where(MASK, rows, 0.0).mean()


def forward_by_masked_fill(x, w, tx, tw):
    s, t = F.linear(x, w), F.linear(tx, tw).detach()
    each = F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="none")
    return each.masked_fill(~MASK[..., None], 0.0).sum() / MASK.sum()


def forward_by_flat_student(x, w, tx, tw):
    s, t = F.linear(x.view(-1, D), w), F.linear(tx, tw).detach()
    return F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1).view(-1, V), reduction="batchmean")


def forward_by_writing_over(x, w, tx, tw):
    s, t = F.linear(x, w), F.linear(tx, tw).detach()
    s.div_(2.0)
    return F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="batchmean").mul_(4.0)


def forward_with_two_temperatures(x, w, tx, tw):
    s, t = F.linear(x, w) * 0.5, F.linear(tx, tw).detach() / 3
    return F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="batchmean")


def reverse_by_kl_div(x, w, tx, tw):
    s, t = F.linear(x, w).log_softmax(-1), F.linear(tx, tw).detach().log_softmax(-1)
    return F.kl_div(t, s, reduction="batchmean", log_target=True)


def reverse_by_hand(x, w, tx, tw):
    s, t = F.linear(x, w).log_softmax(-1), F.linear(tx, tw).detach().log_softmax(-1)
    return (s.exp() * (s - t)).sum(-1).mean()


def reverse_by_exp_log(x, w, tx, tw):
    p, q = F.linear(x, w).softmax(-1), F.linear(tx, tw).detach().softmax(-1)
    return -(p * (q.log() - p.log())).sum(dim=-1).mean()


def mixture_by_halves(x, w, tx, tw):
    p, q = F.linear(x, w).softmax(-1), F.linear(tx, tw).detach().softmax(-1)
    logm = (0.5 * (p + q)).log()
    of_p = F.kl_div(logm, p, reduction="batchmean")
    return 0.5 * (of_p + F.kl_div(logm, q, reduction="batchmean"))


def mixture_by_hand(x, w, tx, tw):
    p, q = F.linear(x, w).softmax(-1), F.linear(tx, tw).detach().softmax(-1)
    m = 0.3 * q + 0.7 * p
    rows = 0.3 * (q * (q.log() - m.log())).sum(-1) + 0.7 * (p * (p.log() - m.log())).sum(-1)
    return rows.mean()


def mixture_by_logsumexp(x, w, tx, tw):
    """As trainers of generalised distillation have it."""
    s = F.log_softmax(F.linear(x, w) / TEMPERATURE, dim=-1)
    t = F.log_softmax(F.linear(tx, tw).detach() / TEMPERATURE, dim=-1)
    beta = torch.tensor(0.1, dtype=s.dtype)
    m = torch.logsumexp(torch.stack([s + torch.log1p(-beta), t + torch.log(beta)]), dim=0)
    of_t = F.kl_div(m, t, reduction="none", log_target=True)
    of_s = F.kl_div(m, s, reduction="none", log_target=True)
    jsd = beta * of_t + (1 - beta) * of_s
    return jsd.sum() / jsd.size(0)


def mixture_by_logaddexp(x, w, tx, tw):
    s, t = F.linear(x, w).log_softmax(-1), F.linear(tx, tw).detach().log_softmax(-1)
    m = torch.logaddexp(s, t) - 0.6931471805599453
    return (t.exp() * (t - m) + s.exp() * (s - m)).sum(-1).mean() / 2


def mixture_by_lerp(x, w, tx, tw):
    p, q = F.linear(x, w).softmax(-1), F.linear(tx, tw).detach().softmax(-1)
    logm = torch.lerp(p, q, 0.25).log()
    return (F.kl_div(logm, q, reduction="none") * 0.25 + F.kl_div(logm, p, reduction="none") * 0.75).sum(-1).mean()


def soft_targets_by_cross_entropy(x, w, tx, tw):
    s, t = F.linear(x, w).view(-1, V), F.linear(tx, tw).detach().view(-1, V)
    return F.cross_entropy(s / TEMPERATURE, F.softmax(t / TEMPERATURE, -1))


def soft_targets_by_hand(x, w, tx, tw):
    q = F.linear(tx, tw).detach().softmax(-1)
    return -(q * F.linear(x, w).log_softmax(-1)).sum(-1).mean()


KINDS = {"forward": "forward_kl", "reverse": "reverse_kl", "mixture": "jensen_shannon", "soft": "cross_entropy"}
SPELLINGS = [fn for name, fn in list(globals().items()) if name.split("_")[0] in KINDS]


@pytest.mark.parametrize("fn", SPELLINGS, ids=lambda fn: fn.__name__)
def test_spellings(fn):
    assert_divided(fn, layers(), KINDS[fn.__name__.split("_")[0]])


@pytest.mark.parametrize("fn", [forward_by_kl_div, mixture_by_hand], ids=lambda fn: fn.__name__)
def test_float64(fn):
    assert_divided(fn, layers(dtype=torch.float64), KINDS[fn.__name__.split("_")[0]])


def test_bfloat16():
    assert_divided(forward_by_sum, layers(dtype=torch.bfloat16), "forward_kl")


def by_layer_bias(x, w, tx, tw, b, tb):
    s, t = F.linear(x, w, b), F.linear(tx, tw, tb).detach()
    return F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="batchmean")


def by_added_bias(x, w, tx, tw, b, tb):
    s, t = x @ w.T + b, (tx @ tw.T + tb).detach()
    return F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="batchmean")


def by_bias_of_the_student(x, w, tx, tw, b, tb):
    s, t = F.linear(x, w, b), F.linear(tx, tw).detach()
    return F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="batchmean") + 0 * tb.sum()


@pytest.mark.parametrize("fn", [by_layer_bias, by_added_bias, by_bias_of_the_student], ids=lambda fn: fn.__name__)
def test_biases(fn):
    report = assert_divided(fn, layers(bias=True), "forward_kl")
    assert ", True, True, True)" in report.graph("after")


def test_the_arguments_of_the_kernel():
    """Temperatures, mixture and reductions reach the kernel as numbers, not as operations around it."""
    after = assert_divided(forward_by_log_target, layers(), "forward_kl").graph("after")
    assert "None, None, 0.5, 0.5, 'forward_kl', 0.5, 'sum', True, True, False)" in after
    after = assert_divided(mixture_by_logsumexp, layers(), "jensen_shannon").graph("after")
    assert "0.5, 0.5, 'jensen_shannon', 0.1" in after
    assert "'mean'" in assert_divided(reverse_by_hand, layers(), "reverse_kl").graph("after")
    assert "'none'" in assert_divided(forward_by_rows_alone, layers(), "forward_kl").graph("after")


def test_one_layer_for_both():
    """Self-distillation: one weight, two inputs; or one input and a frozen copy of the weight."""

    def shared(x, w, tx):
        s, t = F.linear(x, w), F.linear(tx, w).detach()
        return F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="batchmean")

    def copied(x, w, old):
        s, t = F.linear(x, w), F.linear(x, old).detach()
        return F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="batchmean")

    x, w, *_ = layers()
    assert_divided(shared, (x, w, x.flip(0)), "forward_kl")
    assert_divided(copied, (x, w, w.flip(0)), "forward_kl")


class Distilled(nn.Module):
    """A small student that learns from a frozen teacher of another width."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V)
        self.teacher = nn.Sequential(nn.Embedding(V, E), nn.Tanh(), nn.Linear(E, V, bias=False))

    def forward(self, tokens):
        with torch.no_grad():
            targets = F.softmax(self.teacher(tokens).float() / TEMPERATURE, -1)
        logits = self.head(torch.tanh(self.embed(tokens)))
        logp = F.log_softmax(logits.float() / TEMPERATURE, -1)
        return F.kl_div(logp, targets, reduction="batchmean") * TEMPERATURE**2


def test_a_sum_of_two():
    """Of two teachers, or in both directions with products of their own: each is a loss by itself."""

    def fn(x, w, tx, tw):
        return 0.5 * reverse_by_hand(x, w, tx, tw) + forward_by_kl_div(x, w, 2 * tx, tw)

    backend = Passes()
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), layers())
    assert [r.pattern for r in backend.report.rewrites] == ["linear_kl_div"] * 2 and not backend.report.refusals


@pytest.mark.parametrize("then", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_training(then):
    """Some steps of distillation give the weights that eager gives, and the teacher keeps its own."""
    tokens, found = torch.randint(0, V, (4, T)), []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Distilled()
        before = [p.clone() for p in model.teacher.parameters()]
        step = torch.compile(model, backend=(backend := Passes(then=then)), fullgraph=True) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = step(tokens)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] and all(map(torch.equal, model.teacher.parameters(), before))
        found.append([torch.tensor(losses), *(p.detach() for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert [r.pattern for r in backend.report.rewrites] == ["linear_kl_div"] and not backend.report.refusals


@pytest.mark.slow
def test_through_the_backend():
    torch.manual_seed(0)
    model, tokens = Distilled(), torch.randint(0, V, (4, T))
    loss = torch.compile(model, backend="fla", fullgraph=True)(tokens)
    torch.testing.assert_close(loss, model(tokens))
    weights = [*model.embed.parameters(), *model.head.parameters()]
    for a, b in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(model(tokens), weights), strict=True):
        torch.testing.assert_close(a, b)


def test_checkpointed():
    def fn(*operands):
        return torch.utils.checkpoint.checkpoint(reverse_by_hand, *operands, use_reentrant=False)

    assert_divided(fn, layers(), "reverse_kl", then="aot_eager")


def test_autocast():
    """Under autocast both layers run in bfloat16, and so does the kernel: as near to the truth as eager."""
    operands = layers()
    found = []
    for compiled in (False, True):
        leaves = [y.clone().requires_grad_() for y in operands]
        fn = torch.compile(forward_by_kl_div, backend=(backend := Passes())) if compiled else forward_by_kl_div
        with torch.autocast("cpu", torch.bfloat16):
            loss = fn(*leaves)
        found.append((loss, *torch.autograd.grad(loss, leaves[:2])))
    assert [r.pattern for r in backend.report.rewrites] == ["linear_kl_div"]
    truth = forward_by_kl_div(*(y.double() for y in operands))
    assert abs(found[1][0] - truth) <= 2 * abs(found[0][0] - truth) + 1e-3
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=1e-2)
        assert a.dtype == b.dtype == torch.float32


@pytest.mark.parametrize("fn", [forward_by_kl_div, reverse_by_hand, mixture_by_hand], ids=lambda fn: fn.__name__)
def test_without_gradients(fn):
    """In evaluation no gradient is computed; which of the two is the student is then the kernel's choice."""
    operands = [y.requires_grad_() for y in layers()]
    backend = Passes()
    with torch.no_grad():
        got = torch.compile(fn, backend=backend)(*operands)
    torch.testing.assert_close(got, fn(*operands).detach())
    assert [r.pattern for r in backend.report.rewrites] == ["linear_kl_div"]
    assert ", False, False, False)" in backend.report.graph("after")


def test_beside_another_loss():
    """A cross entropy of another layer of the same shape stays its own."""

    def fn(x, w, tx, tw):
        labels = torch.arange(B * T) % V
        return reverse_by_hand(x, w, tx, tw) + F.cross_entropy(F.linear(x, 2 * w).view(-1, V), labels)

    backend = Passes()
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), layers())
    assert [r.pattern for r in backend.report.rewrites] == ["linear_kl_div", "linear_cross_entropy"]
    assert backend.report.refusals == ()


def test_two_of_them():
    def fn(x, w, tx, tw):
        first = forward_by_kl_div(x, w, tx, tw)
        return first.sin() + mixture_by_hand(x, 2 * w, tx, 3 * tw).cos()

    backend = Passes()
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), layers())
    assert [r.pattern for r in backend.report.rewrites] == ["linear_kl_div"] * 2 and not backend.report.refusals


def test_dynamic_sizes():
    """One graph serves every batch and length; batchmean divides by the batch of each."""

    def fn(x, w, tx, tw):
        s, t = F.linear(x, w)[:, :-1], F.linear(tx, tw)[:, :-1].detach()
        return F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="batchmean")

    def dynamic(y, axes):
        torch._dynamo.mark_dynamic(y, [0, 1] if axes > 1 else [])
        return y

    backend = Passes()
    compiled = torch.compile(fn, backend=backend, fullgraph=True)
    for b, length in ((2, 5), (3, 9), (4, 6)):
        operands = torch.randn(b, length, D), torch.randn(V, D), torch.randn(b, length, E), torch.randn(V, E)
        assert_same(fn, lambda *given: compiled(*(dynamic(y, y.ndim - 1) for y in given)), operands)
    (report,) = backend.reports
    assert len(report.rewrites) == 1


def test_a_large_vocabulary_is_checked_on_few_rows():
    shapes = (4, 1024, 16), (50000, 16), (4, 1024, 24), (50000, 24)
    report = explain(forward_by_kl_div, *(torch.randn(shape) for shape in shapes))
    assert [r.pattern for r in report.rewrites] == ["linear_kl_div"]
    assert 0 < report.validation_seconds < 10

"""Cross entropies of linear layers in many spellings: recognised, with the values and gradients of the program."""

import re

import pytest
import torch
import torch.nn.functional as F
from losses import B, D, T, V, assert_fused, layer, mask, targets
from programs import Passes, assert_same
from torch import nn
from torch.utils.checkpoint import checkpoint

from fla_compile import explain

IGNORED = targets(ignored=-100)
TARGET = targets()
MASK = mask()


# Torch's own losses; the layer, the axes and the shift.


def by_cross_entropy(x, w):
    return F.cross_entropy(F.linear(x, w).view(-1, V), IGNORED.view(-1))


def by_sum_of_floats(x, w):
    return F.cross_entropy(F.linear(x, w).flatten(0, 1).float(), IGNORED.flatten(), reduction="sum")


def by_classes_second(x, w):
    return F.cross_entropy((x @ w.t()).transpose(1, 2), IGNORED, label_smoothing=0.1)


def by_rows(x, w):
    return F.cross_entropy((x @ w.T).permute(0, 2, 1), IGNORED, reduction="none")


def by_shift(x, w):
    return F.cross_entropy((x @ w.T)[:, :-1].reshape(-1, V), IGNORED[:, 1:].reshape(-1))


def by_shift_of_both_rows(x, w):
    logits = F.linear(x, w)[..., :-1, :].contiguous()
    return F.cross_entropy(logits.view(-1, V), IGNORED[..., 1:].contiguous().view(-1), reduction="none")


def by_padded_labels(x, w):
    labels = F.pad(IGNORED, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(F.linear(x, w).float().view(-1, V), labels.view(-1), ignore_index=-100)


def by_narrow(x, w):
    return F.cross_entropy(F.linear(x, w).narrow(1, 0, T - 1).flatten(0, 1), IGNORED[:, 1:].flatten())


def by_nll_loss(x, w):
    return F.nll_loss(F.log_softmax(F.linear(x, w).view(-1, V) / 0.7, dim=1), IGNORED.view(-1))


def by_another_index(x, w):
    return F.cross_entropy(F.linear(x, w).view(-1, V), TARGET.view(-1), ignore_index=3)


def by_a_number_of_items(x, w):
    return F.cross_entropy(F.linear(x, w).view(-1, V), IGNORED.view(-1), reduction="sum") / 7


def by_split_rows(x, w):
    logits = F.linear(x.view(-1, D), w).view(2, T, V)
    return F.cross_entropy(logits[:, 1:].reshape(-1, V), IGNORED[:, 1:].reshape(-1))


def by_one_sequence(x, w):
    return F.cross_entropy(F.linear(x[0], w), TARGET[0])


def by_einsum(x, w):
    return F.cross_entropy(torch.einsum("btd,vd->btv", x, w).view(-1, V), IGNORED.view(-1))


def by_einsum_with_classes_first(x, w):
    return F.cross_entropy(torch.einsum("btd,vd->vbt", x, w).flatten(1).t(), IGNORED.view(-1))


def by_weight_first(x, w):
    return F.cross_entropy((w @ x.view(-1, D).T).T, IGNORED.view(-1))


# By hand: softmax, target and reduction.


def by_gather(x, w):
    return -F.log_softmax(x @ w.T, -1).gather(-1, TARGET.unsqueeze(-1)).squeeze(-1).mean()


def by_take_along_dim(x, w):
    return -torch.take_along_dim(F.linear(x, w).log_softmax(-1), indices=TARGET[..., None], dim=-1).mean()


def by_index(x, w):
    return -F.linear(x, w).view(-1, V).log_softmax(-1)[torch.arange(B * T), TARGET.view(-1)].mean()


def by_index_from_the_end(x, w):
    """Negative classes count from the last, here of rows that a mask leaves out and of some that it does not."""
    p = F.linear(x, w).flatten(0, 1).softmax(1)
    found = p[torch.arange(0, len(p), device=p.device), torch.where(MASK, TARGET, TARGET - V).view(-1)]
    return -(found.log() * (IGNORED.view(-1) > 0)).sum()


def by_logsumexp(x, w):
    z = F.linear(x, w)
    return (z.logsumexp(-1) - z.gather(-1, TARGET[..., None])[..., 0]).sum()


def by_a_shifted_softmax(x, w):
    z = F.linear(x, w)
    z = z - z.max(-1, keepdim=True).values
    return -(z - z.exp().sum(-1, keepdim=True).log()).gather(2, TARGET.unsqueeze(2)).mean()


def by_a_detached_shift(x, w):
    z = F.linear(x, w)
    z = z - z.amax(-1, keepdim=True).detach()
    return -(z.exp() / z.exp().sum(-1, keepdim=True)).log().gather(2, TARGET.unsqueeze(2)).sum()


def by_log_of_softmax(x, w):
    return -torch.softmax(F.linear(x, w), -1).gather(-1, TARGET.unsqueeze(-1)).log().mean()


def by_one_hot(x, w):
    return -(F.one_hot(TARGET, V) * F.log_softmax(F.linear(x, w), -1)).sum(-1).mean()


def by_masked_mean(x, w):
    rows = F.cross_entropy(F.linear(x, w).view(-1, V), TARGET.view(-1), reduction="none").view(2, T)
    return (rows * MASK).sum() / MASK.sum()


def by_where(x, w):
    rows = -F.log_softmax(F.linear(x, w), -1).gather(-1, TARGET.unsqueeze(-1)).squeeze(-1)
    return torch.where(MASK, rows, 0.0).mean()


def by_masked_fill(x, w):
    dropped = IGNORED == -100
    rows = -F.log_softmax(F.linear(x, w), -1).gather(-1, IGNORED.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return rows.masked_fill(dropped, 0.0).sum() / (~dropped).sum()


def by_smoothing(x, w):
    logp = F.log_softmax(F.linear(x, w), -1)
    return -0.9 * logp.gather(-1, TARGET.unsqueeze(-1)).squeeze(-1).mean() - 0.1 * logp.mean(-1).mean()


def by_parts_that_add_up_to_more(x, w):
    """1.1 times a loss with smoothing 2 / 11."""
    logp = F.log_softmax(F.linear(x, w), -1)
    return (-0.9 * logp.gather(-1, TARGET.unsqueeze(-1)).squeeze(-1) - 0.2 * logp.mean(-1)).sum()


def by_z_loss(x, w):
    z = F.linear(x, w).float()
    lse = z.logsumexp(-1)
    return (lse - z.gather(-1, TARGET.unsqueeze(-1)).squeeze(-1) + 1e-2 * lse**2).mean()


def by_softcap(x, w):
    z = 3.0 * torch.tanh(F.linear(x, w) / 3.0)
    return F.cross_entropy(z.view(-1, V), IGNORED.view(-1))


def by_writing_over(x, w):
    z = F.linear(x, w)
    z.div_(2.0)
    return F.cross_entropy(z.view(-1, V), IGNORED.view(-1))


def by_some_rows_of_a_logsumexp(x, w):
    z = F.linear(x, w)
    return (z.logsumexp(-1)[:, 1:] - z[:, 1:].gather(-1, TARGET[:, 1:, None]).squeeze(-1)).sum()


def by_some_rows_of_a_loss(x, w):
    """What becomes of a part of the rows stays as it is."""
    return F.cross_entropy(F.linear(x, w).transpose(1, 2), TARGET, reduction="none")[:, 1:].cos().sum()


def by_a_batch_of_one(x, w):
    return F.cross_entropy(F.linear(x[:1], w)[:, :-1].reshape(-1, V), IGNORED[:1, 1:].reshape(-1))


SPELLINGS = [fn for name, fn in list(globals().items()) if name.startswith("by_")]


@pytest.mark.parametrize("fn", SPELLINGS, ids=lambda fn: fn.__name__)
def test_spellings(fn):
    assert_fused(fn, layer())


def by_layer_bias(x, w, b):
    return F.cross_entropy(F.linear(x, w, b).view(-1, V), IGNORED.view(-1))


def by_added_bias(x, w, b):
    return F.cross_entropy((x @ w.T + b).view(-1, V), IGNORED.view(-1))


def by_addmm(x, w, b):
    return F.cross_entropy(torch.addmm(b, x.view(-1, D), w.t()), IGNORED.view(-1))


@pytest.mark.parametrize("fn", [by_layer_bias, by_added_bias, by_addmm], ids=lambda fn: fn.__name__)
def test_biases(fn):
    report = assert_fused(fn, layer(bias=True))
    assert ", True, True, True)" in report.graph("after")


def test_float64():
    assert_fused(by_shift, layer(dtype=torch.float64))


def test_bfloat16():
    assert_fused(by_sum_of_floats, layer(dtype=torch.bfloat16))


def test_the_arguments_of_the_kernel():
    """Options reach the kernel as numbers, not as operations around it."""
    after = assert_fused(by_softcap, layer()).graph("after")
    assert "None, -100, 0.0, 3.0, 1.0, 0.0, 'mean', True, True, False)" in after
    after = assert_fused(by_smoothing, layer()).graph("after")
    assert re.search(r"0\.1\d*, 0\.0, 1\.0, 0\.0, 'mean'", after)
    assert "'none'" in assert_fused(by_rows, layer()).graph("after")


class Model(nn.Module):
    """Embedding and head share a weight."""

    def __init__(self, tied=True):
        super().__init__()
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V, bias=not tied)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        logits = self.head(torch.tanh(self.embed(tokens)))
        return self.criterion(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


@pytest.mark.parametrize("tied", [True, False])
def test_modules(tied):
    model, tokens = Model(tied), targets()
    want = torch.autograd.grad(model(tokens), list(model.parameters()))
    backend = Passes(then="aot_eager")
    loss = torch.compile(model, backend=backend, fullgraph=True)(tokens)
    torch.testing.assert_close(loss, model(tokens))
    for a, b in zip(torch.autograd.grad(loss, list(model.parameters())), want, strict=True):
        torch.testing.assert_close(a, b)
    assert [r.pattern for r in backend.report.rewrites] == ["linear_cross_entropy"]


@pytest.mark.slow
def test_through_inductor():
    model, tokens = Model(), targets()
    compiled = torch.compile(model, backend="fla", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens))
    compiled(tokens).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_checkpointed():
    """Inside an activation checkpoint, whose body is a graph of its own."""

    def fn(x, w):
        return checkpoint(lambda x, w: by_shift(x, w), x, w, use_reentrant=False)

    assert_fused(fn, layer(), then="aot_eager")


def test_autocast():
    """Under autocast the layer runs in bfloat16, and so does the kernel: as near to the truth as eager."""
    x, w = layer()
    found = []
    for compiled in (False, True):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        fn = torch.compile(by_cross_entropy, backend=(backend := Passes())) if compiled else by_cross_entropy
        with torch.autocast("cpu", torch.bfloat16):
            loss = fn(*leaves)
        found.append((loss, *torch.autograd.grad(loss, leaves)))
    assert [r.pattern for r in backend.report.rewrites] == ["linear_cross_entropy"]
    truth = by_cross_entropy(x.double().requires_grad_(), w.double())
    assert abs(found[1][0] - truth) <= 2 * abs(found[0][0] - truth) + 1e-3
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=2e-3)
        assert a.dtype == b.dtype == torch.float32


def test_without_gradients():
    """In inference no gradient is computed."""
    x, w = layer()
    backend = Passes()
    with torch.no_grad():
        got = torch.compile(by_cross_entropy, backend=backend)(x.requires_grad_(), w)
    torch.testing.assert_close(got, by_cross_entropy(x, w).detach())
    assert ", False, False, False)" in backend.report.graph("after")


def test_all_ignored():
    """NaN as in eager, with gradients of zero."""

    def fn(x, w):
        return F.cross_entropy(F.linear(x, w).view(-1, V), torch.full((10,), -100))

    x, w = (y.requires_grad_() for y in layer())
    loss = torch.compile(fn, backend=(backend := Passes()))(x, w)
    assert loss.isnan() and backend.report.rewrites
    assert torch.autograd.grad(loss, x)[0].eq(0).all()


def test_hugging_face():
    """The loss that transformers computes from `labels`; with the logits beside it there is nothing to save."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    tokens = torch.randint(0, 50, (2, 9))
    labels = tokens.clone()
    labels[0, :3] = -100
    alone = explain(lambda t, y: model(input_ids=t, labels=y).loss, tokens, labels)
    assert [r.pattern for r in alone.rewrites] == ["linear_cross_entropy"] and alone.refusals == ()
    items = torch.tensor(9)
    counted = explain(lambda t, y: model(input_ids=t, labels=y, num_items_in_batch=items).loss, tokens, labels)
    assert [r.pattern for r in counted.rewrites] == ["linear_cross_entropy"]
    both = explain(lambda t, y: model(input_ids=t, labels=y), tokens, labels)
    assert [r.reason for r in both.refusals] == ["logits_used"] and "return the loss alone" in both.refusals[0].detail
    assert [(r.pattern, r.kernel) for r in both.rewrites] == [("cross_entropy", "as written (Inductor)")]
    backend = Passes(then="aot_eager")
    loss = torch.compile(lambda t, y: model(input_ids=t, labels=y).loss, backend=backend)(tokens, labels)
    want = model(input_ids=tokens, labels=labels).loss
    torch.testing.assert_close(loss, want)
    weights = list(model.parameters())
    for a, b in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(want, weights), strict=True):
        torch.testing.assert_close(a, b)


def test_another_layer_is_left_alone():
    """What writes over its output has no users, and is no part of this loss."""

    def fn(x, w):
        other = F.linear(x, 2 * w)
        other.mul_(3.0)
        return by_cross_entropy(x, w) + other.sin().sum()

    backend = Passes()
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), layer(), 1e-4)
    assert [r.pattern for r in backend.report.rewrites] == ["linear_cross_entropy"] and not backend.report.refusals
    assert "mul_(3.0)" in backend.report.graph("after")


def test_two_losses_of_two_layers():
    def fn(x, w):
        return by_cross_entropy(x, w) + by_gather(x, 2 * w)

    backend = Passes()
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), layer())
    assert [r.pattern for r in backend.report.rewrites] == ["linear_cross_entropy"] * 2


def test_dynamic_sizes():
    """One graph serves every batch and length."""

    def fn(x, w, t):
        return F.cross_entropy(F.linear(x, w)[:, :-1].reshape(-1, V), t[:, 1:].reshape(-1))

    backend = Passes()
    compiled = torch.compile(fn, backend=backend, fullgraph=True, dynamic=True)
    for b, length in ((2, 5), (3, 9), (4, 6)):
        x, w = torch.randn(b, length, D), torch.randn(V, D)
        assert_same(fn, compiled, (x, w, torch.randint(0, V, (b, length))))
    assert len({report.graph("after") for report in backend.reports}) <= 2
    assert all(len(report.rewrites) == 1 for report in backend.reports)

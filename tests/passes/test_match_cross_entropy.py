"""Cross entropies of logits that exist: taken from the logits, or left to Inductor."""

import pytest
import torch
import torch.nn.functional as F
from logits import CrossEntropies, assert_as_written, assert_left, assert_taken, logits
from losses import B, T, V, layer, mask, targets
from programs import Passes, assert_same
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fla_compile.backend import RefusedError
from fla_compile.options import Options
from fla_compile.passes.match_cross_entropy import has_kernel

TARGET, IGNORED, MASK = targets(), targets(ignored=-100), mask()


# Logits that are given.


def by_cross_entropy(z):
    return F.cross_entropy(z.view(-1, V), IGNORED.view(-1))


def by_floats(z):
    return F.cross_entropy(z.flatten(0, 1).float(), IGNORED.flatten(), reduction="sum")


def by_classes_second(z):
    return F.cross_entropy(z.transpose(1, 2), IGNORED, label_smoothing=0.1)


def by_rows(z):
    return F.cross_entropy(z.permute(0, 2, 1), IGNORED, reduction="none")


def by_nll_loss(z):
    return F.nll_loss(F.log_softmax(z.view(-1, V) / 0.7, dim=1), IGNORED.view(-1))


def by_another_index(z):
    return F.cross_entropy(z.view(-1, V), TARGET.view(-1), ignore_index=3)


def by_one_hot(z):
    return -(F.one_hot(TARGET, V) * F.log_softmax(z, -1)).sum(-1).mean()


def by_softcap(z):
    return F.cross_entropy(3.0 * torch.tanh(z / 3.0).view(-1, V), IGNORED.view(-1))


def by_masked_mean(z):
    rows = F.cross_entropy(z.view(-1, V), TARGET.view(-1), reduction="none").view(B, T)
    return (rows * MASK).sum() / MASK.sum()


def by_one_sequence(z):
    return F.cross_entropy(z[0], TARGET[0])


def by_shift(z):
    return F.cross_entropy(z[:, :-1].reshape(-1, V), IGNORED[:, 1:].reshape(-1))


def by_shift_of_rows(z):
    return F.cross_entropy(z[..., :-1, :].contiguous().view(-1, V), TARGET[..., 1:].reshape(-1), reduction="none")


def by_shift_of_a_shift(z):
    return F.cross_entropy(z[1:, :-1][:, 1:].reshape(-1, V), IGNORED[1:, 2:].reshape(-1))


def by_narrow(z):
    return F.cross_entropy(z.narrow(1, 0, T - 1).flatten(0, 1), IGNORED[:, 1:].flatten())


def by_weighted_shift(z):
    rows = F.cross_entropy(z[:, :-1].transpose(1, 2), IGNORED[:, 1:], reduction="none")
    return (rows * MASK[:, 1:]).sum() / 7


def by_mean_of_a_shift(z):
    return F.cross_entropy(z[:, 1:].transpose(1, 2), TARGET[:, 1:], reduction="none").mean()


TORCHS = [fn for name, fn in list(globals().items()) if name.startswith("by_")]


def gathered(z):
    return -F.log_softmax(z, -1).gather(-1, TARGET.unsqueeze(-1)).squeeze(-1).mean()


def gathered_from_logits(z):
    return (z.logsumexp(-1) - z.gather(-1, TARGET[..., None])[..., 0]).sum()


def gathered_from_a_softmax(z):
    return -torch.softmax(z, -1).gather(-1, TARGET.unsqueeze(-1)).log().mean()


def gathered_each(z):
    return F.log_softmax(z[:, :-1].float(), -1).gather(-1, TARGET[:, 1:, None]).squeeze(-1)


def gathered_under_a_mask(z):
    dropped = IGNORED == -100
    rows = -F.log_softmax(z, -1).gather(-1, IGNORED.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return rows.masked_fill(dropped, 0.0).sum() / (~dropped).sum()


def gathered_where(z):
    return torch.where(MASK, -F.log_softmax(z, -1).gather(-1, TARGET.unsqueeze(-1)).squeeze(-1), 0.0).mean()


def gathered_with_smoothing(z):
    logp = F.log_softmax(z / 0.8, -1)
    return -0.9 * logp.gather(-1, TARGET.unsqueeze(-1)).squeeze(-1).mean() - 0.1 * logp.mean(-1).mean()


def gathered_with_z_loss(z):
    z = 4.0 * torch.tanh(z.float() / 4.0)
    lse = z.logsumexp(-1)
    rows = lse - z.gather(-1, TARGET.unsqueeze(-1)).squeeze(-1) + 1e-2 * lse**2
    return (rows * MASK).sum()


GATHERED = [fn for name, fn in list(globals().items()) if name.startswith("gathered")]


@pytest.mark.parametrize("fn", TORCHS + GATHERED, ids=lambda fn: fn.__name__)
def test_the_operator(fn):
    assert_taken(fn, [logits()])


@pytest.mark.parametrize("fn", GATHERED, ids=lambda fn: fn.__name__)
def test_gathered_losses_become_torchs(fn):
    assert_taken(fn, [logits()], kernel=None)


@pytest.mark.parametrize("fn", [by_cross_entropy, by_nll_loss, by_one_hot], ids=lambda fn: fn.__name__)
def test_torchs_losses_stay_on_the_cpu(fn):
    assert_as_written(fn, [logits()])


@pytest.mark.parametrize("kernel", [True, None])
def test_other_types(kernel):
    assert_taken(gathered, [logits(torch.float64)], kernel)
    assert_taken(gathered_each, [logits(torch.bfloat16)], kernel)


def test_without_gradients():
    """Inference reads the logits once, however it is written."""
    z = logits().requires_grad_()
    backend = CrossEntropies()
    with torch.no_grad():
        got = torch.compile(gathered, backend=backend)(z)
    torch.testing.assert_close(got, gathered(z).detach())
    assert [r.kernel for r in backend.found[-1].rewrites] == ["as written (Inductor)"]


def test_the_arguments_of_the_operator():
    """Options are numbers; a shift is in the targets, so that no slice of the logits is made."""
    graph = str(assert_taken(by_softcap, [logits()]).graph)
    assert "None, -100, 0.0, 3.0, 1.0, 0.0, mean, False)" in graph
    backend = assert_taken(by_shift, [logits()])
    (call,) = (n for n in backend.graph.nodes if str(n.target).endswith("cross_entropy.default"))
    assert call.args[0].op == "placeholder" and "new_full" in backend.targets
    assert not any(n.all_input_nodes[:1] == [call.args[0]] for n in backend.graph.nodes if n is not call)


# Logits of a layer that are used elsewhere too, where `linear_cross_entropy` refuses.


def returned(x, w):
    z = F.linear(x, w)
    return F.cross_entropy(z.view(-1, V), IGNORED.view(-1)), z


def returned_as_floats(x, w):
    z = F.linear(x, w).float()
    return F.cross_entropy(z[:, :-1].reshape(-1, V), IGNORED[:, 1:].reshape(-1)), z


def returned_capped(x, w):
    z = 3.0 * torch.tanh(F.linear(x, w) / 3.0)
    return -F.log_softmax(z, -1).gather(-1, TARGET.unsqueeze(-1)).mean(), z


def in_a_metric(x, w):
    z = x @ w.T
    return F.cross_entropy(z.view(-1, V), TARGET.view(-1)) + 0 * (z.argmax(-1) == TARGET).float().mean()


def beside_the_maxima(x, w):
    z = F.linear(x, w)
    return F.cross_entropy(z.view(-1, V), TARGET.view(-1)), z.amax(-1).square().sum()


BESIDE = [returned, returned_as_floats, returned_capped, in_a_metric, beside_the_maxima]


@pytest.mark.parametrize("fn", BESIDE, ids=lambda f: f.__name__)
def test_logits_of_a_layer(fn):
    backend = CrossEntropies()
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), layer())
    assert [r.kernel for r in backend.found[-1].rewrites] == ["rows (torch)"] and not backend.found[-1].refusals
    assert backend.targets.count("cross_entropy.default") == 1 and "log_softmax" not in backend.targets


def test_the_refusal_of_the_layer_stands():
    """The report has both: the logits could be spared, and what is done as they are not; `strict` still raises."""
    backend = Passes()
    assert_same(returned_capped, torch.compile(returned_capped, backend=backend, fullgraph=True), layer())
    assert [(r.pattern, r.reason) for r in backend.report.refusals] == [("linear_cross_entropy", "logits_used")]
    assert [(r.pattern, r.kernel) for r in backend.report.rewrites] == [("cross_entropy", "torch's loss (Inductor)")]
    with pytest.raises(RefusedError, match="linear_cross_entropy refused: logits_used"):
        torch.compile(returned, backend="fla", options={"strict": True})(*layer())


def no_other_use(x, w):
    return gathered(F.linear(x, w))


def test_a_layer_without_another_use_is_left():
    """It belongs to `linear_cross_entropy`, which may be disabled."""
    assert_left(no_other_use, layer())
    backend = Passes(Options(disable=("linear_cross_entropy",)))
    assert_same(no_other_use, torch.compile(no_other_use, backend=backend, fullgraph=True), layer())
    assert backend.report.rewrites == () and backend.report.refusals == ()


def test_disabled():
    backend = Passes(Options(disable=("cross_entropy",)))
    assert_same(gathered, torch.compile(gathered, backend=backend, fullgraph=True), [logits()])
    assert backend.report.rewrites == () and backend.report.refusals == ()


# Near misses and escapes.


def test_a_batch_of_one():
    z = logits()[:1]
    target = TARGET[:1]
    assert_taken(lambda z: F.cross_entropy(z[:, :-1].reshape(-1, V), target[:, 1:].reshape(-1)), [z])


def drawn_from(z):
    """Targets of as many rows as the logits, which two arguments of a program need not have for `gather`."""
    return (7 * z.detach()[..., 0].abs()).long() % V


def the_mean(z):
    return -F.log_softmax(z[:, :-1], -1).gather(-1, drawn_from(z)[:, 1:, None]).squeeze(-1).mean()


def each(z):
    return F.log_softmax(z[:, :-1], -1).gather(-1, drawn_from(z)[:, 1:, None]).squeeze(-1)


def a_weighted_sum(z):
    weights = z.detach().sum(-1)
    return -(F.log_softmax(z, -1).gather(-1, drawn_from(z)[..., None]).squeeze(-1) * weights)[:, 1:].sum()


@pytest.mark.parametrize("kernel", [True, None])
@pytest.mark.parametrize("fn", [the_mean, each, a_weighted_sum], ids=lambda fn: fn.__name__)
def test_dynamic_sizes(fn, kernel):
    """One graph serves every batch and length."""
    backend = CrossEntropies(kernel)
    compiled = torch.compile(fn, backend=backend, fullgraph=True)

    def run(z):
        torch._dynamo.mark_dynamic(z, 0)
        torch._dynamo.mark_dynamic(z, 1)
        return compiled(z)

    for b, length in ((2, 5), (3, 9), (4, 6)):
        assert_same(fn, run, [torch.randn(b, length, V)])
    (found,) = backend.found
    assert len(found.rewrites) == 1 and not found.refusals


def test_checkpointed():
    """Inside an activation checkpoint, whose body is a graph of its own."""

    def fn(z):
        return checkpoint(gathered, z, use_reentrant=False)

    backend = Passes(then="aot_eager")
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), [logits()])
    assert [r.kernel for r in backend.report.rewrites] == ["torch's loss (Inductor)"]


def test_autocast():
    """Torch's loss is computed in float32 there, and so is this."""
    found = []
    for compiled in (False, True):
        z = logits(torch.bfloat16).requires_grad_()
        fn = torch.compile(gathered, backend=(backend := CrossEntropies())) if compiled else gathered
        with torch.autocast("cpu", torch.bfloat16):
            loss = fn(z)
        found.append((loss, torch.autograd.grad(loss, z)[0]))
    assert [r.kernel for r in backend.found[-1].rewrites] == ["rows (torch)"]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


def test_all_ignored():
    """NaN as in eager, with gradients of zero."""

    def fn(z):
        return F.cross_entropy(z.view(-1, V), torch.full((B * T,), -100))

    z = logits().requires_grad_()
    loss = torch.compile(fn, backend=(backend := CrossEntropies()))(z)
    assert loss.isnan() and backend.found[-1].rewrites
    assert torch.autograd.grad(loss, z)[0].eq(0).all()


class Classifier(nn.Module):
    """Logits of a convolution: no linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, V, 1)

    def forward(self, x, t):
        z = self.conv(x).mean(-1)
        return -F.log_softmax(z, -1).gather(1, t[:, None]).mean()


def test_origins():
    """Logits that a product or a table made exist; those of a mean or a sum are made in the loss's own loop."""
    x, w = layer()
    assert_taken(lambda x, w: gathered(torch.bmm(x, w.T.expand(B, -1, -1))), (x, w), kernel=None)
    assert_taken(lambda x: gathered(F.embedding(TARGET, x)), [torch.randn(V, V)], kernel=None)
    model, t = Classifier(), torch.randint(0, V, (B,))
    assert_left(lambda x: model(x, t), [torch.randn(B, 4, 6)], kernel=None)


@pytest.mark.parametrize(
    ("dtype", "classes", "runs"),
    [(torch.bfloat16, 32000, True), (torch.bfloat16, 1000, False), (torch.float64, 32000, False)],
    ids=["many classes", "few classes", "float64"],
)
def test_where_the_operator_runs(dtype, classes, runs):
    graph = torch.fx.Graph()
    for device in ("cuda", "cpu"):
        node = graph.placeholder(device)
        with FakeTensorMode():
            node.meta["example_value"] = torch.empty(8, classes, dtype=dtype, device=device)
        assert has_kernel(node, None) is (runs and device == "cuda")


@pytest.mark.slow
def test_through_inductor():
    for fn in (gathered, gathered_with_z_loss, returned_capped):
        args = layer() if fn is returned_capped else [logits()]
        assert_same(fn, torch.compile(fn, backend="fla", fullgraph=True), args)

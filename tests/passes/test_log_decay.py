"""Proofs that a decay is positive: the logarithm they give is the decay's, and what is not proved is None."""

import math

import pytest
import torch
import torch.nn.functional as F
from programs import assert_looped, assert_rewritten, operands
from torch import fx

from fla_compile.passes.log_decay import LOG_ZERO, constant_value, emit, log_of, root_of
from fla_compile.passes.memory import memory, written
from fla_compile.passes.proofs import log_of_outer


def captured(fn, *args):
    """Dynamo's graph of `fn` and the node of its first result."""
    kept = []

    def backend(gm, example_inputs):
        kept.append(gm)
        return gm.forward

    torch.compile(fn, backend=backend, fullgraph=True)(*args)
    (gm,) = kept
    return gm, gm.graph.output_node().args[0][0]


def logarithm(fn, *args):
    """What `log_of_outer` writes for the first result of `fn`, evaluated; None without a proof."""
    gm, node = captured(fn, *args)
    before = str(gm.graph)
    log = log_of_outer(node)
    assert str(gm.graph) == before, "deciding must not change a graph"
    if log is None:
        return None
    with gm.graph.inserting_before(gm.graph.output_node()):
        result = emit(log, gm.graph)
    gm.graph.output_node().args = ((result,),)
    gm.recompile()
    used = len(gm.graph.find_nodes(op="placeholder"))
    return torch.as_tensor(gm(*args[:used])[0]), log


X = torch.linspace(-3, 3, 24, dtype=torch.float64).reshape(2, 3, 4)

PROOFS = [
    ("exp", lambda x: torch.exp(x)),
    ("exp", lambda x: x.neg().exp()),
    ("exp", lambda x: torch.exp2(x)),
    ("exp", lambda x: x.exp2()),
    ("sigmoid", lambda x: torch.sigmoid(x)),
    ("sigmoid", lambda x: x.sigmoid()),
    ("sigmoid", lambda x: F.sigmoid(x)),
    ("sigmoid", lambda x: torch.special.expit(x)),
    ("sigmoid", lambda x: 1 - torch.sigmoid(x)),
    ("sigmoid", lambda x: 1.0 - x.sigmoid()),
    ("sigmoid", lambda x: torch.rsub(x.sigmoid(), 1)),
    ("exp", lambda x: torch.exp(x) * torch.exp(-2 * x)),
    ("constant", lambda x: 0.5 * torch.exp(x)),
    ("exp", lambda x: torch.exp(x) / 3),
    ("sigmoid", lambda x: torch.sigmoid(x) ** 0.0625),
    ("sigmoid", lambda x: torch.pow(torch.sigmoid(x), 2)),
    ("sigmoid", lambda x: torch.sigmoid(x).sqrt()),
    ("sigmoid", lambda x: torch.rsqrt(torch.sigmoid(x))),
    ("exp", lambda x: torch.exp(x).reciprocal()),
    ("exp", lambda x: torch.exp(-torch.exp(x.float()).double())),
]
VIEWS = [
    lambda x: x.exp().transpose(0, 1),
    lambda x: x.exp().permute(2, 0, 1),
    lambda x: x.exp().movedim(1, 0),
    lambda x: x.exp().unsqueeze(-1),
    lambda x: x.exp()[:, 1:2].squeeze(1),
    lambda x: x.exp()[..., None],
    lambda x: x.exp()[:, 1],
    lambda x: x.exp().view(6, 4),
    lambda x: x.exp().reshape(-1),
    lambda x: x.exp().flatten(1),
    lambda x: x.exp().unsqueeze(0).expand(5, -1, -1, -1),
    lambda x: x.exp().mT.contiguous().clone(),
    lambda x: x.exp().select(2, 1),
    lambda x: x.exp().narrow(2, 1, 2),
    lambda x: x.exp().unflatten(2, (2, 2)),
    lambda x: (x.exp().transpose(0, 1) * x.mT.sigmoid().permute(2, 0, 1)[:3, :, :3].sum().exp()).reshape(4, 6),
]


@pytest.mark.parametrize("proof, fn", PROOFS, ids=range(len(PROOFS)))
def test_each_proof_gives_the_logarithm(proof, fn):
    got, log = logarithm(fn, X)
    torch.testing.assert_close(got, fn(X).log(), rtol=1e-10, atol=1e-10)
    assert log.proof == proof


@pytest.mark.parametrize("fn", VIEWS, ids=range(len(VIEWS)))
def test_views_of_a_proof(fn):
    got, _ = logarithm(fn, X)
    torch.testing.assert_close(got, fn(X).log(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "fn", [lambda x: x.exp().float(), lambda x: x.float().exp().double(), lambda x: x.exp().to(torch.bfloat16).float()]
)
def test_casts(fn):
    """The log is taken without the program's rounding, never with less precision than it."""
    got, _ = logarithm(fn, X)
    torch.testing.assert_close(got.double(), X, rtol=1e-6, atol=1e-6)


MASKED = [
    lambda x: torch.where(x > 0, 0.0, x.exp()),
    lambda x: torch.where(x > 0, x.sigmoid(), 0.0),
    lambda x: torch.where(x > 0, 1.0, x.exp()),
    lambda x: torch.where(x > 0, x.exp(), x.sigmoid()),
    lambda x: x.exp().masked_fill(x > 0, 0.0),
    lambda x: x.exp().masked_fill(x > 0, 0.5),
    lambda x: (x > 0).to(x.dtype),
    lambda x: (x > 0).double() * x.exp(),
    lambda x: torch.where(x > 0, 0.0, x.exp()).unsqueeze(-1) * 0.5,
]


@pytest.mark.parametrize("fn", MASKED, ids=range(len(MASKED)))
def test_resets_are_zero_and_nothing_else(fn):
    """The logarithm of zero is a number whose exp is zero, so that sums of it stay finite."""
    got, _ = logarithm(fn, X)
    assert got.isfinite().all() and math.exp(LOG_ZERO) == 0.0
    torch.testing.assert_close(got.double().exp(), fn(X), rtol=1e-10, atol=0)


UNPROVED = {
    "where of what is unproved": lambda x: torch.where(x > 0, x, x.exp()),
    "where of a negative number": lambda x: torch.where(x > 0, -1.0, x.exp()),
    "filled with a negative number": lambda x: x.exp().masked_fill(x > 0, -1.0),
    "fill of what is unproved": lambda x: x.masked_fill(x > 0, 0.0),
    "one minus a mask and a half": lambda x: (x > 0).to(x.dtype) - 0.5,
    "count": lambda x: (x > 0).long().to(x.dtype),
    "plain": lambda x: x,
    "relu": lambda x: x.relu(),
    "tanh": lambda x: x.tanh(),
    "abs": lambda x: x.abs(),
    "sum": lambda x: x.exp() + x.exp(),
    "one minus exp": lambda x: 1 - x.exp(),
    "two minus sigmoid": lambda x: 2 - x.sigmoid(),
    "one minus twice": lambda x: torch.sub(1, x.sigmoid(), alpha=2),
    "sigmoid minus one": lambda x: x.sigmoid() - 1,
    "negative factor": lambda x: -0.5 * x.exp(),
    "zero factor": lambda x: 0 * x.exp(),
    "unproved factor": lambda x: x.exp() * x,
    "tensor power": lambda x: x.exp() ** x,
    "negated": lambda x: -x.sigmoid(),
    "integers": lambda x: torch.arange(1, 5),
}


@pytest.mark.parametrize("name", UNPROVED)
def test_without_a_proof(name):
    assert logarithm(UNPROVED[name], X) is None


def retnet(x):
    return 1 - 2.0 ** (-5 - torch.arange(4, dtype=torch.float32))


CONSTANTS = [
    (retnet, True),
    (lambda x: torch.tensor([0.5, 0.9]), True),
    (lambda x: torch.full((3,), 0.99).view(1, 3), True),
    (lambda x: torch.linspace(0.1, 1, 5), True),
    (lambda x: torch.ones(3), True),
    (lambda x: torch.tensor([0.5, 0.0]), False),
    (lambda x: torch.tensor([0.5, -0.1]), False),
    (lambda x: torch.tensor([0.5, math.inf]), False),
    (lambda x: torch.tensor([0.5, math.nan]), False),
    (lambda x: torch.zeros(3), False),
    (lambda x: torch.rand(3), False),
    (lambda x: torch.ones(1 << 17), False),
]


@pytest.mark.parametrize("fn, proved", CONSTANTS, ids=range(len(CONSTANTS)))
def test_constants_are_looked_at(fn, proved):
    result = logarithm(fn, X)
    assert (result is not None) == proved
    if result is not None:
        torch.testing.assert_close(result[0], fn(X).log())


def test_looking_at_a_constant_leaves_the_random_state_alone():
    _, node = captured(lambda x: torch.rand(3) + torch.randn(3), X)
    before = torch.get_rng_state()
    assert constant_value(node) is None
    assert torch.equal(torch.get_rng_state(), before)


def test_numbers():
    assert log_of(0.5, lambda _: None).args == (math.log(0.5),)
    assert all(log_of(x, lambda _: None) is None for x in (0, -1.0, "a"))


def test_a_placeholder_is_asked_for():
    graph = fx.Graph()
    a = graph.placeholder("a")
    asked = []
    assert log_of(a, lambda node: asked.append(node)) is None and asked == [a]


def test_emit_names_an_unknown_operation():
    from fla_compile.passes.log_decay import Log

    with pytest.raises(ValueError, match="cosine"):
        emit(Log("cosine", (), ""), fx.Graph())


# In-place writes: what is proved of a tensor must still hold when the loop reads it.


def changed_after(x):
    a = x.exp()
    a.sub_(1)
    return a


def changed_by_operator(x):
    a = x.exp()
    a -= 1
    return a


def changed_by_assignment(x):
    a = x.exp()
    a[:, 0] = -1
    return a


def changed_through_a_view(x):
    a = x.exp()
    b = a.transpose(0, 1)[0]
    b.mul_(-1)
    return a


def view_of_what_is_changed(x):
    a = x.exp()
    b = a.unsqueeze(-1)
    a.neg_()
    return b


def changed_factor(x):
    a = x.exp()
    b = a * x.sigmoid()
    a.neg_()
    return b


def changed_argument(x):
    a = x.exp()
    x.mul_(2)
    return a


def changed_argument_through_a_view(x):
    a = x.exp()
    x[0].zero_()
    return a


def changed_by_out(x):
    a = x.exp()
    torch.neg(x, out=a)
    return a


def changed_by_function(x):
    a = x.exp()
    F.relu(a.sub_(2), inplace=True)
    return a


def changed_by_flag(x):
    a = x.exp()
    F.threshold(a, 1.0, -1.0, inplace=True)
    return a


def constant_changed(x):
    a = torch.ones(4)
    a[0] = -1
    return a


MUTATED = [
    changed_after, changed_by_operator, changed_by_assignment, changed_through_a_view, view_of_what_is_changed,
    changed_argument, changed_argument_through_a_view, changed_by_out, changed_by_function, changed_by_flag,
    constant_changed,
]  # fmt: skip


@pytest.mark.parametrize("fn", MUTATED, ids=lambda f: f.__name__)
def test_writes_spoil_a_proof(fn):
    result = logarithm(fn, X.clone())
    if result is not None:
        torch.testing.assert_close(result[0], fn(X.clone()).log())
    assert result is None


def test_a_changed_factor_spoils_its_product():
    assert logarithm(changed_factor, X.clone()) is None


def test_writes_elsewhere_do_not():
    def fn(x):
        other = x * 2
        other.add_(1)
        a = x.exp()
        (a + other).mul_(3)
        return a

    got, _ = logarithm(fn, X)
    torch.testing.assert_close(got, X)


def test_roots():
    gm, node = captured(changed_through_a_view, X)
    assert root_of(node).name == node.name
    assert memory(node) and memory(node) <= written(gm.graph)


def gated(fn):
    def loop(q, k, v, g):
        a = fn(g)
        S, o = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), torch.zeros_like(v)
        for t in range(q.shape[1]):
            S = S * a[:, t][..., None] + k[:, t][..., None] * v[:, t][..., None, :]
            o[:, t] = (q[:, t][..., None] * S).sum(-2)
        return o, S

    return loop


def test_a_decay_changed_before_the_loop():
    def loop(q, k, v, g):
        a = torch.exp(-g.abs()) * 1.0
        a.sub_(0.7)
        S, o = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), torch.zeros_like(v)
        for t in range(q.shape[1]):
            S = S * a[:, t][..., None] + k[:, t][..., None] * v[:, t][..., None, :]  # here
            o[:, t] = (q[:, t][..., None] * S).sum(-2)
        return o, S

    assert_looped(loop, operands("bthk bthk bthv bthk", k=16, v=24), "decay_sign_unknown", "exp(g)")


def test_a_decay_changed_after_the_loop():
    """The proof is given up rather than asked when the write happens; the numbers are those from before it."""

    def loop(q, k, v, g):
        a = torch.exp(-g.abs()) * 1.0
        S, o = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), torch.zeros_like(v)
        for t in range(q.shape[1]):
            S = S * a[:, t].clone()[..., None] + k[:, t][..., None] * v[:, t][..., None, :]  # here
            o[:, t] = (q[:, t][..., None] * S).sum(-2)
        a.mul_(2)
        return o, S, a

    assert_looped(loop, operands("bthk bthk bthv bthk", k=16, v=24), "decay_sign_unknown")


@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_very_strong_decays_stay_exact(scale):
    """exp(-10^4) is zero in every type; its logarithm is not."""
    q, k, v, g = operands("bthk bthk bthv bthk")
    assert_rewritten(gated(lambda g: torch.exp(-g.abs())), (q, k, v, g * scale), "gla")

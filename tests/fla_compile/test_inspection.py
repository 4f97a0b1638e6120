"""`explain`: the whole story of a call, and nothing done."""

import pytest
import torch
from programs import here, operands
from torch import nn

from fla_compile import explain


def recur(q, k, v, *, gamma=0.9):
    S, o = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * gamma + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o


def squashed(q, k, v):
    S, o = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = torch.tanh(S + k[:, t][..., None] * v[:, t][..., None, :])  # here
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(4, 4)

    def forward(self, q, k, v):
        return recur(self.project(q), k, v)


ARGS = "bthk bthk bthv"


@pytest.mark.parametrize(
    "make",
    [
        lambda: recur,
        lambda: Layer(),
        lambda: Layer().forward,
        lambda: torch.compile(Layer(), backend="fla"),
        lambda: torch.compile(recur, backend="fla"),
        lambda: torch.compile(recur),
    ],
    ids=["function", "module", "method", "compiled module", "compiled function", "compiled by another"],
)
def test_what_it_takes(make):
    report = explain(make(), *operands(ARGS))
    assert [(r.family, r.source.split(":")[0]) for r in report.rewrites] == [("retention", "test_inspection.py")]
    assert report.refusals == ()


def test_keywords():
    assert [r.family for r in explain(recur, *operands(ARGS), gamma=1.0).rewrites] == ["linear_attention"]


def test_nothing_is_run(monkeypatch):
    ran = []

    def fn(q, k, v):
        q.add_(1)
        ran.append(torch.compiler.is_compiling())
        return recur(q, k, v)

    args = operands(ARGS)
    kept = [x.clone() for x in args]
    state = torch.get_rng_state()
    report = explain(fn, *args)
    assert report.rewrites and not any(ran)
    assert all(torch.equal(a, b) for a, b in zip(args, kept, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_is_left_as_it_was():
    model = Layer()
    weights, attributes = [p.clone() for p in model.parameters()], set(vars(model))
    explain(model, *operands(ARGS))
    assert set(vars(model)) - {"_is_torch_compile"} == attributes  # torch.compile itself leaves this one
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_refusals_are_listed():
    report = explain(squashed, *operands(ARGS))
    (refusal,) = report.refusals
    assert (refusal.reason, refusal.source) == ("unsupported_op", here(squashed)) and "tanh" in refusal.detail
    assert [r.family for r in report.rewrites] == ["generic"] and "unsupported_op" in str(report)


def test_one_of_each():
    report = explain(lambda q, k, v: squashed(recur(q, k, q), k, v), *operands(ARGS))
    assert [r.family for r in report.rewrites] == ["retention", "generic"]
    assert [r.reason for r in report.refusals] == ["unsupported_op"]


def broken(q, k, v):
    y = recur(q, k, v)
    torch._dynamo.graph_break()  # here
    return y + recur(q, k, v)


def test_a_graph_break_is_reported():
    report = explain(broken, *operands(ARGS))
    assert [r.family for r in report.rewrites] == ["retention"]
    (refusal,) = report.refusals
    assert (refusal.pattern, refusal.reason, refusal.source) == ("graph", "graph_break", here(broken))
    assert refusal.detail


def test_no_loops():
    report = explain(lambda x: x.sin() * 2, torch.ones(3))
    assert report.rewrites == () and report.refusals == ()
    assert "sin" in report.graph("before") and report.graph("before") == report.graph("after")


def test_the_programs_own_errors_come_through():
    with pytest.raises(Exception, match=r"must match|size"):
        explain(lambda x, y: x + y, torch.ones(3), torch.ones(4))


def test_compiled_programs_still_compile_after_it():
    compiled = torch.compile(recur, backend="aot_eager", fullgraph=True)
    args = operands(ARGS)
    explain(compiled, *args)
    torch.testing.assert_close(compiled(*args), recur(*args), rtol=2e-5, atol=2e-5)


def test_many_explanations():
    """No limit on recompilation is met, and one explanation does not colour the next."""
    args = operands(ARGS)
    assert all(explain(recur, *args).rewrites for _ in range(torch._dynamo.config.recompile_limit + 2))


def test_a_number_that_changes_between_explanations():
    args = operands(ARGS)
    assert [len(explain(recur, *args, gamma=gamma).rewrites) for gamma in (0.5, 0.6, 0.7)] == [1, 1, 1]

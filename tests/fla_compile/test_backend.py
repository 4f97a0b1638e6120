"""The backend as users meet it: every way to reach a loop, options, refusals, and nothing changed for anybody else."""

import logging

import pytest
import torch
import torch.nn.functional as F
from programs import Passes, assert_same, here, operands
from torch import nn

from fla_compile import RefusedError
from fla_compile.options import PASSES, Options


@pytest.fixture
def graphs(monkeypatch):
    """What is handed to Inductor, which is left out: (code, options) of each graph."""
    found = []

    def compile_fx(gm, example_inputs, config_patches=None):
        found.append((gm.print_readable(print_output=False), config_patches))
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return found


def recur(q, k, v, g):
    S, o = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o


def squashed(q, k, v, g):
    S, o = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = torch.tanh(S + k[:, t][..., None] * v[:, t][..., None, :])  # here
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o


ARGS = "bthk bthk bthv bthk"


class Mixer(nn.Module):
    """[B, T, D] -> [B, T, D] with the loop in `forward` itself."""

    def __init__(self, width=8, heads=2):
        super().__init__()
        self.heads, self.project, self.out = heads, nn.Linear(width, 4 * width), nn.Linear(width, width)

    def split(self, x):
        return (y.unflatten(-1, (self.heads, -1)) for y in self.project(x).chunk(4, -1))

    def forward(self, x):
        q, k, v, g = self.split(x)
        S, outs = x.new_zeros(x.shape[0], self.heads, q.shape[-1], v.shape[-1]), []
        for t in range(x.shape[1]):
            S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
            outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
        return self.out(torch.stack(outs, 1).flatten(-2))


class ByHelper(Mixer):
    def forward(self, x):
        return self.out(recur(*self.split(x)).flatten(-2))


class ByMethod(Mixer):
    def mix(self, q, k, v, g):
        S, o = q.new_zeros(q.shape[0], self.heads, q.shape[3], v.shape[3]), torch.zeros_like(v)
        for t in range(q.shape[1]):
            S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
            o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
        return o

    def forward(self, x):
        return self.out(self.mix(*self.split(x)).flatten(-2))


class Stacked(nn.Module):
    def __init__(self, mixers):
        super().__init__()
        self.layers = nn.ModuleList(mixers)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, x.shape[-1:]))
        return x


@pytest.mark.parametrize(
    "make, kernels",
    [
        (Mixer, 1),
        (ByHelper, 1),
        (ByMethod, 1),
        (lambda: Stacked([Mixer(), ByHelper(), ByMethod()]), 3),
        (lambda: nn.Sequential(nn.Linear(8, 8), Stacked([nn.Sequential(ByMethod())])), 1),
    ],
    ids=["top", "helper", "method", "layers", "nested"],
)
def test_modules(make, kernels, graphs):
    model = make()
    x = torch.randn(2, 7, 8, requires_grad=True)
    compiled = torch.compile(model, backend="fla", fullgraph=True)
    assert_same(model, compiled, [x])
    for parameter in model.parameters():
        parameter.grad = None
    compiled(x).sum().backward()
    got = [p.grad for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for a, b in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad, rtol=2e-5, atol=2e-5)
    ((code, _),) = graphs
    assert code.count("torch.ops.fla_compile.gla") == kernels and "higher_order.scan" not in code


def test_module_compiled_in_place(graphs):
    model, x = ByHelper(), torch.randn(2, 7, 8)
    want = model(x)
    model.compile(backend="fla", fullgraph=True)
    torch.testing.assert_close(model(x), want, rtol=2e-5, atol=2e-5)
    assert "torch.ops.fla_compile.gla" in graphs[0][0]


def test_functions(graphs):
    args = operands(ARGS)
    scale = 0.5

    def closure(q, k, v, g):
        S, o = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), torch.zeros_like(v)
        for t in range(q.shape[1]):
            S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :] * scale
            o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
        return o

    for fn in (recur, closure, lambda *args: recur(*args), Mixer().forward):
        given = args if fn.__name__ != "forward" else [torch.randn(2, 7, 8)]
        assert_same(fn, torch.compile(fn, backend="fla", fullgraph=True), given)
    assert len(graphs) == 4 and all("torch.ops.fla_compile.gla" in code for code, _ in graphs)


def test_decorator_keeps_the_name(graphs):
    @torch.compile(backend="fla", fullgraph=True)
    def mix(q, k, v, g):
        """What it does."""
        return recur(q, k, v, g)

    assert (mix.__name__, mix.__doc__) == ("mix", "What it does.")
    args = operands(ARGS)
    torch.testing.assert_close(mix(*args), recur(*args), rtol=2e-5, atol=2e-5)


def test_a_graph_break_elsewhere(graphs):
    def fn(q, k, v, g):
        y = recur(q, k, v, g)
        torch._dynamo.graph_break()
        return recur(y, y, v, torch.cat([g, g[..., :2]], -1)).sin()

    assert_same(fn, torch.compile(fn, backend="fla"), operands(ARGS))
    assert [code.count("torch.ops.fla_compile.gla") for code, _ in graphs] == [1, 1]


def test_a_training_step_with_an_optimiser():
    """Full Inductor: three steps, the same losses and weights as eager."""

    def train(compiled):
        torch.manual_seed(0)
        model = Stacked([ByMethod(), ByHelper()])
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)

        def step(x, y):
            loss = F.mse_loss(model(x), y)
            loss.backward()
            return loss

        run = torch.compile(step, backend="fla", fullgraph=False) if compiled else step
        losses = []
        for i in range(3):
            x, y = (operands("btD", D=8, seed=2 * i + j)[0] for j in range(2))
            losses.append(run(x, y).item())
            optimiser.step()
            optimiser.zero_grad()
        return losses, [p.detach() for p in model.parameters()]

    losses, weights = train(True)
    want_losses, want_weights = train(False)
    assert losses == pytest.approx(want_losses, rel=1e-4)
    torch.testing.assert_close(weights, want_weights, rtol=1e-3, atol=1e-3)


def strided(q, k, v, g):
    S, o = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = torch.as_strided(S + k[:, t][..., None] * v[:, t][..., None, :], S.shape, S.stride())  # here
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o


@pytest.mark.parametrize(("program", "op"), [(strided, None), (squashed, "torch.ops.fla_compile.loop")])
def test_a_loop_of_no_known_family(program, op, graphs, caplog):
    """One that cannot be looped runs as it is written, any other as a loop; both say why."""
    with caplog.at_level(logging.INFO, "fla_compile"):
        assert_same(program, torch.compile(program, backend="fla", fullgraph=True), operands(ARGS))
    ((code, _),) = graphs
    assert "higher_order.scan" not in code
    assert op in code if op else "torch.ops.fla_compile" not in code
    assert any(here(program) in r.getMessage() and "unsupported_op" in r.getMessage() for r in caplog.records)


def test_strict():
    args = operands(ARGS)
    with pytest.raises(RefusedError) as caught:
        torch.compile(squashed, backend="fla", options={"strict": True})(*args)
    assert here(squashed) in str(caught.value) and "unsupported_op" in str(caught.value) and "tanh" in str(caught.value)


def test_strict_names_what_lifting_refuses():
    def fn(x):
        S, outs = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            if t > 2:  # here
                S = S + x[:, t]
            outs.append(S)
        return torch.stack(outs)

    with pytest.raises(RefusedError, match=here(fn)):
        torch.compile(fn, backend="fla", options={"strict": True})(torch.ones(2, 7, 4))


def test_strict_lets_recognised_loops_pass(graphs):
    args = operands(ARGS)
    compiled = torch.compile(recur, backend="fla", fullgraph=True, options={"strict": True})
    torch.testing.assert_close(compiled(*args), recur(*args), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"lfit": False}, ["'lfit'", "lift", "validate", "strict", "disable", "inductor"]),
        ({"lift": 1}, ["'lift'", "True or False", "1"]),
        ({"strict": "yes"}, ["'strict'", "'yes'"]),
        ({"validate": None}, ["'validate'", "None"]),
        ({"disable": "lift"}, ["'disable'", "'lift'"]),
        ({"disable": ["recurence"]}, ["'disable'", "'recurence'", *PASSES]),
        ({"inductor": 3}, ["'inductor'", "3"]),
    ],
    ids=lambda x: str(x),
)
def test_bad_options(options, words):
    with pytest.raises(ValueError) as caught:
        Options.parse(options)
    with pytest.raises(Exception) as compiled:
        torch.compile(recur, backend="fla", options=options)(*operands(ARGS))
    assert all(word in str(error.value) for error in (caught, compiled) for word in words)


def test_options_are_plain_data():
    assert Options.parse(None) == Options() == Options.parse({})
    chosen = Options.parse({"disable": ["recurrence"], "inductor": {"max_autotune": True}})
    assert chosen.disable == ("recurrence",) and not chosen.runs("recurrence") and not chosen.runs("lift")
    assert Options(disable=("lift",)).runs("recurrence") and not Options(disable=("lift",)).runs("lift")
    assert Options().runs("lift") and not Options(lift=False).runs("lift") and PASSES[:2] == ("lift", "recurrence")


@pytest.mark.parametrize("options", [{"lift": False}, {"disable": ("lift",)}], ids=["lift", "disable"])
def test_without_lifting_loops_are_unrolled(options, graphs):
    assert_same(recur, torch.compile(recur, backend="fla", options=options), operands(ARGS))
    ((code, _),) = graphs
    assert "scan" not in code and "torch.ops.fla_compile" not in code
    assert code.count("torch.functional.einsum(") >= 7


def test_without_recurrences_training_still_works(graphs):
    """A scan left in a training graph fails under Inductor: loops that no pass will take are not to be lifted."""
    assert_same(recur, torch.compile(recur, backend="fla", options={"disable": ["recurrence"]}), operands(ARGS))
    assert all("torch.ops.fla_compile" not in code and "higher_order.scan" not in code for code, _ in graphs)


def test_inductor_options_are_handed_on(graphs):
    args = operands(ARGS)
    torch.compile(recur, backend="fla", options={"inductor": {"max_autotune": False}})(*args)
    torch._dynamo.reset()
    torch.compile(recur, backend="fla")(*args)
    assert [patches for _, patches in graphs] == [{"max_autotune": False}, None]


def test_other_backends_and_eager_are_left_alone(graphs):
    code, attributes = recur.__code__, dict(vars(recur))
    args = operands(ARGS)
    torch.compile(recur, backend="fla")(*args)
    seen = []

    def plain(gm, example_inputs):
        seen.append(gm.print_readable(print_output=False))
        return gm.forward

    torch.testing.assert_close(torch.compile(recur, backend=plain)(*args), recur(*args), rtol=2e-5, atol=2e-5)
    assert "scan" not in seen[0] and "fla" not in seen[0].replace("fla_compile/test", "")
    torch.testing.assert_close(torch.compile(recur, backend="eager")(*args), recur(*args), rtol=2e-5, atol=2e-5)
    assert recur.__code__ is code and dict(vars(recur)) == attributes


def make(i):
    def mix(q, k, v, g):
        return recur(q, k, v, g) * i

    return mix


def test_twenty_functions_in_one_process():
    """Dynamo limits recompilations of one code object; ours must not count what users see as different functions."""
    backend = Passes(options=Options(validate=False))
    args = operands(ARGS)
    for i in range(20):
        fn = make(i)
        got = torch.compile(fn, backend=backend, fullgraph=True)(*args)
        torch.testing.assert_close(got, fn(*args), rtol=2e-5, atol=2e-5 * max(1, i))
    assert backend.graphs == 20


def test_many_modules_of_one_class():
    backend = Passes(options=Options(validate=False))
    x = torch.randn(2, 3, 8)
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        model = ByHelper()
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x), rtol=2e-5, atol=2e-5)
    assert all(report.rewrites for report in backend.reports)


def signed(q, k, v, a):
    S, o = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * a[:, t][..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o


@pytest.mark.parametrize("reset", [False, True], ids=["recompiled", "after reset"])
def test_a_refusal_binds_its_own_compilation_only(reset):
    """A decay of unknown sign is refused where it needs a gradient, and taken where it does not."""
    backend, args = Passes(), operands(ARGS, k=32, v=32)
    compiled = torch.compile(signed, backend=backend, fullgraph=True)
    assert_same(signed, compiled, args, tolerance=1e-4)
    assert [r.reason for r in backend.report.refusals] == ["decay_sign_unknown"]
    if reset:
        torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), signed(*args), rtol=1e-4, atol=1e-3)
    assert [r.family for r in backend.report.rewrites] == ["gla"] and not backend.report.refusals


def scaled(q, k, v, gamma):
    S, o = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * gamma + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o


def test_a_number_that_changes_between_calls():
    """Dynamo makes a float symbolic when it sees a second value of it."""
    backend, args = Passes(), operands("bthk bthk bthv")
    compiled = torch.compile(scaled, backend=backend, fullgraph=True)
    for gamma in (0.5, 0.6, 0.7):
        torch.testing.assert_close(compiled(*args, gamma), scaled(*args, gamma), rtol=2e-5, atol=2e-5)
    assert all(report.rewrites and not report.refusals for report in backend.reports)


def test_registered_by_entry_point():
    assert "fla" in torch._dynamo.list_backends(exclude_tags=())

"""Norms with a gate among other things: narrow types, linear layers, dynamic sizes, regions, recurrences, options."""

import math

import pytest
import torch
import torch.nn.functional as F
from norm_gates import NormGates, assert_matched
from programs import Passes, assert_same, bare, operands
from torch import nn
from torch.utils.checkpoint import checkpoint

import fla_compile
from fla_compile.options import Options
from fla_compile.passes.match_norm_gate import match_norm_gate

D = 16
RMS_SILU = "rms_norm(x) * silu(gate)"


def gated(x, g, w):
    return F.rms_norm(x, (D,), w, 1e-5) * F.silu(g)


def up_and_down(x, g, w):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (w * h).to(x.dtype) * F.silu(g.float()).to(g.dtype)


def weight_before_the_cast(x, g, w):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5) * w.float() * F.silu(g.float())).to(x.dtype)


def all_narrow(x, g, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w * F.silu(g)


def result_is_wide(x, g, w):
    return gated(x.float(), g.float(), w.float())


def narrowed_first(x, g, w):
    """The kernel has to read what was narrowed."""
    return gated(x.float().cumsum(1).to(torch.bfloat16), g, w)


@pytest.mark.parametrize(
    "fn", [up_and_down, weight_before_the_cast, all_narrow, result_is_wide, narrowed_first], ids=lambda f: f.__name__
)
def test_casts_anywhere(fn):
    """No further from float64 than the program as written, whose roundings stand in between."""
    args = [x.bfloat16() for x in operands("btd btd d", d=D)]
    truth = fn.__globals__["gated"](*(x.double() for x in args))
    backend = NormGates()
    got, eager = torch.compile(fn, backend=backend, fullgraph=True)(*args), fn(*args)
    assert [r.family for r in backend.found[-1].rewrites] == [RMS_SILU]
    assert got.dtype == eager.dtype
    if fn is narrowed_first:
        torch.testing.assert_close(got, eager, rtol=2e-2, atol=2e-2)
    else:
        assert (got - truth).abs().max() <= 1.01 * (eager - truth).abs().max() + 1e-6
    narrow = [n for n in backend.graph.nodes if n.op == "call_method" and n.target in ("float", "to")]
    assert not narrow or fn is narrowed_first


def test_the_kernel_reads_the_narrow_tensors():
    args = [x.bfloat16() for x in operands("btd btd d", d=D)]
    backend = NormGates()
    torch.compile(weight_before_the_cast, backend=backend, fullgraph=True)(*args)
    (call,) = (n for n in backend.graph.nodes if "norm_gate" in str(n.target))
    assert [n.op for n in call.args[:3]] == ["placeholder"] * 3


@pytest.mark.parametrize("form", ["rows", "heads", "bias"])
def test_with_the_linear_layer_behind_it(form):
    def fn(x, g, w, p, b):
        if form == "heads":
            y = F.rms_norm(x.unflatten(-1, (2, 8)), (8,), w[:8], 1e-5) * F.silu(g.unflatten(-1, (2, 8)))
            return F.linear(y.flatten(2), p)
        return F.linear(gated(x, g, w), p, b if form == "bias" else None)

    args = operands("btd btd d vd v", d=D, v=6)
    backend = assert_matched(fn, args, RMS_SILU + " + linear")
    assert "norm_gate_linear.default" in backend.targets


def test_the_linear_layer_stays_where_its_input_is_used_elsewhere():
    def fn(x, g, w, p):
        y = gated(x, g, w)
        return F.linear(y, p), y

    assert_matched(fn, operands("btd btd d vd", d=D), RMS_SILU, left=["linear"])


def test_the_linear_layer_stays_under_autocast():
    def fn(x, g, w, p):
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(gated(x, g, w), p).float()

    assert_matched(fn, operands("btd btd d vd", d=D), RMS_SILU, left=["linear"], tolerance=5e-2)


@torch.no_grad()
def test_the_linear_layer_stays_where_no_gradient_is_wanted():
    backend = NormGates()
    x, g, w, p = (x.requires_grad_() for x in operands("btd btd d vd", d=D))
    torch.compile(lambda x, g, w, p: F.linear(gated(x, g, w), p), backend=backend, fullgraph=True)(x, g, w, p)
    assert "linear" in backend.targets and "norm_gate.default" in backend.targets


def saved(fn, args):
    """The sizes of what autograd keeps of a call beside its arguments, by shape."""
    kept = []
    leaves = [x.detach().clone().requires_grad_() for x in args]
    own = {x.untyped_storage().data_ptr() for x in leaves}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        fn(*leaves)
    return {x.untyped_storage().data_ptr(): x.numel() for x in kept if x.untyped_storage().data_ptr() not in own}


def test_what_lies_before_the_linear_layer_is_not_kept():
    """One statistic a row, where eager keeps the normalised tensor and the gated one."""
    args = operands("btd btd d vd", d=D)
    rows = args[0].numel() // D

    def fn(x, g, w, p):
        return F.linear(gated(x, g, w), p)

    compiled = torch.compile(fn, backend=NormGates(), fullgraph=True)
    compiled(*(x.detach().clone().requires_grad_() for x in args))
    assert sum(saved(compiled, args).values()) == rows
    assert sum(saved(fn, args).values()) >= 2 * rows * D


def test_one_graph_serves_every_length():
    def fn(x, g, w):
        h = x.unflatten(-1, (2, 8))
        return (F.rms_norm(h, (8,), w[:8], 1e-5) * F.silu(g.view_as(h))).flatten(2)

    backend = NormGates(then="aot_eager")
    compiled = torch.compile(fn, backend=backend, fullgraph=True, dynamic=True)
    for b, t in ((2, 7), (3, 5), (4, 11)):
        args = operands("btd btd d", b=b, t=t, d=D)
        assert_same(fn, compiled, args)
    assert len(backend.found) == 1 and [r.family for r in backend.found[0].rewrites] == [RMS_SILU]


def test_an_eps_that_is_no_literal():
    """Under dynamic shapes a module's numbers are operands too: the program is compiled again when one changes."""
    norm = nn.RMSNorm(D)
    norm.eps = 1e-2

    def fn(x, g):
        x = x.unflatten(-1, (2, 8))
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * F.silu(g.view_as(x))

    backend = NormGates(then="aot_eager")
    compiled = torch.compile(fn, backend=backend, fullgraph=True, dynamic=True)
    compiled_before = []
    for eps in (1e-2, 1e-2, 0.3):
        norm.eps = eps
        assert_same(fn, compiled, operands("btd btd", d=D))
        assert [r.family for r in backend.found[-1].rewrites] == [RMS_SILU]
        compiled_before.append(len(backend.found))
    assert compiled_before[0] == compiled_before[1] < compiled_before[2]


def test_rows_that_do_not_lie_side_by_side():
    """Time first, slices of one projection, and a view of the result, which is dense now."""

    def fn(x, g, w):
        x, g = x.transpose(0, 1), g[..., D : 2 * D].transpose(0, 1)
        return all_narrow(x, g, w).transpose(0, 1).view(-1, D)

    assert_matched(fn, operands("btd bte d", d=D, e=3 * D), RMS_SILU, then="aot_eager")


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.gate = nn.RMSNorm(D), nn.Linear(D, D)
        self.act, self.out = nn.SiLU(), nn.Linear(D, D)

    def forward(self, x):
        return self.out(self.norm(x) * self.act(self.gate(x)))


@pytest.fixture
def operators(monkeypatch):
    """The whole pipeline writes the operators, as it does for a CUDA device."""
    monkeypatch.setattr("fla_compile.passes.norm_gate_emit.has_triton", lambda *args: True)


def test_in_checkpoints_and_layer_after_layer(operators):
    layers = nn.ModuleList(Layer() for _ in range(3))

    def fn(x):
        for layer in layers:
            x = x + checkpoint(layer, x, use_reentrant=False)
        return layers[0](x)

    backend, args = Passes(then="aot_eager"), operands("btd", d=D)
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), args)
    assert [r.family for r in backend.report.rewrites] == [RMS_SILU + " + linear"] * 4
    assert backend.report.refusals == ()


def test_a_gate_that_is_a_gated_norm():
    """The second is begun before the first, and needs its result."""

    def fn(x, g, w):
        n = F.rms_norm(x + 1, (D,), w, 1e-5)
        return n * F.silu(gated(x, g, w))

    assert_matched(fn, operands("btd btd d", d=D), RMS_SILU, RMS_SILU)


def recurrence(q, k, v, g):
    S, o = bare(q, v), []
    for t in range(q.shape[1]):
        S = S + k[:, t][..., None] * v[:, t][..., None, :]
        o.append((q[:, t][..., None] * S).sum(-2))
    o = torch.stack(o, 1)
    return F.rms_norm(o, o.shape[-1:], eps=1e-5) * F.silu(g)


def test_behind_a_recurrence(operators):
    backend, args = Passes(then="aot_eager"), operands("bthk bthk bthv bthv")
    assert_same(recurrence, torch.compile(recurrence, backend=backend, fullgraph=True), args)
    assert [r.family for r in backend.report.rewrites] == ["linear_attention", RMS_SILU]
    assert "fla_compile.norm_gate.default" in backend.report.after


def test_disabled():
    backend = Passes(Options(disable=("norm_gate",)))
    torch.compile(gated, backend=backend, fullgraph=True)(*operands("btd btd d", d=D))
    assert backend.report.rewrites == ()


def test_reported():
    """On the CPU the program stays as it is, and the report says so."""
    report = fla_compile.explain(gated, *operands("btd btd d", d=D))
    (rewrite,) = report.rewrites
    assert rewrite.equation == "u = x, y = u / sqrt(mean(u^2) + eps) * w * silu(g)"
    assert rewrite.kernel == "as written (Inductor)"
    assert rewrite.source.startswith("test_norm_gate_regions.py:")
    assert report.graph("after") == report.graph("before") and rewrite.nodes_before == rewrite.nodes_after == 3


def test_a_wrong_reading_is_refused(monkeypatch):
    """What the algebra gets wrong costs the rewrite, not the numbers."""
    from dataclasses import replace

    from fla_compile.passes import norm_gate_search

    read = norm_gate_search.read

    def wrong(value):
        found = read(value)
        return found and replace(found, eps=found.eps * 2)

    monkeypatch.setattr(norm_gate_search, "read", wrong)
    backend = NormGates()
    args = operands("btd btd d", d=D)
    assert_same(gated, torch.compile(gated, backend=backend, fullgraph=True), args)
    assert [r.reason for r in backend.found[-1].refusals] == ["validation_failed"]


class Stop(Exception):
    """What is compiled is too large to run."""


@pytest.mark.parametrize("spelled", ["plain", "rows", "grouped"])
def test_large_programs_are_checked_on_few_rows(spelled, monkeypatch):
    """Sizes stand in the program as numbers, alone or multiplied."""
    from fla_compile.passes import norm_gate_check

    B, T, H, V = 8, 2048, 32, 128
    seen = []
    compare = norm_gate_check._compare

    def watched(before, after, inputs, decays, sized):
        seen.append([tuple(sized(s) for s in n.meta["example_value"].shape) for n in inputs])
        return compare(before, after, inputs, decays, sized)

    def fn(o, g, w):
        if spelled == "grouped":
            return F.group_norm(o.view(B * T, H * V), H, w.repeat(H)).view(B, T, H * V) * F.silu(g.view(B, T, H * V))
        if spelled == "rows":
            o, g = o.view(B * T * H, V), g.view(B * T * H, V)
        return (F.rms_norm(o, (V,), w, 1e-5) * F.silu(g)).view(B, T, H * V)

    def stop(gm, example_inputs):
        found.append(match_norm_gate(gm, kernel=True))
        raise Stop

    monkeypatch.setattr(norm_gate_check, "_compare", watched)
    found = []
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="Stop"):
        torch.compile(fn, backend=stop, fullgraph=True)(torch.empty(B, T, H, V), torch.empty(B, T, H, V), torch.ones(V))
    assert found[0].refusals == [] and len(found[0].rewrites) == 1
    assert seen and all(math.prod(shape) <= 200_000 for shape in seen[0])

"""Matching in a whole graph: each loop is judged alone, and what surrounds it computes what it did."""

import pytest
import torch
import torch.nn.functional as F
from programs import Passes, assert_looped, assert_rewritten, assert_same, bare, here, operands
from torch._higher_order_ops.scan import scan

from fla_compile.options import Options


def recur(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o


def test_two_loops_of_one_function():
    def fn(q, k, v, g):
        return recur(recur(q, k, q, g).tanh(), k, v, -g)

    report = assert_rewritten(fn, operands("bthk bthk bthv bthk"), "gla", "gla")
    assert len({r.source for r in report.rewrites}) == 1


def one_of_two(q, k, v, g):
    y = recur(q, k, v, g)
    h, outs = torch.zeros_like(y[:, 0]), []
    for t in range(y.shape[1]):
        h = h + F.dropout(y[:, t], 0.5)  # here
        outs.append(h)
    return torch.stack(outs, 1)


def test_a_refused_loop_does_not_take_the_other_with_it():
    backend = Passes()
    assert_same(one_of_two, torch.compile(one_of_two, backend=backend, fullgraph=True), operands("bthk bthk bthv bthk"))
    report = backend.report
    assert [r.family for r in report.rewrites] == ["gla"]
    assert [r.reason for r in report.refusals] == ["random_in_loop"]
    assert report.refusals[0].source == here(one_of_two)
    # The first trace has both as scans; the second has the refused loop as the user wrote it.
    assert len(backend.reports) == 2 and backend.reports[0].graph("before").count("scan(") > 1
    code = [line for line in report.graph("after").splitlines() if "#" not in line]
    assert sum("dropout(" in line for line in code) == operands("bt")[0].shape[1]
    assert "higher_order.scan" not in report.graph("after")


def written_scan(q, k, v, g):
    def step(S, x):
        q, k, v, a = x
        S = S * a[..., None] + k[..., None] * v[..., None, :]
        return S, torch.einsum("bhk,bhkv->bhv", q, S)

    xs = tuple(x.movedim(1, 0) for x in (q, k, v, torch.sigmoid(g)))
    S, o = scan(step, bare(q, v), xs)
    return o.movedim(0, 1), S


def looped(q, k, v, g):
    S, o = bare(q, v), []
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        o.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(o, 1), S


def test_a_scan_that_the_user_wrote():
    report = assert_rewritten(written_scan, operands("bthk bthk bthv bthk"), "gla", reference=looped)
    assert report.rewrites[0].source.startswith("test_match_recurrences.py:")


def test_a_refused_scan_that_the_user_wrote_stays():
    def fn(x):
        def step(h, x):
            h = h + x * torch.rand_like(x)
            return h, h.clone()

        return scan(step, x[0] * 0, x)[1]

    backend = Passes()
    x = operands("tk")[0].abs()
    with torch.no_grad():
        got = torch.compile(fn, backend=backend, fullgraph=True)(x)
    steps = got.diff(dim=0) / x[1:]
    assert ((0 <= steps) & (steps <= 1)).all() and steps.std() > 0
    assert [r.reason for r in backend.report.refusals] == ["random_in_loop"] and len(backend.reports) == 1
    assert "higher_order.scan" in backend.report.graph("after")


# The start of the state: zeros that nothing writes to are not read by the kernel.


def from_zeros(q, k, v, g):
    return recur(q, k, v, g)


def from_changed_zeros(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    S[:, 0] = 1.0
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


def from_zeros_changed_through_a_view(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    S.transpose(0, 1)[0].fill_(2.0)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


def from_zeros_that_the_loop_updates(q, k, v, g):
    S, o = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), torch.zeros_like(v)
    held = S
    S.add_(1.0)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, held


@pytest.mark.parametrize(
    "fn, zero",
    [
        (from_zeros, True),
        (from_changed_zeros, False),
        (from_zeros_changed_through_a_view, False),
        (from_zeros_that_the_loop_updates, False),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_states_that_start_at_zero(fn, zero):
    report = assert_rewritten(fn, operands("bthk bthk bthv bthk"), "gla")
    call = next(line for line in report.graph("after").splitlines() if "torch.ops.fla_compile.gla" in line)
    assert (", None, 1.0)" in call) == zero


# Memory that the program writes to.


def writes_to_its_argument(q, k, v, g):
    S = bare(q, v)
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        v[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)  # lifting refuses this: v is read and written
    return S


def writes_to_another_name(q, k, v, o):
    S = bare(q, v)
    for t in range(q.shape[1]):
        S = S * 0.9 + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return S


@pytest.mark.parametrize("shift", [0, 1], ids=["same step", "next step"])
def test_an_output_that_shares_memory_with_an_operand(shift):
    """With a shift, step t writes what step t+1 reads: eager sees it, and so must the compiled program."""
    q, k, _, _ = operands("bthk bthk bthv bthk")
    base = operands("btEhv", E=1, seed=5)[0].reshape(2, 7, 2, 6)
    base = torch.cat([base, base], 1)

    def arguments():
        memory = base.clone()
        return memory, (q, k, memory[:, shift : shift + 7], memory[:, 1:8])

    backend = Passes()
    memory, args = arguments()
    got = torch.compile(writes_to_another_name, backend=backend)(*args)
    wanted_memory, args = arguments()
    want = writes_to_another_name(*args)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(memory, wanted_memory, rtol=2e-5, atol=2e-5)
    assert backend.report.rewrites == ()


def test_an_output_of_its_own_is_written_to():
    q, k, v, o = operands("bthk bthk bthv bthv")
    backend = Passes()
    got_o, want_o = o.clone(), o.clone()
    got = torch.compile(writes_to_another_name, backend=backend, fullgraph=True)(q, k, v, got_o)
    want = writes_to_another_name(q, k, v, want_o)
    torch.testing.assert_close((got, got_o), (want, want_o), rtol=2e-5, atol=2e-5)
    assert [r.family for r in backend.report.rewrites] == ["retention"]


def test_reading_what_is_written_is_left_alone():
    q, k, v, g = operands("bthk bthk bthv bthk")
    backend = Passes()
    got_v, want_v = v.clone(), v.clone()
    got = torch.compile(writes_to_its_argument, backend=backend)(q, k, got_v, g)
    want = writes_to_its_argument(q, k, want_v, g)
    torch.testing.assert_close((got, got_v), (want, want_v), rtol=2e-5, atol=2e-5)
    if backend.report.rewrites:
        assert backend.report.refusals == ()


def escaping_read_out(q, k, v, g):
    S, o = bare(q, v), torch.zeros_like(v)
    y = torch.zeros_like(v[:, 0])
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * (v[:, t] + y)[..., None, :]  # here
        y = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
        o[:, t] = y
    return o


def test_a_read_out_that_feeds_the_next_step_is_looped():
    assert_looped(escaping_read_out, operands("bthk bthk bthv bthk"), "unknown_recurrence", "2 states")


def test_intermediates_used_elsewhere_stay():
    """What the loop reads is used after it too: the rewrite must leave it in the graph."""

    def fn(q, k, v, g):
        a = torch.sigmoid(g)
        S, o = bare(q, v), torch.zeros_like(v)
        for t in range(q.shape[1]):
            S = S * a[:, t][..., None] + k[:, t][..., None] * v[:, t][..., None, :]
            o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
        return o, a * q, S.sum() + k.movedim(1, 0).cos()

    assert_rewritten(fn, operands("bthk bthk bthv bthk"), "gla")


def test_a_kernel_that_refuses(monkeypatch):
    from fla_compile.passes import pipeline

    monkeypatch.setattr(pipeline.decay_ops, "supports", lambda *args: "not on a Tuesday")

    def fn(q, k, v, g):
        S, o = bare(q, v), torch.zeros_like(v)
        for t in range(q.shape[1]):
            S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]  # here
            o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
        return o

    assert_looped(fn, operands("bthk bthk bthv bthk", k=16, v=24), "no_kernel", "Tuesday")


@pytest.fixture
def on_cuda(monkeypatch):
    """What is asked of kernels is asked for CUDA."""
    from fla_compile.passes import pipeline

    for name in ("kernel_name", "supports"):
        known = getattr(pipeline.decay_ops, name)
        monkeypatch.setattr(pipeline.decay_ops, name, lambda own, _, *args, known=known: known(own, "cuda", *args))


@pytest.mark.parametrize(
    ("axes", "sizes", "kernel"),
    [
        ("bthv", {}, "chunk (Triton)"),
        ("bthv", {"v": 257}, "chunk (matrix products)"),
        ("bthv", {"k": 513}, "chunk (matrix products)"),
        ("bthv bthk", {}, "chunk (matrix products)"),
    ],
    ids=["values", "wide", "many keys", "both"],
)
def test_what_runs_a_decay_over_values_on_cuda(on_cuda, axes, sizes, kernel):
    def fn(q, k, v, w, g=None):
        S, o = bare(q, v), torch.zeros_like(v)
        for t in range(q.shape[1]):
            S = S * w[:, t].sigmoid()[..., None, :]
            if g is not None:
                S = S * g[:, t].sigmoid()[..., None]
            S = S + k[:, t][..., None] * v[:, t][..., None, :]
            o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
        return o

    report = assert_rewritten(fn, operands(f"bthk bthk bthv {axes}", **sizes), "gla")
    assert [r.kernel for r in report.rewrites] == [kernel]


def test_operands_and_not_the_state_say_what_runs(on_cuda):
    def fn(q, k, v, g, w):
        S, o = bare(q, v).float(), torch.zeros_like(v)
        for t in range(q.shape[1]):
            S = S * g[:, t].sigmoid()[..., None] * w[:, t].sigmoid()[..., None, :]
            S = S + k[:, t][..., None] * v[:, t][..., None, :]
            o[:, t] = (q[:, t][..., None] * S).sum(-2).to(v.dtype)
        return o

    args = operands("bthk bthk bthv bthk bthv", dtype=torch.bfloat16)
    report = assert_rewritten(fn, args, "gla")
    assert [r.kernel for r in report.rewrites] == ["chunk (Triton)"]


def test_disabled():
    backend = Passes(Options(disable=("recurrence",)))
    args = operands("bthk bthk bthv bthk")
    with torch.no_grad():
        got = torch.compile(recur, backend=backend, fullgraph=True)(*args)
    torch.testing.assert_close(got, recur(*args), rtol=2e-5, atol=2e-5)
    assert backend.report.rewrites == () and backend.report.refusals == ()


def chained(q, k, v, g, S):
    for _ in range(2):
        o, S = recur_from(q, k, v, g.exp(), S)
    return o, S


def recur_from(q, k, v, a, S):
    o = torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * a[:, t][..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


def decay_changed_under_another_name(q, k, v, g, S):
    g = g * 1
    a = g.exp()
    g.detach().mul_(2)
    return recur_from(q, k, v, a, S)


def decay_changed_by_parts(q, k, v, g, S):
    a = g.sigmoid()
    for part in a.unbind(2):
        part.mul_(0.3)
    return recur_from(q, k, v, a, S)


def constant_changed(q, k, v, g, S):
    c = torch.zeros(q.shape[-1])
    c[0] = -0.5
    return recur_from(q, k, v, (c + 0.7).expand_as(q), S)


def zeros_filled(q, k, v, g, S):
    S = torch.zeros_like(S)
    torch.full(S.shape, 2.0, out=S)
    return recur_from(q, k, v, g.exp(), S)


def rounded_to_integers(q, k, v, g, S):
    return recur_from(q, k, v, g.exp().mul(3).to(torch.int32).float() * 0.1, S)


def argument_changed_after(q, k, v, g, S):
    o, S = recur_from(q, k, v, g.exp(), S)
    k.zero_()
    return o, S


@pytest.mark.parametrize(
    "fn",
    [
        chained, decay_changed_under_another_name, decay_changed_by_parts, constant_changed, zeros_filled,
        rounded_to_integers, argument_changed_after,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "q has a gradient"])
def test_memory_written_around_the_loop(fn, grad):
    torch.manual_seed(0)
    fresh = [x.detach() for x in operands("bthk bthk bthv bthk bhkv")]

    def run(f):
        args = [x.clone() for x in fresh]
        args[0].requires_grad_(grad)
        o, S = f(*args)
        return o, S, *args[1:], *(torch.autograd.grad((o * o).sum(), args[0]) if grad else ())

    backend = Passes(then="aot_eager")
    for got, want in zip(run(torch.compile(fn, backend=backend, fullgraph=True)), run(fn), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert backend.report.rewrites or backend.report.refusals


def test_number_that_changes():
    def fn(q, k, v, gamma):
        S, o = bare(q, v), torch.zeros_like(v)
        for t in range(q.shape[1]):
            S = S * gamma + k[:, t][..., None] * v[:, t][..., None, :]
            o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
        return o

    args = [x.detach() for x in operands("bthk bthk bthv")]
    compiled = torch.compile(fn, backend=Passes(), fullgraph=True)
    for gamma in (0.9, 0.8, 2, 3, 0.7):
        torch.testing.assert_close(compiled(*args, gamma), fn(*args, gamma), rtol=1e-4, atol=1e-5)

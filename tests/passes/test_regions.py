"""Recurrences where something else is going on: checkpoint regions, autocast, no_grad, scans written by hand."""

import pytest
import torch
import torch.nn.functional as F
from programs import Passes, assert_same, bare, operands
from torch._higher_order_ops.scan import scan
from torch.utils.checkpoint import checkpoint

AXES = "bthk bthk bthv bthk"


def gla(q, k, v, g):
    S, o = bare(q, v), []
    for t in range(q.shape[1]):
        S = S * torch.sigmoid(g[:, t])[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        o.append((q[:, t][..., None] * S).sum(-2))
    return torch.stack(o, 1), S


def delta(q, k, v, g):
    S, o = bare(q, v), []
    for t in range(q.shape[1]):
        k_t = F.normalize(k[:, t], dim=-1)
        u = (v[:, t] - (k_t[..., None] * S).sum(-2)) * torch.sigmoid(g[:, t, :, :1])
        S = S + k_t[..., None] * u[..., None, :]
        o.append((q[:, t][..., None] * S).sum(-2))
    return torch.stack(o, 1), S


def scanned(q, k, v, g):
    h, o = torch.zeros_like(g[:, 0]), []
    for t in range(q.shape[1]):
        h = torch.sigmoid(g[:, t]) * h + k[:, t]
        o.append(h * q[:, t])
    return torch.stack(o, 1), h


def generic(q, k, v, g):
    h, o = torch.zeros_like(g[:, 0]), []
    for t in range(q.shape[1]):
        h = torch.tanh(g[:, t] * h + k[:, t])
        o.append(h * q[:, t])
    return torch.stack(o, 1), h


LOOPS = {"gla": gla, "delta_rule": delta, "linear_scan": scanned, "generic": generic}


def families(backend):
    return [r.family for r in backend.report.rewrites]


@pytest.mark.parametrize("family", LOOPS)
def test_in_a_checkpoint(family):
    loop = LOOPS[family]

    def fn(q, k, v, g):
        o, S = checkpoint(loop, q, k.tanh(), v, g, use_reentrant=False)
        return o * 2, S

    backend, args = Passes(then="aot_eager"), operands(AXES)
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), args)
    assert families(backend) == [family]


def test_beside_and_inside_a_checkpoint():
    def fn(q, k, v, g):
        o, S = gla(q, k, v, g)
        p, R = checkpoint(gla, q, k, o, g, use_reentrant=False)
        return p, S, R

    backend, args = Passes(then="aot_eager"), operands("bthk bthk bthk bthk")
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), args)
    assert families(backend) == ["gla", "gla"]


@pytest.mark.parametrize("family", LOOPS)
def test_without_gradients_inside(family):
    loop = LOOPS[family]

    def fn(q, k, v, g):
        with torch.no_grad():
            o, S = loop(q, k, v, g)
        return o * q.sum(), S * g.sum()

    backend, args = Passes(then="aot_eager"), operands(AXES)
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), args)
    assert families(backend) == [family]


@pytest.mark.parametrize("family", LOOPS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def test_without_gradients_outside(family, mode):
    backend, args, loop = Passes(), operands(AXES), LOOPS[family]
    with mode():
        got, want = torch.compile(loop, backend=backend, fullgraph=True)(*args), loop(*args)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    assert families(backend) == [family]


# Autocast: what eager rounds may be rounded, in no other type; what it keeps wide is kept wide.


def projected(x, W, U, R):
    """The products are those that autocast narrows."""
    S, o = x.new_zeros(x.shape[0], W.shape[1], U.shape[1]), []
    for t in range(x.shape[1]):
        k, v = x[:, t] @ W, x[:, t] @ U
        S = S * torch.sigmoid(x[:, t] @ R)[:, :, None] + k[:, :, None].float() * v[:, None, :].float()
        o.append(torch.einsum("bk,bkv->bv", k, S.to(k.dtype)))
    return torch.stack(o, 1), S


def recurrent_product(x, W, U, R):
    h, o = x.new_zeros(x.shape[0], U.shape[1]), []
    for t in range(x.shape[1]):
        h = torch.tanh((x[:, t] @ U).float() + (h @ R).float() * 0.1)
        o.append(h)
    return torch.stack(o, 1), h


def only_elementwise(x, W, U, R):
    h, o = x.new_zeros(x.shape[0], x.shape[2]), []
    for t in range(x.shape[1]):
        h = torch.sigmoid(x[:, t]) * h + x[:, t]
        o.append(h)
    return torch.stack(o, 1) @ W, h


def state_as_a_matrix_product(x, W, U, R):
    S, o = x.new_zeros(x.shape[0], x.shape[2], x.shape[2]), []
    for t in range(x.shape[1]):
        S = S * 0.9 + (x[:, t].unsqueeze(-1) @ x[:, t].unsqueeze(-2)).float()
        o.append((x[:, t].unsqueeze(-2) @ S).squeeze(-2))
    return torch.stack(o, 1), S


PROGRAMS = [projected, recurrent_product, only_elementwise, state_as_a_matrix_product]


@pytest.mark.parametrize("fn", PROGRAMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_autocast(fn, inside):
    args = [x * 0.3 for x in operands("btx xk xv vv" if fn is recurrent_product else "btx xk xv xk", x=4)]
    backend = Passes(then="aot_eager")

    def region(*args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fn(*args)

    if inside:
        compiled = torch.compile(region, backend=backend, fullgraph=True)
    else:
        own = torch.compile(fn, backend=backend, fullgraph=True)

        def compiled(*args):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return own(*args)

    assert_same(region, compiled, args, tolerance=3e-2)
    assert backend.report.rewrites


def test_autocast_leaves_wide_states_wide():
    """Nothing here is narrowed by eager: the numbers are those of float32."""
    args = operands(AXES)

    def region(*args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gla(*args)

    backend = Passes(then="aot_eager")
    assert_same(region, torch.compile(region, backend=backend, fullgraph=True), args, tolerance=2e-5)
    assert families(backend) == ["gla"]


def test_autocast_that_ends_before_the_loop():
    def fn(x, W, U, R):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x @ W
        return only_elementwise(y.float(), U[:, :2], U, R)

    backend, args = Passes(then="aot_eager"), [x * 0.3 for x in operands("btx xx xv xk", x=4)]
    assert_same(fn, torch.compile(fn, backend=backend, fullgraph=True), args, tolerance=1e-2)
    assert families(backend) == ["linear_scan"]


# Scans written by hand: state, inputs and outputs may be any tree.


def trees(q, k, v, g):
    def step(state, x):
        a = torch.sigmoid(x["g"])
        S = state["S"] * a[..., None] + x["kv"][0][..., None] * x["kv"][1][..., None, :]
        z = state["z"] * a + x["kv"][0]
        return {"S": S, "z": z}, {"o": torch.einsum("bhk,bhkv->bhv", x["q"], S), "n": [(x["q"] * z).sum(-1)]}

    first = [x.movedim(1, 0) for x in (q, k, v, g)]
    init = {"S": bare(q, v), "z": torch.zeros_like(q[:, 0])}
    end, outs = scan(step, init, {"q": first[0], "kv": (first[1], first[2]), "g": first[3]})
    return outs["o"].movedim(0, 1), outs["n"][0].movedim(0, 1), end["S"], end["z"]


def trees_looped(q, k, v, g):
    S, z, o, n = bare(q, v), torch.zeros_like(q[:, 0]), [], []
    for t in range(q.shape[1]):
        a = torch.sigmoid(g[:, t])
        S = S * a[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        z = z * a + k[:, t]
        o.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
        n.append((q[:, t] * z).sum(-1))
    return torch.stack(o, 1), torch.stack(n, 1), S, z


def backwards(q, k, v, g):
    def step(S, x):
        q, k, v, g = x
        S = S * torch.sigmoid(g)[..., None] + k[..., None] * v[..., None, :]
        return S, torch.einsum("bhk,bhkv->bhv", q, S)

    S, o = scan(step, bare(q, v), tuple(x.movedim(1, 0) for x in (q, k, v, g)), reverse=True)
    return o.movedim(0, 1), S


def backwards_looped(q, k, v, g):
    o, S = gla(*(x.flip(1) for x in (q, k, v, g)))
    return o.flip(1), S


def unknown(q, k, v, g):
    def step(h, x):
        h = torch.tanh(h * x[0] + x[1])
        return h, h.clone()

    h, o = scan(step, torch.zeros_like(q[:, 0]), (g.movedim(1, 0), k.movedim(1, 0)))
    return o.movedim(0, 1) * q, h


@pytest.mark.parametrize(
    "fn, reference, family",
    [(trees, trees_looped, "gla"), (backwards, backwards_looped, "gla"), (unknown, generic, "generic")],
    ids=["trees", "backwards", "unknown"],
)
def test_scans_written_by_hand(fn, reference, family):
    backend, args = Passes(then="aot_eager"), operands(AXES)
    assert_same(reference, torch.compile(fn, backend=backend, fullgraph=True), args)
    assert families(backend) == [family]
    assert "higher_order.scan" not in backend.report.graph("after")

"""Lifting: every form gives eager's values and gradients through one scan."""

import inspect
import time

import pytest
import torch
import torch._dynamo
from lifting import Graphs, twin_of
from torch import nn

from fla_compile.passes.lift_loops import lift_loops

B, T, K, V = 2, 6, 3, 4


def outer(a, b):
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def state(k, v):
    return k.new_zeros(k.shape[0], k.shape[2], v.shape[2])


# Forms that lift: each takes (q, k, v, a) of shapes [B, T, K], [B, T, K], [B, T, V], [B, T, K].


def rebound(q, k, v, a):
    S = state(k, v)
    o = torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * a[:, t, :, None] + k[:, t, :, None] * v[:, t, None]
        o[:, t] = torch.einsum("bk,bkv->bv", q[:, t], S)
    return o, S


def in_place(q, k, v, a):
    S = torch.zeros(k.shape[0], k.shape[2], v.shape[2])
    outs = []
    for t in range(q.shape[1]):
        S *= a[:, t, :, None]
        S += outer(k[:, t], v[:, t])
        outs.append((q[:, t, :, None] * S).sum(1))
    return torch.stack(outs, dim=1), S


def in_place_methods(q, k, v, a):
    S = torch.zeros(k.shape[0], k.shape[2], v.shape[2])
    outs = []
    for t in range(q.shape[1]):
        S.mul_(a[:, t].unsqueeze(-1)).add_(outer(k[:, t], v[:, t]))
        S[:, 0] = S[:, 0] * 0.5
        outs += [torch.matmul(q[:, t].unsqueeze(1), S)]
    return torch.cat(outs, 1)


def whole_setitem(q, k, v, a):
    S = torch.zeros(k.shape[0], k.shape[2], v.shape[2])
    o = torch.empty_like(v)
    for t in range(k.size(1)):
        S[:] = S * a[:, t, :, None] + outer(k[:, t], v[:, t])
        o[..., t, :] = (q[..., t, :, None] * S).sum(-2)
    return o


def time_first(q, k, v, a):
    q, k, v, a = (x.transpose(0, 1) for x in (q, k, v, a))
    S = 0
    o = torch.zeros(v.shape)
    for t in range(len(q)):
        S = S * a[t].unsqueeze(-1) + outer(k[t], v[t])
        o[t] = (q[t].unsqueeze(-1) * S).sum(1)
    return o, S


def number_state(q, k, v, a):
    S, z = 0.0, 1
    outs = []
    for t in range(q.shape[1]):
        S = S * a[:, t, :, None] + outer(k[:, t], v[:, t])
        z = z + k[:, t]
        outs.append((q[:, t, :, None] * S).sum(1) / (1 + (q[:, t] * z).sum(-1, keepdim=True) ** 2))
    return torch.stack(outs, 1), z


def step(S, z, q, k, v, a):
    S = S * a[..., None] + outer(k, v)
    z = z + k
    return S, z, (q.unsqueeze(-1) * S).sum(1)


def tuple_rebound(q, k, v, a):
    S, z = state(k, v), torch.zeros_like(k[:, 0])
    o = v.new_zeros(v.shape)
    for t in range(q.shape[1]):
        S, z, y = step(S, z, q[:, t], k[:, t], v[:, t], a[:, t])
        o[:, t] = y
    return o, S, z


def sub_range(q, k, v, a):
    S = state(k, v)
    o = torch.zeros_like(v)
    for t in range(1, q.shape[1] - 1):
        S = S + outer(k[:, t], v[:, t])
        o[:, t] = (q[:, t, :, None] * S).sum(1)
    return o, S


def by_head(q, k, v, a):
    H = 2
    q, k, v = q[..., :2], k[..., :2], v[..., :2]
    S = torch.zeros(q.shape[0], H)
    o = torch.zeros(q.shape[0], q.shape[1], H)
    for t in range(q.shape[1]):
        rows = []
        for h in range(H):
            rows = [*rows, S[:, h] * 0.9 + k[:, t, h] * v[:, t, h]]
            o[:, t, h] = q[:, t, h] * rows[h]
        S = torch.stack(rows, 1)
    return o, S


def static_branch(q, k, v, a, gated=True, bias=None):
    S = state(k, v)
    o = torch.zeros_like(v)
    for t in range(q.shape[1]):
        """A docstring, and pass, change nothing."""
        pass
        kv = outer(k[:, t], v[:, t])
        if gated:
            S = S * a[:, t, :, None]
        if bias is not None:
            kv = kv + bias[:, t]
        S = S + kv
        del kv
        o[:, t] += (q[:, t, :, None] * S).sum(1)
    return o


def layers(q, k, v, a):
    x = v
    for _ in range(2):
        S = state(k, x)
        outs = []
        for t in range(q.shape[1]):
            S = S * a[:, t, :, None]
            S += outer(k[:, t], x[:, t])
            outs.append((q[:, t, :, None] * S).sum(1))
        x = x + torch.stack(outs, 1) * len(outs)
    return x


def nested_base(q, k, v, a):
    qkv = (q, k, v)
    S = state(k, v)
    with torch.autocast("cpu", enabled=False):
        if q.dim() == 3:
            o = torch.zeros_like(v)
            for t in range(q.shape[1]):
                S = S + outer(qkv[1][:, t], qkv[2][:, t])
                o[:, t] = (qkv[0].transpose(1, 2)[..., t].unsqueeze(-1) * S).sum(1)
    return o, S


def kept_states(q, k, v, a):
    S, prev = state(k, v), state(k, v)
    outs, states = [], []
    for t in range(q.shape[1]):
        y = prev
        prev = S
        S = S * a[:, t, :, None] + outer(k[:, t], v[:, t])
        states.append(S)
        outs.append(y)
        outs.append(prev)
    return torch.stack(states), torch.stack(outs, -1), S


def no_reads(q, k, v, a):
    S = v.clone()
    o = torch.zeros(T, *v.shape)
    for t in range(T):
        S = S * 0.5
        o[t] = S
    return o


def no_carry(q, k, v, a):
    o = torch.zeros_like(v)
    for t in range(q.shape[1]):
        o[:, t] = v[:, t] * 2 + 1.0
    return o


def no_steps(q, k, v, a):
    S = state(k, v)
    o = torch.zeros_like(v)
    for t in range(0):
        S = S + outer(k[:, t], v[:, t])
        o[:, t] = (q[:, t, :, None] * S).sum(1)
    return o, S + v.sum()


FORMS = [
    rebound, in_place, in_place_methods, whole_setitem, time_first, number_state, tuple_rebound, sub_range, by_head,
    static_branch, layers, nested_base, kept_states, no_reads, no_carry, no_steps,
]  # fmt: skip


# Eager's own backward raises: the state it saved for q * S was changed in place.
NO_EAGER_GRADIENT = [in_place, in_place_methods, whole_setitem]


def inputs(steps=T, batch=B, grad=False):
    torch.manual_seed(0)
    q, k, a = (torch.rand(batch, steps, K) for _ in range(3))
    return [x.requires_grad_(grad) for x in (q, k, torch.rand(batch, steps, V), a)]


def flat(out):
    return out if isinstance(out, tuple) else (out,)


def check_against_eager(compiled, fn, steps):
    grad = fn is not whole_setitem
    mine, theirs = inputs(steps, grad=grad), inputs(steps, grad=grad)
    got, want = flat(compiled(*mine)), flat(fn(*theirs))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)
    if fn in NO_EAGER_GRADIENT:
        return
    sum(x.square().sum() for x in want).backward()
    sum(x.square().sum() for x in got).backward()
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("fn", FORMS, ids=lambda f: f.__name__)
def test_values_and_gradients_are_eager_and_one_scan_is_flat_in_time(fn):
    twin = twin_of(fn)
    short = Graphs(twin, by_steps=True)
    check_against_eager(short.fn, fn, T)
    long = Graphs(twin)
    start = time.monotonic()
    got = long.fn(*inputs(10 * T))
    assert time.monotonic() - start < 10
    for x, y in zip(flat(got), flat(fn(*inputs(10 * T))), strict=True):
        torch.testing.assert_close(x, y)
    scans = {layers: 2, no_steps: 0}.get(fn, 1)
    assert short.scans == long.scans == [scans] and short.sizes == long.sizes


@pytest.mark.parametrize("fn", [rebound, in_place, time_first, sub_range], ids=lambda f: f.__name__)
def test_one_graph_for_all_lengths(fn):
    compiled = Graphs(twin_of(fn))
    for steps in (6, 9, 17):
        x = inputs(steps)
        for y in x:
            torch._dynamo.mark_dynamic(y, 1)
        for got, want in zip(flat(compiled.fn(*x)), flat(fn(*x)), strict=True):
            torch.testing.assert_close(got, want)
    assert len(compiled.graphs) == 1


@pytest.mark.parametrize("options", [{"gated": False}, {"bias": torch.ones(B, T, 1, 1)}], ids=str)
def test_static_branches_take_the_value_they_have(options):
    x = inputs()
    got = Graphs(twin_of(static_branch)).fn(*x, **options)
    torch.testing.assert_close(got, static_branch(*x, **options))


def test_argument_updated_in_place_is_the_callers_tensor():
    def fn(S, k):
        first = S
        for t in range(k.shape[1]):
            S += k[:, t]
        return first * 2, S

    mine, theirs = torch.ones(B, K), torch.ones(B, K)
    k = torch.rand(B, T, K)
    compiled = Graphs(twin_of(fn))
    got, want = compiled.fn(mine, k), fn(theirs, k)
    assert got[1] is mine
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(got, want)


class Base(nn.Module):
    def mix(self, q, S):
        return (q.unsqueeze(-1) * S).sum(1)


class Layer(Base):
    __scale = 2.0

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(K, K)
        self.register_buffer("decay", torch.full((B, T, 1), 0.9))

    def mix(self, q, S):
        return super().mix(q, S) * 3

    def forward(self, q, k, v, *, scale=0.5):
        S = torch.zeros(B, K, V)
        o = torch.zeros_like(v)
        for t in range(q.shape[1]):
            S = S * self.decay[:, t, :, None] + outer(self.proj(k[:, t]), v[:, t]) * self.__scale
            o[:, t] = super().mix(q[:, t], S) * scale + self.mix(q[:, t], S)
        return o


def test_method_with_super_private_names_and_submodules():
    layer = Layer()
    q, k, v, _ = inputs()
    want = layer(q, k, v)
    twin = twin_of(Layer.forward)
    Layer.forward._torchdynamo_inline = twin
    try:
        compiled = Graphs(lambda *x: layer(*x))
        torch.testing.assert_close(compiled.fn(q, k, v), want)
        assert compiled.scans == [1]
    finally:
        del Layer.forward._torchdynamo_inline
    assert inspect.signature(twin) == inspect.signature(Layer.forward)
    assert twin.__closure__ == Layer.forward.__closure__ and twin.__globals__ is Layer.forward.__globals__


SCALE = 1.0


@torch._dynamo.config.patch(specialize_float=True)  # a scan takes no symbolic floats
def test_twin_sees_later_changes_of_cells_and_globals():
    global SCALE
    factor = 2.0

    def fn(S, x):
        for t in range(x.shape[1]):
            S = S * factor + x[:, t] * SCALE
        return S

    def change(value):
        nonlocal factor
        factor = value

    fn._torchdynamo_inline = twin_of(fn)
    compiled = Graphs(lambda *a: fn(*a))
    x = torch.zeros(B, K), torch.rand(B, T, K)
    for value in (2.0, 0.5):
        change(value)
        SCALE = value
        torch.testing.assert_close(compiled.fn(*x), fn(*x))


def test_function_is_untouched():
    before = rebound.__code__, dict(rebound.__dict__), rebound.__closure__, rebound.__defaults__
    twin_of(rebound)
    assert (rebound.__code__, dict(rebound.__dict__), rebound.__closure__, rebound.__defaults__) == before


def test_skipped_loops_stay():
    site = lift_loops(rebound).loops[0]
    assert site.function == "rebound" and site.filename == __file__
    assert lift_loops(rebound, skip=frozenset({(site.filename, site.line)})).twin is None


def test_no_source_no_twin():
    namespace = {}
    exec("def f(x, S):\n    for t in range(3):\n        S = S + x[t]\n    return S\n", namespace)
    assert lift_loops(namespace["f"]) == lift_loops(outer)

"""Steps that loops are made of, with operands, and the eager loop over them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fla_compile.kernels.loop_ops import loop, register_step

B, H, D, K, V = 3, 2, 4, 5, 6
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}


def lstm(h, c, x, W):
    i, f, o, u = (x + h @ W.t()).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * u.tanh()
    h = o.sigmoid() * c.tanh()
    return h.clone(), c.clone(), h


def lstm_projecting(h, c, x, U, W, b):
    return lstm(h, c, torch.nn.functional.linear(x, U, b), W)


def gru(h, x, W, b):
    r, z, n = x.chunk(3, -1)
    a, e, m = (torch.nn.functional.linear(h, W, b)).chunk(3, -1)
    z = (z + e).sigmoid()
    h = (1 - z) * (n + (r + a).sigmoid() * m).tanh() + z * h
    return h.clone(), h


def tanh_state(S, q, k, v, a):
    S = torch.tanh(S * a[..., None, None] + k[..., :, None] * v[..., None, :])
    return S.clone(), (q[..., :, None] * S).sum(-2)


def delta_tanh(S, q, k, v, beta):
    """S' = tanh(S + k (beta (v - S^T k))^T) by batched matrix products."""
    error = beta[..., None] * (v - torch.matmul(k[..., None, :], S).squeeze(-2))
    S = torch.tanh(S + torch.matmul(k[..., :, None], error[..., None, :]))
    return S.clone(), torch.matmul(q[..., None, :], S).squeeze(-2)


def masked(h, n, x, start, index, table):
    """A bool and an int read, a counter as an int carry, a table looked up."""
    h = torch.where(start[:, None], torch.zeros_like(h), h)
    h = torch.sin(h + x + table[index]) / (n + 1).to(x.dtype)
    return h.clone(), n + 1, h, n * 2


def idle(h, never, x, unused, spare):
    """A carry that stays, a read and an invariant that nothing uses, the old carry and a constant as outputs."""
    return h * x, never.clone(), h.clone(), torch.full_like(h, 2.0), x.clone()


def narrow(h, x, W):
    """A bfloat16 step that computes in float32 inside."""
    wide = torch.tanh(h.float() @ W.float() + x.float())
    return wide.to(h.dtype), wide


def numbers(h, x, n, scale):
    """An int and a float among the operands, a constant in the step."""
    return torch.tanh(h * scale + x).reshape(n, -1).reshape(h.shape) * torch.tensor([0.5]), h.clone()


def accumulating(s, x, W, b):
    """Linear in the carry: the backward needs no carry at all; W's gradient is a product, b's a sum."""
    return s + (x @ W) * b.exp(), s * 2.0


def transposing(S, q, k, v):
    """The state is turned at each step; what the backward needs of it has other strides where it is computed."""
    S = (S + k[..., :, None] * v[..., None, :]).transpose(1, 2).contiguous()
    return S.clone(), torch.einsum("hk,hkv->hv", q, S)


def views(S, q, k, W):
    """Carry and outputs are views of all kinds, products are transposed."""
    S = torch.tanh((S.transpose(1, 2) @ W).transpose(1, 2) + q[..., :, None] * k[..., None, :])
    outputs = S, S.transpose(0, 1), (S @ W.t()).mT.mT, S.sum((1, 2))[:, None].expand(H, 3), S.flatten(1)[:, ::2]
    return S.mT, *outputs, torch.diagonal(S, dim1=1, dim2=2), k.t() @ q


def detached(h, c, x, W):
    """No gradient through the gate, the weights of the second product and two outputs."""
    g = torch.sigmoid(h.detach() @ W)
    c = c * g + x.detach() * h
    h = torch.tanh(c @ W.detach() + x)
    return h.clone(), c.detach(), h, h.detach() * c, c.detach()


def rounded(S, q, k, v):
    """The state is rounded at each step."""
    S = torch.tanh(S + k[..., :, None] * v[..., None, :]).to(torch.bfloat16).to(S.dtype)
    return S.clone(), (q[..., :, None] * S).sum(-2)


def swapping(h, g, x, W):
    """Two states change places; one is an output twice."""
    return g.clone(), torch.tanh(h @ W + x), g * h, g.clone(), g.clone()


@dataclass(frozen=True)
class Case:
    """`shapes` of carries, reads (without T) and invariants; a float or an int stands for itself."""

    step: Callable[..., Any]
    carries: int
    reads: int
    shapes: tuple[Any, ...]
    dtypes: tuple[tuple[int, torch.dtype], ...] = ()
    dtype: torch.dtype = torch.float64

    def operands(self, T: int, dtype: torch.dtype | None = None, seed: int = 0) -> list[Any]:
        """Random operands, reads with T in front; the floating ones require gradients."""
        generator = torch.Generator().manual_seed(seed)
        found: list[Any] = []
        for i, shape in enumerate(self.shapes):
            if not isinstance(shape, tuple):
                found.append(shape)
                continue
            lead = (T,) if self.carries <= i < self.carries + self.reads else ()
            kind = dict(self.dtypes).get(i, dtype or self.dtype)
            if kind.is_floating_point:
                x = torch.randn(*lead, *shape, generator=generator, dtype=torch.float64) / 2
                found.append(x.to(kind).requires_grad_())
            else:
                found.append(torch.randint(0, 2, (*lead, *shape), generator=generator).to(kind))
        return found

    def graph(self, dtype: torch.dtype | None = None, symbolic: bool = False) -> fx.GraphModule:
        return step_graph(self.step, self.carries, self.reads, self.operands(2, dtype), symbolic)

    def register(self, dtype: torch.dtype | None = None, symbolic: bool = False) -> str:
        return register_step(self.graph(dtype, symbolic), self.carries, self.reads)

    def eager(self, operands: Sequence[Any]) -> list[Tensor]:
        """The definition: the step once for each t, outputs stacked."""
        n, last = self.carries, self.carries + self.reads
        state, outputs = list(operands[:n]), []
        for t in range(operands[n].shape[0]):
            results = self.step(*state, *(x[t] for x in operands[n:last]), *operands[last:])
            state = list(results[:n])
            outputs.append(results[n:])
        return state + [torch.stack(ys) for ys in zip(*outputs, strict=True)]


STATE = ((B, H, K, V), (B, H, K), (B, H, K), (B, H, V))
CASES = {
    "lstm": Case(lstm, 2, 1, ((B, D), (B, D), (B, 4 * D), (4 * D, D))),
    "lstm_projecting": Case(lstm_projecting, 2, 1, ((B, D), (B, D), (B, K), (4 * D, K), (4 * D, D), (4 * D,))),
    "gru": Case(gru, 1, 1, ((B, D), (B, 3 * D), (3 * D, D), (3 * D,))),
    "tanh_state": Case(tanh_state, 1, 4, (*STATE, (B, H))),
    "delta_tanh": Case(delta_tanh, 1, 4, (*STATE, (B, H))),
    "masked": Case(
        masked, 2, 3, ((B, D), (), (B, D), (B,), (B,), (2, D)), ((1, torch.int64), (3, torch.bool), (4, torch.int64))
    ),
    "idle": Case(idle, 2, 2, ((B, D), (D,), (B, D), (K,), (V,))),
    "narrow": Case(narrow, 1, 1, ((B, D), (B, D), (D, D)), dtype=torch.bfloat16),
    "numbers": Case(numbers, 1, 1, ((B, D), (B, D), B, 0.75)),
    "transposing": Case(transposing, 1, 3, ((H, D, D), (H, D), (H, D), (H, D))),
    "views": Case(views, 1, 2, ((H, D, D), (H, D), (H, D), (D, D))),
    "detached": Case(detached, 2, 1, ((B, D), (B, D), (B, D), (D, D))),
    "rounded": Case(rounded, 1, 3, STATE),
    "swapping": Case(swapping, 2, 1, ((B, D), (B, D), (B, D), (D, D))),
    "accumulating": Case(accumulating, 1, 1, ((B, D), (B, K), (K, D), (D,))),
}


def step_graph(
    step: Callable[..., Any], carries: int, reads: int, operands: Sequence[Any], symbolic: bool = False
) -> fx.GraphModule:
    """One step as functional ATen on fake tensors, as the passes make it."""
    shaped = [
        x.detach()[0] if carries <= i < carries + reads else x.detach() if isinstance(x, Tensor) else x
        for i, x in enumerate(operands)
    ]
    functional = torch.func.functionalize(step, remove="mutations")
    if symbolic:
        graph, values = make_fx(functional, tracing_mode="symbolic")(*shaped), shaped
    else:
        mode = FakeTensorMode()
        with mode:
            values = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in shaped]
            graph = make_fx(functional)(*values)
    for node, value in zip(graph.graph.find_nodes(op="placeholder"), values, strict=True):
        node.meta.setdefault("val", value)
    return graph


def as_graph(gm: fx.GraphModule, examples: Sequence[Tensor]) -> Callable[[list[Any]], Any]:
    """The step as the graph that it is, with the check of its operands that a compiled step makes."""

    def run(arguments: list[Any]) -> Any:
        for example, x in zip(examples, arguments, strict=True):
            assert example.shape == x.shape and example.dtype == x.dtype
            pairs = zip(x.shape, example.stride(), x.stride(), strict=True)
            assert x.numel() == 0 or all(size == 1 or a == b for size, a, b in pairs), (example.stride(), x.stride())
        return gm(*arguments)

    return run


def weights(results):
    """Fixed gradients for the floating results."""
    return [
        torch.cos(torch.arange(y.numel(), dtype=torch.float64) + i).view(y.shape).to(y.dtype)
        for i, y in enumerate(results)
        if y.dtype.is_floating_point
    ]


def gradients(results, operands):
    floating = [y for y in results if y.dtype.is_floating_point]
    wanted = [x for x in operands if isinstance(x, torch.Tensor) and x.requires_grad]
    ends = [(y, w) for y, w in zip(floating, weights(results), strict=True) if y.requires_grad]
    return torch.autograd.grad([y for y, _ in ends], wanted, [w for _, w in ends], allow_unused=True)


def assert_close(got, want, tolerance=None):
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if a is None or b is None:
            assert (a is None or not a.any()) and (b is None or not b.any()), i
            continue
        assert a.shape == b.shape and a.dtype == b.dtype, i
        limit = tolerance or TOLERANCE.get(a.dtype, 0)
        error = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
        assert error <= limit * max(1.0, b.double().abs().max().item() if b.numel() else 1.0), (i, error)


def assert_same(case, operands, run=None, key=None):
    key = key or case.register(operands[0].dtype)
    got, want = (run or loop)(key, operands), case.eager(operands)
    assert_close(got, want)
    assert_close(gradients(got, operands), gradients(want, operands))

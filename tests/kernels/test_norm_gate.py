"""Norm times gate as operators on the CPU: against their definition, every gradient, and torch's operator checks."""

import pytest
import torch
import torch.nn.functional as F
from budget import check_budget
from norm_gate_cases import CASES, Case, make_inputs, naive_results, results

from fla_compile.ops import naive_norm_gate, naive_norm_gate_linear, norm_gate, norm_gate_linear

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LARGE = Case(300, 64, groups=4, affine="wb", per_head=True, norm="layer")
NAMES = ("x", "gate", "weight", "bias", "linear_weight", "linear_bias")


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        ("rms", lambda x, w, b: F.rms_norm(x, (8,), eps=1e-5).flatten(-2) * w + b),
        ("layer", lambda x, w, b: F.group_norm(x.flatten(-2).reshape(-1, 24), 3, w, b, 1e-5).view(2, 5, 24)),
    ],
    ids=["rms", "layer"],
)
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_definition(norm, expected, activation):
    """The naive twin says what torch's own norms say."""
    x, g = (torch.randn(2, 5, 24, dtype=torch.float64) for _ in range(2))
    w, b = (torch.randn(24, dtype=torch.float64) for _ in range(2))
    act = getattr(torch, activation) if activation == "sigmoid" else F.silu
    how = dict(norm=norm, activation=activation, width=8)
    want = expected(x.unflatten(-1, (3, 8)), w, b)
    torch.testing.assert_close(naive_norm_gate(x, g, w, b, **how), want * act(g))
    want = expected((x * act(g)).unflatten(-1, (3, 8)), w, b)
    torch.testing.assert_close(naive_norm_gate(x, g, w, b, gate_first=True, **how), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, LARGE], ids=str)
def test_outputs_and_gradients(case, dtype):
    x = make_inputs(case, dtype)
    got, truth, eager = results(case, x, norm_gate), naive_results(case, x, torch.float64), results(case, x)
    assert set(got) == set(truth)
    for name, y in got.items():
        check_budget(f"{case} {name}", y, truth[name], eager[name], "forward" if name == "y" else "backward")


@pytest.mark.parametrize("gate_first", [False, True], ids=["gate-last", "gate-first"])
def test_numerical_gradients(gate_first):
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 8), (3, 8), (8,), (8,))]

    def fn(x, g, w, b):
        return norm_gate(x, g, w, b, norm="layer", width=4, gate_first=gate_first)

    assert torch.autograd.gradcheck(fn, leaves)


def linear_operands(case, dtype, bias=True):
    x = make_inputs(case, dtype)
    P = case.groups * case.width
    linear = torch.randn(7, P).to(dtype), torch.randn(7).to(dtype) if bias else None
    operands = x.x, x.gate, x.weight, x.bias, *linear
    return {n: y.detach().requires_grad_() for n, y in zip(NAMES, operands, strict=True) if y is not None}


def linear_results(fn, case, leaves, dout):
    how = dict(norm=case.norm, activation=case.activation, eps=case.eps, gate_first=case.gate_first, width=case.width)
    out = fn(*(leaves.get(name) for name in NAMES), **how)
    return {
        "out": out.detach(),
        **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), dout), strict=True)),
    }


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_with_a_linear_layer(case, dtype):
    leaves = linear_operands(case, dtype, bias=case.affine == "wb")
    dout = torch.randn(case.rows, 7).to(dtype)
    wide = {name: y.detach().double().requires_grad_() for name, y in leaves.items()}
    got, eager = (linear_results(f, case, leaves, dout) for f in (norm_gate_linear, naive_norm_gate_linear))
    truth = linear_results(naive_norm_gate_linear, case, wide, dout.double())
    for name, y in got.items():
        check_budget(f"{case} {name}", y, truth[name], eager[name], "forward" if name == "out" else "backward")


def test_only_what_needs_a_gradient_gets_one():
    case = CASES[0]
    for wanted in ("x", "gate", "weight", "linear_weight", "linear_bias"):
        leaves = {n: y.detach().requires_grad_(n == wanted) for n, y in linear_operands(case, torch.float64).items()}
        out = norm_gate_linear(*(leaves.get(name) for name in NAMES))
        (got,) = torch.autograd.grad(out.sum(), [leaves[wanted]])
        (want,) = torch.autograd.grad(naive_norm_gate_linear(*(leaves.get(n) for n in NAMES)).sum(), [leaves[wanted]])
        torch.testing.assert_close(got, want)


def test_the_normalised_tensor_is_not_saved():
    """Beside its operands the operator keeps one number a row; its plain form keeps several tensors."""
    case = Case(50, 32)
    kept = {}
    for fn in (norm_gate_linear, naive_norm_gate_linear):
        leaves = linear_operands(case, torch.float32)
        own, sizes = {y.data_ptr() for y in leaves.values()}, {}

        def pack(y, own=own, sizes=sizes):
            if y.data_ptr() not in own:
                sizes[y.data_ptr()] = y.numel()
            return y

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
            fn(*(leaves.get(name) for name in NAMES))
        kept[fn] = sum(sizes.values())
    assert kept[norm_gate_linear] == case.rows
    assert kept[naive_norm_gate_linear] >= 3 * case.rows * case.width


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[4], CASES[6]], ids=str)
def test_opcheck(case):
    leaves = linear_operands(case, torch.float32)
    *four, linear_weight, linear_bias = (leaves.get(name) for name in NAMES)
    form = case.width, case.eps, case.norm == "layer", case.activation == "silu", case.gate_first
    torch.library.opcheck(torch.ops.fla_compile.norm_gate.default, (*four, *form, torch.bfloat16))
    torch.library.opcheck(torch.ops.fla_compile.norm_gate_linear.default, (*four, linear_weight, linear_bias, *form))


def test_one_graph_serves_every_batch():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def run(x, g, w, lw):
        # a literal eps: a default would be a number from elsewhere, for which Dynamo traces twice
        how = dict(width=8, eps=1e-5)
        return norm_gate(x, g, w, **how) + norm_gate_linear(x, g, w, None, lw, **how)

    w, lw = torch.randn(8, requires_grad=True), torch.randn(16, 16, requires_grad=True)
    for B, T in ((2, 3), (5, 7)):
        x, g = (torch.randn(B, T, 16, requires_grad=True) for _ in range(2))
        out = run(x, g, w, lw)
        want = naive_norm_gate(x, g, w, width=8) + naive_norm_gate_linear(x, g, w, None, lw, width=8)
        leaves, do = [x, g, w, lw], torch.randn_like(out)
        for a, b in zip(torch.autograd.grad(out, leaves, do), torch.autograd.grad(want, leaves, do), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1
    assert sum("norm_gate" in str(n.target) for n in counter.graphs[0].graph.nodes) == 2


def test_result_in_another_type():
    x, g = torch.randn(4, 8).bfloat16(), torch.randn(4, 8)
    for fn in (norm_gate, naive_norm_gate):
        assert fn(x, g).dtype == torch.bfloat16 and fn(x, g, dtype=torch.float32).dtype == torch.float32


X = torch.zeros(3, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": torch.zeros(3, 4)}, "gate has shape"),
        ({"width": 3}, "width must divide"),
        ({"weight": torch.zeros(4)}, "weight has 4 elements"),
        ({"weight": torch.zeros(8), "bias": torch.zeros(4), "width": 4}, "bias has 4 elements, weight has 8"),
        ({"weight": torch.zeros(8, dtype=torch.int64)}, "weight must be floating point"),
        ({"weight": torch.zeros(8, device="meta")}, "weight must be floating point on cpu"),
        ({"norm": "batch"}, "norm must be one of"),
        ({"activation": "tanh"}, "activation must be one of"),
    ],
    ids=["gate", "width", "weight", "bias", "integers", "device", "norm", "activation"],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        norm_gate(**{"x": X, "gate": X, **change})


def test_bad_linear():
    with pytest.raises(ValueError, match="linear_weight has shape"):
        norm_gate_linear(X, X, None, None, torch.zeros(5, 4))


def test_extreme_values():
    """Gates and inputs whose squares and exponentials leave float16 or float32."""
    x = torch.tensor([[3e4, -2e4, 1e-7, 0.0]], dtype=torch.float16)
    g = torch.tensor([[200.0, -200.0, 0.0, 60000.0]], dtype=torch.float16)
    for change in ({}, {"gate_first": True}, {"norm": "layer"}):
        leaves = [x.clone().requires_grad_(), g.clone().requires_grad_()]
        y = norm_gate(*leaves, dtype=torch.float32, **change)
        assert all(z.isfinite().all() for z in (y, *torch.autograd.grad(y.sum(), leaves)))

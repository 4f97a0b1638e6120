from itertools import product

import pytest
import torch
from budget import check_budget
from short_conv_cases import NAMES, Case, make_gradients, make_operands, results, truth_and_eager
from torch._dynamo.testing import CompileCounterWithBackend

from fla_compile.kernels.short_conv import kernel_name, short_conv_op, short_conv_step_op, supports
from fla_compile.ops import naive_short_conv, naive_short_conv_step, short_conv, short_conv_step

PLAIN: tuple[str, ...] = ()
CASES = [
    *(Case(W=W, T=T) for W, T in product((2, 4, 8), (1, 2, 7, 63, 64, 65, 1000))),
    *(Case(W=4, T=65, activation=a, parts=p) for a in (None, "silu") for p in (PLAIN, ("bias",), ("residual",))),
    Case(W=3, T=65, D=1),
    Case(W=4, T=65, scale=0.0),
    Case(W=4, T=65, scale=100.0),
    Case(W=20, T=65, D=7),
    Case(W=4, T=3000, B=1, D=64),  # several slabs
    *(Case(W=W, lengths=(1, 40, 2, 7, 64, 3), parts=p) for W in (2, 4, 8) for p in (PLAIN, Case().parts)),
    Case(W=4, lengths=(5,)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_definition(case, dtype):
    operands = make_operands(case, dtype)
    got = results(short_conv, case, operands)
    truth, eager = truth_and_eager(case, operands)
    assert set(got) == {"y", "final_state", "dx", "dweight", *(f"d{name}" for name in case.parts)}
    for name, y in got.items():
        check_budget(f"{case} {name}", y, truth[name], eager[name], "backward" if name[0] == "d" else "forward")


def test_definition_by_hand():
    """x = 1, 2, 3 under the taps 10, 1 after a 7; then SiLU."""
    x = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1)
    y, final = naive_short_conv(
        x, torch.tensor([[10.0, 1.0]]), initial_state=torch.full((1, 1, 1), 7.0), output_final_state=True
    )
    assert y.flatten().tolist() == [71.0, 12.0, 23.0] and final.flatten().tolist() == [3.0]
    conv = torch.nn.Conv1d(5, 5, 4, padding=3, groups=5)
    x = torch.randn(2, 9, 5)
    want = torch.nn.functional.silu(conv(x.mT)[..., :9]).mT
    got, none = naive_short_conv(x, conv.weight[:, 0], conv.bias, activation="silu")
    assert none is None
    torch.testing.assert_close(got, want)


def test_outputs_alone():
    """Gradients from y alone and from the final state alone."""
    case = Case(W=4, T=2)
    operands = make_operands(case, torch.float64)
    for part, grad in enumerate(make_gradients(case, operands)):
        found = []
        for fn in (short_conv, naive_short_conv):
            leaves = {n: x.clone().requires_grad_() for n, x in operands.items()}
            x, weight, bias, residual, state = leaves.values()
            out = fn(x, weight, bias, residual=residual, initial_state=state, output_final_state=True)[part]
            slopes = torch.autograd.grad(out, list(leaves.values()), grad, allow_unused=True)
            found.append(
                [torch.zeros_like(x) if g is None else g for g, x in zip(slopes, leaves.values(), strict=True)]
            )
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("wide", ["weight", "initial_state", "residual"])
def test_operands_of_another_dtype(wide):
    case = Case(W=4, T=20)
    operands = make_operands(case, torch.bfloat16)
    operands[wide] = operands[wide].float()
    got, (truth, eager) = results(short_conv, case, operands), truth_and_eager(case, operands)
    for name, y in got.items():
        if name != "dresidual":  # rounded to bfloat16 in the definition's sum only
            check_budget(name, y, truth[name], eager[name], "backward" if name[0] == "d" else "forward")


def test_strided_operands_and_determinism():
    case = Case(W=4, T=70, D=16)
    operands = make_operands(case, torch.float32)
    strided = dict(operands)
    for name in ("x", "residual", "weight", "initial_state"):
        strided[name] = torch.stack([operands[name].mT, operands[name].mT], -1)[..., 0].mT
    for a, b in zip(*(results(short_conv, case, x).values() for x in (operands, strided)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("parts", [PLAIN, ("bias", "residual")], ids=["plain", "full"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_step(dtype, parts):
    """One step after another is the convolution, and leaves its final state."""
    case = Case(W=4, T=9, parts=(*parts, "initial_state"))
    operands = make_operands(case, dtype)
    x, weight, state = operands["x"], operands["weight"], operands["initial_state"]
    bias, residual = operands.get("bias"), operands.get("residual")
    want, final = short_conv(
        x, weight, bias, activation="silu", residual=residual, initial_state=state, output_final_state=True
    )
    for step in (short_conv_step, naive_short_conv_step):
        own, ys = state.clone(), []
        for t in range(case.T):
            r = None if residual is None else residual[:, t]
            ys.append(step(x[:, t], own, weight, bias, activation="silu", residual=r))
        torch.testing.assert_close(torch.stack(ys, 1), want)
        assert torch.equal(own, final)


@pytest.mark.parametrize("case", [Case(T=5, D=3), Case(T=5, D=3, parts=PLAIN), Case(D=3, lengths=(2, 3))], ids=str)
def test_opcheck(case):
    operands = {n: x.requires_grad_() for n, x in make_operands(case, torch.float64).items()}
    named = (operands.get(n) for n in NAMES)
    torch.library.opcheck(short_conv_op, (*named, True, True, case.cu_seqlens))


def test_opcheck_step():
    x, weight, bias, residual, state = make_operands(Case(T=5, D=3), torch.float64).values()
    torch.library.opcheck(short_conv_step_op, (x[:, 0], state, weight, bias, residual[:, 0], True))


def test_compiles_once():
    """One graph, with one operator in it, serves every batch and length."""
    counter = CompileCounterWithBackend("aot_eager")

    def run(x, weight, state):
        return short_conv(x, weight, activation="silu", initial_state=state, output_final_state=True)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    for B, T in ((2, 17), (5, 48), (4, 65)):
        case = Case(T=T, B=B, D=6, parts=("initial_state",))
        leaves = [x.requires_grad_() for x in make_operands(case, torch.float64).values()]
        out, slopes = compiled(*leaves), make_gradients(case, {"x": leaves[0]})
        want = run(*leaves)
        for a, b in zip(
            torch.autograd.grad(out, leaves, slopes), torch.autograd.grad(want, leaves, slopes), strict=True
        ):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1
    assert sum("short_conv" in str(node.target) for node in counter.graphs[0].graph.nodes) == 1


X, WEIGHT = torch.zeros(2, 5, 3), torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[0]}, "x must have 3 dimensions, got 2"),
        ({"x": X[:, :0]}, "x has an axis of size 0"),
        ({"x": X.int()}, "x must be floating point, got torch.int32"),
        ({"weight": WEIGHT[:2]}, "weight has D=2, x has D=3"),
        ({"weight": WEIGHT[:, :1]}, "W=1 is no convolution"),
        ({"bias": torch.zeros(4)}, "bias has D=4, x has D=3"),
        ({"residual": X[:, :4]}, "residual has T=4, x has T=5"),
        ({"initial_state": torch.zeros(2, 4, 3)}, "initial_state has 4 steps, weight has W=4"),
        ({"initial_state": torch.zeros(1, 3, 3)}, "initial_state has B=1, x has B=2"),
        ({"activation": "gelu"}, "activation must be None, 'silu' or 'swish', got 'gelu'"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "x has B=2, cu_seqlens needs B=1"),
        ({"x": X[:1], "cu_seqlens": torch.tensor([0, 3, 3, 5])}, "sequence 1 is from 3 to 3"),
        ({"x": X[:1], "cu_seqlens": torch.tensor([0, 4])}, "it runs from 0 to 4"),
        ({"x": X.to("meta"), "weight": WEIGHT.to("meta")}, "device 'meta' is not one of"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        short_conv(**{"x": X, "weight": WEIGHT, **change})


def test_supports():
    assert supports("cpu", torch.bfloat16, 20) is None and supports("cuda", torch.bfloat16, 8) is None
    assert supports("cuda", torch.float32, 9) == "W=9 exceeds 8 on cuda"
    assert "dtype" in supports("cpu", torch.int32, 4)
    assert kernel_name("cuda", torch.bfloat16) == "conv (Triton)"
    assert kernel_name("cuda", torch.float64) == kernel_name("cpu", torch.float32) == "conv (slabs)"

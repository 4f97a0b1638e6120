import pytest
import torch
from decay_cases import Case, make_inputs, make_leaves
from operator_checks import LENGTHS, STRENGTHS, check_against_naive, check_compiles_once, check_each_output_alone

from fla_compile.kernels import decay_naive, rwkv6_ops

FAMILIES = ("rwkv6", "rwkv6_no_bonus")
SIZES = [Case(family, T, B=1) for family in FAMILIES for T in LENGTHS]
SIZES += [Case("rwkv6", 3, B=3, H=5, K=7, V=5), Case("rwkv6", 70, B=1, H=1, K=1, V=1)]
DECAYS = [Case("rwkv6", 130, decay, B=1, H=2) for decay in STRENGTHS]


def _check(case, dtype):
    gradients = ("dg", "du") if case.family == "rwkv6" else ("dg",)
    check_against_naive(rwkv6_ops.rwkv6, case, dtype, gradients=gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_sizes(case, dtype):
    _check(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", DECAYS, ids=str)
def test_decays(case, dtype):
    _check(case, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow(dtype):
    _check(Case("rwkv6", 100, B=1, decay="mixed"), dtype)


def test_a_bonus_of_one_reads_what_undecayed_attention_reads():
    x = make_inputs(Case("rwkv6", 70, "zero"), torch.float64)
    o, final = rwkv6_ops.rwkv6(x.q, x.k, x.v, x.g, torch.ones_like(x.u), initial_state=x.h0, output_final_state=True)
    expected, state = decay_naive.naive_linear_attention(x.q, x.k, x.v, initial_state=x.h0, output_final_state=True)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(final, state)


def test_the_first_step_reads_the_initial_state_alone():
    x = make_inputs(Case("rwkv6", 5, "strong"), torch.float64)
    o, _ = rwkv6_ops.rwkv6(x.q, x.k, x.v, x.g, scale=1.0, initial_state=x.h0)
    torch.testing.assert_close(o[:, 0], torch.einsum("bhk,bhkv->bhv", x.q[:, 0], x.h0))
    none, _ = rwkv6_ops.rwkv6(x.q, x.k, x.v, x.g)
    assert none[:, 0].count_nonzero() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_opcheck(family):
    leaves = make_leaves(make_inputs(Case(family, 20, B=1), torch.float32), torch.float32)
    args = [leaves.get(name) for name in ("q", "k", "v", "g", "u", "h0")]
    torch.library.opcheck(rwkv6_ops.rwkv6_op, (*args, 0.3))
    torch.library.opcheck(rwkv6_ops.rwkv6_op, (*args[:5], None, 0.3))


@pytest.mark.parametrize("family", FAMILIES)
def test_opcheck_backward(family):
    x = make_inputs(Case(family, 20, B=1), torch.bfloat16)
    torch.library.opcheck(rwkv6_ops.rwkv6_backward, (x.q, x.k, x.v, x.g, x.u, x.h0, 0.3, x.do, x.dht))
    torch.library.opcheck(rwkv6_ops.rwkv6_backward, (x.q, x.k, x.v, x.g, x.u, None, 0.3, x.do, None))


def test_compiles_once_for_every_length():
    check_compiles_once(rwkv6_ops.rwkv6, "rwkv6", "fla_compile.rwkv6")


def test_only_the_output_or_only_the_state():
    check_each_output_alone(rwkv6_ops.rwkv6, decay_naive.naive_rwkv6, Case("rwkv6", 70))


def _x(*shape, device="cpu"):
    return torch.zeros(shape, device=device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": _x(3)}, "u must have 2 dimensions, got 1"),
        ({"u": _x(3, 6)}, "u has K=6, q has K=4"),
        ({"u": _x(2, 4)}, "u has H=2, q has H=3"),
        ({"u": _x(3, 4).long()}, "u must be floating point, got torch.int64"),
        ({"u": _x(3, 4, device="meta")}, "u is on meta, q is on cpu"),
        ({"g": _x(2, 5, 3)}, "g must have 4 dimensions, got 3"),
        ({"initial_state": _x(2, 3, 4, 5)}, "initial_state has V=5, v has V=6"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"q": _x(2, 5, 3, 4), "k": _x(2, 5, 3, 4), "v": _x(2, 5, 3, 6), "g": _x(2, 5, 3, 4), "u": _x(3, 4)}
    with pytest.raises(ValueError, match=message):
        rwkv6_ops.rwkv6(**(good | change))

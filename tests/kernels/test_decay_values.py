import pytest
import torch
from decay_cases import Case, make_inputs, make_leaves
from operator_checks import LENGTHS, STRENGTHS, check_against_naive, check_compiles_once, check_each_output_alone

from fla_compile.kernels import decay_naive, decay_ops, decay_values

FAMILIES = ("gla_values", "gla_both")
SIZES = [Case(family, T, B=1) for family in FAMILIES for T in LENGTHS]
SIZES += [Case("gla_both", 3, B=3, H=5, K=7, V=5), Case("gla_values", 70, B=1, H=1, K=1, V=1)]
DECAYS = [Case("gla_values", 130, B=1, H=2, value_decay=values) for values in STRENGTHS]
DECAYS += [
    Case("gla_both", 130, keys, B=1, H=2, value_decay=values)
    for keys, values in (
        ("zero", "zero"),
        ("weak", "hard_resets"),
        ("hard_resets", "weak"),
        ("resets", "resets"),
        ("very_strong", "very_strong"),
        ("strong", "mixed"),
        ("mixed", "strong"),
        ("growing", "weak"),
    )
]


def _check(case, dtype):
    gradients = ("dgv",) if case.family == "gla_values" else ("dg", "dgv")
    check_against_naive(decay_ops.gla, case, dtype, gradients=gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_sizes(case, dtype):
    _check(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", DECAYS, ids=str)
def test_decays(case, dtype):
    _check(case, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_narrow(family, dtype):
    _check(Case(family, 100, B=1, value_decay="mixed"), dtype)


def test_keys_and_values_are_mirror_images():
    """The state transposed and read from its other side: sum(do * o) with (q, k) and (do, v) exchanged."""
    x = make_inputs(Case("gla_both", 100, "mixed", value_decay="strong"), torch.float64)
    o, _ = decay_ops.gla(x.q, x.k, x.v, x.g, x.gv, scale=1.0)
    mirrored, _ = decay_ops.gla(x.do, x.v, x.k, x.gv, x.g, scale=1.0)
    torch.testing.assert_close((x.do * o).sum(), (x.q * mirrored).sum())


def test_rows_do_not_see_the_future():
    x = make_inputs(Case("gla_both", 100), torch.float32)
    o, _ = decay_ops.gla(x.q, x.k, x.v, x.g, x.gv, initial_state=x.h0)
    for y in (x.q, x.k, x.v):
        y[:, 50:] = 7.0
    changed, _ = decay_ops.gla(x.q, x.k, x.v, x.g, x.gv, initial_state=x.h0)
    assert torch.equal(o[:, :50], changed[:, :50])


@pytest.mark.parametrize("family", FAMILIES)
def test_opcheck(family):
    leaves = make_leaves(make_inputs(Case(family, 20, B=1), torch.float32), torch.float32)
    args = [leaves.get(name) for name in ("q", "k", "v", "g", "gv", "h0")]
    torch.library.opcheck(decay_values.gla_values, (*args, 0.3))
    torch.library.opcheck(decay_values.gla_values, (*args[:5], None, 0.3))


@pytest.mark.parametrize("family", FAMILIES)
def test_opcheck_backward(family):
    x = make_inputs(Case(family, 20, B=1), torch.bfloat16)
    torch.library.opcheck(decay_values.gla_values_backward, (x.q, x.k, x.v, x.g, x.gv, x.h0, 0.3, x.do, x.dht))
    torch.library.opcheck(decay_values.gla_values_backward, (x.q, x.k, x.v, x.g, x.gv, None, 0.3, x.do, None))


def test_compiles_once_for_every_length():
    check_compiles_once(decay_ops.gla, "gla_both", "fla_compile.gla_values")


def test_only_the_output_or_only_the_state():
    check_each_output_alone(decay_ops.gla, decay_naive.naive_gla, Case("gla_both", 70))


def _x(*shape, device="cpu"):
    return torch.zeros(shape, device=device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gv": None}, "gla needs a gate"),
        ({"gv": _x(2, 5, 3)}, "gv must have 4 dimensions, got 3"),
        ({"gv": _x(2, 5, 3, 4)}, "gv has V=4, v has V=6"),
        ({"gv": _x(2, 4, 3, 6)}, "gv has T=4, q has T=5"),
        ({"gv": _x(2, 5, 3, 6).long()}, "gv must be floating point, got torch.int64"),
        ({"gv": _x(2, 5, 3, 6, device="meta")}, "gv is on meta, q is on cpu"),
        ({"g": _x(2, 5, 3, 6)}, "g has K=6, q has K=4"),
        ({"k": _x(2, 5, 3, 8)}, "k has K=8, q has K=4"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"q": _x(2, 5, 3, 4), "k": _x(2, 5, 3, 4), "v": _x(2, 5, 3, 6), "g": None, "gv": _x(2, 5, 3, 6)}
    with pytest.raises(ValueError, match=message):
        decay_ops.gla(**(good | change))


def test_naive_needs_a_gate_too():
    with pytest.raises(ValueError, match="needs a gate"):
        decay_naive.naive_gla(_x(2, 5, 3, 4), _x(2, 5, 3, 4), _x(2, 5, 3, 6))

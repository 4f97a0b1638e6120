import pytest
import torch
from budget import check_budget
from decay_cases import log_decay
from delta_cases import SCALE, Case, kind, make_operands, output_gradients, results, truth_and_eager

from fla_compile.kernels import decay_factors, decay_layout, delta_chunk, delta_links, delta_naive
from fla_compile.kernels.delta_ops import FAMILIES

SIZES = [Case(family, T) for family in FAMILIES for T in (1, 63, 64, 65)]
SIZES += [Case(family, 200, B=1, H=2, K=16, V=24) for family in FAMILIES]
SIZES += [
    Case("delta_rule", 129, B=1, H=1, K=5, V=3),
    Case("gated_delta_rule", 130, B=1, H=2, K=33, V=17),
    Case("kda", 3, B=3, H=5, K=7, V=5),
    Case("dplr", 70, B=1, H=2, K=33, V=17),
]
DECAYS = [
    Case(family, 130, decay, B=1, H=2)
    for family in ("gated_delta_rule", "kda", "dplr")
    for decay in ("zero", "strong", "very_strong", "resets", "erasing", "mixed", "growing")
]
BETAS = [Case(family, 130, beta=beta, B=1, H=2) for family in FAMILIES for beta in ("two", "any", "same_key")]
BETAS += [Case(family, 130, "erasing", "two", B=1, H=2) for family in ("gated_delta_rule", "kda", "dplr")]


def _operands(case, dtype, **change):
    absent = {"g": None, "beta": None, "b": None, "c": None}
    return delta_chunk.Operands(**(absent | make_operands(case, dtype) | {"scale": SCALE} | change))


def _results(case, dtype):
    return _outcome(_operands(case, dtype), *output_gradients(case, dtype))


def _outcome(x, do, dht):
    o, final = delta_chunk.chunk_forward(x)
    grads = delta_chunk.chunk_backward(x, do, dht)
    found = {"o": o, "final_state": final} | {f"d{name}": getattr(grads, name) for name in grads.__slots__}
    return {name: y for name, y in found.items() if y is not None}


def _check(case, dtype):
    got = _results(case, dtype)
    truth, eager = truth_and_eager(case, dtype)
    assert got.keys() == truth.keys()
    for name, y in got.items():
        check_budget(f"{case} {name}", y, truth[name], eager[name], kind(name))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_sizes(case, dtype):
    _check(case, dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_of_one(family):
    # Not in float32: with one direction to erase, hardly anything is left of the terms that the results are sums of.
    _check(Case(family, 70, K=1, V=1), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", DECAYS, ids=str)
def test_decays(case, dtype):
    _check(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", BETAS, ids=str)
def test_betas(case, dtype):
    _check(case, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_narrow(family, dtype):
    _check(Case(family, 100, "mixed", B=1), dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_slabs_change_nothing(family, monkeypatch):
    case = Case(family, 65)
    whole = _results(case, torch.float64)
    for slab in (1, 65 * 40, 65 * 40 * 3):
        monkeypatch.setattr(decay_layout, "SLAB", slab)
        parts = _results(case, torch.float64)
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("leaf", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("family", ["kda", "dplr"])
def test_every_leaf_size_is_chosen_and_right(family, leaf):
    case = Case(family, 64, "zero", B=1)
    operands, grads = make_operands(case, torch.float64), output_gradients(case, torch.float64)
    operands["g"].fill_(-decay_factors.MILD / (leaf / 2) if leaf > 1 else -2 * decay_factors.MILD)
    gates, k = (operands[name].transpose(1, 2)[None].contiguous() for name in "gk")
    keys = delta_links.make_links(gates, k).keys
    assert keys is not None and keys.leaf == leaf
    truth = results(getattr(delta_naive, f"naive_{family}"), case, operands, *grads)
    x = _operands(case, torch.float64, **operands)
    for name, y in _outcome(x, *grads).items():
        check_budget(name, y, truth[name], truth[name], kind(name))


@pytest.mark.parametrize("decay", ["mixed", "erasing", "weak"])
@pytest.mark.parametrize("wide", [1, 5], ids=["scalar", "keys"])
def test_links_are_the_sum_over_pairs(wide, decay):
    C, K = 16, 5
    r, w = torch.randn(2, 1, 2, 1, C, K, dtype=torch.float64)
    g = log_decay(decay, (1, 2, 1, C, wide)).double() if decay != "erasing" else torch.zeros(1, 2, 1, C, wide).double()
    if decay == "erasing":
        g[..., 7, :] = -1e4
    links = delta_links.make_links(g, r)
    assert (links.keys is None) == (wide == 1)
    b = torch.zeros(1, 2, 1, C, C, wide, dtype=torch.float64)
    for i in range(C):
        for j in range(i):
            b[..., i, j, :] = g[..., j + 1 : i + 1, :].sum(-2)
    expected = torch.einsum("...ik,...jk,...ijk->...ij", r, w, b.exp().expand(*b.shape[:-1], K)).tril().flatten(0, 2)
    torch.testing.assert_close(delta_links.scores(links, r, w), expected)
    total = g.sum(-2, keepdim=True).exp()
    torch.testing.assert_close(links.total, total.mT)
    torch.testing.assert_close(links.read[..., -1:, :], total)
    torch.testing.assert_close(links.write, b[..., -1, :, :].exp())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exponentials_are_normal_numbers_or_zero(dtype):
    x = torch.cat((torch.linspace(-800, 80, 5000), torch.tensor([0.0, -1e4, -torch.inf]))).to(dtype)
    expected, found = x.exp(), delta_links._exp_(x.clone())
    tiny = torch.finfo(dtype).tiny
    assert ((found == 0) | (found >= tiny)).all()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2 * tiny)


@pytest.mark.parametrize("C", [2, 8, 16, 32, 64])
def test_inverse(C):
    # One key again and again, beta = 2: powers of A reach 2^C C-over-C/2, the inverse stays at 2.
    A = torch.full((3, C, C), -2.0).tril(-1)
    A[1] = torch.randn(C, C).tril(-1) / C
    A[2] = 0
    found = delta_chunk._inverse(A + torch.ones(C, C).triu())
    expected = torch.linalg.inv(torch.eye(C).double() - A.double())
    assert found[0].abs().max() == 2
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["gated_delta_rule", "kda", "dplr"])
def test_exact_zero_decay_forgets(family):
    case = Case(family, 65)
    operands = make_operands(case, torch.float32)
    operands["g"][:, 20] = -torch.inf
    if family == "dplr":
        operands["c"][:, 20] = 0  # reads the state before it decays
    x = _operands(case, torch.float32, **operands)
    later = {name: y[:, 20:] for name, y in operands.items() if name != "initial_state"}
    o, _ = delta_chunk.chunk_forward(x)
    alone, _ = delta_chunk.chunk_forward(_operands(case, torch.float32, **later, initial_state=None))
    torch.testing.assert_close(o[:, 20:], alone, rtol=1e-5, atol=1e-5)
    got = _outcome(x, *output_gradients(case, torch.float32))
    assert all(y.isfinite().all() for y in got.values())
    assert got["dinitial_state"].count_nonzero() > 0 and got["dg"][:, 20].count_nonzero() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_do_not_see_the_future(family):
    x = _operands(Case(family, 100), torch.float32)
    o, _ = delta_chunk.chunk_forward(x)
    for y in (x.q, x.k, x.v, x.beta, x.b, x.c):
        if y is not None:
            y[:, 50:] = 0.5
    changed, _ = delta_chunk.chunk_forward(x)
    assert torch.equal(o[:, :50], changed[:, :50])
    assert not torch.equal(o[:, 50:], changed[:, 50:])


@pytest.mark.parametrize("case", [Case(family, 200, "mixed", B=1, H=2) for family in FAMILIES], ids=str)
def test_twice_is_bitwise_the_same(case):
    first, second = _results(case, torch.float32), _results(case, torch.float32)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_optional_gradients(family):
    case = Case(family, 70)
    do, dht = output_gradients(case, torch.float64)
    x = _operands(case, torch.float64)
    zeros = _operands(case, torch.float64, initial_state=0 * x.initial_state)
    alone = delta_chunk.chunk_backward(_operands(case, torch.float64, initial_state=None), do, None, need_dg=False)
    assert alone.g is None and alone.initial_state is None
    with_zeros = delta_chunk.chunk_backward(zeros, do, 0 * dht)
    for name in ("q", "k", "v", "beta", "b", "c"):
        if getattr(x, name) is not None:
            torch.testing.assert_close(getattr(alone, name), getattr(with_zeros, name))

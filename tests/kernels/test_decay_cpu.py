import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from budget import check_budget
from decay_cases import FAMILIES, NAMES, Case, make_inputs, naive_results, truth_and_eager

from fla_compile.kernels import decay_cpu, decay_factors, decay_layout

SIZES = [Case(family, T) for family in FAMILIES for T in (1, 63, 64, 65)]
SIZES += [Case(family, 1000, B=1, H=2, K=16, V=24) for family in FAMILIES]
SIZES += [
    Case("gla", 70, B=1, H=1, K=1, V=1),
    Case("gla", 3, B=3, H=5, K=7, V=5),
    Case("simple_gla", 130, B=1, H=2, K=33, V=17),
    Case("linear_attention", 129, B=1, H=1, K=5, V=3),
]
DECAYS = [
    Case(family, 130, decay, B=1)
    for family in ("retention", "simple_gla", "gla")
    for decay in ("zero", "strong", "very_strong", "resets", "mixed", "growing")
]


def _results(case, dtype):
    x = make_inputs(case, dtype)
    o, final = decay_cpu.chunk_forward(x.q, x.k, x.v, x.g, x.h0, 0.3)
    grads = decay_cpu.chunk_backward(x.q, x.k, x.v, x.g, x.h0, 0.3, x.do, x.dht)
    found = dict(zip(NAMES, (o, final, *grads), strict=True))
    return x, {name: y for name, y in found.items() if y is not None}


def _check(case, dtype):
    x, got = _results(case, dtype)
    truth, eager = truth_and_eager(case, x, dtype)
    assert got.keys() == truth.keys()
    for name, y in got.items():
        kind = "forward" if name in ("o", "final_state") else "backward"
        check_budget(f"{case} {name}", y, truth[name], eager[name], kind)


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
    _check(Case(family, 100, B=1, decay="mixed"), dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_slabs_change_nothing(family, monkeypatch):
    case = Case(family, 65, decay="weak")
    _, whole = _results(case, torch.float64)
    for slab in (1, 65 * 40, 65 * 40 * 3):
        monkeypatch.setattr(decay_layout, "SLAB", slab)
        _, parts = _results(case, torch.float64)
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("leaf", [1, 2, 4, 8, 16, 32, 64])
def test_every_leaf_size_is_chosen_and_right(leaf):
    x = make_inputs(Case("gla", 64, "zero", B=1), torch.float64)
    x.g.fill_(-decay_factors.MILD / (leaf / 2) if leaf > 1 else -2 * decay_factors.MILD)
    assert decay_factors.decays(x.g.transpose(1, 2).unsqueeze(2), 64).leaf == leaf
    got = decay_cpu.chunk_backward(x.q, x.k, x.v, x.g, x.h0, 0.3, x.do, x.dht)
    truth = naive_results(Case("gla", 64, B=1), x, torch.float64)
    for name, y in zip(NAMES[2:], got, strict=True):
        check_budget(name, y, truth[name], truth[name], "backward")


def test_exact_zero_decay_forgets():
    x = make_inputs(Case("gla", 65), torch.float32)
    x.g[:, 20] = -torch.inf
    o, final = decay_cpu.chunk_forward(x.q, x.k, x.v, x.g, x.h0, 0.3)
    later = slice(20, None)
    alone, _ = decay_cpu.chunk_forward(x.q[:, later], x.k[:, later], x.v[:, later], x.g[:, later], None, 0.3)
    torch.testing.assert_close(o[:, later], alone, rtol=1e-5, atol=1e-5)
    grads = decay_cpu.chunk_backward(x.q, x.k, x.v, x.g, x.h0, 0.3, x.do, x.dht)
    assert all(y.isfinite().all() for y in (o, final, *grads))
    assert grads[-1].count_nonzero() > 0 and grads[3][:, 20].count_nonzero() == 0


def test_rows_do_not_see_the_future():
    x = make_inputs(Case("gla", 100), torch.float32)
    o, _ = decay_cpu.chunk_forward(x.q, x.k, x.v, x.g, x.h0, 0.3)
    for y in (x.q, x.k, x.v):
        y[:, 50:] = 7.0
    changed, _ = decay_cpu.chunk_forward(x.q, x.k, x.v, x.g, x.h0, 0.3)
    assert torch.equal(o[:, :50], changed[:, :50])


@pytest.mark.parametrize("case", [Case("gla", 200, "mixed"), Case("simple_gla", 200), Case("retention", 65)], ids=str)
def test_twice_is_bitwise_the_same(case):
    (_, first), (_, second) = _results(case, torch.float32), _results(case, torch.float32)
    assert all(torch.equal(first[name], second[name]) for name in first)


def _fill_kept_memory(value):
    _results(Case("gla", 65), torch.float64)
    decay_layout._kept.memory.view(torch.float64).fill_(value)


@pytest.mark.parametrize("decay", ["weak", "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_workspace_held_is_not_read(family, decay):
    case = Case(family, 65, decay, B=1)
    _, expected = _results(case, torch.float32)
    _fill_kept_memory(torch.nan)
    _, got = _results(case, torch.float32)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_results_do_not_lie_in_the_workspace():
    _, first = _results(Case("gla", 64, B=1, H=1), torch.float32)
    kept = {name: y.clone() for name, y in first.items()}
    _fill_kept_memory(7.0)
    assert all(torch.equal(first[name], kept[name]) for name in kept)


def test_memory_kept_in_inference_mode_serves_training(monkeypatch):
    monkeypatch.setattr(decay_layout, "_kept", threading.local())
    with torch.inference_mode():
        _results(Case("gla", 65, B=1), torch.float32)
    assert not decay_layout._kept.memory.is_inference()
    _check(Case("gla", 65, B=1), torch.float32)


def test_threads_do_not_share_a_workspace():
    case = Case("gla", 200, "strong")
    _, expected = _results(case, torch.float64)
    x = make_inputs(case, torch.float64)

    def forward(_):
        return decay_cpu.chunk_forward(x.q, x.k, x.v, x.g, x.h0, 0.3)[0]

    with ThreadPoolExecutor(2) as pool:
        assert all(torch.equal(o, expected["o"]) for o in pool.map(forward, range(8)))


def test_optional_gradients():
    x = make_inputs(Case("gla", 70), torch.float64)
    *_, dg, dh0 = decay_cpu.chunk_backward(x.q, x.k, x.v, x.g, None, 0.3, x.do, None, need_dg=False)
    assert dg is None and dh0 is None
    with_zeros = decay_cpu.chunk_backward(x.q, x.k, x.v, x.g, 0 * x.h0, 0.3, x.do, 0 * x.dht)
    without = decay_cpu.chunk_backward(x.q, x.k, x.v, x.g, None, 0.3, x.do, None)
    for i in range(4):
        torch.testing.assert_close(without[i], with_zeros[i])

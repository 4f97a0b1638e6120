"""The helpers behind a twin, run eagerly (scan then compiles itself)."""

import pytest
import torch
from fla_compile.passes.loop_runtime import (
    NotLiftable,
    TimeList,
    cat_time,
    finish_in_place,
    len_time,
    not_liftable,
    one_axis,
    over_time,
    run_loop,
    snapshot,
    stack_time,
    time_first,
    write_time,
)

SITE = "user.py:1"


def loop(body, start, stop, carries, reads, **changes):
    fixed = {
        "names": ("S",) * len(carries),
        "in_place": (False,) * len(carries),
        "optional": (False,) * len(reads),
        "targets": (),
        "n_writes": 0,
        "n_lists": 1,
        "site": SITE,
    }
    return run_loop(body, start, stop, carries, reads, **(fixed | changes))


def add(carry, x):
    S = carry[0] + x[0]
    return (S,), (), ([S],)


@pytest.mark.parametrize("first", [torch.zeros(2), 0, 0.5], ids=["tensor", "int", "float"])
def test_run_loop_sums(first):
    x = torch.rand(2, 5)
    (S,), _, ((ys,),) = loop(add, 1, 4, (first,), ((x, 1),))
    start = first if isinstance(first, torch.Tensor) else torch.full((2,), float(first))
    want = x[:, 1:4].cumsum(1) + start[:, None]
    torch.testing.assert_close(ys.movedim(0, 1), want)
    torch.testing.assert_close(S, want[:, -1])


def test_no_steps_changes_nothing():
    S = torch.ones(2)
    assert loop(add, 3, 3, (S,), ((None, 0),), n_writes=1) == ((S,), (None,), ((),))


@pytest.mark.parametrize(
    "call, reason",
    [
        (lambda: time_first([1, 2], 0, 0, 2, SITE), "not_a_tensor"),
        (lambda: time_first(torch.ones(2), 1, 0, 2, SITE), "index_axis"),
        (lambda: time_first(torch.ones(2), 0, 0, 3, SITE), "index_range"),
        (lambda: time_first(torch.ones(2), 0, -1, 2, SITE), "index_range"),
        (lambda: one_axis(None, SITE), "index_axis"),
        (lambda: one_axis(torch.tensor([True]), SITE), "index_axis"),
        (lambda: loop(add, 0, 2, (None,), ((torch.ones(2), 0),)), "carry_not_tensor"),
        (lambda: over_time(torch.hstack, TimeList((torch.ones(2, 2),), 2), site=SITE), "output_list_used"),
    ],
    ids=range(8),
)
def test_not_liftable(call, reason):
    with pytest.raises(NotLiftable) as caught:
        call()
    assert not_liftable(caught.value) == (reason, caught.value.args[1], SITE)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_stack_and_cat_are_torchs(dim):
    items = [torch.rand(2, 3) for _ in range(4)]
    ys = TimeList((torch.stack(items),), 4)
    got = over_time(torch.stack, ys, dim, site=SITE)
    assert got.equal(torch.stack(items, dim)) and got.is_contiguous() and stack_time(ys.streams[0], dim).equal(got)
    if dim < 2:
        got = over_time(torch.cat, ys, dim=dim, site=SITE)
        assert got.equal(torch.cat(items, dim)) and got.is_contiguous() and cat_time(ys.streams[0], dim).equal(got)


def test_two_appends_a_step_interleave():
    a, b = torch.rand(3, 2), torch.rand(3, 2)
    both = TimeList((a, b), 3)
    want = torch.stack([x for pair in zip(a, b, strict=True) for x in pair])
    assert over_time(torch.stack, both, site=SITE).equal(want)
    assert len_time(both) == 6 and len_time([1]) == 1
    assert over_time(torch.stack, [a, b], site=SITE).equal(torch.stack([a, b]))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (1, 2, 3), (2, 1)], ids=str)
def test_write_time_broadcasts_and_casts_as_assignment_does(shape):
    ys = torch.rand(4, *shape, dtype=torch.float64)
    got, want = torch.zeros(2, 6, 3), torch.zeros(2, 6, 3)
    for t in range(4):
        want[:, t + 1] = ys[t]
    write_time(got, 1, (), 1, 5, ys, SITE)
    assert got.equal(want)


def test_state_stays_in_its_object():
    S = torch.zeros(2)
    assert finish_in_place(S, torch.ones(2)) is S and S.sum() == 2
    assert finish_in_place(0, 3) == 3
    assert snapshot(2, torch.zeros(1, dtype=torch.float64)).dtype == torch.float64

"""The helpers behind a twin, run eagerly (scan then compiles itself), and what they refuse while a twin is traced."""

import pytest
import torch
import torch._dynamo
from torch import nn

from fla_compile.passes.lift_loops import lift_loops
from fla_compile.passes.loop_analysis import REASONS, SILENT
from fla_compile.passes.loop_outputs import TimeList, cat_time, len_time, over_time, stack_time
from fla_compile.passes.loop_refusal import NotLiftable, not_liftable
from fla_compile.passes.loop_runtime import run_loop, snapshot
from fla_compile.passes.loop_states import finish_in_place
from fla_compile.passes.loop_steps import one_axis, time_first, write_time

SITE = "user.py:1"
PLAIN = (0, 1, None)
B, T, K = 2, 6, 3


def loop(body, start, stop, carries, reads, **changes):
    fixed = {
        "names": ("S",) * len(carries),
        "in_place": (False,) * len(carries),
        "optional": (False,) * len(reads),
        "slots": (),
        "targets": (),
        "changed": (),
        "others": (),
        "defined": (True,) * len(carries),
        "numbers": (),
        "tests": (),
        "n_lists": 1,
        "site": SITE,
    }
    return run_loop(body, (start, stop, 1), carries, reads, **(fixed | changes))


def add(carry, x, numbers, tests):
    S = carry[0] + x[0]
    return (S,), (), ([S],)


@pytest.mark.parametrize("first", [torch.zeros(2), 0, 0.5], ids=["tensor", "int", "float"])
def test_run_loop_sums(first):
    x = torch.rand(2, 5)
    (S,), _, (((ys,),),) = loop(add, 1, 4, (first,), ((x, 1),))
    start = first if isinstance(first, torch.Tensor) else torch.full((2,), float(first))
    want = x[:, 1:4].cumsum(1) + start[:, None]
    torch.testing.assert_close(ys.movedim(0, 1), want)
    torch.testing.assert_close(S, want[:, -1])


def test_no_steps_changes_nothing():
    S = torch.ones(2)
    assert loop(add, 3, 3, (S,), ((None, 0),), targets=(torch.ones(2),)) == ((S,), ((),), ((),))


@pytest.mark.parametrize(
    "call, reason",
    [
        (lambda: time_first([1, 2], 0, PLAIN, 0, 2, SITE), "not_a_tensor"),
        (lambda: time_first(torch.ones(2), 1, PLAIN, 0, 2, SITE), "index_axis"),
        (lambda: time_first(torch.ones(2), 0, PLAIN, 0, 3, SITE), "index_range"),
        (lambda: time_first(torch.ones(2), 0, PLAIN, -1, 2, SITE), "index_range"),
        (lambda: one_axis(None, SITE), "index_axis"),
        (lambda: one_axis(torch.tensor([True]), SITE), "index_axis"),
        (lambda: loop(add, 0, 2, ("",), ((torch.ones(2), 0),)), "carry_not_tensor"),
        (lambda: over_time(torch.sum, TimeList(((torch.ones(2, 2),),)), site=SITE), "output_list_used"),
    ],
    ids=range(8),
)
def test_not_liftable(call, reason):
    with pytest.raises(NotLiftable) as caught:
        call()
    assert not_liftable(caught.value) == (reason, caught.value.args[1], SITE, 0)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_stack_and_cat_are_torchs(dim):
    items = [torch.rand(2, 3) for _ in range(4)]
    ys = TimeList(((torch.stack(items),),))
    got = over_time(torch.stack, ys, dim, site=SITE)
    assert got.equal(torch.stack(items, dim)) and got.is_contiguous() and stack_time(ys.runs[0][0], dim).equal(got)
    if dim < 2:
        got = over_time(torch.cat, ys, dim=dim, site=SITE)
        assert got.equal(torch.cat(items, dim)) and got.is_contiguous() and cat_time(ys.runs[0][0], dim).equal(got)


def test_two_appends_a_step_interleave():
    a, b = torch.rand(3, 2), torch.rand(3, 2)
    both = TimeList(((a, b),))
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
    write_time(got, 1, (), (1, 5, 1), ((0, ys),), SITE)
    assert got.equal(want)


def test_state_stays_in_its_object():
    S = torch.zeros(2)
    assert finish_in_place(S, torch.ones(2)) is S and S.sum() == 2
    assert finish_in_place(0, 3) == 3
    assert snapshot(2, torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def compiled(fn):
    torch._dynamo.reset()
    twin = lift_loops(fn).twin
    assert twin is not None
    return torch.compile(twin, backend="eager", fullgraph=True)


def containers(weights, x):
    for i in range(len(weights)):
        x = x + weights[i] @ x
    return x


def layer_weights(layers, x):
    for i in range(len(layers)):
        x = x + layers[i].weight @ x
    return x


def into_a_list(kept, x):
    for i in range(len(kept)):
        x = x[:1] * 2
        kept[i] = x
    return x


def changing(x, S):
    for t in range(x.shape[1]):
        S = S + x[:, t]
    return S


def into_argument(x, o):
    for t in range(x.shape[1]):
        o[:, t] = x[:, t].flip(0)


def into_part_of_argument(x, o):
    for t in range(x.shape[1]):
        o[:, t, 0] = x[:, t, 1]


def into_two_arguments(p, o):
    for t in range(p.shape[1]):
        p[:, t] = 1
        o[:, t] = 2


def into_first_state(S, o):
    for t in range(o.shape[1]):
        o[:, t] = 1
        S = S + o.shape[0]
    return S


def state_in_place(x, S):
    for t in range(x.shape[1]):
        S += x[:, t]


def state_and_weight(S, w):
    for t in range(X.shape[1]):
        S += X[:, t] * w


def state_twice(S, P):
    for t in range(X.shape[1]):
        S += X[:, t]
        P = P + S
    return P


X = torch.ones(B, T, K)
STATE = torch.zeros(B, K)
LAYERS = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))


@pytest.mark.parametrize(
    "fn, args, reason",
    [
        (containers, ([torch.eye(2)] * 3, torch.ones(2)), "not_a_tensor"),
        (layer_weights, (LAYERS, torch.ones(2)), "not_a_tensor"),
        (into_a_list, ([None] * 3, torch.ones(2)), "not_a_tensor"),
        (changing, (X, torch.zeros(1, 1)), "carry_changes"),
        (changing, (X.double(), STATE), "carry_changes"),
        (changing, (X, "none"), "carry_not_tensor"),
        (into_argument, (X, X), "mutates_input"),
        (into_argument, (X, X[:, ::1]), "mutates_input"),
        (into_part_of_argument, (X, X), "mutates_input"),
        (into_two_arguments, (X, X), "mutates_input"),
        (into_first_state, (X, X), "mutates_input"),
        (state_in_place, (X, X[:, 1]), "mutates_input"),
        (state_and_weight, (STATE, STATE), "mutates_input"),
        (state_twice, (STATE, STATE), "mutates_input"),
    ],
    ids=lambda x: getattr(x, "__name__", "" if isinstance(x, tuple) else x),
)
def test_refused_while_tracing(fn, args, reason):
    with pytest.raises(Exception) as caught:
        compiled(fn)(*args)
    found = not_liftable(caught.value)
    assert found is not None and found[0] == reason in REASONS
    assert found[2] == f"{__file__}:{fn.__code__.co_firstlineno + 1}"
    assert (reason in SILENT) == (reason == "not_a_tensor")


@pytest.mark.parametrize(
    "fn, shapes",
    [
        (into_argument, [(B, T, K)] * 2),
        (into_part_of_argument, [(B, T, K)] * 2),
        (into_two_arguments, [(B, T, K)] * 2),
        (state_and_weight, [(B, K)] * 2),
        (state_twice, [(B, K)] * 2),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_changed_arguments_lift_where_they_are_distinct(fn, shapes):
    mine, theirs = ([torch.rand(s, generator=torch.Generator().manual_seed(0)) for s in shapes] for _ in range(2))
    got, want = compiled(fn)(*mine), fn(*theirs)
    torch.testing.assert_close(mine, theirs)
    if want is not None:
        torch.testing.assert_close(got, want)


def mutate(S):
    return S.mul_(2)


def hidden_mutation(x, S):
    for t in range(x.shape[1]):
        S = mutate(S) + x[:, t]
    return S


def hidden_view(x, S):
    outs = []
    for t in range(x.shape[1]):
        S += x[:, t]
        outs.append(same(S))
    return torch.stack(outs)


def same(S):
    return S.view(-1)


@pytest.mark.parametrize("fn", [hidden_mutation, hidden_view], ids=lambda f: f.__name__)
def test_what_helpers_hide_fails_in_tracing_not_in_numbers(fn):
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        compiled(fn)(torch.ones(B, T, K), torch.zeros(B, K))

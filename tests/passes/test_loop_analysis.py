"""Every near miss of a time loop is refused at its line; a loop that is no time loop is left without a word."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fla_compile.passes.lift_loops import lift_loops
from fla_compile.passes.loop_analysis import REASONS


def line_of(fn):
    lines, first = inspect.getsourcelines(fn)
    return next(first + i for i, line in enumerate(lines) if "# here" in line)


def refused_branch(x, S):
    for t in range(x.shape[1]):
        S = S + x[:, t]
        if S.abs().max() > 10:  # here
            S = S * 0.5
    return S


def refused_break(x, S):
    for t in range(x.shape[1]):
        S = S + x[:, t]
        if x.shape[0] == 3:
            break  # here
    return S


def refused_return(x, S):
    for t in range(x.shape[1]):
        S = S + x[:, t]
        return S  # here


def refused_index_branch(x, S):
    for t in range(x.shape[1]):
        if t % 2 == 0:  # here
            S = S + x[:, t]
    return S


def refused_two_entries(x, S):
    for t in range(x.shape[1]):
        S = S + x[:, t, t]  # here
    return S


def refused_square(x, S):
    for t in range(1, x.shape[1]):
        S = S + x[:, t]
        S = S * x[:, t * t]  # here
    return S


def refused_slice(x, S):
    for t in range(x.shape[1]):
        S = S + x[:, :t].sum(1)  # here
    return S


def refused_index_after(x, S):
    for t in range(x.shape[1]):
        S = S + x[:, t]
    return S * t  # here


def refused_own_output(x, S):
    o = torch.zeros_like(x)
    for t in range(x.shape[1]):
        o[:, t] = x[:, t]
        S = S + o[:, t]  # here
    return S, o


def refused_aliased_output(x, S):
    o = x.view(x.shape)  # here
    for t in range(x.shape[1]):
        S = S + x[:, t]
        o[:, t] = S
    return o


def refused_list_read(x, S):
    outs = []
    for t in range(x.shape[1]):
        S = S + x[:, t]
        outs.append(S)
    return outs  # here


def refused_list_not_empty(x, S):
    outs = [S]
    for t in range(x.shape[1]):
        S = S + x[:, t]
        outs.append(S)  # here
    return torch.stack(outs)


def refused_temporary_escapes(x, S):
    for t in range(x.shape[1]):
        y = x[:, t] * 2  # here
        S = S + y
    return S, y


class Holder(nn.Module):
    def refused_attribute(self, x, S):
        for t in range(x.shape[1]):
            S = S + x[:, t]
            self.S = S  # here
        return S

    def refused_attribute_in_place(self, x, S):
        for t in range(x.shape[1]):
            self.S.mul_(x[:, t])  # here
        return S


def refused_dict(x, S):
    cache = globals()
    for t in range(x.shape[1]):
        S = S + x[:, t]
        cache["S"] = S  # here
    return cache


def refused_target(x, S):
    holder = F
    for t in range(x.shape[1]):
        S = S + x[:, t]
        holder.o[:, t] = S  # here
    return S


def refused_changed_input(x, S):
    for t in range(x.shape[1]):
        y = x[:, t].mul_(2)  # here
        S = S + y
    return S


def refused_changed_alias(x, S):
    for t in range(x.shape[1]):
        y = x[:, t].view(-1)
        y += 1  # here
        S = S + y.sum()
    return S


def refused_in_place_and_rebound(x, S):
    for t in range(x.shape[1]):
        S += x[:, t]
        S = S * 2  # here
    return S


def refused_kept_state(x, S):
    outs = []
    for t in range(x.shape[1]):
        S += x[:, t]
        outs.append(S.view(-1))  # here
    return torch.stack(outs)


def refused_second_name(x, S):
    prev = S
    for t in range(x.shape[1]):
        y = prev * 2
        prev = S  # here
        S += x[:, t] + y
    return S


def refused_effect(x, S):
    for t in range(x.shape[1]):
        S = S + x[:, t]
        print(S)  # here
    return S


def refused_read(x, S):
    for t in range(x.shape[1]):
        S = S + F.dropout(x)[:, t]  # here
    return S


def refused_with(x, S):
    for t in range(x.shape[1]):
        with torch.no_grad():  # here
            S = S + x[:, t]
    return S


def refused_state_is_a_view_of_a_read(x, S):
    S = x[:, 1]  # here
    for t in range(x.shape[1]):
        S += x[:, t]
    return S


def refused_first_state_read(x, S):
    first = S
    for t in range(x.shape[1]):  # here
        S += x[:, t] * first
    return S


def refused_output_seen_through_a_view(x, S):
    o = torch.zeros_like(x)  # here
    seen = o.view(x.shape)
    for t in range(x.shape[1]):
        S = S + x[:, t] + seen[:, t]
        o[:, t] = S
    return o


REFUSED = [
    (refused_state_is_a_view_of_a_read, "mutates_input"),
    (refused_first_state_read, "mutates_input"),
    (refused_output_seen_through_a_view, "reads_own_output"),
    (refused_branch, "data_dependent_branch"),
    (refused_break, "data_dependent_branch"),
    (refused_return, "data_dependent_branch"),
    (refused_index_branch, "loop_index_used"),
    (refused_two_entries, "loop_index_used"),
    (refused_square, "loop_index_used"),
    (refused_slice, "loop_index_used"),
    (refused_index_after, "loop_index_used"),
    (refused_own_output, "reads_own_output"),
    (refused_aliased_output, "reads_own_output"),
    (refused_list_read, "output_list_used"),
    (refused_list_not_empty, "output_list_used"),
    (refused_temporary_escapes, "state_escapes"),
    (Holder.refused_attribute, "state_escapes"),
    (Holder.refused_attribute_in_place, "mutates_input"),
    (refused_dict, "state_escapes"),
    (refused_target, "unsupported_target"),
    (refused_changed_input, "mutates_input"),
    (refused_changed_alias, "mutates_input"),
    (refused_in_place_and_rebound, "mutates_input"),
    (refused_kept_state, "aliased_state"),
    (refused_second_name, "aliased_state"),
    (refused_effect, "side_effect"),
    (refused_read, "unsupported_read"),
    (refused_with, "unsupported_statement"),
]


@pytest.mark.parametrize("fn, reason", REFUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_refused_at_its_line(fn, reason):
    lifted = lift_loops(fn)
    assert lifted.twin is None
    (refusal,) = lifted.refusals
    assert (refusal.reason, refusal.source) == (reason, f"test_loop_analysis.py:{line_of(fn)}")
    assert refusal.pattern == "recurrence" and refusal.detail and reason in REASONS


def test_other_loops_are_left_alone_silently():
    def modules(stack, x):
        for layer in stack:
            x = layer(x)
        for i in range(len(stack)):
            x = x + stack[i](x)
        for _ in range(3):
            x = x * 2
        return [x * i for i in range(3)]

    lifted = lift_loops(modules)
    assert lifted.twin is None and lifted.refusals == () and lifted.loops == ()

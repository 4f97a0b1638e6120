"""Decide whether a `for t in range(...)` is a time loop that one scan can replace, and describe it.

`describe(loop, scope)` answers with a frozen `LoopPlan` (what is read and written by time, what is carried, which lists
are filled), with None for a loop that has nothing to do with time, or raises `Refused` with the offending line. It
changes nothing; the rewriting in `lift_loops` consumes only the plan.
"""

import ast

from fla_compile.passes.loop_accesses import Accesses
from fla_compile.passes.loop_carries import find_carries
from fla_compile.passes.loop_lists import find_lists
from fla_compile.passes.loop_memory import find_overlap
from fla_compile.passes.loop_plan import LoopPlan
from fla_compile.passes.loop_scope import Body, Scope, range_of
from fla_compile.passes.loop_statements import check_statements

REASONS = {
    "data_dependent_branch": "The body branches on a value it computes, or leaves the loop early.",
    "loop_index_used": "The loop index does more than pick steps, scale tensors, or tell the first or last step.",
    "reads_own_output": "The loop reads, or may read, a tensor that it writes step by step.",
    "output_list_used": "A list that the loop fills is used other than by len, stack or cat after the loop.",
    "state_escapes": "A value of one step outlives it other than as a carried local variable.",
    "aliased_state": "A state that is updated in place is also kept or read under another name, or in a list.",
    "mutates_input": "The body changes memory in place that the loop reads or that something else may refer to.",
    "side_effect": "The body calls something only for its effect.",
    "unsupported_target": "A step is stored somewhere other than in a local tensor.",
    "unsupported_read": "A tensor indexed by time is computed inside the loop.",
    "unsupported_statement": "The body contains a statement that has no counterpart in a scan.",
    "source_mismatch": "The function's source is not what it was compiled from.",
    "not_a_tensor": "What the loop indexes is a container, not a tensor.",
    "taps": "The loop runs over the few taps of a window, not over time.",
    "index_axis": "The time index does not fall on an axis of the tensor.",
    "index_range": "The range leaves the time axis of a tensor.",
    "carry_not_tensor": "A carried value is neither a tensor nor a number to start a tensor from.",
    "carry_changes": "A carried tensor changes its shape, dtype or device in a step.",
}

# Tells no time loop from a loop over layers, or over taps: the loop is left without a record.
NO_TIME_LOOP = "not_a_tensor"
SILENT = frozenset({NO_TIME_LOOP, "taps"})


def is_time_loop(body: Body) -> bool:
    """Whether the index picks steps of something that is not simply called, as a list of layers is."""
    found = False
    for node in body.nodes:
        if isinstance(node, ast.Subscript) and body.index.mentioned(node.slice):
            parent = body.scope.parents[id(node)]
            if isinstance(parent, ast.Call) and parent.func is node:
                return False
            found = True
    return found


def describe(loop: ast.For, scope: Scope) -> LoopPlan | None:
    """Return the plan of a liftable time loop, None if this is no time loop.

    Raises Refused.
    """
    arguments = range_of(loop)
    if arguments is None or not isinstance(loop.target, ast.Name):
        return None
    body = Body(loop, scope)
    if not is_time_loop(body):
        return None
    check_statements(body)
    lists, list_sites, list_uses = find_lists(body)
    accesses = Accesses(body)
    accesses.check_index_uses()
    accesses.check_own_output()
    writes = accesses.writes()
    carries = find_carries(body, accesses)
    return LoopPlan(
        loop=loop,
        index=body.index.name,
        start=arguments[0] if len(arguments) > 1 else None,
        stop=arguments[1] if len(arguments) > 1 else arguments[0],
        step=arguments[2] if len(arguments) > 2 else None,
        reads=tuple(accesses.reads),
        writes=writes,
        numbers=tuple(accesses.numbers),
        tests=tuple(accesses.tests),
        carries=carries,
        lists=lists,
        overlap=find_overlap(body, accesses, carries),
        read_sites=accesses.read_sites,
        write_sites=accesses.write_sites,
        number_sites=accesses.number_sites,
        test_sites=accesses.test_sites,
        list_sites=list_sites,
        list_uses=list_uses,
        dropped=frozenset(body.index.dropped),
    )

"""Decide whether a `for t in range(...)` is a time loop that one scan can replace, and describe it.

`describe(loop, scope)` answers with a frozen `LoopPlan` (what is read and written by time, what is carried, which lists
are filled), with None for a loop that has nothing to do with time, or raises `Refused` with the offending line. It
changes nothing; the rewriting in `lift_loops` consumes only the plan.
"""

import ast

from fla_compile.passes.loop_accesses import Accesses
from fla_compile.passes.loop_carries import find_carries
from fla_compile.passes.loop_memory import find_overlap
from fla_compile.passes.loop_plan import LoopPlan
from fla_compile.passes.loop_scope import Body, Scope, mentions, range_of
from fla_compile.passes.loop_statements import check_lists, check_statements

REASONS = {
    "data_dependent_branch": "The body branches on a value it computes, or leaves the loop early.",
    "loop_index_used": "The loop index does more than pick one step of a tensor.",
    "reads_own_output": "The loop reads, or may read, a tensor that it writes step by step.",
    "output_list_used": "A list that the loop fills is used other than by len, stack or cat after the loop.",
    "state_escapes": "A value of one step outlives it other than as a carried local variable.",
    "aliased_state": "A state that is updated in place is also kept under another name or in a list.",
    "mutates_input": "The body changes memory in place that the loop reads or that something else may refer to.",
    "side_effect": "The body calls something only for its effect.",
    "step_not_one": "The range has a step other than 1.",
    "unsupported_target": "A step is stored somewhere other than in a local tensor.",
    "unsupported_read": "A tensor indexed by time is computed inside the loop.",
    "unsupported_statement": "The body contains a statement that has no counterpart in a scan.",
    "source_mismatch": "The function's source is not what it was compiled from.",
    "not_a_tensor": "What the loop indexes is a container, not a tensor.",
    "index_axis": "The time index does not fall on an axis of the tensor.",
    "index_range": "The range leaves the time axis of a tensor.",
    "carry_not_tensor": "A carried value is neither a tensor nor a number to start a tensor from.",
    "carry_changes": "A carried tensor changes its shape, dtype or device in a step.",
}

# Reasons that tell no time loop from a loop over layers: the loop is left without a record.
SILENT = frozenset({"not_a_tensor"})


def is_candidate(loop: ast.For, scope: Scope) -> bool:
    """Whether the index picks steps of something that is not simply called, as a list of layers is."""
    if range_of(loop) is None or not isinstance(loop.target, ast.Name) or "range" in scope.locals:
        return False
    index, found = loop.target.id, False
    for node in (n for s in loop.body for n in ast.walk(s)):
        if isinstance(node, ast.Subscript) and mentions(node.slice, index):
            parent = scope.parents[id(node)]
            if isinstance(parent, ast.Call) and parent.func is node:
                return False
            found = True
    return found


def describe(loop: ast.For, scope: Scope) -> LoopPlan | None:
    """Return the plan of a liftable time loop, None if this is no time loop.

    Raises Refused.
    """
    if not is_candidate(loop, scope):
        return None
    arguments = range_of(loop)
    assert arguments is not None
    if len(arguments) == 3:
        step = arguments[2]
        if not isinstance(step, ast.Constant) or step.value != 1:
            scope.refuse("step_not_one", f"range with step {ast.unparse(step)}", loop)
    body = Body(loop, scope)
    check_statements(body)
    list_uses = check_lists(body)
    accesses = Accesses(body)
    accesses.check_index_uses()
    accesses.check_own_output()
    writes = accesses.writes()
    carries = find_carries(body, accesses)
    return LoopPlan(
        loop=loop,
        index=body.index,
        start=arguments[0] if len(arguments) > 1 else None,
        stop=arguments[1] if len(arguments) > 1 else arguments[0],
        reads=tuple(accesses.reads),
        writes=writes,
        carries=carries,
        lists=tuple(sorted(body.lists)),
        overlap=find_overlap(body, accesses, carries),
        read_sites=accesses.read_sites,
        write_sites=accesses.write_sites,
        list_uses=list_uses,
    )

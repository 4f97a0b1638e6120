"""What a loop carries from step to step, and whether a state that is updated in place has one name only."""

import ast

from fla_compile.passes.loop_accesses import Accesses
from fla_compile.passes.loop_calls import find_watched, watch
from fla_compile.passes.loop_names import (
    Liveness,
    assigned_value,
    bound_names,
    is_in_place_name,
    read_names,
    sources,
)
from fla_compile.passes.loop_plan import Carry
from fla_compile.passes.loop_scope import Body, appended


def find_carries(body: Body, accesses: Accesses) -> tuple[Carry, ...]:
    """Return what goes from step to step; refuse values that leave the loop in any other way."""
    exposed = Liveness().block(body.loop.body, set())
    defined = body.scope.defined_before(body.loop)
    undefined = {name for name in body.bound & exposed - defined if _bound_by_step(body, accesses, name)}
    carried = body.bound & exposed & defined | undefined
    mutated = _mutated(body, accesses, carried)
    carried |= mutated | body.containers
    watched = find_watched(body, accesses, carried, defined)
    shared = sorted(mutated & body.scope.captured(body.loop))
    if shared:
        body.refuse("state_escapes", f"{shared[0]} is shared with another function", body.loop)
    for name in sorted((body.bound - carried) & body.scope.live_after[id(body.loop)]):
        body.refuse("state_escapes", f"{name} of the last step is used after the loop", body.binding(name))
    for node in body.nodes:
        if isinstance(node, ast.Delete):
            for target in node.targets:
                if isinstance(target, ast.Name) and target.id in carried:
                    body.refuse("unsupported_statement", f"del of the carried {target.id}", node)
    rebound = {
        n.id: n
        for n in reversed(body.nodes)
        if isinstance(n, ast.Name)
        and isinstance(n.ctx, ast.Store)
        and not isinstance(body.scope.parents[id(n)], ast.AugAssign)
    }
    carries = []
    for name in sorted(carried):
        fresh = name in mutated and (name in undefined or body.scope.starts_fresh(name, body.loop))
        if name in mutated and name in rebound and not fresh:
            detail = f"{name} is updated in place and rebound, and something else may refer to its first value"
            body.refuse("mutates_input", detail, rebound[name])
        kept = name in mutated and not fresh
        seen = watch(body, name, False) if name in watched or name in mutated else None
        carries.append(Carry(name, name in mutated, kept, name not in undefined, seen))
    _check_fixed(body, accesses, carried)
    tentative = [Carry(n, False, False, True, watch(body, n, True)) for n in sorted(watched) if watched[n]]
    return (*carries, *tentative)


def _bound_by_step(body: Body, accesses: Accesses, name: str) -> bool:
    """Whether the name gets a value in a branch that the loop index decides, as in `if t == 0: S = ...`."""
    for node in body.nodes:
        if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store):
            for parent in body.scope.ancestors(node):
                if isinstance(parent, ast.If) and any(id(n) in accesses.test_sites for n in ast.walk(parent.test)):
                    return True
    return False


def _check_fixed(body: Body, accesses: Accesses, carried: set[str]) -> None:
    """Refuse positions, tests and numbers that are computed before the loop from what a step changes."""
    places = [*(read.steps for read in accesses.reads), *accesses.write_steps()]
    steps = [value for place in places for value in (place.at, place.end, place.limit)]
    values = [*steps, *(n.value for n in accesses.numbers), *(t.difference for t in accesses.tests)]
    for value in values:
        changed = read_names(value) & carried
        if changed:
            detail = f"{min(changed)} changes in the loop and decides, with the index, {ast.unparse(value)}"
            body.refuse("loop_index_used", detail, body.loop)


def _mutated(body: Body, accesses: Accesses, carried: set[str]) -> set[str]:
    """Names, at the start of a step, of the memory that the step changes in place."""
    mutated: set[str] = set()
    time_read = {name for r in accesses.reads for name in sources(r.base)}
    for position, statement in enumerate(body.loop.body):
        for node in ast.walk(statement):
            for name in _changed_by(body, accesses, node):
                for root in _roots(body, name, position, set()):
                    owner = root.split(".")[0]
                    if owner != root and body.scope.starts_container(owner, body.loop):
                        root = owner
                    if root in body.written and root not in time_read:
                        continue
                    if root in time_read or "." in root or root not in body.scope.locals:
                        body.refuse("mutates_input", f"{root} is changed in place", node)
                    if root in carried or root not in body.bound:
                        mutated.add(root)
    if not mutated:
        return mutated
    end = len(body.loop.body)
    for name in sorted(carried | mutated):
        shared = (_roots(body, name, end, set()) if name in body.bound else {name}) - {name}
        if shared & mutated:
            detail = f"{name} may share memory with {min(shared & mutated)}"
            body.refuse("aliased_state", detail, body.binding(name))
    for position, statement in enumerate(body.loop.body):
        for node in ast.walk(statement):
            if (item := appended(node)) and item[0] in body.lists:
                roots = {r for name in sources(item[1]) for r in _roots(body, name, position, set())}
                if roots & mutated:
                    body.refuse("aliased_state", f"{min(roots & mutated)} is kept in {item[0]}", node)
    return mutated


def _changed_by(body: Body, accesses: Accesses, node: ast.AST) -> set[str]:
    if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
        return set() if node.target.id in body.lists else {node.target.id}
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
        known = id(node) in accesses.write_sites
        return set() if known else (sources(node.value) or {"."}) - body.placed - body.containers
    if isinstance(node, ast.Call):
        names = {n for k in node.keywords if k.arg == "out" for n in sources(k.value)}
        if isinstance(node.func, ast.Attribute) and is_in_place_name(node.func.attr):
            owner = node.func.value
            roots = sources(owner)
            is_module = bool(roots) and not any(r.split(".")[0] in body.scope.locals for r in roots)
            names |= (sources(node.args[0]) if node.args else roots) if is_module else roots
        return names
    return set()


def _roots(body: Body, name: str, position: int, seen: set[str]) -> set[str]:
    """What the name may refer to at a top-level statement of the body, in terms of the start of the step."""
    if name not in body.bound or name in seen:
        return {name} if name not in body.bound else set()
    for i in range(position - 1, -1, -1):
        statement = body.loop.body[i]
        if name not in bound_names(statement):
            continue
        if isinstance(statement, ast.AugAssign):
            continue
        if isinstance(statement, ast.Assign):
            value = assigned_value(statement, name)
            shared = sources(statement.value if value is None else value)
            return {root for s in shared for root in _roots(body, s, i, seen)}
        break
    roots = {name}
    for node in body.nodes:
        value = node.value if isinstance(node, ast.NamedExpr) else None
        if isinstance(node, ast.Assign | ast.AnnAssign) and name in bound_names(node):
            value = assigned_value(node, name) or node.value
        if isinstance(node, ast.For) and name in bound_names(node.target):
            value = node.iter
        for source in sources(value):
            roots |= _roots(body, source, len(body.loop.body), seen | {name})
    return roots

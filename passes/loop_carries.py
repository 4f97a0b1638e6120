"""What a loop carries from step to step, and whether a state that is updated in place has one name only."""

import ast

from fla_compile.passes.loop_accesses import Accesses
from fla_compile.passes.loop_names import (
    Liveness,
    assigned_value,
    bound_names,
    is_in_place_name,
    sources,
)
from fla_compile.passes.loop_plan import Carry
from fla_compile.passes.loop_scope import Body, appended


def find_carries(body: Body, accesses: Accesses) -> tuple[Carry, ...]:
    """Return what goes from step to step; refuse values that leave the loop in any other way."""
    exposed = Liveness().block(body.loop.body, set())
    defined = body.scope.defined_before(body.loop)
    carried = body.bound & exposed & defined
    mutated = _mutated(body, accesses, carried)
    carried |= mutated
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
        fresh = name in mutated and body.scope.starts_fresh(name, body.loop)
        if name in mutated and name in rebound and not fresh:
            detail = f"{name} is updated in place and rebound, and something else may refer to its first value"
            body.refuse("mutates_input", detail, rebound[name])
        carries.append(Carry(name, name in mutated, name in mutated and not fresh))
    return tuple(carries)


def _mutated(body: Body, accesses: Accesses, carried: set[str]) -> set[str]:
    """Names, at the start of a step, of the memory that the step changes in place."""
    mutated: set[str] = set()
    time_read = {name for r in accesses.reads for name in sources(r.base)}
    for position, statement in enumerate(body.loop.body):
        for node in ast.walk(statement):
            for name in _changed_by(body, accesses, node):
                for root in _roots(body, name, position, set()):
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
        return set() if id(node) in accesses.write_sites else sources(node.value) or {"."}
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

"""Whether memory that a loop changes in place has, as the loop starts, another name that the loop uses.

    p = o.view(...)                 S = x[:, 1]
    for t in range(T):              for t in range(T):
        y = y + p[:, t]                 S += x[:, t]
        o[:, t] = y

Eager sees each step's change under the other name, a scan does not. Names that the function itself ties together are
refused here; arguments that are the same tensor only show in tracing, where `loop_runtime` compares `Overlap`'s two
sides. Like `loop_names`, a call that is not known to return a view counts as fresh.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from fla_compile.passes.loop_accesses import Accesses
from fla_compile.passes.loop_names import (
    COMPREHENSIONS,
    SCOPES,
    assigned_value,
    bound_names,
    sources,
    uses_beyond_metadata,
    walk_scope,
)
from fla_compile.passes.loop_plan import Carry, Overlap
from fla_compile.passes.loop_scope import Body, Scope


@dataclass(frozen=True)
class _Binding:
    """One way that a name gets its value, and where."""

    name: str
    value: ast.expr
    at: ast.AST


def find_overlap(body: Body, accesses: Accesses, carries: tuple[Carry, ...]) -> Overlap:
    """Return what tracing must compare; refuse what the function ties together before the loop."""
    written = sorted(body.written)
    in_place = [carry.name for carry in carries if carry.same_object or carry.name in body.containers]
    changed = [*(name for name in written if not body.scope.starts_fresh(name, body.loop)), *in_place]
    apart = _apart(body, accesses, carries)
    if not changed:
        return Overlap((), (), apart)
    kept = [carry.name for carry in carries if carry.name not in in_place]
    inner = body.bound - {carry.name for carry in carries} | body.lists
    used = {name: certain for name, certain in _used(body, accesses).items() if name not in inner}
    for name in changed:
        mine = memory(body.scope, name, body.loop)
        roots = {place.split(".")[0] for place in mine}
        for other in sorted({*used, *kept} - {name}):
            if other in roots or mine & memory(body.scope, other, body.loop):
                reason = "mutates_input" if name in in_place else "reads_own_output"
                where = next((s for s in body.scope.preceding(body.loop) if name in bound_names(s)), body.loop)
                body.refuse(reason, f"{name} may share memory with {other}, which the loop uses", where)
    others = {name for name, certain in used.items() if certain} | set(kept)
    others -= {*changed, *written}
    return Overlap(tuple(changed), tuple(sorted(others)), apart)


def _apart(body: Body, accesses: Accesses, carries: tuple[Carry, ...]) -> tuple[str, ...]:
    """Names that the body only reads and that may share memory with another such name, all but one of each group."""
    taken = {carry.name for carry in carries} | body.bound | body.written | body.lists | body.scope.declared
    times = {n.id for read in accesses.reads for n in ast.walk(read.base) if isinstance(n, ast.Name)}
    own = {carry.name: memory(body.scope, carry.name, body.loop) for carry in carries}
    used = {
        name: memory(body.scope, name, body.loop)
        for name, certain in sorted(_used(body, accesses).items())
        if certain and name in body.scope.locals - taken - times - body.scope.captured(body.loop)
    }
    # What a step may change in place must be seen changed under its other names.
    used = {name: m for name, m in used.items() if not any(m & other or name in other for other in own.values())}
    found: list[str] = []
    for name, mine in used.items():
        others = [other for other in used if other != name and other not in found]
        if any(mine & used[other] or other in mine for other in others) and name not in body.scope.parameters:
            found.append(name)
    return tuple(found)


def _used(body: Body, accesses: Accesses) -> dict[str, bool]:
    """Names whose values the body uses, each with whether it surely has one as the loop starts."""
    uses: dict[str, bool] = {}
    for node in body.nodes:
        if not isinstance(node, ast.Name) or isinstance(node.ctx, ast.Store) or node.id in body.index.names:
            continue
        parent = body.scope.parents[id(node)]
        called = isinstance(parent, ast.Call) and parent.func is node
        module = isinstance(parent, ast.Attribute) and node.id not in body.scope.locals
        if called or module or not uses_beyond_metadata(parent, node.id):
            continue
        hidden = any(isinstance(p, (*SCOPES, *COMPREHENSIONS)) for p in _inside(body, node))
        certain = node.id in body.scope.parameters or not (hidden or accesses.guard(node)[1])
        uses[node.id] = uses.get(node.id, False) or certain
    return uses


def _inside(body: Body, node: ast.AST) -> Iterator[ast.AST]:
    for parent in body.scope.ancestors(node):
        if parent is body.loop:
            return
        yield parent


def memory(scope: Scope, name: str, at: ast.AST, seen: frozenset[tuple[str, int]] = frozenset()) -> set[str]:
    """What the name may refer to just before `at`: an argument, an attribute, or where fresh memory was bound."""
    if (name, id(at)) in seen:
        return set()
    seen |= {(name, id(at))}
    found: set[str] = set()
    start: ast.AST = at
    for s in scope.preceding(at):
        start = s
        if name not in bound_names(s) or isinstance(s, ast.AugAssign):
            continue
        bindings = list(_bindings(s, name))
        for binding in bindings:
            found |= _memory_of(scope, binding, seen)
        if bindings and isinstance(s, ast.Assign | ast.AnnAssign):
            return found
    in_loop = any(isinstance(p, ast.For | ast.While) for p in scope.ancestors(start))
    if in_loop:
        for s in walk_scope(scope.function.body):
            if isinstance(s, ast.stmt):
                for binding in _bindings(s, name):
                    found |= _memory_of(scope, binding, seen)
    if name in scope.parameters or name not in scope.locals:
        found.add(name)
    return found


def _memory_of(scope: Scope, binding: _Binding, seen: frozenset[tuple[str, int]]) -> set[str]:
    found: set[str] = set()
    for source in sources(binding.value):
        found |= {source} if "." in source else memory(scope, source, binding.at, seen)
    return found or {f"{binding.name}@{binding.value.lineno}:{binding.value.col_offset}"}


def _bindings(s: ast.stmt, name: str) -> Iterator[_Binding]:
    for node in walk_scope(s):
        if isinstance(node, ast.Assign | ast.AnnAssign) and name in bound_names(node):
            value = assigned_value(node, name)
            if value is None:
                value = node.value
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            # `a = b = zeros(...)` is one piece of memory, `a, b = f(x)` two.
            shared = len(targets) > 1 and any(isinstance(t, ast.Name) and t.id == name for t in targets)
            if value is not None:
                yield _Binding("" if shared else name, value, node)
        elif isinstance(node, ast.NamedExpr) and node.target.id == name:
            yield _Binding(name, node.value, s)
        elif isinstance(node, ast.For) and name in bound_names(node.target):
            yield _Binding(name, node.iter, node)

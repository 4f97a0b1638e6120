"""Lists that a loop fills step by step: how they are filled, and every use of them after the loop."""

import ast

from fla_compile.passes.loop_names import SCOPES, assigned_value, bound_names
from fla_compile.passes.loop_plan import Filled, Steps
from fla_compile.passes.loop_scope import Body, appended, is_empty_list, is_front_insert, mentions

JOINS = frozenset("stack cat concat concatenate vstack hstack rearrange".split())
WRAPPERS = frozenset("list tuple reversed".split())


def find_lists(body: Body) -> tuple[tuple[Filled, ...], dict[int, str], dict[int, str]]:
    """Return the lists, the statements that store into one by index, and the helper for each use after the loop.

    Lists that are more than outputs of the loop are refused.
    """
    uses: dict[int, str] = {}
    sites: dict[int, str] = {}
    filled = []
    inside = {id(n) for n in body.nodes}
    for name in sorted(body.lists):
        first = _first_filling(body, name)
        if name not in body.scope.locals:
            body.refuse("output_list_used", f"{name} is not a list of this function", first)
        steps = None
        if name in body.placed:
            steps = _place(body, name, sites)
        elif not body.scope.starts_empty(name, body.loop):
            body.refuse("output_list_used", f"{name} is not empty right before the loop", first)
        rebound = _rebinding(body, name)
        for use in ast.walk(body.scope.function):
            if isinstance(use, ast.Name) and use.id == name:
                if rebound is not None and (use is rebound.targets[0] or use.lineno > (rebound.end_lineno or 0)):
                    continue  # from here on the name is that of the joined tensor
                if id(body.scope.parents[id(body.scope.parents[id(use)])]) in sites:
                    continue
                if not (_fills(body, use, name, inside) or (id(use) not in inside and _is_known_use(body, use, uses))):
                    body.refuse("output_list_used", f"{name} is used other than by len, stack or cat", use)
        fronts = {is_front_insert(n.value) for n in body.nodes if isinstance(n, ast.Expr) and appended(n, name)}
        fronts |= {False for n in body.nodes if isinstance(n, ast.AugAssign) and appended(n, name)}
        if len(fronts) > 1:
            body.refuse("output_list_used", f"{name} is filled at both ends", first)
        filled.append(Filled(name, fronts == {True}, steps))
    return tuple(filled), sites, uses


def _rebinding(body: Body, name: str) -> ast.Assign | None:
    """`outs = torch.stack(outs)`, in the same block after the loop."""
    for block in ("body", "orelse", "finalbody"):
        statements = getattr(body.scope.parents[id(body.loop)], block, None)
        if not isinstance(statements, list) or not any(s is body.loop for s in statements):
            continue
        at = next(i for i, s in enumerate(statements) if s is body.loop)
        for s in statements[at + 1 :]:
            if name in bound_names(s):
                value = assigned_value(s, name)
                plain = isinstance(s, ast.Assign) and len(s.targets) == 1 and isinstance(s.targets[0], ast.Name)
                return s if plain and mentions(value, name) and not _is_reversal(body, s) else None  # type: ignore
    return None


def _first_filling(body: Body, name: str) -> ast.AST:
    for n in body.nodes:
        if appended(n, name) or (isinstance(n, ast.Subscript) and isinstance(n.ctx, ast.Store) and mentions(n, name)):
            return n
    return body.loop


def _place(body: Body, name: str, sites: dict[int, str]) -> Steps:
    """Where `outs[t] = y`, the only statement of the loop that touches the list, puts its step."""
    stores = [
        s
        for s in body.loop.body
        if isinstance(s, ast.Assign)
        and len(s.targets) == 1
        and isinstance(s.targets[0], ast.Subscript)
        and isinstance(s.targets[0].value, ast.Name)
        and s.targets[0].value.id == name
    ]
    mentioned = [n for n in body.nodes if isinstance(n, ast.Name) and n.id == name]
    target = stores[0].targets[0] if stores else None
    place = target.slice if isinstance(target, ast.Subscript) else None
    if len(mentioned) != 1 or place is None or not body.index.is_affine(place):
        body.refuse("output_list_used", f"{name} is more than filled step by step", mentioned[-1])
    sites[id(stores[0])] = name
    return Steps(body.index.resolve(place))


def _fills(body: Body, use: ast.Name, name: str, inside: set[int]) -> bool:
    """Whether the name stands in a statement that starts, fills or deletes a list."""
    parent = next((p for p in body.scope.ancestors(use) if isinstance(p, (ast.stmt, *SCOPES))), None)
    if not isinstance(parent, ast.stmt) or isinstance(parent, SCOPES):
        return False
    value = assigned_value(parent, name)
    if is_empty_list(value) or (name in body.placed and value is not None and isinstance(use.ctx, ast.Store)):
        return id(use) not in inside and not mentions(value, name)
    if isinstance(parent, ast.Delete):
        return id(use) not in inside
    item = appended(parent, name)
    if item is None or mentions(item[1], name):
        return False
    loops = [p for p in body.scope.ancestors(parent) if isinstance(p, ast.For)]
    return id(use) in inside or any(body.scope.starts_empty(name, other) for other in loops)


def _is_known_use(body: Body, use: ast.Name, uses: dict[int, str]) -> bool:
    """Whether the list goes to a join, to `len`, or gives one item, perhaps in reverse order; notes the helpers."""
    if isinstance(use.ctx, ast.Store):
        parent = body.scope.parents[id(use)]
        return isinstance(parent, ast.Assign) and _is_reversal(body, parent)
    found: dict[int, str] = {}
    node: ast.AST = use
    while True:
        parent = body.scope.parents[id(node)]
        if isinstance(parent, ast.Subscript) and parent.value is node and isinstance(parent.ctx, ast.Load):
            if _is_backwards(parent.slice):
                found[id(parent)] = "backwards"
            elif _is_integer(parent.slice):
                uses.update(found | {id(parent): "item_time"})
                return True
            else:
                return False
        elif isinstance(parent, ast.Attribute) and parent.attr == "reverse" and node is use:
            call = body.scope.parents[id(parent)]
            statement = body.scope.parents[id(call)]
            if not isinstance(call, ast.Call) or not isinstance(statement, ast.Expr):
                return False
            uses[id(statement)] = "backwards"
            return True
        elif isinstance(parent, ast.Call) and parent.args and parent.args[0] is node:
            called = parent.func.attr if isinstance(parent.func, ast.Attribute) else ast.unparse(parent.func)
            if called == "len" and isinstance(parent.func, ast.Name):
                uses.update(found | {id(parent): "len_time"})
                return True
            if called in JOINS:
                uses.update(found | {id(parent): "over_time"})
                return True
            if called not in WRAPPERS or not isinstance(parent.func, ast.Name) or len(parent.args) != 1:
                return called == body.scope.prefix + "grow"
            found[id(parent)] = "backwards" if called == "reversed" else "as_list"
        else:
            if isinstance(parent, ast.Assign) and _is_reversal(body, parent):
                uses.update(found)
                return True
            return False
        node = parent


def _is_reversal(body: Body, s: ast.Assign) -> bool:
    """Whether this is `outs = outs[::-1]` and no more, outside the loop."""
    target, value = s.targets[0], s.value
    while isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in WRAPPERS and value.args:
        value = value.args[0]
    if isinstance(value, ast.Subscript) and _is_backwards(value.slice):
        value = value.value
    same = isinstance(target, ast.Name) and isinstance(value, ast.Name) and target.id == value.id
    return same and len(s.targets) == 1 and not any(p is body.loop for p in body.scope.ancestors(s))


def _is_backwards(entry: ast.expr) -> bool:
    return isinstance(entry, ast.Slice) and ast.unparse(entry) == "::-1"


def _is_integer(entry: ast.expr) -> bool:
    if isinstance(entry, ast.UnaryOp) and isinstance(entry.op, ast.USub):
        entry = entry.operand
    return isinstance(entry, ast.Constant) and type(entry.value) is int

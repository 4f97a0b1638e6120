"""Spell comprehensions over time as loops that fill a list: the rest of lifting knows only those.

    outs = [step(x[:, t]) for t in range(T)]       ->     outs = []
                                                          for t' in range(T): outs.append(step(x[:, t']))

    y = f(a(x), torch.stack([g(x_t) for x_t in xs]))  ->  v0 = a(x); v1 = []
                                                          for x_t' in xs: v1.append(g(x_t'))
                                                          y = f(v0, torch.stack(v1))

What the statement computes before the comprehension gets a name and stays before it. Targets that the function also
uses elsewhere get names of their own.
"""

import ast
import itertools
from collections.abc import Iterator

from fla_compile.passes.loop_names import COMPREHENSIONS, SCOPES, bound_names

JOINS = frozenset("stack cat concat concatenate vstack hstack".split())


def spell_comprehensions(function: ast.AST, block: list[ast.stmt], prefix: str) -> None:
    """Take those over time out of the statements of a block, in their order."""
    for s in list(block):
        while (path := _first(function, s)) is not None:
            name = f"{prefix}list_{path[-1].lineno}_{path[-1].col_offset}"  # type: ignore[attr-defined]
            before = _hoisted(path, f"{name}_")
            if before is None:
                break
            own = _own_name(path, s) or name
            new = [*before, *_spell(function, path, own)]
            for statement in new:
                for node in ast.walk(statement):
                    if isinstance(node, ast.expr | ast.stmt) and not hasattr(node, "lineno"):
                        ast.copy_location(node, path[-1])
            place = next(i for i, other in enumerate(block) if other is s)
            block[place : place + (own != name)] = new
            if own != name:
                break


def _own_name(path: list[ast.AST], s: ast.stmt) -> str | None:
    """The name that the statement gives to the list, where it does no more."""
    if len(path) != 2 or not isinstance(s, ast.Assign) or len(s.targets) != 1 or not isinstance(s.targets[0], ast.Name):
        return None
    target = s.targets[0].id
    return None if any(isinstance(n, ast.Name) and n.id == target for n in ast.walk(path[-1])) else target


def _first(function: ast.AST, s: ast.stmt) -> list[ast.AST] | None:
    """The way from the statement to the first comprehension over time that it evaluates."""
    if not isinstance(s, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Return | ast.Expr) or s.value is None:
        return None
    if isinstance(s, ast.AugAssign) and not isinstance(s.target, ast.Name):
        return None
    return next(_paths(function, [s], s.value), None)


def _paths(function: ast.AST, path: list[ast.AST], e: ast.AST) -> Iterator[list[ast.AST]]:
    way = [*path, e]
    inner = _collected(e)
    if inner is not None and _is_time(inner) and (_is_joined(function, way) or _has_state(inner)):
        yield way if isinstance(e, ast.ListComp) or _name_of(e) == "list" else [*way, inner]  # type: ignore[arg-type]
    elif not isinstance(e, (*SCOPES, *COMPREHENSIONS)):
        for child in ast.iter_child_nodes(e):
            yield from _paths(function, way, child.value if isinstance(child, ast.keyword) else child)


def _collected(e: ast.AST) -> ast.ListComp | ast.GeneratorExp | None:
    """The comprehension of `[... for ...]`, `list(... for ...)` and `tuple(... for ...)`."""
    if isinstance(e, ast.Call) and isinstance(e.func, ast.Name) and e.func.id in ("list", "tuple"):
        alone = len(e.args) == 1 and not e.keywords
        return e.args[0] if alone and isinstance(e.args[0], ast.GeneratorExp) else None
    return e if isinstance(e, ast.ListComp) else None


def _is_time(e: ast.ListComp | ast.GeneratorExp) -> bool:
    """Whether each round may be a step: one loop without conditions, over more than what is simply called."""
    if len(e.generators) != 1 or e.generators[0].ifs or e.generators[0].is_async:
        return False
    if isinstance(e.elt, ast.Constant | ast.Name) or any(isinstance(n, ast.Lambda | ast.Await) for n in ast.walk(e)):
        return False
    targets = {n.id for n in ast.walk(e.generators[0].target) if isinstance(n, ast.Name)}
    called = {n.func.id for n in ast.walk(e.elt) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    return not targets & called


def _has_state(e: ast.AST) -> bool:
    return any(isinstance(n, ast.NamedExpr) for n in ast.walk(e))


def _is_joined(function: ast.AST, way: list[ast.AST]) -> bool:
    """Whether the list goes to `torch.stack` or its like, at once or under the name that it gets."""
    parent = way[-2]
    if isinstance(parent, ast.Call):
        return _name_of(parent) in JOINS
    if not isinstance(parent, ast.Assign) or len(parent.targets) != 1 or not isinstance(parent.targets[0], ast.Name):
        return False
    name = parent.targets[0].id
    joins = [n for n in ast.walk(function) if isinstance(n, ast.Call) and n.args and _name_of(n) in JOINS]
    return any(isinstance(n, ast.Name) and n.id == name for join in joins for n in ast.walk(join.args[0]))


def _name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _hoisted(path: list[ast.AST], name: str) -> list[ast.stmt] | None:
    """Statements for what is evaluated before the end of the path, which gets their names; None if none can be."""
    before: list[ast.stmt] = []
    later = bound_names(path[-1])
    steps = list(itertools.pairwise(path[1:]))
    if not all(any(e is child for *_, e in _in_order(parent)) for parent, child in steps):
        return None
    for parent, child in steps:
        for owner, field, place, e in _in_order(parent):
            if e is child:
                break
            if isinstance(e, ast.Constant) or (isinstance(e, ast.Name) and e.id not in later):
                continue
            own = ast.Name(f"{name}{len(before)}", ast.Load())
            if isinstance(e, ast.Attribute) and isinstance(parent, ast.Call) and e is parent.func:
                if isinstance(e.value, ast.Name) and e.value.id not in later:
                    continue
                before.append(ast.Assign([ast.Name(own.id, ast.Store())], e.value))
                e.value = own
                continue
            before.append(ast.Assign([ast.Name(own.id, ast.Store())], e))
            if place is None:
                setattr(owner, field, own)
            else:
                getattr(owner, field)[place] = own
    return before


def _in_order(e: ast.AST) -> list[tuple[ast.AST, str, int | None, ast.expr]]:
    """The parts of an expression in the order in which they are evaluated, each with its place; none if not known."""
    if isinstance(e, ast.Call):
        if any(isinstance(a, ast.Starred) for a in e.args) or any(k.arg is None for k in e.keywords):
            return []
        args = [(e, "args", i, a) for i, a in enumerate(e.args)]
        return [(e, "func", None, e.func), *args, *((k, "value", None, k.value) for k in e.keywords)]
    if isinstance(e, ast.Attribute | ast.UnaryOp):
        part = "operand" if isinstance(e, ast.UnaryOp) else "value"
        return [(e, part, None, getattr(e, part))]
    if isinstance(e, ast.BinOp):
        return [(e, "left", None, e.left), (e, "right", None, e.right)]
    if isinstance(e, ast.Tuple | ast.List) and not any(isinstance(x, ast.Starred) for x in e.elts):
        return [(e, "elts", i, x) for i, x in enumerate(e.elts)]
    if isinstance(e, ast.Subscript):
        return [(e, "value", None, e.value), (e, "slice", None, e.slice)]
    return []


class _Rename(ast.NodeTransformer):
    def __init__(self, names: dict[str, str]):
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self.names.get(node.id, node.id)
        return node


def _spell(function: ast.AST, path: list[ast.AST], name: str) -> list[ast.stmt]:
    """The list and the loop that fills it; the list's name stands in place of the comprehension at the path's end."""
    whole, parent = path[-1], path[-2]
    e = whole.args[0] if isinstance(whole, ast.Call) else whole
    assert isinstance(e, ast.ListComp | ast.GeneratorExp)
    mine = {id(n) for n in ast.walk(e)}
    others = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and id(n) not in mine}
    others |= {n.arg for n in ast.walk(function) if isinstance(n, ast.arg)}
    targets = {n.id for n in ast.walk(e.generators[0].target) if isinstance(n, ast.Name)}
    renames = _Rename({target: f"{name}_{target}" for target in targets & others})
    target, value = renames.visit(e.generators[0].target), renames.visit(e.elt)
    body: list[ast.stmt] = []
    if isinstance(value, ast.NamedExpr):
        body.append(ast.Assign([ast.Name(value.target.id, ast.Store())], value.value))
        value = ast.Name(value.target.id, ast.Load())
    append = ast.Attribute(ast.Name(name, ast.Load()), "append", ast.Load())
    body.append(ast.Expr(ast.Call(append, [value], [])))
    for s in body:
        for node in ast.walk(s):
            if isinstance(node, ast.expr | ast.stmt) and not hasattr(node, "lineno"):
                ast.copy_location(node, e.elt)
    for holder in (parent, *getattr(parent, "keywords", [])):
        for field, held in ast.iter_fields(holder):
            if held is whole:
                setattr(holder, field, ast.copy_location(ast.Name(name, ast.Load()), whole))
            elif isinstance(held, list) and any(x is whole for x in held):
                place = next(i for i, x in enumerate(held) if x is whole)
                held[place] = ast.copy_location(ast.Name(name, ast.Load()), whole)
    loop = ast.For(target, e.generators[0].iter, body, [], None)
    return [ast.Assign([ast.Name(name, ast.Store())], ast.List([], ast.Load())), loop]

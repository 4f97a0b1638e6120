"""A function's syntax tree and one loop body of it, with the facts that every check of the loop asks for."""

import ast
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import PurePath
from typing import NoReturn

from fla_compile.passes.loop_index import Index
from fla_compile.passes.loop_names import (
    SCOPES,
    Liveness,
    assigned_value,
    bound_names,
    is_fresh,
    is_in_place_name,
    read_names,
    sources,
    uses_beyond_metadata,
    walk_scope,
)
from fla_compile.passes.records import Refused


class Scope:
    """A function's syntax tree with the facts that every loop of it asks for."""

    def __init__(self, function: ast.FunctionDef | ast.AsyncFunctionDef, filename: str, prefix: str):
        self.function = function
        self.filename = filename
        self.prefix = prefix  # of names that are not the user's
        arguments = function.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        self.parameters = tuple(a.arg for a in every if a is not None)
        self.locals = set(self.parameters) | bound_names(function.body)
        self.parents: dict[int, ast.AST] = {}
        for node in ast.walk(function):
            for child in ast.iter_child_nodes(node):
                self.parents[id(child)] = node
        self.declared: set[str] = set()
        for node in walk_scope(function.body):
            if isinstance(node, ast.Global | ast.Nonlocal):
                self.declared |= set(node.names)
        self.locals -= self.declared

    @cached_property
    def live_after(self) -> dict[int, set[str]]:
        liveness = Liveness()
        liveness.block(self.function.body, set())
        return liveness.after

    def ancestors(self, node: ast.AST) -> Iterator[ast.AST]:
        while (parent := self.parents.get(id(node))) is not None:
            yield parent
            node = parent

    def preceding(self, node: ast.AST) -> Iterator[ast.stmt]:
        """Statements that always ran just before this one, nearest first, back to an enclosing loop or the start."""
        for parent in self.ancestors(node):
            for block in ("body", "orelse", "finalbody"):
                statements = getattr(parent, block, None)
                if isinstance(statements, list) and any(s is node for s in statements):
                    position = next(i for i, s in enumerate(statements) if s is node)
                    yield from reversed(statements[:position])
            if not isinstance(parent, ast.If | ast.With):
                return
            node = parent

    def starts_fresh(self, name: str, loop: ast.For) -> bool:
        return self.starts_as(name, loop, is_fresh)

    def starts_as(self, name: str, loop: ast.For, kind: Callable[[ast.expr], bool]) -> bool:
        """Whether the name has a value of this kind that nothing was done with before the loop."""
        for s in self.preceding(loop):
            value = assigned_value(s, name)
            if value is not None:
                return kind(value)
            if uses_beyond_metadata(s, name):
                return False
        return False

    def starts_empty(self, name: str, loop: ast.AST) -> bool:
        for s in self.preceding(loop):
            if name in bound_names(s) | read_names(s):
                return is_empty_list(assigned_value(s, name))
        return False

    def starts_sized(self, name: str, loop: ast.AST) -> bool:
        """Whether the name is, right before the loop, a list of a given length with nothing in it."""
        for s in self.preceding(loop):
            if name in bound_names(s) | read_names(s):
                value = assigned_value(s, name)
                if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Mult):
                    filler: ast.expr | None = value.left if isinstance(value.left, ast.List) else value.right
                    filler = filler.elts[0] if isinstance(filler, ast.List) and len(filler.elts) == 1 else None
                elif isinstance(value, ast.ListComp):
                    filler = value.elt
                else:
                    filler = None
                return isinstance(filler, ast.Constant)
        return False

    def starts_container(self, name: str, loop: ast.AST) -> bool:
        """Whether the name is bound before the loop to a container, or an object, that the function makes there."""
        if name in self.parameters or name not in self.locals:
            return False
        for s in self.preceding(loop):
            if name in bound_names(s):
                value = assigned_value(s, name)
                if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Mult):
                    return isinstance(value.left, ast.List)
                if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
                    return value.func.id == "dict" or value.func.id[:1].isupper()
                filled = isinstance(value, ast.List) and value.elts
                return bool(filled) or isinstance(value, ast.Dict | ast.ListComp | ast.DictComp)
        return False

    def defined_before(self, loop: ast.For) -> set[str]:
        names = set(self.parameters)
        outer = [p for p in self.ancestors(loop) if isinstance(p, ast.For | ast.While)]
        for node in walk_scope(self.function.body):
            if (
                isinstance(node, ast.stmt)
                and node is not loop
                and (node.lineno, node.col_offset)
                < (
                    loop.lineno,
                    loop.col_offset,
                )
            ):
                names |= bound_names([n for n in ast.iter_child_nodes(node) if not isinstance(n, ast.stmt)])
                if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom):
                    names |= bound_names(node)
        for parent in outer:
            for s in parent.body:
                if not any(inner is loop for inner in ast.walk(s)):
                    names |= bound_names(s)
        return names

    def captured(self, loop: ast.For) -> set[str]:
        """Names that functions defined outside the loop refer to."""
        inside = {id(n) for n in ast.walk(loop)}
        names: set[str] = set()
        for node in ast.walk(self.function):
            if isinstance(node, SCOPES) and node is not self.function and id(node) not in inside:
                names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        return names

    def refuse(self, reason: str, detail: str, node: ast.AST) -> NoReturn:
        raise Refused(reason, detail, f"{PurePath(self.filename).name}:{getattr(node, 'lineno', 0)}")


class Body:
    """One loop with what its statements bind, fill and write by time."""

    def __init__(self, loop: ast.For, scope: Scope):
        self.loop, self.scope = loop, scope
        body_and_down = [n for s in loop.body for n in ast.walk(s)]
        self.nodes = sorted(
            body_and_down, key=lambda n: (getattr(n, "lineno", loop.lineno), getattr(n, "col_offset", 0))
        )
        appended_to = {found[0] for node in self.nodes if (found := appended(node))}
        self.lists = {name for name in appended_to if not self._is_new_each_step(name)}
        self.bound = bound_names(loop.body) - self.lists
        self.index = Index(loop, self.bound | self.lists | _stored_into(self.nodes))
        self.written = {
            n.value.id
            for n in self.nodes
            if isinstance(n, ast.Subscript)
            and isinstance(n.ctx, ast.Store)
            and isinstance(n.value, ast.Name)
            and self.index.mentioned(n.slice)
        }
        self.placed = {name for name in self.written if scope.starts_sized(name, loop)}
        self.written -= self.placed
        self.lists |= self.placed
        places = [n for n in self.nodes if isinstance(n, ast.Subscript | ast.Attribute)]
        stored = {n.value.id for n in places if isinstance(n.ctx, ast.Store) and isinstance(n.value, ast.Name)}
        stored -= self.bound | self.written | self.lists
        self.containers = {name for name in stored if scope.starts_container(name, loop)}

    def _is_new_each_step(self, name: str) -> bool:
        """Whether the body itself makes the list, at its top level before anything else happens to it."""
        first = next((s for s in self.loop.body if name in bound_names(s) | read_names(s)), None)
        stores = [n for n in self.nodes if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Store)]
        return (
            isinstance(first, ast.Assign)
            and isinstance(assigned_value(first, name), ast.List)
            and all(
                isinstance(s, ast.AugAssign)
                or (isinstance(s, ast.Assign) and isinstance(assigned_value(s, name), ast.List))
                for s in (self.scope.parents[id(n)] for n in stores)
            )
        )

    def refuse(self, reason: str, detail: str, node: ast.AST) -> NoReturn:
        self.scope.refuse(reason, detail, node)

    def binding(self, name: str) -> ast.AST:
        for node in self.nodes:
            if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store):
                return node
        return self.loop


def _stored_into(nodes: list[ast.AST]) -> set[str]:
    """Names of what the statements change in place, as far as they say so."""
    names: set[str] = set()
    for n in nodes:
        if isinstance(n, ast.Subscript | ast.Attribute) and isinstance(n.ctx, ast.Store):
            names |= sources(n.value)
        elif isinstance(n, ast.Call):
            names |= {name for k in n.keywords if k.arg == "out" for name in sources(k.value)}
            if isinstance(n.func, ast.Attribute) and is_in_place_name(n.func.attr):
                names |= sources(n.func.value) | {name for a in n.args[:1] for name in sources(a)}
    return names


def is_empty_list(value: ast.expr | None) -> bool:
    if isinstance(value, ast.List):
        return not value.elts
    return isinstance(value, ast.Call) and ast.unparse(value) == "list()"


def mentions(node: ast.AST | None, name: str) -> bool:
    return node is not None and any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node))


def index_entries(subscript: ast.Subscript) -> list[ast.expr]:
    return list(subscript.slice.elts) if isinstance(subscript.slice, ast.Tuple) else [subscript.slice]


def appended(node: ast.AST, name: str | None = None) -> tuple[str, ast.expr] | None:
    """(list, item or items) of `outs.append(y)`, `outs.extend([y])`, `outs.insert(0, y)` and `outs += [y]`."""
    found = None
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        call = node.value
        if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name) and not call.keywords:
            method, args = call.func.attr, call.args
            one = method == "append" and len(args) == 1
            several = method == "extend" and len(args) == 1 and _is_display(args[0])
            if one or several or is_front_insert(call):
                found = call.func.value.id, args[-1]
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add) and isinstance(node.target, ast.Name):
        if isinstance(node.value, ast.List) and _is_display(node.value):
            found = node.target.id, node.value
    return found if found and name in (None, found[0]) else None


def is_front_insert(call: ast.Call) -> bool:
    return (
        isinstance(call.func, ast.Attribute)
        and call.func.attr == "insert"
        and len(call.args) == 2
        and isinstance(call.args[0], ast.Constant)
        and call.args[0].value == 0
        and call.args[0].value is not False
    )


def _is_display(value: ast.expr) -> bool:
    return isinstance(value, ast.List | ast.Tuple) and not any(isinstance(e, ast.Starred) for e in value.elts)


def range_of(loop: ast.For) -> list[ast.expr] | None:
    call = loop.iter
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "range":
        return None
    if call.keywords or not 1 <= len(call.args) <= 3 or any(isinstance(a, ast.Starred) for a in call.args):
        return None
    return call.args

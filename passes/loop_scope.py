"""A function's syntax tree and one loop body of it, with the facts that every check of the loop asks for."""

import ast
from collections.abc import Iterator
from functools import cached_property
from pathlib import PurePath
from typing import NoReturn

from fla_compile.passes.loop_names import (
    SCOPES,
    Liveness,
    assigned_value,
    bound_names,
    is_fresh,
    read_names,
    uses_beyond_metadata,
    walk_scope,
)
from fla_compile.passes.records import Refused


class Scope:
    """A function's syntax tree with the facts that every loop of it asks for."""

    def __init__(self, function: ast.FunctionDef | ast.AsyncFunctionDef, filename: str):
        self.function = function
        self.filename = filename
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
        for s in self.preceding(loop):
            value = assigned_value(s, name)
            if value is not None:
                return is_fresh(value)
            if uses_beyond_metadata(s, name):
                return False
        return False

    def starts_empty(self, name: str, loop: ast.AST) -> bool:
        for s in self.preceding(loop):
            if name in bound_names(s) | read_names(s):
                return is_empty_list(assigned_value(s, name))
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
        assert isinstance(loop.target, ast.Name)
        self.index = loop.target.id
        body_and_down = [n for s in loop.body for n in ast.walk(s)]
        self.nodes = sorted(
            body_and_down, key=lambda n: (getattr(n, "lineno", loop.lineno), getattr(n, "col_offset", 0))
        )
        self.lists = {found[0] for node in self.nodes if (found := appended(node))}
        self.bound = bound_names(loop.body) - self.lists
        self.written = {
            n.value.id
            for n in self.nodes
            if isinstance(n, ast.Subscript)
            and isinstance(n.ctx, ast.Store)
            and isinstance(n.value, ast.Name)
            and mentions(n.slice, self.index)
        }

    def refuse(self, reason: str, detail: str, node: ast.AST) -> NoReturn:
        self.scope.refuse(reason, detail, node)

    def binding(self, name: str) -> ast.AST:
        for node in self.nodes:
            if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store):
                return node
        return self.loop


def is_empty_list(value: ast.expr | None) -> bool:
    if isinstance(value, ast.List):
        return not value.elts
    return isinstance(value, ast.Call) and ast.unparse(value) == "list()"


def mentions(node: ast.AST | None, name: str) -> bool:
    return node is not None and any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node))


def index_entries(subscript: ast.Subscript) -> list[ast.expr]:
    return list(subscript.slice.elts) if isinstance(subscript.slice, ast.Tuple) else [subscript.slice]


def appended(node: ast.AST, name: str | None = None) -> tuple[str, ast.expr] | None:
    """(list, item) of `outs.append(y)` and `outs += [y]`."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        call = node.value
        if (
            isinstance(call.func, ast.Attribute)
            and call.func.attr == "append"
            and isinstance(call.func.value, ast.Name)
            and len(call.args) == 1
            and not call.keywords
        ):
            return (call.func.value.id, call.args[0]) if name in (None, call.func.value.id) else None
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add) and isinstance(node.target, ast.Name):
        if isinstance(node.value, ast.List) and len(node.value.elts) == 1:
            return (node.target.id, node.value.elts[0]) if name in (None, node.target.id) else None
    return None


def range_of(loop: ast.For) -> list[ast.expr] | None:
    call = loop.iter
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "range":
        return None
    if call.keywords or not 1 <= len(call.args) <= 3 or any(isinstance(a, ast.Starred) for a in call.args):
        return None
    return call.args

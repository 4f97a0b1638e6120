"""Decide whether a `for t in range(...)` is a time loop that one scan can replace, and describe it.

`describe(loop, scope)` answers with a frozen `LoopPlan` (what is read and written by time, what is carried, which lists
are filled), with None for a loop that has nothing to do with time, or raises `Refused` with the offending line. It
changes nothing; the rewriting in `lift_loops` consumes only the plan.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import NoReturn

from fla_compile.passes.loop_names import (
    COMPREHENSIONS,
    SCOPES,
    VIEWS,
    Liveness,
    assigned_value,
    bound_names,
    comprehension_targets,
    is_fresh,
    is_in_place_name,
    read_names,
    sources,
    uses_beyond_metadata,
    walk_scope,
)
from fla_compile.passes.records import Refused

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

PURE = VIEWS | frozenset("exp log sigmoid tanh neg abs sqrt rsqrt softplus square reciprocal cumsum sum mean".split())
JOINS = frozenset("stack cat concat concatenate".split())
TYPE_TESTS = frozenset("isinstance callable hasattr is_tensor".split())


@dataclass(frozen=True)
class Read:
    """A loop-invariant tensor indexed by time; looked at only where `guard` holds, and maybe None if optional."""

    base: ast.expr
    axis: int
    guard: ast.expr | None = None
    optional: bool = False


@dataclass(frozen=True)
class Access:
    """One subscript by time: which read or write it belongs to, and the index that is left without the time entry.

    `checked` holds positions in `rest` of entries that must take up exactly one axis.
    """

    which: int
    rest: tuple[ast.expr, ...]
    checked: frozenset[int]


@dataclass(frozen=True)
class Write:
    """A tensor filled step by step: by one whole assignment, or through a copy of its slice (`slot`, a read)."""

    name: str
    axis: int
    rest: tuple[ast.expr, ...] = ()
    slot: int | None = None


@dataclass(frozen=True)
class Carry:
    """A name whose value goes from step to step; `same_object` if the loop must leave it in the object it found."""

    name: str
    in_place: bool
    same_object: bool


@dataclass(frozen=True)
class LoopPlan:
    loop: ast.For
    index: str
    start: ast.expr | None
    stop: ast.expr
    reads: tuple[Read, ...]
    writes: tuple[Write, ...]
    carries: tuple[Carry, ...]
    lists: tuple[str, ...]
    read_sites: Mapping[int, Access]
    write_sites: Mapping[int, Access]
    list_uses: frozenset[int]


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
    return _Analysis(loop, scope).plan() if is_candidate(loop, scope) else None


class _Analysis:
    def __init__(self, loop: ast.For, scope: Scope):
        self.loop, self.scope = loop, scope
        assert isinstance(loop.target, ast.Name)
        self.index = loop.target.id
        self.reads: list[Read] = []
        self.read_sites: dict[int, Access] = {}
        self.write_sites: dict[int, Access] = {}
        self.list_uses: set[int] = set()
        body_and_down = [n for s in loop.body for n in ast.walk(s)]
        self.nodes = sorted(
            body_and_down, key=lambda n: (getattr(n, "lineno", loop.lineno), getattr(n, "col_offset", 0))
        )
        self.lists = self._list_names()
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

    def plan(self) -> LoopPlan:
        arguments = range_of(self.loop)
        assert arguments is not None
        if len(arguments) == 3:
            step = arguments[2]
            if not isinstance(step, ast.Constant) or step.value != 1:
                self.refuse("step_not_one", f"range with step {ast.unparse(step)}", self.loop)
        self._check_statements()
        self._check_lists()
        self._check_index_uses()
        self._check_own_output()
        writes = self._writes()
        carries = self._carries()
        return LoopPlan(
            loop=self.loop,
            index=self.index,
            start=arguments[0] if len(arguments) > 1 else None,
            stop=arguments[1] if len(arguments) > 1 else arguments[0],
            reads=tuple(self.reads),
            writes=writes,
            carries=carries,
            lists=tuple(sorted(self.lists)),
            read_sites=self.read_sites,
            write_sites=self.write_sites,
            list_uses=frozenset(self.list_uses),
        )

    # Statements

    def _check_statements(self) -> None:
        if self.loop.orelse:
            self.refuse("data_dependent_branch", "for ... else", self.loop.orelse[0])
        for node in self.nodes:
            if isinstance(node, ast.Break | ast.Continue | ast.Return | ast.While | ast.Try | ast.TryStar | ast.Raise):
                word = type(node).__name__.lower()
                self.refuse("data_dependent_branch", f"{word} in the loop", node)
            if isinstance(node, ast.Yield | ast.YieldFrom | ast.Await | ast.AsyncFor | ast.AsyncWith):
                self.refuse("data_dependent_branch", "the loop suspends the function", node)
            if isinstance(node, ast.If | ast.IfExp | ast.Assert):
                self._check_test(node.test, node)
            elif isinstance(node, ast.For):
                if node.orelse:
                    self.refuse("data_dependent_branch", "for ... else", node.orelse[0])
            elif isinstance(node, ast.Expr):
                self._check_effect(node)
            elif isinstance(node, ast.stmt) and not isinstance(
                node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Pass | ast.Delete
            ):
                self.refuse("unsupported_statement", f"{type(node).__name__.lower()} in the loop", node)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
                self.refuse("state_escapes", f"the loop assigns {ast.unparse(node)}", node)
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
                self._check_store(node)
        for name in sorted(self.bound & (self.scope.declared | self.scope.captured(self.loop))):
            self.refuse("state_escapes", f"{name} is shared with another function", self._binding(name))

    def _check_test(self, test: ast.expr, node: ast.AST) -> None:
        if mentions(test, self.index):
            self.refuse("loop_index_used", f"branch on {ast.unparse(test)}", test)
        if isinstance(test, ast.BoolOp):
            for part in test.values:
                self._check_test(part, node)
        elif isinstance(test, ast.UnaryOp):
            self._check_test(test.operand, node)
        elif isinstance(test, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in test.ops):
            return
        elif isinstance(test, ast.Call) and ast.unparse(test.func).split(".")[-1] in TYPE_TESTS:
            return
        else:
            counters = {
                n.target.id
                for n in self.nodes
                if isinstance(n, ast.For) and isinstance(n.target, ast.Name) and range_of(n) is not None
            }
            varying = self.bound - counters | self.written
            if any(uses_beyond_metadata(test, name) for name in varying):
                self.refuse("data_dependent_branch", f"branch on {ast.unparse(test)}", test)

    def _check_effect(self, node: ast.Expr) -> None:
        value = node.value
        if isinstance(value, ast.Constant) or appended(node):
            return
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and is_in_place_name(value.func.attr):
            return
        self.refuse("side_effect", f"{ast.unparse(value)} is called for its effect", node)

    def _check_store(self, node: ast.Subscript) -> None:
        if isinstance(node.ctx, ast.Del):
            self.refuse("unsupported_statement", "del of an element", node)
        constant = isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)
        if constant or (isinstance(node.value, ast.Attribute) and not mentions(node.slice, self.index)):
            self.refuse("state_escapes", f"the loop stores into {ast.unparse(node)}", node)

    def _binding(self, name: str) -> ast.AST:
        for node in self.nodes:
            if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store):
                return node
        return self.loop

    # Lists

    def _list_names(self) -> set[str]:
        return {found[0] for node in self.nodes if (found := appended(node))}

    def _check_lists(self) -> None:
        inside = {id(n) for n in self.nodes}
        for name in sorted(self.lists):
            if name not in self.scope.locals:
                self.refuse("output_list_used", f"{name} is not a list of this function", self._append_to(name))
            if not self.scope.starts_empty(name, self.loop):
                self.refuse("output_list_used", f"{name} is not empty right before the loop", self._append_to(name))
            for use in ast.walk(self.scope.function):
                if isinstance(use, ast.Name) and use.id == name and not self._good_list_use(use, name, inside):
                    self.refuse("output_list_used", f"{name} is used other than by len, stack or cat", use)

    def _append_to(self, name: str) -> ast.AST:
        return next((n for n in self.nodes if appended(n, name)), self.loop)

    def _good_list_use(self, use: ast.Name, name: str, inside: set[int]) -> bool:
        for parent in self.scope.ancestors(use):
            if isinstance(parent, ast.Call) and parent.args and parent.args[0] is use and id(use) not in inside:
                called = parent.func.attr if isinstance(parent.func, ast.Attribute) else ast.unparse(parent.func)
                if called in JOINS or called == "len":
                    self.list_uses.add(id(parent))
                    return True
            if isinstance(parent, SCOPES):
                return False
            if isinstance(parent, ast.stmt):
                if is_empty_list(assigned_value(parent, name)) and not mentions(getattr(parent, "value", None), name):
                    return id(use) not in inside
                if isinstance(parent, ast.Delete):
                    return id(use) not in inside
                item = appended(parent, name)
                if item is None or mentions(item[1], name):
                    return False
                loops = [p for p in self.scope.ancestors(parent) if isinstance(p, ast.For)]
                return id(use) in inside or any(self.scope.starts_empty(name, other) for other in loops)
        return False

    # The loop index, reads and writes

    def _check_index_uses(self) -> None:
        if self.index in self.bound or self.index in self.scope.declared | self.scope.captured(self.loop):
            self.refuse("loop_index_used", f"{self.index} is rebound or captured", self._binding(self.index))
        accepted: set[int] = set()
        for node in self.nodes:
            if isinstance(node, ast.Subscript) and mentions(node.slice, self.index):
                axis, access = self._index(node)
                accepted |= {id(e) for e in index_entries(node) if isinstance(e, ast.Name) and e.id == self.index}
                if isinstance(node.ctx, ast.Load):
                    self._read(node, axis, access)
                else:
                    self._target(node, axis, access)
        for node in self.nodes:
            if isinstance(node, ast.Name) and node.id == self.index and id(node) not in accepted:
                self.refuse("loop_index_used", f"{self.index} is used other than to pick a step", node)
        if self.index in self.scope.live_after[id(self.loop)]:
            end = (self.loop.end_lineno or self.loop.lineno, self.loop.end_col_offset or 0)
            later = [
                n
                for n in ast.walk(self.scope.function)
                if isinstance(n, ast.Name) and n.id == self.index and (n.lineno, n.col_offset) > end
            ]
            where = min(later, key=lambda n: n.lineno) if later else self.loop
            self.refuse("loop_index_used", f"{self.index} is used after the loop", where)

    def _index(self, node: ast.Subscript) -> tuple[int, Access]:
        entries = index_entries(node)
        at = [i for i, e in enumerate(entries) if isinstance(e, ast.Name) and e.id == self.index]
        if len(at) != 1 or sum(mentions(e, self.index) for e in entries) != 1:
            self.refuse("loop_index_used", f"{ast.unparse(node)} is not one step", node)
        position = at[0]
        before, after = entries[:position], entries[position + 1 :]
        from_end = any(isinstance(e, ast.Constant) and e.value is Ellipsis for e in before)
        counted, first = (after, position) if from_end else (before, 0)
        axes, checked = 0, set()
        for i, entry in enumerate(counted):
            odd = isinstance(entry, ast.Constant) and isinstance(entry.value, bool | str)
            if odd or isinstance(entry, ast.Starred):
                self.refuse("unsupported_read", f"the axis of {self.index} in {ast.unparse(node)} is not clear", node)
            absent = isinstance(entry, ast.Constant) and entry.value is None
            axes += not absent
            if not isinstance(entry, ast.Slice | ast.Constant | ast.UnaryOp):
                checked.add(first + i)
        rest = before + after
        while rest and ast.unparse(rest[-1]) in (":", "..."):
            rest.pop()
        return (-1 - axes if from_end else axes), Access(0, tuple(rest), frozenset(i for i in checked if i < len(rest)))

    def _read(self, node: ast.Subscript, axis: int, access: Access) -> None:
        names = read_names(node.value)
        if names & self.written:
            self.refuse("reads_own_output", f"{ast.unparse(node)} is written by the same loop", node)
        inner = names & (self.bound | self.lists | comprehension_targets(self.loop.body))
        impure = [
            n
            for n in ast.walk(node.value)
            if isinstance(n, (ast.Call, ast.Lambda, ast.NamedExpr, ast.Await, *COMPREHENSIONS))
            and not (isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in PURE)
        ]
        if inner or impure or mentions(node.value, self.index):
            self.refuse("unsupported_read", f"{ast.unparse(node.value)} is computed inside the loop", node)
        guard, optional = self._guard(node)
        which = self._add_read(Read(node.value, axis, guard, optional))
        self.read_sites[id(node)] = Access(which, access.rest, access.checked)

    def _add_read(self, read: Read) -> int:
        def key(r: Read) -> tuple:
            return ast.dump(r.base), r.axis, ast.dump(r.guard) if r.guard else "", r.optional

        for i, other in enumerate(self.reads):
            if key(other) == key(read):
                return i
        self.reads.append(read)
        return len(self.reads) - 1

    def _guard(self, node: ast.AST) -> tuple[ast.expr | None, bool]:
        """Under which condition the loop reaches this read, as far as that can be asked before the loop."""
        tests: list[ast.expr] = []
        optional, child = False, node
        for parent in self.scope.ancestors(node):
            if parent is self.loop:
                break
            if isinstance(parent, ast.If | ast.IfExp) and child is not parent.test:
                optional = True
                if self._is_invariant_test(parent.test):
                    orelse = parent.orelse if isinstance(parent.orelse, list) else [parent.orelse]
                    negated = any(child is s for s in orelse)
                    tests.append(ast.UnaryOp(ast.Not(), parent.test) if negated else parent.test)
            elif isinstance(parent, (ast.For, ast.BoolOp, *COMPREHENSIONS)):
                optional = True
            child = parent
        if not tests:
            return None, optional
        return (tests[0] if len(tests) == 1 else ast.BoolOp(ast.And(), tests[::-1])), True

    def _is_invariant_test(self, test: ast.expr) -> bool:
        plain = (ast.Name, ast.Attribute, ast.Constant, ast.Compare, ast.BoolOp, ast.UnaryOp)
        syntax = (ast.cmpop, ast.boolop, ast.unaryop, ast.expr_context)
        return all(isinstance(n, plain + syntax) for n in ast.walk(test)) and not read_names(test) & (
            self.bound | self.lists | comprehension_targets(self.loop.body)
        )

    def _target(self, node: ast.Subscript, axis: int, access: Access) -> None:
        if not isinstance(node.value, ast.Name) or node.value.id not in self.scope.locals:
            self.refuse("unsupported_target", f"{ast.unparse(node.value)} is not a local tensor", node)
        if node.value.id in self.bound:
            self.refuse("unsupported_target", f"{node.value.id} is also assigned in the loop", node)
        self.write_sites[id(node)] = Access(axis, access.rest, access.checked)

    def _check_own_output(self) -> None:
        bases = {id(n.value) for n in self.nodes if isinstance(n, ast.Subscript) and isinstance(n.ctx, ast.Store)}
        for node in self.nodes:
            if isinstance(node, ast.Name) and node.id in self.written and id(node) not in bases:
                parent = self.scope.parents[id(node)]
                if uses_beyond_metadata(parent, node.id):
                    self.refuse("reads_own_output", f"{node.id} is written by the same loop", node)
        read = {name for node in self.nodes if isinstance(node, ast.expr) for name in read_names(node)} - self.written
        for name in sorted(self.written):
            for s in self.scope.preceding(self.loop):
                value = assigned_value(s, name)
                if value is not None and not is_fresh(value):
                    shared = {source.split(".")[0] if "." in source else source for source in sources(value)}
                    if shared & read:
                        self.refuse("reads_own_output", f"{name} may share memory with what the loop reads", s)
                if name in bound_names(s):
                    break

    def _writes(self) -> tuple[Write, ...]:
        writes: list[Write] = []
        subscripts = {id(n): n for n in self.nodes if isinstance(n, ast.Subscript)}
        for name in sorted(self.written):
            sites = [i for i in self.write_sites if ast.unparse(subscripts[i].value) == name]
            axes = {self.write_sites[i].which for i in sites}
            if len(axes) != 1:
                self.refuse("unsupported_target", f"{name} is written along different axes", subscripts[sites[-1]])
            axis, access = axes.pop(), self.write_sites[sites[0]]
            statement = self.scope.parents[sites[0]]
            plain = (
                len(sites) == 1
                and isinstance(statement, ast.Assign)
                and len(statement.targets) == 1
                and any(s is statement for s in self.loop.body)
                and all(isinstance(e, ast.Slice | ast.Constant) for e in access.rest)
                and not any(n & (self.bound | self.lists) for n in map(read_names, access.rest))
            )
            slot = None if plain else self._add_read(Read(ast.Name(name, ast.Load()), axis))
            for i in sites:
                found = self.write_sites[i]
                self.write_sites[i] = Access(len(writes), found.rest, found.checked)
            writes.append(Write(name, axis, access.rest if plain else (), slot))
        return tuple(writes)

    # Carried state

    def _carries(self) -> tuple[Carry, ...]:
        exposed = Liveness().block(self.loop.body, set())
        defined = self.scope.defined_before(self.loop)
        carried = self.bound & exposed & defined
        mutated = self._mutated(carried)
        carried |= mutated
        for name in sorted((self.bound - carried) & self.scope.live_after[id(self.loop)]):
            self.refuse("state_escapes", f"{name} of the last step is used after the loop", self._binding(name))
        for node in self.nodes:
            if isinstance(node, ast.Delete):
                for target in node.targets:
                    if isinstance(target, ast.Name) and target.id in carried:
                        self.refuse("unsupported_statement", f"del of the carried {target.id}", node)
        rebound = {
            n.id: n
            for n in reversed(self.nodes)
            if isinstance(n, ast.Name)
            and isinstance(n.ctx, ast.Store)
            and not isinstance(self.scope.parents[id(n)], ast.AugAssign)
        }
        carries = []
        for name in sorted(carried):
            fresh = name in mutated and self.scope.starts_fresh(name, self.loop)
            if name in mutated and name in rebound and not fresh:
                detail = f"{name} is updated in place and rebound, and something else may refer to its first value"
                self.refuse("mutates_input", detail, rebound[name])
            carries.append(Carry(name, name in mutated, name in mutated and not fresh))
        return tuple(carries)

    def _mutated(self, carried: set[str]) -> set[str]:
        """Names, at the start of a step, of the memory that the step changes in place."""
        mutated: set[str] = set()
        time_read = {name for r in self.reads for name in sources(r.base)}
        for position, statement in enumerate(self.loop.body):
            for node in ast.walk(statement):
                for name in self._changed_by(node):
                    for root in self._roots(name, position, set()):
                        if root in self.written and root not in time_read:
                            continue
                        if root in time_read or "." in root or root not in self.scope.locals:
                            self.refuse("mutates_input", f"{root} is changed in place", node)
                        if root in carried or root not in self.bound:
                            mutated.add(root)
        if not mutated:
            return mutated
        end = len(self.loop.body)
        for name in sorted(carried | mutated):
            shared = (self._roots(name, end, set()) if name in self.bound else {name}) - {name}
            if shared & mutated:
                detail = f"{name} may share memory with {min(shared & mutated)}"
                self.refuse("aliased_state", detail, self._binding(name))
        for position, statement in enumerate(self.loop.body):
            for node in ast.walk(statement):
                if (item := appended(node)) and item[0] in self.lists:
                    roots = {r for name in sources(item[1]) for r in self._roots(name, position, set())}
                    if roots & mutated:
                        self.refuse("aliased_state", f"{min(roots & mutated)} is kept in {item[0]}", node)
        return mutated

    def _changed_by(self, node: ast.AST) -> set[str]:
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            return set() if node.target.id in self.lists else {node.target.id}
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            return set() if id(node) in self.write_sites else sources(node.value) or {"."}
        if isinstance(node, ast.Call):
            names = {n for k in node.keywords if k.arg == "out" for n in sources(k.value)}
            if isinstance(node.func, ast.Attribute) and is_in_place_name(node.func.attr):
                owner = node.func.value
                roots = sources(owner)
                is_module = bool(roots) and not any(r.split(".")[0] in self.scope.locals for r in roots)
                names |= (sources(node.args[0]) if node.args else roots) if is_module else roots
            return names
        return set()

    def _roots(self, name: str, position: int, seen: set[str]) -> set[str]:
        """What the name may refer to at a top-level statement of the body, in terms of the start of the step."""
        if name not in self.bound or name in seen:
            return {name} if name not in self.bound else set()
        for i in range(position - 1, -1, -1):
            statement = self.loop.body[i]
            if name not in bound_names(statement):
                continue
            if isinstance(statement, ast.AugAssign):
                continue
            if isinstance(statement, ast.Assign):
                value = assigned_value(statement, name)
                shared = sources(statement.value if value is None else value)
                return {root for s in shared for root in self._roots(s, i, seen)}
            break
        roots = {name}
        for node in self.nodes:
            value = node.value if isinstance(node, ast.NamedExpr) else None
            if isinstance(node, ast.Assign | ast.AnnAssign) and name in bound_names(node):
                value = assigned_value(node, name) or node.value
            if isinstance(node, ast.For) and name in bound_names(node.target):
                value = node.iter
            for source in sources(value):
                roots |= self._roots(source, len(self.loop.body), seen | {name})
        return roots

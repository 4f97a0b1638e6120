"""What a loop reads and writes by time, and what else its index decides: see `loop_index` for the forms."""

import ast
from dataclasses import fields, is_dataclass
from typing import Any

from fla_compile.passes.loop_names import (
    COMPREHENSIONS,
    VIEWS,
    assigned_value,
    bound_names,
    comprehension_targets,
    is_fresh,
    read_names,
    sources,
    uses_beyond_metadata,
)
from fla_compile.passes.loop_plan import Access, Number, Read, Steps, Test, Write
from fla_compile.passes.loop_scope import Body, index_entries

PURE = VIEWS | frozenset("exp log sigmoid tanh neg abs sqrt rsqrt softplus square reciprocal cumsum sum mean".split())


class Accesses:
    """The reads, writes, numbers and tests of one loop body, gathered by `check_index_uses` and then `writes`."""

    def __init__(self, body: Body):
        self.body = body
        self.reads: list[Read] = []
        self.numbers: list[Number] = []
        self.tests: list[Test] = []
        self.read_sites: dict[int, Access] = {}
        self.write_sites: dict[int, Access] = {}
        self.number_sites: dict[int, int] = {}
        self.test_sites: dict[int, int] = {}
        self._places: dict[int, tuple[int, Steps]] = {}

    def check_index_uses(self) -> None:
        body, index = self.body, self.body.index
        if index.name in body.bound or index.name in body.scope.declared | body.scope.captured(body.loop):
            body.refuse("loop_index_used", f"{index.name} is rebound or captured", body.binding(index.name))
        accepted: set[int] = set(index.ignored)
        for node in body.nodes:
            if isinstance(node, ast.Subscript) and index.mentioned(node.slice) and id(node) not in accepted:
                if isinstance(node.value, ast.Name) and node.value.id in body.placed:
                    accepted |= {id(n) for n in ast.walk(node.slice)}
                    continue
                access, axis, steps = self._index(node)
                accepted |= {id(n) for e in index_entries(node) if index.mentioned(e) for n in ast.walk(e)}
                if isinstance(node.ctx, ast.Load):
                    self._read(node, axis, steps, access)
                else:
                    self._target(node, axis, steps, access)
        for node in body.nodes:
            if isinstance(node, ast.Name) and node.id in index.names and id(node) not in accepted:
                self._outside_of_subscripts(node)
        for name in sorted(index.names & body.scope.live_after[id(body.loop)]):
            end = (body.loop.end_lineno or body.loop.lineno, body.loop.end_col_offset or 0)
            later = [
                n
                for n in ast.walk(body.scope.function)
                if isinstance(n, ast.Name) and n.id == name and (n.lineno, n.col_offset) > end
            ]
            where = min(later, key=lambda n: n.lineno) if later else body.loop
            body.refuse("loop_index_used", f"{name} is used after the loop", where)

    def _outside_of_subscripts(self, node: ast.Name) -> None:
        """Take the largest expression that the index decides: a test, or a number; refuse all else."""
        body, index, e = self.body, self.body.index, node
        while index.is_numeric(parent := body.scope.parents[id(e)]):
            e = parent
        if isinstance(parent, ast.Compare) and (found := index.difference(parent)):
            self.test_sites[id(parent)] = _add(self.tests, Test(*found, node.lineno))
        elif self._decides_a_branch(e) and (found := index.difference(e)):
            self.test_sites[id(e)] = _add(self.tests, Test(*found, node.lineno))
        elif isinstance(node.ctx, ast.Load) and not isinstance(parent, ast.Subscript | ast.Slice | ast.Starred):
            self.number_sites[id(e)] = _add(self.numbers, Number(index.resolve(e)))
            for divisor in index.divisors(e):
                # A step that divides by 0 raises; run by itself, it still does.
                _add(self.tests, Test("!=", divisor, node.lineno))
        else:
            body.refuse("loop_index_used", f"{node.id} is used other than to pick a step", node)

    def _decides_a_branch(self, e: ast.AST) -> bool:
        for parent in self.body.scope.ancestors(e):
            if isinstance(parent, ast.If | ast.IfExp | ast.Assert):
                return parent.test is e
            if not isinstance(parent, ast.BoolOp) and not (
                isinstance(parent, ast.UnaryOp) and isinstance(parent.op, ast.Not)
            ):
                return False
            e = parent
        return False

    def _steps(self, entry: ast.expr, node: ast.Subscript) -> Steps:
        index = self.body.index
        if isinstance(entry, ast.Slice):
            whole = entry.step is None or (isinstance(entry.step, ast.Constant) and entry.step.value == 1)
            low, high = entry.lower, entry.upper
            high, limit = (index.capped(high) if high else None) or (high, None)
            if whole and low and high and index.mentioned(low) and index.is_affine(low) and index.is_affine(high):
                return Steps(index.resolve(low), index.resolve(high), limit)
        elif isinstance(entry, ast.Name) and entry.id == index.name:
            return Steps()
        elif index.is_affine(entry):
            return Steps(index.resolve(entry))
        self.body.refuse("loop_index_used", f"{ast.unparse(node)} is not one step", node)

    def _index(self, node: ast.Subscript) -> tuple[Access, int, Steps]:
        index, entries = self.body.index, index_entries(node)
        at = [i for i, e in enumerate(entries) if index.mentioned(e)]
        if len(at) != 1:
            self.body.refuse("loop_index_used", f"{ast.unparse(node)} is not one step", node)
        position = at[0]
        steps = self._steps(entries[position], node)
        before, after = entries[:position], entries[position + 1 :]
        from_end = any(isinstance(e, ast.Constant) and e.value is Ellipsis for e in before)
        kept: list[ast.expr] = [] if steps.end is None else [ast.Slice()]
        counted, first = (after, position + len(kept)) if from_end else (before, 0)
        axes, checked = 0, set()
        for i, entry in enumerate(counted):
            odd = isinstance(entry, ast.Constant) and isinstance(entry.value, bool | str)
            if odd or isinstance(entry, ast.Starred):
                self.body.refuse("unsupported_read", f"the axis of time in {ast.unparse(node)} is not clear", node)
            absent = isinstance(entry, ast.Constant) and entry.value is None
            axes += not absent
            if not isinstance(entry, ast.Slice | ast.Constant | ast.UnaryOp):
                checked.add(first + i)
        rest = before + kept + after
        while rest and ast.unparse(rest[-1]) in (":", "..."):
            rest.pop()
        access = Access(0, tuple(rest), frozenset(i for i in checked if i < len(rest)))
        return access, (-1 - axes if from_end else axes), steps

    def _read(self, node: ast.Subscript, axis: int, steps: Steps, access: Access) -> None:
        names = read_names(node.value)
        if names & self.body.written:
            self.body.refuse("reads_own_output", f"{ast.unparse(node)} is written by the same loop", node)
        inner = names & (self.body.bound | self.body.lists | comprehension_targets(self.body.loop.body))
        impure = [
            n
            for n in ast.walk(node.value)
            if isinstance(n, (ast.Call, ast.Lambda, ast.NamedExpr, ast.Await, *COMPREHENSIONS))
            and not (isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in PURE)
        ]
        if inner or impure or self.body.index.mentioned(node.value):
            self.body.refuse("unsupported_read", f"{ast.unparse(node.value)} is computed inside the loop", node)
        guard, optional = self.guard(node)
        which = _add(self.reads, Read(node.value, axis, steps, guard, optional))
        self.read_sites[id(node)] = Access(which, access.rest, access.checked)

    def guard(self, node: ast.AST) -> tuple[ast.expr | None, bool]:
        """Under which condition the loop reaches this read, as far as that can be asked before the loop."""
        tests: list[ast.expr] = []
        optional, child = False, node
        for parent in self.body.scope.ancestors(node):
            if parent is self.body.loop:
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
            self.body.bound | self.body.lists | self.body.index.names | comprehension_targets(self.body.loop.body)
        )

    def _target(self, node: ast.Subscript, axis: int, steps: Steps, access: Access) -> None:
        if not isinstance(node.value, ast.Name) or node.value.id not in self.body.scope.locals:
            self.body.refuse("unsupported_target", f"{ast.unparse(node.value)} is not a local tensor", node)
        if node.value.id in self.body.bound:
            self.body.refuse("unsupported_target", f"{node.value.id} is also assigned in the loop", node)
        self.write_sites[id(node)] = access
        self._places[id(node)] = axis, steps

    def check_own_output(self) -> None:
        bases = {id(n.value) for n in self.body.nodes if isinstance(n, ast.Subscript) and isinstance(n.ctx, ast.Store)}
        for node in self.body.nodes:
            if isinstance(node, ast.Name) and node.id in self.body.written and id(node) not in bases:
                parent = self.body.scope.parents[id(node)]
                if uses_beyond_metadata(parent, node.id):
                    self.body.refuse("reads_own_output", f"{node.id} is written by the same loop", node)
        read = {
            name for node in self.body.nodes if isinstance(node, ast.expr) for name in read_names(node)
        } - self.body.written
        for name in sorted(self.body.written):
            for s in self.body.scope.preceding(self.body.loop):
                value = assigned_value(s, name)
                if value is not None and not is_fresh(value):
                    shared = {source.split(".")[0] if "." in source else source for source in sources(value)}
                    if shared & read:
                        self.body.refuse("reads_own_output", f"{name} may share memory with what the loop reads", s)
                if name in bound_names(s):
                    break

    def write_steps(self) -> list[Steps]:
        return [steps for _, steps in self._places.values()]

    def writes(self) -> tuple[Write, ...]:
        writes: list[Write] = []
        subscripts = {id(n): n for n in self.body.nodes if isinstance(n, ast.Subscript)}
        for name in sorted(self.body.written):
            sites = [i for i in self.write_sites if ast.unparse(subscripts[i].value) == name]
            axis, steps = self._places[sites[0]]
            access = self.write_sites[sites[0]]
            if any(_dump(self._places[i]) != _dump((axis, steps)) for i in sites):
                self.body.refuse("unsupported_target", f"{name} is written at different places", subscripts[sites[-1]])
            statement = self.body.scope.parents[sites[0]]
            plain = (
                len(sites) == 1
                and isinstance(statement, ast.Assign)
                and len(statement.targets) == 1
                and any(s is statement for s in self.body.loop.body)
                and all(isinstance(e, ast.Slice | ast.Constant) for e in access.rest)
                and not any(n & (self.body.bound | self.body.lists) for n in map(read_names, access.rest))
            )
            slot = None if plain else _add(self.reads, Read(ast.Name(name, ast.Load()), axis, steps))
            for i in sites:
                found = self.write_sites[i]
                self.write_sites[i] = Access(len(writes), found.rest, found.checked)
            writes.append(Write(name, axis, steps, access.rest if plain else (), slot))
        return tuple(writes)


def _dump(record: Any) -> Any:
    """What tells two records apart: their fields, with syntax trees as text."""
    if isinstance(record, ast.AST):
        return ast.dump(record)
    if isinstance(record, tuple):
        return tuple(_dump(part) for part in record)
    if is_dataclass(record):
        return tuple(_dump(getattr(record, f.name)) for f in fields(record))
    return record


def _add(records: list, record: Any) -> int:
    """The place of an equal record, added if there is none."""
    for i, other in enumerate(records):
        if _dump(other) == _dump(record):
            return i
    records.append(record)
    return len(records) - 1

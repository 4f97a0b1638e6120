"""What a loop reads and writes by time: only a subscript may use the loop index, and only to pick one step."""

import ast

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
from fla_compile.passes.loop_plan import Access, Read, Write
from fla_compile.passes.loop_scope import Body, index_entries, mentions

PURE = VIEWS | frozenset("exp log sigmoid tanh neg abs sqrt rsqrt softplus square reciprocal cumsum sum mean".split())


class Accesses:
    """The reads and writes by time of one loop body, gathered by `check_index_uses` and then `writes`."""

    def __init__(self, body: Body):
        self.body = body
        self.reads: list[Read] = []
        self.read_sites: dict[int, Access] = {}
        self.write_sites: dict[int, Access] = {}

    def check_index_uses(self) -> None:
        if self.body.index in self.body.bound or self.body.index in self.body.scope.declared | self.body.scope.captured(
            self.body.loop
        ):
            self.body.refuse(
                "loop_index_used", f"{self.body.index} is rebound or captured", self.body.binding(self.body.index)
            )
        accepted: set[int] = set()
        for node in self.body.nodes:
            if isinstance(node, ast.Subscript) and mentions(node.slice, self.body.index):
                axis, access = self._index(node)
                accepted |= {id(e) for e in index_entries(node) if isinstance(e, ast.Name) and e.id == self.body.index}
                if isinstance(node.ctx, ast.Load):
                    self._read(node, axis, access)
                else:
                    self._target(node, axis, access)
        for node in self.body.nodes:
            if isinstance(node, ast.Name) and node.id == self.body.index and id(node) not in accepted:
                self.body.refuse("loop_index_used", f"{self.body.index} is used other than to pick a step", node)
        if self.body.index in self.body.scope.live_after[id(self.body.loop)]:
            end = (self.body.loop.end_lineno or self.body.loop.lineno, self.body.loop.end_col_offset or 0)
            later = [
                n
                for n in ast.walk(self.body.scope.function)
                if isinstance(n, ast.Name) and n.id == self.body.index and (n.lineno, n.col_offset) > end
            ]
            where = min(later, key=lambda n: n.lineno) if later else self.body.loop
            self.body.refuse("loop_index_used", f"{self.body.index} is used after the loop", where)

    def _index(self, node: ast.Subscript) -> tuple[int, Access]:
        entries = index_entries(node)
        at = [i for i, e in enumerate(entries) if isinstance(e, ast.Name) and e.id == self.body.index]
        if len(at) != 1 or sum(mentions(e, self.body.index) for e in entries) != 1:
            self.body.refuse("loop_index_used", f"{ast.unparse(node)} is not one step", node)
        position = at[0]
        before, after = entries[:position], entries[position + 1 :]
        from_end = any(isinstance(e, ast.Constant) and e.value is Ellipsis for e in before)
        counted, first = (after, position) if from_end else (before, 0)
        axes, checked = 0, set()
        for i, entry in enumerate(counted):
            odd = isinstance(entry, ast.Constant) and isinstance(entry.value, bool | str)
            if odd or isinstance(entry, ast.Starred):
                self.body.refuse(
                    "unsupported_read", f"the axis of {self.body.index} in {ast.unparse(node)} is not clear", node
                )
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
        if names & self.body.written:
            self.body.refuse("reads_own_output", f"{ast.unparse(node)} is written by the same loop", node)
        inner = names & (self.body.bound | self.body.lists | comprehension_targets(self.body.loop.body))
        impure = [
            n
            for n in ast.walk(node.value)
            if isinstance(n, (ast.Call, ast.Lambda, ast.NamedExpr, ast.Await, *COMPREHENSIONS))
            and not (isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in PURE)
        ]
        if inner or impure or mentions(node.value, self.body.index):
            self.body.refuse("unsupported_read", f"{ast.unparse(node.value)} is computed inside the loop", node)
        guard, optional = self.guard(node)
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
            self.body.bound | self.body.lists | comprehension_targets(self.body.loop.body)
        )

    def _target(self, node: ast.Subscript, axis: int, access: Access) -> None:
        if not isinstance(node.value, ast.Name) or node.value.id not in self.body.scope.locals:
            self.body.refuse("unsupported_target", f"{ast.unparse(node.value)} is not a local tensor", node)
        if node.value.id in self.body.bound:
            self.body.refuse("unsupported_target", f"{node.value.id} is also assigned in the loop", node)
        self.write_sites[id(node)] = Access(axis, access.rest, access.checked)

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

    def writes(self) -> tuple[Write, ...]:
        writes: list[Write] = []
        subscripts = {id(n): n for n in self.body.nodes if isinstance(n, ast.Subscript)}
        for name in sorted(self.body.written):
            sites = [i for i in self.write_sites if ast.unparse(subscripts[i].value) == name]
            axes = {self.write_sites[i].which for i in sites}
            if len(axes) != 1:
                self.body.refuse("unsupported_target", f"{name} is written along different axes", subscripts[sites[-1]])
            axis, access = axes.pop(), self.write_sites[sites[0]]
            statement = self.body.scope.parents[sites[0]]
            plain = (
                len(sites) == 1
                and isinstance(statement, ast.Assign)
                and len(statement.targets) == 1
                and any(s is statement for s in self.body.loop.body)
                and all(isinstance(e, ast.Slice | ast.Constant) for e in access.rest)
                and not any(n & (self.body.bound | self.body.lists) for n in map(read_names, access.rest))
            )
            slot = None if plain else self._add_read(Read(ast.Name(name, ast.Load()), axis))
            for i in sites:
                found = self.write_sites[i]
                self.write_sites[i] = Access(len(writes), found.rest, found.checked)
            writes.append(Write(name, axis, access.rest if plain else (), slot))
        return tuple(writes)

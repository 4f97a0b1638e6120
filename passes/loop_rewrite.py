"""Replace planned loops in a function's syntax tree by a body function and the calls of `loop_runtime` around it."""

import ast
from collections.abc import Iterable

from fla_compile.passes.loop_plan import Access, LoopPlan
from fla_compile.passes.loop_scope import Scope

RUNTIME = "fla_compile.passes.loop_runtime"


def rewrite_function(scope: Scope, plans: list[LoopPlan]) -> None:
    """Replace the planned loops in the function's tree."""
    taken = {n.id for n in ast.walk(scope.function) if isinstance(n, ast.Name)} | set(scope.parameters)
    prefix = "_fla_"
    while any(name.startswith(prefix) for name in taken):
        prefix += "_"
    body = scope.function.body
    for number, plan in enumerate(plans):
        replacement = _Loop(scope, plan, f"{prefix}{number}_", prefix).statements()
        for statement in replacement:
            for node in ast.walk(statement):
                if isinstance(node, ast.expr | ast.stmt) and not hasattr(node, "lineno"):
                    ast.copy_location(node, plan.loop)
        parent = scope.parents[id(plan.loop)]
        for block in ("body", "orelse", "finalbody"):
            statements = getattr(parent, block, None)
            if isinstance(statements, list):
                for position, s in enumerate(statements):
                    if s is plan.loop:
                        statements[position : position + 1] = replacement
                        break
    uses = frozenset[int]().union(*(plan.list_uses for plan in plans))
    site = f"{scope.filename}:{plans[0].loop.lineno}"
    _Lists(uses, prefix, site).visit(scope.function)
    # An import, not a cell, a default or a global: none of these can be added without the user's objects showing it.
    names = "run_loop finish_in_place snapshot one_axis write_time time_list over_time len_time".split()
    load = ast.ImportFrom(RUNTIME, [ast.alias(name, prefix + name) for name in names], 0)
    ast.copy_location(load, body[0])
    documented = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    body.insert(1 if documented else 0, load)


def _name(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def _store(name: str) -> ast.Name:
    return ast.Name(name, ast.Store())


def _tuple(items: list, ctx: ast.expr_context | None = None) -> ast.Tuple:
    return ast.Tuple(items, ctx or ast.Load())


def _constants(values: Iterable[str | bool | int]) -> ast.Tuple:
    return _tuple([ast.Constant(value) for value in values])


def _assign(target: ast.expr, value: ast.expr) -> ast.Assign:
    return ast.Assign([target], value)


def _item(name: str, i: int) -> ast.Subscript:
    return ast.Subscript(_name(name), ast.Constant(i), ast.Load())


class _Loop(ast.NodeTransformer):
    """One loop's replacement: the body as a function, the call that runs it, and what becomes of its results."""

    def __init__(self, scope: Scope, plan: LoopPlan, own: str, prefix: str):
        self.scope, self.plan, self.own, self.prefix = scope, plan, own, prefix
        self.site = ast.Constant(f"{scope.filename}:{plan.loop.lineno}")

    def call(self, helper: str, *args: ast.expr, **kwargs: ast.expr) -> ast.Call:
        return ast.Call(_name(self.prefix + helper), list(args), [ast.keyword(k, v) for k, v in kwargs.items()])

    def statements(self) -> list[ast.stmt]:
        plan, own = self.plan, self.own
        body: list[ast.stmt] = []
        if plan.carries:
            body.append(_assign(_tuple([_store(c.name) for c in plan.carries], ast.Store()), _name(own + "carry")))
        for i, write in enumerate(plan.writes):
            if write.slot is not None:
                clone = ast.Call(ast.Attribute(_item(own + "x", write.slot), "clone", ast.Load()), [], [])
                body.append(_assign(_store(f"{own}y{i}"), clone))
        body += [_assign(_store(name), ast.List([], ast.Load())) for name in plan.lists]
        body += [self.visit(s) for s in plan.loop.body]
        results = (
            [_name(c.name) for c in plan.carries],
            [_name(f"{own}y{i}") for i in range(len(plan.writes))],
            [_name(name) for name in plan.lists],
        )
        body.append(ast.Return(_tuple([_tuple(list(r)) for r in results])))
        arguments = ast.arguments([], [ast.arg(own + "carry"), ast.arg(own + "x")], None, [], [], None, [])
        function = ast.FunctionDef(own + "body", arguments, body, [], None, None)
        if hasattr(ast, "TypeVar"):
            setattr(function, "type_params", [])  # noqa: B010
        bounds = [
            _assign(_store(own + "start"), plan.start or ast.Constant(0)),
            _assign(_store(own + "stop"), plan.stop),
        ]
        return [*bounds, function, self._run(), *self._results()]

    def _run(self) -> ast.stmt:
        plan, own = self.plan, self.own
        reads = []
        for read in plan.reads:
            base = ast.IfExp(read.guard, read.base, ast.Constant(None)) if read.guard else read.base
            reads.append(_tuple([base, ast.Constant(read.axis)]))
        run = self.call(
            "run_loop",
            _name(own + "body"),
            _name(own + "start"),
            _name(own + "stop"),
            _tuple([_name(c.name) for c in plan.carries]),
            _tuple(reads),
            names=_constants(c.name for c in plan.carries),
            in_place=_constants(c.in_place for c in plan.carries),
            optional=_constants(r.optional for r in plan.reads),
            slots=_constants(w.slot for w in plan.writes if w.slot is not None),
            targets=_tuple([_name(w.name) for w in plan.writes]),
            changed=_tuple([_name(name) for name in plan.overlap.changed]),
            others=_tuple([_name(name) for name in plan.overlap.others]),
            n_lists=ast.Constant(len(plan.lists)),
            site=self.site,
        )
        return _assign(_tuple([_store(own + r) for r in ("final", "writes", "lists")], ast.Store()), run)

    def _results(self) -> list[ast.stmt]:
        plan, own = self.plan, self.own
        bounds = (_name(own + "start"), _name(own + "stop"))
        after: list[ast.stmt] = []
        for i, carry in enumerate(plan.carries):
            final: ast.expr = _item(own + "final", i)
            if carry.same_object:
                final = self.call("finish_in_place", _name(carry.name), final)
            after.append(_assign(_store(carry.name), final))
        for i, write in enumerate(plan.writes):
            rest = _tuple([self._as_value(e) for e in write.rest])
            ys = _item(own + "writes", i)
            call = self.call("write_time", _name(write.name), ast.Constant(write.axis), rest, *bounds, ys, self.site)
            after.append(ast.Expr(call))
        for i, name in enumerate(plan.lists):
            after.append(_assign(_store(name), self.call("time_list", _item(own + "lists", i), *bounds)))
        return after

    @staticmethod
    def _as_value(entry: ast.expr) -> ast.expr:
        if not isinstance(entry, ast.Slice):
            return entry
        parts: list[ast.expr] = [part or ast.Constant(None) for part in (entry.lower, entry.upper, entry.step)]
        return ast.Call(_name("slice"), parts, [])

    def _rest(self, access: Access) -> ast.expr | None:
        entries: list[ast.expr] = []
        for i, entry in enumerate(access.rest):
            visited = self.visit(entry)
            if i in access.checked:
                visited = ast.copy_location(self.call("one_axis", visited, self.site), entry)
            entries.append(visited)
        if not entries:
            return None
        return entries[0] if len(entries) == 1 else _tuple(entries)

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        if id(node) in self.plan.read_sites:
            access = self.plan.read_sites[id(node)]
            step: ast.expr = _item(self.own + "x", access.which)
            rest = self._rest(access)
            return self._at(node, step if rest is None else ast.Subscript(step, rest, ast.Load()))
        if id(node) in self.plan.write_sites:
            access = self.plan.write_sites[id(node)]
            place = _name(f"{self.own}y{access.which}")
            rest = self._rest(access) or ast.Constant(Ellipsis)
            return self._at(node, ast.Subscript(place, rest, node.ctx))
        return self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        access = self.plan.write_sites.get(id(node.targets[0]))
        if access is None or self.plan.writes[access.which].slot is not None:
            return self.generic_visit(node)
        write = self.plan.writes[access.which]
        value = self.call("snapshot", self.visit(node.value), _name(write.name))
        return self._at(node, _assign(_store(f"{self.own}y{access.which}"), value))

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args:
            # A nested function has neither the cell nor the first argument that a bare `super()` looks for.
            node.args = [_name("__class__"), _name(self.scope.parameters[0])]
            self._at(node, node)
        return node

    @staticmethod
    def _at(old: ast.AST, new: ast.AST) -> ast.AST:
        for inner in ast.walk(new):
            if isinstance(inner, ast.expr | ast.stmt) and not hasattr(inner, "lineno"):
                ast.copy_location(inner, old)
        return new


class _Lists(ast.NodeTransformer):
    """Send `torch.stack(outs)`, `torch.cat(outs)` and `len(outs)` to the helpers that know lifted lists."""

    def __init__(self, uses: frozenset[int], prefix: str, site: str):
        self.uses, self.prefix, self.site = uses, prefix, site

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if id(node) not in self.uses:
            return node
        if isinstance(node.func, ast.Name) and node.func.id == "len":
            new = ast.Call(_name(self.prefix + "len_time"), node.args, [])
        else:
            keywords = [*node.keywords, ast.keyword("site", ast.Constant(self.site))]
            new = ast.Call(_name(self.prefix + "over_time"), [node.func, *node.args], keywords)
        return _Loop._at(node, ast.copy_location(new, node))

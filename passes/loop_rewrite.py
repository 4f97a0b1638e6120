"""Replace planned loops in a function's syntax tree by a body function and the calls of `loop_runtime` around it."""

import ast
from collections.abc import Iterable, Mapping
from typing import Any

from fla_compile.passes.loop_forms import Form
from fla_compile.passes.loop_plan import Access, LoopPlan, Read, Steps, Test, Write
from fla_compile.passes.loop_scope import Scope

HELPERS = {
    "loop_runtime": "run_loop snapshot",
    "loop_states": "finish_in_place apart turned",
    "loop_numbers": "with_number number_for number_value",
    "loop_steps": "one_axis write_time count_steps at_least_none are_tensors shortest chunk_width",
    "loop_outputs": "time_list place_list over_time grow len_time backwards as_list item_time",
}


def rewrite_function(scope: Scope, plans: list[LoopPlan], forms: Mapping[int, Form]) -> None:
    """Replace the planned loops in the function's tree; `forms`, by loop, are of those that were spelled otherwise."""
    prefix, body = scope.prefix, scope.function.body
    for number, plan in enumerate(plans):
        form = forms.get(id(plan.loop))
        otherwise = form.as_written() if form and form.only_if else None
        replacement = _Loop(scope, plan, f"{prefix}{number}_").statements()
        statements = block_of(scope.parents[id(plan.loop)], plan.loop)
        place = next(i for i, s in enumerate(statements) if s is plan.loop)
        begin, end = place, place + 1
        if form and form.only_if and otherwise:
            begin, end = place - len(form.before), end + len(form.after)
            replacement = [ast.If(form.only_if, [*form.before, *replacement, *form.after], [otherwise])]
        for statement in replacement:
            _at(plan.loop, statement)
        statements[begin:end] = replacement
    uses = {i: helper for plan in plans for i, helper in plan.list_uses.items()}
    _Lists(uses, prefix, f"{scope.filename}:{plans[0].loop.lineno}").visit(scope.function)
    used = {n.id for n in ast.walk(scope.function) if isinstance(n, ast.Name)}
    documented = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    # An import, not a cell, a default or a global: none of these can be added without the user's objects showing it.
    for module, helpers in HELPERS.items():
        names = [ast.alias(name, prefix + name) for name in helpers.split() if prefix + name in used]
        if names:
            load = ast.ImportFrom(f"fla_compile.passes.{module}", names, 0)
            body.insert(1 if documented else 0, ast.copy_location(load, body[0]))


def block_of(parent: ast.AST, s: ast.stmt) -> list[ast.stmt]:
    """The block of `parent` that the statement stands in."""
    blocks = [getattr(parent, block, None) for block in ("body", "orelse", "finalbody")]
    return next(b for b in blocks if isinstance(b, list) and any(other is s for other in b))


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


def _at(old: ast.AST, new: Any) -> Any:
    """Put what has no place in the user's source at the place of `old`."""
    for inner in ast.walk(new):
        if isinstance(inner, ast.expr | ast.stmt | ast.arg) and not hasattr(inner, "lineno"):
            ast.copy_location(inner, old)
    return new


def _item(name: str, i: int) -> ast.Subscript:
    return ast.Subscript(_name(name), ast.Constant(i), ast.Load())


class _Loop(ast.NodeTransformer):
    """One loop's replacement: the body as a function, the call that runs it, and what becomes of its results."""

    def __init__(self, scope: Scope, plan: LoopPlan, own: str):
        self.scope, self.plan, self.own, self.prefix = scope, plan, own, scope.prefix
        self.site = ast.Constant(f"{scope.filename}:{plan.loop.lineno}")

    def call(self, helper: str, *args: ast.expr, **kwargs: ast.expr) -> ast.Call:
        return ast.Call(_name(self.prefix + helper), list(args), [ast.keyword(k, v) for k, v in kwargs.items()])

    def function(self, value: ast.expr) -> ast.Lambda:
        """The value as a function of the loop's index."""
        return ast.Lambda(ast.arguments([], [ast.arg(self.plan.index)], None, [], [], None, []), value)

    def entry(self, steps: Steps) -> list[ast.expr]:
        return [self.function(value) for value in (steps.at, steps.end, steps.limit) if value is not None]

    def statements(self) -> list[ast.stmt]:
        plan, own = self.plan, self.own
        body: list[ast.stmt] = []
        if plan.carries:
            body.append(_assign(_tuple([_store(c.name) for c in plan.carries], ast.Store()), _name(own + "carry")))
        body += [_assign(_store(name), _name(f"{own}apart_{name}")) for name in plan.overlap.apart]
        for i, write in enumerate(plan.writes):
            if write.slot is not None:
                clone = ast.Call(ast.Attribute(_item(own + "x", write.slot), "clone", ast.Load()), [], [])
                body.append(_assign(_store(f"{own}y{i}"), clone))
        body += [_assign(_store(filled.name), ast.List([], ast.Load())) for filled in plan.lists]
        body += [self.visit(s) for s in plan.loop.body if id(s) not in plan.dropped]
        results = (
            [_name(c.name) for c in plan.carries],
            [_name(f"{own}y{i}") for i in range(len(plan.writes))],
            [_name(filled.name) for filled in plan.lists],
        )
        body.append(ast.Return(_tuple([_tuple(list(r)) for r in results])))
        given = [ast.arg(own + name) for name in ("carry", "x", "n", "tests")]
        function = ast.FunctionDef(own + "body", ast.arguments([], given, None, [], [], None, []), body, [], None, None)
        if hasattr(ast, "TypeVar"):
            setattr(function, "type_params", [])  # noqa: B010
        bounds = _tuple([plan.start or ast.Constant(0), plan.stop, plan.step or ast.Constant(1)])
        copies = [_assign(_store(f"{own}apart_{n}"), self.call("apart", _name(n))) for n in plan.overlap.apart]
        return [_assign(_store(own + "bounds"), bounds), *copies, function, self._run(), *self._results()]

    def _read(self, read: Read) -> ast.expr:
        base = ast.IfExp(read.guard, read.base, ast.Constant(None)) if read.guard else read.base
        return _tuple([base, ast.Constant(read.axis), *self.entry(read.steps)])

    def _test(self, test: Test) -> ast.expr:
        return _tuple([ast.Constant(test.op), self.function(test.difference), ast.Constant(test.line)])

    def _run(self) -> ast.stmt:
        plan, own = self.plan, self.own
        run = self.call(
            "run_loop",
            _name(own + "body"),
            _name(own + "bounds"),
            _tuple([_name(c.name) if c.defined else ast.Constant(None) for c in plan.carries]),
            _tuple([self._read(read) for read in plan.reads]),
            names=_constants(c.name for c in plan.carries),
            in_place=_constants(c.in_place for c in plan.carries),
            defined=_constants(c.defined for c in plan.carries),
            optional=_constants(r.optional for r in plan.reads),
            slots=_constants(w.slot for w in plan.writes if w.slot is not None),
            targets=_tuple([_name(w.name) for w in plan.writes]),
            changed=_tuple([_name(name) for name in plan.overlap.changed]),
            others=_tuple([_name(name) for name in plan.overlap.others]),
            numbers=_tuple([self.function(n.value) for n in plan.numbers]),
            tests=_tuple([self._test(test) for test in plan.tests]),
            n_lists=ast.Constant(len(plan.lists)),
            site=self.site,
            **self._watches(),
        )
        return _assign(_tuple([_store(own + r) for r in ("final", "writes", "lists")], ast.Store()), run)

    def _watches(self) -> dict[str, ast.expr]:
        watches = [c.watch for c in self.plan.carries]
        if not any(watches):
            return {}
        told = [_constants((w.tentative, w.fresh)) if w else ast.Constant(None) for w in watches]
        keys = [_constants(w.keys) if w else _tuple([]) for w in watches]
        return {"watched": _tuple(told), "keys": _tuple(keys)}

    def _results(self) -> list[ast.stmt]:
        plan, own, bounds = self.plan, self.own, _name(self.own + "bounds")
        after: list[ast.stmt] = []
        for i, carry in enumerate(plan.carries):
            final: ast.expr = _item(own + "final", i)
            if carry.same_object:
                final = self.call("finish_in_place", _name(carry.name), final)
            after.append(_assign(_store(carry.name), final))
        for i, write in enumerate(plan.writes):
            after.append(ast.Expr(self._write(write, _item(own + "writes", i))))
        for i, filled in enumerate(plan.lists):
            runs = _item(own + "lists", i)
            if filled.steps is None:
                made = self.call("time_list", runs, ast.Constant(filled.front))
            else:
                made = self.call("place_list", _name(filled.name), runs, bounds, *self.entry(filled.steps), self.site)
            after.append(_assign(_store(filled.name), made))
        return after

    def _write(self, write: Write, pieces: ast.expr) -> ast.expr:
        rest = _tuple([self._as_value(e) for e in write.rest])
        where = (_name(write.name), ast.Constant(write.axis), rest, _name(self.own + "bounds"))
        return self.call("write_time", *where, pieces, self.site, *self.entry(write.steps))

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

    def visit(self, node: ast.AST) -> Any:
        if id(node) in self.plan.test_sites:
            return _at(node, _item(self.own + "tests", self.plan.test_sites[id(node)]))
        if id(node) in self.plan.number_sites:
            return _at(node, self.call("number_value", self._number(node), *self._here(node)))
        return super().visit(node)

    def _here(self, node: ast.expr | ast.stmt) -> tuple[ast.expr, ast.expr]:
        return self.site, ast.Constant(node.lineno)

    def _number(self, node: ast.AST) -> ast.expr:
        return _item(self.own + "n", self.plan.number_sites[id(node)])

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        sites = self.plan.number_sites
        if not (id(node.left) in sites or id(node.right) in sites) or isinstance(node.op, ast.MatMult):
            return self.generic_visit(node)
        sides = [self._number(e) if id(e) in sites else self.visit(e) for e in (node.left, node.right)]
        return _at(node, self.call("with_number", ast.Constant(type(node.op).__name__), *sides, *self._here(node)))

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        if id(node.value) in self.plan.number_sites and isinstance(node.target, ast.Name):
            target = _name(node.target.id)
            node.value = self.call("number_for", self._number(node.value), target, *self._here(node))
            return _at(node, node)
        return self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        if id(node) in self.plan.read_sites:
            access = self.plan.read_sites[id(node)]
            step: ast.expr = _item(self.own + "x", access.which)
            rest = self._rest(access)
            return _at(node, step if rest is None else ast.Subscript(step, rest, ast.Load()))
        if id(node) in self.plan.write_sites:
            access = self.plan.write_sites[id(node)]
            place = _name(f"{self.own}y{access.which}")
            rest = self._rest(access) or ast.Constant(Ellipsis)
            return _at(node, ast.Subscript(place, rest, node.ctx))
        return self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr not in ("T", "mT") or not isinstance(node.ctx, ast.Load):
            return node
        return _at(node, self.call("turned", node.value, ast.Constant(node.attr)))

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        if id(node) in self.plan.list_sites:
            add = ast.Attribute(_name(self.plan.list_sites[id(node)]), "append", ast.Load())
            return _at(node, ast.Expr(ast.Call(add, [self.visit(node.value)], [])))
        access = self.plan.write_sites.get(id(node.targets[0]))
        if access is None or self.plan.writes[access.which].slot is not None:
            return self.generic_visit(node)
        write = self.plan.writes[access.which]
        value = self.call("snapshot", self.visit(node.value), _name(write.name))
        return _at(node, _assign(_store(f"{self.own}y{access.which}"), value))

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args:
            # A nested function has neither the cell nor the first argument that a bare `super()` looks for.
            node.args = [_name("__class__"), _name(self.scope.parameters[0])]
            _at(node, node)
        return node


class _Lists(ast.NodeTransformer):
    """Send the uses of lists after their loops to the helpers that know lifted lists."""

    def __init__(self, uses: Mapping[int, str], prefix: str, site: str):
        self.uses, self.prefix, self.site = uses, prefix, ast.Constant(site)

    def helper(self, node: ast.AST, *args: ast.expr, **kwargs: ast.expr) -> Any:
        name = self.uses[id(node)]
        keywords = [ast.keyword(k, v) for k, v in kwargs.items()]
        return _at(node, ast.copy_location(ast.Call(_name(self.prefix + name), list(args), keywords), node))

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if id(node) not in self.uses:
            return node
        if self.uses[id(node)] != "over_time":
            return self.helper(node, *node.args)
        call = self.helper(node, node.func, *node.args, site=self.site)
        call.keywords = [*node.keywords, *call.keywords]
        return call

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        if id(node) not in self.uses:
            return node
        return self.helper(node, node.value, *([node.slice, self.site] if self.uses[id(node)] == "item_time" else []))

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if id(node) not in self.uses:
            return self.generic_visit(node)
        name = ast.unparse(node.value).split(".")[0]
        return _at(node, _assign(_store(name), self.helper(node, _name(name))))

"""Make a twin of a function in which each time loop is one scan.

Before:                                          After:

    def naive(q, k, v, g):                           def naive(q, k, v, g):
        S = torch.zeros(...)                             S = torch.zeros(...)
        o = torch.zeros_like(v)                          o = torch.zeros_like(v)
        for t in range(q.shape[1]):                      def body(carry, x):
            S = S * g[:, t] + k[:, t] * v[:, t]              S, = carry
            o[:, t] = q[:, t] @ S                            S = S * x[0] + x[1] * x[2]
        return o, S                                          y = snapshot(x[3] @ S, o)
                                                             return (S,), (y,), ()
                                                         (S,), ys, _ = run_loop(body, 0, q.shape[1], (S,), ...)
                                                         write_time(o, 1, (), 0, q.shape[1], ys[0], "file.py:4")
                                                         return o, S

Legal because the body keeps the user's statements in their order; only where a step comes from (a slice of a tensor
that the loop does not change) and where it goes (a tensor or list that the loop does not read) is rewritten. A state
that is updated in place acts on a copy, and the object it started in gets the final value. The function is not touched:
Dynamo traces the twin in its place, under the user's file name and lines, with the user's globals, cells and defaults.

Refused, with the line: see `loop_analysis.REASONS`. What only values can tell is refused by `loop_runtime` in tracing.
"""

import __future__

import ast
import dis
import functools
import inspect
import linecache
import opcode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from types import CodeType, FunctionType

from fla_compile.passes.loop_analysis import Access, LoopPlan, Scope, describe
from fla_compile.passes.records import Refusal, Refused

RUNTIME = "fla_compile.passes.loop_runtime"
FUTURE_FLAGS = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)


@dataclass(frozen=True)
class LoopSite:
    """A lifted loop: where its `for` stands, and in which function."""

    filename: str
    line: int
    function: str


@dataclass(frozen=True)
class Lifted:
    """A function's twin, None if nothing lifts, with the loops it lifts and those it leaves."""

    twin: FunctionType | None
    loops: tuple[LoopSite, ...]
    refusals: tuple[Refusal, ...]


NOTHING = Lifted(None, (), ())


def lift_loops(fn: FunctionType, *, skip: frozenset[tuple[str, int]] = frozenset()) -> Lifted:
    """Return `fn`'s twin for Dynamo to trace; loops whose (filename, line) is in `skip` stay as written."""
    code = fn.__code__
    if not _has_loop(code):
        return NOTHING
    mine = frozenset(line for name, line in skip if name == code.co_filename)
    twin_code, loops, refusals = _lift_code(code, mine)
    if twin_code is None:
        return Lifted(None, loops, refusals)
    twin = FunctionType(twin_code, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    twin.__kwdefaults__ = fn.__kwdefaults__
    twin.__qualname__ = fn.__qualname__
    twin.__module__ = fn.__module__
    twin.__doc__ = fn.__doc__
    return Lifted(twin, loops, refusals)


def _has_loop(code: CodeType) -> bool:
    return "range" in code.co_names and opcode.opmap["FOR_ITER"] in code.co_code[::2]


@functools.lru_cache(maxsize=4096)
def _lift_code(
    code: CodeType, skip: frozenset[int]
) -> tuple[CodeType | None, tuple[LoopSite, ...], tuple[Refusal, ...]]:
    tree = _parse(code)
    if tree is None:
        return None, (), ()
    module, function = tree
    scope = Scope(function, code.co_filename)
    plans, refusals = _plan(scope, skip)
    if not plans:
        return None, (), refusals
    site = f"{PurePath(code.co_filename).name}:{plans[0].loop.lineno}"
    original = _compile(code, *_parse(code))  # type: ignore[misc]
    if original is None or not _same_program(original, code):
        detail = "the source on disk is not what this function was compiled from"
        return None, (), (Refusal("recurrence", "source_mismatch", detail, site),)
    rewrite_function(scope, plans)
    ast.fix_missing_locations(module)
    twin = _compile(code, module, function)
    # Guards on the user's cells go by position, so the twin must have the same ones in the same order.
    if twin is None or twin.co_freevars != code.co_freevars:
        return None, (), (Refusal("recurrence", "source_mismatch", "the twin's closure differs", site),)
    return twin, tuple(LoopSite(code.co_filename, p.loop.lineno, code.co_qualname) for p in plans), refusals


def _plan(scope: Scope, skip: frozenset[int]) -> tuple[list[LoopPlan], tuple[Refusal, ...]]:
    """Plan the outermost time loops; a loop that carries nothing yields to a time loop inside it."""

    def visit(loop: ast.For) -> tuple[list[LoopPlan], list[Refusal]]:
        own: list[LoopPlan] = []
        refusals: list[Refusal] = []
        if loop.lineno not in skip:
            try:
                plan = describe(loop, scope)
                own = [plan] if plan else []
            except Refused as refused:
                refusals = [refused.record("recurrence")]
        if own and own[0].carries:
            return own, []
        inner: list[LoopPlan] = []
        inner_refusals: list[Refusal] = []
        for nested in _loops(loop.body):
            plans, refused_inside = visit(nested)
            inner += plans
            inner_refusals += refused_inside
        if inner:
            return inner, inner_refusals
        return own, refusals + ([] if own or refusals else inner_refusals)

    plans: list[LoopPlan] = []
    refusals: list[Refusal] = []
    for loop in _loops(scope.function.body):
        found, refused = visit(loop)
        plans += found
        refusals += refused
    return plans, tuple(refusals)


def _loops(body: list[ast.stmt]) -> Iterator[ast.For]:
    """The outermost `for` statements of a block, in order."""
    for s in body:
        if isinstance(s, ast.For):
            yield s
        elif not isinstance(s, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for block in ("body", "orelse", "finalbody", "handlers", "cases"):
                yield from _loops(getattr(s, block, []))


# Source to tree, and tree to code


def _parse(code: CodeType) -> tuple[ast.Module, ast.FunctionDef | ast.AsyncFunctionDef] | None:
    """Parse the function alone, at its own lines and columns."""
    lines = linecache.getlines(code.co_filename)[code.co_firstlineno - 1 :]
    if not lines:
        return None
    try:
        block = "".join(inspect.getblock(lines))
        # The `if` makes an indented function a legal program without moving its columns.
        module = ast.parse("if 1:\n" + block if block[0].isspace() else "\n" + block)
    except (SyntaxError, IndexError):
        return None
    ast.increment_lineno(module, code.co_firstlineno - 2)
    body = module.body[0].body if isinstance(module.body[0], ast.If) else module.body
    function = body[0]
    if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) or function.name != code.co_name:
        return None
    return module, function


def _class_of(qualname: str) -> str | None:
    """The class whose private names the function spells `__name`."""
    parts = qualname.split(".")[:-1]
    while parts and parts[-1] == "<locals>":
        parts = parts[:-2]
    return parts[-1] if parts else None


def _compile(code: CodeType, module: ast.Module, function: ast.FunctionDef | ast.AsyncFunctionDef) -> CodeType | None:
    """Compile the function where its free names are those of `code`."""
    cells = ast.arguments([], [ast.arg(name) for name in code.co_freevars], None, [], [], None, [])
    outer: ast.stmt = ast.FunctionDef("factory", cells, [function], [], None, None, lineno=1, col_offset=0)
    owner = _class_of(code.co_qualname)
    if owner:
        outer = ast.ClassDef(owner, [], [], [outer], [], lineno=1, col_offset=0)
    if hasattr(ast, "TypeVar"):
        for node in (outer, *getattr(outer, "body", [])):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node is not function:
                setattr(node, "type_params", [])  # noqa: B010  (no such field before Python 3.12)
    wrapped = ast.fix_missing_locations(ast.Module([outer], []))
    flags = code.co_flags & FUTURE_FLAGS
    try:
        top = compile(wrapped, code.co_filename, "exec", flags=flags, dont_inherit=True)
    except SyntaxError:
        return None
    todo = [top]
    while todo:
        current = todo.pop(0)
        if current.co_name == code.co_name and current.co_firstlineno == code.co_firstlineno:
            return current.replace(co_qualname=code.co_qualname)
        todo += [c for c in current.co_consts if isinstance(c, CodeType)]
    return None


def _same_program(ours: CodeType, theirs: CodeType) -> bool:
    if any(name.startswith("@py") for name in (*theirs.co_names, *theirs.co_varnames)):
        return True  # pytest rewrites the asserts of test files
    return _instructions(ours) == _instructions(theirs)


def _instructions(code: CodeType) -> list:
    """What the code does, without what depends on the rest of its module (how a method is called) or on offsets."""
    found: list = []
    for i in dis.get_instructions(code):
        if i.opname in ("PUSH_NULL", "PRECALL", "EXTENDED_ARG", "CACHE"):
            continue
        if i.opcode in dis.hasjrel or i.opcode in dis.hasjabs:
            found.append(i.opname)
        elif isinstance(i.argval, CodeType):
            found.append(_instructions(i.argval))
        else:
            found.append((i.opname.replace("LOAD_METHOD", "LOAD_ATTR"), type(i.argval), repr(i.argval)))
    return found


# Rewriting


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


def _constants(values: Iterable[str | bool]) -> ast.Tuple:
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
            targets=_tuple([_name(w.name) for w in plan.writes if w.slot is None]),
            n_writes=ast.Constant(len(plan.writes)),
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

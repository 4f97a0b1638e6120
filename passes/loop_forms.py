"""Spell every loop over time as `for t in range(...)` with subscripts, which is all that the analysis knows.

    for q_t, k_t in zip(q.unbind(1), k.unbind(1)):       for i in range(shortest(q.shape[1], k.shape[1])):
        ...                                        ->        q_t = q[:, i]; k_t = k[:, i]; ...

    while t < T:                                         for t in range(t0, T, 1):
        ...                                        ->        ...
        t += 1                                           t = t0 + T'

    o = torch.cat([o, y.unsqueeze(1)], dim=1)      ->    ys.append(y.unsqueeze(1)), and one cat after the loop

Both sides compute the same where what is iterated is a tensor. Where only the values can tell (`for x_t in x`), the
twin asks before it runs one or the other. A loop that does not lift is put back as it was.
"""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

from fla_compile.passes.loop_comprehensions import spell_comprehensions
from fla_compile.passes.loop_index import MEASURES
from fla_compile.passes.loop_iterables import Iterable, Unknown, spell
from fla_compile.passes.loop_names import bound_names, read_names, walk_scope
from fla_compile.passes.records import Refused

STEPS_TOWARDS = {ast.Lt: 1, ast.LtE: 1, ast.Gt: -1, ast.GtE: -1}


@dataclass
class Form:
    """A loop spelled anew, in its block between `before` and `after`; `back` holds what stood for a new statement."""

    original: ast.For | ast.While
    loop: ast.For
    block: list[ast.stmt]
    before: list[ast.stmt] = field(default_factory=list)
    after: list[ast.stmt] = field(default_factory=list)
    back: dict[int, list[ast.stmt]] = field(default_factory=dict)
    only_if: ast.expr | None = None

    def put_in_place(self) -> None:
        place = next(i for i, s in enumerate(self.block) if s is self.original)
        self.block[place : place + 1] = [*self.before, self.loop, *self.after]

    def restore_body(self) -> None:
        """Give the original body what has become of its statements since."""
        self.original.body[:] = [old for s in self.loop.body for old in self.back.get(id(s), [s])]

    def put_back(self, parents: dict[int, ast.AST]) -> None:
        self.restore_body()
        place = next(i for i, s in enumerate(self.block) if s is self.loop) - len(self.before)
        self.block[place : place + len(self.before) + 1 + len(self.after)] = [self.original]
        parents[id(self.original)] = parents[id(self.loop)]
        for s in self.original.body:
            parents[id(s)] = self.original

    def as_written(self) -> ast.stmt:
        """A copy of the loop before it is rewritten."""
        return copy.deepcopy(self.original)


class Speller:
    """Spells the loops of one function; `forms` are in the order from outer to inner loops."""

    def __init__(self, function: ast.FunctionDef | ast.AsyncFunctionDef, filename: str, prefix: str):
        self.function, self.filename, self.prefix = function, filename, prefix
        self.forms: list[Form] = []
        self.refused: list[Refused] = []
        self.tensors = {a.arg for a in _arguments(function) if _is_tensor_type(a.annotation)}

    def spell(self, skip: frozenset[int]) -> None:
        self._block(self.function.body, skip)

    def _block(self, block: list[ast.stmt], skip: frozenset[int]) -> None:
        spell_comprehensions(self.function, block, self.prefix)
        for s in list(block):
            if isinstance(s, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if isinstance(s, ast.For | ast.While) and s.lineno not in skip and not s.orelse:
                form = self._spell_one(s, block)
                if form:
                    form.put_in_place()
                    self.forms.append(form)
                    s = form.loop
            for name in ("body", "orelse", "finalbody", "handlers", "cases"):
                inner = getattr(s, name, None)
                if isinstance(inner, list):
                    self._block(inner, skip)

    def name(self, what: str) -> str:
        return f"{self.prefix}{what}{len(self.forms)}"

    def _spell_one(self, s: ast.For | ast.While, block: list[ast.stmt]) -> Form | None:
        form = self._while(s, block) if isinstance(s, ast.While) else self._for(s, block)
        loop = form.loop if form else s
        grown = list(self._growing(loop)) if isinstance(loop, ast.For) else []
        if grown and form is None:
            form = Form(s, ast.For(s.target, s.iter, list(s.body), [], None), block)
        if form:
            for i, (place, o, item, dim) in enumerate(grown):
                self._grow(form, f"{self.name('grown')}_{i}", place, o, item, dim)
            ast.copy_location(form.loop, s)
            for statement in (*form.before, *form.loop.body, *form.after):
                for node in ast.walk(statement):
                    if isinstance(node, ast.expr | ast.stmt) and not hasattr(node, "lineno"):
                        ast.copy_location(node, s)
            for node in ast.walk(form.loop.iter):
                if not hasattr(node, "lineno"):
                    ast.copy_location(node, s)
            if not hasattr(form.loop.target, "lineno"):
                ast.copy_location(form.loop.target, s)
            if form.only_if:
                ast.fix_missing_locations(ast.copy_location(form.only_if, s))
            seen: set[int] = set()
            for statement in (*form.before, form.loop, *form.after):
                _unshare(statement, seen)
        return form

    def _for(self, s: ast.For, block: list[ast.stmt]) -> Form | None:
        site = f"{self.filename}:{s.lineno}"
        try:
            found: Iterable = spell(s, self.name(""), self.prefix, site, self.tensors)
        except Unknown:
            return None
        stop = found.length
        range_call = ast.Call(ast.Name("range", ast.Load()), [stop], [])
        loop = ast.For(ast.Name(found.index, ast.Store()), range_call, [*found.head, *s.body], [], None)
        return Form(s, loop, block, found.before, [], {id(h): [] for h in found.head}, found.only_if)

    def _while(self, s: ast.While, block: list[ast.stmt]) -> Form | None:
        """A counted `while`: its counter goes one constant step, once, as a statement of the body itself."""
        test = s.test
        if not isinstance(test, ast.Compare) or len(test.ops) != 1 or type(test.ops[0]) not in STEPS_TOWARDS:
            return None
        counter, towards = test.left, STEPS_TOWARDS[type(test.ops[0])]
        bound = test.comparators[0]
        changed = bound_names(s.body)
        if isinstance(bound, ast.Name) and bound.id in changed:
            counter, bound, towards = bound, counter, -towards
        if not isinstance(counter, ast.Name) or counter.id not in changed or not _is_fixed(bound, changed):
            return None
        t = counter.id
        if not any(isinstance(n, ast.Subscript) and t in read_names(n.slice) for n in walk_scope(s.body)):
            return None
        stores = [n for n in walk_scope(s.body) if isinstance(n, ast.Name) and n.id == t and _is_store(n)]
        advances = [(i, step) for i, inner in enumerate(s.body) if (step := _advance(inner, t))]
        place, step = advances[0] if advances else (0, 0)
        late = read_names_in(s.body[place + 1 :]) if advances else set()
        if len(stores) != 1 or len(advances) != 1 or step * towards <= 0 or t in late:
            detail = f"{t} does not advance by one constant at the end of the body"
            where = max(stores, key=lambda n: n.lineno) if len(stores) != 1 or not advances else s.body[place]
            self.refused.append(Refused("loop_index_used", detail, f"{_file(self.filename)}:{where.lineno}"))
            return None
        if isinstance(test.ops[0], ast.LtE | ast.GtE):
            bound = ast.BinOp(bound, ast.Add(), ast.Constant(towards))
        first, count = self.name("first"), self.name("count")
        begin, advance = ast.Name(first, ast.Load()), ast.Constant(step)
        steps = ast.Call(ast.Name(self.prefix + "count_steps", ast.Load()), [begin, bound, advance], [])
        end = ast.BinOp(begin, ast.Add(), ast.BinOp(ast.Name(count, ast.Load()), ast.Mult(), advance))
        at_least_none = ast.Call(ast.Name(self.prefix + "at_least_none", ast.Load()), [steps], [])
        before: list[ast.stmt] = [
            ast.Assign([ast.Name(first, ast.Store())], ast.Name(t, ast.Load())),
            ast.Assign([ast.Name(count, ast.Store())], at_least_none),
        ]
        after: list[ast.stmt] = [ast.Assign([ast.Name(t, ast.Store())], end)]
        filler = ast.Pass()
        body = [filler if i == place else inner for i, inner in enumerate(s.body)]
        call = ast.Call(ast.Name("range", ast.Load()), [begin, copy.deepcopy(end), advance], [])
        loop = ast.For(ast.Name(t, ast.Store()), call, body, [], None)
        return Form(s, loop, block, before, after, {id(filler): [s.body[place]]})

    def _growing(self, loop: ast.For) -> Iterator[tuple[int, str, ast.expr, ast.expr]]:
        """(place, o, y, dim) of statements `o = torch.cat([o, y], dim)` of the body, the only ones that touch `o`."""
        for place, s in enumerate(loop.body):
            if not isinstance(s, ast.Assign) or len(s.targets) != 1 or not isinstance(s.targets[0], ast.Name):
                continue
            o, call = s.targets[0].id, s.value
            if not isinstance(call, ast.Call) or ast.unparse(call.func) not in ("torch.cat", "torch.concat"):
                continue
            items = call.args[0] if call.args else None
            given = [*call.args[1:], *(k.value for k in call.keywords if k.arg in ("dim", "axis"))]
            if not isinstance(items, ast.List | ast.Tuple) or len(items.elts) != 2 or len(given) > 1:
                continue
            if len(call.args) - 1 + len(call.keywords) != len(given):
                continue
            old, item = items.elts
            uses = [n for n in walk_scope(loop.body) if isinstance(n, ast.Name) and n.id == o]
            if isinstance(old, ast.Name) and old.id == o and len(uses) == 2:
                yield place, o, item, given[0] if given else ast.Constant(0)

    def _grow(self, form: Form, items: str, place: int, o: str, item: ast.expr, dim: ast.expr) -> None:
        old = form.loop.body[place]
        append = ast.Call(ast.Attribute(ast.Name(items, ast.Load()), "append", ast.Load()), [item], [])
        new = ast.copy_location(ast.Expr(append), old)
        form.loop.body[place] = new
        form.back[id(new)] = [old]
        form.before.append(ast.Assign([ast.Name(items, ast.Store())], ast.List([], ast.Load())))
        site = ast.Constant(f"{self.filename}:{form.original.lineno}")
        given = [ast.Name(items, ast.Load()), ast.Name(o, ast.Load()), dim, site]
        joined = ast.Call(ast.Name(self.prefix + "grow", ast.Load()), given, [])
        form.after.append(ast.Assign([ast.Name(o, ast.Store())], joined))


def free_prefix(function: ast.AST) -> str:
    """What no name of the function starts with."""
    taken = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
    taken |= {n.arg for n in ast.walk(function) if isinstance(n, ast.arg)}
    prefix = "_fla_"
    while any(name.startswith(prefix) for name in taken):
        prefix += "_"
    return prefix


def _unshare(node: ast.AST, seen: set[int]) -> None:
    """Give every place in the tree a node of its own: the analysis tells places apart by their nodes."""
    for name, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        for i, child in enumerate(children):
            if not isinstance(child, ast.expr | ast.stmt):
                continue
            if id(child) in seen:
                child = copy.deepcopy(child)
                if isinstance(value, list):
                    value[i] = child
                else:
                    setattr(node, name, child)
            seen.add(id(child))
            _unshare(child, seen)


def read_names_in(statements: list[ast.stmt]) -> set[str]:
    return {name for s in statements for name in read_names(s)}


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def _is_tensor_type(annotation: ast.expr | None) -> bool:
    text = annotation.value if isinstance(annotation, ast.Constant) else annotation and ast.unparse(annotation)
    return text in ("Tensor", "torch.Tensor")


def _is_store(n: ast.Name) -> bool:
    return isinstance(n.ctx, ast.Store | ast.Del)


def _is_fixed(e: ast.expr, changed: set[str]) -> bool:
    calls = [n for n in ast.walk(e) if isinstance(n, ast.Call)]
    measures = [ast.unparse(n.func).split(".")[-1] in MEASURES | {"len"} for n in calls]
    return all(measures) and not read_names(e) & changed


def _advance(s: ast.stmt, t: str) -> int:
    """The step of `t += 1`, `t -= 1` and `t = t + 1`, else 0."""
    if isinstance(s, ast.AugAssign) and isinstance(s.target, ast.Name) and s.target.id == t:
        op, by = s.op, s.value
    elif isinstance(s, ast.Assign) and len(s.targets) == 1 and ast.unparse(s.targets[0]) == t:
        if not isinstance(s.value, ast.BinOp) or ast.unparse(s.value.left) != t:
            return 0
        op, by = s.value.op, s.value.right
    else:
        return 0
    if not isinstance(by, ast.Constant) or type(by.value) is not int or not isinstance(op, ast.Add | ast.Sub):
        return 0
    return by.value if isinstance(op, ast.Add) else -by.value


def _file(path: str) -> str:
    return path.replace("\\", "/").split("/")[-1]

"""What a `for` runs over, as subscripts by one index: tensors taken apart, ranges, and their zips and reversals."""

import ast
import copy
from dataclasses import dataclass, field

EVIDENT = frozenset(
    "transpose permute movedim moveaxis swapaxes swapdims flip float double half bfloat16 contiguous clone detach "
    "unflatten flatten reshape view unsqueeze squeeze".split()
)


class Unknown(Exception):
    """The loop runs over something else."""


@dataclass
class Iterable:
    """How often the loop goes round, its index, and what each round starts with.

    `before` holds what is computed once, `only_if` asks whether that is a loop over tensors at all.
    """

    index: str
    length: ast.expr
    before: list[ast.stmt]
    head: list[ast.stmt]
    only_if: ast.expr | None


def spell(loop: ast.For, name: str, prefix: str, site: str, tensors: set[str]) -> Iterable:
    """Return the loop's iterable; names that start with `name` are free.

    Raises Unknown.
    """
    if isinstance(loop.iter, ast.Call) and isinstance(loop.iter.func, ast.Name) and loop.iter.func.id == "range":
        raise Unknown
    speller = _Speller(loop, name, prefix, site, tensors)
    length = speller.take(loop.iter, loop.target, backwards=False)
    only_if = None
    if speller.asked:
        called = {ast.unparse(n.func) for s in loop.body for n in ast.walk(s) if isinstance(n, ast.Call)}
        if called & {n.id for n in ast.walk(loop.target) if isinstance(n, ast.Name)}:
            raise Unknown
        only_if = ast.Call(ast.Name(prefix + "are_tensors", ast.Load()), speller.asked, [])
    return Iterable(speller.index, length, speller.before, speller.head, only_if)


@dataclass
class _Speller:
    loop: ast.For
    name: str
    prefix: str
    site: str
    tensors: set[str]
    before: list[ast.stmt] = field(default_factory=list)
    head: list[ast.stmt] = field(default_factory=list)
    asked: list[ast.expr] = field(default_factory=list)

    @property
    def index(self) -> str:
        return f"{self.name}_i"

    def keep(self, value: ast.expr) -> ast.Name:
        """A name for a value that is computed once, before the loop."""
        name = f"{self.name}_{len(self.before)}"
        self.before.append(ast.Assign([ast.Name(name, ast.Store())], value))
        return ast.Name(name, ast.Load())

    def helper(self, name: str, *args: ast.expr, **kwargs: ast.expr) -> ast.Call:
        keywords = [ast.keyword(k, v) for k, v in kwargs.items()]
        return ast.Call(ast.Name(self.prefix + name, ast.Load()), list(args), keywords)

    def take(self, it: ast.expr, target: ast.expr, backwards: bool) -> ast.expr:
        """Let each round start by giving `target` its value; returns the number of rounds."""
        if not isinstance(it, ast.Call) or not isinstance(it.func, ast.Name):
            return self._tensor(it, target, backwards)
        called = it.func.id
        if any(isinstance(a, ast.Starred) for a in it.args):
            raise Unknown
        if called in ("list", "tuple") and len(it.args) == 1 and not it.keywords:
            return self.take(it.args[0], target, backwards)
        if called == "reversed" and len(it.args) == 1 and not it.keywords:
            if backwards:
                raise Unknown
            return self.take(it.args[0], target, True)
        if called == "range":
            return self._range(it, target, backwards)
        if called == "enumerate" and not backwards:
            return self._enumerate(it, target)
        if called == "zip" and not backwards:
            return self._zip(it, target)
        raise Unknown

    def _give(self, target: ast.expr, value: ast.expr) -> None:
        self.head.append(ast.Assign([copy.deepcopy(target)], value))

    def _parts(self, target: ast.expr) -> list[ast.expr]:
        if not isinstance(target, ast.Tuple | ast.List) or any(isinstance(e, ast.Starred) for e in target.elts):
            raise Unknown
        return target.elts

    def _zip(self, it: ast.Call, target: ast.expr) -> ast.expr:
        parts = self._parts(target)
        strict = next((k.value for k in it.keywords if k.arg == "strict"), ast.Constant(False))
        if len(parts) != len(it.args) or len(it.keywords) > 1 or not isinstance(strict, ast.Constant) or not parts:
            raise Unknown
        counts = [self.take(a, part, False) for a, part in zip(it.args, parts, strict=True)]
        if len(counts) == 1:
            return counts[0]
        return self.keep(self.helper("shortest", *counts, strict=strict, site=ast.Constant(self.site)))

    def _enumerate(self, it: ast.Call, target: ast.expr) -> ast.expr:
        parts = self._parts(target)
        given = [*it.args[1:], *(k.value for k in it.keywords if k.arg == "start")]
        if len(parts) != 2 or not it.args or len(given) > 1 or len(it.args) - 1 + len(it.keywords) != len(given):
            raise Unknown
        count = self.take(it.args[0], parts[1], False)
        number: ast.expr = ast.Name(self.index, ast.Load())
        if given:
            start = given[0] if isinstance(given[0], ast.Constant) else self.keep(given[0])
            number = ast.BinOp(start, ast.Add(), number)
        self._give(parts[0], number)
        return count

    def _range(self, it: ast.Call, target: ast.expr, backwards: bool) -> ast.expr:
        if it.keywords or not 1 <= len(it.args) <= 3:
            raise Unknown
        args = [a if isinstance(a, ast.Constant) else self.keep(a) for a in it.args]
        start, stop = (args[0], args[1]) if len(args) > 1 else (ast.Constant(0), args[0])
        step = args[2] if len(args) > 2 else ast.Constant(1)
        count = self.keep(self.helper("count_steps", start, stop, step))
        self._give(target, ast.BinOp(start, ast.Add(), ast.BinOp(self._place(count, backwards), ast.Mult(), step)))
        return count

    def _place(self, count: ast.expr, backwards: bool) -> ast.expr:
        index = ast.Name(self.index, ast.Load())
        if not backwards:
            return index
        return ast.BinOp(ast.BinOp(count, ast.Sub(), ast.Constant(1)), ast.Sub(), index)

    def _tensor(self, it: ast.expr, target: ast.expr, backwards: bool) -> ast.expr:
        base, axis, parts, split = _taken_apart(it)
        pure = all(isinstance(n, ast.Name | ast.Attribute | ast.expr_context) for n in ast.walk(base))
        method = base.func.attr if isinstance(base, ast.Call) and isinstance(base.func, ast.Attribute) else ""
        certain = isinstance(base, ast.Name) and base.id in self.tensors
        if base is it and not certain and method not in EVIDENT:
            if not pure:
                raise Unknown
        if pure and not certain:
            self.asked.append(copy.deepcopy(base))
        x = self.keep(base)
        size: ast.expr = ast.Subscript(ast.Attribute(x, "shape", ast.Load()), ast.Constant(axis), ast.Load())
        entry: ast.expr
        if parts is None:
            count = self.keep(size)
            entry = self._place(count, backwards)
        else:
            site = ast.Constant(self.site)
            width = self.keep(self.helper("chunk_width", x, parts, ast.Constant(axis), ast.Constant(split), site))
            # The last piece may be shorter.
            count = self.keep(self.helper("count_steps", ast.Constant(0), size, width))
            place = self._place(count, backwards)
            low = ast.BinOp(place, ast.Mult(), width)
            entry = ast.Slice(low, ast.BinOp(copy.deepcopy(low), ast.Add(), width))
        around: list[ast.expr] = [ast.Slice() for _ in range(axis if axis >= 0 else -1 - axis)]
        entries = [*around, entry] if axis >= 0 else [ast.Constant(Ellipsis), entry, *around]
        where = entries[0] if len(entries) == 1 else ast.Tuple(entries, ast.Load())
        self._give(target, ast.Subscript(x, where, ast.Load()))
        return count


def _taken_apart(it: ast.expr) -> tuple[ast.expr, int, ast.expr | None, bool]:
    """(tensor, axis, size or number of pieces, whether it is their size) of `x.unbind(1)`, `x.split(1, dim=1)`, ..."""
    if not isinstance(it, ast.Call):
        if isinstance(it, ast.Name | ast.Attribute):
            return it, 0, None, False
        raise Unknown
    if not isinstance(it.func, ast.Attribute):
        raise Unknown
    method, args = it.func.attr, list(it.args)
    if method not in ("unbind", "split", "chunk"):
        return it, 0, None, False
    base: ast.expr = it.func.value
    if isinstance(base, ast.Name) and base.id == "torch":
        if not args:
            raise Unknown
        base = args.pop(0)
    parts = None if method == "unbind" else args.pop(0) if args else None
    given = [*args, *(k.value for k in it.keywords if k.arg == "dim")]
    known = len(given) <= 1 and len(args) + len(it.keywords) == len(given)
    if not known or (method != "unbind" and (parts is None or isinstance(parts, ast.List | ast.Tuple))):
        raise Unknown
    if isinstance(parts, ast.Constant) and type(parts.value) is not int:
        raise Unknown
    try:
        axis = ast.literal_eval(given[0]) if given else 0
    except ValueError as error:
        raise Unknown from error
    if type(axis) is not int:
        raise Unknown
    return base, axis, parts, method == "split"

"""What a loop body does with its index, as far as the index and what the loop leaves alone decide it.

    i = T - 1 - t                 an alias: `x[:, i]` is read from right to left
    x[:, t - 1], x[:, t:t + C]    positions, affine in the index: each step is C further, or one back
    if t > 0:                     a test, settled for every step before the loop runs
    S * 0.9 ** t                  a number, the same whatever the data are

Only the shape of the expressions is judged here; that they are numbers, and which ones, shows in tracing.
"""

import ast
import copy
from collections.abc import Iterable, Mapping

from fla_compile.passes.loop_names import COMPREHENSIONS, SCOPES, comprehension_targets, read_names

COMPARISONS: Mapping[type[ast.cmpop], str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}
ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.FloorDiv, ast.Mod)
DIVISIONS = (ast.Div, ast.FloorDiv, ast.Mod)
MEASURES = frozenset("size dim numel".split())


class Index:
    """The names that stand for the step in one loop body: the loop's target and its aliases."""

    def __init__(self, loop: ast.For, changing: set[str]):
        assert isinstance(loop.target, ast.Name)
        self.name = loop.target.id
        self.changing = changing | comprehension_targets(loop.body)
        self.aliases: dict[str, ast.expr] = {}
        self.caps: dict[str, tuple[ast.expr, ast.expr]] = {}
        self.dropped: dict[int, ast.stmt] = {}
        for place, s in enumerate(loop.body):
            if isinstance(s, ast.Assign) and len(s.targets) == 1 and isinstance(s.targets[0], ast.Name):
                name = s.targets[0].id
                if self.mentioned(s.value) and self.is_affine(s.value) and _bound_here_first(loop.body, place, name):
                    self.aliases[name] = self.resolve(s.value)
                    self.dropped[id(s)] = s
                elif (cap := self.capped(s.value)) and _only_ends_slices(loop.body, place, name):
                    self.caps[name] = cap
                    self.dropped[id(s)] = s
        self.ignored = {id(n) for s in self.dropped.values() for n in ast.walk(s)}

    @property
    def names(self) -> set[str]:
        return {self.name, *self.aliases, *self.caps}

    def mentioned(self, node: ast.AST | None) -> bool:
        return node is not None and any(isinstance(n, ast.Name) and n.id in self.names for n in ast.walk(node))

    def is_fixed(self, e: ast.expr) -> bool:
        """Whether the expression has one value for all steps, and may be evaluated before the loop."""
        for n in ast.walk(e):
            if isinstance(n, ast.Name) and (n.id in self.names or n.id in self.changing):
                return False
            if isinstance(n, ast.Call) and not _is_measure(n):
                return False
            if isinstance(n, (*SCOPES, *COMPREHENSIONS, ast.NamedExpr, ast.Await, ast.Slice)):
                return False
        return True

    def is_affine(self, e: ast.expr) -> bool:
        if isinstance(e, ast.Name) and e.id in self.caps:
            return False
        if (isinstance(e, ast.Name) and e.id in self.names) or self.is_fixed(e):
            return True
        if isinstance(e, ast.UnaryOp):
            return isinstance(e.op, ast.USub) and self.is_affine(e.operand)
        if isinstance(e, ast.BinOp) and isinstance(e.op, ast.Add | ast.Sub):
            return self.is_affine(e.left) and self.is_affine(e.right)
        if isinstance(e, ast.BinOp) and isinstance(e.op, ast.Mult):
            return (
                self.is_affine(e.left) and self.is_affine(e.right) and (self.is_fixed(e.left) or self.is_fixed(e.right))
            )
        return False

    def capped(self, e: ast.expr) -> tuple[ast.expr, ast.expr] | None:
        """(position, limit) of `min(position, limit)` where the limit has one value for all steps."""
        if isinstance(e, ast.Name) and e.id in self.caps:
            return self.caps[e.id]
        if not isinstance(e, ast.Call) or ast.unparse(e.func) != "min" or len(e.args) != 2 or e.keywords:
            return None
        for position, limit in (e.args, e.args[::-1]):
            if self.mentioned(position) and self.is_affine(position) and self.is_fixed(limit):
                return self.resolve(position), limit
        return None

    def is_numeric(self, e: ast.AST) -> bool:
        """Whether the expression is arithmetic on the index and on what is the same for all steps."""
        if not isinstance(e, ast.expr):
            return False
        if isinstance(e, ast.Name) and e.id in self.names:
            return e.id not in self.caps
        if isinstance(e, ast.UnaryOp):
            return isinstance(e.op, ast.USub | ast.UAdd) and self.is_numeric(e.operand)
        if isinstance(e, ast.BinOp) and isinstance(e.op, ARITHMETIC):
            if isinstance(e.op, ast.Pow) and not self.is_fixed(e):
                return self._is_real_power(e)
            if isinstance(e.op, DIVISIONS) and not self.is_affine(e.right):
                return False
            return self.is_numeric(e.left) and self.is_numeric(e.right)
        return self.is_fixed(e)

    def _is_real_power(self, e: ast.BinOp) -> bool:
        """Whether the power is of real numbers to a real one in every step, if it is in the first and the last."""
        if not self.is_fixed(e.left):
            whole = isinstance(e.right, ast.Constant) and type(e.right.value) is int and e.right.value >= 0
            return whole and self.is_numeric(e.left)
        integral = (ast.Name, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.expr_context)
        names = read_names(e.right) <= self.names
        whole = names and all(
            isinstance(n, integral) or (isinstance(n, ast.Constant) and type(n.value) is int) for n in ast.walk(e.right)
        )
        positive = isinstance(e.left, ast.Constant) and isinstance(e.left.value, int | float) and e.left.value > 0
        return self.is_affine(e.right) and (whole or positive)

    def divisors(self, e: ast.expr) -> list[ast.expr]:
        """What the expression divides by that differs from step to step; affine in the index."""
        divisions = [n for n in ast.walk(e) if isinstance(n, ast.BinOp) and isinstance(n.op, DIVISIONS)]
        return [self.resolve(n.right) for n in divisions if not self.is_fixed(n.right)]

    def resolve(self, e: ast.expr) -> ast.expr:
        """The expression in terms of the loop's own index."""
        return _Resolve(self.aliases).visit(copy.deepcopy(e))

    def difference(self, test: ast.expr) -> tuple[str, ast.expr] | None:
        """(op, d) if the test says `d op 0` for a `d` that is affine in the index."""
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and type(test.ops[0]) in COMPARISONS:
            left, right = test.left, test.comparators[0]
            if self.mentioned(test) and self.is_affine(left) and self.is_affine(right):
                return COMPARISONS[type(test.ops[0])], self.resolve(ast.BinOp(left, ast.Sub(), right))
        elif isinstance(test, ast.Name) and test.id in self.names - self.caps.keys():
            return "!=", self.resolve(test)
        return None


class _Resolve(ast.NodeTransformer):
    def __init__(self, aliases: Mapping[str, ast.expr]):
        self.aliases = aliases

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return copy.deepcopy(self.aliases.get(node.id, node))


def _bound_here_first(body: list[ast.stmt], place: int, name: str) -> bool:
    """Whether the statement at `place` alone binds the name and nothing before it uses it."""

    def uses(statements: Iterable[ast.stmt]) -> list[ast.Name]:
        return [n for s in statements for n in ast.walk(s) if isinstance(n, ast.Name) and n.id == name]

    return len(uses(body[: place + 1])) == 1 and all(isinstance(n.ctx, ast.Load) for n in uses(body[place + 1 :]))


def _only_ends_slices(body: list[ast.stmt], place: int, name: str) -> bool:
    """Whether the name, bound at `place` alone, is used for nothing but the ends of slices."""
    ends = {id(n.upper) for s in body for n in ast.walk(s) if isinstance(n, ast.Slice)}
    uses = [n for s in body for n in ast.walk(s) if isinstance(n, ast.Name) and n.id == name]
    return _bound_here_first(body, place, name) and all(id(n) in ends for n in uses if isinstance(n.ctx, ast.Load))


def _is_measure(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Name):
        return call.func.id == "len" and not call.keywords
    return isinstance(call.func, ast.Attribute) and call.func.attr in MEASURES

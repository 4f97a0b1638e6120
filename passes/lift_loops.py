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

import ast
import functools
import opcode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from types import CodeType, FunctionType

from fla_compile.passes.loop_analysis import describe
from fla_compile.passes.loop_forms import Form, Speller, free_prefix
from fla_compile.passes.loop_names import COMPREHENSIONS, walk_scope
from fla_compile.passes.loop_plan import LoopPlan
from fla_compile.passes.loop_rewrite import rewrite_function
from fla_compile.passes.loop_scope import Scope
from fla_compile.passes.loop_source import compile_function, parse_function, same_program
from fla_compile.passes.records import Refusal, Refused


@dataclass(frozen=True)
class LoopSite:
    """A lifted loop: where it stands, and in which function; perhaps not `certain` to be a loop over time."""

    filename: str
    line: int
    function: str
    certain: bool = True


@dataclass(frozen=True)
class Lifted:
    """A function's twin, None if nothing lifts, with the loops it lifts and those it leaves."""

    twin: FunctionType | None
    loops: tuple[LoopSite, ...]
    refusals: tuple[Refusal, ...]


NOTHING = Lifted(None, (), ())
LOOPS = frozenset(n for name, n in opcode.opmap.items() if name == "FOR_ITER" or "JUMP_BACKWARD" in name)
BUILTINS = frozenset("range zip enumerate reversed list tuple len min".split())


def lift_loops(fn: FunctionType, *, skip: frozenset[tuple[str, int]] = frozenset()) -> Lifted:
    """Return `fn`'s twin for Dynamo to trace; loops whose (filename, line) is in `skip` stay as written."""
    code = fn.__code__
    if not _has_loop(code) or not BUILTINS.isdisjoint(fn.__globals__):
        return NOTHING
    mine = frozenset(line for name, line in skip if name == code.co_filename)
    twin_code, loops, refusals = _lift_code(code, code.co_filename, mine)
    if twin_code is None:
        return Lifted(None, loops, refusals)
    twin = FunctionType(twin_code, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    twin.__kwdefaults__ = fn.__kwdefaults__
    twin.__qualname__ = fn.__qualname__
    twin.__module__ = fn.__module__
    twin.__doc__ = fn.__doc__
    return Lifted(twin, loops, refusals)


def _has_loop(code: CodeType) -> bool:
    # Until Python 3.12 a comprehension is a code object of its own.
    codes = [code, *(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name in ("<listcomp>", "<genexpr>"))]
    return any(not LOOPS.isdisjoint(c.co_code[::2]) for c in codes) and not _hides_builtins(code)


def _hides_builtins(code: CodeType) -> bool:
    return not BUILTINS.isdisjoint((*code.co_varnames, *code.co_cellvars, *code.co_freevars))


@functools.lru_cache(maxsize=4096)
def _lift_code(
    code: CodeType, filename: str, skip: frozenset[int]
) -> tuple[CodeType | None, tuple[LoopSite, ...], tuple[Refusal, ...]]:
    """The file is a key of the cache: code objects of two files are equal if they differ in nothing else."""
    tree = parse_function(code)
    if tree is None:
        return None, (), ()
    module, function = tree
    if not any(isinstance(n, (ast.Subscript, ast.For, ast.While, *COMPREHENSIONS)) for n in walk_scope(function.body)):
        return None, (), ()
    prefix = free_prefix(function)
    speller = Speller(function, filename, prefix)
    speller.spell(skip)
    scope = Scope(function, filename, prefix)
    forms = {id(form.loop): form for form in speller.forms}
    plans, refusals = _plan(scope, skip, forms)
    refusals += tuple(refused.record("recurrence") for refused in speller.refused)
    if not plans:
        return None, (), refusals
    site = f"{PurePath(filename).name}:{plans[0].loop.lineno}"
    original = compile_function(code, *parse_function(code))  # type: ignore[misc]
    if original is None or not same_program(original, code):
        detail = "the source on disk is not what this function was compiled from"
        return None, (), (Refusal("recurrence", "source_mismatch", detail, site),)
    planned = {id(plan.loop) for plan in plans}
    for form in reversed(speller.forms):
        if id(form.loop) in planned:
            form.restore_body()
        else:
            form.put_back(scope.parents)
    rewrite_function(scope, plans, forms)
    ast.fix_missing_locations(module)
    twin = compile_function(code, module, function)
    # Guards on the user's cells go by position, so the twin must have the same ones in the same order.
    if twin is None or twin.co_freevars != code.co_freevars:
        return None, (), (Refusal("recurrence", "source_mismatch", "the twin's closure differs", site),)
    sites = tuple(LoopSite(filename, p.loop.lineno, code.co_qualname, not _is_asked(forms, p.loop)) for p in plans)
    return twin, sites, refusals


def _is_asked(forms: Mapping[int, Form], loop: ast.For) -> bool:
    """Whether only the values can tell that this is a loop over a tensor."""
    return id(loop) in forms and forms[id(loop)].only_if is not None


def _plan(scope: Scope, skip: frozenset[int], forms: Mapping[int, Form]) -> tuple[list[LoopPlan], tuple[Refusal, ...]]:
    """Plan the outermost time loops; one that carries nothing, or may be no time loop, yields to one inside it."""

    def visit(loop: ast.For) -> tuple[list[LoopPlan], list[Refusal]]:
        own: list[LoopPlan] = []
        refusals: list[Refusal] = []
        asked = _is_asked(forms, loop)
        if loop.lineno not in skip:
            try:
                plan = describe(loop, scope)
                own = [plan] if plan else []
            except Refused as refused:
                refusals = [] if asked else [refused.record("recurrence")]
        if own and own[0].carries and not asked:
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

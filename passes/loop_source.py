"""From a function's code object to its syntax tree at the user's own lines, and from the tree back to code."""

import __future__

import ast
import dis
import functools
import inspect
import linecache
from types import CodeType

FUTURE_FLAGS = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)


def parse_function(code: CodeType) -> tuple[ast.Module, ast.FunctionDef | ast.AsyncFunctionDef] | None:
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


def compile_function(
    code: CodeType, module: ast.Module, function: ast.FunctionDef | ast.AsyncFunctionDef
) -> CodeType | None:
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


def same_program(ours: CodeType, theirs: CodeType) -> bool:
    """Whether our compilation of the source on disk is what Python runs."""
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

"""Which states a call in a loop's body may change in place, as far as syntax tells: tracing shows which it does.

def update(S, k, v):                        for t in range(T):
    S.mul_(0.9).add_(k * v)                     update(S, k[:, t], v[:, t])
"""

import ast
import builtins

import torch

from fla_compile.passes.loop_accesses import Accesses
from fla_compile.passes.loop_names import COMPREHENSIONS, METADATA, SCOPES, is_fresh, sources
from fla_compile.passes.loop_plan import Watch
from fla_compile.passes.loop_scope import Body, appended

TENSOR_METHODS = frozenset(name for name in dir(torch.Tensor) if not name.startswith("_"))
QUIET = TENSOR_METHODS | frozenset("get keys values items".split())
# Methods that are called for what they do elsewhere; what a module's function does is not known either.
ELSEWHERE = frozenset("append extend insert remove clear add info debug warning error log print write".split())


def is_unknown(call: ast.Call, scope_locals: set[str]) -> bool:
    """Whether the call may run code of the user's."""
    func = call.func
    if isinstance(func, ast.Name):
        return not hasattr(builtins, func.id)
    if not isinstance(func, ast.Attribute):
        return True
    root = func.value
    while isinstance(root, ast.Attribute):
        root = root.value
    name = root.id if isinstance(root, ast.Name) else ""
    library = name in ("torch", "F", "nn", "einops", "math") and name not in scope_locals
    return not library and func.attr not in QUIET


def shown(call: ast.Call) -> set[str]:
    """Names of the values that the call may change: its arguments, and the object of a method."""
    given = [*call.args, *(k.value for k in call.keywords)]
    owner = [call.func.value] if isinstance(call.func, ast.Attribute) else []
    return {name.split(".")[0] for value in (*given, *owner) for name in sources(_plain(value))}


def _plain(value: ast.expr) -> ast.expr:
    """The value, None in place of what only measures a tensor."""
    return ast.Constant(None) if isinstance(value, ast.Attribute) and value.attr in METADATA else value


def is_effect(body: Body, node: ast.Expr) -> bool:
    """Whether the statement calls what may change a state of this function in place."""
    call = node.value
    if not isinstance(call, ast.Call) or appended(node) or not is_unknown(call, body.scope.locals):
        return False
    if isinstance(call.func, ast.Attribute) and call.func.attr in ELSEWHERE:
        return False
    return bool(shown(call) & body.scope.locals)


def find_watched(body: Body, accesses: Accesses, carried: set[str], defined: set[str]) -> dict[str, bool]:
    """Names that calls may change in place, each with whether it is a carry only if they do."""
    taken = body.written | body.lists | body.index.names | body.scope.captured(body.loop) | body.scope.declared
    taken |= {n.id for read in accesses.reads for n in ast.walk(read.base) if isinstance(n, ast.Name)}
    found: dict[str, bool] = {name: False for name in body.containers}
    for node in body.nodes:
        if not isinstance(node, ast.Call) or not is_unknown(node, body.scope.locals):
            continue
        for name in shown(node):
            if name in carried:
                found[name] = False
            elif name in defined - body.bound - taken and name not in found and _is_certain(body, accesses, node, name):
                found[name] = True
    return found


def _is_certain(body: Body, accesses: Accesses, node: ast.Call, name: str) -> bool:
    """Whether the name surely has a value as the loop starts."""
    if name in body.scope.parameters:
        return True
    for parent in body.scope.ancestors(node):
        if parent is body.loop:
            break
        if isinstance(parent, (*SCOPES, *COMPREHENSIONS)):
            return False
    return not accesses.guard(node)[1]


def watch(body: Body, name: str, tentative: bool) -> Watch:
    fresh = body.scope.starts_as(name, body.loop, _is_fresh_state)
    keys = []
    for n in body.nodes:
        if not isinstance(n, ast.Subscript) or not isinstance(n.ctx, ast.Store):
            continue
        key = n.slice
        if isinstance(n.value, ast.Name) and n.value.id == name:
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                keys.append(key.value)
    return Watch(tentative, fresh, tuple(dict.fromkeys(keys)))


def _is_fresh_state(value: ast.expr) -> bool:
    if isinstance(value, ast.Tuple | ast.List):
        return all(_is_fresh_state(e) for e in value.elts)
    if isinstance(value, ast.Dict):
        return all(_is_fresh_state(e) for e in value.values)
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id[:1].isupper():
        return all(_is_fresh_state(e) for e in (*value.args, *(k.value for k in value.keywords)))
    return is_fresh(value)

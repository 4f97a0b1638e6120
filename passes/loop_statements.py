"""Whether every statement of a loop body, and every use of the lists it fills, has a counterpart in a scan."""

import ast

from fla_compile.passes.loop_names import SCOPES, assigned_value, is_in_place_name, uses_beyond_metadata
from fla_compile.passes.loop_scope import Body, appended, is_empty_list, mentions, range_of

JOINS = frozenset("stack cat concat concatenate".split())
TYPE_TESTS = frozenset("isinstance callable hasattr is_tensor".split())


def check_statements(body: Body) -> None:
    """Refuse statements that have no counterpart in a scan."""
    if body.loop.orelse:
        body.refuse("data_dependent_branch", "for ... else", body.loop.orelse[0])
    for node in body.nodes:
        if isinstance(node, ast.Break | ast.Continue | ast.Return | ast.While | ast.Try | ast.TryStar | ast.Raise):
            word = type(node).__name__.lower()
            body.refuse("data_dependent_branch", f"{word} in the loop", node)
        if isinstance(node, ast.Yield | ast.YieldFrom | ast.Await | ast.AsyncFor | ast.AsyncWith):
            body.refuse("data_dependent_branch", "the loop suspends the function", node)
        if isinstance(node, ast.If | ast.IfExp | ast.Assert):
            _check_test(body, node.test, node)
        elif isinstance(node, ast.For):
            if node.orelse:
                body.refuse("data_dependent_branch", "for ... else", node.orelse[0])
        elif isinstance(node, ast.Expr):
            _check_effect(body, node)
        elif isinstance(node, ast.stmt) and not isinstance(
            node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Pass | ast.Delete
        ):
            body.refuse("unsupported_statement", f"{type(node).__name__.lower()} in the loop", node)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            body.refuse("state_escapes", f"the loop assigns {ast.unparse(node)}", node)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            _check_store(body, node)
    for name in sorted(body.bound & (body.scope.declared | body.scope.captured(body.loop))):
        body.refuse("state_escapes", f"{name} is shared with another function", body.binding(name))


def _check_test(body: Body, test: ast.expr, node: ast.AST) -> None:
    if mentions(test, body.index):
        body.refuse("loop_index_used", f"branch on {ast.unparse(test)}", test)
    if isinstance(test, ast.BoolOp):
        for part in test.values:
            _check_test(body, part, node)
    elif isinstance(test, ast.UnaryOp):
        _check_test(body, test.operand, node)
    elif isinstance(test, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in test.ops):
        return
    elif isinstance(test, ast.Call) and ast.unparse(test.func).split(".")[-1] in TYPE_TESTS:
        return
    else:
        counters = {
            n.target.id
            for n in body.nodes
            if isinstance(n, ast.For) and isinstance(n.target, ast.Name) and range_of(n) is not None
        }
        varying = body.bound - counters | body.written
        if any(uses_beyond_metadata(test, name) for name in varying):
            body.refuse("data_dependent_branch", f"branch on {ast.unparse(test)}", test)


def _check_effect(body: Body, node: ast.Expr) -> None:
    value = node.value
    if isinstance(value, ast.Constant) or appended(node):
        return
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and is_in_place_name(value.func.attr):
        return
    body.refuse("side_effect", f"{ast.unparse(value)} is called for its effect", node)


def _check_store(body: Body, node: ast.Subscript) -> None:
    if isinstance(node.ctx, ast.Del):
        body.refuse("unsupported_statement", "del of an element", node)
    constant = isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)
    if constant or (isinstance(node.value, ast.Attribute) and not mentions(node.slice, body.index)):
        body.refuse("state_escapes", f"the loop stores into {ast.unparse(node)}", node)


def check_lists(body: Body) -> frozenset[int]:
    """Refuse lists that are more than outputs of the loop; return the calls that take one after it."""
    uses: set[int] = set()
    inside = {id(n) for n in body.nodes}
    for name in sorted(body.lists):
        if name not in body.scope.locals:
            body.refuse("output_list_used", f"{name} is not a list of this function", _append_to(body, name))
        if not body.scope.starts_empty(name, body.loop):
            body.refuse("output_list_used", f"{name} is not empty right before the loop", _append_to(body, name))
        for use in ast.walk(body.scope.function):
            if isinstance(use, ast.Name) and use.id == name and not _good_list_use(body, use, name, inside, uses):
                body.refuse("output_list_used", f"{name} is used other than by len, stack or cat", use)
    return frozenset(uses)


def _append_to(body: Body, name: str) -> ast.AST:
    return next((n for n in body.nodes if appended(n, name)), body.loop)


def _good_list_use(body: Body, use: ast.Name, name: str, inside: set[int], uses: set[int]) -> bool:
    for parent in body.scope.ancestors(use):
        if isinstance(parent, ast.Call) and parent.args and parent.args[0] is use and id(use) not in inside:
            called = parent.func.attr if isinstance(parent.func, ast.Attribute) else ast.unparse(parent.func)
            if called in JOINS or called == "len":
                uses.add(id(parent))
                return True
        if isinstance(parent, SCOPES):
            return False
        if isinstance(parent, ast.stmt):
            if is_empty_list(assigned_value(parent, name)) and not mentions(getattr(parent, "value", None), name):
                return id(use) not in inside
            if isinstance(parent, ast.Delete):
                return id(use) not in inside
            item = appended(parent, name)
            if item is None or mentions(item[1], name):
                return False
            loops = [p for p in body.scope.ancestors(parent) if isinstance(p, ast.For)]
            return id(use) in inside or any(body.scope.starts_empty(name, other) for other in loops)
    return False

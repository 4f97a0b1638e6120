"""Whether every statement of a loop body has a counterpart in a scan."""

import ast

from fla_compile.passes.loop_calls import is_effect
from fla_compile.passes.loop_names import is_in_place_name, uses_beyond_metadata
from fla_compile.passes.loop_scope import Body, appended, range_of

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
        elif isinstance(node, ast.With) and all(_is_autocast(item) for item in node.items):
            continue
        elif isinstance(node, ast.stmt) and not isinstance(
            node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Pass | ast.Delete
        ):
            body.refuse("unsupported_statement", f"{type(node).__name__.lower()} in the loop", node)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            if (
                isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name)
                and node.value.id in body.containers
            ):
                continue
            body.refuse("state_escapes", f"the loop assigns {ast.unparse(node)}", node)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            _check_store(body, node)
    for name in sorted(body.bound & (body.scope.declared | body.scope.captured(body.loop))):
        body.refuse("state_escapes", f"{name} is shared with another function", body.binding(name))


def _check_test(body: Body, test: ast.expr, node: ast.AST) -> None:
    if body.index.difference(test):
        return
    if isinstance(test, ast.BoolOp):
        for part in test.values:
            _check_test(body, part, node)
    elif isinstance(test, ast.UnaryOp):
        _check_test(body, test.operand, node)
    elif body.index.mentioned(test):
        body.refuse("loop_index_used", f"branch on {ast.unparse(test)}", test)
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
    if isinstance(value, ast.Constant) or appended(node) or is_effect(body, node):
        return
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and is_in_place_name(value.func.attr):
        return
    body.refuse("side_effect", f"{ast.unparse(value)} is called for its effect", node)


def _check_store(body: Body, node: ast.Subscript) -> None:
    if isinstance(node.ctx, ast.Del):
        body.refuse("unsupported_statement", "del of an element", node)
    if isinstance(node.value, ast.Name) and node.value.id in body.containers:
        return
    constant = isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)
    if constant or (isinstance(node.value, ast.Attribute) and not body.index.mentioned(node.slice)):
        body.refuse("state_escapes", f"the loop stores into {ast.unparse(node)}", node)


def _is_autocast(item: ast.withitem) -> bool:
    called = item.context_expr.func if isinstance(item.context_expr, ast.Call) else None
    return item.optional_vars is None and called is not None and ast.unparse(called).split(".")[-1] == "autocast"

"""What a function's names do around a loop: which are bound, which are read later, which may share memory.

Answers err on one side: a name may be called live, aliased or not fresh when it is none of these, never the reverse
(a call that is not known to return a view counts as fresh; for those `scan` checks aliasing itself).
"""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

FRESH = frozenset(
    "zeros ones empty full rand randn zeros_like ones_like empty_like full_like rand_like randn_like "
    "new_zeros new_ones new_empty new_full clone eye arange".split()
)
VIEWS = frozenset(
    "view view_as reshape reshape_as transpose permute squeeze unsqueeze expand expand_as select narrow flatten "
    "unflatten movedim moveaxis swapaxes swapdims t unbind chunk split diagonal contiguous to type_as float double "
    "half bfloat16 detach real imag numpy data rearrange alias requires_grad_ T mT H mH".split()
)
VIEW_ATTRIBUTES = frozenset("T mT H mH data real imag".split())
METADATA = frozenset("shape dtype device ndim size dim numel stride is_cuda requires_grad".split())
MODULES = frozenset({"torch", "F", "einops", "nn.functional", "torch.nn.functional"})
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def walk_scope(node: ast.AST | Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Walk a node or several, without entering nested functions and classes (the nodes themselves are yielded)."""
    todo = [node] if isinstance(node, ast.AST) else list(node)
    while todo:
        current = todo.pop()
        yield current
        if not isinstance(current, SCOPES):
            todo.extend(ast.iter_child_nodes(current))


def comprehension_targets(node: ast.AST | Iterable[ast.AST]) -> set[str]:
    return {
        name.id
        for inner in walk_scope(node)
        if isinstance(inner, ast.comprehension)
        for name in ast.walk(inner.target)
        if isinstance(name, ast.Name)
    }


def bound_names(node: ast.AST | Iterable[ast.AST]) -> set[str]:
    """Names that the statements may bind in the function's own scope."""
    nodes = [node] if isinstance(node, ast.AST) else list(node)
    names: set[str] = set()
    todo: list[ast.AST] = list(nodes)
    while todo:
        current = todo.pop()
        if isinstance(current, COMPREHENSIONS):
            names |= {n.target.id for n in ast.walk(current) if isinstance(n, ast.NamedExpr)}
            continue
        if isinstance(current, ast.Name) and isinstance(current.ctx, ast.Store | ast.Del):
            names.add(current.id)
        elif isinstance(current, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(current.name)
            continue
        elif isinstance(current, ast.Lambda):
            continue
        elif isinstance(current, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and current.name:
            names.add(current.name)
        elif isinstance(current, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in current.names}
        todo.extend(ast.iter_child_nodes(current))
    return names


def read_names(node: ast.AST | None) -> set[str]:
    """Names that are read, in nested functions too; a comprehension's own targets do not count."""
    if node is None:
        return set()
    if isinstance(node, COMPREHENSIONS):
        inner = {n for child in ast.iter_child_nodes(node) for n in read_names(child)}
        own = {n.id for g in node.generators for n in ast.walk(g.target) if isinstance(n, ast.Name)}
        return (inner - own) | read_names(node.generators[0].iter)
    names = {node.id} if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store) else set()
    for child in ast.iter_child_nodes(node):
        names |= read_names(child)
    return names


@dataclass
class Liveness:
    """Backward liveness over statements; `after[id(loop)]` holds the names that may be read once a `for` is over."""

    after: dict[int, set[str]] = field(default_factory=dict)
    jumps: set[str] = field(default_factory=set)

    def block(self, body: list[ast.stmt], after: set[str]) -> set[str]:
        for stmt in reversed(body):
            after = self._stmt(stmt, after)
        return after

    def _stmt(self, s: ast.stmt, after: set[str]) -> set[str]:
        if isinstance(s, ast.If):
            return read_names(s.test) | self.block(s.body, after) | self.block(s.orelse, after)
        if isinstance(s, ast.For | ast.AsyncFor | ast.While):
            return self._loop(s, after)
        if isinstance(s, ast.With | ast.AsyncWith):
            live = self.block(s.body, after)
            for item in s.items:
                live |= read_names(item)
            return live
        if isinstance(s, ast.Try | ast.TryStar | ast.Match):
            if isinstance(s, ast.Match):
                nested = [case.body for case in s.cases]
            else:
                nested = [*(h.body for h in s.handlers), s.orelse, s.finalbody, s.body]
            anywhere = after | read_names(s)
            for body in nested:
                anywhere |= self.block(body, anywhere)
            return anywhere
        if isinstance(s, ast.Return | ast.Raise):
            return read_names(s)
        if isinstance(s, ast.Break | ast.Continue):
            return set(self.jumps)
        if isinstance(s, ast.AugAssign):
            target = {s.target.id} if isinstance(s.target, ast.Name) else set()
            return after | target | read_names(s)
        return (after - bound_names(s)) | read_names(s)

    def _loop(self, s: ast.For | ast.AsyncFor | ast.While, after: set[str]) -> set[str]:
        self.after[id(s)] = self.after.get(id(s), set()) | after | read_names_of(s.orelse)
        enter = read_names(s.test) if isinstance(s, ast.While) else read_names(s.iter)
        targets = set() if isinstance(s, ast.While) else bound_names(s.target)
        head = after | enter | self.block(s.orelse, after)
        outer = self.jumps
        for _ in range(2):
            self.jumps = head | outer
            head = head | (self.block(s.body, head) - targets)
        self.jumps = outer
        return head


def read_names_of(body: Iterable[ast.AST]) -> set[str]:
    return {name for node in body for name in read_names(node)}


def sources(value: ast.AST | None) -> set[str]:
    """Names whose memory the value may share; "self.S" for an attribute."""
    if isinstance(value, ast.Name):
        return {value.id}
    if isinstance(value, ast.Attribute):
        if value.attr in VIEW_ATTRIBUTES:
            return sources(value.value)
        return {ast.unparse(value)} if value.attr not in METADATA else set()
    if isinstance(value, ast.Subscript | ast.Starred | ast.NamedExpr):
        return sources(value.value)
    if isinstance(value, ast.Tuple | ast.List):
        return {name for item in value.elts for name in sources(item)}
    if isinstance(value, ast.IfExp):
        return sources(value.body) | sources(value.orelse)
    if isinstance(value, ast.BoolOp):
        return {name for item in value.values for name in sources(item)}
    if isinstance(value, ast.Call):
        called = value.func
        name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
        if name in VIEWS or is_in_place_name(name):
            if isinstance(called, ast.Attribute) and not (sources(called.value) & MODULES):
                return sources(called.value)
            return sources(value.args[0]) if value.args else set()
    return set()


def is_in_place_name(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__") and not name.startswith("_")


def is_fresh(value: ast.AST) -> bool:
    """Whether the value is surely memory (or a number) that nothing else refers to."""
    if isinstance(value, ast.Constant):
        return value.value is None or isinstance(value.value, int | float)
    if isinstance(value, ast.UnaryOp):
        return not isinstance(value.op, ast.UAdd)
    if isinstance(value, ast.BinOp):
        return not isinstance(value.left, ast.List | ast.Tuple)
    if isinstance(value, ast.IfExp):
        return is_fresh(value.body) and is_fresh(value.orelse)
    if isinstance(value, ast.Subscript):
        return is_fresh(value.value)
    if isinstance(value, ast.Call):
        called = value.func
        name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
        if name in FRESH:
            return True
        return name in VIEWS and isinstance(called, ast.Attribute) and is_fresh(called.value)
    return False


def uses_beyond_metadata(node: ast.AST, name: str) -> bool:
    """Whether the node mentions the name other than as `name.shape`, `name.dtype` and the like."""
    if isinstance(node, ast.Attribute) and node.attr in METADATA and isinstance(node.value, ast.Name):
        return False
    if isinstance(node, ast.Name):
        return node.id == name
    return any(uses_beyond_metadata(child, name) for child in ast.iter_child_nodes(node))


def assigned_value(s: ast.stmt, name: str) -> ast.expr | None:
    """The expression that the statement alone assigns to the name, if it is a plain assignment of it."""
    if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name) and s.target.id == name:
        return s.value
    if not isinstance(s, ast.Assign) or len(s.targets) != 1:
        return None
    target = s.targets[0]
    if isinstance(target, ast.Name) and target.id == name:
        return s.value
    if isinstance(target, ast.Tuple) and isinstance(s.value, ast.Tuple) and len(target.elts) == len(s.value.elts):
        for place, value in zip(target.elts, s.value.elts, strict=True):
            if isinstance(place, ast.Name) and place.id == name:
                return value
    return None

"""Normalise: one time step, as a graph of ATen operations, into values in normal form.

Before: the body of a scan as Dynamo captured it, any spelling, in place or not.
After: for every node a `Value` (see normal_form.py), or the reason why it has none.

The body is traced again as functional ATen, so that in-place updates, views and Python operators are gone, and one rule
per operation of a small closed set is applied. What does not touch the state and has no rule is an *atom*: an opaque
tensor with labelled axes. What does touch the state and has no rule is *blocked*, with the operation's name and line.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx.experimental.proxy_tensor import make_fx

from fla_compile.passes import normal_form as nf
from fla_compile.passes.normal_form import NoNormalForm, Space, Value
from fla_compile.passes.records import Refused

aten = torch.ops.aten
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in')
_OWN = (str(Path(torch.__file__).parent), str(Path(__file__).resolve().parent), "<")


def source_of(node: fx.Node) -> tuple[str, int] | None:
    """The user's file and line that made this node: the innermost frame that is not torch's nor ours."""
    return innermost_frame(node.meta.get("stack_trace") or "")


def innermost_frame(trace: str) -> tuple[str, int] | None:
    """The innermost frame of a printed traceback that is not torch's nor ours."""
    frames = _FRAME.findall(trace)
    for filename, line in reversed(frames):
        if not str(Path(filename).resolve()).startswith(_OWN):
            return filename, int(line)
    return None


def short_source(place: tuple[str, int] | None) -> str:
    return f"{Path(place[0]).name}:{place[1]}" if place else ""


@dataclass
class Atom:
    """An opaque tensor of the step: a node of the step graph; `expansion` when it is itself a sum or a contraction,
    `eye` when it is the identity matrix."""

    node: fx.Node
    carry: int | None = None
    expansion: Value | None = None
    eye: bool = False


@dataclass
class Step:
    """One traced time step and, for the states in focus, the normal form of its nodes.

    `values[node]` is missing exactly for the nodes in `blocked`. `depends` tells which changing states a node is
    computed from; a state that every step hands on as it is counts as an invariant.
    """

    gm: fx.GraphModule
    carries: list[fx.Node]
    reads: list[fx.Node]
    invariants: list[fx.Node]
    next_carries: list[fx.Node]
    outputs: list[fx.Node]
    eyes: frozenset[int] = frozenset()  # operands known to be identity matrices
    idle: frozenset[int] = frozenset()
    depends: dict[fx.Node, frozenset[int]] = field(default_factory=dict)
    timed: set[fx.Node] = field(default_factory=set)
    space: Space = field(default_factory=Space)
    atoms: list[Atom] = field(default_factory=list)
    core: frozenset[int] = frozenset()
    solved: frozenset[int] = frozenset()
    known: set[fx.Node] = field(default_factory=set)  # what the solved states were read as
    values: dict[fx.Node, Value] = field(default_factory=dict)
    blocked: dict[fx.Node, Refused] = field(default_factory=dict)
    rounded: set[fx.Node] = field(default_factory=set)  # computed from a state rounded to less than its own type

    def __post_init__(self) -> None:
        pairs = enumerate(zip(self.carries, self.next_carries, strict=True))
        self.idle = frozenset(i for i, (old, new) in pairs if original(new) is old)
        for node in self.gm.graph.nodes:
            if node.op != "output":
                self.adopt(node)

    def adopt(self, node: fx.Node) -> None:
        """Note what a node, perhaps a new one, is computed from."""
        inputs = node.all_input_nodes
        changing = node in self.carries and self.carries.index(node) not in self.idle
        own = frozenset({self.carries.index(node)}) if changing else frozenset[int]()
        self.depends[node] = own.union(*(self.depends[n] for n in inputs))
        if changing or node in self.reads or any(n in self.timed for n in inputs):
            self.timed.add(node)

    def focus(self, core: frozenset[int], solved: frozenset[int]) -> None:
        """Take the states in `core` as variables; those in `solved` are known at every step, others are not yet."""
        self.core, self.solved = core, solved
        self.values, self.blocked, self.rounded = {}, {}, set()
        for node in list(self.gm.graph.nodes):
            if node.op != "output":
                visit(self, node)

    def stateful(self, node: fx.Node) -> bool:
        """Whether a node is computed from a state in focus."""
        return bool(self.depends[node] & self.core)

    def pending(self, node: fx.Node) -> bool:
        """Whether a node is computed from a state that is neither in focus nor solved."""
        return bool(self.depends[node] - self.core - self.solved)

    def new_atom(
        self, node: fx.Node, carry: int | None = None, expansion: Value | None = None, eye: bool = False
    ) -> Value:
        self.atoms.append(Atom(node, carry, expansion, eye))
        return self.space.atom(len(self.atoms) - 1, shape_of(node))

    def is_carry(self, atom: int) -> bool:
        return self.atoms[atom].carry is not None

    def is_timed(self, factor: nf.Factor) -> bool:
        return self.atoms[factor.atom].node in self.timed

    def source(self, node: fx.Node) -> str:
        return short_source(source_of(node))


def original(node: fx.Node) -> fx.Node:
    """Behind the copies that a lifted loop makes of its states and outputs."""
    while node.target in (aten.clone.default, aten.alias.default):
        node = node.args[0]  # type: ignore[assignment]
    return node


def shape_of(node: fx.Node) -> Sequence[Any]:
    return node.meta["val"].shape


def elements(node: fx.Node) -> int:
    """Elements of a node's value, by hint where a size is dynamic; a number counts as none."""
    value = node.meta.get("val")
    total = 1
    for size in getattr(value, "shape", ()):
        total *= size if isinstance(size, int) else int(size.node.hint or 1)
    return total if hasattr(value, "shape") else 0


def _copied(a: torch.Tensor, b: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return b.to(device=a.device, dtype=a.dtype).expand(a.shape).clone()


def _with_row(a: torch.Tensor, row: torch.Tensor, dim: int, index: int) -> torch.Tensor:
    at = index if index >= 0 else index + a.shape[dim]
    return torch.slice_scatter(a, row.unsqueeze(dim), dim, at, at + 1)


# What functionalisation writes for `x[:] = y` has neither a derivative nor a batching rule; for `x[0] = y` it has a
# batching rule whose derivative is wrong (torch 2.11 to 2.13).
REWRITTEN = {aten.copy.default: _copied, aten.select_scatter.default: _with_row}


OUT_OF_PLACE = {
    aten.squeeze_.default: aten.squeeze.default,
    aten.squeeze_.dim: aten.squeeze.dim,
    aten.squeeze_.dims: aten.squeeze.dims,
    aten.unsqueeze_.default: aten.unsqueeze.default,
    aten.t_.default: aten.t.default,
    aten.transpose_.default: aten.transpose.int,
}


def trace_step(body: fx.GraphModule, around: AbstractContextManager | None = None) -> fx.GraphModule:
    """The body as functional ATen, with fake values and the user's stack traces on its nodes.

    `around` is entered while it is traced: the casts of an autocast region become operations of the step.
    """
    fakes = [node.meta["example_value"] for node in body.graph.find_nodes(op="placeholder")]

    def run(*args: Any) -> Any:
        return fx.Interpreter(body).run(*args)

    mode = next((fake.fake_mode for fake in fakes if hasattr(fake, "fake_mode")), None)
    if mode is None:
        raise Refused("unsupported_op", "the loop body has no tensor operands")
    around = around or nullcontext()
    with fx.traceback.preserve_node_meta(), torch._guards.tracing(None), mode, torch.no_grad(), around:
        functional = torch.func.functionalize(run, remove="mutations")
        step = make_fx(functional, decomposition_table=REWRITTEN, tracing_mode="real")(*fakes)
    step.graph = fx_graph_cse(step.graph)  # a product that the program computes twice is one atom
    for node in step.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # over all of time a tensor may have other strides
        elif node.target in OUT_OF_PLACE:
            node.target = OUT_OF_PLACE[node.target]  # on a tensor of its own, where functionalisation leaves it
        elif node.target is aten.sym_size.int:
            node.op, node.target = "call_method", "size"  # the operator has no batching rule
    step.recompile()
    return step


def normalise(
    body: fx.GraphModule,
    carries: int,
    reads: int,
    around: AbstractContextManager | None = None,
    eyes: frozenset[int] = frozenset(),
) -> Step:
    """Trace a scan body whose operands are `carries` states, `reads` per-step slices, then invariants.

    `eyes` are the operands that are known to be identity matrices.
    """
    gm = trace_step(body, around)
    operands = gm.graph.find_nodes(op="placeholder")
    results = gm.graph.output_node().args[0]
    return Step(
        gm,
        carries=operands[:carries],
        reads=operands[carries : carries + reads],
        invariants=operands[carries + reads :],
        next_carries=list(results[:carries]),
        outputs=list(results[carries:]),
        eyes=eyes,
    )


def visit(step: Step, node: fx.Node) -> None:
    inputs = node.all_input_nodes
    if node in step.carries and step.carries.index(node) in step.core:
        step.values[node] = step.new_atom(node, carry=step.carries.index(node))
        return
    if node.op == "placeholder" and [*step.carries, *step.reads, *step.invariants].index(node) in step.eyes:
        step.values[node] = step.new_atom(node, eye=True)
        return
    state = step.stateful(node)
    if state and (narrows(step, node) or any(n in step.rounded for n in inputs)):
        step.rounded.add(node)
    if step.pending(node):
        step.blocked[node] = Refused("unknown_recurrence", "two states depend on each other", step.source(node))
        return
    if node in step.known:
        step.values[node] = step.new_atom(node)
        return
    if not isinstance(node.meta.get("val"), torch.Tensor):
        if state:
            step.blocked[node] = Refused("unsupported_op", f"{node.target} of the state", step.source(node))
        return
    stuck = next((n for n in inputs if n in step.blocked), None)
    if stuck is not None:
        step.blocked[node] = step.blocked[stuck]
        return
    rule = RULES.get(getattr(node.target, "overloadpacket", None))
    if not node.meta["val"].dtype.is_floating_point:
        rule = None
    try:
        value = rule(step, node, *node.args, **node.kwargs) if rule else None
    except (NoNormalForm, TypeError) as error:  # TypeError: an overload with arguments that the rule does not know
        value = None
        if state:
            step.blocked[node] = Refused("unsupported_op", f"{node.target}: {error}", step.source(node))
            return
    if value is not None and not state:
        value = opaque_where_mixed(step, node, value)
    if value is None:
        if state:
            step.blocked[node] = Refused("unsupported_op", f"{node.target} applied to the state", step.source(node))
            return
        value = step.new_atom(node)
    step.values[node] = value


def narrows(step: Step, node: fx.Node) -> bool:
    """Whether a cast of a state, or of what is computed from it, keeps less than the state's own type does."""
    own = step.carries[min(step.core)].meta["val"].dtype
    value = node.meta.get("val")
    return (
        node.target is aten._to_copy.default
        and own.is_floating_point
        and isinstance(value, torch.Tensor)
        and torch.promote_types(value.dtype, own) != value.dtype
    )


def opaque_where_mixed(step: Step, node: fx.Node, value: Value) -> Value:
    """Without the state a value stays a plain product; a sum or a contraction becomes an atom that knows its terms."""
    dims = {label for axis in value.dims for label in axis}
    if len(value.terms) > 1 or any(term.labels - dims for term in value.terms):
        return step.new_atom(node, expansion=value)
    return value


def of(step: Step, x: Any) -> Value:
    if isinstance(x, fx.Node):
        if x not in step.values:
            raise NoNormalForm(f"a number that changes from call to call ({x.meta.get('val')})")
        if not x.meta["val"].dtype.is_floating_point:
            return as_float(step, x)
        return step.values[x]
    if isinstance(x, int | float):
        return step.space.constant(float(x), ())
    raise NoNormalForm(f"operand {x!r}")


def as_float(step: Step, x: fx.Node) -> Value:
    """A mask or a count among the factors of a product, in the state's type."""
    dtype = step.carries[min(step.core)].meta["val"].dtype
    with step.gm.graph.inserting_after(x):
        node = step.gm.graph.call_function(aten._to_copy.default, (x,), {"dtype": dtype})
    node.meta = {**x.meta, "val": x.meta["val"].new_empty(shape_of(x), dtype=dtype)}
    step.adopt(node)
    step.values[node] = step.new_atom(node)
    return step.values[node]


def number(x: Any) -> float:
    if isinstance(x, int | float):
        return float(x)
    raise NoNormalForm(f"operand {x!r} is not a number")


def _mul(step: Step, node: fx.Node, a: Any, b: Any) -> Value:
    return nf.multiply(step.space, of(step, a), of(step, b))


def _add(step: Step, node: fx.Node, a: Any, b: Any, *, alpha: Any = 1) -> Value:
    return nf.add(step.space, of(step, a), of(step, b), number(alpha))


def _sub(step: Step, node: fx.Node, a: Any, b: Any, *, alpha: Any = 1) -> Value:
    return nf.add(step.space, of(step, a), of(step, b), -number(alpha))


def _rsub(step: Step, node: fx.Node, a: Any, b: Any, alpha: Any = 1) -> Value:
    return nf.add(step.space, of(step, b), of(step, a), -number(alpha))


def _neg(step: Step, node: fx.Node, a: Any) -> Value:
    return nf.scaled(of(step, a), -1.0)


def _div(step: Step, node: fx.Node, a: Any, b: Any) -> Value:
    if isinstance(b, fx.Node):
        if step.stateful(b):
            raise NoNormalForm("division by the state")
        with step.gm.graph.inserting_after(b):
            inverse = step.gm.graph.call_function(aten.reciprocal.default, (b,))
        inverse.meta = {**b.meta, "val": b.meta["val"].new_empty(shape_of(b), dtype=node.meta["val"].dtype)}
        step.adopt(inverse)
        step.values[inverse] = step.new_atom(inverse)
        return nf.multiply(step.space, of(step, a), of(step, inverse))
    return nf.scaled(of(step, a), 1.0 / number(b))


def _sum(step: Step, node: fx.Node, a: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    value = of(step, a)
    return nf.reduce_sum(step.space, value, range(len(value.dims)) if not dim else dim, keepdim)


def _mean(step: Step, node: fx.Node, a: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    count = 1
    for axis in dim or range(len(shape_of(a))):
        count = count * shape_of(a)[axis]
    return nf.scaled(_sum(step, node, a, dim, keepdim), 1.0 / number(count))


def _bmm(step: Step, node: fx.Node, a: Any, b: Any) -> Value:
    return nf.contract(step.space, of(step, a), of(step, b), batch=1)


def _mm(step: Step, node: fx.Node, a: Any, b: Any) -> Value:
    return nf.contract(step.space, of(step, a), of(step, b), batch=0)


def _mv(step: Step, node: fx.Node, a: Any, b: Any) -> Value:
    return nf.reduce_sum(step.space, nf.multiply(step.space, of(step, a), of(step, b)), [-1], keepdim=False)


def _dot(step: Step, node: fx.Node, a: Any, b: Any) -> Value:
    return nf.reduce_sum(step.space, nf.multiply(step.space, of(step, a), of(step, b)), [0], keepdim=False)


def _addcmul(step: Step, node: fx.Node, a: Any, b: Any, c: Any, *, value: Any = 1) -> Value:
    return nf.add(step.space, of(step, a), _mul(step, node, b, c), number(value))


def _baddbmm(step: Step, node: fx.Node, a: Any, b: Any, c: Any, *, beta: Any = 1, alpha: Any = 1) -> Value:
    return nf.add(step.space, nf.scaled(of(step, a), number(beta)), _bmm(step, node, b, c), number(alpha))


def _addmm(step: Step, node: fx.Node, a: Any, b: Any, c: Any, *, beta: Any = 1, alpha: Any = 1) -> Value:
    return nf.add(step.space, nf.scaled(of(step, a), number(beta)), _mm(step, node, b, c), number(alpha))


def _lerp(step: Step, node: fx.Node, a: Any, b: Any, weight: Any) -> Value:
    return nf.add(step.space, of(step, a), nf.multiply(step.space, of(step, weight), _sub(step, node, b, a)))


def _where(step: Step, node: fx.Node, mask: Any, a: Any, b: Any) -> Value | None:
    """mask * a + (1 - mask) * b; of what has no state, only what the mask lets through is looked at."""
    if not step.stateful(node) or step.stateful(mask):
        return None
    with step.gm.graph.inserting_before(node):
        inverse = step.gm.graph.call_function(aten.logical_not.default, (mask,))
    inverse.meta = dict(mask.meta)
    step.adopt(inverse)
    step.values[inverse] = step.new_atom(inverse)
    parts = [_masked(step, node, x, keep) for x, keep in ((a, mask), (b, inverse))]
    return nf.expand(step.space, nf.add(step.space, *parts), shape_of(node))


def _masked(step: Step, node: fx.Node, x: Any, keep: fx.Node) -> Value:
    if not isinstance(x, fx.Node) or step.stateful(x) or not step.values[x].atoms:
        return nf.multiply(step.space, as_float(step, keep), of(step, x))
    with step.gm.graph.inserting_before(node):
        kept = step.gm.graph.call_function(torch.where, (keep, x, 0.0))
    val = node.meta["val"]
    shape = torch.broadcast_shapes(shape_of(keep), shape_of(x))
    kept.meta = {**node.meta, "val": val.new_empty(shape)}
    step.adopt(kept)
    step.values[kept] = step.new_atom(kept)
    return step.values[kept]


def _masked_fill(step: Step, node: fx.Node, a: Any, mask: Any, fill: Any) -> Value | None:
    return _where(step, node, mask, fill, a)


def _same(step: Step, node: fx.Node, a: Any, *args: Any, **kwargs: Any) -> Value:
    return of(step, a)


def _cast(step: Step, node: fx.Node, a: Any, **kwargs: Any) -> Value | None:
    """A cast that loses nothing is no operation; a rounding is part of the state's arithmetic, or an atom."""
    wide = torch.promote_types(a.meta["val"].dtype, node.meta["val"].dtype)
    if not node.meta["val"].dtype.is_floating_point or a.meta["val"].device != node.meta["val"].device:
        return None
    if step.stateful(node) or (wide == node.meta["val"].dtype and a.meta["val"].dtype.is_floating_point):
        return of(step, a)
    return None


def _copy(step: Step, node: fx.Node, a: Any, b: Any, *args: Any) -> Value:
    return nf.expand(step.space, of(step, b), shape_of(node))


def _reshape(step: Step, node: fx.Node, a: Any, *args: Any, **kwargs: Any) -> Value:
    return nf.reshape(step.space, of(step, a), shape_of(node))


def _permute(step: Step, node: fx.Node, a: Any, order: Any) -> Value:
    return nf.permute(of(step, a), [axis % len(order) for axis in order])


def _transpose(step: Step, node: fx.Node, a: Any, i: int, j: int) -> Value:
    order = list(range(len(shape_of(a))))
    order[i], order[j] = order[j], order[i]
    return nf.permute(of(step, a), order)


def _t(step: Step, node: fx.Node, a: Any) -> Value:
    return nf.permute(of(step, a), range(len(shape_of(a)))[::-1])


def _expand(step: Step, node: fx.Node, a: Any, *args: Any, **kwargs: Any) -> Value:
    return nf.expand(step.space, of(step, a), shape_of(node))


def _whole(step: Step, node: fx.Node, a: Any, *args: Any) -> Value | None:
    """A slice that keeps everything."""
    whole = all(nf.same_size(x, y) for x, y in zip(shape_of(a), shape_of(node), strict=True))
    return of(step, a) if whole else None


def _select(step: Step, node: fx.Node, a: Any, dim: int, index: Any) -> Value | None:
    """Taking the only element of an axis of size 1."""
    if not nf.same_size(shape_of(a)[dim], 1):
        return None
    return nf.reshape(step.space, of(step, a), shape_of(node))


def _full(step: Step, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    fill = {aten.zeros: 0.0, aten.zeros_like: 0.0, aten.new_zeros: 0.0, aten.ones: 1.0, aten.ones_like: 1.0}
    packet = node.target.overloadpacket  # type: ignore[union-attr]
    value = fill[packet] if packet in fill else number(args[0 if packet is aten.scalar_tensor else 1])
    return step.space.constant(value, shape_of(node))


def _eye(step: Step, node: fx.Node, n: Any, m: Any = None, **kwargs: Any) -> Value:
    return step.new_atom(node, eye=m is None or m == n)


def _diag_embed(step: Step, node: fx.Node, a: Any, *args: Any, **kwargs: Any) -> Value | None:
    """A diagonal matrix: the vector times the identity."""
    value = of(step, a)
    if any(args) or kwargs or len(value.dims[-1]) != 1:
        return None
    val = node.meta["val"]
    with step.gm.graph.inserting_before(node):
        size = (shape_of(a)[-1],)
        eye = step.gm.graph.call_function(aten.eye.default, size, {"dtype": val.dtype, "device": val.device})
    eye.meta = {**node.meta, "val": val.new_empty((*size, *size))}
    step.adopt(eye)
    step.values[eye] = step.new_atom(eye, eye=True)
    column = Value((*value.dims, ()), value.terms)
    return nf.multiply(step.space, column, step.values[eye])


Rule = Callable[..., Value | None]
RULES: dict[Any, Rule] = {
    aten.mul: _mul,
    aten.add: _add,
    aten.sub: _sub,
    aten.rsub: _rsub,
    aten.neg: _neg,
    aten.div: _div,
    aten.sum: _sum,
    aten.mean: _mean,
    aten.bmm: _bmm,
    aten.mm: _mm,
    aten.mv: _mv,
    aten.dot: _dot,
    aten.addcmul: _addcmul,
    aten.baddbmm: _baddbmm,
    aten.addmm: _addmm,
    aten.lerp: _lerp,
    aten.where: _where,
    aten.masked_fill: _masked_fill,
    aten.clone: _same,
    aten.alias: _same,
    aten._to_copy: _cast,
    aten.copy: _copy,
    aten.view: _reshape,
    aten.reshape: _reshape,
    aten._unsafe_view: _reshape,
    aten.unsqueeze: _reshape,
    aten.squeeze: _reshape,
    aten.permute: _permute,
    aten.transpose: _transpose,
    aten.t: _t,
    aten.expand: _expand,
    aten.slice: _whole,
    aten.select: _select,
    aten.eye: _eye,
    aten.diag_embed: _diag_embed,
    aten.zeros: _full,
    aten.zeros_like: _full,
    aten.new_zeros: _full,
    aten.ones: _full,
    aten.ones_like: _full,
    aten.full: _full,
    aten.scalar_tensor: _full,
    aten.full_like: _full,
}

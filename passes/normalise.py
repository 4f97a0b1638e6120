"""Normalise: one time step, as a graph of ATen operations, into values in normal form.

Before: the body of a scan as Dynamo captured it, any spelling, in place or not.
After: for every node a `Value` (see normal_form.py), or the reason why it has none.

The body is traced again as functional ATen, so that in-place updates, views and Python operators are gone, and one rule
per operation of a small closed set is applied. What does not touch the state and has no rule is an *atom*: an opaque
tensor with labelled axes. What does touch the state and has no rule is *blocked*, with the operation's name and line.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx
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
    """An opaque tensor of the step: a node of the step graph; `expansion` when it is itself a contraction."""

    node: fx.Node
    carry: int | None = None
    expansion: Value | None = None


@dataclass
class Step:
    """One normalised time step. `values[node]` is missing exactly for the nodes in `blocked`."""

    gm: fx.GraphModule
    carries: list[fx.Node]
    reads: list[fx.Node]
    invariants: list[fx.Node]
    next_carries: list[fx.Node]
    outputs: list[fx.Node]
    space: Space = field(default_factory=Space)
    atoms: list[Atom] = field(default_factory=list)
    values: dict[fx.Node, Value] = field(default_factory=dict)
    blocked: dict[fx.Node, Refused] = field(default_factory=dict)
    stateful: set[fx.Node] = field(default_factory=set)
    timed: set[fx.Node] = field(default_factory=set)

    def new_atom(self, node: fx.Node, carry: int | None = None, expansion: Value | None = None) -> Value:
        self.atoms.append(Atom(node, carry, expansion))
        return self.space.atom(len(self.atoms) - 1, shape_of(node))

    def is_carry(self, atom: int) -> bool:
        return self.atoms[atom].carry is not None

    def source(self, node: fx.Node) -> str:
        return short_source(source_of(node))


def shape_of(node: fx.Node) -> Sequence[Any]:
    return node.meta["val"].shape


def _copied(a: torch.Tensor, b: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return b.to(device=a.device, dtype=a.dtype).expand(a.shape).clone()


# What functionalisation writes for `x[:] = y` has neither a derivative nor a batching rule.
REWRITTEN = {aten.copy.default: _copied}


def trace_step(body: fx.GraphModule) -> fx.GraphModule:
    """The body as functional ATen, with fake values and the user's stack traces on its nodes."""
    fakes = [node.meta["example_value"] for node in body.graph.find_nodes(op="placeholder")]

    def run(*args: Any) -> Any:
        return fx.Interpreter(body).run(*args)

    mode = next((fake.fake_mode for fake in fakes if hasattr(fake, "fake_mode")), None)
    if mode is None:
        raise Refused("unsupported_op", "the loop body has no tensor operands")
    with fx.traceback.preserve_node_meta(), torch._guards.tracing(None), mode, torch.no_grad():
        functional = torch.func.functionalize(run, remove="mutations")
        step = make_fx(functional, decomposition_table=REWRITTEN, tracing_mode="real")(*fakes)
    for node in step.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # over all of time a tensor may have other strides
        elif node.target is aten.sym_size.int:
            node.op, node.target = "call_method", "size"  # the operator has no batching rule
    step.recompile()
    return step


def normalise(body: fx.GraphModule, carries: int, reads: int) -> Step:
    """Normalise a scan body whose operands are `carries` states, `reads` per-step slices, then invariants."""
    gm = trace_step(body)
    operands = gm.graph.find_nodes(op="placeholder")
    results = gm.graph.output_node().args[0]
    step = Step(
        gm,
        carries=operands[:carries],
        reads=operands[carries : carries + reads],
        invariants=operands[carries + reads :],
        next_carries=list(results[:carries]),
        outputs=list(results[carries:]),
    )
    for node in list(gm.graph.nodes):
        if node.op != "output":
            visit(step, node)
    return step


def visit(step: Step, node: fx.Node) -> None:
    inputs = node.all_input_nodes
    if node in step.reads or any(n in step.timed for n in inputs):
        step.timed.add(node)
    if node in step.carries:
        step.stateful.add(node)
        step.values[node] = step.new_atom(node, carry=step.carries.index(node))
        return
    if any(n in step.stateful for n in inputs):
        step.stateful.add(node)
    if not isinstance(node.meta.get("val"), torch.Tensor):
        if node in step.stateful:
            step.blocked[node] = Refused("unsupported_op", f"{node.target} of the state", step.source(node))
        return
    stuck = next((n for n in inputs if n in step.blocked), None)
    if stuck is not None:
        step.blocked[node] = step.blocked[stuck]
        return
    rule = RULES.get(getattr(node.target, "overloadpacket", None))
    if not node.meta["val"].dtype.is_floating_point:
        rule = None
    state = node in step.stateful
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
        return step.values[x]
    if isinstance(x, int | float):
        return step.space.constant(float(x), ())
    raise NoNormalForm(f"operand {x!r}")


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
        if b in step.stateful:
            raise NoNormalForm("division by the state")
        with step.gm.graph.inserting_after(b):
            inverse = step.gm.graph.call_function(aten.reciprocal.default, (b,))
        inverse.meta = {**b.meta, "val": b.meta["val"].new_empty(shape_of(b), dtype=node.meta["val"].dtype)}
        if b in step.timed:
            step.timed.add(inverse)
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


def _same(step: Step, node: fx.Node, a: Any, *args: Any, **kwargs: Any) -> Value:
    return of(step, a)


def _cast(step: Step, node: fx.Node, a: Any, **kwargs: Any) -> Value | None:
    """A cast that loses nothing is no operation; a rounding is part of the state's arithmetic, or an atom."""
    wide = torch.promote_types(a.meta["val"].dtype, node.meta["val"].dtype)
    if not node.meta["val"].dtype.is_floating_point or a.meta["val"].device != node.meta["val"].device:
        return None
    if node in step.stateful or (wide == node.meta["val"].dtype and a.meta["val"].dtype.is_floating_point):
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
    return step.space.constant(fill[packet] if packet in fill else number(args[1]), shape_of(node))


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
    aten.zeros: _full,
    aten.zeros_like: _full,
    aten.new_zeros: _full,
    aten.ones: _full,
    aten.ones_like: _full,
    aten.full: _full,
    aten.full_like: _full,
}

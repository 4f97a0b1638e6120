"""Normalise: one time step, as a graph of ATen operations, into values in normal form.

Before: the body of a scan as Dynamo captured it, any spelling, in place or not.
After: for every node a `Value` (see normal_form.py), or the reason why it has none.

The body is traced again as functional ATen, so that in-place updates, views and Python operators are gone, and one rule
per operation of a small closed set is applied. What does not touch the state and has no rule is an *atom*: an opaque
tensor with labelled axes. What does touch the state and has no rule is *blocked*, with the operation's name and line.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx.experimental.proxy_tensor import make_fx

from fla_compile.passes.alike import mixed, opaque
from fla_compile.passes.normal_form import NoNormalForm, Value
from fla_compile.passes.polynomials import multiplied_out
from fla_compile.passes.records import Refused
from fla_compile.passes.rules import RULES
from fla_compile.passes.step import Step

aten = torch.ops.aten


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
    for node in step.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # over all of time a tensor may have other strides
        elif node.target in OUT_OF_PLACE:
            node.target = OUT_OF_PLACE[node.target]  # on a tensor of its own, where functionalisation leaves it
        elif node.target is aten.sym_size.int:
            node.op, node.target = "call_method", "size"  # the operator has no batching rule
    step.graph = fx_graph_cse(step.graph)  # a product that the program computes twice is one atom
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


def focus(step: Step, core: frozenset[int], solved: frozenset[int]) -> None:
    """Take the states in `core` as variables; those in `solved` are known at every step, others are not yet."""
    step.core, step.solved = core, solved
    step.values, step.blocked, step.rounded, step.alike = {}, {}, set(), {}
    for node in list(step.gm.graph.nodes):
        if node.op != "output":
            visit(step, node)


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
        value = multiplied_out(step, value) if value is not None and state else value
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
        value = opaque(step, node)
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
        return mixed(step, node, value)
    return value

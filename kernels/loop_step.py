"""The step of a generic loop: one time step as a graph, kept under a key that is a hash of its content.

    *next_carries, *outputs_t = step(*carries, *reads_t, *invariants)

A step is functional ATen. Registering it decides, from the graph alone, what the backward of one step needs from the
forward besides its operands: the carry before the step, where an operation that is not linear depends on it, and the
results of matrix products, which are dearer to compute again than to keep. All else is recomputed. So the shapes of
what is kept follow from the step and the shapes of its operands, also where those are symbolic.
"""

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

# The same value under another name.
SAME = {aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default}
# Besides views: linear in every tensor operand, so that no derivative needs a value.
_LINEAR = {
    aten.add, aten.sub, aten.rsub, aten.neg, aten.sum, aten.mean, aten._to_copy, aten.clone, aten.cat, aten.stack,
    aten.reshape, aten._unsafe_view, aten.lift_fresh_copy, aten.detach,
}  # fmt: skip
_STRIDED = {aten.as_strided, aten.as_strided_copy, aten.as_strided_scatter}
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.mv, aten.addmv, aten.dot, aten.convolution}


@dataclass(frozen=True)
class Step:
    """`graph(*operands, *constants)` gives next carries, outputs and `saved` products of one time step.

    `kinds` says of each operand if it is a "tensor", an "int", a "float", or "fixed": a number that the trace has put
    into the graph, here in `fixed`. Carries and reads are tensors. `keep` says of each carry if the backward needs it;
    `shared[i]` is the output that is the next carry i, if there is one.
    """

    key: str
    graph: fx.GraphModule
    kinds: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    carries: int
    reads: int
    outputs: int
    saved: int
    keep: tuple[bool, ...]
    shared: tuple[int | None, ...]
    constants: tuple[Tensor, ...]
    fixed: tuple[int | float, ...] = ()

    def operands(self, tensors: Sequence[Any], ints: Sequence[Any], floats: Sequence[Any]) -> list[Any]:
        """Sorted operands back in the step's order."""
        parts = {"tensor": iter(tensors), "int": iter(ints), "float": iter(floats), "fixed": iter(self.fixed)}
        return [next(parts[kind]) for kind in self.kinds]

    def own(self) -> list[int]:
        """The carries that are kept as stacks of their own: needed, and no output is the same."""
        return [i for i in range(self.carries) if self.keep[i] and self.shared[i] is None]


STEPS: dict[str, Step] = {}


def register_step(step: fx.GraphModule, carries: int, reads: int) -> str:
    """Keep a step for `loop` and return its key: equal for equal content, in other processes too.

    `step` is a graph of functional ATen with `meta["val"]` on its nodes; its operands are `carries` states, `reads`
    slices of one time step, then invariants. Raises ValueError for a step that cannot be looped: carries that change
    their rank or dtype, operations that write, draw random numbers, take strides or are complex, constants that are
    not known.
    """
    graph, constants = _copied(step)
    operands = graph.find_nodes(op="placeholder")
    kinds = tuple(_kind(node) for node in operands[: len(operands) - len(constants)])
    results = results_of(graph)
    _check(operands, results, kinds, carries, reads)
    varying = _dependent(graph, operands[: carries + reads])
    sources = [source(node) for node in results]
    saved = [
        node
        for node in graph.nodes
        if node in varying and _is_product(node) and node not in sources[:carries] and _value_needed(node)
    ]
    keep = tuple(_value_needed(node) for node in operands[:carries])
    shared = tuple(next((j for j, y in enumerate(sources[carries:]) if y is x), None) for x in sources[:carries])
    graph.output_node().args = ((*results, *saved),)
    text = "\n".join([f"{carries} {reads} {keep}", *_lines(graph, len(constants))])
    digest = hashlib.sha256(text.encode())
    for constant in constants:
        digest.update(repr((constant.shape, constant.dtype, constant.device, constant.tolist())).encode())
    key = digest.hexdigest()[:32]
    values = [(kind, n.meta["val"]) for n, kind in zip(operands, kinds, strict=False)]
    for node in graph.nodes:
        node.meta = {}
    known = Step(
        key,
        fx.GraphModule(torch.nn.Module(), graph),
        kinds,
        tuple(value.dtype for kind, value in values if kind == "tensor"),
        carries,
        reads,
        len(results) - carries,
        len(saved),
        keep,
        shared,
        tuple(constants),
        tuple(value for kind, value in values if kind == "fixed"),
    )
    return STEPS.setdefault(key, known).key


def results_of(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.output_node().args[0])  # type: ignore[arg-type]


def for_any_strides(graph: fx.Graph) -> None:
    """Views are taken for strides that the trace has seen; operands may have others."""
    for node in graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default


def source(node: fx.Node) -> fx.Node:
    """The node whose value this one has."""
    while node.target in SAME:
        node = node.all_input_nodes[0]
    return node


def _copied(step: fx.GraphModule) -> tuple[fx.Graph, list[Tensor]]:
    """The graph with its constants as operands behind the others."""
    graph, env = fx.Graph(), {}
    for node in step.graph.find_nodes(op="placeholder"):
        env[node] = graph.node_copy(node)
    constants: dict[str, fx.Node] = {}
    values = []
    for node in step.graph.find_nodes(op="get_attr"):
        if node.target not in constants:
            values.append(_constant(operator.attrgetter(node.target)(step), node.target))
            constants[node.target] = graph.placeholder(f"constant_{len(constants)}")
            constants[node.target].meta["val"] = values[-1]
        env[node] = constants[node.target]
    for node in step.graph.nodes:
        if node.op not in ("placeholder", "get_attr", "output"):
            env[node] = graph.node_copy(node, lambda n: env[n])
    for_any_strides(graph)
    results = results_of(step.graph)
    graph.output(tuple(env[n] if isinstance(n, fx.Node) else n for n in results))
    return graph, values


def _constant(value: Any, name: str) -> Tensor:
    value = getattr(value, "constant", value)  # of a fake tensor: the real one, if it is known
    if not isinstance(value, Tensor):
        raise ValueError(f"step has the constant {name}, whose value is not known")
    return value.detach()


def _kind(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, torch.SymInt):
        return "int"
    if isinstance(value, torch.SymFloat):
        return "float"
    if isinstance(value, int | float) and not node.users:
        return "fixed"
    raise ValueError(f"operand {node.name} of the step must be a tensor or a number, got {value!r}")


def _check(operands: list[fx.Node], results: Any, kinds: tuple[str, ...], carries: int, reads: int) -> None:
    if len(kinds) < carries + reads or set(kinds[: carries + reads]) - {"tensor"}:
        raise ValueError(f"step must have {carries} carries and {reads} reads that are tensors, got {kinds}")
    if len(results) < carries or not all(isinstance(n, fx.Node) for n in results):
        raise ValueError(f"step must return tensors, at least {carries}, got {results}")
    for node in operands:
        if isinstance(node.meta["val"], Tensor) and node.meta["val"].dtype.is_complex:
            raise ValueError(f"operand {node.name} of the step must be real, got {node.meta['val'].dtype}")
    for i, (old, new) in enumerate(zip(operands[:carries], results, strict=False)):
        had, has = (n.meta["val"] for n in (old, new))
        if (had.dtype, had.ndim, had.device) != (has.dtype, has.ndim, has.device):
            raise ValueError(
                f"carry {i} must stay {had.dtype} with {had.ndim} axes on {had.device}, "
                f"got {has.dtype} with {has.ndim} axes on {has.device}"
            )
    for node in operands[0].graph.nodes if operands else ():
        if isinstance(node.target, torch._ops.OpOverload):
            if node.target._schema.is_mutable:
                raise ValueError(f"step must be functional, got {node.target}")
            if torch.Tag.nondeterministic_seeded in node.target.tags:
                raise ValueError(f"step must not draw random numbers, got {node.target}")
            if node.target.overloadpacket in _STRIDED:
                raise ValueError(f"step must not depend on strides, got {node.target}")


def _dependent(graph: fx.Graph, roots: Sequence[fx.Node]) -> set[fx.Node]:
    found = set(roots)
    for node in graph.nodes:
        if any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _is_product(node: fx.Node) -> bool:
    """A matrix product that sums over something: an outer product is cheaper to compute again than to keep."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet not in PRODUCTS:
        return False
    left = node.args[1] if packet in (aten.addmm, aten.baddbmm, aten.addmv) else node.args[0]
    inner = left.meta["val"].shape[-1]  # type: ignore[union-attr]
    return packet is aten.convolution or not (isinstance(inner, int) and inner == 1)


def is_view(node: fx.Node) -> bool:
    """An operation on one tensor that moves no data."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or len(node.all_input_nodes) != 1:
        return False
    returns = target._schema.returns
    return target is aten.reshape.default or any(r.alias_info and not r.alias_info.is_write for r in returns)


def _value_needed(node: fx.Node) -> bool:
    """Whether a derivative may need the value of this node: one of its uses, direct or not, is not linear."""
    todo, seen = list(node.users), set()
    while todo:
        user = todo.pop()
        if user.op == "output" or user in seen:
            continue
        seen.add(user)
        packet = getattr(user.target, "overloadpacket", None)
        shape_only = user.op == "call_method" and user.target == "size"
        scaled = packet in (aten.mul, aten.div) and not isinstance(user.args[1], fx.Node)
        if shape_only:
            continue
        if not (packet in _LINEAR or scaled or is_view(user) or user.target is operator.getitem):
            return True
        todo.extend(user.users)
    return False


def _lines(graph: fx.Graph, constants: int) -> list[str]:
    """The graph as text that does not depend on names."""
    index = {node: i for i, node in enumerate(graph.nodes)}

    def written(value: Any) -> str:
        if isinstance(value, fx.Node):
            return f"%{index[value]}"
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(written, value))}]"
        if isinstance(value, slice):
            return f"slice{written((value.start, value.stop, value.step))}"
        if isinstance(value, torch.SymInt | torch.SymFloat):
            raise ValueError(f"step has {value} as a literal, it must be an operand")
        return repr(value)

    lines = []
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            kind = _kind(node)
            told = f"{value.dtype} {value.ndim}" if isinstance(value, Tensor) else value if kind == "fixed" else ""
            lines.append(f"{kind} {told}")
            continue
        target = node.target
        if not isinstance(target, str | torch._ops.OpOverload):
            target = f"{target.__module__}.{target.__qualname__}"
        keywords = [f"{name}={written(arg)}" for name, arg in sorted(node.kwargs.items())]
        lines.append(f"{node.op} {target} {written(node.args)} {keywords}")
    return [*lines, str(constants)]

"""Where in a graph a norm and a gate may be, and what lies between them; decisions only, nothing is changed.

From every reduction, and every norm that is one operation, the elementwise operations behind it are read as polynomials
over rows. Which tensor is the one that is normalised is tried: all that has a rule is opened up first, which finds a
gate in front of the norm, then each tensor near the reduction is taken as it is.
"""

from torch import fx

from fla_compile.passes.data_flow import Flow
from fla_compile.passes.log_decay import op_name
from fla_compile.passes.norm_gate_form import Reading, read
from fla_compile.passes.normal_form import same_size
from fla_compile.passes.row_values import ACTIVATIONS, NORMS, REDUCTIONS, RULES, Values
from fla_compile.passes.spellings import call_of, is_cast, is_reshape, peel, tensor_of

NEAR = 12  # operations between a reduction and the tensor that it normalises


def elementwise(node: fx.Node) -> bool:
    call = call_of(node)
    return call is not None and (call.name in RULES or is_cast(node) or is_reshape(node))


def argument_of(node: fx.Node) -> fx.Node | None:
    """The gate that an activation is computed from: behind casts, reshapes, signs and factors."""
    x = node.args[0] if node.args else node.kwargs.get("input")
    while isinstance(x := peel(x), fx.Node):
        call = call_of(x)
        inner = [y for y in call.args.values() if isinstance(y, fx.Node)] if call is not None else []
        if len(inner) != 1 or call.name not in ("neg", "mul", "div"):
            return x
        x = inner[0]
    return None


class Search:
    """The graph as the decisions see it; nothing here changes it."""

    def __init__(self, graph: fx.Graph):
        self.graph, self.flow = graph, Flow(graph)
        self.gates: set[fx.Node] = set()
        self.gated: set[fx.Node] = set()  # computed, element by element, from an activation
        self.seeds: list[fx.Node] = []  # reductions and norms
        for node in graph.nodes:
            call = call_of(node)
            if call is None:
                continue
            if call.name in ACTIVATIONS:
                self.gated.add(node)
                gate = argument_of(node)
                if gate is not None:
                    self.gates.add(gate)
            elif elementwise(node) and any(n in self.gated for n in self.flow.inputs(node)):
                self.gated.add(node)
            if call.name in REDUCTIONS | NORMS:
                self.seeds.append(node)

    def behind(self, seed: fx.Node) -> list[fx.Node]:
        """What is computed from a node element by element, itself included, in order."""
        found, todo = {seed}, [seed]
        while todo:
            for user, _ in self.flow.readers(todo.pop()):
                part = op_name(user) == "getitem" and tensor_of(user) is not None
                if user not in found and (elementwise(user) or part):
                    found.add(user)
                    todo.append(user)
        return sorted(found, key=self.flow.order.__getitem__)

    def bases(self, seed: fx.Node) -> list[fx.Node | None]:
        """Which tensor may be what is normalised: None for whatever has no rule, then the near ones, far ones first."""
        found: dict[fx.Node, None] = {}
        todo = [n for n in self.flow.inputs(seed)[:1]]
        while todo and len(found) < NEAR:
            node = todo.pop(0)
            if node in found or tensor_of(node) is None:
                continue
            found[node] = None
            call = call_of(node)
            if call is not None and (
                is_cast(node) or is_reshape(node) or call.name in ("mul", "sub", "pow", "square", "abs", "div")
            ):
                todo += self.flow.inputs(node)
        return [None, *reversed(found)]

    def match(self, seed: fx.Node) -> tuple[fx.Node, Reading, Values] | None:
        """The last node of a pattern around a reduction."""
        region = [n for n in self.behind(seed) if n in self.gated]
        if not region:
            return None
        for base in self.bases(seed):
            cuts = self.gates if base is None else {*self.gates, base}
            values = Values(cuts, self.flow)
            readings = {n: reading for n in region if (reading := self.reading(n, values)) is not None}
            if readings:
                root = next(iter(readings))
                while len(readers := {user for user, _ in self.flow.readers(root)}) == 1:
                    (user,) = readers
                    if user not in readings:
                        break
                    root = user
                return root, readings[root], values
        return None

    def reading(self, node: fx.Node, values: Values) -> Reading | None:
        value = tensor_of(node)
        if value is None or not value.dtype.is_floating_point:
            return None
        found = read(values.opened(node) if node in self.gates else values.of(node))
        whole = found is not None and all(
            same_size(tensor_of(n).numel(), value.numel()) for n in (found.x, found.gate)
        )  # fmt: skip
        return found if whole else None

"""Check a recognised divergence as `loss_check` does: the program's operations and the kernel, on few random rows."""

import torch
from torch import fx

from fla_compile.passes.kl_labels import Both
from fla_compile.passes.kl_labels_emit import BothEmitter
from fla_compile.passes.kl_rules import constant
from fla_compile.passes.kl_values import Pairs
from fla_compile.passes.loss_check import LARGE, WIDTH, Program, Sizes, compare
from fla_compile.passes.loss_rules import is_zero
from fla_compile.passes.loss_values import Root, is_one, resolved
from fla_compile.passes.records import Refused
from fla_compile.passes.spellings import call_of, tensor_of


class TwoLayers(Program):
    """The operations from both layers to the loss, at small sizes, as a graph of `operands`."""

    def __init__(self, losses: Pairs, both: Both):
        loss, self.hard = both.soft, both.hard
        self.losses, self.sizes = losses, Sizes()
        self.graph = fx.Graph()
        self.operands: list[torch.Tensor] = []
        self.inputs: dict[fx.Node, fx.Node] = {}
        generator = torch.Generator().manual_seed(0)
        self.random = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
        self.mask = lambda *size: torch.rand(size, generator=generator) > 0.3
        roots = loss.student.root, loss.teacher.root
        V = roots[0].classes.size
        if self.sizes.product(loss.rows) * V > LARGE:
            raise Refused("validation_failed", "the rows are too many to run on random data")
        if self.hard is not None:
            self.loss, self.picked = self.hard, self.drawn(self.hard, generator)
        for root in roots:
            shape = [1 if is_one(label.size) else self.sizes(label) for label in root.rows]
            self.add(root.x, self.random(*shape, WIDTH))
            self.add(root.weight, self.random(*((WIDTH, V) if root.transposed else (V, WIDTH))))
            if root.bias is not None:
                self.add(root.bias, self.random(V))
            if root is roots[0]:
                self.has_bias = root.bias is not None
                self.leaves = 2 + self.has_bias
        layers = {root.node: root for root in roots}
        for n in both.inside:
            if n not in layers:
                self.operands_of(n)
        env: dict[fx.Node, fx.Node] = {}
        for n in both.inside:
            env[n] = self.copied(n, env) if n not in layers else self.layer(layers[n])
            if n is loss.teacher.root.node:
                env[n] = self.graph.call_method("detach", (env[n],))
        self.graph.output(tuple(env[n] for n in both.nodes))

    def layer(self, root: Root) -> fx.Node:
        value, weight = self.losses.values[root.node], self.inputs[root.weight]
        weight = self.graph.call_method("t", (weight,)) if root.transposed else weight
        bias = None if value.root.bias is None or root.bias is None else self.inputs[root.bias]
        out = self.graph.call_function(torch.nn.functional.linear, (self.inputs[root.x], weight, bias))
        if value.class_axis == 0 and len(root.rows) > 0:
            out = self.graph.call_function(torch.movedim, (out, -1, 0))
        return self.graph.call_method("reshape", (out, self.sizes.shape(resolved(value.dims))))

    def copied(self, node: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
        """Without a detach: the teacher is cut off above, and of the student nothing is."""
        call = call_of(node)
        return env[call.get("input")] if call is not None and call.name == "detach" else super().copied(node, env)

    def operand(self, node: fx.Node) -> None:
        if node in self.losses.values or node in self.losses.pairs or node in self.inputs or is_zero(node):
            return
        number = constant(node)
        if number is not None:
            return self.add(node, torch.tensor(number, dtype=torch.float64))
        if self.hard is not None:
            return super().operand(node)
        if node not in self.losses.laid:
            raise Refused("validation_failed", f"nothing says what {node.name} is made of")
        shape = self.sizes.shape(self.losses.laid[node])
        is_mask = tensor_of(node).dtype == torch.bool
        self.add(node, self.mask(*shape) if is_mask else self.random(*shape).abs() + 0.1)


def check(losses: Pairs, both: Both) -> float:
    """The largest relative error; raises `Refused("validation_failed")` beyond tolerance."""

    def kernel(program: TwoLayers) -> fx.Graph:
        graph = fx.Graph()
        mine = {node: graph.placeholder(x.name) for node, x in program.inputs.items()}
        emitter = BothEmitter(graph, mine, program.sizes, faked=False)
        needs = True, True, program.has_bias
        graph.output(tuple(emitter.losses(both, needs, [torch.float64] * len(both.nodes))))
        return graph

    return compare(lambda: TwoLayers(losses, both), kernel)

"""Lower a loop of exactly one step: the step itself, as plain operations.

Before: `*final_states, *outputs = scan(body, states, reads [1, ...], invariants)`, one token of a decoding program.
After: the step on `reads[0]`, its outputs as [1, ...]; Inductor fuses it with what stands around it.

It is legal for every step, known family or not. A graph for any number of steps never comes here: a length that may
vary is no constant of the graph, and torch.compile gives the length 1 a graph of its own.
"""

import operator

import torch
from torch import fx

from fla_compile.passes.lower import Lowered
from fla_compile.passes.lowering import Lowering, extract
from fla_compile.passes.step import Step

KERNEL = "step (Inductor)"
FRESH = torch.ops.aten.clone.default


def lower_step(step: Step) -> Lowered:
    low = Lowering(step, zero_init=(), logs=())
    operands = list(low.init)
    operands += [low.call(torch.select, low.node[node], 0, 0) for node in step.reads]
    operands += [low.node[node] for node in step.invariants]
    results = [*step.next_carries, *step.outputs]
    low.root.add_module("step", extract(step, low.operands, results))
    call = low.graph.call_module("step", tuple(operands))
    values: list[fx.Node] = []
    for i, node in enumerate(results):
        value = low.call(operator.getitem, call, i)
        if i in step.idle:
            value = low.init[i]
        elif node.target is not FRESH or node in results[:i]:
            # No two results may share memory, nor one with an operand.
            value = low.call(torch.clone, value)
        values.append(value if i < len(step.carries) else low.call(torch.unsqueeze, value, 0))
    low.graph.output(tuple(values))
    return Lowered(fx.GraphModule(low.root, low.graph), ())

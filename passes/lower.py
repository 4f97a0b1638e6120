"""Lower: a classified step becomes a module that runs all time steps at once.

Before: `*final_states, *outputs = scan(body, states, reads, invariants)`, one call of the body per time step.
After: a module with the same operands and results (plus the logarithms of decays that were proved outside the loop),
one stage of the plan after the other, and what lies between and behind them mapped over time.

It is legal because each stage equals its states' recurrence as a polynomial; `validate` checks the whole on data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fla_compile.passes.fission import Delay, Window
from fla_compile.passes.log_decay import emit
from fla_compile.passes.lower_recurrence import lower_recurrence
from fla_compile.passes.lower_scans import (
    lower_delay,
    lower_elementwise,
    lower_generic,
    lower_selective,
    lower_window,
)
from fla_compile.passes.lowering import Lowering
from fla_compile.passes.recurrence import Elementwise, Generic, Plan, Recurrence, Selective
from fla_compile.passes.step import Step, original

STAGES: dict[type, Callable[[Lowering, Any, dict[int, fx.Node]], None]] = {
    Delay: lower_delay,
    Window: lower_window,
    Elementwise: lower_elementwise,
    Selective: lower_selective,
    Generic: lower_generic,
}


@dataclass
class Lowered:
    """`module(states, reads, invariants, logs)` gives (final states, outputs); `logs` names the operands it wants."""

    module: fx.GraphModule
    logs: tuple[int, ...]


def lower(step: Step, plan: Plan, zero_init: Sequence[bool], logs: Sequence[int]) -> Lowered:
    low = Lowering(step, zero_init, logs)
    log_nodes = write_logs(step, plan, low.log_node)
    final = {carry: low.init[carry] for carry in step.idle}
    for stage in plan.stages:
        if isinstance(stage, Recurrence):
            lower_recurrence(low, stage, log_nodes, final)
        else:
            STAGES[type(stage)](low, stage, final)
    outputs = all_outputs(low)
    low.graph.output((*(final[i] for i in range(len(step.carries))), *outputs))
    return Lowered(fx.GraphModule(low.root, low.graph), low.logs)


def all_outputs(low: Lowering) -> list[fx.Node]:
    """The step's outputs as [T, ...]; no two of them may share memory, nor one with a state."""
    nodes = [original(n) if original(n) in low.node else n for n in low.step.outputs]
    low.parallel(nodes)
    outputs: list[fx.Node] = []
    for node in nodes:
        stream = low.stream(node)
        if stream in outputs or stream in low.shared or node in (*low.step.reads, *low.step.invariants):
            stream = low.call(torch.clone, stream)
        outputs.append(stream)
    return outputs


def write_logs(step: Step, plan: Plan, given: dict[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
    """Add the logarithms of the decays to the step's graph; returns the log of each decay atom."""
    logs: dict[fx.Node, fx.Node] = {}
    for r in plan.stages:
        if not isinstance(r, Recurrence):
            continue
        for factor, log in (*r.decay, *r.value_decay):
            node = step.atoms[factor.atom].node
            if node in given or node in logs:
                continue
            known = set(step.gm.graph.nodes)
            with step.gm.graph.inserting_before(step.gm.graph.output_node()):
                result = emit(log, step.gm.graph)
            assert isinstance(result, fx.Node)
            for fresh in step.gm.graph.nodes:
                if fresh not in known:
                    step.adopt(fresh)
            logs[node] = result
    return logs

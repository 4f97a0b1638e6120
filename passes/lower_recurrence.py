"""Lower: a classified step becomes a module that runs all time steps at once.

Before: `*final_states, *outputs = scan(body, states, reads, invariants)`, one call of the body per time step.
After: a module with the same operands and results (plus the logarithms of decays that were proved outside the loop):

    parallel part    what does not depend on the state, mapped over time by vmap (left out where it is an operand)
    operands         products of factors, laid out as q, k [B,T,H,K], v [B,T,H,V], log decay, initial state [B,H,K,V]
    kernel op        one `torch.ops.fla_compile.<family>` per read-out
    after part       what only consumes the read-outs, mapped over time

It is legal because the classified step equals the kernel's recurrence as a polynomial; `validate` checks it on data.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fla_compile.passes.classify import Plan, Recurrence, original
from fla_compile.passes.log_decay import emit
from fla_compile.passes.normal_form import Factor, Labels, same_size
from fla_compile.passes.normalise import Step, shape_of

TIME = -1  # stands for the time axis among labels


class OverTime(nn.Module):
    """Runs a module written for one time step on all of them: operands with time lead by [T, ...]."""

    def __init__(self, step: fx.GraphModule, timed: Sequence[bool]):
        super().__init__()
        self.step = step
        self.in_dims = tuple(0 if t else None for t in timed)

    def forward(self, *operands: Any) -> tuple[torch.Tensor, ...]:
        return torch.vmap(self.step, in_dims=self.in_dims)(*operands)


@dataclass
class Lowered:
    """`module(states, reads, invariants, logs)` gives (final states, outputs); `logs` names the operands it wants."""

    module: fx.GraphModule
    logs: tuple[int, ...]
    ops: tuple[str, ...]


def extract(step: Step, operands: Sequence[fx.Node], results: Sequence[fx.Node]) -> fx.GraphModule:
    """The part of the step's graph that computes `results` from `operands`."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in operands:
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)

    needed: set[fx.Node] = set()
    todo = list(results)
    while todo:
        node = todo.pop()
        if node not in needed and node not in env:
            needed.add(node)
            todo.extend(node.all_input_nodes)
    for node in step.gm.graph.nodes:
        if node in needed:
            env[node] = graph.node_copy(node, lambda n: env[n])
    graph.output(tuple(env[node] for node in results))
    return fx.GraphModule(step.gm, graph)


class Lowering:
    """Builds the module of one step; every method appends nodes to `self.graph`."""

    def __init__(self, step: Step, plan: Plan, zero_init: Sequence[bool], logs: Sequence[int]):
        self.step, self.plan, self.zero_init, self.logs = step, plan, zero_init, tuple(logs)
        self.graph, self.root = fx.Graph(), nn.Module()
        self.node: dict[fx.Node, fx.Node] = {}
        self.returned: set[fx.Node] = set()
        operands = [*step.carries, *step.reads, *step.invariants]
        self.operands = operands
        for node in operands:
            self.node[node] = self.graph.placeholder(node.name)
        self.log_node: dict[fx.Node, fx.Node] = {}
        for index in self.logs:
            self.log_node[operands[index]] = self.graph.placeholder(f"log_{operands[index].name}")
        self.sizes: dict[int, Any] = {}
        self.length = self.call(torch.ops.aten.sym_size.int, self.node[step.reads[0]], 0)

    def call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(function, args, kwargs)

    def cast(self, tensor: fx.Node, have: torch.dtype | None, want: torch.dtype) -> fx.Node:
        return tensor if have == want else self.graph.call_method("to", (tensor, want))

    def size(self, label: int) -> Any:
        """The size of a label (or of time) as a number or a node."""
        if label == TIME:
            return self.length
        size = self.step.space.sizes[label]
        if isinstance(size, int):
            return size
        if label not in self.sizes:
            self.sizes[label] = self._dynamic_size(size)
        return self.sizes[label]

    def _dynamic_size(self, size: Any) -> fx.Node:
        for node in self.operands:
            value = node.meta["val"]
            if isinstance(value, torch.Tensor):
                for axis, extent in enumerate(value.shape):
                    if same_size(extent, size):
                        lead = 1 if node in self.step.reads else 0
                        return self.call(torch.ops.aten.sym_size.int, self.node[node], axis + lead)
        raise ValueError(f"size must be the extent of an operand, got {size}")

    def product(self, labels: Sequence[int]) -> Any:
        sizes = [self.size(label) for label in labels]
        static = math.prod(s for s in sizes if isinstance(s, int))
        total: Any = static
        for size in sizes:
            if not isinstance(size, int):
                total = size if isinstance(total, int) and total == 1 else self.call(torch.mul, total, size)
        return total

    def parallel(self, wanted: Sequence[fx.Node]) -> None:
        """Compute state-free nodes of the step for all steps at once."""
        for timed in (False, True):
            todo = [n for n in dict.fromkeys(wanted) if n not in self.node and (n in self.step.timed) == timed]
            if not todo:
                continue
            inputs = [n for n in (*self.step.reads, *self.step.invariants) if timed or n not in self.step.reads]
            part = extract(self.step, inputs, todo)
            self._submodule("before", part, inputs, todo, timed)

    def _submodule(
        self, name: str, part: fx.GraphModule, inputs: list[fx.Node], results: Sequence[fx.Node], timed: bool
    ) -> None:
        used = [p for p in part.graph.find_nodes(op="placeholder") if p.users]
        kept = [n for n, p in zip(inputs, part.graph.find_nodes(op="placeholder"), strict=True) if p in used]
        for p in part.graph.find_nodes(op="placeholder"):
            if p not in used:
                part.graph.erase_node(p)
        part.recompile()
        module: nn.Module = part
        if timed:
            module = OverTime(part, [n in self.step.timed for n in kept])
        target = f"{name}_{len(self.root._modules)}"
        self.root.add_module(target, module)
        call = self.graph.call_module(target, tuple(self.node[n] for n in kept))
        for i, node in enumerate(results):
            self.node[node] = self.call(operator.getitem, call, i)

    def laid_out(self, tensor: fx.Node, axes: tuple[Labels, ...], timed: bool, order: Sequence[int]) -> fx.Node:
        """`tensor` [T?, *axes] with one axis for each entry of `order`, of size 1 where it has none."""
        flat = [label for axis in axes for label in axis]
        have = ([TIME] if timed else []) + flat
        if any(len(axis) != 1 for axis in axes):
            tensor = self.call(torch.reshape, tensor, [self.size(label) for label in have])
        wanted = [label for label in order if label in have]
        if wanted != have:
            tensor = self.call(torch.permute, tensor, [have.index(label) for label in wanted])
        for i, label in enumerate(order):
            if label not in have:
                tensor = self.call(torch.unsqueeze, tensor, i)
        return tensor

    def group(
        self,
        factors: Sequence[tuple[Factor, fx.Node]],
        order: Sequence[int],
        dtype: torch.dtype | None,
        combine: Any = torch.mul,
    ) -> fx.Node | None:
        """The product (or sum) of factors over the axes `order`, broadcast but not yet expanded."""
        total: fx.Node | None = None
        for factor, tensor in factors:
            part = self.laid_out(tensor, factor.axes, self.step.atoms[factor.atom].node in self.step.timed, order)
            if dtype is not None:
                part = self.cast(part, None, dtype)
            total = part if total is None else self.call(combine, total, part)
        return total

    def full(self, tensor: fx.Node, roles: Sequence[Sequence[int]], have: set[int]) -> fx.Node:
        """Expand to all labels of `roles`, of which the tensor has `have`, and merge each role into one axis."""
        order = [label for role in roles for label in role]
        if not have.issuperset(order):
            tensor = self.graph.call_method("expand", (tensor, *(self.size(label) for label in order)))
        if all(len(role) == 1 for role in roles):
            return tensor
        return self.call(torch.reshape, tensor, [self.product(role) for role in roles])

    def operand(self, r: Recurrence, factors: tuple[Factor, ...], axis: Labels) -> fx.Node:
        """q, k or v as [B,T,H,X]; several factors of narrow tensors are multiplied at the state's precision."""
        roles = (r.batch, (TIME,), r.heads, axis)
        order = [label for role in roles for label in role]
        pairs = [(f, self.node[self.step.atoms[f.atom].node]) for f in factors]
        wide = self.state_dtype(r) if len(factors) > 1 else None
        total = self.group(pairs, order, wide)
        if total is None:
            total = self.call(torch.ones, [1] * len(order), dtype=self.state_dtype(r), device=self.device(r))
        return self.full(total, roles, self.labels_of(factors))

    def labels_of(self, factors: Sequence[Factor]) -> set[int]:
        timed = any(self.step.atoms[f.atom].node in self.step.timed for f in factors)
        return {label for f in factors for label in f.labels} | ({TIME} if timed else set())

    def factor_dtype(self, r: Recurrence, factors: tuple[Factor, ...]) -> torch.dtype:
        if len(factors) == 1:
            return self.step.atoms[factors[0].atom].node.meta["val"].dtype
        return self.state_dtype(r)

    def state_dtype(self, r: Recurrence) -> torch.dtype:
        return self.step.carries[r.carry].meta["val"].dtype

    def device(self, r: Recurrence) -> torch.device:
        return self.step.carries[r.carry].meta["val"].device

    def log_decay(self, r: Recurrence, dtype: torch.dtype) -> fx.Node | None:
        """The natural log of the decay: None, [H], [B,T,H] or [B,T,H,K]."""
        if r.family == "linear_attention":
            return None
        roles: tuple[Labels, ...] = (r.heads,) if r.family == "retention" else (r.batch, (TIME,), r.heads)
        if r.family == "gla":
            roles = (*roles, r.keys)
        order = [label for role in roles for label in role]
        pairs = [(factor, self.log_tensor(factor)) for factor, _ in r.decay]
        total = self.group(pairs, order, dtype, torch.add)
        if r.decay_coef != 1.0:
            base = total
            if base is None:
                base = self.call(torch.zeros, [1] * len(order), dtype=dtype, device=self.device(r))
            total = self.call(torch.add, base, math.log(r.decay_coef))
        assert total is not None
        return self.full(total, roles, self.labels_of([factor for factor, _ in r.decay]))

    def signs(self, r: Recurrence, dtype: torch.dtype) -> fx.Node | None:
        """Where the sign of the decay is unknown: the product of its signs up to each step, [B?,T,H?,K?] of +1 and -1.

        With P_t that product, S_t = P_t * S'_t where S' decays by |a|; so q and k are multiplied by P, and a zero
        counts as positive because its magnitude ends all that came before.
        """
        order = [*r.batch, TIME, *r.heads, *r.keys]
        total: fx.Node | None = None
        for factor, log in r.decay:
            if log.op != "magnitude":
                continue
            node = self.step.atoms[factor.atom].node
            part = self.laid_out(self.node[node], factor.axes, node in self.step.timed, order)
            part = self.call(torch.where, self.call(operator.lt, part, 0), -1.0, 1.0)
            if node not in self.step.timed:
                shape = [self.length if label == TIME else -1 for label in order]
                part = self.graph.call_method("expand", (part, *shape))
            total = part if total is None else self.call(torch.mul, total, part)
        if total is None:
            return None
        return self.cast(self.call(torch.cumprod, total, len(r.batch)), None, dtype)

    def merged(self, tensor: fx.Node, roles: Sequence[Labels]) -> fx.Node:
        """Each role's axes, which may be of size 1, merged into one axis."""
        for i, role in enumerate(roles):
            if not role:
                tensor = self.call(torch.unsqueeze, tensor, i)
            elif len(role) > 1:
                sizes = [self.size(label) for label in role]
                expanded = [-1] * i + sizes + [-1] * sum(len(later) for later in roles[i + 1 :])
                tensor = self.graph.call_method("expand", (tensor, *expanded))
                tensor = self.call(torch.flatten, tensor, i, i + len(role) - 1)
        return tensor

    def log_tensor(self, factor: Factor) -> fx.Node:
        node = self.step.atoms[factor.atom].node
        return self.log_node[node] if node in self.log_node else self.node[self.log_nodes[node]]

    def module(self) -> Lowered:
        step = self.step
        self.log_nodes = write_logs(step, self.plan, self.log_node)
        wanted = [step.atoms[f.atom].node for r in self.plan.recurrences for f in (*r.q, *r.k, *r.v)]
        wanted += self.log_nodes.values()
        wanted += [n for n in step.outputs if n not in step.stateful]
        self.parallel([n for n in wanted if n not in self.node])
        final: dict[int, fx.Node] = {}
        for carry in self.plan.idle:
            final[carry] = self.node[step.carries[carry]]
        for r in self.plan.recurrences:
            self.core(r, final)
        if self.plan.post:
            inputs = [*(r.read for r in self.plan.recurrences if r.read is not None), *step.reads, *step.invariants]
            part = extract(step, inputs, self.plan.post)
            for node in inputs[: len(inputs) - len(step.reads) - len(step.invariants)]:
                step.timed.add(node)
            self._submodule("after", part, inputs, self.plan.post, timed=True)
        outputs = [self.stacked(node) for node in step.outputs]
        self.graph.output((*(final[i] for i in range(len(step.carries))), *outputs))
        return Lowered(
            fx.GraphModule(self.root, self.graph), self.logs, tuple(r.family for r in self.plan.recurrences)
        )

    def stacked(self, node: fx.Node) -> fx.Node:
        """An output [T, ...]; one that is the same at every step is expanded."""
        if node in self.step.stateful:
            node, seen = original(node), self.node[original(node)] in self.returned
            self.returned.add(self.node[node])
            return self.call(torch.clone, self.node[node]) if seen else self.node[node]
        if node in self.step.timed:
            return self.node[node]
        shape = [self.length] + [self._extent(s) for s in shape_of(node)]
        return self.graph.call_method("expand", (self.node[node], *shape))

    def _extent(self, size: Any) -> Any:
        return size if isinstance(size, int) else self._dynamic_size(size)

    def core(self, r: Recurrence, final: dict[int, fx.Node]) -> None:
        carry = self.node[self.step.carries[r.carry]]
        dtype = torch.promote_types(
            torch.promote_types(self.factor_dtype(r, r.q), self.factor_dtype(r, r.k)), self.factor_dtype(r, r.v)
        )
        wide = torch.float64 if torch.float64 in (dtype, self.state_dtype(r)) else torch.float32
        if wide == torch.float64:
            dtype = wide
        q, k, v = (
            self.cast(self.operand(r, factors, axis), self.factor_dtype(r, factors), dtype)
            for factors, axis in ((r.q, r.keys), (r.k, r.keys), (r.v, r.values))
        )
        signs = self.signs(r, dtype)
        if signs is not None:
            signs = self.merged(signs, (r.batch, (TIME,), r.heads, r.keys))
            q, k = self.call(torch.mul, q, signs), self.call(torch.mul, k, signs)
        if r.write_coef != 1.0:
            v = self.call(torch.mul, v, r.write_coef)
        state_roles = (r.batch, r.heads, r.keys, r.values)
        initial = None
        if not self.zero_init[r.carry]:
            order = [label for role in state_roles for label in role]
            initial = self.full(self.laid_out(carry, r.state_dims, False, order), state_roles, set(order))
            initial = self.cast(initial, self.state_dtype(r), wide)
        op = getattr(torch.ops.fla_compile, r.family).default
        call = self.call(op, q, k, v, self.log_decay(r, wide), initial, r.scale)
        if r.carry not in final:
            state = self.call(operator.getitem, call, 1)
            if signs is not None:
                last = self.call(torch.unsqueeze, self.call(torch.select, signs, 1, -1), -1)
                state = self.call(torch.mul, state, last)
            state = self.restored(state, state_roles, r.state_dims, timed=False)
            final[r.carry] = self.cast(state, wide, self.state_dtype(r))
        if r.read is not None:
            read_roles = (r.batch, (TIME,), r.heads, r.values)
            read = self.restored(self.call(operator.getitem, call, 0), read_roles, r.read_dims, timed=True)
            self.node[r.read] = self.cast(read, dtype, r.read.meta["val"].dtype)

    def restored(
        self, tensor: fx.Node, roles: Sequence[Sequence[int]], dims: tuple[Labels, ...], timed: bool
    ) -> fx.Node:
        """The kernel's [B,(T),H,...] back to the axes that the program has, time first."""
        have = [label for role in roles for label in role]
        if any(len(role) != 1 for role in roles):
            tensor = self.call(torch.reshape, tensor, [self.size(label) for label in have])
        order = ([TIME] if timed else []) + [label for axis in dims for label in axis]
        if order != have:
            tensor = self.call(torch.permute, tensor, [have.index(label) for label in order])
        if any(len(axis) != 1 for axis in dims):
            shape = ([self.length] if timed else []) + [self.product(axis) for axis in dims]
            tensor = self.call(torch.reshape, tensor, shape)
        return tensor


def write_logs(step: Step, plan: Plan, given: dict[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
    """Add the logarithms of the decays to the step's graph; returns the log of each decay atom."""
    logs: dict[fx.Node, fx.Node] = {}
    for r in plan.recurrences:
        for factor, log in r.decay:
            node = step.atoms[factor.atom].node
            if node in given or node in logs:
                continue
            known = set(step.gm.graph.nodes)
            with step.gm.graph.inserting_before(step.gm.graph.output_node()):
                result = emit(log, step.gm.graph)
            assert isinstance(result, fx.Node)
            for fresh in step.gm.graph.nodes:
                if fresh not in known and any(n in step.timed for n in fresh.all_input_nodes):
                    step.timed.add(fresh)
            logs[node] = result
    return logs

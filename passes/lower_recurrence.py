"""Lower a matrix-valued recurrence: lay out its operands and call the kernel op of its family.

    o, S_T = torch.ops.fla_compile.<family>(q, k, v, gates..., initial_state, scale)

A read-out before the update is the same recurrence on sequences that begin with one idle step: k, v and the gates are
moved back by one, q gets one more row at the end. A decay that may be negative goes as its magnitude: with P_t the
product of its signs, S_t = P_t * S'_t where S' decays by |a|, so q and k are multiplied by P; a zero counts as positive
because its magnitude ends all that came before.

Where the kernel takes operands that neighbouring heads share, heads that an operand does not vary over are left out of
it if they are the last ones: it is not expanded. Of a state, heads that only the query has are left out likewise.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fla_compile.passes.log_decay import Log
from fla_compile.passes.lowering import TIME, Layout, Lowering, factor_dtype
from fla_compile.passes.normal_form import Factor, Labels
from fla_compile.passes.recurrence import Recurrence
from fla_compile.passes.share_heads import HEADS
from fla_compile.passes.step import Step

OPS = {"gla": "gla_values"}  # where values decay
SHARING = {"linear_attention", "retention", "simple_gla", "gla"}


def lower_recurrence(low: Lowering, r: Recurrence, logs: dict[fx.Node, fx.Node], final: dict[int, fx.Node]) -> None:
    """Append the recurrence to the graph; its read-out and, once for each state, its final state become known."""
    _Kernel(low, r, logs).emit(final)


def operand_dtype(step: Step, r: Recurrence) -> torch.dtype:
    """The type of the kernel's q, k and v."""
    state = step.carries[r.carry].meta["val"]
    types = [factor_dtype(step, f, state.dtype) for f in (r.q, r.k, r.v)]
    own = torch.promote_types(torch.promote_types(types[0], types[1]), types[2])
    wide = torch.float64 if torch.float64 in (own, state.dtype) else torch.float32
    # Narrow operands that the program widens stay narrow for tensor cores only: a kernel's output is as narrow.
    widened = r.read is not None and r.read.meta["val"].dtype == wide
    return wide if wide == torch.float64 or (state.device.type == "cpu" and widened) else own


class _Kernel:
    def __init__(self, low: Lowering, r: Recurrence, logs: dict[fx.Node, fx.Node]):
        self.low, self.r, self.logs = low, r, logs
        self.rank: dict[fx.Node, int] = {}
        self.sharing = False  # whether operands may have fewer heads
        state = low.step.carries[r.carry].meta["val"]
        self.state_dtype, self.device = state.dtype, state.device
        self.dtype = operand_dtype(low.step, r)
        self.wide = torch.float64 if torch.float64 in (self.dtype, state.dtype) else torch.float32

    def layout(self, *axes: tuple[int, ...], heads: Labels | None = None) -> Layout:
        return Layout((self.r.batch, (TIME,), self.r.heads if heads is None else heads, *axes))

    def own_heads(self, factors: Sequence[Factor]) -> Labels:
        """The heads of an operand, up to the last one that it varies over."""
        heads, own = self.r.heads, self.low.labels_of(factors)
        while self.sharing and heads and heads[-1] not in own:
            heads = heads[:-1]
        return heads

    def state_heads(self) -> Labels:
        return tuple(label for label in self.r.heads if not self.sharing or label not in self.r.extra)

    def factors(
        self, factors: Sequence[Factor], *axes: tuple[int, ...], coef: float = 1.0, heads: Labels | None = None
    ) -> fx.Node:
        """Factors as [B,T,H,...] in the kernel's type."""
        low = self.low
        have = factor_dtype(low.step, factors, self.state_dtype)
        layout = self.layout(*axes, heads=self.own_heads(factors) if heads is None else heads)
        tensor = low.cast(low.operand(factors, layout, self.state_dtype, self.device), have, self.dtype)
        if coef != 1.0:
            tensor = low.call(torch.mul, tensor, coef)
        self.rank[tensor] = 3 + len(axes)
        return tensor

    def emit(self, final: dict[int, fx.Node]) -> None:
        r, low = self.r, self.low
        before = r.before and r.read is not None
        signs = self.signs()
        family = r.family
        if family == "rwkv6" and signs is not None:
            family = "gla"
        shifted = before and family != "rwkv6"
        if family == "retention" and shifted:
            family = "simple_gla"
        name = OPS.get(family, family) if r.value_decay else family
        self.sharing = name in SHARING and signs is None
        q, k = self.factors(r.q, r.keys), self.factors(r.k, r.keys)
        if shifted:
            q = self.late(q)
        if signs is not None:
            q = low.call(torch.mul, q, self.early(signs, shifted, 1.0))
            k = low.call(torch.mul, k, signs)
        gates: list[Any] = [self.early(x, shifted) for x in self.gates(family)]
        k = self.early(k, shifted)
        v = self.early(self.factors(r.v, r.values, coef=r.write_coef, heads=self.value_heads()), shifted)
        op = getattr(torch.ops.fla_compile, name).default
        call = low.call(op, q, k, v, *gates, self.initial(), r.scale)
        if self.sharing:
            self.note_heads(call)
        if r.carry not in final:
            final[r.carry] = self.final(low.call(operator.getitem, call, 1), signs)
        if r.read is not None:
            o = low.call(operator.getitem, call, 0)
            if shifted:
                o = low.call(torch.narrow, o, 1, 0, low.length)
            self.read(o)

    def note_heads(self, call: fx.Node) -> None:
        """For `share_heads`, where all are known."""
        r, low = self.r, self.low
        labels = {"q": self.own_heads(r.q), "k": self.own_heads(r.k), "v": self.value_heads()}
        labels |= {"g": self.own_heads([f for f, _ in r.decay]), "state": self.state_heads()}
        sizes = {name: low.product(heads) for name, heads in labels.items()}
        if all(isinstance(size, int) for size in sizes.values()):
            absent = {"g": call.args[3] is None, "state": call.args[4] is None}
            call.meta[HEADS] = {name: 0 if absent.get(name) else size for name, size in sizes.items()}

    def value_heads(self) -> Labels:
        """Those of v: one operand at least has as many heads as there are states, where no initial state has."""
        r = self.r
        shared = [self.own_heads(factors) for factors in (r.k, r.v, [f for f, _ in r.decay])]
        states = self.state_heads()
        return states if self.low.zero_init[r.carry] and states not in shared else shared[1]

    def gates(self, family: str) -> list[Any]:
        """What an op takes between v and the initial state."""
        r = self.r
        if family == "linear_attention":
            return [None]
        if r.value_decay:
            over_keys = self.log_decay(r.decay, r.keys) if r.decay or r.decay_coef != 1.0 else None
            return [over_keys, self.log_decay(r.value_decay, r.values, coef=1.0)]
        if family == "retention":
            return [self.log_decay(r.decay, layout=Layout((self.own_heads([f for f, _ in r.decay]),)))]
        if family == "delta_rule":
            return [self.factors(r.beta, coef=r.beta_coef)]
        if family in ("simple_gla", "gated_delta_rule"):
            g = self.log_decay(r.decay)
            return [g, self.factors(r.beta, coef=r.beta_coef)] if family == "gated_delta_rule" else [g]
        g = self.log_decay(r.decay, r.keys)
        if family == "kda":
            return [g, self.factors(r.beta, coef=r.beta_coef)]
        if family == "rwkv6":
            return [g, self.bonus()]
        if family == "dplr":
            assert r.erase is not None
            left = self.factors((*r.erase.scale, *r.erase.left), r.keys, coef=r.erase.coef)
            return [g, left, self.factors(r.erase.right, r.keys)]
        return [g]

    def log_decay(
        self,
        factors: Sequence[tuple[Factor, Log]],
        *axes: tuple[int, ...],
        layout: Layout | None = None,
        coef: float | None = None,
    ) -> fx.Node:
        """The natural log of a product of decays, in the wide type."""
        low = self.low
        layout = layout or self.layout(*axes, heads=self.own_heads([f for f, _ in factors]))
        coef = self.r.decay_coef if coef is None else coef
        total = low.group([(f, self.log(f)) for f, _ in factors], layout.order, self.wide, torch.add)
        if total is None:
            total = low.call(torch.zeros, [1] * len(layout.order), dtype=self.wide, device=self.device)
        if coef != 1.0:
            total = low.call(torch.add, total, math.log(coef))
        total = low.full(total, layout, low.labels_of([f for f, _ in factors]))
        self.rank[total] = len(layout.roles)
        return total

    def log(self, factor: Factor) -> fx.Node:
        node = self.low.step.atoms[factor.atom].node
        if node in self.low.log_node:
            return self.low.log_node[node]
        self.low.parallel([self.logs[node]])
        return self.low.node[self.logs[node]]

    def signs(self) -> fx.Node | None:
        """The product of the signs of all magnitudes up to each step, as [B,T,H,K]."""
        low, total = self.low, None
        layout = self.layout(self.r.keys)
        for factor, log in self.r.decay:
            if log.op != "magnitude":
                continue
            node = low.step.atoms[factor.atom].node
            part = low.laid_out(low.stream(node), factor.axes, True, layout.order)
            part = low.call(torch.where, low.call(operator.lt, part, 0), -1.0, 1.0)
            total = part if total is None else low.call(torch.mul, total, part)
        if total is None:
            return None
        product = low.cast(low.call(torch.cumprod, total, len(self.r.batch)), None, self.dtype)
        return low.full(product, layout, set())

    def bonus(self) -> fx.Node | None:
        r = self.r
        if not r.bonus:
            return None
        layout = Layout((r.heads, r.keys))
        have = factor_dtype(self.low.step, r.bonus, self.state_dtype)
        return self.low.cast(self.low.operand(r.bonus, layout, self.state_dtype, self.device), have, self.wide)

    def initial(self) -> fx.Node | None:
        r, low = self.r, self.low
        if low.zero_init[r.carry]:
            return None
        layout = Layout((r.batch, self.state_heads(), r.keys, r.values))
        own = {label for axis in r.state_dims for label in axis}
        tensor = low.full(low.laid_out(low.init[r.carry], r.state_dims, False, layout.order), layout, own)
        return low.cast(tensor, self.state_dtype, self.wide)

    def final(self, state: fx.Node, signs: fx.Node | None) -> fx.Node:
        r, low = self.r, self.low
        if signs is not None:
            state = low.call(torch.mul, state, low.call(torch.unsqueeze, low.call(torch.select, signs, 1, -1), -1))
        layout = Layout((r.batch, self.state_heads(), r.keys, r.values))
        state = low.restored(state, layout, r.state_dims, timed=False, dropped=() if self.sharing else r.extra)
        return low.cast(state, self.wide, self.state_dtype)

    def read(self, o: fx.Node) -> None:
        r, low = self.r, self.low
        assert r.read is not None
        own = r.read.meta["val"].dtype
        o = low.cast(low.restored(o, self.layout(r.values), r.read_dims, timed=True), self.dtype, own)
        low.node[r.read] = low.plus(o, r.rest, r.read_dims, own)

    def early(self, x: fx.Node | None, shifted: bool, value: float = 0.0) -> fx.Node | None:
        """One idle step in front."""
        return x if x is None or not shifted else self.padded(x, 1, 0, value)

    def late(self, x: fx.Node) -> fx.Node:
        """One more step at the end."""
        return self.padded(x, 0, 1, 0.0)

    def padded(self, x: fx.Node, front: int, back: int, value: float) -> fx.Node:
        rank = self.rank.get(x, 4)  # [B,T,H,X] or [B,T,H]
        return self.low.call(torch.nn.functional.pad, x, (*(0, 0) * (rank - 2), front, back), value=value)

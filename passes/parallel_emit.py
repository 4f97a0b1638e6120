"""Write a read-out as kernel operators into a graph: operands laid out as [B,T,H,K] and [B,T,H,V], and the result back.

q, k, v      products of factors, broadcast over the labels that they lack; several are multiplied in full precision
log decay    None, [H], [B,T,H] or [B,T,H,K]
kernel       one `torch.ops.fla_compile.<family>` per term
result       times the factors of the rows, added up, in the axes and the type of the program
"""

import math
import operator
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fla_compile.passes.appending import Appending
from fla_compile.passes.log_decay import Log, emit
from fla_compile.passes.memory import memory
from fla_compile.passes.normal_form import Factor, Labels, same_size
from fla_compile.passes.parallel_decide import Kernel, Operand, ReadOut
from fla_compile.passes.parallel_forms import Forms, Terms
from fla_compile.passes.parallel_linear import written_number
from fla_compile.passes.records import Refused


@dataclass
class Traced:
    """A piece of a graph and its forms: `origin` says which node of the program holds what a traced node computes."""

    forms: Forms
    origin: Mapping[fx.Node, fx.Node]
    sized: Sequence[fx.Node]
    proofs: Mapping[fx.Node, Log]

    def leaves(self, read: ReadOut) -> set[fx.Node]:
        """The nodes of the program that the kernels of a read-out are computed from; raises `Refused`."""
        found: set[fx.Node] = set()
        for kernel in read.kernels:
            operands = [*kernel.q.factors, *kernel.k.factors, *kernel.v.factors, *kernel.rows.factors]
            logs = (*kernel.q.log, *kernel.k.log, *kernel.v.log, *kernel.rows.log, *kernel.gate, *kernel.level)
            for factor in [*operands, *(f for t in logs for f in t.factors)]:
                found |= self._below(factor.atom)
        return found

    def _below(self, atom: int) -> set[fx.Node]:
        if atom == self.forms.pos:
            return set()
        node = self.forms.atoms[self.forms.log_of.get(atom, self.forms.sign_of.get(atom, atom))].node
        if node is None:
            raise Refused("unsupported_op", "a part of the mask is computed nowhere by itself")
        found, todo = set[fx.Node](), [node]
        while todo:
            here = todo.pop()
            if here in self.origin:
                found.add(self.origin[here])
            elif here.op == "get_attr" and written_number(self.forms.gm, here) is not None:
                continue
            elif here.op == "get_attr" or "nondeterministic_seeded" in str(getattr(here.target, "tags", "")):
                raise Refused("unsupported_op", f"{here.target} cannot be computed twice")
            else:
                todo += here.all_input_nodes
        return found


@dataclass
class Emitter(Appending):
    """Appends nodes to `graph` at its insertion point; `env` says which of its nodes stand for those of the program.

    What lies in `changed` memory is copied, as a kernel may keep it for its backward. `faked` gives nodes fake values.
    """

    traced: Traced
    graph: fx.Graph
    env: Mapping[fx.Node, fx.Node]
    changed: Set[int]
    faked: bool
    device: torch.device
    added: list[fx.Node] = field(default_factory=list)
    copies: dict[fx.Node, fx.Node] = field(default_factory=dict)
    extents: dict[int, fx.Node] = field(default_factory=dict)

    def held(self, node: fx.Node) -> fx.Node:
        """A node of the program."""
        node = self.env.get(node, node)
        return self.method("clone", node) if memory(node) & self.changed else node

    def cast(self, tensor: fx.Node, dtype: torch.dtype) -> fx.Node:
        value = tensor.meta.get("example_value") if self.faked else None
        return tensor if value is not None and value.dtype == dtype else self.method("to", tensor, dtype)

    def size(self, label: int) -> Any:
        """The size of a label as a number or a node."""
        size = self.traced.forms.space.sizes[label]
        if isinstance(size, int):
            return size
        if label not in self.extents:
            self.extents[label] = self._extent(size)
        return self.extents[label]

    def _extent(self, size: Any) -> fx.Node:
        for node in self.traced.sized:
            value = node.meta["example_value"]
            if isinstance(value, torch.SymInt) and same_size(value, size):
                return self.held(node)
            for axis, extent in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                if same_size(extent, size):
                    return self.method("size", self.held(node), axis)
        raise Refused("unsupported_op", f"no tensor has an axis of size {size}")

    def sizes(self, roles: Sequence[Labels]) -> list[Any]:
        found = []
        for role in roles:
            numbers = [self.size(label) for label in role]
            total: Any = math.prod(n for n in numbers if isinstance(n, int))
            for n in numbers:
                if not isinstance(n, int):
                    total = n if isinstance(total, int) and total == 1 else self.call(torch.mul, total, n)
            found.append(total)
        return found

    def tensor(self, atom: int) -> fx.Node:
        forms = self.traced.forms
        if atom in forms.log_of:
            return self._log(forms.atoms[forms.log_of[atom]].node)  # type: ignore[arg-type]
        node = forms.atoms[atom].node
        assert node is not None
        return self._copied(node)

    def _copied(self, node: fx.Node) -> fx.Node:
        if node in self.traced.origin:
            return self.held(self.traced.origin[node])
        if node.op == "get_attr":
            held = node.meta["val"]
            number = written_number(self.traced.forms.gm, node)
            return self.call(torch.full, [], number, dtype=held.dtype, device=held.device)
        if node not in self.copies:
            for n in node.all_input_nodes:
                self._copied(n)
            self.copies[node] = self._noted(self.graph.node_copy(node, self._copied))
            self.copies[node].meta.pop("val", None)
        return self.copies[node]

    def _log(self, node: fx.Node) -> fx.Node:
        """The logarithm of a tensor, by its proof where the graph holds what the proof needs."""
        if not self.faked:
            return self.call(torch.log, self.call(torch.abs, self._copied(node)))
        known = set(self.graph.nodes)
        result = emit(self.traced.proofs[node], self.graph)
        for new in self.graph.nodes:
            if new not in known:
                self._noted(new)
        if isinstance(result, fx.Node):
            return result
        return self.call(torch.full_like, self._copied(node), result)

    def _signs(self, factor: Factor) -> fx.Node:
        """[..., T]: -1 at odd times where the base is negative, else 1."""
        base, time = self.tensor(self.traced.forms.sign_of[factor.atom]), factor.axes[-1][0]
        if any(len(axis) != 1 for axis in factor.axes[:-1]):
            base = self.call(torch.reshape, base, [self.size(x) for axis in factor.axes[:-1] for x in axis])
        odd = self.call(torch.remainder, self.call(torch.arange, self.size(time), device=self.device), 2)
        negative = self.call(torch.lt, self.call(torch.unsqueeze, base, -1), 0)
        return self.call(torch.where, self.call(torch.logical_and, negative, odd), -1.0, 1.0)

    def laid_out(self, factor: Factor, order: Labels) -> fx.Node:
        """A factor with one axis for each entry of `order`, of size 1 where it has none."""
        flat = factor.labels
        if factor.atom == self.traced.forms.pos:
            tensor = self.call(torch.arange, self.size(flat[0]), device=self.device)
        elif factor.atom in self.traced.forms.sign_of:
            tensor = self._signs(factor)
        elif self._is_scalar(factor):
            one = self.call(torch.ones, [1] * len(order), dtype=torch.float32, device=self.device)
            return self.call(torch.mul, one, self.tensor(factor.atom))
        else:
            tensor = self.tensor(factor.atom)
            if any(len(axis) != 1 for axis in factor.axes):
                tensor = self.call(torch.reshape, tensor, [self.size(label) for label in flat])
        wanted = [label for label in order if label in flat]
        if wanted != list(flat):
            tensor = self.call(torch.permute, tensor, [flat.index(label) for label in wanted])
        for n, label in enumerate(order):
            if label not in flat:
                tensor = self.call(torch.unsqueeze, tensor, n)
        return tensor

    def product(self, factors: Sequence[Factor], order: Labels, dtype: torch.dtype | None) -> fx.Node | None:
        total: fx.Node | None = None
        for factor in factors:
            part = self.laid_out(factor, order)
            if dtype is not None:
                part = self.cast(part, dtype)
            total = part if total is None else self.call(torch.mul, total, part)
        return total

    def polynomial(self, terms: Terms, order: Labels, dtype: torch.dtype) -> fx.Node | None:
        total: fx.Node | None = None
        for term in terms:
            part = self.product(term.factors, order, dtype)
            if part is None:
                part = self.call(torch.full, [1] * len(order), term.coef, dtype=dtype, device=self.device)
            elif term.coef != 1.0:
                part = self.call(torch.mul, part, term.coef)
            total = part if total is None else self.call(torch.add, total, part)
        return total

    def operand(self, operand: Operand, order: Labels, wide: torch.dtype) -> fx.Node | None:
        """The product of an operand; the type of its only factor, or `wide`."""
        alone = len(operand.factors) == 1 and not operand.log
        total = self.product(operand.factors, order, None if alone and self._is_float(operand.factors[0]) else wide)
        log = self.polynomial(operand.log, order, wide)
        if log is not None:
            grown = self.call(torch.exp, log)
            total = grown if total is None else self.call(torch.mul, total, grown)
        return total

    def _dtype(self, factor: Factor) -> torch.dtype | None:
        node = self.traced.forms.atoms[factor.atom].node
        return getattr(node.meta["val"], "dtype", None) if node is not None else None

    def _is_float(self, factor: Factor) -> bool:
        dtype = self._dtype(factor)
        return dtype is not None and dtype.is_floating_point

    def _is_scalar(self, factor: Factor) -> bool:
        node = self.traced.forms.atoms[factor.atom].node
        return node is not None and not isinstance(node.meta["val"], torch.Tensor)

    def dtype_of(self, operand: Operand, wide: torch.dtype) -> torch.dtype | None:
        if not operand.factors and not operand.log:
            return None
        if len(operand.factors) == 1 and not operand.log and self._is_float(operand.factors[0]):
            return self._dtype(operand.factors[0])
        return wide

    def full(self, tensor: fx.Node, roles: Sequence[Labels], have: set[int]) -> fx.Node:
        """Expand to all labels of `roles` and merge each role into one axis, of size 1 where it is empty."""
        order = [label for role in roles for label in role]
        if not have.issuperset(order):
            tensor = self.method("expand", tensor, *(self.size(label) for label in order))
        if all(len(role) == 1 for role in roles):
            return tensor
        return self.call(torch.reshape, tensor, self.sizes(roles))

    def arranged(self, operand: Operand, roles: Sequence[Labels], dtype: torch.dtype, wide: torch.dtype) -> fx.Node:
        order = tuple(label for role in roles for label in role)
        total = self.operand(operand, order, wide)
        if total is None:
            total = self.call(torch.ones, [1] * len(order), dtype=dtype, device=self.device)
        return self.cast(self.full(total, roles, operand.labels), dtype)

    def decay(self, kernel: Kernel, roles: Sequence[Labels], wide: torch.dtype) -> fx.Node | None:
        if kernel.family == "linear_attention":
            return None
        if kernel.family == "retention":
            roles = (kernel.heads,)
        elif kernel.family == "simple_gla":
            roles = roles[:3]
        order = tuple(label for role in roles for label in role)
        total = self.polynomial(kernel.gate, order, wide)
        level = self.polynomial(kernel.level, order, wide)
        if level is not None:
            at = order.index(kernel.row)
            first = self.call(torch.narrow, level, at, 0, 1)
            steps = self.call(torch.diff, level, n=1, dim=at, prepend=first)
            total = steps if total is None else self.call(torch.add, total, steps)
        assert total is not None
        have = {x for t in (*kernel.gate, *kernel.level) for x in t.labels}
        return self.full(total, roles, have)

    def is_double(self, kernel: Kernel) -> bool:
        parts = (kernel.q, kernel.k, kernel.v)
        factors = [f for x in parts for f in (*x.factors, *(f for t in x.log for f in t.factors))]
        factors += [f for t in (*kernel.gate, *kernel.level) for f in t.factors]
        return any(self._dtype(f) == torch.float64 for f in factors)

    def kernel(self, kernel: Kernel, dims: tuple[Labels, ...]) -> fx.Node:
        """One term of a read-out over the labels of `dims`, one axis each."""
        if self.is_double(kernel):
            dtype = torch.float64
        else:
            own = {self.dtype_of(x, torch.float32) for x in (kernel.q, kernel.k, kernel.v)} - {None}
            dtype = own.pop() if len(own) == 1 else torch.float32
        wide = torch.promote_types(dtype, torch.float32)
        roles = (kernel.batch, (kernel.row,), kernel.heads, kernel.keys)
        steps = (kernel.batch, (kernel.column,), kernel.heads)
        q = self.arranged(kernel.q, roles, dtype, wide)
        k = self.arranged(kernel.k, (*steps, kernel.keys), dtype, wide)
        v = self.arranged(kernel.v, (*steps, kernel.values), dtype, wide)
        g = self.decay(kernel, roles, wide)
        if kernel.before:
            k, v = self._shifted(k, g, kernel.family), self._shifted(v, None, kernel.family)
        op = getattr(torch.ops.fla_compile, kernel.family).default
        o = self.call(operator.getitem, self.call(op, q, k, v, g, None, kernel.scale), 0)
        axes = (kernel.batch, (kernel.row,), kernel.heads, kernel.values)
        flat = tuple(label for role in axes for label in role)
        if any(len(role) != 1 for role in axes):
            o = self.call(torch.reshape, o, [self.size(label) for label in flat])
        order = tuple(label for axis in dims for label in axis)
        wanted = [label for label in order if label in flat]
        if wanted != list(flat):
            o = self.call(torch.permute, o, [flat.index(label) for label in wanted])
        for n, label in enumerate(order):
            if label not in flat:
                o = self.call(torch.unsqueeze, o, n)
        rows = self.operand(kernel.rows, order, wide)
        if rows is not None:
            o = self.call(torch.mul, self.cast(o, wide), rows)
        return self.full(o, tuple((label,) for label in order), set(flat) | kernel.rows.labels)

    def _shifted(self, x: fx.Node, g: fx.Node | None, family: str) -> fx.Node:
        """What a step reads of the step before it: x_{t-1}, decayed where g is given."""
        past = self.call(torch.nn.functional.pad, x, (0, 0, 0, 0, 1, -1))
        if g is None:
            return past
        decay = self.call(torch.exp, g)
        decay = decay if family == "gla" else self.call(torch.unsqueeze, decay, -1)
        return self.method("type_as", self.call(torch.mul, past, decay), x)

    def read_out(self, read: ReadOut, dtype: torch.dtype) -> fx.Node:
        total: fx.Node | None = None
        for kernel in read.kernels:
            part = self.kernel(kernel, read.dims)
            total = part if total is None else self.call(torch.add, total, part)
        assert total is not None
        if any(len(axis) != 1 for axis in read.dims):
            total = self.call(torch.reshape, total, self.sizes(read.dims))
        return self.cast(total, dtype)

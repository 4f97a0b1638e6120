"""Write a recognised divergence as the kernel's operator and what goes around it, into a graph of any sizes."""

import operator

import torch
from torch import fx

from fla_compile.kernels.linear_kl_div_ops import linear_kl_div_forward  # noqa: F401
from fla_compile.passes.kl_decide import Divided
from fla_compile.passes.kl_values import Side
from fla_compile.passes.loss_emit import Emitter
from fla_compile.passes.loss_values import Label
from fla_compile.passes.records import Refused
from fla_compile.passes.spellings import tensor_of


class PairEmitter(Emitter):
    """As `Emitter`, for two layers."""

    def layer(self, side: Side, rows: tuple[Label, ...], *, constant: bool) -> tuple[list, tuple[Label, ...]]:
        """Rows [N, D], weight [V, D] and bias [V] of a layer, and the order of its rows."""
        root = side.root
        x, order = self.rows_of(self.operand(root.x, constant), root.rows, set(rows))
        weight = self.operand(root.weight, constant)
        bias = None if root.bias is None else self.operand(root.bias, constant)
        if root.transposed:
            weight = self.method("t", weight)
        have, run = tensor_of(root.x).dtype, tensor_of(root.node).dtype
        if have != run and self.faked:  # the type that autocast casts the layer's operands to
            x, weight, bias = (None if y is None else self.method("to", y, run) for y in (x, weight, bias))
        return [x, weight, bias], order

    def operand(self, node: fx.Node, constant: bool) -> fx.Node:
        return self.method("detach", self.env[node]) if constant and tensor_of(node).requires_grad else self.env[node]

    def divergence(self, loss: Divided, needs: tuple[bool, ...], dtype: torch.dtype) -> fx.Node:
        student, order = self.layer(loss.student, loss.rows, constant=False)
        teacher, others = self.layer(loss.teacher, loss.rows, constant=True)
        if order != others:
            raise Refused("unsupported_loss", "the layers have their rows in another order")
        keep, weights = self.kept(loss, order), self.weighed(loss.weights, order)
        found = self.call(
            torch.ops.fla_compile.linear_kl_div.default, *student, *teacher, keep, weights, loss.student.form.scale,
            loss.teacher.form.scale, loss.kind, loss.beta, loss.reduction, *needs,
        )  # fmt: skip
        result = self.call(operator.getitem, found, 0)
        if loss.factor != 1.0:
            result = self.call(torch.mul, result, loss.factor)
        for axis in (*((order,) if loss.over_rows else ()), *loss.axes):
            result = self.call(torch.div, result, self.axis(axis))
        for divisor in loss.over:
            result = self.call(torch.div, result, self.laid_out_scalar(divisor))
        return self._shaped(self.method("to", result, dtype), loss, order)

    def kept(self, loss: Divided, order: tuple[Label, ...]) -> fx.Node | None:
        """Which rows [N] the masks leave, if there are any."""
        keep: fx.Node | None = None
        for mask, sense, dims in loss.keeps:
            part = self.laid_out(mask, dims, order)
            part = part if sense else self.call(torch.logical_not, part)
            keep = part if keep is None else self.call(torch.logical_and, keep, part)
        return keep

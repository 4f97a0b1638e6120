"""Write a loss of logits that exist: as the operator of rows, or as torch's own loss for Inductor."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fla_compile.kernels.cross_entropy import cross_entropy_forward  # noqa: F401
from fla_compile.kernels.cross_entropy_rows import wide_dtype
from fla_compile.passes.loss_decide import Loss
from fla_compile.passes.loss_emit import Emitter
from fla_compile.passes.loss_values import Label, flat, is_one
from fla_compile.passes.spellings import tensor_of


@dataclass
class OverLogits(Emitter):
    """`kernel`: the operator, of all rows of the logits. A slice's rows are told by targets that are ignored: the
    gradient then is that of the logits themselves, and not a slice to be copied into another of their size."""

    kernel: bool = False

    def loss(self, loss: Loss, needs: tuple[bool, ...], dtype: torch.dtype, narrow: torch.dtype | None) -> fx.Node:
        root = loss.value.root
        logits = self.env[root.node]
        rows, order = self.rows_of(logits, root.rows, set(flat(loss.target.dims)))
        target, weights = self.targets(loss, order)
        target = self.method("to", target, torch.int64)  # which has every number that is ignored
        if self.kernel:
            result = self.by_rows(loss, logits, target, weights, order)
        else:
            result = self.by_torch(loss, rows, target, weights)
        result = self.finished(result, loss, order, dtype)
        for node in reversed(self.added):
            if not node.users and node is not result:
                self.graph.erase_node(node)
        self.added[:] = [node for node in self.added if node.users or node is result]
        return result

    def by_rows(
        self, loss: Loss, logits: fx.Node, target: fx.Node, weights: fx.Node | None, order: tuple[Label, ...]
    ) -> fx.Node:
        cap = 0.0 if loss.value.form.cap is None else abs(loss.value.form.cap)
        axes = {label: self.size_of(label, logits, i) for i, label in enumerate(loss.value.root.rows)}
        found = self.call(
            torch.ops.fla_compile.cross_entropy.default, logits,
            self.uncut(target, order, axes, loss.ignore_index),
            None if weights is None else self.uncut(weights, order, axes, 0.0),
            loss.ignore_index, loss.smoothing, cap, loss.value.form.scale, loss.z_loss, loss.reduction, False,
        )  # fmt: skip
        result = self.call(operator.getitem, found, 0)
        return self.cut(result, order, axes) if loss.reduction == "none" else result

    def size_of(self, label: Label, logits: fx.Node, axis: int) -> Any:
        size = 1 if is_one(label.size) else self.size(label)
        return size if isinstance(size, int) else self.method("size", logits, axis)

    def by_torch(self, loss: Loss, rows: fx.Node, target: fx.Node, weights: fx.Node | None) -> fx.Node:
        """rows [N, V]: torch's loss, whose backward Inductor writes without a tensor to scatter into."""
        form, have = loss.value.form, tensor_of(loss.value.root.node).dtype
        z = self.method("to", rows, wide_dtype(have))
        if form.scale != 1.0:
            z = self.call(torch.mul, z, form.scale)
        if form.cap is not None:
            z = self.call(torch.mul, self.call(torch.tanh, self.call(torch.div, z, form.cap)), form.cap)
        alone = weights is None and not loss.z_loss
        losses = self.call(
            F.cross_entropy, z, target, ignore_index=loss.ignore_index,
            reduction=loss.reduction if alone else "none", label_smoothing=loss.smoothing,
        )  # fmt: skip
        if alone:
            return losses
        if loss.z_loss:
            square = self.call(torch.mul, self.call(torch.square, self.call(torch.logsumexp, z, 1)), loss.z_loss)
            dropped = self.call(torch.eq, target, loss.ignore_index)
            losses = self.call(torch.add, losses, self.method("masked_fill", square, dropped, 0.0))
        if weights is not None:
            losses = self.call(torch.mul, losses, weights)
        if loss.reduction == "none":
            return losses
        total = self.call(torch.sum, losses)
        if loss.reduction == "sum":
            return total
        return self.call(torch.div, total, self.call(torch.sum, self.call(torch.ne, target, loss.ignore_index)))

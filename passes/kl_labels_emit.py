"""Write a divergence and the cross entropy with it as one operator, into a graph of any sizes."""

import operator
from collections.abc import Sequence

import torch
from torch import fx

from fla_compile.kernels.cross_entropy_rows import wide_dtype
from fla_compile.kernels.linear_distillation_ops import linear_distillation_forward  # noqa: F401
from fla_compile.passes.kl_decide import Divided
from fla_compile.passes.kl_emit import PairEmitter
from fla_compile.passes.kl_labels import Both
from fla_compile.passes.loss_decide import NEVER, Loss
from fla_compile.passes.loss_emit import spans_of
from fla_compile.passes.loss_values import Label, flat
from fla_compile.passes.records import Refused
from fla_compile.passes.spellings import tensor_of

Order = tuple[Label, ...]


class BothEmitter(PairEmitter):
    """As `PairEmitter`, where a loss may have labels too.

    The operator runs over the rows of both losses if these are the same, else over all rows of the layers, in which a
    mask and ignored labels say what is in neither.
    """

    def losses(self, both: Both, needs: tuple[bool, ...], dtypes: Sequence[torch.dtype]) -> list[fx.Node]:
        """The values of `both.nodes`."""
        if both.hard is None:
            return [self.divergence(both.soft, needs, dtypes[0])]
        found = self.labelled(both, both.hard, needs, dtypes)
        for node in reversed(self.added):
            if not node.users and node not in found:
                self.graph.erase_node(node)
        self.added[:] = [node for node in self.added if node.users or node in found]
        return found

    def labelled(self, both: Both, hard: Loss, needs: tuple[bool, ...], dtypes: Sequence[torch.dtype]) -> list[fx.Node]:
        soft, root = both.soft, both.soft.student.root
        by_soft, by_hard = (
            self.rows_of(self.env[root.x], root.rows, set(rows))[1] for rows in (soft.rows, flat(hard.target.dims))
        )
        rows = by_soft if by_soft == by_hard else _wholes(by_soft)
        if by_soft != by_hard and set(rows) != set(_wholes(by_hard)):
            raise Refused("unsupported_loss", "the labels are for rows that the divergence does not have")
        student, order = self.layer(soft.student, rows, constant=False)
        teacher, others = self.layer(soft.teacher, rows, constant=True)
        if order != others:
            raise Refused("unsupported_loss", "the layers have their rows in another order")

        def over_all(y: fx.Node | None, by: Order, fill: float) -> fx.Node | None:
            return y if y is None or by == order else self.method("reshape", self.uncut(y, by, axes, fill), -1)

        axes = {label: self.extent(label) for label in order}
        keep = self.kept(soft, by_soft)
        if keep is None and by_soft != order:
            keep = self.method("new_ones", self.env[root.x], [self.axis(by_soft)], dtype=torch.bool)
        target, of_hard = self.targets(hard, by_hard)
        target = self.method("to", target, torch.int64)  # which has every number that is ignored
        of_soft = self.weighed(soft.weights, by_soft)
        factors = self.factor(soft, by_soft, None), self.factor(hard, by_hard, target)
        operands = *student, *teacher, over_all(keep, by_soft, False), over_all(target, by_hard, hard.ignore_index)
        numbers = (
            soft.student.form.scale, soft.teacher.form.scale, soft.kind, soft.beta,
            hard.ignore_index, hard.smoothing, hard.value.form.scale, hard.z_loss,
        )  # fmt: skip
        if len(both.nodes) == 1 and soft.reduction != "none":
            weights = over_all(of_soft, by_soft, 0.0), over_all(of_hard, by_hard, 0.0)
            op = torch.ops.fla_compile.linear_distillation.default
            total = self.call(operator.getitem, self.call(op, *operands, *weights, *factors, *numbers, *needs), 0)
            return [self._shaped(self.method("to", total, dtypes[0]), soft, order)]

        def finished(i: int, by: Order, weights: fx.Node | None, reduction: str) -> fx.Node:
            result = self.call(operator.getitem, found, i)
            result = result if by == order else self.cut(result, by, axes)
            result = result if weights is None else self.call(torch.mul, result, weights)
            result = result if reduction == "none" else self.call(torch.sum, result)
            return self.call(torch.mul, result, factors[i])

        found = self.call(torch.ops.fla_compile.linear_distillation_rows.default, *operands, *numbers)
        a, b = finished(0, by_soft, of_soft, soft.reduction), finished(1, by_hard, of_hard, hard.reduction)
        if len(both.nodes) == 1:
            if by_soft != by_hard:
                raise Refused("unsupported_loss", "it adds losses of different rows")
            return [self._shaped(self.method("to", self.call(torch.add, a, b), dtypes[0]), soft, by_soft)]
        first = both.nodes.index(both.of_labels)
        results = [
            self._shaped(self.method("to", a, dtypes[1 - first]), soft, by_soft),
            self._shaped(self.method("to", b, dtypes[first]), hard, by_hard),
        ]
        return results if first else results[::-1]

    def factor(self, loss: Divided | Loss, order: Order, target: fx.Node | None) -> fx.Node:
        """What the weighted sum of rows is multiplied by: a tensor of one number."""
        root = loss.student.root if isinstance(loss, Divided) else loss.value.root
        dtype = wide_dtype(tensor_of(root.node).dtype) if self.faked else torch.float64
        found = self.method("new_full", self.env[root.x], [], loss.factor, dtype=dtype)
        if isinstance(loss, Loss) and loss.reduction == "mean" and loss.ignore_index != NEVER:
            found = self.call(torch.div, found, self.call(torch.sum, self.call(torch.ne, target, loss.ignore_index)))
        elif loss.over_rows or loss.reduction == "mean":
            found = self.call(torch.div, found, self.axis(order))
        for axis in loss.axes if isinstance(loss, Divided) else ():
            found = self.call(torch.div, found, self.axis(axis))
        for divisor in loss.over:
            found = self.call(torch.div, found, self.laid_out_scalar(divisor))
        return found


def _wholes(rows: Order) -> Order:
    return tuple(spans_of(label)[0] for label in rows)

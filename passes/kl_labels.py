"""A divergence of two layers together with a cross entropy of the student's labels: one loss, or two side by side.

    a D(q, p) + b (lse - z_t)        their sum, each over its rows, or row by row: one value
    D(q, p)   and   lse - z_t        two values, of which the program makes what it likes

Both are made of the same student logits, each at a scale of its own; rows, masks, weights and means are each one's own.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from fla_compile.passes.autocast import regions_at
from fla_compile.passes.kl_decide import Divided
from fla_compile.passes.kl_rules import PAIR_RULES
from fla_compile.passes.kl_values import Pairs, Side
from fla_compile.passes.log_decay import op_name
from fla_compile.passes.loss_decide import Loss, decode
from fla_compile.passes.loss_values import Value
from fla_compile.passes.match_linear_cross_entropy import ADVICE, comes_from, place
from fla_compile.passes.match_short_conv import GRAD_MODES
from fla_compile.passes.memory import memory, written_between
from fla_compile.passes.records import Refused
from fla_compile.passes.spellings import call_of, tensor_of

# What may be moved behind a loss: operations on numbers that nothing else can tell the place of.
ARITHMETIC = PAIR_RULES.keys() | {"sqrt", "rsqrt", "sigmoid", "clamp", "sin", "cos", "softplus", "reciprocal"}


@dataclass(frozen=True)
class Both:
    """What is rewritten: `nodes` in their order, the one sum of both losses, or each; without `hard` the divergence.

    `inside` has all nodes from the layers to these; `of_labels` is the cross entropy among two, and `later` what is
    made of the first of two before the other is there, and moves behind it.
    """

    nodes: tuple[fx.Node, ...]
    soft: Divided
    hard: Loss | None
    inside: tuple[fx.Node, ...]
    of_labels: fx.Node | None = None
    later: tuple[fx.Node, ...] = ()


def decode_labels(value: Value, student: Side) -> Loss:
    """The cross entropy of the student that a value is; raises `Refused`."""
    if value.root is not student.root:
        raise Refused("unsupported_loss", "the labels are for other logits than the student's")
    if value.form.cap is not None:
        raise Refused("unsupported_loss", "the logits that meet the labels are capped")
    return decode(value)


def labels_beside(losses: Pairs, student: Side, inside: list[fx.Node]) -> tuple[fx.Node, Loss] | None:
    """The one cross entropy that the student's logits go into, outside of `inside`; None if there is none."""
    own = {n for n, v in losses.values.items() if v.root.node is student.root.node and not losses.is_shared(v)}
    found: list[tuple[fx.Node, Loss]] = []
    for node in student.root.node.graph.nodes:
        if node in own and node not in inside and any(user not in own for user in node.users):
            try:
                found.append((node, decode_labels(losses.values[node], student)))
            except Refused:
                continue  # its use is then one of the logits
    if not found:
        return None
    first = found[0][0]
    others = [node for node, _ in found[1:] if not comes_from(node, first)]
    if others:
        raise Refused("logits_used", f"another loss of the same logits is at {place(others[0])}; {ADVICE}")
    return found[0]


def check_uses(nodes: tuple[fx.Node, ...], inside: list[fx.Node]) -> None:
    """Refuse where a part of the losses is used elsewhere too."""
    for n in inside:
        outside = [user for user in n.users if user not in inside] if n not in nodes else []
        if outside:
            where = place(outside[0]) or outside[0].name
            raise Refused("logits_used", f"{n.name}, before the loss, is used at {where} as well; {ADVICE}")


def made_of(first: fx.Node, last: fx.Node) -> tuple[fx.Node, ...]:
    """What is made of `first` in front of `last`, and can be made behind it as well; raises `Refused`."""
    found: dict[fx.Node, None] = {first: None}
    for node in _from(first, last):
        if any(n in found for n in node.all_input_nodes):
            found[node] = None
    found.pop(first)
    writes, behind = written_between(first, last), regions_at(last)
    switched = any(op_name(n) in GRAD_MODES for n in _from(first, last))
    for node in found:
        call, fake = call_of(node), tensor_of(node)
        arithmetic = call is not None and call.name in ARITHMETIC and not call.in_place and call.get("out") is None
        reads = frozenset[int]().union(*(memory(n) for n in (node, *node.all_input_nodes)))
        # Where gradients are switched in between, they are on at both places if both have one.
        alike = not switched or (fake is not None and fake.requires_grad and tensor_of(last).requires_grad)
        if node is last or not arithmetic or writes & reads or not alike or regions_at(node) != behind:
            detail = f"one loss is used at {place(node) or node.name}, before the other is there"
            raise Refused("logits_used", f"{detail}; {ADVICE}")
    return tuple(found)


def _from(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    """The nodes behind `first` as far as `last`."""
    node = first
    while node is not last:
        node = node.next
        yield node

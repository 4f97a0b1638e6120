"""Find two linear layers whose only use is a distillation loss, and compute all three without the logits.

Before: student and teacher logits by any spelling of a layer, divided by a temperature; log_softmax, softmax or the
same by hand; then `F.kl_div` or `nn.KLDivLoss` with either kind of target, sums of p (log p - log q) by hand in either
direction, a Jensen-Shannon divergence over a mixture of both, or `F.cross_entropy` with the teacher's probabilities;
summed, averaged, masked, weighted, or left for each row; the teacher under `no_grad` or detached. Beside it, or added
to it, a cross entropy of the student's logits with labels, in any spelling of `match_linear_cross_entropy`.
After: `fla_compile::linear_kl_div` on both layers' operands, with labels `linear_distillation` for a sum of both losses
or `linear_distillation_rows` for each by itself. The logits exist for a few rows at a time.
Legal because the program's loss is the kernel's as a polynomial over both distributions and their logarithms
(`kl_values`, `kl_rules`, `kl_decide`, `kl_labels`), and checked on data (`kl_check`).
Refused: logits, or losses in part, that are used elsewhere too (`logits_used`); a teacher that takes a gradient
(`teacher_gradient`); other sums of such terms, and a student of which a part takes no gradient (`unsupported_loss`);
operands that are written to in between (`mutates_input`).
Layers that meet in no loss are left without a word.
"""

import time
from dataclasses import dataclass

from torch import fx

from fla_compile.kernels.linear_kl_div import kernel_name, supports
from fla_compile.passes.kl_check import check
from fla_compile.passes.kl_decide import Divided, compares, decode, sides_of
from fla_compile.passes.kl_labels import Both, check_uses, decode_labels, labels_beside, made_of
from fla_compile.passes.kl_labels_emit import BothEmitter
from fla_compile.passes.kl_rules import PAIR_RULES
from fla_compile.passes.kl_values import Pairs, Side, between, pairs_of, parted
from fla_compile.passes.loss_emit import put_all, wanted_of
from fla_compile.passes.loss_reader import read
from fla_compile.passes.loss_values import MAX, Value
from fla_compile.passes.match_linear_cross_entropy import EQUATION as OF_LABELS
from fla_compile.passes.match_linear_cross_entropy import REFUSED, Found, check_writes, place
from fla_compile.passes.memory import memory, written_between
from fla_compile.passes.records import Refused, Rewrite
from fla_compile.passes.spellings import call_of, tensor_of

PATTERN = "linear_kl_div"
EQUATION = "l = KL(softmax(W' x'), softmax(W x))"
EQUATIONS = {
    "forward_kl": EQUATION,
    "reverse_kl": "l = KL(softmax(W x), softmax(W' x'))",
    "jensen_shannon": "l = JS(softmax(W' x'), softmax(W x))",
    "cross_entropy": "l = -softmax(W' x') log softmax(W x)",
}


def candidates(losses: Pairs, graph: fx.Graph) -> list[fx.Node]:
    """The values that compare two layers, the last first; of single classes only what is no part of another."""
    values = {n: v for n, v in losses.values.items() if losses.is_shared(v) and n not in losses.spaces}
    meant = [n for n in graph.nodes if n in values and compares(values[n])]
    last = [n for n in meant if not (n.users and all(user in meant for user in n.users))]
    return [n for n in reversed(meant) if values[n].kind != "terms" or n in last]


def live(losses: Pairs, inside: list[fx.Node], side: Side) -> bool:
    """Whether a side takes a gradient; raises `Refused` where a part of it does and another does not."""
    here = set(inside)
    own = [n for n in inside if n in losses.values and losses.values[n].root.node is side.root.node]
    own = [n for n in own if not losses.is_shared(losses.values[n]) or n in losses.spaces]
    ends = [n for n in own if any(user in here and user not in own for user in n.users)]
    found = {tensor_of(n).requires_grad for n in ends}
    if found != {True}:
        if found == {True, False}:
            raise _cut_off(next(n for n in ends if not tensor_of(n).requires_grad))
        return False
    for n in own:
        value = losses.values[n]
        shift = value.kind == "row" and set(value.rows) == {(MAX,)}
        if not shift and not tensor_of(n).requires_grad:
            raise _cut_off(n)
    for n in inside:
        value = losses.values.get(n)
        both = losses.is_shared(value) and n not in losses.spaces and side in sides_of(value)
        if both and not tensor_of(n).requires_grad:
            raise _cut_off(n)
    return True


def _cut_off(node: fx.Node) -> Refused:
    return Refused("unsupported_loss", f"{node.name}, a part of it, takes no gradient", place(node))


def choose(losses: Pairs, node: fx.Node) -> Both:
    """The divergence at a node, and the cross entropy in it or beside it; raises `Refused`."""
    value, labelled = parted(losses.values[node])
    sides = sides_of(value)
    if len(sides) != 2 or sides[0].root.node is sides[1].root.node:
        raise Refused("unsupported_loss", f"it is of {len(sides)} distributions, not of two layers' one each")
    inside = between(losses, node, sides)
    graded = [live(losses, inside, side) for side in sides]
    if all(graded):
        decode(value, *sides)
        raise Refused("teacher_gradient", "both layers take a gradient; compute the teacher's under torch.no_grad()")
    if any(graded):
        loss = decode(value, *(sides if graded[0] else sides[::-1]))
    elif labelled is not None:
        loss = decode(value, *(sides if labelled.root is sides[0].root else sides[::-1]))
    else:
        loss = _without_gradients(value, sides)
    if labelled is not None:
        check_uses((node,), inside)
        return Both((node,), loss, decode_labels(labelled, loss.student), tuple(inside))
    try:
        check_uses((node,), inside)
    except Refused:
        found = _beside(losses, node, loss, inside, any(graded))
        if found is None:
            raise
        return found
    return Both((node,), loss, None, tuple(inside))


def _beside(losses: Pairs, node: fx.Node, loss: Divided, inside: list[fx.Node], graded: bool) -> Both | None:
    """The divergence at a node and a cross entropy that has no other use of the logits beside it."""
    student = loss.student
    found = labels_beside(losses, student, inside)
    if found is None and not graded:  # either layer may be the student
        student, loss = loss.teacher, decode(losses.values[node], loss.teacher, loss.student)
        found = labels_beside(losses, student, inside)
    if found is None:
        return None
    other, hard = found
    here = {*inside, *between(losses, other, (student, loss.teacher))}
    every = [n for n in node.graph.nodes if n in here]
    nodes = tuple(n for n in every if n in (node, other))
    check_uses(nodes, every)
    if tensor_of(other).requires_grad != graded or live(losses, every, student) != graded:
        raise Refused("unsupported_loss", "of two losses of the same logits one takes no gradient", place(other))
    return Both(nodes, loss, hard, tuple(every), other, made_of(*nodes))


def _without_gradients(value: Value, sides: list[Side]) -> Divided:
    """Either side may be the student: it is the one for which the kernel has a name, forward_kl before reverse_kl."""
    try:
        found = decode(value, *sides)
    except Refused:
        return decode(value, *sides[::-1])
    return decode(value, *sides[::-1]) if found.kind == "reverse_kl" else found


def check_operands(losses: Pairs, both: Both) -> None:
    """Refuse what the kernel cannot take, and operands that are not at the loss what they were at the layers."""
    loss, last = both.soft, both.nodes[-1]
    roots = loss.student.root, loss.teacher.root
    dtypes = [tensor_of(root.node).dtype for root in roots]
    reason = supports(tensor_of(roots[0].node).device.type, *dtypes)
    if reason is not None:
        raise Refused("no_kernel", reason)
    operands = [*loss.over, *(n for n, _ in loss.weights), *(n for n, _, _ in loss.keeps)]
    for root in roots:
        own = [root.x, root.weight, root.bias, *operands]
        if written_between(root.node, last) & frozenset[int]().union(*(memory(n) for n in own)):
            raise Refused("mutates_input", "the program writes to what a layer or the loss reads, between the two")
    if both.hard is not None:
        check_writes(losses, roots[0].node, last, both.hard, ())


def splice(gm: fx.GraphModule, both: Both) -> Rewrite:
    """Put the kernel in the place of both losses; what nothing wants any more is removed."""
    loss, hard, last = both.soft, both.hard, both.nodes[-1]
    roots = loss.student.root, loss.teacher.root
    kernel = kernel_name(tensor_of(last).device.type, *(tensor_of(root.node).dtype for root in roots))
    for node in reversed(both.later):
        last.append(node)
    needs, dtypes = wanted_of(last, roots[0]), [tensor_of(n).dtype for n in both.nodes]
    nodes = put_all(gm.graph, both.nodes, BothEmitter, lambda writer: writer.losses(both, needs, dtypes), both.inside)
    equation = EQUATIONS[loss.kind] if hard is None else f"{EQUATIONS[loss.kind]}, {OF_LABELS}"
    return Rewrite(PATTERN, PATTERN, equation, kernel, place(last), *nodes)


@dataclass
class Failure:
    """A value that was refused, unless a part of it is a loss by itself."""

    node: fx.Node
    sides: list[Side]
    why: Refused
    inside: set[fx.Node]
    dropped: bool = False


def refuse(found: Found, node: fx.Node, sides: list[Side], why: Refused) -> None:
    found.refusals.append(why.record(PATTERN, place(node)))
    for side in sides:
        side.root.node.meta[REFUSED] = PATTERN


def misread(losses: Pairs, graph: fx.Graph) -> list[tuple[fx.Node, list[Side]]]:
    """Calls of `kl_div` on what comes from layers that no rule took."""
    found = []
    for node in graph.nodes:
        call = call_of(node)
        if call is not None and call.name == "kl_div" and node not in losses.values:
            given = [losses.values[n] for n in node.all_input_nodes if n in losses.values]
            sides = [Side(v.root, v.form) for v in given if v.root.node in losses.spaces]
            if given:
                found.append((node, sides))
    return found


def match_linear_kl_div(gm: fx.GraphModule, *, validated: bool = True) -> Found:
    """Rewrite every two linear layers of `gm` that end in a divergence, in place."""
    found = Found()
    losses = pairs_of(gm.graph)
    if len(losses.spaces) < 2:
        return found
    read(losses, gm.graph, PAIR_RULES)
    failures: list[Failure] = []
    done: set[fx.Node] = set()
    for node in candidates(losses, gm.graph):
        if node in done:
            continue
        sides = sides_of(losses.values[node])
        outer = [failure for failure in failures if node in failure.inside]
        try:
            both = choose(losses, node)
            check_operands(losses, both)
            if validated:
                start = time.perf_counter()
                check(losses, both)
                found.validation_seconds += time.perf_counter() - start
            found.rewrites.append(splice(gm, both))
            done |= set(both.inside)
            for failure in outer:
                failure.dropped = True
        except Refused as refused:
            if not outer:
                failures.append(Failure(node, sides, refused, set(between(losses, node, sides))))
    for failure in failures:
        if not failure.dropped:
            refuse(found, failure.node, failure.sides, failure.why)
    for node, sides in misread(losses, gm.graph):
        why = Refused("unsupported_loss", "kl_div with these arguments is not the kernel's, or one side is no layer's")
        refuse(found, node, sides, why)
    if found.rewrites:
        gm.graph.lint()
        gm.recompile()
    return found

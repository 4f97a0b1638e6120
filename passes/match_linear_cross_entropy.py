"""Find a linear layer whose only use is a cross entropy, and compute both without the logits.

Before: logits = x W^T (+ b), by `F.linear`, `@`, `einsum`, with W tied or not; then a cast, a scale, a cap
c tanh(z / c), views, transposes and slices of rows (a shift by one token); then `F.cross_entropy`, or `log_softmax`,
`logsumexp`, exp and sum by hand, with `nll_loss`, `gather` or a one-hot product; label smoothing and z-loss by torch or
by hand; summed, averaged, weighted by masks, or left for each row.
After: `fla_compile::linear_cross_entropy` on x, W, b and the targets. The logits exist for a few rows at a time.
Legal because the program's loss is the kernel's as a polynomial over logsumexp, target logit and sum of logits
(`loss_values`, `loss_rules`, `loss_decide`), and checked on data (`loss_check`).
Refused: logits, or losses in part, that are used elsewhere too (`logits_used`); class weights, soft targets, a softmax
over another axis, a scale that is a tensor (`unsupported_loss`); operands that are written to in between
(`mutates_input`).
A layer whose logits end in no loss is left without a word.
"""

import time
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fla_compile.kernels.linear_cross_entropy import kernel_name, supports
from fla_compile.passes.loss_check import check, needed
from fla_compile.passes.loss_decide import Loss, decode, roots_of
from fla_compile.passes.loss_emit import Emitter, narrowed, put, wanted_of
from fla_compile.passes.loss_reader import read
from fla_compile.passes.loss_values import MAX, Losses, Target
from fla_compile.passes.memory import memory, written, written_between
from fla_compile.passes.normal_form import same_size
from fla_compile.passes.places import short_source, source_of
from fla_compile.passes.records import Refusal, Refused, Rewrite
from fla_compile.passes.spellings import call_of, tensor_of

PATTERN = "linear_cross_entropy"
EQUATION = "l = logsumexp(W x) - (W x)_t"
# What only a loss does with logits: one of these that is not understood is worth a word.
LOSSES = {"cross_entropy", "nll_loss", "log_softmax", "logsumexp"}
HOPS = 6  # operations between logits and a loss
REFUSED = "fla_refused"  # mark of logits for which another pass has said why
ADVICE = "return the loss alone from the compiled function to spare the logits"


@dataclass
class Found:
    """What the pass did; what it refused stays in the graph as it was."""

    rewrites: list[Rewrite] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    validation_seconds: float = 0.0


def frontier_of(losses: Losses, root: fx.Node) -> list[fx.Node]:
    """The values that come from a layer and are used by what is none."""
    own = {n for n, v in losses.values.items() if v.root.node is root}
    inside = own | {n for n in losses.pairs if n.all_input_nodes[0] in own}
    return [n for n in root.graph.nodes if n in inside and any(user not in inside for user in n.users)]


def choose(losses: Losses, root: fx.Node) -> tuple[fx.Node, Loss] | None:
    """The value to compute by the kernel; None where a layer ends in no loss; raises `Refused`."""
    frontier = frontier_of(losses, root)
    decoded: dict[fx.Node, Loss] = {}
    why: dict[fx.Node, Refused] = {}
    for node in frontier:
        value = losses.values.get(node)
        try:
            if value is not None:
                decoded[node] = decode(value)
        except Refused as refused:
            why[node] = Refused(refused.reason, refused.detail, place(node))
    others = [node for node in frontier if node not in decoded]
    if not decoded:
        _near_miss(losses, others, why)
        return None
    first = next(iter(decoded))
    beyond = [node for node in others + list(decoded) if node is not first and not comes_from(node, first)]
    if beyond:
        node = beyond[0]
        user = next((u for u in node.users if u not in losses.values), node)
        what = "another loss of the same logits" if node in decoded else f"{node.name}, before the loss,"
        where = place(user) or user.name
        raise Refused("logits_used", f"{what} is used at {where} as well; {ADVICE}", place(first))
    return first, decoded[first]


def _near_miss(losses: Losses, others: list[fx.Node], why: dict[fx.Node, Refused]) -> None:
    """Raises `Refused` where something was meant to be a loss."""
    for node in others:
        value = losses.values.get(node)
        if value is None:
            continue
        if value.kind in ("row", "total") and any(atom[0] == "pick" for monomial in value.rows for atom in monomial):
            raise why[node]
        for user in node.users:
            call = call_of(user)
            if call is not None and call.name in LOSSES and user not in losses.values:
                raise Refused("unsupported_loss", f"{call.name} with these arguments is not the kernel's", place(user))
        if value.kind == "class" and any(atom == ("lse",) for monomial in value.rows for atom in monomial):
            user = next((u for u in node.users if u not in losses.values), node)
            raise Refused("unsupported_loss", f"log probabilities are used in {user.name}", place(user))
        for user in node.users:
            if value.plain and user not in losses.values and _ends_in_loss(user):
                detail = f"{user.name} makes other logits of them, not by one number or a cap"
                raise Refused("unsupported_loss", detail, place(user))


def _ends_in_loss(node: fx.Node) -> bool:
    """Whether something of the size of these logits goes into a loss, a few operations on."""
    here, size = [node], tensor_of(node).numel() if tensor_of(node) is not None else None
    for _ in range(HOPS):
        for n in here:
            call = call_of(n)
            if call is not None and call.name in LOSSES:
                return True
        here = [u for n in here for u in n.users if _has_size(n, size)]
    return False


def _has_size(node: fx.Node, size: Any) -> bool:
    fake = tensor_of(node)
    return fake is not None and same_size(fake.numel(), size)


def comes_from(node: fx.Node, other: fx.Node) -> bool:
    seen, todo = set[fx.Node](), [node]
    while todo:
        here = todo.pop()
        if here is other:
            return True
        if here not in seen:
            seen.add(here)
            todo += here.all_input_nodes
    return False


def place(node: fx.Node) -> str:
    return short_source(source_of(node))


def check_gradients(losses: Losses, node: fx.Node, loss: Loss) -> None:
    """Refuse where a part of the loss takes no gradient although the logits do: a detach, or a region without."""
    if not tensor_of(loss.value.root.node).requires_grad:
        return
    for part in needed(losses, node, loss.value.root.node):
        value = losses.values.get(part)
        shift = value is not None and value.kind == "row" and set(value.rows) == {(MAX,)}
        if value is not None and not shift and not tensor_of(part).requires_grad:
            raise Refused("unsupported_loss", f"{part.name}, a part of it, takes no gradient")


def check_operands(losses: Losses, node: fx.Node, loss: Loss) -> None:
    """Refuse what the kernel cannot take, and operands that are not at the loss what they were at the layer."""
    root = loss.value.root
    device, dtype = tensor_of(root.node).device.type, tensor_of(root.node).dtype
    reason = supports(device, dtype)
    if reason is not None:
        raise Refused("no_kernel", reason)
    check_writes(losses, root.node, node, loss, (root.x, root.weight, root.bias))


def check_writes(
    losses: Losses, start: fx.Node, node: fx.Node, loss: Loss, operands: tuple[fx.Node | None, ...]
) -> None:
    """Refuse what is not at the loss what it was at `start`, `operands` and all that the loss reads beside them."""
    read = [*operands, loss.target.node, *loss.over, *(n for n, _ in loss.weights), *(n for n, _, _ in loss.keeps)]
    if written_between(start, node) & frozenset[int]().union(*(memory(n) for n in read)):
        raise Refused("mutates_input", "the program writes to what the layer or the loss reads, between the two")
    # Targets that were read apart, or into a one-hot matrix, are one only if nothing was written to them meanwhile.
    readers = {n for n, target in losses.one_hots.items() if target == loss.target}
    readers |= {n for n in losses.laid if Target.of(n, losses.laid[n]).root is loss.target.root}
    first = next(n for n in node.graph.nodes if n in readers)
    if readers - {loss.target.node} and (
        written_between(first, node) & memory(loss.target.root) or _one_hot_is_old(losses, loss)
    ):
        raise Refused("mutates_input", "the program writes to the targets while they are in use")


def _one_hot_is_old(losses: Losses, loss: Loss) -> bool:
    """A one-hot matrix does not show when its targets were read: nothing may ever be written to them."""
    used = any(target == loss.target for target in losses.one_hots.values())
    return used and bool(written(loss.value.root.node.graph) & memory(loss.target.root))


def splice(gm: fx.GraphModule, losses: Losses, node: fx.Node, loss: Loss) -> Rewrite:
    """Put the kernel in the place of `node`; what nothing wants any more is removed."""
    root, fake = loss.value.root, tensor_of(node)
    kernel = kernel_name(fake.device.type, tensor_of(root.node).dtype)

    def write(emitter: Emitter) -> fx.Node:
        return emitter.loss(loss, wanted_of(node, root), fake.dtype, narrowed(loss))

    nodes = put(gm.graph, node, Emitter, write, read_from(losses, root.node))
    return Rewrite(PATTERN, PATTERN, EQUATION, kernel, place(node), *nodes)


def read_from(losses: Losses, logits: fx.Node) -> set[fx.Node]:
    """The nodes that are these logits, or made of them."""
    own = {n for n, value in losses.values.items() if value.root.node is logits}
    return own | {n for n in losses.pairs if n.all_input_nodes[0] in own}


def match_linear_cross_entropy(gm: fx.GraphModule, *, validated: bool = True) -> Found:
    """Rewrite every linear layer of `gm` that ends in a cross entropy, in place."""
    found = Found()
    losses = Losses(roots_of(gm.graph))
    roots = list(losses.values)
    read(losses, gm.graph)
    for root in roots:
        try:
            chosen = choose(losses, root)
            if chosen is None:
                continue
            node, loss = chosen
            try:
                check_operands(losses, node, loss)
                check_gradients(losses, node, loss)
                if validated:
                    start = time.perf_counter()
                    check(losses, node, loss)
                    found.validation_seconds += time.perf_counter() - start
            except Refused as refused:
                refused.source = refused.source or place(node)
                raise
            found.rewrites.append(splice(gm, losses, node, loss))
        except Refused as refused:
            if REFUSED not in root.meta:
                found.refusals.append(refused.record(PATTERN, place(root)))
    if found.rewrites:
        gm.graph.lint()
        gm.recompile()
    return found

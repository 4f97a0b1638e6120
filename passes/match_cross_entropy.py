"""Find a cross entropy over logits that exist, and write nothing of their size but their gradient.

Before: logits from anywhere, or a linear layer's that are used elsewhere too, so that `linear_cross_entropy` leaves
them; then what that pass reads: casts, a scale, a cap, slices, and a loss by torch or by hand.
After, where a gradient is wanted:
- on CUDA, from CLASSES classes on, `fla_compile::cross_entropy`, a row a program;
- elsewhere, where the program picks the target's logit by `gather`, torch's own loss: the backward of a `gather` adds
  to a float32 tensor of the logits' size, which Inductor does not fuse away; that of torch's loss compares indices.
What is torch's loss already, or wants no gradient, stays as written: Inductor's loops read the logits once forward, and
backward once more to write their gradient. The report says which of these it is.
Legal for the reasons of `match_linear_cross_entropy`, whose rules these are, and checked on data in the same way.
Refused: log probabilities or losses in part that are used elsewhere too (`intermediate_used`), several losses of the
same logits (`logits_used`), logits or targets that are written to meanwhile (`mutates_input`), and where the operator
would run, losses that it does not compute (`unsupported_loss`). Logits that other operations make on the way into the
loss are left alone: Inductor fuses these.
"""

import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import fx

from fla_compile.kernels.cross_entropy import kernel_name, supports
from fla_compile.passes.logits_emit import OverLogits
from fla_compile.passes.loss_check import check, needed
from fla_compile.passes.loss_decide import CLASSES as FEWEST
from fla_compile.passes.loss_decide import Loss, decode, linear
from fla_compile.passes.loss_emit import put
from fla_compile.passes.loss_reader import read
from fla_compile.passes.loss_values import Form, Label, Losses, Root, Value, is_one, settled
from fla_compile.passes.loss_views import VIEWS
from fla_compile.passes.match_linear_cross_entropy import (
    Found,
    check_gradients,
    check_writes,
    comes_from,
    frontier_of,
    place,
    read_from,
)
from fla_compile.passes.records import Refused, Rewrite
from fla_compile.passes.spellings import call_of, tensor_of

PATTERN = "cross_entropy"
EQUATION = "l = logsumexp(z) - z_t"
AS_WRITTEN = "as written (Inductor)"
TORCH = "torch's loss (Inductor)"
CLASSES = 4096  # fewer, and launches cost more than the rows
SEEDS = {"cross_entropy", "nll_loss", "log_softmax", "softmax", "logsumexp", "gather"}
# What between logits and a loss makes other logits of them.
MADE = VIEWS.keys() | {"mul", "div", "tanh"}
EXIST = {
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "bilinear", "embedding",
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
}  # fmt: skip


def logits_before(node: fx.Node) -> Iterator[fx.Node]:
    """What an operation's input is made of, the furthest first, where that is a tensor that exists."""
    chain = list[fx.Node]()
    while True:
        call = call_of(node)
        inputs = [n for n in node.all_input_nodes if tensor_of(n) is not None and tensor_of(n).is_floating_point()]
        if call is None or call.in_place or not inputs or (chain and call.name not in MADE):
            break
        if chain and len(inputs) > 1:
            break
        node = inputs[0]
        chain.append(node)
    if not chain or not exists(chain[-1]):
        return
    yield chain[-1]
    for node in reversed(chain[:-1]) if linear(chain[-1]) is None else ():  # axes may be merged in what is given
        if call_of(node).name not in VIEWS or tensor_of(node).dtype != tensor_of(chain[-1]).dtype:
            break
        yield node


def exists(node: fx.Node) -> bool:
    if node.op in ("placeholder", "get_attr"):
        return True
    call = call_of(node)
    return call is not None and (call.name in EXIST or any(user.op == "output" for user in node.users))


def value_of(node: fx.Node) -> Value | None:
    """Logits [*rows, V] whose rows lie in memory as rows."""
    fake = tensor_of(node)
    if fake is None or fake.ndim < 2 or fake.stride(-1) != 1:
        return None
    *sizes, V = (settled(size) for size in fake.shape)
    if not isinstance(V, int) or V < FEWEST:
        return None
    rows, classes = tuple(Label(size) for size in sizes), Label(V, whole=True)
    axes = (() if is_one(label.size) else (label,) for label in rows)
    return Value(Root(node, node, None, None, False, rows, classes), Form(), "class", (*axes, (classes,)), {})


def kernel_for(losses: Losses, node: fx.Node, root: fx.Node, kernel: bool | None) -> str:
    """What computes the loss `node`; `kernel` as in `match_cross_entropy`."""
    if not tensor_of(node).requires_grad or not tensor_of(root).requires_grad:
        return AS_WRITTEN
    if has_kernel(root, kernel):
        return kernel_name(tensor_of(root).device.type, tensor_of(root).dtype)
    calls = [call_of(n) for n in needed(losses, node, root)]
    return TORCH if any(call is not None and call.name == "gather" for call in calls) else AS_WRITTEN


def has_kernel(root: fx.Node, kernel: bool | None) -> bool:
    fake = tensor_of(root)
    if supports(fake.device.type, fake.dtype) is not None:
        return False
    runs = fake.device.type == "cuda" and fake.dtype != torch.float64 and fake.shape[-1] >= CLASSES
    return runs if kernel is None else kernel


def choose(losses: Losses, root: fx.Node) -> tuple[fx.Node, Loss] | None:
    """The loss of these logits; None where there is none, or where a linear layer has no other use than it."""
    frontier = frontier_of(losses, root)
    decoded: dict[fx.Node, Loss] = {}
    for node in frontier:
        try:
            decoded[node] = decode(losses.values[node])
        except (KeyError, Refused):
            continue
    if not decoded:
        return None
    first = next(iter(decoded))
    beyond = [n for n in frontier if n is not first and not comes_from(n, first)]
    return None if not beyond and linear(root) is not None else (first, decoded[first])


def check_uses(losses: Losses, root: fx.Node, node: fx.Node) -> None:
    """Refuse a loss beside which its parts, or another loss, are computed all the same."""
    parts = needed(losses, node, root)
    for other in frontier_of(losses, root):
        value = losses.values.get(other)
        if other is node or (value is not None and value.plain) or comes_from(other, node):
            continue
        user = next((u for u in other.users if u not in losses.values), other)
        where = place(user) or user.name
        try:
            loss = None if value is None else decode(value)
        except Refused:
            loss = None
        if loss is not None:
            raise Refused("logits_used", f"another loss of the same logits is used at {where} as well")
        if other in parts:
            raise Refused("intermediate_used", f"{other.name}, before the loss, is used at {where} as well")
    own = {n for n, value in losses.values.items() if value.root.node is root}
    if any(losses.writes.get(n) for n in own):
        raise Refused("mutates_input", "the program writes over its logits on the way to the loss")


def near_miss(losses: Losses, root: fx.Node) -> Refused | None:
    """Why torch's own loss of these logits is none that the operator computes."""
    for node, value in losses.values.items():
        for user in node.users:
            call = call_of(user)
            if value.root.node is root and user not in losses.values and call is not None:
                if call.name in ("cross_entropy", "nll_loss"):
                    detail = f"{call.name} with these arguments is not the kernel's"
                    return Refused("unsupported_loss", detail, place(user))
    return None


def decide(root: fx.Node, kernel: bool | None) -> tuple[Losses, fx.Node, Loss] | None:
    """The loss of one tensor; None where there is none of ours; raises `Refused`."""
    value = value_of(root)
    if value is None:
        return None
    losses = Losses({root: value})
    read(losses, root.graph)
    chosen = choose(losses, root)
    if chosen is not None:
        return losses, *chosen
    why = near_miss(losses, root)
    if why is not None and linear(root) is None and has_kernel(root, kernel):
        raise why
    return None


def rewrite(
    gm: fx.GraphModule, losses: Losses, node: fx.Node, loss: Loss, name: str, found: Found, validated: bool
) -> Rewrite:
    root = loss.value.root.node
    check_uses(losses, root, node)
    if name == AS_WRITTEN:
        size = len(needed(losses, node, root)) - 1
        return Rewrite(PATTERN, PATTERN, EQUATION, name, place(node), size, size)
    start = next(n for n in needed(losses, node, root) if n is not root)
    check_writes(losses, start, node, loss, (root,))
    check_gradients(losses, node, loss)
    emitter = partial(OverLogits, kernel=name != TORCH)
    if validated:
        began = time.perf_counter()
        check(losses, node, loss, emitter)
        found.validation_seconds += time.perf_counter() - began

    def write(writer: OverLogits) -> fx.Node:
        return writer.loss(loss, (), tensor_of(node).dtype, None)

    nodes = put(gm.graph, node, emitter, write, read_from(losses, root))
    return Rewrite(PATTERN, PATTERN, EQUATION, name, place(node), *nodes)


def match_cross_entropy(gm: fx.GraphModule, *, validated: bool = True, kernel: bool | None = None) -> Found:
    """Rewrite every cross entropy of `gm` over logits that exist, in place; `kernel` says whether the operator runs,
    whatever the device."""
    found, done = Found(), set[fx.Node]()
    changed = False
    for seed in [n for n in gm.graph.nodes if (call := call_of(n)) is not None and call.name in SEEDS]:
        for root in logits_before(seed) if seed.users else ():
            if root in done:
                break
            node, name = seed, ""
            try:
                decided = decide(root, kernel)
                if decided is None:
                    continue
                done.add(root)
                losses, node, loss = decided
                name = kernel_for(losses, node, root, kernel)
                found.rewrites.append(rewrite(gm, losses, node, loss, name, found, validated))
                changed = changed or name != AS_WRITTEN
            except Refused as refused:
                done.add(root)
                # What is told already of a layer, or costs nothing as it is written, is no news.
                told = linear(root) is not None or name == AS_WRITTEN
                if not told or refused.reason == "validation_failed":
                    found.refusals.append(refused.record(PATTERN, place(node)))
            break
    if changed:
        gm.graph.lint()
        gm.recompile()
    return found

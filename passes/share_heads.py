"""Let a kernel share the heads that a program repeats for it.

Before: `o, S = gla(q, permute(k.repeat_interleave(G, 2)), ...)`, or an axis of one unsqueezed, expanded and merged.
After: `o, S = gla(q, permute(k), ...)`, S repeated where the kernel now has fewer states.

Legal because the kernel means by fewer heads that neighbours share them, which is what the program wrote out, gradients
included: the sum over a group, which the kernel takes, is the gradient of the repetition.
Left alone: repetitions that something else reads as well, of memory that the graph writes to, by a number that is not
known, and all in graphs that switch gradients off and on.
Refused: what `heads_check` does not find to be the same (`validation_failed`); it stays as the program has it.
"""

import time
from collections.abc import Mapping

import torch
from torch import fx

from fla_compile.passes.heads_check import check_call, check_operand
from fla_compile.passes.log_decay import op_name
from fla_compile.passes.memory import memory, written
from fla_compile.passes.places import short_source, source_of
from fla_compile.passes.records import Refusal, Refused
from fla_compile.passes.repeated_heads import Repeated, repeated_heads

HEADS = "fla_heads"  # in a kernel call's meta: heads of each operand by name, 0 for one that there is not
PLACES = {"q": 0, "k": 1, "v": 2}
SWITCHES = {"_set_grad_enabled", "_enter_inference_mode"}


def states(heads: Mapping[str, int]) -> int:
    return heads["state"] or max(heads["k"], heads["v"], heads["g"])


def decide(call: fx.Node, changed: set[int]) -> dict[str, Repeated]:
    """The operands of a kernel to be handed over as they were before they were repeated."""
    heads = call.meta[HEADS]
    found = {name: repeated_heads(call.args[place], 2) for name, place in PLACES.items()}
    known = {name: x for name, x in found.items() if x is not None and not memory(x.source) & changed}
    for names in (list(known), [name for name in known if name != "q"]):
        after = heads | {name: known[name].heads for name in names}
        H = states(after)
        fits = all(n == 0 or H % n == 0 for name, n in after.items() if name != "q")
        fits &= H % after["q"] == 0 or after["q"] % H == 0
        if fits and max(after["q"], H) == max(heads["q"], states(heads)):
            return {name: known[name] for name in names}
    return {}


def check(call: fx.Node, operands: Mapping[str, Repeated]) -> None:
    """Raises `Refused("validation_failed")`."""
    heads = call.meta[HEADS]
    for name, repeated in operands.items():
        operand = call.args[PLACES[name]]
        assert isinstance(operand, fx.Node)
        check_operand(operand, repeated, heads[name])
    after = heads | {name: x.heads for name, x in operands.items()}
    check_call(call, heads, after, (states(heads), states(after)))


def rewrite(call: fx.Node, operands: Mapping[str, Repeated]) -> None:
    graph, heads = call.graph, call.meta[HEADS]
    for name, repeated in operands.items():
        with graph.inserting_before(call):
            tensor = repeated.source
            if repeated.squeezed is not None:
                tensor = graph.call_function(torch.squeeze, (tensor, repeated.squeezed))
            for move in reversed(repeated.moves):
                tensor = graph.create_node(move.op, move.target, (tensor, *move.args[1:]))
        old = call.args[PLACES[name]]
        call.update_arg(PLACES[name], tensor)
        while isinstance(old, fx.Node) and not old.users:
            unused, old = old, old.args[0]
            graph.erase_node(unused)
    call.meta[HEADS] = heads | {name: x.heads for name, x in operands.items()}
    times = states(heads) // states(call.meta[HEADS])
    for final in [user for user in call.users if times > 1 and user.args[1] == 1]:
        with graph.inserting_after(final):
            every = graph.call_method("repeat_interleave", (final, times, 1))
        final.replace_all_uses_with(every)
        every.update_arg(0, final)


def share_heads(gm: fx.GraphModule, *, validated: bool = True) -> tuple[list[Refusal], float]:
    """Rewrites `gm` in place; returns what was refused, and the seconds that checks took."""
    calls = [node for node in gm.graph.nodes if HEADS in node.meta]
    if not calls or any(op_name(node) in SWITCHES for node in gm.graph.nodes):
        return [], 0.0
    changed, rewritten, seconds = written(gm.graph), False, 0.0
    refusals: list[Refusal] = []
    for call in calls:
        operands = decide(call, changed)
        if not operands:
            continue
        if validated:
            start = time.perf_counter()
            try:
                check(call, operands)
            except Refused as refused:
                name, repeated = next(iter(operands.items()))
                repetition = repeated.moves[-1].args[0] if repeated.moves else call.args[PLACES[name]]
                refusals.append(refused.record("share_heads", short_source(source_of(repetition))))
                continue
            finally:
                seconds += time.perf_counter() - start
        rewrite(call, operands)
        rewritten = True
    if rewritten:
        gm.graph.lint()
        gm.recompile()
    return refusals, seconds

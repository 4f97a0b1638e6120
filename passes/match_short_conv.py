"""Find causal depthwise convolutions over time, and run each as one kernel.

Before: nn.Conv1d(D, D, W, groups=D, padding=W - 1)(x)[..., :T], F.conv1d of a padded x or of cat([state, x]), a sum
        over x.unfold(...), or a sum of products of x at several steps; then SiLU and a residual, or not.
After:  `torch.ops.fla_compile.short_conv` on [B, T, D]. On the CPU, but for large tensors in training, the sum of its W
        products: Inductor makes one loop of it and of what is around, and differentiates it at dynamic lengths, as it
        does not conv1d.
        What is computed before it is read as a tensor: a masked x, a sum, channels or weights that are joined.
Legal because the program is this sum as a polynomial (`windows`, `conv_decide`), and checked on data.
Refused: convolutions padded as causal ones of which other steps are kept (`not_causal`), more than 8 taps or dilated
ones (`no_kernel`), and those of which a part is used elsewhere. What is not padded like one is left without a word.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from fla_compile.kernels.short_conv import kernel_name, supports
from fla_compile.passes.conv_decide import JOINS, Conv, computed_before, decide, heavy, interior_of, leaves_of
from fla_compile.passes.conv_emit import Emitter, Head, computed_in
from fla_compile.passes.inline_parts import inline_parts
from fla_compile.passes.log_decay import op_name
from fla_compile.passes.memory import _writes, memory, written
from fla_compile.passes.normal_form import same_size
from fla_compile.passes.parallel_check import check
from fla_compile.passes.parallel_regions import elements
from fla_compile.passes.places import short_source, source_of
from fla_compile.passes.records import Refusal, Refused, Rewrite
from fla_compile.passes.spellings import call_of, is_cast, tensor_of
from fla_compile.passes.validate import concrete
from fla_compile.passes.window_rules import analyse
from fla_compile.passes.windows import Window, Windows

EQUATION = "y_t = act(sum_j w_j x_{t-W+1+j} + b) + r_t"
TAPS = "conv (taps, Inductor)"
STARTS = {"conv1d", "pad", "constant_pad_nd", "unfold"}  # whose operands may be sums or products themselves
TRIGGERS = STARTS | JOINS
GRAD_MODES = {"_set_grad_enabled", "set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode"}
LARGE_ON_CPU = 1 << 20  # elements of x
NEAR = 16  # from the number of steps: that many and a few taps


@dataclass
class Found:
    """What the pass did; what it refused stays in the graph as it was."""

    rewrites: list[Rewrite] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    validation_seconds: float = 0.0


@dataclass(frozen=True)
class Match:
    conv: Conv
    head: Head
    kernel: str  # "op" or "taps"

    @property
    def nodes(self) -> set[fx.Node]:
        """All that the match replaces."""
        return {*self.conv.interior, self.conv.node, *self.head.inner, self.head.node}


def choose_kernel(x: fx.Node, trains: bool) -> str:
    """The operator; on the CPU only for training at sizes where it was measured to win, else taps, which fuse."""
    on_cpu = tensor_of(x).device.type == "cpu"
    return "taps" if on_cpu and not (trains and elements(x) >= LARGE_ON_CPU) else "op"


def head_of(conv: Conv, switches: Sequence[fx.Node]) -> Head:
    """The last of what follows a convolution that belongs to it; what only makes it wider is left to Inductor."""
    head, best, own = Head(conv.node), Head(conv.node), tensor_of(conv.node).dtype
    while (following := _next(conv, head)) is not None and not _between(switches, head.node, following.node):
        head = following
        if torch.promote_types(own, tensor_of(head.node).dtype) == own:
            best = head
    return best


def _between(switches: Sequence[fx.Node], first: fx.Node, last: fx.Node) -> bool:
    """Whether gradients are switched on or off between two nodes."""
    return any(first < node < last for node in switches)


def _next(conv: Conv, head: Head) -> Head | None:
    users = list(head.node.users)
    inner = head.inner | {head.node}
    if len(users) == 2 and not head.silu and head.residual is None and conv.residual is None:
        gate = next((u for u in users if _named(u, "sigmoid")), None)
        if gate is None:
            return None
        product = next(u for u in users if u is not gate)
        factors = {product.args[0], product.args[1]} if len(product.args) == 2 else set()
        if _named(product, "mul") and factors == {gate, head.node} and list(gate.users) == [product]:
            return Head(product, True, None, inner | {gate})
        return None
    if len(users) != 1 or head.residual is not None:
        return None
    (user,) = users
    call = call_of(user)
    if call is None or call.in_place:
        return None
    if is_cast(user):
        return Head(user, head.silu, None, inner)
    if call.name == "silu" and not head.silu and conv.residual is None:
        return Head(user, True, None, inner)
    if call.name == "add" and call.get("alpha", 1) == 1 and head.silu:
        a, b = call.args.get("input"), call.args.get("other")
        other = b if a is head.node else a
        have, want = tensor_of(other), tensor_of(user)
        alike = (
            have is not None
            and have.dtype == tensor_of(head.node).dtype == want.dtype
            and len(have.shape) == len(want.shape)
        )
        if (
            other is not head.node
            and alike
            and all(same_size(x, y) for x, y in zip(have.shape, want.shape, strict=True))
        ):
            return Head(user, True, other, inner)
    return None


def _named(node: fx.Node, name: str) -> bool:
    call = call_of(node)
    return call is not None and call.name == name and not call.in_place


def recognise(w: Windows, node: fx.Node, switches: Sequence[fx.Node]) -> Match | None:
    """The match whose convolution ends at `node`, across no switch of gradients; raises `Refused`."""
    conv = decide(w, node)
    if conv is None or _between(switches, min(conv.interior, default=node), node):
        return None
    device, dtype = tensor_of(conv.x).device.type, tensor_of(conv.x).dtype
    reason = supports(device, dtype, conv.width)
    if reason is not None:
        raise Refused("no_kernel", reason)
    trains = any(tensor_of(n).requires_grad for n in leaves_of(w, w.values[node]))
    match = Match(conv, head_of(conv, switches), choose_kernel(conv.x, trains))
    check_escapes(w, match)
    check_memory(w, match)
    return match


def check_escapes(w: Windows, match: Match) -> None:
    """Refuse where a part of the sum would be computed all the same."""
    inside = match.nodes
    for node in match.conv.interior:
        user = next((u for u in node.users if u not in inside), None)
        if user is not None and heavy(w, node):
            place = short_source(source_of(user)) or user.name
            raise Refused("intermediate_used", f"{node.name} is used at {place} as well")
    changed = frozenset[int]().union(*(_writes(n) for n in inside if n.op in ("call_function", "call_method")))
    for node in w.graph.nodes if changed else ():
        if node in (match.conv.node, match.head.node) or not memory(node) & changed:
            continue
        if any(user not in inside for user in node.users):
            raise Refused("intermediate_used", f"{node.name}, which holds the sum, is used as well")


def check_memory(w: Windows, match: Match) -> None:
    """Refuse where something writes to what the kernel reads, between the program's reads and the kernel's."""
    conv, graph = match.conv, match.conv.node.graph
    leaves = leaves_of(w, w.values[conv.node]) | ({match.head.residual} if match.head.residual is not None else set())
    held = frozenset[int]().union(*(memory(n) for n in leaves))
    running = False
    for node in graph.nodes:
        running = running or node in match.nodes
        if running and node.op in ("call_function", "call_method") and _writes(node) & held:
            raise Refused("mutates_input", "the program writes to what the convolution reads, before it is done")
        if node is match.head.node:
            break
    changed = written(graph)
    wants = any(tensor_of(n).requires_grad for n in leaves)
    if wants and any(memory(n) & changed & held for n in graph.find_nodes(op="placeholder")):
        raise Refused("mutates_input", "the program writes to an argument that the convolution's gradient needs")


def final_states(w: Windows, match: Match) -> list[fx.Node]:
    """The nodes after a match that are the last W - 1 steps that it reads, in x's axes."""
    conv, size = match.conv, tensor_of(match.conv.x).shape[match.conv.time]
    own, dtype = tensor_of(conv.x).dtype, computed_in(conv, match.head)
    if (
        conv.first
        or not same_size(size, conv.length)
        or match.kernel != "op"
        or torch.promote_types(own, dtype) != dtype
    ):
        return []
    found, after, changed = [], False, written(w.graph)
    for node in w.graph.nodes:
        after = after or node is match.head.node
        value = w.values.get(node)
        if not after or value is None or len(value.terms) != 1 or len(value.terms[0].factors) != 1:
            continue
        (factor,), what = value.terms[0].factors, w.atoms[value.terms[0].factors[0].atom]
        if value.terms[0].coef != 1.0 or not isinstance(what, Window) or (what.node, what.axis) != (conv.x, conv.time):
            continue
        ends = same_size(what.start + what.length, size) and same_size(what.length, conv.width - 1)
        alike = tensor_of(node).dtype == tensor_of(conv.x).dtype and factor.axes == value.dims
        alike &= not memory(node) & changed
        own = what.prefix + tuple(reversed(conv.rows))[len(what.prefix) :]
        if ends and alike and not what.suffix and own[: conv.width - 1] == conv.rows[::-1]:
            found.append(node)
    return found


def write(w: Windows, match: Match, graph: fx.Graph, env: dict[fx.Node, fx.Node], faked: bool) -> list[fx.Node]:
    """Put the kernel in place of the match in a graph in which `env` stands for the nodes of the program."""
    conv, head = match.conv, match.head
    at = env.get(head.node, head.node)
    states = final_states(w, match) if faked else []
    value = tensor_of(head.node)
    with graph.inserting_before(at):
        emitter = Emitter(w, graph, env, written(graph) if faked else set(), faked)
        with torch._guards.tracing(None), getattr(value, "fake_mode", None) or contextlib.nullcontext():
            try:
                result, last = emitter.convolution(conv, head, match.kernel, bool(states))
                state = emitter.relabelled(conv, last, conv.groups, conv.labels) if last is not None else None
            except Exception as error:
                # A mistake of ours must not cost the user the program.
                for node in reversed(emitter.added):
                    graph.erase_node(node)
                told = f"cannot be written: {type(error).__name__}: {error}"
                raise Refused("validation_failed", told, short_source(source_of(conv.node))) from error
    for node in emitter.added:
        node.meta.setdefault("stack_trace", conv.node.meta.get("stack_trace"))
    at.replace_all_uses_with(result)
    env[head.node] = result
    for node in states:
        assert state is not None
        node.replace_all_uses_with(state)
        env[node] = state
    return emitter.added


def programs_of(w: Windows, match: Match) -> tuple[list[fx.Node], fx.GraphModule, fx.GraphModule]:
    """The operands of a match, the program from them to its head, and its replacement."""
    inside = match.nodes
    nodes = [n for n in match.conv.node.graph.nodes if n in inside]
    leaves = leaves_of(w, w.values[match.conv.node])
    inputs = list(dict.fromkeys([*(n for node in nodes for n in node.all_input_nodes if n not in inside), *leaves]))
    programs = []
    for replaced in (False, True):
        graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in inputs:
            env[node] = graph.placeholder(node.name)
            env[node].meta = dict(node.meta)
        for node in nodes:
            env[node] = graph.node_copy(node, env.__getitem__)
        graph.output((env[match.head.node],))
        if replaced:
            write(w, match, graph, env, faked=False)
            graph.eliminate_dead_code()
        programs.append(fx.GraphModule(match.conv.node.graph.owning_module, graph))
    return inputs, programs[0], programs[1]


def fingerprint(match: Match, inputs: list[fx.Node]) -> str:
    """Equal for matches that are the same program, as in the layers of a model."""
    inside = match.nodes
    nodes = [*inputs, *(n for n in match.conv.node.graph.nodes if n in inside)]
    names = {node: f"n{i}" for i, node in enumerate(nodes)}
    lines = []
    for node in nodes:
        value, args = tensor_of(node), fx.map_arg((node.args, node.kwargs), lambda n: names.get(n, "?"))
        shape = "" if value is None else f"{value.dtype} {tuple(value.shape)} {value.device} {value.requires_grad}"
        lines.append(f"{names[node]} {'' if node in inputs else f'{node.target} {args}'} {shape}")
    return "\n".join(lines)


def splice(w: Windows, match: Match, graph: fx.Graph, env: dict[fx.Node, fx.Node]) -> Rewrite:
    """Rewrite the graph; `env` has what earlier matches put in place of nodes."""
    added = write(w, match, graph, env, faked=True)
    value = tensor_of(match.conv.x)
    name = TAPS if match.kernel == "taps" else kernel_name(value.device.type, value.dtype)
    place = short_source(source_of(match.conv.node))
    return Rewrite("short_conv", "short_conv", EQUATION, name, place, len(match.nodes), len(added))


@dataclass
class Search:
    """The matches in a graph, each in the values that it was found in, and the nodes that need no further look."""

    found: Found
    switches: list[fx.Node]
    validated: bool
    taken: set[fx.Node] = field(default_factory=set)
    passed: set[str] = field(default_factory=set)
    matches: list[tuple[Windows, Match]] = field(default_factory=list)

    def over(self, w: Windows) -> None:
        for node in reversed(list(w.values)):
            if node in self.taken:
                continue
            try:
                match = recognise(w, node, self.switches)
                if match is None:
                    continue
                validate(w, match, self.passed, self.found if self.validated else None)
            except Refused as refused:
                self.found.refusals.append(refused.record("short_conv", short_source(source_of(node))))
                self.taken |= interior_of(w, node) | {node}
                continue
            self.matches.append((w, match))
            self.taken |= match.nodes


def match_short_conv(gm: fx.GraphModule, *, validated: bool = True) -> Found:
    """Rewrite every short convolution of `gm`, in place."""
    found, graph = Found(), gm.graph
    inline_parts(gm)
    if not any(op_name(node).rstrip("_") in TRIGGERS for node in graph.nodes):
        return found
    search = Search(found, [node for node in graph.nodes if op_name(node) in GRAD_MODES], validated)
    w = analyse(graph)
    search.over(w)
    missed = [node for node in graph.nodes if op_name(node) in STARTS and node not in search.taken]
    opaque = computed_before(w, missed)
    if opaque:
        search.over(analyse(graph, opaque))
    places = {node: i for i, node in enumerate(graph.nodes)}
    env: dict[fx.Node, fx.Node] = {}
    for w, match in sorted(search.matches, key=lambda one: places[one[1].conv.node]):
        try:
            found.rewrites.append(splice(w, match, graph, env))
        except Refused as refused:
            found.refusals.append(refused.record("short_conv"))
    replaced = set(env).union(*(match.nodes for _, match in search.matches))
    for node in reversed(list(graph.nodes)):
        if node in replaced and not node.users:
            graph.erase_node(node)
    if found.rewrites:
        graph.lint()
        gm.recompile()
    return found


def validate(w: Windows, match: Match, passed: set[str], found: Found | None) -> None:
    """Run both on random data, each program once; with `found` None only build them."""
    inputs, before, after = programs_of(w, match)
    program = fingerprint(match, inputs)
    if found is None or program in passed:
        return
    start, steps = time.perf_counter(), concrete(match.conv.length)
    check(before, after, inputs, {}, match.conv.length, near=NEAR if steps >= 3 * NEAR else 0)
    found.validation_seconds += time.perf_counter() - start
    passed.add(program)

"""Find norms that are multiplied by a gate, and run each as one kernel, together with a linear layer behind it.

Before: y = norm(x) * weight * act(gate), or norm(x * act(gate)) * weight, the norm an RMSNorm, LayerNorm or GroupNorm
over heads by any steps, act SiLU or the sigmoid; in front of `linear(y)` or not.
After: one operator, `norm_gate` or `norm_gate_linear`, where Triton runs it. Elsewhere the program stays as it is
written, as Inductor fuses it well, and the report says so.
Legal because both are the same polynomial over rows (`norm_gate_form`), checked on data. Casts between do not matter:
the kernel computes in float32 and rounds once, to the type that the program's result has.
Refused: a statistic or normalised value that is used elsewhere too. Norms without a gate, other axes, other gates are
none of this and are left alone without a word.
"""

import time
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from fla_compile.passes.autocast import active, regions_at
from fla_compile.passes.log_decay import op_name
from fla_compile.passes.memory import _writes, memory
from fla_compile.passes.norm_gate_check import check
from fla_compile.passes.norm_gate_emit import emit, plan
from fla_compile.passes.norm_gate_search import Search
from fla_compile.passes.norm_gate_uses import Match, between, check_uses, switches_gradients
from fla_compile.passes.places import short_source, source_of
from fla_compile.passes.records import Refusal, Refused, Rewrite
from fla_compile.passes.row_values import fix
from fla_compile.passes.scans import needs_gradient
from fla_compile.passes.spellings import call_of, is_reshape, tensor_of

PATTERN = "norm_gate"


@dataclass
class Found:
    """What the pass did; what it refused stays in the graph as it was."""

    rewrites: list[Rewrite] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    validation_seconds: float = 0.0


def decide(search: Search, seed: fx.Node, kernel: bool | None) -> Match | None:
    """The pattern around a reduction, with what to write in its place; raises `Refused`."""
    found = search.match(seed)
    if found is None:
        return None
    root, reading, values = found
    emission = plan(root, reading, kernel)
    if emission is None:
        return None
    interior = between(search, root, set(emission.leaves))
    inputs = dict.fromkeys(n for node in interior for n in node.all_input_nodes if n not in interior)
    match = Match(root, reading, values, interior, tuple({**inputs, **dict.fromkeys(emission.leaves)}), emission)
    if not check_uses(search, match):
        return None
    return follow(search, match)


def follow(search: Search, match: Match) -> Match:
    """Take in the linear layer behind a pattern, where its gradient would keep the pattern's result."""
    if not match.emission.operator or not needs_gradient(match.root):
        return match
    path, node = list[fx.Node](), match.root
    while len(readers := {user for user, _ in search.flow.readers(node)}) == 1:
        (node,) = readers
        call = call_of(node)
        if call is not None and call.name == "linear":
            weight, bias = call.get("weight"), call.get("bias")
            value, data = tensor_of(weight), call.get("input")
            if value is None or data is not (path[-1] if path else match.root):
                return match
            if switches_gradients(search, data, node):
                return match
            same = value.dtype == tensor_of(data).dtype == tensor_of(node).dtype
            cast = active(value.device.type, regions_at(node))
            emission = match.emission.with_linear(data, weight, bias)
            if not same or cast or emission is None:
                return match
            if any(list(search.flow.writes_between(n, node)) for n in emission.leaves):
                return match
            interior = (*match.interior, *path, node)
            inputs = dict.fromkeys((*match.inputs, *(n for n in (weight, bias) if n is not None)))
            return replace(match, root=node, interior=interior, inputs=tuple(inputs), emission=emission)
        if not is_reshape(node):
            break
        path.append(node)
    return match


def programs_of(gm: fx.GraphModule, match: Match) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The pattern and its replacement, from its inputs to its result."""
    programs = []
    written = frozenset[int]().union(*(_writes(node) for node in match.interior))
    for replaced in (False, True):
        graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in match.inputs:
            env[node] = graph.placeholder(node.name)
        for node in match.inputs:  # what is written over in place may not be an argument that needs a gradient
            if memory(node) & written and not replaced:
                env[node] = graph.call_function(torch.clone, (env[node],))
        if replaced:
            result = emit(match.emission, graph, env)
        else:
            for node in match.interior:
                env[node] = graph.node_copy(node, env.__getitem__)
                call = call_of(node)
                if call.name == "rms_norm" and call.get("eps") is None:  # its default depends on the type
                    x, shape = call.get("input"), call.get("normalized_shape")
                    env[node].args = (env[x], shape, env.get(call.get("weight")), match.reading.eps)
                    env[node].kwargs = {}
            result = env[match.root]
        graph.output((result,))
        programs.append(fx.GraphModule(gm, graph))
    return programs[0], programs[1]


def fingerprint(match: Match) -> str:
    """Equal for patterns that are the same program, such as the layers of a model."""
    names = {node: f"n{i}" for i, node in enumerate(dict.fromkeys((*match.inputs, *match.interior)))}
    lines = []
    for node in names:
        value = tensor_of(node)
        kind = "" if value is None else f"{value.dtype} {tuple(value.shape)} {value.device} {value.requires_grad}"
        args = fx.map_arg((node.args, node.kwargs), lambda n: names.get(n, ""))
        lines.append(f"{names[node]} {kind} {(node.target, args) if node in match.interior else ''}")
    return "\n".join([*lines, str([names[n] for n in match.emission.leaves]), repr(match.emission.options)])


def rewrite(search: Search, match: Match, replaced: dict[fx.Node, fx.Node]) -> Rewrite:
    """Write the replacement; what nothing wants any more is removed. `replaced` are results of earlier ones."""
    kind = match.reading.family + (" + linear" if match.emission.linear else "")
    told = PATTERN, kind, match.reading.equation, match.emission.kernel, short_source(source_of(match.root))
    if not match.emission.operator:
        return Rewrite(*told, len(match.interior), len(match.interior))
    fix(match.inputs)
    graph, before = search.graph, len(search.graph.nodes)
    readers, value = search.flow.readers(match.root), tensor_of(match.root)
    with graph.inserting_before(match.root):
        known = set(graph.nodes)
        result = emit(match.emission, graph, replaced)
    fresh = [n for n in graph.nodes if n not in known]
    for node in fresh:
        node.meta["stack_trace"] = match.root.meta.get("stack_trace")
    result.meta["example_value"] = value
    replaced[match.root] = result
    for user, name in readers:
        user.replace_input_with(name, result)
    if not value.is_contiguous():
        keep_views(result)
    for node in reversed(match.interior):
        if not node.users:
            graph.erase_node(node)
    return Rewrite(*told, before + len(fresh) - len(graph.nodes), len(fresh))


def keep_views(node: fx.Node) -> None:
    """Views behind a result that is dense now, and was not, become reshapes."""
    for user in node.users:
        if user.op == "call_method" and user.target == "view":
            user.target = "reshape"
        if is_reshape(user) or op_name(user) in ("transpose", "permute", "movedim"):
            keep_views(user)


def match_norm_gate(gm: fx.GraphModule, *, validated: bool = True, kernel: bool | None = None) -> Found:
    """Rewrite every norm with a gate of `gm`, in place; `kernel` says whether to, whatever the device."""
    found, passed, taken = Found(), set[str](), set[fx.Node]()
    search, matches = Search(gm.graph), list[Match]()
    for seed in search.seeds:
        if seed in taken:
            continue
        try:
            match = decide(search, seed, kernel)
            if match is None or match.root in taken:
                continue
            program = fingerprint(match)
            if validated and match.emission.operator and program not in passed:
                start = time.perf_counter()
                check(*programs_of(gm, match), match)
                passed.add(program)
                found.validation_seconds += time.perf_counter() - start
        except Refused as refused:
            found.refusals.append(refused.record(PATTERN, short_source(source_of(seed))))
            continue
        matches.append(match)
        taken.update(match.interior)
    replaced: dict[fx.Node, fx.Node] = {}
    for match in sorted(matches, key=lambda match: search.flow.order[match.root]):
        found.rewrites.append(rewrite(search, match, replaced))
    found.refusals = list(dict.fromkeys(found.refusals))
    if replaced:
        gm.graph.lint()
        gm.recompile()
    return found

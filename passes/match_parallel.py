"""Find recurrences that are written without a loop, and run them as kernels.

Before: o = ((q k^T) * D) v with a causal D of size T x T: a mask, gamma^(i-j), or exp(g_i - g_j); normalised by the sum
over a row or not. Or S = cumsum(k v^T) over time, read as o = q S.
After: `linear_attention`, `retention`, `simple_gla` or `gla` on q, k, v and the log decay of a step; a normaliser is
another one with v = 1. No tensor over two time axes is left.
Legal because the program is the recurrence as a polynomial (`parallel_decide`), and checked on data.
Refused: masks that are not causal, bands, queries and keys of different lengths, a decay that is no function of a step,
and a matrix that something else wants as well. Softmax attention is none of this and is left alone without a word.
"""

import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fla_compile.kernels.decay_ops import supports
from fla_compile.passes.log_decay import Log
from fla_compile.passes.memory import memory, written
from fla_compile.passes.normal_form import same_size
from fla_compile.passes.normalise import trace_step
from fla_compile.passes.parallel_check import check
from fla_compile.passes.parallel_decide import ReadOut, read_out
from fla_compile.passes.parallel_emit import Emitter, Traced
from fla_compile.passes.parallel_regions import (
    Region,
    body_of,
    elements,
    find_regions,
    is_square,
    live_nodes,
    sound,
    tensor_of,
)
from fla_compile.passes.parallel_rules import analyse
from fla_compile.passes.places import short_source, source_of
from fla_compile.passes.proofs import log_of_outer
from fla_compile.passes.records import Refusal, Refused, Rewrite
from fla_compile.passes.recurrence import EQUATIONS
from fla_compile.passes.step import original

KERNELS = {"cpu": "chunk (matrix products)", "cuda": "chunk (Triton)"}


@dataclass
class Found:
    """What the pass did; what it refused stays in the graph as it was."""

    rewrites: list[Rewrite] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    validation_seconds: float = 0.0


@dataclass
class Match:
    """The read-outs of one piece by the node that holds them, and what is known of the piece."""

    region: Region
    traced: Traced
    body: fx.GraphModule
    holds: dict[fx.Node, fx.Node]
    reads: dict[fx.Node, ReadOut]
    leaves: dict[fx.Node, set[fx.Node]]


def trace(gm: fx.GraphModule, region: Region) -> tuple[Traced, fx.GraphModule, dict[fx.Node, fx.Node]] | None:
    """The forms of a piece, and which traced node holds which of its own; None where it cannot be traced as it runs."""
    body = body_of(gm, region)
    try:
        step = trace_step(body)
    except Exception:  # whatever the program's own operations raise without data
        return None
    holds: dict[fx.Node, fx.Node] = {}
    operands, results = step.graph.find_nodes(op="placeholder"), list(step.graph.output_node().args[0])  # type: ignore
    if len(operands) != len(region.inputs) or len(results) != len(region.tensors):
        return None  # an operation with several results is cut through
    origin = dict(zip(operands, region.inputs, strict=True))
    changed = written(gm.graph)
    for node, result in zip(region.tensors, results, strict=True):
        have, want = result.meta["val"], tensor_of(node)
        if have.dtype != want.dtype or len(have.shape) != len(want.shape) or have.device != want.device:
            return None  # traced under other settings than the program runs with, such as autocast
        holds[node] = result
        if not memory(node) & changed:
            origin.setdefault(original(result), node)
            origin.setdefault(result, node)
    proofs: dict[fx.Node, Log] = {}

    measured: set[fx.Node] = set()

    def provable(node: fx.Node) -> bool:
        """A tensor of unknown sign that needs no gradient goes by its magnitude and its signs."""
        log = log_of_outer(origin[node]) if node in origin else None
        value = tensor_of(origin[node]) if node in origin else None
        if log is None and value is not None and value.dtype.is_floating_point and not value.requires_grad:
            log = Log("magnitude", (origin[node],), "measured")
            measured.add(node)
        if log is not None:
            proofs[node] = log
        return log is not None

    forms = analyse(step, provable, measured)
    return Traced(forms, origin, region.inputs, proofs), body, holds


def recognise(gm: fx.GraphModule, region: Region, found: Found) -> Match | None:
    """Decide on every node of a piece; refusals are noted."""
    traced = trace(gm, region)
    if traced is None:
        return None
    known, body, holds = traced
    match = Match(region, known, body, holds, {}, {})
    closed: set[int] = set()
    for node in region.tensors:
        value = known.forms.values[holds[node]]
        contractions = {a for a in value.atoms if known.forms.summed(a)} - closed
        if not contractions or not tensor_of(node).dtype.is_floating_point:
            continue
        read = None
        try:
            read = read_out(known.forms, value, closed)
            if read is None:
                continue
            if read.keyed:
                closed |= contractions
            match.leaves[node] = known.leaves(read)
            check_kernels(node, read, known)
            match.reads[node] = read
        except Refused as refused:
            closed |= contractions
            if read is None or read.keyed:  # a sum by a mask alone, as of layers or tokens, wants no kernel
                found.refusals.append(refused.record("parallel_attention", short_source(source_of(node))))
    return match if any(read.complete for read in match.reads.values()) else None


def check_kernels(node: fx.Node, read: ReadOut, traced: Traced) -> None:
    value = tensor_of(node)
    space = traced.forms.space
    for kernel in read.kernels:
        reason = supports(
            kernel.family, value.device.type, value.dtype, space.total(kernel.keys), space.total(kernel.values)
        )
        if reason is not None:
            raise Refused("no_kernel", reason)


def between(region: Region, node: fx.Node, leaves: set[fx.Node]) -> set[fx.Node]:
    """The nodes of a piece from which a read-out is computed, down to the operands of its kernels."""
    members, found = set(region.nodes), set[fx.Node]()
    todo = list(node.all_input_nodes)
    while todo:
        here = todo.pop()
        if here in members and here not in leaves and here not in found:
            found.add(here)
            todo += here.all_input_nodes
    return found


def check_escapes(match: Match) -> None:
    """Refuse where a matrix over two time axes, or a running sum of states, would be computed all the same."""
    region, reads = match.region, match.reads
    leaves = set[fx.Node]().union(*(match.leaves[n] for n in reads))
    live = live_nodes(region, set(reads), leaves)
    wanted = live_nodes(region, set(region.nodes) - set(leaves), leaves) if leaves else set()
    for node in reads:
        inner = between(region, node, match.leaves[node])
        small = max((elements(n) for n in (*match.leaves[node], node)), default=0)
        for n in region.nodes:
            heavy = n in inner and n not in reads and (is_square(n) or elements(n) > small) and not _is_leaf(match, n)
            if heavy and n in live and (n not in region.free or n in wanted):
                user = next((u for u in n.users if u in live or u not in region.nodes), n)
                place = short_source(source_of(user)) or user.name
                raise Refused("state_escapes", f"{n.name} is used at {place} as well", short_source(source_of(node)))


def _is_leaf(match: Match, node: fx.Node) -> bool:
    """A view of an operand, which may be square by chance."""
    forms, held = match.traced.forms, match.holds.get(node)
    value = forms.values[held] if held is not None else None
    if value is None or len(value.terms) != 1 or len(value.terms[0].factors) != 1:
        return False
    atom = value.terms[0].factors[0].atom
    return forms.atoms[atom].node is not None and forms.atoms[atom].expansion is None


def check_memory(match: Match) -> bool:
    """Whether operands must be copied, as something writes to them after; refuses what an argument's gradient needs."""
    graph = match.region.bound[0].graph
    changed = written(graph)
    held = frozenset[int]().union(*(memory(n) for leaves in match.leaves.values() for n in leaves))
    arguments = [n for n in graph.find_nodes(op="placeholder") if memory(n) & changed]
    if any(memory(n) & held for n in arguments):
        raise Refused("mutates_input", "the program writes to an argument that the kernel reads")
    return bool(held & changed)


def write(match: Match, graph: fx.Graph, env: dict[fx.Node, fx.Node], faked: bool) -> list[fx.Node]:
    """Put kernels in place of the read-outs in a graph in which `env` stands for the nodes of the program.

    What nothing wants any more is removed. Returns the new nodes.
    """
    leaves = set[fx.Node]().union(*(match.leaves[n] for n in match.reads))
    live = live_nodes(match.region, set(match.reads), leaves)
    old = {node: env.get(node, node) for node in match.region.nodes}
    fresh: list[fx.Node] = []
    changed = written(graph) if faked else set()
    for node, read in match.reads.items():
        at, value = env.get(node, node), tensor_of(node)
        with graph.inserting_before(at):
            emitter = Emitter(match.traced, graph, env, changed, faked, value.device)
            with torch._guards.tracing(None), fake_mode(value):
                result = emitter.read_out(read, value.dtype)
        result.meta["example_value"] = value
        fresh += emitter.added
        at.replace_all_uses_with(result)
        env[node] = result
        for n in emitter.added:
            n.meta.setdefault("stack_trace", node.meta.get("stack_trace"))
    for node in reversed(match.region.nodes):
        if node not in live and not old[node].users:
            graph.erase_node(old[node])
    return fresh


def fake_mode(value: Any) -> Any:
    return getattr(value, "fake_mode", None) or contextlib.nullcontext()


def programs_of(match: Match) -> list[fx.GraphModule]:
    """The piece and its replacement, from its inputs to the read-outs."""
    reads = list(match.reads)
    programs = []
    for replaced in (False, True):
        graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in match.region.inputs:
            env[node] = graph.placeholder(node.name)
            env[node].meta = dict(node.meta)
        for node in match.region.nodes:
            env[node] = graph.node_copy(node, env.__getitem__)
        graph.output(tuple(env[node] for node in reads))
        if replaced:
            write(match, graph, env, faked=False)
        programs.append(fx.GraphModule(match.body, graph))
    return programs


def fingerprint(match: Match) -> str:
    """Equal for pieces that are the same program, such as the layers of a model, and so have the same replacement."""
    names = {node: f"n{i}" for i, node in enumerate((*match.region.inputs, *match.region.nodes))}
    lines = [
        f"{names[n]} {_meta(n)} {getattr(n.meta['example_value'], 'requires_grad', '')}" for n in match.region.inputs
    ]
    for node in match.region.nodes:
        args = fx.map_arg((node.args, node.kwargs), lambda n: names[n])
        lines.append(f"{names[node]} {node.op} {node.target} {args} {_meta(node)} {node in match.reads}")
    return "\n".join(lines)


def _meta(node: fx.Node) -> str:
    value = tensor_of(node)
    return "" if value is None else f"{value.dtype} {tuple(value.shape)} {value.device}"


def decay_inputs(match: Match) -> dict[int, str]:
    """Which operands of the piece are log decays as they are, and which are decays."""
    forms, origin = match.traced.forms, match.traced.origin
    terms = [t for read in match.reads.values() for k in read.kernels for t in (*k.gate, *k.level)]
    nodes = [forms.atoms[f.atom].node for t in terms for f in t.factors]
    held = {
        "log": {origin[n] for n in nodes if n in origin},
        "decay": {origin[n] for n in match.traced.proofs if n not in forms.measured},
    }
    return {i: kind for kind, x in held.items() for i, node in enumerate(match.region.inputs) if node in x}


def time_size(match: Match) -> Any:
    read = next(iter(match.reads.values()))
    return match.traced.forms.space.sizes[read.kernels[0].row]


def splice(gm: fx.GraphModule, match: Match) -> list[Rewrite]:
    """Rewrite the graph; what nothing wants any more is removed."""
    graph = gm.graph
    square = {node: is_parallel(match, node) for node in match.reads}
    before = len(graph.nodes)
    fresh = write(match, graph, {}, faked=True)
    gone = before + len(fresh) - len(graph.nodes)
    rewrites = []
    for node, read in match.reads.items():
        family = " + ".join(dict.fromkeys(k.family for k in read.kernels))
        equation = "; ".join(dict.fromkeys(EQUATIONS[k.family] for k in read.kernels))
        pattern = "parallel_attention" if square[node] else "recurrence"
        name = KERNELS[tensor_of(node).device.type]
        place = short_source(source_of(node))
        rewrites.append(Rewrite(pattern, family, equation, name, place, gone, len(fresh)))
    return rewrites


def is_parallel(match: Match, node: fx.Node) -> bool:
    """Whether a read-out goes through a matrix over two time axes."""
    size = time_size(match)

    def over_time(n: fx.Node) -> bool:
        value = tensor_of(n)
        return value is not None and sum(same_size(s, size) for s in value.shape) > 1

    return any(over_time(n) for n in between(match.region, node, match.leaves[node]))


def drop_useless(match: Match) -> None:
    """A sum by a mask is left as it is where nothing of it is over two time axes, or nothing wants it any more."""
    complete = {n for n, read in match.reads.items() if read.complete}
    live = live_nodes(match.region, complete, set[fx.Node]().union(*(match.leaves[n] for n in complete)))
    for node in [n for n in match.reads if n not in complete and not (n in live and is_parallel(match, n))]:
        del match.reads[node], match.leaves[node]


def match_parallel(gm: fx.GraphModule, *, validated: bool = True) -> Found:
    """Rewrite every parallel or prefix-sum form of `gm` that is a recurrence, in place."""
    found, passed = Found(), set[str]()
    for region in find_regions(gm.graph):
        if not sound(region):
            continue
        match = recognise(gm, region, found)
        if match is None:
            continue
        drop_useless(match)
        complete = [n for n, read in match.reads.items() if read.complete]
        try:
            check_escapes(match)
            check_memory(match)
            before, after = programs_of(match)
            program = fingerprint(match)
            if validated and program not in passed:
                start = time.perf_counter()
                check(before, after, region.inputs, decay_inputs(match), time_size(match))
                passed.add(program)
                found.validation_seconds += time.perf_counter() - start
        except Refused as refused:
            pattern = "parallel_attention" if is_parallel(match, complete[0]) else "recurrence"
            found.refusals.append(refused.record(pattern, short_source(source_of(complete[0]))))
            continue
        found.rewrites += splice(gm, match)
    if found.rewrites:
        gm.graph.lint()
        gm.recompile()
    return found

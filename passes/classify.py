"""Classify: say of every state of a step what it is, in the order in which the states can be solved.

A group of states is a delay, a matrix-valued recurrence of a known family, an elementwise scan, a selective scan, or
none of these: then it runs as the loop that it is, and only what needs the state stays in it. Once a group is solved
its read-outs are known for all time, and the next group may use them (ABC, GSA, stacked cells). A state may be read by
what only another state tells (ABC's normaliser): of the groups that could be next, the first that needs no loop is.
"""

import math
from collections.abc import Callable

from torch import fx

from fla_compile.passes.families import Prover, recurrence
from fla_compile.passes.fission import delay_of, ready
from fla_compile.passes.generic import generic
from fla_compile.passes.normal_form import Factor, NoNormalForm
from fla_compile.passes.normalise import focus
from fla_compile.passes.polynomials import less
from fla_compile.passes.read_outs import ReadOut, read_outs, wanted
from fla_compile.passes.records import Refused
from fla_compile.passes.recurrence import Elementwise, Generic, Plan, Recurrence, Selective, Stage, Update, family_of
from fla_compile.passes.step import Step, elements
from fla_compile.passes.updates import update_of, written_at

KernelOf = Callable[[Step, Stage], str]

# A state is handed out at every step where it has at most this many times the elements of what the step reads.
AFFORDABLE = 4


def classify(step: Step, prove: Prover, kernel: KernelOf, looped: Refused | None = None) -> Plan:
    """The plan for a normalised step; raises `Refused` with the reason and the user's line.

    `kernel` names what runs a stage, or raises `Refused` where nothing does. With `looped`, the reason, all states
    run as loops.
    """
    for node in step.gm.graph.nodes:
        if "nondeterministic_seeded" in str(getattr(node.target, "tags", "")):
            raise Refused("random_in_loop", f"{node.target} draws random numbers", step.source(node))
    stages: list[Stage] = []
    kernels: dict[str, None] = {}
    solved = step.idle
    while groups := ready(step, solved):
        for group in groups:
            found, names = solve(step, group, solved, prove, kernel, looped)
            if len(groups) == 1 or not any(isinstance(stage, Generic) for stage in found):
                break
        else:
            group = groups[0]
            found, names = solve(step, group, solved, prove, kernel, looped)
        stages += found
        kernels.update(dict.fromkeys(names))
        solved |= group
        step.known.update(node for stage in found for node in read_nodes(stage))
    return Plan(tuple(stages), tuple(kernels))


def solve(
    step: Step, group: frozenset[int], solved: frozenset[int], prove: Prover, kernel: KernelOf, looped: Refused | None
) -> tuple[list[Stage], list[str]]:
    """What a group is, once the states in `solved` are known, and the names of the kernels that run it."""
    focus(step, group, solved)
    found: list[Stage] = [generic(step, group, looped)] if looped else stages_of(step, group, prove)
    try:
        return found, [kernel(step, stage) for stage in found if family_of(stage)]
    except Refused as why:
        found = [generic(step, group, why)]
        return found, [kernel(step, found[0])]


def read_nodes(stage: Stage) -> tuple[fx.Node, ...]:
    """The nodes that a stage makes known for all steps, apart from the states."""
    if isinstance(stage, Generic):
        return stage.emitted
    return (stage.read,) if isinstance(stage, Recurrence | Selective) and stage.read is not None else ()


def stages_of(step: Step, group: frozenset[int], prove: Prover) -> list[Stage]:
    delay = delay_of(step, group)
    if delay is not None:
        return [delay]
    if len(group) > 1:
        carry = min(group)
        why = Refused("unknown_recurrence", f"{len(group)} states depend on each other", written_at(step, carry))
        return [generic(step, group, why)]
    (carry,) = group
    try:
        update = update_of(step, carry)
    except Refused as why:
        return [generic(step, group, why)]
    try:
        reads: list[ReadOut | None] = [*read_outs(step, update)]
        found = [recurrence(step, update, read, prove) for read in reads or [None]]
        if update.erase is not None or not any(wasteful(step, r) for r in found):
            return list(found)
        return [Elementwise(carry, update.dims, update.decay_coef, update.decay)]
    except (Refused, NoNormalForm) as error:
        why = error if isinstance(error, Refused) else Refused("no_kernel", str(error), written_at(step, carry))
    if update.erase is None:
        selective = selective_scan(step, update)
        if selective is not None:
            return [selective]
        if affordable(step, carry):
            return [Elementwise(carry, update.dims, update.decay_coef, update.decay)]
    return [generic(step, group, why)]


def wasteful(step: Step, r: Recurrence) -> bool:
    """Whether a query would have to be repeated to more than the state holds: what is written is no outer product, or
    the read-out is a projection by one matrix for all. The states themselves are then less to keep."""
    own = {label for f in r.q for label in f.labels}
    query = {*r.batch, *r.heads, *r.keys}
    state = {label for axis in r.state_dims for label in axis}
    extent = [_extent(step, labels) for labels in (own, query, state)]
    return extent[1] > extent[0] and extent[2] <= extent[1]


def _extent(step: Step, labels: set[int]) -> int:
    sizes = [step.space.sizes[label] for label in labels]
    return math.prod(s if isinstance(s, int) else int(s.node.hint or 1) for s in sizes)


def affordable(step: Step, carry: int) -> bool:
    """Whether a state is small enough to be kept for every step, or wanted whole at every step anyway."""
    state = step.carries[carry]
    size = elements(state)
    read = sum(elements(n) for n in step.reads)
    return size <= AFFORDABLE * read or any(elements(n) >= size for n in wanted(step))


def selective_scan(step: Step, update: Update) -> Selective | None:
    """Mamba: a decay exp(dt A) over both axes of the state, where dt varies over time and values only."""
    try:
        reads = read_outs(step, update)
    except (Refused, NoNormalForm):
        return None
    if len(reads) != 1 or reads[0].before or len(reads[0].update.write) != 1 or len(update.decay) != 1:
        return None
    read = reads[0]
    update, keys = read.update, read.keys
    (decay,), (write,) = update.decay, update.write
    exponent = exponent_of(step, decay)
    if exponent is None or update.decay_coef != 1.0:
        return None
    coef, factors = exponent
    B = tuple(f for f in write.factors if set(f.labels) & set(keys))
    u = less(write.factors, B)
    A = tuple(f for f in factors if not step.is_timed(f))
    dt = tuple(f for f in factors if step.is_timed(f))
    key_labels = {label for f in (*B, *read.q) for label in f.labels}
    values = tuple(label for label in update.labels if label not in key_labels)
    batch = tuple(label for label in update.labels if label in key_labels and label not in keys)
    fits = (
        all(set(f.labels) <= {*keys, *values} for f in A)
        and all(set(f.labels) <= {*batch, *values} for f in (*dt, *u))
        and all(set(f.labels) <= {*batch, *keys} for f in (*B, *read.q))
    )
    if not (fits and values and dt and A):
        return None
    return Selective(
        update.carry, batch, keys, values, dt, A, coef, u, B, write.coef, read.q, read.scale,
        update.dims, read.node, read.dims, read.rest,
    )  # fmt: skip


def exponent_of(step: Step, decay: Factor) -> tuple[float, tuple[Factor, ...]] | None:
    """x of a decay exp(x) as one product, over the labels that the decay has in its update."""
    node = step.atoms[decay.atom].node
    target = getattr(node.target, "overloadpacket", None)
    if getattr(target, "__name__", "") != "exp":
        return None
    value = step.values.get(node.args[0])  # type: ignore[arg-type]
    if value is None or len(value.terms) != 1:
        return None
    joined = step.space.renamed(value)
    names: dict[int, int] = {}
    for axis, own in zip(joined.dims, decay.axes, strict=True):
        if len(axis) != len(own):
            return None
        names.update(zip(axis, own, strict=True))
    (term,) = joined.terms
    if term.labels - set(names):
        return None
    renamed = tuple(
        Factor(f.atom, tuple(tuple(names[label] for label in axis) for axis in f.axes)) for f in term.factors
    )
    return term.coef, renamed

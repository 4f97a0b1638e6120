"""Classify: read the family of a recurrence off the normal form of its step.

`S' = a * S + k v^T` with `o = scale * q^T S'`: the update must have one term in the old state, multiplied by factors
that are known to be positive (the decay), and one term without it that is an outer product. Which axes are keys is
decided by the read-out: keys are the axes that it sums over. The family then follows from the axes of the decay alone.
Nothing here depends on names, on the order of axes or operations, or on where a scale was applied.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from fla_compile.passes import normal_form as nf
from fla_compile.passes.log_decay import Log
from fla_compile.passes.normal_form import Factor, Labels, Term, Value
from fla_compile.passes.normalise import Step
from fla_compile.passes.records import Refused

EQUATIONS = {
    "linear_attention": "S' = S + k v^T",
    "retention": "S' = gamma S + k v^T",
    "simple_gla": "S' = a_t S + k v^T",
    "gla": "S' = diag(a_t) S + k v^T",
}


@dataclass(frozen=True)
class Update:
    """S' = decay_coef * (decay factors) * S + write_coef * (write factors), over the labels `dims` of the state."""

    carry: int
    dims: tuple[Labels, ...]
    decay_coef: float
    decay: tuple[Factor, ...]
    write_coef: float
    write: tuple[Factor, ...]
    value: Value

    @property
    def labels(self) -> Labels:
        return tuple(label for axis in self.dims for label in axis)


@dataclass(frozen=True)
class Recurrence:
    """One recognised recurrence with one read-out: everything that a kernel needs to know.

    The labels of the state are split over `batch`, `heads`, `keys` and `values`; `extra` are heads that only the query
    has. `q`, `k`, `v`, `decay` are the factors whose products are the operands. `read` is the node that holds the
    read-out, with axes `read_dims`.
    """

    family: str
    carry: int
    batch: Labels
    heads: Labels
    keys: Labels
    values: Labels
    q: tuple[Factor, ...]
    k: tuple[Factor, ...]
    v: tuple[Factor, ...]
    decay: tuple[tuple[Factor, Log], ...]
    decay_coef: float
    write_coef: float
    scale: float
    state_dims: tuple[Labels, ...]
    read: fx.Node | None
    read_dims: tuple[Labels, ...]

    @property
    def equation(self) -> str:
        return EQUATIONS[self.family]


@dataclass(frozen=True)
class Plan:
    """All recurrences of one step, the outputs computed from their read-outs, and the states that never change."""

    recurrences: tuple[Recurrence, ...]
    post: tuple[fx.Node, ...]
    idle: frozenset[int]

    @property
    def families(self) -> str:
        return " + ".join(dict.fromkeys(r.family for r in self.recurrences)) or "elementwise"


Prover = Callable[[fx.Node], Log | None]


def classify(step: Step, prove: Prover) -> Plan:
    """The plan for a normalised step; raises `Refused` with the reason and the user's line."""
    for node in step.gm.graph.nodes:
        if "nondeterministic_seeded" in str(getattr(node.target, "tags", "")):
            raise Refused("random_in_loop", f"{node.target} draws random numbers", step.source(node))
    idle = {carry for carry in range(len(step.carries)) if unchanged(step, carry)}
    updates = {carry: update_of(step, carry) for carry in range(len(step.carries)) if carry not in idle}
    reads: dict[fx.Node, Recurrence] = {}
    post: list[fx.Node] = []
    for output in dict.fromkeys(step.outputs):
        if output not in step.stateful:
            continue
        node = original(output)  # one read-out that is returned twice is one read-out
        try:
            if not find_reads(step, node, updates, prove, reads) and node not in post:
                post.append(node)
        except Refused as refused:
            escaped = refused.reason == "state_escapes" and node in step.blocked
            refused = step.blocked[node] if escaped else refused
            raise Refused(refused.reason, refused.detail, refused.source or step.source(output)) from None
    recurrences = list(reads.values())
    for update in updates.values():
        if not any(r.carry == update.carry for r in recurrences):
            recurrences.append(unread(step, update, prove))
    return Plan(tuple(recurrences), tuple(post), frozenset(idle))


def unchanged(step: Step, carry: int) -> bool:
    """A state that every step hands on as it is, and that nothing reads."""
    value = step.values.get(step.next_carries[carry])
    if value is None or len(value.terms) != 1 or value.terms[0].coef != 1.0:
        return False
    factors = value.terms[0].factors
    atom = next(i for i, a in enumerate(step.atoms) if a.carry == carry)
    if len(factors) != 1 or factors[0].atom != atom or factors[0].axes != value.dims:
        return False
    for output in step.outputs:
        if output in step.blocked or (output in step.values and atom in step.values[output].atoms):
            return False
    others = [n for n in step.next_carries if n is not step.next_carries[carry]]
    return all(n in step.values and atom not in step.values[n].atoms for n in others)


def original(node: fx.Node) -> fx.Node:
    """Behind the copies that a lifted loop makes of its states and outputs."""
    while node.target in (torch.ops.aten.clone.default, torch.ops.aten.alias.default):
        node = node.args[0]  # type: ignore[assignment]
    return node


def written_at(step: Step, carry: int) -> str:
    """The user's line that computes a new state."""
    node = step.next_carries[carry]
    return step.source(original(node)) or step.source(node)


def update_of(step: Step, carry: int) -> Update:
    node = step.next_carries[carry]
    if node in step.blocked:
        raise step.blocked[node]
    where = written_at(step, carry)
    value = step.values.get(node)
    if value is None or node not in step.stateful:
        raise Refused("not_a_recurrence", "the new state does not depend on the old one", where)
    old = [t for t in value.terms if any(step.is_carry(f.atom) for f in t.factors)]
    new = [t for t in value.terms if t not in old]
    for term in old:
        states = [f for f in term.factors if step.is_carry(f.atom)]
        if len(states) > 1:
            raise Refused("not_affine", "the update multiplies states with each other", where)
        if step.atoms[states[0].atom].carry != carry:
            raise Refused("unknown_recurrence", "the update mixes one state into another", where)
    if len(old) != 1:
        raise Refused("unknown_recurrence", f"the update has {len(old)} terms in the old state, not one", where)
    state = next(f for f in old[0].factors if step.is_carry(f.atom))
    decay = tuple(f for f in old[0].factors if f is not state)
    dims = {label for axis in value.dims for label in axis}
    if state.axes != value.dims or any(set(f.labels) - dims for f in decay):
        raise Refused("unknown_recurrence", "the update moves or contracts axes of the state", where)
    if len(new) != 1:
        raise Refused("not_outer_product", f"the update writes {len(new)} terms, not one outer product", where)
    if new[0].labels - dims:
        raise Refused("not_outer_product", "the update writes a sum of outer products", where)
    return Update(carry, value.dims, old[0].coef, decay, new[0].coef, new[0].factors, value)


def find_reads(
    step: Step, node: fx.Node, updates: dict[int, Update], prove: Prover, reads: dict[fx.Node, Recurrence]
) -> bool:
    """Find the read-outs below `node`; True when `node` is one itself. What lies between runs after the loop.

    The outermost one is taken, with the scales around it, unless it sums over values too (an output projection, a
    quadratic form) and there is one below that does not.
    """
    if node in reads:
        return True
    found, refused = None, None
    try:
        found = read_out(step, node, updates, prove)
    except Refused as error:
        refused = error
    if found is None or not found.values:
        try:
            reads.update(reads_below(step, node, updates, prove, reads))
            return False
        except Refused as error:
            if found is None:
                raise (refused or error) from None
    reads[node] = found
    return True


def reads_below(
    step: Step, node: fx.Node, updates: dict[int, Update], prove: Prover, reads: dict[fx.Node, Recurrence]
) -> dict[fx.Node, Recurrence]:
    states = {*step.carries, *step.next_carries, *(original(n) for n in step.next_carries)}
    below = [n for n in node.all_input_nodes if n in step.stateful]
    if node in step.carries or any(n in states for n in below):
        raise Refused("state_escapes", "the state is used other than through a read-out", step.source(node))
    deeper = dict(reads)
    for n in below:
        find_reads(step, n, updates, prove, deeper)
    return deeper


def read_out(step: Step, node: fx.Node, updates: dict[int, Update], prove: Prover) -> Recurrence | None:
    """`node` as scale * q^T S' of one state, or None; the whole polynomial must match, term by term."""
    value = step.values.get(node)
    if value is None:
        return None
    uses = [(t, f) for t in value.terms for f in t.factors if step.is_carry(f.atom)]
    if len(uses) != 1:
        return None
    term, state = uses[0]
    update = updates.get(step.atoms[state.atom].carry)  # type: ignore[arg-type]
    if update is None:
        return None
    value, term, state, update = match_labels(step, value, term, state, update)
    dims = {label for axis in value.dims for label in axis}
    keys = tuple(label for label in state.labels if label not in dims)
    q = list(term.factors)
    q.remove(state)
    for factor in update.decay:
        if factor not in q:
            break
        q.remove(factor)
    else:
        scale = term.coef / update.decay_coef
        expected = Value(value.dims, tuple(Term(scale * t.coef, t.factors + tuple(q)) for t in update.value.terms))
        if keys and equal(step, expected, value):
            return recurrence(step, update, tuple(q), keys, scale, node, value.dims, prove)
    if keys and len(value.terms) == 1:
        raise Refused("no_kernel", "the state is read before its update", step.source(node))
    return None


def match_labels(
    step: Step, value: Value, term: Term, state: Factor, update: Update
) -> tuple[Value, Term, Factor, Update]:
    """Give the update the labels under which this read-out knows the state, cutting axes where either side did."""
    fresh = step.space.renamed(update.value)
    at = value.terms.index(term)
    place = term.factors.index(state)
    rank = len(value.dims)
    joined = Value(value.dims + state.axes, value.terms)
    for i, axis in enumerate(fresh.dims):
        if axis:
            joined, fresh = step.space.unify(joined, rank + i, fresh, i)
    value = Value(joined.dims[:rank], joined.terms)
    renamed = update_from(step, update.carry, fresh)
    return value, value.terms[at], value.terms[at].factors[place], renamed


def update_from(step: Step, carry: int, value: Value) -> Update:
    old = next(t for t in value.terms if any(step.is_carry(f.atom) for f in t.factors))
    new = next(t for t in value.terms if t is not old)
    decay = tuple(f for f in old.factors if not step.is_carry(f.atom))
    return Update(carry, value.dims, old.coef, decay, new.coef, new.factors, value)


def equal(step: Step, a: Value, b: Value) -> bool:
    """Equal as polynomials; atoms that are contractions are opened where the two sides name them differently."""
    if _same_terms(a, b):
        return True
    for atom in sorted((a.atoms ^ b.atoms), reverse=True):
        definition = step.atoms[atom].expansion
        if definition is None:
            continue
        try:
            a, b = nf.inline(step.space, a, atom, definition), nf.inline(step.space, b, atom, definition)
        except nf.NoNormalForm:
            return False
    return _same_terms(a, b)


def _same_terms(a: Value, b: Value) -> bool:
    left = {nf.canonical(t, a.dims): t.coef for t in nf.collect(a).terms}
    right = {nf.canonical(t, b.dims): t.coef for t in nf.collect(b).terms}
    return left.keys() == right.keys() and all(
        abs(left[key] - right[key]) <= 1e-9 * max(abs(left[key]), abs(right[key])) for key in left
    )


def unread(step: Step, update: Update, prove: Prover) -> Recurrence:
    """A state that is only wanted at the end: any split of the outer product will do."""
    factors = sorted(update.write, key=lambda f: -len(f.labels))
    shared = set(update.labels).intersection(*(set(f.labels) for f in factors)) if factors else set()
    keys = tuple(label for label in (factors[0].labels if factors else ()) if label not in shared)
    if not keys:
        raise Refused("not_outer_product", "the update is elementwise", written_at(step, update.carry))
    q = tuple(f for f in update.write if set(f.labels) & set(keys))
    return recurrence(step, update, q, keys, 1.0, None, (), prove)


def recurrence(
    step: Step,
    update: Update,
    q: tuple[Factor, ...],
    keys: Labels,
    scale: float,
    read: fx.Node | None,
    read_dims: tuple[Labels, ...],
    prove: Prover,
) -> Recurrence:
    where = step.source(read if read is not None else step.next_carries[update.carry])
    k = tuple(f for f in update.write if set(f.labels) & set(keys))
    v = tuple(f for f in update.write if f not in k)
    if any(len(set(f.labels)) != len(f.labels) for f in (*q, *k, *v, *update.decay)):
        raise Refused("unknown_recurrence", "a diagonal of a tensor is taken", where)
    outer = {label for f in (*q, *k) for label in f.labels} - set(keys)
    values = tuple(label for label in update.labels if label not in keys and label not in outer)
    batch = tuple(label for label in update.labels if label in outer)
    extra = tuple(dict.fromkeys(label for f in q for label in f.labels if label not in (*update.labels, *keys)))
    if extra:
        raise Refused("no_kernel", "the query has axes that the state has not", where)
    spread = {label for f in update.decay for label in f.labels}
    if spread & set(values):
        raise Refused("no_kernel", "the decay varies over values", where)
    logs = []
    for factor in update.decay:
        log = prove(step.atoms[factor.atom].node)
        if log is None:
            node = step.atoms[factor.atom].node
            raise Refused(
                "decay_sign_unknown",
                f"nothing shows that the decay {tuple(node.meta['val'].shape)} is positive; write it as exp(g) or "
                "sigmoid(x)",
                written_at(step, update.carry),
            )
        logs.append((factor, log))
    if update.decay_coef <= 0:
        raise Refused("decay_sign_unknown", f"the decay is multiplied by {update.decay_coef}", where)
    timed = any(step.atoms[f.atom].node in step.timed for f in update.decay)
    heads = batch[1:]
    if not timed and spread & set(batch):
        heads = tuple(label for label in batch if label in spread)
    if not update.decay:
        family = "linear_attention" if update.decay_coef == 1.0 else "retention"
    elif spread & set(keys):
        family = "gla"
    elif timed:
        family = "simple_gla"
    else:
        family = "retention"
    return Recurrence(
        family=family,
        carry=update.carry,
        batch=tuple(label for label in batch if label not in heads),
        heads=heads,
        keys=keys,
        values=values,
        q=q,
        k=k,
        v=v,
        decay=tuple(logs),
        decay_coef=update.decay_coef,
        write_coef=update.write_coef,
        scale=scale,
        state_dims=update.dims,
        read=read,
        read_dims=read_dims,
    )

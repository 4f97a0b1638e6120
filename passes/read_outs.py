"""Find where a step reads a state: the nodes that are a query times the state, and nothing else of the state.

    o = scale * q^T S' + rest       after the update, `rest` without the state
    o = scale * q^T S  + rest       before it

Everything between these nodes and the outputs of the step runs after the loop, for all steps at once.
"""

from dataclasses import dataclass

from torch import fx

from fla_compile.passes import normal_form as nf
from fla_compile.passes.normal_form import Factor, Labels, Term, Value
from fla_compile.passes.polynomials import difference, opened, without
from fla_compile.passes.records import Refused
from fla_compile.passes.recurrence import Factors, Update
from fla_compile.passes.step import Step, elements, original
from fla_compile.passes.updates import read_update, state_factor, written_at


@dataclass(frozen=True)
class ReadOut:
    """`node` = scale * q^T (S before or after the update) + rest; `update` has the labels of this read-out."""

    node: fx.Node
    dims: tuple[Labels, ...]
    update: Update
    q: Factors
    keys: Labels
    scale: float
    before: bool
    rest: tuple[Term, ...]

    @property
    def whole(self) -> bool:
        """Whether it sums over the values too: an output projection, a quadratic form."""
        return not values_of(self.update, self.q, self.keys)


def values_of(update: Update, q: Factors, keys: Labels) -> Labels:
    """The labels of the state that neither the query nor the key has."""
    k = [f for t in update.write for f in t.factors if set(f.labels) & set(keys)]
    taken = set(keys).union(*(f.labels for f in (*q, *k)))
    return tuple(label for label in update.labels if label not in taken)


def wanted(step: Step) -> list[fx.Node]:
    """What the rest of the step needs of the states in focus: outputs, and new states that are solved later."""
    later = [n for i, n in enumerate(step.next_carries) if i not in step.core and i not in step.solved]
    nodes = [original(n) for n in (*step.outputs, *later)]
    return [n for n in dict.fromkeys(nodes) if step.stateful(n)]


def read_outs(step: Step, update: Update) -> list[ReadOut]:
    """All read-outs that the rest of the step needs; raises `Refused` where the state is used in another way."""
    reads: dict[fx.Node, ReadOut] = {}
    for node in wanted(step):
        try:
            _find(step, node, update, reads)
        except Refused as refused:
            escaped = refused.reason == "state_escapes" and node in step.blocked and not step.pending(node)
            refused = step.blocked[node] if escaped else refused
            raise Refused(refused.reason, refused.detail, refused.source or step.source(node)) from None
    return list(reads.values())


def _find(step: Step, node: fx.Node, update: Update, reads: dict[fx.Node, ReadOut]) -> None:
    """The outermost read-out is taken, with the scales around it, unless there is a smaller one below."""
    if node in reads:
        return
    found, refused = None, None
    try:
        found = read_out(step, node, update)
    except Refused as error:
        refused = error
    larger = elements(node) > max((elements(n) for n in node.all_input_nodes if step.stateful(n)), default=0)
    if found is None or found.whole or larger:
        try:
            reads.update(_below(step, node, update, reads))
            return
        except Refused as error:
            if found is None:
                raise (refused or error) from None
    assert found is not None
    reads[node] = found


def _below(step: Step, node: fx.Node, update: Update, reads: dict[fx.Node, ReadOut]) -> dict[fx.Node, ReadOut]:
    carry = update.carry
    states = {step.carries[carry], step.next_carries[carry], original(step.next_carries[carry])}
    below = [n for n in node.all_input_nodes if step.stateful(n)]
    if node in states or any(n in states for n in below):
        raise Refused("state_escapes", "the state is used other than through a read-out", step.source(node))
    deeper = dict(reads)
    for n in below:
        _find(step, n, update, deeper)
    return deeper


def read_out(step: Step, node: fx.Node, update: Update) -> ReadOut | None:
    """`node` as a read-out; the whole polynomial must match, term by term."""
    value = step.values.get(node)
    if value is None:
        return None
    found = _best(step, node, value, update)
    if found is None or found.rest:
        try:
            found = min(
                (x for x in (found, _best(step, node, opened(step, value), update)) if x), key=_rank, default=None
            )
        except nf.NoNormalForm:
            pass
    return found


def _best(step: Step, node: fx.Node, value: Value, update: Update) -> ReadOut | None:
    found: list[ReadOut] = []
    for term in value.terms:
        state = state_factor(step, term)
        if state is not None:
            found += _as_read(step, node, value, term, state, update)
    return min(found, key=_rank, default=None)


def _rank(read: ReadOut) -> tuple[int, bool]:
    return len(read.rest), read.before


def _as_read(step: Step, node: fx.Node, value: Value, term: Term, state: Factor, update: Update) -> list[ReadOut]:
    if sum(step.is_carry(f.atom) for f in term.factors) != 1:
        return []
    value, term, state, update = _match_labels(step, value, term, state, update)
    dims = {label for axis in value.dims for label in axis}
    keys = tuple(label for label in state.labels if label not in dims)
    q = without(term.factors, [state])
    if not keys or q is None or state.axes != update.dims:
        return []
    if any(not set(f.labels) <= dims | set(state.labels) for f in q):
        return []  # something else is summed over with the state
    found = []
    own = Factor(state.atom, update.dims)
    candidates: list[tuple[Factors, float, bool]] = [(q, term.coef, True), (q, term.coef, False)]
    undecayed = without(q, update.decay)
    if undecayed is not None and (update.decay or update.decay_coef != 1.0):
        candidates.append((undecayed, term.coef / update.decay_coef, False))
    for query, scale, before in candidates:
        of = (Term(1.0, (own,)),) if before else update.value.terms
        expected = Value(value.dims, tuple(Term(scale * t.coef, t.factors + query) for t in of))
        left = difference(step, value, expected)
        if not any(step.is_carry(f.atom) for t in left.terms for f in t.factors):
            found.append(ReadOut(node, value.dims, update, query, keys, scale, before, left.terms))
    return found


def _match_labels(
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
    renamed = read_update(step, update.carry, fresh, written_at(step, update.carry))
    return value, value.terms[at], value.terms[at].factors[place], renamed

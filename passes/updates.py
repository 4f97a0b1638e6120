"""Read the update of one state off its normal form: S' = decay * S + erase + write.

The decay multiplies each element of the state; the erase term contracts an axis of it (the delta rules); the write is
all that does not depend on the state. Sums of decays (`lerp`) and writes with a common factor are gathered first.
"""

from fla_compile.passes import normal_form as nf
from fla_compile.passes.normal_form import Factor, Term, Value
from fla_compile.passes.normalise import Step, original
from fla_compile.passes.polynomials import less, materialise, opened
from fla_compile.passes.records import Refused
from fla_compile.passes.recurrence import Update


def written_at(step: Step, carry: int) -> str:
    """The user's line that computes a new state."""
    node = step.next_carries[carry]
    return step.source(original(node)) or step.source(node)


def state_factor(step: Step, term: Term) -> Factor | None:
    return next((f for f in term.factors if step.is_carry(f.atom)), None)


def update_of(step: Step, carry: int) -> Update:
    """The update of the state in focus; raises `Refused` where it is not affine or moves the state's axes."""
    node = step.next_carries[carry]
    if node in step.blocked:
        raise step.blocked[node]
    where = written_at(step, carry)
    if node in step.rounded:
        raise Refused("unsupported_op", "the state is rounded to a narrower type at each step", where)
    try:
        update = read_update(step, carry, step.values[node], where)
    except Refused as refused:
        try:  # (I - k k^T) S, with the matrix computed first
            update = read_update(step, carry, opened(step, step.values[node]), where)
        except (Refused, nf.NoNormalForm):
            raise refused from None
    return gathered(step, update)


def read_update(step: Step, carry: int, value: Value, where: str) -> Update:
    old = [t for t in value.terms if any(step.is_carry(f.atom) for f in t.factors)]
    if any(sum(step.is_carry(f.atom) for f in t.factors) > 1 for t in old):
        raise Refused("not_affine", "the update multiplies states with each other", where)
    dims = {label for axis in value.dims for label in axis}
    decays, erases = [], []
    for term in old:
        state = state_factor(step, term)
        assert state is not None
        decays.append(term) if state.axes == value.dims else erases.append(term)
    if any(term.labels - dims for term in decays):
        raise Refused("unknown_recurrence", "the update contracts axes of its decay", where)
    if len(erases) > 1:
        raise Refused("unknown_recurrence", f"the update mixes the state in {len(erases)} ways", where)
    if not decays:
        raise Refused("unknown_recurrence", "the update moves or contracts axes of the state", where)
    new = tuple(t for t in value.terms if t not in old)
    state = state_factor(step, decays[0])
    coef, factors = decays[0].coef, tuple(f for f in decays[0].factors if f is not state)
    if len(decays) > 1:
        coef, factors = 1.0, ()  # `gathered` adds them up
    return Update(carry, value.dims, coef, factors, erases[0] if erases else None, new, value)


def gathered(step: Step, update: Update) -> Update:
    """The update with one decay and, where its write terms share factors, one write term."""
    where = written_at(step, update.carry)
    state = next(iter(t for t in update.value.terms if (s := state_factor(step, t)) and s.axes == update.dims))
    own = state_factor(step, state)
    assert own is not None
    decays = [Term(t.coef, less(t.factors, [own])) for t in update.value.terms if own in t.factors]
    coef, decay, write = update.decay_coef, update.decay, update.write
    try:
        if len(decays) > 1:
            used = {label for t in decays for label in t.labels}
            coef, decay = 1.0, (materialise(step, decays, [label for label in update.labels if label in used]),)
        write = shared_write(step, update)
    except nf.NoNormalForm as error:
        raise Refused("unknown_recurrence", str(error), where) from None
    terms = (Term(coef, (*decay, own)), *((update.erase,) if update.erase else ()), *write)
    return Update(update.carry, update.dims, coef, decay, update.erase, write, Value(update.dims, terms))


def shared_write(step: Step, update: Update) -> tuple[Term, ...]:
    """k v1 + k v2 as k (v1 + v2)."""
    terms = update.write
    if len(terms) < 2:
        return terms
    common = list(terms[0].factors)
    for term in terms[1:]:
        left = list(term.factors)
        common = [f for f in common if f in left and not left.remove(f)]  # type: ignore[func-returns-value]
    if not common:
        return terms
    rest = [Term(t.coef, less(t.factors, common)) for t in terms]
    used = {label for t in rest for label in t.labels}
    if used - set(update.labels) or not any(t.factors for t in rest):
        return terms
    return (Term(1.0, (*common, materialise(step, rest, [label for label in update.labels if label in used]))),)

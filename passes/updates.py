"""Read the update of one state off its normal form: S' = decay * S + erase + write.

The decay multiplies each element of the state; the erase term contracts an axis of it (the delta rules); the write is
all that does not depend on the state. Sums of decays (`lerp`), erases of what such a sum has decayed, and writes with a
common factor are gathered first.
"""

from fla_compile.passes import normal_form as nf
from fla_compile.passes.normal_form import Factor, Labels, Term, Value
from fla_compile.passes.polynomials import difference, less, materialise, opened, renamed, without
from fla_compile.passes.records import Refused
from fla_compile.passes.recurrence import Update
from fla_compile.passes.step import Step, original


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
        return read_update(step, carry, gathered(step, step.values[node], where), where)
    except Refused as refused:
        try:  # a matrix that is made of others
            return read_update(step, carry, gathered(step, opened(step, step.values[node]), where), where)
        except (Refused, nf.NoNormalForm):
            raise refused from None


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
    (decay,) = decays  # `gathered` has added them up
    factors = tuple(f for f in decay.factors if not step.is_carry(f.atom))
    return Update(carry, value.dims, decay.coef, factors, erases[0] if erases else None, new, value)


def gathered(step: Step, value: Value, where: str) -> Value:
    """The update with one decay, and with one erase and one write where their terms share what they must."""
    states = [(t, state_factor(step, t)) for t in value.terms]
    dims = {label for axis in value.dims for label in axis}
    decays = [t for t, state in states if state is not None and state.axes == value.dims]
    erases = [t for t, state in states if state is not None and state.axes != value.dims]
    write = [t for t, state in states if state is None]
    linear = all(sum(step.is_carry(f.atom) for f in t.factors) == 1 for t in (*decays, *erases))
    if not decays or not linear or any(t.labels - dims for t in decays):
        return value
    own = state_factor(step, decays[0])
    assert own is not None
    parts = [Term(t.coef, less(t.factors, [own])) for t in decays]
    labels = [label for axis in value.dims for label in axis]
    try:
        if len(parts) > 1:
            used = {label for t in parts for label in t.labels}
            decay = materialise(step, parts, [label for label in labels if label in used])
            decays = [Term(1.0, (decay, own))]
            if len(erases) > 1:
                erases = _decayed(step, value.dims, own, parts, decay, _aligned(step, erases, own))
        if len(erases) > 1:
            erases = _aligned(step, erases, own)
            erases = shared(step, erases, [*labels, *sorted({x for t in erases for x in t.labels} - dims)])
        return Value(value.dims, (*decays, *erases, *shared(step, write, labels)))
    except nf.NoNormalForm as error:
        raise Refused("unknown_recurrence", str(error), where) from None


def shared(step: Step, terms: list[Term], labels: list[int]) -> list[Term]:
    """k v1 + k v2 as k (v1 + v2)."""
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
    if used - set(labels) or not any(t.factors for t in rest) or any(state_factor(step, t) for t in rest):
        return terms
    return [Term(1.0, (*common, materialise(step, rest, [label for label in labels if label in used])))]


def _aligned(step: Step, erases: list[Term], own: Factor) -> list[Term]:
    """The erases with the same names for the axes of the state that they sum over, where these are the same axes."""
    first = _contracted(step, erases[0], own)
    terms = []
    for term in erases:
        summed = _contracted(step, term, own)
        if first is None or summed is None or summed.keys() != first.keys():
            return erases
        names = {summed[new]: first[new] for new in first}
        others = term.labels - set(names)
        if others & set(names.values()):
            return erases
        terms.append(Term(term.coef, renamed(term.factors, names)))
    return terms


def _contracted(step: Step, erase: Term, own: Factor) -> dict[int, int] | None:
    """The labels of the state that an erase replaces by others: the new one's, and the one that it sums over."""
    state = state_factor(step, erase)
    assert state is not None
    if [len(axis) for axis in state.axes] != [len(axis) for axis in own.axes]:
        return None
    return {new: old for new, old in zip(own.labels, state.labels, strict=True) if new != old}


def _decayed(
    step: Step, dims: tuple[Labels, ...], own: Factor, parts: list[Term], decay: Factor, erases: list[Term]
) -> list[Term]:
    """Erases of a state that has decayed before by a sum of `parts`, or decays with it afterwards, as one erase."""
    moved = _contracted(step, erases[0], own)
    for names in (moved or {}, {}):
        sides = [Term(t.coef, renamed(t.factors, names)) for t in parts]
        for side in sides:
            left = without(erases[0].factors, side.factors)
            if left is None:
                continue
            one = Term(erases[0].coef / side.coef, left)
            expected = tuple(Term(one.coef * t.coef, (*left, *t.factors)) for t in sides)
            if not difference(step, Value(dims, tuple(erases)), Value(dims, expected)).terms:
                return [Term(one.coef, (*left, *renamed([decay], names)))]
    return erases

"""Decide: is a value o_i = sum over j <= i of q_i k_j D_ij v_j, and which recurrence is that?

The value is opened until its masks are in sight. Each of its terms must then have one mask i - j >= 0 (or 1: the state
before its update), where i is an axis of the value and j is summed; other summed axes are keys. What is left over both
i and j must be exponentials, whose logarithms add up to G_i - G_j: the log decay of a step is G_t - G_{t-1}, which is
the summand where G is a cumulative sum, and a number for each head where G is the position. All else is a factor of q,
k, v or o by the axes that it has. Nothing here depends on how the mask, the decay or the products are spelled.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from fla_compile.passes import normal_form as nf
from fla_compile.passes.normal_form import Factor, Labels, NoNormalForm, Term, Value
from fla_compile.passes.parallel_forms import Forms, Terms
from fla_compile.passes.records import Refused

MAX_OPENED = 24
TIME = -1  # stands for i and j alike


@dataclass(frozen=True)
class Operand:
    """A product of factors and of exp(log)."""

    factors: tuple[Factor, ...]
    log: Terms = ()

    @property
    def labels(self) -> set[int]:
        return labels_of(self.factors) | set[int]().union(*(t.labels for t in self.log))


@dataclass(frozen=True)
class Kernel:
    """One recurrence: the labels of its axes, its operands, and the log decay of a step, `gate` + diff(`level`).

    q and `rows` (a factor of o) are over label `row`, k and v over `column`; the decay is over `row`. `before` reads
    the state before its update.
    """

    family: str
    scale: float
    row: int
    column: int
    batch: Labels
    heads: Labels
    keys: Labels
    values: Labels
    q: Operand
    k: Operand
    v: Operand
    rows: Operand
    gate: Terms
    level: Terms
    before: bool


@dataclass(frozen=True)
class ReadOut:
    """A value over `dims` as a sum of recurrences; `keyed` where queries meet keys, else it only sums by a mask."""

    dims: tuple[Labels, ...]
    kernels: tuple[Kernel, ...]
    keyed: bool

    @property
    def complete(self) -> bool:
        """Whether it has keys and values, so is no normaliser."""
        return self.keyed and all(k.v.factors or k.v.log for k in self.kernels)


def labels_of(factors: Iterable[Factor]) -> set[int]:
    return {label for f in factors for label in f.labels}


def read_out(forms: Forms, value: Value, closed: set[int]) -> ReadOut | None:
    """The recurrences of a value; None where it is not of this kind; raises `Refused` where it nearly is."""
    try:
        value = exposed(forms, value, closed)
    except NoNormalForm:
        return None
    dims = {label for axis in value.dims for label in axis}
    sights = [sight(forms, term, dims) for term in value.terms]
    if not any(sights):
        return None
    keyed = any(s is not None and is_keyed(term, s, dims) for s, term in zip(sights, value.terms, strict=True))
    try:
        kernels = []
        for term, pair in zip(value.terms, sights, strict=True):
            if pair is None:
                raise Refused("unknown_recurrence", "a part of the sum runs over later steps too")
            kernels.append(kernel_of(forms, term, pair, value.dims))
    except (Refused, NoNormalForm) as error:
        if not keyed:
            return None
        raise error if isinstance(error, Refused) else Refused("unsupported_op", str(error)) from None
    return ReadOut(value.dims, tuple(kernels), keyed)


def is_deep(forms: Forms, atom: int, closed: set[int]) -> bool:
    """Whether there is a mask somewhere below an atom."""
    expansion = forms.atoms[atom].expansion
    if expansion is None or atom in closed:
        return False
    return forms.masked(expansion) or any(is_deep(forms, a, closed) for a in expansion.atoms)


def exposed(forms: Forms, value: Value, closed: set[int]) -> Value:
    """Open contractions until each term shows its mask, then all that is over both axes of the mask."""
    dims = {label for axis in value.dims for label in axis}
    for _ in range(MAX_OPENED):
        value = oriented(forms, value)
        atom = next((a for t in value.terms for a in [_hidden(forms, t, dims, closed)] if a is not None), None)
        if atom is None:
            return value
        opened = nf.inline(forms.space, value, atom, forms.atoms[atom].expansion)
        if opened.dims != value.dims or len(opened.terms) > nf.MAX_TERMS:
            raise NoNormalForm("a contraction cuts an axis")
        value = opened
    raise NoNormalForm("too many contractions")


def _hidden(forms: Forms, term: Term, dims: set[int], closed: set[int]) -> int | None:
    pair = sight(forms, term, dims)
    for factor in term.factors:
        if forms.atoms[factor.atom].expansion is None or factor.atom in closed:
            continue
        if pair is None and is_deep(forms, factor.atom, closed):
            return factor.atom
        if pair is not None and set(pair[:2]) <= set(factor.labels):
            return factor.atom
    return None


def sight(forms: Forms, term: Term, dims: set[int]) -> tuple[int, int, int] | None:
    """(i, j, d) of the only mask of a term between an axis of the value and a summed one."""
    pairs = [(*f.labels, forms.inds[f.atom]) for f in forms.masks(term)]
    found = [p for p in pairs if p[0] in dims and p[1] not in dims]
    return found[0] if len(found) == 1 and len(pairs) == 1 else None


def oriented(forms: Forms, value: Value) -> Value:
    """Masks between an axis of the value and a summed one, written in this order; one for each pair."""
    dims = {label for axis in value.dims for label in axis}
    todo, done = list(value.terms), list[Term]()
    while todo:
        if len(todo) + len(done) > nf.MAX_TERMS:
            raise NoNormalForm("the value has too many terms")
        term = todo.pop()
        masks: dict[Labels, int] = {}
        others = [f for f in term.factors if f.atom not in forms.inds]
        for n, factor in enumerate(term.factors):
            if factor.atom not in forms.inds:
                continue
            if any(len(axis) != 1 for axis in factor.axes):
                raise NoNormalForm("a mask over merged axes")
            row, column = factor.labels
            d = forms.inds[factor.atom]
            if column in dims and row not in dims:
                rest = term.factors[:n] + term.factors[n + 1 :]
                todo += [Term(term.coef, rest), Term(-term.coef, (*rest, forms.ind(1 - d, column, row)))]
                break
            masks[row, column] = max(d, masks.get((row, column), d))
        else:
            done.append(Term(term.coef, (*(forms.ind(d, *pair) for pair, d in masks.items()), *others)))
    return nf.collect(Value(value.dims, tuple(done)))


def is_keyed(term: Term, pair: tuple[int, int, int], dims: set[int]) -> bool:
    """Whether q_i and k_j are contracted: the mark of attention."""
    i, j, _ = pair
    keys = term.labels - dims - {j}
    mine = [set(f.labels) for f in term.factors]
    return any(x & keys and i in x and j not in x for x in mine) and any(
        x & keys and j in x and i not in x for x in mine
    )


def kernel_of(forms: Forms, term: Term, pair: tuple[int, int, int], dims: tuple[Labels, ...]) -> Kernel:
    i, j, d = pair
    space, order = forms.space, [label for axis in dims for label in axis]
    if not nf.same_size(space.sizes[i], space.sizes[j]):
        raise Refused("unknown_recurrence", "queries and keys differ in length")
    if d not in (0, 1):
        where = "before" if d > 0 else "after"
        raise Refused("unknown_recurrence", f"the mask begins {abs(d)} steps {where} the query")
    keys = tuple(sorted(term.labels - set(order) - {j}))
    factors = [f for f in term.factors if f.atom not in forms.inds]
    if any(len(set(f.labels)) != len(f.labels) for f in factors):
        raise Refused("unknown_recurrence", "a diagonal of a tensor is taken")
    plain = [f for f in factors if f.atom not in forms.logs]
    for f in plain:
        if {i, j} <= set(f.labels):
            raise Refused("unknown_recurrence", "the mask depends on data other than through exp(g_i - g_j)")
    only_values = labels_of(f for f in plain if j in f.labels and not set(f.labels) & set(keys))
    only_values -= {j} | labels_of(f for f in plain if set(f.labels) & set(keys))
    decay = Decay.of(forms, [f for f in factors if f.atom in forms.logs], i, j, only_values)
    plain += decay.unused

    def side(member: int | None, over_keys: bool) -> tuple[Factor, ...]:
        other = {i, j} - {member}
        return tuple(
            f
            for f in plain
            if bool(set(f.labels) & set(keys)) == over_keys
            and (member in f.labels if member == j else not other & set(f.labels))
        )

    logs = {True: decay.rows, False: decay.columns}
    q, k, v, rows = (
        Operand(side(member, over), tuple(t for t in logs[member == i] if bool(t.labels & set(keys)) == over))
        for member, over in ((i, True), (j, True), (j, False), (i, False))
    )
    gate_labels = set[int]().union(*(t.labels for t in (*decay.gate, *decay.level)))
    outer = (q.labels | k.labels | gate_labels) - {i, j} - set(keys)
    values = tuple(x for x in order if x in v.labels and x not in outer)
    batch = tuple(x for x in order if x != i and (x in outer or (x in v.labels and x not in values)))
    timed = bool(decay.level) or i in gate_labels
    heads = batch[1:]
    if gate_labels & set(keys):
        family = "gla"
    elif timed:
        family = "simple_gla"
    elif decay.gate:
        family = "retention"
        heads = tuple(x for x in batch if x in gate_labels)
    else:
        family = "linear_attention"
    batch = tuple(x for x in batch if x not in heads)
    return Kernel(
        family, term.coef, i, j, batch, heads, keys, values, q, k, v, rows, decay.gate, decay.level, before=d == 1
    )


@dataclass(frozen=True)
class Decay:
    """The exponentials of a term: the decay of a step, what is left for the rows and the columns, and the unused."""

    gate: Terms
    level: Terms
    rows: Terms
    columns: Terms
    unused: list[Factor]

    @classmethod
    def of(cls, forms: Forms, factors: list[Factor], i: int, j: int, only_values: set[int]) -> "Decay":
        def matched(used: list[Factor]) -> tuple[dict[tuple, dict[int, Term]], dict[tuple, float]]:
            logs = [t for f in used for t in forms.applied(forms.logs[f.atom], f)]
            found: dict[tuple, dict[int, Term]] = {}
            for t in logs:
                if {i, j} <= t.labels:
                    raise Refused("unknown_recurrence", "the decay is no function of a step")
                at = j if j in t.labels else i
                sides = found.setdefault(_key(t, {i, j}), {})
                sides[at] = Term(t.coef + (sides[at].coef if at in sides else 0.0), t.factors)
            shared = {}
            for key, sides in found.items():
                elementwise = bool(only_values) and only_values <= sides[min(sides)].labels and not paired
                if len(sides) == 2 and sides[i].coef * sides[j].coef < 0 and not elementwise:
                    shared[key] = min(sides[i].coef, -sides[j].coef, key=abs)
            return found, shared

        paired = any({i, j} <= set(f.labels) for f in factors)
        _, shared = matched(factors)
        unused = [
            f
            for f in factors
            if not {i, j} <= set(f.labels)
            and not any(_key(t, {i, j}) in shared for t in forms.applied(forms.logs[f.atom], f))
        ]
        found, shared = matched([f for f in factors if f not in unused])
        gate, level, left = list[Term](), list[Term](), {i: list[Term](), j: list[Term]()}
        for key, sides in found.items():
            step = shared.get(key, 0.0)
            if step:
                grown = _increment(forms, Term(step, sides[i].factors), i)
                if grown is None:
                    level.append(Term(step, sides[i].factors))
                else:
                    gate += grown
            for at, t in sides.items():
                rest = t.coef - (step if at == i else -step)
                if rest:
                    left[at].append(Term(rest, t.factors))
        return cls(tuple(gate), tuple(level), tuple(left[i]), tuple(left[j]), unused)


def _key(term: Term, time: set[int]) -> tuple:
    """Equal for a function of i and the same function of j."""
    return tuple(
        sorted((f.atom, tuple(tuple(TIME if x in time else x for x in axis) for axis in f.axes)) for f in term.factors)
    )


def _increment(forms: Forms, term: Term, i: int) -> Terms | None:
    """G_t - G_{t-1} where G is, but for constant factors, a position or a cumulative sum."""
    over = [f for f in term.factors if i in f.labels]
    if len(over) != 1:
        return None
    rest = tuple(f for f in term.factors if f is not over[0])
    if over[0].atom == forms.pos:
        return (Term(term.coef, rest),)
    if over[0].atom not in forms.gains:
        return None
    axis, step = forms.gains[over[0].atom]
    if over[0].axes[axis] != (i,):
        return None
    try:
        return tuple(Term(term.coef * t.coef, (*rest, *t.factors)) for t in forms.applied(step, over[0]))
    except NoNormalForm:
        return None

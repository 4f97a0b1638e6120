"""Name the family of a matrix-valued recurrence, and split its factors over the operands of a kernel.

Keys are the axes that the read-out sums over; the family then follows from the axes of the decay and from the erase
term alone. Nothing here depends on names, on the order of axes or operations, or on where a scale was applied.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import fx

from fla_compile.passes import normal_form as nf
from fla_compile.passes.log_decay import Log
from fla_compile.passes.normal_form import Factor, Labels, Term
from fla_compile.passes.polynomials import less, renamed, same_factors, without
from fla_compile.passes.read_outs import ReadOut, values_of
from fla_compile.passes.records import Refused
from fla_compile.passes.recurrence import Erase, Factors, Recurrence, Update
from fla_compile.passes.step import Step
from fla_compile.passes.updates import state_factor, written_at

Prover = Callable[[fx.Node], Log | None]


def recurrence(step: Step, update: Update, read: ReadOut | None, prove: Prover) -> Recurrence:
    """The record of one state with one read-out, or with none where only its end is wanted."""
    where = step.source(read.node) if read else written_at(step, update.carry)
    if read is None:
        q, keys, scale, before, rest = *_any_split(step, update), 1.0, False, ()
    else:
        update, q, keys, scale, before, rest = read.update, read.q, read.keys, read.scale, read.before, read.rest
    if len(update.write) != 1:
        raise Refused("not_outer_product", f"the update writes {len(update.write)} terms, not one product", where)
    (write,) = update.write
    if write.labels - set(update.labels):
        raise Refused("not_outer_product", "the update writes a sum of outer products", where)
    if not keys:
        raise Refused("not_outer_product", "the update is elementwise", where)
    k = tuple(f for f in write.factors if set(f.labels) & set(keys))
    v = tuple(f for f in write.factors if f not in k)
    erase = _erase(step, update, keys, written_at(step, update.carry))
    factors = (*q, *k, *v, *update.decay, *((*erase.scale, *erase.left, *erase.right) if erase else ()))
    if any(len(set(f.labels)) != len(f.labels) for f in factors):
        raise Refused("unknown_recurrence", "a diagonal of a tensor is taken", where)
    values = values_of(update, q, keys)
    if erase:
        values = tuple(x for x in values if x not in {y for f in (*erase.left, *erase.right) for y in f.labels})
    over_values = {label for f in update.decay for label in f.labels} & set(values)
    if over_values and set(values) - over_values:
        values = tuple(label for label in values if label not in over_values)  # one more head, as cheap
    batch = tuple(label for label in update.labels if label not in keys and label not in values)
    extra = tuple(dict.fromkeys(x for f in q for x in f.labels if x not in update.labels))
    if any(not set(f.labels) <= {*batch, *values} for f in v) or any(set(f.labels) & set(values) for f in k):
        raise Refused("not_outer_product", "what the update writes is not a key times a value", where)
    logs = tuple((factor, _log(step, factor, prove, update.carry)) for factor in update.decay)
    if update.decay_coef <= 0:
        raise Refused("decay_sign_unknown", f"the decay is multiplied by {update.decay_coef}", where)
    value_decay = tuple((f, log) for f, log in logs if set(f.labels) & set(values))
    decay = tuple((f, log) for f, log in logs if not set(f.labels) & set(values))
    if any(set(f.labels) & set(keys) for f, _ in value_decay):
        raise Refused("no_kernel", "one decay varies over keys and values", where)
    record = Recurrence(
        family=_family(step, decay, value_decay, update.decay_coef, keys),
        carry=update.carry,
        batch=batch,
        heads=(),
        extra=extra,
        keys=keys,
        values=values,
        q=q,
        k=k,
        v=v,
        decay=decay,
        value_decay=value_decay,
        decay_coef=update.decay_coef,
        write_coef=write.coef,
        beta=(),
        beta_coef=1.0,
        erase=erase,
        bonus=(),
        scale=scale,
        state_dims=update.dims,
        read=read.node if read else None,
        read_dims=read.dims if read else (),
        before=before,
        rest=rest,
    )
    record = _delta(step, record, where) if erase else _with_bonus(step, record)
    return replace(record, **_heads(step, record))


def _any_split(step: Step, update: Update) -> tuple[Factors, Labels]:
    """A query and keys for a state that nothing reads: any split of the outer product will do."""
    if update.erase is not None:
        state = state_factor(step, update.erase)
        assert state is not None
        new = dict(zip(state.labels, update.labels, strict=True))
        return (), tuple(new[label] for label in state.labels if new[label] != label)
    if len(update.write) != 1:
        return (), ()
    factors = sorted(update.write[0].factors, key=lambda f: -len(f.labels))
    shared = set(update.labels).intersection(*(set(f.labels) for f in factors)) if factors else set()
    keys = tuple(label for label in (factors[0].labels if factors else ()) if label not in shared)
    return tuple(f for f in factors if set(f.labels) & set(keys)), keys


def _erase(step: Step, update: Update, keys: Labels, where: str) -> Erase | None:
    term = update.erase
    if term is None:
        return None
    state = state_factor(step, term)
    assert state is not None
    if [len(axis) for axis in state.axes] != [len(axis) for axis in update.dims]:
        raise Refused("unknown_recurrence", "the update moves axes of the state", where)
    names = {old: new for old, new in zip(state.labels, update.labels, strict=True) if old != new}
    if set(names.values()) != set(keys) or set(names) & set(update.labels):
        raise Refused("unknown_recurrence", "the update contracts other axes of the state than it is read by", where)
    rest = less(term.factors, [state])
    right = [f for f in rest if set(f.labels) & set(names)]
    left = [f for f in rest if set(f.labels) & set(keys)]
    if any(f in left for f in right):
        raise Refused("unknown_recurrence", "the update multiplies the state by a whole matrix", where)
    scale = tuple(f for f in rest if f not in left and f not in right)
    return Erase(term.coef, scale, tuple(left), renamed(right, names))


def _log(step: Step, factor: Factor, prove: Prover, carry: int) -> Log:
    node = step.atoms[factor.atom].node
    log = prove(node)
    if log is None:
        detail = f"nothing shows that the decay {tuple(node.meta['val'].shape)} is positive; write it as exp(g) or "
        raise Refused("decay_sign_unknown", detail + "sigmoid(x)", written_at(step, carry))
    return log


def _family(step: Step, decay: Sequence, value_decay: Sequence, coef: float, keys: Labels) -> str:
    if value_decay or any(set(f.labels) & set(keys) for f, _ in decay):
        return "gla"
    if any(step.is_timed(f) for f, _ in decay):
        return "simple_gla"
    return "retention" if decay or coef != 1.0 else "linear_attention"


def _heads(step: Step, r: Recurrence) -> dict[str, Labels]:
    """Which labels are heads: all but the first, or where the decay is constant in time, those it varies over."""
    heads = r.batch[1:]
    if r.family == "retention" and r.decay:
        spread = {label for f, _ in r.decay for label in f.labels}
        heads = tuple(label for label in r.batch if label in spread)
    return {"batch": tuple(label for label in r.batch if label not in heads), "heads": (*heads, *r.extra)}


def _with_bonus(step: Step, r: Recurrence) -> Recurrence:
    """RWKV-6: gla read before its update, and `u k v^T` added to what is read."""
    if not r.before or r.family != "gla" or r.value_decay:
        return r
    r = replace(r, family="rwkv6")
    if len(r.rest) != 1 or len(r.keys) != 1 or r.rest[0].coef != r.scale * r.write_coef:
        return r
    (rest,) = r.rest
    plain = nf.canonical(Term(1.0, (*r.q, *r.k, *r.v)), r.read_dims)
    for u in rest.factors:
        others = less(rest.factors, [u])
        summed = {label for f in others for label in f.labels} - {label for axis in r.read_dims for label in axis}
        if step.is_timed(u) or len(summed) != 1 or nf.canonical(Term(1.0, others), r.read_dims) != plain:
            continue
        (bonus,) = renamed([u], {summed.pop(): r.keys[0]})
        if set(bonus.labels) <= {*r.batch[1:], *r.keys}:
            return replace(r, bonus=(bonus,), rest=())
    return r


def _delta(step: Step, r: Recurrence, where: str) -> Recurrence:
    """A rank-one erase beside the decay: which delta rule is it?"""
    erase = r.erase
    assert erase is not None
    if r.extra or any(log.op == "magnitude" for _, log in r.decay):
        raise Refused("no_kernel", "a delta rule with these axes or signs", where)
    if r.value_decay or any(set(f.labels) & set(r.values) for f in erase.scale):
        raise Refused("no_kernel", "a delta rule with a decay or an erase that varies over values", where)
    beta = tuple(f for f in r.v if not set(f.labels) & set(r.values))
    v = tuple(f for f in r.v if f not in beta)
    over_keys = tuple(f for f, _ in r.decay if set(f.labels) & set(r.keys))
    scalars = tuple(f for f, _ in r.decay if f not in over_keys)
    plain = "gated_delta_rule" if r.decay or r.decay_coef != 1.0 else "delta_rule"
    erased = without(erase.scale, scalars)
    if same_factors(erase.left, r.k) and same_factors(erase.right, (*r.k, *over_keys)) and erased is not None:
        split = _rates(erased, beta)
        if split is not None:
            beta, of_key, of_value = split
            # A constant factor of k counts twice in the erase and once in the write: v takes up the difference.
            coef = -erase.coef / r.decay_coef
            return replace(
                r,
                family="kda" if over_keys else plain,
                k=(*of_key, *r.k),
                v=(*of_value, *v),
                beta=beta,
                beta_coef=coef,
                write_coef=r.write_coef / coef,
            )
    return replace(r, family="dplr")


def _rates(erased: Factors, written: Factors) -> tuple[Factors, Factors, Factors] | None:
    """beta, x and y where the scalars of the erase are beta x x and those of the write beta x y: k is scaled by x (its
    norm, say) and v by y."""
    of_key = list(erased)
    of_value = []
    for factor in written:
        of_key.remove(factor) if factor in of_key else of_value.append(factor)
    beta = without(less(written, of_value), of_key)
    return None if beta is None else (beta, tuple(of_key), tuple(of_value))

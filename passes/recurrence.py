"""What a step is made of once it is understood: one record for each group of states, in the order of solving.

Labels are those of the step's `Space`; factors are atoms of the step with the labels of their axes.
"""

from dataclasses import dataclass

from torch import fx

from fla_compile.passes.fission import Delay, Window
from fla_compile.passes.log_decay import Log
from fla_compile.passes.normal_form import Factor, Labels, Term, Value
from fla_compile.passes.records import Refused

EQUATIONS = {
    "linear_attention": "S' = S + k v^T",
    "retention": "S' = gamma S + k v^T",
    "simple_gla": "S' = a_t S + k v^T",
    "gla": "S' = diag(a_t) S + k v^T",
    "rwkv6": "S' = diag(a_t) S + k v^T, o = q (S + u k v^T)",
    "delta_rule": "S' = (I - beta k k^T) S + beta k v^T",
    "gated_delta_rule": "S' = a_t (I - beta k k^T) S + beta k v^T",
    "kda": "S' = (I - beta k k^T) diag(a_t) S + beta k v^T",
    "dplr": "S' = (diag(a_t) + b c^T) S + k v^T",
    "linear_scan": "h' = a_t * h + b_t",
    "selective_scan": "h' = exp(dt A) * h + (dt x) B^T",
    "generic": "S' = f(S, x_t)",
}

Factors = tuple[Factor, ...]


@dataclass(frozen=True)
class Erase:
    """The term `coef * scale * left (right^T S)` of an update: `left` over keys, `right` over the summed keys."""

    coef: float
    scale: Factors
    left: Factors
    right: Factors


@dataclass(frozen=True)
class Update:
    """S' = decay_coef * (decay factors) * S + erase + write, over the labels `dims` of the state.

    `write` holds all terms without the state.
    """

    carry: int
    dims: tuple[Labels, ...]
    decay_coef: float
    decay: Factors
    erase: Term | None
    write: tuple[Term, ...]
    value: Value

    @property
    def labels(self) -> Labels:
        return tuple(label for axis in self.dims for label in axis)


@dataclass(frozen=True)
class Recurrence:
    """One matrix-valued recurrence with one read-out: everything that a kernel needs to know.

    The labels of the state are split over `batch`, `heads`, `keys` and `values`; `extra` are heads that only the query
    has. `q`, `k`, `v`, `beta`, `erase_left`, `erase_right` are the factors whose products are the operands, `decay`
    and `value_decay` those of the gates over keys (or scalars) and values. `read` is the node that holds the read-out,
    with axes `read_dims`; it reads the state before its update if `before`, and adds the stateless terms `rest`.
    """

    family: str
    carry: int
    batch: Labels
    heads: Labels
    extra: Labels
    keys: Labels
    values: Labels
    q: Factors
    k: Factors
    v: Factors
    decay: tuple[tuple[Factor, Log], ...]
    value_decay: tuple[tuple[Factor, Log], ...]
    decay_coef: float
    write_coef: float
    beta: Factors
    beta_coef: float
    erase: Erase | None
    bonus: Factors
    scale: float
    state_dims: tuple[Labels, ...]
    read: fx.Node | None
    read_dims: tuple[Labels, ...]
    before: bool
    rest: tuple[Term, ...]


@dataclass(frozen=True)
class Elementwise:
    """S' = decay_coef * (decay factors) * S + write, element by element; the state itself is wanted at each step."""

    carry: int
    dims: tuple[Labels, ...]
    decay_coef: float
    decay: Factors


@dataclass(frozen=True)
class Selective:
    """S' = exp(dt A) * S + u B^T with a decay over both axes of the state, read out over keys by C."""

    carry: int
    batch: Labels
    keys: Labels
    values: Labels
    dt: Factors
    A: Factors
    coef: float
    u: Factors
    B: Factors
    write_coef: float
    C: Factors
    scale: float
    state_dims: tuple[Labels, ...]
    read: fx.Node
    read_dims: tuple[Labels, ...]
    rest: tuple[Term, ...]


@dataclass(frozen=True)
class Generic:
    """States of no known family: the step as it is, looped. `emitted` are the nodes that the rest needs of it."""

    carries: tuple[int, ...]
    inputs: tuple[fx.Node, ...]
    emitted: tuple[fx.Node, ...]
    why: Refused


Stage = Delay | Window | Recurrence | Elementwise | Selective | Generic


@dataclass(frozen=True)
class Plan:
    """All stages of one step, in the order in which they run, and the names of the kernels that run them."""

    stages: tuple[Stage, ...]
    kernels: tuple[str, ...]

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for stage in self.stages if (name := family_of(stage))))

    @property
    def generic(self) -> tuple[Generic, ...]:
        return tuple(stage for stage in self.stages if isinstance(stage, Generic))


def family_of(stage: Stage) -> str | None:
    """The family's name in reports; None for a delay, which is no recurrence."""
    if isinstance(stage, Recurrence):
        return stage.family
    names = {Elementwise: "linear_scan", Selective: "selective_scan", Generic: "generic"}
    return names.get(type(stage))

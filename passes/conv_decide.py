"""Decide whether a sum of products of windows is a causal depthwise convolution, and of what.

    z_t = sum_o weight_o x_{t+o} + bias + residual_t        o from first - W + 1 to first

The windows are parts of one tensor x along one axis, W of them side by side; weights and bias run over channels only;
and no step is read that comes after x's last. What is in front of x are the steps of a state, or zeros.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from fla_compile.passes.log_decay import op_name
from fla_compile.passes.normal_form import Factor, Labels, Term, Value
from fla_compile.passes.records import Refused
from fla_compile.passes.spellings import call_of, is_cast, tensor_of
from fla_compile.passes.windows import ZERO, Family, Row, Window, Windows, fixed, statically

LARGEST_WIDTH = 8
JOINS = {"cat", "concat", "concatenate"}
TIME = -1  # stands for the axis of steps among labels

# Two taps are a token shift, unless the program says conv1d: Inductor fuses these with what they feed.
FEWEST_TAPS = 3


@dataclass(frozen=True)
class Conv:
    """A convolution at `node`: steps `first` to `first + length` of `x` along `time`.

    `taps` holds the terms of each weight, oldest first, x's factor left out; `rows` the steps before, oldest first.
    `labels` are those of x's axes, `dims` those of the axes of `node`; TIME stands for the axis of steps.
    """

    node: fx.Node
    x: fx.Node
    time: int
    channels: tuple[int, ...]
    labels: tuple[Labels, ...]
    dims: tuple[Labels, ...]
    first: int
    length: Any
    rows: tuple[Row, ...]
    taps: tuple[tuple[Term, ...], ...]
    bias: tuple[Term, ...]
    residual: Factor | None
    interior: frozenset[fx.Node]

    @property
    def width(self) -> int:
        return len(self.taps)

    @property
    def groups(self) -> tuple[Labels, Labels, Labels]:
        """The labels of [B, T, D]."""
        batch = (own for i, own in enumerate(self.labels) if i != self.time and i not in self.channels)
        return tuple(x for own in batch for x in own), (TIME,), tuple(x for i in self.channels for x in self.labels[i])


def decide(w: Windows, node: fx.Node) -> Conv | None:
    """The convolution that ends at a node, None for anything else; raises `Refused` for one that we do not take."""
    value = w.values[node]
    if len(value.terms) < 2:
        return None
    for x, axis in _sources(w, value):
        found = _over(w, node, value, x, axis)
        if found is not None:
            return found
    return None


def _sources(w: Windows, value: Value) -> list[tuple[fx.Node, int]]:
    """Tensors that several windows are of, with their axes; those with steps in front, and long ones, come first."""
    starts: dict[tuple[fx.Node, int], set[Any]] = {}
    rank: dict[tuple[fx.Node, int], tuple[bool, bool]] = {}
    for term in value.terms:
        for f in term.factors:
            what = w.atoms[f.atom]
            if isinstance(what, Window) and what.axis is not None:
                key = what.node, what.axis
                starts.setdefault(key, set()).add(str(what.start))
                bare, short = rank.get(key, (True, True))
                rank[key] = bare and not what.prefix, short and not f.axes[what.axis]
    return sorted(
        (key for key, found in starts.items() if len(found) > 1 or rank[key][0] is False), key=rank.__getitem__
    )


def _over(w: Windows, node: fx.Node, value: Value, x: fx.Node, axis: int) -> Conv | None:
    dims = [label for own in value.dims for label in own]
    taps: dict[int, list[Term]] = {}
    rest: list[Term] = []
    data: list[Factor] = []
    for term in value.terms:
        own = [f for f in term.factors if _is_part(w, f, x, axis)]
        if not own:
            rest.append(term)
            continue
        start = w.window(own[0].atom, axis).start
        if len(own) > 1 or not isinstance(start, int):
            return None
        data.append(own[0])
        if len(term.factors) == 1:
            rest.append(term)  # x itself, not weighted: a residual
            continue
        taps.setdefault(start, []).append(Term(term.coef, tuple(f for f in term.factors if f is not own[0])))
    if not taps or any(f.axes != data[0].axes for f in data):
        return None
    axes, step = data[0].axes, data[0].axes[axis]
    if len(step) > 1 or sorted(label for own in axes for label in own) != sorted(dims):
        return None
    weights = {label for terms in taps.values() for t in terms for f in t.factors for label in f.labels}
    channels = tuple(i for i, own in enumerate(axes) if weights & set(own))
    over = {label for i in channels for label in axes[i]}
    if not weights or not weights <= over or axis in channels:
        return None
    if not all(_lies_inside(w, f) for terms in taps.values() for t in terms for f in t.factors):
        return None
    bias, residual = _split(rest, dims, over)
    if bias is None or not _settled(w, node, value):
        return None
    interior = interior_of(w, node)
    if any(heavy(w, n) and _widens(n) for n in interior | {node}):
        return None  # a sum that is made wider: the convolution is before it
    written = [n for n in interior | {node} if getattr(call_of(n), "name", "") == "conv1d"]
    first, last = max(0, *taps), min(taps)
    if residual is not None and not _lies_inside(w, residual):
        return None
    width = first - last + 1
    if len(taps) < (2 if written else FEWEST_TAPS) or width < 2:
        return None
    windows = [w.window(f.atom, axis) for f in data]
    length, prefix = windows[0].length, max((v.prefix for v in windows), key=len)
    padded = len(prefix) >= width - 1
    inside = statically(first + length, tensor_of(x).shape[axis])
    if not inside:
        if written and padded:
            raise Refused("not_causal", f"steps up to {first} after the one that is computed are read")
        return None
    if any(v.length is not length and v.length != length for v in windows):
        return None
    if width > LARGEST_WIDTH or len(taps) < width:
        if written:
            raise Refused("no_kernel", f"{len(taps)} taps over {width} steps, at most {LARGEST_WIDTH} side by side run")
        return None
    rows = _rows(x, axis, first, width, windows)
    if rows is None:
        return None
    left = fixed(tensor_of(x).shape[axis] - length)
    sizes = [fixed(w.space.sizes[label]) for label in over]
    if not all(isinstance(size, int) for size in (*sizes, left if first or left != 0 else 0)):
        return None
    ordered = tuple(tuple(taps.get(start, ())) for start in range(last, first + 1))
    named = {step[0]: TIME} if step else {}

    def renamed(dims: Sequence[Labels]) -> tuple[Labels, ...]:
        return tuple(tuple(named.get(label, label) for label in own) for own in dims)

    labels = tuple((TIME,) if i == axis else own for i, own in enumerate(axes))
    if residual is not None:
        residual = Factor(residual.atom, renamed(residual.axes))
    return Conv(
        node, x, axis, channels, labels, renamed(value.dims), first, length, rows, ordered, bias, residual,
        frozenset(interior),
    )  # fmt: skip


def _widens(node: fx.Node) -> bool:
    return is_cast(node) and tensor_of(node.args[0]).dtype != tensor_of(node).dtype


def _is_part(w: Windows, f: Factor, x: fx.Node, axis: int) -> bool:
    what = w.atoms[f.atom]
    return isinstance(what, Window) and what.node is x and what.axis in (None, axis)


def _split(rest: Sequence[Term], dims: Sequence[int], over: set[int]) -> tuple[tuple[Term, ...] | None, Factor | None]:
    """The terms of the bias, None if there are others than it and one residual."""
    bias, residual = [], None
    for term in rest:
        labels = term.labels
        if labels and labels <= over:
            bias.append(term)
        elif residual is None and len(term.factors) == 1 and term.coef == 1.0 and labels == set(dims):
            (residual,) = term.factors
        else:
            return None, None
    return tuple(bias), residual


def _lies_inside(w: Windows, f: Factor) -> bool:
    """Whether a window is a part of its tensor, with nothing in front or behind."""
    what = w.atoms[f.atom]
    if not isinstance(what, Window):
        return False
    if what.axis is None:
        return True
    size = tensor_of(what.node).shape[what.axis]
    return statically(0, what.start) and statically(what.start + what.length, size)


def _settled(w: Windows, node: fx.Node, value: Value) -> bool:
    """Whether no family is left in a value, and nothing is summed over."""
    dims = {label for own in value.dims for label in own}
    return all(
        isinstance(w.atoms[f.atom], Window) and set(f.labels) <= dims for term in value.terms for f in term.factors
    )


def leaves_of(w: Windows, value: Value) -> set[fx.Node]:
    """The tensors that a value is made of."""
    found: set[fx.Node] = set()
    for term in value.terms:
        for f in term.factors:
            what = w.atoms[f.atom]
            if isinstance(what, Family):
                found |= {w.atoms[member].node for member in what.members}  # type: ignore[union-attr]
                continue
            found.add(what.node)
            found |= {row.node for row in what.prefix if row.node is not None}
    return found


def interior_of(w: Windows, node: fx.Node) -> set[fx.Node]:
    """The nodes between a value and the tensors that it is made of; constants end there as well."""
    leaves, found, todo = leaves_of(w, w.values[node]), set[fx.Node](), list(node.all_input_nodes)
    while todo:
        here = todo.pop()
        if here in leaves or here in found or here not in w.values:
            continue
        found.add(here)
        constant = not w.values[here].terms
        todo += [n for n in here.all_input_nodes if not (constant and n in w.values and w.values[n].terms)]
    return found


def _rows(x: fx.Node, axis: int, first: int, width: int, windows: Sequence[Window]) -> tuple[Row, ...] | None:
    """The width - 1 steps before step `first` of x, oldest first; all windows must know the same steps in front."""
    longest = max((v.prefix for v in windows), key=len)
    if any(v.prefix[: -v.start] != longest[: -v.start] for v in windows if v.start < 0):
        return None
    order = tuple(range(len(tensor_of(x).shape)))
    rows = []
    for place in range(first - width + 1, first):
        if place >= 0:
            rows.append(Row(x, place, axis, order))
        elif -place <= len(longest):
            rows.append(longest[-place - 1])
        else:
            rows.append(ZERO)
    return tuple(rows)


def heavy(w: Windows, node: fx.Node) -> bool:
    """Whether a node inside a convolution computes anything: more than a part of a tensor."""
    value = w.values[node]
    return len(value.terms) > 1 or any(len(t.factors) > 1 for t in value.terms)


def computed_before(w: Windows, starts: Iterable[fx.Node]) -> set[fx.Node]:
    """What is computed, and then only cut, turned and padded, to be an operand of `starts`.

    What is joined along another axis than time counts as computed: a start that has it has no value of its own.
    """
    found = set[fx.Node]()
    for start in starts:
        if start not in w.values:
            continue
        joined, seen, todo = _is_whole(w, start), set[fx.Node](), list(start.all_input_nodes)
        while todo:
            here = todo.pop()
            if here in seen or here not in w.values:
                continue
            seen.add(here)
            if heavy(w, here) or (joined and op_name(here) in JOINS):
                found.add(here)
            elif not _is_whole(w, here):
                todo += here.all_input_nodes
    return found


def _is_whole(w: Windows, node: fx.Node) -> bool:
    """Whether a node is an atom: nothing is known of what it is made of."""
    return node in leaves_of(w, w.values[node])

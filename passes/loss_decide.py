"""Which linear layers end in a cross entropy, and in which one: from polynomials to the arguments of the kernel.

    a (lse - (1 - e) z_t - (e / V) sum_v z_v + w lse^2) times factors that all four parts share

with a > 0 or < 0 any number, e in [0, 1), w >= 0. Whatever else is a sum of such parts is refused.
"""

from dataclasses import dataclass
from typing import Any

from torch import fx

from fla_compile.passes.loss_values import Atom, Axis, Dims, Form, Label, Root, Target, Value, is_one, settled
from fla_compile.passes.records import Refused
from fla_compile.passes.spellings import Call, call_of, peel, tensor_of

CLOSE = 1e-6  # numbers of a program: 0.1 and 0.9 add up to 1 in fp32 too
NEVER = -(1 << 62)  # no target has this number
CLASSES = 2  # fewer than two classes are no classification


@dataclass(frozen=True)
class Loss:
    """A recognised loss: `factor` and the divisors `over` are applied after the kernel, `weights` and `keeps` in it."""

    value: Value
    target: Target
    ignore_index: int
    smoothing: float
    z_loss: float
    factor: float
    reduction: str  # "none", "sum", "mean"
    over_rows: bool
    weights: tuple[tuple[fx.Node, Dims], ...]
    keeps: tuple[tuple[fx.Node, bool, Dims], ...]
    over: tuple[fx.Node, ...]


def roots_of(graph: fx.Graph) -> dict[fx.Node, Value]:
    """The logits of every linear layer, by the node that computes them."""
    found = {}
    for node in graph.nodes:
        value = linear(node)
        if value is not None:
            found[node] = value
    return found


def linear(node: fx.Node) -> Value | None:
    call, fake = call_of(node), tensor_of(node)
    if call is None or fake is None or not fake.dtype.is_floating_point or fake.ndim < 1:
        return None
    taken = LINEAR[call.name](call) if call.name in LINEAR else None
    if taken is None:
        return None
    x, weight, bias, transposed, first = taken
    have, matrix = tensor_of(x), tensor_of(weight)
    if have is None or matrix is None or matrix.ndim != 2 or have.ndim < 2 or have.dtype != matrix.dtype:
        return None
    V = settled(matrix.shape[1] if transposed else matrix.shape[0])
    if not isinstance(V, int) or V < CLASSES or fake.device != have.device:
        return None
    if bias is not None and (tensor_of(bias) is None or [settled(s) for s in tensor_of(bias).shape] != [V]):
        return None
    rows = tuple(Label(settled(size)) for size in have.shape[:-1])
    root = Root(node, x, weight, bias, transposed, rows, Label(V, whole=True))
    axes: list[Axis] = [() if is_one(label.size) else (label,) for label in rows]
    dims = ((root.classes,), *axes) if first else (*axes, (root.classes,))
    return Value(root, Form(), "class", dims, {})


Taken = tuple[Any, Any, Any, bool, bool] | None  # x, weight, bias, whether weight is [D, V], whether classes come first


def _linear(call: Call) -> Taken:
    return call.get("input"), call.get("weight"), call.get("bias"), False, False


def _transposed(node: Any) -> Any:
    """W where the node is W^T, a matrix; None otherwise."""
    node = peel(node, casts=False)
    call, fake = (call_of(node) if isinstance(node, fx.Node) else None), tensor_of(node)
    if call is None or fake is None or fake.ndim != 2 or call.in_place:
        return None
    swaps = call.name in ("t", "T", "mT") or (
        call.name == "transpose" and {call.get("dim0") % 2, call.get("dim1") % 2} == {0, 1}
    )
    swaps = swaps or (call.name == "permute" and [d % 2 for d in call.get("dims")] == [1, 0])
    return call.get("input") if swaps else None


def _product(left: Any, right: Any, bias: Any = None) -> Taken:
    if tensor_of(left) is None or tensor_of(right) is None or tensor_of(right).ndim != 2:
        return None
    weight = _transposed(right)
    # W x^T is a layer whose classes come first: a matrix W is given, x is computed
    given = left.op in ("placeholder", "get_attr") and tensor_of(left).ndim == 2
    if weight is not None and given and weight.op not in ("placeholder", "get_attr"):
        return (weight, left, None, False, True) if bias is None else None
    return (left, weight, bias, False, False) if weight is not None else (left, right, bias, True, False)


def _addmm(call: Call) -> Taken:
    if call.get("beta", 1) != 1 or call.get("alpha", 1) != 1:
        return None
    return _product(call.get("mat1"), call.get("mat2"), call.get("input"))


def _einsum(call: Call) -> Taken:
    equation, *operands = call.args.values()
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "." in equation or "->" not in equation:
        return None
    inputs, output = equation.replace(" ", "").split("->")
    sides = list(zip(operands, inputs.split(","), strict=True))
    for (x, names), (weight, pair) in (sides, sides[::-1]):
        if len(pair) != 2 or len(names) < 2 or len(set(names)) != len(names):
            continue
        for inner, outer in ((pair[0], pair[1]), (pair[1], pair[0])):
            if names[-1] == inner and outer not in names and output in (names[:-1] + outer, outer + names[:-1]):
                return x, weight, None, pair[0] == inner, output != names[:-1] + outer
    return None


LINEAR = {
    "linear": _linear,
    "matmul": lambda call: _product(call.get("input"), call.get("other")),
    "mm": lambda call: _product(call.get("input"), call.get("other")),
    "addmm": _addmm,
    "einsum": _einsum,
}


def decode(value: Value) -> Loss:
    """The loss that a value is; raises `Refused` where it is none that the kernel has."""
    if value.kind not in ("row", "total"):
        raise Refused("unsupported_loss", "the logits themselves, or their probabilities, are wanted")
    parts: dict[str, float] = {}
    target: Target | None = None
    shared: tuple[Atom, ...] | None = None
    for monomial, coef in value.rows.items():
        own = [atom for atom in monomial if atom[0] in ("lse", "pick", "sum", "max")]
        rest = tuple(atom for atom in monomial if atom not in own)
        kinds = "*".join(atom[0] for atom in own)
        if kinds not in ("lse", "pick", "sum", "lse*lse"):
            raise Refused("unsupported_loss", f"no cross entropy has a term {kinds or 'without logits'}")
        if shared is not None and rest != shared:
            raise Refused("unsupported_loss", "its terms weigh the rows differently")
        if kinds == "pick":
            if target is not None and own[0][1] != target:
                raise Refused("unsupported_loss", "it has two targets a row")
            target = own[0][1]
        shared, parts[kinds] = rest, parts.get(kinds, 0.0) + coef
    factor, V = parts.get("lse", 0.0), value.root.classes.size
    if target is None or not factor or shared is None:
        raise Refused("unsupported_loss", "it is no logsumexp less the target's logit")
    hit, spread = -parts["pick"] / factor, -parts.get("sum", 0.0) * V / factor
    if abs(hit + spread - 1.0) > CLOSE or spread < -CLOSE or hit <= 0.0:
        raise Refused("unsupported_loss", f"the target weighs {hit:.3g} and all classes {spread:.3g}, not 1 together")
    z_loss = parts.get("lse*lse", 0.0) / factor
    return _with_factors(value, target, shared, factor, 0.0 if spread < CLOSE else spread, z_loss)


def _with_factors(
    value: Value, target: Target, shared: tuple[Atom, ...], factor: float, smoothing: float, z_loss: float
) -> Loss:
    by_kind: dict[str, list[Atom]] = {}
    for atom in shared:
        by_kind.setdefault(atom[0], []).append(atom)
    valid, count, rows = (list(dict.fromkeys(by_kind.get(kind, []))) for kind in ("valid", "count", "rows"))
    if len(valid) > 1 or len(by_kind.get("count", [])) > 1 or len(by_kind.get("rows", [])) > 1:
        raise Refused("unsupported_loss", "it is a mean of means")
    if any(atom[1] != target for atom in (*valid, *count)) or (count and not valid) or (count and rows):
        raise Refused("unsupported_loss", "the rows that count are not those of its target")
    weights = tuple((atom[1], atom[2]) for atom in by_kind.get("node", []))
    keeps = tuple((atom[1], atom[2], atom[3]) for atom in by_kind.get("keep", []))
    reduction = "none" if value.kind == "row" else "sum"
    over_rows = bool(rows)
    if count and not keeps:
        reduction = "mean"
    elif count:
        raise Refused("unsupported_loss", "a mean over its targets, of which some are masked again")
    elif rows and not valid and not keeps:
        reduction, over_rows = "mean", False  # all rows count
    ignore_index = valid[0][2] if valid else NEVER
    over = tuple(atom[1] for atom in by_kind.get("over", []))
    return Loss(value, target, ignore_index, smoothing, z_loss, factor, reduction, over_rows, weights, keeps, over)

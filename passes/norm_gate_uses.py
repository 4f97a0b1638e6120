"""Whether a norm and gate may be replaced: who else uses what is inside, and what is written over in place.

A cast of x or the activated gate may well be used elsewhere: it stays beside the kernel. A statistic or a normalised
value may not, as the kernel never forms it, unless the gate itself is computed from it: then the program is no pattern
of ours.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx

from fla_compile.passes.log_decay import op_name
from fla_compile.passes.memory import memory
from fla_compile.passes.norm_gate_emit import Emission
from fla_compile.passes.norm_gate_form import Reading
from fla_compile.passes.norm_gate_search import Search
from fla_compile.passes.parallel_regions import MODES
from fla_compile.passes.places import short_source, source_of
from fla_compile.passes.records import Refused
from fla_compile.passes.row_algebra import Poly
from fla_compile.passes.row_values import Values
from fla_compile.passes.scans import needs_gradient
from fla_compile.passes.spellings import call_of, tensor_of

GRAD_MODES = MODES - {"_enter_autocast", "_exit_autocast"}


@dataclass(frozen=True)
class Match:
    """`root` computes the pattern from the `inputs` through `interior`; `emission` says what is written instead."""

    root: fx.Node
    reading: Reading
    values: Values
    interior: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    emission: Emission


def statistic(value: Poly) -> bool:
    """Whether a value depends on a mean over rows."""
    return any(atom.kind in ("mean", "base") for product, _ in value.terms for atom, _ in product)


def between(search: Search, root: fx.Node, stops: set[fx.Node]) -> tuple[fx.Node, ...]:
    """The nodes from which `root` is computed, itself included, up to `stops` and to what is no tensor; in order."""
    found, todo = {root}, [root]
    while todo:
        node = todo.pop()
        for n in {*search.flow.inputs(node), *node.all_input_nodes}:
            if n not in found and n not in stops and n.op in ("call_function", "call_method"):
                if tensor_of(n) is not None or call_of(n).name in ("var_mean", "std_mean"):
                    found.add(n)
                    todo.append(n)
    return tuple(sorted(found, key=search.flow.order.__getitem__))


def check_uses(search: Search, match: Match) -> bool:
    """Refuse where a value inside is used elsewhere; False where the program is another one for it."""
    flow, members = search.flow, set(match.interior)
    source = short_source(source_of(match.root))
    last = flow.order[match.root]
    if switches_gradients(search, match.interior[0], match.root):
        return False
    for node in match.interior:
        if node is match.root:
            continue
        outside = [user for user, _ in flow.readers(node) if user not in members]
        value = tensor_of(node)
        if outside and (value is None or statistic(match.values.of(node))):
            if depends(search, match.emission.leaves, node):
                return False
            user = next((u for u in outside if source_of(u)), outside[0])
            where = short_source(source_of(user)) or "the program's result"
            raise Refused("intermediate_used", f"{node.name} is used at {where} as well", source)
    own = frozenset[int]().union(*(memory(n) for n in search.graph.find_nodes(op="placeholder")))
    for writer, writes in flow.writers:
        if writer not in members:
            continue
        if writes & own:
            raise Refused("mutates_input", "the pattern writes over an argument", source)
        for user in span(search, flow.order[writer] + 1, len(flow.order)):
            reads = [n for n in user.all_input_nodes if memory(n) & writes and flow.read(user, n) is not match.root]
            if user not in members and reads:
                raise Refused("intermediate_used", f"{reads[0].name} is written over and used after", source)
    for leaf in match.emission.leaves:
        if any(writer not in members for writer, _ in flow.writes_between(leaf, match.root)):
            return False
        later = any(writes & memory(leaf) for writer, writes in flow.writers if flow.order[writer] > last)
        if later and needs_gradient(match.root):
            raise Refused("mutates_input", f"{leaf.name} is written over, and the kernel's gradient needs it", source)
    return True


def switches_gradients(search: Search, first: fx.Node, last: fx.Node) -> bool:
    return any(op_name(n) in GRAD_MODES for n in span(search, search.flow.order[first], search.flow.order[last]))


def span(search: Search, first: int, last: int) -> Iterator[fx.Node]:
    return (node for node, i in search.flow.order.items() if first <= i < last)


def depends(search: Search, nodes: Iterable[fx.Node], on: fx.Node) -> bool:
    """Whether one of `nodes` is computed from `on`."""
    todo, seen, first = list(nodes), set[fx.Node](), search.flow.order[on]
    while todo:
        node = todo.pop()
        if node is on:
            return True
        if node not in seen and search.flow.order[node] > first:
            seen.add(node)
            todo += search.flow.inputs(node)
    return False

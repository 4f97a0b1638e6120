"""Which value a node of Dynamo's graph reads, where operations in place have changed it since it was made.

After `y.mul_(g)` or `y *= g`, reading `y` is reading the product. For elementwise operations in place on a tensor of
the same layout the answer is the node that wrote last; for any other write there is none.
"""

from collections.abc import Iterator

from torch import fx

from fla_compile.passes.memory import _writes, memory
from fla_compile.passes.spellings import call_of, tensor_of


class Flow:
    """`read(user, n)` is the node whose value `user` gets by its argument n; `readers(n)` are the users that do."""

    def __init__(self, graph: fx.Graph):
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        calls = (node for node in graph.nodes if node.op in ("call_function", "call_method"))
        self.writers = [(node, writes) for node in calls if (writes := _writes(node))]
        self._readers: dict[fx.Node, list[tuple[fx.Node, fx.Node]]] = {}
        for user in graph.nodes if self.writers else ():
            for n in user.all_input_nodes:
                made = self.read(user, n)
                if made is not None:
                    self._readers.setdefault(made, []).append((user, n))

    def read(self, user: fx.Node, n: fx.Node) -> fx.Node | None:
        if not self.writers:
            return n
        found: fx.Node | None = n
        for writer, _ in self.writes_between(n, user):
            found = writer if _overwrites(writer, n) else None
        return found

    def readers(self, node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """The users that get this node's value, each with the argument by which it does."""
        return self._readers.get(node, []) if self.writers else [(user, node) for user in node.users]

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """The nodes whose values a node reads; where one is unknown, the node that it names."""
        return [self.read(node, n) or n for n in node.all_input_nodes]

    def writes_between(self, n: fx.Node, user: fx.Node) -> Iterator[tuple[fx.Node, frozenset[int]]]:
        """The operations that write to a node's memory after it was made and before `user` runs."""
        first, last, held = self.order[n], self.order[user], None
        for writer, writes in self.writers:
            if first < self.order[writer] < last:
                held = memory(n) if held is None else held
                if writes & held:
                    yield writer, writes


def _overwrites(writer: fx.Node, n: fx.Node) -> bool:
    """Whether all of `n` is what `writer` computed."""
    call, new, old = call_of(writer), tensor_of(writer), tensor_of(n)
    if call is None or not call.in_place or new is None or old is None or new.dtype != old.dtype:
        return False
    same = new.shape == old.shape and new.stride() == old.stride()
    return same and new.storage_offset() == old.storage_offset() and memory(writer) == memory(n)

"""What everything that writes new nodes into a graph shares."""

from typing import Any

from torch import fx


class Appending:
    """Appends nodes to `graph` at its insertion point and lists them in `added`; `faked` gives them fake values."""

    graph: fx.Graph
    faked: bool
    added: list[fx.Node]

    def call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self._noted(self.graph.call_function(function, args, kwargs))

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        return self._noted(self.graph.call_method(name, args, kwargs))

    def _noted(self, node: fx.Node) -> fx.Node:
        """Give a node its fake value, so that other passes can read it."""
        self.added.append(node)
        if not self.faked:
            return node
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
        if node.op == "call_method":
            node.meta["example_value"] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            node.meta["example_value"] = node.target(*args, **kwargs)  # type: ignore[operator]
        return node

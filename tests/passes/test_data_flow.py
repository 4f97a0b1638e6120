"""Which value is read after operations in place."""

import torch

from fla_compile.passes.data_flow import Flow


def captured(fn, *args):
    graphs = []

    def keep(gm, example_inputs):
        graphs.append(gm.graph)
        return gm.forward

    torch.compile(fn, backend=keep, fullgraph=True)(*args)
    return graphs[0]


def only(graph, name):
    (found,) = (n for n in graph.nodes if getattr(n.target, "__name__", n.target) == name)
    return found


def test_without_writes_every_node_is_what_it_says():
    graph = captured(lambda x: x.exp() + x, torch.randn(3))
    flow, x = Flow(graph), graph.find_nodes(op="placeholder")[0]
    assert flow.read(only(graph, "add"), x) is x
    assert {user for user, _ in flow.readers(x)} == set(x.users)


def test_a_product_in_place_is_what_is_read_after_it():
    def fn(x, y):
        z = x.exp()
        before = z.sin()
        z.mul_(y)
        return before, z.cos()

    graph = captured(fn, torch.randn(3), torch.randn(3))
    flow = Flow(graph)
    exp, sin, mul, cos = (only(graph, name) for name in ("exp", "sin", "mul_", "cos"))
    assert flow.read(sin, exp) is exp and flow.read(mul, exp) is exp
    assert all(flow.read(cos, n) is mul for n in cos.all_input_nodes)
    assert {user for user, _ in flow.readers(mul)} == {cos} and {user for user, _ in flow.readers(exp)} == {sin, mul}


def test_a_write_through_a_view_leaves_no_answer():
    def fn(x, y):
        z = x.exp()
        z[0].mul_(y)
        return z.cos()

    graph = captured(fn, torch.randn(3, 2), torch.randn(2))
    flow = Flow(graph)
    assert flow.read(only(graph, "cos"), only(graph, "exp")) is None

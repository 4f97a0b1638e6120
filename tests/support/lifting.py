"""What the tests of lifting share: twins traced into graphs whose scans plain autograd goes through."""

import torch

from fla_compile.passes.lift_loops import lift_loops


def twin_of(fn):
    lifted = lift_loops(fn)
    assert lifted.twin is not None, lifted
    assert lifted.refusals == ()
    return lifted.twin


def scan_by_steps(combine, init, xs, closed_over):
    """A scan that plain autograd goes through: torch's own takes a second to derive its backward."""
    carry, steps = list(init), []
    for x in zip(*xs, strict=True):
        out = combine(*carry, *x, *closed_over)
        carry = out[: len(init)]
        steps.append(out[len(init) :])
    return [*carry, *(torch.stack(ys) for ys in zip(*steps, strict=True))]


class Graphs:
    """A compiled function with the size, and the number of scans, of each of its graphs."""

    def __init__(self, fn, by_steps=False, **options):
        self.graphs, self.sizes, self.scans, self.by_steps = [], [], [], by_steps
        torch._dynamo.reset()
        self.fn = torch.compile(fn, backend=self, fullgraph=True, **options)

    def __call__(self, gm, example_inputs):
        self.graphs.append(gm)
        self.sizes.append(len(gm.graph.nodes))
        scans = [n for n in gm.graph.nodes if n.op == "call_function" and "scan" in str(n.target)]
        self.scans.append(len(scans))
        if self.by_steps:
            for node in scans:
                node.target = scan_by_steps
            gm.recompile()
        return gm.forward

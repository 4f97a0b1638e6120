"""What the tests of every operator of a decayed outer product beyond one gate over keys ask of it."""

from collections.abc import Callable, Sequence

import torch
from budget import check_budget
from decay_cases import LEAVES, Case, call, make_inputs, make_leaves, results, truth_and_eager
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

Op = Callable[..., tuple[Tensor, Tensor]]
LENGTHS = (1, 63, 64, 65, 200)
STRENGTHS = ("zero", "strong", "very_strong", "resets", "hard_resets", "mixed", "growing")


def check_against_naive(fn: Op, case: Case, dtype: torch.dtype, *, gradients: Sequence[str]) -> None:
    """Outputs and gradients are within budget, and there are those of q, k, v, h0 and of `gradients`."""
    x = make_inputs(case, dtype)
    got = results(fn, case, x, dtype)
    truth, eager = truth_and_eager(case, x, dtype)
    assert set(got) == set(truth) == {"o", "final_state", "dq", "dk", "dv", "dh0", *gradients}
    for name, y in got.items():
        kind = "forward" if name in ("o", "final_state") else "backward"
        check_budget(f"{case} {name}", y, truth[name], eager[name], kind)


def check_compiles_once(fn: Op, family: str, target: str) -> None:
    """One graph, with one operator `target` in it, serves every batch and length."""
    counter = CompileCounterWithBackend("aot_eager")

    def run(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v, g, gv, u, h0 = tensors
        gates = {name: x for name, x in (("g", g), ("gv", gv), ("u", u)) if x is not None}
        # a literal: a float from elsewhere would be an input of the graph, which Dynamo would fix at its second value
        return fn(q, k, v, **gates, scale=0.3, initial_state=h0, output_final_state=True)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    for B, T in ((2, 17), (5, 48), (4, 65)):
        case = Case(family, T, B=B)
        x = make_inputs(case, torch.float32)
        leaves = make_leaves(x, torch.float32)
        out = compiled(*(leaves.get(name) for name in LEAVES))
        got = torch.autograd.grad(out, list(leaves.values()), [x.do, x.dht])
        expected = list(results(fn, case, x, torch.float32).values())[2:]
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1
    targets = [str(node.target) for node in counter.graphs[0].graph.nodes]
    assert sum(target in name for name in targets) == 1


def check_each_output_alone(fn: Op, naive: Op, case: Case) -> None:
    """Gradients from o alone and from the final state alone."""
    x = make_inputs(case, torch.float64)
    for part, grad in enumerate((x.do, x.dht)):
        found = []
        for each in (fn, naive):
            leaves = make_leaves(x, torch.float64)
            out = call(each, case, leaves)[part]
            found.append(torch.autograd.grad(out, list(leaves.values()), grad, allow_unused=True))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)

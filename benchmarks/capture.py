"""How long capture takes, and how large the graph is, as the loop of one naive GLA layer grows longer.

    python benchmarks/capture.py
    python benchmarks/capture.py --backend inductor --lengths 64 256     # what unrolling costs
    python benchmarks/capture.py --layers 24 --lengths 4096 --repeats 1  # a deep model

"capture" is all of compilation before Inductor: Dynamo with the lift, for backend "fla" recognition, validation and
lowering, then AOT. Each length is compiled anew, `--repeats` times in turn; the median counts. Nodes are those of the
graph that Dynamo made, as it counts them.
"""

import argparse
import statistics
import time

import torch
import torch._dynamo
import torch.nn.functional as F
from common import save, table
from torch import Tensor, nn
from torch._dynamo.utils import clear_compilation_metrics, compilation_time_metrics, get_compilation_metrics


class NaiveGLA(nn.Module):
    """One token mixing, its state kept by an ordinary loop; x: [B, T, D]."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.g, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, g = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q, self.k, self.v, self.g))
        g = F.logsigmoid(g) / 16
        S = x.new_zeros(x.shape[0], self.heads, q.shape[-1], v.shape[-1])
        o = torch.zeros_like(v)
        for t in range(x.shape[1]):
            S = S * g[:, t].exp()[..., None] + k[:, t, :, :, None] * v[:, t, :, None, :]
            o[:, t] = (q[:, t, :, :, None] * S).sum(-2)
        return self.out(o.flatten(-2))


class Deep(nn.Module):
    """Residual layers of naive GLA, as a deep model stacks them."""

    def __init__(self, layers: int, dim: int, heads: int):
        super().__init__()
        self.layers = nn.ModuleList(NaiveGLA(dim, heads) for _ in range(layers))
        self.norms = nn.ModuleList(nn.RMSNorm(dim, eps=1e-5) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return x


def compile_once(backend: str, layer: nn.Module, x: Tensor) -> dict[str, float]:
    """Seconds and node counts of compiling `layer` at the shape of `x`, from nothing."""
    torch._dynamo.reset()
    compilation_time_metrics.clear()
    clear_compilation_metrics()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)
    start = time.perf_counter()
    with torch.no_grad():
        compiled(x)
    total = time.perf_counter() - start
    frame, backend_, inductor = (
        sum(compilation_time_metrics.get(key, []))
        for key in ("_compile.compile_inner", "OutputGraph.call_user_compiler", "compile_fx_inner")
    )
    nodes = sum(metrics.graph_node_count or 0 for metrics in get_compilation_metrics())
    return {
        "capture s": frame - inductor,
        "of it Dynamo s": frame - backend_,
        "Inductor s": inductor,
        "first call s": total,
        "nodes": nodes,
    }


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--backend", default="fla", help="any torch.compile backend")
    p.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024, 4096], help="values of T")
    p.add_argument("--repeats", type=int, default=5, help="compilations of each length")
    p.add_argument("--layers", type=int, default=1, help="layers of the model")
    p.add_argument("--dim", type=int, default=64, help="width of the layer")
    p.add_argument("--heads", type=int, default=2, help="heads of the layer")
    args = p.parse_args()

    torch.manual_seed(0)
    layer = NaiveGLA(args.dim, args.heads) if args.layers == 1 else Deep(args.layers, args.dim, args.heads)
    inputs = {T: torch.randn(1, T, args.dim) for T in args.lengths}
    warm = NaiveGLA(args.dim, args.heads)
    compile_once(args.backend, warm, torch.randn(1, min(args.lengths) // 2, args.dim))  # imports and caches, once
    runs: dict[int, list[dict[str, float]]] = {T: [] for T in args.lengths}
    for _ in range(args.repeats):
        for T in args.lengths:
            runs[T].append(compile_once(args.backend, layer, inputs[T]))
    rows = [
        {"T": T, **{key: statistics.median(run[key] for run in runs[T]) for key in runs[T][0]}} for T in args.lengths
    ]
    for row in rows:
        row["capture, to the shortest"] = row["capture s"] / rows[0]["capture s"]
    section = args.backend if args.layers == 1 else f"{args.backend}, {args.layers} layers"
    print(table(rows))
    print("wrote", save("capture", "cpu", section, rows, vars(args)))


if __name__ == "__main__":
    main()

"""A time loop of no known family by `fla_compile::loop`, against the eager loop and `torch.compile`'s unrolled graph.

    python benchmarks/generic_loop.py
    python benchmarks/generic_loop.py --lengths 16 --skip-unrolled

"CPU ms" is the process's CPU time, which a busy machine disturbs least, "ms" the wall-clock time; both are the least of
`--repeats` runs after the first. "first call s" is what the first forward and backward took, compilation included. The
unrolled graph is `torch.compile(eager loop)`, compiled again for every length. Each measurement has a fresh process
and an empty compile cache.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from common import fresh_process, save, table
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fla_compile.kernels.loop_ops import loop, register_step  # type: ignore[import-not-found]

WAYS = ("loop", "eager", "unrolled")


def lstm(h: Tensor, c: Tensor, x: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    """x [B, 4D] is projected already, W [4D, D]."""
    i, f, o, u = (x + h @ W.t()).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * u.tanh()
    h = o.sigmoid() * c.tanh()
    return h, c, h


def tanh_state(S: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> tuple[Tensor, ...]:
    """S' = tanh(a S + k v^T), o = S'^T q; S [B, H, K, V], a [B, H]."""
    S = torch.tanh(S * a[..., None, None] + k[..., :, None] * v[..., None, :])
    return S, (q[..., :, None] * S).sum(-2)


def problem(name: str, T: int, dtype: torch.dtype) -> tuple[Callable[..., tuple[Tensor, ...]], int, int, list[Tensor]]:
    """The step, its numbers of carries and reads, and operands that require gradients."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    if name == "lstm":
        B, D = 16, 256
        operands = [random(B, D), random(B, D), random(T, B, 4 * D), random(4 * D, D, scale=D**-0.5)]
        return lstm, 2, 1, [x.requires_grad_() for x in operands]
    B, H, K, V = 8, 4, 32, 32
    operands = [random(B, H, K, V), *(random(T, B, H, n) for n in (K, K, V)), random(T, B, H).sigmoid()]
    return tanh_state, 1, 4, [x.requires_grad_() for x in operands]


def looped(step: Callable[..., tuple[Tensor, ...]], carries: int, reads: int) -> Callable[..., list[Tensor]]:
    def run(*operands: Tensor) -> list[Tensor]:
        state, outputs = operands[:carries], []
        # Not x[t], whose gradient is as large as x: eager would take time quadratic in T.
        for slices in zip(*(x.unbind(0) for x in operands[carries : carries + reads]), strict=True):
            results = step(*state, *slices, *operands[carries + reads :])
            state = results[:carries]
            outputs.append(results[carries:])
        return [*state, *(torch.stack(ys) for ys in zip(*outputs, strict=True))]

    return run


def registered(step: Callable[..., tuple[Tensor, ...]], carries: int, reads: int, operands: list[Tensor]) -> str:
    slices = [x[0] if carries <= i < carries + reads else x for i, x in enumerate(operands)]
    with FakeTensorMode() as mode:
        graph = make_fx(torch.func.functionalize(step, remove="mutations"))(*(mode.from_tensor(x) for x in slices))
    return register_step(graph, carries, reads)


def way_of(way: str, name: str, T: int, dtype: torch.dtype) -> tuple[Callable[..., list[Tensor]], list[Tensor]]:
    step, carries, reads, operands = problem(name, T, dtype)
    if way == "loop":
        key = registered(step, carries, reads, operands)
        return lambda *xs: loop(key, xs), operands
    run = looped(step, carries, reads)
    return torch.compile(run, dynamic=False) if way == "unrolled" else run, operands


def gradients(results: list[Tensor], operands: list[Tensor]) -> tuple[Tensor, ...]:
    weights = [torch.cos(torch.arange(y.numel()) + i).view(y.shape).to(y.dtype) for i, y in enumerate(results)]
    return torch.autograd.grad(results, operands, weights)


def largest_error(name: str, T: int, dtype: torch.dtype) -> dict[str, float]:
    """Of values and of gradients against the eager loop, relative to the largest entry of each tensor."""
    found: list[tuple[Any, Any]] = []
    for way in ("loop", "eager"):
        run, operands = way_of(way, name, T, dtype)
        results = run(*operands)
        found.append((results, gradients(results, operands)))
    (values, slopes), (true_values, true_slopes) = found

    def worst(got: Any, want: Any) -> float:
        return max(float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in zip(got, want, strict=True))

    return {"values": worst(values, true_values), "gradients": worst(slopes, true_slopes)}


def measure(way: str, name: str, T: int, repeats: int) -> dict[str, float]:
    """Least times of forward and of both in ms, and seconds of the first call."""
    run, operands = way_of(way, name, T, torch.float32)
    weights: list[Tensor] = []
    seen: list[tuple[float, ...]] = []
    for _ in range(repeats + 1):
        clocks = [(time.process_time(), time.perf_counter())]
        results = run(*operands)
        clocks.append((time.process_time(), time.perf_counter()))
        weights = weights or [torch.randn_like(y) for y in results]
        torch.autograd.grad(results, operands, weights)
        clocks.append((time.process_time(), time.perf_counter()))
        seen.append(tuple(clocks[j][i] - clocks[0][i] for j in (1, 2) for i in (0, 1)))
        del results
    forward_cpu, forward, both_cpu, both = (1e3 * min(run[i] for run in seen[1:]) for i in range(4))
    return {
        "forward CPU ms": forward_cpu,
        "forward ms": forward,
        "both CPU ms": both_cpu,
        "both ms": both,
        "first call s": seen[0][3],
    }


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024], help="values of T")
    p.add_argument("--unrolled-to", type=int, default=64, help="the longest T that is also compiled unrolled")
    p.add_argument("--repeats", type=int, default=20, help="runs of each, after the first")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--limit", type=float, default=1200.0, help="seconds for one measurement")
    p.add_argument("--only", nargs=3, metavar=("WAY", "STEP", "T"), help="measure one, print JSON, write nothing")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if args.only:
        way, name, T = args.only
        print(json.dumps(measure(way, name, int(T), args.repeats)))
        return

    rows, errors = [], []
    for name in ("lstm", "tanh_state"):
        for dtype in (torch.float64, torch.float32):
            errors.append({"step": name, "dtype": str(dtype), "T": 64, **largest_error(name, 64, dtype)})
        for T in args.lengths:
            ways = WAYS if args.unrolled_to >= T else WAYS[:2]
            found: dict[str, Any] = {}
            for way in ways:
                with tempfile.TemporaryDirectory() as cache:
                    options = ["--repeats", str(args.repeats), "--threads", str(args.threads)]
                    found[way] = fresh_process(
                        __file__, ["--only", way, name, str(T), *options],
                        limit=args.limit, env={"TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": str(args.threads)},
                    )  # fmt: skip
            for way in ways:
                if found[way] is not None:
                    ratio = found[way]["both CPU ms"] / found["loop"]["both CPU ms"] if found["loop"] else None
                    rows.append({"step": name, "T": T, "way": way, **found[way], "CPU, to loop": ratio})
            save("generic_loop", "cpu", "times", rows, vars(args))
    print(table(errors))
    print(table(rows))
    print("wrote", save("generic_loop", "cpu", "errors", errors, vars(args)))


if __name__ == "__main__":
    main()

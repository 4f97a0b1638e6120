"""One decode step of the decayed outer products, on one CUDA device: our kernel beside flash-linear-attention's.

    python benchmarks/decode.py                 # every op and size, with fla if it is installed
    python benchmarks/decode.py --tiles         # and our kernel at other tiles than the table's
    python benchmarks/decode.py --dry-run       # a small size of the operators on the CPU; nothing is saved

As in a model, every call has a state of its own: as many as take 256 MB and no more fit in cache, up to 512. "graph us"
is a call's share of a CUDA graph of them all, "python us" of the same calls from Python, to the end of the last.
"floor us" is the state [B, H, D, D] in float32, read and written at 3.0 TB/s, an H100's measured copy. "kernel" is
launched directly, in place; "op" is the public function, by whatever it runs ("runs"); "fla" is its fused_recurrent,
which writes another state. Operands bfloat16, gates float32. "error" is relative, to the definition in float64.
"""

import argparse
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from common import save, table
from timing import BYTES_PER_MS, milliseconds, peer
from torch import Tensor

import fla_compile.ops
from fla_compile.kernels.decay_configs import StepConfig
from fla_compile.kernels.decay_step import kernel_name

HEADS = 32
SIZES = tuple(product((1, 8, 64), (64, 128, 256)))  # B, D
CACHED, MOST_STATES = 256e6, 512
PEERS = {
    "linear_attention": ("fla.ops.linear_attn", "fused_recurrent_linear_attn", {"normalize": False}),
    "retention": ("fla.ops.retention", "fused_recurrent_retention", {}),
    "simple_gla": ("fla.ops.simple_gla", "fused_recurrent_simple_gla", {}),
    "gla": ("fla.ops.gla", "fused_recurrent_gla", {}),
    "rwkv6": ("fla.ops.rwkv6", "fused_recurrent_rwkv6", {}),
}
GATES: dict[str, tuple[str, ...]] = {"simple_gla": ("g",), "gla": ("g",), "rwkv6": ("g", "u"), "retention": ("gamma",)}

Call = Callable[[Tensor], Any]


def operands(op: str, B: int, H: int, D: int, device: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    found = {name: torch.randn(B, 1, H, D, device=device, dtype=torch.bfloat16) for name in "qkv"}
    found["k"] = F.normalize(found["k"].float(), dim=-1).bfloat16()
    shape = (B, 1, H) if op == "simple_gla" else (B, 1, H, D)
    gates = {
        "g": F.logsigmoid(torch.randn(shape, device=device)) / 16,
        "u": torch.randn(H, D, device=device),
        "gamma": 1 - torch.exp2(-5 - torch.arange(H, device=device, dtype=torch.float32)),
    }
    return found | {name: gates[name] for name in GATES.get(op, ())}


def by_kernel(op: str, x: dict[str, Tensor], config: StepConfig | None = None) -> Call:
    from fla_compile.kernels import decay_step_triton

    g = x.get("gamma", x.get("g"))
    log, scale = "gamma" not in x, x["q"].shape[-1] ** -0.5

    def call(state: Tensor) -> Tensor:
        return decay_step_triton.step_in_place(
            x["q"], x["k"], x["v"], state, g, None, x.get("u"), log=log, before=op == "rwkv6", scale=scale,
            config=config,
        )  # fmt: skip

    return call


def by_op(op: str, x: dict[str, Tensor], prefix: str = "") -> Call:
    fn = getattr(fla_compile.ops, f"{prefix}{op}_step")
    gates = {name: x[name] for name in GATES.get(op, ())}
    return lambda state: fn(x["q"], x["k"], x["v"], state, **gates)


def by_peer(op: str, x: dict[str, Tensor]) -> Call | None:
    module, name, options = PEERS[op]
    fn = peer(module, name)
    if fn is None:
        return None
    gates = [x[name] for name in GATES.get(op, ()) if name != "gamma"]
    return lambda state: fn(x["q"], x["k"], x["v"], *gates, initial_state=state, output_final_state=True, **options)


def measure(call: Call, states: list[Tensor]) -> dict[str, Any]:
    """Microseconds of a call, from Python and in a graph; or what it raised."""
    device = states[0].device.type

    def every() -> None:
        for state in states:
            call(state)

    try:
        if device == "cpu":
            return {"python us": 1e3 * milliseconds(every, device) / len(states)}
        every()
        torch.cuda.synchronize()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            every()
            torch.cuda.synchronize()
            times.append(1e6 * (time.perf_counter() - start) / len(states))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            every()
        return {
            "graph us": 1e3 * milliseconds(graph.replay, device) / len(states),
            "python us": sorted(times)[len(times) // 2],
        }
    except Exception as error:  # a peer's refusal is a result
        return {"refused": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]}


def error(op: str, x: dict[str, Tensor], call: Call, state: Tensor) -> float:
    """Relative, the larger of the output's and the state's."""
    own, wide = state.clone(), state.double()
    got = call(own), own
    want = by_op(op, {name: y.double() for name, y in x.items()}, "naive_")(wide), wide
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True))


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--ops", nargs="+", choices=list(PEERS), default=list(PEERS), help="which ops")
    p.add_argument("--no-peer", action="store_true", help="ours alone")
    p.add_argument("--tiles", action="store_true", help="gla at other tiles too")
    p.add_argument("--dry-run", action="store_true", help="a small size of the operators on the CPU, nothing saved")
    args = p.parse_args()
    if not torch.cuda.is_available() and not args.dry_run:
        p.error("a CUDA device is needed, and torch sees none")
    device, H = ("cpu", 2) if args.dry_run else ("cuda", HEADS)

    rows: list[dict[str, Any]] = []
    for op, (B, D) in product(args.ops, [(2, 16)] if args.dry_run else SIZES):
        x = operands(op, B, H, D, device)
        nbytes = 4 * B * H * D * D
        count = min(MOST_STATES, -(-int(CACHED) // nbytes)) if device == "cuda" else 2
        states = [torch.randn(B, H, D, D, device=device) for _ in range(count)]
        calls: dict[str, Call | None] = {"op": by_op(op, x)}
        if device == "cuda":
            calls["kernel"] = by_kernel(op, x)
            if args.tiles and op == "gla":
                tiles = [StepConfig(*tile) for tile in product((8, 16, 32, 64), (1, 2, 4, 8))]
                calls.update({f"{t.block_v} values, {t.num_warps} warps": by_kernel(op, x, t) for t in tiles})
        if not (args.no_peer or args.dry_run):
            calls["fla"] = by_peer(op, x)
        for name, call in calls.items():
            if call is None:
                continue
            row: dict[str, Any] = {"op": op, "B": B, "D": D, "by": name}
            row["runs"] = kernel_name(torch.device(device), torch.bfloat16, D, D) if name == "op" else None
            row["floor us"] = 2e3 * nbytes / BYTES_PER_MS
            with torch.no_grad():
                row |= measure(call, states)
                if "graph us" in row:
                    row["to floor"] = row["graph us"] / row["floor us"]
                if name != "fla" and B * D <= 256 and "refused" not in row:
                    row["error"] = error(op, x, call, torch.randn_like(states[0]))
            rows.append(row)
            print(row, flush=True)
            if not args.dry_run:
                save("decode", "cuda", "one step, other tiles" if args.tiles else "one step", rows, vars(args))
        del states
    print(table(rows))


if __name__ == "__main__":
    main()

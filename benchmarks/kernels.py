"""Each decayed op on one device beside flash-linear-attention's and beside softmax attention.

    python benchmarks/kernels.py                                    # one shape
    python benchmarks/kernels.py --grids time long sizes --who ours softmax
    python benchmarks/kernels.py --grids sizes --who ours fla --ops gla --limit 500 --resume
    python benchmarks/kernels.py --plot                             # from the file, nothing is measured

Grids: `quick`, one shape; `time`, RetNet's published setting (B=8, H=32, D=128) from 128 to 16384 steps; `long`, one
sequence of up to 131072; `sizes`, few to many heads of 64 to 256 elements and 256 to 65536 steps, as far as one tensor
holds 2^30 elements; `tiny`, for a CPU. Operands are bfloat16 (float32 on a CPU), gates float32.

"ms" are medians of `triton.testing.do_bench`, launches from Python included; "graph ms" is the forward in a CUDA graph,
kernels alone, "kernels ms" what forward and backward take on the GPU without the launches it may wait for. "floor" is
the bytes that must move once (inputs read, outputs written; backward reads the inputs and the output's gradient and
writes the inputs' gradients) at 3.0 TB/s, an H100's measured copy. "over inputs" is the most memory that forward and
backward take beside the operands and their gradients. "first s" compiles; fla's autotunes too.

The file is written after each measurement. --resume keeps what it holds of the same device, versions and commit.
"""

import argparse
import json
import math
import subprocess
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import ROOT, environment, save, skip_autotuning, table
from decayed import FLA, Shape, decayed, operands
from timing import floors, kernel_milliseconds, milliseconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

GRIDS: dict[str, list[Shape]] = {
    "quick": [(8, 2048, 32, 128)],
    "time": [(8, T, 32, 128) for T in (128, 256, 512, 1024, 2048, 4096, 8192, 16384)],
    "long": [(1, T, 32, 128) for T in (2048, 8192, 32768, 131072)],
    "sizes": [
        (B, T, H, D)
        for D in (64, 128, 256)
        for B, H in ((1, 4), (2, 16), (8, 32))
        for T in (256, 2048, 16384, 65536)
        if B * T * H * D <= 1 << 30
    ],
    "tiny": [(1, T, 2, 16) for T in (64, 128, 256)],
}
SOFTMAX = {
    "FlashAttention-2": [SDPBackend.FLASH_ATTENTION],
    "cuDNN": [SDPBackend.CUDNN_ATTENTION],
    "SDPA": [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION],  # what a CPU has
}
WHO = ("ours", "fla", "softmax")
SECTION = "decayed ops beside peers"


def softmax(backends: list[SDPBackend]) -> Callable[..., tuple[Tensor]]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        with sdpa_kernel(backends):
            o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return (o.transpose(1, 2),)

    return run


def measure(f: Callable, inputs: Sequence[Tensor], device: str) -> dict[str, Any]:
    """First-call seconds, median milliseconds and memory, or the message of what `f` raised."""
    results: dict[str, Any] = {}
    cuda = device == "cuda"
    synchronize = torch.cuda.synchronize if cuda else lambda: None

    def both() -> None:
        torch.autograd.grad(f(*inputs)[0], inputs, do)

    def first(run: Callable[[], Any]) -> float:
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        return time.perf_counter() - start

    try:
        results["fwd first s"] = first(lambda: f(*inputs))
        do = torch.randn_like(inputs[2])
        with torch.no_grad():
            results["fwd ms"] = milliseconds(lambda: f(*inputs), device)
        results["fwd+bwd first s"] = first(both)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated() + sum(x.numel() * x.element_size() for x in inputs)
            both()
            results["over inputs GiB"] = (torch.cuda.max_memory_allocated() - held) / 2**30
        results["fwd+bwd ms"] = milliseconds(both, device)
        if cuda:
            from triton.testing import do_bench_cudagraph

            results["kernels ms"] = kernel_milliseconds(both)
            with torch.no_grad():
                results["fwd graph ms"] = float(do_bench_cudagraph(lambda: f(*inputs), return_mode="median"))
    except Exception as error:  # a peer's refusal is a result
        results["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
    return results


def cases(args: argparse.Namespace) -> list[tuple[str, str, Shape]]:
    """Who, op and shape; all of ours first, fla's by op, as it tunes an op for all lengths at once."""
    shapes = list(dict.fromkeys(shape for grid in args.grids for shape in GRIDS[grid]))
    found: list[tuple[str, str, Shape]] = []
    if "ours" in args.who:
        found += [("ours", op, shape) for shape in shapes for op in args.ops]
    if "softmax" in args.who:
        names = ["SDPA"] if args.device == "cpu" else ["FlashAttention-2", "cuDNN"]
        found += [(name, "softmax attention", shape) for shape in shapes for name in names]
    if "fla" in args.who:
        found += [("fla", op, shape) for op in args.ops for shape in shapes]
    return found


def function(who: str, op: str) -> Callable | None:
    if who in SOFTMAX:
        return softmax(SOFTMAX[who])
    return decayed(who, op)


def beside(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each op and shape: ours, how much faster it is than fla, how far from the floor."""
    by = {(row["who"], row["op"], row["shape"]): row for row in rows}
    found = []
    for (who, op, shape), row in by.items():
        if who == "fla" and ("ours", op, shape) in by:
            continue
        line = {"who": who, "op": op, "B,T,H,D": shape}
        theirs = by.get(("fla", op, shape), {}) if who == "ours" else {}
        for part in ("fwd", "fwd+bwd"):
            line[part] = row.get(f"{part} ms")
            if who == "ours" and line[part] is not None:
                line[f"{part} / floor"] = line[part] / row[f"floor {part}"]
                if f"{part} ms" in theirs:
                    line[f"{part}: fla / ours"] = theirs[f"{part} ms"] / line[part]
        line |= {"kernels": row.get("kernels ms"), "GiB": row.get("over inputs GiB")}
        if not (theirs if who == "ours" else row).get("autotuned", True):
            line["note"] = "fla not tuned"
        line["error"] = row.get("error") or (f"fla: {theirs['error']}" if "error" in theirs else None)
        found.append(line)
    return found


def crossing(linear: dict[int, float], quadratic: dict[int, float]) -> float | None:
    """The number of steps from which `linear` is faster, between measured ones on a logarithmic scale."""
    ratios = [(T, linear[T] / quadratic[T]) for T in sorted(set(linear) & set(quadratic))]
    for (T, ratio), (T2, ratio2) in pairwise(ratios):
        if ratio >= 1 > ratio2:
            return T * (T2 / T) ** (math.log(ratio) / math.log(ratio / ratio2))
    return None


def plot(rows: Sequence[dict[str, Any]], path: Path, device: str) -> None:
    """Time against steps at the setting with the most lengths; where an op meets softmax attention is marked.

    What fla takes without tuning is left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings: dict[tuple[str, ...], dict[tuple[str, str], dict[int, float]]] = {}
    for row in rows:
        B, T, H, D = row["shape"].split(",")
        if "fwd+bwd ms" in row and row.get("autotuned", True):
            settings.setdefault((B, H, D), {}).setdefault((row["who"], row["op"]), {})[int(T)] = row["fwd+bwd ms"]
    if not settings:
        return
    setting = max(settings, key=lambda s: sum(map(len, settings[s].values())))
    lines = settings[setting]
    quadratic = next((line for (who, _), line in reversed(lines.items()) if who in SOFTMAX), {})
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for (who, op), line in lines.items():
        steps = sorted(line)
        style = {"ours": "-", "fla": ":"}.get(who, "--")
        axes.loglog(steps, [line[T] for T in steps], style, marker=".", label=f"{op}, {who}", base=2)
        met = crossing(line, quadratic) if who == "ours" else None
        if met is not None:
            axes.axvline(met, color="grey", linewidth=0.5)
            axes.annotate(f"{op} {met:,.0f}", (met, axes.get_ylim()[0]), rotation=90, fontsize=6, va="bottom")
    axes.set_xlabel("steps")
    axes.set_ylabel("forward and backward, ms")
    axes.set_title("B={}, H={}, D={}, ".format(*setting) + device, fontsize=9)
    axes.legend(fontsize=6)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def commit() -> str:
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def kept(path: Path, device: str, of: str) -> list[dict[str, Any]]:
    """The rows of the file that were measured on this device with these versions."""
    if not path.exists():
        return []
    section = json.loads(path.read_text()).get(SECTION)
    now = environment(device)
    same = section and all(section["environment"][key] == now[key] for key in ("device", "versions"))
    return [row for row in section["rows"] if row["commit"] == of or row["who"] != "ours"] if same else []


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--grids", nargs="+", choices=list(GRIDS), default=["quick"], help="which shapes")
    p.add_argument("--who", nargs="+", choices=WHO, default=list(WHO), help="whose")
    p.add_argument("--ops", nargs="+", choices=list(FLA), default=list(FLA), help="which ops")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where")
    p.add_argument("--limit", type=float, default=float("inf"), help="seconds after which nothing more is begun")
    p.add_argument("--resume", action="store_true", help="keep what the file holds")
    p.add_argument("--no-autotune", action="store_true", help="fla's kernels in their first configuration that runs")
    p.add_argument("--plot", action="store_true", help="only draw what the file holds")
    p.add_argument("--results", default="kernels", help="the file's name")
    args = p.parse_args(arguments)
    path = ROOT / "benchmarks" / "results" / f"{args.results}.json"
    if args.plot:
        section = json.loads(path.read_text())[SECTION]
        plot(section["rows"], path.with_suffix(".svg"), section["environment"]["device"])
        print(table(beside(section["rows"])))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("a CUDA device is needed, and torch sees none")

    if args.no_autotune:
        skip_autotuning()
    of, start = commit(), time.perf_counter()
    rows = kept(path, args.device, of) if args.resume else []
    done = {(row["who"], row["op"], row["shape"]) for row in rows}
    for who, op, shape in cases(args):
        key = who, op, ",".join(map(str, shape))
        if key in done:
            continue
        if time.perf_counter() - start > args.limit:
            print(f"{args.limit:.0f} s are over: {key} and what follows are left for --resume")
            break
        f = function(who, op)
        if f is None:
            print(f"{who} has no {op} here")
            continue
        inputs = operands(op, shape, args.device)
        row = dict(zip(("who", "op", "shape"), key, strict=True), commit=of, **floors(inputs, inputs[2]))
        if who == "fla":
            row["autotuned"] = not args.no_autotune
        rows.append(row | measure(f, inputs, args.device))
        print(rows[-1], flush=True)
        save(args.results, args.device, SECTION, rows, vars(args))
        del inputs
    plot(rows, path.with_suffix(".svg"), environment(args.device)["device"])
    print(table(beside(rows)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

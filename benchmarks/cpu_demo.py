"""The demo's model (examples/train_bytes.py) on the CPU: eager, plain `torch.compile` and backend "fla".

    python benchmarks/cpu_demo.py layer     # one token mixing, forward and backward
    python benchmarks/cpu_demo.py step      # a whole training step; plain torch.compile gets --limit seconds
    python benchmarks/cpu_demo.py loss      # validation loss after --steps steps, same seed
    python benchmarks/cpu_demo.py memory    # peak memory of a training step
    python benchmarks/cpu_demo.py head      # a last layer of 32,000 classes and its loss, with and without logits
    python benchmarks/cpu_demo.py logits    # a loss over logits that exist, by torch and by gather
    python benchmarks/cpu_demo.py first     # the first call, cold and warm, and where the time goes
    python benchmarks/cpu_demo.py all

Each measurement has a process of its own, one at a time. Leave the machine idle meanwhile.
"""

import argparse
import ctypes
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import ROOT, fresh_process, median_seconds, save, table
from torch import Tensor

from fla_compile.ops import cross_entropy

sys.path.insert(0, str(ROOT / "examples"))
import train_bytes as demo


def written_in_place(q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """The demo's recurrence with `o[:, t] = y`, whose eager backward copies all of `o` at every step."""
    o = torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * g[:, t].exp()[..., None] + k[:, t, :, :, None] * v[:, t, :, None, :]
        o[:, t] = (q[:, t, :, :, None] * S).sum(-2)
    return o, S


LOGITS = "fla, with logits"  # the loss left as it is written
OPERATOR = "eager, fla_compile.ops"
LOOPS = {"append + stack": demo.gated_linear_attention, "o[:, t] = y": written_in_place}


def compiled(f: Callable, backend: str) -> Callable:
    if backend == LOGITS:
        options: Any = {"disable": ("linear_cross_entropy",)}
        return torch.compile(f, backend="fla", options=options)
    return f if backend == "eager" else torch.compile(f, backend=backend)


def demo_args(job: dict[str, Any]) -> argparse.Namespace:
    given = [
        f"--{name}={job[key]}" for name, key in (("batch", "B"), ("seq-len", "T"), ("steps", "steps")) if key in job
    ]
    return demo.parse_args([*given, "--quiet", "--backend", job["backend"]])


def measure_layer(job: dict[str, Any]) -> float:
    """Median seconds of forward and backward: the recurrence alone, or with the projections around it."""
    B, T, H, K = job["B"], job["T"], 4, 64
    torch.manual_seed(0)
    S = torch.zeros(B, H, K, K)
    if job["part"] == "whole":
        layer, x = demo.TokenMixing(H * K, H), torch.randn(B, T, H * K)
        inputs, leaves = [x, S], list(layer.parameters())
        f = compiled(lambda *inputs: layer(*inputs)[0], job["backend"])
    else:
        q, k, v, g = (torch.randn(B, T, H, K) for _ in range(4))
        leaves = [x.requires_grad_() for x in (q * K**-0.5, k * K**-0.5, v, F.logsigmoid(g) / 16)]
        inputs, loop = [*leaves, S], LOOPS[job["loop"]]
        f = compiled(lambda *inputs: loop(*inputs)[0], job["backend"])
    do = torch.randn_like(f(*inputs))
    return median_seconds(lambda: torch.autograd.grad(f(*inputs), leaves, do), most=job["repeats"])


def make_step(job: dict[str, Any]) -> Callable[[], float]:
    """The demo's training step on one fixed batch, its compilation still to come."""
    args = demo_args(job)
    torch.manual_seed(args.seed)
    model, step = demo.ByteLM(), compiled(demo.model_loss, job["backend"])
    optimiser = demo.make_optimiser(model, 1e-4)
    tokens = torch.randint(256, (args.batch, args.seq_len + 1))

    def run() -> float:
        loss = demo.optimise(step, model, optimiser, tokens)
        optimiser.zero_grad(set_to_none=True)
        return loss

    return run


def measure_step(job: dict[str, Any]) -> float:
    return median_seconds(make_step(job), most=job["repeats"], limit=60)


def measure_loss(job: dict[str, Any]) -> list[tuple[int, float]]:
    args = demo_args(job)
    torch.manual_seed(args.seed)
    model = demo.ByteLM()
    log = demo.train(compiled(demo.model_loss, job["backend"]), model, demo.standard_library(), args)
    return log["validation"]


def memory_status(field: str) -> float:
    """MiB of `field` (VmRSS, VmHWM) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def measure_memory(job: dict[str, Any]) -> dict[str, float]:
    """MiB that a training step needs at its peak above what is held between steps.

    A first step compiles and allocates the optimiser's state; then freed memory goes back to the system (else what the
    first step left in malloc's arenas would hide what the second needs) and the kernel's high-water mark is reset.
    """
    step = make_step(job)
    step()
    peak, before = peak_memory(step)
    return {"peak MiB": peak, "held between steps MiB": before}


def peak_memory(step: Callable[[], Any]) -> tuple[float, float]:
    """MiB that a call needs at its peak above what is held before it, and that."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = memory_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step()
    return memory_status("VmHWM") - before, before


def measure_head(job: dict[str, Any]) -> dict[str, float]:
    """A last layer of more classes than the demo's 256, and its loss: forward and backward."""
    N, D, V = job["N"], 256, 32000
    torch.manual_seed(0)
    x, head, target = torch.randn(N, D, requires_grad=True), torch.nn.Linear(D, V, bias=False), torch.randint(V, (N,))
    f = compiled(lambda x: F.cross_entropy(head(x).float(), target), job["backend"])

    def step() -> None:
        torch.autograd.grad(f(x), (x, head.weight))

    seconds = median_seconds(step, most=job["repeats"])
    return {"peak MiB": peak_memory(step)[0], "s": seconds}


def by_torch(z: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(z.float(), target)


def by_gather(z: Tensor, target: Tensor) -> Tensor:
    return -F.log_softmax(z.float(), -1).gather(-1, target.unsqueeze(-1)).mean()


def measure_logits(job: dict[str, Any]) -> dict[str, float]:
    """A loss over logits that exist, forward and backward: the peak is over the logits."""
    N, V = job["N"], 32000
    torch.manual_seed(0)
    z, target = torch.randn(N, V).to(getattr(torch, job["dtype"])).requires_grad_(), torch.randint(V, (N,))
    spelled = by_torch if job["spelling"] == "torch" else by_gather
    f = cross_entropy if job["backend"] == OPERATOR else compiled(spelled, job["backend"])

    def step() -> None:
        torch.autograd.grad(f(z, target), z)

    seconds = median_seconds(step, most=job["repeats"])
    return {"peak MiB": peak_memory(step)[0], "s": seconds}


# By Dynamo's own timers: each phase is one timer less another that runs inside it.
PHASES = {
    "Dynamo, with the lift": ("_compile.compile_inner", "OutputGraph.call_user_compiler"),
    "recognise, validate, lower": ("OutputGraph.call_user_compiler", "create_aot_dispatcher_function"),
    "AOT autograd": ("create_aot_dispatcher_function", "compile_fx.<locals>.fw_compiler_base"),
    "Inductor, with its probes of the CPU": ("compile_fx_inner", "async_compile.wait"),
    "waiting for the C++ compiler": ("async_compile.wait", ""),
}


def measure_first(job: dict[str, Any]) -> dict[str, float]:
    """Seconds of the first training step, by phase."""
    from torch._dynamo.utils import compilation_time_metrics

    step = make_step(job)
    compilation_time_metrics.clear()
    start = time.perf_counter()
    step()
    total = time.perf_counter() - start
    start = time.perf_counter()
    step()
    run = time.perf_counter() - start
    spent = {key: sum(values) for key, values in compilation_time_metrics.items()}
    phases = {name: spent.get(whole, 0.0) - spent.get(part, 0.0) for name, (whole, part) in PHASES.items()}
    rest = total - run - sum(phases.values())
    return {"first call": total, **phases, "the step itself": run, "the rest": rest}


MEASURES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "layer": measure_layer,
    "step": measure_step,
    "loss": measure_loss,
    "memory": measure_memory,
    "head": measure_head,
    "logits": measure_logits,
    "first": measure_first,
}


def measure(kind: str, limit: float, env: dict[str, str] | None = None, **job: Any) -> Any:
    print(f"  {kind} {job}", file=sys.stderr, flush=True)
    return fresh_process(__file__, ["worker", kind, json.dumps(job)], limit=limit, env=env)


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def run_layer(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    parts = [("recurrence", loop) for loop in LOOPS] + [("whole", "append + stack")]
    for part, loop in parts:
        # The eager backward of slices costs T^2: one loop at all lengths is enough of that.
        for T in args.lengths if (part, loop) == parts[0] else args.lengths[:1]:
            job = {"part": part, "loop": loop, "B": args.batch, "T": T, "repeats": args.repeats}
            eager, fla = (measure("layer", args.limit, backend=backend, **job) for backend in ("eager", "fla"))
            rows.append({"part": part, "loop": loop, "B": args.batch, "T": T, "eager s": eager, "fla s": fla,
                         "faster by": ratio(eager, fla)})  # fmt: skip
    return rows


def run_step(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for backend in ("eager", "fla", "inductor"):
        job = {"backend": backend, "B": args.batch, "T": args.lengths[0], "repeats": args.repeats}
        seconds, note = None, f"not compiled within {args.limit:.0f} s"
        try:
            seconds = measure("step", args.limit, **job)
        except RuntimeError as error:  # plain torch.compile may fail on the unrolled graph: that is a result
            if backend != "inductor":
                raise
            note = str(error).strip().splitlines()[-1][:200]
        note = "" if seconds else note
        rows.append({"backend": backend, "B": args.batch, "T": args.lengths[0], "s a step": seconds, "note": note})
    for row in rows:
        row["against eager"] = ratio(rows[0]["s a step"], row["s a step"])
    return rows


def run_loss(args: argparse.Namespace) -> list[dict[str, Any]]:
    job = {"B": args.batch, "T": args.lengths[0], "steps": args.steps}
    eager, fla = (dict(measure("loss", 3600, backend=backend, **job)) for backend in ("eager", "fla"))
    return [{"step": i, "eager": eager[i], "fla": fla[i], "relative": abs(fla[i] / eager[i] - 1)} for i in eager]


def run_memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for backend in ("eager", LOGITS, "fla"):
        T = args.lengths[-1]
        rows.append({"backend": backend, "B": args.batch, "T": T,
                     **measure("memory", args.limit, backend=backend, B=args.batch, T=T)})  # fmt: skip
    for row in rows:
        row["of eager"] = row["peak MiB"] / rows[0]["peak MiB"]
    return rows


def run_head(args: argparse.Namespace) -> list[dict[str, Any]]:
    job = {"N": 2048, "repeats": args.repeats}
    backends = ("eager", LOGITS, "fla")
    return [{"backend": b, **job, **measure("head", args.limit, backend=b, **job)} for b in backends]


def run_logits(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for dtype in ("float32", "bfloat16"):
        for spelling, backend in [(s, b) for s in ("torch", "gather") for b in ("eager", "inductor", "fla")] + [
            ("operator", OPERATOR)
        ]:
            job = {"dtype": dtype, "spelling": spelling, "backend": backend, "N": 2048, "repeats": args.repeats}
            rows.append({**job, **measure("logits", args.limit, **job)})
    return rows


def run_first(args: argparse.Namespace) -> list[dict[str, Any]]:
    job = {"backend": "fla", "B": args.batch, "T": args.lengths[0]}
    with tempfile.TemporaryDirectory() as cache:
        env = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        cold, warm = (measure("first", 600, env=env, **job) for _ in range(2))
    return [{"": name, "cold s": cold[name], "warm s": warm[name]} for name in cold]


RUNS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "layer": run_layer,
    "step": run_step,
    "loss": run_loss,
    "memory": run_memory,
    "head": run_head,
    "logits": run_logits,
    "first": run_first,
}


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        kind, job = sys.argv[2], json.loads(sys.argv[3])
        print(json.dumps(MEASURES[kind](job)))
        return
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("part", choices=[*RUNS, "all"], help="what to measure")
    p.add_argument("--batch", type=int, default=8, help="sequences a step")
    p.add_argument(
        "--lengths", type=int, nargs="+", default=[512, 2048], help="T; steps take the first, memory the last"
    )
    p.add_argument("--steps", type=int, default=60, help="training steps before the losses are compared")
    p.add_argument("--repeats", type=int, default=5, help="runs whose median counts")
    p.add_argument("--limit", type=float, default=600.0, help="seconds before a measurement is given up")
    args = p.parse_args()
    for name in RUNS if args.part == "all" else [args.part]:
        rows = RUNS[name](args)
        print(f"\n{name}\n{table(rows)}", flush=True)
        print("wrote", save("cpu_demo", "cpu", name, rows, vars(args)), flush=True)


if __name__ == "__main__":
    main()

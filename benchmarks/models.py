"""A training step of every model, ours compiled beside fla's own class in eager: step time, tokens/s, peak, parity.

    python benchmarks/models.py --jobs 12 --total 460            # small models, one CUDA device, 16 CPU cores
    python benchmarks/models.py --size large --models GLA RWKV7  # 24 layers of width 1024
    python benchmarks/models.py --size tiny                      # on the CPU, ours alone, to try the script

A step is forward, loss and backward in bfloat16, without optimiser. Ours is compiled with backend "fla", fullgraph, and
`strict`, so that nothing unrecognised is measured, and returns its loss alone (`fuse_linear_cross_entropy`). fla's has
the loss of its default configuration, which forms the logits (but for KDA), or with `--fla-linear-loss` the one that
does not; its own is slower. `model_step.py` says how gradients are checked. Every
measurement is a process with a time limit: ours of all models first, then fla's, those that compile fast first.
`--jobs` of them compile side by side; while one is timed, the others are stopped (so first steps are longer than they
would be alone). Results are written after each, so that a run that is cut off, by `--total` or by hand, still reports.

Where there is no flash_attn, fla's attention layers get torch's causal SDPA in its place; where there is no mamba_ssm,
fla's Mamba and Samba loop over time. fla has no model, only the layer, of Based and Rebased.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from common import save, table
from model_step import fields, parser

# fla's models by the time that their first step takes, the shortest first.
FLA_ORDER = (
    "HGRN", "Transformer", "GatedDeltaNet", "Mamba2", "DeltaNet", "RetNet", "HGRN2", "RWKV6", "KDA", "GLA", "RWKV7",
    "ABC", "GSA", "Samba", "Mamba",
)  # fmt: skip
LEAST = 15.0  # seconds: less is not worth starting a process


def kill(process: subprocess.Popen) -> None:
    """It and the compile workers that it started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


class Turns:
    """Processes that run side by side, of which one at a time may have the machine for itself."""

    def __init__(self) -> None:
        self.timing, self.lock, self.running = threading.Lock(), threading.Lock(), set[int]()

    @contextlib.contextmanager
    def started(self, command: list[str], **how: Any) -> Iterator[subprocess.Popen]:
        """A process in a group of its own, begun while no other is timed, ended at the latest where this ends."""
        with self.timing:
            process = subprocess.Popen(command, start_new_session=True, **how)
            with self.lock:
                self.running.add(process.pid)
        try:
            yield process
        finally:
            with self.lock:
                self.running.discard(process.pid)
            kill(process)
            process.wait()

    @contextlib.contextmanager
    def alone(self, pid: int) -> Iterator[None]:
        """Stop all others; what they have begun on the device ends within the steps that warm up."""
        with self.timing:
            try:
                self._signal(pid, signal.SIGSTOP)
                yield
            finally:
                self._signal(pid, signal.SIGCONT)

    def end(self) -> None:
        """Kill all."""
        self._signal(0, signal.SIGKILL)

    def _signal(self, but: int, what: signal.Signals) -> None:
        with self.lock:
            for pid in self.running - {but}:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, what)


class Table:
    """One row a model, written to benchmarks/results after each change."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.lock = args, threading.Lock()
        self.rows: dict[str, dict[str, Any]] = {name: {"model": name} for name in args.models}

    def add(self, name: str, peer: bool, result: dict[str, Any]) -> None:
        with self.lock:
            row = self.rows[name]
            row.update({peer * "fla " + key: value for key, value in result.items()})
            if "step ms" in row and "fla step ms" in row:
                row["faster by"] = row["fla step ms"] / row["step ms"]
            print(f"{'fla ' * peer}{name}: {result}", flush=True)
            self.save()

    def of(self, name: str, peer: bool) -> set[str]:
        """What is known of one of the two so far."""
        with self.lock:
            return {key.removeprefix("fla ") for key in self.rows[name] if key.startswith("fla ") == peer}

    def save(self) -> None:
        args = self.args
        if args.size != "tiny":  # a try of the script is no measurement
            section = f"{args.size}, B={args.batch}, T={args.length}"
            save("models", args.device, section, [*self.rows.values()], vars(args))


def measure(name: str, peer: bool, args: argparse.Namespace, end: float, turns: Turns, rows: Table) -> None:
    """One process; a failure and running out of time are results."""
    limit = min(args.fla_limit if peer else args.limit, end - time.monotonic())
    if limit < LEAST:
        rows.add(name, peer, {"error": "no time left to start"})
        return
    passed = [f"--{key}={getattr(args, key.replace('-', '_'))}" for key in PASSED]
    passed += ["--no-autotune"] * args.no_autotune + ["--fla-linear-loss"] * args.fla_linear_loss + ["--peer"] * peer
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    env = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
    env.setdefault("OMP_NUM_THREADS", str(threads))
    command = [sys.executable, str(Path(__file__).with_name("model_step.py")), name, "--wait", *passed]
    with tempfile.TemporaryFile("w+") as errors:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
        with turns.started(command, env=env, **pipes) as process:
            assert process.stdin is not None and process.stdout is not None
            over = threading.Timer(limit, kill, (process,))
            over.start()
            try:
                for line in process.stdout:
                    if line == "READY\n":
                        with turns.alone(process.pid), contextlib.suppress(BrokenPipeError):
                            process.stdin.write("go\n")
                            process.stdin.flush()
                            line = next((said for said in process.stdout if said.startswith("{")), "")
                    if line.startswith("{"):
                        rows.add(name, peer, json.loads(line))
                process.wait()
            finally:
                over.cancel()
        if process.returncode == -signal.SIGKILL:
            rows.add(name, peer, {"error": f"killed, past {limit:.0f} s or for want of memory"})
        elif process.returncode and "error" not in rows.of(name, peer):
            errors.seek(0)
            lines = errors.read().strip().splitlines() or ["it ended without a word"]
            rows.add(name, peer, {"error": lines[-1][:300]})


PASSED = ("size", "batch", "length", "eager-length", "repeats", "device")


def main() -> None:
    p = parser()
    p.description = __doc__.split("\n")[0]
    p.add_argument("--models", nargs="+", choices=list(fields("small")), default=list(fields("small")))
    p.add_argument("--jobs", type=int, default=1, help="processes that compile side by side")
    p.add_argument("--limit", type=float, default=300.0, help="seconds for each of ours")
    p.add_argument("--fla-limit", type=float, default=400.0, help="seconds for each of fla's")
    p.add_argument("--total", type=float, default=3600.0, help="seconds for all")
    p.add_argument("--no-peer", action="store_true", help="ours alone")
    p.add_argument("--no-ours", action="store_true", help="fla's alone")
    args = p.parse_args()
    if args.size == "tiny":
        args.device, args.batch, args.length, args.eager_length = "cpu", 2, 64, 32
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("a CUDA device is needed, and torch sees none; --size tiny runs on the CPU")

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    end = time.monotonic() + args.total
    known = importlib.import_module("fla.models") if args.device == "cuda" and not args.no_peer else None
    theirs = [name for name in FLA_ORDER if name in args.models and hasattr(known, f"{name}Config")]
    rows, turns = Table(args), Turns()
    if importlib.util.find_spec("mamba_ssm") is None:
        for name in {"Mamba", "Samba"} & {*theirs}:
            rows.rows[name]["fla note"] = "a Python loop, for want of mamba_ssm"
    with ThreadPoolExecutor(args.jobs) as pool:
        tasks = [] if args.no_ours else [(name, False) for name in args.models]
        tasks += [(name, True) for name in theirs]
        running = {pool.submit(measure, *task, args, end, turns, rows): task for task in tasks}
        try:
            for future in as_completed(running):
                if (error := future.exception()) is not None:  # of this script: the other rows shall not want for it
                    rows.add(*running[future], {"error": f"{type(error).__name__}: {error}"})
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            turns.end()
    print(table([*rows.rows.values()]))


if __name__ == "__main__":
    main()

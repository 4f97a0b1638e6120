"""Seconds of an op's first call in a new process, forward and then backward, with an empty disk cache and a full one.

    python benchmarks/first_call.py                     # the decayed ops on a CUDA device, side by side
    python benchmarks/first_call.py --ops gla --jobs 1

Torch is imported and the operands exist before the clock runs. "warm" finds what "cold" compiled on disk. Triton hashes
its own library once a process, whatever it runs: the import of the ops begins that on a thread, which goes on while the
device starts and the operands are made, and the first call waits for what is left of it. "warm, hashed" has waited for
all of it before the clock runs, as in a process whose model Inductor compiled. Backward starts from a number, as in
training: given gradients, torch imports sympy to compare shapes, which is 2 s of a process and not the op's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from common import save, table
from decayed import FLA, decayed, operands

SHAPE = (8, 2048, 32, 128)  # B, T, H, D
HOW = ("cold", "warm", "warm, hashed")


def first_call(op: str, hashed: bool) -> dict[str, float]:
    """In this process, which has not called it before."""
    inputs, f = operands(op, SHAPE, "cuda"), decayed("ours", op)
    assert f is not None
    do = torch.randn_like(inputs[2])
    if hashed:
        from triton.runtime.cache import triton_key

        from fla_compile.kernels.library_hash import wait_for_hash

        wait_for_hash()
        triton_key()
    torch.cuda.synchronize()
    start = time.perf_counter()
    o = f(*inputs)[0]
    torch.cuda.synchronize()
    middle = time.perf_counter()
    torch.autograd.grad((o * do).sum(), inputs)
    torch.cuda.synchronize()
    return {"forward s": middle - start, "backward s": time.perf_counter() - middle}


def measure(op: str) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for how in HOW:
            command = [sys.executable, __file__, "--one", op, *["--hashed"] * (how == HOW[-1])]
            env = os.environ | {"TRITON_CACHE_DIR": cache}
            said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
            rows.append({"op": op, "how": how, **json.loads(said.splitlines()[-1])})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--ops", nargs="+", choices=list(FLA), default=list(FLA))
    p.add_argument("--jobs", type=int, default=4, help="ops that are measured side by side")
    p.add_argument("--one", choices=list(FLA), help="measure in this process")
    p.add_argument("--hashed", action="store_true", help="with --one: after Triton has hashed its library")
    args = p.parse_args()
    if not torch.cuda.is_available():
        p.error("a CUDA device is needed, and torch sees none")
    if args.one:
        print(json.dumps(first_call(args.one, args.hashed)))
        return
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = [row for found in pool.map(measure, args.ops) for row in found]
    save("first_call", "cuda", "first calls", rows, {"ops": args.ops, "jobs": args.jobs, "shape": SHAPE})
    print(table(rows))


if __name__ == "__main__":
    main()

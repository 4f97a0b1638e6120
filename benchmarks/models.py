"""A training step of every model, ours compiled beside fla's own class in eager: tokens/s, peak memory, first step.

    python benchmarks/models.py                                  # small models, one CUDA device
    python benchmarks/models.py --size large --models GLA RWKV7  # 24 layers of width 1024
    python benchmarks/models.py --size tiny                      # on the CPU, ours alone, to try the script

A step is forward, loss and backward in bfloat16, without optimiser. Ours is compiled with backend "fla", fullgraph, and
`strict`, so that nothing unrecognised is measured. Each measurement has a process of its own; fla's model has the
weights of ours. With `--jobs`, first steps overlap (they are mostly compilation); timed steps never do. Where there is
no flash_attn, fla's attention layers get torch's causal SDPA in its place; where there is no mamba_ssm, fla's Mamba and
Samba loop over time, and a note says so.
"""

import argparse
import contextlib
import fcntl
import importlib
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from common import ROOT, fresh_process, save, table
from torch import Tensor, nn

SIZES = {"tiny": (2, 64, 256), "small": (4, 512, 32000), "large": (24, 1024, 32000)}  # layers, width, vocabulary
LOCK = "FLA_COMPILE_BENCHMARK_LOCK"


def heads(size: str) -> dict[str, dict[str, Any]]:
    """Every model by name, with the fields besides layers and width that keep its heads 64 to 128 wide."""
    layers, width, _ = SIZES[size]
    head = min(128, width // 2)
    count = width // head
    window = {"layers": [*range(1, layers, 2)], "num_heads": count, "window_size": 2048}
    return {
        "RetNet": {"num_heads": count},
        "GLA": {},
        "Based": {},
        "Rebased": {},
        "DeltaNet": {"num_heads": count},
        "ABC": {},
        "HGRN": {},
        "HGRN2": {"expand_ratio": head},
        "RWKV6": {},
        "RWKV7": {"head_dim": head // 2},
        "Mamba": {},
        "Mamba2": {"num_heads": 4 * count, "head_dim": head // 2},
        "Samba": {"attn": window},
        "GSA": {"num_heads": count},
        "GatedDeltaNet": {"num_heads": 6, "head_dim": width // 8},
        "KDA": {"num_heads": count, "head_dim": head},
        "Transformer": {"num_heads": count},
    }


def causal_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, window_size: Any = (-1, -1)) -> Tensor:
    """flash_attn's function by torch's SDPA; q, k, v [B, T, H, K]."""
    if 0 <= window_size[0] < q.shape[1] - 1:
        raise ValueError(f"a window is only stood in for where it covers all, got {window_size} at T={q.shape[1]}")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def build(args: argparse.Namespace) -> nn.Module:
    """Our model, or fla's with the same weights."""
    layers, width, vocabulary = SIZES[args.size]
    fields = {"num_hidden_layers": layers, "hidden_size": width, "vocab_size": vocabulary, **heads(args.size)[args.one]}

    def create(library: str) -> nn.Module:
        models = importlib.import_module(library)
        return getattr(models, f"{args.one}ForCausalLM")(getattr(models, f"{args.one}Config")(**fields))

    torch.manual_seed(0)
    ours = create("fla_compile.models")
    if not args.peer:
        return ours
    attention: Any = importlib.import_module("fla.layers.attn")
    if attention.flash_attn_func is None:
        attention.flash_attn_func = causal_attention
    if args.no_autotune:
        sys.path.append(str(ROOT / "tests"))
        importlib.import_module("support.peers").skip_autotuning()
    theirs = create("fla.models")
    theirs.load_state_dict(ours.state_dict())
    return theirs


@contextlib.contextmanager
def turn(kind: int) -> Iterator[None]:
    """Wait for the device: shared with other first steps (LOCK_SH), or alone (LOCK_EX)."""
    path = os.environ.get(LOCK)
    with open(path, "w") if path else contextlib.nullcontext() as file:
        if file is not None:
            fcntl.flock(file, kind)
        yield


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """First step, then the median of the others, of one model in this process."""
    cuda = args.device == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    model = build(args).to(args.device, torch.bfloat16).train()
    run = model if args.peer else torch.compile(model, backend="fla", fullgraph=True, options={"strict": True})
    ids = torch.randint(SIZES[args.size][2], (args.batch, args.length), device=args.device)

    def step() -> tuple[float, Tensor]:
        model.zero_grad(set_to_none=True)
        wait()
        start = time.perf_counter()
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        wait()
        return time.perf_counter() - start, loss.detach()

    with turn(fcntl.LOCK_SH):
        first, loss = step()
    if not all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None):
        raise RuntimeError("a gradient is not finite")
    with turn(fcntl.LOCK_EX):
        for _ in range(2):
            step()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = sorted(step()[0] for _ in range(args.repeats))
    row = {"tokens/s": ids.numel() / seconds[len(seconds) // 2], "first step s": first, "loss": loss.item()}
    return row | ({"peak GiB": torch.cuda.max_memory_allocated() / 2**30} if cuda else {})


def compare(name: str, peers: bool, args: argparse.Namespace) -> dict[str, Any]:
    """One row: ours and, if there is one, fla's, each in its own process. A failure is a result."""
    row: dict[str, Any] = {"model": name}
    passed = ["--size", args.size, "--device", args.device, "--batch", str(args.batch), "--length", str(args.length)]
    passed += ["--repeats", str(args.repeats), *(["--no-autotune"] if args.no_autotune else [])]
    for label, own in (("", []), *([("fla ", ["--peer"])] if peers else [])):
        try:
            result = fresh_process(__file__, ["--one", name, *passed, *own], limit=args.limit)
        except RuntimeError as error:
            lines = str(error).strip().splitlines()
            told = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Unsupported)\b", line)]
            result = {"error": (told or lines)[-1][:300]}
        row.update({f"{label}{key}": x for key, x in (result or {"error": f"past {args.limit:.0f} s"}).items()})
    if peers and name in ("Mamba", "Samba") and importlib.util.find_spec("mamba_ssm") is None:
        row["fla note"] = "a Python loop, for want of mamba_ssm"
    if "tokens/s" in row and "fla tokens/s" in row:
        row["faster by"] = row["tokens/s"] / row["fla tokens/s"]
    print(row, flush=True)
    return row


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--size", choices=list(SIZES), default="small")
    p.add_argument("--models", nargs="+", choices=list(heads("small")), default=list(heads("small")))
    p.add_argument("--batch", type=int, help="sequences in a step (default: 8, tiny 2)")
    p.add_argument("--length", type=int, help="T (default: 2048, tiny 64)")
    p.add_argument("--repeats", type=int, default=7, help="timed steps, of which the median counts")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda, tiny cpu")
    p.add_argument("--jobs", type=int, default=1, help="processes at once; their timed steps still run one by one")
    p.add_argument("--limit", type=float, default=400.0, help="seconds after which a measurement is given up")
    p.add_argument("--no-peer", action="store_true", help="ours alone")
    p.add_argument("--no-autotune", action="store_true", help="fla's kernels in their first configuration that runs")
    p.add_argument("--one", help=argparse.SUPPRESS)
    p.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    tiny = args.size == "tiny"
    args.batch, args.length = args.batch or (2 if tiny else 8), args.length or (64 if tiny else 2048)
    args.device = args.device or ("cpu" if tiny else "cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("a CUDA device is needed, and torch sees none; --size tiny runs on the CPU")
    if args.one:
        warnings.filterwarnings("ignore")
        print(json.dumps(measure(args)))
        return

    known = importlib.import_module("fla.models") if args.device == "cuda" and not args.no_peer else None
    rows: list[dict[str, Any]] = []
    with tempfile.NamedTemporaryFile() as lock, ThreadPoolExecutor(args.jobs) as pool:
        os.environ[LOCK] = lock.name
        for row in pool.map(lambda name: compare(name, hasattr(known, f"{name}Config"), args), args.models):
            rows.append(row)
            if not tiny:  # a try of the script is no measurement
                save("models", args.device, f"{args.size}, B={args.batch}, T={args.length}", rows, vars(args))
    print(table(rows))


if __name__ == "__main__":
    main()

"""One training step of one model, ours compiled or fla's own class: what `benchmarks/models.py` runs as a process.

Prints its results as JSON, one object a line, as soon as each is known. Before it times anything it prints READY and,
with `--wait`, waits for a line on its standard input.

The parity of ours: the compiled step gets labels for the first `--eager-length` tokens of the first row only. As models
are causal, its gradients are then those of the eager loop on these tokens alone, in bfloat16, and in float32 for the
truth. Each gradient may be as far from the truth as the eager one's, times FACTOR, plus FLOOR (Euclidean norms).
"""

import argparse
import copy
import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import skip_autotuning
from torch import Tensor, nn
from transformers import PreTrainedModel

SIZES = {"tiny": (2, 64, 256), "small": (4, 512, 8192), "large": (24, 1024, 32000)}  # layers, width, vocabulary
# As in tests/models/test_parity.py: gradients of few numbers may be exact by luck in one of the two.
FACTOR, FLOOR, FEW, FLOOR_OF_FEW = 3.0, 8e-3, 16, 5e-2


def fields(size: str) -> dict[str, dict[str, Any]]:
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
        "KDA": {"num_heads": count, "head_dim": head},
        "Mamba": {},
        "Mamba2": {"num_heads": 4 * count, "head_dim": head // 2},
        "Samba": {"attn": window},
        "GSA": {"num_heads": count},
        "GatedDeltaNet": {"num_heads": 6, "head_dim": width // 8},
        "Transformer": {"num_heads": count},
    }


def causal_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, window_size: Any = (-1, -1)) -> Tensor:
    """flash_attn's function by torch's SDPA; q, k, v [B, T, H, K]."""
    if 0 <= window_size[0] < q.shape[1] - 1:
        raise ValueError(f"a window is only stood in for where it covers all, got {window_size} at T={q.shape[1]}")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def build(args: argparse.Namespace) -> PreTrainedModel:
    """Our model, or fla's with the same weights."""
    layers, width, vocabulary = SIZES[args.size]
    given = {"num_hidden_layers": layers, "hidden_size": width, "vocab_size": vocabulary}

    def create(library: str, **loss: bool) -> PreTrainedModel:
        models = importlib.import_module(library)
        config = getattr(models, f"{args.model}Config")(**given, **fields(args.size)[args.model], **loss)
        return getattr(models, f"{args.model}ForCausalLM")(config)

    torch.manual_seed(0)
    alone = {"fuse_cross_entropy": False, "fuse_linear_cross_entropy": True}
    ours = create("fla_compile.models", **alone)
    with torch.no_grad():
        for p in ours.parameters():  # some begin at zero, and what lies before them has no gradient then
            p.add_(0.02 * torch.randn_like(p))
    if not args.peer:
        return ours
    attention: Any = importlib.import_module("fla.layers.attn")
    if attention.flash_attn_func is None:
        attention.flash_attn_func = causal_attention
    if args.no_autotune:
        skip_autotuning()
    theirs = create("fla.models", **(alone if args.fla_linear_loss and args.model != "KDA" else {}))
    theirs.load_state_dict(ours.state_dict())
    return theirs


def gradients(model: nn.Module, run: Callable[..., Any], ids: Tensor, labels: Tensor) -> tuple[Tensor, dict]:
    """The loss and every gradient of one step; raises RuntimeError where one is missing or not finite."""
    model.zero_grad(set_to_none=True)
    loss = run(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    broken = [name for name, grad in found.items() if not grad.isfinite().all()]
    if broken or not loss.isfinite():
        raise RuntimeError(f"loss {loss.item()}, gradients that are not finite: {broken}")
    return loss.detach(), found


def parity(model: PreTrainedModel, ids: Tensor, compiled: tuple[Tensor, dict]) -> dict[str, Any]:
    """How far the compiled loss and gradients are from float32's, beside the eager loop's in the model's dtype."""
    model.gradient_checkpointing_enable()  # the states of all layers' steps need not fit beside each other
    eager = gradients(model, model, ids, ids)
    wide = copy.deepcopy(model).float()
    truth = gradients(wide, wide, ids, ids)
    if not truth[1].keys() == eager[1].keys() == compiled[1].keys():
        raise RuntimeError(f"gradients of {sorted(truth[1].keys() ^ compiled[1].keys())} in one of the two only")
    worst, said, inside = 0.0, "", True
    for name, x in (("loss", truth[0]), *truth[1].items()):
        pair = (compiled[0], eager[0]) if name == "loss" else (compiled[1][name], eager[1][name])
        size = x.double().norm().clamp(min=1e-30)
        own, other = (((y.to(x) - x).double().norm() / size).item() for y in pair)
        limit = FACTOR * other + (FLOOR_OF_FEW if x.numel() <= FEW else FLOOR)
        inside = inside and own <= limit
        if own / limit > worst:
            worst, said = own / limit, f"{name} {own:.1e}, eager {other:.1e}"
    return {"in budget": inside, "worst error": said, "of its budget": worst}


def measure(args: argparse.Namespace, tell: Callable[[dict[str, Any]], None], turn: Callable[[], None]) -> None:
    """First step, gradients, the median of timed steps, parity."""
    cuda = args.device == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    model = build(args).to(args.device, torch.bfloat16).train()
    run = model if args.peer else torch.compile(model, backend="fla", fullgraph=True, options={"strict": True})
    ids = torch.randint(SIZES[args.size][2], (args.batch, args.length), device=args.device)
    few = torch.full_like(ids, -100)
    few[0, : args.eager_length] = ids[0, : args.eager_length]

    start = time.perf_counter()
    loss, found = gradients(model, run, ids, few)
    compiled = loss.cpu(), {name: grad.cpu() for name, grad in found.items()}  # not part of the peak
    wait()
    tell({"first step s": time.perf_counter() - start})
    loss, found = gradients(model, run, ids, ids)
    missing = {name for name, _ in model.named_parameters()} - found.keys()
    if missing and not args.peer:
        raise RuntimeError(f"no gradient of {sorted(missing)}")
    tell({"loss": loss.item(), "gradients": "all finite"})
    del loss, found
    model.zero_grad(set_to_none=True)
    if cuda:
        torch.cuda.empty_cache()

    def step() -> float:
        model.zero_grad(set_to_none=True)
        wait()
        begin = time.perf_counter()
        run(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        wait()
        return time.perf_counter() - begin

    turn()
    for _ in range(3):
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = sorted(step() for _ in range(args.repeats))
    middle = seconds[len(seconds) // 2]
    peak = {"peak GiB": torch.cuda.max_memory_allocated() / 2**30} if cuda else {}
    tell({"step ms": 1000 * middle, "tokens/s": ids.numel() / middle, **peak})
    if not args.peer:
        model.zero_grad(set_to_none=True)
        tell(parity(model, ids[:1, : args.eager_length], compiled))


def parser() -> argparse.ArgumentParser:
    """What one measurement takes; `models.py` hands these on."""
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--size", choices=list(SIZES), default="small", help="tiny is for trying the scripts on the CPU")
    p.add_argument("--batch", type=int, default=8, help="sequences in a step")
    p.add_argument("--length", type=int, default=2048, help="T")
    p.add_argument("--eager-length", type=int, default=512, help="tokens of the eager loop that gradients are held to")
    p.add_argument("--repeats", type=int, default=9, help="timed steps, of which the median counts")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    p.add_argument("--fla-linear-loss", action="store_true", help="fla's loss too without logits")
    p.add_argument("--no-autotune", action="store_true", help="fla's kernels in their first configuration that runs")
    return p


def main() -> None:
    p = parser()
    p.add_argument("model", choices=list(fields("small")))
    p.add_argument("--peer", action="store_true", help="fla's class")
    p.add_argument("--wait", action="store_true", help="for a line on standard input, before timing")
    args = p.parse_args()
    warnings.filterwarnings("ignore")

    def turn() -> None:
        print("READY", flush=True)
        if args.wait:
            sys.stdin.readline()

    def tell(result: dict[str, Any]) -> None:
        print(json.dumps(result), flush=True)

    try:
        measure(args, tell, turn)
    except Exception as error:
        tell({"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]})
        raise


if __name__ == "__main__":
    main()

"""Generate with a linear-attention model through Hugging Face's `generate`, and time prompt and decoding.

    python examples/generate.py                                        # a small GLA of random weights, on the CPU
    python examples/generate.py --model RetNet --device cuda --dtype bfloat16 --dim 2048 --layers 24 --compile
    python examples/generate.py --checkpoint out/hybrid --text "def "  # a folder that save_pretrained wrote

The cache holds one state per layer, of the same size after 10 tokens and after 10,000 (but for layers of full softmax
attention). `--compile` compiles the model once for prompts of every length and once for decoding.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import fla_compile.models


def new_model(args: argparse.Namespace) -> PreTrainedModel:
    """The checkpoint, or a model of the named kind with random weights over bytes."""
    dtype = getattr(torch, args.dtype)
    if args.checkpoint is not None:
        return AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=dtype).to(args.device).eval()
    torch.manual_seed(args.seed)
    heads = {} if args.heads is None else {"num_heads": args.heads}
    longest = args.new + (args.prompt if args.text is None else len(args.text.encode()))
    config = getattr(fla_compile.models, f"{args.model}Config")(
        hidden_size=args.dim, num_hidden_layers=args.layers, vocab_size=256, max_position_embeddings=longest,
        eos_token_id=None, **heads,
    )  # fmt: skip
    model = getattr(fla_compile.models, f"{args.model}ForCausalLM")(config)
    return model.to(device=args.device, dtype=dtype).eval()


def prompts(args: argparse.Namespace, vocabulary: int) -> torch.Tensor:
    """Token ids [B, T]: the given text's bytes, or random ones."""
    if args.text is not None:
        return torch.tensor([list(args.text.encode())] * args.batch, device=args.device)
    generator = torch.Generator().manual_seed(args.seed)
    return torch.randint(vocabulary, (args.batch, args.prompt), generator=generator).to(args.device)


def seconds(model: Any, ids: torch.Tensor, count: int, **how: Any) -> tuple[float, torch.Tensor]:
    """The time that `count` new tokens take, and the tokens."""
    if ids.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    out = model.generate(ids, max_new_tokens=count, min_new_tokens=count, **how)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, out


def measure(model: PreTrainedModel, ids: torch.Tensor, count: int, **how: Any) -> dict[str, Any]:
    """Tokens per second of reading the prompts and of writing, all rows together, best of 3 after one that compiles."""
    first, _ = seconds(model, ids, 3, **how)
    prompt = min(seconds(model, ids, 1, **how)[0] for _ in range(3))
    whole, out = min((seconds(model, ids, count, **how) for _ in range(3)), key=lambda run: run[0])
    decode = whole - prompt if whole > prompt else math.nan  # lost in the noise of the prompt's time
    return {
        "first call s": first,
        "prompt tokens/s": ids.numel() / prompt,
        "decode tokens/s": (count - 1) * len(ids) / decode,
        "ms/token": 1000 * decode / (count - 1),
        "tokens": out[:, ids.shape[1] :],
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="GLA", help="X of a class XForCausalLM in fla_compile.models")
    p.add_argument("--checkpoint", type=Path, help="a local folder of weights and config instead")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    p.add_argument("--dim", type=int, default=256, help="width of a new model")
    p.add_argument("--layers", type=int, default=4, help="blocks of a new model")
    p.add_argument("--heads", type=int, help="heads of a new model; default: the model's own")
    p.add_argument("--batch", type=int, default=1, help="sequences at a time")
    p.add_argument("--prompt", type=int, default=256, help="random prompt tokens a sequence")
    p.add_argument("--text", help="a prompt of bytes instead; the continuation is printed")
    p.add_argument("--new", type=int, default=64, help="new tokens a sequence, 2 or more")
    p.add_argument("--beams", type=int, default=1, help="beams of a beam search")
    p.add_argument("--sample", action="store_true", help="sample instead of the likeliest token")
    p.add_argument("--compile", action="store_true", help='also time the model under torch.compile(backend="fla")')
    p.add_argument("--seed", type=int, default=0, help="of weights, prompts and sampling")
    args = p.parse_args(argv)
    if args.new < 2:
        p.error("--new must be 2 or more: the first token is the prompt's")
    return args


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    args = parse_args(argv)
    model = new_model(args)
    ids = prompts(args, model.config.vocab_size)
    how = {"do_sample": args.sample, "num_beams": args.beams, "pad_token_id": 0}
    count = sum(p.numel() for p in model.parameters())
    print(f"{type(model).__name__}, {count:,} parameters, {args.dtype} on {args.device}, prompts {tuple(ids.shape)}")
    found = {}
    for name in ("eager", "compiled") if args.compile else ("eager",):
        if name == "compiled":
            model.forward = torch.compile(model.forward, backend="fla", fullgraph=True, dynamic=True)
        torch.manual_seed(args.seed)
        found[name] = measure(model, ids, args.new, **how)
        numbers = (f"{key} {value:,.1f}" for key, value in found[name].items() if key != "tokens")
        print(f"{name:>8}: " + ", ".join(numbers))
    if args.text is not None:
        print(args.text + bytes(found[name]["tokens"][0].tolist()).decode(errors="replace"))
    return found


if __name__ == "__main__":
    main()

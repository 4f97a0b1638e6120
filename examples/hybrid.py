"""Train a small hybrid, linear layers and one of softmax attention, on Python's own standard library.

    python examples/hybrid.py                            # CPU, a few minutes
    python examples/hybrid.py --model RetNet --layers 4 --attention 1 3 --window 128 --device cuda --steps 500

`config.attn` puts attention into any model of `fla_compile.models`. The whole model is compiled as one graph; `explain`
shows what its loops became. The trained model is saved as a Hugging Face folder and loaded again to generate.
"""

import argparse
import time
from pathlib import Path

import torch
from train_bytes import standard_library, windows
from transformers import AutoModelForCausalLM, PreTrainedModel

import fla_compile
import fla_compile.models


def new_model(args: argparse.Namespace) -> PreTrainedModel:
    """A model over bytes with softmax attention at the layers asked for."""
    torch.manual_seed(args.seed)
    attention = {"layers": args.attention, "num_heads": args.heads, "num_kv_heads": 1, "window_size": args.window}
    config = getattr(fla_compile.models, f"{args.model}Config")(
        hidden_size=args.dim,
        num_hidden_layers=args.layers,
        num_heads=args.heads,
        attn=attention if args.attention else None,
        vocab_size=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=True,
        fuse_linear_cross_entropy=True,  # in training the loss alone, so that its logits are never formed
    )
    return getattr(fla_compile.models, f"{args.model}ForCausalLM")(config).to(args.device)


def train(model: PreTrainedModel, args: argparse.Namespace) -> list[float]:
    """The loss of each step, in nats per byte."""
    data, generator = standard_library()[0], torch.Generator().manual_seed(args.seed)
    step = model if args.eager else torch.compile(model, backend="fla", fullgraph=True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, args.lr, total_steps=args.steps, pct_start=0.1)
    losses: list[float] = []
    start = time.perf_counter()
    for i in range(args.steps):
        ids = windows(data, args.batch, args.seq_len, generator)[:, :-1].long().to(args.device)
        loss = step(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if i % 20 == 0 or i == args.steps - 1:
            print(f"step {i:4d}  loss {losses[-1]:.3f}  {time.perf_counter() - start:6.1f} s")
    return losses


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="GLA", help="X of a class XForCausalLM in fla_compile.models")
    p.add_argument("--attention", type=int, nargs="*", default=[1], help="layers of softmax attention")
    p.add_argument("--window", type=int, default=64, help="how far attention sees; its cache is no longer")
    p.add_argument("--dim", type=int, default=128, help="width of the model")
    p.add_argument("--layers", type=int, default=3, help="blocks")
    p.add_argument("--heads", type=int, default=4, help="heads, of linear layers and of attention")
    p.add_argument("--steps", type=int, default=120, help="optimiser steps")
    p.add_argument("--batch", type=int, default=8, help="sequences a step")
    p.add_argument("--seq-len", type=int, default=256, help="bytes a sequence")
    p.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--eager", action="store_true", help="do not compile")
    p.add_argument("--seed", type=int, default=0, help="of weights, data order and sampling")
    p.add_argument("--text", default="def ", help="what the sample continues")
    p.add_argument("--out", type=Path, default=Path("out/hybrid"), help="folder for the trained model")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> list[float]:
    args = parse_args(argv)
    model = new_model(args)
    ids = torch.zeros(args.batch, args.seq_len, dtype=torch.long, device=args.device)
    print(fla_compile.explain(model, ids, labels=ids))
    losses = train(model, args)
    model.save_pretrained(args.out)
    loaded = AutoModelForCausalLM.from_pretrained(args.out).to(args.device).eval()
    prompt = torch.tensor([list(args.text.encode())], device=args.device)
    sample = loaded.generate(prompt, max_new_tokens=200, do_sample=True, temperature=0.7, top_k=40)
    print(bytes(sample[0].tolist()).decode(errors="replace"))
    return losses


if __name__ == "__main__":
    main()

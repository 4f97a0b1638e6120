"""Train a byte-level language model on Python's own standard library, its token mixing a plain loop over time.

    python examples/train_bytes.py                  # CPU, about four minutes
    python examples/train_bytes.py --device cuda --batch 32 --steps 2000 --dim 512

`gated_linear_attention` below is all that `torch.compile(..., backend="fla")` gets to see: it finds the recurrence in
the loop and runs a chunk kernel in its place. Shapes: B batch, T time, H heads, K = V head size, D width.
"""

import argparse
import hashlib
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = list[Tensor]  # one [B, H, K, V] a layer


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t.

    q, k, g: [B, T, H, K], v: [B, T, H, V], S: [B, H, K, V]. Yang et al., "Gated Linear Attention Transformers with
    Hardware-Efficient Training" (2024), equation 3.
    """
    outputs = []
    for t in range(q.shape[1]):
        S = S * g[:, t].exp()[..., None] + k[:, t, :, :, None] * v[:, t, :, None, :]  # [B, H, K, V]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(outputs, dim=1), S


class TokenMixing(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.size = heads, dim // heads
        self.q, self.k, self.v, self.gate, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(5))
        self.decay = nn.Sequential(nn.Linear(dim, 16, bias=False), nn.Linear(16, dim))  # low rank
        self.norm = nn.RMSNorm(self.size, eps=1e-5)

    def forward(self, x: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, g = (f(x).unflatten(-1, (self.heads, self.size)) for f in (self.q, self.k, self.v, self.decay))
        o, S = gated_linear_attention(q * self.size**-0.5, k, v, F.logsigmoid(g) / 16, S)
        o = self.norm(o).flatten(-2) * F.silu(self.gate(x))  # [B, T, D]
        return self.out(o), S


class SwiGLU(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        hidden = 32 * round(dim * 8 / 3 / 32)
        self.gate, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(dim, eps=1e-5), nn.RMSNorm(dim, eps=1e-5)
        self.mix, self.mlp = TokenMixing(dim, heads), SwiGLU(dim)

    def forward(self, x: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
        y, S = self.mix(self.norm1(x), S)
        x = x + y
        return x + self.mlp(self.norm2(x)), S


class ByteLM(nn.Module):
    """Bytes in, logits over the next byte out, and the recurrent state, from which any later call can go on."""

    def __init__(self, dim: int = 256, layers: int = 4, heads: int = 4):
        super().__init__()
        self.heads, self.size = heads, dim // heads
        self.embed = nn.Embedding(256, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(dim, eps=1e-5), nn.Linear(dim, 256, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=dim**-0.5 / 2)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        x = self.embed(tokens)  # [B, T, D]
        if state is None:
            zeros = x.new_zeros(x.shape[0], self.heads, self.size, self.size)
            state = [zeros] * len(self.blocks)
        new_state = []
        for block, S in zip(self.blocks, state, strict=True):
            x, S = block(x, S)
            new_state.append(S)
        return self.head(self.norm(x)), new_state


def model_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross entropy in nats a byte of `tokens` [B, T + 1], each predicted from those before it."""
    logits, _ = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def standard_library() -> tuple[Tensor, Tensor]:
    """The running Python's own `.py` files as two uint8 tensors, split by file: (train, validation)."""
    root = Path(os.__file__).parent
    splits: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" not in name and "dist-packages" not in name:
            splits[hashlib.sha256(name.encode()).digest()[0] < 16].append(path.read_bytes())  # 1 in 16 validates
    train, validation = (torch.frombuffer(bytearray(b"\n".join(files)), dtype=torch.uint8) for files in splits)
    return train, validation


def windows(data: Tensor, batch: int, seq_len: int, generator: torch.Generator) -> Tensor:
    """`batch` random windows of `data`: int64 [B, T + 1]."""
    starts = torch.randint(len(data) - seq_len, (batch, 1), generator=generator)
    return data[starts + torch.arange(seq_len + 1)].long()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine down to a tenth of the peak."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def optimise(step: Callable, model: nn.Module, optimiser: torch.optim.Optimizer, tokens: Tensor) -> float:
    """One optimiser step on the loss that `step(model, tokens)` computes; returns the loss."""
    optimiser.zero_grad(set_to_none=True)
    loss = step(model, tokens)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return loss.item()


def make_optimiser(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def train(step: Callable, model: nn.Module, data: tuple[Tensor, Tensor], args: argparse.Namespace) -> dict[str, list]:
    """Train `model` in place; returns {"train": [(step, loss)], "validation": [(step, loss)], "seconds": [...]}."""
    from tqdm import tqdm

    generator = torch.Generator().manual_seed(args.seed)
    held_out = [windows(data[1], args.batch, args.seq_len, generator).to(args.device) for _ in range(8)]
    optimiser = make_optimiser(model, args.lr)
    log: dict[str, list] = {"train": [], "validation": [], "seconds": []}

    def validate(done: int) -> None:
        # With gradients on, though none are taken: the graph that trains serves here too, nothing compiles again.
        loss = sum(step(model, tokens).item() for tokens in held_out) / len(held_out)
        log["validation"].append((done, loss))
        tqdm.write(f"step {done:5d}: validation loss {loss:.4f} nats a byte")

    validate(0)
    with tqdm(range(args.steps), unit="step", mininterval=1.0, disable=args.quiet) as bar:
        for i in bar:
            optimiser.param_groups[0]["lr"] = learning_rate(i, args.steps, args.lr)
            start = time.perf_counter()
            tokens = windows(data[0], args.batch, args.seq_len, generator).to(args.device)
            log["train"].append((i, loss := optimise(step, model, optimiser, tokens)))
            log["seconds"].append(time.perf_counter() - start)
            bar.set_postfix_str(f"loss {loss:.3f}, {args.batch * args.seq_len / log['seconds'][-1]:,.0f} tokens/s")
            if (i + 1) % max(1, args.steps // 4) == 0 and i + 1 < args.steps:
                validate(i + 1)
    validate(args.steps)
    return log


def seconds_a_step(step: Callable, model: nn.Module, tokens: Tensor, limit: float, most: int = 5) -> float:
    """Median seconds of a training step: at most `most` steps, none begun after `limit` seconds; moves the weights."""
    optimiser = make_optimiser(model, 1e-4)
    seconds: list[float] = []
    while len(seconds) < most and sum(seconds) < limit:
        start = time.perf_counter()
        optimise(step, model, optimiser, tokens)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:] or seconds)[len(seconds[1:]) // 2]


@torch.no_grad()
def sample(model: nn.Module, prompt: bytes, length: int, temperature: float, generator: torch.Generator) -> bytes:
    """Continue `prompt` by `length` bytes: the prompt in one call, then a byte at a time from the recurrent state."""
    device = next(model.parameters()).device
    text, state = bytearray(prompt), None
    tokens = torch.tensor([list(prompt)], device=device)
    for _ in range(length):
        logits, state = model(tokens, state)  # state does not grow, however long the text
        probabilities = (logits[:, -1].float().cpu() / temperature).softmax(-1)
        token = torch.multinomial(probabilities, 1, generator=generator)  # [1, 1]
        text.append(int(token))
        tokens = token.to(device)
    return bytes(text)


def save_and_reload(model: ByteLM, fresh: ByteLM, path: Path) -> ByteLM:
    """Write the weights of `model` to `path` and read them into `fresh`, which must then be the same model."""
    from safetensors.torch import load_file, save_file

    save_file(model.state_dict(), path)
    fresh.load_state_dict(load_file(path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    return fresh


def plot(log: dict[str, list], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*log["train"], strict=True), linewidth=1, label="train")
    axes.plot(*zip(*log["validation"], strict=True), "o-", label="validation")
    axes.set(xlabel="step", ylabel="nats a byte", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--backend", default="fla", help="a torch.compile backend (fla, inductor, ...), or eager for none")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--steps", type=int, default=160, help="optimiser steps")
    p.add_argument("--batch", type=int, default=8, help="sequences a step")
    p.add_argument("--seq-len", type=int, default=512, help="bytes a sequence")
    p.add_argument("--dim", type=int, default=256, help="width of the model")
    p.add_argument("--layers", type=int, default=4, help="blocks")
    p.add_argument("--heads", type=int, default=4, help="heads of each token mixing")
    p.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    p.add_argument("--seed", type=int, default=0, help="of weights, data order and sampling")
    p.add_argument("--prompt", default="def ", help="what the sample continues")
    p.add_argument("--out", type=Path, default=Path("out"), help="folder for weights and plot")
    p.add_argument("--no-eager-compare", action="store_true", help="skip the few eager steps")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    args = p.parse_args(argv)
    if args.dim % args.heads:
        p.error(f"--dim must be a multiple of --heads, got {args.dim} and {args.heads}")
    return args


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model = ByteLM(args.dim, args.layers, args.heads).to(args.device)
    data = standard_library()
    probe = windows(data[0], args.batch, args.seq_len, torch.Generator().manual_seed(1)).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(data[0]):,} bytes to train on, "
          f"{len(data[1]):,} held out; B={args.batch}, T={args.seq_len}, {args.device}", flush=True)  # fmt: skip

    if args.backend == "fla":
        import fla_compile

        print(fla_compile.explain(model_loss, model, probe), flush=True)
    step = model_loss if args.backend == "eager" else torch.compile(model_loss, backend=args.backend)
    start = time.perf_counter()
    step(model, probe).backward()
    print(f"first step, {args.backend}: {time.perf_counter() - start:.1f} s", flush=True)

    log = train(step, model, data, args)
    compiled = sorted(log["seconds"])[len(log["seconds"]) // 2]
    print(f"{args.backend}: {compiled:.3f} s a step, {args.batch * args.seq_len / compiled:,.0f} tokens/s")

    plot(log, f"{args.backend} on {args.device}, {args.steps} steps", args.out / "loss.png")
    fresh = ByteLM(args.dim, args.layers, args.heads).to(args.device)
    model = save_and_reload(model, fresh, args.out / "train_bytes.safetensors")
    print(f"weights and loss curve in {args.out}/; the weights read back equal")
    text = sample(model, args.prompt.encode(), 300, 0.7, torch.Generator().manual_seed(args.seed))
    print(f"--- a sample ---\n{text.decode(errors='replace')}\n---")

    if args.backend != "eager" and not args.no_eager_compare:
        eager = seconds_a_step(model_loss, model, probe, limit=30.0)
        print(f"eager: {eager:.3f} s a step; {args.backend} is {eager / compiled:.1f}x as fast")


if __name__ == "__main__":
    main()

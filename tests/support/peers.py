"""fla's models beside ours: built on any machine, run on a GPU, or in Triton's interpreter (slow, small sizes).

`python tests/support/peers.py NAME ...` compares logits, loss and gradients of the named cases in the interpreter;
it must be a process of its own, because Triton reads TRITON_INTERPRET when it is imported.
"""

import importlib
import os
import sys
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = True, window_size: tuple[int, int] = (-1, -1)
) -> Tensor:
    """What fla's attention layer asks of flash_attn, q [B, T, H, K]: it refuses to be built without the package."""
    T, S = q.shape[1], k.shape[1]
    distance = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)
    visible = (distance >= 0) & (distance <= window_size[0] if window_size[0] >= 0 else True)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True).transpose(1, 2)


def peer(path: str) -> Any:
    """A module or class of fla by its path, `fla.models` or `fla.layers.based.BasedLinearAttention`."""
    attention = importlib.import_module("fla.layers.attn")
    if attention.flash_attn_func is None:
        attention.flash_attn_func = flash_attention
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def results(
    module: nn.Module, given: Tensor, dtype: torch.dtype, *, compiled: bool = False, may_refuse: bool = False
) -> dict[str, Tensor]:
    """Output and all gradients of a model (given token ids) or of a layer (given [B, T, D]) in this dtype.

    `may_refuse`: fla has no forward of some layers in some dtypes, no backward on some devices; then without these.
    """
    module = module.to(dtype)
    module.zero_grad()
    run = torch.compile(module, backend="fla", fullgraph=True) if compiled else module
    wide = torch.promote_types(dtype, torch.float32)
    found: dict[str, Tensor] = {}
    try:
        if given.is_floating_point():
            output = run(given.to(dtype))
            output = output[0] if isinstance(output, tuple) else output
            loss = (output.to(wide) * torch.linspace(-1, 1, output.shape[-1], device=given.device)).sum()
        else:
            output = run(given, use_cache=False).logits
            loss = F.cross_entropy(output[:, :-1].flatten(0, 1).to(wide), given[:, 1:].flatten())
        found["output"] = output.detach()
        loss.backward()
    except Exception:
        if not may_refuse:
            raise
        return found
    return found | {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def skip_autotuning() -> None:
    """Let fla's kernels run the first of their configurations that runs: timing them all takes minutes per kernel."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.errors import OutOfResources

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(kwargs):
            if config.pre_hook is not None:
                config.pre_hook({**self.nargs, **kwargs, **config.all_kwargs()})
            try:
                return self.fn.run(*args, **kwargs, **config.all_kwargs())
            except OutOfResources:
                continue
        raise RuntimeError(f"no configuration of {self.fn} fits this device")

    Autotuner.run = run


class Index(int):
    """A loop index as the compiler has it."""

    def to(self, dtype: Any) -> "Index":
        return self


def interpret() -> None:
    """Run Triton kernels in its interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"
    skip_autotuning()
    peer("fla.models.GLAConfig")
    # In the interpreter the index of a loop is a plain int, of which some kernels call `to`.
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops."):
            vars(module).setdefault("range", lambda *bounds: [Index(i) for i in range(*bounds)])
    hgrn, slots = importlib.import_module("fla.layers.hgrn"), importlib.import_module("fla.layers.abc")
    hgrn.chunk_hgrn = hgrn.fused_recurrent_hgrn
    naive = importlib.import_module("fla.ops.abc.naive").naive_cumsum_abc  # [B, H, T, K]
    slots.chunk_abc = lambda initial_state, output_final_state, **xs: (
        naive(**{name: x.transpose(1, 2) for name, x in xs.items()})[0].transpose(1, 2),
        None,
    )


def main(names: list[str]) -> int:
    warnings.filterwarnings("ignore")
    interpret()
    from models import MODELS, tokens

    for case in (case for case in MODELS if str(case) in names):
        ours, theirs = case.new_pair(hidden_size=64)
        given = tokens(2, 12) if case.peer is not None else torch.randn(2, 12, 64)
        mine, reference = (results(module, given, torch.float32) for module in (ours, theirs))
        truth = results(ours, given, torch.float64)
        if not mine.keys() == reference.keys() == truth.keys():
            sys.exit(f"{case}: gradients of {sorted(mine.keys() ^ reference.keys())} in one of the two only")
        for whose, found, limit in (("ours", mine, 1e-4), ("fla", reference, 1e-3)):
            errors = {name: ((found[name] - x).norm() / x.norm()).item() for name, x in truth.items()}
            worst = max(errors, key=lambda name: errors[name])
            print(f"{case}: {whose} is {errors['output']:.1e} from float64, at worst {errors[worst]:.1e}, {worst}")
            if errors[worst] > limit:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What `config.use_l2warp` adds to the loss of a language model."""

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla_compile.models.layers import widen


def pull_of_largest(head: nn.Module, x: Tensor, logits: Tensor | None) -> Tensor:
    """A scalar of value zero whose gradient pulls the largest logit of each token towards zero.

    x [B, T, D] are hidden states, logits [B, T, vocabulary] what `head` makes of them, None if they shall not be kept.
    Source: RWKV-LM's L2Wrap, 1e-4 times the logit, over the number of tokens.
    """
    largest = largest_logit(head, x) if logits is None else logits.amax(-1)
    pull = largest.square().sum() * (0.5e-4 / largest.numel())
    return pull - pull.detach()


def largest_logit(head: nn.Module, x: Tensor) -> Tensor:
    """[B, T], through one row of the head for each token: logits are compared, but not kept for backward."""
    if type(head) is not nn.Linear or head.bias is not None:  # an adapter, say: its logits are not of its weight alone
        return head(x).amax(-1)
    row = F.embedding(head(x.detach()).argmax(-1), head.weight)
    return (widen(x) * widen(row)).sum(-1)

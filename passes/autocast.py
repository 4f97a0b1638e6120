"""Autocast around a loop: its casts become operations of the step, and what replaces the loop runs without it."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx

ENTER = torch.amp.autocast_mode._enter_autocast
EXIT = torch.amp.autocast_mode._exit_autocast


def regions_at(node: fx.Node) -> list[tuple[Any, ...]]:
    """The arguments of the autocast regions of the graph that are open where `node` stands, outermost first."""
    open_at: dict[fx.Node, tuple[Any, ...]] = {}
    for other in node.graph.nodes:
        if other is node:
            break
        if other.target is ENTER:
            open_at[other] = other.args
        elif other.target is EXIT:
            open_at.pop(other.args[0])  # type: ignore[arg-type]
    return list(open_at.values())


@contextmanager
def entered(regions: Sequence[tuple[Any, ...]]) -> Iterator[None]:
    """As if inside these regions; the caller's own autocast is on already."""
    with ExitStack() as stack:
        for device, dtype, enabled, cache in regions:
            stack.enter_context(torch.autocast(device, dtype, enabled, cache))
        yield


def active(device: str, regions: Sequence[tuple[Any, ...]]) -> bool:
    """Whether operations on the device are cast, by the caller's autocast or by these regions."""
    own = [enabled for region, _, enabled, _ in regions if region == device]
    return own[-1] if own else torch.is_autocast_enabled(device)

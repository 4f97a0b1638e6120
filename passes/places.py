"""Where in the user's program a node comes from: the file and line that made it."""

import re
from pathlib import Path

import torch
from torch import fx

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in')
_OWN = (str(Path(torch.__file__).parent), str(Path(__file__).resolve().parent), "<")


def source_of(node: fx.Node) -> tuple[str, int] | None:
    """The user's file and line that made this node: the innermost frame that is not torch's nor ours."""
    return innermost_frame(node.meta.get("stack_trace") or "")


def innermost_frame(trace: str) -> tuple[str, int] | None:
    """The innermost frame of a printed traceback that is not torch's nor ours."""
    frames = _FRAME.findall(trace)
    for filename, line in reversed(frames):
        if not str(Path(filename).resolve()).startswith(_OWN):
            return filename, int(line)
    return None


def short_source(place: tuple[str, int] | None) -> str:
    return f"{Path(place[0]).name}:{place[1]}" if place else ""

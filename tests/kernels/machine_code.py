"""What ptxas made of a kernel that was compiled ahead of time."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
(PINNED,) = re.findall(r"^triton==(\S+)", CONSTRAINTS.read_text(), re.MULTILINE)
# What one program may have of it
DEVICE_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def stack_bytes(compiled: Any) -> int:
    """Local memory of the machine code: where spilled registers go."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage).group(1))  # type: ignore[union-attr]


def check_memory(compiled: Any, shared: int | None = None, stack: int = 0, case: object = "") -> None:
    """At most so many bytes; those are bounds of what the pinned Triton compiles: by another it must fit the device."""
    made = compiled.metadata
    is_pinned = triton.__version__ == PINNED
    most = shared if is_pinned and shared is not None else DEVICE_SHARED[made.target.arch]
    assert made.shared <= most, f"{made.name} {case}: {made.shared} bytes of shared memory, {most} allowed"
    if is_pinned:
        found = stack_bytes(compiled)
        assert found <= stack, f"{made.name} {case}: {found} bytes of stack, {stack} allowed"

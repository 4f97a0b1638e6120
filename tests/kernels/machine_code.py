"""What ptxas made of a kernel that was compiled ahead of time."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton


def stack_bytes(compiled: Any) -> int:
    """Local memory of the machine code: where spilled registers go."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage).group(1))  # type: ignore[union-attr]

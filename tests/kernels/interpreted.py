"""Run a test file as a script under Triton's interpreter, in a process of its own: Triton decides at import."""

import os
import subprocess
import sys
from pathlib import Path


def interpreted(file: str, *args: str) -> int:
    """How many times the file printed "ok "; raises AssertionError with its output where it fails."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    path = [str(Path(file).parent), str(Path(file).parents[1] / "support"), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(path)
    done = subprocess.run([sys.executable, file, *args], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.count("ok ")

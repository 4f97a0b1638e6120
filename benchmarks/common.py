"""What every benchmark shares: the machine's description, tables, JSON files, fresh processes."""

import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "transformers", "flash-linear-attention", "liger-kernel", "fla-compile")


def environment(device: str = "cpu") -> dict[str, Any]:
    """Device, versions and date, as every result file records them."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, {torch.get_num_threads()} threads"
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"device": name, "python": platform.python_version(), "versions": versions, "date": date}


def skip_autotuning() -> None:
    """Let fla's kernels run in their first configuration, as its parity tests do: tuning takes minutes an op."""
    sys.path.append(str(ROOT / "tests"))
    importlib.import_module("support.peers").skip_autotuning()


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def save(name: str, device: str, section: str, rows: Any, arguments: dict[str, Any] | None = None) -> Path:
    """Put `rows` in benchmarks/results/`name`.json under `section`, beside the sections already there."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    results[section] = {"environment": environment(device), "arguments": arguments or {}, "rows": rows}
    whole = path.with_suffix(".new")  # a run that is cut off while it writes must not cost the results before it
    whole.write_text(json.dumps(results, indent=1, default=str) + "\n")
    whole.replace(path)
    return path


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same keys as an aligned Markdown table; floats to three significant digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([text(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def median_seconds(f: Callable[[], Any], *, most: int = 5, limit: float = 20.0) -> float:
    """Median of up to `most` runs after one to warm up, none begun once `limit` seconds are spent."""
    f()
    seconds: list[float] = []
    while not seconds or (len(seconds) < most and sum(seconds) < limit):
        start = time.perf_counter()
        f()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]


def fresh_process(script: str, arguments: Iterable[str], *, limit: float, env: dict[str, str] | None = None) -> Any:
    """Run `script` in a process of its own and return the JSON of its last line, or None past `limit` seconds.

    Raises RuntimeError with the end of its standard error if it fails.
    """
    command = [sys.executable, script, *arguments]
    process = subprocess.Popen(
        command, env=os.environ | (env or {}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the compile workers that it started
        process.communicate()
        return None
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{err[-2000:]}")
    return json.loads(out.strip().splitlines()[-1])

"""The README says what is true: its example runs, its tables are the program's own."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from fla_compile.options import Options
from fla_compile.passes.loop_analysis import REASONS as NOT_LIFTED
from fla_compile.passes.loop_analysis import SILENT
from fla_compile.passes.records import REASONS
from fla_compile.passes.recurrence import EQUATIONS

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def rows(heading):
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def test_example_runs(tmp_path):
    example = tmp_path / "example.py"
    example.write_text(re.search(r"```python\n(.*?)```", README, re.S).group(1))
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 rewritten, 0 refused" in done.stdout and "| gla" in done.stdout


def test_refusals():
    expected = {name: text for name, text in {**NOT_LIFTED, **REASONS}.items() if name not in SILENT}
    assert {name.strip("`"): text for name, text in rows("Refusals")} == expected


def test_options():
    assert [(name.strip("`"), default.strip("`")) for name, default, _ in rows("Options")] == [
        (f.name, "{}" if f.name == "inductor" else repr(getattr(Options(), f.name))) for f in fields(Options)
    ]


def test_families_that_run():
    running = [name.strip("`") for name, _, runs in rows("What is recognised") if runs.startswith("yes")]
    assert running == list(EQUATIONS)

"""One set of records, told to people, logs, tlparse and as a page."""

import ast
import logging
import os
import subprocess
import sys

import pytest
import torch
from programs import operands

from fla_compile import Report, explain
from fla_compile.passes.records import Refusal, Refused, Rewrite
from fla_compile.report import emit_report

REWRITE = Rewrite("recurrence", "gla", "S' = diag(a_t) S + k v^T", "chunk", "model.py:12", 20, 9)
REFUSAL = Refusal("recurrence", "not_affine", "S < S & S", "model.py:30")
REPORT = Report((REWRITE,), (REFUSAL,), "a = 1 < 2", "b = 2", 0.125)


def recur(q, k, v):
    S, o = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * 0.9 + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o


def test_table():
    assert str(REPORT).splitlines() == [
        "1 rewritten, 1 refused",
        "source      | pattern    | family | equation                 | kernel | nodes",
        "------------+------------+--------+--------------------------+--------+--------",
        "model.py:12 | recurrence | gla    | S' = diag(a_t) S + k v^T | chunk  | 20 -> 9",
        "validation: 0.12 s",
        "source      | pattern    | refused because | detail",
        "------------+------------+-----------------+----------",
        "model.py:30 | recurrence | not_affine      | S < S & S",
    ]
    assert str(Report((), ())) == "0 rewritten, 0 refused"


def test_graphs_are_python():
    report = explain(recur, *operands("bthk bthk bthv"))
    for which in ("before", "after"):
        (module,) = ast.parse(report.graph(which)).body
        assert isinstance(module, ast.ClassDef) and any(isinstance(x, ast.FunctionDef) for x in module.body)
    assert "higher_order.scan" in report.graph("before") and "fla_compile.retention" in report.graph("after")
    (rewrite,) = report.rewrites
    assert rewrite.nodes_before > rewrite.nodes_after > 0
    with pytest.raises(ValueError, match="'before' or 'after', got 'middle'"):
        report.graph("middle")


def test_page(tmp_path):
    path = REPORT.to_html(tmp_path / "report.html")
    text = path.read_text()
    assert path == tmp_path / "report.html"
    for words in ("1 rewritten, 1 refused", "model.py:12", "gla", "S &lt; S &amp; S", "a = 1 &lt; 2", "b = 2"):
        assert words in text
    assert REPORT.to_html(str(tmp_path / "other.html")).read_text() == text
    assert "<table>" not in Report((), ()).to_html(tmp_path / "empty.html").read_text()


def test_log(caplog):
    with caplog.at_level(logging.DEBUG, "fla_compile"):
        emit_report(REPORT)
        emit_report(Report((), ()))
    messages = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "fla_compile"]
    assert messages == [("INFO", str(REPORT)), ("DEBUG", "graph after:\nb = 2")]


def test_tlparse(monkeypatch):
    seen = []

    def trace_structured(name, metadata_fn, payload_fn):
        seen.append((name, metadata_fn(), payload_fn()))

    monkeypatch.setattr("torch._logging.trace_structured", trace_structured)
    emit_report(REPORT)
    assert seen == [("artifact", {"name": "fla_compile_report", "encoding": "string"}, str(REPORT))]


def test_torch_logs(tmp_path):
    """TORCH_LOGS="+fla_compile" in a process of its own, as a user would."""
    program = tmp_path / "program.py"
    program.write_text(
        "from fla_compile.report import Report, emit_report\n"
        "from fla_compile.passes.records import Refusal\n"
        "from torch._logging._internal import log_state\n"
        "print(len(log_state.log_qname_to_level))\n"
        "emit_report(Report((), (Refusal('recurrence', 'not_affine', 'S * S', 'model.py:30'),), 'a', 'b'))\n"
    )
    env = os.environ | {"TORCH_LOGS": "+fla_compile"}
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0 rewritten, 1 refused" in done.stderr and "model.py:30" in done.stderr and "graph after" in done.stderr
    # Torch walks the package for loggers: what else lies in a checkout must not be found through it.
    assert int(done.stdout) < 100


def test_refused_becomes_a_record():
    error = Refused("not_affine", "S * S", "a.py:1")
    assert error.record("recurrence", "b.py:2") == Refusal("recurrence", "not_affine", "S * S", "a.py:1")
    assert Refused("x", "y").record("recurrence", "b.py:2").source == "b.py:2"
    assert str(error) == "not_affine: S * S (a.py:1)"

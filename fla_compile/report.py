"""What was rewritten and what was refused, for people, logs, tlparse and tests: all from the same records."""

import html
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fla_compile.passes.pipeline import Result
from fla_compile.passes.records import Refusal, Rewrite

log = logging.getLogger("fla_compile")


@dataclass(frozen=True)
class Report:
    """`rewrites` and `refusals` of one captured graph; `str()` is the table a person reads."""

    rewrites: tuple[Rewrite, ...]
    refusals: tuple[Refusal, ...]
    before: str = ""
    after: str = ""
    validation_seconds: float = 0.0

    @classmethod
    def of(cls, result: Result, refusals: tuple[Refusal, ...]) -> "Report":
        return cls(result.rewrites, refusals, result.before, result.after, result.validation_seconds)

    def graph(self, which: str) -> str:
        """The graph "before" or "after" the passes, as Python source."""
        if which not in ("before", "after"):
            raise ValueError(f"which must be 'before' or 'after', got {which!r}")
        return self.before if which == "before" else self.after

    def __str__(self) -> str:
        lines = [f"{len(self.rewrites)} rewritten, {len(self.refusals)} refused"]
        if self.rewrites:
            rows = [
                (r.source, r.pattern, r.family, r.equation, r.kernel, f"{r.nodes_before} -> {r.nodes_after}")
                for r in self.rewrites
            ]
            lines += _table(("source", "pattern", "family", "equation", "kernel", "nodes"), rows)
            lines.append(f"validation: {self.validation_seconds:.2f} s")
        if self.refusals:
            lines += _table(
                ("source", "pattern", "refused because", "detail"),
                [(r.source, r.pattern, r.reason, r.detail) for r in self.refusals],
            )
        return "\n".join(lines)

    def to_html(self, path: str | Path) -> Path:
        """Write the report, with both graphs, as one HTML page; returns its path."""
        parts = ["<!doctype html><meta charset='utf-8'><title>fla_compile report</title>", _STYLE]
        parts.append(f"<h1>{len(self.rewrites)} rewritten, {len(self.refusals)} refused</h1>")
        parts.append(_html_table(Rewrite, self.rewrites) + _html_table(Refusal, self.refusals))
        for which in ("before", "after"):
            source = html.escape(self.graph(which))
            parts.append(f"<details><summary>graph {which}</summary><pre>{source}</pre></details>")
        target = Path(path)
        target.write_text("\n".join(parts), encoding="utf-8")
        return target


_STYLE = """<style>body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:75em;padding:0 1em}
table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left}
pre{overflow-x:auto;background:#f6f6f6;padding:1em}</style>"""


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    text = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return [text[0].rstrip(), "-+-".join("-" * width for width in widths), *(line.rstrip() for line in text[1:])]


def _html_table(kind: type, records: tuple[Rewrite, ...] | tuple[Refusal, ...]) -> str:
    if not records:
        return ""
    names = list(kind.__dataclass_fields__)  # type: ignore[attr-defined]
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in names)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(getattr(r, name)))}</td>" for name in names) + "</tr>" for r in records
    )
    return f"<table><tr>{head}</tr>{rows}</table>"


def emit_report(report: Report) -> None:
    """Send a report to `TORCH_LOGS="+fla_compile"` and to tlparse."""
    from torch._logging import trace_structured

    if not report.rewrites and not report.refusals:
        return
    text = str(report)
    log.info("%s", text)
    log.debug("graph after:\n%s", report.after)
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "fla_compile_report", "encoding": "string"},
        payload_fn=lambda: text,
    )

"""What the passes did and what they refused, as frozen records: reports, logs and tests all read these."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rewrite:
    """One pattern that was recognised and replaced.

    `source` is the user's "file.py:12"; `nodes_before` and `nodes_after` count graph nodes.
    """

    pattern: str
    family: str
    equation: str
    kernel: str
    source: str
    nodes_before: int
    nodes_after: int


@dataclass(frozen=True)
class Refusal:
    """One candidate that was left as the user wrote it; `reason` is from the README's stable list."""

    pattern: str
    reason: str
    detail: str
    source: str


class Refused(Exception):
    """Raised inside a pass to leave a candidate alone; the pass turns it into a `Refusal`."""

    def __init__(self, reason: str, detail: str, source: str = ""):
        super().__init__(f"{reason}: {detail}" + (f" ({source})" if source else ""))
        self.reason, self.detail, self.source = reason, detail, source

    def record(self, pattern: str, source: str = "") -> Refusal:
        return Refusal(pattern, self.reason, self.detail, self.source or source)

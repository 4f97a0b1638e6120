"""What the passes did and what they refused, as frozen records: reports, logs and tests all read these."""

from dataclasses import dataclass

# Why a captured loop is refused; `loop_analysis.REASONS` says why a loop is not captured. README has both as one table.
REASONS = {
    "not_captured": "Dynamo cannot trace the loop's body as one step.",
    "graph_break": "The program is captured in pieces; only the first is explained.",
    "unsupported_op": "An operation without a rule is applied to the state.",
    "not_affine": "The update is not affine in the state.",
    "unknown_recurrence": "The update is affine, but of no family that we know.",
    "not_outer_product": "What the update writes is not one outer product of a key and a value.",
    "decay_sign_unknown": "Nothing shows that a decay which needs a gradient is positive.",
    "random_in_loop": "The loop draws random numbers.",
    "intermediate_used": "A value inside the pattern, which the kernel never forms, is used elsewhere too.",
    "logits_used": "Logits, or a part of their loss, are used elsewhere too, so they are computed anyway.",
    "unsupported_loss": "What is made of the logits is no loss that a kernel computes.",
    "teacher_gradient": "Both layers of a distillation loss take a gradient; the kernel gives the student's alone.",
    "not_causal": "A convolution is padded as a causal one is, but other steps of it are kept.",
    "no_kernel": "The recurrence is known, but no kernel of ours takes it.",
    "validation_failed": "Loop and kernel gave different numbers on random data; please report it.",
}


@dataclass(frozen=True)
class Rewrite:
    """One pattern that was recognised and replaced.

    `source` is the user's "file.py:12"; `nodes_before` and `nodes_after` count graph nodes. A loop of no known family
    has the family "generic", and a refusal beside this record says why.
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

"""Find the time loops of a graph and run each as a kernel.

Before: `scan(body, states, reads, invariants)` nodes, from lifted loops or written by the user.
After: for each loop that is a recurrence of a known family, the nodes of `lower_recurrence` in its place; for a loop
of one step, the step.
Refused: everything that `normalise`, `classify` or `validate` refuses, with the reason and the user's line; the graph
then keeps its scan, and the caller decides what becomes of it.
"""

import logging
import time
from dataclasses import dataclass, field

from torch import fx

from fla_compile.passes.autocast import entered, regions_at
from fla_compile.passes.classify import KernelOf, classify
from fla_compile.passes.log_decay import Log, constant_value, op_name
from fla_compile.passes.lower import Lowered, lower
from fla_compile.passes.lower_step import KERNEL, lower_step
from fla_compile.passes.normalise import normalise, trace_step
from fla_compile.passes.places import short_source, source_of
from fla_compile.passes.proofs import log_of_outer, prover
from fla_compile.passes.records import Refusal, Refused, Rewrite
from fla_compile.passes.recurrence import EQUATIONS, Plan
from fla_compile.passes.scans import Scan, check_memory, identities, inner_scans, scan_nodes, signature, take_apart
from fla_compile.passes.splice import splice
from fla_compile.passes.validate import STEPS, Claim, validate

log = logging.getLogger("fla_compile")

# What cuts gradients without an operation that the normal form would see, by the name of its node.
UNSEEN = {"data": ".data", "_set_grad_enabled": "torch.no_grad", "_enter_inference_mode": "torch.inference_mode"}


@dataclass
class Found:
    """What the pass did: rewrites, refusals beside the scan that each of them leaves in the graph, and refusals of
    loops that were rewritten all the same, as loops."""

    rewrites: list[Rewrite] = field(default_factory=list)
    refusals: list[tuple[Refusal, Scan]] = field(default_factory=list)
    looped: list[Refusal] = field(default_factory=list)
    validation_seconds: float = 0.0


@dataclass(frozen=True)
class Recognised:
    """A scan that is understood, with all that can be used again for a scan with the same signature."""

    plan: Plan
    lowered: Lowered


@dataclass
class Known:
    """What was recognised in a graph, by signature: layers that are alike are recognised once."""

    found: dict[tuple, Recognised] = field(default_factory=dict)

    def like(self, scan: Scan, key: tuple | None) -> tuple[Recognised, dict[int, Log]] | None:
        """An earlier result under this signature that holds for this scan too, with the proofs that it needs."""
        recognised = self.found.get(key) if key is not None else None
        if recognised is None:
            return None
        outer = {index: log_of_outer(scan.operands[index]) for index in recognised.lowered.logs}
        proofs = {index: log for index, log in outer.items() if log is not None}
        return (recognised, proofs) if len(proofs) == len(outer) else None


def check(scan: Scan, lowered: Lowered) -> None:
    fakes = [node.meta["example_value"] for node in scan.body.graph.find_nodes(op="placeholder")]
    fixed = {}
    for index in (*lowered.logs, *identities(scan)):
        value = constant_value(scan.operands[index])
        if value is not None:
            fixed[index] = value

    def pure() -> fx.GraphModule:
        return trace_step(scan.body, entered(regions_at(scan.node)))

    states, reads, steps = len(scan.init), len(scan.reads), 1 if scan.single else STEPS
    validate(Claim(scan.body, lowered.module, fakes, states, reads, lowered.logs, fixed, scan.zero_init, pure, steps))


def recognise(
    scan: Scan, found: "Found", known: Known, kernel: KernelOf, validated: bool
) -> tuple[Recognised, dict[int, Log]]:
    """What the scan is, and the proofs found outside of it by operand; raises `Refused`."""
    check_memory(scan)
    if inner_scans(scan.body):
        raise Refused("unknown_recurrence", "the loop has another loop inside")
    key = signature(scan)
    earlier = known.like(scan, key)
    if earlier is not None:
        return earlier
    try:
        plan, lowered, outer = understood(scan, found, kernel, validated)
    except Refused as refused:
        if refused.reason != "validation_failed":
            raise
        log.warning("%s: recurrence refused: %s: %s", short_source(scan.place), refused.reason, refused.detail)
        plan, lowered, outer = understood(scan, found, kernel, validated, looped=refused)
    recognised = Recognised(plan, lowered)
    if key is not None:
        known.found[key] = recognised
    return recognised, outer


def understood(
    scan: Scan, found: "Found", kernel: KernelOf, validated: bool, looped: Refused | None = None
) -> tuple[Plan, Lowered, dict[int, Log]]:
    """Normalise, classify, lower and check; with `looped`, the reason, all states stay in loops."""
    for node in scan.body.graph.nodes:
        if op_name(node) in UNSEEN:
            raise Refused(
                "unsupported_op", f"{UNSEEN[op_name(node)]} cuts gradients unseen", short_source(source_of(node))
            )
    step = normalise(scan.body, len(scan.init), len(scan.reads), entered(regions_at(scan.node)), identities(scan))
    prove, outer = prover(step, scan)
    plan = classify(step, prove, (lambda *_: KERNEL) if scan.single else kernel, looped)
    try:
        lowered = lower_step(step) if scan.single else lower(step, plan, scan.zero_init, sorted(outer))
    except Refused:
        raise
    except Exception as error:
        # A mistake of ours must not cost the user the program.
        raise Refused("validation_failed", f"cannot be lowered: {type(error).__name__}: {error}") from error
    if validated:
        start = time.perf_counter()
        check(scan, lowered)
        found.validation_seconds += time.perf_counter() - start
    return plan, lowered, outer


def match_recurrences(
    gm: fx.GraphModule, *, validated: bool = True, kernel: KernelOf, known: Known | None = None
) -> Found:
    """Rewrite every recognised scan of `gm`, in place; `kernel` names what runs a stage or raises `Refused`."""
    found = Found()
    for node in scan_nodes(gm):
        scan = take_apart(gm, node)
        source = short_source(scan.place)
        try:
            recognised, outer = recognise(scan, found, known or Known(), kernel, validated)
        except Refused as refused:
            found.refusals.append((refused.record("recurrence", source), scan))
            continue
        plan = recognised.plan
        before = 1 + len(scan.body.graph.nodes)
        after = splice(gm, scan, recognised.lowered, outer)
        family = " + ".join(plan.families) or "elementwise"
        kernels = KERNEL if scan.single else " + ".join(plan.kernels) or "parallel"
        equation = "; ".join(EQUATIONS[name] for name in plan.families)
        found.rewrites.append(Rewrite("recurrence", family, equation, kernels, source, before, after))
        found.looped += [stage.why.record("recurrence", source) for stage in plan.generic]
    if found.rewrites:
        gm.graph.lint()
        gm.recompile()
    return found

"""What a generated program computes: a family, its axes, and what else the recurrence has."""

from dataclasses import dataclass, replace

from generator_spelling import Pick

MATRIX = ("linear_attention", "retention", "simple_gla", "gla", "rwkv6")
DELTA = ("delta_rule", "gated_delta_rule", "kda", "dplr")
OTHER = ("linear_scan", "selective_scan", "abc")

# Decays in (0, 1) of any x; `{a}` is a weight over heads.
GATES = (
    "torch.sigmoid({x})",
    "{x}.sigmoid()",
    "torch.exp(-F.softplus({x}))",
    "torch.exp(F.logsigmoid({x}))",
    "(F.logsigmoid({x}) / 16).exp()",
    "torch.exp(-{x}.exp())",
    "(1 - torch.sigmoid({x}))",
    "torch.exp(-{x}.abs())",
    "torch.sigmoid({x}) ** 0.5",
    "torch.exp2(-F.softplus({x}))",
    "torch.sqrt(torch.sigmoid({x}))",
    "torch.special.expit({x})",
)
FEATURES = ("{x}",) * 3 + ("F.silu({x})", "(F.elu({x}) + 1)", "torch.softmax({x}, -1)", "F.normalize({x}, dim=-1)")
POSITIVE = ("torch.exp({x})", "(F.elu({x}) + 1)", "torch.softmax({x}, -1)", "(F.relu({x}) + 0.5)")


@dataclass(frozen=True)
class Spec:
    """What is computed: `decays` are the axes of each gate, "c" for a number, "w" for a weight without time."""

    family: str
    lead: str
    decays: tuple[str, ...] = ()
    before: bool = False
    bonus: bool = False
    normaliser: bool = False
    tied: bool = False
    initial: bool = False
    final: bool = True
    groups: bool = False
    scale: str = "none"
    dtype: str = "float64"


def draw_spec(pick: Pick, families: tuple[str, ...] = MATRIX + DELTA + OTHER) -> Spec:
    """A specification; whatever is drawn is legal."""
    family = pick(*families)
    lead = pick("bh", "bh", "bh", "b", "h", "")
    spec = Spec(
        family,
        lead,
        initial=pick(False, False, True),
        final=pick(True, False),
        scale=pick("none", "none", "q", "k", "out"),
        dtype=pick("float64", "float64", "float32"),
    )
    if family == "linear_attention":
        return replace(spec, **_reads(pick, spec, True))
    if family == "retention":
        return replace(spec, decays=(pick("c", "w" if "h" in lead else "c"),), **_reads(pick, spec, True))
    if family == "simple_gla":
        return replace(spec, decays=(lead,), **_reads(pick, spec, True))
    if family in ("gla", "rwkv6"):
        decays = pick((lead + "k",), (lead + "v",), (lead + "k", lead + "v"), (lead + "k", lead))
        if family == "rwkv6":
            bonus = pick(True, False)
            return replace(spec, decays=(lead + "k",), before=True, bonus=bonus)
        keys = decays == (lead + "k",)
        return replace(spec, decays=decays, tied=keys and pick(False, False, True), **_reads(pick, spec, keys))
    if family in DELTA:
        decays = {
            "delta_rule": (),
            "gated_delta_rule": (pick(lead, lead, "c"),),
            "kda": (lead + "k",),
            "dplr": pick((lead + "k",), (lead,)),
        }[family]
        return replace(spec, decays=decays, before=pick(False, False, True))
    if family == "linear_scan":
        return replace(spec, decays=(lead + "v",), tied=pick(False, True))
    return replace(spec, lead="bh" if family == "abc" and lead == "h" else lead, scale="none")


def _reads(pick: Pick, spec: Spec, keys: bool) -> dict:
    normaliser = keys and pick(*[False] * 5, True)
    grouped = "h" in spec.lead and pick(*[False] * 7, True)
    return {
        "normaliser": normaliser,
        "groups": grouped and not normaliser,
        "before": not normaliser and pick(False, False, False, True),
    }

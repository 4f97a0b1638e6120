"""The options of `torch.compile(model, backend="fla", options={...})`; README has the same table."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

PASSES = (
    "lift", "recurrence", "parallel_attention", "short_conv", "norm_gate", "linear_kl_div", "linear_cross_entropy",
    "cross_entropy",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """`lift`: capture time loops as one scan. `validate`: check rewrites numerically. `strict`: refusals raise.
    `disable`: passes to leave out. `inductor`: options for the rest of the graph."""

    lift: bool = True
    validate: bool = True
    strict: bool = False
    disable: tuple[str, ...] = ()
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> "Options":
        """Raises ValueError naming the option, the value and what is allowed."""
        given = dict(given or {})
        names = [f.name for f in fields(cls)]
        for name in given:
            if name not in names:
                raise ValueError(f"option {name!r} is unknown to backend 'fla'; it has {', '.join(names)}")
        for name in ("lift", "validate", "strict"):
            if name in given and not isinstance(given[name], bool):
                raise ValueError(f"option {name!r} must be True or False, got {given[name]!r}")
        if "disable" in given:
            wanted = given["disable"]
            if isinstance(wanted, str) or not all(isinstance(w, str) for w in wanted):
                raise ValueError(f"option 'disable' must be names of passes, got {wanted!r}")
            for name in wanted:
                if name not in PASSES:
                    raise ValueError(f"option 'disable' names {name!r}; the passes are {', '.join(PASSES)}")
            given["disable"] = tuple(wanted)
        if "inductor" in given and not isinstance(given["inductor"], Mapping):
            raise ValueError(f"option 'inductor' must be a mapping, got {given['inductor']!r}")
        return cls(**given)

    def runs(self, name: str) -> bool:
        if name in self.disable:
            return False
        # A scan that no pass takes cannot be trained under Inductor: without `recurrence` nothing is lifted.
        return name != "lift" or (self.lift and "recurrence" not in self.disable)

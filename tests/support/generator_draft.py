"""A program under construction: its arguments, and the statements before, in and after its loop."""

from dataclasses import dataclass, field

from generator_spelling import Pick, Speller, Tensor

SIZES = {"b": 2, "t": 5, "h": 2, "g": 2, "k": 3, "v": 4, "m": 3}
FEATURES = "gkvm"
WRAPS = ("function", "function", "helper", "module", "method", "cell")
MODULES = ("module", "method", "cell")
HELPERS = ("helper", "method", "cell")
# How a helper hands the states on: as results, in place, or in a container that it stores into.
CALLS = ("returned", "returned", "copied", "dict", "list")
# How the loop is written; `STREAMED` forms name a step of each tensor in their heads, "zip" has no index.
INDEXED = ("from_zero", "measured", "while", "reversed", "backwards")
STREAMED = ("unbind", "enumerate", "zip")
FORMS = ("range",) * 3 + INDEXED + STREAMED


@dataclass(frozen=True)
class Line:
    """A statement; `pure` is what it says without writing in place."""

    text: str
    pure: str


def line(text: str, pure: str | None = None) -> Line:
    return Line(text, text if pure is None else pure)


@dataclass(frozen=True)
class Argument:
    """An operand of the program; `linear` is the weight of an `nn.Linear`."""

    axes: str
    linear: bool = False


@dataclass
class Draft:
    """`setup` and `init`; the loop over `ready`, `update` and `read` (or `read` first), `store`; `finish`.

    `timed` are the axes of all tensors with time, `steps` the reads of one step that have a name. `call` is one of
    CALLS; a helper that returns no state may be called in a comprehension.
    """

    pick: Pick
    wrap: str
    form: str
    layout: str
    dtype: str
    before: bool
    spell: Speller
    index: str = "t"
    sizes: dict[str, int] = field(default_factory=lambda: dict(SIZES))
    arguments: dict[str, Argument] = field(default_factory=dict)
    weights: dict[str, Argument] = field(default_factory=dict)
    timed: dict[str, str] = field(default_factory=dict)
    steps: dict[str, str] = field(default_factory=dict)
    states: list[str] = field(default_factory=list)
    returns: list[str] = field(default_factory=list)
    setup: list[Line] = field(default_factory=list)
    init: list[Line] = field(default_factory=list)
    ready: list[Line] = field(default_factory=list)
    update: list[Line] = field(default_factory=list)
    read: list[Line] = field(default_factory=list)
    store: list[Line] = field(default_factory=list)
    finish: list[Line] = field(default_factory=list)
    call: str = "returned"
    comprehend: bool = False

    def __post_init__(self) -> None:
        if self.wrap in HELPERS:
            self.call = self.pick(*CALLS)
            self.comprehend = self.call != "returned" and self.form != "while" and self.pick(False, True)

    def operand(self, name: str, axes: str) -> str:
        """A new argument with time; `axes` are those of one step."""
        lead = "".join(a for a in self.layout if a == "t" or a in axes)
        full = lead + "".join(a for a in axes if a in FEATURES)
        if axes and axes[-1] in FEATURES and self.pick(*[False] * 7, True):
            full = full.replace("t", "") + "t"
        self.arguments[name] = Argument(full)
        self.timed[name] = full
        return name

    def weight(self, name: str, axes: str, linear: bool = False) -> Tensor:
        """A new argument without time; a parameter where the program is a module."""
        self.weights[name] = Argument(axes, linear)
        return Tensor(f"self.{name}" if self.wrap in MODULES else name, axes)

    def precomputed(self, name: str, source: str, text: str) -> str:
        """A tensor with time made from another before the loop."""
        self.setup.append(line(f"{name} = {text}"))
        self.timed[name] = self.timed[source]
        return name

    def step_of(self, name: str) -> Tensor:
        """One step of a tensor with time, by name or as it is read."""
        full, own = self.timed[name], f"{name}_t"
        axes = full.replace("t", "")
        if own not in self.steps:
            read = self.subscript(name, full)
            named = self.wrap in HELPERS or self.form in STREAMED
            if not named and self.pick(False, True):
                return Tensor(read, axes)
            self.steps[own] = read
        return Tensor(own, axes)

    def subscript(self, name: str, full: str) -> str:
        at, behind = full.index("t"), len(full) - 1 - full.index("t")
        front = [":"] * at + [self.index]
        forms = [", ".join(front), ", ".join(["...", self.index] + [":"] * behind)]
        if behind:
            forms.append(", ".join(front + [":"] * behind))
        return f"{name}[{self.pick(*forms)}]"

    def zeros(self, axes: str, like: str) -> str:
        sizes = ", ".join(a.upper() for a in axes)
        if not axes:
            return self.pick(f"{like}.new_zeros(())", f"torch.zeros((), dtype={like}.dtype)")
        return self.pick(
            f"{like}.new_zeros({sizes})",
            f"torch.zeros({sizes}, dtype={like}.dtype)",
            f"torch.zeros(({sizes},), dtype={like}.dtype, device={like}.device)",
        )

    def collect(self, y: str, axes: str, like: str) -> None:
        """Gather the tensor `y` of every step; the program returns it with time somewhere."""
        name, at = self.spell.fresh("o"), self.pick(*range(len(axes) + 1))
        form = self.pick("buffer", "buffer", "append", "append", "cat", "plus", "grown")
        if form == "buffer" and self.form == "zip":
            form = "append"
        full = axes[:at] + "t" + axes[at:]
        if form == "buffer":
            empty = f"{like}.new_empty({', '.join(a.upper() for a in full)})"
            self.init.append(line(f"{name} = {self.pick(self.zeros(full, like), empty)}"))
            self.store.append(line(f"{self.subscript(name, full)} = {y}"))
            self.returns.append(name)
            return
        if form == "grown":
            none = ", ".join("0" if a == "t" else a.upper() for a in full)
            self.init.append(line(f"{name} = {like}.new_zeros({none})"))
            self.store.append(line(f"{name} = torch.cat([{name}, {y}.unsqueeze({at})], {at})"))
            self.returns.append(name)
            return
        self.init.append(line(f"{name} = []"))
        at = self.pick(at, at - len(axes) - 1)
        y = f"{y}.unsqueeze({at})" if form == "cat" else y
        self.store.append(line(f"{name} += [{y}]" if form == "plus" else f"{name}.append({y})"))
        join = f"torch.cat({name}, {at})" if form == "cat" else f"torch.stack({name}, dim={at})"
        if self.pick(True, False):
            self.finish.append(line(f"{name} = {join}"))
            join = name
        self.returns.append(join)

"""Near misses: one edit that makes a program no member of its family, and what its step may then still be.

Whatever becomes of the program, it must give eager's values and gradients.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from generator_draft import line
from generator_families import Builder
from generator_specs import DELTA, MATRIX, OTHER, Spec, draw_spec
from generator_spelling import Pick, Tensor

ALL = (*MATRIX, *DELTA, *OTHER)
OUTER = ("function", "module")  # the step stands in the loop itself


@dataclass(frozen=True)
class Edit:
    """`change` rewrites the draft; `wraps` are where its statements may stand, `heads` whether it needs heads."""

    change: Callable[[Builder, str], None]
    families: tuple[str, ...] = ALL
    wraps: tuple[str, ...] = ()
    heads: bool = False
    fullgraph: bool = True
    square: bool = False

    def spec(self, pick: Pick) -> Spec:
        spec = draw_spec(pick, self.families)
        return replace(spec, lead="bh", decays=tuple(_with_heads(spec, d) for d in spec.decays)) if self.heads else spec


def _with_heads(spec: Spec, decay: str) -> str:
    return decay if decay in ("c", "w") else "bh" + "".join(a for a in decay if a in "kvm")


EDITS: dict[str, Edit] = {}


def edit(**limits) -> Callable:
    def add(change: Callable[[Builder, str], None]) -> Callable:
        EDITS[change.__name__] = Edit(change, **limits)
        return change

    return add


def appended(*texts: str) -> Callable[[Builder, str], None]:
    """One of these statements behind the update; {S} is the state."""

    def change(b: Builder, S: str) -> None:
        b.draft.update.append(line(b.pick(*texts).format(S=S)))

    return change


def _statements(name: str, *texts: str, **limits) -> None:
    EDITS[name] = Edit(appended(*texts), **limits)


_statements(
    "nonlinear", "{S} = torch.tanh({S})", "{S} = F.relu({S})", "{S} = {S}.clamp(-1, 1)", "{S} = {S}.abs()",
    "{S} = torch.where({S} > 0, {S}, 0.5 * {S})", "{S} = F.silu({S})", "{S} = {S} * torch.sigmoid({S})",
)  # fmt: skip
_statements(
    "own_norm", "{S} = {S} / (1 + {S}.norm())", "{S} = F.normalize({S} + 1, dim=-1)",
    "{S} = {S} / {S}.abs().amax().clamp(min=1.0)", "{S} = {S} * torch.rsqrt({S}.pow(2).mean(-1, keepdim=True) + 1)",
)  # fmt: skip
_statements(
    "decay_from_state", "{S} = {S} * torch.sigmoid({S}.mean())",
    "{S} = {S} * torch.exp(-{S}.sum(-1, keepdim=True).abs())",
)  # fmt: skip
_statements("squared", "{S} = 0.1 * {S} * {S}", "{S} = {S} * torch.cos({S})", "{S} = {S} ** 2 / (1 + {S} ** 2)")
_statements(
    "random", "{S} = F.dropout({S}, 0.5)", "{S} = {S} + 0.1 * torch.randn_like({S})",
    "{S} = {S} * torch.bernoulli(torch.full_like({S}, 0.5))",
)  # fmt: skip
_statements(
    "detached", "{S} = {S}.detach()", "{S} = 0.5 * {S} + 0.5 * {S}.detach()", "{S} = {S} + ({S}.detach() - {S})",
    "with torch.no_grad():\n    {S} = {S} * 0.5",
)  # fmt: skip
_statements("data_branch", "if {S}.sum() > 0:\n    {S} = {S} * 0.5", fullgraph=False)
_statements("data_where", "{S} = torch.where({S}.sum() > 0, {S} * 0.5, {S})")
_statements("odd_number", "{S} = {S} * -0.9", "{S} = {S} * 0.0", "{S} = {S} * 1.5", "{S} = -{S}", "{S} = {S} + 0.1")
_statements("slice_written", "{S} = {S}.clone()\n{S}[..., 0] = 0.0", "{S} = {S}.clone()\n{S}[..., 0] *= 0.5")
_statements(
    "moved", "{S} = {S}.flip(-1)", "{S} = {S}.roll(1, -1)", "{S} = {S}.reshape(-1).roll(1).reshape({S}.shape)",
    "{S} = torch.cumsum({S}, -1)", "{S} = {S} - {S}.mean(-1, keepdim=True)", "{S} = torch.sort({S}, -1).values",
)  # fmt: skip
_statements(
    "rounded", "{S} = {S}.to(torch.bfloat16).to({S}.dtype)", "{S} = {S}.to(torch.float16).to({S}.dtype)",
    "{S} = {S}.to(torch.float32).to({S}.dtype)",
)  # fmt: skip


def reader(*texts: str, **limits) -> Edit:
    """One of these statements behind the read-out; {S} is the state."""

    def change(b: Builder, S: str) -> None:
        b.draft.read.append(line(b.pick(*texts).format(S=S, i=b.draft.index)))

    return Edit(change, **limits)


EDITS["quadratic_read"] = reader("y = y + {S}.pow(2).sum()", "y = y * {S}.abs().sum()", "y = y + torch.tanh({S}).sum()")
EDITS["random_read"] = reader("y = F.dropout(y, 0.5)", "y = y + torch.rand_like(y)")
EDITS["read_mean"] = reader("y = y + {S}.mean()", "y = y + {S}.sum(-1).sum()", "y = y + {S}[0].sum()")


@edit(wraps=OUTER)
def early_exit(b: Builder, S: str) -> None:
    draft = b.draft
    draft.init = [line(x.text.replace("new_empty", "new_zeros")) for x in draft.init]  # some rows are never written
    # `continue` in a counted while would skip the count, and never end.
    leave = "break" if draft.form == "while" else b.pick("break", "continue")
    draft.read.append(line(f"if {draft.index} == 3:\n    {leave}"))


@edit(wraps=OUTER)
def index_used(b: Builder, S: str) -> None:
    i = b.draft.index
    texts = (
        "{S} = {S} * 0.9 ** {i}",
        "{S} = {S} * (0.5 if {i} % 2 == 0 else 0.9)",
        "if {i} == 2:\n    {S} = {S} * 0.5",
    )
    b.draft.update.append(line(b.pick(*texts).format(S=S, i=i)))


@edit(wraps=OUTER)
def own_output(b: Builder, S: str) -> None:
    draft, i = b.draft, b.draft.index
    if b.pick(True, False):
        draft.init.append(line("seen = []"))
        draft.read.append(line("y = y + (seen[-1] if seen else 0.0)\nseen.append(y)"))
    else:
        draft.init.append(line("seen = torch.zeros(T, dtype=v.dtype)"))
        draft.update.append(line(f"{S} = {S} + 0.1 * seen[{i} - 1]\nseen[{i}] = {S}.sum()"))


@edit(wraps=OUTER)
def state_kept(b: Builder, S: str) -> None:
    b.draft.init.append(line("seen = []"))
    b.draft.read.append(line(f"seen.append({S})"))
    b.draft.returns.append(b.pick("torch.stack(seen)", "sum(seen)", "seen[-2]", "torch.stack(seen)[1]"))


@edit(wraps=OUTER)
def last_output(b: Builder, S: str) -> None:
    b.draft.returns.append("y")


@edit()
def shifted_read(b: Builder, S: str) -> None:
    draft, i = b.draft, b.draft.index
    other = b.pick(f"{i} - 1", f"T - 1 - {i}", f"{i} // 2", f"({i} + 2) % T")
    reads = [n for n, read in draft.steps.items()]
    pattern = re.compile(rf"(\w+\[[^\]]*)\b{i}\b([^\]]*\])")
    if reads:
        name = b.pick(*reads)
        draft.steps[name] = pattern.sub(rf"\g<1>{other}\g<2>", draft.steps[name])
        return
    for part in (draft.ready, draft.update, draft.read):
        for at, statement in enumerate(part):
            if pattern.search(statement.text):
                texts = (statement.text, statement.pure)
                part[at] = line(*(pattern.sub(rf"\g<1>{other}\g<2>", x, count=1) for x in texts))
                return


@edit(families=(*MATRIX, *DELTA), square=True)
def transposed(b: Builder, S: str) -> None:
    b.draft.update.append(line(f"{S} = {S}.transpose({b.axes.index('k')}, {b.axes.index('v')}).contiguous()"))


@edit(families=(*MATRIX, *DELTA), heads=True)
def mixed(b: Builder, S: str) -> None:
    letter = b.pick("h", "k", "v")
    w = b.draft.weight("M", letter * 2)
    to = b.axes.replace(letter, "j")
    form = f"torch.einsum('{b.axes},{letter}j->{to}', {S}, {w.text})"
    b.draft.update.append(line(f"{S} = 0.5 * {form}"))


@edit(families=(*MATRIX, *DELTA))
def raw_decay(b: Builder, S: str) -> None:
    lead = b.spec.lead
    forms = ("{x}", "torch.tanh({x})", "torch.cos({x})", "({x} - 0.5)")
    raw = b.gate("raw", b.pick(lead, lead + "k", lead + "v"), forms)
    b.draft.update.insert(0, line(f"{S} = {b.spell.product(Tensor(S, b.axes), raw, b.axes).text}"))
    b.draft.update[:0] = [line(x) for x in b.spell.lines]
    b.spell.lines.clear()


@edit(families=(*MATRIX, *DELTA))
def joint_decay(b: Builder, S: str) -> None:
    gate = b.draft.step_of(b.draft.operand("joint", b.spec.lead + "kv"))
    b.draft.update.insert(0, line(f"{S} = {S} * torch.sigmoid({b.spell.permuted(gate, b.axes).text})"))


@edit(families=(*MATRIX, *DELTA))
def two_writes(b: Builder, S: str) -> None:
    k, v = b.source("k2", b.spec.lead + "k"), b.source("v2", b.spec.lead + "v")
    b.into(b.draft.update, f"{S} = {S} + {b.spell.product(k, v, b.axes).text}")


@edit(families=(*MATRIX, *DELTA))
def two_erases(b: Builder, S: str) -> None:
    spell, lead, state = b.spell, b.spec.lead, Tensor(S, b.axes)
    over = b.pick("k", "v", "v")
    w = b.source("w", lead + over)
    out = "".join(a for a in b.axes if a != over)
    seen = spell.contract(w, state, over, out)
    b.into(b.draft.update, f"{S} = {S} - 0.1 * {spell.product(w, seen, b.axes).text}")


@edit()
def alias_read(b: Builder, S: str) -> None:
    b.draft.update.insert(0, line(f"old = {S}"))
    text = "y = y + old.sum()"
    (b.draft.update if b.draft.before else b.draft.read).append(line(text))


@edit()
def alias_before_loop(b: Builder, S: str) -> None:
    b.draft.init.append(line(f"old = {S}"))
    b.draft.read.append(line("y = y + old.sum()"))


@edit(wraps=OUTER)
def previous_state(b: Builder, S: str) -> None:
    copied = b.pick(S, f"{S}.clone()", f"{S} * 1")
    b.draft.init.append(line(f"old = {S}.clone()"))
    b.draft.update.insert(0, line(f"old = {copied}"))
    b.draft.returns.append("old")


@edit(wraps=OUTER)
def input_written(b: Builder, S: str) -> None:
    draft, i = b.draft, b.draft.index
    names = [n for n in draft.timed if n in draft.arguments]
    name = b.pick(*names)
    draft.setup.insert(0, line(f"{name} = {name} * 1.0"))
    full = draft.timed[name]
    index = ", ".join([":"] * full.index("t") + [b.pick(i, f"({i} + 1) % T", f"{i} - 1")])
    place = f"{name}[{index}]"
    draft.ready.insert(0, line(b.pick(f"{place} *= 0.5", f"{place} = {place} * 0.5", f"{place}.mul_(0.5)")))

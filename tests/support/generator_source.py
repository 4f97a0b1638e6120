"""A draft as the text of a Python module: a function, a function with a helper, or modules, around one loop."""

import re

from generator_draft import HELPERS, MODULES, Draft, Line

IMPORTS = ["import einops", "import torch", "import torch.nn.functional as F", "from torch import nn", "", ""]


def source(draft: Draft, pure: bool = False) -> str:
    """The module's text, with a callable `program`; `pure` without writes in place."""

    def text(*parts: list[Line]) -> list[str]:
        return [x for part in parts for s in part for x in (s.pure if pure else s.text).split("\n")]

    core = (draft.read, draft.update) if draft.before else (draft.update, draft.read)
    step, init = text(draft.ready, *core), text(draft.setup, draft.init)
    head, reads = _head(draft)
    definition: list[str] = []
    finish = text(draft.finish)
    if draft.wrap in HELPERS:
        call = "returned" if pure else draft.call
        needs = _needs(draft, step, init)
        taken, given, before, after = _handed(draft, call)
        results = ", ".join([*(draft.states if call == "returned" else []), "y"])
        inputs, arguments = (", ".join([*states, *needs]) for states in (taken, given))
        if call == "copied":
            init = [f"{s}.clone()" if s in [f"{S} = {S}0" for S in draft.states] else s for s in init]
        elif call != "returned":
            entries = ", ".join(f"'{S}': {S}" if call == "dict" else S for S in draft.states)
            init = [*init, f"{given[0]} = " + (f"{{{entries}}}" if call == "dict" else f"[{entries}]")]
            finish = [*before, *finish]
        name, callee = {
            "helper": ("step", "step"),
            "method": ("step", "self.step"),
            "cell": ("forward", "self.cell"),
        }[draft.wrap]
        own = "" if draft.wrap == "helper" else "self, "
        definition = [f"def {name}({own}{inputs}):", *_indented([*before, *step, *after, f"return {results}"])]
        step = [f"{results} = {callee}({arguments})"]
    tail = [f"{draft.index} += 1"] if draft.form == "while" else []
    start = [f"{draft.index} = 0"] if draft.form == "while" else []
    store = text(draft.store)
    around = [init, finish]
    if draft.wrap == "cell":
        around = [[s.replace("self.", "self.cell.") for s in part] for part in around]
    loop = [head, *_indented([*reads, *step, *store, *tail])]
    if draft.comprehend and not pure and (found := _comprehension(head, reads, step, store)):
        name, comprehension = found
        around[0] = [s for s in around[0] if s != f"{name} = []"]
        loop = [comprehension]
    inner = [*_sizes(draft), *around[0], *start, *loop, *around[1], f"return {', '.join(draft.returns)}"]
    if draft.wrap not in MODULES:
        function = [f"def program({', '.join([*draft.arguments, *draft.weights])}):", *_indented(inner)]
        return "\n".join([*IMPORTS, *definition, *([""] * 2 if definition else []), *function, ""])
    holder = ["def __init__(self):", *_indented(["super().__init__()", *_parameters(draft)]), ""]
    forward = [f"def forward(self, {', '.join(draft.arguments)}):", *_indented(inner)]
    parts = [*holder, *forward]
    lines = list(IMPORTS)
    if draft.wrap == "method":
        parts = [*holder, *definition, "", *forward]
    if draft.wrap == "cell":
        lines += ["class Cell(nn.Module):", *_indented([*holder, *definition]), "", ""]
        parts = ["def __init__(self):", *_indented(["super().__init__()", "self.cell = Cell()"]), "", *forward]
    return "\n".join([*lines, "class Mixer(nn.Module):", *_indented(parts), "", "", "program = Mixer()", ""])


def _handed(draft: Draft, call: str) -> tuple[list[str], list[str], list[str], list[str]]:
    """A helper's parameters and arguments for the states, and its statements before and after the step."""
    states = draft.states
    if call == "returned":
        return states, states, [], []
    if call == "copied":
        own = [f"{S}_" for S in states]
        return own, states, [f"{S} = {S}_" for S in states], [f"{S}_.copy_({S})" for S in states]
    name = {"dict": "cache", "list": "box"}[call]
    places = [f"{name}[{S!r}]" if call == "dict" else f"{name}[{i}]" for i, S in enumerate(states)]
    before = [f"{S} = {place}" for S, place in zip(states, places, strict=True)]
    return [name], [name], before, [f"{place} = {S}" for S, place in zip(states, places, strict=True)]


def _comprehension(head: str, reads: list[str], step: list[str], store: list[str]) -> tuple[str, str] | None:
    """(list, statement) for a loop that does no more than append what a helper returns."""
    filled = re.fullmatch(r"(\w+)(?:\.append\((.*)\)| \+= \[(.*)\])", store[0]) if len(store) == 1 else None
    if filled is None or len(step) != 1 or not step[0].startswith("y = "):
        return None
    call = step[0].removeprefix("y = ")
    for read in reads:
        name, value = read.split(" = ", 1)
        call = re.sub(rf"(?<![\w.]){name}\b", value, call)
    item = re.sub(r"\by\b", call, filled[2] or filled[3])
    return filled[1], f"{filled[1]} = [{item} {head.removesuffix(':')}]"


def _head(draft: Draft) -> tuple[str, list[str]]:
    """The loop's first line, and the reads that the body begins with."""
    i, form = draft.index, draft.form
    reads = [f"{name} = {read}" for name, read in draft.steps.items()]
    names = list(draft.steps)
    tensors = [name.removesuffix("_t") for name in names]
    axes = [draft.timed[x].index("t") for x in tensors]
    streams = [f"{x}.unbind({at})" if at else x for x, at in zip(tensors, axes, strict=True)]
    if form == "unbind":
        return f"for {i}, {names[0]} in enumerate({streams[0]}):", reads[1:]
    if form in ("enumerate", "zip"):
        each, stream = ", ".join(names), f"zip({', '.join(streams)})"
        if len(names) == 1:
            stream = streams[0]
        if form == "zip":
            return f"for {each} in {stream}:", []
        return f"for {i}, {f'({each})' if len(names) > 1 else each} in enumerate({stream}):", []
    measured = next(f"{x}.shape[{axes.index('t')}]" for x, axes in draft.timed.items())
    heads = {
        "while": f"while {i} < T:",
        "reversed": f"for {i} in reversed(range(T)):",
        "backwards": f"for {i} in range(T - 1, -1, -1):",
        "from_zero": f"for {i} in range(0, T):",
        "measured": f"for {i} in range({measured}):",
    }
    return heads.get(form, f"for {i} in range(T):"), reads


def _needs(draft: Draft, step: list[str], init: list[str]) -> list[str]:
    """The local names of the program that its step uses, besides its states."""
    plain = re.sub(r"'[^']*'", "", "\n".join(step))
    used = set(re.findall(r"(?<![\w.])[A-Za-z_]\w*", plain))
    local = [name for s in init if (name := s.split(" = ")[0]).isidentifier()]
    weights = [] if draft.wrap in MODULES else list(draft.weights)
    letters = [a.upper() for a in draft.sizes]
    known = dict.fromkeys([*draft.steps, *draft.arguments, *weights, *local, *letters, draft.index])
    return [name for name in known if name in used and name not in draft.states]


def _sizes(draft: Draft) -> list[str]:
    """`K = q.shape[3]` for every letter."""
    operands = {**draft.arguments, **({} if draft.wrap in MODULES else draft.weights)}
    lines = []
    for letter in draft.sizes:
        holder = next((name for name, a in operands.items() if letter in a.axes), None)
        if holder:
            lines.append(f"{letter.upper()} = {holder}.shape[{operands[holder].axes.index(letter)}]")
    return lines


def _parameters(draft: Draft) -> list[str]:
    lines = []
    for name, w in draft.weights.items():
        size, dtype = ", ".join(str(draft.sizes[a]) for a in w.axes), f"dtype=torch.{draft.dtype}"
        made = f"nn.Linear({size}, bias=False, {dtype})" if w.linear else f"nn.Parameter(torch.empty({size}, {dtype}))"
        lines.append(f"self.{name} = {made}")
    return lines


def _indented(lines: list[str]) -> list[str]:
    return [f"    {x}" if x else x for x in lines]

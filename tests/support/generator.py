"""Programs for the tests: a recurrence drawn at random in a random spelling, or a near miss by one illegal edit."""

import itertools
import linecache
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from generator_draft import FORMS, MODULES, STREAMED, WRAPS
from generator_families import Builder
from generator_misses import EDITS
from generator_source import source
from generator_specs import DELTA, MATRIX, OTHER, Spec, draw_spec
from generator_spelling import Pick


@dataclass(frozen=True)
class Program:
    """Source with a callable `program`, for operands of these shapes; `pure` is it without writes in place.

    `families` are the names under which a legal program may be recognised; a near miss says which `edit` made it one.
    """

    source: str
    pure: str
    spec: Spec
    shapes: tuple[tuple[int, ...], ...]
    edit: str | None
    families: frozenset[str]
    fullgraph: bool
    validate: bool

    def __repr__(self) -> str:
        return f"{self.edit or 'legal'} {self.spec}\n{self.source}"


def families_of(spec: Spec) -> frozenset[str]:
    """The names under which the passes may know the recurrence."""
    same = {
        "abc": {"gla"} if spec.lead else {"gla", "simple_gla"},
        "retention": {"retention", "simple_gla"},
        "linear_scan": {"linear_scan", "gla"},  # with an output projection as its read-out, a state of one column
    }
    if spec.family == "gla" and spec.before and not any("v" in axes for axes in spec.decays):
        return frozenset({"gla", "rwkv6"})
    return frozenset(same.get(spec.family, {spec.family}))


def draw(
    pick: Pick,
    miss: bool | None = None,
    forms: tuple[str, ...] = FORMS,
    families: tuple[str, ...] = (*MATRIX, *DELTA, *OTHER),
) -> Program:
    """A legal program, or a near miss; one in three is a near miss where `miss` does not say."""
    if pick(False, False, True) if miss is None else miss:
        return _near_miss(pick, forms)
    spec = draw_spec(pick, families)
    builder = Builder(pick, spec, forms)
    builder.run()
    return _program(builder, None)


def _near_miss(pick: Pick, forms: tuple[str, ...]) -> Program:
    name = pick(*EDITS)
    edit = EDITS[name]
    if edit.wraps:  # its statements use the index
        forms = tuple(form for form in forms if form not in STREAMED) or FORMS[:1]
    builder = Builder(pick, edit.spec(pick), forms, edit.wraps or WRAPS)
    builder.run()
    if edit.square:
        builder.draft.sizes["v"] = builder.draft.sizes["k"]
    edit.change(builder, builder.draft.states[0])
    return _program(builder, name)


def _program(builder: Builder, edit: str | None) -> Program:
    draft, spec = builder.draft, builder.spec
    operands = {**draft.arguments, **({} if draft.wrap in MODULES else draft.weights)}
    return Program(
        source=source(draft),
        pure=source(draft, pure=True),
        spec=spec,
        shapes=tuple(tuple(draft.sizes[a] for a in operand.axes) for operand in operands.values()),
        edit=edit,
        families=families_of(spec),
        fullgraph=edit is None or EDITS[edit].fullgraph,
        validate=builder.pick(False, False, False, True),
    )


_loaded = itertools.count(1)


def load(text: str) -> Callable:
    """Import the text as a module of its own, whose source `inspect` finds; returns its `program`."""
    name = f"generated_{next(_loaded)}"
    filename = f"{name}.py"
    linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)
    module = types.ModuleType(name)
    module.__file__ = filename
    sys.modules[name] = module
    exec(compile(text, filename, "exec"), module.__dict__)
    return module.program


def operands_of(program: Program) -> list[torch.Tensor]:
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, program.spec.dtype)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in program.shapes]

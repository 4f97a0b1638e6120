"""Spells a specification into a draft, family by family."""

from collections.abc import Callable

from generator_draft import FORMS, MODULES, WRAPS, Argument, Draft, Line, line
from generator_specs import DELTA, FEATURES, GATES, POSITIVE, Spec
from generator_spelling import Pick, Speller, Tensor


def new_draft(pick: Pick, spec: Spec, forms: tuple[str, ...], wraps: tuple[str, ...]) -> Draft:
    # Batch before time, heads behind it, is the plainest.
    lead = pick(spec.lead, spec.lead, spec.lead[::-1])
    at = pick(min(1, len(lead)), *range(len(lead) + 1))
    layout, index = lead[:at] + "t" + lead[at:], pick("t", "t", "i")
    return Draft(pick, pick(*wraps), pick(*forms), layout, spec.dtype, spec.before, Speller(pick), index)


class Builder:
    """Spells one specification into a draft."""

    def __init__(self, pick: Pick, spec: Spec, forms: tuple[str, ...] = FORMS, wraps: tuple[str, ...] = WRAPS):
        self.pick, self.spec = pick, spec
        self.draft = new_draft(pick, spec, forms, wraps)
        self.spell = self.draft.spell
        lead = pick(*[spec.lead] * 4, spec.lead[::-1])
        tail = pick("kv", "kv", "vk")
        self.axes = lead + tail
        if pick(*[False] * 9, True):
            order = pick(*range(len(self.axes)))
            self.axes = self.axes[order:] + self.axes[:order]
        self.lead = lead
        self.build: dict[str, Callable[[], None]] = {
            "linear_scan": self.linear_scan,
            "selective_scan": self.selective_scan,
            "abc": self.abc,
        }

    def run(self) -> None:
        self.build.get(self.spec.family, self.matrix)()

    # Operands.

    def into(self, lines: list[Line], text: str) -> None:
        """A statement, behind what its expressions needed."""
        lines += [line(x) for x in self.spell.lines]
        self.spell.lines.clear()
        lines.append(line(text))

    def flush(self, lines: list[Line]) -> None:
        lines += [line(x) for x in self.spell.lines]
        self.spell.lines.clear()

    def mapped(self, x: Tensor, forms: tuple[str, ...]) -> Tensor:
        text = self.pick(*forms).format(x=x.text)
        return x if text == x.text else self.spell.bound(Tensor(text, x.axes))

    def source(self, name: str, axes: str, forms: tuple[str, ...] = FEATURES) -> Tensor:
        """One step of a new argument, maybe projected, behind a feature map."""
        x = self.draft.step_of(self.draft.operand(name, axes))
        last = x.axes[-1:]
        if last in tuple("kvm") and self.pick(*[False] * 5, True):
            if self.draft.wrap in MODULES and self.pick(True, False):
                w = self.draft.weight(f"W{name}", last * 2, linear=True)
                x = self.spell.bound(Tensor(f"{w.text}({x.text})", x.axes))
            else:
                w = self.draft.weight(f"W{name}", last * 2)
                text = self.pick(f"({x.text} @ {w.text})", f"F.linear({x.text}, {w.text})")
                x = self.spell.bound(Tensor(text, x.axes))
        return self.mapped(x, forms)

    def gate(self, name: str, axes: str, forms: tuple[str, ...] = GATES) -> Tensor:
        """A decay of one step, computed before the loop or in it."""
        draft = self.draft
        if axes == "c":
            return Tensor(self.pick("0.9", "0.5", "0.97"), "")
        if axes == "w":
            w = draft.weight(name, "h")
            return self.spell.bound(Tensor(self.pick(*GATES[:6]).format(x=w.text), "h"))
        source = draft.operand(name, axes)
        form = self.pick(*forms)
        if self.pick(True, False):
            draft.precomputed(f"{name}a", source, form.format(x=source))
            return draft.step_of(f"{name}a")
        x = draft.step_of(source)
        return self.spell.bound(Tensor(f"({form.format(x=x.text)})", x.axes))

    # States.

    def state(self, name: str, axes: str, like: str, in_place: bool) -> Tensor:
        draft = self.draft
        draft.states.append(name)
        if self.spec.initial:
            draft.arguments[f"{name}0"] = Argument(axes)
            forms = [f"{name}0.clone()"] if in_place else [f"{name}0", f"{name}0.clone()", f"{name}0 * 1.0"]
            draft.init.append(line(f"{name} = {self.pick(*forms)}"))
        else:
            draft.init.append(line(f"{name} = {draft.zeros(axes, like)}"))
        if self.spec.final:
            draft.returns.append(name)
        return Tensor(name, axes)

    def affine(self, S: Tensor, decays: list[Tensor], x: Tensor, y: Tensor, in_place: bool) -> list[Line]:
        """S = decays * S + x y, x over one group of axes of S and y over another."""
        pick, spell, name, lines = self.pick, self.spell, S.text, []
        decays = pick(decays, decays[::-1])
        lead = S.axes[:-2]
        columns = x.axes == lead + S.axes[-2:-1] and y.axes == lead + S.axes[-1]
        if pick(True, False):
            old = S.text
            for a in decays:
                old = spell.product(Tensor(old, S.axes), a, S.axes).text
            kinds = ["sum", "sum", "swapped", "add", "addcmul"] + (["baddbmm"] if len(lead) == 1 and columns else [])
            kind = pick(*kinds)
            if kind == "addcmul":
                new = f"torch.addcmul({old}, {spell.aligned(x, S.axes)}, {spell.aligned(y, S.axes)})"
            elif kind == "baddbmm":
                new = f"torch.baddbmm({old}, {x.text}.unsqueeze(-1), {y.text}.unsqueeze(-2))"
            else:
                write = spell.bound(spell.product(x, y, S.axes)).text
                new = {
                    "sum": f"{old} + {write}",
                    "swapped": f"{write} + {old}",
                    "add": f"torch.add({old}, {write})",
                }[kind]
            self.flush(lines)
            return [*lines, line(f"{name} = {new}")]
        for a in decays:
            aligned = spell.aligned(a, S.axes)
            self.flush(lines)
            pure = f"{name} = {name} * {aligned}"
            forms = [pure, f"{name} = {spell.product(S, a, S.axes).text}", f"{name} = {name}.mul({aligned})"]
            self.flush(lines)
            if in_place:
                forms += [f"{name} *= {aligned}", f"{name}.mul_({aligned})", "chain", f"{name}[:] = {name} * {aligned}"]
            form = pick(*forms)
            if form == "chain":
                lines.append(Line(f"{name}.mul_({aligned})", pure))
            else:
                lines.append(Line(form, pure))
        write = spell.bound(spell.product(x, y, S.axes)).text
        self.flush(lines)
        pure = f"{name} = {name} + {write}"
        forms = [pure, f"{name} = {write} + {name}", f"{name} = {name}.add({write})"]
        if in_place:
            left, right = spell.aligned(x, S.axes), spell.aligned(y, S.axes)
            forms += [f"{name} += {write}", f"{name}.add_({write})", f"{name}.addcmul_({left}, {right})"]
            forms += [f"{name}.copy_({name} + {write})"]
            if len(lead) == 1 and columns:
                forms.append(f"{name}.baddbmm_({x.text}.unsqueeze(-1), {y.text}.unsqueeze(-2))")
        return [*lines, Line(pick(*forms), pure)]

    # Families.

    def matrix(self) -> None:
        spec, draft, pick, spell = self.spec, self.draft, self.pick, self.spell
        lead = spec.lead
        # Matrix products that hold what they were given cannot be differentiated after a write in place.
        # Lifting sees an update in place only among the loop's own statements.
        in_place = pick(False, False, True) and draft.wrap not in ("helper", "method", "cell")
        forms = POSITIVE if spec.normaliser else FEATURES
        k: Tensor | None = None
        if not spec.tied:
            k = self.source("k", lead + "k", forms)
        v = self.source("v", lead + "v", FEATURES[:4])
        decays = [self.gate(f"g{'' if i == 0 else i}", axes) for i, axes in enumerate(spec.decays)]
        if spec.tied:
            k = spell.bound(Tensor(pick(f"(1 - {decays[0].text})", f"(1.0 - {decays[0].text})"), decays[0].axes))
        assert k is not None
        extra = "g" if spec.groups else ""
        q = self.source("q", lead + extra + "k", forms)
        if spec.scale in ("q", "k"):
            scaled = q if spec.scale == "q" else k
            text = pick("({x} * 0.5)", "({x} * K ** -0.5)", "({x} / 2)").format(x=scaled.text)
            done = spell.bound(Tensor(text, scaled.axes))
            q, k = (done, k) if spec.scale == "q" else (q, done)
        self.flush(draft.ready)
        S = self.state("S", self.axes, "v", in_place)
        if spec.family in DELTA:
            self.delta(S, k, v, decays, in_place)
        else:
            draft.update += self.affine(S, decays, k, v, in_place)
        if spec.normaliser:
            z = self.state("z", "".join(a for a in self.axes if a != "v"), "v", in_place)
            draft.update += self.vector(z, decays, k, in_place)
        self.read_out(q, k, v, S)

    def vector(self, z: Tensor, decays: list[Tensor], x: Tensor, in_place: bool) -> list[Line]:
        spell, lines, old = self.spell, [], z.text
        for a in decays:
            old = spell.product(Tensor(old, z.axes), a, z.axes).text
        right = spell.permuted(x, z.axes).text
        self.flush(lines)
        pure = f"{z.text} = {old} + {right}"
        if decays or not in_place:
            return [*lines, line(self.pick(pure, f"{z.text} = {right} + {old}"))]
        return [*lines, Line(self.pick(pure, f"{z.text} += {right}", f"{z.text}.add_({right})"), pure)]

    def read_out(self, q: Tensor, k: Tensor, v: Tensor, S: Tensor) -> None:
        spec, draft, pick, spell = self.spec, self.draft, self.pick, self.spell
        out = "".join(a for a in S.axes if a not in "kv") + ("g" if spec.groups else "") + "v"
        if pick(*[False] * 4, True) and len(out) > 1:
            out = out[1:] + out[0] if out[0] not in "g" and pick(False, True) else out
        seen = S
        bonus = ""
        if spec.bonus:
            u = draft.weight("u", ("h" if "h" in spec.lead else "") + "k")
            uk = spell.bound(spell.product(u, k, k.axes)) if pick(True, False) else None
            if uk is not None and pick(True, False):
                dot = f"({q.text} * {spell.permuted(uk, q.axes).text}).sum(-1)"
                scalar = Tensor(dot, q.axes[:-1])
                bonus = spell.permuted(spell.product(v, scalar, v.axes), out).text
            elif uk is not None:
                seen = spell.bound(Tensor(f"({S.text} + {spell.product(uk, v, S.axes).text})", S.axes))
            else:
                kv = spell.bound(spell.product(k, v, S.axes))
                seen = spell.bound(Tensor(f"({S.text} + {spell.product(kv, u, S.axes).text})", S.axes))
        y = spell.contract(q, seen, "k", out)
        if bonus:
            y = Tensor(f"({y.text} + {bonus})", out)
        if spec.normaliser:
            zq = spell.bound(spell.contract(q, Tensor("z", S.axes.replace("v", "")), "k", out.replace("v", "")))
            y = Tensor(f"({y.text} / {spell.aligned(zq, out)})", out)
        if spec.scale == "out":
            y = Tensor(pick(f"({y.text} * 0.5)", f"({y.text} / 2.0)", f"(0.5 * {y.text})"), out)
        self.result(y)

    def result(self, y: Tensor) -> None:
        """What the step does with its read-out, and how the program gathers it."""
        draft, pick = self.draft, self.pick
        self.into(draft.read, f"y = {y.text}")
        last = y.axes[-1:]
        forms = [""] * 6 + ["y = torch.tanh(y)", "y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1)"]
        forms += [f"y = F.layer_norm(y, ({last.upper()},), eps=1.0)"] * bool(last)
        forms += ["gate", "project"] * bool(last)
        form = pick(*forms)
        if form == "gate":
            gate = self.draft.step_of(self.draft.operand("og", y.axes))
            text = f"y = y * F.silu({self.spell.permuted(gate, y.axes).text})"
            self.into(draft.read, text)
        elif form == "project":
            w = draft.weight("Wo", last * 2)
            draft.read.append(line(f"y = y @ {w.text}"))
        elif form:
            draft.read.append(line(form))
        draft.y = "y"
        draft.collect("y", y.axes, "v")

    def delta(self, S: Tensor, k: Tensor, v: Tensor, decays: list[Tensor], in_place: bool) -> None:
        spec, draft, pick, spell = self.spec, self.draft, self.pick, self.spell
        lines: list[Line] = []
        if spec.family == "dplr":
            b, c = self.source("b", spec.lead + "k"), self.source("c", spec.lead + "k")
            self.flush(draft.ready)
            cS = spell.bound(spell.contract(c, S, "k", v.axes))
            kv, erase = spell.product(k, v, S.axes), spell.product(b, cS, S.axes)
            old = S.text
            for a in decays:
                old = spell.product(Tensor(old, S.axes), a, S.axes).text
            parts = pick([old, erase.text, kv.text], [kv.text, erase.text, old], [old, kv.text, erase.text])
            self.into(lines, f"{S.text} = {' + '.join(parts)}")
            draft.update += lines
            return
        beta = self.gate("beta", spec.lead, ("torch.sigmoid({x})", "{x}", "(2 * torch.sigmoid({x}))"))
        self.flush(draft.ready)
        name = S.text
        form = pick("error", "error", "erase", "matrix")
        if form == "matrix" and set(S.axes[-2:]) != {"k", "v"}:
            form = "erase"
        for a in decays:
            lines.append(line(f"{name} = {spell.product(S, a, S.axes).text}"))
        if form == "error":
            kS = spell.bound(spell.contract(k, S, "k", v.axes))
            difference = Tensor(pick(f"({v.text} - {kS.text})", f"torch.sub({v.text}, {kS.text})"), v.axes)
            self.flush(lines)
            if pick(True, False):
                u = spell.bound(spell.product(spell.bound(difference), beta, v.axes))
                self.flush(lines)
                lines += self.affine(S, [], k, u, in_place)
            else:
                bk = spell.bound(spell.product(k, beta, k.axes))
                u = spell.bound(difference)
                self.flush(lines)
                lines += self.affine(S, [], bk, u, in_place)
        elif form == "erase":
            kS = spell.bound(spell.contract(k, S, "k", v.axes))
            bk = spell.bound(spell.product(k, beta, k.axes))
            erase = spell.bound(spell.product(bk, kS, S.axes))
            write = spell.product(bk, v, S.axes)
            new = pick("{S} - {erase} + {write}", "{write} + {S} - {erase}")
            self.into(lines, f"{name} = {new.format(S=name, erase=erase.text, write=write.text)}")
        else:
            bk = spell.bound(spell.product(k, beta, k.axes))
            lead = S.axes[:-2]
            outer = spell.product(Tensor(bk.text, bk.axes), Tensor(k.text, k.axes.replace("k", "j")), lead + "kj")
            M = Tensor(f"(torch.eye(K, dtype=v.dtype) - {outer.text})", lead + "kj")
            M = spell.bound(M)
            moved = f"{M.text} @ {name}" if S.axes[-2] == "k" else f"{name} @ {M.text}"
            write = spell.product(bk, v, S.axes)
            self.into(lines, f"{name} = {moved} + {write.text}")
            if "v.dtype" in "".join(x.text for x in lines) and "v" in draft.timed:
                draft.setup.append(line("eye = torch.eye(K, dtype=v.dtype)"))
                lines = [line(x.text.replace("torch.eye(K, dtype=v.dtype)", "eye")) for x in lines]
        draft.update += lines

    def linear_scan(self) -> None:
        spec, draft, pick, spell = self.spec, self.draft, self.pick, self.spell
        x = self.source("v", spec.lead + "v")
        a = self.gate("g", spec.lead + "v")
        axes = "".join(c for c in self.axes if c != "k")
        self.flush(draft.ready)
        self.state("h", axes, "v", False)
        a_text, x_text = spell.permuted(a, axes).text, spell.permuted(x, axes).text
        if spec.tied:
            forms = [
                f"{a_text} * h + (1 - {a_text}) * {x_text}",
                f"torch.lerp({x_text}, h, {a_text})",
                f"h + (1 - {a_text}) * ({x_text} - h)",
                f"torch.lerp(h, {x_text}, 1 - {a_text})",
            ]
        else:
            forms = [f"{a_text} * h + {x_text}", f"{x_text} + h * {a_text}", f"torch.addcmul({x_text}, h, {a_text})"]
        self.into(draft.update, f"h = {pick(*forms)}")
        self.result(Tensor(pick("h", "(h * 0.5)", "torch.tanh(h)", "h.clone()"), axes))

    def selective_scan(self) -> None:
        spec, draft, pick, spell = self.spec, self.draft, self.pick, self.spell
        lead, v = spec.lead, spec.lead + "v"
        x = draft.step_of(draft.operand("v", v))
        dt = self.gate("dt", v, ("F.softplus({x})", "torch.exp({x})", "torch.sigmoid({x})"))
        Bt, C = draft.step_of(draft.operand("k", lead + "k")), draft.step_of(draft.operand("q", lead + "k"))
        A = draft.weight("A", "vk")
        draft.setup.append(line(f"rate = {pick('-torch.exp({})', '-F.softplus({})', '-({}.exp())').format(A.text)}"))
        A = Tensor("rate", "vk")
        axes = self.axes
        h = self.state("h", axes, "v", False)
        decay = spell.bound(Tensor(f"torch.exp({spell.product(dt, A, axes).text})", axes))
        u = spell.bound(spell.product(dt, x, v))
        if u.axes != v:
            u = Tensor(u.text, v)
        write = spell.product(u, Bt, axes)
        self.flush(draft.ready)
        draft.update.append(line(f"h = {pick(f'{decay.text} * h + {write.text}', f'{write.text} + h * {decay.text}')}"))
        self.flush(draft.read)
        out = "".join(c for c in axes if c != "k")
        y = spell.contract(C, h, "k", out)
        if pick(True, False):
            D = draft.weight("D", "v")
            y = Tensor(f"({y.text} + {spell.permuted(spell.product(D, x, v), out).text})", out)
        self.result(y)

    def abc(self) -> None:
        spec, draft, pick, spell = self.spec, self.draft, self.pick, self.spell
        lead = spec.lead
        k, v, q = self.source("k", lead + "k"), self.source("v", lead + "v"), self.source("q", lead + "k")
        a = self.gate("s", lead + "m")
        w = spell.bound(Tensor(f"(1 - {a.text})", a.axes))
        self.flush(draft.ready)
        keys, values = lead + pick("mk", "km"), lead + pick("mv", "vm")
        P, R = self.state("P", keys, "v", False), self.state("R", values, "v", False)
        draft.update += self.affine(P, [a], w, k, False)
        draft.update += self.affine(R, [a], w, v, False)
        scores = spell.contract(q, P, "k", lead + "m")
        self.into(draft.read, f"p = torch.softmax({scores.text}, -1)")
        self.result(spell.contract(Tensor("p", lead + "m"), R, "m", lead + "v"))

"""Ways to write one tensor operation, drawn at random: every choice is the same mathematics in other words.

A tensor is an expression with one letter for each of its axes: b batch, h head, g query head, k key, v value, m slot.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Pick = Callable[..., Any]  # one of its arguments; the first is the plainest


@dataclass(frozen=True)
class Tensor:
    """`text` may be indexed, called upon and multiplied as it stands."""

    text: str
    axes: str


def atom(text: str) -> str:
    """`text` in parentheses unless it needs none."""
    depth, plain = 0, True
    for i, c in enumerate(text):
        depth += (c in "([") - (c in ")]")
        plain &= c.isalnum() or c in "_.([])" or depth > 0
        if c in "([" and depth == 1 and (i == 0 or not (text[i - 1].isalnum() or text[i - 1] in "_])")):
            plain = False
    return text if plain else f"({text})"


def spaced(axes: str) -> str:
    return " ".join(axes)


class Speller:
    """Draws spellings; statements that an expression needs beforehand go to `lines`."""

    def __init__(self, pick: Pick):
        self.pick = pick
        self.lines: list[str] = []
        self.names = 0

    def fresh(self, stem: str) -> str:
        self.names += 1
        return f"{stem}{self.names}"

    def bound(self, x: Tensor) -> Tensor:
        """`x` under a name of its own, or as it is."""
        if x.text.isidentifier() or not self.pick(True, False):
            return x
        name = self.fresh("x")
        self.lines.append(f"{name} = {x.text}")
        return Tensor(name, x.axes)

    def permuted(self, x: Tensor, axes: str) -> Tensor:
        """`x` with its axes in the order of `axes`."""
        if x.axes == axes:
            return x
        order = [x.axes.index(a) for a in axes]
        moved = [i for i, o in enumerate(order) if i != o]
        forms = [f"{x.text}.permute({', '.join(map(str, order))})"]
        if len(moved) == 2:
            forms += [f"{x.text}.transpose({moved[0]}, {moved[1]})", f"torch.swapaxes({x.text}, *{moved})"]
            if moved[1] == len(axes) - 1 and moved[0] == moved[1] - 1:
                forms += [f"{x.text}.mT", f"{x.text}.transpose(-1, -2)"]
        forms.append(f"einops.rearrange({x.text}, '{spaced(x.axes)} -> {spaced(axes)}')")
        forms.append(f"torch.einsum('{x.axes}->{axes}', {x.text})")
        return Tensor(self.pick(*forms), axes)

    def aligned(self, x: Tensor, target: str) -> str:
        """`x` so that it broadcasts against a tensor with the axes `target`."""
        if not x.axes:
            return x.text
        full = "".join(a if a in x.axes else "1" for a in target)
        rearranged = f"einops.rearrange({x.text}, '{spaced(x.axes)} -> {spaced(full)}')"
        x = self.permuted(x, "".join(a for a in target if a in x.axes))
        if x.axes == target:
            return x.text
        missing = [i for i, a in enumerate(target) if a not in x.axes]
        lead = 0
        while lead in missing:
            lead += 1
        if len(missing) == lead:
            return self.pick(x.text, f"{x.text}[{'None, ' * lead}...]", rearranged)
        index = ["None" if i in missing else ":" for i in range(len(target))][lead:]
        forms = [f"{x.text}[{', '.join(index)}]", "unsqueeze", rearranged]
        tail = [i for i in range(len(target)) if i in missing and all(j in missing for j in range(i, len(target)))]
        if len(tail) + lead == len(missing):
            forms.append(f"{x.text}[..., {', '.join(['None'] * len(tail))}]")
            shape = f"*{x.text}.shape, " + ", ".join(["1"] * len(tail))
            forms += [f"{x.text}.reshape({shape})", f"{x.text}.view({shape})"]
        elif index[-1] == ":" and "None" in index:
            first = index.index("None")
            if set(index[:first]) <= {":"} and first > 0 and len(missing) - lead < 3:
                forms.append(f"{x.text}[..., {', '.join(index[first:])}]")
        chosen = self.pick(*forms)
        if chosen != "unsqueeze":
            return chosen
        if len(missing) - lead == 1:
            at = next(i for i in missing if i >= lead)
            return self.pick(
                f"{x.text}.unsqueeze({at - lead})",
                f"{x.text}.unsqueeze({at - len(target)})",
                f"torch.unsqueeze({x.text}, {at - lead})",
            )
        return x.text + "".join(f".unsqueeze({i - lead})" for i in missing if i >= lead)

    def product(self, x: Tensor, y: Tensor, target: str) -> Tensor:
        """x * y with the axes `target`, nothing summed; one of them may lack axes."""
        if not x.axes or not y.axes:
            return Tensor(self.pick(f"({x.text} * {y.text})", f"({y.text} * {x.text})"), target)
        forms = ["multiply", "swapped", "torch.mul"]
        if set(x.axes) | set(y.axes) == set(target):
            forms += ["einsum", "einsum"]
            if len(x.axes) > 1 or len(y.axes) > 1:
                forms.append("einops")
        lead = target[:-2]
        if len(target) > 1 and {x.axes[-1], y.axes[-1]} == set(target[-2:]) and x.axes[:-1] == y.axes[:-1] == lead:
            forms += ["matmul", "matmul", "bmm" if len(lead) == 1 else "matmul"] if lead else ["outer", "ger", "matmul"]
        form = self.pick(*forms)
        if form == "einsum":
            return Tensor(f"torch.einsum('{x.axes},{y.axes}->{target}', {x.text}, {y.text})", target)
        if form == "einops":
            spec = f"{spaced(x.axes)}, {spaced(y.axes)} -> {spaced(target)}"
            return Tensor(f"einops.einsum({x.text}, {y.text}, '{spec}')", target)
        if form in ("matmul", "bmm", "outer", "ger"):
            if x.axes[-1] != target[-2]:
                x, y = y, x
            if form in ("outer", "ger"):
                return Tensor(f"torch.{form}({x.text}, {y.text})", target)
            column, row = f"{x.text}.unsqueeze(-1)", f"{y.text}.unsqueeze(-2)"
            call = f"torch.bmm({column}, {row})" if form == "bmm" else ""
            return Tensor(call or self.pick(f"({column} @ {row})", f"torch.matmul({column}, {row})"), target)
        left, right = self.aligned(x, target), self.aligned(y, target)
        if form == "swapped":
            left, right = right, left
        return Tensor(f"torch.mul({left}, {right})" if form == "torch.mul" else f"({left} * {right})", target)

    def contract(self, q: Tensor, S: Tensor, over: str, out: str) -> Tensor:
        """q times S, summed over the one axis `over`, with the axes `out`."""
        lead = S.axes[:-2]
        forms = ["sum", "einsum", "einsum", "einops"] if len(out) else ["sum", "einsum"]
        plain = not set(q.axes) - set(S.axes) and len(S.axes) > 1
        if plain and over in S.axes[-2:] and q.axes == lead + over and out == S.axes.replace(over, ""):
            forms += ["matmul"] * 3 + (["bmm"] if len(lead) == 1 else []) + (["mv"] if not lead else [])
        form = self.pick(*forms)
        if form == "einsum":
            if self.pick(True, False):
                return Tensor(f"torch.einsum('{q.axes},{S.axes}->{out}', {q.text}, {S.text})", out)
            return Tensor(f"torch.einsum('{S.axes},{q.axes}->{out}', {S.text}, {q.text})", out)
        if form == "einops":
            spec = f"{spaced(q.axes)}, {spaced(S.axes)} -> {spaced(out)}"
            return Tensor(f"einops.einsum({q.text}, {S.text}, '{spec}')", out)
        if form == "mv":
            matrix = S if S.axes[-1] == over else self.permuted(S, S.axes[::-1])
            call = [f"torch.mv({matrix.text}, {q.text})", f"({matrix.text} @ {q.text})"]
            if S.axes[0] == over:
                call.append(f"({q.text} @ {S.text})")
            return Tensor(self.pick(*call), out)
        if form in ("matmul", "bmm"):
            swap = lead + S.axes[-2:][::-1]
            if S.axes[-2] == over and self.pick(True, False):
                left, right, one = f"{q.text}.unsqueeze(-2)", S.text, "-2"
            else:
                matrix = S if S.axes[-1] == over else self.permuted(S, swap)
                left, right, one = matrix.text, f"{q.text}.unsqueeze(-1)", "-1"
            call = f"torch.bmm({left}, {right})" if form == "bmm" else f"({left} @ {right})"
            tail = "[..., 0, :]" if one == "-2" else "[..., 0]"
            return Tensor(call + self.pick(f".squeeze({one})", tail, f".sum({one})"), out)
        extra = "".join(a for a in q.axes if a not in S.axes)
        full = "".join(a for a in S.axes if a not in "kvm") + extra + "".join(a for a in S.axes if a in "kvm")
        if not extra:
            full = S.axes
        factors = [self.aligned(S, full), self.aligned(q, full)]
        at = full.index(over)
        summed = Tensor(
            self.pick(
                f"({factors[1]} * {factors[0]}).sum({at})",
                f"({factors[0]} * {factors[1]}).sum(dim={at - len(full)})",
                f"torch.sum({factors[0]} * {factors[1]}, {at})",
            ),
            full.replace(over, ""),
        )
        return self.permuted(summed, out)

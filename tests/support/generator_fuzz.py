"""Check many generated programs, in several processes, and say what became of them.

`python tests/support/generator_fuzz.py --first 5000 --count 5000` does a part of what `pytest -m fuzz` does.
"""

import argparse
import multiprocessing
import os
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from generator import draw
from generator_check import Unplaced, check, plain_steps


@dataclass
class Tally:
    """Programs by what became of them; all but the counts hold a seed and what was wrong."""

    programs: int = 0
    legal: int = 0
    missed: list[tuple[int, str]] = field(default_factory=list)
    wrong: list[tuple[int, str]] = field(default_factory=list)
    unplaced: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        self.programs += other.programs
        self.legal += other.legal
        self.missed += other.missed
        self.wrong += other.wrong
        self.unplaced += other.unplaced

    @property
    def recognised(self) -> float:
        """The part of the legal programs that is recognised."""
        return 1 - len(self.missed) / max(1, self.legal)

    def __str__(self) -> str:
        lines = [
            f"{self.programs} programs: {100 * self.recognised:.2f} % of {self.legal} legal ones recognised, "
            f"{self.programs - self.legal} near misses, {len(self.wrong)} wrong, "
            f"{len(self.unplaced)} with a refusal without a line"
        ]
        for name in ("wrong", "unplaced", "missed"):
            lines += [f"  {name}, seed {number}: {why}" for number, why in getattr(self, name)]
        return "\n".join(lines)


def check_seeds(first: int, count: int) -> Tally:
    """Check the programs that these seeds draw, one in ten with compiled steps; one that raises anything is wrong."""
    tally = Tally()
    for number in range(first, first + count):
        chance = random.Random(number)
        program = draw(lambda *options, chance=chance: options[chance.randrange(len(options))])
        tally.programs += 1
        tally.legal += program.edit is None
        try:
            with plain_steps() if number % 10 else nullcontext():
                verdict = check(program)
        except Unplaced as error:
            tally.unplaced.append((number, str(error)))
        except Exception as error:
            tally.wrong.append((number, f"{type(error).__name__}: {error}"[:500]))
        else:
            if program.edit is None and verdict.missed:
                tally.missed.append((number, verdict.missed))
        if not tally.programs % 25:
            torch._dynamo.reset()  # or compiled code piles up
    return tally


def check_many(count: int, chunk: int = 100, processes: int = os.cpu_count() or 1, first: int = 0) -> Iterator[Tally]:
    """Yield what is known after each chunk; a new process for each, as compiled code is never wholly given back."""
    total = Tally()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, max_tasks_per_child=1) as pool:
        starts = range(first, first + count, chunk)
        for tally in pool.map(check_seeds, starts, [min(chunk, first + count - start) for start in starts]):
            total.add(tally)
            yield total


def main() -> int:
    p = argparse.ArgumentParser(description="Check many generated programs.")
    p.add_argument("--first", type=int, default=0, help="first seed")
    p.add_argument("--count", type=int, default=10_000, help="programs")
    p.add_argument("--chunk", type=int, default=100, help="programs of one process")
    p.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="at a time")
    args = p.parse_args()
    for tally in check_many(args.count, args.chunk, args.processes, args.first):
        print(str(tally).splitlines()[0], flush=True)
    print(tally)
    return bool(tally.wrong or tally.unplaced)


if __name__ == "__main__":
    raise SystemExit(main())

"""Numbers that the loop's index decides, as tensors that give the values and dtypes of the Python numbers."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fla_compile.passes.loop_refusal import fail
from fla_compile.passes.loop_steps import is_number

ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mult": operator.mul,
    "Div": operator.truediv,
    "Pow": operator.pow,
    "FloorDiv": operator.floordiv,
    "Mod": operator.mod,
}


class StepNumber(NamedTuple):
    """A Python number of the current step, as a tensor without axes in float64."""

    value: torch.Tensor


def with_number(op: str, left: Any, right: Any, site: str, line: int) -> Any:
    """`left op right`, one of which the index may decide."""
    if isinstance(left, StepNumber):
        left = number_for(left, right, site, line)
    elif isinstance(right, StepNumber):
        right = number_for(right, left, site, line)
    return ARITHMETIC[op](left, right)


def number_for(number: Any, other: Any, site: str, line: int) -> Any:
    """Return the number as an operand that gives `other` the value and dtype that the Python number would."""
    if not isinstance(number, StepNumber):
        return number
    if not isinstance(other, torch.Tensor) or other.dtype not in (torch.float32, torch.float64):
        fail("loop_index_used", "a number computed from the index meets no tensor in float32 or float64", site, line)
    return number.value.to(other.dtype)


def number_value(number: Any, site: str, line: int) -> Any:
    """Return what the index decides where only a tensor will do."""
    if isinstance(number, StepNumber):
        fail("loop_index_used", "the index is used as a number other than in arithmetic with a tensor", site, line)
    return number


def numbers_of_step(numbers: tuple, samples: tuple, values: tuple, site: str) -> tuple:
    """The numbers of a step: `values` holds the index and then what is a number, as `samples` show, in Python."""
    found: list = []
    place = 1
    for number, sample in zip(numbers, samples, strict=True):
        if is_number(sample):
            found.append(StepNumber(values[place]))
            place += 1
        elif isinstance(sample, torch.Tensor) and sample.dtype in (torch.float32, torch.float64):
            found.append(number(values[0]).to(sample.dtype))
        else:
            fail("loop_index_used", f"the index takes part in a {type(sample).__name__}", site)
    return tuple(found)

"""Linear-attention recurrences, written in plain PyTorch, compiled to chunk kernels."""

import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"


class _Checkout:
    """Finds `kernels`, `passes` and `models` beside this folder, where a checkout has them; a wheel has them inside.

    Not by `__path__`: whoever walks the package (torch, to register loggers) would walk the whole checkout.
    """

    root = Path(__file__).resolve().parent.parent
    names = frozenset({f"{__name__}.kernels", f"{__name__}.passes", f"{__name__}.models"})

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        return PathFinder.find_spec(name, [str(cls.root)], target) if name in cls.names else None


if (_Checkout.root / "pyproject.toml").is_file() and (_Checkout.root / "passes").is_dir():
    # First, or the finder of an editable install of another checkout would mix its folders with these.
    sys.meta_path.insert(0, _Checkout)  # type: ignore[arg-type]

if TYPE_CHECKING:
    from fla_compile.backend import RefusedError
    from fla_compile.inspection import explain
    from fla_compile.report import Report

__all__ = ["RefusedError", "Report", "explain"]
_HOMES = {"RefusedError": "backend", "Report": "report", "explain": "inspection"}


def __getattr__(name: str) -> Any:
    # Lazy: importing the package must not import torch._dynamo.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value

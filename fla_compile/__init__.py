"""Linear-attention recurrences, written in plain PyTorch, compiled to chunk kernels."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout `kernels`, `passes` and `models` lie beside this folder; a wheel has them inside it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "passes").is_dir():
    __path__.append(str(_checkout))

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

"""Linear-attention recurrences, written in plain PyTorch, compiled to chunk kernels."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout `kernels`, `passes` and `models` lie beside this folder; a wheel has them inside it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "passes").is_dir():
    __path__.append(str(_checkout))

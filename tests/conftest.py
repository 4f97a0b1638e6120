"""Makes tests/support importable, and gives every test a Dynamo and a random state of its own."""

import sys
from pathlib import Path

import pytest
import torch

# Not this folder itself: its `fla_compile` would hide the package.
sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))
pytest.register_assert_rewrite("programs")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)

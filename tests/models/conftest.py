"""Keeps the Auto classes ours: fla, a peer of some tests, takes their entries over wherever it is imported."""

import pytest
from support.models import MODELS
from transformers import AutoConfig

import fla_compile.models


@pytest.fixture(autouse=True)
def registered() -> None:
    for name in {case.name for case in MODELS}:
        config = getattr(fla_compile.models, f"{name}Config")
        AutoConfig.register(config.model_type, config, exist_ok=True)

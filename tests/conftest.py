"""Fixtures for all tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from fastserve.gateway.tokenizer import Tokenizer

# An example takes as long as a busy machine makes it: time is no property of the code under test.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(scope="session")
def default_model_folder() -> Path:
    """The default model, converted; the first time on a machine that takes half a minute."""
    result = subprocess.run(
        [sys.executable, "-m", "fastserve.worker.model.prepare"],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.strip())


@pytest.fixture(scope="session")
def default_tokenizer(default_model_folder: Path) -> Tokenizer:
    return Tokenizer.load(default_model_folder)

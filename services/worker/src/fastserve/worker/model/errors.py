"""Why a model cannot be served."""

from __future__ import annotations

from fastserve.common.errors import StartupError


class ModelError(StartupError):
    """The model is missing, damaged or unsupported; the message names the file and the reason."""

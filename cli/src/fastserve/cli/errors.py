"""What a command ends with when it cannot do its work: one message for the user."""

from __future__ import annotations


class CliError(Exception):
    """Shown as it is, without a stack trace."""

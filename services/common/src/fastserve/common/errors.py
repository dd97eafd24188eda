"""Errors that end a process with one sentence instead of a stack trace.

FastServeError
└── StartupError      cannot start: bad settings, missing model, port taken
"""

from __future__ import annotations


class FastServeError(Exception):
    """Base of errors whose message is meant for the operator."""


class StartupError(FastServeError):
    """The service cannot start; the message says what to change. Exit status 2."""

"""Connections that a child process has inherited: it must neither use nor close them."""

from __future__ import annotations

import ctypes
from typing import Any

from onewriter.errors import forked_error


def keep_open(thing: object) -> None:
    """Leak it: closing it would drop the parent's locks, and delete its log."""
    # An extra reference keeps it beyond the end of the interpreter, which clears every list.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


class Inherited:
    """Replaces the parent's connection: every use raises ForkedError."""

    def __getattr__(self, name: str) -> Any:
        raise forked_error()

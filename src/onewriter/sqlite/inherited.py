"""Connections that a child process has inherited: neither used nor closed there."""

from __future__ import annotations

import ctypes
from typing import Any

from onewriter.errors import forked_error


def keep_open(thing: object) -> None:
    """Closing it would drop the parent's locks, and delete its log."""
    # One reference more than there are keeps it to the end of the process, when a list of them would be emptied.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


class Inherited:
    """What is in the place of the parent's connection: nothing on the stack gets past it."""

    def __getattr__(self, name: str) -> Any:
        raise forked_error()

"""What becomes of open gateways in a forked child: nothing of them is used, closed, or opened again there.

SQLite keeps its table of locks in the memory of the process. A child inherits it, and believes that it holds locks
that it does not (https://www.sqlite.org/howtocorrupt.html#_carrying_an_open_database_across_a_fork_).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import TYPE_CHECKING, Any

from onewriter.errors import ForkedError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from onewriter.loop import WriterLoop

ADVICE = "close the gateway before the fork, and open one in the child after it"
_inherited: list[tuple[int, int]] = []  # device and inode of the files that an inherited gateway has open


def forked_error() -> ForkedError:
    return ForkedError(f"this gateway belongs to the parent of this process: {ADVICE}")


def forget_inherited(loops: Iterable[WriterLoop]) -> None:
    """Called in the child, at once after the fork."""
    for loop in loops:
        for thing in loop.become_inherited():
            keep_open(thing)
        if loop.file.identity is None:  # it is about to be opened
            with contextlib.suppress(OSError):
                loop.file.remember(loop.file.files, ())
        if loop.file.identity is not None:
            _inherited.append(loop.file.identity)


def keep_open(thing: object) -> None:
    """Closing it would drop the parent's locks, and delete its log."""
    # One reference more than there are keeps it to the end of the process, when a list of them would be emptied.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


class Inherited:
    """What is in the place of the parent's connection: nothing on the stack gets past it."""

    def __getattr__(self, name: str) -> Any:
        raise forked_error()


def refuse_inherited(path: str) -> None:
    """Raise ForkedError if an inherited gateway has this file open."""
    if _inherited and os.path.exists(path):
        file = os.stat(path)
        if (file.st_dev, file.st_ino) in _inherited:
            raise ForkedError(f"{path} is still open in a gateway that this process has inherited: {ADVICE}")

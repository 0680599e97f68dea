"""Open gateways in a forked child: nothing of them is used, closed, or opened again there.

SQLite keeps its table of locks in the memory of the process. A child inherits it, and SQLite there assumes locks
that the child does not have (https://www.sqlite.org/howtocorrupt.html#_carrying_an_open_database_across_a_fork_).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from onewriter.errors import ADVICE, ForkedError
from onewriter.sqlite.inherited import keep_open
from onewriter.write.writer import Writer

_inherited: list[tuple[int, int]] = []  # device and inode of the files that an inherited gateway writes


def forget_inherited(writers: Iterable[Writer]) -> None:
    """Called in the child, immediately after the fork."""
    for writer in writers:
        for thing in writer.after_fork_in_child():
            keep_open(thing)
        if writer.file.identity is None:  # it is about to be opened
            with contextlib.suppress(OSError):
                writer.file.remember(writer.file.files, ())
        _inherited.extend(writer.file.written)


def refuse_inherited(path: str) -> None:
    """Raise ForkedError if an inherited gateway has this file open."""
    if _inherited and os.path.exists(path):
        file = os.stat(path)
        if (file.st_dev, file.st_ino) in _inherited:
            raise ForkedError(f"{path} is still open in a gateway that this process has inherited: {ADVICE}")

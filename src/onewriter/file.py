"""DatabaseFile: whether the file under a gateway is still the one that it has opened. Looks by stat only.

Closing another descriptor of the file would drop this process's locks on it
(https://www.sqlite.org/howtocorrupt.html#_posix_advisory_locks).
"""

from __future__ import annotations

import os

from onewriter.errors import WriterBrokenError

LOOK = 0.1  # seconds between two looks


class FileMovedError(WriterBrokenError):
    """The file was moved, deleted or replaced."""


class DatabaseFile:
    """Threads: written by the writer thread, read by any."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._log = f"{os.path.realpath(path)}-wal"  # SQLite follows links, and keeps the log beside the file itself
        self.identity: tuple[int, int] | None = None  # device and inode; None: not opened yet
        self._looked_at = 0.0

    def remember(self) -> None:
        """The writer has opened the file."""
        if self.identity is None:
            file = os.stat(self.path)
            self.identity = (file.st_dev, file.st_ino)

    def wal_bytes(self) -> int:
        """The size of the write-ahead log's file; 0: there is none."""
        try:
            return os.stat(self._log).st_size
        except OSError:
            return 0

    def check_at_times(self, now: float) -> None:
        """Check, unless that was done a moment ago."""
        if now - self._looked_at >= LOOK:
            self._looked_at = now
            self.check()

    def check(self) -> None:
        """Raise FileMovedError if another file has the name now, or none."""
        if self.identity is None:
            return
        try:
            file = os.stat(self.path)
        except OSError:
            found = "is no longer there"
        else:
            if (file.st_dev, file.st_ino) == self.identity:
                return
            found = "is another file now"
        raise FileMovedError(
            f"{self.path} {found}: it was moved, deleted or replaced while it was open, so the last writes may be lost"
        )

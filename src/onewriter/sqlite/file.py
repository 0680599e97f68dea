"""DatabaseFile: detects that the file of an open gateway, or its log, was moved, deleted or replaced. Uses stat only.

Closing another descriptor of the file would drop this process's locks on it
(https://www.sqlite.org/howtocorrupt.html#_posix_advisory_locks).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator

from onewriter.errors import WriterBrokenError
from onewriter.sqlite.mounts import is_mounted_alone

CHECK_INTERVAL = 0.1  # seconds
LOG, INDEX, JOURNAL = "-wal", "-shm", "-journal"  # https://www.sqlite.org/tempfiles.html
# The last connection that closes a file checkpoints its log and deletes it by name. While another process holds the
# SHARED lock that every connection holds, it is not the last: https://www.sqlite.org/lockingv3.html
KEEP_OPEN = """
import fcntl, sys
files = [open(name, "rb") for name in sys.argv[1:]]
for file in files:
    fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 0x40000002)
print("kept", flush=True)
sys.stdin.read()
"""
Identity = tuple[int, int]  # device and inode
_left_open: list[Identity] = []  # files whose connection this process never closes


class FileMovedError(WriterBrokenError):
    """The file or its log was moved, deleted, replaced or overwritten."""


class DatabaseFile:
    """Threads: written by the writer thread, read by any."""

    def __init__(self, path: str) -> None:
        self.path = path
        # The databases in WAL mode. SQLite follows symbolic links, and keeps the log in the target's folder.
        self.logged = self.files = [os.path.realpath(path)]
        self._log_names = [f"{name}{LOG}" for name in self.logged]
        self.exposed = ""  # why commits may be lost with this file system; empty: they are not
        self.identity: Identity | None = None  # None: not opened yet
        self._logs: dict[str, Identity] = {}  # logs and their indexes, by name
        self._main = self.files[0]
        self._attached: dict[str, Identity] = {}
        self.read_only: list[str] = []  # of these
        self.check_attached: Callable[[], object] | None = None  # called once, when these are known first
        self.look_again_at = 0.0  # when the next ``check`` is due, by the writer
        self.size = 0  # bytes; the file cannot be smaller unless another connection shrank it
        self.is_smaller = False  # than ``size``, at the last check
        self.overwritten = ""

    @property
    def unlogged(self) -> list[str]:
        """The databases in a rollback-journal mode."""
        return [path for path in self.files if path not in self.logged]

    @property
    def attached(self) -> list[str]:
        return list(self._attached)

    @property
    def identities(self) -> list[Identity]:
        """Of the main and attached databases, once they are open."""
        return [*filter(None, [self.identity]), *self._attached.values()]

    @property
    def written(self) -> list[Identity]:
        """Those of them that are not attached to be read only."""
        read_only = [self._attached.get(path) for path in self.read_only]
        return [identity for identity in self.identities if identity not in read_only]

    def remember(self, files: Iterable[str], logged: Iterable[str], read_only: Iterable[str] = ()) -> None:
        """Record what the writer has opened: the main and attached databases, and the logs of ``logged``."""
        if self.identity is None:
            self.identity = _identity(os.stat(self.path))
        self.files = list(dict.fromkeys(map(os.path.realpath, filter(None, files))))
        self.logged = list(dict.fromkeys(map(os.path.realpath, logged)))
        self._log_names = [f"{name}{LOG}" for name in self.logged]
        logs = {}
        for name in (f"{path}{suffix}" for path in self.logged for suffix in (LOG, INDEX)):
            with contextlib.suppress(OSError):  # SQLite creates them on demand
                logs[name] = _identity(os.lstat(name))
        self._logs = logs
        self._main = os.path.realpath(self.path)
        attached = {}
        for path in self.files:
            with contextlib.suppress(OSError):
                attached[path] = _identity(os.lstat(path))
        attached.pop(self._main, None)
        self._attached, self.read_only = attached, list(map(os.path.realpath, read_only))
        check, self.check_attached = self.check_attached, None
        if check is not None:
            check()

    def remember_size(self, needed: int) -> None:
        """From now on the file does not become smaller than it is, or than the database, ``needed`` bytes: the rest
        goes with a checkpoint.
        """
        with contextlib.suppress(OSError):
            # Once there is something in it, it is never empty, unless it is overwritten: perhaps in this moment.
            least = min(1, max(needed, self.size))
            self.size = max(least, min(needed, os.stat(self.path).st_size))
        self.is_smaller = False

    def forget_size(self) -> None:
        """Another connection may have made the file smaller, though never empty."""
        self.size, self.is_smaller = min(self.size, 1), False

    def log_sizes(self) -> list[int]:
        """The sizes of the write-ahead logs in bytes, in the order of ``logged``; 0 where there is none."""
        return list(map(_size, self._log_names))

    def wal_bytes(self) -> int:
        """The size of all write-ahead logs."""
        return sum(map(_size, self._log_names))

    def look(self, now: float) -> None:
        """``check``, for the writer, which need not do so again for ``CHECK_INTERVAL``."""
        self.look_again_at = now + CHECK_INTERVAL
        self.check()

    def check(self) -> None:
        """Raise FileMovedError if the path, or that of a log, now names another file or none.

        Any other error of stat, such as a permission that is missing for a moment, proves nothing about the file.
        """
        if self.overwritten:
            raise FileMovedError(self.overwritten)
        if self.identity is None:
            return
        try:
            file = os.stat(self.path)
        except FileNotFoundError:
            raise _moved(self.path, "is no longer there") from None
        except OSError:
            return
        if _identity(file) != self.identity:
            raise _moved(self.path, "is another file now")
        self.is_smaller = file.st_size < self.size
        if self.is_smaller and file.st_size == 0:
            self.refuse_smaller(0)
        # Under the name that SQLite has followed the path to: beside it is the log.
        _refuse_others({self._main: self.identity, **self._attached})
        self.check_logs()

    def check_logs(self) -> None:
        """Raise FileMovedError if a log is not the one that is open: others would not see what is written to it."""
        logs = self._logs
        try:
            _refuse_others(logs)
        except FileMovedError:
            if self._logs is logs:  # or else another thread has closed it in this moment, and removed them
                raise

    def refuse_smaller(self, size: int | None = None) -> None:
        """Raise FileMovedError: the file is smaller than what was written to it."""
        found = _size(self.path) if size is None else size
        self.overwritten = (
            f"{self.path} has {found:,} bytes, less than the {self.size:,} that it had: it was overwritten while it "
            f"was open, as by a copy of a backup, so the last writes may be lost. {self.path}{LOG} may belong to the "
            "file that was there before. Close all connections; to restore a backup, remove the log, then copy it"
        )
        raise FileMovedError(self.overwritten)

    def close(self, connection: sqlite3.Connection) -> None:
        """Close the write connection, without writing to a database whose log was lost: others may have replaced it."""
        endangered = self._endangered()
        if not endangered:
            self._logs = {}  # SQLite deletes them, unless a reader uses them
            connection.close()
            return
        with _kept_open(endangered) as is_kept:
            if is_kept:
                connection.close()
                return
        # Leaked: it stays open until the process ends, and so does what SQLite has in memory about the file.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
        known = {self._main: self.identity, **self._attached}
        _left_open.extend(filter(None, map(known.get, endangered)))

    def _endangered(self) -> list[str]:
        """The databases that closing the connection would checkpoint from a log that was replaced or deleted, or that
        others do not have: their names have become links to them.
        """
        main = self._main
        lost = {name.removesuffix(LOG).removesuffix(INDEX) for name in self._logs if self._is_lost(name)}
        lost.update(filter(os.path.islink, (main, *self._attached)))
        if self.overwritten and main in self.logged:
            lost.add(main)
        with contextlib.suppress(OSError):
            if main in lost and _identity(os.stat(main)) != self.identity:
                lost.discard(main)  # SQLite detects that by itself
        return sorted(path for path in lost if os.path.exists(path))

    def _is_lost(self, name: str) -> bool:
        """Whether a log or index was replaced or deleted."""
        try:
            return _identity(os.lstat(name)) != self._logs[name]
        except FileNotFoundError:
            return True
        except OSError:
            return False


def _refuse_others(files: dict[str, Identity]) -> None:
    """Their names are of files, not of links: as a link, each would be where others look for another log."""
    for name, identity in list(files.items()):
        try:
            found = _identity(os.lstat(name))
        except FileNotFoundError:
            raise _moved(name, "is no longer there") from None
        except OSError:
            continue
        if found != identity:
            raise _moved(name, "is another file now")


def exposure(paths: Iterable[str]) -> str:
    """Why commits to these files may be lost with their file system; empty: they cannot."""
    return "; ".join(
        f"{path} is mounted without its folder: SQLite keeps the log in that folder, so it is deleted with the "
        "container, and commits that are only in the log are lost. Mount the folder"
        for path in paths
        if is_mounted_alone(path)
    )


def refuse_left_open(path: str) -> None:
    """Raise if this process cannot open the file again: SQLite would use what it still has in memory about it."""
    if _left_open and os.path.exists(path) and _identity(os.stat(path)) in _left_open:
        raise FileMovedError(
            f"the log of {path} was lost while this process had it open, and a connection to it could not be closed: "
            "open it in another process"
        )


@contextlib.contextmanager
def _kept_open(paths: list[str]) -> Iterator[bool]:
    """For the ``with`` block, have another process hold the files open too; False: it could not be started."""
    try:
        keeper = subprocess.Popen(
            [sys.executable or "", "-I", "-S", "-c", KEEP_OPEN, *paths],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except (OSError, RuntimeError, ValueError):  # no such program, no descriptor left, or the interpreter ends
        yield False
        return
    with keeper:
        assert keeper.stdout is not None
        yield keeper.stdout.readline() == b"kept\n"


def _moved(name: str, found: str) -> FileMovedError:
    return FileMovedError(
        f"{name} {found}: it was moved, deleted or replaced while it was open, so the last writes may be lost"
    )


def _identity(file: os.stat_result) -> Identity:
    return file.st_dev, file.st_ino


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0

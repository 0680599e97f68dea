"""Checks of the path and of SQLite's other files, before it opens the database."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
from collections.abc import Callable

from onewriter.sqlite.file import INDEX, JOURNAL, LOG

LOOKS = 3  # at a -wal, -shm or -journal file, which other processes may create and delete meanwhile
SMALLEST_FILE = 512  # bytes; SQLite treats a smaller file as empty, and would overwrite it
MAX_PATHNAME = 512  # bytes, of the names beside it, too; https://www.sqlite.org/src/file/src/os_unix.c


def absolute(path: str) -> str:
    try:
        return os.path.abspath(path)
    except OSError as error:
        raise cannot_open(path, f"the current folder: {error.strerror}") from None


def check(path: str) -> None:
    """Raise if no database can be opened at ``path``, or there is one whose rows would be lost."""
    check_link(path)
    real = os.path.realpath(path)
    check_path(real)
    check_company(real)


def check_path(path: str) -> None:
    """Raise if ``path`` cannot be a database, before SQLite creates anything there. Uses stat only: closing another
    descriptor of the file would drop this process's locks on it (https://www.sqlite.org/howtocorrupt.html#_posix_advisory_locks).
    """
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise cannot_open(path, f"there is no folder {folder}")
    longest = f"{path}{JOURNAL}"
    for look, name in ((os.stat, path), (os.lstat, longest)):
        try:
            look(name)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
                raise cannot_open(path, f"{name}: {error.strerror}") from None
    if os.name == "posix" and len(os.fsencode(longest)) > MAX_PATHNAME:
        most = MAX_PATHNAME - len(JOURNAL)
        raise cannot_open(path, f"its path has {len(os.fsencode(path))} bytes, and SQLite takes {most} at most")
    if os.path.exists(path):
        if os.path.isdir(path):
            raise cannot_open(path, "it is a folder")
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise cannot_open(path, "it is not a regular file")
        if 0 < os.stat(path).st_size < SMALLEST_FILE:
            raise cannot_open(
                path, "file is not a database", sqlite3.SQLITE_NOTADB, "SQLITE_NOTADB", sqlite3.DatabaseError
            )
        if not _may(path, os.W_OK):
            # SQLite would silently open it read-only.
            raise cannot_open(path, "the file is not writable", sqlite3.SQLITE_READONLY, "SQLITE_READONLY")
    if not _may(folder, os.W_OK | os.X_OK):
        raise cannot_open(path, f"the folder {folder} is not writable, and SQLite keeps its log beside the database")


def check_link(path: str) -> None:
    """Raise if a link has taken the place of a database whose log is still beside it."""
    log = f"{path}{LOG}"
    if os.path.islink(path) and size_of(log) > 0 and not os.path.islink(log):
        raise cannot_open(
            path,
            f"it is a link, and {log} is the log of a file that was there before: SQLite keeps that of the file "
            "that the link points to beside that. Put the file back, or move the log away",
        )


def check_names(path: str) -> None:
    """Raise if the file has a second name."""
    if os.path.exists(path) and os.stat(path).st_nlink > 1:
        raise cannot_open(
            path,
            "the file has a second name (a hard link), and SQLite keeps a log for each name: what is written "
            "under one would be lost under the other. Remove all names but one; use a symbolic link instead",
        )


def check_company(path: str) -> None:
    """Raise if the file has a second name, or if its -wal, -shm or -journal file cannot be used."""
    check_names(path)
    for suffix in (LOG, INDEX, JOURNAL):
        owner = path.removesuffix(suffix)
        if owner != path and os.path.basename(owner) and os.path.exists(owner):
            raise cannot_open(path, f"SQLite keeps it for the database {owner}")
        name = f"{path}{suffix}"
        if _stays_unusable(name, lambda name: os.path.isfile(name) and not os.path.islink(name)):
            raise cannot_open(path, f"{name}, which SQLite keeps beside the database, is not a regular file")
        if _stays_unusable(name, lambda name: _may(name, os.R_OK | os.W_OK)):
            raise cannot_open(
                path,
                f"{name}, which SQLite keeps beside the database, is not writable: another user created it. Give this "
                "user permission to write it, or open and close the database once as a user who may write both",
                sqlite3.SQLITE_READONLY,
                "SQLITE_READONLY",
            )
    # The log first: a database that is being created is no longer empty once it has a log.
    if size_of(f"{path}{LOG}") > 0 and size_of(path) == 0:
        what, how = ("empty", "overwritten") if os.path.exists(path) else ("missing", "moved or deleted")
        raise cannot_open(
            path,
            f"the file is {what} and {path}{LOG} is not: the file was {how}, and SQLite would delete the log too. "
            "Put the file back, or move the log away",
        )


def _may(path: str, mode: int) -> bool:
    """Whether SQLite may: as the effective user, where the system can tell."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _stays_unusable(name: str, is_usable: Callable[[str], bool]) -> bool:
    """Whether there is a file that is not usable. Other processes create and delete these files at any moment, so it
    counts only if every look finds the same file."""
    found = _identity(name)
    return found is not None and all(not is_usable(name) and _identity(name) == found for _ in range(LOOKS))


def _identity(name: str) -> tuple[int, int, int] | None:
    try:
        found = os.lstat(name)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns


def cannot_open(
    path: str,
    reason: str,
    code: int = sqlite3.SQLITE_CANTOPEN,
    name: str = "SQLITE_CANTOPEN",
    kind: type[sqlite3.DatabaseError] = sqlite3.OperationalError,
) -> sqlite3.DatabaseError:
    error = kind(f"cannot open {path}: {reason}")
    error.sqlite_errorcode, error.sqlite_errorname = code, name
    return error


def size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0

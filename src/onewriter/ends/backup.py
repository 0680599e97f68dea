"""A consistent copy of the database while it is written to: the target is complete, or untouched."""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

from onewriter.base.arguments import check_callback
from onewriter.ends import exit as at_exit
from onewriter.ends.fork import refuse_inherited
from onewriter.errors import forked_error
from onewriter.sqlite.connection import open_new
from onewriter.sqlite.lent import LentConnection
from onewriter.sqlite.path_checks import absolute, check_path
from onewriter.sqlite.pragma_values import database_files

Progress = Callable[[int, int, int], object]
STEP = 32  # pages


def check_backup(target: Any, progress: Any, pages: Any) -> None:
    """Refuse an invalid target before anything is created."""
    if not isinstance(pages, int) or isinstance(pages, bool):
        raise TypeError(f"pages must be an int, not {type(pages).__name__}")
    if pages == 0 or not -1 <= pages < 2**31:
        raise ValueError(f"pages must be a number of pages for each step, or -1 for all at once, not {pages}")
    if progress is not None:
        check_callback("progress", progress)
    if isinstance(target, sqlite3.Connection):
        if isinstance(target, LentConnection):
            raise ValueError("the target is a connection that a gateway has lent: nothing can be restored into it")
        cursor = target.cursor()
        cursor.row_factory = None
        path = next((row[2] for row in cursor.execute("PRAGMA database_list") if row[1] == "main"), "")
    elif isinstance(target, str | bytes | os.PathLike):
        path = os.fsdecode(target)
        if path in ("", ":memory:") or path.startswith("file:") or "\0" in path:
            raise ValueError(f"the target {path!r} is not the path of a file: give one, or an open sqlite3.Connection")
        path = os.path.realpath(absolute(path))
        check_path(path)
    else:
        raise TypeError(f"the target is a path or a sqlite3.Connection, not {type(target).__name__}")
    refuse_inherited(path)
    if path and at_exit.others_on(path):
        raise ValueError(f"the target {path} is the file of a gateway that is open in this process")
    for suffix in ("-wal", "-shm", "-journal"):
        if path.endswith(suffix) and os.path.exists(path.removesuffix(suffix)):
            raise ValueError(
                f"the target {path} is the name of a file that SQLite keeps for {path.removesuffix(suffix)}"
            )
    for name in (f"{path}-wal", f"{path}-journal"):
        if os.path.exists(name) and not isinstance(target, sqlite3.Connection):
            raise ValueError(f"the target {path} is in use, or was not closed cleanly: there is {name}")


def copy(source: sqlite3.Connection, target: Any, progress: Progress | None, pages: int) -> None:
    """Copy from a connection whose transaction pins what it sees, so that writes do not make it start again."""
    if isinstance(target, sqlite3.Connection):
        source.backup(target, pages=pages, progress=progress and _in_this_process(progress))
        return
    path = os.path.realpath(os.fsdecode(target))
    models = [database_files(source)["main"], path]
    # It stays open until SQLite has closed the file: closing it earlier would drop SQLite's locks there.
    with _appearing_at(path) as unfinished, _created(unfinished, models) as descriptor:
        _copy_in_steps(source, unfinished, descriptor, progress, pages)
        os.fsync(descriptor)


@contextlib.contextmanager
def _created(name: str, models: list[str]) -> Iterator[int]:
    """Create a file that only those may read who may read all of ``models`` that exist."""
    found = []
    for model in models:
        with contextlib.suppress(FileNotFoundError):
            found.append(os.stat(model))
    mode = functools.reduce(operator.and_, (file.st_mode for file in found), 0o644)
    with _opened(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode | 0o600) as descriptor:
        if hasattr(os, "fchown"):
            for file in found[:1]:
                with contextlib.suppress(OSError):  # only a member of the group may give it away
                    os.fchown(descriptor, -1, file.st_gid)
            new = os.fstat(descriptor)
            if any(file.st_gid != new.st_gid for file in found):
                os.fchmod(descriptor, new.st_mode & 0o707)
        yield descriptor


@contextlib.contextmanager
def _opened(path: str, flags: int, mode: int = 0o777) -> Iterator[int]:
    """A descriptor that is closed at the end."""
    opened: list[int] = []
    try:
        # Opened and noted in one step: what a signal handler raises in between would leave it open.
        opened.extend(map(os.open, (path,), (flags,), (mode,)))
        yield opened[0]
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _copy_in_steps(
    source: sqlite3.Connection, path: str, descriptor: int, progress: Progress | None, pages: int
) -> None:
    """Sync each step to the disk: one sync of everything would keep every COMMIT waiting in the file system."""

    sync = getattr(os, "fdatasync", os.fsync)  # not everywhere

    @_in_this_process
    def after_step(status: int, remaining: int, total: int) -> None:
        sync(descriptor)
        if progress is not None and (pages > 0 or remaining == 0):
            progress(status, remaining, total)

    with contextlib.closing(open_new(path)) as connection:
        # What fails is thrown away, so there is nothing to roll back to; and no page waits in memory.
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "cache_size = 10"):
            connection.execute(f"PRAGMA {pragma}").close()
        source.backup(connection, pages=pages if pages > 0 else STEP, progress=after_step)


def _in_this_process(progress: Progress) -> Progress:
    """``progress``, but raising in a child that it forks: the copy is the parent's."""
    process = os.getpid()

    def call(status: int, remaining: int, total: int) -> None:
        progress(status, remaining, total)
        if os.getpid() != process:
            raise forked_error()

    return call


@contextlib.contextmanager
def _appearing_at(path: str) -> Iterator[str]:
    """The name of a new file in the folder of ``path``, which replaces ``path`` at the end of the ``with`` block."""
    unfinished, process = f"{path}.{secrets.token_hex(4)}.unfinished", os.getpid()
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        if os.getpid() == process:
            with contextlib.suppress(OSError):  # the first error is the one that says why
                os.unlink(unfinished)
        raise
    _sync_folder(os.path.dirname(path))


def _sync_folder(folder: str) -> None:
    """Make a new name survive a power loss; where one may only write in the folder, that is left to the system, as
    SQLite does.
    """
    if os.name == "posix":
        with contextlib.suppress(PermissionError), _opened(folder, os.O_RDONLY) as descriptor:
            try:
                os.fsync(descriptor)
            except OSError as error:
                error.add_note(f"onewriter: the copy is in place; a power loss may undo that (fsync of {folder})")
                raise

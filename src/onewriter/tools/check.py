"""Examines a database file, and which processes use it: ``python -m onewriter check FILE``. Changes nothing."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from onewriter.sqlite.connection import open_to_look
from onewriter.sqlite.file import INDEX, JOURNAL, LOG, DatabaseFile, exposure
from onewriter.sqlite.lock_holders import command_of, lock_holders, openers, readers_in_the_way, wal_readers
from onewriter.sqlite.path_checks import check_company, check_link
from onewriter.tools.report import MOST_FINDINGS, Process, Report, describe, judge, names
from onewriter.tools.terminal import printable

PATIENCE = 5.0  # seconds to wait for a lock
READ_HEADER = "import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read(100))"
WAL_VERSION = 2
SYNCHRONOUS = ("OFF", "NORMAL", "FULL", "EXTRA")
ALL_CHECKS = ("quick_check", "foreign_key_check")
NOT_CHECKED = 2  # exit code, as for arguments that cannot be understood
EXIT_CODES = {"ok": 0, "needs attention": 1, "damaged": 3}


class CannotCheckError(Exception):
    """The file cannot be checked; the text says why."""


def check(path: str) -> Report:
    """Look at the file. Raises CannotCheckError."""
    _refuse(path)
    given, path = path, os.path.realpath(path)
    # Before SQLite opens the file: run by root, it gives its own files to the owner of that.
    company = _company(given, path)
    if os.stat(path).st_size == 0 and DatabaseFile(path).wal_bytes() > 0:  # it would delete that log
        report = Report(path, wal_bytes=DatabaseFile(path).wal_bytes(), not_checked=[*ALL_CHECKS], problems=company)
        judge(report)
        return report
    for may_be_closed in (True, True, False):
        report, before = Report(path), os.stat(path)
        is_closed_wal = may_be_closed and not _is_open(path) and _is_wal_by_header(path)
        # Any other connection to it would leave a new, empty log behind, since it may not delete one.
        _look(report, immutable=is_closed_wal)
        after = os.stat(path)
        unchanged = (after.st_mtime_ns, after.st_size) == (before.st_mtime_ns, before.st_size)
        if not is_closed_wal or (unchanged and not _is_open(path)):  # otherwise another process has opened it meanwhile
            break
    if report.journal_mode == "WAL" and report.opened_by:
        # Whoever begins or ends in this moment has none either; so they are asked for again.
        still = [process for process in report.opened_by if process.pid in (openers(path) or ())]
        if still and not os.path.exists(f"{path}{LOG}"):
            company.append(
                f"{path}{LOG} was deleted under {names(still)}: what is committed there since nobody else sees, and it "
                "is lost with that process. Copy the rows through it before you end it"
            )
    report.problems[:0] = company
    judge(report)
    return report


def _refuse(path: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise CannotCheckError(getattr(error, "strerror", None) or str(error)) from None
    if not stat.S_ISREG(mode):
        raise CannotCheckError("it is a folder" if stat.S_ISDIR(mode) else "it is not a regular file")
    if not os.access(path, os.R_OK):
        raise CannotCheckError(_no_right(path))


def _no_right(name: str) -> str:
    return f"no right to read {name}: run this as its owner (user {os.stat(name).st_uid})"


def _is_open(path: str) -> bool:
    """In WAL mode, or left behind with what must be read: an empty log or an index alone says nothing."""
    return DatabaseFile(path).wal_bytes() > 0 or all(os.path.exists(f"{path}{end}") for end in ("-wal", "-shm"))


def _is_wal_by_header(path: str) -> bool:
    """Whether the file says that it is in WAL mode; https://www.sqlite.org/fileformat.html#file_format_version_numbers

    Another process reads it: closing the file here would drop all locks that this one may have on it.
    """
    command = [sys.executable or "", "-I", "-S", "-c", READ_HEADER, path]
    try:
        # What cannot be read there, SQLite will not be able to read either, and says why.
        header = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False).stdout
    except OSError:  # this user may not run it, or there is no such program
        return False
    return header[19:20] == bytes([WAL_VERSION])  # of the two versions, that for readers decides


def _look(report: Report, *, immutable: bool) -> None:
    path = report.path
    report.bytes, report.wal_bytes = os.stat(path).st_size, DatabaseFile(path).wal_bytes()
    report.write_lock, report.wal_readers = _processes(lock_holders(path)), _processes(wal_readers(path))
    report.opened_by = _processes(openers(path))
    try:
        with contextlib.closing(open_to_look(path, PATIENCE, immutable=immutable)) as connection:
            report.journal_mode = "WAL" if immutable else _value(connection, "journal_mode").upper()
            if report.journal_mode != "WAL":
                report.wal_readers = _processes(readers_in_the_way(path))
            _ask(report, connection)
    except sqlite3.Error as error:
        _explain(report, error)


def _explain(report: Report, error: sqlite3.Error) -> None:
    """Why SQLite did not go on. Raises CannotCheckError if nothing can be said of the file."""
    code, path = getattr(error, "sqlite_errorcode", 0) & 0xFF, report.path
    if code == sqlite3.SQLITE_CORRUPT:
        report.quick_check.append(str(error))
    elif code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_READONLY):
        report.not_checked += ALL_CHECKS
        report.write_lock = _processes(lock_holders(path))
        # READONLY: something must be written before anybody can read
        why = _locked(report, error) if code == sqlite3.SQLITE_BUSY else _cut_off(path)
        report.problems.append(f"not checked any further: {why}")
    elif code == sqlite3.SQLITE_NOTADB:
        raise CannotCheckError(
            f"{error}: it is of another kind, encrypted, or its beginning was overwritten. Look whether this is the "
            "path that the application opens; if it is, restore a backup"
        ) from None
    else:
        raise CannotCheckError(_closed_to_us(path) if code == sqlite3.SQLITE_CANTOPEN else str(error)) from None


def _locked(report: Report, error: sqlite3.Error) -> str:
    by = f", by {names(report.write_lock)}" if report.write_lock else ""
    return f"{error}{by}. Check again when that transaction has ended, or end that process"


def _closed_to_us(path: str) -> str:
    """Why SQLite cannot open a file that this user may read."""
    for name in (f"{path}{suffix}" for suffix in (LOG, INDEX, JOURNAL)):
        if os.path.exists(name) and not os.access(name, os.R_OK):
            return f"{_no_right(name)}, since rows may be in it that are not in the file"
    if os.path.exists(f"{path}{LOG}") and not os.access(os.path.dirname(path), os.W_OK):
        return (
            f"to read {path}{LOG} SQLite creates {path}{INDEX}, and this user may not write in that folder: run this "
            "as one who may, or check a copy of both files in another folder"
        )
    return "unable to open database file"


def _cut_off(path: str) -> str:
    """What a crash has left, and what SQLite will do with it."""
    if os.path.exists(f"{path}{JOURNAL}"):
        return (
            f"a crash has interrupted a transaction, and {path}{JOURNAL} has what was there "
            "before. The next connection that may write rolls it back: open the file once, and "
            "check again. Without that journal the file would be damaged"
        )
    return (
        f"a crash has left {path}{LOG} behind. The next connection that may write recovers "
        "it: open the file once, and check again"
    )


def _ask(report: Report, connection: sqlite3.Connection) -> None:
    report.page_size, report.pages = _value(connection, "page_size"), _value(connection, "page_count")
    report.free_pages = _value(connection, "freelist_count")
    report.synchronous = SYNCHRONOUS[_value(connection, "synchronous")]
    with _as_far_as_possible(report, "quick_check"):
        rows = connection.execute(f"PRAGMA quick_check({MOST_FINDINGS})").fetchall()
        report.quick_check = [text for (text,) in rows if text != "ok"]
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
    report.tables = len(tables)
    count = "SELECT count(DISTINCT id) FROM pragma_foreign_key_list(?)"
    report.foreign_keys = sum(connection.execute(count, (name,)).fetchone()[0] for name in tables)
    with _as_far_as_possible(report, "foreign_key_check"):
        for table, rowid, parent, _ in connection.execute("PRAGMA foreign_key_check"):
            report.foreign_key_violation_count += 1
            if report.foreign_key_violation_count <= MOST_FINDINGS:
                row = f"{table}, a row" if rowid is None else f"{table}, rowid {rowid},"  # None: WITHOUT ROWID
                report.foreign_key_violations.append(f"{row} has no parent in {parent}")


def _value(connection: sqlite3.Connection, pragma: str) -> Any:
    return connection.execute(f"PRAGMA {pragma}").fetchone()[0]


@contextlib.contextmanager
def _as_far_as_possible(report: Report, what: str) -> Iterator[None]:
    """What only the application's own connections have, a collation say, is missing here."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_ERROR:
            raise
        report.not_checked.append(what)
        report.advice.append(
            f"{what} could not be done here: {error}. Run `PRAGMA {what}` on a connection of the application, which "
            "may have what is missing"
        )


def _processes(pids: list[int] | None) -> list[Process] | None:
    return None if pids is None else [Process(pid, command_of(pid)) for pid in pids]


def _company(given: str, path: str) -> list[str]:
    """What is wrong with the file's names, and with SQLite's other files."""
    found = [exposure([path])]
    try:
        check_link(given)
        check_company(path)
    except sqlite3.Error as error:
        # Who may not write the file need not be able to write its log.
        if error.sqlite_errorcode != sqlite3.SQLITE_READONLY or os.access(path, os.W_OK):
            found.append(str(error).removeprefix(f"cannot open {given}: ").removeprefix(f"cannot open {path}: "))
    file = os.stat(path)
    for name in (f"{path}{suffix}" for suffix in (LOG, INDEX, JOURNAL)):
        with contextlib.suppress(OSError):
            other = os.stat(name)
            is_shared = other.st_mode & stat.S_IWOTH or (other.st_gid == file.st_gid and other.st_mode & stat.S_IWGRP)
            if other.st_uid != file.st_uid and not is_shared:
                found.append(
                    f"{name} belongs to another user ({other.st_uid}) than the file ({file.st_uid}), who cannot write "
                    "it, nor so the file: give it to that user (chown)"
                )
    return list(filter(None, found))


def _interruptible(path: str) -> Report:
    """``check`` in a thread: no signal reaches Python while SQLite looks through a large file."""
    found: Future[Report] = Future()

    def look() -> None:
        try:
            found.set_result(check(path))
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=look, daemon=True).start()
    return found.result()


def run(arguments: argparse.Namespace) -> int:
    """Print the report; the exit code is for scripts."""
    try:
        report = _interruptible(arguments.file)
    except CannotCheckError as error:
        print(printable(f"cannot check {arguments.file or repr('')}: {error}"), file=sys.stderr)
        return NOT_CHECKED
    print(json.dumps(dataclasses.asdict(report), indent=2) if arguments.json else describe(report))
    return EXIT_CODES[report.verdict]


def add_command(subparsers: Any) -> None:
    """Add ``check`` to the command line."""
    parser = subparsers.add_parser(
        "check",
        help="examine a database file: mode, log, locks, damage, advice",
        description="Examine a database file, also while it is written to, and change nothing. "
        "Exit codes: 0 ok, perhaps with advice; 1 something needs attention; 2 the file cannot be checked; "
        "3 it is damaged; 130 interrupted.",
    )
    parser.add_argument("file", metavar="FILE", help="the database")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)

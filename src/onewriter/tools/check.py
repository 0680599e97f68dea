"""What a database file is like, and who has it: ``python -m onewriter check FILE``. Changes nothing."""

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
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from onewriter.sqlite.connection import open_to_look
from onewriter.sqlite.file import INDEX, JOURNAL, LOG, DatabaseFile, exposure
from onewriter.sqlite.lock_holders import command_of, describe_process, lock_holders, readers_in_the_way, wal_readers
from onewriter.sqlite.path_checks import SMALLEST_FILE, check_company

LARGE_WAL = 4 * 2**20  # bytes; the default of wal_limit
MOST_FINDINGS = 20
PATIENCE = 5.0  # seconds to wait for a lock
FIXED_VERSION = (3, 51, 3)
READ_HEADER = "import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read(100))"
WAL_VERSION = 2
SYNCHRONOUS = ("OFF", "NORMAL", "FULL", "EXTRA")
ALL_CHECKS = ("quick_check", "foreign_key_check")
ATTENTION, NOT_CHECKED = 1, 2  # exit codes


@dataclass(frozen=True)
class Process:
    """Somebody who has a lock; the command is empty where the system does not tell."""

    pid: int
    command: str


@dataclass
class Report:
    """What was found. ``problems`` want attention, ``advice`` is worth a thought.

    ``write_lock`` and ``wal_readers`` (in the rollback-journal modes: those who read now): None where the system does
    not tell.
    """

    path: str
    sqlite_version: str = sqlite3.sqlite_version
    bytes: int = 0
    journal_mode: str = "unknown"
    synchronous: str = "unknown"
    page_size: int = 0
    pages: int = 0
    free_pages: int = 0
    wal_bytes: int = 0
    can_be_checkpointed: bool = True
    write_lock: list[Process] | None = None
    wal_readers: list[Process] | None = None
    foreign_keys: int = 0
    foreign_key_violations: list[str] = field(default_factory=list)
    quick_check: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)


class CannotCheckError(Exception):
    """There is nothing here that could be checked; the text says why."""


def check(path: str) -> Report:
    """Look at the file. Raises CannotCheckError."""
    _refuse(path)
    path = os.path.realpath(path)
    company = _company(path)  # before SQLite opens the file: run by root, it gives its own files to the owner of that
    if os.stat(path).st_size == 0 and DatabaseFile(path).wal_bytes() > 0:  # it would delete that log
        return Report(path, wal_bytes=DatabaseFile(path).wal_bytes(), not_checked=[*ALL_CHECKS], problems=company)
    for may_be_closed in (True, True, False):
        report, before = Report(path), os.stat(path)
        is_closed_wal = may_be_closed and not _is_open(path) and _is_wal_by_header(path)
        # Any other connection to it would leave a new, empty log behind, since it may not delete one.
        _look(report, immutable=is_closed_wal)
        after = os.stat(path)
        unchanged = (after.st_mtime_ns, after.st_size) == (before.st_mtime_ns, before.st_size)
        if not is_closed_wal or (unchanged and not _is_open(path)):  # or else somebody has opened it meanwhile
            break
    report.problems[:0] = company
    _judge(report)
    return report


def _refuse(path: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise CannotCheckError(getattr(error, "strerror", None) or str(error)) from None
    if not stat.S_ISREG(mode):
        raise CannotCheckError("it is a folder" if stat.S_ISDIR(mode) else "it is not a regular file")
    if not os.access(path, os.R_OK):
        raise CannotCheckError("no right to read it")


def _is_open(path: str) -> bool:
    """In WAL mode, or left behind with what must be read: an empty log alone says nothing, its index is there too."""
    return DatabaseFile(path).wal_bytes() > 0 or os.path.exists(f"{path}-shm")


def _is_wal_by_header(path: str) -> bool:
    """Whether the file says that it is in WAL mode; https://www.sqlite.org/fileformat.html#file_format_version_numbers

    Another process reads it: closing the file here would drop all locks that this one may have on it.
    """
    command = [sys.executable, "-I", "-S", "-c", READ_HEADER, path]
    # What cannot be read there, SQLite will not be able to read either, and says why.
    header = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False).stdout
    return header[18:20] == bytes([WAL_VERSION, WAL_VERSION])


def _look(report: Report, *, immutable: bool) -> None:
    path = report.path
    report.bytes, report.wal_bytes = os.stat(path).st_size, DatabaseFile(path).wal_bytes()
    report.write_lock, report.wal_readers = _processes(lock_holders(path)), _processes(wal_readers(path))
    try:
        with contextlib.closing(open_to_look(path, PATIENCE, immutable=immutable)) as connection:
            report.journal_mode = "WAL" if immutable else _value(connection, "journal_mode").upper()
            if report.journal_mode != "WAL":
                report.wal_readers = _processes(readers_in_the_way(path))
            _ask(report, connection)
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_CORRUPT:
            report.quick_check.append(str(error))
        elif code == sqlite3.SQLITE_BUSY:
            report.problems.append(f"not checked any further: {error}")
            report.not_checked += ALL_CHECKS
            report.write_lock = _processes(lock_holders(path))
        elif code == sqlite3.SQLITE_READONLY:  # something must be written before anybody can read
            report.problems.append(_cut_off(path))
            report.not_checked += ALL_CHECKS
        elif code == sqlite3.SQLITE_NOTADB:
            encrypted = ", or it is encrypted" if report.bytes >= SMALLEST_FILE else ""
            raise CannotCheckError(f"{error}{encrypted}") from None
        else:
            raise CannotCheckError(str(error)) from None


def _cut_off(path: str) -> str:
    """What a crash has left, and what becomes of it."""
    if os.path.exists(f"{path}{JOURNAL}"):
        return (
            f"not checked any further: a crash has cut a transaction off, and {path}{JOURNAL} has what was there "
            "before. The next connection that may write puts that back, and so undoes it: open the file once, and "
            "check again. Without that journal the file would be damaged"
        )
    return (
        f"not checked any further: a crash has left {path}{LOG} behind. The next connection that may write reads it "
        "again: open the file once, and check again"
    )


def _ask(report: Report, connection: sqlite3.Connection) -> None:
    report.page_size, report.pages = _value(connection, "page_size"), _value(connection, "page_count")
    report.free_pages = _value(connection, "freelist_count")
    report.synchronous = SYNCHRONOUS[_value(connection, "synchronous")]
    with _as_far_as_possible(report, "quick_check"):
        rows = connection.execute(f"PRAGMA quick_check({MOST_FINDINGS})").fetchall()
        report.quick_check = [text for (text,) in rows if text != "ok"]
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
    count = "SELECT count(DISTINCT id) FROM pragma_foreign_key_list(?)"
    report.foreign_keys = sum(connection.execute(count, (name,)).fetchone()[0] for name in tables)
    with _as_far_as_possible(report, "foreign_key_check"):
        for table, rowid, parent, _ in connection.execute("PRAGMA foreign_key_check").fetchmany(MOST_FINDINGS):
            report.foreign_key_violations.append(f"{table}, rowid {rowid}, has no parent in {parent}")


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
        report.advice.append(f"{what} could not be done here: {error}")


def _processes(pids: list[int] | None) -> list[Process] | None:
    return None if pids is None else [Process(pid, command_of(pid)) for pid in pids]


def _judge(report: Report) -> None:
    """Say what the findings mean."""
    problems, advice = report.problems, report.advice
    if report.bytes == 0:
        advice.append("the file is empty, a database without tables: if rows were expected, this is not the path")
    if report.quick_check:
        problems.append("the file is damaged: stop writing, keep a copy of it and its -wal, restore from a backup")
    if report.foreign_key_violations:
        problems.append("rows refer to rows that are not there: `PRAGMA foreign_key_check` lists them all")
    report.can_be_checkpointed = report.journal_mode not in ("WAL", "unknown") or not report.wal_readers
    if report.wal_bytes > LARGE_WAL:
        if report.wal_readers:
            problems.append(
                f"the log is large and cannot begin anew while it is read, by {_names(report.wal_readers)}: "
                "end that read, or keep readers short"
            )
        else:
            advice.append("the log is large, and nobody reads from it now: the next checkpoint makes it small")
    if report.write_lock:
        advice.append(f"SQLite's write lock is held at this moment by {_names(report.write_lock)}")
    if report.journal_mode not in ("WAL", "unknown") and report.bytes:
        advice.append(
            "readers and the writer wait for each other in this mode: DbWriter uses WAL unless told otherwise"
        )
    if report.journal_mode == "WAL" and sqlite3.sqlite_version_info < FIXED_VERSION:
        advice.append(
            f"SQLite {report.sqlite_version} can, very rarely, damage a log that several processes write and "
            "checkpoint; 3.51.3 cannot: update it if several processes have this file"
        )
    if report.pages and report.free_pages * 2 > report.pages:
        advice.append("more than half of the file is free pages: `VACUUM` makes it smaller")


def _company(path: str) -> list[str]:
    """What is wrong with the file's names, and with what SQLite keeps beside it."""
    found = [exposure([path])]
    try:
        check_company(path)
    except sqlite3.Error as error:
        found.append(str(error))
    file = os.stat(path)
    for name in (f"{path}{suffix}" for suffix in (LOG, INDEX, JOURNAL)):
        with contextlib.suppress(OSError):
            other = os.stat(name)
            is_shared = other.st_mode & stat.S_IWOTH or (other.st_gid == file.st_gid and other.st_mode & stat.S_IWGRP)
            if other.st_uid != file.st_uid and not is_shared:
                found.append(
                    f"{name} belongs to another user ({other.st_uid}) than the file ({file.st_uid}), who cannot write "
                    "it, nor so the file"
                )
    return list(filter(None, found))


def _names(processes: list[Process]) -> str:
    return ", ".join(describe_process(process.pid) for process in processes)


def describe(report: Report) -> str:
    """The report for people."""
    held = "nobody" if report.write_lock == [] else "cannot be told here"
    read = "nobody" if report.wal_readers == [] else "cannot be told here"
    keys = f"{report.foreign_keys} declared, " if report.foreign_keys else "none declared, "
    violations = _count(report.foreign_key_violations, "violation")
    found = "not all checked" if "foreign_key_check" in report.not_checked else "no violation"
    well = "not done" if "quick_check" in report.not_checked else "ok"
    rows = {
        "size": f"{report.bytes:,} bytes",
        "pages": f"{report.pages:,} of {report.page_size:,} bytes, {report.free_pages:,} of them free"
        if report.page_size
        else "unknown",
        "journal mode": report.journal_mode if report.bytes else "none yet",
        "log (-wal)": f"{report.wal_bytes:,} bytes"
        + ("" if report.can_be_checkpointed else ", cannot begin anew while it is read"),
        "read by": _names(report.wal_readers) if report.wal_readers else read,
        "write lock": _names(report.write_lock) if report.write_lock else held,
        "synchronous": f"{report.synchronous} in a plain connection; each has its own setting",
        "foreign keys": keys + (violations or found),
        "quick_check": _count(report.quick_check, "finding") or well,
        "SQLite": report.sqlite_version,
    }
    lines = [report.path, *(f"  {name:<13} {text}" for name, text in rows.items())]
    lines += [f"    {text}" for text in (*report.quick_check, *report.foreign_key_violations)]
    lines += [f"PROBLEM: {text}" for text in report.problems] + [f"advice: {text}" for text in report.advice]
    return "\n".join([*lines, "needs attention" if report.problems else "ok"])


def _count(found: list[str], what: str) -> str:
    """In words; empty: none."""
    count = len(found)
    return f"{count} {what}{'s' * (count > 1)}{' or more' * (count >= MOST_FINDINGS)}" if found else ""


def run(arguments: argparse.Namespace) -> int:
    """Print the report; the exit code is for scripts."""
    try:
        report = check(arguments.file)
    except CannotCheckError as error:
        print(f"cannot check {arguments.file}: {error}", file=sys.stderr)
        return NOT_CHECKED
    print(json.dumps(dataclasses.asdict(report), indent=2) if arguments.json else describe(report))
    return ATTENTION if report.problems else 0


def add_command(subparsers: Any) -> None:
    """Add ``check`` to the command line."""
    parser = subparsers.add_parser(
        "check",
        help="look at a database file: mode, log, locks, damage, advice",
        description="Look at a database file, also while others write to it, and change nothing. "
        "Exit codes: 0 ok; 1 something needs attention; 2 the file cannot be checked; 130 interrupted.",
    )
    parser.add_argument("file", metavar="FILE", help="the database")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)

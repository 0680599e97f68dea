"""What ``check`` says about its findings: how bad they are, and what to do."""

from __future__ import annotations

import platform
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from onewriter.sqlite.lock_holders import describe_process
from onewriter.tools.terminal import printable, wrap
from onewriter.tools.versions import gil_enabled, versions

LARGE_WAL = 4 * 2**20  # bytes; the default of wal_limit
MOST_FINDINGS = 20
# https://www.sqlite.org/wal.html#walresetbug: fixed from here on, and in these older lines
FIXED_VERSION = (3, 51, 3)
ALSO_FIXED = ((3, 50, 7), (3, 44, 6))
UNTOLD = "cannot be determined here"
LABEL = 16  # columns before a row's text


@dataclass(frozen=True)
class Process:
    """A process that has a lock; the command is empty where the system does not say."""

    pid: int
    command: str


@dataclass
class Report:
    """What was found. ``problems`` need attention, ``advice`` may help.

    ``write_lock``, ``wal_readers`` (in the rollback-journal modes: those who read now) and ``opened_by`` (in WAL mode
    only): None where the system does not tell. ``synchronous``: what a connection has that does not set it.
    """

    path: str
    verdict: Literal["ok", "needs attention", "damaged"] = "ok"
    sqlite_version: str = sqlite3.sqlite_version
    python_version: str = platform.python_version()
    gil_enabled: bool | None = field(default_factory=gil_enabled)
    bytes: int = 0
    journal_mode: str = "unknown"
    synchronous: str = "unknown"
    page_size: int = 0
    pages: int = 0
    free_pages: int = 0
    tables: int | None = None
    wal_bytes: int = 0
    can_be_checkpointed: bool = True
    write_lock: list[Process] | None = None
    wal_readers: list[Process] | None = None
    opened_by: list[Process] | None = None
    foreign_keys: int = 0
    foreign_key_violations: list[str] = field(default_factory=list)  # the first of them
    foreign_key_violation_count: int = 0
    quick_check: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)


def judge(report: Report) -> None:
    """Add what the findings mean, and the verdict."""
    # Of a file that is damaged, or could not be read, the log may be what saves it.
    is_sound = report.tables is not None and not report.quick_check
    report.can_be_checkpointed = is_sound and (report.journal_mode != "WAL" or not report.wal_readers)
    report.problems += _problems(report)
    report.advice += _advice(report)
    if report.quick_check:
        report.verdict = "damaged"
    elif report.problems:
        report.verdict = "needs attention"


def _problems(report: Report) -> Iterator[str]:
    if report.bytes == 0 and report.wal_bytes == 0:
        yield (
            "the file is empty, to SQLite a database without tables: if there should be rows in it, look whether this "
            "is the path that the application opens, or restore a backup"
        )
    if report.quick_check:
        yield (
            "the file is damaged: stop all programs that use it, copy it with its -wal, and restore a backup; "
            "without one, `sqlite3 FILE .recover` saves what can be read"
        )
    if report.foreign_key_violations:
        yield (
            "rows refer to rows that do not exist: `PRAGMA foreign_key_check` lists them; delete or change them, "
            "or insert what they refer to. Only a connection with `PRAGMA foreign_keys = ON` prevents them"
        )
    if report.wal_bytes > LARGE_WAL and report.wal_readers:
        yield (
            "the write-ahead log is large, and cannot be reset while it is read, by "
            f"{names(report.wal_readers)}: end that read, or keep readers short"
        )


def _advice(report: Report) -> Iterator[str]:
    if report.tables == 0 and report.bytes:
        yield "there are no tables in it: if there should be, look whether this is the path that the application opens"
    if report.wal_bytes > LARGE_WAL and report.can_be_checkpointed:
        yield "the write-ahead log is large, and no reader uses it now: `PRAGMA wal_checkpoint(TRUNCATE)` truncates it"
    if report.write_lock and "quick_check" not in report.not_checked:
        yield (
            f"SQLite's write lock is held at this moment by {names(report.write_lock)}: if it is named "
            "repeatedly, have it commit before it computes or waits"
        )
    if report.journal_mode not in ("WAL", "unknown") and report.bytes and not report.quick_check:
        yield (
            "readers and the writer wait for each other in this journal mode: `PRAGMA journal_mode = WAL` changes it "
            "for good; DbWriter does so unless told otherwise"
        )
    if report.journal_mode == "WAL" and _has_wal_reset_bug(sqlite3.sqlite_version_info):
        yield from _wal_reset_bug(report)
    if report.pages and report.free_pages * 2 > report.pages and not report.quick_check:
        yield "more than half of the file is free pages: `VACUUM` makes it smaller"


def _has_wal_reset_bug(version: tuple[int, ...]) -> bool:
    return version < FIXED_VERSION and not any(version[:2] == fixed[:2] and version >= fixed for fixed in ALSO_FIXED)


def _wal_reset_bug(report: Report) -> Iterator[str]:
    """Where the file may be open in several processes: within one, the gateway's only writer prevents it."""
    if len(report.opened_by) > 1 if report.opened_by is not None else report.wal_bytes:
        several = "several processes have it open, and" if report.opened_by else "if several processes have it open,"
        yield (
            f"{several} SQLite {report.sqlite_version} can, very rarely, damage a database while one of them "
            "checkpoints and another commits (https://www.sqlite.org/wal.html#walresetbug): update SQLite to 3.51.3 or "
            "later, 3.50.7 or 3.44.6"
        )


def names(processes: list[Process]) -> str:
    return ", ".join(describe_process(process.pid) for process in processes)


def describe(report: Report) -> str:
    """The report for people."""
    lines = [report.path, *(f"  {name:<{LABEL - 3}} {text}" for name, text in _rows(report))]
    lines += [f"    {text}" for text in (*report.quick_check, *report.foreign_key_violations)]
    if (more := report.foreign_key_violation_count - len(report.foreign_key_violations)) > 0:
        lines.append(f"    and {more:,} more")
    indents = [*(LABEL for _ in lines), *(2 for _ in (*report.problems, *report.advice, ""))]
    lines += [f"PROBLEM: {text}" for text in report.problems] + [f"advice: {text}" for text in report.advice]
    lines.append(report.verdict)
    return "\n".join(wrap(printable(line), indent) for line, indent in zip(lines, indents, strict=True))


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    yield "size", f"{report.bytes:,} bytes"
    if report.page_size:
        yield "pages", f"{report.pages:,} of {report.page_size:,} bytes, {report.free_pages:,} of them free"
    yield "journal mode", report.journal_mode if report.bytes else "none yet"
    if report.journal_mode == "WAL" or report.wal_bytes:
        blocked = ", cannot be reset while it is read" if report.wal_readers else ""
        yield "log (-wal)", f"{report.wal_bytes:,} bytes{blocked}"
        yield "opened by", _nobody_or(report.opened_by)
    yield "read by", _nobody_or(report.wal_readers)
    yield "write lock", _nobody_or(report.write_lock)
    if report.synchronous != "unknown":
        yield "synchronous", f"not stored in the file; {report.synchronous} in a connection that sets none"
    yield "foreign keys", _foreign_keys(report)
    yield "quick_check", "not done" if "quick_check" in report.not_checked else _findings(report.quick_check)
    yield "checked with", versions()


def _nobody_or(processes: list[Process] | None) -> str:
    return UNTOLD if processes is None else names(processes) or "nobody"


def _foreign_keys(report: Report) -> str:
    if "foreign_key_check" in report.not_checked:
        return "not all checked"
    count = report.foreign_key_violation_count
    found = f"{count:,} violation{'s' * (count > 1)}" if count else "no violation"
    return f"{report.foreign_keys} declared, {found}" if report.foreign_keys else "none declared"


def _findings(found: list[str]) -> str:
    count = len(found)
    return f"{count} finding{'s' * (count > 1)}{' or more' * (count >= MOST_FINDINGS)}" if found else "ok"

"""What check says of what it has found, without a file."""

from __future__ import annotations

import sqlite3

import pytest

from onewriter.tools.report import Process, Report, describe, judge

TWO = [Process(1, "one"), Process(2, "two")]


def judged(**facts: object) -> Report:
    report = Report("app.db", **{"bytes": 4096, "journal_mode": "WAL", "write_lock": [], "wal_readers": [], **facts})  # type: ignore[arg-type]
    judge(report)
    return report


@pytest.mark.parametrize(
    ("version", "has_it"),
    [
        ((3, 37, 2), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 45, 0), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 52, 0), False),
        ((4, 0, 0), False),
    ],
)
def test_the_wal_reset_bug_is_told_of_the_versions_that_have_it(
    version: tuple[int, int, int], has_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", version)
    assert any("walresetbug" in line for line in judged(opened_by=TWO).advice) is has_it


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"opened_by": TWO}, True),
        ({"opened_by": TWO[:1]}, False),
        ({"opened_by": []}, False),
        ({"opened_by": None, "wal_bytes": 32}, True),  # the system does not say who has it open, but somebody has
        ({"opened_by": None, "wal_bytes": 0}, False),
        ({"opened_by": TWO, "journal_mode": "DELETE"}, False),
    ],
)
def test_the_wal_reset_bug_is_told_where_several_processes_may_have_the_file(
    facts: dict[str, object], told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 40, 1))
    assert any("walresetbug" in line for line in judged(**facts).advice) is told


@pytest.mark.parametrize(
    ("facts", "verdict"),
    [
        ({}, "ok"),
        ({"journal_mode": "DELETE"}, "ok"),
        ({"bytes": 0, "journal_mode": "DELETE"}, "needs attention"),
        ({"foreign_key_violations": ["c, rowid 1, has no parent in t"]}, "needs attention"),
        ({"problems": ["not checked any further: database is locked"]}, "needs attention"),
        ({"quick_check": ["database disk image is malformed"]}, "damaged"),
        ({"quick_check": ["wrong"], "foreign_key_violations": ["c"]}, "damaged"),
    ],
)
def test_the_verdict_is_the_worst_of_the_findings(facts: dict[str, object], verdict: str) -> None:
    report = judged(**facts)
    assert report.verdict == verdict
    assert describe(report).endswith(f"\n{verdict}")
    assert bool(report.problems) is (verdict != "ok")


def test_every_finding_says_what_to_do() -> None:
    worst = judged(bytes=0, tables=0, quick_check=["x"], foreign_key_violations=["x"], pages=10, free_pages=9)
    large = judged(wal_bytes=2**30, wal_readers=TWO, write_lock=TWO, opened_by=TWO)
    calm = judged(wal_bytes=2**30, journal_mode="DELETE", tables=0)
    for line in (*worst.problems, *worst.advice, *large.problems, *large.advice, *calm.advice):
        what, _, remedy = line.partition(": ")
        assert what, line
        assert remedy, line


def test_the_log_is_no_row_of_a_file_without_one() -> None:
    assert "log (-wal)" in describe(judged())
    assert "log (-wal)" not in describe(judged(journal_mode="DELETE"))

"""Failures: told to the one they concern, and to nobody twice; the writer goes on."""

from __future__ import annotations

import logging
import os
import sqlite3
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import DEADLINE, parked, writer_of
from onewriter import DbWriter, Ticket, Transaction, WriterBrokenError


@pytest.fixture
def db(any_db: DbWriter) -> DbWriter:
    any_db.run("CREATE TABLE t (n INTEGER)")
    return any_db


def test_when_the_writer_thread_dies_every_job_gets_an_error_of_its_own(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(todo: object) -> None:
        raise RuntimeError("the thread's own fault")

    db = DbWriter(path)
    with parked(db):
        tickets = [db.enqueue("SELECT 1") for _ in range(50)]
        monkeypatch.setattr(writer_of(db), "_write_next", die)
    errors = [ticket.exception(DEADLINE) for ticket in tickets]
    assert len({id(error) for error in errors}) == 50
    assert all(isinstance(error, WriterBrokenError) for error in errors)
    assert all(error is not None and isinstance(error.__cause__, RuntimeError) for error in errors)
    depths = []
    for ticket in tickets:
        with pytest.raises(WriterBrokenError) as caught:
            ticket.result(DEADLINE)
        depths.append(len(traceback.extract_tb(caught.value.__traceback__)))
    assert max(depths) == min(depths)
    for call in (lambda: db.run("SELECT 1"), lambda: db.enqueue("SELECT 1"), lambda: db.read("SELECT 1")):
        with pytest.raises(WriterBrokenError, match="own fault"):
            call()
    assert db.health.startswith("broken")
    db.close()


BAD_VALUES: list[Any] = [
    pytest.param((object(),), sqlite3.ProgrammingError, id="an object"),
    (({"a": 1},), sqlite3.ProgrammingError),
    ((2**63,), OverflowError),
    ((-(2**63) - 1,), OverflowError),
    (("x\ud83d",), UnicodeEncodeError),
    ((1, 2), sqlite3.ProgrammingError),
]


@pytest.mark.parametrize(("params", "kind"), BAD_VALUES, ids=repr)
def test_a_value_that_cannot_be_bound_fails_its_own_job_only(
    db: DbWriter, params: Any, kind: type[BaseException]
) -> None:
    with pytest.raises(kind):
        db.run("INSERT INTO t VALUES (?)", params)
    with pytest.raises(kind), db.transaction() as tx:
        tx.execute("INSERT INTO t VALUES (5)")
        tx.execute("INSERT INTO t VALUES (?)", params)
    db.run("INSERT INTO t VALUES (1)")
    assert db.read("SELECT n FROM t") == [(1,)]


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, BaseException])
def test_whatever_a_job_raises_reaches_its_caller_only(db: DbWriter, kind: type[BaseException]) -> None:
    def job(tx: Transaction) -> None:
        tx.execute("INSERT INTO t VALUES (5)")
        raise kind("from the job")

    with pytest.raises(kind, match="from the job"):
        db.run(job)
    db.run("INSERT INTO t VALUES (1)")
    assert db.read("SELECT n FROM t") == [(1,)]


def test_many_rows_with_a_bad_one_leave_none(db: DbWriter) -> None:
    with pytest.raises(OverflowError):
        db.run_many("INSERT INTO t VALUES (?)", [(1,), (2,), (2**63,), (4,)])
    assert db.read("SELECT n FROM t") == []


def test_a_failed_enqueue_that_nobody_waits_for_is_logged_once_with_its_label(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Ticket[Any]] = []
    with DbWriter(path, on_error=told.append) as db:
        ticket = db.enqueue("INSERT INTO nowhere VALUES (1)", label="the lost one")
        db.enqueue("SELECT 1")
        db.flush()
        assert told == [ticket]
    records = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(records) == 1
    assert "the lost one" in records[0].getMessage()
    assert "test_failures.py" in records[0].getMessage()


def fill(db: DbWriter) -> Callable[[Transaction], object]:
    return lambda tx: tx.executemany("INSERT INTO big VALUES (?)", [("x" * 1000,) for _ in range(2000)])


def test_a_full_disk_is_told_as_such_and_the_next_job_works_when_there_is_room(path: Path) -> None:
    def limit(connection: sqlite3.Connection, readonly: bool) -> None:
        if not readonly:
            connection.execute("CREATE TABLE IF NOT EXISTS big (text TEXT)")
            connection.execute("PRAGMA max_page_count = 40")

    with DbWriter(path, on_connect=limit, lock_timeout=3600) as db:
        with pytest.raises(sqlite3.OperationalError) as caught:
            db.run(fill(db), timeout=DEADLINE)
        assert caught.value.sqlite_errorname == "SQLITE_FULL"
        with pytest.raises(sqlite3.OperationalError) as caught, db.transaction() as tx:
            fill(db)(tx)
        assert caught.value.sqlite_errorname == "SQLITE_FULL"
        assert db.read_value("SELECT count(*) FROM big") == 0
        db.run("PRAGMA max_page_count = 100000")
        db.run(fill(db))
        assert db.read_value("SELECT count(*) FROM big") == 2000


def test_corruption_is_told_to_whom_it_hits_and_the_rest_goes_on(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with DbWriter(path) as db:
        db.run("CREATE TABLE sound (n INTEGER)")
        db.run("INSERT INTO sound VALUES (1)")
        db.run("CREATE TABLE hurt (n INTEGER, text TEXT)")
        db.run_many("INSERT INTO hurt VALUES (?, ?)", [(n, "x" * 500) for n in range(3000)])
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2 // 4096 * 4096)
        file.write(os.urandom(4096 * 20))
    with DbWriter(path, lock_timeout=3600) as db:
        for _ in range(3):
            with pytest.raises(sqlite3.DatabaseError) as caught:
                db.run("UPDATE hurt SET n = n + 1, text = upper(text)", timeout=DEADLINE)
            assert caught.value.sqlite_errorcode & 0xFF == sqlite3.SQLITE_CORRUPT
        assert db.read("SELECT n FROM sound") == [(1,)]
        db.run("INSERT INTO sound VALUES (2)")
        assert db.health.startswith("degraded")
    assert sum("damaged" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("reads", [True, False])
def test_a_log_that_somebody_has_emptied_is_told(path: Path, reads: bool, caplog: pytest.LogCaptureFixture) -> None:
    with DbWriter(path, slow_after=DEADLINE) as db:
        db.run("CREATE TABLE t (n INTEGER)")
        db.checkpoint()
        db.run("INSERT INTO t VALUES (1)")
        os.truncate(f"{path}-wal", 0)
        if reads:
            with pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
                db.read("SELECT n FROM t")
            assert db.health.startswith("degraded")
    assert [record.levelname for record in caplog.records if "damaged" in record.getMessage()] == ["CRITICAL"]


def test_returning_is_read_to_its_end_and_committed(db: DbWriter) -> None:
    assert db.run("INSERT INTO t VALUES (1) RETURNING n").rows == [(1,)]
    assert db.run(lambda tx: tx.execute("INSERT INTO t VALUES (2), (3) RETURNING n").fetchone()[0]) == 2

    def through_a_cursor(tx: Transaction) -> int:
        return int(tx.connection.execute("INSERT INTO t VALUES (4), (5) RETURNING n").fetchone()[0])

    assert db.run(through_a_cursor) == 4
    assert db.read("SELECT n FROM t") == [(n,) for n in range(1, 6)]

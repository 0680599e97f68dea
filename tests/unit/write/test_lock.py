"""Waiting for SQLite's lock through the gateway: what is told, what is repeated, who fails, and who is let in."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helpers import (
    DEADLINE,
    eventually,
    holding_lock,
    parked,
    policy_of,
    rows,
    rows_in,
    until_waiting,
    waiting_for_lock,
    writer_of,
)
from onewriter import DbWriter, Transaction
from onewriter.write import lock

INSERT = "INSERT INTO t VALUES (?)"


@contextlib.contextmanager
def at_first_warning(action: Callable[[], object]) -> Iterator[list[str]]:
    """Do ``action`` once, when the gateway first warns, in the thread that warns, which waits for it meanwhile."""
    told: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())
            if len(told) == 1:
                action()

    handler, logger = Handler(logging.WARNING), logging.getLogger("onewriter")
    logger.addHandler(handler)
    try:
        yield told
    finally:
        logger.removeHandler(handler)
        # After ``action``, which frees what the writer waits for in the midst: its connection is closed next.
        handler.acquire()
        handler.release()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Callable[[], None]]:
    """Somebody else in the middle of a SELECT; yields what ends it."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as connection:
        connection.execute("BEGIN")
        connection.execute("SELECT count(*) FROM t").fetchall()
        yield lambda: connection.execute("ROLLBACK").close()


def writes(runs: list[int], n: int) -> Callable[[Transaction], int]:
    def job(tx: Transaction) -> int:
        runs.append(n)
        tx.execute(INSERT, (n,))
        return n

    return job


@pytest.fixture
def db(path: Path) -> Iterator[DbWriter]:
    """A gateway with room for three, and a table."""
    with DbWriter(path, maxsize=3) as db:
        db.run("CREATE TABLE t (n INTEGER PRIMARY KEY)")
        yield db


def test_the_warning_that_frees_the_lock_is_followed_by_one_that_it_was_had(path: Path) -> None:
    with DbWriter(path, label="ledger", lock_timeout=3600) as db:
        db.run("CREATE TABLE t (n)")
        with holding_lock(path) as holder, at_first_warning(lambda: holder.execute("COMMIT")) as told:
            db.run(INSERT, (1,), label="the patient one", timeout=DEADLINE)
        assert [text.split(": ")[1] for text in told] == ["waits for SQLite's lock", "got SQLite's lock"]
        for text in told:
            assert text.startswith("ledger: ")
            assert "'the patient one' (called from test_lock.py:" in text
            assert "attempts" in text
        assert rows(db) == [1]


@pytest.mark.parametrize("journal_mode", ["DELETE", "TRUNCATE", "PERSIST"])
def test_a_commit_that_a_reader_holds_up_is_repeated_and_no_body_of_its_batch_is(path: Path, journal_mode: str) -> None:
    runs: list[int] = []
    with DbWriter(path, journal_mode=journal_mode, lock_timeout=3600) as db:  # type: ignore[arg-type]
        db.run("CREATE TABLE t (n UNIQUE)")
        with reading(path) as leave, at_first_warning(leave) as told:
            with parked(db):
                tickets = [db.enqueue(writes(runs, n)) for n in range(3)]
                statement = db.enqueue(INSERT, (3,))
            assert [ticket.result(DEADLINE) for ticket in tickets] == [0, 1, 2]
            assert statement.result(DEADLINE).rowcount == 1
        assert "waits for SQLite's lock" in told[0]
        assert runs == [0, 1, 2]
        assert rows(db) == [0, 1, 2, 3]


def test_a_block_whose_commit_is_held_up_by_a_reader_is_committed_when_the_reader_has_gone(path: Path) -> None:
    with DbWriter(path, journal_mode="DELETE", lock_timeout=3600) as db:
        db.run("CREATE TABLE t (n UNIQUE)")
        with reading(path) as leave, at_first_warning(leave), db.transaction(label="held up") as tx:
            tx.execute(INSERT, (1,))
        assert rows(db) == [1]


def test_jobs_whose_begin_was_refused_fail_together_each_with_an_error_of_its_own(path: Path) -> None:
    runs: list[int] = []
    with DbWriter(path, lock_timeout=0.05) as db:
        db.run("CREATE TABLE t (n)")
        with parked_before_lock(db) as release, holding_lock(path):
            tickets = [db.enqueue(writes(runs, n), label=f"job {n}") for n in range(5)]
            release.set()
            errors = [ticket.exception(DEADLINE) for ticket in tickets]
        assert len({id(error) for error in errors}) == 5
        for n, error in enumerate(errors):
            assert type(error) is sqlite3.OperationalError
            assert error.sqlite_errorcode == sqlite3.SQLITE_BUSY
            assert [f"'job {n}'" in note for note in error.__notes__ if "attempts" in note] == [True]
        assert runs == []
        db.run(INSERT, (9,))
        assert rows(db) == [9]


@contextlib.contextmanager
def parked_before_lock(db: DbWriter) -> Iterator[threading.Event]:
    """Keep the writer busy without a transaction, in a callback, until the Event that it yields is set."""
    entered, release = threading.Event(), threading.Event()

    def stay(ticket: object) -> None:
        entered.set()
        release.wait(DEADLINE)

    with parked(db):
        db.enqueue("SELECT 1").add_done_callback(stay)
    assert entered.wait(DEADLINE)
    yield release
    release.set()


def test_a_lone_statement_is_repeated_while_somebody_else_writes(path: Path) -> None:
    with DbWriter(path, lock_timeout=3600) as db:
        db.run("CREATE TABLE t (n)")
        with holding_lock(path) as holder, at_first_warning(lambda: holder.execute("COMMIT")) as told:
            assert db.run_without_transaction(INSERT, (1,), label="alone", timeout=DEADLINE).rowcount == 1
        assert all("'alone'" in text for text in told)
        assert rows(db) == [1]


def test_the_lock_is_left_free_for_a_moment_after_long_holding(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(lock, "LONGEST_HOLD", 0.0)
    with DbWriter(path) as db:
        monkeypatch.setattr(writer_of(db)._stop, "wait", pauses.append)
        with parked(db):
            for n in range(3):
                db.enqueue(f"PRAGMA user_version = {n}")  # each has a transaction of its own
        db.flush()
    assert pauses
    assert all(0 < pause <= lock.GAP for pause in pauses)


def test_a_writer_that_had_to_wait_for_the_lock_holds_it_for_a_shorter_time(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "LONGEST_HOLD", 3600.0)
    monkeypatch.setattr(lock, "SHARED_HOLD", -1.0)  # over when it begins
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        with waiting_for_lock(db, path) as go:
            for n in range(10):
                db.enqueue(INSERT, (n,))
            before = db.stats().commits
            go.set()
            until_waiting(db)
        db.flush()
        # The first alone; then the gap, in which nobody takes the lock, so that the others go together.
        assert db.stats().commits - before == 2


def test_many_jobs_behind_a_busy_commit_wait_for_the_lock_once(path: Path) -> None:
    with DbWriter(path, journal_mode="DELETE", lock_timeout=0.05) as db:
        db.run("CREATE TABLE t (k UNIQUE)")
        attempts: list[int] = []
        keep_trying = policy_of(db).keep_trying

        def counted(*args: Any, **options: Any) -> Any:
            attempts.append(1)
            return keep_trying(*args, **options)

        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
            with parked(db):
                tickets = [db.enqueue("INSERT INTO t VALUES (1)") for _ in range(30)]
                reader.execute("BEGIN")
                reader.execute("SELECT * FROM t").fetchall()
                policy_of(db).keep_trying = counted  # type: ignore[method-assign]
            errors = {str(ticket.exception(DEADLINE)) for ticket in tickets}
        assert errors == {"database is locked"}
        assert len(attempts) <= 2  # of the job that parks, and of them all


def test_what_takes_the_lock_by_itself_is_not_refused_with_those_that_share_a_transaction(path: Path) -> None:
    with DbWriter(path, lock_timeout=0.3) as db, ThreadPoolExecutor(1) as threads:
        db.run("CREATE TABLE t (n)")
        with holding_lock(path) as other:
            first = db.enqueue("INSERT INTO t VALUES (1)")
            until_waiting(db)
            second = db.enqueue("INSERT INTO t VALUES (2)")
            second.add_done_callback(lambda _: other.execute("COMMIT"))
            alone = threads.submit(db.run_without_transaction, "INSERT INTO t VALUES (3)")  # taken with the second
            assert alone.result(DEADLINE).rowcount == 1
        assert {type(ticket.exception()) for ticket in (first, second)} == {sqlite3.OperationalError}
        assert rows(db) == [3]


def test_close_without_draining_ends_the_wait_of_a_commit_for_readers(path: Path) -> None:
    db = DbWriter(path, journal_mode="DELETE", lock_timeout=2 * DEADLINE)
    db.run("CREATE TABLE t (n)")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader, ThreadPoolExecutor(1) as threads:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM t").fetchall()
        ticket = db.enqueue("INSERT INTO t VALUES (1)")
        eventually(lambda: db.stats().waiting_for_lock is not None)
        closing = threads.submit(db.close, drain=False)
        with pytest.raises(sqlite3.OperationalError, match="database is locked"):
            ticket.result(DEADLINE)
        assert closing.result(DEADLINE).failed == 1
    assert rows_in(path) == []

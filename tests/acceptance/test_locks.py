"""Locks held by others: waited for at BEGIN and COMMIT, and nowhere else."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers import holding_lock, released_soon, run_child, session_of
from onewriter import DbWriter, Transaction, WriterClosedError

COUNT = """
import sys
from onewriter import DbWriter
def add(tx):
    n = tx.execute("SELECT n FROM counter").fetchone()[0]
    tx.execute("UPDATE counter SET n = ?", (n + 1,))
with DbWriter({path!r}) as db:
    for _ in range(200):
        db.run(add)
"""


@pytest.fixture
def db(path: Path) -> Iterator[DbWriter]:
    with DbWriter(path) as gateway:
        gateway.run("CREATE TABLE t (n INTEGER)")
        yield gateway


def read_then_write(tx: Transaction) -> None:
    count = tx.execute("SELECT count(*) FROM t").fetchone()[0]
    tx.execute("INSERT INTO t VALUES (?)", (count,))


def test_a_job_that_reads_and_then_writes_waits_for_the_lock(db: DbWriter, path: Path) -> None:
    with released_soon(path):
        db.run(read_then_write)
    with released_soon(path), db.transaction() as tx:
        read_then_write(tx)
    assert db.read("SELECT n FROM t") == [(0,), (1,)]


def test_two_processes_that_read_and_then_write_one_row_lose_no_update(db: DbWriter, path: Path) -> None:
    db.run("CREATE TABLE counter (n INTEGER)")
    db.run("INSERT INTO counter VALUES (0)")

    def add(tx: Transaction) -> None:
        n = tx.execute("SELECT n FROM counter").fetchone()[0]
        tx.execute("UPDATE counter SET n = ?", (n + 1,))

    with ThreadPoolExecutor() as pool:
        child = pool.submit(run_child, COUNT.format(path=str(path)))
        for _ in range(100):
            db.run(add)
            with db.transaction() as tx:
                add(tx)
        assert child.result().returncode == 0, child.result().stderr
    assert db.read_value("SELECT n FROM counter") == 400


@contextlib.contextmanager
def unfinished_select(path: Path) -> Iterator[sqlite3.Cursor]:
    """A reader in the middle of its rows, until its cursor is closed."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as connection:
        cursor = connection.execute("SELECT n FROM t")
        cursor.fetchone()
        yield cursor
        cursor.close()


def test_a_commit_that_stays_refused_is_rolled_back_and_the_next_job_works(path: Path) -> None:
    with DbWriter(path, journal_mode="DELETE", lock_timeout=0.2) as db:
        db.run("CREATE TABLE t (n INTEGER)")
        db.run_many("INSERT INTO t VALUES (?)", [(n,) for n in range(3)])
        with unfinished_select(path):
            with pytest.raises(sqlite3.OperationalError) as caught:
                db.run("INSERT INTO t VALUES (8)")
            assert caught.value.sqlite_errorcode == sqlite3.SQLITE_BUSY
        db.run("INSERT INTO t VALUES (9)")
        assert db.read("SELECT n FROM t WHERE n > 2") == [(9,)]


def test_a_wait_for_the_lock_repeats_no_job_and_loses_no_row(db: DbWriter, path: Path) -> None:
    ran = []

    def once(tx: Transaction) -> None:
        ran.append(1)
        tx.execute("INSERT INTO t VALUES (100)")

    with released_soon(path):
        db.run_many("INSERT INTO t VALUES (?)", ((n,) for n in range(5)))
    with released_soon(path):
        db.run(once)
    with released_soon(path), db.transaction() as tx:
        ran.append(2)
        tx.executemany("INSERT INTO t VALUES (?)", ((n,) for n in range(200, 203)))
    assert ran == [1, 2]
    assert db.read("SELECT n FROM t") == [(n,) for n in (0, 1, 2, 3, 4, 100, 200, 201, 202)]


BAD = ["SELECT * FROM nope", "SELEC 1", "SELECT nope FROM t", "VACUUM"]


@pytest.mark.parametrize("sql", BAD)
def test_an_error_that_never_goes_away_is_not_retried(path: Path, sql: str) -> None:
    """The budget for retries is far longer than the deadline of the call."""
    with DbWriter(path, lock_timeout=3600) as db:
        db.run("CREATE TABLE t (n INTEGER)")
        with pytest.raises(sqlite3.OperationalError):
            db.run(sql, timeout=30)


def test_a_message_that_speaks_of_a_lock_is_no_lock(path: Path) -> None:
    with DbWriter(path, lock_timeout=3600) as db:
        db.run_script("""
            CREATE TABLE t (n INTEGER);
            CREATE TRIGGER policy BEFORE INSERT ON t BEGIN SELECT RAISE(ABORT, 'database is locked by policy'); END;
        """)
        with pytest.raises(sqlite3.IntegrityError, match="locked by policy"):
            db.run("INSERT INTO t VALUES (1)", timeout=30)


def test_close_ends_the_wait_for_a_lock(path: Path) -> None:
    db = DbWriter(path, lock_timeout=3600)
    db.run("CREATE TABLE t (n INTEGER)")
    with holding_lock(path):
        ticket = db.enqueue("INSERT INTO t VALUES (1)")
        report = db.close(timeout=0.1)
        assert (report.cancelled, report.unfinished) == (1, 0)
        with pytest.raises(WriterClosedError):
            ticket.result(30)


@pytest.mark.parametrize("after", [1, 3])
def test_a_commit_that_met_a_lock_and_is_rolled_back_is_a_definite_failure(path: Path, after: int) -> None:
    """An attempt at COMMIT without a transaction would raise another error, and leave the outcome open."""
    with DbWriter(path, journal_mode="DELETE") as db:
        db.run("CREATE TABLE t (n INTEGER)")
        session, tried = session_of(db), []

        def busy() -> None:
            tried.append("COMMIT")
            if len(tried) == after:
                session.control["ROLLBACK"]()
            error = sqlite3.OperationalError("database is locked")
            error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_BUSY, "SQLITE_BUSY"
            raise error

        session.control["COMMIT"] = busy
        with pytest.raises(sqlite3.OperationalError, match="database is locked"):
            db.run("INSERT INTO t VALUES (1)")
        del session.control["COMMIT"]
        assert len(tried) == after
        assert db.health == "ok"
        db.run("INSERT INTO t VALUES (2)")
        assert db.read("SELECT n FROM t") == [(2,)]

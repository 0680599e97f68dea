"""Reads: what they see, what they may not do, and how they wait for a connection."""

from __future__ import annotations

import concurrent.futures
import contextlib
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helpers import DEADLINE, parked
from onewriter import DbWriter, ReadTimeoutError, ReentrantWriteError, WriterClosedError, gateway
from onewriter.read.claim import Claim

INSERT = "INSERT INTO t VALUES (?)"
ENDLESS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT max(n) FROM c"


@pytest.fixture
def one(path: Path) -> Any:
    """A gateway with a single connection to read."""
    with DbWriter(path, readers=1) as gateway:
        gateway.run("CREATE TABLE t (n INTEGER)")
        yield gateway


def test_the_forms_of_a_read(any_db: DbWriter) -> None:
    any_db.run("CREATE TABLE t (n INTEGER)")
    assert any_db.read_one("SELECT n FROM t") is None
    assert any_db.read_value("SELECT n FROM t") is None
    any_db.run_many(INSERT, [(1,), (2,)])
    assert any_db.read("SELECT n FROM t WHERE n > :least", {"least": 1}) == [(2,)]
    assert any_db.read_one("SELECT n FROM t") == (1,)
    assert any_db.read_value("SELECT n FROM t") == 1
    assert any_db.read(lambda connection: connection.execute("SELECT n FROM t").fetchall()) == [(1,), (2,)]


def test_a_value_is_one_whatever_the_row_factory(path: Path) -> None:
    with DbWriter(path, row_factory=lambda cursor, row: {"row": row}) as db:
        assert db.read("SELECT 5") == [{"row": (5,)}]
        assert db.read_one("SELECT 5") == {"row": (5,)}
        assert db.read_value("SELECT 5") == 5
        assert db.run("SELECT 5").rows == [{"row": (5,)}]
        with db.transaction():
            assert db.read_value("SELECT 5") == 5


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO t VALUES (1)",
        "CREATE TEMP TABLE x (n)",
        "PRAGMA query_only = 0",
        "ATTACH ':memory:' AS other",
        "VACUUM INTO '/dev/null'",
        "DELETE FROM t",
    ],
)
def test_a_read_cannot_write_and_neither_can_the_next_one(any_db: DbWriter, sql: str) -> None:
    any_db.run("CREATE TABLE t (n INTEGER)")
    for _ in range(2):
        with pytest.raises(sqlite3.DatabaseError):
            any_db.read(sql)
    with any_db.transaction() as tx:
        with pytest.raises(sqlite3.DatabaseError):
            any_db.read(sql)
        with pytest.raises(sqlite3.DatabaseError):
            any_db.read(lambda connection: connection.execute(sql).fetchall())
        tx.execute(INSERT, (1,))
    assert any_db.read("SELECT n FROM t") == [(1,)]


def test_a_function_reads_one_snapshot(one: DbWriter) -> None:
    def read(connection: sqlite3.Connection) -> list[Any]:
        first = connection.execute("SELECT count(*) FROM t").fetchone()
        with ThreadPoolExecutor() as pool:
            pool.submit(one.run, INSERT, (1,)).result(DEADLINE)
        return [first, connection.execute("SELECT count(*) FROM t").fetchone()]

    assert one.read(read) == [(0,), (0,)]
    assert one.read_value("SELECT count(*) FROM t") == 1


def test_bad_arguments_are_refused_at_the_call(any_db: DbWriter) -> None:
    async def coroutine(connection: sqlite3.Connection) -> None:
        pass

    calls: list[Any] = [
        lambda: any_db.read(3),  # type: ignore[call-overload]
        lambda: any_db.read_value(b"SELECT 1"),  # type: ignore[arg-type]
        lambda: any_db.read("SELECT ?", "a"),
        lambda: any_db.read(lambda connection: 1, (1,)),  # type: ignore[call-overload]
        lambda: any_db.read(coroutine),
        lambda: any_db.read("SELECT 1", label=3),  # type: ignore[call-overload]
        lambda: any_db.read("SELECT 1", timeout="3"),  # type: ignore[call-overload]
        lambda: any_db.read("SELECT 1", after=3),  # type: ignore[call-overload]
        lambda: any_db.reader(label=3),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(TypeError):
            call()
    with pytest.raises(ValueError, match="seconds"):
        any_db.read("SELECT 1", timeout=float("nan"))


def test_after_waits_for_that_write(db: DbWriter, tmp_path: Path) -> None:
    db.run("CREATE TABLE t (n INTEGER)")
    with ThreadPoolExecutor() as pool:
        with parked(db):
            ticket = db.enqueue(INSERT, (1,))
            failing = db.enqueue("INSERT INTO nowhere VALUES (1)")
            withdrawn = db.enqueue(INSERT, (2,))
            withdrawn.cancel()
            reading = pool.submit(db.read, "SELECT n FROM t", after=ticket)
            with pytest.raises(ReadTimeoutError, match="INSERT INTO t"):
                db.read("SELECT n FROM t", after=ticket, timeout=0.01)
        assert reading.result(DEADLINE) == [(1,)]
    with pytest.raises(sqlite3.OperationalError, match="nowhere"):
        db.read("SELECT 1", after=failing)
    with pytest.raises(concurrent.futures.CancelledError):
        db.read("SELECT 1", after=withdrawn)
    with DbWriter(tmp_path / "other.db") as other, pytest.raises(ValueError, match="another"):
        other.read("SELECT 1", after=ticket)


def test_a_query_that_runs_for_too_long_ends_and_harms_no_later_one(one: DbWriter) -> None:
    for _ in range(3):
        with pytest.raises(ReadTimeoutError, match="WITH RECURSIVE"):
            one.read(ENDLESS, timeout=0.05)
        with pytest.raises(ReadTimeoutError):
            one.read(lambda connection: connection.execute(ENDLESS).fetchall(), timeout=0.05)
        with one.reader() as connection:
            with pytest.raises(ReadTimeoutError):
                one.read(ENDLESS, timeout=0.05)
            assert connection.execute("SELECT 1").fetchone() == (1,)
        for n in range(300):
            assert one.read_value("SELECT ?", (n,)) == n


def test_waiters_for_a_connection_are_served_in_order_or_told(one: DbWriter) -> None:
    served: list[int] = []
    with ThreadPoolExecutor() as pool:
        with one.reader(label="the long one"):
            waiting = []
            for n in range(4):
                waiting.append(pool.submit(one.read, lambda connection, n=n: served.append(n)))
                while one._readers.waiting <= n:
                    pass
            with pytest.raises(ReadTimeoutError, match="the long one"):
                pool.submit(one.read, "SELECT 1", timeout=0.01).result(DEADLINE)
        for reading in waiting:
            reading.result(DEADLINE)
    assert served == [0, 1, 2, 3]


def test_an_interrupt_while_waiting_for_a_connection_loses_none(one: DbWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is handed over in the moment of the interrupt."""

    class Interrupted(Claim):
        def __init__(self, label: str) -> None:
            super().__init__(label)
            self.signal = self

        def acquire(self, timeout: float) -> bool:
            block.__exit__(None, None, None)
            raise KeyboardInterrupt

        def release(self) -> None:
            pass

    with ThreadPoolExecutor(1) as pool:
        block = one.reader()
        pool.submit(block.__enter__).result(DEADLINE)
        monkeypatch.setattr(gateway, "Claim", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.read("SELECT 1")
        assert one.read("SELECT 1", timeout=DEADLINE) == [(1,)]


def test_waiters_are_told_when_the_gateway_closes(one: DbWriter) -> None:
    with ThreadPoolExecutor() as pool:
        with one.reader():
            waiting = pool.submit(one.read, "SELECT 1")
            while not one._readers.waiting:
                pass
            closing = pool.submit(one.close)
            with pytest.raises(WriterClosedError):
                waiting.result(DEADLINE)
        closing.result(DEADLINE)


def test_close_with_a_time_limit_does_not_wait_for_a_reader_for_ever(path: Path) -> None:
    db = DbWriter(path)
    with db.reader() as connection:
        assert db.close(timeout=0.05).unfinished == 0
        assert connection.execute("SELECT 1").fetchone() == (1,)
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA journal_mode = DELETE")


def test_close_in_the_midst_of_an_own_read_is_refused_where_it_would_never_end(one: DbWriter) -> None:
    with (
        one.reader(),
        pytest.raises(ReentrantWriteError, match="close waits for all readers, and this thread or task has one"),
    ):
        one.close()
    with pytest.raises(ReentrantWriteError):
        one.read(lambda connection: one.close())
    assert not one.closed
    with ThreadPoolExecutor(1) as pool, one.reader():
        closing = pool.submit(one.close)
        while not one.closed:
            pass
        assert not closing.done()
    closing.result(DEADLINE)


def test_readers_are_opened_when_they_are_needed(path: Path) -> None:
    opened: list[bool] = []
    with DbWriter(path, readers=3, on_connect=lambda connection, readonly: opened.append(readonly)) as db:
        assert opened == [False]
        for _ in range(5):
            db.read("SELECT 1")
        assert opened == [False, True]
        both_in = threading.Barrier(3, timeout=DEADLINE)
        with ThreadPoolExecutor() as pool:
            for _ in range(3):
                pool.submit(db.read, lambda connection: both_in.wait() and None)
        assert opened == [False, True, True, True]

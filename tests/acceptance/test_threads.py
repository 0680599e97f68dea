"""Many threads, calls from inside jobs, tickets that are cancelled, queues that are full, and the end of it all."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import in_threads, parked
from onewriter import (
    DbWriter,
    OneWriterError,
    QueueFullError,
    ReentrantWriteError,
    Ticket,
    Transaction,
    WriterClosedError,
    WriteTimeoutError,
)

DEADLINE = 30.0
INSERT = "INSERT INTO t VALUES (?)"


@pytest.fixture
def db(path: Path) -> Iterator[DbWriter]:
    with DbWriter(path) as gateway:
        gateway.run("CREATE TABLE t (n INTEGER)")
        yield gateway


def rows(db: DbWriter) -> list[Any]:
    return [n for (n,) in db.read("SELECT n FROM t ORDER BY rowid")]


def test_results_are_plain_data(db: DbWriter) -> None:
    assert list(db.run("SELECT 1 UNION SELECT 2")) == [(1,), (2,)]
    with pytest.raises(TypeError, match="live"):
        db.run(lambda tx: tx.connection.execute("SELECT 1"))
    with pytest.raises(TypeError, match="live"):
        db.run(lambda tx: (row for row in [1]))
    with pytest.raises(TypeError, match="live"):
        db.read(lambda connection: connection.execute("SELECT 1"))


def test_reads_of_many_threads_do_not_meet(db: DbWriter) -> None:
    db.run_many(INSERT, [(n,) for n in range(2000)])

    def read() -> set[int]:
        return {len(db.read("SELECT n FROM t")) for _ in range(200)}

    assert in_threads(*[read] * 8) == [{2000}] * 8


def test_lastrowid_is_that_of_the_callers_own_row(db: DbWriter) -> None:
    def insert(thread: int) -> None:
        for n in range(50):
            rowid = db.run(INSERT, (thread * 1000 + n,)).lastrowid
            assert db.read_value("SELECT n FROM t WHERE rowid = ?", (rowid,)) == thread * 1000 + n

    in_threads(*[lambda thread=thread: insert(thread) for thread in range(8)])


def test_close_waits_for_readers_and_answers_everything(db: DbWriter) -> None:
    db.run_many(INSERT, [(n,) for n in range(100)])
    reading, go_on = threading.Event(), threading.Event()
    tickets: list[Ticket[Any]] = []

    def read_slowly() -> int:
        with db.reader() as connection:
            cursor = connection.execute("SELECT n FROM t WHERE n < 100")
            cursor.fetchone()
            reading.set()
            go_on.wait(DEADLINE)
            return 1 + len(cursor.fetchall())

    def flood() -> None:
        with pytest.raises(WriterClosedError):
            while True:
                tickets.append(db.enqueue(INSERT, (1000,)))

    with concurrent.futures.ThreadPoolExecutor() as pool:
        reader, producer = pool.submit(read_slowly), pool.submit(flood)
        assert reading.wait(DEADLINE)
        closers = [pool.submit(db.close) for _ in range(3)]
        producer.result(DEADLINE)
        assert not closers[0].done()
        go_on.set()
        assert reader.result(DEADLINE) == 100
        reports = {closer.result(DEADLINE) for closer in closers}
    assert len(reports) == 1
    assert all(ticket.done() for ticket in tickets)
    assert db.close() in reports
    for call in (lambda: db.run("SELECT 1"), lambda: db.read("SELECT 1")):
        with pytest.raises(WriterClosedError):
            call()
    with DbWriter(db.path) as again:
        assert again.read_value("SELECT count(*) FROM t WHERE n = 1000") == len(tickets)


def test_blocks_of_several_threads_do_not_mix(db: DbWriter) -> None:
    db.run("CREATE TABLE groups (thread INTEGER, n INTEGER, part INTEGER)")

    def work(thread: int) -> None:
        for n in range(50):
            try:
                with db.transaction() as tx:
                    for part in range(3):
                        tx.execute("INSERT INTO groups VALUES (?, ?, ?)", (thread, n, part))
                    if n % 3 == 2:
                        raise LookupError("every third")
            except LookupError:
                pass

    in_threads(*[lambda thread=thread: work(thread) for thread in range(8)])
    found = db.read("SELECT thread, n, count(*), max(rowid) - min(rowid) FROM groups GROUP BY thread, n")
    assert len(found) == 8 * 34
    assert {(count, spread) for _, _, count, spread in found} == {(3, 2)}


def test_an_inner_block_that_raises_undoes_itself_only(any_db: DbWriter) -> None:
    any_db.run("CREATE TABLE t (n INTEGER)")
    with any_db.transaction() as tx:
        tx.execute(INSERT, (1,))
        with pytest.raises(LookupError), any_db.transaction() as inner:
            inner.execute(INSERT, (2,))
            raise LookupError
        with any_db.transaction() as inner:
            inner.execute(INSERT, (3,))
        tx.execute(INSERT, (4,))
    assert rows(any_db) == [1, 3, 4]


@pytest.mark.parametrize("sql", ["BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT mine", "/* so */ end;"])
def test_the_transaction_is_not_the_jobs_to_end(any_db: DbWriter, sql: str) -> None:
    any_db.run("CREATE TABLE t (n INTEGER)")
    with any_db.transaction() as tx:
        tx.execute(INSERT, (1,))
        with pytest.raises(sqlite3.DatabaseError) as caught:
            tx.execute(sql)
        assert caught.value.sqlite_errorname == "SQLITE_AUTH"
        tx.execute(INSERT, (2,))
    with pytest.raises(sqlite3.DatabaseError):
        any_db.run(lambda tx: [tx.execute(INSERT, (3,)), tx.execute(sql)])
    with pytest.raises(sqlite3.DatabaseError):
        any_db.run(sql)
    any_db.run(INSERT, (4,))
    assert rows(any_db) == [1, 2, 4]


def test_a_cancelled_job_never_runs_and_a_started_one_is_not_cancelled(db: DbWriter) -> None:
    started, go_on = threading.Event(), threading.Event()

    def slow(tx: Transaction) -> None:
        started.set()
        go_on.wait(DEADLINE)
        tx.execute(INSERT, (2,))

    with parked(db):
        cancelled = db.enqueue(INSERT, (1,))
        assert cancelled.cancel()
        running = db.enqueue(slow)
    assert started.wait(DEADLINE)
    assert not running.cancel()
    go_on.set()
    running.result(DEADLINE)
    assert cancelled.cancelled()
    with pytest.raises(concurrent.futures.CancelledError):
        cancelled.result()
    assert rows(db) == [2]


def test_an_awaiting_task_that_gives_up_harms_nobody(db: DbWriter) -> None:
    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(db.enqueue(INSERT, (1,)).future()), 0.01)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(db.enqueue(INSERT, (1,)), 0.01)

    with parked(db):
        for _ in range(10):
            asyncio.run(give_up())
    db.run(INSERT, (2,))
    assert rows(db) == [2]


def test_a_wait_that_times_out_withdraws_the_job_or_lets_it_finish_whole(db: DbWriter) -> None:
    with parked(db) as release:
        with pytest.raises(WriteTimeoutError) as caught:
            db.run(INSERT, (1,), timeout=0.01)
        assert not caught.value.started
        assert "park" in str(caught.value)
        with pytest.raises(WriteTimeoutError), db.transaction(timeout=0.01):
            pass
        release.set()
    go_on = threading.Event()

    def slow(tx: Transaction) -> None:
        go_on.wait(DEADLINE)
        tx.execute(INSERT, (2,))

    with pytest.raises(WriteTimeoutError) as caught:
        db.run(slow, timeout=0.05)
    assert caught.value.started
    go_on.set()
    caught.value.ticket.result(DEADLINE)
    db.run(INSERT, (3,))
    assert rows(db) == [2, 3]


ENDLESS: list[Callable[[DbWriter], object]] = [
    lambda db: db.enqueue(INSERT, (7,)).result(),
    lambda db: db.close(),
    lambda db: db.flush(),
    lambda db: db.run_without_transaction("VACUUM"),
    lambda db: db.read("SELECT 1", after=db.enqueue("SELECT 1")),
]


@pytest.mark.parametrize("call", ENDLESS)
def test_a_wait_for_oneself_raises(any_db: DbWriter, call: Callable[[DbWriter], object]) -> None:
    any_db.run("CREATE TABLE t (n INTEGER)")
    with pytest.raises(ReentrantWriteError):
        any_db.run(lambda tx: call(any_db) and None)
    with any_db.transaction() as tx:
        tx.execute(INSERT, (1,))
        with pytest.raises(ReentrantWriteError):
            call(any_db)
    any_db.run(INSERT, (2,))
    assert [n for n in rows(any_db) if n != 7] == [1, 2]


def test_calls_inside_a_job_or_block_act_on_its_transaction(any_db: DbWriter) -> None:
    any_db.run("CREATE TABLE t (n INTEGER)")
    any_db.run(lambda tx: any_db.run(INSERT, (1,)).rows)
    with any_db.transaction():
        any_db.run(INSERT, (2,))
        assert rows(any_db) == [1, 2]
        ticket = any_db.enqueue(INSERT, (3,))
    ticket.result(DEADLINE)
    any_db.run(lambda tx: any_db.enqueue(INSERT, (4,)) and None)
    any_db.flush()
    assert rows(any_db) == [1, 2, 3, 4]


def test_enqueue_inside_a_job_does_not_wait_for_room(path: Path) -> None:
    with DbWriter(path, maxsize=1) as db:
        db.run("CREATE TABLE t (n INTEGER)")
        db.run(lambda tx: [db.enqueue(INSERT, (n,)) for n in range(5)] and None)
        with db.transaction():
            for n in range(5, 9):
                db.enqueue(INSERT, (n,), timeout=0)
        db.flush()
        assert rows(db) == list(range(9))


def test_a_log_handler_that_enqueues_neither_hangs_nor_loops(path: Path) -> None:
    class Sink(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            gateway.enqueue("INSERT INTO log VALUES (?)", (record.getMessage(),))

    sink, root = Sink(logging.DEBUG), logging.getLogger()
    with DbWriter(path, slow_after=0.0) as gateway:
        gateway.run("CREATE TABLE log (text TEXT)")
        level = root.level
        root.addHandler(sink)
        root.setLevel(logging.DEBUG)
        try:
            gateway.enqueue("INSERT INTO nowhere VALUES (1)")
            gateway.flush()
            gateway.run("DROP TABLE log")  # from here on, every record fails to be written
            gateway.enqueue("INSERT INTO nowhere VALUES (2)")
            for _ in range(3):
                gateway.flush()
        finally:
            root.removeHandler(sink)
            root.setLevel(level)
        gateway.run("CREATE TABLE t (n INTEGER)")


def test_a_sql_function_that_calls_the_gateway_gets_a_named_error(path: Path) -> None:
    errors: list[BaseException] = []

    def call_back() -> int:
        for call in (lambda: gateway.run("SELECT 1"), lambda: gateway.read("SELECT 1")):
            try:
                call()
            except OneWriterError as error:
                errors.append(error)
        return 1

    def hook(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.create_function("call_back", 0, call_back)

    with DbWriter(path, on_connect=hook) as gateway:
        gateway.run("SELECT call_back()")
        gateway.run(lambda tx: tx.execute("SELECT call_back()").rows)
        with gateway.transaction() as tx:
            tx.execute("SELECT call_back()")
        gateway.run("SELECT 1")
    assert [type(error) for error in errors] == [ReentrantWriteError] * 6


def test_a_full_queue_bounds_the_backlog_and_recovers(path: Path) -> None:
    with DbWriter(path, maxsize=100) as db:
        db.run("CREATE TABLE t (n INTEGER)")
        depths: list[int] = []

        def produce() -> int:
            accepted = 0
            for n in range(1000):
                try:
                    db.enqueue(INSERT, (n,), timeout=0.0 if n % 2 else DEADLINE)
                    accepted += 1
                except QueueFullError:
                    pass
                depths.append(db.stats().queue_depth)
            return accepted

        with concurrent.futures.ThreadPoolExecutor() as pool:
            with parked(db):
                producers = [pool.submit(produce) for _ in range(4)]
                with pytest.raises(WriteTimeoutError):
                    db.run(INSERT, (-1,), timeout=0.2)  # takes its place at once, though the queue is full
            accepted = sum(producer.result(DEADLINE) for producer in producers)
        db.flush()
        assert max(depths) <= 101
        assert db.read_value("SELECT count(*) FROM t") == accepted
        db.enqueue(INSERT, (0,)).result(DEADLINE)


def test_close_frees_the_producers_that_wait_for_room(path: Path) -> None:
    db = DbWriter(path, maxsize=1)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with parked(db) as release:
            db.enqueue("SELECT 1")
            producers = [pool.submit(db.enqueue, "SELECT 1", timeout=None) for _ in range(4)]
            closer = pool.submit(db.close)
            for producer in producers:
                with pytest.raises(WriterClosedError):
                    producer.result(DEADLINE)
            release.set()
        closer.result(DEADLINE)

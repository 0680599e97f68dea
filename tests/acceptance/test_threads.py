"""Many threads, calls from inside jobs, tickets that are cancelled, queues that are full, and the end of it all."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import DEADLINE, in_threads, parked, rows
from onewriter import DbWriter, QueueFullError, Ticket, WriterClosedError, WriteTimeoutError

INSERT = "INSERT INTO t VALUES (?)"


@pytest.fixture
def db(path: Path) -> Iterator[DbWriter]:
    with DbWriter(path) as gateway:
        gateway.run("CREATE TABLE t (n INTEGER)")
        yield gateway


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

"""Reads end in time although their time goes into Python functions, and never wait for their own thread."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from helpers import DEADLINE, eventually, in_threads, pool_of, queue_of, raising
from onewriter import AsyncDbWriter, DbWriter, ReadTimeoutError, ReentrantWriteError, WriterClosedError
from onewriter.read import places
from onewriter.read.claim import new_claim

NUMBERS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c LIMIT 1000000000) SELECT {} FROM c"
SOON = 0.2  # seconds
SLOW = NUMBERS.format("slow(n)")


class Patient:
    """Functions that take a while for each row, as the user's may, and stop the test if nobody stops them."""

    def __init__(self) -> None:
        self.calls = 0
        self._never = threading.Event()

    def wait(self, value: Any = None) -> Any:
        self.calls += 1
        assert self.calls < 100 * DEADLINE, "nobody has ended the read"
        self._never.wait(0.01)
        return value

    def connect(self, connection: sqlite3.Connection, readonly: bool) -> None:
        connection.create_function("slow", 1, self.wait)

    def row(self, cursor: sqlite3.Cursor, row: tuple[object, ...]) -> tuple[object, ...]:
        self.wait()
        return row


def by_function(path: Path) -> Any:
    with DbWriter(path, on_connect=Patient().connect) as db:
        db.read(SLOW, timeout=SOON)


def by_function_with_a_connection_that_was_idle(path: Path) -> Any:
    with DbWriter(path, on_connect=Patient().connect) as db:
        db.read("SELECT 1", timeout=None)  # so that the clock rings for the second only
        db.read(SLOW, timeout=SOON)


def by_row_factory(path: Path) -> Any:
    with DbWriter(path, row_factory=Patient().row) as db:
        db.read(NUMBERS.format("n"), timeout=SOON)


def by_text_factory(path: Path) -> Any:
    def connect(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.text_factory = Patient().wait

    with DbWriter(path, on_connect=connect) as db:
        db.read(NUMBERS.format("'text'"), timeout=SOON)


def by_converter(path: Path) -> Any:
    sqlite3.register_converter("slowly", Patient().wait)
    with DbWriter(path, detect_types=sqlite3.PARSE_COLNAMES) as db:
        db.read(NUMBERS.format("'x' AS \"x [slowly]\""), timeout=SOON)


def by_function_of_the_connection(path: Path) -> Any:
    def read(connection: sqlite3.Connection) -> list[Any]:
        connection.row_factory = Patient().row
        return connection.execute(NUMBERS.format("n")).fetchall()

    with DbWriter(path) as db:
        db.read(read, timeout=SOON)


def in_a_reader_block(path: Path) -> Any:
    with DbWriter(path, on_connect=Patient().connect) as db, db.reader() as connection:
        try:
            db.read(SLOW, timeout=SOON)
        finally:
            assert connection.execute("SELECT 5").fetchall() == [(5,)]


def in_a_task(path: Path) -> Any:
    async def main() -> None:
        async with AsyncDbWriter(path, on_connect=Patient().connect) as db:
            await db.read(SLOW, timeout=SOON)

    asyncio.run(main())


def in_a_reader_of_a_task(path: Path) -> Any:
    async def main() -> None:
        async with AsyncDbWriter(path, on_connect=Patient().connect) as db, db.reader() as reader:
            try:
                await db.read(SLOW, timeout=SOON)
            finally:
                assert (await reader.execute("SELECT 5")).rows == [(5,)]

    asyncio.run(main())


@pytest.mark.parametrize(
    "read",
    [
        by_function,
        by_function_with_a_connection_that_was_idle,
        by_row_factory,
        by_text_factory,
        by_converter,
        by_function_of_the_connection,
        in_a_reader_block,
        in_a_task,
        in_a_reader_of_a_task,
    ],
)
def test_a_read_whose_time_goes_into_python_ends_in_time(path: Path, read: Callable[[Path], Any]) -> None:
    with pytest.raises(ReadTimeoutError):
        read(path)


def test_a_cancelled_read_whose_time_goes_into_python_ends(path: Path) -> None:
    patient = Patient()

    async def main() -> None:
        async with AsyncDbWriter(path, on_connect=patient.connect, readers=1) as db:
            task = asyncio.create_task(db.read(SLOW, timeout=None))
            while not patient.calls:
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert await db.read_value("SELECT 5", timeout=DEADLINE) == 5  # its connection is free again

    asyncio.run(main())


def test_a_late_interrupt_never_hits_the_next_borrower(path: Path) -> None:
    with DbWriter(path, on_connect=Patient().connect, readers=1) as db:
        for _ in range(5):
            with pytest.raises(ReadTimeoutError):
                db.read(SLOW, timeout=0.01)
            for n in range(200):
                assert db.read_value("SELECT ?", (n,), timeout=DEADLINE) == n


def test_the_clock_is_there_only_while_a_read_is(path: Path) -> None:
    def clocks() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "onewriter-clock"]

    with DbWriter(path, inline=True) as db:
        db.read("SELECT 1")
        assert clocks() == []
    with DbWriter(path) as db:
        db.read("SELECT 1", timeout=None)
        assert clocks() == []
        db.read("SELECT 1", timeout=0.5)
        clock = clocks()
        assert len(clock) <= 1
        for thread in clock:
            thread.join(DEADLINE)
            assert not thread.is_alive()  # it has found nobody
        assert db.read_value("SELECT 5") == 5
    assert clocks() == []


def nested(db: DbWriter, how: str) -> None:
    if how == "read":
        assert db.read_value("SELECT count(*) FROM t", timeout=DEADLINE) == 3
    elif how == "function":
        assert db.read(lambda connection: connection.execute("SELECT count(*) FROM t").fetchone()[0]) == 3
    else:
        with db.reader(timeout=DEADLINE) as connection:
            assert connection.execute("SELECT count(*) FROM t").fetchone()[0] == 3


@pytest.mark.parametrize("how", ["read", "function", "reader"])
def test_a_read_in_a_row_factory_does_not_wait_for_its_own_thread(path: Path, how: str) -> None:
    def row(cursor: sqlite3.Cursor, row: tuple[Any, ...]) -> Any:
        if len(row) == 1:
            return row
        nested(db, how)
        return row[0]

    with DbWriter(path, readers=1, row_factory=row) as db:
        db.run("CREATE TABLE t (a, b)")
        db.run("INSERT INTO t VALUES (1, 1), (2, 2), (3, 3)")
        results = in_threads(*[lambda: db.read("SELECT a, b FROM t", timeout=None)] * 6)
        assert results == [[1, 2, 3]] * 6
        assert (pool_of(db)._count, len(pool_of(db)._idle)) == (1, 1)  # what was beside them is closed


def test_a_read_in_a_function_that_a_tasks_read_calls_does_not_wait_for_its_own_thread(path: Path) -> None:
    def twice(n: int) -> int:
        return 2 * int(db.read_value("SELECT ?", (n,), timeout=None))

    with DbWriter(
        path, readers=2, on_connect=lambda connection, _: connection.create_function("twice", 1, twice)
    ) as db:
        found = []

        async def main() -> None:
            gateway = AsyncDbWriter.wrap(db)
            found.extend(await asyncio.gather(*[gateway.read_value("SELECT twice(?)", (n,)) for n in range(20)]))
            async with gateway.reader() as one:
                found.append((await one.execute("SELECT twice(20)")).rows[0][0])
            await gateway.close()

        asyncio.run(main())
        assert found == [2 * n for n in range(21)]


def test_close_in_a_row_factory_of_a_tasks_read_raises(path: Path) -> None:
    def row(cursor: sqlite3.Cursor, row: tuple[Any, ...]) -> Any:
        with pytest.raises(ReentrantWriteError):
            db.close()
        return row

    async def main() -> None:
        gateway = AsyncDbWriter.wrap(db)
        assert await gateway.read("SELECT 1") == [(1,)]
        await gateway.close()

    with DbWriter(path, row_factory=row) as db:
        asyncio.run(main())
    with pytest.raises(WriterClosedError):
        db.read("SELECT 1")


def test_the_clocks_thread_ends_with_the_last_connection_of_a_closed_gateway(path: Path) -> None:
    db = DbWriter(path)
    db.read(lambda connection: db.close(0.0))
    db.close()
    clock = pool_of(db).clock._thread
    if clock is not None:
        clock.join(DEADLINE)
        assert not clock.is_alive()


@contextlib.contextmanager
def in_a_backup(db: DbWriter) -> Iterator[None]:
    go_on, inside = threading.Event(), threading.Event()

    def progress(*_: int) -> None:
        inside.set()
        go_on.wait(DEADLINE)

    with ThreadPoolExecutor(1) as pool:
        copying = pool.submit(db.backup, db.path + ".copy", progress=progress)
        assert inside.wait(DEADLINE)
        try:
            yield
        finally:
            go_on.set()
            copying.result(DEADLINE)


@contextlib.contextmanager
def in_a_tasks_block(db: DbWriter) -> Iterator[None]:
    go_on, inside = threading.Event(), threading.Event()

    async def main() -> None:
        async with AsyncDbWriter.wrap(db).reader():
            inside.set()
            await asyncio.to_thread(go_on.wait, DEADLINE)

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(asyncio.run, main())
        assert inside.wait(DEADLINE)
        try:
            yield
        finally:
            go_on.set()
            reading.result(DEADLINE)


@pytest.mark.parametrize("lent", [DbWriter.reader, in_a_backup, in_a_tasks_block])
def test_a_slow_reader_is_named_once_while_it_is_open_and_the_writer_sleeps(
    path: Path, caplog: pytest.LogCaptureFixture, lent: Any
) -> None:
    with DbWriter(path, slow_after=0.05) as db:
        db.flush()
        wakes: list[object] = []
        wake = queue_of(db)._wake
        queue_of(db)._wake = lambda: wakes.append(wake())  # type: ignore[method-assign]
        with lent(db):
            until = monotonic() + DEADLINE
            while not any("has been open for" in message for message in caplog.messages) and monotonic() < until:
                threading.Event().wait(0.01)
        assert wakes == []
    assert len([message for message in caplog.messages if message.startswith("slow: ")]) == 1


def test_a_slow_reader_is_named_although_the_clock_has_looked_before_and_then_nothing_is_waited_for(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with DbWriter(path, slow_after=0.3) as db, db.reader():
        with pytest.raises(ReadTimeoutError):
            db.read(NUMBERS.format("max(n)"), timeout=0.01)
        eventually(lambda: any("has been open for" in message for message in caplog.messages))
        eventually(lambda: pool_of(db).clock._thread is None)


def test_without_a_thread_for_it_a_slow_reader_is_named_after_the_next_batch(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with DbWriter(path, inline=True, slow_after=1e-9) as db, db.reader():
        db.run("CREATE TABLE t (n)")
        assert any("has been open for" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("mode", "kept"), [("WAL", "the WAL cannot be reset"), ("DELETE", "no write can be committed")]
)
def test_a_slow_reader_that_the_clock_has_not_named_is_named_at_its_end(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, mode: Any, kept: str
) -> None:
    with DbWriter(path, slow_after=1e-9, journal_mode=mode) as db:
        monkeypatch.setattr(pool_of(db).clock, "watch", lambda claim, deadline: None)
        monkeypatch.setattr(pool_of(db).clock, "warn", lambda: None)
        with db.reader():
            pass
        (told,) = caplog.messages
        assert " was open for " in told
        assert told.endswith(f"; meanwhile {kept}")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_clock_that_could_not_be_started_is_started_by_the_next_read(
    path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    with DbWriter(path, on_connect=Patient().connect) as db:
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(threading.Thread, "start", raising(error))
            assert db.read_value("SELECT 1", timeout=DEADLINE) == 1
            assert error is RuntimeError  # as at the end of the interpreter; another one is the caller's
        with pytest.raises(ReadTimeoutError):
            db.read(SLOW, timeout=SOON)


def test_those_who_come_in_a_pause_are_admitted_in_order_at_its_end_or_when_its_time_is_over(path: Path) -> None:
    served: list[int] = []
    with DbWriter(path, readers=1) as db, ThreadPoolExecutor() as pool:
        db.read("SELECT 1")
        for seconds in (DEADLINE, 0.02):
            served.clear()
            readings = []
            with pool_of(db).pause(seconds):
                for n in range(3):
                    readings.append(pool.submit(db.read, lambda connection, n=n: served.append(n)))
                    while seconds == DEADLINE and db.stats().readers_waiting <= n:
                        pass
                if seconds == DEADLINE:
                    assert served == []
                else:
                    wait(readings, DEADLINE)  # the clock ends it
            wait(readings, DEADLINE)
            assert served == [0, 1, 2] if seconds == DEADLINE else sorted(served) == [0, 1, 2]
            assert db.stats().readers_in_use == 0


def test_there_is_no_pause_while_a_connection_is_out_for_long_already(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "LONG", -1.0)
    with DbWriter(path, readers=2) as db, db.reader(), pool_of(db).pause(3600.0):
        assert in_threads(lambda: db.read_value("SELECT 7", timeout=DEADLINE)) == [7]


def test_a_pause_that_nobody_ends_is_over_for_the_next_who_comes(path: Path) -> None:
    with DbWriter(path, inline=True, readers=1) as db:  # which has no clock
        db.read("SELECT 1")
        with pool_of(db)._lock:
            pool_of(db)._paused_until = 1.0  # as Ctrl-C may leave it
            pool_of(db)._serve()
        assert db.read_value("SELECT 2", timeout=DEADLINE) == 2
        assert (pool_of(db)._paused_until, pool_of(db)._count, db.stats().readers_waiting) == (0.0, 1, 0)


def test_what_is_to_end_at_once_does_although_its_time_limit_is_lifted(one: DbWriter) -> None:
    """As the read of a watch whose task is cancelled before it begins."""
    pool = pool_of(one)
    for deadline, expected in ((5.0, math.inf), (0.0, 0.0)):
        claim = new_claim("read", deadline)
        pool.clock.lift(claim)
        assert claim.deadline == expected


def test_a_read_that_was_slow_is_named_at_its_end(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with DbWriter(path, inline=True, slow_after=0.0) as db:
        db.read("SELECT 5")
    assert [message for message in caplog.messages if "SELECT 5 was open for" in message]

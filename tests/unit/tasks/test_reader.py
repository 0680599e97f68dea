"""Reads and ``reader()`` blocks of tasks: what they see, how they wait, and what a cancellation leaves."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import sqlite3
import threading
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aio_helpers import Gate, beats, keep_busy, left_in_a_closed_loop, opened, rows, run, until
from helpers import DEADLINE, eventually, in_threads, pool_of, raises, raising, threads_of
from onewriter import AsyncDbWriter, DbWriter, ReadTimeoutError, ReentrantWriteError, WriterClosedError
from onewriter.base.scopes import Scopes
from onewriter.read import clock
from onewriter.read.claim import new_claim
from onewriter.read.reader import Reader, Snapshot
from onewriter.tasks import reader
from onewriter.tasks import reader as tasks_reader
from onewriter.tasks.call import Call
from onewriter.tasks.calls import Turn
from onewriter.tasks.reader import AsyncReader, TaskReads

INSERT = "INSERT INTO t VALUES (?)"
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
LONG = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 300000) SELECT count(*) FROM n"
COUNT = "SELECT count(*) FROM t"


async def called_there(call: Callable[[], Awaitable[Any]]) -> Any:
    """For a task that is not inside the blocks of the one that makes it: a call belongs to where it is called."""
    return await call()


def test_a_slow_read_does_not_block_the_loop_and_its_timeout_ends_it(path: Path) -> None:
    async def main() -> None:
        async with opened(path, readers=1) as db:
            reading = await beats(20, db.read(ENDLESS, timeout=0.2, label="count"))
            with pytest.raises(ReadTimeoutError, match=r"'count' \(WITH RECURSIVE"):
                await reading
            for _ in range(100):
                assert await db.read_value("SELECT 1") == 1

    run(main)


def test_a_read_that_is_cancelled_gives_its_connection_back(path: Path) -> None:
    async def main() -> None:
        async with opened(path, readers=1) as db:
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(db.read(ENDLESS), 0.02)
                async with asyncio.timeout(DEADLINE):
                    assert await rows(db) == []
            async with db.reader() as reader:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(reader.execute(ENDLESS), 0.02)
                assert (await reader.execute(LONG)).rows == [(300_000,)]  # with no time limit left over
                waiting = await beats(5, called_there(lambda: db.read("SELECT 2")))
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                second = asyncio.create_task(rows(db))
                await asyncio.sleep(0.005)
            assert await second == []

    run(main)


def test_a_reader_sees_one_state_and_the_inner_block_decides(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            await db.run(INSERT, (1,))
            async with db.reader() as reader:
                await db.run(INSERT, (2,))
                assert (await reader.execute("SELECT n FROM t")).rows == [(1,)]
                assert await rows(db) == [1]
                assert await asyncio.create_task(rows(db)) == [1, 2]
                async with db.reader() as same:
                    assert same is reader
                async with db.transaction() as tx:
                    await tx.execute(INSERT, (3,))
                    assert await rows(db) == [1, 2, 3]
                    async with db.reader() as inner:
                        assert (await inner.execute("SELECT n FROM t")).fetchall() == [(1,), (2,)]
                        assert await rows(db) == [1, 2]
                    assert await rows(db) == [1, 2, 3]
                assert await rows(db) == [1]
                with pytest.raises(sqlite3.OperationalError):
                    await reader.execute("DELETE FROM t")
            with pytest.raises(sqlite3.ProgrammingError):
                await reader.execute("SELECT 1")
            assert await rows(db) == [1, 2, 3]

    run(main)


def test_more_readers_than_connections_wait_in_order_and_say_who_has_them(path: Path) -> None:
    async def main() -> None:
        async with opened(path, readers=2) as db:
            assert await asyncio.gather(*[db.read_value("SELECT ?", (n,)) for n in range(100)]) == list(range(100))
            async with db.reader(label="first"):

                async def second() -> None:
                    async with db.reader(label="second"):
                        await asyncio.create_task(third())

                async def third() -> None:
                    with pytest.raises(ReadTimeoutError, match=r"'third'.*'(first|second)'.*'(first|second)'"):
                        await db.read("SELECT 1", label="third", timeout=0.01)
                    with pytest.raises(ReadTimeoutError):
                        async with db.reader(timeout=0.01):
                            pytest.fail("entered")

                await asyncio.create_task(second())

    run(main)


def test_a_statement_of_a_reader_ends_before_the_next_one_begins(path: Path) -> None:
    entered, release = threading.Event(), threading.Event()

    def hold() -> int:
        entered.set()
        release.wait(DEADLINE)
        return 1

    def hook(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.create_function("hold", 0, hold)

    async def main() -> None:
        async with opened(path, on_connect=hook) as db, db.reader() as reader:
            task = asyncio.create_task(reader.execute("SELECT hold()"))
            await asyncio.to_thread(entered.wait, DEADLINE)
            task.cancel()
            await asyncio.sleep(0.01)
            assert not task.done()
            release.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await reader.execute("SELECT 2")).rows == [(2,)]

    run(main)


def test_a_read_that_no_thread_has_begun_gives_its_connection_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with opened(path, readers=1) as db:
            assert await rows(db) == []
            with monkeypatch.context() as patch:
                patch.setattr(threads_of(db), "submit", lambda call: None)
                task = asyncio.create_task(rows(db))
                await asyncio.sleep(0.001)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert await rows(db) == []

    run(main)


def test_a_connection_whose_opening_was_cancelled_goes_to_the_next(path: Path) -> None:
    opening, release = threading.Event(), threading.Event()

    def hook(connection: sqlite3.Connection, readonly: bool) -> None:
        if readonly:
            opening.set()
            release.wait(DEADLINE)

    async def main() -> None:
        async with opened(path, readers=1, on_connect=hook) as db:
            task = asyncio.create_task(rows(db))
            await asyncio.to_thread(opening.wait, DEADLINE)
            task.cancel()
            next_one = asyncio.create_task(rows(db))
            await asyncio.sleep(0.001)
            release.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await next_one == []

    run(main)


def test_reads_are_held_back_for_a_moment_so_that_the_log_can_begin_anew(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            await rows(db)
            with pool_of(db).pause(DEADLINE):
                reading = await beats(3, rows(db))
            assert await reading == []

    run(main)


def test_a_connection_that_comes_in_the_moment_its_task_is_cancelled_goes_to_the_next(path: Path) -> None:
    opened_readers: list[sqlite3.Connection] = []

    def count(connection: sqlite3.Connection, readonly: bool) -> None:
        opened_readers.extend([connection] * readonly)

    async def main() -> None:
        with DbWriter(path, readers=1, on_connect=count) as inner:
            shared = AsyncDbWriter.wrap(inner)
            for is_cancelled in (False, True):
                with inner.reader():
                    waiting = asyncio.create_task(called_there(lambda: shared.read_value("SELECT 1")))
                    while inner.stats().readers_waiting == 0:
                        await asyncio.sleep(0)
                if is_cancelled:
                    waiting.cancel()  # it has the connection, and has not heard of it yet
                    with pytest.raises(asyncio.CancelledError):
                        await waiting
                else:
                    assert await waiting == 1
                assert inner.stats().readers_in_use == 0
            assert await shared.read_value("SELECT 2", timeout=DEADLINE) == 2
            assert len(opened_readers) == 1

    run(main)


def test_a_read_that_is_cancelled_before_its_thread_begins_gives_its_connection_back_once(path: Path) -> None:
    async def main() -> None:
        with DbWriter(path, readers=1) as inner:
            shared = AsyncDbWriter.wrap(inner)
            await shared.read("SELECT 1")
            gate = threading.Event()

            async def enter() -> None:
                async with shared.reader():
                    pytest.fail("entered")

            for read in (enter, lambda: shared.read("SELECT 1"), lambda: shared.read(lambda connection: None)):
                busy = keep_busy(shared, gate)
                reading = asyncio.create_task(read())
                while inner.stats().readers_in_use == 0:
                    await asyncio.sleep(0)
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
                gate.set()
                await busy
                gate.clear()
                with inner.reader(), pytest.raises(ReadTimeoutError):  # so there is still just the one
                    await asyncio.create_task(called_there(lambda: shared.read("SELECT 1", timeout=0.01)))

    run(main)


def test_a_read_is_held_back_only_while_somebody_asks_for_it_and_not_for_long(path: Path) -> None:
    async def main() -> None:
        with DbWriter(path) as inner:
            shared = AsyncDbWriter.wrap(inner)
            with pool_of(inner).pause(0.05):  # which is over before the block is
                assert await shared.read_value("SELECT 1", timeout=DEADLINE) == 1
                assert await asyncio.to_thread(inner.read_value, "SELECT 1", timeout=DEADLINE) == 1

    run(main)


def test_a_read_of_a_function_is_named_by_its_label_or_its_name(path: Path) -> None:
    def count_all(connection: sqlite3.Connection) -> None:
        pass

    async def main() -> None:
        async with opened(path, readers=1) as db, db.reader():

            async def other(**options: Any) -> None:
                await db.read(count_all, timeout=0.01, **options)

            for options, name in (({"label": "mine"}, "'mine'"), ({}, "count_all'")):
                with pytest.raises(ReadTimeoutError, match=name):
                    await asyncio.create_task(other(**options))

    run(main)


def test_a_task_that_is_cancelled_while_it_leaves_a_reader_waits_for_what_runs_there(path: Path) -> None:
    gate = Gate()

    async def main() -> None:
        async with opened(path, readers=1, on_connect=gate.on_connect) as db:
            kept: list[AsyncReader] = []
            running: list[asyncio.Task[Any]] = []

            async def parent() -> None:
                async with db.reader() as reader:
                    kept.append(reader)
                    running.append(asyncio.create_task(reader.execute("SELECT gate()")))
                    await until(gate.entered.is_set)

            leaving = asyncio.create_task(parent())
            await until(lambda: bool(kept) and bool(kept[0]._turn._line))
            for _ in range(2):
                leaving.cancel()
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            assert not leaving.done()
            assert db.stats().readers_in_use == 1
            gate.open.set()
            with pytest.raises(sqlite3.ProgrammingError, match="has ended"):
                await kept[0].execute(COUNT)
            with pytest.raises(asyncio.CancelledError):
                await leaving
            with pytest.raises(sqlite3.ProgrammingError, match="has ended"):
                await running[0]
            assert db.stats().readers_in_use == 0

    run(main)


def test_a_statement_that_ends_after_its_reader_gives_no_result(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    select = tasks_reader._select

    async def main() -> None:
        async with opened(path) as db, db.reader() as block:

            def too_late(*args: Any) -> Any:
                block._snapshot.is_left = True
                return select(*args)

            monkeypatch.setattr(tasks_reader, "_select", too_late)
            with pytest.raises(sqlite3.ProgrammingError, match="has ended"):
                await block.execute("SELECT 1")

    run(main)


@pytest.mark.parametrize("where", ["in the block", "leaving it"])
def test_a_cancelled_reader_ends_the_statement_of_another_task(path: Path, where: str) -> None:
    async def main() -> None:
        async with opened(path, readers=1) as db:
            readers: list[AsyncReader] = []
            running: list[asyncio.Task[Any]] = []

            async def parent() -> None:
                async with db.reader() as reader:
                    readers.append(reader)
                    running.append(asyncio.create_task(reader.execute(ENDLESS)))
                    await until(lambda: reader._turn._owner is not None)
                    if where == "in the block":
                        await asyncio.Event().wait()

            task = asyncio.create_task(parent())
            await until(lambda: bool(running) and readers[0]._turn._owner is not None)
            if where == "leaving it":
                await until(lambda: bool(readers[0]._turn._line))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(sqlite3.Error):
                await running[0]
            assert await db.read_value(COUNT) == 0

    run(main)


def test_a_reader_that_is_over_leaves_the_connection_of_the_next_borrower_alone(path: Path) -> None:
    async def main() -> None:
        async with opened(path, readers=1) as db:
            async with db.reader() as over:
                pass
            pool, claim = pool_of(db), new_claim("next", 100.0)
            pool.wait_for(claim)
            with pytest.raises(sqlite3.ProgrammingError, match="has ended"):
                await over.execute(COUNT)
            assert claim.deadline == 100.0
            pool.end(claim)

    run(main)


def test_a_statement_that_is_cancelled_before_it_begins_in_its_thread_ends(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()
    fetch = reader.fetch_result

    def hesitate(snapshot: Snapshot, *args: Any) -> Any:
        entered.set()
        go_on.wait(DEADLINE)
        return fetch(snapshot, *args)

    monkeypatch.setattr(reader, "fetch_result", hesitate)

    async def main() -> None:
        async with opened(path) as db, db.reader() as reader:
            task = asyncio.create_task(reader.execute(ENDLESS))
            await until(entered.is_set)
            task.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await db.read_value(COUNT) == 0

    run(main)


def test_an_interrupted_statement_that_nobody_waits_for_is_not_logged(path: Path) -> None:
    logged: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))
        async with opened(path) as db, db.reader() as reader:
            task = asyncio.create_task(reader.execute(ENDLESS))
            await until(lambda: reader._turn._owner is not None and threads_of(db)._line.calls.empty())
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gc.collect()
        assert logged == []

    run(main)


def test_a_nested_transaction_or_savepoint_in_a_reader_decides_what_reads_see(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:

            async def count() -> Any:
                return await db.read_value(COUNT)

            async with db.transaction() as tx:
                await db.run(INSERT, (1,))
                async with db.reader() as reader:
                    assert await count() == 0
                    for part in (db.transaction, tx.savepoint):
                        async with part():
                            assert await count() == 1
                            async with db.reader() as inner:
                                assert inner is not reader
                                assert await count() == 0
                            assert await count() == 1
                        assert await count() == 0
                assert await count() == 1
                async with tx.savepoint(), db.reader() as reader, db.reader() as same:
                    assert same is reader
                    assert await count() == 0

    run(main)


def test_a_read_while_another_loop_closes_the_gateway_is_served(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    came = threading.Event()  # the close: to the lock, which the read has
    closing: list[Future[Any]] = []

    class Lock:
        def __init__(self) -> None:
            self._lock = threading.Lock()

        def __enter__(self) -> None:
            if not self._lock.acquire(blocking=False):
                came.set()
                self._lock.acquire()
            elif not closing:
                closing.append(other.submit(run, shared.close))
                assert came.wait(DEADLINE)

        def __exit__(self, *_: object) -> None:
            self._lock.release()

    with DbWriter(path) as inner, ThreadPoolExecutor(1) as other:
        shared = AsyncDbWriter.wrap(inner)
        monkeypatch.setattr(threads_of(shared)._line, "lock", Lock())
        assert run(lambda: shared.read_value("SELECT 1")) == 1
        closing[0].result(DEADLINE)


def test_a_read_that_begins_while_the_gateway_closes_is_served_and_the_close_ends(path: Path) -> None:
    async def main() -> None:
        db = AsyncDbWriter(path, readers=2)
        await db.open()
        gate = threading.Event()
        slow = asyncio.create_task(db.read(lambda connection: gate.wait(DEADLINE)))
        await until(lambda: db.stats().readers_in_use == 1)
        parking = threading.Event()
        job = db.enqueue(lambda tx: parking.wait(DEADLINE))
        closing = asyncio.create_task(db.close())
        await until(lambda: db.closed)
        assert await db.read_value("SELECT 1") == 1
        gate.set()
        parking.set()
        assert await slow is True
        assert await job is True
        assert (await closing).committed == 1
        with pytest.raises(WriterClosedError):
            await db.read("SELECT 1")

    run(main)


def test_a_reader_that_is_open_while_a_wrapper_closes_goes_on_and_comes_back(path: Path) -> None:
    async def main() -> None:
        with DbWriter(path, readers=1) as inner:
            shared = AsyncDbWriter.wrap(inner)
            async with shared.reader() as reader:
                await shared.close()
                assert (await reader.execute("SELECT 1")).fetchall() == [(1,)]
            assert inner.stats().readers_in_use == 0
            assert await AsyncDbWriter.wrap(inner).read_value("SELECT 2") == 2
            threads_of(shared).shutdown()

    run(main)


def test_close_in_the_midst_of_an_own_reader_is_refused_where_it_would_never_end(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            async with db.reader() as reader:
                with pytest.raises(ReentrantWriteError, match="close waits for all readers"):
                    await db.close()
                assert (await reader.execute("SELECT 1")).fetchall() == [(1,)]
            await db.run(INSERT, (1,))

    run(main)


def test_a_late_cancellation_does_not_hurry_the_next_borrower(path: Path) -> None:
    with DbWriter(path, readers=1) as db:
        reads, pool = AsyncDbWriter.wrap(db)._task_reads(), pool_of(db)
        first, second = new_claim("first", 1e9), new_claim("second", 1e9)
        reader = pool.wait_for(first)
        reads.expire(first)
        assert reader._is_late()
        pool.end(first)
        assert pool.wait_for(second) is reader
        reads.expire(first)
        assert not reader._is_late()
        pool.end(second)


def test_a_read_that_is_cancelled_before_its_connection_is_opened_gives_its_place_back(path: Path) -> None:
    async def main() -> None:
        with DbWriter(path, readers=1) as inner:
            shared = AsyncDbWriter.wrap(inner)
            gate = threading.Event()
            busy = keep_busy(shared, gate)
            reading = asyncio.create_task(shared.read("SELECT 1"))
            await until(lambda: inner.stats().readers_in_use == 1)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            gate.set()
            await busy
            assert inner.stats().readers_in_use == 0
            assert await shared.read_value("SELECT 1", timeout=DEADLINE) == 1
            await shared.close()

    run(main)


def test_a_reader_inside_a_reader_cannot_wait_for_what_that_will_never_show(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db, db.reader():
            ticket = db.enqueue(INSERT, (1,))
            await ticket
            with pytest.raises(ReentrantWriteError, match="would never be seen here"):
                async with db.reader(after=ticket):
                    pass

    run(main)


def test_where_a_reader_keeps_commits_waiting_a_write_inside_it_is_refused_at_once(path: Path) -> None:
    async def main() -> None:
        async with opened(path, journal_mode="DELETE") as db, db.reader():
            with pytest.raises(ReentrantWriteError, match=r"inside a reader\(\) waits for a COMMIT"):
                await db.run(INSERT, (1,), timeout=None)
            with pytest.raises(ReentrantWriteError, match=r"inside a reader\(\) waits for a COMMIT"):
                async with db.transaction(timeout=None):
                    pass

    run(main)


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_read_that_gets_no_thread_gives_its_connection_back_and_a_reader_keeps_its_own(
    path: Path, monkeypatch: pytest.MonkeyPatch, is_kept: bool
) -> None:
    async def main() -> None:
        async with opened(path, readers=1) as db:
            with monkeypatch.context() as patch:
                if not is_kept:  # it has to be closed, which is a call into SQLite
                    patch.setattr(pool_of(db), "end_unused", lambda claim: False)
                    patch.setattr(tasks_reader, "start_new_thread", raising(RuntimeError))
                patch.setattr(threads_of(db), "submit", raising(RuntimeError))
                with pytest.raises(RuntimeError):
                    await db.read("SELECT 1")
            assert db.stats().readers_in_use == 0
            async with db.reader() as reader:
                with monkeypatch.context() as patch:
                    patch.setattr(threads_of(db), "submit", raising(RuntimeError))
                    with pytest.raises(RuntimeError):
                        await reader.execute(COUNT)
                assert db.stats().readers_in_use == 1
                assert (await reader.execute(COUNT)).rows == [(0,)]

    run(main)


def test_a_statement_of_a_reader_that_is_cancelled_before_it_has_a_thread_leaves_the_reader_as_it_was(
    path: Path,
) -> None:
    async def main() -> None:
        async with opened(path, readers=1) as db, db.reader() as reader:
            free = threading.Event()
            keep_busy(db, free)  # the only one
            waiting = asyncio.create_task(called_there(lambda: reader.execute(COUNT)))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            free.set()
            assert db.stats().readers_in_use == 1
            assert (await reader.execute(COUNT)).rows == [(0,)]

    run(main)


@pytest.mark.parametrize(("is_left", "text"), [(True, "no such table: x"), (False, "interrupted")])
def test_only_a_statement_that_the_end_of_its_reader_has_interrupted_is_told_as_that(is_left: bool, text: str) -> None:
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = sqlite3.SQLITE_ERROR if is_left else sqlite3.SQLITE_INTERRUPT
    fail = raises(error)
    snapshot: Any = SimpleNamespace(
        is_left=is_left, connection=None, call=lambda function, connection, *_: fail(connection, True)
    )
    with pytest.raises(sqlite3.OperationalError, match=text):
        reader.fetch_result(snapshot, "", ())


def test_a_reader_inside_a_reader_may_be_left_later(path: Path) -> None:
    """Two generators that have one each, say."""

    async def main() -> None:
        async with opened(path, readers=1) as db:

            async def counts() -> AsyncGenerator[int, None]:
                async with db.reader() as reader:
                    while True:
                        yield (await reader.execute(COUNT)).rows[0][0]

            first, second = counts(), counts()
            assert [await anext(first), await anext(second)] == [0, 0]
            await called_there(lambda: db.run(INSERT, (1,)))
            await first.aclose()
            assert await anext(second) == 0
            assert await db.read_value(COUNT, timeout=DEADLINE) == 0  # it is inside the second, as before
            assert db.stats().readers_in_use == 1
            await second.aclose()
            assert db.stats().readers_in_use == 0
            assert await db.read_value(COUNT) == 1

    run(main)


def test_a_cancelled_reader_inside_a_reader_ends_nothing(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db, db.reader() as reader:
            task = asyncio.current_task()
            assert task is not None
            with pytest.raises(asyncio.CancelledError):
                async with db.reader() as inner:
                    assert inner is reader
                    task.cancel()
                    await asyncio.sleep(0)
            task.uncancel()
            assert (await reader.execute(COUNT)).rows == [(0,)]

    run(main)


def test_a_reader_of_a_thread_inside_one_of_a_task_may_be_left_later(path: Path) -> None:
    async def main() -> None:
        with DbWriter(path, readers=1) as inner:
            inner.run("CREATE TABLE t (n)")
            shared = AsyncDbWriter.wrap(inner)
            with contextlib.ExitStack() as outer:
                async with shared.reader():
                    connection = outer.enter_context(inner.reader())
                assert connection.execute(COUNT).fetchone() == (0,)
                assert inner.stats().readers_in_use == 1
            assert inner.stats().readers_in_use == 0
            await shared.close()

    run(main)


NUMBERS = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 1000) SELECT i FROM n"
ENDLESS_ROWS = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"


def test_rows_are_streamed_from_one_snapshot(path: Path) -> None:
    async def main() -> None:
        async with AsyncDbWriter(path) as db:
            await db.run_script(f"CREATE TABLE t (n); INSERT INTO t {NUMBERS}")
            async with db.reader() as reader:
                seen = []
                async for (n,) in reader.stream("SELECT n FROM t WHERE n > ? ORDER BY n", (10,)):
                    seen.append(n)
                    if n == 11:
                        await db.run("DELETE FROM t")
                        assert (await reader.execute("SELECT count(*) FROM t")).rows == [(1000,)]
                assert seen == list(range(11, 1001))
                assert [row async for row in reader.stream("SELECT 1 WHERE 0")] == []
            assert await db.read("SELECT * FROM t") == []

    asyncio.run(main())


def test_two_streams_of_one_reader_go_on_side_by_side(path: Path) -> None:
    async def main() -> None:
        async with AsyncDbWriter(path) as db, db.reader() as reader:
            one, other = reader.stream(NUMBERS), reader.stream(NUMBERS)
            pairs = [(n, await anext(other)) async for n in one]
            assert pairs == [((n,), (n,)) for n in range(1, 1001)]

    asyncio.run(main())


def test_a_reader_of_a_loop_that_was_closed_gives_its_connection_back(path: Path) -> None:
    with DbWriter(path, readers=1) as db:
        tasks = AsyncDbWriter.wrap(db)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(tasks.open())
        block = tasks.reader()
        reader = loop.run_until_complete(block.__aenter__())
        loop.run_until_complete(reader.execute("SELECT 1"))
        loop.close()  # without shutdown_asyncgens()
        assert pool_of(db).in_use == 1
        del block, reader
        gc.collect()
        assert db.read("SELECT 1", timeout=DEADLINE) == [(1,)]


def test_nobody_waits_for_itself_while_a_reader_of_a_closed_loop_is_given_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[Callable[[], object]] = []
    monkeypatch.setattr(tasks_reader, "start_new_thread", lambda end, args: ends.append(lambda: end(*args)))
    with DbWriter(path, readers=1) as db:
        loop = asyncio.new_event_loop()
        block = AsyncDbWriter.wrap(db).reader()
        reader = loop.run_until_complete(block.__aenter__())
        loop.close()
        assert pool_of(db).has_mine
        del block, reader
        gc.collect()
        assert not pool_of(db).has_mine
        assert pool_of(db).in_use == 1
        ends[0]()
        assert pool_of(db).in_use == 0


def test_a_stream_that_is_left_early_pins_nothing_behind_its_block(path: Path) -> None:
    async def main() -> None:
        async with AsyncDbWriter(path, readers=1) as db:
            await db.run("CREATE TABLE t (n)")
            async with db.reader() as reader:
                async for _ in reader.stream(ENDLESS_ROWS):
                    break
                kept = reader.stream(ENDLESS_ROWS)
                await anext(kept)
                async with contextlib.aclosing(reader.stream(ENDLESS_ROWS)) as closing:
                    await anext(closing)
                with pytest.raises(StopAsyncIteration):
                    await anext(closing)
            await db.run("INSERT INTO t VALUES (1)")
            assert await db.read("SELECT n FROM t") == [(1,)]
            assert (await db.checkpoint()).busy is False
            with pytest.raises(sqlite3.ProgrammingError):
                for _ in range(1000):
                    await anext(kept)

    asyncio.run(main())


def test_a_cancelled_stream_ends_its_statement(path: Path) -> None:
    async def main() -> None:
        async with AsyncDbWriter(path, readers=1) as db:

            async def read() -> None:
                async with db.reader() as reader:
                    async for _ in reader.stream(f"SELECT count(*) FROM ({ENDLESS_ROWS}) UNION ALL SELECT 1"):
                        pass

            task = asyncio.create_task(read())
            while not db.stats().readers_in_use:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(task, DEADLINE)
            assert await db.read("SELECT 1") == [(1,)]

    asyncio.run(main())


def test_a_stream_cannot_write_and_checks_its_arguments(path: Path) -> None:
    async def main() -> None:
        async with AsyncDbWriter(path) as db:
            await db.run("CREATE TABLE t (n)")
            async with db.reader() as reader:
                with pytest.raises(sqlite3.OperationalError, match="readonly"):
                    await anext(reader.stream("INSERT INTO t VALUES (1) RETURNING n"))
                with pytest.raises(TypeError):
                    reader.stream(3)  # type: ignore[arg-type]
                with pytest.raises(TypeError):
                    reader.stream("SELECT ?", "a")  # type: ignore[arg-type]

    asyncio.run(main())


def test_a_task_of_another_loop_that_is_closed_in_its_call_keeps_nobody_from_the_block(path: Path) -> None:
    gate = Gate()

    async def main() -> None:
        async with opened(path, readers=1, on_connect=gate.on_connect) as db:
            async with db.reader() as reader:
                call = reader.execute("SELECT gate()")
                task = await asyncio.to_thread(left_in_a_closed_loop, call, gate.entered.is_set)
                next_one = await beats(5, reader.execute("SELECT 1"))
                gate.open.set()
                assert (await next_one).rows == [(1,)]
            assert not task.done()
            assert await db.read_value("SELECT 2") == 2

    run(main)


def test_a_cancelled_call_ends_no_stream_of_the_same_block(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "GRACE", DEADLINE)  # it ends by itself, however busy the machine is

    async def main() -> None:
        async with opened(path) as db, db.reader() as reader:
            stream = reader.stream(NUMBERS)
            first = await anext(stream)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await reader.execute(ENDLESS)
            assert (await reader.execute("SELECT 1")).rows == [(1,)]
            assert [first] + [row async for row in stream] == [(n,) for n in range(1, 1001)]

    run(main)


def test_a_stream_whose_task_is_collected_in_another_loop_keeps_nobody_from_the_block(path: Path) -> None:
    gate = Gate()
    slow = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 999) SELECT iif(i=700,gate(),i) FROM n"

    async def main() -> None:
        async with opened(path, readers=1, on_connect=gate.on_connect) as db, db.reader() as reader:

            async def stream() -> None:
                async for _ in reader.stream(slow):
                    pass

            def lose() -> None:
                task = left_in_a_closed_loop(stream(), gate.entered.is_set)
                gate.open.set()
                eventually(lambda: threads_of(db)._line.idle)
                del task

            await asyncio.to_thread(lose)
            gc.collect()
            assert (await reader.execute("SELECT 1")).rows == [(1,)]

    run(main)


def test_a_thread_may_close_although_the_read_of_a_loop_that_it_has_closed_still_runs(path: Path) -> None:
    gate = Gate()
    db = DbWriter(path, readers=1, on_connect=gate.on_connect)
    task = left_in_a_closed_loop(AsyncDbWriter.wrap(db).read("SELECT gate()"), gate.entered.is_set)
    threading.Timer(0.05, gate.open.set).start()
    db.close()
    assert not task.done()


def test_a_reader_that_has_read_is_ended_as_its_loop_is_closed(one: DbWriter) -> None:
    blocks: list[object] = []

    async def main() -> None:
        blocks.append(AsyncDbWriter.wrap(one).reader())
        snapshot = await blocks[0].__aenter__()  # type: ignore[attr-defined]
        await snapshot.execute(COUNT)
        blocks.append(snapshot)

    in_threads(lambda: asyncio.run(main()))
    assert one.read_value(COUNT, timeout=DEADLINE) == 0


def test_a_call_that_is_given_up_leaves_the_reader_its_connection(one: DbWriter) -> None:
    async def main() -> None:
        async with AsyncDbWriter.wrap(one).reader() as snapshot:
            call = snapshot.execute(LONG)
            call.send(None)
            call.close()  # as where its task is collected
            assert (await snapshot.execute(COUNT)).fetchone() == (0,)
            assert pool_of(one).in_use == 1

    asyncio.run(main())


def test_a_connection_on_which_no_snapshot_can_begin_is_given_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with opened(path, readers=1) as db:
            with monkeypatch.context() as patch, pytest.raises(OSError, match="own making"):
                patch.setattr(Reader, "pin", raising(OSError))
                patch.setattr(tasks_reader, "start_new_thread", raising(AssertionError))  # to give it back again
                async with db.reader():
                    pytest.fail("entered")
            assert pool_of(db).in_use == 0
            assert await db.read_value("SELECT 1", timeout=DEADLINE) == 1

    run(main)


def test_a_reader_whose_coroutine_is_closed_where_no_loop_runs_is_given_back_there_and_then(path: Path) -> None:
    with DbWriter(path) as db:
        wrapped = AsyncDbWriter.wrap(db)
        is_there = asyncio.Event()

        async def reads_for_ever() -> None:
            async with wrapped.reader():
                is_there.set()
                await asyncio.Event().wait()

        reading = reads_for_ever()
        task = left_in_a_closed_loop(reading, is_there.is_set)
        reading.close()
        assert pool_of(db).in_use == 0
        assert not task.done()


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_a_reader_of_a_closed_loop_holds_up_no_commit_and_keeps_no_log(path: Path, mode: Any) -> None:
    with DbWriter(path, journal_mode=mode, lock_timeout=DEADLINE) as db:
        wrapped = AsyncDbWriter.wrap(db)
        db.run("CREATE TABLE t (n)")
        db.run("INSERT INTO t VALUES (1)")
        is_there = asyncio.Event()

        async def reads_for_ever() -> None:
            async with wrapped.reader() as connection:
                await connection.execute("SELECT n FROM t")
                is_there.set()
                await asyncio.Event().wait()

        task = left_in_a_closed_loop(reads_for_ever(), is_there.is_set)
        db.run("INSERT INTO t VALUES (2)")
        eventually(lambda: not db.checkpoint().busy)
        assert pool_of(db).in_use == 0
        assert not task.done()


@pytest.mark.parametrize("is_stored", [False, True])
def test_a_reader_whose_statement_was_interrupted_as_it_got_its_turn_can_be_left(
    path: Path, monkeypatch: pytest.MonkeyPatch, is_stored: bool
) -> None:
    def interrupted(turn: Turn, *args: Any) -> None:
        monkeypatch.undo()
        getattr(turn, name)(*args)
        raise KeyboardInterrupt

    name = "release" if is_stored else "take"

    async def main() -> None:
        async with opened(path) as db:
            async with asyncio.timeout(DEADLINE), db.reader() as reader:
                if is_stored:  # as it begins to give it back
                    monkeypatch.setattr(Turn, name, raising(KeyboardInterrupt))
                else:
                    monkeypatch.setattr(Turn, name, interrupted)
                with pytest.raises(KeyboardInterrupt):
                    await reader.execute("SELECT 1")
                monkeypatch.undo()
                assert (await reader.execute("SELECT 2")).rows == [(2,)]
            assert await db.read("SELECT 3") == [(3,)]

    run(main)


def test_a_reader_whose_beginning_was_interrupted_is_given_back(one: DbWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(call: Call[Any]) -> Any:
        monkeypatch.undo()
        yield from waits(call)
        raise KeyboardInterrupt

    waits = Call.__await__

    async def enter(where: Any) -> None:
        monkeypatch.setattr(*where)
        async with AsyncDbWriter.wrap(one).reader():
            pytest.fail("entered")

    async def read(where: Any) -> None:
        monkeypatch.setattr(*where)
        await AsyncDbWriter.wrap(one).read("SELECT 1")

    def finalize(owner: object, *args: Any) -> Any:
        return weakref.finalize(owner, *args) if isinstance(owner, AsyncReader) else raising(KeyboardInterrupt)()

    wheres: list[Any] = [
        (Call, "__await__", raising(KeyboardInterrupt)),
        (Call, "__await__", interrupted),
        (Call, "__init__", raising(KeyboardInterrupt)),  # behind the admission
    ]
    of_blocks: list[Any] = [
        (AsyncReader, "__init__", raising(KeyboardInterrupt)),
        (tasks_reader, "weakref", SimpleNamespace(finalize=finalize, ref=weakref.ref)),
        (Scopes, "enter", raising(KeyboardInterrupt)),
    ]
    for main, where in [*itertools.product((enter, read), wheres), *((enter, where) for where in of_blocks)]:
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(main(where))
        monkeypatch.undo()
        eventually(lambda: pool_of(one).in_use == 0)
        assert one.read("SELECT 1", timeout=DEADLINE) == [(1,)]


def test_a_reader_inside_a_reader_whose_beginning_was_interrupted_ends_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with opened(path) as db, db.reader() as reader:
            with monkeypatch.context() as patch, pytest.raises(LookupError):
                patch.setattr(Scopes, "enter", raising(LookupError))
                async with db.reader():
                    pytest.fail("entered")
            gc.collect()
            assert (await reader.execute("SELECT 1")).rows == [(1,)]

    run(main)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("is_closed", [True, False])
def test_a_reader_whose_task_is_collected_as_its_cancellation_waits_is_given_back(
    one: DbWriter, monkeypatch: pytest.MonkeyPatch, is_closed: bool
) -> None:
    def pin_later(reader: Reader) -> None:
        gate.entered.set()
        gate.open.wait(DEADLINE)
        pin(reader)

    async def enter() -> None:
        async with AsyncDbWriter.wrap(one).reader():
            pytest.fail("entered")

    gate, pin = Gate(), Reader.pin
    monkeypatch.setattr(Reader, "pin", pin_later)
    loop = asyncio.new_event_loop()
    task = loop.create_task(enter())
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.run_until_complete(until(gate.entered.is_set))
    task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.run_until_complete(asyncio.sleep(0))
    if is_closed:
        loop.close()
    del task, loop
    gate.open.set()
    eventually(lambda: gc.collect() >= 0 and pool_of(one).in_use == 0)
    assert one.read("SELECT 1", timeout=DEADLINE) == [(1,)]


def test_a_reader_whose_cancelled_beginning_is_interrupted_is_given_back(
    one: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def enter() -> None:
        async with AsyncDbWriter.wrap(one).reader():
            pytest.fail("entered")

    async def main() -> None:
        def pin_later(reader: Reader) -> None:
            pin(reader)
            loop.call_soon_threadsafe(task.cancel)

        loop, pin = asyncio.get_running_loop(), Reader.pin
        monkeypatch.setattr(Reader, "pin", pin_later)
        monkeypatch.setattr(TaskReads, "end", raising(LookupError))
        task = asyncio.create_task(enter())
        with pytest.raises(LookupError):
            await task
        monkeypatch.undo()
        await until(lambda: pool_of(one).in_use == 0)

    run(main)


def test_a_cancellation_that_comes_as_a_generator_gives_its_reader_back_is_not_lost(path: Path) -> None:
    async def values(db: AsyncDbWriter) -> AsyncGenerator[int, None]:
        async with db.reader():
            yield 1

    async def main() -> None:
        async with opened(path, readers=1) as db:
            gate, has_begun = threading.Event(), asyncio.Event()

            async def first() -> None:
                async with contextlib.aclosing(values(db)) as generator:
                    await anext(generator)
                    keep_busy(db, gate)
                    asyncio.get_running_loop().call_soon(has_begun.set)
                pytest.fail("went on")

            task = asyncio.create_task(first())
            await has_begun.wait()
            await beats(1, task)
            task.cancel()
            await asyncio.sleep(0)
            gate.set()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(main)

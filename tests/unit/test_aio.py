"""AsyncDbWriter: awaited, cancelled, from several loops, and never in the loop's way."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import gc
import inspect
import logging
import os
import sqlite3
import sys
import threading
import warnings
import weakref
from asyncio.futures import _PyFuture  # type: ignore[attr-defined]
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, assert_type

import pytest

from aio_helpers import beats, left_in_a_closed_loop, opened, rows, run, until, writer_parked
from helpers import BRIEFLY, DEADLINE, eventually, holding_lock, notes_of, parked, pool_of, queue_of, raising, rows_in
from onewriter import (
    AsyncDbWriter,
    AsyncReader,
    AsyncTransaction,
    CloseReport,
    DbWriter,
    QueueFullError,
    ReadTimeoutError,
    ReentrantWriteError,
    Result,
    Ticket,
    Transaction,
    WriterClosedError,
    WriteTimeoutError,
)
from onewriter.base.task_waits import waits_of
from onewriter.tasks.calls import Turn

INSERT = "INSERT INTO t VALUES (?)"
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
COUNT = "SELECT count(*) FROM t"


async def cancel_await(db: AsyncDbWriter, ticket: Ticket[Any]) -> None:
    async def wait() -> None:
        await ticket

    waiting = asyncio.create_task(wait())
    await until(lambda: bool(ticket._waiters))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def read_after(db: AsyncDbWriter, ticket: Ticket[Any]) -> None:
    with pytest.raises(ReadTimeoutError, match="was not committed"):
        await db.read("SELECT 1", after=ticket, timeout=0.01)


def test_every_call_does_what_its_twin_does(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            assert (await db.run(INSERT, (1,))).rowcount == 1
            assert_type(await db.run(INSERT, (2,)), Result)
            assert_type(await db.run(lambda tx: len(tx.label)), int)
            assert (await db.run_many(INSERT, ((n,) for n in (3, 4)))).rowcount == 2
            await db.run_script("INSERT INTO t VALUES (5); INSERT INTO t VALUES (6);")
            await db.run_without_transaction("VACUUM")
            ticket = db.enqueue(INSERT, (7,))
            assert_type(ticket, Ticket[Result])
            assert (await ticket).rowcount == 1
            assert ticket.called_from.startswith("test_aio.py:")
            ticket = await db.enqueue_wait(INSERT, (8,))
            assert await db.read_value("SELECT max(n) FROM t", after=ticket) == 8
            await db.flush()
            assert await rows(db) == [1, 2, 3, 4, 5, 6, 7, 8]
            assert await db.read_one("SELECT n FROM t WHERE n = 9") is None
            assert await db.read(lambda connection: connection.execute("SELECT sum(n) FROM t").fetchone()) == (36,)
            await db.backup(path.parent / "copy.db")
            assert (await db.checkpoint()) == (False, 0, 0)
            assert (db.path, db.journal_mode, db.health, db.closed, db.in_writer()) == (
                str(path),
                "WAL",
                "ok",
                False,
                False,
            )
            assert db.stats().failed == 0
            assert repr(db).startswith("<AsyncDbWriter <DbWriter")
        assert db.closed
        report = await db.close()
        assert report.failed == 0
        assert sorted(os.listdir(path.parent)) == [path.name, "copy.db"]

    run(main)


def test_errors_arrive_as_they_are(path: Path) -> None:
    def fail(tx: Transaction) -> None:
        raise LookupError("mine")

    async def main() -> None:
        async with opened(path) as db:
            await db.run("CREATE UNIQUE INDEX i ON t (n)")
            await db.run(INSERT, (1,))
            anything: Any = db  # wrong types too
            for call, kind in [
                (lambda: db.run(INSERT, (1,)), sqlite3.IntegrityError),
                (lambda: db.run(fail), LookupError),
                (lambda: db.read("SELECT"), sqlite3.OperationalError),
                (lambda: db.read("DELETE FROM t"), sqlite3.OperationalError),
                (lambda: db.run(INSERT, "1"), TypeError),  # type: ignore[call-overload]
                (lambda: anything.run(1), TypeError),
                (lambda: db.run(INSERT, (1,), timeout=-1), ValueError),
                (lambda: anything.read(1), TypeError),
                (lambda: db.read("SELECT 1", timeout=-1), ValueError),
                (lambda: anything.read("SELECT 1", after=1), TypeError),
                (lambda: anything.checkpoint("x"), ValueError),
                (lambda: db.backup(db.path), ValueError),
                (lambda: db.read(lambda connection: connection.cursor()), TypeError),
            ]:
                with pytest.raises(kind):
                    await call()  # type: ignore[no-untyped-call]
            assert await rows(db) == [1]

    run(main)


def test_before_open_and_after_close_every_call_says_so(path: Path) -> None:
    async def main() -> None:
        db = AsyncDbWriter(path)

        async def all_raise() -> None:
            for call in (
                lambda: db.run(INSERT, (1,)),
                lambda: db.read("SELECT 1"),
                lambda: db.flush(),
                lambda: db.checkpoint(),
                lambda: db.enqueue_wait(INSERT, (1,)),
                lambda: db.backup("x"),
                lambda: db.transaction().__aenter__(),
                lambda: db.reader().__aenter__(),
            ):
                with pytest.raises(WriterClosedError):
                    await call()
            with pytest.raises(WriterClosedError):
                db.enqueue(INSERT, (1,))

        await all_raise()
        assert db.closed
        with pytest.raises(TypeError, match="async with"), db:
            pass
        assert await db.open() is db
        assert await db.open() is db
        await db.close()
        await all_raise()
        with pytest.raises(WriterClosedError):
            await db.open()
        never_opened = AsyncDbWriter(path)
        assert (await never_opened.close()).committed == 0
        with pytest.raises(WriterClosedError):
            await never_opened.open()

    run(main)


def test_what_cannot_be_opened_raises_at_open_and_may_be_tried_again(path: Path) -> None:
    async def main() -> None:
        path.mkdir()
        db = AsyncDbWriter(path)
        with pytest.raises(sqlite3.OperationalError, match="it is a folder"):
            await db.open()
        path.rmdir()
        async with db:
            await db.run("CREATE TABLE t (n)")
        with pytest.raises(TypeError):
            await AsyncDbWriter(path, maxsize="1").open()

    run(main)


def test_wrap_leaves_the_gateway_open(path: Path) -> None:
    with DbWriter(path) as inner:
        inner.run("CREATE TABLE t (n)")

        async def main() -> None:
            async with AsyncDbWriter.wrap(inner) as db:
                await db.run(INSERT, (1,))
                assert await db.read_value("SELECT max(n) FROM t") == 1
            with pytest.raises(WriterClosedError):
                await db.run(INSERT, (2,))

        run(main)
        run(main)
        inner.run(INSERT, (3,))
        assert inner.read("SELECT n FROM t") == [(1,), (1,), (3,)]
    with pytest.raises(TypeError):
        AsyncDbWriter.wrap(path)  # type: ignore[arg-type]
    with DbWriter(path, inline=True) as inline, pytest.raises(ValueError, match="inline"):
        AsyncDbWriter.wrap(inline)
    with pytest.raises(ValueError, match="inline"):
        AsyncDbWriter(path, inline=True)


def test_a_batch_wakes_a_loop_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with opened(path) as db:
            loop = asyncio.get_running_loop()
            calls: list[Any] = []
            call_soon_threadsafe = loop.call_soon_threadsafe

            def count(callback: Any, *args: Any, **options: Any) -> Any:
                calls.append(callback)
                return call_soon_threadsafe(callback, *args, **options)

            async with writer_parked(db) as release:
                tasks = [asyncio.ensure_future(db.run(INSERT, (n,))) for n in range(100)]
                await asyncio.sleep(0)
                monkeypatch.setattr(loop, "call_soon_threadsafe", count)
                release.set()
                await asyncio.gather(*tasks)
                monkeypatch.undo()
            # One for the job that parked, at most, and one for the hundred that shared a transaction.
            assert len(calls) <= 2

    run(main)


def test_nothing_blocks_the_loop_while_the_lock_is_held_elsewhere(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:

            async def block() -> None:
                async with db.transaction() as tx:
                    await tx.execute(INSERT, (2,))

            with holding_lock(path) as other:
                writing = await beats(20, db.run(INSERT, (1,)))
                entering = await beats(20, block())
                closing = await beats(20, db.close())
                other.execute("COMMIT")
                await asyncio.gather(writing, entering, closing)

    run(main)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT n FROM t").fetchall() == [(1,), (2,)]


def test_opening_does_not_block_the_loop(path: Path) -> None:
    async def main() -> None:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
            other.execute("BEGIN EXCLUSIVE")
            db = AsyncDbWriter(path)
            opening = await beats(20, db.open())
            other.execute("COMMIT")
            await opening
            await db.close()

    run(main)


def test_an_opening_that_is_cancelled_leaves_nothing_open(path: Path) -> None:
    async def main() -> None:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
            other.execute("BEGIN EXCLUSIVE")
            opening = await beats(5, AsyncDbWriter(path).open())
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            other.execute("COMMIT")
        await until(lambda: not any("writer" in thread.name for thread in threading.enumerate()))

    run(main)


def test_close_waits_for_an_opening_that_was_cancelled(path: Path) -> None:
    """Or else files would appear behind it."""
    entered, release, has_closed = threading.Event(), threading.Event(), threading.Event()

    def wait(connection: sqlite3.Connection, readonly: bool) -> None:
        entered.set()
        release.wait(DEADLINE)

    async def main() -> None:
        db = AsyncDbWriter(path, on_connect=wait)
        opening = asyncio.create_task(db.open())
        await until(entered.is_set)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        assert await db.close(0.01) == CloseReport(0, 0, 0, 0, ())
        closing = asyncio.create_task(db.close())
        closing.add_done_callback(lambda _: has_closed.set())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(closing), BRIEFLY)
        assert not has_closed.is_set()
        release.set()
        await closing
        assert os.listdir(path.parent) == [path.name]

    run(main)


def test_a_slow_statement_in_a_block_or_reader_does_not_block_the_loop(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:

            async def block() -> None:
                async with db.transaction() as tx:
                    await tx.execute(ENDLESS)

            async def reader() -> None:
                async with db.reader() as reader:
                    await reader.execute(ENDLESS)

            for slow in (block, reader):
                task = await beats(20, slow())
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await db.run(INSERT, (1,))

    run(main)


def test_a_full_queue_does_not_block_the_loop(path: Path) -> None:
    async def main() -> None:
        async with opened(path, maxsize=1) as db:
            async with writer_parked(db):
                first = db.enqueue(INSERT, (1,))
                with pytest.raises(QueueFullError):
                    db.enqueue(INSERT, (2,))
                with pytest.raises(QueueFullError, match=r"within 0\.01 s"):
                    await db.enqueue_wait(INSERT, (3,), timeout=0.01)
                waiting = await beats(10, db.enqueue_wait(INSERT, (4,)))
                cancelled = await beats(10, db.enqueue_wait(INSERT, (5,)))
                cancelled.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await cancelled
            ticket = await waiting
            await ticket
            await first
            assert await rows(db) == [1, 4]

    run(main)


def test_closing_ends_the_wait_for_room(path: Path) -> None:
    async def main() -> None:
        async with opened(path, maxsize=1) as db:
            async with writer_parked(db):
                db.enqueue(INSERT, (1,))
                waiting = await beats(5, db.enqueue_wait(INSERT, (2,)))
                closing = await beats(5, db.close())
                with pytest.raises(WriterClosedError):
                    await waiting
            await closing

    run(main)


@pytest.mark.parametrize("timeout", [0.01, 1.0])
def test_a_write_that_does_not_start_in_time_never_runs(path: Path, timeout: float) -> None:
    async def main() -> None:
        async with opened(path) as db:
            async with writer_parked(db):
                with pytest.raises(WriteTimeoutError, match=r"is withdrawn.*park") as caught:
                    await db.run(INSERT, (1,), timeout=timeout)
                assert not caught.value.started
                with pytest.raises(WriteTimeoutError, match="did not begin within") as caught:
                    async with db.transaction(timeout=timeout):
                        pytest.fail("entered")
            await db.flush()
            assert await rows(db) == []

    run(main)


def test_a_write_that_has_started_goes_on_whole_when_its_time_is_up(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            entered, release = threading.Event(), threading.Event()

            def job(tx: Transaction) -> str:
                entered.set()
                release.wait(DEADLINE)
                tx.execute(INSERT, (1,))
                return "done"

            with pytest.raises(WriteTimeoutError) as caught:
                await db.run(job, timeout=0.05)
            assert caught.value.started
            release.set()
            assert await caught.value.ticket == "done"
            assert await rows(db) == [1]

    run(main)


AT_ONCE: dict[str, Callable[[AsyncDbWriter, AsyncReader], Any]] = {
    "run": lambda db, reader: db.run(INSERT, (1,)),
    "run_many": lambda db, reader: db.run_many(INSERT, [(1,)]),
    "run_script": lambda db, reader: db.run_script("DELETE FROM t"),
    "run_without_transaction": lambda db, reader: db.run_without_transaction("VACUUM"),
    "migrate": lambda db, reader: db.migrate(["DELETE FROM t"]),
    "enqueue_wait": lambda db, reader: db.enqueue_wait(INSERT, (1,)),
    "flush": lambda db, reader: db.flush(),
    "checkpoint": lambda db, reader: db.checkpoint(),
    "read": lambda db, reader: db.read("SELECT 1"),
    "read_one": lambda db, reader: db.read_one("SELECT 1"),
    "read_value": lambda db, reader: db.read_value("SELECT 1"),
    "read of a reader": lambda db, reader: reader.execute("SELECT 1"),
    "backup": lambda db, reader: db.backup("never.db"),
    "close": lambda db, reader: db.close(),
}


@pytest.mark.parametrize("call", AT_ONCE.values(), ids=AT_ONCE)
def test_a_task_that_is_cancelled_at_once_leaves_no_coroutine_behind(
    path: Path, call: Callable[[AsyncDbWriter, AsyncReader], Any]
) -> None:
    async def main() -> None:
        async with opened(path) as db:
            async with db.reader() as reader:
                task = asyncio.ensure_future(contextvars.Context().run(call, db, reader))
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                del task
            assert not db.closed
            assert await db.read("SELECT * FROM t") == []

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(main)
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


def test_cancelled_before_it_starts_a_write_never_runs(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            async with writer_parked(db):
                tasks = [
                    asyncio.ensure_future(db.run(INSERT, (1,))),
                    asyncio.ensure_future(db.enqueue(INSERT, (2,))),
                    asyncio.ensure_future(db.flush()),
                    asyncio.ensure_future(db.transaction().__aenter__()),
                ]
                await asyncio.sleep(0.005)
                for task in tasks:
                    task.cancel()
                for task in tasks:
                    with pytest.raises(asyncio.CancelledError):
                        await task
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(db.run(INSERT, (3,)), 0.01)
                with pytest.raises(ExceptionGroup):
                    async with asyncio.TaskGroup() as group:
                        group.create_task(db.run(INSERT, (4,)))
                        raise LookupError
            await db.run(INSERT, (5,))
            assert await rows(db) == [5]
            assert db.stats().cancelled == 4  # the task of the group had not even begun

    run(main)


def test_cancelled_after_it_started_a_write_finishes_and_its_ticket_has_the_outcome(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with opened(path) as db:
            entered, release = threading.Event(), threading.Event()

            def job(tx: Transaction) -> str:
                entered.set()
                release.wait(DEADLINE)
                tx.execute(INSERT, (1,))
                return "done"

            ticket = db.enqueue(job)
            await asyncio.to_thread(entered.wait, DEADLINE)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(ticket, 0.01)
            release.set()
            assert await ticket == "done"
            entered.clear()
            release.clear()

            def fail(tx: Transaction) -> None:
                job(tx)
                raise LookupError("nobody waits")

            failing = asyncio.ensure_future(db.run(fail, label="left alone"))
            await asyncio.to_thread(entered.wait, DEADLINE)
            failing.cancel()
            with pytest.raises(asyncio.CancelledError) as cancelled:
                await failing
            release.set()
            await db.flush()
            assert await rows(db) == [1]
            assert cancelled.tb is not None  # with the frames that waited: whoever keeps them waits no more

    with caplog.at_level(logging.ERROR):
        run(main)
    assert "left alone" in caplog.text


def test_several_loops_and_threads_share_one_gateway(path: Path) -> None:
    with DbWriter(path) as inner:
        inner.run("CREATE TABLE t (n)")
        shared = AsyncDbWriter.wrap(inner)
        failures: list[BaseException] = []

        async def main() -> None:
            await asyncio.gather(*[shared.run(INSERT, (n,)) for n in range(100)])
            async with shared.transaction() as tx:
                await tx.execute(INSERT, (-1,))
                assert len(await shared.read("SELECT n FROM t")) > 100

        def thread() -> None:
            try:
                run(main)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=thread) for _ in range(4)]
        for each in threads:
            each.start()
        for n in range(50):
            inner.run(INSERT, (n,))
        for each in threads:
            each.join(DEADLINE)
        assert failures == []
        assert inner.read_value("SELECT count(*) FROM t") == 4 * 101 + 50


def test_a_loop_that_is_closed_before_the_result_arrives_harms_nobody(path: Path) -> None:
    with DbWriter(path) as inner:
        inner.run("CREATE TABLE t (n)")
        with parked(inner):
            loop = asyncio.new_event_loop()
            db = AsyncDbWriter.wrap(inner)
            task = loop.create_task(db.run(INSERT, (1,)))
            loop.run_until_complete(asyncio.sleep(0.001))
            loop.close()
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            ticket = inner.enqueue(INSERT, (2,))
        ticket.result(DEADLINE)
        inner.run(INSERT, (3,), timeout=DEADLINE)
        assert inner.read("SELECT n FROM t") == [(1,), (2,), (3,)]


def test_a_blocking_call_on_the_loops_thread_warns_in_debug_mode_only(path: Path) -> None:
    with DbWriter(path) as inner:
        inner.run("CREATE TABLE t (n)")

        async def main() -> None:
            inner.run(INSERT, (1,))
            with inner.transaction() as tx:
                tx.execute(INSERT, (2,))
            with inner.reader():
                inner.read("SELECT 1")

        asyncio.run(main())

        async def debugged() -> None:
            wait = threading.Event()  # a ticket that is not done
            for call in (
                lambda: inner.run(INSERT, (1,)),
                lambda: inner.flush(),
                lambda: inner.read("SELECT 1"),
                lambda: inner.read(lambda connection: None),
                lambda: inner.read_one("SELECT 1", timeout=1.0),
                lambda: inner.backup(path.with_name("copy.db")),
                lambda: inner.enqueue(lambda tx: wait.wait(0.05) and None).exception(),
                lambda: inner.transaction().__enter__(),
                lambda: inner.reader().__enter__(),
            ):
                with pytest.warns(RuntimeWarning, match="blocks the event loop") as caught:
                    call()
                assert caught[0].filename == __file__
            inner.enqueue(INSERT, (3,))

        with contextlib.suppress(ReentrantWriteError):
            asyncio.run(debugged(), debug=True)


def test_ten_thousand_tasks_leave_nothing_behind(path: Path) -> None:
    async def main() -> None:
        async with opened(path, synchronous="NORMAL") as db:
            await asyncio.gather(*[db.run(INSERT, (n,)) for n in range(100)])
            gc.collect()
            before = len(gc.get_objects())
            await asyncio.gather(*[db.run(INSERT, (n,)) for n in range(10_000)])
            # The loop lets go of them, and the writer of its last batch.
            await until(lambda: gc.collect() >= 0 and len(gc.get_objects()) < before + 100)
            assert await db.read_value("SELECT count(*) FROM t") == 10_100

    run(main)


def test_an_error_that_was_dealt_with_is_gone_at_once(path: Path) -> None:
    async def main() -> None:
        def fail(*_: object) -> None:
            raise OwnError

        async with opened(path) as db:
            broken = AsyncDbWriter(path, on_connect=fail)
            ways: list[Callable[[], Awaitable[object]]] = [
                lambda: db.run("SELECT * FROM nowhere"),
                lambda: db.enqueue("SELECT * FROM nowhere"),
                lambda: db.read("SELECT * FROM nowhere"),
                lambda: db.read(fail),
                broken.open,
            ]
            for way in ways:
                try:
                    await way()
                except (OwnError, sqlite3.Error) as error:
                    gone = weakref.ref(error)
                async with asyncio.timeout(DEADLINE):  # until the threads that made it have let it go
                    while gone() is not None:
                        await asyncio.sleep(0.001)

    class OwnError(Exception):
        pass

    gc.collect()
    gc.disable()
    try:
        run(main)
    finally:
        gc.enable()


def test_an_opening_that_is_cancelled_in_the_moment_it_ends_is_undone(path: Path) -> None:
    threads = set(threading.enumerate())
    opened_files: list[sqlite3.Connection] = []

    async def main() -> None:
        db = AsyncDbWriter(path, on_connect=lambda connection, readonly: opened_files.append(connection))
        opening = asyncio.create_task(db.open())
        await asyncio.sleep(0)
        for thread in set(threading.enumerate()) - threads:
            if thread.name == "onewriter-call":
                thread.join(DEADLINE)  # the loop stands still: it has not heard yet
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening

    run(main)
    for thread in set(threading.enumerate()) - threads:
        thread.join(DEADLINE)
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        opened_files[0].execute("SELECT 1")


def test_a_job_that_waited_in_line_wakes_a_writer_that_sleeps(path: Path) -> None:
    async def main() -> None:
        async with opened(path, auto_checkpoint=False) as db:  # or else it looks up in half a second
            await until(lambda: queue_of(db)._asleep)
            ticket = await db.enqueue_wait(INSERT, (1,))
            assert (await ticket).rowcount == 1

    run(main)


def test_a_gateway_that_was_never_opened_says_so_and_a_closed_one_too(path: Path) -> None:
    async def main() -> None:
        db = AsyncDbWriter(path)
        with pytest.raises(WriterClosedError, match=r"not open.*await db\.open"):
            await db.run("SELECT 1")
        await db.close()
        with pytest.raises(WriterClosedError, match="is closed"):
            await db.run("SELECT 1")
        with DbWriter(path) as inner:
            shared = AsyncDbWriter.wrap(inner)
            await shared.close()
            with pytest.raises(WriterClosedError, match="is closed"):
                await shared.run("SELECT 1")
            assert not inner.closed

    run(main)


@pytest.mark.parametrize("give_up", [cancel_await, read_after])
def test_a_failure_after_the_wait_for_it_was_given_up_is_loud(
    path: Path, give_up: Callable[[AsyncDbWriter, Ticket[Any]], Coroutine[Any, Any, None]]
) -> None:
    heard: list[str] = []

    async def main() -> None:
        async with opened(path, on_error=lambda ticket: heard.append(ticket.label)) as db:
            entered, fail = threading.Event(), threading.Event()

            def job(tx: Transaction) -> None:
                entered.set()
                fail.wait(DEADLINE)
                raise LookupError

            ticket = db.enqueue(job, label="unheard")
            await until(entered.is_set)
            await give_up(db, ticket)
            fail.set()
            await db.flush()
            assert heard == ["unheard"]

    run(main)


def test_a_failure_whose_task_was_left_in_a_closed_loop_is_loud(path: Path) -> None:
    heard: list[str] = []
    with DbWriter(path, on_error=lambda ticket: heard.append(ticket.label)) as db:
        with parked(db):
            ticket = db.enqueue("INSERT INTO nowhere VALUES (1)", label="unheard")

            async def wait() -> None:
                await ticket

            left = left_in_a_closed_loop(wait(), lambda: bool(ticket._waiters))
        db.flush(DEADLINE)
        assert heard == ["unheard"]
        assert not left.done()
        wait_for_it = left.get_coro()
        assert inspect.iscoroutine(wait_for_it)
        wait_for_it.close()


async def enter(db: AsyncDbWriter) -> None:
    async with db.transaction(timeout=0.1):
        pytest.fail("entered")


ENDLESS_WAITS: dict[str, Callable[[AsyncDbWriter], Coroutine[Any, Any, Any]]] = {
    "run": lambda db: db.run(INSERT, (1,), timeout=0.1),
    "run_many": lambda db: db.run_many(INSERT, [(1,)], timeout=0.1),
    "run_script": lambda db: db.run_script("DELETE FROM t", timeout=0.1),
    "run_without_transaction": lambda db: db.run_without_transaction("VACUUM", timeout=0.1),
    "flush": lambda db: db.flush(timeout=0.1),
    "checkpoint": lambda db: db.checkpoint(timeout=0.1),
    "transaction": enter,
}


@pytest.mark.parametrize("wait", ENDLESS_WAITS.values(), ids=ENDLESS_WAITS)
def test_a_wait_inside_a_block_or_job_of_the_same_thread_is_refused(
    db: DbWriter, wait: Callable[[AsyncDbWriter], Coroutine[Any, Any, Any]]
) -> None:
    db.run("CREATE TABLE t (n)")
    shared = AsyncDbWriter.wrap(db)

    def refused(_: Transaction) -> None:
        with pytest.raises(ReentrantWriteError, match="would never end"):
            run(lambda: wait(shared))

    with db.transaction() as tx:
        refused(tx)
    db.run(refused)
    assert db.read_value(COUNT) == 0
    assert db.stats().queue_depth == 0


def test_what_does_not_wait_is_welcome_inside_a_block_or_job_of_the_same_thread(path: Path) -> None:
    with DbWriter(path, maxsize=1) as db:
        db.run("CREATE TABLE t (n)")
        shared = AsyncDbWriter.wrap(db)

        async def write_and_count() -> int:
            await shared.enqueue_wait(INSERT, (1,))
            shared.enqueue(INSERT, (2,))
            count: int = await shared.read_value(COUNT)
            return count

        with db.transaction():
            assert run(write_and_count) == 0
        db.flush()
        assert db.run(lambda tx: run(write_and_count)) == 2
        db.flush()
        assert db.read_value(COUNT) == 4
        run(shared.close)


def test_a_call_made_inside_a_job_may_be_awaited_elsewhere(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            made = await db.run(lambda tx: [db.run(INSERT, (1,))])
            await made[0]
            assert await db.read_value(COUNT) == 1

    run(main)


def test_tasks_that_open_at_once_open_one_gateway(path: Path) -> None:
    async def main() -> None:
        db = AsyncDbWriter(path)
        assert set(await asyncio.gather(db.open(), db.open(), db.open())) == {db}
        await db.close()

    run(main)


def test_tasks_that_open_at_once_see_why_that_fails(path: Path) -> None:
    async def main() -> None:
        db = AsyncDbWriter(path / "nowhere" / "app.db")
        errors = await asyncio.gather(db.open(), db.open(), return_exceptions=True)
        assert [type(error) for error in errors] == [sqlite3.OperationalError] * 2
        (path / "nowhere").mkdir(parents=True)
        async with db:
            assert not db.closed

    run(main)


def test_a_task_that_waits_for_the_opening_by_another_opens_itself_if_that_is_cancelled(path: Path) -> None:
    async def main() -> None:
        entered, go_on = threading.Event(), threading.Event()

        def hesitate(connection: sqlite3.Connection, readonly: bool) -> None:
            entered.set()
            go_on.wait(DEADLINE)

        db = AsyncDbWriter(path, on_connect=hesitate)
        first, second, third = (asyncio.create_task(db.open()) for _ in range(3))
        await until(entered.is_set)
        second.cancel()
        first.cancel()
        go_on.set()
        outcomes = await asyncio.gather(first, second, third, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError] * 2 + [AsyncDbWriter]
        assert await db.read_value("SELECT 1") == 1
        await db.close()

    run(main)


def running(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


@pytest.mark.parametrize("ends", ["while it opens", "before it knows that it is open"])
def test_an_opening_whose_loop_is_closed_keeps_no_other_from_opening(path: Path, ends: str) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def hesitate(connection: sqlite3.Connection, readonly: bool) -> None:
        entered.set()
        go_on.wait(DEADLINE)

    async def begin() -> None:
        tasks.append(asyncio.create_task(db.open()))
        await until(entered.is_set)

    async def again() -> None:
        waiting = asyncio.create_task(db.open())
        await asyncio.sleep(0)
        go_on.set()
        async with asyncio.timeout(DEADLINE):
            await waiting
            await db.run("CREATE TABLE t (n)")
            assert (await db.close()).committed == 1

    tasks: list[asyncio.Task[AsyncDbWriter]] = []
    db = AsyncDbWriter(path, on_connect=hesitate)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    if ends == "before it knows that it is open":
        go_on.set()
        eventually(lambda: not running("onewriter-call"))
    loop.close()
    asyncio.run(again())
    tasks.clear()
    gc.collect()
    eventually(lambda: not running("app.db"))


@pytest.mark.parametrize("closes", [False, True])
def test_a_loop_that_opens_waits_for_that_of_another_thread(path: Path, closes: bool) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def hesitate(connection: sqlite3.Connection, readonly: bool) -> None:
        entered.set()
        go_on.wait(DEADLINE)

    db = AsyncDbWriter(path, on_connect=hesitate)

    async def second() -> None:
        opening = asyncio.create_task(db.open())
        await until(lambda: bool(db._opening._line))
        if closes:
            await db.close()
        go_on.set()
        await opening
        await asyncio.wrap_future(opened_first)  # or else it may find the gateway closed already
        await db.close()

    with ThreadPoolExecutor(2) as pool:
        opened_first = pool.submit(run, db.open)
        assert entered.wait(DEADLINE)
        opened_second = pool.submit(run, second)
        errors = [opened.exception(DEADLINE) for opened in (opened_first, opened_second)]
    assert [type(error) for error in errors] == [WriterClosedError if closes else type(None)] * 2
    assert db.closed


def test_blocks_entered_with_an_exit_stack_are_named_by_who_enters_them(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db, contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(db.transaction())
            running = db.stats().running
            assert running is not None
            assert running.called_from.endswith("in main")
            await stack.enter_async_context(db.reader())
            (reader,) = pool_of(db).borrowers
            assert reader.startswith("reader() in test_aio.py:")
            assert reader.endswith("in main")

    run(main)


def test_a_gateway_that_is_closed_while_it_opens_does_not_open(path: Path) -> None:
    async def main() -> None:
        threads = set(threading.enumerate())
        db = AsyncDbWriter(path)
        opening = asyncio.create_task(db.open())
        await asyncio.sleep(0)
        await db.close()
        with pytest.raises(WriterClosedError, match="closed"):
            await opening
        assert db.closed
        assert {
            thread.name for thread in set(threading.enumerate()) - threads if thread.name.endswith("-writer")
        } == set()

    run(main)


def test_a_wait_for_room_that_is_cancelled_too_late_says_that_the_job_goes_on(path: Path) -> None:
    async def main() -> None:
        async with opened(path, maxsize=1) as db:
            async with writer_parked(db) as release:
                db.enqueue(INSERT, (1,))
                waiting = await beats(5, db.enqueue_wait(INSERT, (2,)))
                release.set()
                eventually(lambda: rows_in(path) == [1, 2])  # while this loop stands still
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError) as cancelled:
                    await waiting
            assert "goes on to its end" in notes_of(cancelled.value)

    run(main)


def test_asyncio_wait_says_what_it_takes(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            with pytest.raises(TypeError, match="ensure_future"):
                await asyncio.wait([db.enqueue(INSERT, (1,))])  # type: ignore[type-var]
            done, _ = await asyncio.wait([asyncio.ensure_future(db.enqueue(INSERT, (2,)))])
            assert [task.result().rowcount for task in done] == [1]

    run(main)


def test_it_is_not_copied(path: Path) -> None:
    """The end of the copy would close it."""

    async def main() -> None:
        async with opened(path) as db:
            with pytest.raises(TypeError, match="cannot be copied"):
                copy.copy(db)

    run(main)


@pytest.mark.parametrize("kind", [AsyncDbWriter, AsyncTransaction, AsyncReader])
def test_what_returns_a_coroutine_is_known_as_a_coroutine_function(kind: type) -> None:
    """Frameworks ask before they call: Starlette's background tasks would drop the coroutine of a plain function."""
    is_one = asyncio.iscoroutinefunction if sys.version_info < (3, 12) else inspect.iscoroutinefunction
    found = {
        name: is_one(member)
        for name, member in vars(kind).items()
        if not name.startswith("_") and inspect.isfunction(member) and name not in ("leave", "drop", "call", "end")
    }
    returns = {name: str(getattr(kind, name).__annotations__["return"]) for name in found}
    expected = {
        name: inspect.iscoroutinefunction(inspect.unwrap(vars(kind)[name])) or text.startswith("Coroutine[")
        for name, text in returns.items()
    }
    assert found == expected
    assert any(found.values())
    assert not all(found.values())


def test_a_bound_method_is_a_coroutine_function_too(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            assert asyncio.iscoroutinefunction(db.run)
            assert not asyncio.iscoroutinefunction(db.enqueue)

    run(main)


@pytest.mark.usefixtures("no_collections")
@pytest.mark.parametrize("kind", ["reader", "block"])
@pytest.mark.parametrize("is_kept_by_itself", [False, True])
def test_close_is_not_refused_for_a_generator_that_was_left_early(
    path: Path, kind: str, is_kept_by_itself: bool
) -> None:
    """asyncio closes it in a task, which needs a step of the loop; in a reference cycle, a collection before that."""

    async def numbers(db: AsyncDbWriter, kept: list[Any]) -> AsyncIterator[int]:
        async with db.reader() if kind == "reader" else db.transaction():
            for n in range(3):
                yield n

    async def main() -> None:
        async with opened(path) as db:
            kept: list[Any] = []
            found = numbers(db, kept)
            if is_kept_by_itself:
                kept.append(found)
            del kept
            async for _ in found:
                break
            del found
        assert db.closed

    run(main)


class OwnFuturesLoop(asyncio.SelectorEventLoop):
    """As every loop is under nest_asyncio, which puts asyncio's futures in Python in the place of those in C."""

    def create_future(self) -> Any:
        return _PyFuture(loop=self)


def test_a_loop_may_have_futures_of_its_own_making(path: Path) -> None:
    async def main() -> None:
        async with asyncio.timeout(DEADLINE), opened(path) as db:
            await db.run(INSERT, (1,))
            await db.enqueue(INSERT, (2,))
            async with db.transaction() as tx, tx.savepoint():
                await tx.execute(INSERT, (3,))
            async with db.reader() as reader:
                assert (await reader.execute("SELECT count(*) FROM t")).rows == [(3,)]
            async with db.watch("SELECT count(*) FROM t", every=0) as live:
                assert await live.next() == [(3,)]
                await db.run(INSERT, (4,))
                assert await live.next() == [(4,)]
            assert await db.read("SELECT n FROM t") == [(1,), (2,), (3,), (4,)]

    with asyncio.Runner(loop_factory=OwnFuturesLoop) as runner:
        runner.run(main())


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_an_opening_that_is_interrupted_as_it_is_done_leaves_no_gateway_open(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with AsyncDbWriter(path):
            pytest.fail("entered")

    before = set(threading.enumerate())
    monkeypatch.setattr(Turn, "release", raising(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    eventually(lambda: gc.collect() >= 0 and set(threading.enumerate()) <= before)


def test_an_opening_that_is_interrupted_as_it_begins_keeps_no_other_from_opening(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        db = AsyncDbWriter(path)
        with monkeypatch.context() as patched, pytest.raises(LookupError):
            patched.setattr(AsyncDbWriter, "_open", raising(LookupError))
            await asyncio.create_task(db.open())
        await db.open()
        await db.close()

    run(main)


def test_a_task_that_waits_for_the_opening_by_another_opens_nothing_once_it_is_closed(path: Path) -> None:
    async def main() -> None:
        opened_by: list[threading.Thread] = []
        go_on = threading.Event()

        def connect(connection: sqlite3.Connection, readonly: bool) -> None:
            opened_by.append(threading.current_thread())
            go_on.wait(DEADLINE)

        db = AsyncDbWriter(path, on_connect=connect)
        opening = [asyncio.create_task(db.open()) for _ in range(2)]
        await until(lambda: bool(opened_by))
        closing = asyncio.create_task(db.close())
        await asyncio.sleep(0)
        go_on.set()
        await closing
        for task in opening:
            with pytest.raises(WriterClosedError):
                await task
        assert len(set(opened_by)) == 1

    run(main)


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_that_is_over_is_waited_for_no_more(path: Path, fails: bool) -> None:
    async def main() -> None:
        async with opened(path) as db:
            with contextlib.suppress(sqlite3.OperationalError):
                await db.run("INSERT INTO missing VALUES (1)" if fails else "INSERT INTO t VALUES (1)")
            assert not waits_of(asyncio.get_running_loop())._waiting

    run(main)

"""AsyncDbWriter: awaited, cancelled, from several loops, and never in the loop's way."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import logging
import os
import sqlite3
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, assert_type

import pytest

from helpers import DEADLINE, holding_lock, parked
from onewriter import (
    AsyncDbWriter,
    AsyncTransaction,
    DbWriter,
    QueueFullError,
    ReadTimeoutError,
    ReentrantWriteError,
    Result,
    Ticket,
    Transaction,
    TransactionAbortedError,
    TransactionClosedError,
    WriterClosedError,
    WriteTimeoutError,
)
from onewriter.tasks import block as taskblock
from onewriter.tasks import calls
from onewriter.write.loan import WriteLoan

INSERT = "INSERT INTO t VALUES (?)"
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
LONG = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 300000) SELECT count(*) FROM n"
ENDLESS_WRITE = "INSERT INTO t WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"


def run(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run on a new loop; what does not end is a hang."""

    async def bounded() -> Any:
        async with asyncio.timeout(DEADLINE):
            return await main()

    return asyncio.run(bounded())


@contextlib.asynccontextmanager
async def opened(path: Path, **options: Any) -> AsyncIterator[AsyncDbWriter]:
    async with AsyncDbWriter(path, **options) as db:
        await db.run("CREATE TABLE t (n)")
        yield db


async def rows(db: AsyncDbWriter) -> list[Any]:
    return [n for (n,) in await db.read("SELECT n FROM t ORDER BY n")]


@contextlib.asynccontextmanager
async def writer_parked(db: AsyncDbWriter) -> AsyncIterator[threading.Event]:
    """Keep the writer busy for the block."""
    entered, release = threading.Event(), threading.Event()

    def park(tx: Transaction) -> None:
        entered.set()
        release.wait(DEADLINE)

    ticket = db.enqueue(park)
    await asyncio.to_thread(entered.wait, DEADLINE)
    try:
        yield release
    finally:
        release.set()
        await ticket


async def called_there(call: Callable[[], Awaitable[Any]]) -> Any:
    """For a task that is not inside the blocks of the one that makes it: a call belongs to where it is called."""
    return await call()


async def beats(count: int, waiting: Awaitable[Any]) -> asyncio.Future[Any]:
    """Start ``waiting``, and show that the loop goes on beside it."""
    task = asyncio.ensure_future(waiting)
    for _ in range(count):
        await asyncio.sleep(0.001)
    assert not task.done()
    return task


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
                (lambda: db.run(INSERT, "1"), TypeError),
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


# The loop goes on -----------------------------------------------------------------------------------------------------


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
        until = asyncio.get_running_loop().time() + DEADLINE
        while any("onewriter-call" in thread.name or "writer" in thread.name for thread in threading.enumerate()):
            assert asyncio.get_running_loop().time() < until
            await asyncio.sleep(0.001)

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


def test_a_slow_read_does_not_block_the_loop_and_its_timeout_ends_it(path: Path) -> None:
    async def main() -> None:
        async with opened(path, readers=1) as db:
            reading = await beats(20, db.read(ENDLESS, timeout=0.2, label="count"))
            with pytest.raises(ReadTimeoutError, match=r"'count' \(WITH RECURSIVE"):
                await reading
            for _ in range(100):
                assert await db.read_value("SELECT 1") == 1

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


# Time and cancellation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0.01, 1.0])
def test_a_write_that_does_not_start_in_time_never_runs(path: Path, timeout: float) -> None:
    async def main() -> None:
        async with opened(path) as db:
            async with writer_parked(db):
                with pytest.raises(WriteTimeoutError, match=r"is withdrawn.*park") as caught:
                    await db.run(INSERT, (1,), timeout=timeout)
                assert not caught.value.started
                with pytest.raises(WriteTimeoutError, match="did not get its turn") as caught:
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
            with pytest.raises(asyncio.CancelledError):
                await failing
            release.set()
            await db.flush()
            assert await rows(db) == [1]

    with caplog.at_level(logging.ERROR):
        run(main)
    assert "left alone" in caplog.text


def test_a_block_that_is_cancelled_is_rolled_back_and_its_statement_ends(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            undone: list[str] = []
            for statement in (ENDLESS, ENDLESS_WRITE):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.05), db.transaction() as tx:
                        tx.on_rollback(lambda: undone.append("undone"))
                        await tx.execute(INSERT, (1,))
                        await tx.execute(statement)
                await db.run(INSERT, (2,))
            assert await rows(db) == [2, 2]
            assert undone == ["undone", "undone"]
            with pytest.raises(TransactionClosedError):
                await tx.execute("SELECT 1")

    run(main)


def test_a_cancellation_during_commit_comes_after_it_and_says_what_became_of_it(path: Path) -> None:
    async def main() -> None:
        async with opened(path, journal_mode="DELETE") as db:
            with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:

                async def block() -> None:
                    async with db.transaction() as tx:
                        await tx.execute(INSERT, (1,))
                        other.execute("BEGIN")
                        other.execute("SELECT * FROM t").fetchall()  # COMMIT waits for this reader

                task = await beats(20, block())
                while db.stats().waiting_for_lock is None:  # COMMIT has met the reader
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.sleep(0.005)
                assert not task.done()
                other.execute("ROLLBACK")
                with pytest.raises(asyncio.CancelledError) as caught:
                    await task
                assert any("was committed" in note for note in getattr(caught.value, "__notes__", []))
            assert await rows(db) == [1]

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


# Blocks ---------------------------------------------------------------------------------------------------------------


def test_calls_written_in_a_block_belong_to_it_wherever_they_are_awaited(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:

            async def other() -> list[Any]:
                return await rows(db)

            with pytest.raises(LookupError):
                async with db.transaction() as tx:
                    assert isinstance(tx, AsyncTransaction)
                    await tx.execute(INSERT, (1,))
                    await asyncio.gather(db.run(INSERT, (2,)), db.run_many(INSERT, [(3,)]))
                    await asyncio.wait_for(db.run(INSERT, (4,)), DEADLINE)
                    await asyncio.create_task(db.run_script("INSERT INTO t VALUES (5)"))
                    assert await asyncio.wait_for(db.read_value("SELECT count(*) FROM t"), DEADLINE) == 5
                    assert await rows(db) == [1, 2, 3, 4, 5]
                    assert await asyncio.create_task(other()) == []  # a child's own calls do not
                    assert db.in_writer()
                    later = db.enqueue(INSERT, (6,))
                    raise LookupError
            await later
            assert not db.in_writer()
            assert await rows(db) == [6]

    run(main)


def test_blocks_nest_as_savepoints(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            called: list[str] = []
            async with db.transaction() as outer:
                outer.on_commit(lambda: called.append("outer"))
                await outer.execute(INSERT, (1,))
                with pytest.raises(LookupError):
                    async with db.transaction() as inner:
                        inner.on_commit(lambda: called.append("inner"))
                        inner.on_rollback(lambda: called.append("inner undone"))
                        await inner.execute(INSERT, (2,))
                        async with inner.savepoint():
                            await inner.executemany(INSERT, [(3,)])
                        raise LookupError
                async with outer.savepoint():
                    await outer.executescript("INSERT INTO t VALUES (4); INSERT INTO t VALUES (5);")
                with pytest.raises(sqlite3.OperationalError):
                    await db.run("INSERT INTO nowhere VALUES (1)")
                assert outer.label == "transaction"
                with pytest.raises(TypeError):
                    outer.on_commit(1)  # type: ignore[arg-type]
                assert called == []
            assert called == ["inner undone", "outer"]
            assert await rows(db) == [1, 4, 5]

    run(main)


def test_a_block_whose_transaction_is_lost_says_so_at_its_end(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            await db.run("CREATE UNIQUE INDEX i ON t (n)")
            await db.run(INSERT, (1,))
            with pytest.raises(TransactionAbortedError):
                async with db.transaction() as tx:
                    await tx.execute(INSERT, (2,))
                    with pytest.raises(sqlite3.IntegrityError):
                        await tx.execute("INSERT OR ROLLBACK INTO t VALUES (1)")
            assert await rows(db) == [1]

    run(main)


def test_tasks_that_share_a_transaction_are_served_one_after_the_other(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            async with db.transaction() as tx:
                await asyncio.gather(*[asyncio.create_task(tx.execute(INSERT, (n,))) for n in range(50)])
            assert await rows(db) == list(range(50))

    run(main)


def test_waits_that_a_block_makes_endless_raise_at_once(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            async with db.transaction() as tx:
                ticket = db.enqueue(INSERT, (1,))
                for call in (
                    lambda: db.flush(),
                    lambda: db.close(),
                    lambda: db.checkpoint(),
                    lambda: db.backup(path.parent / "copy.db"),
                    lambda: db.run_without_transaction("VACUUM"),
                    lambda: db.read("SELECT 1", after=ticket),
                    lambda: db.run(lambda tx: None, foreign_keys=False),
                    lambda: ticket,
                ):
                    with pytest.raises(ReentrantWriteError):
                        await call()
                inner = db._gateway()
                for blocking in (lambda: inner.run(INSERT, (2,)), inner.flush, inner.close, ticket.result):
                    with pytest.raises(ReentrantWriteError):
                        blocking()
                await tx.execute(INSERT, (3,))
            await ticket
            assert await rows(db) == [1, 3]

    run(main)


def test_in_a_block_nothing_waits_for_room(path: Path) -> None:
    async def main() -> None:
        async with opened(path, maxsize=1) as db:
            async with db.transaction():
                tickets = [db.enqueue(INSERT, (n,)) for n in range(3)]
                tickets += [await db.enqueue_wait(INSERT, (n,)) for n in range(3, 6)]
            await asyncio.gather(*tickets)
            assert await rows(db) == [0, 1, 2, 3, 4, 5]

    run(main)


def test_a_block_that_holds_too_long_is_taken_back(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            for statement in (None, ENDLESS, ENDLESS_WRITE):
                with pytest.raises(TransactionClosedError, match="max_hold"):
                    async with db.transaction(max_hold=0.05) as tx:
                        await tx.execute(INSERT, (1,))
                        if statement:
                            await tx.execute(statement)
                        else:
                            await db.enqueue_wait(INSERT, (2,))
                            until = asyncio.get_running_loop().time() + DEADLINE
                            while not tx._block.done() and asyncio.get_running_loop().time() < until:
                                await asyncio.sleep(0.005)
            assert await rows(db) == [2]

    run(main)


def test_a_block_whose_task_has_ended_is_used_and_left_by_another_or_collected(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            left: list[Any] = []

            async def leave_open(n: int) -> None:
                block = db.transaction()
                left.append((block, await block.__aenter__()))
                await left[-1][1].execute(INSERT, (n,))

            await asyncio.create_task(leave_open(1))
            waits = asyncio.create_task(db.run(INSERT, (3,)))
            block, tx = left.pop()
            await tx.execute(INSERT, (2,))
            assert not waits.done()
            await block.__aexit__(None, None, None)
            await waits
            assert await rows(db) == [1, 2, 3]

            await asyncio.create_task(leave_open(4))
            left.clear()  # nobody can leave it any more
            await db.run(INSERT, (5,))
            assert await rows(db) == [1, 2, 3, 5]

    run(main)


@pytest.mark.parametrize("statement", [False, True])
def test_a_callback_of_a_block_that_fails_at_once_is_called(path: Path, statement: bool) -> None:
    async def main() -> None:
        async with opened(path) as db:
            for _ in range(20):
                called: list[str] = []
                with pytest.raises(LookupError):
                    async with db.transaction() as tx:
                        if statement:
                            await tx.execute(INSERT, (1,))
                        tx.on_rollback(lambda called=called: called.append("rollback"))  # type: ignore[misc]
                        tx.on_commit(lambda called=called: called.append("commit"))  # type: ignore[misc]
                        raise LookupError
                assert called == ["rollback"]
            with pytest.raises(TransactionClosedError):
                tx.on_rollback(print)

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


# Loops ----------------------------------------------------------------------------------------------------------------


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


def test_a_ticket_can_be_awaited_on_any_loop_and_by_several_tasks(db: DbWriter) -> None:
    ticket = db.enqueue(lambda tx: 42)

    async def main() -> None:
        assert list(await asyncio.gather(ticket, ticket)) == [42, 42]

    run(main)
    run(main)


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
            await asyncio.sleep(0)  # the loop lets go of them
            await asyncio.sleep(0)
            gc.collect()
            assert len(gc.get_objects()) < before + 100
            assert await db.read_value("SELECT count(*) FROM t") == 10_100

    run(main)


# Forced: what happens in the same moment ------------------------------------------------------------------------------


def test_a_statement_that_was_cancelled_before_its_turn_does_not_run(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            entered, release = threading.Event(), threading.Event()

            def hold(tx: Transaction) -> None:
                entered.set()
                release.wait(DEADLINE)

            async with db.transaction() as tx:
                first = asyncio.create_task(db.run(hold))
                await asyncio.to_thread(entered.wait, DEADLINE)
                second = asyncio.create_task(tx.execute(INSERT, (1,)))
                await asyncio.sleep(0)
                second.cancel()
                await asyncio.wait([second])
                release.set()
                await first
            assert await rows(db) == []

    run(main)


def test_a_cancellation_in_the_moment_of_the_grant_leaves_nothing_behind(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taskblock, "LOOK", 3600.0)  # the writer does not notice by itself

    async def main() -> None:
        async with opened(path) as db:

            async def block() -> None:
                async with db.transaction():
                    pytest.fail("entered")

            async with writer_parked(db) as release:
                task = asyncio.create_task(block())
                await asyncio.sleep(0)
                release.set()
                while getattr(db._gateway()._state.job, "transaction", None) is None:  # granted: the loop does not know
                    pass
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await db.run(INSERT, (1,))
            assert await rows(db) == [1]

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
            assert db._pool is not None
            with monkeypatch.context() as patch:
                patch.setattr(db._pool, "submit", lambda *_: concurrent.futures.Future())
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


def test_a_cancellation_while_a_failed_block_is_rolled_back_is_not_lost(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            entered, release = threading.Event(), threading.Event()

            def hold(tx: Transaction) -> None:
                entered.set()
                release.wait(DEADLINE)

            async def block() -> None:
                async with db.transaction():
                    holding.append(asyncio.create_task(db.run(hold)))
                    await asyncio.to_thread(entered.wait, DEADLINE)
                    raise LookupError

            holding: list[asyncio.Task[None]] = []
            task = asyncio.create_task(block())
            await asyncio.to_thread(entered.wait, DEADLINE)
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.sleep(0.01)
            release.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait(holding)
            await db.run(INSERT, (1,))

    run(main)


def test_reads_are_held_back_for_a_moment_so_that_the_log_can_begin_anew(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            await rows(db)
            readers = db._gateway()._readers
            readers.holds_back = True
            reading = await beats(3, rows(db))
            readers.holds_back = False
            assert await reading == []

    run(main)


def test_what_is_sent_while_the_block_is_taken_back_is_answered(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    async def main() -> None:
        async with opened(path) as db:
            closed_error = WriteLoan.closed_error

            def send_one_more(loan: WriteLoan) -> Any:
                if not answered.is_set() and threading.get_ident() == db._gateway()._state.writer_thread:
                    tx._block.send(answered.set)
                return closed_error(loan)

            with pytest.raises(TransactionClosedError):
                async with db.transaction(max_hold=0.02) as tx:
                    monkeypatch.setattr(WriteLoan, "closed_error", send_one_more)
                    await asyncio.to_thread(answered.wait, DEADLINE)
            assert answered.is_set()

    run(main)


# What is left behind --------------------------------------------------------------------------------------------------


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
            assert shared._pool is not None
            gate = threading.Event()

            async def enter() -> None:
                async with shared.reader():
                    pytest.fail("entered")

            for read in (enter, lambda: shared.read("SELECT 1"), lambda: shared.read(lambda connection: None)):
                busy = shared._pool.submit(gate.wait, DEADLINE)
                reading = asyncio.create_task(read())
                while inner.stats().readers_in_use == 0:
                    await asyncio.sleep(0)
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
                gate.set()
                busy.result(DEADLINE)
                gate.clear()
                with inner.reader(), pytest.raises(ReadTimeoutError):  # so there is still just the one
                    await asyncio.create_task(called_there(lambda: shared.read("SELECT 1", timeout=0.01)))

    run(main)


def test_a_read_is_held_back_only_while_somebody_asks_for_it_and_not_for_long(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        with DbWriter(path) as inner:
            shared = AsyncDbWriter.wrap(inner)
            inner._readers.holds_back = True  # and nobody takes that back
            assert await shared.read_value("SELECT 1") == 1
            inner._readers.holds_back = False
            monkeypatch.setattr(asyncio, "sleep", None)
            assert await shared.read_value("SELECT 1") == 1
            monkeypatch.undo()

    run(main)


def test_a_block_whose_task_thinks_for_long_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskblock, "LOOK", 0.001)

    async def main() -> None:
        async with opened(path) as db:
            looks = asyncio.Semaphore(0)
            loop, holder = asyncio.get_running_loop(), db._gateway()._state
            monkeypatch.setattr(holder, "warn_if_slow", lambda now: loop.call_soon_threadsafe(looks.release))
            async with db.transaction() as tx:
                for _ in range(5):
                    await looks.acquire()
                await tx.execute(INSERT, (1,))
            assert await rows(db) == [1]

    run(main)


def test_each_loop_has_its_own_timeouts(path: Path) -> None:
    with DbWriter(path) as inner:
        shared = AsyncDbWriter.wrap(inner)

        async def leave() -> None:
            await shared.run("SELECT 1")  # the loop ends before the look at its timeouts

        async def wait() -> None:
            with parked(inner), pytest.raises(WriteTimeoutError):
                await shared.run("SELECT 1", timeout=1.0)

        run(leave)
        run(wait)


def test_what_a_block_refuses_is_named(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db, db.transaction():
            with pytest.raises(ReentrantWriteError, match=r"^foreign_keys="):
                await db.run(lambda tx: None, foreign_keys=False)
            with pytest.raises(ReentrantWriteError, match=r"^flush"):
                await db.flush()
            with pytest.raises(ReentrantWriteError, match=r"^checkpoint"):
                await db.checkpoint()

    run(main)


def test_opening_twice_is_no_harm(path: Path) -> None:
    async def main() -> None:
        db = AsyncDbWriter(path)
        assert await db.open() is db
        assert await db.open() is db
        await db.close()

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


def test_a_job_that_waited_in_line_wakes_a_writer_that_sleeps(path: Path) -> None:
    async def main() -> None:
        async with opened(path, auto_checkpoint=False) as db:  # or else it looks up in half a second
            while not db._gateway()._loop.queue._asleep:
                await asyncio.sleep(0.001)
            ticket = await db.enqueue_wait(INSERT, (1,))
            assert (await ticket).rowcount == 1

    run(main)


def test_a_nested_call_that_fails_is_undone_alone(path: Path) -> None:
    def write_and_fail(tx: Transaction) -> None:
        tx.execute(INSERT, (2,))
        raise LookupError

    async def main() -> None:
        async with opened(path) as db:
            async with db.transaction() as tx:
                await tx.execute(INSERT, (1,))
                with pytest.raises(LookupError):
                    await db.run(write_and_fail)
            assert await rows(db) == [1]

    run(main)


def test_a_short_timeout_does_not_wait_for_the_tick_of_the_long_ones(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "TICK", 10 * DEADLINE)

    async def main() -> None:
        with DbWriter(path) as inner, parked(inner):
            async with asyncio.timeout(DEADLINE):
                with pytest.raises(WriteTimeoutError):
                    await AsyncDbWriter.wrap(inner).run("SELECT 1", timeout=0.05)

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


def test_a_block_that_was_left_by_an_error_says_so_afterwards(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            with pytest.raises(LookupError):
                async with db.transaction() as tx:
                    raise LookupError
            with pytest.raises(TransactionClosedError, match="was left by an error"):
                await tx.execute("SELECT 1")
            async with db.transaction() as tx:
                pass
            with pytest.raises(TransactionClosedError, match="has ended"):
                await tx.execute("SELECT 1")

    run(main)

"""More of AsyncDbWriter: what comes in one moment with something else."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sqlite3
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helpers import DEADLINE
from onewriter import (
    AsyncDbWriter,
    AsyncTransaction,
    DbWriter,
    ReentrantWriteError,
    TransactionClosedError,
    WriterClosedError,
    WriteTimeoutError,
)
from onewriter.read.pool import Borrowing
from onewriter.tasks import block as taskblock
from onewriter.write.loan import WriteLoan

INSERT = "INSERT INTO t VALUES (?)"
Hesitant = tuple[list[taskblock.TaskBlock], threading.Event]


def run(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
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


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


# Blocks that are given up as they begin -------------------------------------------------------------------------------


@pytest.fixture
def hesitant(monkeypatch: pytest.MonkeyPatch) -> Hesitant:
    """The writer has started a block, and hesitates to grant it: the blocks it has come to, and its leave to go on."""
    blocks: list[taskblock.TaskBlock] = []
    go_on = threading.Event()
    perform = taskblock.TaskBlock.perform

    def hesitate(block: taskblock.TaskBlock, tx: WriteLoan) -> None:
        blocks.append(block)
        go_on.wait(DEADLINE)
        perform(block, tx)

    monkeypatch.setattr(taskblock.TaskBlock, "perform", hesitate)
    return blocks, go_on


def test_a_timeout_in_the_moment_a_block_starts_frees_the_writer(path: Path, hesitant: Hesitant) -> None:
    blocks, go_on = hesitant

    async def main() -> None:
        async with opened(path) as db:

            async def enter() -> None:
                async with db.transaction(timeout=0.05):
                    pytest.fail("entered")

            entering = asyncio.create_task(enter())
            await until(lambda: bool(blocks) and blocks[0].granted.done())  # its time has run out
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # and it has heard of that
            go_on.set()
            with pytest.raises(WriteTimeoutError) as caught:
                await entering
            assert caught.value.started is False
            await db.run(INSERT, (1,))
            assert await rows(db) == [1]

    run(main)


def test_a_cancellation_in_the_moment_a_block_starts_frees_the_writer(path: Path, hesitant: Hesitant) -> None:
    blocks, go_on = hesitant

    async def main() -> None:
        async with opened(path) as db:

            async def enter() -> None:
                async with db.transaction():
                    pytest.fail("entered")

            entering = asyncio.create_task(enter())
            await until(lambda: bool(blocks))
            entering.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # it waits for the end of the block now
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await entering
            await db.run(INSERT, (1,))
            assert await rows(db) == [1]

    run(main)


# Savepoints of tasks that share a block -------------------------------------------------------------------------------


def test_savepoints_of_tasks_come_one_after_the_other(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            entered, leave = asyncio.Event(), asyncio.Event()

            async def first(tx: AsyncTransaction) -> None:
                async with tx.savepoint():
                    await tx.execute(INSERT, (1,))
                    entered.set()
                    await leave.wait()

            async def second(tx: AsyncTransaction) -> None:
                await entered.wait()
                asyncio.get_running_loop().call_soon(leave.set)
                async with tx.savepoint():
                    await tx.execute(INSERT, (2,))
                    raise LookupError

            async with db.transaction() as tx:
                outcomes = await asyncio.gather(first(tx), second(tx), return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [type(None), LookupError]
            assert await rows(db) == [1]

    run(main)


def test_savepoints_of_tasks_made_in_a_savepoint_are_inside_it(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:

            async def part(tx: AsyncTransaction, n: int) -> None:
                async with tx.savepoint():
                    await tx.execute(INSERT, (n,))
                    async with tx.savepoint():
                        await tx.execute(INSERT, (10 * n,))
                    if n == 2:
                        raise LookupError

            async with db.transaction() as tx:
                with pytest.raises(ZeroDivisionError):
                    async with tx.savepoint():
                        await asyncio.gather(*[part(tx, n) for n in (1, 2, 3)], return_exceptions=True)
                        raise ZeroDivisionError
                assert (await tx.execute("SELECT count(*) FROM t")).fetchone() == (0,)
                await asyncio.gather(*[part(tx, n) for n in (1, 2, 3)], return_exceptions=True)
            assert await rows(db) == [1, 3, 10, 30]

    run(main)


def test_savepoints_of_two_gateways_and_of_tasks_that_outlive_theirs_do_not_meet(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db, opened(path.with_name("other.db")) as other:
            ended = asyncio.Event()

            async def later(tx: AsyncTransaction) -> None:
                await ended.wait()
                async with tx.savepoint():
                    await tx.execute(INSERT, (3,))

            async def elsewhere() -> None:
                await ended.wait()
                async with other.transaction() as tx, tx.savepoint():
                    await tx.execute(INSERT, (4,))

            async with db.transaction() as tx:
                async with tx.savepoint():
                    await tx.execute(INSERT, (1,))
                    async with other.transaction() as tx2, tx2.savepoint():
                        await tx2.execute(INSERT, (2,))
                    tasks = [asyncio.create_task(later(tx)), asyncio.create_task(elsewhere())]
                ended.set()
                await asyncio.gather(*tasks)
            assert await rows(db) == [1, 3]
            assert await rows(other) == [2, 4]

    run(main)


def test_a_savepoint_that_fails_undoes_those_inside_it_that_are_still_open(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            entered, leave = asyncio.Event(), asyncio.Event()

            async def inside(tx: AsyncTransaction) -> None:
                async with tx.savepoint():
                    await tx.execute(INSERT, (2,))
                    entered.set()
                    await leave.wait()

            async with db.transaction() as tx:
                with pytest.raises(LookupError):
                    async with tx.savepoint():
                        task = asyncio.create_task(inside(tx))
                        await entered.wait()
                        raise LookupError
                leave.set()
                with pytest.raises(TransactionClosedError, match="ended with the one around it"):
                    await task
                async with tx.savepoint():
                    await tx.execute(INSERT, (3,))
            assert await rows(db) == [3]

    run(main)


def test_a_task_that_waits_for_its_savepoint_is_told_when_the_block_ends(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            waiting: list[asyncio.Task[None]] = []

            async def late(tx: AsyncTransaction) -> None:
                async with tx.savepoint():
                    pytest.fail("entered")

            with pytest.raises(LookupError):
                async with db.transaction() as tx:
                    waiting += [asyncio.create_task(late(tx)) for _ in range(2)]
                    async with tx.savepoint():
                        await until(lambda: len(tx._block._changes) == 2)
                        raise LookupError
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [TransactionClosedError] * 2
            await db.run(INSERT, (1,))
            assert await rows(db) == [1]

    run(main)


def test_a_savepoint_whose_task_is_cancelled_at_its_end_is_undone_or_kept_as_a_whole(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            called: list[str] = []
            gate = threading.Event()

            async def part(tx: AsyncTransaction) -> None:
                async with tx.savepoint():
                    await tx.execute(INSERT, (2,))
                    tx.on_commit(lambda: called.append("part"))
                    tx._block.send(gate.wait, DEADLINE)  # so that the end has to wait

            async with db.transaction() as tx:
                tx.on_commit(lambda: called.append("outer"))
                await tx.execute(INSERT, (1,))
                working = asyncio.create_task(part(tx))
                await until(lambda: tx._block._requests.qsize() > 0)
                working.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await working
                gate.set()
                await tx.execute(INSERT, (3,))
            assert await rows(db) == [1, 3]
            assert called == ["outer"]

    run(main)


def test_a_callback_for_a_block_that_ends_is_refused_and_does_no_harm(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            async with db.transaction() as tx:
                await tx.execute(INSERT, (1,))
                ending = tx._block
            with pytest.raises(TransactionClosedError):
                tx.on_commit(print)
            assert ending.failed_with is None

            gate = threading.Event()
            async with db.transaction() as tx:
                tx._block.send(gate.wait, DEADLINE)
                tx._block.end(failed=False)
                with pytest.raises(TransactionClosedError):
                    tx.on_commit(print)
                gate.set()
            assert await rows(db) == [1]

    run(main)


def test_a_nested_block_that_is_over_is_dead_though_the_outer_one_lives(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db, db.transaction() as outer:
            async with db.transaction() as inner:
                await inner.execute(INSERT, (1,))
            with pytest.raises(TransactionClosedError, match="has ended"):
                await inner.execute(INSERT, (2,))
            await outer.execute(INSERT, (3,))

    run(main)


# Reads that meet an end -----------------------------------------------------------------------------------------------


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
            assert shared._pool is not None
            shared._pool.shutdown()

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
        pool, first, second = db._readers, Borrowing("first"), Borrowing("second")
        assert pool.take_or_line_up(first)
        pool.reader_of(first, 100.0)
        pool.expire(first)
        assert first.reader is not None
        assert first.reader.deadline == 0.0
        pool.end(first)
        assert pool.take_or_line_up(second)
        reader = pool.reader_of(second, 100.0)
        pool.expire(first)
        assert (reader is first.reader, reader.deadline) == (True, 100.0)
        pool.end(second)


def test_a_read_that_is_cancelled_before_its_connection_is_opened_gives_its_place_back(path: Path) -> None:
    async def main() -> None:
        with DbWriter(path, readers=1) as inner:
            shared = AsyncDbWriter.wrap(inner)
            shared._pool = ThreadPoolExecutor(1)
            gate = threading.Event()
            busy = shared._pool.submit(gate.wait, DEADLINE)
            reading = asyncio.create_task(shared.read("SELECT 1"))
            await until(lambda: inner.stats().readers_in_use == 1)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            gate.set()
            busy.result(DEADLINE)
            assert inner.stats().readers_in_use == 0
            assert await shared.read_value("SELECT 1", timeout=DEADLINE) == 1
            await shared.close()

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


def test_an_error_in_a_block_that_was_dealt_with_is_gone_at_once(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db, db.transaction() as tx:
            try:
                await tx.execute("SELECT * FROM nowhere")
            except sqlite3.OperationalError as error:
                gone = weakref.ref(error)
            await tx.execute("SELECT 1")  # the writer has let it go
            assert gone() is None

    gc.collect()
    gc.disable()
    try:
        run(main)
    finally:
        gc.enable()

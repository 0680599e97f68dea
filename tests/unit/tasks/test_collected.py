"""A loop that is stopped and dropped, without ``close``: nothing of the gateway keeps it, nor what its tasks have."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import sqlite3
import threading
import warnings
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from aio_helpers import beats, run, until
from helpers import DEADLINE, eventually, parked, pool_of, queue_of, rows_in
from onewriter import AsyncDbWriter, DbWriter
from onewriter.tasks.block import TaskBlock

INSERT = "INSERT INTO t VALUES (?)"
# It warns, and fails to close what was collected before it.
LOOP_IS_DROPPED = pytest.mark.filterwarnings(
    "ignore:unclosed event loop:ResourceWarning",
    "ignore:Exception ignored in. <function BaseEventLoop.__del__:pytest.PytestUnraisableExceptionWarning",
)
Work: TypeAlias = Callable[[DbWriter, AsyncDbWriter, asyncio.Event], Coroutine[Any, Any, None]]


@pytest.fixture
def db(path: Path) -> Iterator[DbWriter]:
    with DbWriter(path, readers=1) as gateway:
        gateway.run("CREATE TABLE t (n)")
        yield gateway


async def block(db: DbWriter, aio: AsyncDbWriter, is_there: asyncio.Event) -> None:
    async with aio.transaction() as tx:
        await tx.execute(INSERT, (1,))
        is_there.set()
        await asyncio.sleep(DEADLINE)


async def savepoint(db: DbWriter, aio: AsyncDbWriter, is_there: asyncio.Event) -> None:
    async with aio.transaction() as tx, tx.savepoint():
        await tx.execute(INSERT, (1,))
        is_there.set()
        await asyncio.sleep(DEADLINE)


async def block_of_a_thread(db: DbWriter, aio: AsyncDbWriter, is_there: asyncio.Event) -> None:
    with db.transaction() as tx:
        tx.execute(INSERT, (1,))
        is_there.set()
        await asyncio.get_running_loop().create_future()


async def reader(db: DbWriter, aio: AsyncDbWriter, is_there: asyncio.Event) -> None:
    async with aio.reader() as connection:
        await connection.execute("SELECT n FROM t")
        is_there.set()
        await asyncio.sleep(DEADLINE)


async def reader_of_two(db: DbWriter, aio: AsyncDbWriter, is_there: asyncio.Event) -> None:
    async def read() -> None:
        while True:
            await connection.execute("SELECT n FROM t")
            is_there.set()

    async with aio.reader() as connection:
        await asyncio.gather(read(), read())  # one waits for the other


async def stream(db: DbWriter, aio: AsyncDbWriter, is_there: asyncio.Event) -> None:
    async def one() -> AsyncIterator[Any]:
        async with aio.reader() as connection:
            async for row in connection.stream("VALUES (1), (2)"):
                yield row

    async for _ in one():
        is_there.set()
        await asyncio.sleep(DEADLINE)


async def reader_of_a_thread(db: DbWriter, aio: AsyncDbWriter, is_there: asyncio.Event) -> None:
    with db.reader() as connection:
        connection.execute("SELECT n FROM t")
        is_there.set()
        await asyncio.sleep(DEADLINE)


def dropped(db: DbWriter, work: Work, is_there: Callable[[asyncio.Event], bool]) -> weakref.ref[Any]:
    """A loop that nobody has any more, which ran ``work`` up to there."""
    known: list[weakref.ref[Any]] = []

    def in_thread() -> None:
        loop = asyncio.new_event_loop()
        known.append(weakref.ref(loop))
        event = asyncio.Event()
        task = loop.create_task(work(db, AsyncDbWriter.wrap(db), event))
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        loop.run_until_complete(until(lambda: is_there(event)))

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # of the loop, which asyncio wants closed
        gc.collect()
    return known[0]


@pytest.mark.parametrize(
    "work", [block, savepoint, block_of_a_thread, reader, reader_of_two, stream, reader_of_a_thread]
)
@LOOP_IS_DROPPED
def test_it_is_collected_with_its_tasks_and_what_they_have_is_given_back(db: DbWriter, work: Work) -> None:
    known = dropped(db, work, asyncio.Event.is_set)
    eventually(lambda: gc.collect() >= 0 and known() is None)
    db.run(INSERT, (2,), timeout=DEADLINE)
    assert db.read("SELECT n FROM t", timeout=DEADLINE) == [(2,)]
    assert pool_of(db).in_use == 0


async def waits_for_a_run(db: AsyncDbWriter) -> None:
    await db.run("SELECT 1")


async def waits_for_a_ticket(db: AsyncDbWriter) -> None:
    await db.enqueue("SELECT 1")


async def waits_for_room(db: AsyncDbWriter) -> None:
    for _ in range(3):
        await db.enqueue_wait("SELECT 1", timeout=None)


async def waits_for_flush(db: AsyncDbWriter) -> None:
    await db.flush()


async def waits_for_a_block(db: AsyncDbWriter) -> None:
    async with db.transaction():
        pass


async def waits_for_a_write_to_read(db: AsyncDbWriter) -> None:
    await db.read("SELECT 1", after=db.enqueue("SELECT 1"))


async def waits_for_a_migration(db: AsyncDbWriter) -> None:
    await db.migrate(["SELECT 1"])


async def waits_for_a_connection(db: AsyncDbWriter) -> None:
    async with db.reader():
        await db.read("SELECT 1")


async def waits_for_news(db: AsyncDbWriter) -> None:
    async with db.watch("SELECT n FROM t") as live:
        await live.next()
        await live.next()


WAITS = [
    waits_for_a_run,
    waits_for_a_ticket,
    waits_for_room,
    waits_for_flush,
    waits_for_a_block,
    waits_for_a_write_to_read,
    waits_for_a_migration,
    waits_for_a_connection,
    waits_for_news,
]


@pytest.mark.parametrize("waits", WAITS)
def test_a_task_that_nobody_else_refers_to_is_kept_by_its_loop_as_it_waits(
    path: Path, waits: Callable[[AsyncDbWriter], Coroutine[Any, Any, None]]
) -> None:
    async def main() -> None:
        done = asyncio.Event()

        async def lonely(gateway: AsyncDbWriter) -> None:
            await waits(gateway)
            done.set()

        async with AsyncDbWriter(path, readers=1, maxsize=1) as gateway:
            await gateway.run("CREATE TABLE t (n)")
            reader = gateway.reader() if waits is waits_for_a_connection else contextlib.nullcontext()
            async with reader, gateway.transaction() as tx:
                await tx.execute(INSERT, (1,))
                loop = asyncio.get_running_loop()
                loop.call_soon(lambda: loop.create_task(lonely(gateway)), context=contextvars.Context())
                for _ in range(5):
                    await asyncio.sleep(0.01)
                    gc.collect()
                assert not done.is_set()
            await done.wait()

    run(main)


@pytest.mark.parametrize("waits", WAITS)
@LOOP_IS_DROPPED
def test_one_in_which_one_task_has_a_block_and_another_waits_for_the_gateway_is_collected(
    path: Path, waits: Callable[[AsyncDbWriter], Coroutine[Any, Any, None]]
) -> None:
    """Who waits is known by what it waits for, and knows the other by a TaskGroup."""

    async def has_a_block(aio: AsyncDbWriter, has_begun: asyncio.Event) -> None:
        async with aio.transaction() as tx:
            await tx.execute(INSERT, (1,))
            has_begun.set()
            await asyncio.sleep(DEADLINE)

    async def both(db: DbWriter, aio: AsyncDbWriter, is_there: asyncio.Event) -> None:
        has_begun = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(has_a_block(aio, has_begun))]
            await has_begun.wait()
            tasks.append(group.create_task(waits(aio)))
            for task in tasks:
                task._log_destroy_pending = False  # type: ignore[attr-defined]
            await beats(5, tasks[-1])
            is_there.set()

    with DbWriter(path, readers=1, maxsize=1) as db, db.reader():
        db.run("CREATE TABLE t (n)")
        known = dropped(db, both, asyncio.Event.is_set)
        eventually(lambda: gc.collect() >= 0 and known() is None)
        db.run(INSERT, (2,), timeout=DEADLINE)
    assert rows_in(path) == [2]


@LOOP_IS_DROPPED
def test_one_whose_block_had_to_wait_is_collected_before_it_is_its_turn(db: DbWriter) -> None:
    with parked(db):
        known = dropped(db, block, lambda _: queue_of(db).depth > 0)
        assert known() is None
    db.run(INSERT, (2,), timeout=DEADLINE)
    assert db.read("SELECT n FROM t", timeout=DEADLINE) == [(2,)]


@LOOP_IS_DROPPED
def test_one_in_which_a_task_waits_for_the_savepoint_of_another_is_collected(db: DbWriter) -> None:
    blocks: list[TaskBlock] = []

    async def waits(db: DbWriter, aio: AsyncDbWriter, is_there: asyncio.Event) -> None:
        async def other() -> None:
            async with tx.savepoint():
                is_there.set()
                await asyncio.sleep(DEADLINE)

        async with aio.transaction() as tx:
            task = asyncio.create_task(other())
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            await is_there.wait()
            blocks.append(tx._block)
            async with tx.savepoint():
                pytest.fail("entered")

    known = dropped(db, waits, lambda _: bool(blocks) and bool(blocks[0]._changes))
    blocks.clear()
    eventually(lambda: gc.collect() >= 0 and known() is None)
    db.run(INSERT, (2,), timeout=DEADLINE)


@LOOP_IS_DROPPED
def test_one_in_which_a_gateway_was_being_opened_keeps_no_other_from_opening_it(db: DbWriter, path: Path) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def hesitate(connection: sqlite3.Connection, readonly: bool) -> None:
        entered.set()
        go_on.wait(DEADLINE)

    opening = AsyncDbWriter(path.with_name("other.db"), on_connect=hesitate)

    async def opens(db: DbWriter, aio: AsyncDbWriter, is_there: asyncio.Event) -> None:
        await opening.open()

    async def again() -> None:
        waiting = asyncio.create_task(opening.open())
        go_on.set()
        await until(lambda: gc.collect() >= 0 and known() is None)
        await waiting
        await opening.close()

    known = dropped(db, opens, lambda _: entered.is_set())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        run(again)

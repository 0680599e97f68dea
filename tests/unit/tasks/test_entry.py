"""How tasks enter and leave blocks, savepoints and readers: once, and also where nobody can leave them any more."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import sqlite3
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aio_helpers import opened, rows, run, until, writer_parked
from helpers import DEADLINE, eventually, in_threads, parked, pool_of, raising, state_of
from onewriter import (
    AsyncDbWriter,
    AsyncTransaction,
    DbWriter,
    TransactionClosedError,
    WriterClosedError,
    WriteTimeoutError,
)
from onewriter.read.claim import Claim
from onewriter.read.reader import Snapshot
from onewriter.tasks import collected, entry
from onewriter.tasks import savepoint as tasks_savepoint
from onewriter.tasks.block import TaskBlock
from onewriter.tasks.reader import TaskReads
from onewriter.write.loan import WriteLoan

INSERT = "INSERT INTO t VALUES (?)"
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


async def in_a_block(db: AsyncDbWriter) -> AsyncIterator[None]:
    async with db.transaction():
        yield


async def in_a_reader(db: AsyncDbWriter) -> AsyncIterator[None]:
    async with db.reader():
        yield


async def in_a_savepoint(db: AsyncDbWriter) -> AsyncIterator[None]:
    async with db.transaction() as tx, tx.savepoint():
        await tx.execute(INSERT, (1,))
        yield


async def in_a_block_in_a_block(db: AsyncDbWriter) -> AsyncIterator[None]:
    async with db.transaction(), db.transaction() as tx:
        await tx.execute(INSERT, (1,))
        yield


@pytest.mark.parametrize("inside", [in_a_block, in_a_reader, in_a_savepoint, in_a_block_in_a_block])
def test_an_asynchronous_generator_that_is_open_as_its_loop_ends_leaves_without_a_word(
    path: Path, caplog: pytest.LogCaptureFixture, inside: Callable[[AsyncDbWriter], AsyncIterator[None]]
) -> None:
    """asyncio.run closes it, and each other one, at the same time."""

    async def main() -> None:
        kept.append(inside(AsyncDbWriter.wrap(db)))
        await anext(kept[0])

    kept: list[AsyncIterator[None]] = []
    gc.collect()  # asyncio logs tasks that other tests have left
    caplog.clear()
    with DbWriter(path, readers=1) as db:
        db.run("CREATE TABLE t (n)")
        asyncio.run(main())
        assert caplog.messages == []
        assert db.read("SELECT * FROM t", timeout=DEADLINE) == []
        db.run(INSERT, (2,), timeout=DEADLINE)
        with pytest.raises(StopAsyncIteration):
            asyncio.run(anext(kept[0]))  # type: ignore[arg-type]


def test_each_is_entered_once_and_left_once(path: Path) -> None:
    made: list[object] = []

    def make_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        made.append(coroutine)
        return asyncio.Task(coroutine, loop=loop, **options)

    async def once(entry: contextlib.AbstractAsyncContextManager[Any]) -> None:
        with pytest.raises(RuntimeError, match="was not entered"):
            await entry.__aexit__(None, None, None)
        async with entry:
            with pytest.raises(RuntimeError, match="entered once"):
                await entry.__aenter__()
        with pytest.raises(RuntimeError, match="entered once"):
            await entry.__aenter__()
        with pytest.raises(RuntimeError, match="was not entered"):
            await entry.__aexit__(None, None, None)

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(make_task)
        async with opened(path) as db:
            await once(db.transaction())
            await once(db.reader())
            async with db.transaction() as tx:
                await once(tx.savepoint())
                await tx.execute(INSERT, (1,))
            gc.collect()
            assert await rows(db) == [1]
            assert state_of(db).blocks == set()
            assert made == []  # by what is collected, and was left

    run(main)


def test_a_savepoint_that_nobody_can_leave_is_undone_and_the_next_begins(path: Path) -> None:
    async def leave_open(enter: Callable[[], Any], tx: AsyncTransaction) -> AsyncTransaction:
        entry = enter()
        inner: AsyncTransaction = await entry.__aenter__() or tx
        await inner.execute(INSERT, (1,))
        return inner

    async def main() -> None:
        async with opened(path) as db:
            async with db.transaction() as tx:
                await asyncio.create_task(leave_open(tx.savepoint, tx))
                async with tx.savepoint():
                    await tx.execute(INSERT, (2,))
                inner = await leave_open(db.transaction, tx)
                with pytest.raises(TransactionClosedError):
                    while True:  # as soon as the loop has a moment
                        await inner.execute("SELECT 1")
                await tx.execute(INSERT, (3,))
            assert await rows(db) == [2, 3]

    run(main)


def test_a_reader_that_nobody_can_leave_is_given_back_though_it_is_still_referred_to(path: Path) -> None:
    async def main() -> None:
        async with opened(path, readers=1) as db:
            entry = db.reader()
            reader = await entry.__aenter__()
            assert db.stats().readers_in_use == 1
            del entry
            gc.collect()
            await until(lambda: db.stats().readers_in_use == 0)
            with pytest.raises(Exception, match="has ended"):
                await reader.execute("SELECT 1")

    run(main)


def test_a_block_that_could_not_be_entered_is_not_waited_for(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            entry = db.transaction(timeout=0.01)
            async with writer_parked(db):
                with pytest.raises(WriteTimeoutError):
                    await entry.__aenter__()
            assert state_of(db).blocks == set()

    run(main)


def test_a_savepoint_whose_task_is_cancelled_as_it_enters_keeps_no_other_from_beginning(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db, db.transaction() as tx:
            gate = threading.Event()
            tx._block.send(gate.wait, DEADLINE)
            entry = tx.savepoint()
            entering = asyncio.ensure_future(entry.__aenter__())
            await until(lambda: tx._block.innermost is not None)
            entering.cancel()
            with pytest.raises(asyncio.CancelledError):
                await entering
            gate.set()
            async with tx.savepoint():
                await tx.execute(INSERT, (1,))

    run(main)


def test_a_savepoint_whose_task_is_cancelled_while_it_waits_for_one_inside_is_undone(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            async with db.transaction() as tx:
                entered, leave = asyncio.Event(), asyncio.Event()

                async def inner() -> None:
                    async with tx.savepoint():
                        await tx.execute(INSERT, (2,))
                        entered.set()
                        await leave.wait()

                async def outer() -> None:
                    async with tx.savepoint():
                        await tx.execute(INSERT, (1,))
                        inside.append(asyncio.create_task(inner()))
                        await entered.wait()

                inside: list[asyncio.Task[None]] = []
                around = asyncio.create_task(outer())
                await entered.wait()
                await until(lambda: bool(tx._block._changes))  # it is at its end
                around.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await around
                leave.set()
                with pytest.raises(TransactionClosedError, match="the one around it"):
                    await inside[0]
                async with tx.savepoint():
                    await tx.execute(INSERT, (3,))
            assert await rows(db) == [3]

    run(main)


@pytest.fixture
def two_readers(path: Path) -> Iterator[DbWriter]:
    with DbWriter(path, readers=2) as db:
        db.run("CREATE TABLE t (n)")
        yield db
        eventually(lambda: gc.collect() >= 0 and db.stats().readers_in_use == 0)
        assert pool_of(db)._count <= 2
        assert [len(db.read("SELECT * FROM t", timeout=DEADLINE)) for _ in range(3)] == [0, 0, 0]


async def read_for_ever(db: DbWriter, inside: list[None] | None = None) -> None:
    async with AsyncDbWriter.wrap(db).reader() as reader:
        await reader.execute("SELECT 1")
        if inside is not None:
            inside.append(None)
        await asyncio.get_running_loop().create_future()  # which nobody else refers to


def turn(loop: asyncio.AbstractEventLoop) -> None:
    loop.call_soon(loop.stop)
    loop.run_forever()


async def start_and_forget(db: DbWriter) -> None:
    inside: list[None] = []
    asyncio.create_task(read_for_ever(db, inside))  # noqa: RUF006
    await until(lambda: bool(inside))
    await asyncio.sleep(0)
    gc.collect()


def test_a_task_that_is_collected_inside_its_reader_gives_it_back_once(two_readers: DbWriter) -> None:
    for _ in range(20):
        asyncio.run(start_and_forget(two_readers))


@pytest.mark.parametrize("stage", ["at once", "with a connection", "inside"])
def test_a_task_that_is_collected_with_its_loop_gives_its_reader_back_once(two_readers: DbWriter, stage: str) -> None:
    """What runs in a loop that is closed is not awaited any more."""
    for _ in range(10):
        inside: list[None] = []
        loop = asyncio.new_event_loop()
        task = loop.create_task(read_for_ever(two_readers, inside))
        turn(loop)
        while (stage == "inside" and not inside) or (stage != "at once" and not two_readers.stats().readers_in_use):
            turn(loop)
        loop.close()
        del task, loop
        gc.collect()


def waiting_task(db: DbWriter, loop: asyncio.AbstractEventLoop) -> asyncio.Task[None]:
    """One that waits for a connection, all of which are in use."""
    task = loop.create_task(read_for_ever(db), context=contextvars.Context())  # not inside the caller's reader()
    while not pool_of(db).waiting:
        turn(loop)
    return task


def test_a_task_whose_loop_is_closed_while_it_waits_gets_no_connection(path: Path) -> None:
    loop = asyncio.new_event_loop()
    with DbWriter(path, readers=1) as db:
        with db.reader():
            task = waiting_task(db, loop)
            loop.close()
        assert (db.stats().readers_in_use, db.stats().readers_waiting) == (0, 0)
    del task


def test_a_task_whose_loop_is_closed_as_it_gets_its_connection_gives_that_back(path: Path) -> None:
    loop = asyncio.new_event_loop()
    with DbWriter(path, readers=1) as db:
        with db.reader():
            task = waiting_task(db, loop)
        assert db.stats().readers_in_use == 1  # the task is to be told
        loop.close()
        del task
        eventually(lambda: gc.collect() >= 0 and db.stats().readers_in_use == 0)


def test_a_statement_of_a_reader_whose_loop_is_closed_keeps_nobody_waiting(path: Path) -> None:
    async def read() -> None:
        async with AsyncDbWriter.wrap(db).reader() as reader:
            inside.append(None)
            await reader.execute(ENDLESS)

    inside: list[None] = []
    with DbWriter(path, readers=1) as db:
        loop = asyncio.new_event_loop()
        task = loop.create_task(read())
        while not (inside and any(claim.runs_in for claim in pool_of(db)._lent())):
            turn(loop)
        loop.close()
        assert db.read_value("SELECT 1", timeout=DEADLINE) == 1
        del task


def test_a_reader_whose_coroutine_was_closed_has_ended_for_other_tasks_too(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, finish = threading.Event(), TaskReads._finish

    def finish_slowly(reads: TaskReads, claim: Claim, snapshot: Snapshot | None) -> None:
        slow.wait(DEADLINE)
        finish(reads, claim, snapshot)

    monkeypatch.setattr(TaskReads, "_finish", finish_slowly)

    async def main() -> None:
        async with opened(path) as db:
            entry = db.reader()
            reader = await entry.__aenter__()
            leaving = entry.__aexit__(GeneratorExit, None, None)
            leaving.send(None)  # and it never goes on
            with pytest.raises(sqlite3.ProgrammingError, match="has ended"):
                await reader.execute("SELECT 1")
            slow.set()
            leaving.close()

    run(main)


def test_a_block_is_closed_while_its_thread_is_in_one_of_its_calls(path: Path) -> None:
    """As where its task is collected there."""

    async def main() -> None:
        async with opened(path) as db:
            entry = db.transaction()
            tx = await entry.__aenter__()
            leaving = entry.__aexit__(GeneratorExit, None, None)
            with tx._block._lock:
                leaving.send(None)
            await db.run(INSERT, (1,), timeout=DEADLINE)
            leaving.close()

    run(main)


def test_a_block_whose_coroutine_is_closed_as_it_waits_never_begins(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            async with writer_parked(db):
                entering = db.transaction().__aenter__()
                entering.send(None)
                entering.close()
            await db.run(INSERT, (1,), timeout=DEADLINE)

    run(main)


def test_a_task_that_is_collected_inside_a_shared_reader_leaves_it_to_the_others(path: Path) -> None:
    async def main() -> None:
        async with opened(path, readers=1) as db, db.reader() as reader:

            async def share() -> None:
                async with db.reader() as mine:
                    assert mine is reader
                    await asyncio.get_running_loop().create_future()

            inner = share()
            inner.send(None)
            held = [inner]
            held.append(held)  # type: ignore[arg-type]
            del inner, held
            gc.collect()
            assert (await reader.execute("SELECT 1")).rows == [(1,)]
            assert db.stats().readers_in_use == 1

    run(main)


def test_a_block_whose_finalizer_was_interrupted_is_taken_back_by_the_writer(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collected, "_leave_in", lambda *_: None)  # as if a signal handler had raised as it began

    async def main() -> None:
        async with opened(path) as db:
            left = [db.transaction()]
            tx = await left[0].__aenter__()
            await tx.execute(INSERT, (1,))
            left.clear()
            await db.run(INSERT, (2,), timeout=DEADLINE)
            assert await rows(db) == [2]

    run(main)


def test_blocks_that_wait_when_their_loop_is_closed_are_not_lent_and_keep_nothing(path: Path) -> None:
    async def write() -> None:
        async with AsyncDbWriter.wrap(db).transaction():
            raise AssertionError("entered")

    def wait_in_line() -> list[asyncio.Task[None]]:
        loop = asyncio.new_event_loop()
        tasks = [loop.create_task(write()) for _ in range(3)]
        while db.stats().queue_depth < len(tasks):
            turn(loop)
        loop.close()
        return tasks

    def lend(block: TaskBlock, tx: WriteLoan) -> None:
        try:
            original(block, tx)
        except TransactionClosedError:
            refused.append(block)
            raise

    original, refused = TaskBlock.lend, list[TaskBlock]()
    with DbWriter(path) as db, pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskBlock, "lend", lend)
        with parked(db):
            tasks = wait_in_line()
            known = [weakref.ref(task) for task in tasks]
        db.flush()
        assert len(refused) == 3
        refused.clear()
        tasks.clear()
        gc.collect()
        assert [task() for task in known] == [None] * 3
        assert not state_of(db).blocks


@pytest.mark.parametrize("stage", ["admitted", "begun", "read"])
def test_a_task_that_is_kept_gives_its_connection_back_when_its_loop_is_closed(path: Path, stage: str) -> None:
    async def read() -> None:
        await AsyncDbWriter.wrap(db).read(lambda connection: gate.wait(DEADLINE))

    loop, gate = asyncio.new_event_loop(), threading.Event()
    db = DbWriter(path, readers=1)
    if stage == "admitted":
        with db.reader():
            task = waiting_task(db, loop)
    else:
        task = loop.create_task(read() if stage == "read" else read_for_ever(db))
        while not db.stats().readers_in_use:  # and a thread begins to use it
            turn(loop)
    loop.close()
    gate.set()
    assert in_threads(lambda: db.read_value("SELECT 2", timeout=DEADLINE)) == [2]
    db.close()
    assert not pool_of(db)._readers
    assert not task.done()


def test_an_interrupt_as_the_callbacks_of_a_block_begin_keeps_none_from_being_called(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call_back, told = TaskBlock.call_back, list[str]()

    def interrupted(block: TaskBlock, job: object = None) -> None:
        monkeypatch.setattr(TaskBlock, "call_back", call_back)
        raise InterruptedError

    async def main() -> None:
        async with opened(path) as db:
            with pytest.raises(InterruptedError):
                async with db.transaction() as tx:
                    await tx.execute(INSERT, (1,))
                    tx.on_commit(lambda: told.append("committed"))
                    monkeypatch.setattr(TaskBlock, "call_back", interrupted)

    run(main)
    assert told == ["committed"]


@pytest.mark.parametrize("where", ["as it is queued", "as it is granted", "as it can be left"])
def test_a_block_whose_entry_is_interrupted_does_not_keep_the_writer(
    path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    async def main() -> None:
        gateway = AsyncDbWriter.wrap(db)
        if where == "as it is queued":
            monkeypatch.setattr(entry, "within", raising(KeyboardInterrupt))
        elif where == "as it is granted":
            monkeypatch.setattr(TaskBlock, "entered", raising(KeyboardInterrupt))
        else:
            monkeypatch.setattr(entry, "leave_if_collected", raising(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt) as caught:
            await gateway.transaction().__aenter__()
        monkeypatch.undo()
        await gateway.run(INSERT, (1,), timeout=DEADLINE)
        del caught  # which has kept all

    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        run(main)
        assert db.read("SELECT n FROM t") == [(1,)]


def test_a_savepoint_whose_entry_is_interrupted_keeps_no_other_task_from_its_own(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with opened(path) as db:
            async with db.transaction() as tx:

                async def other() -> None:
                    async with tx.savepoint():
                        await tx.execute(INSERT, (1,))

                with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                    patch.setattr(tasks_savepoint, "leave_if_collected", raising(KeyboardInterrupt))
                    async with tx.savepoint():
                        pytest.fail("entered")
                await asyncio.create_task(other())
            assert await rows(db) == [1]

    run(main)


def test_a_block_that_is_refused_counts_as_no_withdrawn_job(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            await db.close()
            with pytest.raises(WriterClosedError):
                await db.transaction().__aenter__()
            assert (await db.close()).cancelled == 0

    run(main)

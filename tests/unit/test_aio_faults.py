"""AsyncDbWriter where waits are given up, blocks are shared, and calls come at the wrong moment."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helpers import DEADLINE
from onewriter import (
    AsyncDbWriter,
    DbWriter,
    ReadTimeoutError,
    ReentrantWriteError,
    Ticket,
    Transaction,
    WriterClosedError,
)
from onewriter.read.claim import Claim
from onewriter.read.reader import Snapshot
from onewriter.tasks import reader, threads
from onewriter.tasks.reader import AsyncReader

INSERT = "INSERT INTO t VALUES (?)"
COUNT = "SELECT count(*) FROM t"
ENDLESS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT count(*) FROM c"


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


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


# Waits for a ticket that are given up ---------------------------------------------------------------------------------


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


# Readers that several tasks share -------------------------------------------------------------------------------------


class Gate:
    """A SQL function that waits: ``SELECT gate()`` is under way, and its connection busy, until it is opened."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()

    def on_connect(self, connection: sqlite3.Connection, readonly: bool) -> None:
        connection.create_function("gate", 0, self._wait)

    def _wait(self) -> int:
        self.entered.set()
        return self.open.wait(5.0)  # a loop that stands still cannot open it


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
            await until(lambda: bool(kept) and bool(kept[0]._turn._waiters))
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
                    await until(reader._turn.locked)
                    if where == "in the block":
                        await asyncio.Event().wait()

            task = asyncio.create_task(parent())
            await until(lambda: bool(running) and readers[0]._turn.locked())
            if where == "leaving it":
                await until(lambda: bool(readers[0]._turn._waiters))
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
            pool, claim = db._gateway()._readers, Claim("next")
            reader = pool.reader_of(claim, 100.0)
            with pytest.raises(sqlite3.ProgrammingError, match="has ended"):
                await over.execute(COUNT)
            assert reader.deadline == 100.0
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


@pytest.mark.parametrize("block", [AsyncDbWriter.reader, AsyncDbWriter.transaction])
def test_a_read_in_a_block_that_another_task_uses_is_given_up_in_time_and_never_runs(
    path: Path, block: Callable[[AsyncDbWriter], Any]
) -> None:
    gate = Gate()
    called: list[str] = []

    async def main() -> None:
        async with opened(path, on_connect=gate.on_connect) as db, block(db) as shared:
            other = asyncio.create_task(shared.execute("SELECT gate()"))
            await until(gate.entered.is_set)
            with pytest.raises(ReadTimeoutError, match="used by another task"):
                await db.read(lambda connection: called.append("late"), timeout=0.01)
            gate.open.set()
            assert (await other).fetchall() == [(1,)]
            await db.read(lambda connection: called.append("in time"), timeout=DEADLINE)
            await db.read(lambda connection: called.append("whenever"), timeout=None)
            assert called == ["in time", "whenever"]

    run(main)


def test_an_interrupted_statement_that_nobody_waits_for_is_not_logged(path: Path) -> None:
    logged: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))
        async with opened(path) as db, db.reader() as reader:
            task = asyncio.create_task(reader.execute(ENDLESS))
            executor = db._task_reads().threads._executor
            await until(lambda: executor is not None and reader._turn.locked() and not executor._work_queue.qsize())
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


# Calls from inside a thread's own block or job ------------------------------------------------------------------------


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


# Opening and closing by several ---------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("closes", [False, True])
def test_a_loop_that_opens_waits_for_that_of_another_thread(path: Path, closes: bool) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def hesitate(connection: sqlite3.Connection, readonly: bool) -> None:
        entered.set()
        go_on.wait(DEADLINE)

    db = AsyncDbWriter(path, on_connect=hesitate)

    async def second() -> None:
        opening = asyncio.create_task(db.open())
        await until(lambda: bool(db._openers))
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


def test_a_read_while_another_loop_closes_the_gateway_is_served(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    came = threading.Event()  # the close: to the lock, which the read has, or to the shutdown of the pool

    class Lock:
        def __init__(self) -> None:
            self._lock = threading.Lock()

        def __enter__(self) -> None:
            if not self._lock.acquire(blocking=False):
                came.set()
                self._lock.acquire()

        def __exit__(self, *_: object) -> None:
            self._lock.release()

    with DbWriter(path) as inner, ThreadPoolExecutor(1) as other:
        shared = AsyncDbWriter.wrap(inner)
        closing: list[Future[Any]] = []
        submit = other.submit

        class Pool(ThreadPoolExecutor):
            def shutdown(self, *args: Any, **options: Any) -> None:
                super().shutdown(*args, **options)
                came.set()

            def submit(self, call: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
                if not closing:
                    closing.append(submit(run, shared.close))
                    assert came.wait(DEADLINE)
                return super().submit(call, *args, **options)

        monkeypatch.setattr(threads, "ThreadPoolExecutor", Pool)
        monkeypatch.setattr(shared._task_reads().threads, "_lock", Lock())
        assert run(lambda: shared.read_value("SELECT 1")) == 1
        closing[0].result(DEADLINE)


def test_blocks_entered_with_an_exit_stack_are_named_by_who_enters_them(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db, contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(db.transaction())
            running = db.stats().running
            assert running is not None
            assert running.called_from.endswith("in main")
            await stack.enter_async_context(db.reader())
            (reader,) = db._gateway()._readers.borrowers
            assert reader.startswith("reader() in test_aio_faults.py:")
            assert reader.endswith("in main")

    run(main)

"""TaskReads: where the reads of tasks wait, and in which threads SQLite is called for them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sqlite3
import threading
import weakref
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from aio_helpers import keep_busy, opened, run, until
from helpers import DEADLINE, child_code, eventually, pool_of, raising, run_child, threads_of
from onewriter import AsyncDbWriter, DbWriter, ReadTimeoutError
from onewriter.base.threads import start
from onewriter.read.claim import Claim
from onewriter.tasks import threads
from onewriter.tasks.call import Call

Leave = Callable[[AsyncDbWriter], Coroutine[Any, Any, None]]


async def normally(db: AsyncDbWriter) -> None:
    async with db.reader() as reader:
        await reader.execute("SELECT 1")


async def by_an_error(db: AsyncDbWriter) -> None:
    with pytest.raises(LookupError):
        async with db.reader():
            raise LookupError


async def cancelled(db: AsyncDbWriter) -> None:
    entered = asyncio.Event()

    async def read() -> None:
        async with db.reader():
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(read())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def cancelled_at_each_step(db: AsyncDbWriter) -> None:
    """Before it waits for its connection, while that is opened and pinned, in the block, while it leaves."""

    async def read() -> None:
        async with db.reader() as reader:
            await reader.execute("SELECT 1")

    for steps in range(40):
        task = asyncio.create_task(read())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def as_the_loop_ends(db: AsyncDbWriter) -> None:
    entered = asyncio.Event()

    async def read() -> None:
        async with db.reader():
            entered.set()
            await asyncio.Event().wait()

    kept.append(asyncio.create_task(read()))
    await entered.wait()  # asyncio.run cancels what is left


async def as_its_loop_is_closed(db: AsyncDbWriter) -> None:
    reader = db.reader()
    await reader.__aenter__()
    kept.append(reader)


kept: list[Any] = []


@pytest.mark.parametrize(
    "leave", [normally, by_an_error, cancelled, cancelled_at_each_step, as_the_loop_ends, as_its_loop_is_closed]
)
def test_no_statement_of_a_reader_runs_in_the_thread_of_a_loop(path: Path, leave: Leave) -> None:
    statements: list[tuple[int, str]] = []

    def trace(connection: sqlite3.Connection, readonly: bool) -> None:
        if readonly:
            connection.set_trace_callback(lambda sql: statements.append((threading.get_ident(), sql)))

    async def main() -> None:
        await leave(AsyncDbWriter.wrap(db))

    with DbWriter(path, readers=1, on_connect=trace) as db:
        asyncio.run(main())
        here = [sql for thread, sql in statements if thread == threading.get_ident()]
        assert here == []
        assert db.read_value("SELECT 1", timeout=DEADLINE) == 1
        assert any(sql.startswith("ROLLBACK") for _, sql in statements)
        assert db.stats().readers_in_use == 0
        kept.clear()


def test_close_ends_a_reader_whose_loop_is_closed(path: Path) -> None:
    """That of a loop which is closed without asyncio.run, or while the close waits, too."""
    loop, entered, closing = asyncio.new_event_loop(), threading.Event(), threading.Event()

    async def enter(reader: contextlib.AbstractAsyncContextManager[Any]) -> None:
        await reader.__aenter__()

    def run() -> None:
        reader = AsyncDbWriter.wrap(db).reader()
        loop.run_until_complete(enter(reader))
        kept.append(reader)
        entered.set()
        assert closing.wait(DEADLINE)
        eventually(lambda: pool_of(db)._closed)
        loop.close()

    db = DbWriter(path, readers=1)
    thread = threading.Thread(target=run)
    thread.start()
    assert entered.wait(DEADLINE)
    closing.set()
    db.close(timeout=DEADLINE)
    assert pool_of(db)._count == 0
    thread.join(DEADLINE)
    kept.clear()


def test_a_block_that_is_left_after_the_gateway_was_closed_closes_its_connection_elsewhere(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []

    class Connection(sqlite3.Connection):
        def close(self) -> None:
            threads.append(threading.get_ident())
            super().close()

    async def main() -> None:
        async with AsyncDbWriter.wrap(db).reader():
            await asyncio.to_thread(db.close, 0.0)
            (reader,) = pool_of(db)._readers
            replaced.append(reader.connection)
            reader.connection = connection

    replaced: list[sqlite3.Connection] = []
    db = DbWriter(path, readers=1)
    connection = sqlite3.connect(":memory:", factory=Connection, check_same_thread=False)
    asyncio.run(main())
    replaced[0].close()
    assert threads
    assert threading.get_ident() not in threads


def test_a_claim_that_is_given_up_when_the_pool_is_closed_leaves_the_closing_to_a_thread(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        gateway = AsyncDbWriter.wrap(db)
        busy = keep_busy(gateway, gate)
        reading = asyncio.create_task(gateway.read("SELECT 1"))
        while not db.stats().readers_in_use:
            await asyncio.sleep(0)
        await asyncio.to_thread(db.close, 0.0)
        monkeypatch.setattr(pool, "end", end)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        while db.stats().readers_in_use:
            await asyncio.sleep(0)
        assert ended_in
        assert threading.get_ident() not in ended_in
        assert not pool._readers
        gate.set()
        await busy

    def end(claim: Claim) -> None:
        ended_in.append(threading.get_ident())
        original(claim)

    gate = threading.Event()
    ended_in: list[int] = []
    db = DbWriter(path, readers=1)
    pool = pool_of(db)
    original = pool.end
    assert db.read("SELECT 1") == [(1,)]
    asyncio.run(main())
    db.close()


def no_thread(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_read_that_no_thread_could_be_started_for_is_never_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        gateway = AsyncDbWriter.wrap(db)
        with monkeypatch.context() as full:
            full.setattr(threading.Thread, "start", no_thread)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                await gateway.read(calls.append)
        assert await gateway.read("SELECT 1") == [(1,)]

    calls: list[sqlite3.Connection] = []
    db = DbWriter(path)
    asyncio.run(main())
    assert db.stats().readers_in_use == 0
    assert calls == []
    db.close()  # comes to its end
    assert not pool_of(db)._readers


def test_a_read_that_another_thread_takes_while_none_can_be_started_has_its_result(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        other = threading.Thread(target=lambda: run_one(threads_of(gateway)._line.calls.get()))  # nobody knows of it
        start_one(other)
        other.join(DEADLINE)
        no_thread(thread)

    def run_one(call: Call[Any] | None) -> None:
        assert call is not None
        call.run()

    async def main() -> list[Any]:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            return await gateway.read("SELECT 1", timeout=None)

    start_one = threading.Thread.start
    with DbWriter(path) as db:
        gateway = AsyncDbWriter.wrap(db)
        assert asyncio.run(main()) == [(1,)]


def test_tasks_read_on_when_the_main_thread_has_ended(path: Path) -> None:
    code = """
import asyncio
from onewriter import AsyncDbWriter

async def main():
    async with AsyncDbWriter.wrap(db) as gateway:
        await gateway.read("SELECT 1")  # Python 3.12 can start no thread then
        ready.set()
        threading.main_thread().join()
        print(await gateway.read_value("SELECT 7"), flush=True)
    db.close()

db = DbWriter(path)
ready = threading.Event()
threading.Thread(target=asyncio.run, args=[main()]).start()
ready.wait(30)
"""
    child = run_child(child_code(path, code))
    assert (child.stdout, child.returncode) == ("7\n", 0), child.stderr


def test_a_thread_that_is_free_is_used_again_and_others_come_as_they_are_needed(path: Path) -> None:
    async def main() -> None:
        async with AsyncDbWriter(path, readers=3) as db:
            for _ in range(5):
                await db.read("SELECT 1")
                await until(lambda: threads_of(db)._line.idle == 1)
            assert threads_of(db)._line.threads == 1
            gate = threading.Event()
            busy = [keep_busy(db, gate) for _ in range(3)]
            assert threads_of(db)._line.threads == 3
            more = keep_busy(db, gate)
            gate.set()
            for call in (*busy, more):
                assert await call
            assert threads_of(db)._line.threads == 3

    asyncio.run(main())


def test_a_wrap_that_is_dropped_ends_its_threads(path: Path) -> None:
    async def main() -> None:
        gateway = AsyncDbWriter.wrap(db)
        await gateway.read("SELECT 1")
        threads.extend(thread for thread in threading.enumerate() if "app.db-reader" in thread.name)

    threads: list[threading.Thread] = []
    with DbWriter(path) as db:
        asyncio.run(main())
        gc.collect()
        for thread in threads:
            thread.join(DEADLINE)
        assert [thread.is_alive() for thread in threads] == [False]


def test_the_threads_of_a_wrap_end_with_the_gateway_and_not_before_its_readers(path: Path) -> None:
    async def main() -> None:
        gateway = AsyncDbWriter.wrap(db)
        async with gateway.reader() as reader:
            await asyncio.to_thread(db.close, 0.0)
            assert (await reader.execute("SELECT 1")).rows == [(1,)]
        threads.extend(thread for thread in threading.enumerate() if "app.db-reader" in thread.name)
        for thread in threads:
            await asyncio.to_thread(thread.join, DEADLINE)
        assert not any(thread.is_alive() for thread in threads)
        kept.append(gateway)

    kept: list[AsyncDbWriter] = []
    threads: list[threading.Thread] = []
    db = DbWriter(path)
    asyncio.run(main())


def test_in_a_forked_child_nothing_waits_for_the_threads_that_are_not_there(path: Path) -> None:
    code = """
import asyncio, gc
from onewriter import AsyncDbWriter

def hold():
    with line.lock:
        held.set()
        release.wait(30)

db = DbWriter(path)
gateway = AsyncDbWriter.wrap(db)
asyncio.run(gateway.read("SELECT 1"))
line = gateway._reads.threads._line
held, release = threading.Event(), threading.Event()
threading.Thread(target=hold).start()
held.wait(30)
if (child := os.fork()) == 0:
    gateway._reads.threads.shutdown()
    del gateway
    gc.collect()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
release.set()
"""
    child = run_child(child_code(path, code))
    assert (child.stdout, child.returncode) == ("7\n", 0), child.stderr


@pytest.mark.parametrize("is_wrap", [True, False])
def test_a_reader_that_outlives_a_close_is_used_and_left_while_another_read_lasts(path: Path, is_wrap: bool) -> None:
    async def main() -> None:
        gateway = AsyncDbWriter.wrap(db)
        slow = asyncio.create_task(gateway.read(lambda connection: gate.wait(DEADLINE)))
        async with asyncio.timeout(DEADLINE), gateway.reader() as reader:
            await reader.execute("SELECT 1")
            if is_wrap:
                await gateway.close()
            else:
                await asyncio.to_thread(db.close, 0.0)
            assert (await reader.execute("SELECT 2")).rows == [(2,)]
        assert not slow.done()
        gate.set()
        assert await slow

    gate = threading.Event()
    db = DbWriter(path)
    asyncio.run(main())
    db.close()


def test_a_read_leaves_nothing_for_the_garbage_collector(path: Path) -> None:
    async def main() -> None:
        gateway = AsyncDbWriter.wrap(db)
        await gateway.read("SELECT 1")
        async with gateway.reader() as reader:
            await reader.execute("SELECT 1")
        with contextlib.suppress(ReadTimeoutError), db.reader():
            await gateway.read("SELECT 1", timeout=0.0)
        known.append(weakref.ref(threads_of(gateway)))

    known: list[Any] = []
    gc.collect()
    gc.disable()
    try:
        with DbWriter(path, readers=1) as db:
            asyncio.run(main())
            eventually(lambda: known[0]() is None)  # its thread has it for a moment more
    finally:
        gc.enable()


def test_a_read_that_gets_no_thread_of_its_own_is_done_by_one_that_is_there(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with AsyncDbWriter(path) as db:
            gate = threading.Event()
            busy = keep_busy(db, gate)
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", no_thread)
                reading = asyncio.create_task(db.read("SELECT 1"))
                await until(lambda: not threads_of(db)._line.calls.empty())
            gate.set()
            assert await busy
            assert await reading == [(1,)]

    asyncio.run(main())


@pytest.mark.parametrize("way", ["read", "reader"])
def test_what_is_raised_as_a_thread_was_started_leaves_the_connection_to_that(
    path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    def start(thread: threading.Thread) -> None:
        start_one(thread)
        if "app.db-reader" in thread.name:
            eventually(lambda: any(claim.runs_in for claim in pool_of(db)._lent()))
            raise LookupError

    def connect(connection: sqlite3.Connection, readonly: bool) -> None:
        if readonly:
            gate.wait(DEADLINE)  # while the claim is in use

    async def main() -> None:
        gateway = AsyncDbWriter.wrap(db)
        with monkeypatch.context() as patch, pytest.raises(LookupError):
            patch.setattr(threading.Thread, "start", start)
            if way == "read":
                await gateway.read("SELECT 1")
            else:
                await gateway.reader().__aenter__()
        assert db.stats().readers_in_use == 1
        gate.set()
        await until(lambda: db.stats().readers_in_use == 0)
        assert await gateway.read("SELECT 1") == [(1,)]

    start_one, gate = threading.Thread.start, threading.Event()
    with DbWriter(path, readers=1, on_connect=connect) as db:
        asyncio.run(main())


def test_what_a_call_has_returned_is_not_kept_by_the_thread_that_waits_for_the_next(path: Path) -> None:
    class Kept:
        pass

    async def main() -> None:
        async with opened(path) as db:
            kept = weakref.ref(await db.read(lambda connection: Kept()))
            await until(lambda: kept() is None)

    run(main)


def test_a_thread_that_was_never_started_since_that_was_interrupted_is_not_counted(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DbWriter(path, readers=1) as db:
        gateway = AsyncDbWriter.wrap(db)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(threads, "start", raising(KeyboardInterrupt))
            asyncio.run(gateway.read("SELECT 1"))
        assert asyncio.run(gateway.read("SELECT 1", timeout=DEADLINE)) == [(1,)]


def test_a_thread_whose_start_was_interrupted_is_counted_and_ends_with_the_others(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    before = set(threading.enumerate())
    with DbWriter(path, readers=1) as db:
        gateway = AsyncDbWriter.wrap(db)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(threads, "start", interrupted)
            asyncio.run(gateway.read("SELECT 1"))
        assert asyncio.run(gateway.read("SELECT 1", timeout=DEADLINE)) == [(1,)]
        assert threads_of(gateway)._line.threads == 1
    del gateway
    eventually(lambda: gc.collect() >= 0 and set(threading.enumerate()) <= before)

"""AsyncWatch: a task's ``async with db.watch(…)``."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import math
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from aio_helpers import Gate, beats, left_in_a_closed_loop, opened, run, until
from helpers import DEADLINE, core_of, in_threads, pool_of, state_of
from onewriter import AsyncDbWriter, AsyncWatch, DbWriter, ReadTimeoutError, ReentrantWriteError, WriterClosedError
from onewriter.base.task_waits import waits_of

N = "SELECT n FROM t ORDER BY n"


async def collect(live: AsyncWatch[Any], got: list[Any]) -> None:
    async for rows in live:
        got.append(rows)
    got.append("ended")


async def nothing_new(db: AsyncDbWriter, live: AsyncWatch[Any]) -> bool:
    await db.flush()
    try:
        await live.next(0)
    except ReadTimeoutError:
        return True
    return False


def test_it_gives_the_rows_now_and_after_each_commit_that_changed_them(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db, db.watch(N, every=0) as live:
            assert await live.next() == []
            await db.run("INSERT INTO t VALUES (1)")
            assert await live.next() == [(1,)]
            async with db.transaction() as tx:
                await tx.execute("INSERT INTO t VALUES (2)")
                with pytest.raises(ReentrantWriteError):
                    await live.next()
            assert await live.next() == [(1,), (2,)]
            await db.run("UPDATE t SET n = n")
            assert await nothing_new(db, live)
            with contextlib.closing(sqlite3.connect(path)) as other, other:
                other.execute("DELETE FROM t")
            assert await live.next(DEADLINE) == []

    run(main)


def test_the_loop_goes_on_while_it_waits_and_while_it_reads(path: Path) -> None:
    gate = Gate()

    async def main() -> None:
        async with opened(path, on_connect=gate.on_connect) as db, db.watch("SELECT gate(), n FROM t") as live:
            await db.run("INSERT INTO t VALUES (1)")
            reading = await beats(5, live.next())
            gate.open.set()
            assert await reading == [(1, 1)]
            waiting = await beats(5, live.next())
            await db.run("UPDATE t SET n = 2")
            assert await waiting == [(1, 2)]

    run(main)


def test_a_slow_consumer_gets_the_newest_rows(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db, db.watch(N, every=0) as live:
            got = []
            async for rows in live:
                got.append(len(rows))
                if len(rows) == 10:
                    break
                for n in range(5):
                    await db.run("INSERT INTO t VALUES (?)", (n,))
            assert got == [0, 5, 10]

    run(main)


def test_it_pauses_every_seconds_and_close_gives_the_last_state(path: Path) -> None:
    async def main() -> None:
        got: list[Any] = []
        async with opened(path) as db, db.watch(N, every=3600) as live:
            task = asyncio.create_task(collect(live, got))
            await until(lambda: got == [[]])
            await db.run("INSERT INTO t VALUES (1)")
            await db.run("INSERT INTO t VALUES (2)")
            assert await nothing_new(db, live)
            await db.close()
            await task
            assert got == [[], [(1,), (2,)], "ended"]
            with pytest.raises(WriterClosedError):
                await live.next()

    run(main)


def test_the_pause_ends(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db, db.watch(N, every=0.01) as live:
            await live.next()
            await db.run("INSERT INTO t VALUES (1)")
            assert await live.next(DEADLINE) == [(1,)]

    run(main)


def test_a_cancelled_wait_leaves_nothing_and_loses_nothing(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db, db.watch(N, every=0) as live:
            await live.next()
            while not await nothing_new(db, live):
                pass
            waiting = await beats(5, live.next())
            assert len(live._entered().waiters) == 1
            waiting.cancel()
            await asyncio.wait([waiting])
            assert waiting.cancelled()
            assert not live._entered().waiters
            await db.run("INSERT INTO t VALUES (1)")
            assert await live.next() == [(1,)]

    run(main)


def test_a_cancelled_read_is_made_again_by_who_waits_for_it(path: Path) -> None:
    gate = Gate()

    async def main() -> None:
        query = "SELECT gate() FROM t"
        async with opened(path, on_connect=gate.on_connect) as db, db.watch(query) as one, db.watch(query) as two:
            await db.run("INSERT INTO t VALUES (1)")
            first = await beats(1, one.next())
            await until(gate.entered.is_set)
            second = await beats(1, two.next())
            await until(lambda: bool(two._entered().waiters))
            first.cancel()
            gate.open.set()
            assert await second == [(1,)]
            assert first.cancelled()

    run(main)


def test_any_task_ends_it_by_leaving_the_block(path: Path) -> None:
    async def main() -> None:
        got: list[Any] = []
        async with opened(path) as db:
            async with db.watch(N) as live:
                task = asyncio.create_task(collect(live, got))
                await until(lambda: got == [[]])
            await task
            assert got == [[], "ended"]
            assert state_of(db).live is None
            async with db.watch(N) as live:
                live.close()
                with pytest.raises(RuntimeError, match="has ended"):
                    await live.next()

    run(main)


def test_an_error_of_the_query_is_raised_in_the_loop(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db, db.watch("SELECT * FROM nowhere") as live:
            with pytest.raises(sqlite3.OperationalError, match="no such table"):
                await live.next()
            with pytest.raises(TypeError, match="str"):
                db.watch(5)  # type: ignore[call-overload]
            with pytest.raises(ValueError, match="timeout"):
                await live.next(-1)

    run(main)


def test_no_news_in_time_is_a_timeout(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db, db.watch(N) as live:
            await live.next()
            with pytest.raises(TimeoutError, match="no commit has changed"):
                await live.next(0.01)

    run(main)


def test_a_function_runs_in_a_thread(path: Path) -> None:
    async def main() -> None:
        def where(connection: sqlite3.Connection) -> Any:
            return threading.current_thread().name, connection.execute("SELECT count(*) FROM t").fetchone()

        async with opened(path) as db, db.watch(where, every=0) as live:
            name, count = await live.next()
            assert (name.startswith("app.db-reader"), count) == (True, (0,))
            await db.run("INSERT INTO t VALUES (1)")
            assert (await live.next())[1] == (1,)

    run(main)


def test_one_connection_is_enough_beside_a_reader_of_the_same_task(path: Path) -> None:
    async def main() -> None:
        async with opened(path, readers=1) as db, db.reader(), db.watch(N, every=0) as live:
            assert await live.next() == []
            await db.run("INSERT INTO t VALUES (1)")
            assert await live.next(DEADLINE) == [(1,)]

    run(main)


def test_it_reads_on_the_pool(path: Path) -> None:
    opened_readonly: list[bool] = []

    async def main() -> None:
        async with AsyncDbWriter(path, readers=1, on_connect=lambda _, ro: opened_readonly.append(ro)) as db:
            await db.run("CREATE TABLE t (n)")
            async with db.watch(N, every=0) as live:
                assert await live.next() == []
                for n in range(3):
                    await db.run("INSERT INTO t VALUES (1)")
                    assert await live.next(DEADLINE) == [(1,)] * (n + 1)
            assert opened_readonly.count(True) == 1

    run(main)


def test_a_wait_without_an_end_has_no_timer_of_its_own_and_none_waits_behind_its_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uvloop has none without an end."""

    async def main() -> None:
        loop, delays = asyncio.get_running_loop(), []
        later = loop.call_later

        def noted(delay: float, callback: Any, *args: Any, **options: Any) -> asyncio.TimerHandle:
            delays.append(delay)
            return later(delay, callback, *args, **options)

        monkeypatch.setattr(loop, "call_later", noted)
        async with opened(path) as db, db.watch(N, every=0) as live:
            await live.next()
            for limit in (None, DEADLINE):
                waiting = asyncio.create_task(live.next(limit))
                await until(lambda: bool(live._entered().waiters))
                await db.run("INSERT INTO t VALUES (1)")
                await waiting
                assert not waits_of(loop)._waiting
            assert max(delays) < math.inf

    run(main)


def test_threads_and_tasks_of_two_loops_watch_one_gateway(path: Path) -> None:
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        ready = threading.Barrier(3)

        async def follow() -> Any:
            async with AsyncDbWriter.wrap(db) as tasks, tasks.watch(N, every=0) as live:
                assert await live.next() == []
                await asyncio.to_thread(ready.wait, DEADLINE)
                return await live.next(DEADLINE)

        got: list[Any] = []
        threads = [threading.Thread(target=lambda: got.append(run(follow))) for _ in range(2)]
        for thread in threads:
            thread.start()
        with db.watch(N, every=0) as live:
            assert live.next() == []
            ready.wait(DEADLINE)
            db.run("INSERT INTO t VALUES (1)")
            assert live.next(DEADLINE) == [(1,)]
        for thread in threads:
            thread.join(DEADLINE)
        assert got == [[(1,)], [(1,)]]
        assert core_of(db).live._queries == {}


def test_a_gateway_that_is_not_open_is_not_watched(path: Path) -> None:
    with pytest.raises(WriterClosedError):
        AsyncDbWriter(path).watch(N)


def test_it_is_entered_once_and_with_async(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            live = db.watch(N)
            with pytest.raises(RuntimeError, match="needs `with`"):
                await live.next()
            async with live:
                with pytest.raises(RuntimeError, match="entered once"):
                    await live.__aenter__()

    run(main)


@pytest.mark.parametrize("where", ["in its read", "waiting for a connection"])
def test_a_task_whose_loop_is_closed_as_it_reads_keeps_no_other_watch_from_rows(path: Path, where: str) -> None:
    gate = Gate()
    with DbWriter(path, readers=1, on_connect=gate.on_connect) as db, contextlib.ExitStack() as busy:
        db.run("CREATE TABLE t (n)")
        wrapped, got = AsyncDbWriter.wrap(db), list[Any]()
        query = "SELECT n, gate() FROM t" if where == "in its read" else N

        async def watch() -> None:
            async with wrapped.watch(query, every=0) as live:
                await collect(live, got)

        db.run("INSERT INTO t VALUES (1)")
        if where == "in its read":
            is_there = gate.entered.is_set
        else:
            block = db.reader()
            in_threads(block.__enter__)  # so that the task is not inside it
            busy.push(block)
            is_there = lambda: pool_of(db).waiting == 1  # noqa: E731
        task = left_in_a_closed_loop(watch(), is_there)
        busy.close()
        gate.open.set()
        with db.watch(query, every=0) as live:
            assert live.next(DEADLINE)[0][0] == 1
            db.run("UPDATE t SET n = 2")
            assert live.next(DEADLINE)[0][0] == 2
        assert not task.done()
        assert got == []


@pytest.mark.parametrize("closes", [True, False], ids=["closed", "stands still"])
def test_a_task_whose_loop_ends_in_a_read_that_fails_keeps_no_other_watch_from_its_turn(
    path: Path, closes: bool
) -> None:
    gate = Gate()
    query = "SELECT abs(0 * gate() - 9223372036854775807 - 1)"  # an integer overflow
    with DbWriter(path, on_connect=gate.on_connect) as db:
        wrapped = AsyncDbWriter.wrap(db)

        async def watch() -> None:
            async with wrapped.watch(query) as live:
                await live.next()

        loop = asyncio.new_event_loop()
        if closes:
            task = left_in_a_closed_loop(watch(), gate.entered.is_set)
        else:
            task = loop.create_task(watch())
            loop.run_until_complete(until(gate.entered.is_set))
        with db.watch(query) as live, ThreadPoolExecutor(1) as pool:
            other = pool.submit(live.next, DEADLINE)
            gate.open.set()
            with pytest.raises(sqlite3.OperationalError, match="overflow"):
                other.result()
        assert not task.done()
        if not closes:
            with pytest.raises(sqlite3.OperationalError, match="overflow"):
                loop.run_until_complete(task)
        loop.close()


def test_in_a_reader_for_which_a_commit_waits_it_does_not_wait_for_that(path: Path) -> None:
    async def main() -> None:
        async with AsyncDbWriter(path, journal_mode="DELETE") as db, db.watch(N) as live:
            await db.run("CREATE TABLE t (n)")
            async with db.reader():
                with pytest.raises(ReentrantWriteError, match=r"inside a reader\(\)"):
                    await live.next()
            assert await live.next(DEADLINE) == []

    run(main)


def test_a_watch_that_gets_no_connection_in_time_leaves_the_query_to_another_one(path: Path) -> None:
    async def other(db: AsyncDbWriter) -> Any:
        async with db.watch("SELECT n FROM t") as live:
            return await live.next(DEADLINE)

    async def main() -> None:
        async with opened(path, readers=1) as db, db.watch("SELECT n FROM t") as live:
            async with db.reader():
                reading = asyncio.create_task(live.next(0.01), context=contextvars.Context())
                with pytest.raises(ReadTimeoutError):
                    await reading
            assert await asyncio.create_task(other(db)) == []

    run(main)

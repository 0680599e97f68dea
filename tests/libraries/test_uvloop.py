"""uvloop, an event loop that is not asyncio's."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from aio_helpers import writer_parked
from helpers import DEADLINE
from onewriter import AsyncDbWriter, WriteTimeoutError

INSERT = "INSERT INTO t VALUES (?)"
COUNT = "SELECT count(*) FROM t"
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


def run(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(main, DEADLINE))


def test_tasks_write_read_and_watch(path: Path) -> None:
    async def write(db: AsyncDbWriter, n: int) -> None:
        async with db.transaction() as tx:
            await tx.execute(INSERT, (n,))
            async with tx.savepoint():
                await tx.execute(INSERT, (n,))
        async with db.reader() as reader:
            before = await reader.execute(COUNT)
            await db.run(INSERT, (n,))
            assert (await reader.execute(COUNT)).rows == before.rows
        ticket = db.enqueue(INSERT, (n,))
        assert await db.read_value(f"{COUNT} WHERE n = {n}", after=ticket) == 4

    async def main() -> None:
        async with AsyncDbWriter(path) as db:
            await db.run("CREATE TABLE t (n)")
            async with asyncio.TaskGroup() as tasks:
                for n in range(50):
                    tasks.create_task(write(db, n))
            async with db.watch(COUNT) as live:
                assert await live.next() == [(200,)]
                await db.run(INSERT, (-1,))
                assert await live.next(DEADLINE) == [(201,)]

    run(main())


def test_cancelled_and_late_waits_leave_nothing_behind(path: Path) -> None:
    async def block(db: AsyncDbWriter, entered: asyncio.Event) -> None:
        async with db.transaction() as tx:
            await tx.execute(INSERT, (1,))
            entered.set()
            await tx.execute(ENDLESS)

    async def main() -> None:
        async with AsyncDbWriter(path) as db:
            await db.run("CREATE TABLE t (n)")
            entered = asyncio.Event()
            task = asyncio.create_task(block(db, entered))
            await entered.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async with writer_parked(db):
                with pytest.raises(WriteTimeoutError):
                    await db.run(INSERT, (2,), timeout=0.01)
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(db.transaction().__aenter__(), 0.01)
            assert await db.read(COUNT) == [(0,)]

    run(main())

"""What several tests of tasks need: a loop with a deadline, a gateway with a table, a parked writer, a slow read."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from helpers import DEADLINE, threads_of
from onewriter import AsyncDbWriter, Transaction
from onewriter.tasks.call import Call


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


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def beats(count: int, waiting: Awaitable[Any]) -> asyncio.Future[Any]:
    """Start ``waiting``, and show that the loop goes on beside it."""
    task = asyncio.ensure_future(waiting)
    for _ in range(count):
        await asyncio.sleep(0.001)
    assert not task.done()
    return task


def keep_busy(db: AsyncDbWriter, gate: threading.Event) -> Call[bool]:
    """Have one of the threads in which its tasks read wait for ``gate``."""
    call = Call(None, gate.wait, DEADLINE)
    threads_of(db).submit(call)
    return call


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


class Gate:
    """A SQL function that waits: ``SELECT gate()`` is under way, and its connection busy, until it is opened."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()

    def on_connect(self, connection: sqlite3.Connection, readonly: bool) -> None:
        connection.create_function("gate", 0, self._wait)

    def _wait(self) -> int:
        self.entered.set()
        return self.open.wait(5.0)  # a loop that stands still cannot open it


def left_in_a_closed_loop(main: Coroutine[Any, Any, Any], is_there: Callable[[], bool]) -> asyncio.Task[Any]:
    """The task that runs ``main``, in a loop that is closed as soon as it is there. It is not collected while kept."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(main)
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.run_until_complete(until(is_there))
    loop.close()
    return task

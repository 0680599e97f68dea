"""AsyncDbWriter where waits are given up, blocks are shared, and calls come at the wrong moment."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from helpers import DEADLINE
from onewriter import AsyncDbWriter, ReadTimeoutError, Ticket, Transaction

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

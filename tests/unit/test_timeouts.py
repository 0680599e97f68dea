"""Every timeout names who is in the way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import parked
from onewriter import AsyncDbWriter, DbWriter, QueueFullError, ReadTimeoutError, Ticket, WriteTimeoutError

SOON = 0.01
CALLS: dict[str, tuple[type[Exception], Callable[[DbWriter, Ticket[Any]], object]]] = {
    "run": (WriteTimeoutError, lambda db, last: db.run("SELECT 1", timeout=SOON)),
    "run of a function": (WriteTimeoutError, lambda db, last: db.run(lambda tx: 1, timeout=SOON)),
    "run_many": (WriteTimeoutError, lambda db, last: db.run_many("INSERT INTO t VALUES (?)", [(1,)], timeout=SOON)),
    "run_script": (WriteTimeoutError, lambda db, last: db.run_script("SELECT 1;", timeout=SOON)),
    "alone": (WriteTimeoutError, lambda db, last: db.run_without_transaction("VACUUM", timeout=SOON)),
    "a block": (WriteTimeoutError, lambda db, last: db.transaction(timeout=SOON).__enter__()),
    "enqueue": (QueueFullError, lambda db, last: db.enqueue("SELECT 1", timeout=SOON)),
    "flush": (WriteTimeoutError, lambda db, last: db.flush(SOON)),
    "checkpoint": (WriteTimeoutError, lambda db, last: db.checkpoint(timeout=SOON)),
    "a ticket": (TimeoutError, lambda db, last: last.result(SOON)),
    "a ticket's error": (TimeoutError, lambda db, last: last.exception(SOON)),
    "a read after it": (ReadTimeoutError, lambda db, last: db.read("SELECT 1", timeout=SOON, after=last)),
    "a reader after it": (ReadTimeoutError, lambda db, last: db.reader(timeout=SOON, after=last).__enter__()),
}
AWAITED: dict[str, tuple[type[Exception], Callable[[AsyncDbWriter, Ticket[Any]], Any]]] = {
    "run": (WriteTimeoutError, lambda db, last: db.run("SELECT 1", timeout=SOON)),
    "a block": (WriteTimeoutError, lambda db, last: db.transaction(timeout=SOON).__aenter__()),
    "enqueue_wait": (QueueFullError, lambda db, last: db.enqueue_wait("SELECT 1", timeout=SOON)),
    "flush": (WriteTimeoutError, lambda db, last: db.flush(SOON)),
    "checkpoint": (WriteTimeoutError, lambda db, last: db.checkpoint(timeout=SOON)),
    "a read after it": (ReadTimeoutError, lambda db, last: db.read("SELECT 1", timeout=SOON, after=last)),
}
HOLDER = r"the writer is held by '.*park' \(called from helpers.py:\d+ in parked\) for \d"


@pytest.mark.parametrize("call", CALLS)
def test_who_holds_the_writer_is_named(path: Path, call: str) -> None:
    kind, function = CALLS[call]
    with DbWriter(path, maxsize=1) as db:
        db.run("CREATE TABLE t (n)")
        with parked(db):
            last = db.enqueue("SELECT 1")  # and the queue is full
            with pytest.raises(kind, match=HOLDER) as caught:
                function(db, last)
            assert isinstance(caught.value, TimeoutError | QueueFullError)


@pytest.mark.parametrize("call", AWAITED)
def test_who_holds_the_writer_is_named_to_tasks(path: Path, call: str) -> None:
    kind, function = AWAITED[call]

    async def wait(db: DbWriter, last: Ticket[Any]) -> None:
        with pytest.raises(kind, match=HOLDER):
            await function(AsyncDbWriter.wrap(db), last)

    with DbWriter(path, maxsize=1) as db, parked(db):
        asyncio.run(wait(db, db.enqueue("SELECT 1")))


def test_who_holds_the_connections_is_named(path: Path) -> None:
    with DbWriter(path, readers=1) as db:
        outcome: list[str] = []

        async def wait() -> None:
            with pytest.raises(ReadTimeoutError) as caught:
                await AsyncDbWriter.wrap(db).read("SELECT 1", timeout=SOON)
            outcome.append(str(caught.value))

        async def hold() -> None:
            with db.reader(label="the long one"):  # another task is not inside it
                await asyncio.create_task(wait())

        asyncio.run(hold())
        assert outcome == ["no connection for SELECT 1 in time: all 1 are lent, to 'the long one'"]

"""Every timeout names who is in the way."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import onewriter.gateway as gateway_module
from helpers import DEADLINE, in_threads, parked, state_of
from onewriter import AsyncDbWriter, DbWriter, QueueFullError, ReadTimeoutError, Ticket, WriteTimeoutError

SOON = 0.01
HOLDER = r"the writer is held by '.*park' \(called from helpers.py:\d+ in parked\), for \d"
LONG = "INSERT INTO t VALUES (1) -- a text that is longer than sixty characters are"

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
        assert outcome == ["no connection for SELECT 1 in time: all 1 are in use, by 'the long one'"]


def test_the_message_of_a_timeout_has_the_sign_of_a_cut_label(path: Path) -> None:
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        with db.transaction(), pytest.raises(WriteTimeoutError, match="…' "):
            in_threads(lambda: db.run(LONG, timeout=0.01))


async def migrate_awaited(db: DbWriter, timeout: float) -> None:
    await AsyncDbWriter.wrap(db).migrate([], timeout=timeout)


def test_a_timeout_is_checked_wherever_one_is_given(db: DbWriter) -> None:
    ticket = db.enqueue("SELECT 1")

    def migrate(timeout: float) -> None:
        db.migrate([], timeout=timeout)

    def migrate_in_task(timeout: float) -> None:
        asyncio.run(migrate_awaited(db, timeout))

    for call in (ticket.result, ticket.exception, db.flush, migrate, migrate_in_task):
        for value in (float("nan"), -1.0, 10**400):
            with pytest.raises(ValueError, match="timeout must be"):
                call(value)
        with pytest.raises(TypeError, match="timeout must be"):
            call("1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="callable"):
        ticket.add_done_callback(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="drain"):
        db.close(drain="no")  # type: ignore[arg-type]


def test_while_callbacks_are_called_a_timeout_says_whose(db: DbWriter) -> None:
    release, inside = threading.Event(), threading.Event()

    def stay(ticket: Ticket[Any]) -> None:
        inside.set()
        release.wait(DEADLINE)

    with parked(db):
        db.enqueue("SELECT 1", label="the one").add_done_callback(stay)
    assert inside.wait(DEADLINE)
    with pytest.raises(WriteTimeoutError, match="callbacks of 'the one'"):
        db.run("SELECT 2", timeout=0.0)
    release.set()
    db.flush()
    assert "callbacks" not in state_of(db).describe()


def test_a_timeout_error_can_be_pickled_and_copied(db: DbWriter) -> None:
    with parked(db), pytest.raises(WriteTimeoutError) as timeout:
        db.run("SELECT 1", timeout=0.0)
    for again in (pickle.loads(pickle.dumps(timeout.value)), copy.copy(timeout.value)):
        assert (type(again), str(again), again.started) == (WriteTimeoutError, str(timeout.value), False)


def test_an_outcome_that_comes_in_the_moment_of_the_timeout_is_returned(
    db: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(wakeup: Any, *_: object) -> bool:
        assert wakeup.acquire(timeout=DEADLINE)
        return False

    monkeypatch.setattr(gateway_module, "wait_in_slices", too_late)
    assert db.run("SELECT 1").rows == [(1,)]

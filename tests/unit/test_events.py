"""on_event: what it is told, where, and that it can do no harm."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import sqlite3
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, TypeVar

import pytest

from helpers import DEADLINE, core_of, holding_lock, parked, released_when_met, state_of, writer_of
from onewriter import (
    AsyncDbWriter,
    CloseReport,
    CommitUnknownError,
    DbWriter,
    ReentrantWriteError,
    Ticket,
    WriterClosedError,
)
from onewriter.events import BackupEnded, BatchEnded, CheckpointEnded, Event, JobSubmitted, WriterBroken
from onewriter.write.jobs import ControlJob

INSERT = "INSERT INTO t VALUES (?)"
TABLE = "CREATE TABLE t (n INTEGER PRIMARY KEY)"
E = TypeVar("E")


class Heard:
    """A hook that keeps what it was told."""

    def __init__(self) -> None:
        self.heard: list[tuple[Event, int]] = []  # and in which thread: noted in one step

    def __call__(self, event: Event) -> None:
        self.heard.append((event, threading.get_ident()))

    @property
    def events(self) -> list[Event]:
        return [event for event, _ in self.heard]

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.mark.parametrize("inline", [False, True])
def test_every_job_is_told_when_it_is_handed_in_and_when_it_ends(path: Path, inline: bool) -> None:
    heard = Heard()
    with DbWriter(path, on_event=heard, inline=inline) as db:
        db.run(TABLE, label="table")
        db.enqueue(INSERT, (1,), label="later")
        with db.transaction(label="block") as tx:
            tx.execute(INSERT, (2,))
            db.run(INSERT, (3,))  # a part of the block
        with pytest.raises(sqlite3.IntegrityError):
            db.run(INSERT, (1,), label="fails")
        db.flush()
    submitted = [(event.ticket.label, event.waits) for event in heard.of(JobSubmitted)]
    assert submitted == [("table", True), ("later", False), ("block", True), ("fails", True)]
    ended = [ticket for event in heard.of(BatchEnded) for ticket in event.tickets]
    assert [ticket.label for ticket in ended] == ["table", "later", "block", "fails"]
    assert [type(ticket.exception()) for ticket in ended] == [type(None)] * 3 + [sqlite3.IntegrityError]
    assert all(ticket.timings for ticket in ended)
    assert [event.ticket for event in heard.of(JobSubmitted)] == ended
    me, writers = threading.get_ident(), set()
    for event, thread in heard.heard:
        if isinstance(event, JobSubmitted):
            assert thread == me
        else:
            writers.add(thread)
    assert (writers == {me}) is inline
    assert len(writers) == 1


@pytest.mark.parametrize("is_busy", [True, False])
@pytest.mark.parametrize("inline", [True, False])
def test_a_block_that_is_withdrawn_as_it_is_announced_never_begins(path: Path, inline: bool, is_busy: bool) -> None:
    def withdraw(event: object) -> None:
        if isinstance(event, JobSubmitted) and event.ticket.label == "withdrawn":
            assert event.ticket.cancel()

    with DbWriter(path, on_event=withdraw, inline=inline) as db:
        with contextlib.ExitStack() as busy:
            if is_busy and not inline:
                busy.enter_context(parked(db))
            with pytest.raises(CancelledError), db.transaction(label="withdrawn", timeout=None):
                pytest.fail("entered")
        with db.transaction(label="another"):
            pass
        assert (db.stats().cancelled, db.stats().committed - is_busy * (not inline)) == (1, 1)


def test_a_job_that_is_refused_as_it_is_announced_was_never_there(path: Path) -> None:
    def refuse(event: object) -> None:
        if isinstance(event, JobSubmitted):
            raise SystemExit

    with DbWriter(path, on_event=refuse) as db:
        with pytest.raises(SystemExit), db.transaction():
            pytest.fail("entered")
        with pytest.raises(SystemExit):
            db.run("SELECT 1")
    assert db.close() == CloseReport(0, 0, 0, 0, ())


def test_a_batch_is_one_event(path: Path) -> None:
    heard = Heard()
    with DbWriter(path, on_event=heard) as db:
        db.run(TABLE)
        with parked(db):
            tickets = [db.enqueue(INSERT, (n % 5,)) for n in range(10)]
        db.flush()
        batch = heard.of(BatchEnded)[-1]
        assert batch.tickets == tuple(tickets)
        assert (batch.commits, batch.retried, batch.lock_wait) == (1, False, 0.0)
        assert batch.commit > 0
        with released_when_met(db, path):
            db.run(INSERT, (77,))
        db.flush()  # events come after the outcome
        assert heard.of(BatchEnded)[-1].retried
        assert heard.of(BatchEnded)[-1].lock_wait > 0
        with pytest.raises(sqlite3.IntegrityError):
            db.run(INSERT, (77,))
        db.flush()
        assert heard.of(BatchEnded)[-1].commits == 0
        with pytest.raises(dataclasses.FrozenInstanceError):
            batch.commits = 7  # type: ignore[misc]


def test_checkpoints_backups_and_the_end_are_told(path: Path) -> None:
    heard = Heard()
    with DbWriter(path, on_event=heard) as db:
        db.run(TABLE)
        result = db.checkpoint("FULL")
        (event,) = heard.of(CheckpointEnded)
        assert (event.mode, event.busy, event.log, event.checkpointed) == ("FULL", *result)
        assert event.seconds >= 0
        db.backup(path.parent / "copy.db")
        assert [event.seconds >= 0 for event in heard.of(BackupEnded)] == [True]
        with pytest.raises(ValueError, match="the file of a gateway"):
            db.backup(path)
        assert len(heard.of(BackupEnded)) == 1
        path.rename(path.parent / "elsewhere.db")
        with pytest.raises(Exception, match="moved"):
            while True:
                db.run("INSERT INTO t VALUES (NULL)")
        (broken,) = heard.of(WriterBroken)
        assert "moved" in str(broken.cause)


def test_asyncio_is_told_too(path: Path) -> None:
    heard = Heard()

    async def main() -> None:
        async with AsyncDbWriter(path, on_event=heard, maxsize=1) as db:
            await db.run(TABLE, label="table")
            db.enqueue(INSERT, (1,), label="now")
            await db.enqueue_wait(INSERT, (2,), label="room")
            async with db.transaction(label="block") as tx:
                await tx.execute(INSERT, (3,))
            await db.flush()

    asyncio.run(main())
    submitted = [(event.ticket.label, event.waits) for event in heard.of(JobSubmitted)]
    assert submitted == [("table", True), ("now", False), ("room", False), ("block", True)]
    ended = [ticket.label for event in heard.of(BatchEnded) for ticket in event.tickets]
    assert ended == ["table", "now", "room", "block"]


def test_the_hook_is_in_the_context_of_the_call(path: Path) -> None:
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")
    seen: list[str] = []

    def hook(event: Any) -> None:
        if isinstance(event, JobSubmitted):
            seen.append(request.get())

    with DbWriter(path, on_event=hook) as db:
        request.set("one")
        db.run(TABLE)
        request.set("two")
        db.enqueue(INSERT, (1,))
    assert seen == ["one", "two"]


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_what_the_hook_raises_is_logged_and_goes_no_further(
    path: Path, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def hook(event: Any) -> None:
        if error is ValueError or not isinstance(event, JobSubmitted):
            raise error("of the hook")

    with DbWriter(path, on_event=hook) as db:
        db.run(TABLE)
        ticket = db.enqueue(INSERT, (1,))
        ticket.result(DEADLINE)
        assert db.read("SELECT n FROM t") == [(1,)]
    assert "of the hook" in caplog.text


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_an_interrupt_in_the_hook_comes_out_of_the_call_whose_thread_it_is_in(
    path: Path, error: type[BaseException], inline: bool
) -> None:
    raises: type[object] = list

    def hook(event: Any) -> None:
        if isinstance(event, raises):
            raise error("of the hook")

    with DbWriter(path, on_event=hook, inline=inline) as db:
        db.run(TABLE)
        raises = JobSubmitted
        for call in (db.run, db.enqueue):
            with pytest.raises(error, match="of the hook"):
                call(INSERT, (1,))
        with pytest.raises(error, match="of the hook"), db.transaction():
            raise AssertionError("not reached")
        raises = BackupEnded
        with pytest.raises(error, match="of the hook"):
            db.backup(path.parent / "copy.db")
        raises = list
        db.run(INSERT, (2,))
        assert db.read("SELECT n FROM t") == [(2,)]  # what was not handed in is not written


def test_a_hook_may_enqueue_but_not_wait(path: Path) -> None:
    caught: list[BaseException] = []

    def hook(event: Any) -> None:
        if isinstance(event, BatchEnded) and not event.tickets[0].label.startswith("from the hook"):
            try:
                db.run(INSERT, (2,))
            except ReentrantWriteError as error:
                caught.append(error)
            db.enqueue(INSERT, (3,), label="from the hook")

    with DbWriter(path, on_event=hook) as db:
        db.run(TABLE)
        db.flush()  # behind it the hook has been called
        db.flush()
        assert db.read("SELECT n FROM t") == [(3,)]
    assert len(caught) == 1


def test_a_job_that_was_not_accepted_is_only_told_as_handed_in(path: Path) -> None:
    heard = Heard()
    db = DbWriter(path, on_event=heard)
    db.close()
    before = len(heard.events)
    with pytest.raises(WriterClosedError):
        db.run(TABLE)
    assert [type(event) for event in heard.events[before:]] == [JobSubmitted]


def test_only_a_callable_is_a_hook(path: Path) -> None:
    with pytest.raises(TypeError, match="on_event must be callable, not str"):
        DbWriter(path, on_event="print")  # type: ignore[arg-type]
    assert not path.exists()


def test_flush_and_checkpoint_are_no_jobs_of_the_users(path: Path) -> None:
    heard = Heard()
    with DbWriter(path, on_event=heard) as db:
        db.flush()
        db.checkpoint()
    assert not heard.of(JobSubmitted)
    assert not heard.of(BatchEnded)


def test_a_job_withdrawn_in_the_moment_in_which_its_batch_is_refused_is_not_told(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard()
    with DbWriter(path, on_event=heard, lock_timeout=0.01, on_error=lambda ticket: None) as db:
        db.run(TABLE)
        tickets: list[Ticket[Any]] = []
        fail = writer_of(db)._outcomes.fail

        def cancel_the_second_and_fail(job: Any, error: BaseException) -> None:
            tickets[1].cancel()
            fail(job, error)

        monkeypatch.setattr(writer_of(db)._outcomes, "fail", cancel_the_second_and_fail)
        with holding_lock(path):
            with parked_without_lock(db, tickets):
                pass
            tickets[0].exception(DEADLINE)
        db.flush()
    assert tickets[1].cancelled()
    assert [event.tickets for event in heard.of(BatchEnded)][1:] == [(tickets[0],)]


@contextlib.contextmanager
def parked_without_lock(db: DbWriter, tickets: list[Ticket[Any]]) -> Iterator[None]:
    """Two jobs that the writer takes in one go: it is busy with a job that needs no lock meanwhile."""
    entered, release = threading.Event(), threading.Event()

    def park() -> None:
        entered.set()
        release.wait(DEADLINE)

    core_of(db).submit(ControlJob(state_of(db), "park", sys._getframe(), park), None)
    assert entered.wait(DEADLINE)
    tickets += [db.enqueue(INSERT, (n,)) for n in range(2)]
    release.set()
    yield


def test_a_commit_with_an_unknown_outcome_is_told_in_the_log_too(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_IOERR_FSYNC, "SQLITE_IOERR_FSYNC"
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")

        def fail_to_commit(*_: object) -> None:
            raise error

        monkeypatch.setattr(writer_of(db)._lock, "commit", fail_to_commit)
        with pytest.raises(CommitUnknownError):
            db.run("INSERT INTO t VALUES (1)")
        assert db.health.startswith("broken: ")
    told = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert [record.getMessage() for record in told] == ["app.db: out of service: COMMIT failed: disk I/O error"]

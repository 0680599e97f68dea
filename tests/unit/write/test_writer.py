"""The writer thread: it outlives damage and odd errors, keeps nothing alive, and its end is told to everybody."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import sqlite3
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest

from helpers import (
    DEADLINE,
    eventually,
    handling,
    inserting,
    notes_of,
    parked,
    queue_of,
    raises,
    raising,
    released_when_met,
    session_of,
    state_of,
    writer_of,
)
from onewriter import DbWriter, Ticket, Transaction, TransactionClosedError, WriterBrokenError
from onewriter.base.waiting import wake
from onewriter.sqlite import file

ENDLESS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) "
TABLE = "CREATE TABLE t (n)"
INSERT = "INSERT INTO t VALUES (?)"


@pytest.fixture
def db(any_db: DbWriter) -> DbWriter:
    any_db.run("CREATE TABLE t (n UNIQUE)")
    return any_db


def swallow(tx: Transaction) -> None:
    with contextlib.suppress(sqlite3.DatabaseError):
        tx.execute("UPDATE bad SET text = 'y'")


def test_max_hold_is_for_every_job(path: Path) -> None:
    endless = ENDLESS + "SELECT count(*) FROM c"

    def swallow(tx: Transaction) -> None:
        tx.execute("INSERT INTO t VALUES (1)")
        with contextlib.suppress(TransactionClosedError):
            tx.execute(endless)

    with DbWriter(path, max_hold=0.05) as db:
        db.run("CREATE TABLE t (n)")
        ways: list[Callable[[], object]] = [
            lambda: db.run(endless),
            lambda: db.run(swallow),
            lambda: db.run_without_transaction(endless),
            lambda: db.run_script(endless),
        ]
        for way in ways:
            with pytest.raises(TransactionClosedError, match="longer than max_hold"):
                way()
        assert db.read("SELECT * FROM t") == []
        assert db.run("INSERT INTO t VALUES (2)").rowcount == 1


def test_max_hold_ends_a_jobs_statement_on_a_reader_too(path: Path) -> None:
    with DbWriter(path, max_hold=0.05) as db:

        def job(tx: Transaction) -> None:
            with db.reader() as connection:
                connection.execute(ENDLESS + "SELECT count(*) FROM c")

        def job_that_reads(tx: Transaction) -> None:
            with db.reader():
                db.read(ENDLESS + "SELECT count(*) FROM c")

        for function in (job, job_that_reads):
            with pytest.raises(TransactionClosedError, match="longer than max_hold"):
                db.run(function, timeout=DEADLINE)
        db.run("SELECT 1", timeout=DEADLINE)


def test_an_error_that_was_dealt_with_is_gone_at_once(path: Path) -> None:
    """Its traceback holds the frames it went through; one of them that holds it too would keep all of that alive."""

    class OwnError(Exception):
        pass

    def fail(*_: object) -> None:
        raise OwnError

    gc.collect()
    gc.disable()
    try:
        with DbWriter(path, on_error=lambda ticket: None) as db:
            ways: list[Callable[[], object]] = [
                lambda: DbWriter(path, on_connect=fail),
                lambda: db.run("SELECT * FROM nowhere"),
                lambda: db.enqueue("SELECT * FROM nowhere").result(DEADLINE),
                lambda: db.read("SELECT * FROM nowhere"),
                lambda: db.read(fail),
            ]
            for number, way in enumerate(ways):
                try:
                    way()
                except (OwnError, sqlite3.Error) as error:
                    gone = weakref.ref(error)
                db.flush()  # the writer has let go of its last jobs
                assert gone() is None, number
    finally:
        gc.enable()


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("stderr_is_broken", [False, True])
def test_if_the_writer_ends_all_the_same_everybody_hears(
    path: Path, inline: bool, stderr_is_broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[logging.LogRecord] = []

    class Cause(BaseException):
        __str__ = raising(SystemExit)

    def emit(record: logging.LogRecord) -> None:
        told.append(record)
        if stderr_is_broken:
            raise RuntimeError

    with handling(emit):
        db = DbWriter(path, inline=inline)
        monkeypatch.setattr(writer_of(db), "write", raising_it(Cause))
        if stderr_is_broken:
            monkeypatch.setattr(sys, "stderr", None)
        tickets: list[Ticket[Any]] = []
        with contextlib.suppress(Cause):
            tickets = [db.enqueue("SELECT 1")]
        errors = [ticket.exception(DEADLINE) for ticket in tickets]
        for call in (db.run, db.enqueue):
            with pytest.raises(WriterBrokenError) as later:
                call("SELECT 1", timeout=DEADLINE)
            errors.append(later.value)
        assert [type(error) for error in errors] == [WriterBrokenError] * len(errors)
        assert len(set(map(id, errors))) == len(errors)
        assert db.health.startswith("broken: ")
        db.close(DEADLINE)
    assert [record.levelno for record in told if record.levelno == logging.CRITICAL] == [logging.CRITICAL]


def raising_it(kind: type[BaseException]) -> Callable[..., NoReturn]:
    def fail(*_: object) -> NoReturn:
        raise kind

    return fail


def test_a_writer_whose_end_fails_is_at_an_end_and_waits_for_nobody(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = DbWriter(path)
    db.run(TABLE)
    session = session_of(db)
    connection = session.connection
    monkeypatch.setattr(writer_of(db)._connection, "roll_back", raising(SystemExit))
    db.close(DEADLINE)
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.execute("SELECT 1")
    with DbWriter(path) as again:  # and the file is free
        again.run(INSERT, (1,))


def test_a_loop_that_cannot_be_woken_keeps_no_other_waiter_asleep() -> None:
    class Loop(asyncio.SelectorEventLoop):
        def call_soon_threadsafe(self, *_: object, **__: object) -> NoReturn:
            raise ValueError("of the loop")

    loop, lock = Loop(), threading.Lock()
    lock.acquire()
    future: asyncio.Future[None] = loop.create_future()
    wake([weakref.ref(future), lock])
    assert not lock.locked()
    loop.close()


def test_an_interrupt_that_nobody_of_ours_has_sent_is_told_as_it_is(path: Path) -> None:
    inside = threading.Event()

    def tell() -> int:
        inside.set()
        return 1

    def connect(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.create_function("inside", 0, tell)

    def endless(tx: Transaction) -> None:
        tx.execute("WITH RECURSIVE n(i) AS (SELECT inside() UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n")

    with DbWriter(path, on_connect=connect, on_error=lambda ticket: None) as db:
        ticket = db.enqueue(endless)
        assert inside.wait(30)
        session = session_of(db)
        session.connection.interrupt()  # once: the statement is under way, and what comes after it is left alone
        with pytest.raises(sqlite3.OperationalError, match="interrupted"):
            ticket.result(30)


def test_the_error_of_a_job_has_a_note_and_none_of_the_gateways_frames(db: DbWriter) -> None:
    def job(tx: Transaction) -> None:
        raise LookupError("mine")

    ticket = db.enqueue(job, label="the failing one")
    error = ticket.exception(DEADLINE)
    assert error is not None
    (note,) = error.__notes__
    assert "the failing one" in note
    assert "attempts" not in note  # one was enough
    assert error.__traceback__ is not None
    assert error.__traceback__.tb_frame.f_code.co_name == "job"


def test_an_idle_writer_keeps_nothing_of_its_last_job_alive(path: Any) -> None:
    class Thing:
        pass

    gone = threading.Event()
    with DbWriter(path) as db:
        thing: Thing | None = Thing()
        weakref.finalize(thing, gone.set)
        db.run(functools.partial(lambda thing, tx: None, thing))
        thing = None
        db.run("SELECT 1")
        gc.collect()
        assert gone.wait(DEADLINE)


def test_what_a_job_worked_with_has_gone_when_its_callbacks_are_called(new_db: DbWriter) -> None:
    class Thing:
        pass

    thing: Thing | None = Thing()
    kept, seen = weakref.ref(thing), list[object]()
    with parked(new_db):
        ticket = new_db.enqueue(functools.partial(lambda thing, tx: None, thing))
        ticket.add_done_callback(lambda _: seen.append(kept()))
        thing = None
    new_db.flush()
    assert seen == [None]


def test_an_error_says_how_often_its_job_has_met_a_lock_before(new_db: DbWriter, path: Path) -> None:
    with released_when_met(new_db, path), pytest.raises(sqlite3.OperationalError, match="no such table") as error:
        new_db.run("INSERT INTO nowhere VALUES (1)")
    assert "attempts to get SQLite's lock: 2" in notes_of(error.value)


def test_nothing_is_kept_of_jobs_that_have_run_again(new_db: DbWriter) -> None:
    new_db.run("CREATE TABLE t (n UNIQUE)")
    with parked(new_db):
        tickets: list[Ticket[Any]] = [new_db.enqueue(inserting(n)) for n in range(3)]
        tickets.append(new_db.enqueue(lambda tx: tx.execute("INSERT OR ROLLBACK INTO t VALUES (1)") and None))
        tickets[-1].add_done_callback(id)  # or else the log keeps its error, and that the frames
    assert isinstance(tickets[-1].exception(DEADLINE), sqlite3.IntegrityError)
    new_db.flush()
    kept = [weakref.ref(ticket) for ticket in tickets]
    tickets.clear()
    gc.collect()
    assert [ticket() for ticket in kept] == [None] * 4


@pytest.mark.parametrize("job", ["UPDATE bad SET text = 'y'", swallow])
@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_damage_fails_the_job_that_meets_it_and_no_other(damaged: Path, job: Any, mode: Any) -> None:
    with DbWriter(damaged, journal_mode=mode) as db:
        with parked(db):
            first, hit, last = db.enqueue(INSERT, (1,)), db.enqueue(job), db.enqueue(INSERT, (2,))
        assert (first.exception(DEADLINE), last.exception(DEADLINE)) == (None, None)
        error = hit.exception(DEADLINE)
        assert type(error) is sqlite3.DatabaseError
        assert "malformed" in str(error)
        db.run(INSERT, (3,))
        assert db.read("SELECT n FROM t") == [(1,), (2,), (3,)]
        assert db.health.startswith("degraded")


def test_a_job_that_swallows_the_end_of_max_hold_hears_of_it(path: Path) -> None:
    endless = "INSERT INTO t WITH RECURSIVE c (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"

    def job(tx: Transaction) -> None:
        with contextlib.suppress(Exception):
            tx.execute(endless)

    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
    with DbWriter(path, max_hold=0.02) as db, pytest.raises(TransactionClosedError, match="max_hold"):
        db.run(job)


def test_where_the_lock_is_not_to_be_had_only_what_needs_it_fails(path: Path) -> None:
    """What is no transaction of ours, and stands behind, is not refused with it."""

    def refuse() -> None:
        error = sqlite3.OperationalError("database is locked")
        error.sqlite_errorcode = sqlite3.SQLITE_BUSY
        raise error

    with DbWriter(path, lock_timeout=0.01, on_error=lambda ticket: None) as db, ThreadPoolExecutor() as threads:
        db.run("CREATE TABLE t (n)")
        control: Any = session_of(db).control
        with parked(db):
            failing = db.enqueue("INSERT INTO t VALUES (1)")
            withdrawn = db.enqueue("INSERT INTO t VALUES (2)")
            queued = queue_of(db).depth
            flushing = threads.submit(db.flush, DEADLINE)
            reading = threads.submit(db.run_without_transaction, "PRAGMA user_version")
            eventually(lambda: queue_of(db).depth == queued + 2)
            withdrawn.cancel()
            control["BEGIN IMMEDIATE"] = refuse
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            failing.result(DEADLINE)
        flushing.result(DEADLINE)
        assert reading.result(DEADLINE).rows == [(0,)]
        assert withdrawn.cancelled()
        del control["BEGIN IMMEDIATE"]


@pytest.mark.parametrize("name", ["SQLITE_NOTADB", "SQLITE_CORRUPT"])
def test_damage_that_a_job_meets_is_told(path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    damage = sqlite3.DatabaseError("damaged")
    damage.sqlite_errorcode, damage.sqlite_errorname = getattr(sqlite3, name), name
    with DbWriter(path) as db:
        db.flush(DEADLINE)
        monkeypatch.setattr(session_of(db).executor, "insert", raises(damage))
        with pytest.raises(sqlite3.DatabaseError):
            db.run(lambda tx: tx.execute("SELECT 1"))
        assert db.health == "degraded: damaged"


def test_a_gateway_that_breaks_has_nothing_queued_when_it_tells_of_that(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depths: list[int] = []
    monkeypatch.setattr(file, "CHECK_INTERVAL", 0.0)
    with DbWriter(path, on_error=lambda ticket: depths.append(one.stats().queue_depth)) as one:
        one.run(TABLE)
        with parked(one):
            for n in range(3):
                one.enqueue(INSERT, (n,))
            path.rename(path.with_name("moved.db"))
        one.close(DEADLINE)
    assert depths[-1] == 0
    assert queue_of(one)._bounded == 0


def test_a_job_at_whose_end_the_file_is_gone_is_not_named_as_one_that_calls_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(tx: Transaction) -> None:
        with tx.savepoint():
            tx.execute("CREATE TABLE t (n)")
        path.rename(path.with_name("moved.db"))

    monkeypatch.setattr(file, "CHECK_INTERVAL", 0.0)
    with DbWriter(path) as db:
        with pytest.raises(WriterBrokenError):
            db.run(job)
        db.close(DEADLINE)
        assert state_of(db).calling_back is None

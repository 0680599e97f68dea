"""Damage, files beside the database, connections that outlast close, and calls from handlers and children."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import DEADLINE, parked, run_child
from onewriter import AsyncDbWriter, DbWriter, ReentrantWriteError, Ticket, Transaction, TransactionClosedError
from onewriter.sqlite.connection import open_to_look
from onewriter.tools import check
from onewriter.write.checkpoint import Checkpointer
from onewriter.write.driver import InlineDriver

INSERT = "INSERT INTO t VALUES (?)"
FILL = "f = open({path!r}, 'r+b'); f.seek({page}); f.write(b'\\xff' * 4096)"


@pytest.fixture
def damaged(path: Path) -> Path:
    """A file with a table that is damaged, and one, ``t``, that is not."""
    with DbWriter(path) as db:
        db.run_script("CREATE TABLE bad (id INTEGER PRIMARY KEY, text); CREATE TABLE t (n)")
        db.run_many("INSERT INTO bad VALUES (NULL, ?)", [("x" * 400,)] * 500)
    subprocess.run([sys.executable, "-c", FILL.format(path=str(path), page=4096 * 20)], check=True)
    return path


def swallow(tx: Transaction) -> None:
    with contextlib.suppress(sqlite3.DatabaseError):
        tx.execute("UPDATE bad SET text = 'y'")


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


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
def test_a_backup_never_takes_the_place_of_a_file_of_sqlites_own(db: DbWriter, suffix: str) -> None:
    db.run("CREATE TABLE t (n)")
    db.checkpoint()
    with pytest.raises(ValueError, match="SQLite's own"):
        db.backup(db.path + suffix)
    db.run(INSERT, (1,))
    with contextlib.closing(sqlite3.connect(db.path)) as other:
        assert other.execute("SELECT n FROM t").fetchall() == [(1,)]


def test_check_reads_an_open_file_whose_log_is_empty_as_an_open_one(
    db: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    db.run("CREATE TABLE t (n)")
    db.checkpoint()
    asked: list[bool] = []

    def watched(path: str, patience: float, *, immutable: bool) -> sqlite3.Connection:
        asked.append(immutable)
        return open_to_look(path, patience, immutable=immutable)

    monkeypatch.setattr(check, "open_to_look", watched)
    assert check.check(db.path).problems == []
    assert asked == [False]


def test_check_looks_again_at_a_file_that_was_written_and_closed_meanwhile(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
    looks: list[bool] = []
    look = check._look

    def watched(report: check.Report, *, immutable: bool) -> None:
        look(report, immutable=immutable)
        looks.append(immutable)
        if immutable:
            with DbWriter(path) as other:
                other.run_many(INSERT, [(n,) for n in range(5000)])

    monkeypatch.setattr(check, "_look", watched)
    check.check(str(path))
    assert looks == [True, True, False]


def test_check_of_a_closed_damaged_file_in_wal_mode_says_wal(damaged: Path) -> None:
    report = check.check(str(damaged))
    assert report.quick_check
    assert report.journal_mode == "WAL"


def test_checkpoints_that_fail_are_told_once_until_one_works(
    db: DbWriter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Checkpointer, session: object) -> None:
        raise sqlite3.OperationalError("disk full")

    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with monkeypatch.context() as failing:
                failing.setattr(Checkpointer, "after_batch", fail)
                for _ in range(5):
                    db.run("CREATE TEMP TABLE IF NOT EXISTS x (n)")
                db.flush()
            db.run("CREATE TEMP TABLE IF NOT EXISTS x (n)")
            db.flush()
    assert sum("a checkpoint failed" in record.message for record in caplog.records) == 2


OUTLASTING = """
import os, sys, warnings
warnings.simplefilter("ignore")
from onewriter import DbWriter, ForkedError
db = DbWriter(sys.argv[1] if len(sys.argv) > 1 else {path!r})
db.run("CREATE TABLE t (n)")
loan = db.reader()
connection = loan.__enter__()
db.close(0.05)

def is_refused(call):
    try:
        call()
    except ForkedError:
        return True

def child(expected):
    pid = os.fork()
    if pid == 0:
        refused = [is_refused(lambda: connection.execute("SELECT 1")), is_refused(lambda: DbWriter({path!r}))]
        os._exit(0 if refused[expected:] == [True] * (2 - expected) else 9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

child(0)
loan.__exit__(None, None, None)
pid = os.fork()
if pid == 0:
    with DbWriter({path!r}) as own:
        own.run("INSERT INTO t VALUES (1)")
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""


def test_a_connection_that_outlasts_close_keeps_its_file_guarded_in_a_child_until_it_is_back(path: Path) -> None:
    child = run_child(OUTLASTING.format(path=str(path)))
    assert child.returncode == 0, child.stderr
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT n FROM t").fetchall() == [(1,)]


CANCELS = """
import os, sys, threading, warnings
warnings.simplefilter("ignore")
from onewriter import DbWriter, ForkedError
db = DbWriter({path!r})
release = threading.Event()
db.enqueue(lambda tx: release.wait(30) and None)
ticket = db.enqueue("CREATE TABLE t (n)")
pid = os.fork()
if pid == 0:
    try:
        ticket.cancel()
    except ForkedError:
        os._exit(0)
    os._exit(9)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
release.set()
ticket.result(30)
db.close()
"""


def test_a_child_cannot_cancel_a_job_of_its_parent(path: Path) -> None:
    child = run_child(CANCELS.format(path=str(path)))
    assert child.returncode == 0, child.stderr


def test_a_handler_whose_thread_waits_for_its_turn_goes_over_maxsize(path: Path) -> None:
    got: list[Ticket[Any]] = []

    def handler(*_: object) -> None:
        release.set()
        while db._core.state.job is None or db._core.state.job.label != "the block":
            assert not threading.Event().wait(0.001)
        got.append(db.enqueue("SELECT 'handler'", timeout=0.0))

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with DbWriter(path, maxsize=1) as db:
            with parked(db) as release:
                db.enqueue("SELECT 1")
                waiting = threading.Thread(target=lambda: db.enqueue("SELECT 2"))
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                with db.transaction(label="the block", timeout=None):
                    waiting.start()
                    assert got
            waiting.join(DEADLINE)
            assert got[0].result(DEADLINE).rows == [("handler",)]
    finally:
        signal.signal(signal.SIGALRM, before)


class Turn:
    """A lock in whose taking and giving something else happens, as a signal does."""

    def __init__(self, lock: Any, at: str, happens: Callable[[], None]) -> None:
        self.lock, self.at, self.happens = lock, at, happens

    def acquire(self, **options: Any) -> bool:
        taken: bool = self.lock.acquire(**options)
        self._happens("acquire")
        return taken

    def release(self) -> None:
        self.lock.release()
        self._happens("release")

    def _happens(self, at: str) -> None:
        if at == self.at:
            self.at = ""
            self.happens()


@pytest.mark.parametrize("at", ["acquire", "release"])
def test_without_a_thread_a_handler_that_comes_as_the_turn_is_taken_or_given_does_not_wait(path: Path, at: str) -> None:
    with DbWriter(path, inline=True) as db:
        db.run("CREATE TABLE t (n)")
        got: list[Ticket[Any]] = []
        driver = db._core.driver
        assert isinstance(driver, InlineDriver)
        driver._turn = Turn(driver._turn, at, lambda: got.append(db.enqueue(INSERT, (1,), timeout=0.0)))  # type: ignore[assignment]
        db.run(INSERT, (2,))
        assert got[0].done()
        assert sorted(db.read("SELECT n FROM t")) == [(1,), (2,)]


@pytest.mark.parametrize("call", ["run", "read", "transaction"])
def test_inside_a_tasks_block_that_max_hold_has_ended_the_gateways_calls_raise_too(path: Path, call: str) -> None:
    async def main() -> list[Any]:
        async with AsyncDbWriter(path) as db:
            await db.run("CREATE TABLE t (n)")

            async def other() -> None:
                await db.run(INSERT, (4,))

            async def enter() -> None:
                async with db.transaction() as tx:
                    await tx.execute(INSERT, (2,))

            calls: dict[str, Callable[[], Any]] = {
                "run": lambda: db.run(INSERT, (2,)),
                "read": lambda: db.read("SELECT * FROM t"),
                "transaction": enter,
            }
            assert db._opened is not None
            with pytest.raises(TransactionClosedError, match="max_hold"):
                async with db.transaction(max_hold=0.01):
                    while db.in_writer():
                        await asyncio.sleep(0.001)
                    with pytest.raises(TransactionClosedError, match="max_hold"):
                        await calls[call]()
                    ticket = db.enqueue(INSERT, (3,))  # no part of the block
                    await asyncio.create_task(other())  # nor is another task
            await db.run(INSERT, (5,))
            assert ticket.done()
            return await db.read("SELECT n FROM t")

    assert asyncio.run(main()) == [(3,), (4,), (5,)]


def test_a_block_given_back_in_the_moment_in_which_it_is_taken_leaves_its_thread_free(path: Path) -> None:
    with DbWriter(path) as db:
        for _ in range(50):
            with contextlib.suppress(TransactionClosedError), db.transaction(max_hold=0.0):
                pass
            db.run("SELECT 1")
            assert not db.in_writer()


LEFT_OPEN = """
import sys
from onewriter import DbWriter
inline = DbWriter({path!r} + ".inline", inline=True)
kept = inline.transaction()
kept.__enter__()
db = DbWriter({path!r})
db.run("CREATE TABLE t (n)")
for n in range(100):
    db.enqueue("INSERT INTO t VALUES (?)", (n,))
sys.exit(7)
"""


def test_an_inline_block_left_open_at_exit_keeps_no_other_gateway_from_writing(path: Path) -> None:
    child = run_child(LEFT_OPEN.format(path=str(path)))
    assert child.returncode == 7, child.stderr
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (100,)


def test_a_task_waits_while_another_task_of_its_loop_holds_a_block_of_its_thread(path: Path) -> None:
    async def main() -> list[Any]:
        with DbWriter(path) as db:
            db.run("CREATE TABLE t (n)")
            shared = AsyncDbWriter.wrap(db)
            with db.transaction() as tx:
                other = asyncio.create_task(write(shared))
                await asyncio.sleep(0)
                tx.execute(INSERT, (1,))
                with pytest.raises(ReentrantWriteError):
                    await shared.run(INSERT, (3,))
            await other
            return db.read("SELECT n FROM t")

    async def write(db: AsyncDbWriter) -> None:
        await db.run(INSERT, (2,))

    assert asyncio.run(main()) == [(1,), (2,)]

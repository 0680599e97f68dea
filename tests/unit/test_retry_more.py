"""Waiting for a lock through the gateway: what is told, what is repeated, and who fails when it is not to be had."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers import DEADLINE, holding_lock, parked
from onewriter import DbWriter, Transaction
from onewriter.sqlite.retry import LockPolicy

INSERT = "INSERT INTO t VALUES (?)"


@contextlib.contextmanager
def at_first_warning(action: Callable[[], object]) -> Iterator[list[str]]:
    """Do ``action`` once, when the gateway first warns, in the thread that warns, which waits for it meanwhile."""
    told: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())
            if len(told) == 1:
                action()

    handler, logger = Handler(logging.WARNING), logging.getLogger("onewriter")
    logger.addHandler(handler)
    try:
        yield told
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Callable[[], None]]:
    """Somebody else in the middle of a SELECT; yields what ends it."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as connection:
        connection.execute("BEGIN")
        connection.execute("SELECT count(*) FROM t").fetchall()
        yield lambda: connection.execute("ROLLBACK").close()


def writes(runs: list[int], n: int) -> Callable[[Transaction], int]:
    def job(tx: Transaction) -> int:
        runs.append(n)
        tx.execute(INSERT, (n,))
        return n

    return job


def rows(db: DbWriter) -> list[int]:
    return [n for (n,) in db.read("SELECT n FROM t ORDER BY rowid")]


def test_the_warning_that_frees_the_lock_is_followed_by_one_that_it_was_had(path: Path) -> None:
    with DbWriter(path, label="ledger", lock_timeout=3600) as db:
        db.run("CREATE TABLE t (n)")
        with holding_lock(path) as holder, at_first_warning(lambda: holder.execute("COMMIT")) as told:
            db.run(INSERT, (1,), label="the patient one", timeout=DEADLINE)
        assert [text.split(": ")[1] for text in told] == ["waits for SQLite's lock", "got SQLite's lock"]
        for text in told:
            assert text.startswith("ledger: ")
            assert "'the patient one' (called from test_retry_more.py:" in text
        assert rows(db) == [1]


@pytest.mark.parametrize("journal_mode", ["DELETE", "TRUNCATE", "PERSIST"])
def test_a_commit_that_a_reader_holds_up_is_repeated_and_no_body_of_its_batch_is(path: Path, journal_mode: str) -> None:
    runs: list[int] = []
    with DbWriter(path, journal_mode=journal_mode, lock_timeout=3600) as db:  # type: ignore[arg-type]
        db.run("CREATE TABLE t (n UNIQUE)")
        with reading(path) as leave, at_first_warning(leave) as told:
            with parked(db):
                tickets = [db.enqueue(writes(runs, n)) for n in range(3)]
                statement = db.enqueue(INSERT, (3,))
            assert [ticket.result(DEADLINE) for ticket in tickets] == [0, 1, 2]
            assert statement.result(DEADLINE).rowcount == 1
        assert "waits for SQLite's lock" in told[0]
        assert runs == [0, 1, 2]
        assert rows(db) == [0, 1, 2, 3]


def test_a_block_whose_commit_is_held_up_by_a_reader_is_committed_when_the_reader_has_gone(path: Path) -> None:
    with DbWriter(path, journal_mode="DELETE", lock_timeout=3600) as db:
        db.run("CREATE TABLE t (n UNIQUE)")
        with reading(path) as leave, at_first_warning(leave), db.transaction(label="held up") as tx:
            tx.execute(INSERT, (1,))
        assert rows(db) == [1]


def test_jobs_whose_begin_was_refused_fail_together_each_with_an_error_of_its_own(path: Path) -> None:
    runs: list[int] = []
    with DbWriter(path, lock_timeout=0.05) as db:
        db.run("CREATE TABLE t (n)")
        with parked_before_lock(db) as release, holding_lock(path):
            tickets = [db.enqueue(writes(runs, n), label=f"job {n}") for n in range(5)]
            release.set()
            errors = [ticket.exception(DEADLINE) for ticket in tickets]
        assert len({id(error) for error in errors}) == 5
        for n, error in enumerate(errors):
            assert type(error) is sqlite3.OperationalError
            assert error.sqlite_errorcode == sqlite3.SQLITE_BUSY
            assert [f"'job {n}'" in note for note in error.__notes__ if "attempts" in note] == [True]
        assert runs == []
        db.run(INSERT, (9,))
        assert rows(db) == [9]


@contextlib.contextmanager
def parked_before_lock(db: DbWriter) -> Iterator[threading.Event]:
    """Keep the writer busy without a transaction, in a callback, until the Event that it yields is set."""
    entered, release = threading.Event(), threading.Event()

    def stay(ticket: object) -> None:
        entered.set()
        release.wait(DEADLINE)

    with parked(db):
        db.enqueue("SELECT 1").add_done_callback(stay)
    assert entered.wait(DEADLINE)
    yield release
    release.set()


def test_a_lone_statement_is_repeated_while_somebody_else_writes(path: Path) -> None:
    with DbWriter(path, lock_timeout=3600) as db:
        db.run("CREATE TABLE t (n)")
        with holding_lock(path) as holder, at_first_warning(lambda: holder.execute("COMMIT")) as told:
            assert db.run_without_transaction(INSERT, (1,), label="alone", timeout=DEADLINE).rowcount == 1
        assert all("'alone'" in text for text in told)
        assert rows(db) == [1]


# The policy -----------------------------------------------------------------------------------------------------------


def busy() -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("not told by its text")
    error.sqlite_errorcode = sqlite3.SQLITE_BUSY
    return error


class Attempts:
    """Meets BUSY ``refusals`` times; notes attempts and sleeps in their order."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals
        self.order: list[str] = []

    def __call__(self) -> str:
        self.order.append("attempt")
        if self.refusals:
            self.refusals -= 1
            raise busy()
        return "had"

    def sleep(self, seconds: float) -> None:
        self.order.append("sleep")


@pytest.mark.parametrize("refusals", [0, 1, 2, 5, 50])
def test_there_is_one_sleep_before_each_further_attempt(refusals: int) -> None:
    attempts = Attempts(refusals)
    policy = LockPolicy(3600, threading.Event(), attempts.sleep)
    assert policy.call(attempts, lambda level, text: None) == "had"
    assert attempts.order == ["attempt"] + ["sleep", "attempt"] * refusals
    assert policy.attempts == refusals + 1


def test_each_call_counts_for_itself() -> None:
    policy = LockPolicy(3600, threading.Event(), lambda seconds: None)
    for refusals in (3, 0, 1):
        assert policy.call(Attempts(refusals), lambda level, text: None) == "had"
        assert policy.attempts == refusals + 1
        assert (policy.waited > 0) is (refusals > 0)


def test_without_patience_one_refusal_is_the_end() -> None:
    attempts = Attempts(5)
    with pytest.raises(sqlite3.OperationalError, match="not told by its text") as caught:
        LockPolicy(3600, threading.Event(), attempts.sleep).call(attempts, lambda level, text: None, 0.0)
    assert type(caught.value) is sqlite3.OperationalError
    assert attempts.order == ["attempt"]


def test_a_wait_that_close_has_ended_before_does_not_begin() -> None:
    stop = threading.Event()
    stop.set()
    attempts = Attempts(5)
    with pytest.raises(sqlite3.OperationalError):
        LockPolicy(3600, stop, attempts.sleep).call(attempts, lambda level, text: None)
    assert attempts.order == ["attempt"]


def test_an_interrupt_while_it_sleeps_ends_the_wait_as_it_is() -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LockPolicy(3600, threading.Event(), interrupted).call(Attempts(5), lambda level, text: None)


def test_what_is_logged_doubles_so_that_a_long_wait_takes_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that only the sleeps move: 0.01 s each."""
    now = 1000.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += 0.01

    monkeypatch.setattr("onewriter.sqlite.retry.monotonic", lambda: now)
    told: list[tuple[bool, str]] = []
    policy = LockPolicy(3600, threading.Event(), sleep)
    policy.call(Attempts(1000), lambda *line: told.append(line))
    # The first at 0.1 s, then at the doubles of it, up to 6.4 s; the last says that it was had after 10 s.
    assert len(told) == 8
    assert [has_it for has_it, _ in told] == [False] * 7 + [True]
    assert [text.split(":")[0] for _, text in told] == ["waits for SQLite's lock"] * 7 + ["got SQLite's lock"]
    assert "1001 attempts in 10." in told[-1][1] or "1001 attempts in 9.9" in told[-1][1]
    told.clear()
    policy.call(Attempts(5), lambda *line: told.append(line))
    assert told == []

"""Waiting for a lock: which errors, how often, how long, and what is told."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tenacity

import onewriter.sqlite.retry
from helpers import holding_lock, released_soon
from onewriter import DbWriter, TransactionClosedError
from onewriter.base.waiting import Flag
from onewriter.sqlite.retry import LockPolicy, is_busy

INSERT = "INSERT INTO t VALUES (?)"
Told = list[tuple[bool, str]]


@pytest.fixture
def connection(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE t (n)")
        yield connection


def begin(connection: sqlite3.Connection) -> str:
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("COMMIT")
    return "begun"


def test_a_lock_is_tried_for_again_until_it_is_free(connection: sqlite3.Connection, path: Path) -> None:
    sleeps: list[float] = []

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        if len(sleeps) == 3:
            holder.execute("COMMIT")

    told: Told = []
    with holding_lock(path) as holder:
        policy = LockPolicy(30, Flag(), sleep)
        assert policy.call(lambda: begin(connection), lambda *line: told.append(line)) == "begun"
    assert (policy.attempts, len(sleeps)) == (4, 3)
    assert sleeps[0] <= 0.001  # tenacity's, of a random length
    assert all(0.0009 <= seconds <= 0.0015 for seconds in sleeps[1:])
    assert told == []


def test_whoever_has_waited_longer_tries_more_often_but_not_without_limit(
    connection: sqlite3.Connection, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeps: list[float] = []
    now = 0.0
    stop = Flag()

    def sleep(seconds: float) -> None:
        nonlocal now
        sleeps.append(seconds)
        now += seconds
        if now > 0.5:
            stop.set()

    monkeypatch.setattr(onewriter.sqlite.retry, "monotonic", lambda: now)
    monkeypatch.setattr(onewriter.sqlite.retry, "JITTER", 0.0)
    monkeypatch.setattr(onewriter.sqlite.retry, "ROUND", 1.0)
    with holding_lock(path), pytest.raises(sqlite3.OperationalError, match="locked"):
        LockPolicy(30, stop, sleep).call(lambda: begin(connection), lambda *line: None)
    sleeps = sleeps[1:]  # the first is tenacity's
    assert sleeps == sorted(sleeps, reverse=True)
    assert sleeps[0] == pytest.approx(0.001, rel=0.1)
    assert sleeps[-1] == pytest.approx(0.0002)


def test_attempts_end_with_the_time_that_is_given(
    connection: sqlite3.Connection, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onewriter.sqlite.retry, "ROUND", 3600.0)
    with holding_lock(path), pytest.raises(sqlite3.OperationalError, match="locked"):
        LockPolicy(0.05, Flag()).call(lambda: begin(connection), lambda *line: None)


def test_tenacity_is_asked_once_for_several_attempts(
    connection: sqlite3.Connection, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeps: list[float] = []

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        if len(sleeps) == 5:
            holder.execute("COMMIT")

    rounds: list[object] = []

    class Counted(tenacity.Retrying):
        def iter(self, retry_state: tenacity.RetryCallState) -> Any:
            rounds.append(retry_state.attempt_number)
            return super().iter(retry_state)

    monkeypatch.setattr(onewriter.sqlite.retry, "ROUND", 60.0)
    monkeypatch.setattr(tenacity, "Retrying", Counted)
    with holding_lock(path) as holder:
        policy = LockPolicy(30, Flag(), sleep)
        policy.call(lambda: begin(connection), lambda *line: None)
    assert policy.attempts == 6
    assert set(rounds) == {1, 2}  # the first attempt, whose error is raised again, and all the others


def test_a_lock_that_is_free_is_had_without_tenacity(
    connection: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenacity, "Retrying", None)
    policy = LockPolicy(30, Flag())
    assert policy.call(lambda: begin(connection), lambda *line: None) == "begun"
    assert policy.attempts == 1


def test_the_end_of_patience_is_sqlites_own_error_and_is_told(connection: sqlite3.Connection, path: Path) -> None:
    told: Told = []
    with holding_lock(path), pytest.raises(sqlite3.OperationalError, match="locked") as caught:
        LockPolicy(0.25, Flag()).call(lambda: begin(connection), lambda *line: told.append(line))
    assert caught.value.sqlite_errorcode == sqlite3.SQLITE_BUSY
    # Noticeable after 0.1 s, then whenever the wait has doubled, then the end.
    assert [text.split(":")[0] for _, text in told] == ["waits for SQLite's lock"] * 2 + ["did not get SQLite's lock"]
    assert not any(has_it for has_it, _ in told)
    assert all("attempts" in text for _, text in told)


def test_close_ends_a_wait_at_once(connection: sqlite3.Connection, path: Path) -> None:
    stop = Flag()
    policy = LockPolicy(3600, stop, lambda seconds: stop.set())
    with holding_lock(path), pytest.raises(sqlite3.OperationalError, match="locked"):
        policy.call(lambda: begin(connection), lambda *line: None)
    assert policy.attempts == 2


def test_other_errors_are_not_tried_again(connection: sqlite3.Connection, path: Path) -> None:
    calls: list[str] = []

    def execute(sql: str) -> None:
        calls.append(sql)
        connection.execute(sql)

    policy = LockPolicy(3600, Flag())
    with pytest.raises(sqlite3.OperationalError, match="nowhere"):
        policy.call(lambda: execute("SELECT * FROM nowhere"), lambda *line: None)
    connection.execute("BEGIN")
    connection.execute("SELECT * FROM t").fetchall()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("INSERT INTO t VALUES (1)")
    with pytest.raises(sqlite3.OperationalError) as caught:
        policy.call(lambda: execute("INSERT INTO t VALUES (2)"), lambda *line: None)
    assert caught.value.sqlite_errorname == "SQLITE_BUSY_SNAPSHOT"
    assert len(calls) == 2


@pytest.mark.parametrize("error", [LookupError, sqlite3.OperationalError])
def test_an_error_midway_ends_the_wait(connection: sqlite3.Connection, path: Path, error: type[Exception]) -> None:
    attempts = 0

    def attempt() -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 3:
            raise error("midway")
        begin(connection)

    with holding_lock(path), pytest.raises(error, match="midway"):
        LockPolicy(3600, Flag()).call(attempt, lambda *line: None)
    assert attempts == 3


def test_busy_is_told_by_its_code_alone() -> None:
    error = sqlite3.OperationalError("database is locked")
    assert not is_busy(error)
    for code, busy in (("BUSY", True), ("BUSY_RECOVERY", True), ("BUSY_TIMEOUT", True), ("LOCKED", False)):
        error.sqlite_errorcode = getattr(sqlite3, f"SQLITE_{code}")
        assert is_busy(error) is busy
    error.sqlite_errorcode = sqlite3.SQLITE_BUSY_SNAPSHOT
    assert not is_busy(error)
    assert not is_busy(LookupError())

    class Disguised(Exception):
        sqlite_errorcode = sqlite3.SQLITE_BUSY

    assert not is_busy(Disguised())


def test_opening_waits_for_a_lock_too(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE t (n)")
    with released_soon(path), DbWriter(path) as db:  # WAL cannot be set while somebody writes
        assert db.run("SELECT * FROM t").rows == []
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    with holding_lock(path), pytest.raises(sqlite3.OperationalError, match="cannot open") as caught:
        DbWriter(path, lock_timeout=0.05)
    assert caught.value.sqlite_errorcode == sqlite3.SQLITE_BUSY


def test_an_interrupt_that_sqlite_tells_by_its_text_alone_is_one_too(db: DbWriter) -> None:
    """As it does where it meets one while it makes ready a table-valued PRAGMA."""
    error = sqlite3.OperationalError("interrupted")
    error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_ERROR, "SQLITE_ERROR"
    db.run("CREATE TABLE t (n)")
    with pytest.raises(TransactionClosedError, match="has ended"), db.transaction() as tx:
        executor = tx._loan.session.executor

        def interrupted(*_: object) -> Any:
            tx._loan.close("has ended early")
            raise error

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(executor, "insert", interrupted)
            tx.execute(INSERT, (1,))


def test_another_error_of_sqlite_with_its_own_text_is_no_interrupt() -> None:
    error = sqlite3.OperationalError("near is a syntax error")
    error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_ERROR, "SQLITE_ERROR"
    assert not onewriter.sqlite.retry.is_interrupted(error)


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
    policy = LockPolicy(3600, Flag(), attempts.sleep)
    assert policy.call(attempts, lambda level, text: None) == "had"
    assert attempts.order == ["attempt"] + ["sleep", "attempt"] * refusals
    assert policy.attempts == refusals + 1


def test_each_call_counts_for_itself() -> None:
    policy = LockPolicy(3600, Flag(), lambda seconds: None)
    for refusals in (3, 0, 1):
        assert policy.call(Attempts(refusals), lambda level, text: None) == "had"
        assert policy.attempts == refusals + 1
        assert (policy.waited > 0) is (refusals > 0)


def test_without_patience_one_refusal_is_the_end() -> None:
    attempts = Attempts(5)
    with pytest.raises(sqlite3.OperationalError, match="not told by its text") as caught:
        LockPolicy(3600, Flag(), attempts.sleep).call(attempts, lambda level, text: None, 0.0)
    assert type(caught.value) is sqlite3.OperationalError
    assert attempts.order == ["attempt"]


def test_a_wait_that_close_has_ended_before_does_not_begin() -> None:
    stop = Flag()
    stop.set()
    attempts = Attempts(5)
    with pytest.raises(sqlite3.OperationalError):
        LockPolicy(3600, stop, attempts.sleep).call(attempts, lambda level, text: None)
    assert attempts.order == ["attempt"]


def test_an_interrupt_while_it_sleeps_ends_the_wait_as_it_is() -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LockPolicy(3600, Flag(), interrupted).call(Attempts(5), lambda level, text: None)


def test_what_is_logged_doubles_so_that_a_long_wait_takes_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that only the sleeps move: 0.01 s each."""
    now = 1000.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += 0.01

    monkeypatch.setattr("onewriter.sqlite.retry.monotonic", lambda: now)
    told: list[tuple[bool, str]] = []
    policy = LockPolicy(3600, Flag(), sleep)
    policy.call(Attempts(1000), lambda *line: told.append(line))
    # The first at 0.1 s, then at the doubles of it, up to 6.4 s; the last says that it was had after 10 s.
    assert len(told) == 8
    assert [has_it for has_it, _ in told] == [False] * 7 + [True]
    assert [text.split(":")[0] for _, text in told] == ["waits for SQLite's lock"] * 7 + ["got SQLite's lock"]
    assert "1001 attempts in 10." in told[-1][1] or "1001 attempts in 9.9" in told[-1][1]
    told.clear()
    policy.call(Attempts(5), lambda *line: told.append(line))
    assert told == []

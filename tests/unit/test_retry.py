"""Waiting for a lock: which errors, how often, how long, and what is told."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tenacity

from helpers import holding_lock, released_soon
from onewriter import DbWriter
from onewriter.sqlite.retry import LockPolicy, is_busy

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
        policy = LockPolicy(30, threading.Event(), sleep)
        assert policy.call(lambda: begin(connection), lambda *line: told.append(line)) == "begun"
    assert (policy.attempts, len(sleeps)) == (4, 3)
    assert all(0.001 <= seconds <= 0.0015 for seconds in sleeps)
    assert told == []


def test_a_lock_that_is_free_is_had_without_tenacity(
    connection: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenacity, "Retrying", None)
    policy = LockPolicy(30, threading.Event())
    assert policy.call(lambda: begin(connection), lambda *line: None) == "begun"
    assert policy.attempts == 1


def test_the_end_of_patience_is_sqlites_own_error_and_is_told(connection: sqlite3.Connection, path: Path) -> None:
    told: Told = []
    with holding_lock(path), pytest.raises(sqlite3.OperationalError, match="locked") as caught:
        LockPolicy(0.25, threading.Event()).call(lambda: begin(connection), lambda *line: told.append(line))
    assert caught.value.sqlite_errorcode == sqlite3.SQLITE_BUSY
    # Noticeable after 0.1 s, then whenever the wait has doubled, then the end.
    assert [text.split(":")[0] for _, text in told] == ["waits for SQLite's lock"] * 2 + ["gave up on SQLite's lock"]
    assert not any(has_it for has_it, _ in told)
    assert all("attempts" in text for _, text in told)


def test_close_ends_a_wait_at_once(connection: sqlite3.Connection, path: Path) -> None:
    stop = threading.Event()
    policy = LockPolicy(3600, stop, lambda seconds: stop.set())
    with holding_lock(path), pytest.raises(sqlite3.OperationalError, match="locked"):
        policy.call(lambda: begin(connection), lambda *line: None)
    assert policy.attempts == 2


def test_other_errors_are_not_tried_again(connection: sqlite3.Connection, path: Path) -> None:
    calls: list[str] = []

    def execute(sql: str) -> None:
        calls.append(sql)
        connection.execute(sql)

    policy = LockPolicy(3600, threading.Event())
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


def test_an_error_midway_ends_the_wait(connection: sqlite3.Connection, path: Path) -> None:
    attempts = 0

    def attempt() -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 3:
            raise LookupError
        begin(connection)

    with holding_lock(path), pytest.raises(LookupError):
        LockPolicy(3600, threading.Event()).call(attempt, lambda *line: None)


def test_busy_is_told_by_its_code_alone() -> None:
    error = sqlite3.OperationalError("database is locked")
    assert not is_busy(error)
    for code, busy in (("BUSY", True), ("BUSY_RECOVERY", True), ("BUSY_TIMEOUT", True), ("LOCKED", False)):
        error.sqlite_errorcode = getattr(sqlite3, f"SQLITE_{code}")
        assert is_busy(error) is busy
    error.sqlite_errorcode = sqlite3.SQLITE_BUSY_SNAPSHOT
    assert not is_busy(error)
    assert not is_busy(LookupError())


def test_a_noticeable_wait_is_logged_with_label_and_place(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        with released_soon(path):
            db.run("INSERT INTO t VALUES (1)", label="the patient one")
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "waits for SQLite's lock" in told[0]
    assert "got SQLite's lock" in told[-1]
    assert all("the patient one" in text and "test_retry.py" in text and "attempts" in text for text in told)


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

"""What a killed process has left of a transaction, in the rollback-journal modes: a reader has the writer undo it."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers import session_of, state_of
from onewriter import AsyncDbWriter, DbWriter, WriterClosedError
from onewriter.read import recovery
from onewriter.read.recovery import Recovery

COUNT = "SELECT count(*) FROM t"
SLEEP = time.sleep
# It has written to the file what is not committed, so nobody can read until that is undone.
IN_MIDST = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 5")
connection.execute("BEGIN IMMEDIATE")
connection.executemany("INSERT INTO t VALUES (?)", [("x" * 3000,)] * 500)
print(flush=True)
sys.stdin.read()
"""


class Other:
    """A process in the midst of a transaction."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-c", IN_MIDST, str(path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def kill(self, _: object = None) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def db(path: Path, monkeypatch: pytest.MonkeyPatch, slept: list[Callable[[float], object]]) -> Iterator[DbWriter]:
    monkeypatch.setattr(time, "sleep", lambda seconds: slept[-1](seconds))
    with DbWriter(path, journal_mode="DELETE", readers=1) as db:
        db.run("CREATE TABLE t (n)")
        db.run("INSERT INTO t VALUES (1)")
        yield db


@pytest.fixture
def slept() -> list[Callable[[float], object]]:
    """What is called between two attempts is the last of these."""
    return [SLEEP]


def by_read(db: DbWriter) -> Any:
    return db.read_value(COUNT)


def by_function(db: DbWriter) -> Any:
    return db.read(lambda connection: connection.execute(COUNT).fetchone()[0])


def by_reader(db: DbWriter) -> Any:
    with db.reader(timeout=None) as connection:
        return connection.execute(COUNT).fetchone()[0]


def by_backup(db: DbWriter) -> Any:
    target = sqlite3.connect(":memory:")
    try:
        db.backup(target)
        return target.execute(COUNT).fetchone()[0]
    finally:
        target.close()


def by_task(db: DbWriter) -> Any:
    async def count() -> Any:
        async with AsyncDbWriter.wrap(db).reader() as reader:
            return (await reader.execute(COUNT)).fetchone()[0]

    return asyncio.run(count())


@pytest.mark.parametrize("is_known", [True, False], ids=["a connection that is there", "a new one"])
@pytest.mark.parametrize("read", [by_read, by_function, by_reader, by_backup, by_task], ids=lambda way: way.__name__)
def test_a_read_that_waits_for_a_commit_goes_on_if_that_process_is_killed(
    db: DbWriter, path: Path, slept: list[Callable[[float], object]], read: Callable[[DbWriter], Any], is_known: bool
) -> None:
    if is_known:
        by_read(db)
    other = Other(path)
    killed: list[float] = []

    def kill(seconds: float) -> None:
        slept.append(SLEEP)
        killed.append(seconds)
        other.kill()

    slept.append(kill)  # the read has met the lock, and waits for it
    assert read(db) == 1
    assert killed


def test_what_the_writer_cannot_undo_is_told_at_once(db: DbWriter, path: Path) -> None:
    by_read(db)
    Other(path).kill()

    def fail() -> None:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
        raise error

    control: Any = session_of(db).control
    control["BEGIN IMMEDIATE"] = fail
    with pytest.raises(sqlite3.OperationalError, match="disk"):
        by_read(db)
    del control["BEGIN IMMEDIATE"]
    assert by_read(db) == 1


def test_the_writer_is_asked_for_one_at_a_time(db: DbWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    help_ = Recovery(state_of(db), lambda job, timeout: asked.append(job))
    first: Any = help_.ask(None)
    assert [help_.ask(None), help_.ask(first)] == [first, first]
    first.cancel()  # so it is over
    monkeypatch.setattr(recovery, "PAUSE", 3600.0)
    assert help_.ask(first) is None
    monkeypatch.setattr(recovery, "PAUSE", 0.0)
    locked = sqlite3.OperationalError("database is locked")
    locked.sqlite_errorcode = sqlite3.SQLITE_BUSY
    second = help_.ask(SimpleNamespace(done=lambda: True, cancelled=lambda: False, failed_with=locked))
    assert asked == [first, second]
    assert help_.ask(SimpleNamespace(done=lambda: True, cancelled=lambda: True, failed_with=LookupError())) is second


def test_that_a_gateway_is_closed_is_not_raised_in_a_read_that_goes_on(db: DbWriter) -> None:
    def refuse(job: object, timeout: float | None) -> None:
        raise WriterClosedError("closed")

    assert Recovery(state_of(db), refuse).ask(None) is not None

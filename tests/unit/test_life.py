"""The ends of a gateway's life: without close, by signals, by being dropped, and while somebody else has the lock."""

from __future__ import annotations

import contextlib
import gc
import json
import re
import signal
import sqlite3
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import DEADLINE, holding_lock, parked, run_child
from onewriter import DbWriter

PRELUDE = """
import json, logging, os, signal, sys, threading
from onewriter import DbWriter

path = {path!r}
logging.basicConfig(format="%(levelname)s %(message)s")
INSERT = "INSERT INTO t VALUES (?)"
"""
OPEN = """
db = DbWriter(path, label="ledger")
"""


def child_code(path: Path, code: str) -> str:
    return PRELUDE.format(path=str(path)) + code


@pytest.fixture
def table(path: Path) -> Path:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE t (n INTEGER)")
    return path


def rows_in(path: Path) -> list[Any]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return [n for (n,) in connection.execute("SELECT n FROM t ORDER BY rowid")]


# Exit without close ---------------------------------------------------------------------------------------------------

FILL = """
for n in range(3000):
    db.enqueue(INSERT, (n,))
"""


def test_what_was_accepted_is_written_when_the_program_falls_off_its_end(table: Path) -> None:
    child = run_child(child_code(table, OPEN + FILL))
    assert child.returncode == 0, child.stderr
    assert rows_in(table) == list(range(3000))


def test_sys_exit_keeps_its_code_and_what_was_accepted_is_written(table: Path) -> None:
    child = run_child(child_code(table, OPEN + FILL + "sys.exit(3)"))
    assert child.returncode == 3, child.stderr
    assert rows_in(table) == list(range(3000))


def test_an_uncaught_exception_ends_with_code_1_and_what_was_accepted_is_written(table: Path) -> None:
    child = run_child(child_code(table, OPEN + FILL + "raise LookupError('the cause')"))
    assert child.returncode == 1
    assert "LookupError: the cause" in child.stderr
    assert rows_in(table) == list(range(3000))


def test_an_interrupt_of_an_idle_program_leaves_what_was_accepted_written(table: Path) -> None:
    child = run_child(child_code(table, OPEN + FILL + "signal.raise_signal(signal.SIGINT)"))
    assert child.returncode == -signal.SIGINT, child.stderr
    assert "KeyboardInterrupt" in child.stderr
    assert rows_in(table) == list(range(3000))


def test_an_interrupt_frees_the_caller_of_run_and_the_job_that_has_started_is_committed(table: Path) -> None:
    code = """
interrupted = threading.Event()

def interrupt(tx):
    os.kill(os.getpid(), signal.SIGINT)
    print(interrupted.wait(30), flush=True)
    tx.execute(INSERT, (1,))

try:
    db.run(interrupt, timeout=60)
except KeyboardInterrupt:
    interrupted.set()
    raise
"""
    child = run_child(child_code(table, OPEN + code))
    assert child.returncode == -signal.SIGINT, child.stderr
    assert child.stdout.split() == ["True"]
    assert rows_in(table) == [1]


def test_a_gateway_works_after_an_interrupt_that_was_caught(table: Path) -> None:
    """The interrupted call may have left nothing behind that keeps the next one waiting."""
    code = """
interrupted = threading.Event()

def interrupt(tx):
    os.kill(os.getpid(), signal.SIGINT)
    interrupted.wait(30)

for n in range(20):
    interrupted.clear()
    try:
        db.run(interrupt, timeout=60)
    except KeyboardInterrupt:
        interrupted.set()
    db.run(INSERT, (n,), timeout=30)
db.close(timeout=30)
"""
    child = run_child(child_code(table, OPEN + code))
    assert child.returncode == 0, child.stderr
    assert rows_in(table) == list(range(20))


def test_a_thread_that_outlives_the_main_thread_can_still_write(table: Path) -> None:
    code = """
def work():
    threading.main_thread().join()
    for n in range(100):
        db.enqueue(INSERT, (n,))
    db.run(INSERT, (100,), timeout=30)
    for n in range(101, 200):
        db.enqueue(INSERT, (n,))

threading.Thread(target=work).start()
"""
    child = run_child(child_code(table, OPEN + code))
    assert child.returncode == 0, child.stderr
    assert rows_in(table) == list(range(200))


# Exits that cannot write everything -----------------------------------------------------------------------------------


def critical_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("CRITICAL ")]


def test_an_exit_while_somebody_else_has_the_lock_ends_and_tells_what_was_not_written(table: Path) -> None:
    code = """
db = DbWriter(path, label="ledger", lock_timeout=1.0)
for n in range(5):
    db.enqueue(INSERT, (n,), label="booking")
print("accepted")
"""
    with holding_lock(table):
        child = run_child(child_code(table, code))
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == ["accepted"]
    told = "\n".join(critical_lines(child.stderr))
    assert "booking" in told
    assert re.search(r"\b5\b", told)
    assert rows_in(table) == []


def test_an_exit_with_a_job_that_never_returns_ends_and_tells_what_was_not_written(table: Path) -> None:
    code = """
db = DbWriter(path, label="ledger", lock_timeout=1.0)
db.run(INSERT, (0,))
entered = threading.Event()

def stay(tx):
    entered.set()
    threading.Event().wait()

db.enqueue(stay, label="endless")
entered.wait(30)
for n in range(4):
    db.enqueue(INSERT, (n,), label="booking")
sys.exit(7)
"""
    child = run_child(child_code(table, code))
    assert child.returncode == 7, child.stderr
    told = "\n".join(critical_lines(child.stderr))
    assert "endless" in told
    assert "booking" in told
    assert re.search(r"\b[45]\b", told)
    assert rows_in(table) == [0]


def test_the_drain_at_exit_goes_on_for_longer_than_lock_timeout_while_jobs_finish(table: Path) -> None:
    code = """
db = DbWriter(path, lock_timeout=0.5)
never = threading.Event()
for n in range(8):
    db.enqueue(lambda tx, n=n: (never.wait(0.2), tx.execute(INSERT, (n,))) and None)
"""
    child = run_child(child_code(table, code))
    assert child.returncode == 0, child.stderr
    assert critical_lines(child.stderr) == []
    assert rows_in(table) == list(range(8))


# Dropped --------------------------------------------------------------------------------------------------------------


def test_a_gateway_that_is_dropped_without_close_warns_writes_what_it_accepted_and_ends_its_threads(
    table: Path,
) -> None:
    code = """
import gc, warnings

at_start = set(threading.enumerate())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    db = DbWriter(path, label="ledger")
    db.read("SELECT * FROM t")
    for n in range(100):
        db.enqueue(INSERT, (n,))
    del db
    gc.collect()
    for thread in set(threading.enumerate()) - at_start:
        thread.join(30)
left = sorted(thread.name for thread in set(threading.enumerate()) - at_start)
told = [warning.category.__name__ for warning in caught]
print(json.dumps({"left": left, "told": told}))
"""
    child = run_child(child_code(table, code))
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    assert found["left"] == []
    assert found["told"] == ["ResourceWarning"]
    assert rows_in(table) == list(range(100))


def test_a_ticket_of_a_dropped_gateway_still_gets_its_outcome(table: Path) -> None:
    code = """
import warnings

warnings.simplefilter("ignore", ResourceWarning)
db = DbWriter(path)
ticket = db.enqueue("INSERT INTO t VALUES (1) RETURNING n")
del db
print(ticket.result(timeout=30).rows)
"""
    child = run_child(child_code(table, code))
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() == "[(1,)]"


# Private files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [":memory:", ""])
def test_a_private_database_is_a_file_that_close_removes(name: str) -> None:
    with DbWriter(name) as db:
        file = Path(db.path)
        db.run("CREATE TABLE t (n INTEGER)")
        db.run("INSERT INTO t VALUES (1)")
        assert db.read("SELECT n FROM t") == [(1,)]
        assert file.exists()
    assert not list(file.parent.glob(file.name + "*"))


def test_a_private_database_is_removed_at_an_exit_without_close() -> None:
    code = """
from onewriter import DbWriter

db = DbWriter(":memory:")
db.run("CREATE TABLE t (n INTEGER)")
db.enqueue("INSERT INTO t VALUES (1)")
print(db.path)
"""
    child = run_child(code)
    assert child.returncode == 0, child.stderr
    file = Path(child.stdout.strip())
    assert file.name
    assert not list(file.parent.glob(file.name + "*"))


def test_closing_says_what_it_withdrew_and_nothing_if_that_is_nothing(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    DbWriter(path).close(drain=False)
    assert caplog.messages == []
    db = DbWriter(path)
    with parked(db) as release:
        db.enqueue("SELECT 1")
        threading.Timer(0.05, release.set).start()
        report = db.close(drain=False)
    assert report.cancelled == 1
    assert [message for message in caplog.messages if "withdrew" in message] == ["app.db: close withdrew 1 queued jobs"]


@pytest.mark.parametrize("inline", [False, True])
def test_a_temporary_database_that_cannot_be_opened_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inline: bool
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail(connection: sqlite3.Connection, readonly: bool) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        DbWriter(":memory:", on_connect=fail, inline=inline)
    assert list(tmp_path.iterdir()) == []


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

"""A COMMIT whose fsync failed has an unknown outcome: it is told so, and the gateway goes out of service."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PRELUDE = """
import json, sys, threading
from onewriter import CommitUnknownError, DbWriter, WriterBrokenError

def describe(error):
    cause = error.__cause__
    return {
        "type": type(error).__name__,
        "identity": id(error),
        "cause": None if cause is None else type(cause).__name__,
        "code": getattr(cause, "sqlite_errorname", None),
    }

def error_of(call):
    try:
        call()
    except Exception as error:
        errors.append(error)  # kept, so that no two have the same id
        return describe(error)
    return None

errors = []
found = {}
db = DbWriter(sys.argv[1], on_error=lambda ticket: None)
INSERT = "INSERT INTO t VALUES (?)"
"""
LATER = """
found["later"] = [
    error_of(lambda: db.run(INSERT, (900,))),
    error_of(lambda: db.run(lambda tx: None)),
    error_of(lambda: db.run_many(INSERT, [(901,)])),
    error_of(lambda: db.enqueue(INSERT, (902,)).result(timeout=30)),
    error_of(lambda: db.flush(timeout=30)),
]
found["health"] = db.health
db.close(timeout=30)
found["closed"] = db.closed
print(json.dumps(found))
"""
# The parked job writes nothing, so that its COMMIT has nothing to sync. Whoever runs waits in a thread of its own;
# the parked job lets go when all six are in the queue.
A_BATCH = (
    PRELUDE
    + """
entered, release = threading.Event(), threading.Event()

def park(tx):
    entered.set()
    release.wait(30)

parking = db.enqueue(park)
entered.wait(30)
tickets = [db.enqueue(INSERT, (n,)) for n in range(5)]
threading.Timer(0.5, release.set).start()
found["run"] = error_of(lambda: db.run(INSERT, (5,)))
found["batch"] = [error_of(lambda: ticket.result(timeout=30)) for ticket in tickets]
found["parked"] = error_of(lambda: parking.result(timeout=30))
"""
    + LATER
)
RUNS = (
    PRELUDE
    + """
found["acknowledged"] = []
for n in range(100):
    error = error_of(lambda: db.run(INSERT, (n,)))
    if error is not None:
        found["run"] = error
        break
    found["acknowledged"].append(n)
"""
    + LATER
)

ALONE = (
    PRELUDE
    + """
found["alone"] = error_of(lambda: db.run_without_transaction(INSERT, (1,)))
"""
    + LATER
)


def strace_or_skip() -> str:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace, which is not installed")
    probe = subprocess.run([strace, "-f", "-o", os.devnull, "true"], capture_output=True, timeout=30, check=False)
    if probe.returncode != 0:
        pytest.skip("strace may not trace here (ptrace is refused)")
    return strace


@pytest.fixture
def table(path: Path) -> Path:
    """A database in WAL mode with a table, so that a child that opens it has nothing to sync yet."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY)")
    return path


def found_by(code: str, path: Path, first: int) -> dict[str, Any]:
    """What ``code`` printed, when each sync of the WAL from the ``first`` on fails with an I/O error."""
    command = [
        *(strace_or_skip(), "-f", "-qq", "-o", os.devnull, "-P", f"{path}-wal"),
        *("-e", "trace=fdatasync,fsync", "-e", f"inject=fdatasync,fsync:error=EIO:when={first}+"),
        *(sys.executable, "-c", code, str(path)),
    ]
    child = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert child.returncode == 0, child.stderr
    found: dict[str, Any] = json.loads(child.stdout)
    return found


def check_out_of_service(found: dict[str, Any]) -> None:
    """Everything later is refused, says why, and each refusal is an object of its own; close works."""
    assert [error["type"] for error in found["later"]] == ["WriterBrokenError"] * 5
    assert None not in [error["cause"] for error in found["later"]]
    assert len({error["identity"] for error in found["later"]}) == 5
    assert found["health"].startswith("broken")
    assert found["closed"]


def test_every_job_of_a_batch_whose_sync_failed_gets_its_own_commit_unknown_error(table: Path) -> None:
    found = found_by(A_BATCH, table, first=1)
    unknown = [found["run"], *found["batch"]]
    assert [error["type"] for error in unknown] == ["CommitUnknownError"] * 6
    assert {(error["cause"], error["code"]) for error in unknown} == {("OperationalError", "SQLITE_IOERR_FSYNC")}
    assert len({error["identity"] for error in unknown}) == 6
    check_out_of_service(found)


def test_a_lone_statement_whose_sync_failed_is_unknown_too(table: Path) -> None:
    found = found_by(ALONE, table, first=1)
    assert (found["alone"]["type"], found["alone"]["code"]) == ("CommitUnknownError", "SQLITE_IOERR_FSYNC")
    check_out_of_service(found)


def test_what_was_acknowledged_before_a_failed_sync_is_there(table: Path) -> None:
    found = found_by(RUNS, table, first=6)
    assert found["run"]["type"] == "CommitUnknownError"
    assert found["run"]["code"] == "SQLITE_IOERR_FSYNC"
    check_out_of_service(found)
    acknowledged = found["acknowledged"]
    assert acknowledged
    with contextlib.closing(sqlite3.connect(table)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        rows = [n for (n,) in connection.execute("SELECT id FROM t ORDER BY id")]
    # The write that failed may be there or not; nothing behind it may.
    assert rows in (acknowledged, [*acknowledged, len(acknowledged)])

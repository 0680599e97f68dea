"""Several processes, each with a gateway of its own, on one file."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import DEADLINE
from onewriter import DbWriter

OPEN_TOGETHER = """
import os, sys
from onewriter import DbWriter
for number in range(int(sys.argv[2])):
    sys.stdin.readline()  # all at once
    with DbWriter(f"{sys.argv[1]}-{number}", journal_mode=sys.argv[3]) as db:
        db.run("CREATE TABLE IF NOT EXISTS t (n)")
        db.run("INSERT INTO t VALUES (1)")
    print("done", flush=True)
"""

COUNT = """
import sys
from onewriter import DbWriter
with DbWriter(sys.argv[1]) as db:
    for _ in range(int(sys.argv[2])):
        with db.transaction() as tx:
            n = tx.execute("SELECT n FROM counter").fetchone()[0]
            tx.execute("UPDATE counter SET n = ?", (n + 1,))
"""

HOLD = """
import sys, time
from onewriter import DbWriter
db = DbWriter(sys.argv[1])
with db.transaction() as tx:
    tx.execute("INSERT INTO t VALUES (-1)")
    print("held", flush=True)
    time.sleep(60)
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_eight_processes_that_open_a_new_file_at_once_all_succeed(path: Path, mode: Any) -> None:
    rounds = 10
    processes = [start(OPEN_TOGETHER, path, rounds, mode) for _ in range(8)]
    for _ in range(rounds):
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "done\n", process.communicate(timeout=DEADLINE)
    for process in processes:
        _, errors = process.communicate(timeout=DEADLINE)
        assert process.returncode == 0, errors
        assert "Error" not in errors  # that one waits for a lock may be told
    for number in range(rounds):
        with contextlib.closing(sqlite3.connect(f"{path}-{number}")) as connection:
            assert connection.execute("SELECT count(*) FROM t").fetchone() == (8,)


def test_blocks_of_four_processes_that_read_and_then_write_lose_no_update(path: Path) -> None:
    with DbWriter(path) as db:
        db.run("CREATE TABLE counter (n)")
        db.run("INSERT INTO counter VALUES (0)")
        processes = [start(COUNT, path, 100) for _ in range(4)]
        for process in processes:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
        assert db.read_value("SELECT n FROM counter") == 400


def test_a_holder_that_is_killed_lets_the_others_go_on_at_once(path: Path) -> None:
    with DbWriter(path, lock_timeout=DEADLINE) as db:
        db.run("CREATE TABLE t (n)")
        for how in (signal.SIGKILL, signal.SIGSTOP):
            holder = start(HOLD, path)
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            holder.send_signal(how)
            ticket = db.enqueue("INSERT INTO t VALUES (1)")
            if how == signal.SIGSTOP:
                with pytest.raises(TimeoutError, match=f"held by process {holder.pid}"):
                    ticket.result(0.2)
                holder.kill()
            ticket.result(DEADLINE)
            holder.communicate(timeout=DEADLINE)
        assert db.read("SELECT n FROM t") == [(1,), (1,)]


def test_what_another_process_changes_is_seen(path: Path) -> None:
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        db.run("INSERT INTO t VALUES (1)")
        for change in (
            "ALTER TABLE t ADD COLUMN m",
            "CREATE TABLE other (n)",
            "VACUUM",
            "PRAGMA wal_checkpoint(TRUNCATE)",
            "DROP TABLE other",
        ):
            code = "import sqlite3, sys; sqlite3.connect(sys.argv[1], isolation_level=None).execute(sys.argv[2])"
            subprocess.run([sys.executable, "-c", code, str(path), change], check=True, timeout=60)
            db.run("INSERT INTO t (n) VALUES (2)")
            db.enqueue("INSERT INTO t (n) VALUES (3)").result(DEADLINE)
            assert db.read_value("SELECT max(n) FROM t") == 3
        assert len(db.read_one("SELECT * FROM t")) == 2
        assert db.read_value("SELECT count(*) FROM t") == 11

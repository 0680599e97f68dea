"""A program that forks while its gateway is open."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from helpers import run_child

PROGRAM = """
import os, sys, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from onewriter import DbWriter, ForkedError

def in_child(db):
    for call in (lambda: db.run("INSERT INTO t VALUES (-1)"), lambda: db.read("SELECT 1")):
        try:
            call()
        except ForkedError:
            pass
        else:
            os._exit(9)

with DbWriter({path!r}) as db:
    db.run("CREATE TABLE t (n)")
    db.run("INSERT INTO t VALUES (0)")
    release = threading.Event()
    db.enqueue(lambda tx: release.wait(20) and None)
    for n in range(1, 501):
        db.enqueue("INSERT INTO t VALUES (?)", (n,))  # pending at the fork
    pid = os.fork()
    if pid == 0:
        in_child(db)
        {leave}
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == {code}
    release.set()
    for n in range(501, 601):
        db.run("INSERT INTO t VALUES (?)", (n,))
"""


@pytest.mark.parametrize(("leave", "code"), [("sys.exit(0)", 0), ("sys.exit(7)", 7), ("os._exit(0)", 0)])
def test_a_child_is_told_and_the_parents_pending_writes_happen_once(path: Path, leave: str, code: int) -> None:
    child = run_child(PROGRAM.format(path=str(path), leave=leave, code=code))
    assert child.returncode == 0, child.stderr
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("SELECT n FROM t ORDER BY n").fetchall() == [(n,) for n in range(601)]

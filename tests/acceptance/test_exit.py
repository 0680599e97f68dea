"""The ends of a program: nothing that was accepted is lost, and nothing keeps it from ending."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from helpers import HEARS_INTERRUPTS, run_child

OPEN = """
import signal, sys, threading
from onewriter import DbWriter
db = DbWriter({path!r})
db.run("CREATE TABLE t (n INTEGER)")
"""


def rows_in(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("SELECT count(*) FROM t").fetchone()[0])


def test_an_open_block_is_rolled_back_at_exit_and_holds_nothing_up(path: Path) -> None:
    code = 'block = db.transaction(); tx = block.__enter__(); tx.execute("INSERT INTO t VALUES (1)")'
    child = run_child(OPEN.format(path=str(path)) + code)
    assert (child.returncode, rows_in(path)) == (0, 0), child.stderr


def test_a_program_that_forgets_to_close_ends(path: Path) -> None:
    child = run_child(OPEN.format(path=str(path)) + 'db.run("INSERT INTO t VALUES (1)")')
    assert (child.returncode, rows_in(path)) == (0, 1), child.stderr


IDLE = """
print("ready", flush=True)
threading.Event().wait(30)
"""
WAITING = """
entered = threading.Event()
def stay(tx):
    print("ready", flush=True)
    threading.Event().wait(2)
db.run(stay, timeout=None)
"""


@pytest.mark.parametrize("code", [IDLE, WAITING], ids=["idle", "waiting in run"])
def test_an_interrupt_ends_the_program(path: Path, code: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HEARS_INTERRUPTS + OPEN.format(path=str(path)) + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        _, told = child.communicate(timeout=30)
    assert "KeyboardInterrupt" in told
    assert child.returncode == -signal.SIGINT

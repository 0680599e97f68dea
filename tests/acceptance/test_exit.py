"""The ends of a program: nothing that was accepted is lost, and nothing keeps it from ending."""

from __future__ import annotations

import gc
import signal
import sqlite3
import subprocess
import sys
import threading
import weakref
from contextlib import closing
from pathlib import Path

import pytest

from helpers import HEARS_INTERRUPTS, run_child
from onewriter import DbWriter

OPEN = """
import signal, sys, threading
from onewriter import DbWriter
db = DbWriter({path!r})
db.run("CREATE TABLE t (n INTEGER)")
"""
FILL = """
for n in range(3000):
    db.enqueue("INSERT INTO t VALUES (?)", (n,))
"""
LATE = """
def work():
    threading.main_thread().join()
    threading.Event().wait(0.5)
    db.enqueue("INSERT INTO t VALUES (0)")
threading.Thread(target=work).start()
"""


def rows_in(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("SELECT count(*) FROM t").fetchone()[0])


@pytest.mark.parametrize(
    ("code", "rows", "status"),
    [
        (FILL, 3000, 0),
        (FILL + "sys.exit(3)", 3000, 3),
        (FILL + "raise LookupError", 3000, 1),
        (LATE, 1, 0),
        (FILL + LATE, 3001, 0),
    ],
    ids=["falls off its end", "sys.exit", "exception", "late thread", "both"],
)
def test_what_was_accepted_is_written_at_exit(path: Path, code: str, rows: int, status: int) -> None:
    child = run_child(OPEN.format(path=str(path)) + code)
    assert (child.returncode, rows_in(path)) == (status, rows), child.stderr


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


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_gateway_that_is_dropped_ends_its_threads(path: Path) -> None:
    before = set(threading.enumerate())
    db = DbWriter(path)
    db.run("CREATE TABLE t (n INTEGER)")
    ticket = db.enqueue("INSERT INTO t VALUES (1)")
    writer = next(iter(set(threading.enumerate()) - before))
    gone = weakref.ref(db)
    del db
    gc.collect()
    assert gone() is None
    writer.join(30)
    assert not writer.is_alive()
    assert ticket.done()
    assert rows_in(path) == 1

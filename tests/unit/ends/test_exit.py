"""Leaving the interpreter without close: what was accepted is written, or told, and nothing keeps it from ending."""

from __future__ import annotations

import contextlib
import re
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import DEADLINE, child_code, holding_lock, rows_in, run_child
from onewriter.ends.exit import HOOKS

OPEN = """
db = DbWriter(path, label="ledger")
"""

FILL = """
for n in range(3000):
    db.enqueue(INSERT, (n,))
"""


def test_what_was_accepted_is_written_when_the_program_falls_off_its_end(table: Path) -> None:
    child = run_child(child_code(table, OPEN + FILL))
    assert child.returncode == 0, child.stderr
    assert rows_in(table) == list(range(3000))


def test_one_that_had_no_thread_to_open_with_keeps_no_other_from_writing_what_it_accepted(table: Path) -> None:
    code = """
def no_thread(thread):
    raise RuntimeError("can't start new thread")

start, threading.Thread.start = threading.Thread.start, no_thread
try:
    DbWriter(path)
except RuntimeError as error:
    print(error)
threading.Thread.start = start
"""
    child = run_child(child_code(table, code + OPEN + FILL))
    assert (child.stdout, child.stderr, child.returncode) == ("can't start new thread\n", "", 0)
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


@pytest.mark.parametrize("handler", ["signal.default_int_handler", "lambda number, frame: sys.exit(3)"])
def test_signals_while_what_was_accepted_is_written_keep_nothing_from_that(table: Path, handler: str) -> None:
    code = f"""
import atexit
signal.signal(signal.SIGINT, {handler})
leaving = threading.Event()

def write(tx):
    leaving.wait({DEADLINE})
    os.kill(os.getpid(), signal.SIGINT)
    tx.execute(INSERT, (1,))

other = DbWriter(path + ".other")
other.run("CREATE TABLE t (n)")
for _ in range(20):
    db.enqueue(write)
    other.enqueue(write)
atexit.register(leaving.set)
"""
    child = run_child(child_code(table, OPEN + code))
    assert "Exception ignored" in child.stderr
    assert child.returncode == 0, child.stderr
    assert rows_in(table) == rows_in(table.with_name(f"{table.name}.other")) == [1] * 20


def test_more_signals_than_the_interpreter_has_hooks_of_ours_keep_nothing_from_being_written(table: Path) -> None:
    code = f"""
import atexit
handled = threading.Event()

def handle(number, frame):
    handled.set()
    raise KeyboardInterrupt

def write(tx):
    leaving.wait({DEADLINE})
    handled.clear()
    os.kill(os.getpid(), signal.SIGINT)
    handled.wait({DEADLINE})
    tx.execute(INSERT, (1,))

leaving = threading.Event()
signal.signal(signal.SIGINT, handle)
for _ in range({2 * HOOKS}):
    db.enqueue(write)
atexit.register(leaving.set)
"""
    child = run_child(child_code(table, OPEN + code))
    assert child.returncode == 0, child.stderr
    assert rows_in(table) == [1] * (2 * HOOKS)


@pytest.mark.parametrize("before", ["", FILL], ids=["idle", "beside the drain"])
def test_a_thread_that_outlives_the_main_thread_can_still_write(table: Path, before: str) -> None:
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
    child = run_child(child_code(table, OPEN + before + code))
    assert child.returncode == 0, child.stderr
    assert rows_in(table) == [*range(3000 if before else 0), *range(200)]


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
    assert "for SQLite's lock, held elsewhere" in told
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


LEFT_OPEN = """
import sys
from onewriter import DbWriter
inline = DbWriter({path!r} + ".inline", inline=True, lock_timeout=0.5)
kept = inline.transaction()
kept.__enter__()
db = DbWriter({path!r})
db.run("CREATE TABLE t (n)")
for n in range(100):
    db.enqueue("INSERT INTO t VALUES (?)", (n,))
sys.exit(7)
"""


def test_an_inline_block_left_open_at_exit_keeps_no_other_gateway_from_writing(path: Path) -> None:
    child = run_child(LEFT_OPEN.format(path=str(path)))
    assert child.returncode == 7, child.stderr
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (100,)


GOES_ON = """
import asyncio
from helpers import writer_of
from onewriter import AsyncDbWriter

inside, looked = threading.Event(), threading.Event()
look = writer_of(db).end_block_at_exit

def look_and_tell():
    look()
    looked.set()

def in_thread():
    with db.transaction() as tx:
        tx.execute(INSERT, (1,))
        inside.set()
        looked.wait(30)
        tx.execute(INSERT, (2,))

async def in_task():
    async with AsyncDbWriter.wrap(db).transaction() as tx:
        await tx.execute(INSERT, (1,))
        inside.set()
        while not looked.is_set():  # a thread of asyncio's would be joined before the look
            await asyncio.sleep(0.01)
        await tx.execute(INSERT, (2,))

writer_of(db).end_block_at_exit = look_and_tell
threading.Thread(target=lambda: WORK, daemon=True).start()
inside.wait(30)
"""


@pytest.mark.parametrize("work", ["in_thread()", "asyncio.run(in_task())"])
def test_a_block_whose_thread_or_loop_goes_on_at_exit_comes_to_its_own_end(table: Path, work: str) -> None:
    child = run_child(child_code(table, OPEN + GOES_ON.replace("WORK", work)))
    assert child.returncode == 0, child.stderr
    assert rows_in(table) == [1, 2]


def test_an_interrupt_outside_of_what_catches_it_is_followed_by_the_rest_of_the_drain(table: Path) -> None:
    code = """
from onewriter.ends import exit

class Open(dict):
    def copy(self):
        exit._open = was
        raise KeyboardInterrupt

was, exit._open = exit._open, Open()
"""
    child = run_child(child_code(table, OPEN + code + FILL))
    assert "KeyboardInterrupt" in child.stderr
    assert rows_in(table) == list(range(3000))


def test_a_drain_is_given_up_once(table: Path) -> None:
    code = """
import logging
logging.basicConfig()
db = DbWriter(path, lock_timeout=0.05)
db.enqueue(lambda tx: threading.Event().wait())
"""
    child = run_child(child_code(table, code))
    assert child.stderr.count("were not written at exit") == 1


def test_a_tasks_block_whose_loop_stands_still_holds_up_nothing(table: Path) -> None:
    code = """
import asyncio
loop = asyncio.new_event_loop()
entry = AsyncDbWriter.wrap(db).transaction()
tx = loop.run_until_complete(entry.__aenter__())
db.enqueue(INSERT, (1,))
"""
    child = run_child(child_code(table, OPEN + "from onewriter import AsyncDbWriter" + code))
    assert "not written" not in child.stderr
    assert rows_in(table) == [1]


def test_what_is_opened_behind_the_hooks_of_the_gateway_writes_at_once(table: Path) -> None:
    """Handlers that were registered before ``import onewriter`` run behind them: nobody would drain a queue."""
    code = f"""
import atexit, threading

def write():
    db = DbWriter({str(table)!r})
    tickets = [db.enqueue("INSERT INTO t VALUES (?)", (n,)) for n in range(100)]
    print(all(ticket.done() for ticket in tickets), threading.active_count())

atexit.register(write)
from onewriter import DbWriter
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=DEADLINE)
    assert child.stdout.split() == ["True", "1"], child.stderr
    assert rows_in(table) == list(range(100))

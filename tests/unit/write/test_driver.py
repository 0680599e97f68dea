"""A gateway without a thread: the calling threads take turns as the writer."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helpers import DEADLINE, child_code, driver_of, eventually, raises, rows, run_child
from onewriter import DbWriter, Ticket, WriteTimeoutError
from onewriter.core import Core
from onewriter.errors import closed_error
from onewriter.options import Options
from onewriter.write.driver import InlineDriver

INSERT = "INSERT INTO t VALUES (?)"


def test_inline_a_block_of_another_thread_is_waited_for(path: Path) -> None:
    with DbWriter(path, inline=True) as db, ThreadPoolExecutor() as pool:
        db.run("CREATE TABLE t (n UNIQUE)")
        with db.transaction() as tx:
            tx.execute(INSERT, (1,))
            with pytest.raises(WriteTimeoutError):
                pool.submit(db.run, INSERT, (8,), timeout=0.05).result(DEADLINE)
            with pytest.raises(WriteTimeoutError):
                pool.submit(lambda: db.transaction(timeout=0.05).__enter__()).result(DEADLINE)
            waiting = pool.submit(db.run, INSERT, (2,), timeout=DEADLINE)
        waiting.result(DEADLINE)
        assert rows(db) == [1, 2]
        assert not [thread for thread in threading.enumerate() if "writer" in thread.name]


@pytest.mark.parametrize("write", ["run", "block"])
def test_inline_a_call_in_a_runaway_recursion_is_refused_before_anything_is_done(path: Path, write: str) -> None:
    def deeper(left: int) -> None:
        if left:
            deeper(left - 1)
        elif write == "run":
            db.run(INSERT, (len(done),))
        else:
            with db.transaction() as tx:
                tx.execute(INSERT, (len(done),))

    done: list[int] = []
    refused = 0
    with DbWriter(path, inline=True) as db:
        db.run("CREATE TABLE t (n UNIQUE)")
        for calls in range(sys.getrecursionlimit() - 250, sys.getrecursionlimit()):
            try:
                deeper(calls)
            except RecursionError:
                refused += 1
            else:
                done.append(len(done))
        assert db.health == "ok"
        assert done
        assert refused
        assert rows(db) == done


@pytest.mark.parametrize("inline", [False, True])
def test_nothing_is_kept_of_one_that_could_not_be_opened(path: Path, inline: bool) -> None:
    hook = raises(LookupError())
    kept = weakref.ref(hook)
    with pytest.raises(LookupError):
        DbWriter(path, on_connect=hook, inline=inline)
    del hook
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "RuntimeError"])
def test_what_a_signal_handler_raises_while_it_opens_ends_the_writer_too(path: Path, error: str) -> None:
    code = """
from helpers import eventually
from onewriter.write.writer import Writer

interrupted, enders = threading.Event(), []

def handler(*_):
    raise ERROR

def end(writer):
    enders.append(threading.current_thread().name)
    original(writer)

signal.signal(signal.SIGINT, handler)
original, Writer.end = Writer.end, end

def interrupt(connection, readonly):
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    interrupted.wait(30)

try:
    DbWriter(path, on_connect=interrupt)
except ERROR as error:
    kept = error  # and with it the frames that have what was opened
    interrupted.set()
    eventually(lambda: threading.active_count() == 1)
    print(*enders)
"""
    child = run_child(child_code(path, code.replace("ERROR", error)))
    assert (child.stdout, child.returncode) == ("app.db-writer\n", 0), child.stderr


def test_an_opening_that_waits_for_a_lock_ends_with_ctrl_c(path: Path) -> None:
    code = """
import sqlite3
from helpers import eventually

signal.signal(signal.SIGINT, signal.default_int_handler)
holder = sqlite3.connect(path, isolation_level=None)
holder.execute("BEGIN EXCLUSIVE")

def interrupt():
    # One without a number is listed too, before it runs: interrupted then, it never does, and stays listed.
    eventually(lambda: any(thread.name == "app.db-writer" and thread.ident for thread in threading.enumerate()))
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

threading.Thread(target=interrupt).start()
try:
    DbWriter(path, lock_timeout=1000.0)
except KeyboardInterrupt as error:
    kept = error
    eventually(lambda: threading.active_count() == 1)
    print("ended")
"""
    child = run_child(child_code(path, code))
    assert (child.stdout, child.returncode) == ("ended\n", 0), child.stderr


class Turn:
    """A lock in whose taking and giving something else happens, as a signal does."""

    def __init__(self, lock: Any, at: str, happens: Callable[[], None]) -> None:
        self.lock, self.at, self.happens = lock, at, happens

    def acquire(self, **options: Any) -> bool:
        taken: bool = self.lock.acquire(**options)
        self._happens("acquire")
        return taken

    def release(self) -> None:
        self.lock.release()
        self._happens("release")

    def _happens(self, at: str) -> None:
        if at == self.at:
            self.at = ""
            self.happens()


@pytest.mark.parametrize("at", ["acquire", "release"])
def test_without_a_thread_a_handler_that_comes_as_the_turn_is_taken_or_given_does_not_wait(path: Path, at: str) -> None:
    with DbWriter(path, inline=True) as db:
        db.run("CREATE TABLE t (n)")
        got: list[Ticket[Any]] = []
        driver = driver_of(db)
        assert isinstance(driver, InlineDriver)
        driver._turn = Turn(driver._turn, at, lambda: got.append(db.enqueue(INSERT, (1,), timeout=0.0)))  # type: ignore[assignment]
        db.run(INSERT, (2,))
        assert got[0].done()
        assert sorted(db.read("SELECT n FROM t")) == [(1,), (2,)]


def test_a_close_after_an_interrupted_one_waits_for_the_writer(path: Path) -> None:
    """Before Python 3.13, a ``join`` that Ctrl-C ends says of the thread that it has ended."""
    code = """
entered, release = threading.Event(), threading.Event()

def park(tx):
    entered.set()
    release.wait(30)

def handler(*_):
    raise LookupError

signal.signal(signal.SIGINT, handler)
db = DbWriter(path)
db.run("CREATE TABLE t (n)")
db.enqueue(park)
tickets = [db.enqueue("INSERT INTO t VALUES (1)") for _ in range(3)]
entered.wait(30)
threading.Timer(0.05, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)).start()
try:
    db.close()
except LookupError:
    threading.Timer(0.05, release.set).start()
    report = db.close()
    print(report.committed, report.unfinished, os.path.exists(path + "-wal"))
"""
    child = run_child(child_code(path, code))
    assert (child.stdout, child.returncode) == ("5 0 False\n", 0), child.stderr


def test_a_gateway_whose_constructor_was_interrupted_at_its_end_is_collected(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_and_fail(core: Core) -> None:
        opens(core)
        raise LookupError

    opens = Core.open
    monkeypatch.setattr(Core, "open", open_and_fail)
    with pytest.warns(ResourceWarning), pytest.raises(LookupError):
        DbWriter(path)
    eventually(lambda: not [thread for thread in threading.enumerate() if "writer" in thread.name])


def test_a_writer_that_was_given_up_before_it_has_begun_has_ended(path: Path) -> None:
    core = Core(path, Options())
    core.queue.refuse(closed_error())
    core.driver.give_up()
    assert core.driver.join(DEADLINE)
    driver: Any = core.driver
    driver._main()  # its thread, if that begins after all
    assert not path.exists()

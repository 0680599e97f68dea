"""Nothing that a job, a callback, a handler of the log or an exception object does ends or stalls the writer."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import DEADLINE, eventually, handling, in_threads, parked, raising, run_child, state_of
from onewriter import AsyncDbWriter, DbWriter, Ticket, Transaction
from onewriter.base import log, waiting
from onewriter.write import outcomes

TABLE = "CREATE TABLE t (n)"
INSERT = "INSERT INTO t VALUES (?)"
BAD = "INSERT INTO nowhere VALUES (1)"


def odd(name: str, error: type[BaseException], base: type[BaseException]) -> type[BaseException]:
    """An exception class whose ``name`` raises ``error``."""
    fail = raising(error)
    return type("Odd", (base,), {name: fail if name in METHODS else property(fail, fail)})


METHODS = ["add_note", "with_traceback", "__str__", "__repr__", "__eq__", "__hash__", "__bool__", "__getattribute__"]
METHODS += ["__setattr__", "__reduce__"]

NAMES = [*METHODS, "__class__", "__traceback__", "__notes__", "__cause__", "__context__", "args", "sqlite_errorcode"]


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("base", [Exception, BaseException, sqlite3.OperationalError])
def test_an_exception_that_raises_by_itself_fails_its_own_job_only(
    path: Path, name: str, error: type[BaseException], base: type[BaseException]
) -> None:
    kind = odd(name, error, base)

    def job(tx: Transaction) -> None:
        tx.execute(INSERT, (1,))
        raise kind

    def caught(call: Callable[[], object]) -> type[BaseException]:
        try:
            call()
        except BaseException as raised:
            return type(raised)
        return type(None)  # type: ignore[return-value]

    def in_a_block() -> None:
        with db.transaction():
            raise kind

    def callbacks(tx: Transaction) -> None:
        tx.on_commit(raise_it)

    def raise_it(*_: object) -> None:
        raise kind

    with handling(lambda record: logging.Formatter().format(record)), DbWriter(path, on_error=raise_it) as db:
        db.run(TABLE)
        assert caught(lambda: db.run(job)) is kind
        ticket = db.enqueue(job)
        db.flush()
        assert caught(ticket.result) is kind
        ticket = db.enqueue(callbacks)
        caught(lambda: ticket.add_done_callback(raise_it))  # which calls it at once, if the job is over by now
        db.run(callbacks)
        caught(in_a_block)
        db.run(INSERT, (2,))
        assert db.read("SELECT n FROM t") == [(2,)]
        assert db.health == "ok"
        stats = db.stats()
        assert (stats.failed, stats.committed) == (3, 4)


@pytest.mark.parametrize("name", ["add_note", "__class__", "__getattribute__", "__notes__"])
def test_a_task_whose_block_or_job_raises_such_an_exception_hears_of_it(path: Path, name: str) -> None:
    kind = odd(name, SystemExit, Exception)

    def job(tx: Transaction) -> None:
        raise kind

    async def main() -> None:
        async with AsyncDbWriter(path) as db:
            await db.run(TABLE)
            with pytest.raises(kind):
                await db.run(job)
            with contextlib.suppress(kind):
                async with db.transaction() as tx:
                    await tx.execute(INSERT, (1,))
                    raise kind
            await db.run(INSERT, (2,))
            assert await db.read("SELECT n FROM t") == [(2,)]

    asyncio.run(main())


STDERR = """
import os, sys, time
from onewriter import DbWriter
class Broken:
    def write(self, text): raise {error}("of stderr")
    def flush(self): raise {error}("of stderr")
db = DbWriter({path!r})
db.run("CREATE TABLE t (n)")
sys.stderr = {stderr}
db.enqueue("INSERT INTO nowhere VALUES (1)")
db.flush()
tickets = [db.enqueue("INSERT INTO t VALUES (?)", (n,)) for n in range(10)]
assert [ticket.exception(20) for ticket in tickets] == [None] * 10
assert db.health == "ok"
report = db.close(20)
assert (report.committed, report.failed, report.unfinished) == (11, 1, 0)
os.write(1, b"survived")
sys.stderr = None
"""


BROKEN = [
    ("Broken()", error) for error in ("RuntimeError", "OSError", "SystemExit", "KeyboardInterrupt", "GeneratorExit")
]
BROKEN += [(stderr, "RuntimeError") for stderr in ("None", "open(os.devnull)", "object()")]


@pytest.mark.parametrize(("stderr", "error"), BROKEN)
def test_a_stderr_that_cannot_be_written_to_is_no_trouble(path: Path, stderr: str, error: str) -> None:
    done = run_child(STDERR.format(path=str(path), stderr=stderr, error=error))
    assert (done.returncode, done.stdout) == (0, "survived"), done.stderr


def test_what_a_handler_raises_is_not_printed_to_stdout_when_there_is_no_stderr(
    db: DbWriter, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", None)
    with handling(raising(RuntimeError)):
        db.enqueue(BAD)
        db.flush(DEADLINE)
        db.close()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("error", [RuntimeError, OSError, SystemExit, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("place", ["emit", "filter", "format", "filter of the logger"])
def test_a_handler_that_raises_does_the_writer_no_harm(
    path: Path, place: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def fail(*_: object) -> bool:
        raise error("of the handler")

    class Formatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            raise error("of the formatter")

    logger = logging.getLogger("onewriter")
    with handling(fail if place == "emit" else lambda record: handler.format(record)) as handler, DbWriter(path) as db:
        if place == "filter":
            handler.addFilter(fail)
        if place == "filter of the logger":
            logger.addFilter(fail)
        if place == "format":
            handler.setFormatter(Formatter())
        try:
            db.run(TABLE)
            db.enqueue(BAD)
            db.flush()
            db.run(INSERT, (1,))
            assert db.health == "ok"
        finally:
            logger.removeFilter(fail)


def test_a_handler_that_blocks_keeps_nobody_waiting(path: Path) -> None:
    entered, release = threading.Event(), threading.Event()

    def block(record: logging.LogRecord) -> None:
        entered.set()
        release.wait(DEADLINE)

    with handling(block), DbWriter(path) as db:
        db.run(TABLE)
        for _ in range(5):
            db.enqueue(BAD)
        assert entered.wait(DEADLINE)
        for n in range(5):
            db.run(INSERT, (n,), timeout=DEADLINE / 2)
        assert db.health == "ok"
        release.set()


def test_close_gives_up_on_a_handler_that_hangs(path: Path) -> None:
    release = threading.Event()
    with handling(lambda record: release.wait(DEADLINE)):
        db = DbWriter(path)
        db.enqueue(BAD)
        assert db.close().failed == 1
        assert db.health == "closed"
        release.set()


def test_the_lock_of_a_handler_whose_owner_waits_for_room_does_not_stall_the_writer(path: Path) -> None:
    """A thread logs; the handler, locked by logging, enqueues into a full queue; the writer has to log a failure."""
    app = logging.getLogger("onewriter.app")
    waits = threading.Event()

    def store(record: logging.LogRecord) -> None:
        if record.name == app.name:
            waits.set()
        db.enqueue(INSERT, (record.getMessage(),), timeout=DEADLINE)

    with DbWriter(path, maxsize=2) as db:
        db.run(TABLE)
        with handling(store):
            with parked(db):
                db.enqueue(BAD)
                db.enqueue(INSERT, ("fills the queue",))
                thread = threading.Thread(target=app.error, args=["from the application"])
                thread.start()
                assert waits.wait(DEADLINE)
            db.flush(DEADLINE / 2)
            thread.join(DEADLINE)
            db.flush(DEADLINE / 2)
        texts = [text for (text,) in db.read("SELECT n FROM t")]
    assert {"fills the queue", "from the application"} < set(texts)
    assert any("failed" in text for text in texts)


def test_a_handler_may_write_and_wait(path: Path) -> None:
    def store(record: logging.LogRecord) -> None:
        db.run(INSERT, (record.getMessage(),))
        db.flush()

    with handling(store), DbWriter(path) as db:
        db.run(TABLE)
        db.enqueue(BAD, label="bad")
        db.flush()
        assert ["'bad'" in text for (text,) in db.read("SELECT n FROM t")] == [True]


def test_what_a_handler_enqueues_and_what_fails_is_not_told_to_it(path: Path) -> None:
    told: list[str] = []

    def store(record: logging.LogRecord) -> None:
        told.append(record.getMessage())
        db.enqueue("INSERT INTO not_there_either VALUES (1)")

    with handling(store), DbWriter(path) as db:
        db.enqueue(BAD)
        for _ in range(3):
            db.flush()
    assert len(told) == 1


@pytest.mark.parametrize("inline", [False, True])
def test_flush_and_close_return_when_the_failures_are_told(path: Path, inline: bool) -> None:
    told: list[str] = []
    with handling(lambda record: told.append(record.getMessage())):
        with DbWriter(path, inline=inline) as db:
            for n in range(50):
                db.enqueue(BAD, label=f"one {n}")
            db.flush()
            assert [text.split("'")[1] for text in told] == [f"one {n}" for n in range(50)]
            db.enqueue(BAD, label="the last")
        assert "'the last'" in told[-1]
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("app.db-")]


def test_a_task_that_flushes_hears_all_too(path: Path) -> None:
    told: list[str] = []

    async def main() -> None:
        async with AsyncDbWriter(path) as db:
            for _ in range(50):
                db.enqueue(BAD)
            await db.flush()
            assert len(told) == 50

    with handling(lambda record: told.append(record.getMessage())):
        asyncio.run(main())


def test_at_exit_what_was_reported_is_told(path: Path) -> None:
    code = f"""
import logging, time
logging.basicConfig(format="%(levelname)s %(message)s")
logging.getLogger("onewriter").addFilter(lambda record: time.sleep(0.01) or True)
from onewriter import DbWriter
db = DbWriter({str(path)!r})
for n in range(20):
    db.enqueue("INSERT INTO nowhere VALUES (1)", label=f"job {{n}}")
"""
    done = run_child(code)
    assert done.returncode == 0
    assert done.stderr.count("ERROR job 'job ") == 20, done.stderr


def test_callbacks_of_the_writer_thread_log_what_they_raise_whatever_it_is(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise SystemExit("of the callback")

    with DbWriter(path, on_error=fail) as db:
        with parked(db):
            db.enqueue("SELECT 1").add_done_callback(fail)
            db.enqueue(BAD)
        db.flush()
        db.run("SELECT 1")
    assert sum("of the callback" in (record.exc_text or "") for record in caplog.records) == 2


def test_threads_log_for_themselves(path: Path) -> None:
    told: list[str] = []
    with handling(lambda record: told.append(record.threadName or "")), DbWriter(path) as db:
        in_threads(lambda: DbWriter(path).close())  # a second one warns
        db.enqueue(BAD)
        db.flush()
    assert told[0].startswith("ThreadPool")
    assert told[1] == "app.db-log"


def test_who_has_a_later_jobs_outcome_finds_earlier_failures_in_the_log(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "MOMENT", DEADLINE)  # however slow this machine is
    with DbWriter(path) as db:
        for n in range(50):
            db.enqueue("SELECT * FROM nowhere", label=f"first {n}")
            db.run("SELECT 1")
            assert f"'first {n}'" in caplog.text
            db.enqueue("SELECT * FROM nowhere", label=f"second {n}")
            db.enqueue("SELECT 1").result(DEADLINE)
            db.enqueue("SELECT 1").result(DEADLINE)
            assert f"'second {n}'" in caplog.text


def test_a_failure_is_said_before_who_waits_for_a_later_job_of_its_batch_is_woken(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    seen: list[tuple[bool, bool]] = []

    def look_and_wake(waiters: list[Any]) -> None:
        assert reporter is not None
        seen.append((later.done(), reporter.is_behind))
        waiting.wake(waiters)

    with handling(lambda record: release.wait(DEADLINE)), DbWriter(path) as db:
        reporter = state_of(db).reporter
        with parked(db):
            db.enqueue(BAD)
            later = db.enqueue("SELECT 1")
            monkeypatch.setattr(outcomes, "wake", look_and_wake)
        later.exception(DEADLINE)
        release.set()
    assert next(is_behind for is_done, is_behind in seen if is_done)


def test_an_error_without_a_text_is_called_by_its_type() -> None:
    assert log.text_of(MemoryError()) == "MemoryError"
    assert log.text_of(MemoryError("no room")) == "no room"


def test_nothing_of_a_failure_is_kept_when_it_was_told(path: Path) -> None:
    class OwnError(Exception):
        pass

    known: list[weakref.ref[BaseException]] = []

    def fail(tx: Transaction) -> None:
        error = OwnError()
        known.append(weakref.ref(error))
        raise error

    def is_gone() -> bool:
        gc.collect()
        return known[0]() is None

    with DbWriter(path) as db, handling(lambda record: None):
        db.enqueue(fail)
        db.flush()
        eventually(is_gone)


def test_of_lines_that_a_handler_is_too_slow_for_the_critical_ones_are_said(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "MOST_LINES", 2)
    release, said = threading.Event(), list[str]()

    def say_slowly(record: logging.LogRecord) -> None:
        release.wait(DEADLINE)
        said.append(f"{record.levelname} {record.getMessage()}")

    with handling(say_slowly), DbWriter(path) as db:
        for _ in range(5):
            db.enqueue(BAD)
        eventually(lambda: db.stats().failed == 5)
        db.run(lambda tx: log.report(state_of(db), logging.CRITICAL, "it is critical"))
        release.set()
        db.flush()
    assert "CRITICAL it is critical" in said
    assert any("3 lines were dropped" in text for text in said)
    assert len(said) == 4


class Interrupted(Iterator[tuple[Any, ...]]):
    """As where a signal handler raises behind the first of ``calls``."""

    def __init__(self, *calls: tuple[Any, ...]) -> None:
        self._calls, self._left = iter(calls), 2

    def __next__(self) -> tuple[Any, ...]:
        self._left -= 1
        if not self._left:
            raise TimeoutError
        return next(self._calls)


def test_what_a_signal_handler_raises_between_two_callbacks_keeps_none_from_being_called(path: Path) -> None:
    called: list[int] = []
    with DbWriter(path) as db, pytest.raises(TimeoutError):
        log.call_all_safely(state_of(db), Interrupted(*((called.append, n) for n in range(3))))
    assert called == [0, 1, 2]


def test_an_interrupt_that_a_callback_raises_is_in_no_reference_cycle(path: Path) -> None:
    class Interrupt(KeyboardInterrupt):
        pass

    def interrupts(ticket: Ticket[Any]) -> None:
        raise Interrupt

    with DbWriter(path) as db, parked(db):
        job = db.enqueue("SELECT 1")
        job.add_done_callback(interrupts)
        gc.disable()
        try:
            job.cancel()
        except Interrupt as error:
            kept = weakref.ref(error)
        finally:
            gc.enable()
        assert kept() is None


def test_without_a_thread_for_the_log_its_lines_are_written_all_the_same(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def start_or_not(thread: threading.Thread) -> None:
        if thread.name.endswith("-log"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with DbWriter(path) as db:
        monkeypatch.setattr(threading.Thread, "start", start_or_not)
        db.enqueue(BAD)
        db.flush(DEADLINE)
    assert [record.levelname for record in caplog.records] == ["ERROR"]

"""What a signal handler raises comes out as it is, wherever it comes, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import functools
import logging
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import (
    DEADLINE,
    child_code,
    driver_of,
    eventually,
    handling,
    parked,
    pool_of,
    queue_of,
    rows_in,
    run_child,
    session_of,
    state_of,
)
from onewriter import AsyncDbWriter, DbWriter, ReentrantWriteError, Ticket, Transaction, WriterClosedError, gateway
from onewriter.base import waiting as job
from onewriter.read.pool import ReaderPool
from onewriter.sqlite.guard import Guard, ReadGuard
from onewriter.sqlite.time_limit import TimeLimit
from onewriter.write import block, driver, entry

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"

OPEN = """
db = DbWriter(path, label="ledger")
"""

TABLE = "CREATE TABLE t (n)"


class SignalError(Exception):
    """What the handler raises."""


@pytest.fixture
def alarm() -> Iterator[Callable[[], None]]:
    """Have the handler of SIGALRM raise a moment from now."""

    def handler(*_: object) -> None:
        raise SignalError

    before = signal.signal(signal.SIGALRM, handler)
    yield lambda: signal.setitimer(signal.ITIMER_REAL, 0.05) and None
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def in_a_reader(db: DbWriter) -> None:
    with db.reader() as connection:
        connection.execute(ENDLESS)


def in_a_block(db: DbWriter) -> None:
    with db.transaction(max_hold=DEADLINE) as tx:
        tx.execute(ENDLESS)


def in_a_lent_connection(db: DbWriter) -> None:
    with db.transaction(max_hold=DEADLINE) as tx:
        tx.connection.execute(ENDLESS)


# Not in a block beside the writer's thread: without a limit to ask for, SQLite runs no Python code meanwhile.
WAYS: dict[str, Callable[[DbWriter], object]] = {
    "read": lambda db: db.read(ENDLESS),
    "read of a function": lambda db: db.read(lambda connection: connection.execute(ENDLESS).fetchall()),
    "reader": in_a_reader,
    "block": in_a_block,
    "lent": in_a_lent_connection,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_slow_statement_is_ended_by_what_the_handler_raises(
    path: Path, alarm: Callable[[], None], way: Callable[[DbWriter], object]
) -> None:
    with DbWriter(path, inline=way in (in_a_block, in_a_lent_connection)) as db:
        alarm()
        with pytest.raises(SignalError):
            way(db)
        assert db.run("SELECT 1", timeout=DEADLINE).rows == [(1,)]
        assert db.read("SELECT 1") == [(1,)]
        assert db.stats().readers_in_use == 0


def test_a_cursor_whose_closing_was_interrupted_is_replaced_all_the_same(db: DbWriter) -> None:
    class Interrupted(sqlite3.Cursor):
        def execute(self, *_: Any) -> Any:
            raise sqlite3.OperationalError("interrupted")

        def close(self) -> None:
            super().close()
            raise SignalError

    executor = session_of(db).executor
    executor._cursor = Interrupted(executor._connection)
    with pytest.raises(SignalError):
        db.run("SELECT 1")
    assert db.run("SELECT 1").rows == [(1,)]


def test_a_watch_keeps_what_was_raised_where_it_answers_and_goes_on() -> None:
    answers: list[Any] = [False, SignalError(), True, False]

    def is_over() -> bool:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return bool(answer)

    watch = TimeLimit(is_over)
    said = [next(watch._answers) for _ in range(4)]
    assert said == [False, True, True, False]
    with pytest.raises(SignalError):
        watch.raise_caught()
    watch.raise_caught()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, SignalError])
def test_whoever_gives_up_waiting_for_a_block_leaves_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    def interrupted(*_: object) -> bool:
        raise kind

    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        with parked(db):
            monkeypatch.setattr(driver, "wait_in_slices", interrupted)
            with pytest.raises(kind), db.transaction():
                pytest.fail("entered")
            monkeypatch.undo()
        assert db.run("INSERT INTO t VALUES (1)", timeout=DEADLINE).rowcount == 1
        assert db.stats().cancelled == 1


@pytest.mark.parametrize("failed", [False, True])
def test_an_interrupt_as_a_block_is_left_gives_the_writer_back(
    path: Path, monkeypatch: pytest.MonkeyPatch, failed: bool
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise SignalError

    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        with pytest.raises(SignalError), db.transaction() as tx:
            tx.execute("INSERT INTO t VALUES (1)")
            monkeypatch.setattr(entry, "_end", interrupted)
            if failed:
                raise LookupError
        monkeypatch.undo()
        assert db.run("INSERT INTO t VALUES (2)", timeout=DEADLINE).rowcount == 1
        assert db.read("SELECT n FROM t") == [(2,)]


def test_a_block_whose_giving_back_was_interrupted_is_given_back_all_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revoke, interrupted = block.ThreadBlock._revoke, threading.Event()

    def interrupted_once(of: block.ThreadBlock, failed: bool) -> None:
        if not interrupted.is_set():
            interrupted.set()
            raise SignalError
        revoke(of, failed)

    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        monkeypatch.setattr(block.ThreadBlock, "_revoke", interrupted_once)
        with pytest.raises(SignalError), db.transaction() as tx:
            tx.execute("INSERT INTO t VALUES (1)")
        assert db.run("INSERT INTO t VALUES (2)", timeout=DEADLINE).rowcount == 1
        assert db.read("SELECT n FROM t") == [(2,)]


def test_callbacks_of_a_block_run_although_the_wait_for_its_end_was_interrupted(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = threading.Event()

    def interrupted(*_: object) -> None:
        raise SignalError

    with DbWriter(path) as db:
        with pytest.raises(SignalError), db.transaction() as tx:
            tx.on_commit(told.set)
            monkeypatch.setattr(driver_of(db), "leave", interrupted)
        monkeypatch.undo()
        assert told.wait(DEADLINE)


def test_an_interrupt_as_the_writer_is_woken_loses_no_wake_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DbWriter(path) as db:
        queue = queue_of(db)
        db.run("CREATE TABLE t (n)")
        db.flush()
        eventually(lambda: queue._asleep)

        def interrupted() -> None:
            raise SignalError

        monkeypatch.setattr(queue, "_wake", interrupted)
        with pytest.raises(SignalError):
            db.enqueue("INSERT INTO t VALUES (1)")
        monkeypatch.undo()
        assert db.run("INSERT INTO t VALUES (2)", timeout=DEADLINE).rowcount == 1


def test_a_connection_is_given_back_although_giving_it_back_was_interrupted(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DbWriter(path, readers=1) as db:
        end, interrupted = pool_of(db).end, []

        def interrupted_once(claim: Any) -> None:
            if claim not in interrupted:
                interrupted.append(claim)
                raise SignalError
            end(claim)

        monkeypatch.setattr(pool_of(db), "end", interrupted_once)
        for sql in ("SAVEPOINT mine", "SELECT * FROM nothing"):  # for a SELECT that does not fail nothing is called
            with pytest.raises(SignalError):
                db.read(sql)
        with pytest.raises(SignalError):
            db.read(lambda connection: None)
        with pytest.raises(SignalError), db.reader():
            pass
        monkeypatch.undo()
        assert db.read("SELECT 1", timeout=DEADLINE) == [(1,)]


def test_a_statement_that_was_refused_only_because_of_an_interrupt_is_an_interrupt(db: DbWriter) -> None:
    """The handler raised before the first line of the authorizer, and sqlite3 made "not authorized" of it."""

    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    for sql in ("SELECT 1", "SELECT * FROM pragma_table_info('sqlite_schema')"):
        with pytest.raises(KeyboardInterrupt), db.reader() as connection:
            reader = connection._loan.reader  # type: ignore[attr-defined]
            reader.guard.authorizer, reader.guard._answers = functools.lru_cache(maxsize=0)(interrupted), 0
            reader.connection.set_authorizer(reader.guard.authorizer)
            connection.execute(sql)
    with pytest.raises(sqlite3.DatabaseError, match="not authorized") as caught:
        db.read("ATTACH 'other.db' AS other")
    assert caught.value.__notes__ == ["onewriter: a reader cannot ATTACH, DETACH or VACUUM"]


class _HandlerError(Exception):
    """What a signal handler of the application raises."""


def test_what_a_handler_raises_while_sqlite_asks_comes_out_of_an_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decide(self: Guard, action: int, *_: object) -> int:
        raise _HandlerError

    with monkeypatch.context() as patch, pytest.raises(_HandlerError):
        patch.setattr(Guard, "decide", decide)
        DbWriter(tmp_path / "app.db", inline=True)
    with DbWriter(tmp_path / "app.db", inline=True) as db:  # nothing was left behind
        assert db.run("SELECT 1").rows == [(1,)]


def test_what_a_handler_raises_while_sqlite_asks_comes_out_also_of_a_table_valued_pragma(
    any_db: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite keeps the text of the refusal alone, without its code, before version 3.41."""

    def decide(self: object, action: int, first: str | None, second: str | None, third: str | None) -> int:
        if action == sqlite3.SQLITE_PRAGMA:
            raise _HandlerError
        return original(self, action, first, second, third)  # type: ignore[arg-type]

    sql = "SELECT name FROM pragma_table_info('t')"
    any_db.run("CREATE TABLE t (n)")
    for guard, call in ((Guard, lambda: any_db.run(sql)), (ReadGuard, lambda: any_db.read(sql))):
        original = guard.decide
        with monkeypatch.context() as patch, pytest.raises(_HandlerError):
            patch.setattr(guard, "decide", decide)
            call()
        assert any_db.read(sql) == [("n",)]


def test_an_error_that_only_sounds_like_a_refusal_stays_what_it_is(any_db: DbWriter) -> None:
    for call in (any_db.run, any_db.read):
        with pytest.raises(sqlite3.OperationalError, match="not authorized"):
            call("SELECT load_extension('nothing')")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_of_multiprocessing_writes_what_it_has_accepted(path: Path, tmp_path: Path, method: str) -> None:
    script = tmp_path / "program.py"
    script.write_text(f"""
import multiprocessing, sys
from onewriter import DbWriter

def work():
    global db
    db = DbWriter({str(path)!r})
    for n in range(500):
        db.enqueue("INSERT INTO t VALUES (?)", (n,))
    sys.exit(3)

if __name__ == "__main__":
    child = multiprocessing.get_context({method!r}).Process(target=work)
    child.start()
    child.join()
    print(child.exitcode)
""")
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
    child = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert child.stdout == "3\n", child.stderr
    with DbWriter(path) as db:
        assert db.read_value("SELECT count(*) FROM t") == 500


def test_a_handler_may_enqueue_while_its_thread_waits_for_room(path: Path) -> None:
    with DbWriter(path, maxsize=1) as db:
        db.run("CREATE TABLE t (n)")
        with parked(db) as release:
            db.enqueue("INSERT INTO t VALUES (1)")

            def handler(*_: object) -> None:
                db.enqueue("INSERT INTO t VALUES (3)", timeout=DEADLINE)  # over maxsize: there will be no room before
                release.set()

            before = signal.signal(signal.SIGALRM, handler)
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                db.enqueue("INSERT INTO t VALUES (2)", timeout=None)
            finally:
                signal.signal(signal.SIGALRM, before)
        db.flush(DEADLINE)
        assert sorted(db.read("SELECT n FROM t")) == [(1,), (2,), (3,)]


WAITS: dict[str, Callable[[DbWriter], object]] = {
    "close": lambda db: db.close(),
    "close without drain": lambda db: db.close(5.0, drain=False),
    "flush": lambda db: db.flush(),
    "run": lambda db: db.run("SELECT 1", timeout=None),
    "run_many": lambda db: db.run_many(INSERT, [(1,)], timeout=None),
    "run_script": lambda db: db.run_script("SELECT 1", timeout=None),
    "run_without_transaction": lambda db: db.run_without_transaction("VACUUM", timeout=None),
    "transaction": lambda db: db.transaction(timeout=None).__enter__(),
    "result": lambda db: db.enqueue("SELECT 1").result(),
    "exception": lambda db: db.enqueue("SELECT 1").exception(),
    "read after": lambda db: db.read("SELECT 1", after=db.enqueue("SELECT 1"), timeout=None),
    "checkpoint": lambda db: db.checkpoint(timeout=None),
    "backup": lambda db: db.backup(db.path + ".copy"),
}

INSERT = "INSERT INTO t VALUES (?)"


def lock_of(db: DbWriter, name: str) -> Any:
    return {"tickets": state_of(db).lock, "queue": queue_of(db).mutex, "pool": pool_of(db)._lock}[name]


@pytest.mark.parametrize("lock", ["tickets", "queue", "pool"])
@pytest.mark.parametrize("call", WAITS)
def test_a_wait_in_a_handler_that_came_inside_a_lock_is_refused(path: Path, call: str, lock: str) -> None:
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        mine = lock_of(db, lock)
        with parked(db), mine, pytest.raises(ReentrantWriteError, match="signal handler"):
            WAITS[call](db)
        assert not db.closed
        db.run(INSERT, (1,))
    assert not path.with_name("app.db.copy").exists()


@pytest.mark.parametrize("lock", ["tickets", "queue", "pool"])
def test_what_does_not_wait_is_done_there(path: Path, lock: str) -> None:
    with DbWriter(path, maxsize=1, readers=1) as db:
        db.run("CREATE TABLE t (n)")
        db.read("SELECT 1")
        mine = lock_of(db, lock)
        with parked(db), mine:
            assert db.read("SELECT 1") == [(1,)]
            assert db.enqueue(INSERT, (1,)).cancel()
            for n in range(3):
                db.enqueue(INSERT, (n,))  # over maxsize
            assert db.stats().queue_depth >= 3
            assert db.health
        db.flush()
        assert db.read_value("SELECT count(*) FROM t") == 3


def test_a_read_there_does_not_wait_for_a_connection_that_cannot_come_back(path: Path) -> None:
    entered, release = threading.Event(), threading.Event()

    def hold(connection: object) -> None:
        entered.set()
        release.wait(DEADLINE)

    with DbWriter(path, readers=1) as db:
        thread = threading.Thread(target=db.read, args=[hold])
        thread.start()
        assert entered.wait(DEADLINE)
        with pool_of(db)._lock, pytest.raises(ReentrantWriteError, match="signal handler"):
            db.read("SELECT 1", timeout=None)
        release.set()
        thread.join(DEADLINE)
        assert db.stats().readers_waiting == 0
        assert db.read("SELECT 1") == [(1,)]


@pytest.mark.parametrize("call", WAITS)
def test_a_wait_in_a_handler_that_came_as_its_thread_waits_for_the_turn_of_a_block_is_refused(
    path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer would lend the connection to a thread that waits for the writer."""
    refused: list[BaseException] = []

    def interrupted(wakeup: Any, until: float, holder: Any) -> bool:
        monkeypatch.undo()
        try:
            WAITS[call](db)
        except ReentrantWriteError as error:
            refused.append(error)
        release.set()
        return job.wait_in_slices(wakeup, until, holder)

    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        with parked(db) as release:
            monkeypatch.setattr(driver, "wait_in_slices", interrupted)
            with db.transaction() as tx:
                tx.execute(INSERT, (1,))
        assert len(refused) == 1
        db.flush()
        assert db.read("SELECT n FROM t") == [(1,)]


@pytest.mark.parametrize("call", WAITS)
def test_a_wait_in_a_handler_that_came_as_its_thread_leaves_a_block_is_refused(
    path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[object] = []
    revoke = block.ThreadBlock._revoke

    def interrupted(of: block.ThreadBlock, failed: bool) -> None:
        revoke(of, failed)
        with pytest.raises(ReentrantWriteError, match=r"signal handler|inside a job") as caught:
            WAITS[call](db)
        refused.append(caught)

    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        with monkeypatch.context() as patched:
            patched.setattr(block.ThreadBlock, "_revoke", interrupted)
            with db.transaction() as tx:
                tx.execute(INSERT, (1,))
        assert len(refused) == 1
        assert db.run(INSERT, (2,), timeout=DEADLINE).rowcount == 1
        assert db.read("SELECT n FROM t WHERE n < 3") == [(1,), (2,)]


def test_close_in_a_handler_that_came_as_a_connection_is_opened_or_closed_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[str] = []

    def close(*_: object) -> None:
        if handles:
            try:
                db.close()
            except ReentrantWriteError:
                refused.append("close")

    handles = False
    with DbWriter(path, readers=1, on_connect=close) as db:
        handles = True
        assert db.read("SELECT 1") == [(1,)]  # which opens one
        db.backup(path.with_name("copy.db"))
        close_place = ReaderPool._close_place

        def closed_in(self: Any, *args: Any) -> None:
            close()
            close_place(self, *args)

        monkeypatch.setattr(ReaderPool, "_close_place", closed_in)
        with db.reader() as connection:
            connection.execute("PRAGMA cache_size=7")  # so it is not lent again
        handles = False
        assert len(refused) == 3
        db.run("CREATE TABLE t (n)")


TERMINATED = """
import os, signal, sys, threading, time
from onewriter import DbWriter
db = DbWriter({path!r})
db.run("CREATE TABLE t (n)")

def close(*_):
    db.close()
    os._exit(0)

signal.signal(signal.SIGTERM, close)
threading.Timer({after}, os.kill, [os.getpid(), signal.SIGTERM]).start()
while True:
    {call}
"""


@pytest.mark.parametrize(
    "call",
    [
        'db.enqueue("INSERT INTO t VALUES (1)")',
        'db.run("INSERT INTO t VALUES (1)")',
        'db.read("SELECT 1")',
        'db.enqueue("INSERT INTO t VALUES (1)").cancel()',
        'with db.transaction() as tx: tx.execute("INSERT INTO t VALUES (1)")',
    ],
)
def test_a_process_whose_handler_of_sigterm_closes_ends(path: Path, call: str) -> None:
    for after in (0.05, 0.07, 0.11):
        path.unlink(missing_ok=True)
        done = run_child(TERMINATED.format(path=str(path), after=after, call=call))
        assert done.returncode == 0 or "ReentrantWriteError" in done.stderr, done.stderr


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


def test_an_interrupted_call_withdraws_its_job_or_has_its_failure_logged(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started, go_on = threading.Event(), threading.Event()

    def fail(tx: Transaction) -> None:
        started.set()
        go_on.wait(DEADLINE)
        raise LookupError("nobody hears this")

    def interrupted(*_: object) -> bool:
        if not go_on.is_set():
            started.wait(DEADLINE)
        raise KeyboardInterrupt

    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        with monkeypatch.context() as patch:
            patch.setattr(gateway, "wait_in_slices", interrupted)
            with pytest.raises(KeyboardInterrupt):
                db.run(fail, label="the lost one")
        go_on.set()
        db.flush()
        assert "the lost one" in caplog.text
        assert "nobody hears this" in caplog.text
        with parked(db), monkeypatch.context() as patch:
            patch.setattr(gateway, "wait_in_slices", interrupted)
            with pytest.raises(KeyboardInterrupt):
                db.run(INSERT, (1,))
        assert db.read("SELECT n FROM t") == []
        assert db.stats().cancelled == 1


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


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_a_callback_of_the_callers_thread_comes_out_when_all_were_called(
    any_db: DbWriter, kind: type[BaseException]
) -> None:
    db, told = any_db, []

    def fail(*_: object) -> None:
        told.append("raised")
        raise kind("of the callback")

    def tell(*_: object) -> None:
        told.append("told")

    db.run(TABLE)
    with pytest.raises(kind, match="of the callback"), db.transaction() as tx:
        tx.execute(INSERT, (1,))
        tx.on_commit(fail)
        tx.on_commit(tell)
    assert told == ["raised", "told"]
    told.clear()
    with pytest.raises(kind, match="of the callback"), db.transaction() as tx:
        tx.on_rollback(fail)
        tx.on_rollback(tell)
        raise LookupError
    assert told == ["raised", "told"]
    done = db.enqueue(INSERT, (2,))
    db.flush()
    with pytest.raises(kind, match="of the callback"):
        done.add_done_callback(fail)
    assert db.read("SELECT n FROM t") == [(1,), (2,)]
    assert db.health == "ok"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_a_callback_of_what_is_withdrawn_comes_out_and_leaves_no_job_without_an_outcome(
    path: Path, kind: type[BaseException]
) -> None:
    told = []

    def fail(ticket: Ticket[Any]) -> None:
        told.append(ticket)
        raise kind("of the callback")

    db = DbWriter(path)
    with parked(db):
        tickets = [db.enqueue("SELECT 1") for _ in range(6)]
        for ticket in tickets:
            ticket.add_done_callback(fail)
            ticket.add_done_callback(told.append)
        with pytest.raises(kind, match="of the callback"):
            tickets[0].cancel()
        assert told == [tickets[0]] * 2
        with pytest.raises(kind, match="of the callback"):
            db.close(drain=False)
    assert [ticket.cancelled() for ticket in tickets] == [True] * 6
    assert told == [ticket for ticket in tickets for _ in range(2)]
    assert db.close(DEADLINE).cancelled == 6


def test_an_interrupt_in_a_handler_comes_out_of_the_callers_thread(path: Path) -> None:
    def fail(record: logging.LogRecord) -> None:
        if record.threadName == threading.current_thread().name == "MainThread":
            raise KeyboardInterrupt("of the handler")

    with DbWriter(path, maxsize=10) as db, handling(fail):
        with parked(db):
            for _ in range(9):
                db.enqueue("SELECT 1")
            with pytest.raises(KeyboardInterrupt, match="of the handler"):
                db.enqueue("SELECT 1")  # nearly full
        db.run("SELECT 1")
        assert db.stats().failed == 0


def test_in_tasks_an_interrupt_in_a_callback_of_a_block_comes_out_too(path: Path) -> None:
    told: list[int] = []

    def fail() -> None:
        raise KeyboardInterrupt("of the callback")

    async def main() -> None:
        async with AsyncDbWriter(path) as db:
            await db.run(TABLE)
            with pytest.raises(KeyboardInterrupt, match="of the callback"):
                async with db.transaction() as tx:
                    await tx.execute(INSERT, (1,))
                    tx.on_commit(fail)
                    tx.on_commit(lambda: told.append(1))
            assert await db.read("SELECT n FROM t") == [(1,)]

    asyncio.run(main())
    assert told == [1]


def test_a_handler_whose_thread_waits_for_its_turn_goes_over_maxsize(path: Path) -> None:
    got: list[Ticket[Any]] = []

    def handler(*_: object) -> None:
        release.set()
        while (job := state_of(db).job) is None or job.label != "the block":
            assert not threading.Event().wait(0.001)
        got.append(db.enqueue("SELECT 'handler'", timeout=0.0))

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with DbWriter(path, maxsize=1) as db:
            with parked(db) as release:
                db.enqueue("SELECT 1")
                waiting = threading.Thread(target=lambda: db.enqueue("SELECT 2"))
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                with db.transaction(label="the block", timeout=None):
                    waiting.start()
                    assert got
            waiting.join(DEADLINE)
            assert got[0].result(DEADLINE).rows == [("handler",)]
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("where", ["begin", "commit", "close"])
@pytest.mark.parametrize("inline", [False, True])
def test_a_signal_handler_that_enqueues_never_waits_for_the_call_it_interrupts(
    path: Path, where: str, inline: bool
) -> None:
    got: list[Any] = []
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)

    def handler(*_: object) -> None:
        try:
            got.append(db.enqueue("INSERT INTO t VALUES ('signal')", timeout=0.0))
        except Exception as error:
            got.append(error)
        threading.Thread(target=let_go.set).start()

    def hold_reader() -> None:
        with db.reader():
            there.set()
            assert let_go.wait(DEADLINE)

    let_go, there = threading.Event(), threading.Event()
    before = signal.signal(signal.SIGALRM, handler)
    db = DbWriter(path, inline=inline, journal_mode="DELETE")
    try:
        db.run("CREATE TABLE t (a)")
        if where == "close":
            thread = threading.Thread(target=hold_reader)
            thread.start()
            assert there.wait(DEADLINE)
        else:
            other.execute("BEGIN IMMEDIATE" if where == "begin" else "BEGIN")
            other.execute("SELECT * FROM t").fetchall()
            thread = threading.Thread(target=lambda: (let_go.wait(DEADLINE), other.execute("ROLLBACK")))
            thread.start()
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        if where != "close":
            with db.transaction() as tx:
                tx.execute(INSERT, (1,))
        db.close()
        thread.join(DEADLINE)
        if where == "close":
            assert isinstance(got[0], WriterClosedError)
        else:
            assert isinstance(got[0], Ticket)
            assert got[0].exception(DEADLINE) is None
    finally:
        signal.signal(signal.SIGALRM, before)
        other.close()
        db.close()


def test_a_handler_that_raises_closed_while_its_thread_waits_for_a_block_leaves_nothing_lent(path: Path) -> None:
    def handler(*_: object) -> None:
        raise WriterClosedError("of another gateway")

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with DbWriter(path) as db:
            with parked(db):
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                with pytest.raises(WriterClosedError, match="of another"), db.transaction(timeout=None):
                    raise AssertionError
            assert db.run("SELECT 1").rows == [(1,)]
    finally:
        signal.signal(signal.SIGALRM, before)

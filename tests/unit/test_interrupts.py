"""What a signal handler raises comes out as it is, wherever it comes, and leaves nothing behind."""

from __future__ import annotations

import functools
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import DEADLINE, parked
from onewriter import DbWriter, driver, gateway
from onewriter.guard import Guard, ReadGuard
from onewriter.watch import Watch

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


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

    executor = db._loop._session.executor  # type: ignore[union-attr]
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

    watch = Watch(is_over)
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
            monkeypatch.setattr(gateway.DbWriter, "_leave", interrupted)
            if failed:
                raise LookupError
        monkeypatch.undo()
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
            monkeypatch.setattr(db._driver, "leave", interrupted)
        monkeypatch.undo()
        assert told.wait(DEADLINE)


def test_an_interrupt_as_the_writer_is_woken_loses_no_wake_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DbWriter(path) as db:
        queue = db._loop.queue
        db.run("CREATE TABLE t (n)")
        db.flush()
        while not queue._asleep:
            pass

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
        end, interrupted = db._readers.end, []

        def interrupted_once(borrowing: Any) -> None:
            if borrowing not in interrupted:
                interrupted.append(borrowing)
                raise SignalError
            end(borrowing)

        monkeypatch.setattr(db._readers, "end", interrupted_once)
        with pytest.raises(SignalError):
            db.read("SELECT 1")
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
            reader = connection.loan.reader  # type: ignore[attr-defined]
            reader.guard.authorizer, reader.guard._answers = functools.lru_cache(maxsize=0)(interrupted), 0
            reader.connection.set_authorizer(reader.guard.authorizer)
            connection.execute(sql)
    with pytest.raises(sqlite3.DatabaseError, match="not authorized") as caught:
        db.read("ATTACH 'other.db' AS other")
    assert caught.value.__notes__ == ["onewriter: a reader cannot ATTACH, DETACH or VACUUM"]


class _HandlerError(Exception):
    """What a signal handler of the application raises."""


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

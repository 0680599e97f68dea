"""Without memory SQLite fails also the gateway's own small statements: the job fails, and the next one works."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from helpers import DEADLINE, checkpointer_of, parked, pool_of, rows, rows_in, session_of
from onewriter import CommitUnknownError, DbWriter, Ticket, Transaction, WriterBrokenError
from onewriter.base.tally import Tally
from onewriter.write.block import ThreadBlock
from onewriter.write.lock import WriteLock
from onewriter.write.session import WriteSession, _Calls

INSERT = "INSERT INTO t VALUES (?)"
Begin = Callable[[], None]


class Cursor:
    """That of the gateway's own statements; the one with the number ``at`` finds no memory.

    SQLite may roll back then. That of a COMMIT is a test of its own.
    """

    def __init__(self, session: WriteSession, at: int, rolls_back: bool) -> None:
        self._cursor, self.left, self.is_on = session._cursor, at, False
        self._session, self._rolls_back = session, rolls_back
        session._cursor = self  # type: ignore[assignment]
        session.control = calls = _Calls(self, session._texts)
        session.set_mark, session.release_mark, session.undo_to_mark = (
            calls[f"{verb} {session.guard.mark}_0"] for verb in ("SAVEPOINT", "RELEASE", "ROLLBACK TO")
        )

    def begin(self) -> None:
        self.is_on = True

    def execute(self, *args: Any) -> object:
        self.left -= self.is_on
        if self.is_on and self.left == 0:
            if self._rolls_back and self._session.connection.in_transaction and "COMMIT" not in args[0]:
                self._cursor.execute(f"ROLLBACK /* {self._session.guard._secret} */")
            raise MemoryError
        return self._cursor.execute(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)


def statement(db: DbWriter, begin: Begin) -> list[int]:
    begin()
    db.run(INSERT, (1,))
    return [1]


def function(db: DbWriter, begin: Begin) -> list[int]:
    def write(tx: Transaction) -> None:
        tx.execute(INSERT, (1,))
        with contextlib.suppress(LookupError), tx.savepoint():
            tx.execute(INSERT, (-1,))
            raise LookupError

    begin()
    db.run(write)
    return [1]


def block(db: DbWriter, begin: Begin) -> list[int]:
    begin()
    with db.transaction() as tx:
        tx.execute(INSERT, (1,))
    return [1]


def failing(db: DbWriter, begin: Begin) -> list[int]:
    begin()
    db.run("INSERT INTO t VALUES (-1), (NULL)")
    return []


def setting(db: DbWriter, begin: Begin) -> list[int]:
    begin()
    db.run("PRAGMA recursive_triggers = 1")
    return []


def batch(db: DbWriter, begin: Begin) -> list[int]:
    with parked(db):
        begin()
        tickets: list[Ticket[Any]] = [db.enqueue(INSERT, (n,)) for n in range(2)]
        tickets.append(db.enqueue("INSERT INTO t SELECT NULL RETURNING n"))  # so that all is undone, and runs again
        tickets.append(db.enqueue(lambda tx: tx.execute(INSERT, (3,)).rowcount))
        tickets.append(db.enqueue(INSERT, (4,)))
        tickets.append(db.enqueue(lambda tx: tx.execute("INSERT OR ROLLBACK INTO t VALUES (NULL)").rowcount))
        tickets.append(db.enqueue(INSERT, (6,)))
    db.flush(DEADLINE)
    return [n for n, ticket in enumerate(tickets) if ticket.exception() is None]


def functions(db: DbWriter, begin: Begin) -> list[int]:
    def write(n: int, tx: Transaction) -> None:
        tx.execute(INSERT, (n,))
        if n % 5 == 2:
            raise LookupError

    with parked(db):
        begin()
        tickets = {n: db.enqueue(functools.partial(write, n)) for n in range(100, 120)}
    db.flush(DEADLINE)
    return [n for n, ticket in tickets.items() if ticket.exception() is None]


def checkpoint(db: DbWriter, begin: Begin) -> list[int]:
    begin()
    db.checkpoint()
    return []


WELL = [n for n in range(100, 120) if n % 5 != 2]


@pytest.mark.parametrize("rolls_back", [False, True])
@pytest.mark.parametrize("journal_mode", ["WAL", "DELETE"])
@pytest.mark.parametrize(
    ("call", "inline"),
    [
        (batch, False),
        (functions, False),
        *itertools.product([statement, function, block, failing, setting, checkpoint], [False, True]),
    ],
)
def test_a_statement_of_the_gateway_that_finds_no_memory_fails_its_job_at_most(
    path: Path,
    call: Callable[[DbWriter, Begin], list[int]],
    inline: bool,
    journal_mode: Literal["WAL", "DELETE"],
    rolls_back: bool,
) -> None:
    with DbWriter(path, synchronous="OFF", inline=inline, journal_mode=journal_mode) as db:
        db.run("CREATE TABLE t (n NOT NULL)")
        for at in range(1, 100):
            db.run("DELETE FROM t")  # after a failure, it opens the connection again
            cursor, acknowledged = Cursor(session_of(db), at, rolls_back), []
            with contextlib.suppress(Exception):
                acknowledged = call(db, cursor.begin)
            is_through, cursor.is_on = cursor.left > 0, False
            assert db.health == "ok", at
            found = rows(db)
            assert set(acknowledged) <= set(found) <= {0, 1, 3, 4, 6, *WELL}, at
            assert len(found) == len(set(found)), at
            db.run(INSERT, (7,), timeout=DEADLINE)
            assert rows(db) == [*found, 7]
            if is_through:
                break
        else:
            pytest.fail("there are more statements than that")


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("call", [statement, block])
def test_the_outcome_of_a_commit_that_finds_no_memory_and_is_undone_is_unknown(
    path: Path, call: Callable[[DbWriter, Begin], list[int]], inline: bool
) -> None:
    """Its pages may be in the log, and found there after a crash."""

    def commit() -> None:
        control["ROLLBACK"]()
        raise MemoryError

    with DbWriter(path, inline=inline) as db:
        db.run("CREATE TABLE t (n)")
        control = session_of(db).control
        control["COMMIT"] = commit
        with pytest.raises(CommitUnknownError):
            call(db, int)  # type: ignore[arg-type]
        assert db.health.startswith("broken")


def test_what_was_undone_fails_with_the_others_if_it_cannot_begin_again(db: DbWriter) -> None:
    """As where another process takes the lock in between."""

    def undo() -> None:
        control["BEGIN IMMEDIATE"] = refuse
        raise LookupError

    def refuse() -> None:
        control.clear()
        raise sqlite3.OperationalError("disk I/O error")

    db.run("CREATE TABLE t (n)")
    control = session_of(db).control
    session_of(db).connection.create_function("undo", 0, undo)
    with parked(db):
        tickets = [db.enqueue(INSERT, (1,)), db.enqueue("INSERT INTO t SELECT undo()"), db.enqueue(INSERT, (2,))]
    for ticket in tickets:
        with pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
            ticket.result(DEADLINE)
    db.run(INSERT, (3,), timeout=DEADLINE)
    assert (rows(db), db.health) == ([3], "ok")


def no_memory(*_: object) -> None:
    raise MemoryError


def test_a_checkpoint_that_finds_no_memory_is_logged_and_fails_nothing(
    db: DbWriter, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer_of(db).attempt(no_memory, session_of(db))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    db.checkpoint()


def test_a_file_that_cannot_be_judged_for_want_of_memory_is_judged_later(db: DbWriter) -> None:
    session = session_of(db)
    session.internal = no_memory  # type: ignore[assignment]
    checkpointer_of(db).judge_size(session)
    del session.internal
    assert db.run("SELECT 1").rows == [(1,)]


def test_a_connection_that_cannot_be_reset_for_want_of_memory_is_replaced(path: Path) -> None:
    with DbWriter(path, readers=1) as db:
        with db.reader():
            (reader,) = pool_of(db)._readers
            reader._internal = no_memory  # type: ignore[assignment]
        assert db.read_value("SELECT 1", timeout=DEADLINE) == 1
        assert reader not in pool_of(db)._readers


def test_a_job_of_a_writer_that_fails_behind_its_commit_is_not_told_that_it_is_not_committed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        monkeypatch.setattr(WriteLock, "released", no_memory)
        with pytest.raises(CommitUnknownError, match="may or may not be committed"):
            db.run(INSERT, (1,), timeout=DEADLINE)
        with pytest.raises(WriterBrokenError):
            db.run(INSERT, (2,))
    assert rows_in(path) == [1]


def test_who_waits_is_woken_although_the_counting_of_its_job_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        monkeypatch.setattr(Tally, "add_batch", no_memory)
        assert db.run(INSERT, (1,), timeout=DEADLINE).rowcount == 1


def test_a_block_whose_granting_fails_is_not_waited_for_without_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lend(self: ThreadBlock, _: object) -> None:
        with self._state.lock:
            self._waiters = None
        raise MemoryError

    with DbWriter(path) as db:
        monkeypatch.setattr(ThreadBlock, "lend", lend)
        with pytest.raises(MemoryError), db.transaction(timeout=0.1, max_hold=DEADLINE):
            pass

"""The same program through threads, without a thread, and through tasks: the same outcomes, and the same rows."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import sqlite3
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import DEADLINE
from onewriter import AsyncDbWriter, DbWriter, Ticket, TransactionClosedError

SCHEMA = """
    CREATE TABLE t (id INTEGER PRIMARY KEY, x UNIQUE, y CHECK (y < 100));
    CREATE TABLE p (id INTEGER PRIMARY KEY);
    CREATE TABLE c (p REFERENCES p (id) DEFERRABLE INITIALLY DEFERRED);
"""
RESET = "DELETE FROM c; DELETE FROM t; INSERT INTO t (x, y) VALUES (0, 0)"
INSERT = "INSERT INTO t (x, y) VALUES (?, 1)"
STATEMENTS = [
    *(f"{INSERT} RETURNING x", "INSERT OR REPLACE INTO t (x, y) VALUES (?, 2)", "SELECT x, y FROM t WHERE x <> ?"),
    *("INSERT OR FAIL INTO t (x, y) VALUES (?, 2), (0, 3)", "INSERT OR IGNORE INTO t (x, y) VALUES (?, 4)"),
    *("UPDATE t SET y = y + 1 WHERE x > ?", "DELETE FROM t WHERE x = ?", "INSERT INTO c VALUES (?)", "COMMIT"),
    *("INSERT INTO nowhere VALUES (?)", "INSERT INTO t (x, y) VALUES (?, 100)", "PRAGMA foreign_keys = ?"),
]
ROLLS_BACK = "INSERT OR ROLLBACK INTO t (x, y) VALUES (0, ?)"
NUMBERS = st.integers(1, 6)


class FailError(Exception):
    pass


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a Transaction, so many parts further out than the innermost, or of the gateway."""

    name: str
    sql: str
    number: int
    outwards: int


@dataclasses.dataclass(frozen=True)
class Part:
    """What has an end of its own; if it fails, that is caught right around it."""

    kind: str
    steps: list[Any]
    fails: bool


CALLS = st.builds(
    Call,
    st.sampled_from(
        [
            *("execute", "executemany", "executescript", "rollback", "on_commit", "on_rollback"),
            *("run", "run_many", "run_script", "read", "reader", "enqueue", "flush", "ended"),
        ]
    ),
    st.sampled_from([*STATEMENTS, *STATEMENTS, ROLLS_BACK]),
    NUMBERS,
    st.integers(0, 2),
)
STEPS = st.recursive(
    CALLS,
    lambda step: st.builds(
        Part, st.sampled_from(["savepoint", "block", "job"]), st.lists(step, max_size=4), st.booleans()
    ),
    max_leaves=10,
)


def outcome(found: Any) -> Any:
    if isinstance(found, BaseException):
        is_of_sqlite = isinstance(found, sqlite3.Error) and not isinstance(found, TransactionClosedError)
        return type(found).__name__, str(found) if is_of_sqlite else ""
    return (found.rows, found.rowcount, found.lastrowid is None) if hasattr(found, "rowcount") else found


class Face:
    """What the program is played on. Written once, for tasks: with threads, nothing in it ever waits."""

    def __init__(self, db: Any, threads_db: DbWriter) -> None:
        self.db = db
        self._threads_db = threads_db
        self.trace: list[Any] = []
        self.tickets: list[Ticket[Any]] = []
        self._ended: list[Any] = []

    async def play(self, steps: list[Any], transactions: list[Any]) -> None:
        for step in steps:
            try:
                if isinstance(step, Part):
                    self.trace.append(step.kind)
                    await self._play_part(step, transactions)
                    self.trace.append("ends well")
                else:
                    self.trace.append((step.name, outcome(await self._call(step, transactions))))
            except Exception as error:
                self.trace.append((step.kind if isinstance(step, Part) else step.name, outcome(error)))

    async def _play_part(self, step: Part, transactions: list[Any]) -> None:
        if step.kind == "job":
            await given_or_awaited(self.db.run(functools.partial(self._as_job, step)))
            return
        async with entered(self.db.transaction() if step.kind == "block" else transactions[-1].savepoint()) as inner:
            await self.play(step.steps, [*transactions, inner or transactions[-1]])
            if step.fails:
                raise FailError
        if inner is not None:
            self._ended.append(inner)

    def _as_job(self, step: Part, tx: Any) -> str:
        """In the writer's thread, on the face of threads."""
        db, self.db = self.db, self._threads_db
        ended, self._ended = self._ended, []  # those of tasks
        try:
            played(self.play(step.steps, [tx]))
        finally:
            self.db, self._ended = db, ended
        if step.fails:
            raise FailError
        return "returned"

    async def _call(self, step: Call, transactions: list[Any]) -> Any:
        tx = transactions[-1 - min(step.outwards, len(transactions) - 1)]
        parameters = (step.number,) if "?" in step.sql else ()
        script = step.sql.replace("?", str(step.number))
        calls: dict[str, Callable[[], Any]] = {
            "execute": lambda: tx.execute(step.sql, parameters),
            "executemany": lambda: tx.executemany(INSERT, [(step.number,), (step.number + step.outwards,)]),
            "executescript": lambda: tx.executescript(f"INSERT INTO t (x, y) VALUES ({step.number + 10}, 5); {script}"),
            "rollback": lambda: tx.rollback(),
            "on_commit": lambda: tx.on_commit(lambda: self.trace.append(("committed", step.number))),
            "on_rollback": lambda: tx.on_rollback(lambda: self.trace.append(("rolled back", step.number))),
            "run": lambda: self.db.run(step.sql, parameters),
            "run_many": lambda: self.db.run_many(INSERT, [(step.number,), (step.number + step.outwards,)]),
            "run_script": lambda: self.db.run_script(f"INSERT INTO t (x, y) VALUES ({step.number + 20}, 6); {script}"),
            "read": lambda: self.db.read("SELECT x, y FROM t ORDER BY x"),
            "enqueue": lambda: self.tickets.append(self.db.enqueue(INSERT, (step.number + 30,))),
            "flush": lambda: self.db.flush(),
            "ended": lambda: self._ended[-1].execute("SELECT 1") if self._ended else None,
        }
        if step.name == "reader":
            async with entered(self.db.reader()) as reader:
                found = await given_or_awaited(reader.execute("SELECT x FROM t ORDER BY x"))
                return found.fetchall()
        return await given_or_awaited(calls[step.name]())


class Entered:
    """A block of either face, for ``async with``."""

    def __init__(self, block: Any) -> None:
        self._block = block

    async def __aenter__(self) -> Any:
        if hasattr(self._block, "__aenter__"):
            return await self._block.__aenter__()
        return self._block.__enter__()

    async def __aexit__(self, *error: Any) -> Any:
        if hasattr(self._block, "__aexit__"):
            return await self._block.__aexit__(*error)
        return self._block.__exit__(*error)


def entered(block: Any) -> Entered:
    return Entered(block)


async def given_or_awaited(found: Any) -> Any:
    return await found if asyncio.iscoroutine(found) else found


def played(program: Coroutine[Any, Any, None]) -> None:
    """It waits for nothing."""
    with contextlib.suppress(StopIteration):
        program.send(None)
        raise AssertionError("it waits")


def outcome_of(face: Face, db: DbWriter, play: Callable[[Face], None]) -> Any:
    db.run_script(RESET)
    try:
        play(face)
    except Exception as error:
        face.trace.append(("the end", outcome(error)))
    db.flush(DEADLINE)
    told = [outcome(ticket.exception(DEADLINE)) for ticket in face.tickets]
    return face.trace, told, db.read("SELECT x, y FROM t ORDER BY x"), db.read("SELECT * FROM c")


async def program(face: Face, steps: list[Any], fails: bool) -> None:
    async with entered(face.db.transaction()) as tx:
        await face.play(steps, [tx])
        if fails:
            raise FailError


@contextlib.contextmanager
def opened(folder: str, name: str, **options: Any) -> Iterator[DbWriter]:
    with DbWriter(Path(folder) / name, synchronous="OFF", on_error=lambda ticket: None, **options) as db:
        db.run_script(SCHEMA)
        yield db


def test_a_program_does_the_same_through_threads_and_tasks_and_without_a_thread() -> None:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        threads, inline = (stack.enter_context(opened(folder, f"{on}", inline=on)) for on in (False, True))
        tasks = stack.enter_context(opened(folder, "tasks"))
        runner = stack.enter_context(asyncio.Runner())

        @settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(STEPS, max_size=5), st.booleans())
        def check(steps: list[Any], fails: bool) -> None:
            def in_tasks(face: Face) -> None:
                runner.run(program(face, steps, fails))

            def in_threads(face: Face) -> None:
                played(program(face, steps, fails))

            expected = outcome_of(Face(threads, threads), threads, in_threads)
            assert outcome_of(Face(AsyncDbWriter.wrap(tasks), tasks), tasks, in_tasks) == expected
            assert outcome_of(Face(inline, inline), inline, in_threads) == expected

        check()

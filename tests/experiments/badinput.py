"""Anything at all, at every public call: a documented error or a result, and the writer serves the next job."""

from __future__ import annotations

import asyncio
import functools
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from experiments import HANG, Outcome
from onewriter import AsyncDbWriter, DbWriter, OneWriterError

DOCUMENTED = (OneWriterError, sqlite3.Error, sqlite3.Warning, TypeError, ValueError, OverflowError, OSError, KeyError)


class OwnError(Exception):
    """What a job raises."""


def _raises(*_: object) -> None:
    raise OwnError


async def _coroutine(*_: object) -> None:
    pass


def _generator(*_: object) -> Any:
    yield 1


WORDS = """
SELECT INSERT INTO t VALUES (1) (?) (:a) ? ?9 :a , ; -- /* */ 'x ' " FROM t WHERE n = 1
BEGIN COMMIT ROLLBACK SAVEPOINT s RELEASE s END PRAGMA foreign_keys=0 user_version journal_mode = DELETE WAL
CREATE TABLE u (n) DROP TABLE u ATTACH ':memory:' AS x VACUUM RETURNING n WITH c AS (SELECT 1) UPDATE t SET n = n
OR ROLLBACK FAIL REPLACE EXPLAIN ANALYZE REINDEX \0 é
"""
OPENING = """
label readers maxsize lock_timeout synchronous journal_mode foreign_keys pragmas on_connect row_factory
detect_types on_error on_event slow_after max_hold wal_limit auto_checkpoint inline
"""
PIECES = st.sampled_from(WORDS.split())
SQL = st.lists(PIECES, max_size=8).map(" ".join) | st.text(max_size=10)
VALUES: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5) | SQL
)
FUNCTIONS: list[Any] = [lambda tx: 1, lambda: 1, lambda tx: tx, lambda tx: tx.execute("SELECT 1"), lambda tx: iter([])]
FUNCTIONS += [_raises, _coroutine, _generator, _generator(), repr, int, len, functools.partial, lambda tx: (yield)]
CALLABLES = st.sampled_from(FUNCTIONS)
ANYTHING: st.SearchStrategy[Any] = st.recursive(
    VALUES | CALLABLES | st.just(object()) | st.just(...),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=2), inner, max_size=2)
        | st.sets(st.integers(), max_size=2)
    ),
    max_leaves=4,
)
WHAT = SQL | CALLABLES | ANYTHING
PARAMETERS = st.lists(VALUES, max_size=3) | st.tuples(VALUES) | st.just({"a": 1}) | ANYTHING
OPTIONS = st.dictionaries(
    st.sampled_from(
        ["label", "timeout", "after", "max_hold", "foreign_keys", "mode", "progress", "pages", "drain", "x"]
    ),
    st.sampled_from([0.05, 1, -1, float("nan"), float("inf"), "label", "", True, False]) | ANYTHING,
    max_size=2,
)
ARGUMENTS = st.tuples(WHAT) | st.tuples(WHAT, PARAMETERS) | st.tuples() | st.tuples(WHAT, PARAMETERS, ANYTHING)
# Names in the working folder only.
PATHS = (
    st.sampled_from(["new.db", "", ".", "no/such/folder.db", "a\0b", b"bytes.db", "file:x?mode=memory"]) | st.integers()
)
NO_PATHS = ANYTHING.filter(lambda value: not isinstance(value, str | bytes))


def _inside(name: str, *arguments: Any, db: DbWriter) -> None:
    with db.transaction() as tx:
        getattr(tx, name)(*arguments)


def _block(kind: str, *_: Any, db: DbWriter, **options: Any) -> None:
    with getattr(db, kind)(**options) as inside:
        inside.execute("SELECT 1")


def _lent(*arguments: Any, db: DbWriter) -> None:
    with db.transaction() as tx:
        tx.connection.execute(*arguments)


def _ticket(name: str, *arguments: Any, db: DbWriter) -> None:
    getattr(db.enqueue("SELECT 1"), name)(*arguments)


def _awaited(*arguments: Any, db: DbWriter, **options: Any) -> None:
    async def call() -> None:
        await AsyncDbWriter.wrap(db).run(*arguments, **options)

    asyncio.run(call())


def _opened(*_: Any, db: DbWriter, **options: Any) -> None:
    DbWriter("opened.db", **options).close()


def _call(name: str, *arguments: Any, db: DbWriter, **options: Any) -> None:
    getattr(db, name)(*arguments, **options)


WRITES = ("run", "run_many", "run_script", "run_without_transaction", "enqueue", "checkpoint")
READS = ("read", "read_one", "read_value")
CALLS: dict[str, tuple[Callable[..., None], st.SearchStrategy[Any], st.SearchStrategy[Any]]] = {
    **{name: (functools.partial(_call, name), ARGUMENTS, OPTIONS) for name in (*WRITES, *READS)},
    "backup": (functools.partial(_call, "backup"), st.tuples(PATHS | NO_PATHS), OPTIONS),
    "transaction": (functools.partial(_block, "transaction"), st.tuples(), OPTIONS),
    "reader": (functools.partial(_block, "reader"), st.tuples(), OPTIONS),
    "tx.execute": (functools.partial(_inside, "execute"), ARGUMENTS, st.just({})),
    "tx.executemany": (functools.partial(_inside, "executemany"), ARGUMENTS, st.just({})),
    "tx.executescript": (functools.partial(_inside, "executescript"), ARGUMENTS, st.just({})),
    "tx.on_commit": (functools.partial(_inside, "on_commit"), st.tuples(ANYTHING), st.just({})),
    "connection.execute": (_lent, ARGUMENTS, st.just({})),
    "ticket.result": (functools.partial(_ticket, "result"), st.tuples(st.floats(0, 1) | ANYTHING), st.just({})),
    "ticket.add_done_callback": (functools.partial(_ticket, "add_done_callback"), st.tuples(CALLABLES), st.just({})),
    "await run": (_awaited, ARGUMENTS, OPTIONS),
    "DbWriter": (
        _opened,
        st.tuples(),
        st.dictionaries(
            st.sampled_from(OPENING.split()),
            ANYTHING,
            max_size=2,
        ),
    ),
}  # fmt: skip


def run(size: int, seed_: int, folder: Path, calls: tuple[str, ...] = tuple(CALLS)) -> Outcome:
    """``size`` inputs for each call."""
    outcome, here = Outcome(), os.getcwd()
    os.chdir(folder)
    try:
        for name in calls:
            outcome.notes[name] = _throw(name, size, seed_, folder, outcome)
    finally:
        os.chdir(here)
    return outcome


def _throw(name: str, size: int, seed_: int, folder: Path, outcome: Outcome) -> int:
    function, arguments, options = CALLS[name]
    count = 0
    with DbWriter(folder / "app.db", slow_after=60, lock_timeout=0.2, on_error=lambda ticket: None) as db:
        db.run("CREATE TABLE IF NOT EXISTS ok (n INTEGER)")
        db.run("CREATE TABLE IF NOT EXISTS t (n)")
        expected = db.read_value("SELECT count(*) FROM ok")

        @seed(seed_)
        @settings(max_examples=size, database=None, deadline=None, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(arguments, options)
        def one(arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            nonlocal count, expected
            count += 1
            try:
                function(*arguments, db=db, **options)
            except (*DOCUMENTED, OwnError):
                outcome.notes["errors"] += 1
            except BaseException as error:
                outcome.find(f"{name}(*{arguments!r}, **{options!r}): {error!r}"[:500])
            try:
                db.run("INSERT INTO ok VALUES (1)", timeout=HANG)
                expected += 1
            except BaseException as error:
                outcome.find(f"after {name}(*{arguments!r}, **{options!r}), the next job: {error!r}"[:500])

        one()
        outcome.trials += count
        found = db.read_value("SELECT count(*) FROM ok")
        if found != expected:
            outcome.lost += abs(expected - found)
            outcome.find(f"{name}: {found} of {expected} rows")
    return count

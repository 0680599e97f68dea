"""What was once reported of other writers of SQLite, as small functions that are run mixed, in threads, on one gateway.

Each says what must come of it, whatever the others do meanwhile.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ctypes
import random
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

from experiments import HANG, Outcome, integrity
from onewriter import AsyncDbWriter, DbWriter, OneWriterError, ReentrantWriteError, Transaction, WriteTimeoutError

THREADS = 6
SCHEMA = """
CREATE TABLE t (who INTEGER, n, CHECK (n IS NULL OR n <> 'bad'));
CREATE TABLE u (who INTEGER, n UNIQUE);
CREATE TABLE counter (n INTEGER);
INSERT INTO counter VALUES (0);
CREATE TRIGGER policy BEFORE INSERT ON t WHEN NEW.n = 'policy' BEGIN
    SELECT RAISE(ABORT, 'database is locked by policy');
END;
CREATE TRIGGER aborts BEFORE INSERT ON t WHEN NEW.n = 'rollback' BEGIN SELECT RAISE(ROLLBACK, 'undo it all'); END;
"""
INSERT = "INSERT INTO t VALUES (?, ?)"


class Kitchen:
    """One thread, which has rows of its own: ``who``."""

    def __init__(self, db: DbWriter, who: int, seed: int) -> None:
        self.db, self.who, self.chance = db, who, random.Random(seed)
        self.added = 0  # to the counter that all share
        self.number = 0

    def rows(self) -> list[Any]:
        return [n for (n,) in self.db.read("SELECT n FROM t WHERE who = ? ORDER BY rowid", (self.who,), timeout=HANG)]

    def run(self, *arguments: Any) -> Any:
        return self.db.run(*arguments, timeout=HANG)

    def fresh(self) -> int:
        """A number that nobody else has."""
        self.number += 1
        return self.who * 1_000_000 + self.number


Recipe = Callable[[Kitchen], None]
RECIPES: list[Recipe] = []


def recipe(function: Recipe) -> Recipe:
    RECIPES.append(function)
    return function


@contextlib.contextmanager
def raises(*kinds: type[BaseException]) -> Iterator[None]:
    try:
        yield
    except kinds:
        return
    raise AssertionError(f"none of {kinds} was raised")


@recipe
def reads_before_it_writes(k: Kitchen) -> None:
    """A transaction that upgrades from reading to writing is refused at once elsewhere."""
    with k.db.transaction(timeout=HANG) as tx:
        n = tx.execute("SELECT n FROM counter").rows[0][0]
        tx.execute("UPDATE counter SET n = ?", (n + 1,))
    k.added += 1


@recipe
def unfinished_reading(k: Kitchen) -> None:
    rows = iter(k.db.read("SELECT 1 UNION SELECT 2 UNION SELECT 3", timeout=HANG))
    next(rows)
    k.run(INSERT, (k.who, 1))
    assert k.rows() == [1]
    with contextlib.suppress(LookupError), k.db.reader(timeout=HANG) as connection:
        cursor = connection.execute("SELECT 1 UNION SELECT 2")
        next(cursor)
        raise LookupError
    with raises(sqlite3.ProgrammingError):
        next(cursor)


@recipe
def parameters_that_cannot_be_bound(k: Kitchen) -> None:
    bad = [object(), {"a": 1}, 2**63, -(2**63) - 1, "x\ud83d"]
    for value in bad:
        with raises(sqlite3.Error, OverflowError, UnicodeEncodeError):
            k.run(INSERT, (k.who, value))
    with raises(OverflowError):
        k.db.run_many(INSERT, [(k.who, n) for n in (1, 2, 2**63, 4)], timeout=HANG)
    assert k.rows() == []


@recipe
def jobs_that_raise_anything(k: Kitchen) -> None:
    def job(tx: Transaction, error: BaseException) -> None:
        tx.execute(INSERT, (k.who, 1))
        raise error

    for error in (SystemExit(3), KeyboardInterrupt(), GeneratorExit(), StopIteration(), LookupError()):
        with raises(type(error)):
            k.run(lambda tx, error=error: job(tx, error))
    assert k.rows() == []


@recipe
def results_are_ones_own(k: Kitchen) -> None:
    n = k.fresh()
    found = k.run("INSERT INTO u VALUES (?, ?) RETURNING n", (k.who, n))
    assert found.rows == [(n,)]
    assert k.db.read_value("SELECT n FROM u WHERE rowid = ?", (found.lastrowid,), timeout=HANG) == n
    with raises(TypeError):
        k.run(lambda tx: tx.connection.execute("SELECT 1"))
    with raises(sqlite3.DatabaseError):
        k.run("SELECT last_insert_rowid()")


@recipe
def scripts_are_atomic(k: Kitchen) -> None:
    good = f"INSERT INTO t VALUES ({k.who}, ';'); INSERT INTO t VALUES ({k.who}, 2);"
    with raises(sqlite3.OperationalError):
        k.db.run_script(good + "INSERT INTO nosuch VALUES (1)", timeout=HANG)
    assert k.rows() == []
    with contextlib.suppress(LookupError), k.db.transaction(timeout=HANG) as tx:
        tx.executescript(good)
        raise LookupError
    assert k.rows() == []
    k.db.run_script(good, timeout=HANG)
    assert k.rows() == [";", 2]


@recipe
def nested_and_typed_transactions(k: Kitchen) -> None:
    with k.db.transaction(timeout=HANG) as tx:
        tx.execute(INSERT, (k.who, 1))
        with contextlib.suppress(LookupError), k.db.transaction() as inner:
            inner.execute(INSERT, (k.who, 2))
            raise LookupError
        for text in ("BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT s"):
            with raises(sqlite3.Error, OneWriterError):
                tx.execute(text)
        k.db.run(INSERT, (k.who, 3))
    assert k.rows() == [1, 3]


@recipe
def calls_back_into_the_queue(k: Kitchen) -> None:
    db = k.db
    k.run(lambda tx: db.run(INSERT, (k.who, 1)).rowcount)
    for wait in (db.flush, db.close, lambda: db.enqueue("SELECT 1").result(), db.checkpoint):
        with raises(ReentrantWriteError):
            k.run(lambda tx, wait=wait: wait() and None)
        with raises(ReentrantWriteError), db.transaction(timeout=HANG):
            wait()
    later: list[Any] = []

    def fails(tx: Transaction) -> None:
        later.append(db.enqueue(INSERT, (k.who, 2)))
        raise LookupError

    with raises(LookupError):
        k.run(fails)
    later[0].result(HANG)
    assert k.rows() == [1, 2]


@recipe
def withdrawn_and_timed_out(k: Kitchen) -> None:
    ticket = k.db.enqueue(INSERT, (k.who, 1))
    was_cancelled = ticket.cancel()
    late = set[int]()
    for n in range(2, 8):
        try:
            k.db.run(INSERT, (k.who, n), timeout=0.0005)
            late.add(n)
        except WriteTimeoutError as error:
            if error.started:
                with contextlib.suppress(Exception):
                    error.ticket.result(HANG)
                    late.add(n)
    k.db.flush(HANG)
    assert set(k.rows()) == late | (set() if was_cancelled else {1})


@recipe
def awaited_and_given_up(k: Kitchen) -> None:
    async def main() -> None:
        for n in range(5):
            with contextlib.suppress(TimeoutError, concurrent.futures.CancelledError, asyncio.CancelledError):
                await asyncio.wait_for(AsyncDbWriter.wrap(k.db).run(INSERT, (k.who, n)), 0.0005)
        await AsyncDbWriter.wrap(k.db).run(INSERT, (k.who, 9))

    asyncio.run(main())
    assert k.rows()[-1] == 9


@recipe
def errors_that_say_locked_and_are_not(k: Kitchen) -> None:
    began = monotonic()
    with raises(sqlite3.IntegrityError):
        k.run(INSERT, (k.who, "policy"))
    with raises(sqlite3.IntegrityError):
        k.run(INSERT, (k.who, "rollback"))
    for sql in ("SELECT * FROM nope", "SELEC 1", "SELECT nope FROM t", "VACUUM"):
        with raises(sqlite3.Error):
            k.run(sql)
    assert monotonic() - began < HANG
    assert k.rows() == []


@recipe
def generators_are_used_once(k: Kitchen) -> None:
    k.db.run_many(INSERT, ((k.who, n) for n in range(5)), timeout=HANG)

    def broken() -> Iterator[Any]:
        yield k.who, 7
        raise LookupError

    with raises(LookupError):
        k.db.run_many(INSERT, broken(), timeout=HANG)
    assert k.rows() == [0, 1, 2, 3, 4]


@recipe
def parameters_that_change_later(k: Kitchen) -> None:
    data, buffer = bytearray(b"before"), ctypes.create_string_buffer(b"before", 6)
    tickets = [k.db.enqueue(INSERT, (k.who, value)) for value in (data, memoryview(data), buffer)]
    data[:], buffer.raw = b"change", b"change"
    for ticket in tickets:
        ticket.result(HANG)
    assert k.rows() == [b"before"] * 3
    k.run("INSERT INTO t VALUES (:who, :n)", defaultdict(lambda: 0, who=k.who))
    assert k.rows()[-1] == 0


@recipe
def rows_left_unread(k: Kitchen) -> None:
    k.run(lambda tx: tx.connection.execute(f"INSERT INTO t VALUES ({k.who}, 1), ({k.who}, 2) RETURNING n").fetchone())
    assert k.rows() == [1, 2]
    with k.db.transaction(timeout=HANG) as tx:
        lent = tx.connection
        lent.executemany(
            f"INSERT INTO t VALUES ({k.who}, ?)", lent.execute("SELECT n FROM t WHERE who = ? ORDER BY n", (k.who,))
        )
        with k.db.transaction() as inner:
            inner.connection.execute("SELECT n FROM t")
    assert k.rows() == [1, 2, 1, 2]
    k.run("PRAGMA user_version")


@recipe
def temporary_tables_end_with_their_job(k: Kitchen) -> None:
    for n in range(2):
        k.run(lambda tx, n=n: tx.execute("CREATE TEMP TABLE work AS SELECT ? AS n", (n,)) and None)
        with k.db.transaction(timeout=HANG) as tx:
            tx.execute("CREATE TEMP TABLE t AS SELECT 1 AS who, 2 AS n")
            tx.execute(INSERT, (k.who, "in the temporary one"))
    k.run(INSERT, (k.who, 5))
    assert k.rows() == [5]


@recipe
def answers_of_one_connection(k: Kitchen) -> None:
    for sql in ("PRAGMA data_version", "SELECT last_insert_rowid()", "SELECT changes()"):
        with raises(sqlite3.DatabaseError):
            k.db.read(sql, timeout=HANG)
    with k.db.reader(timeout=HANG) as connection:
        connection.execute("PRAGMA data_version").fetchall()
        with raises(sqlite3.DatabaseError):
            connection.execute("DELETE FROM t")
        with raises(sqlite3.Error):
            sqlite3.Cursor(connection).execute("DELETE FROM t")


@recipe
def left_by_another_thread(k: Kitchen) -> None:
    block = k.db.transaction(timeout=HANG)
    tx, stop = block.__enter__(), threading.Event()

    def use() -> None:
        with contextlib.suppress(OneWriterError, sqlite3.Error):
            while not stop.is_set():
                with tx.savepoint():
                    tx.execute(INSERT, (k.who, 1))

    thread = threading.Thread(target=use)
    thread.start()
    try:
        with contextlib.suppress(OneWriterError, sqlite3.Error):
            block.__exit__(LookupError, LookupError(), None)
    finally:
        stop.set()
        thread.join()
    assert k.rows() == []


@recipe
def a_block_that_is_lost(k: Kitchen) -> None:
    def generate() -> Iterator[None]:
        with k.db.transaction(timeout=HANG) as tx:
            tx.execute(INSERT, (k.who, 1))
            yield

    generator = generate()
    next(generator)
    del generator
    k.run(INSERT, (k.who, 2))
    assert k.rows() == [2]


@recipe
def rolled_back_by_sqlite(k: Kitchen) -> None:
    tickets = [k.db.enqueue(INSERT, (k.who, n)) for n in (1, "rollback", 2, "bad", 3)]
    for ticket in tickets[::2]:
        ticket.result(HANG)
    for ticket in tickets[1::2]:
        with raises(sqlite3.IntegrityError):
            ticket.result(HANG)
    assert k.rows() == [1, 2, 3]


def cook(k: Kitchen, until: float, outcome: Outcome) -> None:
    while monotonic() < until:
        made = k.chance.choice(RECIPES)
        try:
            k.run("DELETE FROM t WHERE who = ?", (k.who,))
            made(k)
        except BaseException as error:
            outcome.find(f"{made.__name__}: {type(error).__name__}: {str(error)[:300]}")
        outcome.trials += 1


def run(size: float, seed: int, folder: Path) -> Outcome:
    """For ``size`` seconds."""
    outcome, path = Outcome(), folder / "app.db"
    with DbWriter(path, readers=3, slow_after=60, on_error=lambda ticket: None) as db:
        db.run_script(SCHEMA)
        kitchens = [Kitchen(db, who, seed * 100 + who) for who in range(THREADS)]
        until = monotonic() + size
        threads = [threading.Thread(target=cook, args=(k, until, outcome), daemon=True) for k in kitchens]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG + size)
            if thread.is_alive():
                outcome.hung += 1
                outcome.find(f"a thread hangs: {db.health}")
        added = sum(k.added for k in kitchens)
        report = db.close(HANG)
        outcome.acknowledged = report.committed
        if report.unfinished:
            outcome.find(f"unfinished: {report}")
    integrity(path, outcome, "recipes")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        (found,) = connection.execute("SELECT n FROM counter").fetchone()
    if found != added:
        outcome.lost += abs(added - found)
        outcome.find(f"the counter is {found}, not {added}")
    return outcome

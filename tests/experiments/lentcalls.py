"""Every attribute of a lent connection, cursor and blob, called bound and past its class, in every state of the loan.

``python tests/experiments/lentcalls.py [--rounds N] [--seed N]``: the process must live, and nothing be committed.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import random
import sqlite3
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from onewriter import DbWriter, Transaction

PER_STATE = 40  # calls in each state of a loan
LONGEST = 120.0  # seconds without an end: every thread's stack is printed
PLAIN = (sqlite3.Connection, sqlite3.Cursor, sqlite3.Blob)
UNSAFE = {  # of Python, with any object: they end the object or the process, or make one that never was begun
    *("__class__", "__new__", "__dict__", "__setattr__", "__delattr__", "__init_subclass__", "__subclasshook__")
}
SQL = (
    *("SELECT n FROM t", "SELECT n FROM t UNION SELECT 7 UNION SELECT 8", "INSERT INTO t VALUES (7)", "SELECT spy(1)"),
    *(
        "INSERT INTO t VALUES (8), (9) RETURNING n",
        "COMMIT",
        "BEGIN",
        "ROLLBACK",
        "SAVEPOINT s",
        "RELEASE s",
        "f",
        "no",
    ),
    *("DROP TABLE t", "PRAGMA table_info(t)", "INSERT INTO t VALUES (?)", "SELECT ?", "CREATE TABLE u (n)", "t", "b"),
)


class Leak(BaseException):
    """SQLite's own connection, cursor or blob was seen."""


class Cursor(sqlite3.Cursor):
    """A library's, which keeps the connection it was made with."""

    def __init__(self, connection: Any) -> None:
        super().__init__(connection)
        self.kept = connection


class Row(sqlite3.Row):
    def __new__(cls, cursor: Any, row: Any) -> Any:
        look(cursor)
        return super().__new__(cls, cursor, row)


leaks: list[str] = []


def look(thing: Any) -> None:
    """Note what is the gateway's own."""
    raw = type(thing) in (sqlite3.Connection, sqlite3.Blob)
    if raw or (type(thing) is sqlite3.Cursor and type(getattr(thing, "connection", None)) is sqlite3.Connection):
        leaks.append(repr(thing))


class Caller:
    """Calls at random what a loan has given out."""

    def __init__(self, connection: Any, seed: int, writes: bool) -> None:
        self.connection = connection
        self.is_alone = False
        self.random = random.Random(seed)
        self.things: list[Any] = [
            connection,
            connection.cursor(),
            connection.execute(SQL[1]),
            connection.cursor(Cursor),
        ]
        self.things += [sqlite3.Cursor(connection), connection.blobopen("b", "data", 1, readonly=not writes)]
        for cursor in self.things[1:4]:
            look(cursor.connection)
        with contextlib.suppress(sqlite3.Error):
            connection.create_function("spy", -1, self.spy)

    def spy(self, *arguments: Any) -> Any:
        """What Python code that sqlite3 or SQLite calls does: it looks, and sometimes calls back."""
        for argument in arguments:
            look(argument)
        if self.random.random() < 0.2:
            with contextlib.suppress(Exception):
                self.connection.execute("SELECT 1").fetchall()
        return 1

    def argument(self) -> Any:
        pool: tuple[Any, ...] = (*SQL, *SQL, (1,), [(1,), (2,)], {}, 0, 1, -1, None, b"x", self.spy, 2**40)
        pool += (sqlite3.Row, Row, slice(0, 1), iter([(1,), (2,)]), Cursor, *self.things)
        return self.random.choice(pool)

    def call(self) -> None:
        thing = self.random.choice(self.things)
        kind = self.random.choice([kind for kind in PLAIN if isinstance(thing, kind)])
        name = self.random.choice(sorted({*dir(kind)} - UNSAFE))
        arguments = [self.argument() for _ in range(self.random.choice((0, 0, 1, 1, 1, 2, 2, 3)))]
        if name == "backup" or (name == "__init__" and self.random.random() < 0.5):
            arguments = [self.connection]
        with contextlib.suppress(Exception):
            if self.random.random() < 0.15:
                setattr(thing, name, self.argument())
                return
            bound = self.random.random() < 0.6
            if kind is sqlite3.Connection and name == "__init__":
                # To open anew what another thread uses, or with an error, makes any connection crash later: CPython's.
                if not bound and self.is_alone:
                    sqlite3.Connection.__init__(thing, ":memory:")
                return
            found = getattr(thing, name) if bound else getattr(kind, name)
            if not callable(found):
                look(found)
                if not bound:
                    look(found.__get__(thing))
                return
            outcome = found(*arguments) if bound else found(thing, *arguments)
            look(outcome)
            if isinstance(outcome, sqlite3.Cursor | sqlite3.Blob) and len(self.things) < 12:
                self.things.append(outcome)

    def calls(self, count: int = PER_STATE) -> None:
        for _ in range(count):
            self.call()

    def elsewhere(self) -> threading.Thread:
        """Calls of another thread, beside those of this one."""
        other = Caller.__new__(Caller)
        other.__dict__.update(self.__dict__, random=random.Random(self.random.random()))
        thread = threading.Thread(target=other.calls, args=(4 * PER_STATE,))
        thread.start()
        return thread


Round = Callable[[DbWriter, int, Callable[[Any], None]], object]


def in_a_job(db: DbWriter, seed: int, use: Callable[[Any], None]) -> None:
    def job(tx: Transaction) -> None:
        use(tx.connection)
        raise LookupError

    db.run(job)


def in_a_block(db: DbWriter, seed: int, use: Callable[[Any], None]) -> None:
    with db.transaction(max_hold=(0.005, 30.0)[seed % 2]) as tx:
        use(tx.connection)
        raise LookupError


def in_a_nested_block(db: DbWriter, seed: int, use: Callable[[Any], None]) -> None:
    with db.transaction(max_hold=(0.005, 30.0)[seed % 2]) as tx:
        with db.transaction() as inner:
            use(inner.connection)
        use(tx.connection)
        raise LookupError


def in_a_reader(db: DbWriter, seed: int, use: Callable[[Any], None]) -> None:
    with db.reader() as connection:
        use(connection)


WAYS: tuple[Round, ...] = (in_a_job, in_a_block, in_a_nested_block, in_a_reader)


def one_round(db: DbWriter, way: Round, seed: int) -> None:
    callers: list[Caller] = []
    threads: list[threading.Thread] = []

    def use(connection: Any) -> None:
        caller = Caller(connection, seed, writes=way is not in_a_reader)
        callers.append(caller)
        threads.append(caller.elsewhere())  # which goes on as the loan ends
        caller.calls()

    with contextlib.suppress(Exception):
        way(db, seed, use)
    for caller in callers:
        caller.calls()
    for thread in threads:
        thread.join(LONGEST)
        assert not thread.is_alive()
    for caller in callers:
        caller.is_alone = True
        caller.calls()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    faulthandler.dump_traceback_later(LONGEST + options.rounds, exit=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # sqlite3.Connection.__init__ makes files
        with DbWriter("app.db", synchronous="OFF", slow_after=60.0) as db:
            db.run_script("CREATE TABLE t (n); CREATE TABLE b (data); INSERT INTO b VALUES (zeroblob(100))")
            db.run("INSERT INTO t VALUES (1), (2)")
            for seed in range(options.seed, options.seed + options.rounds):
                for way in WAYS:
                    one_round(db, way, seed)
                    where = f"{way.__name__}, seed {seed}"
                    assert not leaks, (where, leaks)
                    found = db.run("SELECT n FROM t").rows
                    assert [tuple(row) for row in found] == [(1,), (2,)], (where, found)
                    assert db.read("SELECT count(*) FROM t") == [(2,)], where
                    assert not db.checkpoint().busy, where
                    assert db.health == "ok", (where, db.health)
            assert db.read_value("SELECT data FROM b") == bytes(100)
        os.chdir("/")
    print("lived")


if __name__ == "__main__":
    main()

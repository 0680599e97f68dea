"""What a statement costs on a lent connection, beside the same on a plain one: ``python tests/bench/lent.py``."""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from pathlib import Path
from time import perf_counter

from onewriter import DbWriter

ROUNDS, TIMES = 7, 20_000
STATEMENTS = {
    "SELECT of one row": ("SELECT n FROM t WHERE n = ?", True),
    "INSERT in a transaction": ("INSERT INTO u VALUES (?)", False),
}


def seconds(connection: sqlite3.Connection, sql: str, fetches: bool) -> float:
    """For one statement, in the best of the rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = perf_counter()
        for n in range(TIMES):
            cursor = connection.execute(sql, (n % 1000,))
            if fetches:
                cursor.fetchone()
        best = min(best, perf_counter() - start)
    return best / TIMES


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, DbWriter(Path(folder) / "app.db", slow_after=60) as db:
        db.run_script("CREATE TABLE t (n INTEGER PRIMARY KEY); CREATE TABLE u (n)")
        db.run_many("INSERT INTO t VALUES (?)", [(n,) for n in range(1000)])
        for name, (sql, fetches) in STATEMENTS.items():
            with contextlib.closing(sqlite3.connect(Path(folder) / "app.db")) as plain:
                alone = seconds(plain, sql, fetches)
            with db.transaction() as tx:
                lent = seconds(tx.connection, sql, fetches)
            print(f"{name}: plain {alone * 1e6:.2f} µs, lent {lent * 1e6:.2f} µs: {lent / alone:.1f} times")


if __name__ == "__main__":
    main()

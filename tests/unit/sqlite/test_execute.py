"""Executor: one statement, run to its end."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from onewriter import DbWriter


@pytest.mark.parametrize("how", ["without a transaction", "run", "function", "block"])
def test_a_statement_whose_rows_have_no_columns_runs_to_its_end(path: Path, how: str) -> None:
    """What is left half run would keep SQLite's lock, or make COMMIT fail."""
    pragma, free = "PRAGMA incremental_vacuum(3)", "PRAGMA freelist_count"
    with DbWriter(path, pragmas={"auto_vacuum": 2}, lock_timeout=1.0) as db, closing(sqlite3.connect(path)) as other:
        db.run("CREATE TABLE t (data)")
        db.run("INSERT INTO t VALUES (zeroblob(100000))")
        db.run("DELETE FROM t")
        before = db.read_value(free)
        if how == "without a transaction":
            db.run_without_transaction(pragma)
        elif how == "run":
            db.run(pragma)
        elif how == "function":
            db.run(lambda tx: tx.execute(pragma) and None)
        else:
            with db.transaction() as tx:
                tx.execute(pragma)
        assert db.read_value(free) == before - 3
        other.execute("INSERT INTO t VALUES (1)")
        other.commit()


@pytest.mark.parametrize(
    ("sql", "params"), [("PRAGMA incremental_vacuum; DELETE FROM t", ()), ("PRAGMA incremental_vacuum", (1,))]
)
def test_such_a_statement_is_one_and_has_no_parameters(path: Path, sql: str, params: tuple[int, ...]) -> None:
    with DbWriter(path, pragmas={"auto_vacuum": 2}) as db:
        db.run("CREATE TABLE t (data)")
        db.run("INSERT INTO t VALUES (1)")
        with pytest.raises((sqlite3.Warning, sqlite3.ProgrammingError)):
            db.run(sql, params)
        assert db.read_value("SELECT count(*) FROM t") == 1

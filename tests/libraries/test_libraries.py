"""Libraries that want a ``sqlite3.Connection`` write and read through the gateway."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from typing import Any

import pandas
import pytest
import sqlalchemy
import sqlite_utils
from sqlalchemy.pool import NullPool

from onewriter import DbWriter, Transaction

ROWS = [{"id": 1, "name": "ada"}, {"id": 2, "name": "grace"}]


def in_a_block(db: DbWriter, function: Callable[[sqlite3.Connection], object]) -> None:
    with db.transaction() as tx:
        function(tx.connection)


def in_a_job(db: DbWriter, function: Callable[[sqlite3.Connection], object]) -> None:
    def job(tx: Transaction) -> None:
        function(tx.connection)

    db.run(job)


WAYS = pytest.mark.parametrize("way", [in_a_block, in_a_job])


def write_with_sqlite_utils(connection: sqlite3.Connection) -> None:
    database = sqlite_utils.Database(connection)
    people: Any = database["people"]
    people.insert_all(ROWS, pk="id")
    people.upsert({"id": 2, "name": "hopper"}, pk="id")
    people.insert({"id": 3, "name": "mary"})
    people.create_index(["name"])
    people.delete(3)
    assert people.count == 2


def write_with_pandas(connection: sqlite3.Connection) -> None:
    pandas.DataFrame(ROWS).to_sql("people", connection, index=False)
    pandas.DataFrame([{"id": 3, "name": "mary"}]).to_sql("people", connection, index=False, if_exists="append")
    assert len(pandas.read_sql("SELECT * FROM people", connection)) == 3


@WAYS
@pytest.mark.parametrize("write", [write_with_sqlite_utils, write_with_pandas])
def test_a_library_writes_all_or_nothing(
    any_db: DbWriter, way: Callable[..., None], write: Callable[[sqlite3.Connection], None]
) -> None:
    any_db.run("CREATE TABLE t (n INTEGER)")

    def fail(connection: sqlite3.Connection) -> None:
        write(connection)
        raise LookupError

    with pytest.raises(LookupError):
        way(any_db, fail)
    assert any_db.read("SELECT name FROM sqlite_schema WHERE name = 'people'") == []
    way(any_db, write)
    assert any_db.read("SELECT id FROM people")[:2] == [(1,), (2,)]
    any_db.run("INSERT INTO t VALUES (1)")
    assert any_db.read_value("SELECT n FROM t") == 1


@WAYS
def test_a_failing_insert_of_sqlite_utils_undoes_itself_only(any_db: DbWriter, way: Callable[..., None]) -> None:
    def write(connection: sqlite3.Connection) -> None:
        people: Any = sqlite_utils.Database(connection)["people"]
        people.insert_all(ROWS, pk="id")
        with pytest.raises(sqlite3.IntegrityError):
            people.insert_all([{"id": 9, "name": "x"}, {"id": 1, "name": "again"}], pk="id")

    way(any_db, write)
    assert any_db.read("SELECT id FROM people WHERE id < 9") == [(1,), (2,)]


def test_pandas_reads_a_snapshot(any_db: DbWriter) -> None:
    in_a_job(any_db, write_with_pandas)
    with any_db.reader() as connection:
        any_db.run("DELETE FROM people")
        assert list(pandas.read_sql("SELECT name FROM people", connection)["name"]) == ["ada", "grace", "mary"]
    with any_db.reader() as connection:
        assert pandas.read_sql("SELECT name FROM people", connection).empty


def test_sqlalchemy_reads_through_a_reader(any_db: DbWriter) -> None:
    in_a_job(any_db, write_with_pandas)
    for _ in range(6):  # there are four connections
        with any_db.reader() as connection:
            engine = sqlalchemy.create_engine(
                "sqlite://", creator=lambda connection=connection: connection, poolclass=NullPool
            )
            with engine.connect() as session:
                names = session.execute(sqlalchemy.text("SELECT name FROM people ORDER BY id")).scalars().all()
                assert names == ["ada", "grace", "mary"]
            with contextlib.suppress(sqlalchemy.exc.OperationalError), engine.begin() as session:
                session.execute(sqlalchemy.text("DELETE FROM people"))
            engine.dispose()
    assert any_db.read_value("SELECT count(*) FROM people") == 3

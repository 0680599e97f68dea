"""tables_read and Written: which tables a query reads, and which a batch has written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import DEADLINE, eventually, parked, pool_of, session_of, state_of
from onewriter import DbWriter, Transaction
from onewriter.live.tables import MOST_TEXTS, Written, tables_read
from onewriter.read.claim import new_claim

SCHEMA = """
CREATE TABLE a (id INTEGER PRIMARY KEY, x);
CREATE TABLE b (id INTEGER PRIMARY KEY AUTOINCREMENT, y REFERENCES a ON DELETE CASCADE ON UPDATE CASCADE);
CREATE TABLE c (z UNIQUE);
CREATE TABLE json_like (j);
CREATE VIEW v AS SELECT x FROM a;
CREATE VIRTUAL TABLE f USING fts5 (t);
CREATE TRIGGER from_a AFTER INSERT ON a BEGIN UPDATE c SET z = NEW.x; END;
CREATE TRIGGER into_v INSTEAD OF INSERT ON v BEGIN INSERT INTO a (x) VALUES (NEW.x); END;
"""


@pytest.fixture
def db(path: Path) -> Iterator[DbWriter]:
    with DbWriter(path) as gateway:
        gateway.run_script(SCHEMA)
        yield gateway


def read_by(db: DbWriter, sql: str, params: Any = ()) -> set[str] | None:
    tables = pool_of(db).use(new_claim(sql), tables_read, sql, params)
    return None if tables is None else set(tables)


@pytest.mark.parametrize(
    ("sql", "tables"),
    [
        ("SELECT x FROM a", {"a"}),
        ("select X from A", {"a"}),
        ("SELECT count(*) FROM a", {"a"}),
        ("SELECT 1 FROM a", {"a"}),
        ("SELECT x FROM v", {"a", "v"}),
        ("SELECT (SELECT max(y) FROM b) FROM a WHERE EXISTS (SELECT 1 FROM c)", {"a", "b", "c"}),
        ("WITH q AS (SELECT x FROM a) SELECT * FROM q JOIN b", {"a", "b"}),
        ("SELECT x FROM a UNION SELECT z FROM c", {"a", "c"}),
        ("SELECT value FROM a, json_each(a.x)", {"a"}),
        ("SELECT 1", set()),
        ("VALUES (1)", set()),
        ("SELECT x FROM a -- the end", {"a"}),
        ("SELECT t FROM f", None),
        ("SELECT name FROM sqlite_schema", None),
        ("SELECT seq FROM sqlite_sequence", None),
        ("SELECT * FROM pragma_page_count", None),
        ("PRAGMA page_count", None),
        ("EXPLAIN SELECT x FROM a", None),
        ("SELECT x FROM nowhere", None),
    ],
)
def test_a_query_reads_these_tables(db: DbWriter, sql: str, tables: set[str] | None) -> None:
    for _ in range(2):  # the second time, too, although the connection knows the text
        assert read_by(db, sql) == tables


def test_a_query_with_parameters_is_no_other(db: DbWriter) -> None:
    assert read_by(db, "SELECT x FROM a WHERE x = ?", (1,)) == {"a"}
    assert read_by(db, "SELECT x FROM a WHERE x = :x", {"x": 1}) == {"a"}


def test_a_text_factory_of_the_user_does_not_see_the_opcodes(path: Path) -> None:
    with DbWriter(path, on_connect=lambda connection, _: setattr(connection, "text_factory", len)) as db:
        db.run_script(SCHEMA)
        assert read_by(db, "SELECT t FROM f") is None
        assert db.read("SELECT 'abc'") == [(3,)]


class Noting:
    """Runs a job as a batch of its own, and says what it has written; in the place of what is watched."""

    def __init__(self, db: DbWriter) -> None:
        self.db = db
        self.written = Written()
        self.found: dict[Any, set[str] | None] = {}  # by the first job of each batch
        state_of(db).live = self

    def settled(self, session: Any, jobs: Any) -> None:
        tables = self.written.take(session, jobs)
        # Spurious, where SQLite declares a virtual table.
        self.found[jobs[0]] = None if tables is None else set(tables - {"sqlite_master"})

    def look(self, session: Any) -> None:
        pass

    end = look

    def run(self, what: Any, *args: Any) -> set[str] | None:
        return self.of(self.db.enqueue(what, *args))

    def of(self, *tickets: Any) -> set[str] | None:
        for ticket in tickets:
            ticket.exception(DEADLINE)
        eventually(lambda: tickets[0] in self.found)
        return self.found[tickets[0]]


@pytest.fixture
def noting(db: DbWriter) -> Noting:
    found = Noting(db)
    found.run(lambda tx: None)
    assert next(iter(found.found.values())) is None  # what was prepared before the first one was not noted
    return found


@pytest.mark.parametrize(
    ("sql", "tables"),
    [
        ("INSERT INTO c VALUES (1)", {"c"}),
        ("UPDATE c SET z = 1", {"c"}),
        ("DELETE FROM c", {"c"}),
        ("REPLACE INTO c VALUES (1)", {"c"}),
        ("INSERT INTO c VALUES (1) ON CONFLICT DO UPDATE SET z = 2", {"c"}),
        ("INSERT INTO a (x) VALUES (1)", {"a", "c"}),
        ("INSERT INTO v VALUES (1)", {"v", "a", "c"}),
        ("DELETE FROM a", {"a", "b"}),
        ("UPDATE a SET id = id + 1", {"a", "b"}),
        ("SELECT x FROM a", set()),
    ],
)
def test_a_statement_writes_these_tables_whatever_has_run_before(
    noting: Noting, sql: str, tables: set[str] | None
) -> None:
    for _ in range(2):
        assert noting.run(sql) == tables
        assert noting.run(lambda tx: tx.execute(sql)) == tables
        assert noting.run("INSERT INTO json_like VALUES (1)") == {"json_like"}


@pytest.mark.parametrize(
    "sql", ["CREATE TABLE new (n)", "DROP TABLE c", "ALTER TABLE c ADD COLUMN n", "PRAGMA recursive_triggers = 1"]
)
def test_what_may_change_more_than_tables_may_have_written_any(noting: Noting, sql: str) -> None:
    assert noting.run(sql) is None


def test_a_lent_connection_may_have_written_any(noting: Noting) -> None:
    assert noting.run(lambda tx: tx.connection.blobopen) is None
    assert noting.run("DELETE FROM c") == {"c"}


def test_sqlite_is_not_asked_again_about_a_text_whose_tables_are_known(noting: Noting) -> None:
    sql = "INSERT INTO c (z) VALUES (?)"
    guard = session_of(noting.db).guard
    for n in range(2):
        before = guard.authorizer.cache_info().misses
        assert noting.run(sql, (n,)) == {"c"}
        assert guard.authorizer.cache_info().misses > before
    for n in range(2, 4):
        before = guard.authorizer.cache_info().misses
        assert noting.run(sql, (n,)) == {"c"}
        assert guard.authorizer.cache_info().misses == before


def test_a_function_behind_known_texts_may_have_written_what_they_write(noting: Noting) -> None:
    """Its statements may be in the statement cache by them."""
    sql = "DELETE FROM c"
    for _ in range(3):
        assert noting.run(sql) == {"c"}
    assert noting.run(lambda tx: (tx.execute(sql), tx.execute("DELETE FROM b"))) == {"b", "c"}
    assert noting.run(lambda tx: tx.execute("DELETE FROM b")) == {"b"}


def test_a_text_is_remembered_with_its_own_tables_only(noting: Noting) -> None:
    for _ in range(3):
        assert noting.run("DELETE FROM c") == {"c"}
    noting.run("DELETE FROM b")  # or what was written before it
    assert noting.run("DELETE FROM b") == {"b"}
    assert noting.run("DELETE FROM b") == {"b"}


def test_the_tables_of_a_batch_are_not_taken_for_those_of_one_of_its_texts(noting: Noting) -> None:
    db = noting.db
    with parked(db):
        tickets = [db.enqueue("DELETE FROM c"), db.enqueue("DELETE FROM b")]
    assert noting.of(*tickets) == {"b", "c"}
    assert noting.run("DELETE FROM c") == {"c"}
    assert noting.run("DELETE FROM b") == {"b"}


def test_what_a_text_writes_is_forgotten_with_the_schema(noting: Noting) -> None:
    for _ in range(2):
        assert noting.run("INSERT INTO json_like VALUES (1)") == {"json_like"}
    noting.run("CREATE TRIGGER later AFTER INSERT ON json_like BEGIN DELETE FROM c; END")
    assert noting.run("INSERT INTO json_like VALUES (1)") == {"json_like", "c"}
    assert noting.run("INSERT INTO json_like VALUES (1)") == {"json_like", "c"}


def test_a_text_that_failed_is_not_remembered(noting: Noting) -> None:
    noting.run("DELETE FROM b")
    noting.run("INSERT INTO c VALUES (nothing())")
    assert list(noting.written._by_text) == ["DELETE FROM b"]


def test_a_great_many_texts_are_not_kept(noting: Noting) -> None:
    for n in range(MOST_TEXTS + 2):
        noting.written._remember(f"SELECT {n}", frozenset())
    assert len(noting.written._by_text) == 2


def test_nothing_is_noted_while_nobody_asks(db: DbWriter) -> None:
    def write(tx: Transaction) -> None:
        tx.execute("INSERT INTO c VALUES (1)")

    db.run(write)
    assert session_of(db).guard.tables is None

"""places_read and Written: what a query reads, and what a batch has written."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import DEADLINE, eventually, parked, pool_of, session_of, state_of
from onewriter import DbWriter, Transaction
from onewriter.live.places import MOST_TEXTS, Places, Written, places_read, schema_versions
from onewriter.read.claim import new_claim

SCHEMA = """
CREATE TABLE a (id INTEGER PRIMARY KEY, x);
CREATE TABLE b (id INTEGER PRIMARY KEY AUTOINCREMENT, y REFERENCES a ON DELETE CASCADE ON UPDATE CASCADE);
CREATE TABLE c (z UNIQUE);
CREATE TABLE json_like (j, k, x, t);
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


def shown(places: Places) -> set[str] | None:
    """The table's rows as ``t``, a column as ``t.c``."""
    return None if places is None else {f"{table}.{column}".rstrip(".") for table, column in places}


def read_by(db: DbWriter, sql: str, params: Any = ()) -> set[str] | None:
    return shown(pool_of(db).use(new_claim(sql), places_read, sql, params))


@pytest.mark.parametrize(
    ("sql", "places"),
    [
        ("SELECT x FROM a", {"a", "a.id", "a.x"}),
        ("select X from A", {"a", "a.id", "a.x"}),
        ("SELECT count(*) FROM a", {"a", "a.id"}),
        ("SELECT rowid FROM a", {"a", "a.id"}),
        ("SELECT rowid FROM json_like", {"json_like", "json_like.ROWID"}),
        ("SELECT j FROM json_like", {"json_like", "json_like.j"}),
        ("SELECT j FROM json_like WHERE k > 1", {"json_like", "json_like.j", "json_like.k"}),
        ("SELECT sum(j) OVER (ORDER BY k) FROM json_like", {"json_like", "json_like.j", "json_like.k"}),
        (
            "SELECT (SELECT max(y) FROM b) FROM a WHERE EXISTS (SELECT 1 FROM c)",
            {"a", "a.id", "b", "b.id", "b.y", "c", "c.z"},
        ),
        ("WITH q AS (SELECT x FROM a) SELECT * FROM q JOIN b", {"a", "a.id", "a.x", "b", "b.id", "b.y"}),
        ("SELECT j FROM json_like UNION SELECT z FROM c", {"json_like", "json_like.j", "c", "c.z"}),
        ("SELECT value FROM json_like, json_each(j)", {"json_like", "json_like.j"}),
        ("SELECT count(*) FROM JSON_EACH('[1]')", set()),
        ("SELECT 1", set()),
        ("VALUES (1)", set()),
        ("SELECT k FROM json_like -- the end", {"json_like", "json_like.k"}),
        ("SELECT t FROM f", None),
        ("SELECT 1 FROM json_like JOIN f USING (t)", None),
        ("SELECT count(*) FROM f_content", None),
        ("SELECT name FROM sqlite_schema", None),
        ("SELECT count(*) FROM SQLITE_SCHEMA", None),
        ("SELECT 1 FROM sqlite_schema AS p JOIN sqlite_schema AS q USING (name)", None),
        ("SELECT seq FROM sqlite_sequence", None),
        ("SELECT * FROM pragma_page_count", None),
        ("PRAGMA page_count", None),
        ("EXPLAIN SELECT x FROM a", None),
    ],
)
def test_a_query_reads_these_places(db: DbWriter, sql: str, places: set[str] | None) -> None:
    for _ in range(2):  # the second time, too, although the connection knows the text
        assert read_by(db, sql) == places


@pytest.mark.parametrize(
    "sql", ["SELECT count(*) FROM JSON_LIKE", "SELECT 1 FROM json_like NATURAL JOIN a", "SELECT x FROM joined"]
)
def test_a_table_that_sqlite_names_as_it_stands_or_not_at_all_is_read(db: DbWriter, sql: str) -> None:
    db.run("CREATE VIEW joined AS SELECT a.x FROM a JOIN json_like USING (x)")
    assert "json_like" in (read_by(db, sql) or ())


@pytest.mark.parametrize("sql", ["SELECT 1 FROM json_like JOIN a USING (x)", "SELECT v.x FROM v JOIN json_like"])
def test_a_query_that_joins_by_name_or_reads_a_view_reads_all_columns(db: DbWriter, sql: str) -> None:
    assert {"a.x", "json_like.j", "json_like.x", "json_like.k", "json_like.t"} <= (read_by(db, sql) or set())


@pytest.mark.parametrize(
    ("schema", "columns"),
    [
        ("CREATE TABLE n (p, q, r, s)", {"r"}),
        ("CREATE TABLE n (p, q, r, s, PRIMARY KEY (q, p))", {"p", "q", "r"}),
        ("CREATE TABLE n (p, q, r, s, PRIMARY KEY (q, p)) WITHOUT ROWID", {"p", "q", "r"}),
        ("CREATE TABLE n (p, q UNIQUE ON CONFLICT REPLACE, r, s)", {"q", "r"}),
        ("CREATE TABLE n (p, q, r, s); CREATE INDEX ni ON n (s, r)", {"r", "s"}),
        ("CREATE TABLE n (p, q, r, s); CREATE INDEX ni ON n (q) WHERE p > 1", {"q", "r"}),
        ("CREATE TABLE n (p, q, r, s); CREATE INDEX ni ON n (abs(p), r)", {"p", "q", "r", "s"}),
        ("CREATE TABLE n (p, q, r AS (p + q), s)", {"p", "q", "r", "s"}),
        ("CREATE TABLE n (p, q AS (p) STORED, r, s)", {"p", "q", "r", "s"}),
    ],
)
def test_what_may_decide_the_order_of_the_rows_is_read(db: DbWriter, schema: str, columns: set[str]) -> None:
    db.run_script(schema)
    assert read_by(db, "SELECT r FROM n") == {"n"} | {f"n.{column}" for column in columns}


def test_a_table_of_an_attached_database_is_read(path: Path) -> None:
    def attach(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.execute('ATTACH ? AS "the ""other"""', (str(path) + "-other",))

    with DbWriter(path, on_connect=attach) as db:
        db.run_script('CREATE TABLE "the ""other""".far (p UNIQUE, q, "r s"); CREATE TABLE near (p, q)')
        assert read_by(db, 'SELECT "r s" FROM far') == {"far", "far.p", "far.r s"}
        assert read_by(db, "SELECT near.q FROM near JOIN far USING (p)") == {
            *("near", "near.p", "near.q", "far", "far.p", "far.q", "far.r s")
        }


def test_a_query_with_parameters_is_no_other(db: DbWriter) -> None:
    places = read_by(db, "SELECT k FROM json_like WHERE j = 1")
    assert read_by(db, "SELECT k FROM json_like WHERE j = ?", (1,)) == places
    assert read_by(db, "SELECT k FROM json_like WHERE j = :j", {"j": 1}) == places


def test_versions_behind_a_lock_are_not_known(path: Path) -> None:
    with DbWriter(path, journal_mode="DELETE") as gateway, contextlib.closing(sqlite3.connect(path)) as other:
        pool = pool_of(gateway)
        gateway.run("CREATE TABLE t (n)")
        before = pool.use(new_claim("test"), schema_versions)
        assert before is not None
        other.execute("BEGIN EXCLUSIVE")
        assert pool.use(new_claim("test"), schema_versions) is None
        other.rollback()
        assert pool.use(new_claim("test"), schema_versions) == before


def test_factories_of_the_user_do_not_see_the_opcodes(path: Path) -> None:
    with DbWriter(path, on_connect=lambda connection, _: setattr(connection, "text_factory", len)) as db:
        db.run_script(SCHEMA)
        assert read_by(db, "SELECT t FROM f") is None
        assert read_by(db, "SELECT k FROM json_like") == {"json_like", "json_like.k"}
        assert db.read("SELECT 'abc'") == [(3,)]
    with DbWriter(path, row_factory=lambda cursor, row: row[0]) as db:
        assert read_by(db, "SELECT k FROM json_like") == {"json_like", "json_like.k"}


class Noting:
    """Runs a job as a batch of its own, and says what it has written; in the place of what is watched."""

    def __init__(self, db: DbWriter) -> None:
        self.db = db
        self.written = Written()
        self.found: dict[Any, set[str] | None] = {}  # by the first job of each batch
        state_of(db).live = self

    def settled(self, session: Any, jobs: Any) -> None:
        places = self.written.take(session, jobs)
        if places is not None:  # spurious, where SQLite declares a virtual table
            places = frozenset(place for place in places if place[0] != "sqlite_master")
        self.found[jobs[0]] = shown(places)

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
    ("sql", "places"),
    [
        ("INSERT INTO c VALUES (1)", {"c"}),
        ("UPDATE c SET z = 1", {"c.z"}),
        ("UPDATE json_like SET K = 1, j = 2", {"json_like.j", "json_like.k"}),
        ("UPDATE a SET rowid = 7", {"a", "b.y"}),
        ("UPDATE json_like SET _rowid_ = 7", {"json_like"}),
        ("DELETE FROM c", {"c"}),
        ("REPLACE INTO c VALUES (1)", {"c"}),
        ("INSERT INTO c VALUES (1) ON CONFLICT DO UPDATE SET z = 2", {"c", "c.z"}),
        ("INSERT INTO a (x) VALUES (1)", {"a", "c.z"}),
        ("INSERT INTO v VALUES (1)", {"v", "a", "c.z"}),
        ("DELETE FROM a", {"a", "b"}),
        ("UPDATE a SET id = id + 1", {"a.id", "b.y"}),
        ("SELECT x FROM a", set()),
    ],
)
def test_a_statement_writes_these_places_whatever_has_run_before(
    noting: Noting, sql: str, places: set[str] | None
) -> None:
    for _ in range(2):
        assert noting.run(sql) == places
        assert noting.run(lambda tx: tx.execute(sql)) == places
        assert noting.run("INSERT INTO json_like (j) VALUES (1)") == {"json_like"}


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
        assert noting.run("INSERT INTO json_like (j) VALUES (1)") == {"json_like"}
    noting.run("CREATE TRIGGER later AFTER INSERT ON json_like BEGIN DELETE FROM c; END")
    assert noting.run("INSERT INTO json_like (j) VALUES (1)") == {"json_like", "c"}
    assert noting.run("INSERT INTO json_like (j) VALUES (1)") == {"json_like", "c"}


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
    assert session_of(db).guard.places is None

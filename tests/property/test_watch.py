"""Live queries against a model: whatever is written, and by whom, a watch gives what a read would, in order."""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, rule

from onewriter import DbWriter, ReadTimeoutError, Transaction, Watch

SCHEMA = """
CREATE TABLE IF NOT EXISTS a (id INTEGER PRIMARY KEY, x UNIQUE);
CREATE TABLE IF NOT EXISTS b (id INTEGER PRIMARY KEY, y REFERENCES a ON DELETE CASCADE ON UPDATE SET NULL);
CREATE TABLE IF NOT EXISTS c (z);
CREATE TABLE IF NOT EXISTS d (p, q, r, s AS (q + 1), u UNIQUE ON CONFLICT REPLACE);
CREATE TABLE IF NOT EXISTS e (p, q, r, k, PRIMARY KEY (k, p)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS g (p, q, r, k);
INSERT INTO d (p, q, r, u) VALUES (1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3);
INSERT INTO e VALUES (1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3);
INSERT INTO g VALUES (1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3);
CREATE TRIGGER IF NOT EXISTS from_g AFTER UPDATE OF r ON g BEGIN UPDATE d SET p = NEW.r; END;
CREATE VIEW IF NOT EXISTS v AS SELECT x, (SELECT count(*) FROM b) AS n FROM a;
CREATE TRIGGER IF NOT EXISTS from_c AFTER INSERT ON c WHEN NEW.z > 2 BEGIN DELETE FROM a WHERE x = NEW.z - 2; END;
"""
WRITES = [
    "INSERT OR IGNORE INTO a (x) VALUES (?)",
    "INSERT OR REPLACE INTO a (x) VALUES (?)",
    "INSERT INTO a (x) VALUES (?)",  # fails at times
    "UPDATE OR REPLACE a SET x = x + 1 WHERE x < ?",
    "UPDATE a SET id = id + 100 WHERE x = ?",
    "DELETE FROM a WHERE x = ?",
    "INSERT INTO b (y) SELECT max(id) FROM a WHERE x > ?",
    "DELETE FROM b WHERE id % 4 = ?",
    "INSERT INTO c VALUES (?)",
    "DELETE FROM c WHERE z = ?",
    "INSERT INTO a (x) VALUES (?) ON CONFLICT DO UPDATE SET x = x + 10",
    *(f"UPDATE {table} SET {column} = random() % 3 WHERE p > ?" for table in "deg" for column in "pqr"),
    "UPDATE d SET u = ? WHERE rowid % 2",  # replaces
    "UPDATE d SET rowid = -rowid - 3 * abs(rowid) WHERE p = ?",
    "UPDATE OR REPLACE e SET k = ?",
    "UPDATE OR IGNORE e SET (p, k) = (k, p) WHERE k > ?",
    "UPDATE g SET _rowid_ = -rowid WHERE p > ?",
    "UPDATE g SET q = d.r FROM d WHERE d.p > ?",
    "INSERT INTO e VALUES (?, 0, 0, 0) ON CONFLICT DO UPDATE SET r = r + 1",
]
CHANGES = [
    "CREATE INDEX IF NOT EXISTS i ON c (z)",
    "DROP INDEX IF EXISTS i",
    "DROP VIEW v; CREATE VIEW v AS SELECT z AS x, 0 AS n FROM c",
    "DROP VIEW v; CREATE VIEW v AS SELECT x, (SELECT count(*) FROM b) AS n FROM a",
    "CREATE TRIGGER IF NOT EXISTS into_b AFTER INSERT ON a BEGIN INSERT INTO b (y) VALUES (NEW.id); END",
    "DROP TRIGGER IF EXISTS into_b",
    "CREATE INDEX IF NOT EXISTS g_i ON g (q, p)",
    "DROP INDEX IF EXISTS g_i",
    "CREATE INDEX IF NOT EXISTS g_e ON g (abs(r), p, k)",
    "DROP INDEX IF EXISTS g_e",
    "CREATE INDEX IF NOT EXISTS d_i ON d (s, p)",
    "DROP INDEX IF EXISTS d_i",
]
QUERIES = [
    "SELECT x FROM a ORDER BY x",
    "SELECT count(*) FROM a",
    "SELECT y FROM b ORDER BY id",
    "SELECT z FROM c ORDER BY rowid",
    "SELECT x, n FROM v ORDER BY x",
    "SELECT id FROM a WHERE EXISTS (SELECT 1 FROM c WHERE z = a.x) ORDER BY id",
    "SELECT value FROM json_each('[1]') WHERE value IN (SELECT x FROM a)",
    "SELECT p FROM d",  # in any order, and yet as a read would have them
    "SELECT s FROM d ORDER BY rowid",
    "SELECT count(*) FROM D",
    "SELECT r FROM e",
    "SELECT q FROM e LIMIT 1",
    "SELECT p FROM g",
    "SELECT k FROM g LIMIT 1",
    "SELECT rowid FROM g",
    "SELECT count(*) FROM d JOIN g USING (q)",
    "SELECT 1 FROM e NATURAL JOIN g",
    "SELECT d.p FROM d JOIN e ON d.r = e.r ORDER BY e.q",
    "SELECT sum(q) OVER (ORDER BY r) FROM g",
    "SELECT 1 FROM (SELECT DISTINCT r FROM g)",
]
write = st.tuples(st.sampled_from(WRITES), st.integers(0, 4))


class Watched(RuleBasedStateMachine):
    """One gateway, and a plain connection; ``seen`` has what each watch has given last."""

    live = Bundle("live")

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        folder = self.stack.enter_context(tempfile.TemporaryDirectory())
        path = Path(folder) / "watched.db"
        self.db = self.stack.enter_context(DbWriter(path, synchronous="OFF"))
        self.db.run_script(SCHEMA)
        self.stranger = sqlite3.connect(path, isolation_level=None)
        self.stack.callback(self.stranger.close)
        self.stranger.execute("PRAGMA foreign_keys = ON")
        self.open: dict[Watch[Any], str] = {}
        self.seen: dict[Watch[Any], Any] = {}

    @rule(target=live, query=st.sampled_from(QUERIES), as_function=st.booleans())
    def enter(self, query: str, as_function: bool) -> Watch[Any]:
        if as_function:
            live: Watch[Any] = self.db.watch(lambda connection: connection.execute(query).fetchall(), every=0)
        else:
            live = self.db.watch(query, every=0)
        live.__enter__()
        self.open[live] = query
        return live

    @rule(live=consumes(live))
    def leave(self, live: Watch[Any]) -> None:
        live.__exit__(None, None, None)
        del self.open[live]
        assert list(live) == []

    @rule(live=live)
    def look(self, live: Watch[Any]) -> None:
        self._catch_up(live)

    @rule(live=live)
    def miss_it(self, live: Watch[Any]) -> None:
        """Somebody who is slow."""
        with contextlib.suppress(ReadTimeoutError):
            self.seen[live] = live.next(0)

    @rule(write=write)
    def run(self, write: Any) -> None:
        with contextlib.suppress(sqlite3.IntegrityError):
            self.db.run(write[0], (write[1],))

    @rule(writes=st.lists(write, max_size=4), fails=st.booleans(), lent=st.booleans())
    def run_function(self, writes: list[Any], fails: bool, lent: bool) -> None:
        def job(tx: Transaction) -> None:
            for sql, value in writes:
                (tx.connection if lent else tx).execute(sql, (value,))
            if fails:
                raise ZeroDivisionError

        with contextlib.suppress(sqlite3.IntegrityError, ZeroDivisionError):
            self.db.run(job)

    @rule(writes=st.lists(write, max_size=6))
    def enqueue(self, writes: list[Any]) -> None:
        for sql, value in writes:
            self.db.enqueue(sql, (value,)).add_done_callback(lambda ticket: None)

    @rule(write=write)
    def write_elsewhere(self, write: Any) -> None:
        self.db.flush()
        with contextlib.suppress(sqlite3.IntegrityError):
            self.stranger.execute(write[0], (write[1],))

    @rule(script=st.sampled_from(CHANGES), elsewhere=st.booleans())
    def change_the_schema(self, script: str, elsewhere: bool) -> None:
        self.db.flush()
        self.stranger.executescript(script) if elsewhere else self.db.run_script(script)

    def _catch_up(self, live: Watch[Any]) -> None:
        self.db.flush()
        expected = self.db.read(self.open[live])
        while self.seen.get(live) != expected:
            rows = live.next(10)
            assert rows != self.seen.get(live)
            self.seen[live] = rows

    def teardown(self) -> None:
        for live in self.open:
            self._catch_up(live)
        self.db.flush()
        expected = {live: self.db.read(query) for live, query in self.open.items()}
        self.db.close()
        for live, rows in expected.items():
            assert rows == self.seen[live]
            assert list(live) == []
        self.stack.close()


Watched.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestWatched = Watched.TestCase

"""What a job may not do on the writer's connection, however it is spelt and however often, and what is put back."""

from __future__ import annotations

import contextlib
import functools
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import DEADLINE, holding_lock, notes_of, parked, raising, rows
from onewriter import DbWriter, Transaction
from onewriter.sqlite import guard

INSERT = "INSERT INTO t VALUES (?)"
Way = Callable[[DbWriter, str], object]


@pytest.fixture
def db(any_db: DbWriter) -> DbWriter:
    any_db.run("CREATE TABLE t (n INTEGER)")
    return any_db


def in_a_function(use: Callable[[Transaction, str], object]) -> Way:
    """A job that writes a row, does it, and lets the error through."""

    def way(db: DbWriter, sql: str) -> None:
        def job(tx: Transaction) -> None:
            tx.execute(INSERT, (-1,))
            use(tx, sql)

        db.run(job)

    return way


def in_a_savepoint(tx: Transaction, sql: str) -> None:
    with tx.savepoint():
        tx.execute(sql)


def in_a_block(db: DbWriter, sql: str) -> None:
    with db.transaction() as tx:
        tx.execute(INSERT, (-1,))
        tx.execute(sql)


def in_a_nested_run(db: DbWriter, sql: str) -> None:
    with db.transaction():
        db.run(INSERT, (-1,))
        db.run(sql)


JOBS: dict[str, Way] = {
    "run": lambda db, sql: db.run(sql),
    "enqueue": lambda db, sql: db.enqueue(sql).result(DEADLINE),
    "a script": lambda db, sql: db.run_script(f"INSERT INTO t VALUES (-1); {sql}"),
    "a function": in_a_function(lambda tx, sql: tx.execute(sql)),
    "a script in a function": in_a_function(lambda tx, sql: tx.executescript(sql)),
    "a savepoint in a function": in_a_function(in_a_savepoint),
    "a block": in_a_block,
    "a run inside a block": in_a_nested_run,
}

BARE: dict[str, Way] = {"run_without_transaction": lambda db, sql: db.run_without_transaction(sql)}
WAYS = JOBS | BARE

ENDS = [
    "BEGIN",
    "begin immediate",
    "/* now */ BeGiN -- comment\n EXCLUSIVE TRANSACTION",
    "COMMIT",
    "\n\t cOmMiT TRANSACTION ;",
    "-- a comment\nEND",
    "ROLLBACK",
    "/**/rollback/**/transaction/**/",
    "ROLLBACK TO mine",
    "SAVEPOINT mine",
    "savepoint 'COMMIT'",
    "RELEASE mine",
    "ATTACH ':memory:' AS other",
    "/* ; */ aTTach DATABASE '' as \"o;ther\"",
    "DETACH main",
    ";COMMIT",
]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_statement_that_is_the_gateways_is_refused_however_it_is_spelt(db: DbWriter, path: Path, way: Way) -> None:
    for number, sql in enumerate(ENDS):
        with pytest.raises(sqlite3.DatabaseError) as caught:
            way(db, sql)
        assert caught.value.sqlite_errorname == "SQLITE_AUTH", sql
        assert any(note.startswith("onewriter: ") and "job" not in note for note in caught.value.__notes__), sql
        with holding_lock(path):  # nothing is open that would keep somebody else out
            assert rows(db) == list(range(number))
        assert db.run(INSERT, (number,)).rowcount == 1


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("sql", ["COMMIT", "ROLLBACK", "SAVEPOINT mine", "ATTACH '' AS other"])
def test_a_text_that_was_refused_stays_refused(db: DbWriter, way: Way, sql: str) -> None:
    """SQLite asks about a text when it prepares it, and the connection keeps what it has prepared."""
    for _ in range(10):
        with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
            way(db, sql)
        db.run(INSERT, (1,))
    assert rows(db) == [1] * 10


@pytest.mark.parametrize("sql", ["COMMIT", "ROLLBACK", "END"])
def test_a_text_refused_in_one_way_is_refused_in_every_other(db: DbWriter, sql: str) -> None:
    for _ in range(2):
        for way in WAYS.values():
            with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
                way(db, sql)
    db.run(INSERT, (1,))
    assert rows(db) == [1]


@pytest.mark.parametrize("sql", ["COMMIT", "ROLLBACK", "ATTACH '' AS other", "PRAGMA foreign_keys = 0"])
def test_a_refusal_that_the_job_catches_does_not_end_its_transaction(db: DbWriter, sql: str) -> None:
    def job(tx: Transaction) -> None:
        tx.execute(INSERT, (1,))
        for use in (tx.execute, tx.executescript, tx.connection.execute, db.run):
            with pytest.raises(sqlite3.DatabaseError, match=r"not authorized|no transaction is active"):
                use(sql)
        tx.execute(INSERT, (2,))

    db.run(job)
    with db.transaction() as tx:
        job(tx)
    with pytest.raises(LookupError), db.transaction() as tx:
        job(tx)
        raise LookupError
    assert rows(db) == [1, 2, 1, 2]


def test_a_refused_statement_undoes_no_other_job_of_its_batch(path: Path) -> None:
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n INTEGER)")
        with parked(db):
            tickets = []
            for n in range(20):
                tickets.append(db.enqueue(INSERT, (n,)))
                tickets.append(db.enqueue(("COMMIT", "ROLLBACK", "BEGIN", "END", "SAVEPOINT a", "RELEASE a")[n % 6]))
        errors = [ticket.exception(DEADLINE) for ticket in tickets]
        assert errors[::2] == [None] * 20
        assert all(isinstance(error, sqlite3.DatabaseError) for error in errors[1::2])
        assert rows(db) == list(range(20))


def test_words_in_strings_names_and_comments_are_no_statements(db: DbWriter) -> None:
    db.run_script("""
        CREATE TABLE "commit" ("begin" TEXT, [rollback] TEXT); -- COMMIT;
        /* ROLLBACK; */
        INSERT INTO "commit" VALUES ('ATTACH', '; COMMIT;');
    """)
    assert db.run('SELECT "begin", [rollback] FROM "commit" -- END').rows == [("ATTACH", "; COMMIT;")]
    assert db.run_without_transaction("SELECT 'BEGIN' /* COMMIT */").rows == [("BEGIN",)]


IGNORED = [
    "PRAGMA foreign_keys = 0",
    "pragma Foreign_Keys(off)",
    "/* rebuild */ PRAGMA main.foreign_keys = OFF",
    "PRAGMA \"foreign_keys\" = 'no'",
    "PRAGMA synchronous = OFF",
    "PRAGMA main.SYNCHRONOUS(0)",
    "PRAGMA journal_mode = DELETE",
    "PRAGMA journal_mode = WAL",
    "PRAGMA wal_checkpoint",
    "PRAGMA wal_checkpoint(TRUNCATE)",
]

NEVER = [
    "PRAGMA query_only = 1",
    "PRAGMA QUERY_ONLY(on)",
    "PRAGMA busy_timeout = 5000",
    "PRAGMA locking_mode = EXCLUSIVE",
    "PRAGMA main.locking_mode = exclusive",
    "PRAGMA wal_autocheckpoint = 1",
    "PRAGMA journal_size_limit = -1",
    "PRAGMA hard_heap_limit = 1",
    "PRAGMA soft_heap_limit(1)",
    "PRAGMA temp_store_directory = '/'",
    "PRAGMA data_store_directory = ''",
]


@pytest.mark.parametrize("way", JOBS.values(), ids=JOBS)
def test_a_pragma_that_has_no_effect_in_a_transaction_raises_in_a_job(db: DbWriter, way: Way) -> None:
    for sql in IGNORED:
        for _ in range(2):
            with pytest.raises(sqlite3.DatabaseError) as caught:
                way(db, sql)
            assert caught.value.sqlite_errorname == "SQLITE_AUTH", sql
            assert any("inside a transaction" in note for note in caught.value.__notes__), sql
        db.run(INSERT, (1,))
    assert rows(db) == [1] * len(IGNORED)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_pragma_that_the_gateway_rests_on_is_refused_everywhere(db: DbWriter, way: Way) -> None:
    for sql in NEVER:
        for _ in range(2):
            with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
                way(db, sql)
    db.run(INSERT, (1,))
    assert rows(db) == [1]


READ_ONLY = ["foreign_keys", "synchronous", "journal_mode", "query_only", "busy_timeout", "user_version"]


@pytest.mark.parametrize("name", READ_ONLY)
def test_a_pragma_that_only_asks_is_answered_in_a_job_and_outside(db: DbWriter, name: str) -> None:
    for _ in range(2):
        inside = db.run(f"PRAGMA {name}").rows
        assert len(inside) == 1
        assert db.run_without_transaction(f"PRAGMA {name}").rows == inside
        assert db.run(lambda tx: tx.execute(f"PRAGMA {name}").rows) == inside


@pytest.mark.parametrize("sql", ["PRAGMA synchronous = OFF", "PRAGMA foreign_keys = 0", "PRAGMA wal_checkpoint(FULL)"])
def test_a_text_allowed_outside_a_transaction_stays_refused_inside_one(db: DbWriter, sql: str) -> None:
    for _ in range(5):
        db.run_without_transaction(sql)
        for way in JOBS.values():
            with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
                way(db, sql)
        db.run_without_transaction(sql)
        db.run_without_transaction(sql)
    db.run(INSERT, (1,))
    assert rows(db) == [1]


SETTINGS = {"synchronous": 2, "foreign_keys": 1, "recursive_triggers": 1, "cache_size": -3000, "temp_store": 2}

CHANGES = [
    "PRAGMA synchronous = OFF",
    "PRAGMA main.synchronous(0)",
    'pragma "Synchronous" = 1',
    "PRAGMA foreign_keys = 0",
    "-- off\nPRAGMA FOREIGN_KEYS(no)",
    "PRAGMA recursive_triggers = 0",
    "PRAGMA recursive_triggers(off)",
    "PRAGMA cache_size = 10",
    "PRAGMA main.cache_size(11)",
    "PRAGMA temp_store = FILE",
]


@pytest.mark.parametrize("inline", [False, True])
def test_what_a_bare_pragma_changes_is_put_back_before_the_next_job(path: Path, inline: bool) -> None:
    pragmas: dict[str, str | int] = {"Recursive_Triggers": "ON", "cache_size": "-3000", "temp_store": "MEMORY"}
    with DbWriter(path, inline=inline, pragmas=pragmas) as db:
        for sql in [*CHANGES, *reversed(CHANGES)]:
            for _ in range(2):
                db.run_without_transaction(sql)
                found = {name: db.run(f"PRAGMA {name}").rows[0][0] for name in SETTINGS}
                assert found == SETTINGS, sql


IN_JOBS = [sql for sql in CHANGES if "synchronous" not in sql.lower() and "foreign_keys" not in sql.lower()]


@pytest.mark.parametrize("way", JOBS.values(), ids=JOBS)
def test_what_a_job_changes_is_put_back_whether_it_fails_or_not(path: Path, way: Way) -> None:
    with DbWriter(path, pragmas={"recursive_triggers": 1, "cache_size": -3000, "temp_store": 2}) as db:
        db.run("CREATE TABLE t (n INTEGER)")
        for sql in IN_JOBS * 2:
            way(db, sql)
            assert {name: db.run(f"PRAGMA {name}").rows[0][0] for name in SETTINGS} == SETTINGS, sql
        for sql in IN_JOBS * 2:
            with pytest.raises(LookupError), db.transaction() as tx:
                tx.execute(sql)
                raise LookupError
            assert {name: db.run(f"PRAGMA {name}").rows[0][0] for name in SETTINGS} == SETTINGS, sql


def test_a_setting_of_one_queued_job_is_not_there_for_the_next(path: Path) -> None:
    """They wait together, so that they could share a transaction."""
    with DbWriter(path, pragmas={"recursive_triggers": 1}) as db:
        seen: list[Any] = []

        def look(tx: Transaction) -> None:
            seen.extend(tx.execute("PRAGMA recursive_triggers").rows[0])

        with parked(db):
            for _ in range(5):
                db.enqueue("PRAGMA recursive_triggers = 0")
                db.enqueue(look)
                db.enqueue(lambda tx: tx.execute("PRAGMA recursive_triggers = OFF") and None)
                db.enqueue(look)
        db.flush(DEADLINE)
        assert seen == [1] * 10


def test_a_deferral_of_foreign_keys_ends_with_its_job(path: Path) -> None:
    with DbWriter(path) as db:
        db.run_script("""
            CREATE TABLE parent (id INTEGER PRIMARY KEY);
            CREATE TABLE child (parent INTEGER REFERENCES parent);
        """)

        def child_first(tx: Transaction) -> None:
            tx.execute("PRAGMA defer_foreign_keys = ON")
            tx.execute("INSERT INTO child VALUES (1)")
            tx.execute("INSERT INTO parent VALUES (1)")

        with parked(db):
            first = db.enqueue(child_first)
            orphan = db.enqueue("INSERT INTO child VALUES (2)")
            healing = db.enqueue("INSERT INTO parent VALUES (2)")
            again = db.enqueue("INSERT INTO child VALUES (2)")
        assert [ticket.exception(DEADLINE) for ticket in (first, healing, again)] == [None] * 3
        assert isinstance(orphan.exception(DEADLINE), sqlite3.IntegrityError)
        assert db.read("SELECT parent FROM child") == [(1,), (2,)]


def test_a_setting_that_lives_in_the_file_belongs_to_the_transaction(db: DbWriter) -> None:
    db.run("PRAGMA user_version = 5")
    with pytest.raises(LookupError), db.transaction() as tx:
        tx.execute("PRAGMA user_version = 6")
        raise LookupError
    assert db.read_value("PRAGMA user_version") == 5


def test_factories_that_a_job_sets_are_gone_after_it(db: DbWriter) -> None:
    def job(tx: Transaction) -> None:
        tx.connection.row_factory = sqlite3.Row
        tx.connection.text_factory = bytes
        assert tx.connection.execute("SELECT 'a' AS x").fetchone()["x"] == b"a"

    def failing(tx: Transaction) -> None:
        job(tx)
        raise LookupError

    for function in (job, failing):
        with contextlib.suppress(LookupError):
            db.run(function)
        assert db.run("SELECT 'a'").rows == [("a",)]


def test_enforcement_is_back_after_a_job_without_it_that_failed(db: DbWriter) -> None:
    db.run_script("""
        CREATE TABLE parent (id INTEGER PRIMARY KEY);
        CREATE TABLE child (parent INTEGER REFERENCES parent);
    """)

    def failing(tx: Transaction) -> None:
        tx.execute("INSERT INTO child VALUES (1)")
        raise LookupError

    for _ in range(2):
        with pytest.raises(LookupError):
            db.run(failing, foreign_keys=False)
        with pytest.raises(sqlite3.IntegrityError):
            db.run("INSERT INTO child VALUES (1)")
    assert db.run("PRAGMA foreign_keys").rows == [(1,)]
    assert db.read("SELECT * FROM child") == []


def test_a_gateway_without_enforcement_has_it_for_the_job_that_asks_for_it(path: Path) -> None:
    with DbWriter(path, foreign_keys=False) as db:
        db.run_script("""
            CREATE TABLE parent (id INTEGER PRIMARY KEY);
            CREATE TABLE child (parent INTEGER REFERENCES parent);
        """)
        with pytest.raises(sqlite3.IntegrityError):
            db.run_script("INSERT INTO child VALUES (1)", foreign_keys=True)
        db.run("INSERT INTO child VALUES (2)")
        assert db.read("SELECT parent FROM child") == [(2,)]


@pytest.mark.parametrize(("sql", "named"), [("SAVEPOINT x", "SAVEPOINT"), ("COMMIT", "COMMIT"), ("BEGIN", "BEGIN")])
def test_a_refusal_names_what_was_refused(db: DbWriter, sql: str, named: str) -> None:
    with pytest.raises(sqlite3.DatabaseError) as caught:
        db.run(lambda tx: tx.execute(sql).rowcount)
    assert f"onewriter: {named} is refused" in caught.value.__notes__[0]


def test_a_savepoint_of_a_lent_connection_opens_the_way_for_no_other(db: DbWriter) -> None:
    def job(tx: Any) -> None:
        for sql in ("SAVEPOINT a", "RELEASE a"):
            tx.connection.execute(sql)

    for _ in range(2):
        db.run(job)
        for sql in ("SAVEPOINT a", "RELEASE a"):
            with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
                db.run_without_transaction(sql)
            with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
                db.run(sql)
            with db.transaction() as tx, pytest.raises(sqlite3.DatabaseError, match="not authorized"):
                tx.execute(sql)


@pytest.mark.parametrize("mode", ["OFF", "MEMORY", "DELETE", "off"])
def test_the_journal_mode_is_the_constructors(db: DbWriter, mode: str) -> None:
    for _ in range(2):
        with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
            db.run_without_transaction(f"PRAGMA journal_mode = {mode}")
    assert db.run_without_transaction("PRAGMA journal_mode = WAL").rows == [("wal",)]


@pytest.mark.parametrize("journal_mode", ["WAL", "DELETE"])
def test_a_setting_that_cannot_be_put_back_is_told_and_the_writer_goes_on(
    path: Path, journal_mode: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with DbWriter(path, journal_mode=journal_mode, pragmas={"max_page_count": 50, "cache_size": -1000}) as db:

        def grow(tx: Transaction) -> None:
            tx.execute("PRAGMA max_page_count = 1000")
            tx.execute("PRAGMA cache_size = -77")
            tx.execute("CREATE TABLE t (data)")
            tx.execute("INSERT INTO t VALUES (zeroblob(400000))")

        db.run(grow)
        assert db.run("PRAGMA cache_size").rows == [(-1000,)]
        assert db.health == "ok"
    assert any("max_page_count = 50 has no effect here" in message for message in caplog.messages)


@pytest.mark.parametrize(
    "run",
    [
        lambda db: db.run("VACUUM"),
        lambda db: db.run("vacuum -- now"),
        lambda db: db.run_script("VACUUM"),
        lambda db: db.run(lambda tx: tx.execute("VACUUM")),
        lambda db: db.enqueue("VACUUM").result(DEADLINE),
    ],
)
def test_vacuum_in_a_transaction_points_at_the_call_for_it(db: DbWriter, run: Callable[[DbWriter], object]) -> None:
    with pytest.raises(sqlite3.OperationalError) as caught:
        run(db)
    assert "use run_without_transaction" in notes_of(caught.value)
    db.run_without_transaction("VACUUM")


def test_a_setting_that_is_put_back_at_once_is_told(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with DbWriter(path, pragmas={"cache_size": -5000}) as db:
        for pragma in (
            "foreign_keys=OFF",
            "foreign_keys(0)",
            "main.synchronous = 1",
            "Synchronous=OFF",
            "cache_size=5",
        ):
            db.run_without_transaction(f"PRAGMA {pragma}")
            db.flush()
            assert "was reset at once" in caplog.text
            caplog.clear()
        assert db.run("PRAGMA cache_size").rows == [(-5000,)]
        assert db.run_without_transaction("PRAGMA foreign_keys").rows == [(1,)]
        for pragma in ("foreign_keys=ON", "synchronous=FULL", "cache_size=-5000", "user_version=7"):
            db.run_without_transaction(f"PRAGMA {pragma}")
        assert db.read_value("PRAGMA user_version") == 7
        db.flush()
        assert not caplog.records


@pytest.mark.parametrize("has_room", [True, False])
def test_too_deep_a_recursion_while_sqlite_asks_is_no_interrupt(
    monkeypatch: pytest.MonkeyPatch, has_room: bool
) -> None:
    """Both come before the authorizer's own code."""
    reader = guard.ReadGuard()
    reader.authorizer = functools.lru_cache(maxsize=0)(raising(RecursionError))
    with contextlib.suppress(RecursionError):  # sqlite3 discards it
        reader.authorizer(sqlite3.SQLITE_SELECT, None, None, None, None)
    if not has_room:
        monkeypatch.setattr(guard, "need_stack", raising(RecursionError))
    with pytest.raises(KeyboardInterrupt if has_room else RecursionError):
        reader.explain(sqlite3.DatabaseError("not authorized"))

"""Opening: what is wrong is said by the constructor, and what is set is in force."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from helpers import holding_lock, in_threads, run_child
from onewriter import DbWriter, Transaction
from onewriter.sqlite.options import refuse_old_sqlite
from onewriter.tools.check import check


def test_impossible_paths_are_refused_and_nothing_is_created(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    before = sorted(os.listdir(tmp_path))
    cases: list[tuple[Any, type[Exception], str]] = [
        (tmp_path / "folder", sqlite3.OperationalError, "it is a folder"),
        (tmp_path / "none" / "app.db", sqlite3.OperationalError, "there is no folder"),
        (fifo, sqlite3.OperationalError, "not a regular file"),
        ("file:app.db", ValueError, "URI"),
        ("a\0b", ValueError, "null"),
        (3, TypeError, "path"),
        (None, TypeError, "path"),
    ]
    for path, kind, text in cases:
        with pytest.raises(kind, match=text):
            DbWriter(path)
    assert sorted(os.listdir(tmp_path)) == before


READ_ONLY = """
import os, sqlite3, sys
from onewriter import DbWriter
if os.geteuid() == 0:
    os.setgid(65534); os.setuid(65534)
for path in sys.argv[1:]:
    try:
        DbWriter(path)
    except sqlite3.OperationalError as error:
        print(error)
"""


def test_folders_and_files_without_the_right_to_write_are_named(open_folder: Path) -> None:
    closed, shared = open_folder / "closed", open_folder / "shared"
    for folder in (closed, shared):
        folder.mkdir()
        sqlite3.connect(folder / "app.db").close()
        (folder / "app.db").write_bytes(b"")
    (closed / "app.db").chmod(0o666)
    closed.chmod(0o555)
    shared.chmod(0o777)
    (shared / "app.db").chmod(0o444)
    code = f"import sys; sys.argv[1:] = [{str(closed / 'app.db')!r}, {str(shared / 'app.db')!r}]\n" + READ_ONLY
    told = run_child(code).stdout.splitlines()
    assert len(told) == 2
    assert "folder" in told[0]
    assert "not writable" in told[0]
    assert "the file is not writable" in told[1]


ARGUMENTS: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"readers": 0}, ValueError),
    ({"readers": 1.5}, TypeError),
    ({"maxsize": 0}, ValueError),
    ({"maxsize": True}, TypeError),
    ({"wal_limit": -1}, ValueError),
    ({"lock_timeout": -1}, ValueError),
    ({"lock_timeout": float("nan")}, ValueError),
    ({"lock_timeout": "10"}, TypeError),
    ({"slow_after": -1}, ValueError),
    ({"max_hold": None}, TypeError),
    ({"synchronous": "full"}, ValueError),
    ({"journal_mode": "MEMORY"}, ValueError),
    ({"label": 3}, TypeError),
    ({"on_connect": 3}, TypeError),
    ({"on_error": "log"}, TypeError),
    ({"row_factory": 3}, TypeError),
    ({"detect_types": "x"}, TypeError),
    ({"pragmas": {"no such": 1}}, ValueError),
    ({"pragmas": {"cache_size": 1.5}}, TypeError),
    ({"pragmas": {"foreign_keys": 0}}, ValueError),
    ({"pragmas": {"nonsense": 1}}, ValueError),
    ({"unknown": 1}, TypeError),
]


@pytest.mark.parametrize(("arguments", "kind"), ARGUMENTS, ids=repr)
def test_arguments_that_cannot_be_meant_are_refused(path: Path, arguments: Any, kind: type[Exception]) -> None:
    threads = threading.active_count()
    with pytest.raises(kind):
        DbWriter(path, **arguments)
    assert threading.active_count() == threads


PRAGMAS: dict[str, str | int] = {"cache_size": -4000, "temp_store": "MEMORY", "recursive_triggers": "on"}


def test_pragmas_are_in_force_on_every_connection_and_put_back_after_jobs(any_db: DbWriter, path: Path) -> None:
    any_db.close()
    with DbWriter(path, pragmas=PRAGMAS) as db:
        for _ in range(2):
            for name, value in (("cache_size", -4000), ("temp_store", 2), ("recursive_triggers", 1)):
                assert db.run_without_transaction(f"PRAGMA {name}").rows == [(value,)]
                assert db.read_value(f"PRAGMA {name}") == value
            db.run("PRAGMA cache_size = 7")
            db.run_without_transaction("PRAGMA recursive_triggers = 0")
            db.run(lambda tx: tx.execute("PRAGMA temp_store = FILE") and None)


def test_what_the_gateway_sets_is_put_back_each_time(any_db: DbWriter) -> None:
    for _ in range(3):
        any_db.run_without_transaction("PRAGMA synchronous = OFF")
        any_db.run_without_transaction("PRAGMA foreign_keys = 0")
        assert any_db.run_without_transaction("PRAGMA synchronous").rows == [(2,)]
        assert any_db.run_without_transaction("PRAGMA foreign_keys").rows == [(1,)]


@pytest.mark.parametrize("sql", ["PRAGMA foreign_keys = 0", "PRAGMA synchronous = 0", "PRAGMA journal_mode = DELETE"])
def test_a_pragma_that_sqlite_would_ignore_in_a_transaction_raises(any_db: DbWriter, sql: str) -> None:
    any_db.run_without_transaction("SELECT 1")
    for _ in range(2):
        with pytest.raises(sqlite3.DatabaseError) as caught:
            any_db.run(sql)
        assert any("inside a transaction" in note for note in caught.value.__notes__)
        with pytest.raises(sqlite3.DatabaseError):
            any_db.run(lambda tx: tx.execute(sql) and None)


@pytest.mark.parametrize("sql", ["BEGIN", "commit", "/**/ ROLLBACK", "SAVEPOINT a", "ATTACH ':memory:' AS x", "END"])
def test_a_bare_statement_cannot_begin_end_or_attach(any_db: DbWriter, sql: str) -> None:
    for _ in range(3):
        with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
            any_db.run_without_transaction(sql)
        any_db.run("CREATE TABLE IF NOT EXISTS t (n)")


def test_vacuum_and_checkpoints_run_without_transaction(any_db: DbWriter, tmp_path: Path) -> None:
    any_db.run("CREATE TABLE t (n)")
    any_db.run_without_transaction("VACUUM")
    any_db.run_without_transaction("VACUUM INTO ?", (str(tmp_path / "copy.db"),))
    assert (tmp_path / "copy.db").exists()
    assert any_db.run_without_transaction("PRAGMA wal_checkpoint(TRUNCATE)").rows[0][0] == 0
    assert any_db.run_without_transaction("INSERT INTO t VALUES (1)").lastrowid == 1


def test_a_table_is_rebuilt_without_foreign_keys_and_checked(any_db: DbWriter) -> None:
    any_db.run_script("""
        CREATE TABLE parent (id INTEGER PRIMARY KEY);
        CREATE TABLE child (parent INTEGER REFERENCES parent ON DELETE CASCADE);
        INSERT INTO parent VALUES (1), (2);
        INSERT INTO child VALUES (1), (2);
    """)
    rebuild = """
        CREATE TABLE rebuilt (id INTEGER PRIMARY KEY, name TEXT);
        INSERT INTO rebuilt SELECT id, 'x' FROM parent {where};
        DROP TABLE parent;
        ALTER TABLE rebuilt RENAME TO parent;
    """
    with pytest.raises(sqlite3.IntegrityError, match="child"):
        any_db.run_script(rebuild.format(where="WHERE id = 1"), foreign_keys=False)
    any_db.run(lambda tx: tx.executescript(rebuild.format(where="")), foreign_keys=False)
    assert any_db.read("SELECT parent FROM child") == [(1,), (2,)]
    assert any_db.read("SELECT name FROM parent") == [("x",), ("x",)]
    with pytest.raises(sqlite3.IntegrityError):
        any_db.run("INSERT INTO child VALUES (9)")
    with pytest.raises(TypeError):
        any_db.run("SELECT 1", foreign_keys=False)  # type: ignore[call-overload]


@pytest.mark.parametrize("journal_mode", ["DELETE", "TRUNCATE", "PERSIST", "WAL"])
def test_each_journal_mode_keeps_what_it_promises(path: Path, journal_mode: Any) -> None:
    for _ in range(2):
        with DbWriter(path, journal_mode=journal_mode) as db:
            assert db.journal_mode == journal_mode
            assert db.run_without_transaction("PRAGMA journal_mode").rows == [(journal_mode.lower(),)]
            assert db.run_without_transaction("PRAGMA synchronous").rows == [(2 if journal_mode == "WAL" else 3,)]
            db.run("CREATE TABLE IF NOT EXISTS t (n)")
            in_threads(*[lambda: db.run("INSERT INTO t VALUES (1)"), lambda: db.read("SELECT * FROM t")] * 4)
    assert [name for name in os.listdir(path.parent) if name.endswith(("-wal", "-shm"))] == []


def test_a_hook_that_fails_for_a_reader_fails_that_read_only(path: Path) -> None:
    broken = [True]

    def hook(connection: sqlite3.Connection, readonly: bool) -> None:
        if readonly and broken:
            raise sqlite3.OperationalError("no extension")

    with DbWriter(path, on_connect=hook, readers=1) as db:
        with pytest.raises(sqlite3.OperationalError, match="no extension"):
            db.read("SELECT 1")
        broken.clear()
        assert db.read("SELECT 1") == [(1,)]


def test_attached_databases_are_there_for_all(path: Path, tmp_path: Path) -> None:
    def hook(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.execute("ATTACH ? AS other", (str(tmp_path / "other.db"),))

    with DbWriter(path, on_connect=hook) as db:
        db.run("CREATE TABLE other.t (n)")
        tickets = [db.enqueue("INSERT INTO other.t VALUES (?)", (n,)) for n in range(5)]
        assert db.read_value("SELECT count(*) FROM other.t", after=tickets[-1]) == 5


OPEN = """
from onewriter import DbWriter
with DbWriter({path!r}) as db:
    db.run("CREATE TABLE IF NOT EXISTS t (n)")
    db.run("INSERT INTO t VALUES (1)")
"""


def test_processes_that_open_a_new_file_at_once_all_succeed(tmp_path: Path) -> None:
    for attempt in range(3):
        path = tmp_path / f"{attempt}.db"
        children = in_threads(*[lambda path=path: run_child(OPEN.format(path=str(path)))] * 4)
        assert [child.stderr for child in children] == [""] * 4  # type: ignore[attr-defined]
        with DbWriter(path) as db:
            assert db.read_value("SELECT count(*) FROM t") == 4


def test_a_second_gateway_on_the_file_warns_and_works(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with DbWriter(path) as first, DbWriter(path) as second:
        first.run("CREATE TABLE t (n)")
        in_threads(*[lambda db=db: [db.run("INSERT INTO t VALUES (1)") for _ in range(50)] for db in (first, second)])
        assert first.read_value("SELECT count(*) FROM t") == 100
    assert [record.levelno for record in caplog.records if "another DbWriter" in record.getMessage()] == [
        logging.WARNING
    ]


def test_an_old_sqlite_is_refused_with_the_reason() -> None:
    with pytest.raises(RuntimeError, match="corrupt"):
        refuse_old_sqlite((3, 37, 1))
    refuse_old_sqlite((3, 37, 2))


def test_a_gateway_is_not_pickled(db: DbWriter) -> None:
    import pickle

    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(db)


def test_a_gateway_shows_its_state(path: Path) -> None:
    db = DbWriter(path, label="ledger")
    assert "ok" in repr(db)
    assert db.path == str(path)
    db.close()
    assert "closed" in repr(db)
    assert db.stats().as_dict()["committed"] == 0


def test_an_error_of_the_hook_stays_as_it_is(path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError) as caught:
        DbWriter(path, on_connect=lambda connection, readonly: connection.execute("SELECT * FROM nowhere"))
    assert str(caught.value) == "no such table: nowhere"
    assert "raised by on_connect" in caught.value.__notes__[0]


def test_a_connection_that_cannot_be_used_is_closed_although_its_error_is_kept(path: Path) -> None:
    connections: list[sqlite3.Connection] = []

    def fail(connection: sqlite3.Connection, readonly: bool) -> None:
        connections.append(connection)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        DbWriter(path, on_connect=fail)
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connections[0].execute("SELECT 1")


@pytest.mark.parametrize("journal_mode", ["WAL", "DELETE"])
def test_what_the_hook_makes_of_texts_is_not_asked_about_the_gateways_own(path: Path, journal_mode: Any) -> None:
    def prepare(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.text_factory = lambda data: (data,)

    pragmas: dict[str, str | int] = {"encoding": "UTF-16", "auto_vacuum": "FULL", "temp_store": "MEMORY"}
    with DbWriter(path, journal_mode=journal_mode, on_connect=prepare, pragmas=pragmas) as db:
        db.run_script("CREATE TABLE p (id INTEGER PRIMARY KEY); CREATE TABLE c (name TEXT, p REFERENCES p (id))")
        with pytest.raises(sqlite3.IntegrityError, match=r"the first: c \(rowid 1\) → p"):
            db.run(lambda tx: tx.execute("INSERT INTO c VALUES ('a', 1)").rowcount, foreign_keys=False)
        db.run("INSERT INTO c VALUES ('a', NULL)")
        db.run_without_transaction("PRAGMA synchronous = OFF")
        assert db.read("SELECT name FROM c") == [((b"a",),)]
        assert db.run("SELECT name FROM c").rows == [((b"a",),)]
        db.checkpoint()


def test_a_pragma_that_has_no_effect_is_told_with_what_is_in_force(path: Path) -> None:
    with pytest.raises(ValueError, match="no_such_pragma = 1 has no effect here: SQLite does not know it"):
        DbWriter(path, pragmas={"no_such_pragma": 1})
    with pytest.raises(ValueError, match="page_size = 1000 has no effect here: 4096 is in force"):
        DbWriter(path, pragmas={"page_size": 1000})


def test_a_transaction_that_the_hook_leaves_open_does_not_keep_settings_from_being_put_right(path: Path) -> None:
    def prepare(connection: sqlite3.Connection, readonly: bool) -> None:
        if not readonly:
            connection.execute("PRAGMA foreign_keys = 0")
            connection.execute("BEGIN")
            connection.execute("CREATE TABLE IF NOT EXISTS of_the_hook (n)")

    with DbWriter(path, on_connect=prepare) as db:
        assert db.run("PRAGMA foreign_keys").rows == [(1,)]
        assert db.read("SELECT * FROM of_the_hook") == []


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


def test_a_path_need_not_be_text(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff.db"
    with DbWriter(name) as db:
        db.run("CREATE TABLE t (n)")
        assert db.read("SELECT * FROM t") == []
    assert os.listdir(os.fsencode(tmp_path)) == [b"\xff.db"]


def test_a_link_to_the_file_is_the_file(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    link = tmp_path / "link.db"
    link.symlink_to(folder / "real.db")
    with DbWriter(link, lock_timeout=0.01) as db:
        db.run("CREATE TABLE t (n)")
        assert db.stats().wal_bytes == (folder / "real.db-wal").stat().st_size > 0
        with holding_lock(link), pytest.raises(sqlite3.OperationalError, match="locked") as caught:
            db.run("INSERT INTO t VALUES (1)")
        assert "SQLite's lock is held by this process" in caught.value.__notes__[0]
        report = check(str(link))
        assert (report.path, report.wal_bytes) == (str(folder / "real.db"), db.stats().wal_bytes)

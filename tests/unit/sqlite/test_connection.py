"""Opening: files, hooks, and settings, which are in force on every connection."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from helpers import DEADLINE, drop_session, holding_lock, in_threads, make, raises, rows_in, run_child
from onewriter import DbWriter
from onewriter.sqlite import connection as connection_module
from onewriter.sqlite import pragma_values
from onewriter.tools.check import check


def test_vacuum_and_checkpoints_run_without_transaction(any_db: DbWriter, tmp_path: Path) -> None:
    any_db.run("CREATE TABLE t (n)")
    any_db.run_without_transaction("VACUUM")
    any_db.run_without_transaction("VACUUM INTO ?", (str(tmp_path / "copy.db"),))
    assert (tmp_path / "copy.db").exists()
    assert any_db.run_without_transaction("PRAGMA wal_checkpoint(TRUNCATE)").rows[0][0] == 0
    assert any_db.run_without_transaction("INSERT INTO t VALUES (1)").lastrowid == 1


def test_a_file_that_vacuum_cannot_write_into_says_nothing_of_this_one(any_db: DbWriter, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("no database " * 1000)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        any_db.run_without_transaction("VACUUM INTO ?", (str(tmp_path / "other"),))
    assert any_db.health == "ok"


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
        db.run("INSERT INTO t VALUES (1)")
        assert db.read("SELECT n FROM t") == [(1,)]
        report = check(str(link))
        assert (report.path, report.wal_bytes) == (str(folder / "real.db"), db.stats().wal_bytes)
    assert os.listdir(folder) == ["real.db"]


@pytest.mark.parametrize(
    "content", [b"x", b"hello", b"SQLite format 3\0", b"this is no database, " * 100, b"\0" * 4096, os.urandom(8192)]
)
def test_a_file_that_is_no_database_stays_as_it_is_and_nothing_is_beside_it(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for journal_mode in ("WAL", "DELETE"):
        with pytest.raises(sqlite3.DatabaseError, match=r"app\.db") as caught:
            DbWriter(path, journal_mode=journal_mode)
        assert "not a database" in str(caught.value)
        assert caught.value.sqlite_errorcode == sqlite3.SQLITE_NOTADB
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == [path.name]


def test_an_empty_file_becomes_a_database(path: Path) -> None:
    path.touch()
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        assert db.read("SELECT * FROM t") == []


def test_a_relative_path_is_the_file_of_the_moment_of_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with DbWriter("app.db") as db:
        monkeypatch.chdir(tmp_path / "elsewhere")
        db.run("CREATE TABLE t (n)")
        assert db.read("SELECT * FROM t") == []
        assert db.path == str(tmp_path / "app.db")
    assert os.listdir(tmp_path / "elsewhere") == []


IN_FORCE: list[tuple[str, str | int, Any]] = [
    ("cache_size", -5000, -5000),
    ("cache_size", "-5000", -5000),
    ("temp_store", "memory", 2),
    ("Temp_Store", "FILE", 1),
    ("recursive_triggers", "yes", 1),
    ("trusted_schema", "off", 0),
    ("cell_size_check", True, 1),
    ("automatic_index", False, 0),
    ("analysis_limit", 400, 400),
    ("threads", 2, 2),
    ("mmap_size", 1 << 20, 1 << 20),
    ("application_id", 77, 77),
]


@pytest.mark.parametrize(("name", "value", "found"), IN_FORCE)
def test_a_pragma_is_in_force_for_the_writer_and_every_reader(path: Path, name: str, value: Any, found: Any) -> None:
    for _ in range(2):
        with DbWriter(path, readers=3, pragmas={name: value}) as db:
            ask = f"PRAGMA {name}"
            assert db.run(ask).rows == [(found,)]
            together = threading.Barrier(3, timeout=DEADLINE)

            def on_one_of_three(connection: sqlite3.Connection, together: threading.Barrier = together) -> Any:
                together.wait()
                return connection.execute(ask).fetchone()[0]  # noqa: B023 - run in this round of the loop only

            assert in_threads(*[lambda: db.read(on_one_of_three)] * 3) == [found] * 3


@pytest.mark.parametrize("synchronous", ["OFF", "NORMAL", "FULL", "EXTRA"])
def test_synchronous_is_as_asked_for_and_full_is_extra_where_the_journal_is_deleted(
    tmp_path: Path, synchronous: Any
) -> None:
    level = ["OFF", "NORMAL", "FULL", "EXTRA"].index(synchronous)
    for journal_mode in ("WAL", "DELETE", "TRUNCATE", "PERSIST"):
        with DbWriter(tmp_path / journal_mode, synchronous=synchronous, journal_mode=journal_mode) as db:
            expected = 3 if journal_mode != "WAL" and synchronous == "FULL" else level
            assert db.run("PRAGMA synchronous").rows == [(expected,)]
            db.run_without_transaction("PRAGMA synchronous = 1")
            assert db.run("PRAGMA synchronous").rows == [(expected,)]


def test_the_journal_mode_of_a_file_follows_the_gateway_that_opens_it(path: Path) -> None:
    for journal_mode in ("WAL", "DELETE", "PERSIST", "WAL", "TRUNCATE", "WAL"):
        with DbWriter(path, journal_mode=journal_mode) as db:
            db.run("CREATE TABLE IF NOT EXISTS t (n)")
            db.run("INSERT INTO t VALUES (1)")
            assert db.run("PRAGMA journal_mode").rows == [(journal_mode.lower(),)]
            assert db.read_value("SELECT count(*) FROM t") >= 1
    with DbWriter(path) as db:
        assert db.read_value("SELECT count(*) FROM t") == 6


def test_a_file_that_others_keep_in_wal_mode_is_not_opened_in_another(path: Path) -> None:
    make(path)
    with contextlib.closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT n FROM t").fetchall() == []
        with pytest.raises(sqlite3.OperationalError, match="cannot open"):
            DbWriter(path, journal_mode="DELETE", lock_timeout=0.0)


def test_a_file_that_another_program_has_put_into_wal_mode_is_opened_again_in_that(path: Path) -> None:
    """As long as somebody has it open it cannot be put back; that is no reason to fail the jobs."""
    with (
        DbWriter(path, journal_mode="DELETE", lock_timeout=0.0) as db,
        contextlib.closing(sqlite3.connect(path)) as other,
    ):
        db.run("CREATE TABLE t (n)")
        assert other.execute("PRAGMA journal_mode = WAL").fetchall() == [("wal",)]
        assert other.execute("SELECT n FROM t").fetchall() == []
        db.flush()  # the writer is idle
        drop_session(db)
        db.run("INSERT INTO t VALUES (1)")
        assert rows_in(path) == [1]


def test_no_checkpoint_of_ours_without_auto_checkpoint(path: Path) -> None:
    with DbWriter(path, auto_checkpoint=False) as db:
        assert db.run("PRAGMA wal_autocheckpoint").rows == [(0,)]
    with DbWriter(path, wal_limit=12345) as db:
        assert db.run("PRAGMA journal_size_limit").rows == [(12345,)]


def test_the_hook_is_called_once_for_every_connection_before_it_is_used(path: Path) -> None:
    calls: list[tuple[int, bool]] = []

    def hook(connection: sqlite3.Connection, readonly: bool) -> None:
        calls.append((id(connection), readonly))
        connection.create_function("side", 0, lambda: "reader" if readonly else "writer")

    with DbWriter(path, on_connect=hook, readers=2) as db:
        assert calls == [(calls[0][0], False)]
        assert db.run("SELECT side()").rows == [("writer",)]
        together = threading.Barrier(2, timeout=DEADLINE)

        def ask(connection: sqlite3.Connection) -> Any:
            together.wait()
            return connection.execute("SELECT side()").fetchone()[0]

        assert in_threads(*[lambda: db.read(ask)] * 2) == ["reader"] * 2
        for _ in range(5):
            assert db.read_value("SELECT side()") == "reader"
    assert [readonly for _, readonly in calls] == [False, True, True]
    assert len({number for number, _ in calls}) == 3


def write_and_stay(connection: sqlite3.Connection, readonly: bool) -> None:
    if not readonly:
        connection.execute("CREATE TABLE IF NOT EXISTS made (n)")
        connection.execute("PRAGMA foreign_keys = 0")
        connection.execute("BEGIN")
        connection.execute("INSERT INTO made VALUES (1)")


def test_a_transaction_that_the_hook_leaves_open_is_committed_and_settings_are_put_right(path: Path) -> None:
    with DbWriter(path, on_connect=write_and_stay) as db:
        with holding_lock(path):
            assert db.read("SELECT n FROM made") == [(1,)]
        db.run("INSERT INTO made VALUES (2)")
        assert db.run("PRAGMA foreign_keys").rows == [(1,)]


def change_settings(connection: sqlite3.Connection, readonly: bool) -> None:
    connection.isolation_level = "EXCLUSIVE"
    connection.execute("PRAGMA foreign_keys = 0")
    connection.execute("PRAGMA query_only = 0")
    if not readonly:
        connection.execute("PRAGMA synchronous = 0")


def test_what_the_gateway_guarantees_is_in_force_after_the_hook(path: Path) -> None:
    with DbWriter(path, on_connect=change_settings) as db:
        assert db.run("PRAGMA foreign_keys").rows == [(1,)]
        assert db.run("PRAGMA synchronous").rows == [(2,)]
        db.run("CREATE TABLE t (n)")
        db.run("INSERT INTO t VALUES (1)")
        with pytest.raises(sqlite3.OperationalError):
            db.read("INSERT INTO t VALUES (2)")
        assert db.read("SELECT n FROM t") == [(1,)]


@pytest.mark.parametrize(
    "error", [LookupError("mine"), sqlite3.OperationalError("mine"), KeyboardInterrupt("mine"), SystemExit("mine")]
)
@pytest.mark.parametrize("inline", [False, True], ids=["thread", "inline"])
def test_an_error_of_the_hook_reaches_the_constructors_caller_with_a_note(
    path: Path, error: BaseException, inline: bool
) -> None:
    threads = set(threading.enumerate())
    with pytest.raises(type(error), match="mine") as caught:
        DbWriter(path, on_connect=raises(error), inline=inline)
    assert caught.value is error
    assert str(error) == "mine"
    assert any("on_connect" in note and "readonly=False" in note for note in caught.value.__notes__)
    assert set(threading.enumerate()) <= threads
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")


MANY = """
import sys, threading
from onewriter import DbWriter
print("ready", flush=True)
sys.stdin.readline()
with DbWriter({path!r}, journal_mode={journal_mode!r}) as db:
    db.run("CREATE TABLE IF NOT EXISTS t (n)")
    for n in range(10):
        db.run("INSERT INTO t VALUES (?)", (n,))
    db.read("SELECT * FROM t")
"""


@pytest.mark.parametrize("journal_mode", ["WAL", "DELETE"])
def test_processes_that_are_let_go_together_all_open_a_new_file(path: Path, journal_mode: str) -> None:
    code = MANY.format(path=str(path), journal_mode=journal_mode)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    ends = [child.communicate(timeout=DEADLINE) for child in children]
    assert [child.returncode for child in children] == [0] * 4, ends
    with DbWriter(path, journal_mode=journal_mode) as db:  # type: ignore[arg-type]
        assert db.read_value("SELECT count(*) FROM t") == 40
        assert db.read_value("PRAGMA integrity_check") == "ok"


def test_opening_uses_no_descriptor_of_its_own_for_the_file(path: Path) -> None:
    """Closing another descriptor of the file would drop the locks of every connection of the process."""
    code = f"""
import os, sys
path = {str(path)!r}
opened = []
def audit(event, args):
    if event == "open" and args[0] in (path, os.fsencode(path)):
        opened.append(args[0])
sys.addaudithook(audit)
from onewriter import DbWriter
for _ in range(2):
    with DbWriter(path) as db:
        db.run("CREATE TABLE IF NOT EXISTS t (n)")
        db.read("SELECT * FROM t")
        db.stats(), db.health, repr(db)
print(opened)
"""
    child = run_child(code)
    assert (child.stdout, child.stderr) == ("[]\n", "")


def attaching(*others: Path) -> Callable[[sqlite3.Connection, bool], object]:
    def attach(connection: sqlite3.Connection, readonly: bool) -> None:
        for other in others:
            connection.execute("ATTACH ? AS ?", (str(other), other.stem))

    return attach


@pytest.mark.parametrize("inline", [False, True])
def test_synchronous_is_set_while_the_log_is_in_use_and_for_attached_files_too(
    path: Path, tmp_path: Path, inline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite built with SQLITE_DEFAULT_WAL_SYNCHRONOUS=1 lowers what was set before, and answers as if it had not."""
    logged, plain = tmp_path / "logged.db", tmp_path / "plain.db"
    make(logged)
    make(plain, "DELETE")
    done: list[str] = []

    def traced(connection: sqlite3.Connection, readonly: bool) -> None:
        attaching(logged, plain)(connection, readonly)
        if not readonly:
            connection.set_trace_callback(done.append)

    for _ in range(2):  # the first one makes the file
        done.clear()
        with DbWriter(path, inline=inline, on_connect=traced) as db:
            for name, level in (("main", "FULL"), ("logged", "FULL"), ("plain", "EXTRA")):
                setting = f'PRAGMA "{name}".synchronous = {level}'
                assert done.index(f'PRAGMA "{name}".schema_version') < done.index(setting)
            for name, found in (("main", 2), ("logged", 2), ("plain", 3)):
                asked = f"PRAGMA {name}.synchronous"
                assert db.run_without_transaction(asked).rows == [(found,)]
                db.run_without_transaction(f"{asked} = OFF")
                assert db.run_without_transaction(asked).rows == [(found,)]


def test_every_connection_locks_for_one_transaction_only(path: Path) -> None:
    """A library may have SQLITE_DEFAULT_LOCKING_MODE=1."""
    modes: list[str] = []

    def hook(connection: sqlite3.Connection, readonly: bool) -> None:
        modes.append(connection.execute("PRAGMA locking_mode").fetchone()[0])
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")

    with DbWriter(path, on_connect=hook) as db:
        db.run("CREATE TABLE t (n)")
        assert db.read("SELECT * FROM t") == []
        assert (
            run_child(f"import sqlite3; sqlite3.connect({str(path)!r}, timeout=0).execute('SELECT * FROM t')").stderr
            == ""
        )
    assert modes == ["normal", "normal"]


@pytest.mark.parametrize("timeout", [0.1, 5.0])
def test_names_of_databases_that_are_behind_a_lock_are_waited_for(
    path: Path, timeout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before SQLite 3.39 PRAGMA database_list reads the schema."""
    refusals = [50 if timeout > 1 else 10**9]

    def names(connection: sqlite3.Connection) -> list[str]:
        if refusals[0] > 0:
            refusals[0] -= 1
            error = sqlite3.OperationalError("database is locked")
            error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_BUSY, "SQLITE_BUSY"
            raise error
        return original(connection)

    original = pragma_values.database_names
    with DbWriter(path) as db:
        monkeypatch.setattr("onewriter.read.reader.database_names", names)
        if timeout > 1:
            assert db.read(lambda c: c.execute("SELECT 1").fetchall(), timeout=timeout) == [(1,)]
        else:
            with pytest.raises(TimeoutError):
                db.read(lambda c: c.execute("SELECT 1").fetchall(), timeout=timeout)
        assert db.stats().readers_in_use == 0


def test_a_writer_that_fails_while_it_looks_at_what_it_has_opened_is_closed(path: Path, monkeypatch: Any) -> None:
    def fail(connection: sqlite3.Connection) -> dict[str, str]:
        raise sqlite3.DatabaseError("no list")

    monkeypatch.setattr("onewriter.write.session.database_files", fail)
    with pytest.raises(sqlite3.DatabaseError, match="no list"):
        DbWriter(path)
    assert os.listdir(path.parent) == [path.name]  # SQLite's last connection has taken its log with it


def test_settings_of_a_new_file_come_before_its_journal(path: Path) -> None:
    pragmas: dict[str, str | int] = {
        "page_size": 8192,
        "auto_vacuum": "FULL",
        "encoding": "UTF-16",
        "secure_delete": "FAST",
    }
    for _ in range(2):
        with DbWriter(path, pragmas=pragmas) as db:
            db.run("CREATE TABLE IF NOT EXISTS t (n)")
            assert db.run_without_transaction("PRAGMA page_size").rows == [(8192,)]
            assert db.read_value("PRAGMA auto_vacuum") == 1
            assert db.read_value("PRAGMA encoding").startswith("UTF-16")
            assert db.read_value("PRAGMA secure_delete") == 2


class FullOfNotesError(Exception):
    __notes__ = ("a", "b")  # type: ignore[assignment]


def test_a_hook_whose_exception_refuses_notes_is_told_as_it_is(path: Path) -> None:
    def hook(connection: sqlite3.Connection, readonly: bool) -> None:
        raise FullOfNotesError

    with pytest.raises(FullOfNotesError):
        DbWriter(path, on_connect=hook)


def test_the_check_of_cells_is_a_setting_that_is_put_back(path: Path) -> None:
    with DbWriter(path, readers=1, pragmas={"cell_size_check": 1}) as db:
        db.run("PRAGMA cell_size_check = 0")
        assert db.run("PRAGMA cell_size_check").rows == [(1,)]
        db.read("PRAGMA cell_size_check = 0")
        assert db.read_value("PRAGMA cell_size_check") == 1


def fail_at_the_index(monkeypatch: pytest.MonkeyPatch, error: sqlite3.Error, name: str) -> None:
    """As where the index of the log cannot be used."""
    error.sqlite_errorcode, error.sqlite_errorname = getattr(sqlite3, name), name
    pragma = pragma_values.pragma

    def without_index(connection: sqlite3.Connection, name: str, *value: Any, **options: Any) -> Any:
        if name == "schema_version" and pragma(connection, "journal_mode") == "wal":
            raise error
        return pragma(connection, name, *value, **options)

    monkeypatch.setattr(connection_module, "pragma", without_index)


def no_such_folder(folder: str) -> NoReturn:
    raise FileNotFoundError(folder)


@pytest.mark.parametrize(
    ("usage", "why"),
    [
        (lambda folder: SimpleNamespace(free=0), "the disk is full"),
        (lambda folder: SimpleNamespace(free=10**9), "as on network file systems"),
        (no_such_folder, "as on network file systems"),
    ],
    ids=["full", "room", "no folder"],
)
def test_an_index_that_cannot_be_created_is_told_once_and_with_its_reason(
    path: Path, monkeypatch: pytest.MonkeyPatch, usage: Callable[[str], object], why: str
) -> None:
    make(path, "DELETE")
    error = sqlite3.OperationalError("disk I/O error")
    fail_at_the_index(monkeypatch, error, "SQLITE_IOERR_SHMSIZE")
    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(sqlite3.OperationalError) as caught:
        DbWriter(path)
    with contextlib.closing(sqlite3.connect(path)) as plain:
        assert plain.execute("PRAGMA journal_mode").fetchone() == ("delete",)  # as it was
    assert str(caught.value).count("cannot open") == 1
    assert why in str(caught.value)
    assert caught.value.sqlite_errorcode == sqlite3.SQLITE_IOERR_SHMSIZE


def test_another_error_where_the_index_is_used_first_is_told_as_it_is(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = sqlite3.DatabaseError("database disk image is malformed")
    fail_at_the_index(monkeypatch, error, "SQLITE_CORRUPT")
    with pytest.raises(sqlite3.DatabaseError) as caught:
        DbWriter(path)
    assert "index" not in str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "mode"), [("WAL", "MEMORY"), ("WAL", "DELETE"), ("DELETE", "OFF"), ("DELETE", "WAL")]
)
def test_a_journal_mode_that_on_connect_sets_is_refused(path: Path, wanted: Any, mode: str) -> None:
    def connect(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.execute(f"PRAGMA journal_mode = {mode}")

    with pytest.raises(
        ValueError, match=f"on_connect has set journal_mode={mode.lower()}, and {wanted.lower()} is want"
    ):
        DbWriter(path, journal_mode=wanted, on_connect=connect)
    with contextlib.closing(sqlite3.connect(path)) as plain:
        assert plain.execute("PRAGMA journal_mode").fetchone() == (wanted.lower(),)


@pytest.mark.parametrize("mode", ["MEMORY", "OFF"])
def test_a_journal_mode_that_on_connect_sets_for_an_attached_file_is_refused_if_a_killed_process_damages_it(
    path: Path, other: Path, mode: str
) -> None:
    def connect(wanted: str, connection: sqlite3.Connection, readonly: bool) -> None:
        connection.execute("ATTACH ? AS other", (str(other),))
        connection.execute(f"PRAGMA other.journal_mode = {wanted}")
        connection.execute("ATTACH ':memory:' AS scratch")  # whose mode is MEMORY

    with pytest.raises(ValueError, match=rf"has set journal_mode={mode.lower()} for .*other\.db"):
        DbWriter(path, on_connect=functools.partial(connect, mode))
    for wanted in ("DELETE", "WAL"):
        with DbWriter(path, on_connect=functools.partial(connect, wanted)) as db:
            db.run("CREATE TABLE IF NOT EXISTS other.t (n)")


def test_the_journal_mode_that_is_in_force_may_be_set_again(path: Path) -> None:
    with DbWriter(path, on_connect=lambda connection, readonly: connection.execute("PRAGMA journal_mode = WAL")) as db:
        db.run("CREATE TABLE t (n)")
        assert db.run_without_transaction(lambda connection: connection.execute("SELECT n FROM t").fetchall()) == []


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_a_file_that_cannot_be_written_in_that_moment_is_not_opened(
    path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    """SQLite opens it read-only, and says nothing: every write would fail."""
    opened = connection_module._connect
    with DbWriter(path, journal_mode=mode) as db:
        db.run("CREATE TABLE t (n)")
    with monkeypatch.context() as refusing:
        refusing.setattr(connection_module, "_connect", lambda settings, mode, **how: opened(settings, "ro", **how))
        with pytest.raises(sqlite3.OperationalError, match="for reading only"):
            DbWriter(path, journal_mode=mode)
    with DbWriter(path, journal_mode=mode) as db:
        drop_session(db)
        with monkeypatch.context() as refusing:
            refusing.setattr(connection_module, "_connect", lambda settings, mode, **how: opened(settings, "ro", **how))
            with pytest.raises(sqlite3.OperationalError, match="for reading only"):
                db.run("INSERT INTO t VALUES (1)")
        assert db.run("INSERT INTO t VALUES (2)").rowcount == 1


def test_an_attached_file_that_is_empty_gets_its_first_page_at_opening(path: Path) -> None:
    """Or else the first transaction writes it, whatever that is about."""
    other = path.with_name("other.db")

    def attach(connection: sqlite3.Connection, readonly: bool) -> None:
        attaching(other)(connection, readonly)
        connection.execute("ATTACH ':memory:' AS scratch")

    with DbWriter(path, on_connect=attach) as db:
        assert other.stat().st_size > 0
        assert db.run("SELECT 1").rows == [(1,)]


def test_an_attached_file_that_is_empty_and_read_only_stays_so(path: Path) -> None:
    other = path.with_name("other.db")
    other.touch()

    def attach(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.execute("ATTACH ? AS other", (f"{other.as_uri()}?mode=ro",))

    with DbWriter(path, on_connect=attach) as db:
        assert db.run("SELECT 1").rows == [(1,)]
    assert other.stat().st_size == 0

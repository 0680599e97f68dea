"""More of opening: arguments one by one, files that are no database, hooks, settings of every connection."""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import DEADLINE, holding_lock, in_threads, run_child
from onewriter import DbWriter

WRONG_TYPES: dict[str, list[Any]] = {
    "readers": ["4", None, 4.0, True],
    "maxsize": ["4", None, 4.0, math.inf],
    "wal_limit": ["4", None, 4.5, False],
    "lock_timeout": ["1", None, True, [1]],
    "slow_after": ["1", None, False],
    "max_hold": ["1", None, True],
    "label": [3, b"label", Path("label")],
    "on_connect": [3, "hook", ()],
    "on_error": [3, "hook", ()],
    "row_factory": [3, "Row"],
    "detect_types": ["1", None, 1.0],
    "pragmas": [{"cache_size": None}, {"cache_size": b"1"}, {"cache_size": [1]}],
}
WRONG_VALUES: dict[str, list[Any]] = {
    "readers": [0, -1],
    "maxsize": [0, -5],
    "wal_limit": [-1],
    "lock_timeout": [-0.1, math.nan, -math.inf],
    "slow_after": [-1, math.nan],
    "max_hold": [-1, math.nan],
    "synchronous": ["full", "2", 2, None, ""],
    "journal_mode": ["wal", "OFF", "MEMORY", None, ""],
    "pragmas": [
        {"": 1},
        {"cache_size = 1; --": 1},
        {"main.cache_size": 1},
        {"no_such_pragma": 1},
        {"Foreign_Keys": 1},
        {"SYNCHRONOUS": "OFF"},
        {"journal_mode": "WAL"},
        {"busy_timeout": 5000},
        {"query_only": 1},
        {"locking_mode": "EXCLUSIVE"},
        {"wal_autocheckpoint": 1},
        {"journal_size_limit": 1},
        {"cache_size": "many"},
        {"recursive_triggers": 2},
    ],
}


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_an_argument_of_a_wrong_type_is_named_and_no_file_is_made(path: Path, name: str) -> None:
    for value in WRONG_TYPES[name]:
        with pytest.raises(TypeError, match=name):
            DbWriter(path, **{name: value})
    assert not path.exists()


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_an_argument_of_a_wrong_value_is_refused_and_leaves_no_thread_and_no_lock(path: Path, name: str) -> None:
    threads = threading.active_count()
    for value in WRONG_VALUES[name]:
        with pytest.raises(ValueError):  # noqa: PT011 - which one is in the name of the case
            DbWriter(path, **{name: value})
    assert threading.active_count() == threads
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")


def test_arguments_at_the_edge_are_taken(path: Path) -> None:
    with DbWriter(
        path,
        readers=1,
        maxsize=1,
        wal_limit=0,
        lock_timeout=math.inf,
        slow_after=math.inf,
        max_hold=math.inf,
        pragmas={},
    ) as db:
        db.run("CREATE TABLE t (n)")
        assert db.read("SELECT * FROM t") == []


@pytest.mark.parametrize("path", ["nul\0.db", b"nul\0.db", "file:x.db", "file::memory:?cache=shared", b"file:x.db"])
def test_a_path_that_sqlite_would_read_otherwise_is_refused(path: Any) -> None:
    with pytest.raises(ValueError, match="path"):
        DbWriter(path)


@pytest.mark.parametrize("content", [b"hello", b"SQLite format 3\0", b"x" * 100, b"\0" * 4096, os.urandom(8192)])
def test_a_file_that_is_no_database_stays_as_it_is_and_nothing_is_beside_it(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for journal_mode in ("WAL", "DELETE"):
        with pytest.raises(sqlite3.DatabaseError, match=r"app\.db"):
            DbWriter(path, journal_mode=journal_mode)
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


def test_a_symbolic_link_opens_the_file_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    link = tmp_path / "link.db"
    link.symlink_to(tmp_path / "data" / "app.db")
    with DbWriter(link) as db:
        db.run("CREATE TABLE t (n)")
        db.run("INSERT INTO t VALUES (1)")
        assert db.read("SELECT n FROM t") == [(1,)]
    assert os.listdir(tmp_path / "data") == ["app.db"]


# Settings -------------------------------------------------------------------------------------------------------------

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


def test_no_checkpoint_of_ours_without_auto_checkpoint(path: Path) -> None:
    with DbWriter(path, auto_checkpoint=False) as db:
        assert db.run("PRAGMA wal_autocheckpoint").rows == [(0,)]
    with DbWriter(path, wal_limit=12345) as db:
        assert db.run("PRAGMA journal_size_limit").rows == [(12345,)]


# Hooks ----------------------------------------------------------------------------------------------------------------


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
        connection.execute("BEGIN")
        connection.execute("INSERT INTO made VALUES (1)")


def test_a_transaction_that_the_hook_leaves_open_is_committed(path: Path) -> None:
    with DbWriter(path, on_connect=write_and_stay) as db:
        with holding_lock(path):
            assert db.read("SELECT n FROM made") == [(1,)]
        db.run("INSERT INTO made VALUES (2)")


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


def raises(error: BaseException) -> Callable[[sqlite3.Connection, bool], object]:
    def hook(connection: sqlite3.Connection, readonly: bool) -> None:
        raise error

    return hook


@pytest.mark.parametrize(
    "error", [LookupError("mine"), sqlite3.OperationalError("mine"), KeyboardInterrupt("mine"), SystemExit("mine")]
)
@pytest.mark.parametrize("inline", [False, True], ids=["thread", "inline"])
def test_an_error_of_the_hook_reaches_the_constructors_caller_with_a_note(
    path: Path, error: BaseException, inline: bool
) -> None:
    threads = threading.active_count()
    with pytest.raises(type(error), match="mine") as caught:
        DbWriter(path, on_connect=raises(error), inline=inline)
    assert caught.value is error
    assert any("on_connect" in note and "readonly=False" in note for note in caught.value.__notes__)
    assert threading.active_count() == threads
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")


# Private and shared files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [":memory:", "", b":memory:", b""])
def test_a_private_database_that_cannot_be_opened_leaves_no_folder(
    name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(LookupError):
        DbWriter(name, on_connect=raises(LookupError()))
    assert os.listdir(tmp_path) == []
    with DbWriter(name) as first, DbWriter(name) as second:
        first.run("CREATE TABLE t (n)")
        assert len(os.listdir(tmp_path)) == 2
        with pytest.raises(sqlite3.OperationalError, match="no such table"):
            second.read("SELECT * FROM t")
    assert os.listdir(tmp_path) == []


def test_a_gateway_closed_before_is_no_second_gateway(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        with DbWriter(path) as db:
            db.run("CREATE TABLE IF NOT EXISTS t (n)")
    with contextlib.suppress(LookupError):
        DbWriter(path, on_connect=raises(LookupError()))
    DbWriter(path).close()
    assert caplog.records == []


def test_a_second_gateway_through_a_link_warns_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "link.db").symlink_to(tmp_path / "app.db")
    with DbWriter(tmp_path / "app.db"), DbWriter(tmp_path / "link.db"):
        pass
    assert len([record for record in caplog.records if "another DbWriter" in record.getMessage()]) == 1


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
    import subprocess
    import sys

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

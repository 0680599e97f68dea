"""What stands beside the file, its other names, and the limits of the system: told at opening, by name."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import run_child
from onewriter import DbWriter, WriterBrokenError
from onewriter.sqlite import options, pragmas
from onewriter.tools import check


def make(path: Path, mode: str = "WAL") -> None:
    with contextlib.closing(sqlite3.connect(path)) as plain:
        plain.execute(f"PRAGMA journal_mode = {mode}")
        plain.execute("CREATE TABLE t (n)")


@pytest.mark.parametrize("other", ["second.db", "folder/app.db"])
def test_a_file_with_a_second_name_is_refused_under_each(path: Path, other: str) -> None:
    make(path)
    second = path.parent / other
    second.parent.mkdir(exist_ok=True)
    os.link(path, second)
    for name in (path, second):
        with pytest.raises(sqlite3.OperationalError, match=r"second name \(a hard link\).*a symbolic link may"):
            DbWriter(name)
        assert any("hard link" in text for text in check.check(str(name)).problems)
    second.unlink()
    second.symlink_to(path)
    with DbWriter(second) as db:
        db.run("INSERT INTO t VALUES (1)")


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
@pytest.mark.parametrize("is_there", [True, False])
def test_what_sqlite_keeps_beside_a_database_is_no_database(path: Path, suffix: str, is_there: bool) -> None:
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        name = Path(f"{path}{suffix}")
        if is_there:
            name.touch()
        before = sorted(os.listdir(path.parent))
        with pytest.raises(sqlite3.OperationalError, match=f"own file beside the database {path}"):
            DbWriter(name)
        link = path.parent / "link.db"
        link.symlink_to(name)
        with pytest.raises(sqlite3.OperationalError, match="own file beside the database"):
            DbWriter(link)
        link.unlink()
        assert sorted(os.listdir(path.parent)) == before
        db.run("INSERT INTO t VALUES (1)")


def test_a_name_that_only_ends_like_one_of_them_is_a_name(tmp_path: Path) -> None:
    with DbWriter(tmp_path / "my-wal") as db:
        db.run("CREATE TABLE t (n)")


AS_ANOTHER_USER = """
import os, sqlite3, sys
from onewriter import DbWriter
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    DbWriter({path!r}, journal_mode={mode!r})
except sqlite3.OperationalError as error:
    print(error.sqlite_errorname, error)
"""


@pytest.mark.parametrize(("suffix", "mode"), [("-wal", "WAL"), ("-shm", "WAL"), ("-journal", "DELETE")])
def test_a_log_or_index_that_cannot_be_written_is_named(open_folder: Path, suffix: str, mode: str) -> None:
    """Somebody with the right to read only has looked at it, and left them."""
    path = open_folder / "app.db"
    make(path, mode)
    name = Path(f"{path}{suffix}")
    name.touch()
    os.chmod(open_folder, 0o777)
    os.chmod(path, 0o666)
    os.chmod(name, 0o444)
    child = run_child(AS_ANOTHER_USER.format(path=str(path), mode=mode))
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith(
        f"SQLITE_READONLY cannot open {path}: {name}, which SQLite keeps beside the database"
    )


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can give a file away")
def test_a_check_by_root_says_that_the_files_belong_to_different_users(path: Path) -> None:
    make(path)
    os.chown(path, 65534, 65534)
    shm = Path(f"{path}-shm")
    shm.touch()
    os.chmod(shm, 0o644)
    assert any(str(shm) in text and "another user" in text for text in check.check(str(path)).problems)
    os.chown(shm, 65534, 65534)
    assert check.check(str(path)).problems == []


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
def test_a_folder_in_the_place_of_a_log_is_named(path: Path, suffix: str) -> None:
    Path(f"{path}{suffix}").mkdir()
    with pytest.raises(sqlite3.OperationalError, match=f"{suffix}, which SQLite keeps .* not a regular file"):
        DbWriter(path)
    assert not path.exists()


def test_a_log_beside_a_file_that_was_emptied_is_kept(path: Path, tmp_path: Path) -> None:
    """SQLite deletes the log of an empty file, and what is in it with it."""
    crashed = tmp_path / "crashed.db"
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        db.run("INSERT INTO t VALUES (1)")
        shutil.copyfile(f"{path}-wal", f"{crashed}-wal")
    crashed.touch()
    with pytest.raises(sqlite3.OperationalError, match=r"is empty and .*-wal is not"):
        DbWriter(crashed)
    assert Path(f"{crashed}-wal").stat().st_size > 0
    assert any("overwritten" in text for text in check.check(str(crashed)).problems)


NO_ROOM_FOR_THE_INDEX = """
import os, resource, sqlite3
from onewriter import DbWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    DbWriter({path!r})
except sqlite3.OperationalError as error:
    print(error.sqlite_errorname, error)
with DbWriter({path!r}, journal_mode="DELETE") as db:
    db.run("CREATE TABLE IF NOT EXISTS t (n)")
    db.run("INSERT INTO t VALUES (1)")
print(sorted(os.listdir({folder!r})))
"""


@pytest.mark.parametrize("is_new", [True, False])
def test_where_the_index_of_the_log_cannot_be_had_the_file_stays_as_it_was(path: Path, is_new: bool) -> None:
    if not is_new:
        make(path, "DELETE")
    child = run_child(NO_ROOM_FOR_THE_INDEX.format(path=str(path), folder=str(path.parent)))
    assert child.returncode == 0, child.stderr
    said, left = child.stdout.splitlines()
    assert said.startswith("SQLITE_IOERR_SHM")
    assert 'journal_mode="DELETE" is the way out' in said
    assert path.name in left
    assert "-wal" not in left


NO_DESCRIPTORS = """
import os, resource, sqlite3
from onewriter import DbWriter
def use_up():
    kept = []
    try:
        while True:
            kept.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return kept
db = DbWriter({path!r}, journal_mode="DELETE")
db.run("CREATE TABLE t (n)")
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
kept = use_up()
insert = "INSERT INTO t VALUES (1)"
for call in (lambda: DbWriter({other!r}, inline=True), lambda: db.read("SELECT * FROM t"), lambda: db.run(insert)):
    try:
        call()
    except sqlite3.OperationalError as error:
        print(error.sqlite_errorname, error.__notes__)
for descriptor in kept:
    os.close(descriptor)
db.run("INSERT INTO t VALUES (1)")
db.close()
"""


def test_when_descriptors_are_used_up_the_error_says_so(path: Path, tmp_path: Path) -> None:
    child = run_child(NO_DESCRIPTORS.format(path=str(path), other=str(tmp_path / "other.db")))
    assert child.returncode == 0, child.stderr
    lines = child.stdout.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("SQLITE_CANTOPEN") and "EMFILE" in line for line in lines)


def test_a_library_without_mutexes_is_refused() -> None:
    with pytest.raises(RuntimeError, match="SQLITE_THREADSAFE=0"):
        options.refuse_unsafe_sqlite(0)
    options.refuse_unsafe_sqlite(1)


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

    original = pragmas.database_names
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


@pytest.mark.parametrize("mode", ["WAL", "DELETE", "TRUNCATE", "PERSIST"])
@pytest.mark.parametrize("way", ["copied over", "emptied"])
def test_a_file_that_is_overwritten_by_a_smaller_one_is_noticed_in_each_mode(path: Path, mode: Any, way: str) -> None:
    with DbWriter(path, journal_mode=mode) as db:
        db.run("CREATE TABLE t (a)")
        db.backup(path.with_name("backup.db"))
        db.run_many("INSERT INTO t VALUES (zeroblob(1000))", [()] * 200)
        db.checkpoint() if mode == "WAL" else db.flush()  # since when the gateway knows how much there is
        if way == "emptied":
            os.truncate(path, 0)
        else:
            shutil.copyfile(path.with_name("backup.db"), path)
        db._core.file._looked_at = 0.0  # the next look is due
        with pytest.raises(WriterBrokenError, match="overwritten"):
            db.run("INSERT INTO t VALUES (1)")


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_a_file_that_another_process_has_made_smaller_is_no_trouble(path: Path, mode: Any) -> None:
    with DbWriter(path, journal_mode=mode) as db:
        db.run("CREATE TABLE t (a)")
        db.run_many("INSERT INTO t VALUES (zeroblob(1000))", [()] * 200)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("DELETE FROM t")
            other.execute("VACUUM")
        db._core.file._looked_at = 0.0
        db.run("INSERT INTO t VALUES (1)")
        assert db.health == "ok"


@pytest.mark.parametrize("way", ["deleted", "moved", "replaced"])
def test_an_attached_file_that_is_not_there_any_more_is_noticed(path: Path, way: str) -> None:
    other = path.with_name("other.db")
    with contextlib.closing(sqlite3.connect(other)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE t (a)")
    with DbWriter(path, on_connect=lambda c, readonly: c.execute("ATTACH ? AS o", (str(other),))) as db:
        db.run("INSERT INTO o.t VALUES (1)")
        if way == "deleted":
            other.unlink()
        else:
            other.rename(path.with_name("moved.db"))
        if way == "replaced":
            shutil.copyfile(path.with_name("moved.db"), other)
        db._core.file._looked_at = 0.0
        with pytest.raises(WriterBrokenError, match=r"other\.db"):
            db.run("INSERT INTO o.t VALUES (2)")


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
def test_a_log_that_others_delete_and_make_at_the_moment_of_the_look_is_no_trouble(
    path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As several openers and closers of one file do."""
    with DbWriter(path):
        pass
    log, access, looks = path.with_name(path.name + suffix), os.access, []

    def replaced_meanwhile(name: Any, mode: int, **options: Any) -> bool:
        if os.fspath(name) == str(log):
            looks.append(name)
            log.unlink()
            found = access(name, mode, **options)
            log.write_bytes(b"")
            os.utime(log, ns=(len(looks), len(looks)))
            return found
        return access(name, mode, **options)

    log.write_bytes(b"")
    monkeypatch.setattr(os, "access", replaced_meanwhile)
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (a)")
    assert looks

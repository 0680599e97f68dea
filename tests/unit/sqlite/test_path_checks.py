"""A path, what stands beside the file, its other names, and the limits of the system: told at opening, by name."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from helpers import attaching, eventually, make, run_child
from onewriter import DbWriter
from onewriter.tools import check


@pytest.mark.parametrize("other", ["second.db", "folder/app.db"])
def test_a_file_with_a_second_name_is_refused_under_each(path: Path, other: str) -> None:
    make(path)
    second = path.parent / other
    second.parent.mkdir(exist_ok=True)
    os.link(path, second)
    for name in (path, second):
        with pytest.raises(sqlite3.OperationalError, match=r"second name \(a hard link\).*use a symbolic link"):
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
        with pytest.raises(sqlite3.OperationalError, match=f"SQLite keeps it for the database {path}"):
            DbWriter(name)
        link = path.parent / "link.db"
        link.symlink_to(name)
        with pytest.raises(sqlite3.OperationalError, match="SQLite keeps it for the database"):
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


def test_a_path_that_sqlite_cannot_follow_or_is_too_long_is_told_as_that(tmp_path: Path) -> None:
    loop = tmp_path / "loop.db"
    loop.symlink_to(loop)
    with pytest.raises(sqlite3.OperationalError, match="symbolic link"):
        DbWriter(loop)
    with pytest.raises(sqlite3.OperationalError, match="name too long"):
        DbWriter(tmp_path / ("x" * 250))
    folder = tmp_path / ("x" * 200) / ("y" * 200)
    folder.mkdir(parents=True)
    room = 504 - len(str(folder)) - 1
    with pytest.raises(sqlite3.OperationalError, match="has 505 bytes, and SQLite takes 504"):
        DbWriter(folder / ("z" * (room + 1)))
    with DbWriter(folder / ("z" * room)) as db:
        db.run("CREATE TABLE t (n)")


def test_a_relative_path_where_the_current_folder_is_gone_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(sqlite3.OperationalError, match=r"cannot open app\.db: the current folder: No such file"):
        DbWriter("app.db")
    text = r"cannot open copy\.db: the current folder: No such file"
    with DbWriter(tmp_path / "app.db") as db, pytest.raises(sqlite3.OperationalError, match=text):
        db.backup("copy.db")


def test_a_link_that_has_taken_the_place_of_a_database_is_refused_while_the_log_of_that_is_there(path: Path) -> None:
    target = path.with_name("moved.db")
    with DbWriter(target) as db:
        db.run("CREATE TABLE t (n)")
    path.symlink_to(target)
    log = Path(f"{path}-wal")
    log.write_bytes(b"rows")
    with pytest.raises(sqlite3.OperationalError, match=r"it is a link, and .*-wal is the log of a file that was there"):
        DbWriter(path)
    assert log.exists()
    log.write_bytes(b"")
    with DbWriter(path) as db:
        assert db.read("SELECT * FROM t") == []
    log.unlink()
    with DbWriter(target) as other:
        other.run("INSERT INTO t VALUES (1)")
        log.symlink_to(f"{target}-wal")  # as tools make links of all files of a folder
        with DbWriter(path) as db:
            assert db.read("SELECT * FROM t") == [(1,)]


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
def test_a_link_in_the_place_of_a_log_is_named(path: Path, suffix: str) -> None:
    """SQLite does not follow it."""
    target = path.with_name("target")
    target.touch()
    Path(f"{path}{suffix}").symlink_to(target)
    with pytest.raises(sqlite3.OperationalError, match=f"{suffix}, which SQLite keeps .* not a regular file"):
        DbWriter(path)


@pytest.mark.parametrize("what", ["empty", "missing"])
def test_a_log_beside_a_file_that_was_emptied_or_moved_is_kept(path: Path, tmp_path: Path, what: str) -> None:
    """SQLite deletes the log of an empty or new file, and what is in it with it."""
    crashed = tmp_path / "crashed.db"
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        db.run("INSERT INTO t VALUES (1)")
        shutil.copyfile(f"{path}-wal", f"{crashed}-wal")
    if what == "empty":
        crashed.touch()
    with pytest.raises(sqlite3.OperationalError, match=rf"is {what} and .*-wal is not"):
        DbWriter(crashed)
    assert Path(f"{crashed}-wal").stat().st_size > 0
    assert crashed.exists() == (what == "empty")
    if what == "empty":
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
    assert 'use journal_mode="DELETE" there' in said
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


def test_an_attached_file_with_a_second_name_is_refused(path: Path, other: Path) -> None:
    """Its log would be beside one of its names, and who opens the other would not have what is in there."""
    make(other)
    os.link(other, path.parent / "second.db")
    threads = set(threading.enumerate())
    with pytest.raises(sqlite3.OperationalError, match=r"other\.db: the file has a second name"):
        DbWriter(path, on_connect=attaching(other))
    assert not Path(f"{path}-wal").exists()  # it is closed by now
    eventually(lambda: set(threading.enumerate()) <= threads)
    os.unlink(path.parent / "second.db")
    with DbWriter(path, on_connect=attaching(other)) as db:
        db.run("INSERT INTO other.t VALUES (1)")


@pytest.mark.parametrize("how", ["mode=ro", "mode=ro&immutable=1"])
def test_what_is_attached_to_be_read_only_may_have_names_and_gateways_and_a_mode(
    path: Path, other: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """As of a package, whose files an installer has linked; nobody's writes are lost."""

    def connect(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.execute("ATTACH ? AS other", (f"file:{other}?{how}",))
        connection.execute("PRAGMA other.journal_mode = MEMORY")

    make(other, "DELETE")
    os.link(other, path.parent / "second.db")
    with DbWriter(path, on_connect=connect) as db, DbWriter(path.parent / "third.db", on_connect=connect):
        assert db.read("SELECT count(*) FROM other.t") == [(0,)]
    assert caplog.records == []


def test_impossible_paths_are_refused_and_nothing_is_created(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    before, threads = sorted(os.listdir(tmp_path)), set(threading.enumerate())
    cases: list[tuple[Any, type[Exception], str]] = [
        (tmp_path / "folder", sqlite3.OperationalError, "it is a folder"),
        (f"{tmp_path}/app.db/", sqlite3.OperationalError, "it is the path of a folder"),
        (f"{tmp_path}/none/..", sqlite3.OperationalError, "it is the path of a folder"),
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
    assert set(threading.enumerate()) <= threads


READ_ONLY = """
import os, sqlite3, sys, threading
from onewriter import DbWriter
if os.geteuid() == 0:
    os.setegid(65534); os.setCALLuid(65534)
for path in sys.argv[1:]:
    try:
        DbWriter(path)
    except sqlite3.OperationalError as error:
        print(error)
print(threading.active_count())
"""


@pytest.mark.parametrize("call", ["", "e"])
def test_folders_and_files_without_the_right_to_write_are_named(open_folder: Path, call: str) -> None:
    """As the user that the process acts for: ``seteuid`` leaves another one in its name."""
    closed, shared = open_folder / "closed", open_folder / "shared"
    for folder in (closed, shared):
        folder.mkdir()
        sqlite3.connect(folder / "app.db").close()
        (folder / "app.db").write_bytes(b"")
    (closed / "app.db").chmod(0o666)
    closed.chmod(0o555)
    shared.chmod(0o777)
    (shared / "app.db").chmod(0o444)
    paths = [str(closed / "app.db"), str(shared / "app.db")]
    code = f"import sys; sys.argv[1:] = {paths!r}\n" + READ_ONLY.replace("CALL", call)
    told = run_child(code).stdout.splitlines()
    assert len(told) == 3
    assert f"the folder {closed}" in told[0]
    assert "not writable" in told[0]
    assert "the file is not writable" in told[1]
    assert told[2] == "1"


@pytest.mark.parametrize(
    "path", ["nul\0.db", b"nul\0.db", "file:x.db", "file:x?mode=memory", "file::memory:?cache=shared", b"file:x.db"]
)
def test_a_path_that_sqlite_would_read_otherwise_is_refused(path: Any) -> None:
    with pytest.raises(ValueError, match="path"):
        DbWriter(path)

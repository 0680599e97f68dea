"""The file, or its log, is moved, deleted, replaced or overwritten under an open gateway."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import attaching, drop_session, eventually, file_of, names_in, raising, run_child
from onewriter import DbWriter, WriterBrokenError
from onewriter.sqlite import file

INSERT = "INSERT INTO t VALUES (?)"


def move(path: Path) -> None:
    path.rename(path.parent / "elsewhere.db")


def delete(path: Path) -> None:
    for name in (str(path), f"{path}-wal", f"{path}-shm"):
        os.unlink(name)


def replace(path: Path) -> None:
    delete(path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE other (n)")


@pytest.fixture(autouse=True)
def _look_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "CHECK_INTERVAL", 0.0)


@pytest.mark.parametrize("away", [move, delete, replace])
@pytest.mark.parametrize("inline", [False, True])
def test_writes_reads_and_blocks_say_so_and_no_file_appears(
    path: Path, away: Callable[[Path], None], inline: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.CRITICAL), DbWriter(path, inline=inline) as db:
        db.run("CREATE TABLE t (n)")
        db.run(INSERT, (1,))
        away(path)
        before = names_in(path.parent)
        with pytest.raises(WriterBrokenError, match="last writes may be lost") as caught:
            db.run(INSERT, (2,))
        assert str(path) in str(caught.value)
        for call in (
            lambda: db.run(INSERT, (3,)),
            lambda: db.enqueue(INSERT, (3,)),
            lambda: db.transaction().__enter__(),
            lambda: db.run_without_transaction("VACUUM"),
            lambda: db.checkpoint(),
            lambda: db.flush(),
            lambda: db.read("SELECT * FROM t"),
            lambda: db.reader().__enter__(),
            lambda: db.backup(path.parent / "copy.db"),
        ):
            with pytest.raises(WriterBrokenError):
                call()
        assert db.health.startswith("broken: ")
        assert db.closed
        report = db.close()
        assert (report.committed, report.failed) == (2, 1)
        assert names_in(path.parent) == before
    assert len([record for record in caplog.records if record.levelno == logging.CRITICAL]) == 1


@pytest.mark.parametrize("inline", [False, True])
def test_a_block_notices_at_entry(path: Path, inline: bool) -> None:
    with DbWriter(path, inline=inline) as db:
        db.run("CREATE TABLE t (n)")
        move(path)
        with pytest.raises(WriterBrokenError), db.transaction():
            pytest.fail("the block ran")


def test_no_reader_opens_another_file(path: Path) -> None:
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        replace(path)
        with pytest.raises(WriterBrokenError, match="another file"):
            db.read("SELECT * FROM other")
        delete_new = path.parent / "gone"
        path.rename(delete_new)
        with pytest.raises(WriterBrokenError, match="no longer there"):
            db.read("SELECT 1")
        assert not path.exists()


def test_the_log_of_the_database_that_took_the_place_is_not_touched(path: Path) -> None:
    """Closing the last connection of a database deletes its log, by name."""
    db = DbWriter(path)
    db.run("CREATE TABLE t (n)")
    db.read("SELECT 1")
    delete(path)
    with DbWriter(path) as new:
        new.run("CREATE TABLE t (n)")
        new.run(INSERT, (1,))
        with pytest.raises(WriterBrokenError):
            db.run(INSERT, (2,))
        db.close()
        assert Path(f"{path}-wal").exists()
        copy = path.parent / "after a crash"
        copy.mkdir()
        for name in (path.name, f"{path.name}-wal"):
            shutil.copy(path.parent / name, copy / name)
        with contextlib.closing(sqlite3.connect(copy / path.name)) as connection:
            assert connection.execute("SELECT n FROM t").fetchall() == [(1,)]


def test_at_exit_the_log_of_the_database_that_took_the_place_is_not_touched_either(path: Path) -> None:
    child = run_child(
        f"""
import os, sqlite3
from onewriter import DbWriter, WriterBrokenError
path = {str(path)!r}
db = DbWriter(path)
db.run("CREATE TABLE t (n)")
for name in (path, path + "-wal", path + "-shm"):
    os.unlink(name)
new = sqlite3.connect(path, isolation_level=None)
new.execute("PRAGMA journal_mode = WAL")
new.execute("CREATE TABLE t (n)")
import ctypes
ctypes.pythonapi.Py_IncRef(ctypes.py_object(new))  # it stays open, as that of another process would
"""
    )
    assert child.returncode == 0, child.stderr
    assert "last writes may be lost" in child.stderr
    assert Path(f"{path}-wal").stat().st_size > 0


def test_closing_notices_too(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    db = DbWriter(path)
    db.run("CREATE TABLE t (n)")
    move(path)
    with caplog.at_level(logging.CRITICAL):
        db.close()
    assert "last writes may be lost" in caplog.text
    assert db.health.startswith("broken: ")


def test_it_is_looked_for_at_most_ten_times_a_second(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "CHECK_INTERVAL", 3600.0)
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        db.run(INSERT, (1,))
        move(path)
        assert db.run(INSERT, (2,)).rowcount == 1  # into the file that was moved


def test_a_file_that_comes_back_does_not_heal_the_gateway(path: Path) -> None:
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        move(path)
        with pytest.raises(WriterBrokenError):
            db.run(INSERT, (1,))
        (path.parent / "elsewhere.db").rename(path)
        with pytest.raises(WriterBrokenError):
            db.run(INSERT, (1,))
    with DbWriter(path) as db:
        db.run(INSERT, (1,))


@pytest.mark.parametrize("inline", [False, True])
def test_a_connection_that_is_opened_again_is_not_one_to_another_file(
    path: Path, inline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file, "CHECK_INTERVAL", 3600.0)
    with DbWriter(path, inline=inline) as db:
        db.run("CREATE TABLE t (n)")
        drop_session(db)  # as after an error that leaves it in doubt; the writer is idle
        path.unlink()
        with pytest.raises(WriterBrokenError):
            db.run(INSERT, (1,))
        assert not path.exists()


def test_a_reader_that_was_opened_while_the_file_was_replaced_is_not_used(path: Path) -> None:
    def hook(connection: sqlite3.Connection, readonly: bool) -> None:
        if readonly:
            replace(path)

    with DbWriter(path, on_connect=hook) as db:
        db.run("CREATE TABLE t (n)")
        with pytest.raises(WriterBrokenError, match="another file"):
            db.read("SELECT 1")


def lose_log(path: Path) -> None:
    for suffix in ("-wal", "-shm"):
        os.unlink(f"{path}{suffix}")


def lose_index(path: Path) -> None:
    os.unlink(f"{path}-shm")


def replace_log(path: Path) -> None:
    for suffix in ("-wal", "-shm"):
        os.rename(f"{path}{suffix}", f"{path}{suffix}.old")
        Path(f"{path}{suffix}").touch()


def take_for_last(path: Path) -> None:
    """What a second SQLite library in this process does: its locks and ours are one, so it closes as the last."""
    checkpoint = "c.execute('PRAGMA wal_checkpoint(TRUNCATE)')"
    assert run_child(f"import sqlite3; c = sqlite3.connect({str(path)!r}); {checkpoint}").returncode == 0
    lose_log(path)


WRITES_AND_IS_KILLED = """
import os, signal, sqlite3
connection = sqlite3.connect({path!r}, isolation_level=None)
connection.execute("PRAGMA journal_mode = WAL")
connection.execute("INSERT INTO t VALUES (100)")
os.kill(os.getpid(), signal.SIGKILL)
"""


def seen_by_others(path: Path) -> str:
    code = f"import sqlite3; print(sqlite3.connect({str(path)!r}).execute('SELECT n FROM t ORDER BY n').fetchall())"
    child = run_child(code)
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


@pytest.mark.parametrize("away", [lose_log, lose_index, replace_log, take_for_last])
@pytest.mark.parametrize("inline", [False, True])
def test_a_log_that_is_lost_is_as_good_as_the_file(path: Path, away: Callable[[Path], None], inline: bool) -> None:
    with DbWriter(path, inline=inline) as db:
        db.run("CREATE TABLE t (n)")
        db.run(INSERT, (1,))
        db.read("SELECT 1")
        db.checkpoint()
        away(path)
        for call in (
            lambda: db.run(INSERT, (2,)),
            lambda: db.enqueue(INSERT, (3,)),
            lambda: db.transaction().__enter__(),
            lambda: db.read("SELECT * FROM t"),
            lambda: db.backup(path.parent / "copy.db"),
        ):
            with pytest.raises(WriterBrokenError, match=r"-(wal|shm) .*last writes may be lost"):
                call()
        assert db.health.startswith("broken: ")
    assert seen_by_others(path) == "[(1,)]"


def test_an_idle_gateway_does_not_write_a_lost_log_over_what_others_have_written(path: Path) -> None:
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        db.checkpoint()
        db.run(INSERT, (1,))
        lose_log(path)
        run_child(WRITES_AND_IS_KILLED.format(path=str(path)))
        eventually(lambda: db.health.startswith("broken"))
    assert seen_by_others(path) == "[(100,)]"


@pytest.mark.parametrize("is_noticed", [True, False])
@pytest.mark.parametrize("inline", [False, True])
def test_closing_writes_nothing_over_what_others_have_written_since_the_log_was_lost(
    path: Path, inline: bool, is_noticed: bool
) -> None:
    db = DbWriter(path, inline=inline)
    db.run("CREATE TABLE t (n)")
    db.checkpoint()
    db.run(INSERT, (1,))  # in the log that will be lost
    lose_log(path)
    run_child(WRITES_AND_IS_KILLED.format(path=str(path)))
    if is_noticed:
        with pytest.raises(WriterBrokenError):
            db.run(INSERT, (2,))
    db.close()
    assert Path(f"{path}-wal").stat().st_size > 0
    assert seen_by_others(path) == "[(100,)]"
    with DbWriter(path, inline=inline) as again:
        again.run(INSERT, (3,))
    assert seen_by_others(path) == "[(3,), (100,)]"


def test_a_connection_that_cannot_be_closed_without_harm_stays_open_and_the_file_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = DbWriter(path)
    db.run("CREATE TABLE t (n)")
    db.checkpoint()
    db.run(INSERT, (1,))
    lose_log(path)
    run_child(WRITES_AND_IS_KILLED.format(path=str(path)))
    monkeypatch.setattr(sys, "executable", "/nothing/there")
    db.close()
    monkeypatch.undo()
    with pytest.raises(WriterBrokenError, match="in another process"):
        DbWriter(path)
    assert seen_by_others(path) == "[(100,)]"


def test_of_a_connection_that_stays_open_that_file_is_refused_whose_log_was_lost(
    path: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    DbWriter(other).close()
    db = DbWriter(path, on_connect=attaching(other))
    db.run("CREATE TABLE other.t (n)")
    lose_log(other)
    monkeypatch.setattr(sys, "executable", "/nothing/there")
    db.close()
    monkeypatch.undo()
    with pytest.raises(WriterBrokenError, match="in another process"):
        DbWriter(other)
    with DbWriter(path) as again:
        again.run("CREATE TABLE t (n)")


def test_a_log_is_looked_at_although_the_opening_before_was_interrupted(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection of which it is not known what its log is does not stay."""
    db = DbWriter(path, inline=True)
    db.run("CREATE TABLE t (n)")
    drop_session(db)  # as after an error that leaves it in doubt
    with monkeypatch.context() as patch:
        patch.setattr(file_of(db), "remember", raising(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            db.run(INSERT, (1,))
    db.run(INSERT, (1,))
    lose_log(path)
    with pytest.raises(WriterBrokenError, match="-wal"):
        db.run(INSERT, (2,))
    db.close()


def link_behind(path: Path) -> None:
    moved = path.with_name("moved.db")
    path.rename(moved)
    path.symlink_to(moved)


@pytest.mark.parametrize("is_noticed", [True, False])
@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("name", ["main", "other"])
def test_a_file_whose_name_has_become_a_link_to_it_is_another_file(
    path: Path, inline: bool, is_noticed: bool, name: str
) -> None:
    """Others follow the link, and have a log beside the file; ours is beside the link."""
    files = {"main": path, "other": path.with_name("other.db")}
    with contextlib.closing(sqlite3.connect(files["other"])) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    attach = ("ATTACH ? AS other", (str(files["other"]),))
    db = DbWriter(path, inline=inline, on_connect=lambda c, readonly: c.execute(*attach))
    db.run(f"CREATE TABLE {name}.t (n)")
    db.checkpoint()
    db.run(INSERT, (1,))  # in the log that nobody else has
    link_behind(files[name])
    run_child(WRITES_AND_IS_KILLED.format(path=str(files[name])))
    before = files[name].read_bytes()
    if is_noticed:
        with pytest.raises(WriterBrokenError, match="another file now"):
            db.run(INSERT, (2,))
    db.close()
    assert files[name].read_bytes() == before
    assert seen_by_others(files[name]) == "[(100,)]"


@pytest.mark.parametrize("is_noticed", [True, False])
@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
def test_a_log_whose_name_has_become_a_link_to_it_is_another_log(path: Path, suffix: str, is_noticed: bool) -> None:
    """SQLite follows no link there: others cannot have it."""
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        db.checkpoint()
        db.run(INSERT, (1,))
        before = path.read_bytes()
        link_behind(Path(f"{path}{suffix}"))
        if is_noticed:
            with pytest.raises(WriterBrokenError, match=f"{suffix} is another file now"):
                db.run(INSERT, (2,))
    assert path.read_bytes() == before


def test_a_file_that_was_moved_to_the_name_of_the_link_that_leads_to_it_is_another_file(path: Path) -> None:
    link = path.with_name("link.db")
    link.symlink_to(path)
    with DbWriter(link) as db:
        db.run("CREATE TABLE t (n)")
        path.rename(link)
        with pytest.raises(WriterBrokenError, match="no longer there"):
            db.run(INSERT, (1,))


@pytest.mark.parametrize("mode", ["DELETE", "TRUNCATE", "PERSIST"])
def test_a_file_that_is_emptied_as_its_size_is_looked_at_is_noticed(path: Path, mode: Any) -> None:
    with DbWriter(path, journal_mode=mode) as db:
        db.run("CREATE TABLE t (n)")
        db.flush()  # the size is looked at when ``run`` has returned
        path.write_bytes(b"")
        file_of(db).remember_size(0)
        with pytest.raises(WriterBrokenError, match="overwritten"):
            db.run("CREATE TABLE t (n)")
    assert path.stat().st_size == 0


def test_a_second_gateway_is_refused_while_one_of_this_process_has_lost_the_log(path: Path) -> None:
    """SQLite has one index of the log for all connections of a process to a file."""
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        lose_log(path)
        with pytest.raises(WriterBrokenError, match="-wal") as caught:
            DbWriter(path)
        assert "close it" in "".join(caught.value.__notes__)
    with DbWriter(path) as again:
        again.run("CREATE TABLE IF NOT EXISTS t (n)")


def test_a_log_that_comes_and_goes_with_our_own_connections_is_not_lost(path: Path) -> None:
    with DbWriter(path, inline=True) as db:
        db.run("CREATE TABLE t (n)")
        for n in range(3):
            drop_session(db)  # as after an error that leaves it in doubt; SQLite deletes the log
            assert not Path(f"{path}-wal").exists()
            db.run(INSERT, (n,))
            db.checkpoint()
            assert (
                run_child(f"import sqlite3; sqlite3.connect({str(path)!r}).execute('SELECT * FROM t')").returncode == 0
            )
        db.read("SELECT 1")
        drop_session(db)  # a reader that has read nothing of the file does not keep the log
        db.run(INSERT, (3,))
        assert db.health == "ok"
    assert seen_by_others(path) == "[(0,), (1,), (2,), (3,)]"


@pytest.mark.parametrize("mode", ["DELETE", "TRUNCATE", "PERSIST"])
def test_where_there_is_no_log_none_is_missed(path: Path, mode: Any) -> None:
    with DbWriter(path, journal_mode=mode) as db:
        db.run("CREATE TABLE t (n)")
        db.run(INSERT, (1,))
        assert (db.stats().wal_bytes, db.health) == (0, "ok")


def test_the_log_of_an_attached_file_is_looked_at_too(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(other)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE t (n)")
    db = DbWriter(path, on_connect=lambda c, readonly: c.execute("ATTACH ? AS other", (str(other),)))
    db.run("INSERT INTO other.t VALUES (1)")
    db.checkpoint()
    db.run("INSERT INTO other.t VALUES (2)")
    lose_log(other)
    run_child(WRITES_AND_IS_KILLED.format(path=str(other)))
    with pytest.raises(WriterBrokenError, match=r"other\.db-wal"):
        db.run("INSERT INTO other.t VALUES (3)")
    db.close()
    assert seen_by_others(other) == "[(1,), (100,)]"


def test_an_attached_file_whose_log_is_lost_cannot_be_opened_again_beside_who_attached_it(
    path: Path, other: Path
) -> None:
    """SQLite would use the index of the lost log, which this process has in memory."""
    with DbWriter(other) as db:
        db.run("CREATE TABLE t (n)")
        with DbWriter(path, on_connect=attaching(other)):
            db.run("INSERT INTO t VALUES (1)")
            db.close()
            lose_log(other)
            with pytest.raises(WriterBrokenError, match="-wal") as caught:
                DbWriter(other)
            with pytest.raises(WriterBrokenError, match="-wal"):
                DbWriter(path.parent / "third.db", on_connect=attaching(other))
    assert any("another DbWriter of this process, app.db" in note for note in caught.value.__notes__)


def grow(db: DbWriter) -> None:
    db.run("CREATE TABLE t (n, text)")
    db.run_many("INSERT INTO t VALUES (?, ?)", [(n, "x" * 100) for n in range(2000)])


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("is_empty", [True, False])
@pytest.mark.parametrize("has_log", [True, False])
def test_a_file_that_is_overwritten_by_a_smaller_one_is_told_as_that(
    path: Path, inline: bool, is_empty: bool, has_log: bool
) -> None:
    small = path.parent / "small.db"
    with DbWriter(small) as db:
        db.run("CREATE TABLE t (n, text)")
    with DbWriter(path, inline=inline) as db:
        grow(db)
        db.checkpoint()
        if has_log:
            db.run("INSERT INTO t VALUES (0, '')")
        if is_empty:
            path.write_bytes(b"")
        else:
            shutil.copyfile(small, path)
        with pytest.raises(WriterBrokenError, match="overwritten while it was open"):
            db.run("INSERT INTO t VALUES (1, '')")
        assert db.health.startswith("broken: ")
    assert path.stat().st_size == (0 if is_empty else small.stat().st_size)  # closing has written nothing


def test_closing_writes_nothing_of_a_log_into_a_file_that_was_overwritten_by_a_little_smaller_one(path: Path) -> None:
    """Of one that is smaller by more than 64 KiB SQLite itself says that it is damaged."""
    small = path.parent / "small.db"
    with DbWriter(small) as db:
        db.run("CREATE TABLE t (n, text)")
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n, text)")
        db.run_many("INSERT INTO t VALUES (?, ?)", [(n, "x" * 100) for n in range(200)])
        db.checkpoint()
        db.run("INSERT INTO t VALUES (0, '')")
        shutil.copyfile(small, path)
        with pytest.raises(WriterBrokenError, match="overwritten while it was open"):
            db.run("INSERT INTO t VALUES (1, '')")
    assert path.read_bytes() == small.read_bytes()


@pytest.mark.parametrize("settings", [{}, {"pragmas": {"auto_vacuum": "FULL"}}, {"journal_mode": "DELETE"}])
def test_a_file_that_sqlite_itself_makes_smaller_is_not_overwritten(path: Path, settings: Any) -> None:
    with DbWriter(path, **settings) as db:
        grow(db)
        db.run_without_transaction("VACUUM")  # ours, that somebody else checkpoints
        db.checkpoint()
        big = path.stat().st_size
        db.run("DELETE FROM t")
        db.run_without_transaction("VACUUM")
        assert run_child(CHECKPOINTS.format(path=str(path))).returncode == 0
        db.run("INSERT INTO t VALUES (1, '')")
        db.checkpoint()
        assert path.stat().st_size < big
        db.run_many("INSERT INTO t VALUES (?, ?)", [(n, "x" * 100) for n in range(2000)])
        db.checkpoint()
        code = f"import sqlite3; c = sqlite3.connect({str(path)!r}); c.execute('DELETE FROM t'); c.commit(); "
        assert run_child(code + "c.execute('VACUUM'); c.execute('PRAGMA wal_checkpoint')").returncode == 0
        db.run("INSERT INTO t VALUES (2, '')")
        assert (db.read_value("SELECT n FROM t"), db.health) == (2, "ok")


CHECKPOINTS = "import sqlite3; sqlite3.connect({path!r}).execute('PRAGMA wal_checkpoint')"


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ENFILE])
def test_a_look_that_fails_for_a_moment_means_nothing(path: Path, reason: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(look: Callable[..., os.stat_result], name: Any, *args: Any, **options: Any) -> os.stat_result:
        if str(path) in str(name):
            raise OSError(reason, os.strerror(reason), str(name))
        return look(name, *args, **options)

    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        with monkeypatch.context() as patch:
            for look in (os.stat, os.lstat):
                patch.setattr(os, look.__name__, functools.partial(failing, look))
            file_of(db).look_again_at = 0.0
            db.run(INSERT, (1,))
            assert db.read("SELECT n FROM t") == [(1,)]
        assert db.run(INSERT, (2,)).rowcount == 1
        assert db.health == "ok"
    assert not Path(f"{path}-wal").exists()


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
        with pytest.raises(WriterBrokenError, match="overwritten"):
            db.run("INSERT INTO t VALUES (1)")


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
@pytest.mark.parametrize("inline", [False, True])
def test_a_file_that_is_overwritten_by_a_smaller_one_in_a_block_is_noticed_before_its_commit(
    path: Path, mode: Any, inline: bool
) -> None:
    with DbWriter(path, journal_mode=mode, inline=inline) as db:
        db.run("CREATE TABLE t (a)")
        db.backup(path.with_name("backup.db"))
        db.run_many("INSERT INTO t VALUES (zeroblob(1000))", [()] * 200)
        db.checkpoint() if mode == "WAL" else db.flush()
        with pytest.raises(WriterBrokenError, match="overwritten"), db.transaction() as tx:
            tx.execute("INSERT INTO t VALUES (1)")
            shutil.copyfile(path.with_name("backup.db"), path)
            file_of(db).look_again_at = 0.0  # a second later
        assert db.stats().committed == 2


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_a_file_that_another_process_has_made_smaller_is_no_trouble(path: Path, mode: Any) -> None:
    with DbWriter(path, journal_mode=mode) as db:
        db.run("CREATE TABLE t (a)")
        db.run_many("INSERT INTO t VALUES (zeroblob(1000))", [()] * 200)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("DELETE FROM t")
            other.execute("VACUUM")
        db.run("INSERT INTO t VALUES (1)")
        assert db.health == "ok"


def test_a_file_that_a_late_checkpoint_of_another_process_makes_smaller_is_no_trouble(path: Path) -> None:
    with DbWriter(path) as db, contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        db.run("CREATE TABLE t (a)")
        db.run_many("INSERT INTO t VALUES (zeroblob(1000))", [()] * 200)
        db.checkpoint()
        other.execute("PRAGMA wal_autocheckpoint = 0")
        other.execute("DELETE FROM t")
        with db.reader():
            other.execute("VACUUM")  # in the log; the file is as large as before
            db.run("INSERT INTO t VALUES (1)")
            assert db.checkpoint("PASSIVE").checkpointed < db.checkpoint("PASSIVE").log  # the gateway knows of it
        size = path.stat().st_size
        with db.transaction() as tx:
            tx.execute("INSERT INTO t VALUES (1)")
            other.execute("PRAGMA wal_checkpoint(PASSIVE)")
            assert path.stat().st_size < size
            file_of(db).look_again_at = 0.0  # a second later
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


def test_logs_that_go_with_a_close_in_this_moment_are_not_lost(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed_meanwhile(name: str) -> os.stat_result:
        if name.endswith("-wal"):
            file._logs = {}
            raise FileNotFoundError(name)
        return lstat(name)

    lstat = os.lstat
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        file = file_of(db)
        logs = file._logs
        monkeypatch.setattr(os, "lstat", closed_meanwhile)
        file.check_logs()
        monkeypatch.undo()
        assert file._logs == {}
        file._logs = logs


@pytest.mark.parametrize("moment", ["before a job", "as it is closed"])
def test_an_error_of_a_look_at_the_log_means_nothing(path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    lstat, failed = os.lstat, list[str]()

    def fail(name: Any, *args: Any, **options: Any) -> os.stat_result:
        if str(name).endswith("-wal"):
            failed.append(name)
            raise OSError(errno.EIO, "Input/output error")
        return lstat(name, *args, **options)

    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        monkeypatch.setattr(os, "lstat", fail)
        if moment == "before a job":
            file_of(db).look_again_at = 0.0
            db.run(INSERT, (1,))
            assert db.health == "ok"
            monkeypatch.undo()
    monkeypatch.undo()
    assert failed
    assert names_in(path.parent) == ["app.db"]


def test_close_leaves_the_log_of_a_file_that_was_moved_as_it_is(path: Path) -> None:
    db = DbWriter(path)
    db.run("CREATE TABLE t (n)")
    log = path.with_name(f"{path.name}-wal")
    kept = log.read_bytes()
    path.rename(path.with_name("moved.db"))
    db.close()
    assert kept
    assert log.read_bytes() == kept

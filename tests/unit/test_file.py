"""The file is moved, deleted or replaced under an open gateway."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import run_child
from onewriter import DbWriter, WriterBrokenError, file

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
    monkeypatch.setattr(file, "LOOK", 0.0)


@pytest.mark.parametrize("away", [move, delete, replace])
@pytest.mark.parametrize("inline", [False, True])
def test_writes_reads_and_blocks_say_so_and_no_file_appears(
    path: Path, away: Callable[[Path], None], inline: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.CRITICAL), DbWriter(path, inline=inline) as db:
        db.run("CREATE TABLE t (n)")
        db.run(INSERT, (1,))
        away(path)
        before = sorted(os.listdir(path.parent))
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
        assert sorted(os.listdir(path.parent)) == before
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
    monkeypatch.setattr(file, "LOOK", 3600.0)
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
    monkeypatch.setattr(file, "LOOK", 3600.0)
    with DbWriter(path, inline=inline) as db:
        db.run("CREATE TABLE t (n)")
        db._loop._drop_session()  # as after an error that leaves it in doubt; the writer is idle
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

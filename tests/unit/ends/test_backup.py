"""backup(): consistent, complete or absent, and never in the way of the writer."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import sqlite3
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import DEADLINE, attaching, full_disk, in_threads, notes_of, parked, pool_of, raising
from onewriter import AsyncDbWriter, DbWriter, ReentrantWriteError, Transaction, WriterBrokenError, WriterClosedError

INSERT = "INSERT INTO t VALUES (?, ?)"
INSERT_ONE = "INSERT INTO t VALUES (?)"


def fill(db: DbWriter, rows: int = 200) -> None:
    db.run("CREATE TABLE t (n INTEGER PRIMARY KEY, text TEXT)")
    db.run_many(INSERT, [(n, "x" * 1000) for n in range(rows)])


def rows_in(path: Path | str) -> int:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        count: int = connection.execute("SELECT count(*) FROM t").fetchone()[0]
        return count


def others(path: Path) -> list[str]:
    """What is in the folder besides the database and its log."""
    return sorted(name for name in os.listdir(path.parent) if not name.startswith(path.name))


@pytest.mark.parametrize("pages", [-1, 3])
@pytest.mark.parametrize("kind", [str, os.fsencode, Path])
def test_a_backup_has_all_rows_and_is_one_file(
    any_db: DbWriter, path: Path, pages: int, kind: Callable[[Any], Any]
) -> None:
    fill(any_db)
    target = path.parent / "copy.db"
    any_db.backup(kind(target), pages=pages)
    assert others(path) == ["copy.db"]
    assert rows_in(target) == 200
    assert others(path) == ["copy.db"]


def test_a_backup_of_a_new_file_can_be_opened(path: Path) -> None:
    with DbWriter(path, journal_mode="DELETE") as db:
        db.backup(path.parent / "copy.db")
    with DbWriter(path.parent / "copy.db") as copy:
        fill(copy)


def test_a_backup_shows_one_moment_however_much_is_written_meanwhile(db: DbWriter, path: Path) -> None:
    fill(db)
    steps = []

    def write(status: int, remaining: int, total: int) -> None:
        steps.append((remaining, total))
        db.run_many(INSERT, [(1000 + len(steps) * 10 + n, "later") for n in range(10)])

    db.backup(path.parent / "copy.db", pages=5, progress=write)
    assert rows_in(path.parent / "copy.db") == 200
    assert len(steps) > 5
    assert len({total for _, total in steps}) == 1
    assert [left for left, _ in steps] == sorted((left for left, _ in steps), reverse=True)  # it never began anew
    assert db.read_value("SELECT count(*) FROM t") == 200 + 10 * len(steps)


def test_a_backup_does_not_wait_for_the_writer_nor_for_a_reader(path: Path) -> None:
    with DbWriter(path, readers=1) as db:
        fill(db)
        with parked(db), db.reader():
            db.backup(path.parent / "copy.db")
        assert rows_in(path.parent / "copy.db") == 200


def test_a_backup_takes_the_place_of_an_older_one(db: DbWriter, path: Path) -> None:
    target = path.parent / "copy.db"
    fill(db)
    db.backup(target)
    db.run(INSERT, (1000, "new"))
    db.backup(target)
    assert rows_in(target) == 201
    link = path.parent / "link.db"
    link.symlink_to(target)
    db.run(INSERT, (1001, "new"))
    db.backup(link)
    assert link.is_symlink()
    assert rows_in(target) == 202
    assert others(path) == ["copy.db", "link.db"]


def test_a_backup_into_an_open_connection(any_db: DbWriter) -> None:
    fill(any_db)
    with contextlib.closing(sqlite3.connect(":memory:")) as memory:
        memory.execute("CREATE TABLE old (n)")
        any_db.backup(memory, pages=10)
        assert memory.execute("SELECT count(*) FROM t").fetchone() == (200,)
        assert memory.execute("SELECT name FROM sqlite_schema").fetchall() == [("t",)]


@pytest.mark.parametrize("old", [False, True])
def test_what_progress_raises_leaves_the_target_as_it_was(db: DbWriter, path: Path, old: bool) -> None:
    fill(db)
    target = path.parent / "copy.db"
    if old:
        db.backup(target)
        db.run(INSERT, (1000, "new"))

    def fail(*_: int) -> None:
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        db.backup(target, pages=1, progress=fail)
    assert others(path) == (["copy.db"] if old else [])
    if old:
        assert rows_in(target) == 200
    with contextlib.closing(sqlite3.connect(":memory:")) as memory:
        memory.execute("CREATE TABLE old (n)")
        with pytest.raises(LookupError):
            db.backup(memory, pages=1, progress=fail)
        assert memory.execute("SELECT name FROM sqlite_schema").fetchall() == [("old",)]
    assert db.checkpoint() == (False, 0, 0)  # no reader stayed behind


def test_a_target_that_cannot_be_meant_is_refused_and_nothing_is_created(db: DbWriter, path: Path) -> None:
    fill(db)
    link = path.parent / "link.db"
    link.symlink_to(path)
    hard = path.parent / "hard.db"
    os.link(path, hard)
    used = path.parent / "used.db"
    used.touch()
    Path(f"{used}-wal").touch()
    with (
        DbWriter(path.parent / "other.db") as other,
        contextlib.closing(sqlite3.connect(path)) as same,
        db.reader() as lent,
    ):
        before = sorted(os.listdir(path.parent))
        for target, word in [
            (path, "open in this process"),
            (link, "open in this process"),
            (hard, "open in this process"),
            (other.path, "open in this process"),
            (same, "open in this process"),
            (used, "is in use"),
            (lent, "lent"),
            (":memory:", "not the path of a file"),
            ("", "not the path of a file"),
            ("file:x.db", "not the path of a file"),
            ("a\0b", "not the path of a file"),
        ]:
            with pytest.raises(ValueError, match=word):
                db.backup(target)  # type: ignore[arg-type]
        for target, word in [
            (path.parent / "missing" / "copy.db", "there is no folder"),
            (path.parent, "it is a folder"),
        ]:
            with pytest.raises(sqlite3.OperationalError, match=word):
                db.backup(target)
        for arguments in [{"pages": 0}, {"pages": -5}, {"pages": 2**31}]:
            with pytest.raises(ValueError, match="pages"):
                db.backup(path.parent / "copy.db", **arguments)  # type: ignore[arg-type]
        for wrong in [{"pages": 1.5}, {"pages": True}, {"pages": None}, {"progress": 1}]:
            with pytest.raises(TypeError, match=r"pages|progress"):
                db.backup(path.parent / "copy.db", **wrong)  # type: ignore[arg-type]
        for nonsense in (None, 1, object()):
            with pytest.raises(TypeError, match="target"):
                db.backup(nonsense)  # type: ignore[arg-type]
        assert sorted(os.listdir(path.parent)) == before
        other.run("CREATE TABLE t (n)")
    assert db.read_value("SELECT count(*) FROM t") == 200


def test_a_full_disk_leaves_no_half_copy(db: DbWriter, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(db)
    with full_disk(50_000) as fill_up:
        fill_up()
        with pytest.raises(sqlite3.Error):
            db.backup(path.parent / "copy.db")
        with monkeypatch.context() as refusing, pytest.raises(sqlite3.Error):
            refusing.setattr(os, "unlink", raising(PermissionError))
            db.backup(path.parent / "copy.db")
    os.unlink(path.parent / others(path)[0])
    assert others(path) == []


def test_backup_and_checkpoint_inside_a_job_or_block_raise_at_once(any_db: DbWriter, path: Path) -> None:
    fill(any_db)
    target = path.parent / "copy.db"

    def job(tx: Transaction) -> None:
        for call in (lambda: any_db.backup(target), any_db.checkpoint):
            with pytest.raises(ReentrantWriteError):
                call()

    any_db.run(job)
    with any_db.transaction() as tx:
        job(tx)
    assert others(path) == []


def test_close_waits_for_a_backup(path: Path) -> None:
    db = DbWriter(path)
    fill(db)
    begun, go_on = threading.Event(), threading.Event()

    def progress(*_: int) -> None:
        begun.set()
        go_on.wait(DEADLINE)

    def close() -> None:
        begun.wait(DEADLINE)
        timer = threading.Timer(0.05, go_on.set)
        timer.start()
        db.close()
        assert go_on.is_set()
        timer.join()

    in_threads(lambda: db.backup(path.parent / "copy.db", pages=50, progress=progress), close)
    assert sorted(os.listdir(path.parent)) == [path.name, "copy.db"]
    assert rows_in(path.parent / "copy.db") == 200
    for call in (lambda: db.backup(path.parent / "copy2.db"), db.checkpoint):
        with pytest.raises(WriterClosedError):
            call()


def test_a_broken_gateway_makes_no_backup(db: DbWriter, path: Path) -> None:
    fill(db)
    path.rename(path.parent / "moved")
    with pytest.raises(WriterBrokenError):
        db.backup(path.parent / "copy.db")
    assert "copy.db" not in os.listdir(path.parent)


def test_all_pages_in_one_step_are_one_call_of_progress(db: DbWriter, path: Path) -> None:
    fill(db, 1000)
    calls: list[tuple[int, ...]] = []
    db.backup(path.parent / "copy.db", progress=lambda *call: calls.append(call))
    assert [(remaining, total > 100) for _, remaining, total in calls] == [(0, True)]
    assert pool_of(db).in_use == 0


def test_the_name_of_a_backup_survives_power_loss(db: DbWriter, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(db)
    synced: list[bool] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    db.backup(path.parent / "copy.db")
    assert synced[-2:] == [False, True]


def test_a_copy_is_in_place_if_only_its_folder_cannot_be_synced(
    db: DbWriter, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(db)
    fsync, opened = os.fsync, os.open

    def fail(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    def refuse(name: str, flags: int, mode: int = 0o777) -> int:  # as in a folder in which one may only write
        if os.path.isdir(name):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(name, flags, mode)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output") as failed:
        db.backup(path.parent / "failed.db")
    assert "the copy is in place" in notes_of(failed.value)
    monkeypatch.setattr(os, "open", refuse)
    db.backup(path.parent / "refused.db")
    for name in ("failed.db", "refused.db"):
        with contextlib.closing(sqlite3.connect(path.parent / name)) as copy:
            assert copy.execute("SELECT count(*) FROM t").fetchone() == (200,)


def test_a_target_may_have_a_row_factory_of_its_own(db: DbWriter, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "copy.db")) as target:
        target.row_factory = lambda cursor, row: {"row": row}
        db.run("CREATE TABLE copied (n)")
        db.backup(target)
        assert target.execute("SELECT count(*) FROM copied").fetchone() == {"row": (0,)}


@pytest.mark.skipif(os.name != "posix", reason="the rights of files")
@pytest.mark.parametrize(
    ("database", "older", "left"),
    [
        (0o600, None, 0o600),
        (0o640, None, 0o640),
        (0o666, None, 0o644),
        (0o644, 0o600, 0o600),
        (0o640, 0o604, 0o600),
        (0o600, 0o644, 0o600),
    ],
)
def test_a_backup_is_readable_by_nobody_who_may_not_read_the_database_and_the_older_backup(
    db: DbWriter, path: Path, database: int, older: int | None, left: int
) -> None:
    fill(db)
    path.chmod(database)
    target = path.parent / "copy.db"
    if older is not None:
        target.touch()
        target.chmod(older)
    seen = []

    def look(status: int, remaining: int, total: int) -> None:
        (unfinished,) = path.parent.glob("*.unfinished")
        seen.append(stat.S_IMODE(unfinished.stat().st_mode))

    before = os.umask(0o022)
    try:
        db.backup(target, progress=look, pages=10)
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == left
    assert set(seen) == {left}
    assert rows_in(target) == 200


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can give a file to any group")
def test_a_backup_is_not_readable_by_another_group(db: DbWriter, path: Path) -> None:
    fill(db)
    os.chown(path, -1, 65534)
    path.chmod(0o640)
    target = path.parent / "copy.db"
    db.backup(target)
    assert (target.stat().st_gid, stat.S_IMODE(target.stat().st_mode)) == (65534, 0o640)
    os.chown(target, -1, 4)  # another one may read the older backup, but not the database
    db.backup(target)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_a_task_can_back_up_into_a_connection_of_its_thread(path: Path) -> None:
    async def main() -> None:
        target = sqlite3.connect(":memory:")
        async with AsyncDbWriter(path) as db:
            await db.run("CREATE TABLE t (n)")
            await db.run("INSERT INTO t VALUES (1)")
            await db.backup(target)
        assert target.execute("SELECT n FROM t").fetchall() == [(1,)]
        target.close()

    asyncio.run(main())


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
def test_a_backup_never_takes_the_place_of_a_file_of_sqlites_own(db: DbWriter, suffix: str) -> None:
    db.run("CREATE TABLE t (n)")
    db.checkpoint()
    with pytest.raises(ValueError, match="SQLite keeps"):
        db.backup(db.path + suffix)
    db.run(INSERT_ONE, (1,))
    with contextlib.closing(sqlite3.connect(db.path)) as other:
        assert other.execute("SELECT n FROM t").fetchall() == [(1,)]


@pytest.mark.parametrize("is_open", [True, False])
def test_a_task_is_told_what_is_wrong_with_its_backup(path: Path, is_open: bool) -> None:
    async def main() -> None:
        async with AsyncDbWriter(path) as db:
            with contextlib.closing(sqlite3.connect(":memory:")) as target, pytest.raises(ValueError, match="pages"):
                await db.backup(target if is_open else path.with_name("backup.db"), pages=0)
            with contextlib.closing(sqlite3.connect(path)) as own, pytest.raises(ValueError, match="is open in this"):
                await db.backup(own if is_open else path)

    asyncio.run(main())


@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
def test_a_write_as_a_backup_goes_on_is_refused_where_its_commit_would_wait_for_that(path: Path, mode: Any) -> None:
    refused = pytest.raises(
        ReentrantWriteError, match="inside a read or backup waits for a COMMIT, which in this journal"
    )

    def write(*_: object) -> None:
        for call in (
            lambda: db.run("INSERT INTO t VALUES (2)"),
            lambda: db.run(lambda tx: tx.execute("INSERT INTO t VALUES (2)")),
            lambda: db.transaction().__enter__().execute("DELETE FROM t WHERE n = 2"),
            lambda: db.flush(),
        ):
            with refused:
                call()

    with DbWriter(path, journal_mode=mode) as db:
        db.run("CREATE TABLE t (n)")
        db.run("INSERT INTO t VALUES (1)")
        if mode == "DELETE":
            db.backup(path.with_name("copy.db"), progress=write)
        else:
            db.backup(path.with_name("copy.db"), progress=lambda *_: db.run("INSERT INTO t VALUES (2)"))
            assert db.read("SELECT n FROM t") == [(1,), (2,)]
        db.run("INSERT INTO t VALUES (3)")


def test_the_target_may_not_be_a_file_that_a_gateway_has_attached(path: Path, other: Path) -> None:
    with DbWriter(path, on_connect=attaching(other)) as db, DbWriter(path.parent / "third.db") as third:
        db.run("CREATE TABLE other.t (n)")
        for gateway in (db, third):
            with pytest.raises(ValueError, match="open in this process"):
                gateway.backup(other)
    with contextlib.closing(sqlite3.connect(other)) as plain:
        assert plain.execute("SELECT n FROM t").fetchall() == []

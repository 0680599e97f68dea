"""An error about SQLite's lock names the process that holds it."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from helpers import DEADLINE, holding_lock, notes_of, policy_of, state_of, until_waiting, waiting_for_lock
from onewriter import DbWriter, WriteTimeoutError
from onewriter.sqlite import lock_holders, mounts
from onewriter.tools.check import check

HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.read()
"""

linux = pytest.mark.skipif(not lock_holders.LOCKS.exists(), reason="only Linux tells who holds a lock")


@contextlib.contextmanager
def held_by_a_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(path), "the-holder"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
@linux
def test_the_error_names_the_process_and_its_command(path: Path, mode: Any) -> None:
    with DbWriter(path, journal_mode=mode, lock_timeout=0.05) as db:
        db.run("CREATE TABLE t (n)")
        with held_by_a_process(path) as process:
            assert lock_holders.lock_holders(str(path)) == [process.pid]
            for call in (
                lambda: db.run("INSERT INTO t VALUES (1)"),
                lambda: db.transaction().__enter__(),
                lambda: db.run_without_transaction("VACUUM"),
            ):
                with pytest.raises(sqlite3.OperationalError) as caught:
                    call()
                assert caught.value.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
                assert f"held by process {process.pid} (" in notes_of(caught.value)
                assert "HOLDER" not in notes_of(caught.value)
                assert "attempts" in notes_of(caught.value)
            policy_of(db).lock_timeout = DEADLINE
            with pytest.raises(WriteTimeoutError, match=f"held by process {process.pid}"):
                db.run("INSERT INTO t VALUES (1)", timeout=0.05)
        assert process.pid not in (lock_holders.lock_holders(str(path)) or [])  # the writer itself may be at it
        db.run("INSERT INTO t VALUES (2)")
        assert db.read("SELECT n FROM t") == [(2,)]


@linux
def test_a_connection_of_this_process_is_told_apart(path: Path) -> None:
    with DbWriter(path, lock_timeout=0.02) as db:
        db.run("CREATE TABLE t (n)")
        with holding_lock(path), pytest.raises(sqlite3.OperationalError) as caught:
            db.run("INSERT INTO t VALUES (1)")
    assert f"this process ({os.getpid()})" in notes_of(caught.value)


def test_where_it_cannot_be_told_the_error_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_holders, "LOCKS", path.parent / "missing")
    with DbWriter(path, lock_timeout=0.02) as db:
        db.run("CREATE TABLE t (n)")
        with holding_lock(path), pytest.raises(sqlite3.OperationalError) as caught:
            db.run("INSERT INTO t VALUES (1)")
    assert "cannot be determined here" in notes_of(caught.value)


@pytest.mark.parametrize(
    ("found", "text"), [(None, "the holder of SQLite's lock cannot be"), ([], "no holder of SQLite's lock was found")]
)
def test_that_nobody_was_found_is_not_said_where_none_can_be(
    monkeypatch: pytest.MonkeyPatch, found: list[int] | None, text: str
) -> None:
    monkeypatch.setattr(lock_holders, "lock_holders", lambda path: found)
    assert lock_holders.describe_lock("app.db").startswith(text)


@linux
def test_opening_names_the_holder_too(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = WAL")
        other.execute("CREATE TABLE t (n)")
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(sqlite3.OperationalError, match="cannot open") as caught:
            DbWriter(path, lock_timeout=0.05)
        assert "onewriter: waited" in notes_of(caught.value)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no SIGSTOP here")
@linux
def test_a_holder_that_was_stopped_is_named_and_one_that_was_killed_holds_nothing(path: Path) -> None:
    with DbWriter(path, lock_timeout=0.05) as db:
        db.run("CREATE TABLE t (n)")
        with held_by_a_process(path) as process:
            process.send_signal(signal.SIGSTOP)
            with pytest.raises(sqlite3.OperationalError) as caught:
                db.run("INSERT INTO t VALUES (1)")
            assert f"process {process.pid}" in notes_of(caught.value)
            process.kill()
            process.wait(DEADLINE)
            db.run("INSERT INTO t VALUES (2)")
        assert db.read("SELECT n FROM t") == [(2,)]


def test_lines_of_the_list_are_read_right(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.touch()
    shm = Path(f"{path}-shm")
    shm.touch()
    names = []
    for file in (shm.stat(), path.stat()):
        names.append(f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}")
    listing = path.parent / "locks"
    listing.write_text(
        f"1: POSIX  ADVISORY  WRITE 11 {names[0]} 120 120\n"
        f"2: POSIX  ADVISORY  READ  12 {names[0]} 123 123\n"
        f"3: POSIX  ADVISORY  WRITE 13 {names[0]} 124 124\n"
        f"3: -> POSIX  ADVISORY  WRITE 14 {names[0]} 120 120\n"
        f"4: POSIX  ADVISORY  READ  15 {names[1]} 1073741826 1073742335\n"
        f"5: POSIX  ADVISORY  WRITE 16 {names[1]} 1073741825 1073741825\n"
        f"6: POSIX  ADVISORY  WRITE 17 {names[1]} 0 EOF\n"
        f"7: FLOCK  ADVISORY  WRITE 18 00:00:1 0 EOF\n"
        "nonsense\n"
    )
    monkeypatch.setattr(lock_holders, "LOCKS", listing)
    assert lock_holders.lock_holders(str(path)) == [11, 16, 17]


def test_the_process_itself_is_named_as_such() -> None:
    assert lock_holders.describe_process(os.getpid()) == f"this process ({os.getpid()}), through another connection"
    assert lock_holders.describe_process(2**30) == f"process {2**30}"  # it has ended
    assert lock_holders.describe_process(os.getppid()).startswith(f"process {os.getppid()}")


def test_who_reads_the_log_is_named_once(path: Path) -> None:
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        assert lock_holders.describe_wal_readers([str(path)], []) == "a reader that cannot be determined here"
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN")
            other.execute("SELECT * FROM t").fetchall()
            mine = lock_holders.describe_process(os.getpid())
            assert lock_holders.describe_wal_readers([str(path)], []) == mine
            assert lock_holders.describe_wal_readers([str(path)], ["'a label'"]) == "'a label'"


READS = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
cursor = connection.execute("SELECT n FROM t")
cursor.fetchone()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("mode", ["DELETE", "TRUNCATE", "PERSIST"])
@linux
def test_a_commit_that_readers_hold_up_names_them_and_never_the_writer(
    path: Path, mode: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with DbWriter(path, journal_mode=mode, lock_timeout=0.2) as db:
        db.run("CREATE TABLE t (n)")
        db.run_many("INSERT INTO t VALUES (?)", [(n,) for n in range(3)])
        monkeypatch.setattr(sys.modules[__name__], "HOLDER", READS)
        with held_by_a_process(path) as process:
            for ticket in (db.enqueue("INSERT INTO t VALUES (1)"), db.enqueue(lambda tx: tx.execute("DELETE FROM t"))):
                with pytest.raises(sqlite3.OperationalError) as caught:
                    ticket.result(DEADLINE)
                assert f"COMMIT waits for readers: process {process.pid} (" in notes_of(caught.value)
                assert f"process {os.getpid()} " not in notes_of(caught.value)
            assert f"COMMIT waits for readers: process {process.pid} (" in caplog.text
            assert "this process" not in caplog.text
            assert [reader.pid for reader in check(str(path)).wal_readers or []] == [process.pid]
            policy_of(db).lock_timeout = DEADLINE
            with pytest.raises(WriteTimeoutError, match=f"waits for readers: process {process.pid} "):
                db.run("INSERT INTO t VALUES (1)", timeout=0.2)
        policy_of(db).lock_timeout = 0.2
        with db.reader(label="monthly report") as connection:
            connection.execute("SELECT n FROM t").fetchone()
            with pytest.raises(sqlite3.OperationalError) as caught, ThreadPoolExecutor(1) as pool:
                pool.submit(db.run, "INSERT INTO t VALUES (1)").result(DEADLINE)
        assert notes_of(caught.value).endswith("COMMIT waits for readers: 'monthly report'")
        with contextlib.closing(sqlite3.connect(path)) as other:
            cursor = other.execute("SELECT n FROM t")
            cursor.fetchone()
            with pytest.raises(sqlite3.OperationalError) as caught:
                db.run("INSERT INTO t VALUES (1)")
            cursor.close()
        assert notes_of(caught.value).endswith(lock_holders.UNKNOWN_READER)


def test_a_file_system_whose_parts_have_devices_of_their_own_is_known_by_its_mount(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On btrfs stat tells the device of the subvolume, and the list of locks that of the file system."""
    path.touch()
    listed, mounted = path.parent / "locks", path.parent / "mountinfo"
    inode = path.stat().st_ino
    lines = [f"{n}: POSIX  ADVISORY  WRITE {n} {{}}:{inode} 1073741825 1073741825\n" for n in (11, 12, 13)]
    devices = ("00:2a", "00:30", "08:2a")
    listed.write_text("".join(line.format(device) for line, device in zip(lines, devices, strict=True)))
    mounted.write_text(f"22 1 8:42 / / rw - ext4 /dev/a rw\n23 22 0:42 / {path.parent} rw - btrfs /dev/b rw\n")
    monkeypatch.setattr(lock_holders, "LOCKS", listed)
    monkeypatch.setattr(mounts, "MOUNTS", mounted)
    for device, found in ((os.makedev(0, 0x31), [11]), (os.makedev(0, 0x30), [11, 12]), (os.makedev(8, 0x2A), [13])):
        fake = FakeStat(device, inode)
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", lambda name, fake=fake: fake)
            assert lock_holders.lock_holders(str(path)) == found


class FakeStat(NamedTuple):
    st_dev: int
    st_ino: int


def test_who_holds_the_lock_is_looked_up_once_for_many_who_ask(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def describe(path: str, attached: list[str]) -> str:
        asked.append(path)
        return "somebody"

    monkeypatch.setattr("onewriter.write.lock.describe_lock", describe)
    monkeypatch.setattr("onewriter.base.state.FRESH", DEADLINE)
    with DbWriter(path) as db:
        state_of(db)._lock_described = (-DEADLINE, "")
        with waiting_for_lock(db, path) as go:
            ticket = db.enqueue("SELECT 1")
            go.set()
            until_waiting(db)
            asked.clear()
            assert all("somebody" in state_of(db).describe() for _ in range(100))
            assert not asked
        assert ticket.exception(DEADLINE) is None


def test_a_holder_that_the_first_look_at_the_list_misses_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [[], [os.getppid()]]
    monkeypatch.setattr(lock_holders, "lock_holders", lambda path: looks.pop(0))
    assert f"process {os.getppid()}" in lock_holders.describe_lock(str(path))
    assert looks == []


def test_who_holds_the_lock_of_an_attached_file_is_named_too(path: Path) -> None:
    other = path.parent / "other.db"
    with contextlib.closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE o (n)")
    attach = f"ATTACH '{other}' AS other"
    with DbWriter(path, on_connect=lambda connection, _: connection.execute(attach), lock_timeout=0.05) as db:
        with holding_lock(other), pytest.raises(sqlite3.OperationalError) as caught:
            db.run("CREATE TABLE t (n)")
        assert f"SQLite's lock of the attached {other} is held by this process" in notes_of(caught.value)

"""The write-ahead log stays small, nobody's COMMIT pays for it, and checkpoint() empties it at once."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from helpers import (
    DEADLINE,
    checkpointer_of,
    drop_session,
    file_of,
    in_threads,
    log_size,
    make,
    parked,
    pool_of,
    session_of,
    until_waiting,
    writer_of,
)
from onewriter import CommitUnknownError, DbWriter, ReentrantWriteError, Transaction, WriteTimeoutError
from onewriter.events import CheckpointEnded
from onewriter.read.claim import new_claim
from onewriter.write import checkpoint
from onewriter.write import writer as loop
from onewriter.write.checkpoint import Checkpointer
from onewriter.write.session import WriteSession

UPDATE = "UPDATE t SET text = ? WHERE id = ?"
INSERT = "INSERT INTO t VALUES (?, ?)"
LIMIT = 2**20


def fill(db: DbWriter) -> None:
    db.run("CREATE TABLE t (id INTEGER PRIMARY KEY, text TEXT)")
    db.run_many("INSERT INTO t VALUES (?, ?)", [(n, "x" * 2000) for n in range(100)])


def update(db: DbWriter, count: int) -> int:
    largest = 0
    for n in range(count):
        db.run(UPDATE, (f"{n:02000}", n % 100))
        largest = max(largest, log_size(Path(db.path)))
    return largest


def fill_table(db: DbWriter, rows: int = 200) -> None:
    db.run("CREATE TABLE t (n INTEGER PRIMARY KEY, text TEXT)")
    db.run_many(INSERT, [(n, "x" * 1000) for n in range(rows)])


@pytest.mark.parametrize("inline", [False, True])
def test_the_log_stays_near_its_limit_while_readers_come_and_go(path: Path, inline: bool) -> None:
    with DbWriter(path, synchronous="NORMAL", wal_limit=LIMIT, inline=inline) as db:
        fill(db)
        stop = threading.Event()

        def read() -> None:
            while not stop.is_set():
                assert len(db.read("SELECT text FROM t")) == 100

        def write() -> int:
            try:
                return update(db, 1500)
            finally:
                stop.set()

        sizes = in_threads(write, read, read, read)
        assert sizes[0] < 4 * LIMIT  # type: ignore[operator]
    assert os.listdir(path.parent) == [path.name]


def test_a_log_that_a_long_reader_let_grow_shrinks_when_the_reader_has_gone(path: Path) -> None:
    with DbWriter(path, synchronous="NORMAL", wal_limit=LIMIT) as db:
        fill(db)
        with db.reader():
            assert update(db, 2000) > LIMIT
        update(db, 600)
        assert log_size(path) <= LIMIT


def test_an_idle_writer_empties_the_log(path: Path) -> None:
    with DbWriter(path) as db:
        fill(db)
        emptied = threading.Event()
        empty = checkpointer_of(db).empty

        def tell(*arguments: object) -> None:
            empty(*arguments)  # type: ignore[arg-type]
            emptied.set()

        checkpointer_of(db).empty = tell  # type: ignore[method-assign, assignment]
        assert emptied.wait(DEADLINE)
        assert log_size(path) == 0
        assert writer_of(db).idle_after == -1


def test_without_checkpoints_of_ours_the_log_is_somebody_elses(path: Path) -> None:
    with DbWriter(path, auto_checkpoint=False, synchronous="NORMAL", wal_limit=LIMIT) as db:
        fill(db)
        assert update(db, 1500) > 2 * LIMIT
        assert db.run_without_transaction("PRAGMA wal_autocheckpoint").rows == [(0,)]
        db.run_without_transaction(lambda connection: connection.execute("INSERT INTO t DEFAULT VALUES").close())
        size = log_size(path)
        update(db, 1)
        db.flush()
        assert writer_of(db).idle_after == -1
        assert log_size(path) >= size > 0


def test_a_reader_that_is_held_back_comes_in_when_the_log_has_begun_anew(path: Path) -> None:
    with DbWriter(path) as db:
        fill(db)
        pool = pool_of(db)
        with pool.pause(0.01):
            (rows,) = in_threads(lambda: db.read_value("SELECT count(*) FROM t"))
        assert rows == 100
        with db.reader(), pool.pause(0.01):  # one that stays is not waited for
            pass


@pytest.mark.parametrize("inline", [False, True])
def test_a_callback_of_a_checkpoint_may_read_although_readers_are_held_back(path: Path, inline: bool) -> None:
    found: list[Any] = []

    def note(event: object) -> None:
        if isinstance(event, CheckpointEnded) and not db.closed:
            found.append(db.read_value("SELECT count(*) FROM t", timeout=DEADLINE))
            with db.reader(timeout=DEADLINE) as reader:
                found.append(reader.execute("SELECT count(*) FROM t").fetchone()[0])
            with pytest.raises(ReentrantWriteError, match="inside a job, block or callback"):
                db.run("DELETE FROM t")

    with DbWriter(path, inline=inline, on_event=note, slow_after=600.0) as db:
        fill(db)
        found.clear()
        db.checkpoint()
    assert found == [100, 100]


@pytest.mark.parametrize(
    ("mode", "waits"), [("PASSIVE", False), ("FULL", False), ("RESTART", True), ("TRUNCATE", True)]
)
def test_readers_are_held_back_only_for_the_modes_that_need_a_log_without_readers(
    path: Path, mode: Any, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DbWriter(path) as db:
        seconds: list[float] = []
        pause = pool_of(db).pause

        def record(most: float) -> Any:
            seconds.append(most)
            return pause(most)

        monkeypatch.setattr(pool_of(db), "pause", record)
        assert not db.checkpoint(mode).busy
    assert [second > 0 for second in seconds[:1]] == [waits]


def test_the_log_is_emptied_later_unless_it_was_just_now(path: Path) -> None:
    with DbWriter(path) as db:
        checkpointer = checkpointer_of(db)
        db.run("CREATE TABLE t (n)")
        db.checkpoint("PASSIVE")
        assert checkpointer.has_work
        with db.reader():
            db.run("INSERT INTO t VALUES (1)")
            assert db.checkpoint("TRUNCATE").busy
        assert checkpointer.has_work
        assert not db.checkpoint("TRUNCATE").busy
        assert not checkpointer.has_work


def test_a_batch_that_has_committed_nothing_leaves_nothing_to_empty(db: DbWriter) -> None:
    db.checkpoint()
    with pytest.raises(sqlite3.OperationalError):
        db.run("INSERT INTO nowhere VALUES (1)")
    db.flush()
    assert not checkpointer_of(db).has_work


def test_a_few_large_values_do_not_make_the_log_large(path: Path) -> None:
    with DbWriter(path, wal_limit=2**20, synchronous="OFF") as db:
        db.run("CREATE TABLE t (data)")
        sizes = []
        for _ in range(40):
            db.run("INSERT INTO t VALUES (zeroblob(1000000))")
            db.flush()
            sizes.append(db.stats().wal_bytes)
    assert max(sizes) < 8 * 2**20


@pytest.mark.parametrize("limit", [0, LIMIT])
def test_a_small_limit_makes_checkpoints_come_sooner(path: Path, limit: int) -> None:
    with DbWriter(path, wal_limit=limit, synchronous="OFF") as db:
        db.run("CREATE TABLE t (b BLOB)")
        largest = 0
        for _ in range(100):
            db.run("INSERT INTO t VALUES (zeroblob(20000))")
            largest = max(largest, log_size(path))
        assert largest < max(limit, 2**19) * 1.1


def test_an_idle_writer_empties_the_log_once_after_a_while(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DbWriter(path, inline=True) as db:
        db.run("CREATE TABLE t (n)")
        monkeypatch.setattr(loop, "IDLE", 3600.0)
        writer_of(db).idle()
        assert db.stats().last_checkpoint is None
        monkeypatch.setattr(loop, "IDLE", 0.0)
        writer_of(db).idle()
        first = writer_of(db).last_checkpoint
        assert first is not None
        writer_of(db).idle()  # there is nothing to do
        assert writer_of(db).last_checkpoint is first


def grown_old(db: DbWriter) -> None:
    """Have the readers that are out be so for long."""
    for claim in pool_of(db)._lent():
        claim.since -= 0.9


def test_an_idle_reader_makes_not_every_commit_try_to_empty_the_log(path: Path) -> None:
    tries: list[CheckpointEnded] = []

    def note(event: object) -> None:
        if isinstance(event, CheckpointEnded) and event.mode == "TRUNCATE":
            tries.append(event)

    with DbWriter(path, synchronous="OFF", wal_limit=LIMIT, slow_after=600.0, on_event=note) as db:
        fill(db)
        with db.reader():
            grown_old(db)
            for k in range(200):
                db.run_many(UPDATE, [(f"{k + n:02000}", n % 100) for n in range(300)])
            assert log_size(path) > 10 * LIMIT
            assert 2 <= len(tries) <= 10  # each time that the log has doubled
            assert tries[-1].busy
        for k in range(10):
            db.run_many(UPDATE, [(f"{k + n:02000}", n % 100) for n in range(300)])
        assert not tries[-1].busy  # as soon as the reader is back
        assert log_size(path) <= LIMIT


def test_reads_are_not_held_back_for_a_reader_that_is_out_for_long(path: Path) -> None:
    with DbWriter(path) as db:
        fill(db)
        with db.reader():
            grown_old(db)
            with pool_of(db).pause(0.5):
                assert not pool_of(db)._paused_until


def test_holding_reads_back_in_vain_makes_the_next_time_come_later_and_later(path: Path) -> None:
    with DbWriter(path, wal_limit=LIMIT) as db:
        checkpointer = checkpointer_of(db)
        checkpointer._kept_size = 2 * LIMIT
        checkpointer._kept_by = [new_claim("one for long")]
        checkpointer._count_hold_back(0.0)  # nobody was held back
        assert checkpointer._again_at == 0.0
        pauses = []
        for _ in range(10):
            checkpointer._count_hold_back(checkpoint.HOLD_BACK)
            pauses.append(checkpointer._pause)
            assert checkpointer._again_at > monotonic()
        assert pauses == sorted(pauses)
        assert pauses[0] == checkpoint.SOON
        assert pauses[-1] == checkpoint.RARELY
        checkpointer._kept_size = 0  # it was emptied
        checkpointer._count_hold_back(0.0)
        assert checkpointer._pause == 0.0


def test_health_looks_at_the_log_when_it_is_asked(path: Path) -> None:
    with DbWriter(path, synchronous="OFF", wal_limit=LIMIT, slow_after=600.0) as db:
        fill(db)
        with db.reader(label="the long one"):
            grown_old(db)
            db.run(UPDATE, ("y" * 3 * LIMIT, 1))
            assert db.health.startswith("degraded: the WAL has grown to 3,")
            assert "the long one" in db.health
        assert db.health == "ok"


def test_a_log_far_over_its_limit_that_nobody_reads_is_no_trouble(path: Path) -> None:
    with DbWriter(path, synchronous="OFF", wal_limit=LIMIT, slow_after=600.0) as db:
        fill(db)
        db.run(UPDATE, ("y" * 3 * LIMIT, 1))
        assert db.health == "ok"


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
@pytest.mark.parametrize("inline", [False, True])
def test_the_log_of_an_attached_file_counts(path: Path, tmp_path: Path, mode: Any, inline: bool) -> None:
    other = tmp_path / "other.db"
    with DbWriter(other) as db:
        db.run("CREATE TABLE other (text)")

    def attach(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.execute("ATTACH ? AS [the other]", (str(other),))

    with DbWriter(path, journal_mode=mode, inline=inline, wal_limit=LIMIT, on_connect=attach) as db:
        db.run("CREATE TABLE t (n)")
        largest = 0
        for _ in range(30):
            db.run("INSERT INTO other VALUES (?)", ("x" * 500_000,))
            largest = max(largest, log_size(other))
        assert largest < 8 * LIMIT
        db.flush()  # behind a checkpoint, which comes after the waiters were told
        assert db.stats().wal_bytes == log_size(other) + (log_size(path) if mode == "WAL" else 0)
        found = db.checkpoint()
        assert (found.busy, found.log) == (False, found.checkpointed)
        assert db.stats().wal_bytes == 0


def test_the_log_of_an_attached_file_counts_from_when_it_has_one(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.db"

    def attach(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.execute("ATTACH ? AS other", (str(other),))

    with DbWriter(path, synchronous="OFF", wal_limit=LIMIT, on_connect=attach) as db:
        db.run("CREATE TABLE other.t (b BLOB)")
        assert db.run_without_transaction("PRAGMA other.journal_mode = WAL").rows == [("wal",)]
        largest = 0
        for _ in range(100):
            db.run("INSERT INTO other.t VALUES (zeroblob(50000))")
            largest = max(largest, log_size(other))
        assert 0 < largest < 3 * LIMIT


def test_a_reader_that_keeps_the_log_of_an_attached_file_is_named(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "other.db"
    with DbWriter(other) as db:
        db.run("CREATE TABLE other (text)")

    def attach(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.execute("ATTACH ? AS other", (str(other),))

    with DbWriter(path, wal_limit=LIMIT, slow_after=0.0, on_connect=attach) as db:
        with db.reader(label="monthly report"):
            for _ in range(12):
                in_threads(lambda: db.run("INSERT INTO other VALUES (?)", ("x" * 500_000,)))
            assert "monthly report" in db.health
            assert "the WAL has grown to" in db.health
        assert "the log cannot be reset" in caplog.text
        db.checkpoint()
        db.run("INSERT INTO other VALUES ('')")


def test_a_checkpoint_empties_the_log_and_says_so(any_db: DbWriter, path: Path) -> None:
    fill_table(any_db)
    assert os.path.getsize(f"{path}-wal") > 0
    full = any_db.checkpoint("FULL")
    assert (full.busy, full.log) == (False, full.checkpointed)
    assert full.log > 0
    assert any_db.checkpoint() == (False, 0, 0)
    assert os.path.getsize(f"{path}-wal") == 0


@pytest.mark.parametrize("mode", ["PASSIVE", "FULL", "RESTART", "TRUNCATE"])
def test_a_checkpoint_that_a_reader_stops_says_so(db: DbWriter, mode: Any) -> None:
    fill_table(db)
    with db.reader():
        db.run(INSERT, (1000, "new"))
        found = db.checkpoint(mode)
        assert found.busy == (mode != "PASSIVE")
        assert found.log > found.checkpointed
    assert db.checkpoint(mode)[0] is False


def test_checkpoints_are_refused_or_empty_where_there_is_no_log(path: Path) -> None:
    with DbWriter(path, journal_mode="DELETE") as db:
        fill_table(db)
        assert db.checkpoint() == (False, -1, -1)
        for mode in ("full", "", None, 1):
            with pytest.raises(ValueError, match="mode"):
                db.checkpoint(mode)  # type: ignore[arg-type]


def test_a_checkpoint_waits_its_turn_and_no_longer_than_its_timeout(db: DbWriter) -> None:
    fill_table(db)
    with parked(db), pytest.raises(WriteTimeoutError) as caught:
        db.checkpoint(timeout=0)
    assert not caught.value.started
    assert db.checkpoint() == (False, 0, 0)


def test_a_checkpoint_runs_although_none_of_the_gateways_own_do(path: Path) -> None:
    with DbWriter(path, auto_checkpoint=False) as db:
        fill_table(db)
        assert db.checkpoint("TRUNCATE") == (False, 0, 0)


def test_a_checkpoint_waits_a_moment_for_those_who_read(db: DbWriter) -> None:
    fill_table(db)
    inside = threading.Event()

    def read() -> None:
        with db.reader():
            inside.set()
            while not pool_of(db)._paused_until:
                for claim in pool_of(db)._lent():
                    claim.since = monotonic()  # as if it had just come

    def checkpoint() -> object:
        inside.wait(DEADLINE)
        return db.checkpoint()

    assert in_threads(checkpoint, read)[0] == (False, 0, 0)
    assert not checkpointer_of(db).has_work


def test_checkpoints_that_fail_are_told_once_until_one_works(
    db: DbWriter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Checkpointer, session: object) -> None:
        raise sqlite3.OperationalError("disk full")

    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            checkpointer_of(db)._often = 0  # one after each commit
            with monkeypatch.context() as failing:
                failing.setattr(Checkpointer, "_checkpoint", fail)
                for _ in range(5):
                    db.run("CREATE TEMP TABLE IF NOT EXISTS x (n)")
                db.flush()
            db.run("CREATE TEMP TABLE IF NOT EXISTS x (n)")
            db.flush()
    assert sum("a checkpoint failed" in record.message for record in caplog.records) == 2


def test_an_error_while_the_writer_opens_a_connection_for_a_checkpoint_is_the_callers(path: Path) -> None:
    failing: list[BaseException] = []

    def hook(connection: sqlite3.Connection, readonly: bool) -> None:
        if failing:
            raise failing.pop()

    with DbWriter(path, on_connect=hook) as db:
        drop_session(db)
        failing.append(LookupError())
        with pytest.raises(LookupError):
            db.checkpoint()
        db.run("CREATE TABLE t (n)")


def test_a_file_that_is_smaller_is_not_judged_while_somebody_else_has_it_locked(path: Path) -> None:
    make(path, "DELETE")
    plain = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    with DbWriter(path, journal_mode="DELETE") as db, contextlib.closing(plain) as other:
        db.run("INSERT INTO t VALUES (zeroblob(100000))")
        db.flush()
        other.execute("DELETE FROM t")
        other.execute("VACUUM")
        other.execute("BEGIN EXCLUSIVE")
        file_of(db).look_again_at = 0.0  # the next look is due
        ticket = db.enqueue("INSERT INTO t VALUES (1)")
        until_waiting(db)
        other.execute("COMMIT")
        assert ticket.result(DEADLINE).rowcount == 1


@pytest.mark.parametrize("auto", [False, True])
def test_close_empties_the_log_beside_others_if_checkpoints_are_its_own(path: Path, auto: bool) -> None:
    with contextlib.closing(sqlite3.connect(path)) as other:
        with DbWriter(path, auto_checkpoint=auto) as db:
            db.run("CREATE TABLE t (n)")
            assert other.execute("SELECT n FROM t").fetchall() == []  # or else the last to close empties it
        assert (log_size(path) == 0) is auto


def test_a_lock_that_somebody_else_takes_right_after_a_commit_costs_the_writer_nothing(path: Path) -> None:
    make(path, "DELETE")
    plain = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    with DbWriter(path, journal_mode="DELETE") as db, contextlib.closing(plain) as other:
        with parked(db):
            ticket = db.enqueue("INSERT INTO t VALUES (1)")
            ticket.add_done_callback(lambda _: other.execute("BEGIN EXCLUSIVE"))
        assert ticket.result(DEADLINE).rowcount == 1
        later = db.enqueue("INSERT INTO t VALUES (2)")
        until_waiting(db)
        other.execute("COMMIT")
        assert later.result(DEADLINE).rowcount == 1


@pytest.fixture
def full(path: Path) -> Iterator[DbWriter]:
    """A gateway whose file cannot become larger, as on a full disk, and whose log holds something."""

    def limit(connection: sqlite3.Connection, readonly: bool) -> None:
        if not readonly:
            connection.execute("CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY, text TEXT)")
            connection.execute("PRAGMA max_page_count = 40")

    with DbWriter(path, on_connect=limit) as db:
        db.run(INSERT, (1, "x" * 1000))
        assert log_size(path) > 0
        yield db


def meet_a_full_disk(db: DbWriter) -> None:
    with pytest.raises(sqlite3.OperationalError, match="full"):
        db.run_many(INSERT, [(None, "x" * 1000) for _ in range(500)])
    db.flush(DEADLINE)


def meet_it_in_a_block(db: DbWriter) -> None:
    with pytest.raises(sqlite3.OperationalError, match="full"), db.transaction() as tx:
        tx.executemany(INSERT, [(None, "x" * 1000) for _ in range(500)])
    db.flush(DEADLINE)


def meet_it_wrapped(db: DbWriter) -> None:
    def fail(tx: Transaction) -> None:
        try:
            tx.executemany(INSERT, [(None, "x" * 1000) for _ in range(500)])
        except sqlite3.OperationalError as error:
            raise LookupError from error

    with pytest.raises(LookupError):
        db.run(fail)
    db.flush(DEADLINE)


def meet_it_at_commit(db: DbWriter) -> None:
    def full() -> None:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    control: Any = session_of(db).control
    control["COMMIT"] = full
    with pytest.raises(sqlite3.OperationalError, match="full"):
        db.run(INSERT, (None, ""))
    del control["COMMIT"]
    db.flush(DEADLINE)


def meet_it_in_part(db: DbWriter) -> None:
    """At COMMIT, which may have committed one of two databases."""
    session = session_of(db)
    control: Any = session.control

    def full() -> None:
        session.internal("ROLLBACK")
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    control["COMMIT"] = full
    with pytest.raises(CommitUnknownError, match="full"):
        db.run_script("INSERT INTO t VALUES (NULL, ''); CREATE TEMP TABLE other (n)")
    del control["COMMIT"]
    db.flush(DEADLINE)


@pytest.mark.parametrize(
    "meet", [meet_a_full_disk, meet_it_in_a_block, meet_it_wrapped, meet_it_at_commit, meet_it_in_part]
)
def test_a_full_disk_has_the_log_emptied_which_may_have_filled_it(
    full: DbWriter, path: Path, meet: Callable[[DbWriter], None]
) -> None:
    for n in (2, 3):
        meet(full)
        assert log_size(path) == 0
        full.run(INSERT, (n, ""))


def test_on_a_full_disk_a_log_that_cannot_be_emptied_is_left_alone_for_a_while(
    full: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "RARELY", 1000.0)
    attempts: list[WriteSession] = []
    empty = checkpointer_of(full).empty

    def attempt(session: WriteSession) -> None:
        attempts.append(session)
        empty(session)

    monkeypatch.setattr(checkpointer_of(full), "empty", attempt)
    with full.reader() as connection:
        connection.execute("SELECT * FROM t").fetchone()
        for _ in range(3):
            meet_a_full_disk(full)
    assert len(attempts) == 1

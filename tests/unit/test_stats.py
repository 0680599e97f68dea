"""stats(): one snapshot, whose sums are those of what was done; health; and what the log says of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import math
import os
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from helpers import (
    DEADLINE,
    eventually,
    file_of,
    holding_lock,
    in_threads,
    inserting,
    parked,
    released_when_met,
    state_of,
)
from onewriter import AsyncDbWriter, DbWriter, QueueFullError, Ticket, WriteTimeoutError
from onewriter.base.tally import Histogram
from onewriter.events import JobSubmitted

INSERT = "INSERT INTO t VALUES (?)"
TABLE = "CREATE TABLE t (n INTEGER PRIMARY KEY)"


def warnings_of(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if text in record.getMessage()]


def test_a_new_gateway_has_done_nothing(any_db: DbWriter) -> None:
    stats = any_db.stats()
    assert (stats.committed, stats.failed, stats.cancelled, stats.commits, stats.timed_out) == (0, 0, 0, 0, 0)
    assert (stats.queue_depth, stats.oldest_age, stats.running, stats.waiting_for_lock) == (0, 0.0, None, None)
    assert (stats.run.count, stats.run.sum, stats.run.max, stats.run.percentile(99)) == (0, 0.0, 0.0, 0.0)
    assert (stats.jobs_per_commit, stats.last_checkpoint, stats.last_backup_ago) == (0.0, None, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.committed = 1  # type: ignore[misc]


@pytest.mark.parametrize("inline", [False, True])
def test_the_sums_are_those_of_what_was_done(path: Path, inline: bool) -> None:
    tickets: list[Ticket[Any]] = []
    failures = 0
    with DbWriter(path, inline=inline, on_error=lambda ticket: None) as db:
        db.run(TABLE)

        def produce(start: int) -> int:
            failed = 0
            for n in range(start, start + 200):
                tickets.append(db.enqueue(INSERT, (n,)))
                tickets.append(db.enqueue(INSERT, (start,)))  # twice: fails but for the first
                tickets.append(db.enqueue(inserting(-1 - n)))
                if n % 20 == 0:
                    with db.transaction() as tx:
                        tx.execute(INSERT, (10_000 + n,))
                    with contextlib.suppress(sqlite3.IntegrityError):
                        db.run(INSERT, (start,))
                    failed += 1
            return failed

        failures = sum(in_threads(*[lambda start=n: produce(start) for n in (0, 1000, 2000, 3000)]))  # type: ignore
        db.flush()
        stats = db.stats()
        rows = db.read_value("SELECT count(*) FROM t")
    good = [ticket for ticket in tickets if ticket.exception() is None]
    blocks = 4 * 10
    assert stats.committed == 1 + len(good) + blocks == 1 + rows
    assert stats.failed == len(tickets) - len(good) + failures
    assert stats.queue_wait.count == stats.run.count == stats.committed + stats.failed
    assert stats.commit.count == stats.commits
    assert stats.jobs_per_commit == stats.committed / stats.commits
    assert stats.lock_attempts >= 2 * stats.commits
    timings = [ticket.timings for ticket in tickets]
    assert all(timings)
    for latency, values in (
        (stats.run, [timing.run for timing in timings if timing]),
        (stats.queue_wait, [timing.queued for timing in timings if timing]),
    ):
        assert latency.sum >= sum(values) * 0.999
        assert latency.max >= max(values)
        for bound, count in latency.buckets:
            assert count >= sum(value <= bound for value in values)
    assert (stats.cancelled, stats.timed_out, stats.retried, stats.run_twice) == (0, 0, 0, 0)


def test_withdrawn_and_timed_out_calls_are_counted(db: DbWriter) -> None:
    db.run(TABLE)
    with parked(db):
        with pytest.raises(WriteTimeoutError):
            db.run(INSERT, (1,), timeout=0)
        with pytest.raises(WriteTimeoutError), db.transaction(timeout=0):
            pass
        assert db.enqueue(INSERT, (2,)).cancel()
    stats = db.stats()
    assert (stats.timed_out, stats.cancelled, stats.failed) == (2, 3, 0)
    assert stats.run.count == stats.committed == 2


def test_a_call_that_gives_up_on_a_job_that_goes_on_is_counted(db: DbWriter) -> None:
    release = threading.Event()
    with pytest.raises(WriteTimeoutError) as caught:
        db.run(lambda tx: release.wait(DEADLINE), timeout=0.05)
    release.set()
    assert caught.value.started
    caught.value.ticket.result(DEADLINE)
    stats = db.stats()
    assert (stats.timed_out, stats.cancelled, stats.committed) == (1, 0, 1)


def test_jobs_that_ran_twice_and_jobs_that_were_retried_are_counted(db: DbWriter, path: Path) -> None:
    db.run(TABLE)
    with parked(db):
        for n in range(3):
            db.enqueue(inserting(n))
        db.enqueue(lambda tx: tx.execute("INSERT OR ROLLBACK INTO t VALUES (0)"), label="undoes all")
    db.flush()
    assert (db.stats().run_twice, db.stats().failed) == (3, 1)
    with parked(db):  # statements that run again with savepoints, since FAIL may have left something behind
        db.enqueue(INSERT, (5,))
        db.enqueue("INSERT OR FAIL INTO t VALUES (6), (5)")
    db.flush()
    assert (db.stats().run_twice, db.stats().failed) == (5, 2)
    assert db.stats().retried == 0
    before = db.stats().lock_attempts
    with released_when_met(db, path):
        db.run(INSERT, (7,))
    stats = db.stats()
    assert stats.retried == 1
    assert stats.lock_attempts > before + 2
    assert 0 < stats.lock_wait < DEADLINE


def test_jobs_that_waited_for_the_lock_in_vain_are_counted_as_retried_too(path: Path) -> None:
    with DbWriter(path, lock_timeout=0.05) as db:
        db.run("CREATE TABLE t (n)")
        with holding_lock(path), pytest.raises(sqlite3.OperationalError):
            db.run("INSERT INTO t VALUES (1)")
        stats = db.stats()
    assert (stats.failed, stats.retried) == (1, 1)


def test_a_statement_without_transaction_that_met_a_lock_is_retried(db: DbWriter, path: Path) -> None:
    with released_when_met(db, path):
        db.run_without_transaction("VACUUM")
    assert db.stats().retried == 1
    assert db.stats().lock_wait > 0


def test_what_runs_and_what_waits_is_there(path: Path) -> None:
    with DbWriter(path, readers=1) as db:
        db.run(TABLE)
        with parked(db):
            db.enqueue(INSERT, (1,))
            stats = db.stats()
            assert stats.running is not None
            assert stats.running.label.endswith("park")
            assert stats.running.called_from.startswith("helpers.py:")
            assert 0 <= stats.running.seconds <= stats.oldest_age < DEADLINE
            assert stats.queue_depth == 1
        db.flush()
        assert db.stats().running is None
        with db.reader():
            waiter = threading.Thread(target=db.read, args=["SELECT 1"])
            waiter.start()
            eventually(lambda: db.stats().readers_waiting == 1)
            assert db.stats().readers_in_use == 1
        waiter.join(DEADLINE)
        assert (db.stats().readers_in_use, db.stats().readers_waiting) == (0, 0)


def test_a_job_that_waits_in_the_queue_has_an_age(db: DbWriter) -> None:
    with parked(db):
        eventually(lambda: db.stats().oldest_age > 0.01)
    db.flush()
    assert db.stats().oldest_age == 0.0


def test_the_wait_for_the_lock_is_there(db: DbWriter, path: Path) -> None:
    db.run(TABLE)
    with holding_lock(path):
        ticket = db.enqueue(INSERT, (1,), label="the waiting one")
        eventually(lambda: db.stats().waiting_for_lock is not None)
        waiting = db.stats().waiting_for_lock
        assert waiting is not None
        assert waiting.label == "the waiting one"
        assert db.stats().running is None
        assert db.stats().oldest_age > 0
    ticket.result(DEADLINE)
    assert db.stats().waiting_for_lock is None


def test_the_log_the_checkpoints_and_the_backups_are_there(path: Path) -> None:
    with DbWriter(path, auto_checkpoint=False) as db:
        db.run(TABLE)
        assert db.stats().wal_bytes == os.path.getsize(f"{path}-wal") > 0
        result = db.checkpoint()
        found = db.stats().last_checkpoint
        assert found is not None
        assert (found.busy, found.log, found.checkpointed) == tuple(result)
        assert db.stats().wal_bytes == 0
        db.backup(path.parent / "copy.db")
        ago = db.stats().last_backup_ago
        assert ago is not None
        assert 0 <= ago <= found.seconds_ago + DEADLINE
    assert db.stats().wal_bytes == 0


def test_as_dict_is_json(db: DbWriter) -> None:
    db.run(TABLE)
    db.checkpoint()
    with parked(db):
        found = json.loads(json.dumps(db.stats().as_dict()))
    assert found["committed"] == 1
    assert found["running"]["label"].endswith("park")
    assert found["last_checkpoint"]["busy"] is False
    assert found["run"]["buckets"][-1] == [50.0, 1]


def test_a_slow_job_is_in_the_health_while_it_runs(path: Path) -> None:
    with DbWriter(path, slow_after=0.01) as db:
        assert db.health == "ok"
        with parked(db):
            eventually(lambda: db.health != "ok")
            assert db.health.startswith("degraded: the writer is held by ")
            assert "park' (called from helpers.py:" in db.health
        db.flush()
        assert db.health == "ok"


def test_a_lock_held_elsewhere_is_in_the_health_while_it_is(path: Path) -> None:
    with DbWriter(path, slow_after=0.01) as db:
        db.run(TABLE)
        with holding_lock(path):
            ticket = db.enqueue(INSERT, (1,))
            eventually(lambda: db.health != "ok")
            assert "SQLite's lock, held elsewhere, to run 'INSERT INTO t VALUES (?)'" in db.health
        ticket.result(DEADLINE)
        assert db.health == "ok"


def test_a_queue_that_is_nearly_full_is_in_the_health_and_in_the_log_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with DbWriter(path, maxsize=20) as db:
        db.run(TABLE)
        with parked(db):
            for n in range(18):
                db.enqueue(INSERT, (n,))
            assert db.health == "ok"
            db.enqueue(INSERT, (18,))
            assert db.health == "degraded: the queue is nearly full: 19 of 20 jobs are queued"
            db.enqueue(INSERT, (19,))
            with pytest.raises(QueueFullError, match=r"20 of 20 jobs are queued; the writer is held by .*park"):
                db.enqueue(INSERT, (20,), timeout=0)
        db.flush()
        assert db.health == "ok"
        with parked(db):  # a moment later, it is not told again
            for n in range(20, 40):
                db.enqueue(INSERT, (n,))
            assert db.health.startswith("degraded")
        db.flush()
        assert db.stats().committed == 43
    told = warnings_of(caplog, "queue nearly full")
    assert len(told) == 1
    assert told[0].startswith("queue nearly full: 19 of 20 jobs are queued; the writer is held by ")


def test_a_log_handler_that_enqueues_neither_loops_nor_hangs(path: Path) -> None:
    class Audit(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(db.enqueue("INSERT INTO log VALUES (?)", (record.getMessage(),), timeout=DEADLINE))

    lines: list[Ticket[Any]] = []
    handler, logger = Audit(), logging.getLogger("onewriter")
    with DbWriter(path, maxsize=10, slow_after=0.0) as db:
        db.run(TABLE)
        db.run("CREATE TABLE log (text TEXT)")
        logger.addHandler(handler)
        try:
            for n in range(100):
                db.enqueue(INSERT, (n % 50,))  # the second half fails, which is logged
            db.flush()
        finally:
            logger.removeHandler(handler)
        db.flush()  # behind it the handler has been called for the last time
        db.flush()
        assert db.read_value("SELECT count(*) FROM t") == 50
        assert db.read_value("SELECT count(*) FROM log") == len(lines)
        assert any("UNIQUE" in str(line) or "failed" in line for (line,) in db.read("SELECT text FROM log"))


def test_a_log_that_readers_keep_from_shrinking_is_told_with_their_names(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with DbWriter(path, synchronous="OFF", wal_limit=200_000, slow_after=0.01) as db:
        db.run("CREATE TABLE t (b BLOB)")
        with db.reader(label="the long reader"), contextlib.closing(sqlite3.connect(path)) as other:
            other.execute("BEGIN")
            other.execute("SELECT count(*) FROM t").fetchone()
            while not warnings_of(caplog, "the log cannot be reset: "):
                db.run("INSERT INTO t VALUES (randomblob(3000))")
            assert db.health.startswith("degraded")
            assert "the WAL has grown to" in db.health
            assert "read by 'the long reader'" in db.health
            db.flush()  # behind it, the log is out
            told = warnings_of(caplog, "the log cannot be reset: ")
            assert len(told) == 1
            while len(told) < 2:  # again when it has doubled
                db.run("INSERT INTO t VALUES (randomblob(30000))")
                told = warnings_of(caplog, "the log cannot be reset: ")
        sizes = [int(text.split("grown to ")[1].split(" bytes")[0].replace(",", "")) for text in told]
        assert sizes[0] > 200_000
        assert sizes[1] >= 2 * sizes[0]
        db.run("INSERT INTO t VALUES (1)")
        eventually(lambda: db.health == "ok")
        assert os.path.getsize(f"{path}-wal") < 200_000


def test_a_reader_that_lets_the_log_grow_is_in_the_health_at_once_and_not_in_the_log(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with DbWriter(path, synchronous="OFF", wal_limit=200_000, slow_after=3600.0) as db:
        db.run("CREATE TABLE t (b BLOB)")
        with db.reader():
            while not db.health.startswith("degraded"):
                db.run("INSERT INTO t VALUES (randomblob(30000))")
            for _ in range(50):
                db.run("INSERT INTO t VALUES (randomblob(30000))")
            db.flush()
            assert warnings_of(caplog, "the log cannot be reset: ") == []


def test_a_gateway_out_of_service_says_why(db: DbWriter, path: Path) -> None:
    db.run(TABLE)
    path.rename(path.parent / "elsewhere.db")
    with pytest.raises(Exception, match="moved"):
        while True:
            db.run("INSERT INTO t VALUES (NULL)")
    assert db.health.startswith("broken: ")
    stats = db.stats()
    assert stats.failed == 1
    assert stats.queue_depth == 0


def test_all_of_it_is_taken_in_one_hold_of_the_lock(db: DbWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer changes the counts of a batch in one hold of it, so no snapshot has half of a batch."""
    held: list[bool] = []
    original = Histogram.latency

    def latency(self: Histogram) -> Any:
        held.append(state_of(db).lock._is_owned())  # type: ignore[attr-defined]
        return original(self)

    monkeypatch.setattr(Histogram, "latency", latency)
    db.stats()
    assert held == [True] * 3


def test_tasks_that_fill_the_queue_are_told_of_too(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def fill(db: DbWriter) -> None:
        shared = AsyncDbWriter.wrap(db)
        for n in range(9):
            await shared.enqueue_wait(INSERT, (n,))
            assert len(warnings_of(caplog, "queue nearly full")) == int(n == 8)

    with DbWriter(path, maxsize=10) as db:
        db.run(TABLE)
        with parked(db):
            asyncio.run(fill(db))
        assert db.stats().oldest_age >= 0


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_a_log_handler_that_raises_does_no_harm(
    path: Path, error: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise error("of the handler")

    handler, logger = Broken(), logging.getLogger("onewriter")
    with DbWriter(path) as db:
        db.run(TABLE)
        logger.addHandler(handler)
        try:
            db.enqueue("INSERT INTO nowhere VALUES (1)")
            db.flush()
        finally:
            logger.removeHandler(handler)
        db.run(INSERT, (1,))
        assert db.health == "ok"
    assert "of the handler" in capsys.readouterr().err


def test_only_what_was_committed_counts_as_a_commit(db: DbWriter) -> None:
    before = db.stats().commits
    db.run_without_transaction("VACUUM")
    assert db.stats().commits == before + 1
    with pytest.raises(sqlite3.OperationalError):
        db.run_without_transaction("VACUUM nowhere")
    with pytest.raises(sqlite3.OperationalError):
        db.run_without_transaction(lambda connection: connection.execute("VACUUM nowhere"))
    with pytest.raises(sqlite3.OperationalError):
        db.run("INSERT INTO nowhere VALUES (1)")
    assert db.stats().commits == before + 1


def test_each_slow_job_is_named_whatever_it_is(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    slow = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 30000) SELECT max(i) FROM n"
    with DbWriter(path, slow_after=0.0001) as db:
        for label in ("one", "two", "three"):
            db.run(slow, label=label)
        db.run(lambda tx: tx.execute(slow).rowcount, label="four")
    named = [message.split("'")[1] for message in caplog.messages if message.startswith("slow: the writer")]
    assert named == ["one", "two", "three", "four"]


@pytest.mark.parametrize("kind", ["on_commit", "a done callback", "on_error", "on_event"])
def test_callbacks_that_keep_the_writer_are_named_like_a_slow_job(
    path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    entered, release = threading.Event(), threading.Event()

    def block(about: object = None) -> None:
        if is_ready and not isinstance(about, JobSubmitted):  # which is told in the thread of the call
            entered.set()
            release.wait(DEADLINE)

    is_ready = False
    hooks: dict[str, Any] = {kind: block} if kind in ("on_error", "on_event") else {}
    with DbWriter(path, slow_after=0.01, **hooks) as db:
        db.run("SELECT 1")
        is_ready = True
        if kind == "on_commit":
            db.enqueue(lambda tx: tx.on_commit(block), label="slow")
        elif kind == "a done callback":
            with parked(db):
                db.enqueue("SELECT 1", label="slow").add_done_callback(block)
        elif kind == "on_error":
            db.enqueue("INSERT INTO nowhere VALUES (1)", label="slow")
        else:
            db.enqueue("SELECT 1")
        assert entered.wait(DEADLINE)
        eventually(lambda: db.health != "ok")
        named = "the writer calls on_event" if kind == "on_event" else "the writer calls the callbacks of 'slow'"
        assert db.health.startswith(f"degraded: {named}")
        release.set()
    assert any(message.startswith(f"slow: {named}") for message in caplog.messages)


@pytest.mark.parametrize("inline", [False, True])
def test_the_health_of_a_closed_gateway_is_that_it_is_closed(path: Path, inline: bool) -> None:
    db = DbWriter(path, inline=inline)
    assert db.health == "ok"
    db.close()
    assert db.health == "closed"


def test_slow_after_may_be_for_ever(path: Path) -> None:
    with DbWriter(path, slow_after=math.inf) as db:
        with db.reader():
            pass
        assert db.run("SELECT 1").rows == [(1,)]
        assert db.health == "ok"


def test_the_file_system_is_asked_without_a_lock(db: DbWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    lock: Any = state_of(db).lock
    held: list[bool] = []

    def size() -> int:
        held.append(lock._is_owned())
        return 7

    monkeypatch.setattr(file_of(db), "wal_bytes", size)
    assert db.stats().wal_bytes == 7
    assert held == [False]


def test_what_is_in_no_transaction_has_no_time_of_a_commit(db: DbWriter) -> None:
    before = db.stats().commit.count
    db.run_without_transaction("VACUUM")
    assert db.stats().commit.count == before
